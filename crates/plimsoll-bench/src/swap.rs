//! The peer's device: a new zram device in use as swap.
//!
//! What must never happen: one made on a host that has swap of its own, which the pages might go to instead.
use crate::session::BenchError;
use anyhow::Context;
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
