//! The standard harness's lines for tests that run one after the other on the main thread.
//!
//! Enters: the program's arguments, tests by name, and what they need that is not here. Leaves: what became of each.
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

pub(crate) type Test = (&'static str, fn());

/// A capability that these tests need and this machine lacks.
pub(crate) struct Missing {
    pub(crate) name: &'static str,
    pub(crate) why: String,
}

/// Runs those of the tests that the arguments choose, or lists them.
pub(crate) fn run(arguments: &[String], all: &[Test], missing: impl FnOnce() -> Option<Missing>) -> ExitCode {
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let chosen =
        |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let tests: Vec<&Test> = all.iter().filter(|(name, _)| chosen(name)).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", tests.len());
    let start = Instant::now();
    let missing = missing();
    let failed = tests.iter().filter(|(name, test)| !passes(name, *test, missing.as_ref())).count();
    println!(
        "\ntest result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s",
        if failed == 0 { "ok" } else { "FAILED" },
        tests.len() - failed,
        all.len() - tests.len(),
        start.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn passes(name: &str, test: fn(), missing: Option<&Missing>) -> bool {
    if let Some(Missing { name: capability, why }) = missing {
        let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
        if required.split(',').any(|required| required.trim() == *capability) {
            println!("test {name} ... FAILED: {capability} is required and missing: {why}");
            return false;
        }
        println!("SKIPPED: {name}: no {capability}: {why}");
        println!("test {name} ... ok");
        return true;
    }
    let start = Instant::now();
    let passed = catch_unwind(AssertUnwindSafe(test)).is_ok();
    let verdict = if passed { "ok" } else { "FAILED" };
    println!("test {name} ... {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
    passed
}
