//! Benchmarks: `crates/plimsoll-bench`, built for speed and then run.
//!
//! Enters: what the command line said. Leaves: nothing but an error, because the benchmark's program takes this one's
//! place. So signals reach it, which has devices to remove, and its exit status is what the caller sees. It knows which benchmarks there
//! are. Only `mmu` is known here, too: it counts the instructions of a program that has to be built besides.
use crate::cargo::{self, cargo};
use anyhow::Result;
use std::convert::Infallible;

/// The package, and the program in it.
const PACKAGE: &str = "plimsoll-bench";

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Choice {
    /// The benchmark; all of them when none is named.
    name: Option<String>,
    /// Say which benchmarks there are, and run none.
    #[arg(long)]
    list: bool,
    /// Only rows whose names begin so.
    #[arg(long, value_name = "PREFIX")]
    rows: Option<String>,
}

/// Builds the benchmarks and becomes them.
pub(crate) fn run(choice: &Choice) -> Result<Infallible> {
    if !choice.list && choice.name.as_deref().is_none_or(|name| name == "mmu") {
        // By itself: what others of the workspace ask of shared dependencies must not be in what is counted.
        let counted = ["--package", "plimsoll-mmu", "--example", "count"];
        cargo::run(cargo().args(["build", "--quiet", "--release", "--locked"]).args(counted))?;
    }
    cargo::become_program(PACKAGE, |command, target| {
        command.arg("--out").arg(target.join("bench"));
        command.args(choice.list.then_some("--list")).args(&choice.name);
        if let Some(prefix) = &choice.rows {
            command.arg("--rows").arg(prefix);
        }
    })
}
