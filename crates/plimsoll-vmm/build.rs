//! Builds the freestanding guest image and leaves it as `$OUT_DIR/guest-image` for `src/boot.rs` to embed.
//!
//! The image is another workspace with another profile, so another cargo builds it. What the outer build was told about
//! compilers, wrappers and flags must not reach it: `cargo clippy` names a wrapper that produces no code, and a
//! `target-cpu=native` would put instructions into the guest that its control registers forbid.
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs, io};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const REMOVED: [&str; 9] = [
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
];
const REMOVED_PREFIXES: [&str; 3] =
    ["CARGO_PROFILE_", "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_", "CARGO_FEATURE_"];

fn folder(variable: &str) -> io::Result<PathBuf> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, format!("cargo did not set {variable}"));
    env::var_os(variable).map(PathBuf::from).ok_or_else(missing)
}

fn main() -> io::Result<()> {
    let guest = folder("CARGO_MANIFEST_DIR")?.join("../plimsoll-guest");
    let out = folder("OUT_DIR")?;
    for file in ["src", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", guest.join(file).display());
    }
    for file in ["src", "image.ld", "build.rs", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", guest.join("image").join(file).display());
    }
    let target_dir = out.join("guest");
    let mut cargo = Command::new(folder("CARGO")?);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if REMOVED.contains(&&*text) || REMOVED_PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            cargo.env_remove(&name);
        }
    }
    // Set rather than removed: it outranks every configuration file.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Crelocation-model=static");
    cargo.args(["build", "--release", "--locked", "--target", TARGET, "--manifest-path"]);
    cargo.arg(guest.join("image/Cargo.toml")).arg("--target-dir").arg(&target_dir);
    if !cargo.status()?.success() {
        return Err(io::Error::other("the guest image did not build; its messages are above"));
    }
    fs::copy(target_dir.join(TARGET).join("release/plimsoll-guest-image"), out.join("guest-image"))?;
    Ok(())
}
