//! Whether a machine's interface works, told to the operator once per change and not at every request.
//!
//! Enters: the outcome of each request, and when. Leaves: a [`Change`] when cooperation begins or ends, and whether to try
//! again. What must never happen: a broken interface filling a log, or being asked so often that asking is the load.
//!
//! One failure does not end cooperation: a VMM that is being resumed or is writing a snapshot misses a request. A peer that
//! breaks its protocol or is not there is given up after [`FAILURES_MAX`] failures in a row.
use super::error::{ControlError, Fault};
use std::time::Duration;

/// Failures in a row that end cooperation. Two could be the two ends of one pause; at one look a second, three are 3 s.
const FAILURES_MAX: u32 = 3;
/// The first pause before a failed interface is tried again, doubled each time up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Whoever repaired an interface should not wait longer than about half a minute to see it.
const RETRY_MAX: Duration = Duration::from_secs(32);

/// What an operator should hear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The interface works again, after so many failures.
    Restored {
        /// Failed requests in between.
        failures: u32,
    },
    /// From now on the machine is managed without its help.
    Lost {
        /// The last error with its causes.
        why: String,
        /// Where the cause lies.
        fault: Fault,
    },
}

/// The state of one interface.
#[derive(Clone, Debug, Default)]
pub struct Cooperation {
    failures: u32,
    is_lost: bool,
    retry_at: Option<Duration>,
}

impl Cooperation {
    /// True while the machine may be counted on to do what it is asked.
    pub const fn is_there(&self) -> bool {
        !self.is_lost
    }

    /// True when the interface may be asked. `now` is the time since any fixed moment.
    pub fn may_try(&self, now: Duration) -> bool {
        self.retry_at.is_none_or(|at| now >= at)
    }

    /// Notes how a request ended, and says what the operator should hear, if anything. A request that was refused came
    /// over an interface that works.
    pub fn note<T>(&mut self, outcome: &Result<T, ControlError>, now: Duration) -> Option<Change> {
        match outcome {
            Err(error) if error.fault() != Fault::Request => self.failed(error, now),
            _ => self.worked(),
        }
    }

    fn worked(&mut self) -> Option<Change> {
        let before = std::mem::take(self);
        before.is_lost.then_some(Change::Restored { failures: before.failures })
    }

    fn failed(&mut self, error: &ControlError, now: Duration) -> Option<Change> {
        let doublings = self.failures.min((RETRY_MAX.as_secs() / RETRY_MIN.as_secs()).ilog2());
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(now + RETRY_MIN * (1 << doublings));
        if self.is_lost || self.failures < FAILURES_MAX {
            return None;
        }
        self.is_lost = true;
        Some(Change::Lost { why: plimsoll_linux::explain(error), fault: error.fault() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    type Outcome = Result<(), ControlError>;

    fn gone() -> Outcome {
        let source = io::Error::from(io::ErrorKind::ConnectionRefused);
        Err(ControlError::Unreachable { interface: "the API at /x".into(), source })
    }

    fn refused() -> Outcome {
        Err(ControlError::Refused { interface: "the API".into(), request: "this".into(), text: "no".into() })
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn an_operator_hears_once_that_an_interface_failed_and_once_that_it_works_again() {
        let mut cooperation = Cooperation::default();
        let told: Vec<_> = (0..20).filter_map(|second| cooperation.note(&gone(), at(second))).collect();
        let [Change::Lost { why, fault: Fault::Setup }] = &told[..] else { panic!("{told:?}") };
        assert!(why.contains("/x") && why.contains("refused"), "{why}");
        assert!(!cooperation.is_there());
        assert_eq!(cooperation.note(&Ok(()), at(21)), Some(Change::Restored { failures: 20 }));
        assert_eq!(cooperation.note(&Ok(()), at(22)), None);
        assert!(cooperation.is_there());
    }

    #[test]
    fn a_single_failure_is_forgiven_in_silence() {
        let mut cooperation = Cooperation::default();
        for second in 0..50 {
            let outcome = if second % 3 == 0 { Ok(()) } else { gone() };
            assert_eq!(cooperation.note(&outcome, at(second)), None);
            assert!(cooperation.is_there());
        }
    }

    #[test]
    fn a_refusal_is_a_sign_of_life() {
        let mut cooperation = Cooperation::default();
        for second in 0..3 {
            cooperation.note(&gone(), at(second));
        }
        assert_eq!(cooperation.note(&refused(), at(9)), Some(Change::Restored { failures: 3 }));
    }

    #[test]
    fn a_failed_interface_is_asked_less_and_less_often_but_at_least_twice_a_minute() {
        let mut cooperation = Cooperation::default();
        let (mut now, mut pauses) = (0, Vec::new());
        for _ in 0..10 {
            cooperation.note(&gone(), at(now));
            let pause = (1..).find(|pause| cooperation.may_try(at(now + pause))).unwrap();
            pauses.push(pause);
            now += pause;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 32, 32, 32, 32]);
        cooperation.note(&Ok(()), at(now));
        assert!(cooperation.may_try(at(now)));
    }
}
