//! Which pages to take from a machine that is managed from outside, and how much it uses.
//!
//! Here nobody tells when a page is touched or brought back: the host's page map says where a page is *now*, whenever
//! it is asked, and asking costs. So whereabouts are looked up, never kept, and what is kept is evidence.
//!
//! Enters: where a block's pages are ([`Presence`]), what really left after it was taken, the ends of periods. Leaves:
//! runs of pages to take, pages to take as samples, the working-set estimate. What must never happen: a block whose pages
//! have just come back is taken again; a call that looks at more blocks than it was allowed.
//!
//! * **Proof of use** is a page that was taken and is in RAM again. `block` keeps it: two bits of *level* a page, which
//!   say how rarely the page is tried again, and the block's heat, which halves with each period.
//! * **Choosing**: a hand goes round the blocks. Cold ones go whole, first, so that huge pages go as huge pages; only
//!   then does a second hand split mixed ones. Blocks are looked at only when a hand comes by.
//! * **Hints** of somebody who watches regions (DAMON) only order the cold blocks.
//! * **The working set**: pages drawn at random are taken at the beginning of a period; those in RAM at its end were
//!   used ([`Sampler`]). Taking one page of a huge one splits it, so a large machine is sampled like a population by
//!   pollsters: a *panel* of blocks, one from each of equal stretches of the machine, of which one is replaced each
//!   period.
//! * [`Pace`] bounds how fast pages are taken, by what becomes of them.
//!
//! Memory: half a byte a page and 12 bytes a block, 0.013 % of guest memory; the panel takes up to 4 KiB.
//!
//! Known holes: a page the guest gives back (balloon, free page reporting) while it is away looks away for ever, which
//! costs nothing but a wrong number; a page that is taken and comes back between two looks and is discarded in between
//! counts as idle. With the panel, what one period says of a large machine has the error of a sample of 128 blocks; the
//! averages are over more.
mod block;
mod pace;
mod set;

pub use pace::{Pace, Signs, Verdict};
pub use set::PageSet;

use crate::replacement::{Round, Run};
use crate::sampler::Sampler;
use alloc::{vec, vec::Vec};
use block::{Block, Temper};
use plimsoll_types::{BLOCK_PAGES, BlockIndex, PageCount, PageIndex};

/// Blocks that are sampled at a time. A machine of up to 256 MiB is sampled whole.
const PANEL: u32 = 128;

/// In which order blocks are offered: by which hand, and whether they are to be hinted at where there are hints. No block is in two of
/// the passes, so that none is offered twice.
const PASSES: [(usize, Round, Temper, Option<bool>); 3] = [
    (0, Round::Whole, Temper::Cold, Some(false)),
    (0, Round::Whole, Temper::Cold, Some(true)),
    (1, Round::Split, Temper::Mixed, None),
];

/// A period, counted from the first. Counts wrap after centuries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Period(pub(crate) u32);

impl Period {
    const fn since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }
}

/// Where a block's pages are. Those in neither set have no contents, or are shared memory whose place the page map does
/// not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// In RAM.
    pub present: PageSet,
    /// In swap.
    pub swapped: PageSet,
}

/// How much [`Outside::choose`] may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Pages to choose.
    pub pages: u32,
    /// Blocks to look at, at most.
    pub looks: u32,
}

/// What [`Outside::choose`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Pages in all runs: at most a block more than wanted.
    pub pages: u32,
    /// Blocks that were looked at.
    pub looks: u32,
    /// Blocks left alone because their pages have just come back.
    pub resting: u32,
    /// The round in which it ended. [`Round::Split`] with fewer pages than wanted and looks to spare means that for now
    /// nothing else is to be had.
    pub round: Round,
}

/// What the end of a period showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples {
    /// Pages that were drawn for it and could be judged.
    pub judged: u32,
    /// Those of them that were used in it.
    pub used: u32,
    /// Pages drawn for the next, ascending: to be taken where they are in RAM.
    pub drawn: Vec<PageIndex>,
}

/// The evidence about one machine. One thread drives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outside {
    blocks: Vec<Block>,
    period: Period,
    /// The next block for whole and for split taking.
    hands: [u32; 2],
    /// Rounds the splitting hand has made.
    round: u32,
    sampler: Sampler,
    /// The blocks that are sampled, ascending, one from each stretch of the machine.
    panel: Vec<BlockIndex>,
    /// Blocks that are believed to be used, ascending.
    hinted: Vec<BlockIndex>,
    seed: u64,
    refaults: u64,
}

