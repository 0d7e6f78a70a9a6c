//! Into how many shards a machine's memory is cut, and where.
//!
//! Enters: a layout, how many shards are wanted. Leaves: a layout for each shard, about equal, cut between blocks, that
//! together are the machine's. Each shard is served by itself (see `plimsoll_linux::uffd`), so that the faults of a large
//! machine do not wait for one another.
use plimsoll_core::layout::{GuestLayout, LayoutError, Region};
use plimsoll_linux::uffd::wire::SHARDS_MAX;
use plimsoll_types::{BLOCK_PAGES, ByteCount, PageCount, PageIndex};

/// Memory for which one thread of the manager is enough.
const BYTES_PER_SHARD: u64 = 16 << 30;
/// Less than this is not worth a thread of its own, however many nodes the host has.
const BYTES_PER_NODE_MIN: u64 = 1 << 30;

/// A shard's place in the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// The machine's page that is the shard's page 0: the first of a block.
    pub(crate) first: PageIndex,
    /// Where the shard's pages lie in the guest.
    pub(crate) layout: GuestLayout,
}

/// How many shards a machine gets that does not say.
pub(crate) fn suitable(ram: ByteCount) -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for_nodes(ram, nodes(&status))
}

fn for_nodes(ram: ByteCount, nodes: u64) -> u32 {
    let shards = ram.0.div_ceil(BYTES_PER_SHARD).max(nodes.min(ram.0 / BYTES_PER_NODE_MIN));
    u32::try_from(shards).unwrap_or(SHARDS_MAX).clamp(1, SHARDS_MAX)
}

/// NUMA nodes that the process may have memory of, from its `/proc/self/status`; 1 if it does not say.
fn nodes(status: &str) -> u64 {
    let list = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:")).unwrap_or("0");
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.trim().split(',').map(|range| count(range).unwrap_or(1)).sum()
}

/// Cuts a machine into `count` shards.
///
/// # Errors
/// [`LayoutError::Empty`] when it has fewer blocks than that.
pub(crate) fn cut(layout: &GuestLayout, count: usize) -> Result<Vec<Cut>, LayoutError> {
    let (blocks, count) = (layout.pages().0 / u64::from(BLOCK_PAGES), count as u64);
    let bound = |shard: u64| blocks * shard / count * u64::from(BLOCK_PAGES);
    let shard = |shard| {
        let (from, to) = (bound(shard), bound(shard + 1));
        let first = u32::try_from(from).map_err(|_| LayoutError::TooLarge)?;
        Ok(Cut { first: PageIndex(first), layout: GuestLayout::new(between(layout, from, to))? })
    };
    (0..count).map(shard).collect()
}

/// What of each region lies in these pages.
fn between(layout: &GuestLayout, from: u64, to: u64) -> Vec<Region> {
    let mut base = 0;
    let part = |region: &Region| {
        let (first, pages) = (base, region.bytes.pages_floor().0);
        base += pages;
        let (from, to) = (from.clamp(first, base), to.clamp(first, base));
        let start = region.start.checked_add(PageCount(from - first).byte_offset())?;
        (from < to).then(|| Region { start, bytes: PageCount(to - from).bytes() })
    };
    layout.regions().iter().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_types::Gpa;

    fn machine(regions: &[(u64, u64)]) -> GuestLayout {
        let region =
            |(start, mib): &(u64, u64)| Region { start: Gpa(start << 20), bytes: ByteCount::mib(*mib) };
        GuestLayout::new(regions.iter().map(region).collect()).unwrap()
    }

    #[test]
    fn shards_are_equal_to_a_block_and_have_every_page_once_in_order() {
        for regions in [&[(0, 22)][..], &[(0, 6), (256, 2), (1024, 14)], &[(2, 2), (4, 18), (32, 2)]] {
            let layout = machine(regions);
            let blocks = layout.pages().0 / 512;
            for count in 1..=usize::try_from(blocks).unwrap() {
                let shards = cut(&layout, count).unwrap();
                let mut next = 0;
                for shard in &shards {
                    assert_eq!(shard.first, PageIndex(next), "{regions:?} in {count}");
                    for page in 0..shard.layout.page_limit().0 {
                        let gpa = shard.layout.gpa_of(PageIndex(page));
                        assert_eq!(gpa, layout.gpa_of(PageIndex(next + page)), "{regions:?} in {count}");
                    }
                    next += shard.layout.page_limit().0;
                }
                assert_eq!(PageIndex(next), layout.page_limit());
                let sizes: Vec<u64> = shards.iter().map(|shard| shard.layout.pages().0 / 512).collect();
                assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
            }
            assert_eq!(cut(&layout, usize::try_from(blocks + 1).unwrap()), Err(LayoutError::Empty));
        }
    }

    #[test]
    fn large_machines_and_hosts_of_many_nodes_get_more_shards() {
        let gib = |gib: u64| ByteCount(gib << 30);
        assert_eq!(for_nodes(ByteCount::mib(8), 8), 1);
        assert_eq!(for_nodes(gib(16), 1), 1);
        assert_eq!(for_nodes(gib(17), 1), 2);
        assert_eq!(for_nodes(gib(2), 8), 2);
        assert_eq!(for_nodes(gib(64), 2), 4);
        assert_eq!(for_nodes(gib(16 << 10), 8), SHARDS_MAX);
    }

    #[test]
    fn nodes_are_counted_from_what_the_kernel_lists() {
        assert_eq!(nodes("Name:\tx\nMems_allowed_list:\t0-1,4\nThreads:\t1\n"), 3);
        assert_eq!(nodes("Mems_allowed_list:\t0\n"), 1);
        assert_eq!(nodes(""), 1);
    }
}
