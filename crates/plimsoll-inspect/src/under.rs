//! How large the host's pages are under the guest's: pages that the guest maps enter, what is left of their size leaves.
//!
//! A translation through both stages is as large as the smaller of the two (see [`plimsoll_mmu::splinter`]); and a large one needs both
//! addresses to lie alike in their large pages. The host's sizes are those of the VMM's page table, which the hypervisor's second
//! stage follows: it maps nothing larger, and may map it smaller (under write protection, while memory is logged as dirty).
use crate::ram::GuestRam;
use crate::tables::Mapped;
use core::ops::AddAssign;
use plimsoll_mmu::splinter::Splinter;
use plimsoll_sys::pagemap::{Categories, Filter, Pagemap, PagemapError};
use plimsoll_types::{BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE};

const PAGE: u64 = PAGE_SIZE as u64;
const BLOCK: u64 = BLOCK_SIZE as u64;

/// Consecutive guest physical addresses that the host has in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    gpa: u64,
    end: u64,
    is_huge: bool,
}

impl Run {
    /// What of it lies there, under pages of the guest's that are large or under small ones.
    fn share(&self, gpa: u64, end: u64, is_large: bool) -> Share {
        let (from, to) = (self.gpa.max(gpa), self.end.min(end));
        let bytes = to.saturating_sub(from);
        let blocks = if self.is_huge && is_large { blocks(from, to) } else { 0 };
        Share { bytes, blocks, huge_in_pages: if self.is_huge { bytes - blocks * BLOCK } else { 0 } }
    }
}

/// What the host has of some addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    bytes: u64,
    /// Whole huge pages of it.
    blocks: u64,
    /// Bytes in huge pages that serve as small ones.
    huge_in_pages: u64,
}

impl AddAssign for Share {
    fn add_assign(&mut self, other: Self) {
        let Self { bytes, blocks, huge_in_pages } = other;
        self.bytes += bytes;
        self.blocks += blocks;
        self.huge_in_pages += huge_in_pages;
    }
}

/// What the host has in RAM of a guest's, and in which sizes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Under {
    runs: Vec<Run>,
    /// The shares under large pages of all runs before each one, and of all: 512 entries may name one page of 1 GiB, over any number
    /// of runs.
    before: Vec<Share>,
}

impl Under {
    /// Looks at all of the guest's RAM.
    ///
    /// # Errors
    /// The page map cannot be read.
    pub fn look(pagemap: &Pagemap, ram: &GuestRam) -> Result<Self, PagemapError> {
        let mut runs = Vec::new();
        let told = Categories::PRESENT | Categories::HUGE;
        let filter = Filter { all_of: Categories::PRESENT, any_of: Categories::empty(), report: told };
        for piece in ram.pieces() {
            // Pages of 2 MiB of the host's that the guest sees across its own serve as small ones.
            let lies_alike = piece.gpa.0 % BLOCK == piece.hva.start().0 % BLOCK;
            pagemap.scan(piece.hva, filter, |run| {
                let gpa = piece.gpa.0 + (run.range.start().0 - piece.hva.start().0);
                let is_huge = lies_alike && run.categories.contains(Categories::HUGE);
                runs.push(Run { gpa, end: gpa + run.range.len().0, is_huge });
            })?;
        }
        Ok(Self::of(runs))
    }

    /// Neighbours of the same kind become one.
    fn of(runs: Vec<Run>) -> Self {
        let mut joined: Vec<Run> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last) if last.end == run.gpa && last.is_huge == run.is_huge => last.end = run.end,
                _ => joined.push(run),
            }
        }
        let mut sum = Share::default();
        let mut before = vec![sum];
        for run in &joined {
            sum += run.share(run.gpa, run.end, true);
            before.push(sum);
        }
        Self { runs: joined, before }
    }

    /// What is left of a page of the guest's.
    pub fn splinter(&self, mapped: &Mapped) -> Splinter {
        let size = 1u64.checked_shl(mapped.shift).unwrap_or(0);
        let is_large = mapped.shift > PAGE_SHIFT;
        let share = self.share(mapped.gpa.0, mapped.gpa.0.saturating_add(size), is_large);
        let in_pages = share.bytes - share.blocks * BLOCK;
        let mut found = Splinter { leaves: 1, large: u64::from(is_large), ..Splinter::default() };
        found.bytes = share.bytes;
        found.entries = share.blocks + in_pages / PAGE;
        found.split_by_host = if size > PAGE { in_pages } else { 0 };
        found.split_by_host += if size > BLOCK { share.blocks * BLOCK } else { 0 };
        found.split_by_guest = share.huge_in_pages;
        found.absent = size.saturating_sub(found.bytes);
        found.whole = u64::from(found.large == 1 && found.entries == 1 && found.absent == 0);
        found
    }

    /// The runs at both ends by themselves, those between them by their sums. A small page has none between.
    fn share(&self, gpa: u64, end: u64, is_large: bool) -> Share {
        let first = self.runs.partition_point(|run| run.end <= gpa);
        let behind = self.runs.partition_point(|run| run.gpa < end);
        let mut share = Share::default();
        let Some(last) = behind.checked_sub(1).filter(|last| *last >= first) else { return share };
        let ends = [Some(first), (last > first).then_some(last)];
        for run in ends.into_iter().flatten().filter_map(|place| self.runs.get(place)) {
            share += run.share(gpa, end, is_large);
        }
        if let Some((until, from)) =
            self.before.get(last).zip(self.before.get(first + 1)).filter(|_| last > first)
        {
            share += Share {
                bytes: until.bytes - from.bytes,
                blocks: until.blocks - from.blocks,
                huge_in_pages: until.huge_in_pages - from.huge_in_pages,
            };
        }
        share
    }
}

