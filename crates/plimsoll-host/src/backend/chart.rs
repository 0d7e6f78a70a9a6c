//! Where a machine's pages are, for whoever looks at it.
//!
//! Enters: page words under our own pager, or what was last seen of a page map. Leaves: sums over the machine, and a [`Chart`] of
//! its memory in cells. What must never happen: the loop drawing a chart that nobody asks for. So a chart of page words is a way to
//! read them, drawn on the thread of whoever asks; and one of a page map comes from a look that was made anyway.
use plimsoll_attach::balloon::Plugged;
use plimsoll_core::layout::Region;
use plimsoll_core::map::Words;
use plimsoll_core::word::{PageWord, StateKind};
use plimsoll_linux::kernel::BlockUse;
use plimsoll_linux::nodes::Place;
use plimsoll_linux::uffd::manager::ShardWords;
use plimsoll_policy::Ppm;
use plimsoll_types::{BLOCK_PAGES, ByteCount, MachineId, PageCount};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Cells of a chart: as many as a page and a terminal of 80 columns can show.
pub const CELLS: usize = 256;
/// Words read of a cell, evenly spread: all cells together take 0.3 ms however large the machine is.
const READ_MAX: usize = 1024;

/// A guest's pages by where they are. Together they are what it owns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// In its RAM.
    pub resident: PageCount,
    /// In RAM, unmapped: the next touch shows that they are used, the next minute that they are not.
    pub limbo: PageCount,
    /// Compressed: in the store, or in swap.
    pub stored: PageCount,
    /// On the disk tier.
    pub disk: PageCount,
    /// Nowhere: never touched, or given back.
    pub free: PageCount,
    /// Of those, by how the guest gave them back, as far as that is known. What it has used since is not among them.
    pub given: Given,
}

/// Pages that a guest gave back and has not used since, by how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// It told by itself that it does not use them: free page reporting.
    pub reported: PageCount,
    /// The host asked, or looked where the guest shows what it has free: hinting, an allocator that is shared.
    pub hinted: PageCount,
    /// In its balloon.
    pub ballooned: PageCount,
    /// Nobody knows how; perhaps some were never there.
    pub otherwise: PageCount,
}

/// Where a machine's pages are.
#[derive(Clone, Debug)]
pub struct Whereabouts {
    /// All of them.
    pub pages: Pages,
    /// What is plugged of it, where it has virtio-mem devices.
    pub plugged: Option<Plugged>,
    /// The pagers that are at a NUMA node, each by its shard.
    pub seats: Vec<(MachineId, Place)>,
    /// Faults that were served so far; of a machine managed from outside, pages that came back.
    pub faults: u64,
    /// Its memory from the first page to the last.
    pub chart: Chart,
}

/// A part of a machine's memory: how much of it is where, and how warm it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// In RAM.
    pub resident: Ppm,
    /// In limbo.
    pub limbo: Ppm,
    /// Compressed, or on a disk.
    pub stored: Ppm,
    /// Pages that came back lately, of all; of a machine managed from outside only.
    pub heat: Option<Ppm>,
}

/// How a machine's memory is drawn.
#[derive(Clone, Debug)]
pub enum Chart {
    /// From its page words, when somebody asks. One part a shard.
    Words(Vec<ShardWords>),
    /// As it was last seen.
    Seen(Arc<[Cell]>),
}

impl Chart {
    /// At most [`CELLS`] of them, of equal size but for the last, from the first page to the last.
    pub fn cells(&self) -> Vec<Cell> {
        match self {
            Self::Words(shards) => {
                let shards: Vec<&[AtomicU64]> = shards.iter().map(|shard| shard.words.words()).collect();
                of_words(&shards)
            }
            Self::Seen(cells) => cells.to_vec(),
        }
    }

    /// What its manager's words say of `most` pages from the `first` on; nothing where it has no words.
    pub fn table(&self, first: usize, most: usize) -> Option<Table> {
        let Self::Words(shards) = self else { return None };
        let words: Vec<&[AtomicU64]> = shards.iter().map(|shard| shard.words.words()).collect();
        let regions = shards.iter().flat_map(|shard| &shard.regions).copied().collect();
        let pages = words.iter().map(|words| words.len()).sum();
        Some(Table { regions, pages, first, states: states(&words, first, most) })
    }

    /// That of blocks as the page map showed them last.
    pub(super) fn of_blocks(blocks: impl Iterator<Item = BlockUse>) -> Self {
        let blocks: Vec<BlockUse> = blocks.collect();
        let size = blocks.len().div_ceil(CELLS).max(1);
        let cell = |blocks: &[BlockUse]| {
            let pages = blocks.len() as u64 * u64::from(BLOCK_PAGES);
            let part = |of: fn(&BlockUse) -> u16| {
                Ppm::of(blocks.iter().map(|block| u64::from(of(block))).sum(), pages).min(Ppm::WHOLE)
            };
            Cell {
                resident: part(|block| block.resident),
                limbo: Ppm(0),
                stored: part(|block| block.elsewhere),
                heat: Some(part(|block| block.heat)),
            }
        };
        Self::Seen(blocks.chunks(size).map(cell).collect())
    }
}