impl Outside {
    /// For a machine of `blocks` blocks of which nothing is known. The seed makes the draws repeatable.
    pub fn new(blocks: u32, seed: u64) -> Self {
        let mut machine = Self {
            blocks: vec![Block::default(); blocks as usize],
            period: Period(0),
            hands: [0; 2],
            round: 0,
            sampler: Sampler::new(0, seed),
            panel: Vec::new(),
            hinted: Vec::new(),
            seed: seed ^ 0x6a09_e667_f3bc_c908,
            refaults: 0,
        };
        machine.draw_panel();
        machine
    }

    /// The same machine with other blocks: `origin` says which block a new one was before, if any. Estimates stay.
    #[must_use]
    pub fn rearranged(&self, blocks: u32, origin: impl Fn(BlockIndex) -> Option<BlockIndex>) -> Self {
        let known = |block| Some(self.blocks.get(origin(block)?.get())?.without_trial());
        let mut machine = Self {
            blocks: (0..blocks).map(|block| known(BlockIndex(block)).unwrap_or_default()).collect(),
            hands: [0; 2],
            panel: Vec::new(),
            hinted: Vec::new(),
            sampler: self.sampler.clone(),
            ..*self
        };
        machine.draw_panel();
        machine
    }

    fn draw_panel(&mut self) {
        let size = self.block_count().min(PANEL);
        self.panel = (0..size).map(|stretch| self.draw_block(stretch, size)).collect();
        self.sampler.resize(size * BLOCK_PAGES);
    }

    /// A block of the stretch: there are `size` of them, of equal length as far as that goes.
    fn draw_block(&mut self, stretch: u32, size: u32) -> BlockIndex {
        let bound = |stretch: u32| u64::from(stretch) * u64::from(self.block_count()) / u64::from(size);
        let (start, end) = (bound(stretch), bound(stretch + 1));
        // xorshift64 (Marsaglia, 2003); its bias over so few blocks is below what a panel can show.
        self.seed |= 1;
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let block = start + self.seed % (end - start).max(1);
        BlockIndex(u32::try_from(block).unwrap_or(0))
    }

    /// Where a page of the panel lies in the machine.
    fn of_panel(&self, page: PageIndex) -> PageIndex {
        let block = self.panel.get(page.block().get()).copied().unwrap_or(BlockIndex(0));
        PageIndex(block.first_page().0 + page.in_block())
    }

    /// Tells where a block's pages are. Returns how many taken ones came back since the block was last seen.
    pub fn see(&mut self, block: BlockIndex, presence: &Presence) -> u32 {
        let Some(known) = self.blocks.get_mut(block.get()) else { return 0 };
        let back = known.see(presence, self.period);
        self.refaults += u64::from(back);
        back
    }

    /// Those pages of the block are not in RAM any more because they were taken. What was asked for and did not leave is
    /// not to be told.
    pub fn took(&mut self, block: BlockIndex, pages: PageSet) {
        if let Some(block) = self.blocks.get_mut(block.get()) {
            block.took(pages);
        }
    }

    /// Pages of the block that were taken and have not been seen back.
    pub fn away(&self, block: BlockIndex) -> PageSet {
        self.blocks.get(block.get()).map_or(PageSet::EMPTY, Block::away)
    }

    /// Appends runs of pages to take. `look` tells where a block's pages are; it is asked at most `want.looks` times, and
    /// each block at most twice. Each hand goes round at most once; where there are [hints](Self::hint), the one for whole blocks
    /// twice.
    ///
    /// # Errors
    /// Those of `look`; what was chosen up to then stays in `out`.
    pub fn choose<E>(
        &mut self,
        want: Want,
        mut look: impl FnMut(BlockIndex) -> Result<Presence, E>,
        out: &mut Vec<Run>,
    ) -> Result<Choice, E> {
        let mut choice = Choice { pages: 0, looks: 0, resting: 0, round: Round::Whole };
        for (hand, round, temper, hinted) in PASSES {
            let looks = match hinted {
                Some(true) if self.hinted.is_empty() => continue,
                // Blocks that hold nothing take a look, too: those with hints are to have their turn on any machine.
                Some(false) if !self.hinted.is_empty() => want.looks / 2,
                _ => want.looks,
            };
            choice.round = round;
            for _ in 0..self.blocks.len() {
                if choice.pages >= want.pages || choice.looks >= want.looks {
                    return Ok(choice);
                }
                if choice.looks >= looks {
                    break;
                }
                let block = BlockIndex(self.advance(hand));
                let found = self.temper(block);
                choice.resting += u32::from(round == Round::Split && found == Temper::Resting);
                if found != temper || hinted.is_some_and(|hinted| hinted != self.is_hinted(block)) {
                    continue;
                }
                let presence = look(block)?;
                choice.looks += 1;
                self.see(block, &presence);
                // What was just seen may have warmed it.
                if self.temper(block) == temper {
                    choice.pages += self.offer(block, presence.present, temper, out);
                }
            }
        }
        Ok(choice)
    }

