//! Builds the guests' first process and leaves it as `$OUT_DIR/init` for `src/initramfs.rs` to embed.
//!
//! It is another workspace with another profile, linked statically, so another cargo builds it. What the outer build was
//! told about compilers, wrappers and flags must not reach it: `cargo clippy` names a wrapper that produces no code, and a
//! `target-cpu=native` would put instructions into the guest that its emulated processor may lack.
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
    let package = folder("CARGO_MANIFEST_DIR")?;
    let out = folder("OUT_DIR")?;
    for file in [
        "src/protocol.rs",
        "init/src",
        "init/Cargo.toml",
        "init/Cargo.lock",
        "../plimsoll-guest/src",
        "../plimsoll-guest/Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={}", package.join(file).display());
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
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    cargo.args(["build", "--release", "--locked", "--target", TARGET, "--manifest-path"]);
    cargo.arg(package.join("init/Cargo.toml")).arg("--target-dir").arg(&target_dir);
    if !cargo.status()?.success() {
        return Err(io::Error::other("the guests' first process did not build; its messages are above"));
    }
    fs::copy(target_dir.join(TARGET).join("release/plimsoll-stock-init"), out.join("init"))?;
    Ok(())
}