/// What the words say of a machine's pages. A word changes whenever its pager changes it, also while this is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Where the pages lie in the guest, one region behind the other.
    pub regions: Vec<Region>,
    /// How many there are in all.
    pub pages: usize,
    /// The first one that is here.
    pub first: usize,
    /// From that one on. Of a word that is damaged nothing is known.
    pub states: Vec<Option<StateKind>>,
}

fn states(shards: &[&[AtomicU64]], first: usize, most: usize) -> Vec<Option<StateKind>> {
    let words = shards.iter().flat_map(|words| words.iter()).skip(first).take(most);
    words.map(|word| Some(PageWord(word.load(Ordering::Relaxed)).state()?.kind())).collect()
}

fn of_words(shards: &[&[AtomicU64]]) -> Vec<Cell> {
    let pages: usize = shards.iter().map(|words| words.len()).sum();
    let size = pages.div_ceil(CELLS).max(1);
    let word = |mut page: usize| {
        shards.iter().find_map(|words| {
            let found = words.get(page);
            page = page.saturating_sub(words.len());
            found
        })
    };
    let cell = |first: usize| {
        let last = (first + size).min(pages);
        let (mut read, mut found) = (0, [0_u64; StateKind::ALL.len()]);
        for page in (first..last).step_by(size.div_ceil(READ_MAX)) {
            // One that is damaged is its pager's to find, and of no state here.
            let state = word(page).and_then(|word| PageWord(word.load(Ordering::Relaxed)).state());
            read += 1;
            if let Some(state) = state {
                found[state.kind() as usize] += 1;
            }
        }
        let part = |kinds: &[StateKind]| Ppm::of(kinds.iter().map(|kind| found[*kind as usize]).sum(), read);
        Cell { resident: part(RESIDENT), limbo: part(LIMBO), stored: part(STORED), heat: None }
    };
    (0..pages).step_by(size).map(cell).collect()
}

/// States whose pages are in RAM, mapped; taken from there, not compressed yet; compressed, on a disk or in a file. All others are nowhere.
const RESIDENT: &[StateKind] =
    &[StateKind::Resident, StateKind::Pinned, StateKind::NeverPage, StateKind::Unwatched];
const LIMBO: &[StateKind] = &[StateKind::Capturing, StateKind::Limbo];
const STORED: &[StateKind] = &[StateKind::Stored, StateKind::File];

/// How a guest gives memory back but by its balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OtherWay {
    /// By free page reporting, and in no other way that its VMM has.
    Reports,
    /// There is no other way that is known of, or more than one.
    #[default]
    Unknown,
}

impl Pages {
    /// By a census of page words, of whose stored pages so many are on a disk.
    pub(super) fn of_census(census: &plimsoll_core::map::Census, disk: PageCount) -> Self {
        let sum = |kinds: &[StateKind]| kinds.iter().map(|kind| census.of(*kind)).sum::<PageCount>();
        let (resident, limbo, all) = (sum(RESIDENT), sum(LIMBO), sum(STORED));
        let disk = disk.min(all);
        let free = census.total().saturating_sub(resident).saturating_sub(limbo).saturating_sub(all);
        let given = Given {
            reported: census.of(StateKind::Reported),
            hinted: census.of(StateKind::Hinted),
            ballooned: census.of(StateKind::Ballooned),
            otherwise: census.of(StateKind::Absent),
        };
        Self { resident, limbo, stored: all.saturating_sub(disk), disk, free, given }
    }

    /// Of a machine of that size, of which so much is in RAM and so much in swap.
    pub(super) fn outside(size: ByteCount, resident: PageCount, stored: PageCount) -> Self {
        let free = size.pages_floor().saturating_sub(resident).saturating_sub(stored);
        Self { resident, stored, free, ..Self::default() }
    }

