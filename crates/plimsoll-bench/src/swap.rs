//! The peer's device: a new zram device in use as swap.
//!
//! What must never happen: one made on a host that has swap of its own, which the pages might go to instead.
use crate::session::BenchError;
use anyhow::Context;
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_linux::zram::{self, ZramError, ZramSwap};
use plimsoll_sys::swap::SwapPriority;
use plimsoll_types::ByteCount;

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

/// What is reclaimed ahead at a time: 13.5 us a page of it (FACTS) are 28 ms.
const PRESSED_MAX: ByteCount = ByteCount::mib(8);

/// Sets a limit, and has the kernel reclaim what is close below it, as kswapd does on a host: where guests meet the limit
/// themselves at full speed, this kernel gives up before it has reclaimed anything, and kills one.
///
/// With cgroup v1 a lower limit takes effect only once what is in use fits, so nobody meets it while it is being reached.
pub(crate) fn press(cgroup: &MemoryCgroup, limit: ByteCount) {
    let used = cgroup.used().unwrap_or_default();
    if used.0 > limit.0 - limit.0 / 32 {
        // What cannot be reached at once is tried again a moment later.
        let _ = cgroup.set_limit(ByteCount(limit.0 - limit.0 / 16).max(used.saturating_sub(PRESSED_MAX)));
    }
    let used = cgroup.used().unwrap_or_default();
    let _ = cgroup.set_limit(limit.max(ByteCount(used.0 + limit.0 / 64)));
}
