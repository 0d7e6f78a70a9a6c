//! Into how many shards a machine's memory is cut, and where.
//!
//! Enters: a layout, how many shards are wanted, how many NUMA nodes the memory is bound to. Leaves: a layout for each shard, about
//! equal, cut between blocks and where the node changes, that together are the machine's. Each shard is served by itself (see `plimsoll_linux::uffd`), so that the faults of a large
//! machine do not wait for one another.
use plimsoll_core::layout::{GuestLayout, LayoutError, Region};
use plimsoll_linux::uffd::wire::SHARDS_MAX;
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::nodes;
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

/// How many shards a machine gets that does not say, of memory that is bound to as many nodes (0: to none).
pub(crate) fn suitable(ram: ByteCount, bound: usize) -> u32 {
    // One, where the kernel does not say.
    let allowed = nodes::allowed(ProcessId::own()).map_or(1, |nodes| nodes.len());
    let bound = u32::try_from(bound).unwrap_or(SHARDS_MAX).min(SHARDS_MAX);
    for_nodes(ram, allowed as u64).max(bound)
}

fn for_nodes(ram: ByteCount, nodes: u64) -> u32 {
    let shards = ram.0.div_ceil(BYTES_PER_SHARD).max(nodes.min(ram.0 / BYTES_PER_NODE_MIN));
    u32::try_from(shards).unwrap_or(SHARDS_MAX).clamp(1, SHARDS_MAX)
}

/// The part of a machine's memory that each of so many nodes has: about equal, cut between blocks, in the order of guest addresses.
pub(crate) fn parts(layout: &GuestLayout, nodes: usize) -> Vec<Vec<Region>> {
    let bounds = bounds(layout, nodes as u64);
    bounds.windows(2).map(|pair| between(layout, pair[0], pair[1])).collect()
}

/// The pages at which a machine is cut into so many parts, its first and its end included.
fn bounds(layout: &GuestLayout, parts: u64) -> Vec<u64> {
    let blocks = layout.pages().0 / u64::from(BLOCK_PAGES);
    (0..=parts).map(|part| blocks * part / parts * u64::from(BLOCK_PAGES)).collect()
}

/// Cuts a machine into `count` shards, none of which is in two of the [`parts`] that as many `nodes` have.
///
/// # Errors
/// [`LayoutError::Empty`] when it has fewer blocks than that, or fewer shards than nodes.
pub(crate) fn cut(layout: &GuestLayout, count: usize, nodes: usize) -> Result<Vec<Cut>, LayoutError> {
    let (count, nodes) = (count as u64, nodes.max(1) as u64);
    let of_nodes = bounds(layout, nodes);
    let shards_up_to = |node: u64| count * node / nodes;
    let mut shards = Vec::new();
    for (node, pair) in (0..).zip(of_nodes.windows(2)) {
        let (first, blocks) = (pair[0], (pair[1] - pair[0]) / u64::from(BLOCK_PAGES));
        let count = shards_up_to(node + 1) - shards_up_to(node);
        if count == 0 {
            return Err(LayoutError::Empty);
        }
        let bound = |shard: u64| first + blocks * shard / count * u64::from(BLOCK_PAGES);
        for shard in 0..count {
            let (from, to) = (bound(shard), bound(shard + 1));
            let first = u32::try_from(from).map_err(|_| LayoutError::TooLarge)?;
            shards
                .push(Cut { first: PageIndex(first), layout: GuestLayout::new(between(layout, from, to))? });
        }
    }
    Ok(shards)
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
                let shards = cut(&layout, count, 1).unwrap();
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
            assert_eq!(cut(&layout, usize::try_from(blocks + 1).unwrap(), 1), Err(LayoutError::Empty));
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
    fn no_shard_is_on_two_nodes_and_every_node_has_one() {
        for (regions, nodes, count) in [
            (&[(0, 22)][..], 2, 2),
            (&[(0, 22)], 2, 5),
            (&[(0, 6), (256, 2), (1024, 14)], 3, 3),
            (&[(2, 2), (4, 18), (32, 2)], 4, 7),
        ] {
            let layout = machine(regions);
            let (parts, shards) = (parts(&layout, nodes), cut(&layout, count, nodes).unwrap());
            assert_eq!(shards.len(), count);
            assert_eq!(
                parts.iter().flatten().map(|region| region.bytes.0).sum::<u64>(),
                layout.pages().bytes().0
            );
            let is_in = |inner: &Region, part: &[Region]| {
                part.iter().any(|region| {
                    region.start <= inner.start
                        && inner.start.0 + inner.bytes.0 <= region.start.0 + region.bytes.0
                })
            };
            let node_of = |shard: &Cut| {
                let regions = shard.layout.regions();
                let holds = |part: &Vec<Region>| regions.iter().all(|region| is_in(region, part));
                parts.iter().position(holds).expect("it is on one node")
            };
            let mut nodes_of: Vec<usize> = shards.iter().map(node_of).collect();
            let pages: u64 = shards.iter().map(|shard| shard.layout.pages().0).sum();
            assert_eq!(PageCount(pages), layout.pages());
            assert!(nodes_of.is_sorted(), "in order");
            nodes_of.dedup();
            assert_eq!(nodes_of, (0..nodes).collect::<Vec<_>>(), "{regions:?} in {count} on {nodes}");
        }
        assert_eq!(cut(&machine(&[(0, 22)]), 1, 2), Err(LayoutError::Empty));
    }
}
