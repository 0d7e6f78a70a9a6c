//! The peer's device: a new zram device in use as swap.
//!
//! What must never happen: one made on a host that has swap of its own, which the pages might go to instead.
use crate::guest::Guest;
use crate::session::BenchError;
use anyhow::Context;
use plimsoll_linux::cgroup::{CgroupError, MemoryCgroup};
use plimsoll_linux::zram::{self, ZramError, ZramSwap};
use plimsoll_sys::pidfd::Signal;
use plimsoll_sys::swap::SwapPriority;
use plimsoll_types::ByteCount;
use std::time::{Duration, Instant};

/// Whether the comparison can be made on this host. What killed runs have left is removed first.
pub(crate) fn check_host() -> Result<(), BenchError> {
    zram::sweep_stale().map(drop).map_err(not_here_or_failed)?;
    let areas = zram::host_swap().context("cannot see what swap the host has")?;
    if let Some(area) = areas.first() {
        let why = format!(
            "this host swaps to {} already, and the pages might go there instead of to a zram device of our own; run it \
             where /proc/swaps is empty",
            area.path.display()
        );
        return Err(BenchError::NotHere(why));
    }
    // The first device shows what is missing before anything is measured.
    device(ByteCount::mib(1)).and_then(|device| device.remove()).map_err(not_here_or_failed)
}

/// A device of this size, compressed by lz4, that nothing else of the host goes to while there is other swap.
pub(crate) fn device(size: ByteCount) -> Result<ZramSwap, ZramError> {
    ZramSwap::create(size, &["lz4"], SwapPriority::Lowest)
}

fn not_here_or_failed(error: ZramError) -> BenchError {
    match error {
        ZramError::NoModule | ZramError::NotPermitted { .. } | ZramError::NoAlgorithm { .. } => {
            BenchError::NotHere(error.to_string())
        }
        other => BenchError::Failed(other.into()),
    }
}

/// What is taken at a time: 13.5 us a page of it (FACTS) are 7 ms.
const STEP: ByteCount = ByteCount::mib(2);
/// After so many times those that stood still go on, whatever was taken.
const HELD_STEPS: usize = 16;

/// Keeps a cgroup to a limit. Where it is reached, those stand still who would take more until the kernel has taken a 64th: as a
/// task does that has to reclaim before it gets memory, by itself or behind `memory.high`.
///
/// A limit that guests meet at work cannot be kept: while somebody lowers it they find nothing that could be taken, and this
/// kernel kills one (docs/bench.md). So nobody meets it, and what is used may be above it until the next look.
///
/// Returns how long that took.
pub(crate) fn hold_to(cgroup: &MemoryCgroup, limit: ByteCount, who: &[&Guest]) -> Duration {
    let used = || cgroup.used().unwrap_or_default();
    if used().0 <= limit.0 - limit.0 / 128 {
        return Duration::ZERO;
    }
    let begun = Instant::now();
    signal(who, Signal::STOP);
    let goal = limit.0 - limit.0 / 64;
    // That of cgroup v1 takes effect once what is in use fits.
    let take = || cgroup.set_limit(ByteCount(goal.max(used().0.saturating_sub(STEP.0))));
    (0..HELD_STEPS).take_while(|_| used().0 > goal && take().is_ok()).for_each(drop);
    let _ = lift(cgroup, limit);
    signal(who, Signal::CONT);
    begun.elapsed()
}

/// Sets a limit so far above that one that nobody meets it.
pub(crate) fn lift(cgroup: &MemoryCgroup, limit: ByteCount) -> Result<(), CgroupError> {
    cgroup.set_limit(ByteCount(limit.0.saturating_mul(8)))
}

/// Has guests stand still, or go on. One that is gone is found to be so when it is heard.
pub(crate) fn signal(who: &[&Guest], signal: Signal) {
    who.iter().for_each(|guest| _ = guest.process().send_signal(signal));
}
