//! Whether there is a model, which seed, and what a report must be.
use plimsoll_oracle::{Case, Hardware, Outcome, Report};
use std::env;

/// Mismatches that are printed; the others are like them.
const SHOWN: usize = 5;

/// Whether the model, or what assembles its program, is missing here. A machine that lacks what `PLIMSOLL_REQUIRE` says it has is at
/// fault.
pub(crate) fn is_wanting(hardware: &Hardware) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let is_there = |program: &str| env::split_paths(&path).any(|folder| folder.join(program).exists());
    let assembler = format!("{}as", hardware.binutils);
    let Some(missing) = [hardware.qemu, &assembler].into_iter().find(|program| !is_there(program)) else {
        return false;
    };
    let required = env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name == "models"), "{missing} is not there");
    println!("SKIPPED: {missing} is not there; `cargo xtask setup` installs it");
    true
}

/// The seed: `PLIMSOLL_ORACLE_SEED`, or always the same.
pub(crate) fn seed() -> u64 {
    env::var("PLIMSOLL_ORACLE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Prints a report and fails on any mismatch, and where fewer than `least` cases ended in a translation, or in a fault.
pub(crate) fn check(name: &str, report: &Report, least: usize) {
    println!("{name}, seed {}: {report}", seed());
    let first: Vec<String> = report.mismatches.iter().take(SHOWN).map(ToString::to_string).collect();
    assert!(report.mismatches.is_empty(), "PLIMSOLL_ORACLE_SEED={}\n{}", seed(), first.join("\n"));
    let translated = report.kinds.iter().filter(|(kind, _)| kind.starts_with("translated"));
    let translated: usize = translated.map(|(_, count)| count).sum();
    let faults = report.cases() - translated;
    assert!(translated >= least && faults >= least, "{translated} translations and {faults} faults");
}

/// What a crate could be wrong about, and a case as it would see it then.
pub(crate) type Mistake<C> = (&'static str, fn(&mut C));

/// Fails if the same outcomes do not differ from what a crate says that is wrong in one respect each.
pub(crate) fn notices<C: Case>(cases: &[C], outcomes: &[Outcome], wrong: &[Mistake<C>]) {
    for (what, mistake) in wrong {
        let mut mistaken = cases.to_vec();
        mistaken.iter_mut().for_each(mistake);
        let found = Report::new(&mistaken, outcomes).mismatches.len();
        assert!(found > 0, "nobody would notice a crate that is wrong about {what}");
        println!("wrong about {what}: {found} mismatches");
    }
}
