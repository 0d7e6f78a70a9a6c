//! What a test program said: how many tests passed, failed, were skipped.
//!
//! Enters: the output of the standard test harness under `--show-output`. Leaves: counts. A test that prints a line
//! beginning with `SKIPPED: ` and passes counts as skipped, because the harness has no way of saying so. So does one
//! that is marked to be ignored.
use std::ops::AddAssign;

/// What a test prints when it cannot run here, followed by the reason.
const SKIPPED: &str = "SKIPPED: ";

/// Counts of tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Ran, and nothing was wrong.
    pub(crate) passed: u64,
    /// Something was wrong.
    pub(crate) failed: u64,
    /// Did not run, or only in part.
    pub(crate) skipped: u64,
    /// Why.
    pub(crate) reasons: Vec<String>,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.reasons.extend(other.reasons);
    }
}

impl Tally {
    /// A check that is not a test program.
    pub(crate) fn of_check(passed: bool) -> Self {
        Self { passed: u64::from(passed), failed: u64::from(!passed), ..Self::default() }
    }

    /// Reads the output of one or more test programs. `None` when no program said how it ended.
    pub(crate) fn read(output: &str) -> Option<Self> {
        let mut tally = Self::default();
        let mut found = false;
        let mut skipped_but_passed = 0;
        let mut place = Place::Outside;
        for line in output.lines() {
            if line == "successes:" {
                place = Place::Passed(None);
            } else if line == "failures:" {
                place = Place::Failed;
            } else if let (Place::Passed(_), Some(name)) = (place, section(line)) {
                place = Place::Passed(Some(name));
            } else if let Some(counts) = line.strip_prefix("test result: ") {
                found = true;
                tally.passed += count(counts, "passed");
                tally.failed += count(counts, "failed");
                tally.skipped += count(counts, "ignored");
                place = Place::Outside;
            } else if let Some(reason) = line.trim_start().strip_prefix(SKIPPED) {
                match place {
                    Place::Passed(Some(name)) => {
                        skipped_but_passed += 1;
                        tally.reasons.push(format!("{name}: {reason}"));
                        // Further lines of the same test are no further tests.
                        place = Place::Passed(None);
                    }
                    Place::Passed(None) | Place::Failed => {}
                    // Printed past the harness, by a process that a test started.
                    Place::Outside => {
                        skipped_but_passed += 1;
                        tally.reasons.push(reason.to_owned());
                    }
                }
            }
        }
        tally.skipped += skipped_but_passed;
        tally.passed = tally.passed.saturating_sub(skipped_but_passed);
        found.then_some(tally)
    }
}

/// Where in a harness's output a line stands.
#[derive(Clone, Copy)]
enum Place<'a> {
    Outside,
    /// Among the captured output of tests that passed; the test, until it is counted as skipped.
    Passed(Option<&'a str>),
    Failed,
}

/// The test whose captured output follows this line.
fn section(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
}

/// The number before a word, in `ok. 3 passed; 0 failed; ...`.
fn count(counts: &str, word: &str) -> u64 {
    let parts = counts.split([';', '.']);
    let number = parts.filter_map(|part| part.trim().strip_suffix(word)).next();
    number.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 4 tests
test a ... ok
test b ... ok
test c ... FAILED
test d ... ignored

successes:

---- b stdout ----
SKIPPED: no KVM
SKIPPED: nor anything else

successes:
    a
    b

failures:

---- c stdout ----
SKIPPED: half of it
thread 'c' panicked

failures:
    c

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn a_test_that_skips_itself_is_not_a_passed_one() {
        let tally = Tally::read(OUTPUT).unwrap();
        assert_eq!((tally.passed, tally.failed, tally.skipped), (1, 1, 2));
        assert_eq!(tally.reasons, ["b: no KVM"]);
    }

    #[test]
    fn a_skip_printed_by_a_test_s_child_process_counts() {
        let tally =
            Tally::read("SKIPPED: no rights\ntest result: ok. 5 passed; 0 failed; 0 ignored\n").unwrap();
        assert_eq!((tally.passed, tally.skipped), (4, 1));
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let tally = Tally::read(&OUTPUT.repeat(3)).unwrap();
        assert_eq!((tally.passed, tally.failed, tally.skipped), (3, 3, 6));
    }

    #[test]
    fn a_program_that_dies_has_no_result() {
        assert_eq!(Tally::read("running 4 tests\ntest a ... ok\n"), None);
    }
}
