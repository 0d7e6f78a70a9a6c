//! Guest memory as blocks: ranges of host virtual addresses enter, block and page numbers that stand for them leave.
//!
//! Blocks lie where huge pages lie, at multiples of 2 MiB of the *host's* address, whatever the guest's address is. A range
//! that begins or ends within a block has pages there that are not its own: they are never looked at nor taken.
use super::KernelError;
use plimsoll_core::replacement::Run;
use plimsoll_sys::HvaRange;
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, BlockIndex, ByteCount, Hva, PAGE_SIZE, PageCount};

/// 32 bits of pages, less than one block short.
const BLOCKS_MAX: u64 = (u32::MAX / BLOCK_PAGES) as u64;

/// One range and the blocks that stand for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    range: HvaRange,
    /// Where its first block begins, at or before the range.
    base: Hva,
    first: u32,
    blocks: u32,
}

impl Span {
    const fn contains(&self, block: BlockIndex) -> bool {
        block.0 >= self.first && block.0 - self.first < self.blocks
    }

    fn base_of(&self, block: BlockIndex) -> Hva {
        Hva(self.base.0 + u64::from(block.0.saturating_sub(self.first)) * BLOCK_SIZE as u64)
    }
}

/// The memory of one machine. Ranges are page-aligned, ascending, and do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    spans: Vec<Span>,
}

impl Layout {
    /// Of these ranges, in any order.
    ///
    /// # Errors
    /// [`KernelError::BadRange`] for one that is empty, not whole pages, overlaps another, or is too much.
    pub fn new(mut ranges: Vec<HvaRange>) -> Result<Self, KernelError> {
        ranges.sort_by_key(|range| range.start());
        let mut spans: Vec<Span> = Vec::with_capacity(ranges.len());
        let mut total = 0;
        for range in ranges {
            let bad = |why| KernelError::BadRange { range, why };
            if range.is_empty() {
                return Err(bad("it is empty"));
            }
            if !range.start().is_page_aligned() || !range.len().is_multiple_of(PAGE_SIZE) {
                return Err(bad("it is not whole pages of 4 KiB"));
            }
            if spans.last().is_some_and(|last| last.range.end() > range.start()) {
                return Err(bad("it overlaps another one"));
            }
            let base = Hva(range.start().0 - range.start().0 % BLOCK_SIZE as u64);
            let blocks = (range.end().0 - base.0).div_ceil(BLOCK_SIZE as u64);
            let fit = |count: u64| u32::try_from(count).ok().filter(|_| count <= BLOCKS_MAX);
            let (first, count) = (fit(total), fit(blocks));
            total += blocks;
            let (Some(first), Some(blocks), Some(_)) = (first, count, fit(total)) else {
                return Err(bad("a machine has at most 16T"));
            };
            spans.push(Span { range, base, first, blocks });
        }
        Ok(Self { spans })
    }

