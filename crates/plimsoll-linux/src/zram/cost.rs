//! What a page taken really frees: swap in compressed memory takes RAM, too.
//!
//! Enters: the host's swap areas, what zram says of its devices, and the kernel of zswap. Leaves: an average over all that is
//! in swap. What must
//! never happen: a budget that is met on paper, with the compressed pages beside it.
use super::{SwapKind, ZramError, host_swap, mm_stat, read};
use plimsoll_sys::procfs::parse_meminfo;
use plimsoll_types::{ByteCount, PageCount};
use std::path::Path;

/// What a page in this host's swap costs in RAM, on average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapCost(u32);

impl SwapCost {
    /// Of each page taken at least a tenth counts as freed: with contents that do not compress no number would do.
    const GAIN_MIN_PERMILLE: u64 = 100;

    /// Of a page that takes so many thousandths of itself.
    pub const fn from_permille(permille: u32) -> Self {
        Self(permille)
    }

    /// Thousandths of a page; above 1000 for contents that do not compress.
    pub const fn permille(self) -> u64 {
        self.0 as u64
    }

    /// What that much of a machine's memory costs in swap.
    pub const fn of(self, elsewhere: ByteCount) -> ByteCount {
        ByteCount((elsewhere.0 / 1000).saturating_mul(self.permille()))
    }

    /// Pages that have to leave for `bytes` of RAM to be freed: more than those bytes, because each leaves its compressed
    /// rest behind.
    pub fn to_free(self, bytes: ByteCount) -> PageCount {
        let gain = 1000_u64.saturating_sub(self.permille()).max(Self::GAIN_MIN_PERMILLE);
        ByteCount(bytes.0.saturating_mul(1000) / gain).pages_ceil()
    }
}

/// What pages in this host's swap cost: the memory of zram and zswap over all that is in swap. Which machine's pages compress
/// well cannot be told from outside. Nothing where swap is empty, or on disks alone.
///
/// # Errors
/// When swap areas or a device's statistics cannot be read.
pub fn swap_cost() -> Result<SwapCost, ZramError> {
    let (mut held, mut memory) = (0_u64, zswap_pool(&read("/proc/meminfo".as_ref())?).0);
    for area in host_swap()? {
        held += area.used.0;
        let name = area.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if area.kind == SwapKind::Zram {
            let path = Path::new("/sys/block").join(name).join("mm_stat");
            memory += mm_stat(&read(&path)?, || path)?.memory_used.0;
        }
    }
    let permille = memory.saturating_mul(1000).checked_div(held).unwrap_or(0);
    Ok(SwapCost(u32::try_from(permille).unwrap_or(u32::MAX)))
}

/// What zswap's pool takes, from the text of /proc/meminfo; nothing where the kernel has no zswap.
fn zswap_pool(meminfo: &str) -> ByteCount {
    parse_meminfo(meminfo, "Zswap").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_pages_leave_than_are_over_because_each_leaves_its_compressed_rest() {
        let hundred = ByteCount::mib(100);
        assert_eq!(SwapCost::default().to_free(hundred), hundred.pages_floor());
        assert_eq!(SwapCost(500).to_free(hundred), ByteCount::mib(200).pages_floor());
        // What does not compress frees next to nothing, and the number stays one that can be asked for.
        assert_eq!(SwapCost(1010).to_free(hundred), ByteCount::mib(1000).pages_floor());
        assert_eq!(SwapCost(u32::MAX).to_free(ByteCount(0)), PageCount(0));
    }

    #[test]
    fn the_pool_of_zswap_is_memory_too() {
        let meminfo =
            "SwapFree:        8388604 kB\nZswap:              2048 kB\nZswapped:           7000 kB\n";
        assert_eq!(zswap_pool(meminfo), ByteCount::mib(2));
        assert_eq!(zswap_pool("SwapFree:        8388604 kB\n"), ByteCount(0));
    }

    #[test]
    fn what_is_elsewhere_costs_its_share() {
        // One page in swap, and a pool that has not shrunk yet: a number, not an overflow.
        assert!(SwapCost(u32::MAX).of(ByteCount(16 << 40)) > ByteCount(16 << 40));
        assert_eq!(SwapCost(550).of(ByteCount::mib(1000)), ByteCount::mib(550));
        assert_eq!(SwapCost(0).of(ByteCount::mib(1000)), ByteCount(0));
    }
}