/// Whole blocks between two addresses.
const fn blocks(from: u64, to: u64) -> u64 {
    (to / BLOCK).saturating_sub(from.div_ceil(BLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_mmu::Permissions;
    use plimsoll_types::Gpa;
    use proptest::prelude::{Just, any, prop_oneof, proptest};

    fn mapped(gpa: u64, shift: u32) -> Mapped {
        Mapped { gva: 0, gpa: Gpa(gpa), shift, permissions: Permissions::all() }
    }

    /// Huge from 2 to 6 MiB, a page at 7 MiB, small pages from 8 to 10 MiB.
    fn under() -> Under {
        let run = |gpa, end, is_huge| Run { gpa, end, is_huge };
        let runs = vec![
            run(2 << 20, 4 << 20, true),
            run(4 << 20, 6 << 20, true),
            run(7 << 20, (7 << 20) + PAGE, false),
            run(8 << 20, 10 << 20, false),
        ];
        Under::of(runs)
    }

    #[test]
    fn neighbours_are_joined() {
        assert_eq!(under().runs.len(), 3);
    }

    #[test]
    fn a_large_page_over_a_huge_one_is_whole() {
        let found = under().splinter(&mapped(4 << 20, 21));
        assert_eq!((found.large, found.whole, found.entries, found.bytes), (1, 1, 1, BLOCK));
        assert_eq!((found.split_by_host, found.split_by_guest, found.absent), (0, 0, 0));
    }

    #[test]
    fn a_large_page_over_small_ones_takes_as_many_entries_as_there_are() {
        let found = under().splinter(&mapped(8 << 20, 21));
        assert_eq!((found.whole, found.entries, found.split_by_host), (0, 512, BLOCK));
        let sparse = under().splinter(&mapped(6 << 20, 21));
        assert_eq!((sparse.whole, sparse.entries, sparse.bytes, sparse.absent), (0, 1, PAGE, BLOCK - PAGE));
        let nothing = under().splinter(&mapped(12 << 20, 21));
        assert_eq!((nothing.entries, nothing.absent), (0, BLOCK));
    }

    #[test]
    fn a_small_page_over_a_huge_one_is_split_by_the_guest() {
        let found = under().splinter(&mapped((2 << 20) + 5 * PAGE, 12));
        assert_eq!((found.large, found.entries, found.split_by_guest, found.split_by_host), (0, 1, PAGE, 0));
    }

    #[test]
    fn a_page_of_1_gib_is_never_whole_over_pages_of_2_mib() {
        let found = under().splinter(&mapped(0, 30));
        assert_eq!((found.whole, found.entries), (0, 2 + 1 + 512));
        assert_eq!(found.split_by_host, found.bytes);
        assert_eq!(found.bytes + found.absent, 1 << 30);
    }

    proptest! {
        #[test]
        fn sums_are_those_of_each_run_by_itself(
            // In quarters of a block: how far the next run is away, how long it is, and whether it is huge.
            runs in proptest::collection::vec((0..4u64, 1..12u64, any::<bool>()), 0..80),
            pages in proptest::collection::vec((0..800u64, prop_oneof![Just(12u32), Just(21), Just(30)]), 1..20),
        ) {
            let (mut at, mut all) = (0, Vec::new());
            for (gap, len, is_huge) in runs {
                let gpa = at + gap * BLOCK / 4;
                at = gpa + len * BLOCK / 4;
                all.push(Run { gpa, end: at, is_huge });
            }
            let under = Under::of(all);
            for (place, shift) in pages {
                let gpa = (place * BLOCK / 4) >> shift << shift;
                let end = gpa + (1 << shift);
                let mut expected = Share::default();
                let touched = under.runs.iter().filter(|run| run.gpa < end && run.end > gpa);
                touched.for_each(|run| expected += run.share(gpa, end, shift > PAGE_SHIFT));
                assert_eq!(under.share(gpa, end, shift > PAGE_SHIFT), expected);
            }
        }
    }

    #[test]
    fn many_large_pages_over_many_runs_are_looked_up_and_not_gone_through() {
        let run = |place: u64| Run { gpa: place * 2 * PAGE, end: (place * 2 + 1) * PAGE, is_huge: false };
        let under = Under::of((0..131_072).map(run).collect());
        let page = mapped(0, 30);
        // Run by run these would be 30 thousand million.
        let entries: u64 = (0..262_144).map(|_| under.splinter(&page).entries).sum();
        assert_eq!(entries, 262_144 * 131_072);
    }

    #[test]
    fn a_page_at_the_end_of_the_address_space_overflows_nothing() {
        assert_eq!(under().splinter(&mapped(u64::MAX - 0xfff, 12)).absent, PAGE);
    }
}
