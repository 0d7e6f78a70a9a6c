//! The shipped scenarios hold what they show, and their targets do not swing by themselves; reports are the same whatever the threads; bad scenarios are refused with a
//! sentence.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails the test")]

mod page;
mod refusals;
mod scenarios;
mod swings;

use plimsoll_sim::{Options, Report, Scenario, run};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// A shipped scenario.
fn shipped(name: &str) -> Scenario {
    Scenario::read(&folder().join(name).with_extension("toml")).unwrap()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/scenarios")
}

fn report(scenario: &Scenario, threads: usize) -> Report {
    let options = Options { threads: NonZeroUsize::new(threads).unwrap(), ..Options::default() };
    run(scenario, options, &|| {}).unwrap()
}
