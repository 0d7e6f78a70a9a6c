//! Which pages to take: credit per page, heat per block, ghosts of what was stored.
//!
//! Enters: which pages came back and from where. Leaves: runs of resident pages to capture. The shape is S3-FIFO's
//! (Yang et al., SOSP '23): limbo is the small queue every page passes through, resident memory the main queue, and
//! ghosts remember what left limbo unused. A page is seen used when it comes back, and by a host that reads its guests'
//! accessed bits also where it is; credit is given then and nowhere else:
//!
//! | the page came back from | credit |
//! |---|---|
//! | limbo: it was used within the time limbo holds a page | 3 |
//! | the store, still a ghost: it would have been used had limbo been longer | 2 |
//! | the store, no longer a ghost | 1 |
//! | nowhere: first touch; or brought back before it was touched | 0 |
//! | it was there, and its accessed bit was set: used since the bits were looked at last | 2, if it had less |
//!
//! A block's heat is the sum of its pages' credits. A hand goes round the blocks. Blocks without heat are taken whole,
//! first, so that huge pages move as huge pages; only when a full round finds too few of them are mixed blocks split:
//! their pages without credit are taken and every other page pays one credit. One call makes at most one such round, so
//! that a page that has just come back is used before it is asked for again.
use crate::bits::Bits;
use crate::map::{MapError, PageMap, Words};
use crate::word::PageState;
use alloc::{vec, vec::Vec};
use plimsoll_types::{BLOCK_PAGES, BlockIndex, PageIndex};

/// Credit of a page whose accessed bit was set: less than of one that was taken and missed.
const USED: u8 = 2;

/// Where a page came back from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Never taken, or given back by the guest.
    Nowhere,
    /// From limbo.
    Limbo,
    /// From the store.
    Store,
    /// From the store, before anybody touched it: no use has shown.
    Ahead,
}

/// Consecutive resident pages of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: PageIndex,
    /// How many.
    pub pages: u32,
}

/// In which of its two rounds the hand chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// Blocks that show no use: a huge page among them goes, and comes back, as one.
    Whole,
    /// Pages without credit of blocks that show some: they go and come back one by one.
    Split,
}

/// What [`Replacement::choose`] chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Pages in all runs.
    pub pages: u32,
    /// How they were chosen.
    pub round: Round,
}

/// The replacement state of one machine: about 1.3 bytes a page.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replacement {
    pages: u32,
    /// Two bits of credit a page.
    credit: Vec<u8>,
    heat: Vec<u16>,
    hand: u32,
    ghosts: Ghosts,
}

impl Replacement {
    /// For a machine of `pages` pages, remembering a quarter of them as ghosts.
    pub fn new(pages: u32) -> Self {
        Self {
            pages,
            credit: vec![0; pages.div_ceil(4) as usize],
            heat: vec![0; pages.div_ceil(BLOCK_PAGES) as usize],
            hand: 0,
            ghosts: Ghosts::new(pages, pages / 4),
        }
    }

    fn credit_of(&self, page: PageIndex) -> u8 {
        self.credit[page.get() / 4] >> (page.0 % 4 * 2) & 3
    }

    fn set_credit(&mut self, page: PageIndex, credit: u8) {
        let old = self.credit_of(page);
        let shift = page.0 % 4 * 2;
        let byte = &mut self.credit[page.get() / 4];
        *byte = *byte & !(3 << shift) | credit << shift;
        let heat = &mut self.heat[page.block().get()];
        *heat = *heat - u16::from(old) + u16::from(credit);
    }

    /// A page is resident again.
    #[inline]
    pub fn came_back(&mut self, page: PageIndex, origin: Origin) {
        if page.0 >= self.pages {
            return;
        }
        let credit = match origin {
            Origin::Nowhere => 0,
            Origin::Ahead => {
                self.ghosts.member.remove(page);
                0
            }
            Origin::Limbo => 3,
            Origin::Store if self.ghosts.forget(page) => 2,
            Origin::Store => 1,
        };
        self.set_credit(page, credit);
    }