    /// Somebody who watches without taking believes that these blocks are used, and the others are not. A hint is no proof: of
    /// cold blocks those that are not hinted at go first, and that is all. It stands until the next.
    pub fn hint(&mut self, used: impl IntoIterator<Item = BlockIndex>) {
        self.hinted = used.into_iter().collect();
        self.hinted.sort_unstable();
        self.hinted.dedup();
    }

    fn is_hinted(&self, block: BlockIndex) -> bool {
        self.hinted.binary_search(&block).is_ok()
    }

    /// The block under a hand, which moves on.
    fn advance(&mut self, hand: usize) -> u32 {
        let block = self.hands[hand];
        self.hands[hand] = (block + 1) % self.block_count().max(1);
        self.round = self.round.wrapping_add(u32::from(hand == 1 && self.hands[hand] == 0));
        block
    }

    fn temper(&self, block: BlockIndex) -> Temper {
        self.blocks.get(block.get()).map_or(Temper::Resting, |known| known.temper(self.period))
    }

    fn offer(&self, block: BlockIndex, present: PageSet, temper: Temper, out: &mut Vec<Run>) -> u32 {
        let Some(known) = self.blocks.get(block.get()) else { return 0 };
        let offered = known.offers(present, temper, self.round);
        let first = block.first_page().0;
        out.extend(
            offered.runs().map(|run| Run { first: PageIndex(first + run.start), pages: run.end - run.start }),
        );
        offered.len()
    }

    /// Ends a period: `is_present` tells of each page that was drawn for it whether it is in RAM now. Begins the next
    /// with `count` newly drawn pages. The caller takes those that are in RAM and tells of each whether it
    /// [left](Self::took) or [did not](Self::stayed).
    ///
    /// # Errors
    /// Those of `is_present`; the period then goes on.
    pub fn end_period<E>(
        &mut self,
        count: u32,
        mut is_present: impl FnMut(PageIndex) -> Result<bool, E>,
    ) -> Result<Samples, E> {
        let drawn = self.sampler.drawn();
        let judged: Vec<(PageIndex, bool)> = drawn
            .iter()
            .map(|page| is_present(self.of_panel(*page)).map(|used| (*page, used)))
            .collect::<Result<_, E>>()?;
        for (page, used) in &judged {
            let page = self.of_panel(*page);
            let Some(block) = self.blocks.get_mut(page.block().get()) else { continue };
            let page = PageSet::only(page);
            block.end_trial(page);
            if *used {
                block.came_back(page, self.period);
            }
        }
        self.period = Period(self.period.0.wrapping_add(1));
        let used = |page| judged.binary_search_by_key(&page, |(page, _)| *page).is_ok_and(|at| judged[at].1);
        self.sampler.turn(count, used);
        self.renew_panel();
        let drawn: Vec<PageIndex> = self.sampler.drawn().iter().map(|page| self.of_panel(*page)).collect();
        for page in &drawn {
            if let Some(block) = self.blocks.get_mut(page.block().get()) {
                block.begin_trial(PageSet::only(*page));
            }
        }
        let used = judged.iter().filter(|(_, used)| *used).count();
        let count = |pages: usize| u32::try_from(pages).unwrap_or(u32::MAX);
        Ok(Samples { judged: count(judged.len()), used: count(used), drawn })
    }

    /// Replaces one block of the panel, each in its turn. The pages just drawn are those of the new panel.
    fn renew_panel(&mut self) {
        let size = self.block_count().min(PANEL);
        if size < self.block_count() {
            let stretch = self.period.0 % size;
            let block = self.draw_block(stretch, size);
            self.panel[stretch as usize] = block;
        }
    }

    /// A drawn page was in RAM and could not be taken: it tells nothing.
    pub fn stayed(&mut self, page: PageIndex) {
        if let Ok(place) = self.panel.binary_search(&page.block()) {
            let first = u32::try_from(place).unwrap_or(0) * BLOCK_PAGES;
            self.sampler.forget(PageIndex(first + page.in_block()));
        }
        if let Some(block) = self.blocks.get_mut(page.block().get()) {
            block.end_trial(PageSet::only(page));
        }
    }

