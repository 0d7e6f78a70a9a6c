//! `plimsoll share` over stock guests whose QEMUs offer their memory to KSM, as they do by default.
use crate::manager::{PATIENCE, alone, bytes, can, sweep};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::Value;
use std::process::Output;

/// `plimsoll share` with these words.
pub(crate) fn share(words: &[&str]) -> Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_plimsoll")).arg("share").args(words).output().unwrap()
}

fn process(guest: &Guest) -> String {
    guest.process().get().to_string()
}

#[test]
fn equal_pages_of_two_guests_are_kept_once_and_a_third_that_was_not_named_prevents_it() {
    const SECONDS: &str = "30";
    if !can(&["qemu", "cloud-kernel", "root", "ksm"]) {
        return;
    }
    let _alone = alone();
    let mut options = Options::new(ByteCount::mib(192));
    options.seed = 61;
    options.work = vec![Command::Alloc { pages: 10_000 }];
    let mut guests = [Guest::start(options.clone()).unwrap(), Guest::start(options.clone()).unwrap()];
    let [one, other] = guests.each_ref().map(process);

    let third = Guest::start(options).unwrap();
    let output = share(&[&one, &other, "--seconds", "5"]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{words}");
    assert!(words.contains(&process(&third)), "{words}");
    drop(third);

    let output = share(&[&one, &other, "--seconds", SECONDS, "--json"]);
    let (text, words) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{words}");
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    println!("{last}");
    // The 39 MiB that they fill alike, less what of it is random or merged with itself; and their kernels' own.
    assert!(bytes(&last, "merged_bytes") > 24 << 20, "{text}");
    assert_eq!(last["machines"].as_array().unwrap().len(), 2);
    for guest in &mut guests {
        sweep(guest);
        assert_eq!(guest.console().report(PATIENCE).unwrap().wrong, 0);
    }
    let run = std::fs::read_to_string("/sys/kernel/mm/ksm/run").unwrap();
    assert_ne!(run.trim(), "1", "KSM was left running");
}