    /// How many blocks.
    pub fn blocks(&self) -> u32 {
        self.spans.last().map_or(0, |last| last.first + last.blocks)
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = HvaRange> {
        self.spans.iter().map(|span| span.range)
    }

    /// How many pages are in the ranges.
    pub fn pages(&self) -> PageCount {
        self.ranges().map(|range| range.len().pages_floor()).sum()
    }

    fn span_of(&self, block: BlockIndex) -> Option<&Span> {
        let after = self.spans.partition_point(|span| span.first <= block.0);
        self.spans.get(after.checked_sub(1)?).filter(|span| span.contains(block))
    }

    /// The addresses of the part of `blocks` blocks from `first` on that lies in the range of the first one; `None` past the
    /// machine's end.
    pub fn window(&self, first: BlockIndex, blocks: u32) -> Option<HvaRange> {
        let span = self.span_of(first)?;
        let start = span.base_of(first);
        let end = Hva(start.0.saturating_add(u64::from(blocks) * BLOCK_SIZE as u64));
        HvaRange::between(start.max(span.range.start()), end.min(span.range.end()))
    }

    /// The block at an address, and the address's page in it.
    pub fn place(&self, address: Hva) -> Option<(BlockIndex, u32)> {
        let after = self.spans.partition_point(|span| span.range.start() <= address);
        let span = self.spans.get(after.checked_sub(1)?).filter(|span| address < span.range.end())?;
        let page = (address.0 - span.base.0) / PAGE_SIZE as u64;
        let block = u32::try_from(page / u64::from(BLOCK_PAGES)).ok()?;
        let place = u32::try_from(page % u64::from(BLOCK_PAGES)).ok()?;
        Some((BlockIndex(span.first + block), place))
    }

    /// The block that begins at an address, be it before the range.
    pub fn block_at_base(&self, base: Hva) -> Option<BlockIndex> {
        let span = self.spans.iter().find(|span| base >= span.base && base < span.range.end())?;
        let block = u32::try_from((base.0 - span.base.0) / BLOCK_SIZE as u64).ok()?;
        Some(BlockIndex(span.first + block))
    }

    /// Where a block begins, be it before its range.
    pub fn base_of(&self, block: BlockIndex) -> Option<Hva> {
        Some(self.span_of(block)?.base_of(block))
    }

    /// The addresses of a run of pages of one block.
    pub fn addresses(&self, run: Run) -> Option<HvaRange> {
        let base = self.base_of(run.first.block())?;
        let start = Hva(base.0 + PageCount(u64::from(run.first.in_block())).byte_offset());
        HvaRange::new(start, ByteCount(PageCount(u64::from(run.pages)).byte_offset()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_types::PageIndex;

    fn range(start: u64, len: u64) -> HvaRange {
        HvaRange::new(Hva(start), ByteCount(len)).unwrap()
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn blocks_lie_at_the_hosts_multiples_and_are_cut_to_the_ranges() {
        let (high, low) = (range(9 * MIB, 2 * MIB), range(2 * MIB, 4 * MIB));
        let layout = Layout::new(vec![high, low]).unwrap();
        assert_eq!((layout.blocks(), layout.pages()), (4, PageCount(1536)));
        assert_eq!(layout.ranges().collect::<Vec<_>>(), [low, high]);
        assert_eq!(layout.window(BlockIndex(0), 1), Some(range(2 * MIB, 2 * MIB)));
        assert_eq!(layout.window(BlockIndex(0), 9), Some(low), "a window ends with its range");
        assert_eq!(layout.window(BlockIndex(2), 1), Some(range(9 * MIB, MIB)), "half of a block");
        assert_eq!(layout.window(BlockIndex(3), 1), Some(range(10 * MIB, MIB)));
        assert_eq!(layout.window(BlockIndex(4), 1), None);
        assert_eq!(layout.place(Hva(9 * MIB + 4096)), Some((BlockIndex(2), 257)));
        assert_eq!((layout.place(Hva(8 * MIB)), layout.place(Hva(11 * MIB))), (None, None));
        let run = Run { first: PageIndex(2 * 512 + 257), pages: 3 };
        assert_eq!(layout.addresses(run), Some(range(9 * MIB + 4096, 3 * 4096)));
        for block in (0..4).map(BlockIndex) {
            assert_eq!(layout.block_at_base(layout.base_of(block).unwrap()), Some(block));
        }
    }

    #[test]
    fn what_cannot_be_guest_memory_is_refused_with_the_reason() {
        for (ranges, part) in [
            (vec![range(4096, 0)], "empty"),
            (vec![range(5, 4096)], "whole pages"),
            (vec![range(4096, 5)], "whole pages"),
            (vec![range(0, 8192), range(4096, 8192)], "overlaps"),
            (vec![range(0, 1 << 44)], "16T"),
            (vec![range(0, 1 << 43), range(1 << 43, 1 << 43)], "16T"),
        ] {
            let error = Layout::new(ranges).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(Layout::new(Vec::new()).unwrap().blocks(), 0);
    }
}
