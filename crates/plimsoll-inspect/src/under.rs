//! How large the host's pages are under the guest's: pages that the guest maps enter, what is left of their size leaves.
//!
//! A translation through both stages is as large as the smaller of the two (see [`plimsoll_mmu::splinter`]); and a large one needs both
//! addresses to lie alike in their large pages. The host's sizes are those of the VMM's page table, which the hypervisor's second
//! stage follows: it maps nothing larger, and may map it smaller (under write protection, while memory is logged as dirty).
use crate::ram::GuestRam;
use crate::tables::Mapped;
use plimsoll_mmu::splinter::Splinter;
use plimsoll_sys::pagemap::{Categories, Filter, Pagemap, PagemapError};
use plimsoll_types::{BLOCK_SIZE, Gpa, PAGE_SHIFT, PAGE_SIZE};

const PAGE: u64 = PAGE_SIZE as u64;
const BLOCK: u64 = BLOCK_SIZE as u64;

/// Consecutive guest physical addresses that the host has in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    gpa: u64,
    end: u64,
    is_huge: bool,
}

/// What the host has in RAM of a guest's, and in which sizes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Under {
    runs: Vec<Run>,
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
        Self { runs: joined }
    }

    /// What is left of a page of the guest's.
    pub fn splinter(&self, mapped: &Mapped) -> Splinter {
        let size = 1u64.checked_shl(mapped.shift).unwrap_or(0);
        let mut found =
            Splinter { leaves: 1, large: u64::from(mapped.shift > PAGE_SHIFT), ..Splinter::default() };
        let end = mapped.gpa.0.saturating_add(size);
        for run in self.overlapping(mapped.gpa, end) {
            let (from, to) = (run.gpa.max(mapped.gpa.0), run.end.min(end));
            let (bytes, whole) = (to - from, blocks(from, to));
            let blocks = if run.is_huge && mapped.shift > PAGE_SHIFT { whole } else { 0 };
            let in_pages = bytes - blocks * BLOCK;
            found.bytes += bytes;
            found.entries += blocks + in_pages / PAGE;
            found.split_by_host += if size > PAGE { in_pages } else { 0 };
            found.split_by_host += if size > BLOCK { blocks * BLOCK } else { 0 };
            found.split_by_guest += if run.is_huge { in_pages } else { 0 };
        }
        found.absent = size.saturating_sub(found.bytes);
        found.whole = u64::from(found.large == 1 && found.entries == 1 && found.absent == 0);
        found
    }

    fn overlapping(&self, gpa: Gpa, end: u64) -> impl Iterator<Item = &Run> {
        let first = self.runs.partition_point(|run| run.end <= gpa.0);
        self.runs.iter().skip(first).take_while(move |run| run.gpa < end)
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

    #[test]
    fn a_page_at_the_end_of_the_address_space_overflows_nothing() {
        assert_eq!(under().splinter(&mapped(u64::MAX - 0xfff, 12)).absent, PAGE);
    }
}
