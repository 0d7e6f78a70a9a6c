//! So many operations a second, by the guest's clock.
//!
//! Enters: the time. Leaves: whether one is due. One that falls behind by more than a second starts its pace over, so
//! that a guest which stood still does not run after the time it lost.
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(1);

/// A pace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    period: Duration,
    next: Instant,
}

impl Pace {
    /// A pace that starts now; none for no operations at all.
    pub(crate) fn new(per_second: u64, now: Instant) -> Option<Self> {
        let nanoseconds = 1_000_000_000_u64.checked_div(per_second)?;
        Some(Self { period: Duration::from_nanos(nanoseconds), next: now })
    }

    /// True when an operation is due, which then counts as done.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        if self.next > now {
            return false;
        }
        let is_late = now.duration_since(self.next) > PATIENCE;
        self.next = if is_late { now } else { self.next } + self.period;
        true
    }

    /// How long until the next is due.
    pub(crate) fn wait(&self, now: Instant) -> Duration {
        self.next.saturating_duration_since(now)
    }
}
