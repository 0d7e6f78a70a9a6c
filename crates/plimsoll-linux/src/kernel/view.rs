//! Where a machine's pages are, read from its page map when somebody asks, and remembered only while one step lasts.
use super::KernelError;
use super::layout::Layout;
use super::source::SourceError;
use plimsoll_core::outside::{PageSet, Presence};
use plimsoll_core::replacement::Run;
use plimsoll_sys::pagemap::{Categories, Filter, Pagemap};
use plimsoll_types::{BLOCK_PAGES, BlockIndex, PAGE_SIZE, PageIndex, Pfn};
use std::collections::BTreeMap;

const WHEREABOUTS: Filter = Filter {
    all_of: Categories::empty(),
    any_of: Categories::PRESENT.union(Categories::SWAPPED),
    report: Categories::PRESENT.union(Categories::SWAPPED).union(Categories::ZERO_PAGE),
};
/// Pages that belong to huge ones.
const HUGE: Filter = Filter {
    all_of: Categories::PRESENT.union(Categories::HUGE),
    any_of: Categories::empty(),
    report: Categories::empty(),
};

/// The page map of one process, cut into the blocks of a layout.
#[derive(Debug)]
pub(super) struct View {
    pagemap: Pagemap,
    layout: Layout,
    /// What was seen since the last [`View::forget`].
    seen: BTreeMap<BlockIndex, Presence>,
}

impl View {
    pub(super) const fn new(pagemap: Pagemap, layout: Layout) -> Self {
        Self { pagemap, layout, seen: BTreeMap::new() }
    }

    pub(super) const fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn set_layout(&mut self, layout: Layout) {
        self.layout = layout;
        self.forget();
    }

    pub(super) fn is_alive(&self) -> Result<bool, KernelError> {
        Ok(self.pagemap.is_alive()?)
    }

    /// From now on pages may be elsewhere.
    pub(super) fn forget(&mut self) {
        self.seen.clear();
    }

    /// Where the pages of a block are. Unless it was seen already, those of up to `ahead` blocks from it on are read with
    /// it: one call of the kernel for all costs little more than for one.
    pub(super) fn look(&mut self, block: BlockIndex, ahead: u32) -> Result<Presence, KernelError> {
        if let Some(presence) = self.seen.get(&block) {
            return Ok(*presence);
        }
        let window = self.scan(block, ahead, WHEREABOUTS)?;
        let found = window.first().copied().unwrap_or_default();
        self.seen.extend((block.0..).map(BlockIndex).zip(window));
        Ok(found)
    }

    /// The frame a page is in now, `None` when it is not in RAM.
    pub(super) fn frame(&self, page: PageIndex) -> Result<Option<Pfn>, SourceError> {
        let Some(range) = self.layout.addresses(Run { first: page, pages: 1 }) else { return Ok(None) };
        let frames = self.pagemap.frames(range).map_err(SourceError::Frames)?;
        Ok(frames.first().copied().flatten())
    }

    /// True when the whole block is a huge page.
    pub(super) fn is_huge(&self, block: BlockIndex) -> Result<bool, KernelError> {
        let mut bytes = 0;
        if let Some(range) = self.layout.window(block, 1) {
            self.pagemap.scan(range, HUGE, |run| bytes += run.range.len().0)?;
        }
        Ok(bytes == u64::from(BLOCK_PAGES) * PAGE_SIZE as u64)
    }

    /// A presence for each block of a window that does not leave the range it begins in.
    fn scan(&self, first: BlockIndex, blocks: u32, filter: Filter) -> Result<Vec<Presence>, KernelError> {
        let Some(window) = self.layout.window(first, blocks.max(1)) else { return Ok(Vec::new()) };
        let last = self.layout.place(plimsoll_types::Hva(window.end().0 - PAGE_SIZE as u64));
        let count = last.map_or(0, |(block, _)| block.0 - first.0 + 1);
        let mut found = vec![Presence::default(); count as usize];
        self.pagemap.scan(window, filter, |run| {
            // Read and never written: the one page of zeros all processes share. It takes no memory and cannot be taken.
            if run.categories.contains(Categories::ZERO_PAGE) {
                return;
            }
            let Some((block, place)) = self.layout.place(run.range.start()) else { return };
            let pages = run.range.len().0 / PAGE_SIZE as u64;
            let Ok(pages) = u32::try_from(pages) else { return };
            // A run may go on through blocks: places are counted from the first one's beginning.
            let end = place + pages;
            for part in 0..end.div_ceil(BLOCK_PAGES) {
                let base = part * BLOCK_PAGES;
                let set = PageSet::from_range(place.saturating_sub(base)..end - base);
                let at = (block.0 - first.0 + part) as usize;
                let Some(presence) = found.get_mut(at) else { return };
                // A page is never both, unless a mark stands for it; then it is there.
                if run.categories.contains(Categories::PRESENT) {
                    presence.present = presence.present | set;
                } else {
                    presence.swapped = presence.swapped | set;
                }
            }
        })?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::ProcessId;
    use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
    use plimsoll_types::ByteCount;

    #[test]
    fn pages_that_were_only_read_are_not_in_ram_and_those_written_are() {
        let memory = AnonymousMapping::new(ByteCount::mib(4), HugePages::Never).unwrap();
        let offset = |page: u64| ByteCount(page * PAGE_SIZE as u64);
        (0..1024).for_each(|page| assert_eq!(memory.read_u64(offset(page)).unwrap(), 0));
        let written = [3..4, 500..512, 0..7];
        for page in (3..4).chain(500..519) {
            memory.write_u64(offset(page), 1).unwrap();
        }
        let layout = Layout::new(vec![memory.range()]).unwrap();
        let mut view = View::new(Pagemap::open(ProcessId::own()).unwrap(), layout);
        let runs = (0..2).map(BlockIndex).flat_map(|block| view.look(block, 2).unwrap().present.runs());
        assert_eq!(runs.collect::<Vec<_>>(), written);
        assert_eq!(view.look(BlockIndex(2), 2).unwrap(), Presence::default(), "past the machine's end");
    }
}