    /// A resident page's accessed bit was found set.
    pub fn used(&mut self, page: PageIndex) {
        if page.0 < self.pages && self.credit_of(page) < USED {
            self.set_credit(page, USED);
        }
    }

    /// A page left limbo for the store.
    #[inline]
    pub fn stored(&mut self, page: PageIndex) {
        if page.0 < self.pages {
            self.ghosts.remember(page);
            self.set_credit(page, 0);
        }
    }

    /// A block's heat: the sum of its pages' credits, 0 to 1,536.
    pub fn heat(&self, block: BlockIndex) -> u16 {
        self.heat.get(block.get()).copied().unwrap_or(0)
    }

    /// Pages that came back from the store while still ghosts: a longer limbo would have kept them.
    pub fn ghost_hits(&self) -> u64 {
        self.ghosts.hits
    }

    /// Appends runs of pages to take, resident or unwatched, at most a block more than `want` pages and possibly fewer,
    /// and says how many. None at all means that every page has just paid a credit, or that nothing is left to take: after four
    /// such answers nothing is.
    ///
    /// # Errors
    /// [`MapError::Damaged`] when a page word is not one any transition writes.
    pub fn choose<W: Words>(
        &mut self,
        map: &PageMap<W>,
        want: u32,
        out: &mut Vec<Run>,
    ) -> Result<Choice, MapError> {
        let blocks = self.pages.div_ceil(BLOCK_PAGES);
        let mut pages = 0;
        for round in [Round::Whole, Round::Split] {
            for _ in 0..blocks {
                if pages >= want {
                    return Ok(Choice { pages, round });
                }
                let block = BlockIndex(self.hand % blocks);
                self.hand = (block.0 + 1) % blocks;
                pages += match round {
                    Round::Whole if self.heat(block) > 0 => 0,
                    Round::Whole => self.take(map, block, |_, _| true, out)?,
                    Round::Split => self.take(map, block, Self::spend, out)?,
                };
            }
            // A page chosen in one round would be chosen again in the next: the caller has not taken it yet.
            if pages > 0 {
                return Ok(Choice { pages, round });
            }
        }
        Ok(Choice { pages, round: Round::Split })
    }

    /// True if the page has no credit left; takes one otherwise.
    fn spend(&mut self, page: PageIndex) -> bool {
        let credit = self.credit_of(page);
        self.set_credit(page, credit.saturating_sub(1));
        credit == 0
    }

    fn take<W: Words>(
        &mut self,
        map: &PageMap<W>,
        block: BlockIndex,
        mut takes: impl FnMut(&mut Self, PageIndex) -> bool,
        out: &mut Vec<Run>,
    ) -> Result<u32, MapError> {
        let first = block.first_page().0;
        let last = self.pages.min(first + BLOCK_PAGES);
        let mut chosen = 0;
        let mut run: Option<Run> = None;
        for page in (first..last).map(PageIndex) {
            let is_taken = matches!(map.state(page)?, PageState::Resident | PageState::Unwatched);
            let taken = is_taken && takes(self, page);
            match &mut run {
                Some(open) if taken => open.pages += 1,
                Some(_) => out.extend(run.take()),
                None if taken => run = Some(Run { first: page, pages: 1 }),
                None => {}
            }
            chosen += u32::from(taken);
        }
        out.extend(run);
        Ok(chosen)
    }

    /// Bytes this bookkeeping takes.
    pub fn table_bytes(&self) -> usize {
        self.credit.len() + self.heat.len() * 2 + self.ghosts.ring.len() * 4 + self.ghosts.member.bytes()
    }
}

/// The most recently stored pages, first in, first out.
///
/// A page that comes back is forgotten at once in `member`; its place in the ring goes stale and is skipped when it
/// is overwritten. A page stored again before that is forgotten a little early, which costs one unit of credit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Ghosts {
    ring: Vec<u32>,
    next: usize,
    member: Bits,
    hits: u64,
}