    /// Pages the machine uses in a period, or `None` before enough samples were judged.
    pub fn estimate(&self) -> Option<PageCount> {
        let panel = u64::from(self.block_count().min(PANEL)).max(1);
        let PageCount(pages) = self.sampler.estimate()?;
        Some(PageCount(pages * u64::from(self.block_count()) / panel))
    }

    /// How many pages of the block came back, halved with each period since.
    pub fn heat(&self, block: BlockIndex) -> u16 {
        self.blocks.get(block.get()).map_or(0, |known| known.heat(self.period))
    }

    /// Pages of the block that have come back after they were taken, at least once more than they stayed away.
    pub fn proven(&self, block: BlockIndex) -> u32 {
        self.blocks.get(block.get()).map_or(0, Block::proven)
    }

    /// True when samples are drawn from all blocks, and not from a panel of some.
    pub fn is_sampled_whole(&self) -> bool {
        self.block_count() <= PANEL
    }

    /// Blocks it was made for.
    pub fn block_count(&self) -> u32 {
        u32::try_from(self.blocks.len()).unwrap_or(u32::MAX)
    }

    /// Pages taken by choice that were seen back, ever. Samples are not among them.
    pub const fn refaults(&self) -> u64 {
        self.refaults
    }

    /// Bytes this bookkeeping takes.
    pub fn table_bytes(&self) -> usize {
        self.blocks.len() * size_of::<Block>()
            + (self.panel.len() + self.hinted.len()) * size_of::<BlockIndex>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::convert::Infallible;

    const FULL: PageSet = PageSet::repeated(u64::MAX);

    fn all_present(_: BlockIndex) -> Result<Presence, Infallible> {
        Ok(Presence { present: FULL, swapped: PageSet::EMPTY })
    }

    fn chosen(machine: &mut Outside, pages: u32) -> (Vec<Run>, Choice) {
        let mut runs = Vec::new();
        let Ok(choice) = machine.choose(Want { pages, looks: u32::MAX }, all_present, &mut runs);
        assert_eq!(choice.pages, runs.iter().map(|run| run.pages).sum::<u32>());
        (runs, choice)
    }

    fn return_pages(machine: &mut Outside, block: u32, places: core::ops::Range<u32>) {
        machine.took(BlockIndex(block), PageSet::from_range(places));
        machine.see(BlockIndex(block), &Presence { present: FULL, swapped: PageSet::EMPTY });
    }

    #[test]
    fn cold_blocks_go_whole_and_before_a_mixed_one_is_split() {
        let mut machine = Outside::new(3, 1);
        return_pages(&mut machine, 0, 3..4);
        assert_eq!((machine.proven(BlockIndex(0)), machine.proven(BlockIndex(1))), (1, 0));
        let whole = |block: u32| Run { first: BlockIndex(block).first_page(), pages: 512 };
        assert_eq!(chosen(&mut machine, 1024).0, [whole(1), whole(2)]);
        let (runs, choice) = chosen(&mut machine, 1536);
        assert_eq!(choice.round, Round::Split);
        assert_eq!(runs[..2], [whole(1), whole(2)]);
        assert_eq!(
            runs[2..],
            [Run { first: PageIndex(0), pages: 3 }, Run { first: PageIndex(4), pages: 508 }]
        );
    }

    #[test]
    fn of_cold_blocks_those_that_are_believed_to_be_used_go_last_and_before_a_mixed_one_is_split() {
        let whole = |block: u32| Run { first: BlockIndex(block).first_page(), pages: 512 };
        // Wherever the hand is, none is offered twice.
        for turns in 0..4 {
            let mut machine = Outside::new(4, 1);
            return_pages(&mut machine, 0, 3..4);
            chosen(&mut machine, turns * 512);
            machine.hint([2, 1, 1].map(BlockIndex));
            let (mut runs, _) = chosen(&mut machine, 1536);
            assert_eq!(runs[0], whole(3), "{turns}");
            runs.sort_by_key(|run| run.first);
            assert_eq!(runs, [whole(1), whole(2), whole(3)], "{turns}");
            assert_eq!(chosen(&mut machine, 512).0, [whole(3)]);
            machine.hint([]);
            assert_eq!(chosen(&mut machine, 1536).0.len(), 3);
        }
    }

    #[test]
    fn hinted_blocks_have_their_turn_however_many_others_hold_nothing() {
        let mut machine = Outside::new(100, 1);
        machine.hint([BlockIndex(99)]);
        let look = |block| {
            let present = if block == BlockIndex(99) { FULL } else { PageSet::EMPTY };
            Ok::<_, Infallible>(Presence { present, swapped: PageSet::EMPTY })
        };
        let Ok(choice) = machine.choose(Want { pages: 512, looks: 20 }, look, &mut Vec::new());
        assert_eq!((choice.pages, choice.looks), (512, 11));
    }

    #[test]
    fn a_block_that_just_came_back_is_left_alone_however_much_is_wanted() {
        let mut machine = Outside::new(2, 1);
        return_pages(&mut machine, 0, 0..512);
        let (runs, choice) = chosen(&mut machine, u32::MAX);
        assert_eq!(runs, [Run { first: PageIndex(512), pages: 512 }]);
        assert_eq!((choice.resting, choice.round), (1, Round::Split));
    }

    #[test]
    fn no_more_blocks_are_looked_at_than_allowed_and_the_next_call_goes_on_from_there() {
        let mut machine = Outside::new(10, 1);
        let mut seen = Vec::new();
        for _ in 0..5 {
            let look = |block| {
                seen.push(block);
                Ok::<_, Infallible>(Presence::default())
            };
            let Ok(choice) = machine.choose(Want { pages: 1, looks: 3 }, look, &mut Vec::new());
            assert_eq!((choice.pages, choice.looks), (0, 3));
        }
        assert_eq!(seen, (0..15).map(|look| BlockIndex(look % 10)).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_known_of_blocks_moves_with_them_and_the_estimate_stays() {
        let mut machine = Outside::new(4, 1);
        return_pages(&mut machine, 1, 0..512);
        let present = |_| Ok::<_, Infallible>(true);
        let Ok(_) = machine.end_period(300, present);
        let Ok(_) = machine.end_period(300, present);
        assert_eq!(machine.estimate(), Some(PageCount(4 * 512)));
        let moved = machine.rearranged(8, |block| block.0.checked_sub(4).map(BlockIndex));
        assert!(moved.heat(BlockIndex(5)) > 100 && moved.heat(BlockIndex(1)) == 0);
        assert_eq!(moved.estimate(), Some(PageCount(8 * 512)), "the same share of more");
        let (runs, _) = chosen(&mut moved.clone(), u32::MAX);
        assert!(runs.iter().any(|run| run.pages == 512), "samples of before are on trial no more");
    }

    #[test]
    fn a_large_machine_is_sampled_through_few_blocks_that_change_one_by_one() {
        let mut machine = Outside::new(10_000, 3);
        let mut before: Vec<BlockIndex> = Vec::new();
        for period in 0..300 {
            let Ok(samples) = machine.end_period(512, |page| Ok::<_, Infallible>(page.0 % 4 == 0));
            let mut blocks: Vec<BlockIndex> = samples.drawn.iter().map(|page| page.block()).collect();
            blocks.dedup();
            assert!(samples.drawn.is_sorted() && blocks.len() <= PANEL as usize);
            let panel = &machine.panel;
            let changed = panel.iter().zip(&before).filter(|(now, then)| now != then).count();
            assert!(changed <= 1, "{changed} in period {period}");
            before = panel.clone();
        }
        let share = machine.estimate().unwrap().0 as f64 / (10_000.0 * 512.0);
        assert!((0.22..0.32).contains(&share), "{share}");
    }

    #[test]
    fn a_sample_that_could_not_be_taken_does_not_count() {
        let mut machine = Outside::new(2, 1);
        let Ok(first) = machine.end_period(512, |_| Ok::<_, Infallible>(true));
        first.drawn.iter().for_each(|page| machine.stayed(*page));
        let Ok(second) = machine.end_period(512, |_| Ok::<_, Infallible>(true));
        assert_eq!((second.judged, machine.estimate()), (0, None));
    }

    #[test]
    fn tables_are_a_fortieth_of_a_percent_at_most() {
        let machine = Outside::new(512, 1);
        assert!(machine.table_bytes() * 4000 <= 512 << 21, "{}", machine.table_bytes());
    }

    #[test]
    fn a_machine_without_memory_has_nothing_to_take() {
        let mut machine = Outside::new(0, 1);
        assert_eq!(chosen(&mut machine, 5).0, []);
        let Ok(samples) = machine.end_period(512, |_| Ok::<_, Infallible>(true));
        assert_eq!(samples, Samples::default());
    }
}
