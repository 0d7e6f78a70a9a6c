//! Benchmarks: `crates/plimsoll-bench`, built for speed and then run.
//!
//! Enters: what the command line said. Leaves: nothing but an error, because the benchmark's program takes this one's
//! place. So signals reach it, which has devices to remove, and its exit status is what the caller sees. `mmu` is none of its: it counts
//! instructions of a program of its own ([`count`]).
use crate::{cargo, count};
use anyhow::Result;

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

/// Counts, or builds the other benchmarks and becomes them.
pub(crate) fn run(choice: &Choice) -> Result<()> {
    match (choice.list, choice.name.as_deref()) {
        (false, Some("mmu")) => return count::run(choice.rows.as_deref().unwrap_or_default()),
        (false, None) if choice.rows.is_none() => count::run("")?,
        (true, _) => {
            println!("{:<8} instructions of the page-table mapper and of walks, against other crates'", "mmu")
        }
        _ => {}
    }
    let never = cargo::become_program(PACKAGE, |command, target| {
        command.arg("--out").arg(target.join("bench"));
        command.args(choice.list.then_some("--list")).args(&choice.name);
        if let Some(prefix) = &choice.rows {
            command.arg("--rows").arg(prefix);
        }
    })?;
    match never {}
}
