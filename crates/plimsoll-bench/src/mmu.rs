//! The instructions of work on page tables, ours against the peers' (`docs/bench.md`, `mmu`).
//!
//! Enters: the example `count` of `plimsoll-mmu`, which `cargo xtask bench` has built beside this program. Leaves: named ratios. Each
//! number is one run of the example, counted by valgrind's callgrind: the same every time, whatever else the machine does, so one run
//! says all. What must never happen: a number of work that was not done; the example checks it, and its exit status is looked at.
use crate::figures::float;
use crate::report::{Comparison, Machine, Report, lower};
use crate::session::{BenchError, Interrupt};
use anyhow::{Context, Result, ensure};
use plimsoll_types::ByteCount;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What each run maps, unmaps or walks.
const BYTES: ByteCount = ByteCount(1 << 30);

const NOTES: [&str; 1] = ["instructions are not time: caches, TLB and branches are not in them"];

/// What a number is of.
#[derive(Clone, Copy)]
enum Each {
    Page,
    /// The example says how many there were.
    Reference,
}

/// Who does the work, by the example's names.
struct Sides {
    ours: &'static str,
    peer: &'static str,
    each: Each,
}

const X86: Sides = Sides { ours: "ours-x86", peer: "x86_64", each: Each::Page };
const ARM: Sides = Sides { ours: "ours-arm", peer: "aarch64-paging", each: Each::Page };
const STAGES: Sides = Sides { ours: "ours-two-stages", peer: "ours-one-stage", each: Each::Reference };

/// What is compared.
struct Row {
    name: &'static str,
    sides: Sides,
    work: &'static str,
    pages: &'static str,
    /// What the ratio must reach; none where the peer does less.
    goal: Option<f64>,
}

const fn row(
    name: &'static str,
    sides: Sides,
    (work, pages): (&'static str, &'static str),
    goal: Option<f64>,
) -> Row {
    Row { name, sides, work, pages, goal }
}

const ROWS: [Row; 26] = [
    row("map/x86/4KiB", X86, ("map", "4KiB"), Some(1.0)),
    row("map/x86/2MiB", X86, ("map", "2MiB"), Some(1.0)),
    row("map/arm/4KiB", ARM, ("map", "4KiB"), Some(1.0)),
    row("map/arm/2MiB", ARM, ("map", "2MiB"), Some(1.0)),
    row("unmap/x86/4KiB", X86, ("unmap", "4KiB"), Some(1.0)),
    row("unmap/x86/2MiB", X86, ("unmap", "2MiB"), Some(1.0)),
    row("unmap/arm/4KiB", ARM, ("unmap", "4KiB"), None),
    row("unmap/arm/2MiB", ARM, ("unmap", "2MiB"), Some(1.0)),
    row("walk/x86/4KiB", X86, ("walk", "4KiB"), Some(1.0)),
    row("walk/x86/2MiB", X86, ("walk", "2MiB"), Some(1.0)),
    row("walk/arm/4KiB", ARM, ("walk", "4KiB"), Some(1.0)),
    row("walk/arm/2MiB", ARM, ("walk", "2MiB"), Some(1.0)),
    row("walk-rights/x86/4KiB", X86, ("walk-rights", "4KiB"), None),
    row("walk-rights/x86/2MiB", X86, ("walk-rights", "2MiB"), None),
    row("walk-rights/arm/4KiB", ARM, ("walk-rights", "4KiB"), None),
    row("walk-rights/arm/2MiB", ARM, ("walk-rights", "2MiB"), None),
    row("look-up/x86/4KiB", X86, ("look-up", "4KiB"), Some(1.0)),
    row("look-up/x86/2MiB", X86, ("look-up", "2MiB"), Some(1.0)),
    row("look-up/arm/4KiB", ARM, ("look-up", "4KiB"), Some(1.0)),
    row("look-up/arm/2MiB", ARM, ("look-up", "2MiB"), Some(1.0)),
    row("look-up-rights/x86/4KiB", X86, ("look-up-rights", "4KiB"), None),
    row("look-up-rights/x86/2MiB", X86, ("look-up-rights", "2MiB"), None),
    row("look-up-rights/arm/4KiB", ARM, ("look-up-rights", "4KiB"), None),
    row("look-up-rights/arm/2MiB", ARM, ("look-up-rights", "2MiB"), None),
    row("two-stages/4KiB", STAGES, ("look-up", "4KiB"), Some(1.2)),
    row("two-stages/2MiB", STAGES, ("look-up", "2MiB"), Some(1.2)),
];

/// What to repeat the benchmark with.
#[derive(Serialize)]
struct Settings {
    bytes: u64,
    valgrind: String,
}