impl Ghosts {
    fn new(pages: u32, capacity: u32) -> Self {
        Self { ring: vec![u32::MAX; capacity as usize], next: 0, member: Bits::new(pages), hits: 0 }
    }

    fn remember(&mut self, page: PageIndex) {
        let Some(place) = self.ring.get_mut(self.next) else { return };
        let oldest = core::mem::replace(place, page.0);
        self.next = (self.next + 1) % self.ring.len();
        self.member.remove(PageIndex(oldest));
        self.member.insert(page);
    }

    fn forget(&mut self, page: PageIndex) -> bool {
        let was = self.member.remove(page);
        self.hits += u64::from(was);
        was
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::HeapWords;
    use crate::word::Transition;

    fn resident(pages: u32) -> PageMap<HeapWords> {
        let mut map = PageMap::adopt(HeapWords::new(pages as usize)).unwrap();
        (0..pages).map(PageIndex).for_each(|page| assert!(map.apply(page, Transition::Install).is_ok()));
        map
    }

    fn chosen(replacement: &mut Replacement, map: &PageMap<HeapWords>, want: u32) -> Vec<Run> {
        let mut runs = Vec::new();
        let count = replacement.choose(map, want, &mut runs).unwrap().pages;
        assert_eq!(count, runs.iter().map(|run| run.pages).sum::<u32>());
        runs
    }

    #[test]
    fn cold_blocks_go_whole_and_before_any_mixed_one() {
        let map = resident(3 * 512);
        let mut replacement = Replacement::new(3 * 512);
        replacement.came_back(PageIndex(3), Origin::Limbo);
        let runs = chosen(&mut replacement, &map, 1024);
        assert_eq!(
            runs,
            [Run { first: PageIndex(512), pages: 512 }, Run { first: PageIndex(1024), pages: 512 }]
        );
    }

    #[test]
    fn a_mixed_block_is_split_and_its_used_pages_outlive_as_many_rounds_as_they_have_credit() {
        let map = resident(512);
        let mut replacement = Replacement::new(512);
        replacement.came_back(PageIndex(3), Origin::Limbo);
        let runs = chosen(&mut replacement, &map, 1);
        assert_eq!(runs, [Run { first: PageIndex(0), pages: 3 }, Run { first: PageIndex(4), pages: 508 }]);
        assert_eq!(replacement.heat(BlockIndex(0)), 2);
    }

    #[test]
    fn a_page_seen_used_by_its_accessed_bit_outlives_its_neighbours_and_keeps_a_higher_credit() {
        let map = resident(512);
        let mut replacement = Replacement::new(512);
        replacement.came_back(PageIndex(4), Origin::Limbo);
        [3, 4].into_iter().for_each(|page| replacement.used(PageIndex(page)));
        assert_eq!((replacement.credit_of(PageIndex(3)), replacement.credit_of(PageIndex(4))), (USED, 3));
        let runs = chosen(&mut replacement, &map, 1);
        assert_eq!(runs, [Run { first: PageIndex(0), pages: 3 }, Run { first: PageIndex(5), pages: 507 }]);
    }

    #[test]
    fn with_everything_hot_something_is_still_found() {
        let map = resident(1024);
        let mut replacement = Replacement::new(1024);
        (0..1024).map(PageIndex).for_each(|page| replacement.came_back(page, Origin::Limbo));
        let asked = (0..4).map(|_| chosen(&mut replacement, &map, 1).len());
        assert_eq!(asked.collect::<Vec<_>>(), [0, 0, 0, 1]);
    }

    #[test]
    fn ghosts_remember_a_quarter_of_the_machine() {
        let mut replacement = Replacement::new(512);
        (0..200).map(PageIndex).for_each(|page| replacement.stored(page));
        replacement.came_back(PageIndex(10), Origin::Store);
        replacement.came_back(PageIndex(199), Origin::Store);
        assert_eq!(replacement.ghost_hits(), 1);
        assert_eq!((replacement.credit_of(PageIndex(10)), replacement.credit_of(PageIndex(199))), (1, 2));
    }
}
