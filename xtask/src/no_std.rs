//! The rooms below the line, linked whole without std and without an operating system.
//!
//! Enters: their libraries. Leaves: nothing, or the reason why they need more than `core` and `alloc`. No bare-metal
//! target is installed on ordinary machines, so the proof is made on the host's:
//!
//! 1. A crate that brings its own panic handler depends on all of them. If any crate of the graph used std, there would be
//!    two handlers, and rustc refuses that.
//! 2. The static library that comes out holds every object of every crate. It is linked whole, with neither C library nor
//!    start-up code, so a call of anything an operating system provides is an undefined symbol.
//!
//! It is a workspace of its own: dependencies' features are those the rooms ask for, not those that others add.
use crate::cargo::{self, TARGET};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// Crates that DESIGN keeps free of std.
pub(crate) const ROOMS: [&str; 6] = [
    "plimsoll-types",
    "plimsoll-mmu",
    "plimsoll-core",
    "plimsoll-policy",
    "plimsoll-store",
    "plimsoll-guest",
];

const SOURCE: &str = include_str!("no_std/library.rs.in");

/// Builds and links the check below `target`; what is printed goes to `log`.
pub(crate) fn check(target: &Path, log: &File) -> Result<()> {
    let folder = target.join("no_std_check");
    fs::create_dir_all(folder.join("src")).context("cannot make the folder of the no_std check")?;
    write(&folder.join("Cargo.toml"), &manifest())?;
    write(&folder.join("src/lib.rs"), &source())?;
    // The same versions as everywhere else. Cargo leaves out those that are not needed.
    let lock = fs::read_to_string(cargo::root().join("Cargo.lock")).context("cannot read Cargo.lock")?;
    write(&folder.join("Cargo.lock"), &lock)?;

    let build = folder.join("target");
    let mut command = cargo::cargo();
    // Set rather than removed: it outranks every configuration file.
    command.env("CARGO_ENCODED_RUSTFLAGS", "").env_remove("RUSTFLAGS");
    command.args(["build", "--target", TARGET, "--manifest-path"]).arg(folder.join("Cargo.toml"));
    command.arg("--target-dir").arg(&build);
    finish(&mut command, log)?;

    let mut link = Command::new("cc");
    link.args(["-static", "-nostdlib", "-nostartfiles", "-Wl,--whole-archive"]);
    link.arg(build.join(TARGET).join("debug/libno_std_check.a"));
    link.args(["-Wl,--no-whole-archive", "-o"]).arg(build.join("no_std_check"));
    finish(&mut link, log)
}

/// Writes only what changed, so that cargo does not build anew.
fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn finish(command: &mut Command, log: &File) -> Result<()> {
    let status = command.stdout(log.try_clone()?).stderr(log.try_clone()?).status();
    let status = status.with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}

fn manifest() -> String {
    let mut text = String::from(
        "[workspace]\n[package]\nname = \"no_std_check\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\
         [lib]\ncrate-type = [\"staticlib\"]\n[profile.dev]\npanic = \"abort\"\n[dependencies]\n",
    );
    for room in ROOMS {
        let path = cargo::root().join("crates").join(room);
        text.push_str(&format!("{room} = {{ path = {:?} }}\n", path.display().to_string()));
    }
    text
}

fn source() -> String {
    let memory = cargo::root().join("crates/plimsoll-guest/image/src/mem.rs");
    let uses: String = ROOMS.iter().map(|room| format!("use {} as _;\n", room.replace('-', "_"))).collect();
    SOURCE.replace("@MEMORY@", &memory.display().to_string()).replace("@USES@", &uses)
}
