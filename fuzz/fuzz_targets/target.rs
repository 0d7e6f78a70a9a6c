//! Every target of plimsoll-fuzz for libFuzzer: this file once for each, which is the one that the program is called.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let target =
        plimsoll_fuzz::target(env!("CARGO_BIN_NAME")).expect("Cargo.toml names targets of plimsoll-fuzz");
    (target.body)(bytes);
});
