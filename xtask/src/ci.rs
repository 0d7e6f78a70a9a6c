//! What a change must satisfy besides the tests.
//!
//! Enters: the workspace. Leaves: a line for each check with the time it took. All checks run, so that one run shows
//! everything there is to mend; an error leaves if any failed.
use crate::cargo::{self, TARGET, cargo};
use crate::lints;
use anyhow::{Result, bail};
use std::process::Command;
use std::time::Instant;

/// A check's name and what runs it.
type Check = (&'static str, fn() -> Result<()>);

/// Cheapest first.
const CHECKS: [Check; 6] = [
    ("house rules", house_rules),
    ("format", format),
    ("format inside guests", inside_format),
    ("clippy inside guests", inside_clippy),
    ("clippy", clippy),
    ("documentation", documentation),
];

/// Runs all checks.
pub(crate) fn run() -> Result<()> {
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        let start = Instant::now();
        let outcome = check();
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("{name:<28} {word}  {:.1} s", start.elapsed().as_secs_f64());
        if let Err(error) = outcome {
            println!("{error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn house_rules() -> Result<()> {
    let violations = lints::check()?;
    for violation in &violations {
        println!("{violation}");
    }
    if !violations.is_empty() {
        bail!("{} violations of the house rules, see CONTRIBUTING.md", violations.len());
    }
    Ok(())
}

fn format() -> Result<()> {
    cargo::run(cargo().args(["fmt", "--all", "--check"]))
}

fn inside_format() -> Result<()> {
    for (manifest, _) in lints::INSIDE {
        cargo::run(cargo().args(["fmt", "--check", "--manifest-path", manifest]))?;
    }
    Ok(())
}

fn clippy() -> Result<()> {
    let mut command = cargo();
    command.args(["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    cargo::run(&mut command)
}

fn inside_clippy() -> Result<()> {
    let target = cargo::metadata(&cargo::root().join("Cargo.toml"))?.target_directory;
    for (manifest, flags) in lints::INSIDE {
        let mut command: Command = cargo();
        command.env("CARGO_ENCODED_RUSTFLAGS", flags).env_remove("RUSTFLAGS");
        command.args(["clippy", "--quiet", "--release", "--locked", "--target", TARGET]);
        command.args(["--manifest-path", manifest, "--target-dir"]).arg(target.join("inside-guests"));
        cargo::run(command.args(["--", "-D", "warnings"]))?;
    }
    Ok(())
}

fn documentation() -> Result<()> {
    let mut command = cargo();
    command.env("RUSTDOCFLAGS", "-D warnings");
    command.args(["doc", "--quiet", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
    cargo::run(&mut command)
}
