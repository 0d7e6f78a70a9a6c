//! What tests need and a fresh Debian 12 with a Rust toolchain lacks.
//!
//! Enters: a table. Leaves: a machine on which every program of the table is there. Nothing is asked of the network when
//! nothing is missing.
use anyhow::{Result, bail};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

/// A Debian package that some test needs.
struct Need {
    package: &'static str,
    /// A program of the package: it is installed when this is found.
    program: &'static str,
    why: &'static str,
}

/// Levels 0 and 1 make their guests, control groups and swap devices themselves, so they need hardly anything.
const NEEDS: &[Need] =
    &[Need { package: "gcc", program: "cc", why: "links the rooms below the line without std" }];

/// True for root.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// Installs what is missing.
pub(crate) fn run() -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|need| !is_there(need.program)).collect();
    if missing.is_empty() {
        println!("setup: nothing is missing");
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    for need in &missing {
        println!("setup: {} is missing ({})", need.package, need.why);
    }
    if !is_root() || !is_there("apt-get") {
        bail!("install {} and try again; on Debian, as root, this is done for you", packages.join(" "));
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    crate::cargo::run(apt().args(["update", "-q"]))?;
    crate::cargo::run(apt().args(["install", "-qy", "--no-install-recommends"]).args(&packages))?;
    match missing.iter().find(|need| !is_there(need.program)) {
        Some(need) => bail!("{} is installed and {} is still not found", need.package, need.program),
        None => Ok(()),
    }
}
