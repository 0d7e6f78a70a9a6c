//! When a manager did what for the first time, on the clock that all processes of the host share.
//!
//! Enters: steps of pagers. Leaves: nanoseconds of CLOCK_MONOTONIC. It costs a pager one load a step.
use plimsoll_linux::uffd::probe::{Killed, Probe, Step};
use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU64, Ordering};

/// Nanoseconds since the host was started, suspended time not counted.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}

/// Watches for the first page that a manager brings.
#[derive(Debug, Default)]
pub struct Milestones {
    first_page_ns: AtomicU64,
}

impl Milestones {
    /// When the first page was brought, 0 if none was yet.
    pub fn first_page_ns(&self) -> u64 {
        self.first_page_ns.load(Ordering::Relaxed)
    }
}

impl Probe for Milestones {
    fn reached(&self, step: Step) -> Result<(), Killed> {
        if matches!(step, Step::Copied | Step::MovedBack) && self.first_page_ns() == 0 {
            let _ = self.first_page_ns.compare_exchange(0, now_ns(), Ordering::Relaxed, Ordering::Relaxed);
        }
        Ok(())
    }
}
