//! The kernel back end over real processes with real swap: a zram device made for each test.
//!
//! Enters: the names of tests to run, or a role when this program starts itself as a [`guest`]. Leaves: the standard
//! harness's lines, and the figures of what was measured. Tests run one after the other: each needs the host's swap to
//! be its own.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]

mod cost;
mod guest;
mod sources;
mod steady;
mod trouble;

use plimsoll_linux::zram::{ZramError, ZramSwap, host_swap};
use plimsoll_sys::swap::{SwapPriority, SwapRank};
use plimsoll_types::ByteCount;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

/// What came of a test that did not fail.
pub(crate) enum Outcome {
    Passed,
    /// It needs something this machine lacks: the capability, as `PLIMSOLL_REQUIRE` lists it, and the reason.
    Skipped(&'static str, String),
}

type Test = (&'static str, fn() -> Outcome);

const TESTS: [Test; 19] = [
    ("private_memory_is_taken_again_and_again_and_the_hot_set_stays", steady::private),
    ("memfd_memory_is_taken_again_and_again_and_the_hot_set_stays", steady::memfd),
    ("hot_blocks_become_huge_again", steady::collapse),
    ("memory_that_is_plugged_in_keeps_what_is_known_of_the_rest", steady::hot_plug),
    ("what_a_guest_gives_back_is_told_from_what_was_paged_out", steady::given_back),
    ("a_process_that_ends_is_gone", trouble::ends),
    ("a_process_that_executes_another_program_is_gone_and_not_advised", trouble::executes),
    ("a_stopped_process_is_managed_like_any_other", trouble::stopped),
    ("locked_memory_is_reported_as_held", trouble::locked),
    ("without_swap_nothing_is_taken_and_the_reason_is_given", trouble::no_swap),
    ("what_is_read_back_because_swap_is_withdrawn_counts_as_used_by_nobody", trouble::withdrawn),
    ("full_swap_is_the_reason_given", trouble::full_swap),
    ("a_cgroup_that_forbids_swap_is_heeded", trouble::forbidden),
    ("without_the_right_attaching_is_refused_and_the_capabilities_are_named", trouble::unprivileged),
    ("taking_is_paced", trouble::paced),
    ("every_source_of_this_kernel_sees_the_hot_set", sources::compare),
    ("sampling_costs_a_busy_guest_little", cost::throughput),
    ("cold_advice_takes_nothing_and_says_what_the_kernel_takes_first", cost::cold),
    ("two_hundred_idle_machines_cost_little", cost::idle_fleet),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [guest::ROLE, kind, mib] => return guest::role(kind, mib),
        [trouble::ROLE, process] => return trouble::role(process),
        _ => {}
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let chosen =
        |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let tests: Vec<Test> = TESTS.into_iter().filter(|(name, _)| chosen(name)).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", tests.len());
    let start = Instant::now();
    let _alone = alone();
    let failed = tests.iter().filter(|(name, test)| !passes(name, *test)).count();
    println!(
        "\ntest result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s",
        if failed == 0 { "ok" } else { "FAILED" },
        tests.len() - failed,
        TESTS.len() - tests.len(),
        start.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Tests with swap devices run one after the other, in whatever processes, also those of the library's own tests.
fn alone() -> File {
    let user = rustix::process::geteuid().as_raw();
    let file = File::create(std::env::temp_dir().join(format!("plimsoll-zram-tests-{user}.lock"))).unwrap();
    file.lock().unwrap();
    file
}

fn passes(name: &str, test: fn() -> Outcome) -> bool {
    let start = Instant::now();
    let verdict = match catch_unwind(AssertUnwindSafe(test)) {
        Ok(Outcome::Passed) => "ok".to_owned(),
        Ok(Outcome::Skipped(capability, why)) => {
            let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
            if required.split(',').any(|required| required.trim() == capability) {
                format!("FAILED: {capability} is required and missing: {why}")
            } else {
                println!("SKIPPED: {name}: no {capability}: {why}");
                "ok".to_owned()
            }
        }
        Err(_) => "FAILED".to_owned(),
    };
    println!("test {name} ... {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
    verdict == "ok"
}

/// A swap device before all others, so that what is taken goes there.
pub(crate) fn swap(size: ByteCount) -> Result<ZramSwap, Outcome> {
    let first = SwapPriority::Fixed(SwapRank::new(i16::MAX).unwrap());
    match ZramSwap::create(size, &["lz4", "lzo-rle"], first) {
        Err(error @ (ZramError::NoModule | ZramError::NotPermitted { .. })) => {
            Err(Outcome::Skipped("zram", error.to_string()))
        }
        made => Ok(made.unwrap()),
    }
}

/// Fails the test's start where somebody else has swap.
pub(crate) fn no_other_swap() -> Result<(), Outcome> {
    match host_swap().unwrap().first() {
        Some(area) => Err(Outcome::Skipped("host without swap", format!("it swaps to {:?}", area.path))),
        None => Ok(()),
    }
}

/// Runs a test that may find out that it cannot run.
pub(crate) fn outcome(test: impl FnOnce() -> Result<(), Outcome>) -> Outcome {
    test().err().unwrap_or(Outcome::Passed)
}
