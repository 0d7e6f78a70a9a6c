//! The bare-metal host, for who works on it: built, booted under QEMU with two guests, or stopped before its first instruction.
//!
//! Enters: what the command line said. Leaves: nothing but an error, because cargo takes this program's place.
use crate::cargo;
use anyhow::{Context, Result};
use std::convert::Infallible;
use std::os::unix::process::CommandExt;

/// How.
#[derive(clap::Args)]
pub(crate) struct Choice {
    /// Wait for a debugger: gdb SYMBOLS -ex 'target remote :1234', where the first line says what SYMBOLS are.
    #[arg(long)]
    gdb: bool,
    /// Further arguments of QEMU's.
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Becomes it.
pub(crate) fn run(choice: &Choice) -> Result<Infallible> {
    let mut command = cargo::cargo();
    command.args(["run", "--quiet", "--locked", "--package", "plimsoll-metal", "--example", "boot", "--"]);
    command.args(choice.gdb.then_some(["-s", "-S"]).into_iter().flatten()).args(&choice.arguments);
    Err(command.exec()).context("cannot start cargo")
}