/// Counts the rows whose names begin so.
pub(crate) fn run(prefix: &str, interrupt: &Interrupt) -> Result<Report, BenchError> {
    let (valgrind, example) = (valgrind()?, example()?);
    let machine = Machine::here();
    println!("instructions of page-table work on {BYTES}, by callgrind of {valgrind}: one run each");
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let mut results = Vec::new();
    for row in ROWS.iter().filter(|row| row.name.starts_with(prefix)) {
        interrupt.check()?;
        let [ours, peer] = [row.sides.ours, row.sides.peer].map(|who| count(&example, who, row));
        let comparison = row.compare(ours?, peer?)?;
        println!("  {comparison}");
        results.push(comparison);
    }
    Ok(Report::new(machine, &Settings { bytes: BYTES.0, valgrind }, &NOTES, results)?)
}

/// Which valgrind there is.
fn valgrind() -> Result<String, BenchError> {
    let found = Command::new("valgrind").arg("--version").output();
    let found = found.map_err(|error| {
        BenchError::NotHere(format!("valgrind does not start ({error}): `cargo xtask setup` installs it"))
    })?;
    Ok(String::from_utf8_lossy(&found.stdout).trim().to_owned())
}

/// The example, where cargo puts it: below this program's folder.
fn example() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find out where this program is")?;
    let example = program.with_file_name("examples").join("count");
    ensure!(example.exists(), "{} is not built: start this as `cargo xtask bench mmu`", example.display());
    Ok(example)
}

impl Row {
    const fn unit(&self) -> &'static str {
        match self.sides.each {
            Each::Page => "instructions/page",
            Each::Reference => "instructions/reference",
        }
    }

    fn compare(&self, ours: f64, peer: f64) -> Result<Comparison> {
        Comparison::exact(lower(self.name, self.unit(), self.goal), ours, peer)
    }

    /// Instructions for each page or reference, by what the example and callgrind said.
    fn each(&self, said: &str, counted: &str) -> Result<f64> {
        let instructions = number(counted, "Collected").filter(|count| *count > 0.0);
        let instructions = instructions.with_context(|| format!("callgrind counted nothing:\n{counted}"))?;
        let among = match self.sides.each {
            Each::Page => float(BYTES.0 / if self.pages == "4KiB" { 4 << 10 } else { 2 << 20 }),
            Each::Reference => number(said, "references")
                .with_context(|| format!("the example does not say its references:\n{said}"))?,
        };
        Ok(instructions / among)
    }
}

/// Runs one piece of work under callgrind, which counts in the function `measured` and what it calls.
fn count(example: &Path, who: &str, row: &Row) -> Result<f64> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]);
    command.arg("--toggle-collect=count::measured*").arg(example).args([who, row.work, row.pages]);
    let output = command.output().context("cannot start valgrind")?;
    let [said, counted] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    ensure!(output.status.success(), "{command:?} failed: {}\n{counted}", output.status);
    row.each(&said, &counted)
}

/// The number that stands after a word, and a colon where there is one.
fn number(text: &str, word: &str) -> Option<f64> {
    let (_, rest) = text.lines().find_map(|line| line.split_once(word))?;
    rest.trim_start_matches([' ', ':']).split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::check_row;

    const COUNTED: &str =
        "==7== Events    : Ir\n==7== Collected : 6553600\n==7== \n==7== I   refs:      6,553,600\n";

    fn named(name: &str) -> &'static Row {
        ROWS.iter().find(|row| row.name == name).unwrap()
    }

    #[test]
    fn what_callgrind_collected_is_divided_by_pages_or_by_references_the_example_made() {
        let each = |name, said| named(name).each(said, COUNTED).unwrap();
        assert!((each("map/x86/4KiB", "") - 25.0).abs() < 1e-9);
        assert!((each("walk/arm/2MiB", "references 7\n") - 12_800.0).abs() < 1e-9);
        assert!((each("two-stages/2MiB", "references 65536\n") - 100.0).abs() < 1e-9);
    }

    #[test]
    fn nothing_counted_and_nothing_said_is_an_error_and_no_number() {
        let none = COUNTED.replace("6553600", "0");
        assert!(named("map/x86/4KiB").each("", &none).unwrap_err().to_string().contains("counted nothing"));
        assert!(named("map/x86/4KiB").each("", "valgrind: no such tool").is_err());
        let error = named("two-stages/4KiB").each("", COUNTED).unwrap_err().to_string();
        assert!(error.contains("references"), "{error}");
    }

    #[test]
    fn every_row_has_the_fields_of_a_measured_one_with_a_spread_of_nothing_and_one_run() {
        for row in &ROWS {
            let json = serde_json::to_value(row.compare(25.0, 190.5).unwrap()).unwrap();
            check_row(&json);
            assert_eq!((&json["spread"], &json["better"]), (&0.0.into(), &"lower".into()), "{}", row.name);
            assert_eq!(json["runs"].as_array().map(Vec::len), Some(1), "{}", row.name);
            assert_eq!(json["goal"], serde_json::json!(row.goal));
        }
    }
}
