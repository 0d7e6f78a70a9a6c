//! Benchmarks against the kernel's own mechanisms, started by `cargo xtask bench`.
//!
//! Enters: the name of a benchmark and where its JSON goes. Leaves: named ratios on standard output and the JSON
//! (`docs/bench.md`). Exit status 0: measured; 1: something went wrong; 2: it cannot be measured on this machine, and the
//! message says why. What must never happen: a device, mapping or swap area left behind.
//!
//! `store`: the store against zram. `pager`: the pager against zram and a bare userfaultfd loop, with guests that are this
//! program again in another role (`guest`). `balloon`: three ways to take memory that a guest has free. `cost`: what a guest
//! pays that any of its memory is taken. `ksm`: guided KSM against KSM over everything. `attach`: machines managed from outside.
//! `density`: many guests in little memory. `disk`: reads of the disk tier. `mmu`: instructions of page-table work against other crates'. `swap`: the peer's device.
//! `session`: signals and clocks. `figures`: the arithmetic. `report`: what is said.
mod attach;
mod balloon;
mod contents;
mod cost;
mod density;
mod disk;
mod figures;
mod guest;
mod ksm;
mod mmu;
mod pager;
mod report;
mod session;
mod store;
mod swap;

use anyhow::{Context, anyhow};
use clap::{Parser, ValueEnum};
use report::Report;
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    Mmu,
    Store,
    Pager,
    Ksm,
    Attach,
    Balloon,
    Cost,
    Density,
    Disk,
}

impl Name {
    const fn text(self) -> &'static str {
        match self {
            Self::Mmu => "mmu",
            Self::Store => "store",
            Self::Pager => "pager",
            Self::Ksm => "ksm",
            Self::Attach => "attach",
            Self::Balloon => "balloon",
            Self::Cost => "cost",
            Self::Density => "density",
            Self::Disk => "disk",
        }
    }

    const fn about(self) -> &'static str {
        match self {
            Self::Mmu => "instructions of the page-table mapper and of walks, against other crates'",
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
            Self::Disk => {
                "pages of the disk tier read by io_uring and by threads, against one read at a time"
            }
        }
    }

    /// Measures the rows whose names begin so. What is for others to read beside the report goes into the folder.
    fn measure(self, rows: &str, folder: &Path, interrupt: &Interrupt) -> Result<Report, BenchError> {
        match self {
            Self::Mmu => mmu::run(rows, interrupt),
            Self::Store => store::run(rows, interrupt),
            Self::Ksm => ksm::run(rows, interrupt),
            Self::Attach => attach::run(rows, interrupt),
            Self::Pager => pager::run(rows, interrupt),
            Self::Balloon => balloon::run(rows, interrupt),
            Self::Cost => cost::run(rows, folder, interrupt),
            Self::Density => density::run(rows, folder, interrupt),
            Self::Disk => disk::run(rows, folder, interrupt),
        }
    }
}

/// A line for each benchmark: its name, and what it compares.
fn list() -> String {
    Name::value_variants().iter().map(|name| format!("{:<8} {}\n", name.text(), name.about())).collect()
}

fn main() -> ExitCode {
    if let Some(status) = guest::role().or_else(ksm::role).or_else(attach::role) {
        return status;
    }
    let arguments = Arguments::parse();
    if arguments.list {
        print!("{}", list());
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
    let mut measured = false;
    for name in chosen {
        let report = name.measure(rows, folder, &interrupt)?;
        // What an earlier run has written is not replaced by nothing.
        if !report.is_empty() {
            let path = report.write(folder, name.text())?;
            println!("written to {}", path.display());
            measured = true;
        }
    }
    if !measured {
        return Err(anyhow!("no row begins with {rows:?}: docs/bench.md names them").into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn listed() -> Vec<String> {
        list().lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_list_names_exactly_the_benchmarks_that_can_be_run() {
        let command = Arguments::command();
        let taken = command.get_arguments().find(|argument| argument.get_id() == "name").unwrap();
        let taken: Vec<_> =
            taken.get_possible_values().iter().map(|name| name.get_name().to_owned()).collect();
        assert_eq!(listed(), taken);
        for (name, variant) in listed().iter().zip(Name::value_variants()) {
            let arguments = Arguments::try_parse_from(["bench", name]).unwrap();
            assert_eq!(arguments.name, Some(*variant));
        }
        assert!(Arguments::try_parse_from(["bench", "stor"]).is_err());
    }

    #[test]
    fn the_book_has_a_section_for_each_benchmark_of_the_list_and_for_no_other() {
        let book = include_str!("../../../docs/bench.md");
        let mut sections: Vec<_> = book
            .lines()
            .filter_map(|line| Some(line.strip_prefix("## `")?.strip_suffix('`')?.to_owned()))
            .collect();
        let mut listed = listed();
        sections.sort();
        listed.sort();
        assert_eq!(sections, listed);
    }
}
