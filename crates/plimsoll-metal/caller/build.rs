//! Links the program as the other guest program is, by that one's linker script.
use std::{env, io, path::PathBuf};

fn main() -> io::Result<()> {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or(io::ErrorKind::NotFound)?);
    let script = package.join("../../plimsoll-guest/image/image.ld");
    println!("cargo::rerun-if-changed={}", script.display());
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());
    Ok(())
}
