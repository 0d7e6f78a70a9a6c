//! Benchmarks against the kernel's own mechanisms, started by `cargo xtask bench`.
//!
//! Enters: the name of a benchmark and where its JSON goes. Leaves: named ratios on standard output and the JSON
//! (`docs/bench.md`). Exit status 0: measured; 1: something went wrong; 2: it cannot be measured on this machine, and the
//! message says why. What must never happen: a device, mapping or swap area left behind.
//!
//! `store`: the store against zram. `pager`: the pager against zram and a bare userfaultfd loop, with guests that are this
//! program again in another role (`guest`). `balloon`: three ways to take memory that a guest has free. `cost`: what a guest
//! pays that any of its memory is taken. `ksm`: guided KSM against KSM over everything. `attach`: machines managed from outside.
//! `density`: many guests in little memory. `swap`: the peer's device. `session`: signals and clocks. `figures`: the
//! arithmetic. `report`: what is said.
mod attach;
mod balloon;
mod contents;
mod cost;
mod density;
mod figures;
mod guest;
mod ksm;
mod pager;
mod report;
mod session;
mod store;
mod swap;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use session::{BenchError, Interrupt, OnlyOne};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Compare plimsoll with the kernel's own mechanisms.
#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    /// The benchmark; all of them when none is named.
    name: Option<Name>,
    /// Say which benchmarks there are, and run none.
    #[arg(long)]
    list: bool,
    /// Only rows whose names begin so.
    #[arg(long, default_value = "", value_name = "PREFIX")]
    rows: String,
    /// The folder for NAME.json.
    #[arg(long, default_value = "target/bench", hide = true)]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    Store,
    Pager,
    Ksm,
    Attach,
    Balloon,
    Cost,
    Density,
}

impl Name {
    const fn text(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Pager => "pager",
            Self::Ksm => "ksm",
            Self::Attach => "attach",
            Self::Balloon => "balloon",
            Self::Cost => "cost",
            Self::Density => "density",
        }
    }

    const fn about(self) -> &'static str {
        match self {
            Self::Store => {
                "pages into the store and back, and what they cost, against MADV_PAGEOUT to zram (lz4)"
            }
            Self::Ksm => "a merged page's processor time, KSM guided to twins against KSM over everything",
            Self::Attach => {
                "machines managed from outside: attaching, taking, following, believing, against the least that could do it"
            }
            Self::Pager => {
                "KVM guests' pages out and back, against MADV_PAGEOUT to zram (lz4) and a bare userfaultfd loop"
            }
            Self::Balloon => {
                "a guest's free memory by a balloon of 2 MiB and by the allocator it shares, against a balloon of 4 KiB"
            }
            Self::Cost => {
                "a guest's operations with 10 to 60 % of its memory taken, by balloon, kernel and pager, against all of it"
            }
            Self::Density => {
                "the same guests in the same memory: plimsoll, the kernel alone, a balloon loop, enough memory"
            }
        }
    }
}

fn main() -> ExitCode {
    if let Some(status) = guest::role().or_else(ksm::role).or_else(attach::role) {
        return status;
    }
    let arguments = Arguments::parse();
    if arguments.list {
        Name::value_variants().iter().for_each(|name| println!("{:<8} {}", name.text(), name.about()));
        return ExitCode::SUCCESS;
    }
    let chosen = arguments.name.map_or_else(|| Name::value_variants().to_vec(), |name| vec![name]);
    match run(&chosen, &arguments.rows, &arguments.out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = if matches!(error, BenchError::NotHere(_)) { 2 } else { 1 };
            eprintln!("error: {:#}", anyhow::Error::from(error));
            ExitCode::from(status)
        }
    }
}

fn run(chosen: &[Name], rows: &str, folder: &Path) -> Result<(), BenchError> {
    let _only = OnlyOne::here()?;
    let interrupt = Interrupt::install()?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for name in chosen {
        let report = match name {
            Name::Store => serde_json::to_string_pretty(&store::run(rows, &interrupt)?),
            Name::Ksm => serde_json::to_string_pretty(&ksm::run(rows, &interrupt)?),
            Name::Attach => serde_json::to_string_pretty(&attach::run(rows, &interrupt)?),
            Name::Pager => serde_json::to_string_pretty(&pager::run(rows, &interrupt)?),
            Name::Balloon => serde_json::to_string_pretty(&balloon::run(rows, &interrupt)?),
            Name::Cost => serde_json::to_string_pretty(&cost::run(rows, folder, &interrupt)?),
            Name::Density => serde_json::to_string_pretty(&density::run(rows, folder, &interrupt)?),
        };
        let path = folder.join(format!("{}.json", name.text()));
        let text = report.context("cannot write the report as JSON")?;
        fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        println!("written to {}", path.display());
    }
    Ok(())
}
