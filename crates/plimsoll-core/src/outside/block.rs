//! What is known of one block of 512 pages: what was taken and has not been seen back, how often each page has proven
//! used, and how lately.
//!
//! A page's *level* counts proofs of use: it came back after it was taken. A page of level L is offered for taking in
//! one round of the hand out of 4^L, which one depends on its place, so that the pages of a block are not all tried in
//! one round. Each period in which a taken page stays away costs it a level. A page that is used all the time is
//! thus taken in one round of 64, and one that has become idle is soon like any other. Levels are two bits a page, kept
//! as two sets.
use super::set::PageSet;
use super::{Period, Presence};

/// Pages of a level are offered when their place, turned by the round, falls on one of these.
const OFFERED: [u64; 4] = [u64::MAX, 0x1111_1111_1111_1111, 0x0001_0001_0001_0001, 1];
/// Heat from which a block is left alone: so many of its pages came back in this period, or twice as many in the one
/// before, and so on. Below it are the few that random samples bring back.
const RESTING: u16 = 16;

/// What may be done with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Temper {
    /// No page of it has shown use: it goes whole.
    Cold,
    /// Some have: those that have not are taken out of it.
    Mixed,
    /// Many have just come back: it is left alone.
    Resting,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Block {
    /// Taken, and not seen in RAM since.
    taken: PageSet,
    /// Drawn by the sampler for this period: left alone until it ends.
    trial: PageSet,
    /// The low and the high bits of levels.
    low: PageSet,
    high: PageSet,
    /// Pages that came back, halved with each period: as of `warmed`.
    heat: u16,
    warmed: Period,
    /// When levels were last lowered.
    aged: Period,
}

impl Block {
    /// Looks at where its pages are. Returns how many came back since the last look.
    pub(super) fn see(&mut self, presence: &Presence, now: Period) -> u32 {
        let back = (self.taken & presence.present) - self.trial;
        self.came_back(back, now);
        let away = self.taken - presence.present;
        if self.aged != now && !away.is_empty() {
            self.aged = now;
            self.lower(away);
        }
        back.len()
    }

    pub(super) fn came_back(&mut self, pages: PageSet, now: Period) {
        if pages.is_empty() {
            return;
        }
        self.taken = self.taken - pages;
        // 00 01 10 11 -> 01 10 11 11, in the pages' places.
        let (low, high) = (self.low, self.high);
        self.low = (low - pages) | (pages - low) | (pages & high);
        self.high = high | (pages & low);
        self.heat = self.heat(now).saturating_add(u16::try_from(pages.len()).unwrap_or(u16::MAX));
        self.warmed = now;
    }

    /// 00 01 10 11 -> 00 00 01 10, in the pages' places.
    fn lower(&mut self, pages: PageSet) {
        let raised = pages & (self.low | self.high);
        let (low, high) = (self.low, self.high);
        self.low = (low - raised) | (raised - low);
        self.high = (high - raised) | (raised & low & high);
    }

    pub(super) fn took(&mut self, pages: PageSet) {
        self.taken = self.taken | pages;
    }

    pub(super) fn begin_trial(&mut self, page: PageSet) {
        self.trial = self.trial | page;
    }

    pub(super) fn end_trial(&mut self, page: PageSet) {
        self.trial = self.trial - page;
    }

    pub(super) fn heat(&self, now: Period) -> u16 {
        self.heat.checked_shr(now.since(self.warmed)).unwrap_or(0)
    }

    pub(super) fn temper(&self, now: Period) -> Temper {
        match self.heat(now) {
            RESTING.. => Temper::Resting,
            0 if (self.low | self.high).is_empty() => Temper::Cold,
            _ => Temper::Mixed,
        }
    }

    /// Pages to take of those that are in RAM: all of a cold block, of a mixed one those whose turn it is.
    pub(super) fn offers(&self, present: PageSet, temper: Temper, round: u32) -> PageSet {
        let turn = |level: usize| PageSet::repeated(OFFERED[level].rotate_left(round % u64::BITS));
        let (low, high) = (self.low, self.high);
        let of_levels = || {
            let one = (low - high) & turn(1);
            let two = (high - low) & turn(2);
            let three = (high & low) & turn(3);
            (present - low - high) | (present & (one | two | three))
        };
        let offered = match temper {
            Temper::Cold => present,
            Temper::Mixed => of_levels(),
            Temper::Resting => PageSet::EMPTY,
        };
        offered - self.trial
    }

    /// Taken pages that have not been seen back.
    pub(super) fn away(&self) -> PageSet {
        self.taken
    }

    /// How many pages have a level above 0.
    pub(super) fn proven(&self) -> u32 {
        (self.low | self.high).len()
    }

    /// The block of a machine whose samples are drawn anew.
    pub(super) fn without_trial(mut self) -> Self {
        self.trial = PageSet::EMPTY;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRESENT: Presence = Presence { present: PageSet::repeated(u64::MAX), swapped: PageSet::EMPTY };
    const ABSENT: Presence = Presence { present: PageSet::EMPTY, swapped: PageSet::repeated(u64::MAX) };

    fn offered(block: &Block, place: u32, now: u32) -> usize {
        let page = plimsoll_types::PageIndex(place);
        let offers = |round| block.offers(PRESENT.present, block.temper(Period(now)), round).contains(page);
        (0..64).filter(|round| offers(*round)).count()
    }

    #[test]
    fn each_return_makes_a_page_four_times_rarer_to_take_and_each_period_away_undoes_one() {
        let mut block = Block::default();
        let page = PageSet::from_range(100..101);
        let mut now = 0;
        for rounds in [64, 16, 4, 1, 1] {
            assert_eq!(offered(&block, 100, now), rounds);
            assert_eq!(offered(&block, 101, now), 64, "its neighbour has shown nothing");
            block.took(page);
            assert_eq!(block.see(&PRESENT, Period(now)), 1);
            now += 1;
        }
        block.took(page);
        for rounds in [4, 16, 64, 64] {
            now += 1;
            assert_eq!(block.see(&ABSENT, Period(now)) + block.see(&ABSENT, Period(now)), 0);
            assert_eq!(offered(&block, 100, now), rounds);
        }
        now += 20;
        assert_eq!(block.temper(Period(now)), Temper::Cold, "as before it was ever used");
    }

    #[test]
    fn a_block_whose_pages_just_came_back_rests_and_cools_by_half_each_period() {
        let mut block = Block::default();
        block.took(PRESENT.present);
        assert_eq!(block.see(&PRESENT, Period(7)), 512);
        let tempers = (7..14).map(|now| block.temper(Period(now)) == Temper::Resting);
        assert!(tempers.eq([true, true, true, true, true, true, false]));
        assert!(block.offers(PRESENT.present, Temper::Resting, 0).is_empty());
    }

    #[test]
    fn a_page_on_trial_is_neither_offered_nor_judged_before_its_period_ends() {
        let mut block = Block::default();
        let page = PageSet::from_range(5..6);
        block.begin_trial(page);
        block.took(page);
        assert_eq!(block.see(&PRESENT, Period(0)), 0);
        assert_eq!(offered(&block, 5, 0), 0);
        block.end_trial(page);
        assert_eq!(block.see(&PRESENT, Period(0)), 1);
    }
}
