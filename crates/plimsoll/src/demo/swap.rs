//! Swap for a run: the host's own, or a zram device made for it and removed after it.
use plimsoll_linux::explain;
use plimsoll_linux::zram::{self, ZramSwap};
use plimsoll_sys::swap::SwapPriority;
use plimsoll_types::ByteCount;

/// The kernel's means of taking pages.
pub(super) struct Swap {
    made: Option<ZramSwap>,
    pub(super) description: String,
}

impl Swap {
    /// The host's swap; where it has none, a device that holds `size`, announced.
    pub(super) fn prepare(size: ByteCount) -> Result<Self, String> {
        let host = zram::host_swap().map_err(|error| explain(&error))?;
        if let Some(area) = host.first() {
            let description = format!("the host's swap on {}", area.path.display());
            return Ok(Self { made: None, description });
        }
        let _ = zram::sweep_stale();
        println!(
            "this host has no swap, so a zram device of {size} is made for the run and removed after it"
        );
        let made = ZramSwap::create(size, &["lz4", "lzo-rle"], SwapPriority::Lowest)
            .map_err(|error| explain(&error))?;
        let description = format!("zram, {}", made.algorithm());
        Ok(Self { made: Some(made), description })
    }

    /// What the device made for the run takes.
    pub(super) fn held(&self) -> ByteCount {
        self.made.as_ref().and_then(|made| made.memory_used().ok()).unwrap_or_default()
    }

    /// Removes what was made. Nothing of the run may have pages in it any more.
    pub(super) fn remove(self) -> Result<(), String> {
        self.made.map_or(Ok(()), |made| made.remove().map_err(|error| explain(&error)))
    }
}