    /// The same, whose balloon holds so much as its VMM says, and of which `gone` pages were seen somewhere before. From outside
    /// nobody sees how a page went, so what went and is more than the balloon holds went by `else_by`.
    pub(super) fn given(self, balloon: ByteCount, gone: PageCount, else_by: OtherWay) -> Self {
        let ballooned = balloon.pages_floor().min(self.free);
        let rest = gone.saturating_sub(ballooned).min(self.free.saturating_sub(ballooned));
        let given = match else_by {
            OtherWay::Reports => Given { ballooned, reported: rest, ..Given::default() },
            OtherWay::Unknown => Given { ballooned, otherwise: rest, ..Given::default() },
        };
        Self { given, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_core::map::{HeapWords, PageMap};
    use plimsoll_core::word::{Gift, Transition};
    use plimsoll_types::PageIndex;

    #[test]
    fn cells_cover_every_shard_in_order_and_say_what_is_in_ram() {
        let [first, second] = [600, 424].map(HeapWords::new);
        let mut map = PageMap::adopt(&first).unwrap();
        for page in 0..512 {
            map.apply(PageIndex(page), Transition::Install).unwrap();
        }
        let cells = of_words(&[first.words(), second.words()]);
        assert_eq!(cells.len(), CELLS);
        let in_ram = cells.iter().position(|cell| cell.resident != Ppm::WHOLE);
        assert_eq!(in_ram, Some(CELLS / 2), "half of 1024 pages are in RAM, the first ones");
        assert!(cells[CELLS / 2..].iter().all(|cell| *cell == Cell::default()));
        assert_eq!(of_words(&[]), []);
        assert_eq!(of_words(&[HeapWords::new(3).words()]).len(), 3);
    }

    #[test]
    fn each_page_has_its_state_whatever_shard_it_is_in_and_a_damaged_word_has_none() {
        let [first, second] = [3, 2].map(HeapWords::new);
        PageMap::adopt(&first).unwrap().apply(PageIndex(2), Transition::Install).unwrap();
        second.words()[1].store(u64::MAX, Ordering::Relaxed);
        let words = [first.words(), second.words()];
        let (zero, resident) = (Some(StateKind::Zero), Some(StateKind::Resident));
        assert_eq!(states(&words, 0, 100), [zero, zero, resident, zero, None]);
        assert_eq!(states(&words, 2, 2), [resident, zero]);
        assert_eq!(states(&words, 5, 2), []);
        assert_eq!(Chart::Seen(Arc::default()).table(0, 1), None);
    }

    #[test]
    fn what_a_guest_gave_back_is_counted_by_how_and_is_no_more_than_what_is_nowhere() {
        let words = HeapWords::new(64);
        let mut map = PageMap::adopt(&words).unwrap();
        let mut give = |page, gift| {
            map.apply(PageIndex(page), Transition::Discard).unwrap();
            if let Some(gift) = gift {
                map.apply(PageIndex(page), Transition::Explain(gift)).unwrap();
            }
        };
        (0..8).for_each(|page| give(page, Some(Gift::Reported)));
        (8..12).for_each(|page| give(page, Some(Gift::Hinted)));
        (12..14).for_each(|page| give(page, Some(Gift::Ballooned)));
        give(14, None);
        let pages = Pages::of_census(map.census(), PageCount(0));
        let [reported, hinted, ballooned, otherwise] = [8, 4, 2, 1].map(PageCount);
        assert_eq!(pages.given, Given { reported, hinted, ballooned, otherwise });
        assert_eq!(pages.free, PageCount(64), "of 64 pages that are nowhere");

        let outside = |balloon, gone, by| {
            let pages = Pages::outside(PageCount(100).bytes(), PageCount(50), PageCount(10));
            pages.given(PageCount(balloon).bytes(), PageCount(gone), by).given
        };
        let ballooned = PageCount(30);
        let known = Given { ballooned, ..Given::default() };
        assert_eq!(outside(30, 30, OtherWay::Reports), known, "the balloon's pages are not counted twice");
        assert_eq!(outside(30, 0, OtherWay::Reports), known, "it may hold what was never touched");
        assert_eq!(outside(30, 35, OtherWay::Reports), Given { reported: PageCount(5), ..known });
        assert_eq!(outside(30, 35, OtherWay::Unknown), Given { otherwise: PageCount(5), ..known });
        let most = Given { ballooned: PageCount(40), ..Given::default() };
        assert_eq!(
            outside(70, 90, OtherWay::Reports),
            most,
            "a VMM that says more than can be is not believed"
        );
    }

    #[test]
    fn blocks_seen_from_outside_are_gathered_with_their_heat() {
        let block = |resident, elsewhere, heat| BlockUse { resident, elsewhere, heat };
        let mut blocks = vec![block(512, 0, 700); 2];
        blocks.resize(2 * CELLS, block(0, 256, 0));
        let cells = Chart::of_blocks(blocks.into_iter()).cells();
        assert_eq!(cells.len(), CELLS);
        let warm = Cell { resident: Ppm::WHOLE, heat: Some(Ppm::WHOLE), ..Cell::default() };
        let cold = Cell { stored: Ppm(500_000), heat: Some(Ppm(0)), ..Cell::default() };
        assert_eq!((cells[0], cells[1], cells[CELLS - 1]), (warm, cold, cold));
    }
}
