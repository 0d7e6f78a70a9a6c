//! Links the hypervisor by its own linker script, and builds the programs that run in its guests: `$OUT_DIR/guest.bin`
//! and `caller.bin`, the bytes from `plimsoll_guest::abi::IMAGE_GPA` on, of which the first is the first instruction.
use plimsoll_inside::Program;
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or(io::ErrorKind::NotFound)?);
    let script = package.join("image.ld");
    println!("cargo::rerun-if-changed={}", script.display());
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());

    let guest = Program {
        package: "../../plimsoll-guest/image",
        binary: "plimsoll-guest-image",
        flags: "-Crelocation-model=static",
        sources: &[
            "../../plimsoll-guest/src",
            "../../plimsoll-guest/Cargo.toml",
            "../../plimsoll-guest/image/src",
            "../../plimsoll-guest/image/image.ld",
            "../../plimsoll-guest/image/build.rs",
            "../../plimsoll-guest/image/Cargo.toml",
            "../../plimsoll-guest/image/Cargo.lock",
        ],
    };
    let caller = Program {
        package: "../caller",
        binary: "plimsoll-metal-caller",
        flags: "-Crelocation-model=static",
        sources: &["../caller/src", "../caller/build.rs", "../caller/Cargo.toml", "../caller/Cargo.lock"],
    };
    guest.build("guest")?;
    caller.build("caller")?;
    flatten("guest")?;
    flatten("caller")
}

/// Makes of a guest program's ELF file what its segments look like in memory. objcopy comes with the linker.
fn flatten(name: &str) -> io::Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    let (elf, flat) = (out.join(name), out.join(name).with_extension("bin"));
    // e_entry of a 64-bit file. The linker script puts `_start` first, in the first segment.
    let entry = fs::read(&elf)?.get(24..32).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
    if entry != Some(0x20_0000) {
        return Err(io::Error::other(format!(
            "{name}'s first instruction is at {entry:x?}, not at 0x200000"
        )));
    }
    let status = Command::new("objcopy").args(["-O", "binary"]).arg(&elf).arg(&flat).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other("objcopy could not read a guest's program")) }
}
