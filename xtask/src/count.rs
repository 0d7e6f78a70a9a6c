//! The instructions of work on page tables, ours against the peers' (`docs/bench.md`, `mmu`).
//!
//! Enters: nothing but the workspace. Leaves: named ratios on standard output, and `target/bench/mmu.json`. The work is done by an example
//! of `plimsoll-mmu`, one run for each number, and counted by valgrind's callgrind: the numbers are the same every time, whatever else the
//! machine does. What must never happen: a number of work that was not done; the example checks it, and its exit status is looked at.
use crate::cargo::{self, cargo};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// What is compared.
struct Row {
    name: &'static str,
    ours: &'static str,
    peer: &'static str,
    work: &'static str,
    pages: &'static str,
    /// What the ratio must reach; none where the peer does less.
    goal: Option<f64>,
}

const fn row(
    name: &'static str,
    (ours, peer): (&'static str, &'static str),
    (work, pages): (&'static str, &'static str),
    goal: Option<f64>,
) -> Row {
    Row { name, ours, peer, work, pages, goal }
}

const X86: (&str, &str) = ("ours-x86", "x86_64");
const ARM: (&str, &str) = ("ours-arm", "aarch64-paging");
const STAGES: (&str, &str) = ("ours-two-stages", "ours-one-stage");
const ROWS: [Row; 14] = [
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
    row("two-stages/4KiB", STAGES, ("walk", "4KiB"), Some(1.2)),
    row("two-stages/2MiB", STAGES, ("walk", "2MiB"), Some(1.2)),
];

/// What was counted in one run.
struct Count {
    instructions: f64,
    /// By memory reference, where the example says how many there were; by page elsewhere.
    each: f64,
}

/// Builds the example, counts, and says what came of it: only rows whose names begin with `prefix`.
pub(crate) fn run(prefix: &str) -> Result<()> {
    cargo::run(cargo().args([
        "build",
        "--quiet",
        "--release",
        "--locked",
        "--package",
        "plimsoll-mmu",
        "--example",
        "count",
    ]))?;
    let target = cargo::metadata(&cargo::root().join("Cargo.toml"))?.target_directory;
    let folder = target.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let example = target.join("release/examples/count");
    let mut results = Vec::new();
    for row in ROWS.iter().filter(|row| row.name.starts_with(prefix)) {
        results.push(compare(row, &example)?);
    }
    ensure!(!results.is_empty(), "no row of mmu begins with {prefix}");
    let path = folder.join("mmu.json");
    let report = json!({ "unit": "instructions by page, or by memory reference", "results": results });
    fs::write(&path, format!("{report:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    println!("written to {}", path.display());
    Ok(())
}

fn compare(row: &Row, example: &Path) -> Result<Value> {
    let [ours, peer] = [row.ours, row.peer].map(|who| count(example, who, row));
    let (ours, peer) = (ours?, peer?);
    let ratio = ours.each / peer.each;
    let verdict = row.goal.map_or(String::new(), |goal| {
        format!("  goal at most {goal}: {}", if ratio <= goal { "met" } else { "MISSED" })
    });
    println!(
        "{:<24} ratio {ratio:>5.2}  ours {:>7.1} peer {:>7.1} instructions{verdict}",
        row.name, ours.each, peer.each
    );
    Ok(json!({
        "name": row.name, "ours": ours.each, "peer": peer.each, "ratio": ratio, "goal": row.goal, "better": "lower",
        "instructions": { "ours": ours.instructions, "peer": peer.instructions },
    }))
}

/// Runs one piece of work under callgrind, which counts in the function `measured` and what it calls.
fn count(example: &Path, who: &str, row: &Row) -> Result<Count> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]);
    command.arg("--toggle-collect=count::measured*").arg(example).args([who, row.work, row.pages]);
    let output =
        command.output().context("cannot start valgrind; `cargo xtask setup` installs what is missing")?;
    let [said, counted] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    if !output.status.success() {
        bail!("{command:?} failed: {}\n{counted}", output.status);
    }
    let number = |text: &str, word: &str| {
        let line = text.lines().find_map(|line| line.split_once(word).map(|(_, rest)| rest));
        line.and_then(|rest| {
            rest.trim_start_matches([' ', ':']).split_whitespace().next()?.parse::<f64>().ok()
        })
    };
    let instructions = number(&counted, "Collected").filter(|count| *count > 0.0);
    let instructions = instructions.with_context(|| format!("callgrind counted nothing:\n{counted}"))?;
    let pages = if row.pages == "4KiB" { 262_144.0 } else { 512.0 };
    Ok(Count { instructions, each: instructions / number(&said, "references").unwrap_or(pages) })
}
