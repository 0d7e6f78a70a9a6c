//! Looking at pages of a machine without waking what sleeps.
//!
//! Enters: which pages. Leaves: what each is. What must never happen: a page brought back from swap to be looked at. So the page map
//! is asked first, and only what is in memory is read. A page that leaves between the two is brought back by the
//! read; that is one page, and a later look finds it cold.
//!
//! Huge pages are left alone: merging one page of 512 splits it, and a huge page is worth more to its guest than a merged
//! page to the host as long as memory suffices. The zero page that the kernel maps takes no memory and is not read.
use plimsoll_core::twins::Look;
use plimsoll_store::{Digest, digest};
use plimsoll_sys::pagemap::{Categories, Filter, Pagemap, PagemapError};
use plimsoll_sys::process_memory::{self, Refusal};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, BlockIndex, ByteCount, Hva, PAGE_SIZE, PageBytes, PageIndex};

/// Pages read by one call: 1 MiB.
const BATCH: usize = 256;

/// Where a machine's blocks are in its process: whole blocks, counted through its ranges in order.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    ranges: Vec<HvaRange>,
}

impl Blocks {
    /// What of each range is whole blocks.
    pub(super) fn of(ranges: &[HvaRange]) -> Self {
        let whole = |range: &HvaRange| {
            let len = range.len().0 / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
            HvaRange::new(range.start(), ByteCount(len))
        };
        Self { ranges: ranges.iter().filter_map(whole).collect() }
    }

    pub(super) fn count(&self) -> u32 {
        let bytes: u64 = self.ranges.iter().map(|range| range.len().0).sum();
        u32::try_from(bytes / BLOCK_SIZE as u64).unwrap_or(u32::MAX / BLOCK_PAGES)
    }

    /// Where that many bytes at an offset are.
    fn locate(&self, mut offset: u64, len: u64) -> Option<HvaRange> {
        for range in &self.ranges {
            if offset < range.len().0 {
                return HvaRange::new(Hva(range.start().0 + offset), ByteCount(len));
            }
            offset -= range.len().0;
        }
        None
    }

    pub(super) fn block(&self, block: BlockIndex) -> Option<HvaRange> {
        self.locate(u64::from(block.0) * BLOCK_SIZE as u64, BLOCK_SIZE as u64)
    }

    fn page(&self, page: PageIndex) -> Option<HvaRange> {
        self.locate(u64::from(page.0) * PAGE_SIZE as u64, PAGE_SIZE as u64)
    }
}

/// Reads pages of one process.
#[derive(Debug)]
pub(super) struct Scout {
    process: ProcessId,
    pagemap: Pagemap,
    buffer: Vec<PageBytes>,
}

impl Scout {
    pub(super) fn open(process: ProcessId) -> Result<Self, PagemapError> {
        Ok(Self { process, pagemap: Pagemap::open(process)?, buffer: vec![[0; PAGE_SIZE]; BATCH] })
    }

    /// Whether the process has ended. A scan of its page map would only find nothing there, and its number may be another's.
    pub(super) fn has_left(&self) -> bool {
        let first_page = HvaRange::new(Hva(0), ByteCount(PAGE_SIZE as u64));
        first_page.is_none_or(|page| self.pagemap.read(page, &mut Vec::new()).is_err())
    }

    /// Looks at pages, ascending, and tells what each is.
    pub(super) fn look(
        &mut self,
        blocks: &Blocks,
        pages: &[PageIndex],
        mut saw: impl FnMut(PageIndex, Look),
    ) -> Result<(), PagemapError> {
        let mut wanted = Vec::with_capacity(pages.len());
        for of_block in pages.chunk_by(|one, next| one.block() == next.block()) {
            let Some(range) = of_block.first().and_then(|page| blocks.block(page.block())) else { continue };
            let present = self.present(range)?;
            for page in of_block {
                let at = blocks.page(*page);
                let run = at.and_then(|at| present.iter().find(|(run, _)| run.contains(at)));
                match (at, run) {
                    (Some(_), Some((_, kind))) if kind.contains(Categories::ZERO_PAGE) => {
                        saw(*page, Look::Zero)
                    }
                    (Some(at), Some((_, kind))) if kind.is_empty() => wanted.push((*page, at)),
                    _ => saw(*page, Look::Away),
                }
            }
        }
        wanted.chunks(BATCH).for_each(|batch| self.read(batch, &mut saw));
        Ok(())
    }

    /// Runs of a block that are in memory, with what makes them unfit to be read.
    fn present(&self, block: HvaRange) -> Result<Vec<(HvaRange, Categories)>, PagemapError> {
        let filter = Filter {
            all_of: Categories::PRESENT,
            any_of: Categories::empty(),
            // What belongs to a file is not asked for: to tell, the kernel reads its struct of each page of the block.
            report: Categories::ZERO_PAGE | Categories::HUGE,
        };
        let mut runs = Vec::new();
        self.pagemap.scan(block, filter, |run| runs.push((run.range, run.categories)))?;
        Ok(runs)
    }

    /// Reads a batch. A page that cannot be read is away, and the rest is read all the same.
    fn read(&mut self, mut batch: &[(PageIndex, HvaRange)], saw: &mut impl FnMut(PageIndex, Look)) {
        while !batch.is_empty() {
            let ranges: Vec<HvaRange> = batch.iter().map(|(_, range)| *range).collect();
            let Some(buffer) = self.buffer.get_mut(..ranges.len()) else { return };
            let transfer = process_memory::read_vectored(self.process, &ranges, buffer.as_flattened_mut());
            let done = usize::try_from(transfer.done.pages_floor().0).unwrap_or(0);
            let (read, rest) = batch.split_at_checked(done).unwrap_or((batch, &[]));
            read.iter().zip(&self.buffer).for_each(|((page, _), bytes)| saw(*page, look_of(bytes)));
            if transfer.stop == Some(Refusal::NoProcess) {
                return rest.iter().for_each(|(page, _)| saw(*page, Look::Away));
            }
            batch = match rest.split_first() {
                Some(((page, _), rest)) => {
                    saw(*page, Look::Away);
                    rest
                }
                None => &[],
            };
        }
    }

    /// How many pages of a block take no memory of their own: what several mappings share, which in memory that no child
    /// inherits is what KSM merged, or the zero page.
    pub(super) fn merged(&self, block: HvaRange) -> Result<u64, PagemapError> {
        use plimsoll_sys::pagemap::Entry;
        let mut entries = Vec::new();
        self.pagemap.read(block, &mut entries)?;
        let is_merged = |entry: &&Entry| {
            entry.contains(Entry::PRESENT) && !entry.intersects(Entry::EXCLUSIVE | Entry::FILE_OR_SHARED)
        };
        Ok(entries.iter().filter(is_merged).count() as u64)
    }
}

fn look_of(bytes: &PageBytes) -> Look {
    match digest(bytes) {
        Digest::Zero => Look::Zero,
        // Spread over all bits, as a hash is: some of them choose what is remembered.
        Digest::Same(word) => {
            Look::Hash(u128::from(word).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
        }
        Digest::Hashed(hash) => Look::Hash(hash),
    }
}
