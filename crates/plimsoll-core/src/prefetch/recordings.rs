//! Recordings of working sets, brought back whole when the guest returns to one (REAP, Ustiugov et al., ASPLOS '21).
//!
//! Enters: every page that comes back or goes to the store, and quiet times. Leaves: all stored pages of a set, once
//! most of the last faults lie in it.
//!
//! A set is recorded from the eighth fault after a quiet time to the next quiet time, or until the guest goes to
//! another set that is known. It is given up when it outgrows half of the machine, and dropped when it stays small.
//! Two sets that a guest goes between without ever being quiet are recorded as one, until it is once.
//!
//! Whether a replayed page is used cannot be seen, and one that was used and is parked again must not count as brought
//! in vain. So each replay leaves some pages out, others each time: the **examined**. Those that are not touched until
//! the phase ends are taken out of the set; when they are more than those touched, the set is dropped.
use super::ask;
use crate::bits::Bits;
use crate::replacement::Run;
use alloc::vec::Vec;
use core::ops::Range;
use plimsoll_types::PageIndex;

/// Complete sets kept; one more is being recorded.
pub(super) const KEPT: usize = 4;
/// The smallest set: fewer pages are as quickly faulted.
const PAGES_MIN: u32 = 32;
/// Faults looked at to recognise a set.
const RECENT: usize = 8;
/// How many of them must lie in it, and how many more for a set of the whole machine's size: faults lie in a large set
/// by chance. With 4 of 8, random touches seem to return to a sixteenth of the machine once in a thousand faults.
const RECENT_IN_SET: u64 = 6;
const RECENT_IN_SET_WHOLE: u64 = 4;
/// A set is worth a replay when this share of it, and at least [`PAGES_MIN`] / 2 pages, is in the store.
const GONE_SHARE: u32 = 8;
/// One replayed page in so many is examined: at 62 us a fault and 1.4 us a page in a batch (FACTS) one in 128 costs a third of
/// the batch, which is right for a set that is used whole; one that drifts is examined more.
const EXAMINE_EVERY: Range<u32> = 16..128;
/// Pages examined of a small set, if one in eight are as many.
const EXAMINED_MIN: u32 = 16;
/// A set of which more than this share of the examined was not touched is examined more next time.
const DRIFT_SHARE: usize = 16;
/// Pages examined of a large set, about and at most: it is judged as well by few.
const EXAMINED_AIM: u32 = 128;
const EXAMINED_MAX: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Set {
    pages: Bits,
    /// Pages of it that are in the store.
    gone: u32,
    /// How often it was replayed: others are examined each time.
    replays: u32,
    /// One page in so many is examined.
    every: u32,
}

impl Set {
    fn new(pages: Bits) -> Self {
        Self { pages, gone: 0, replays: 0, every: EXAMINE_EVERY.end }
    }

    fn is_worth_replaying(&self) -> bool {
        self.gone >= (self.pages.len() / GONE_SHARE).max(PAGES_MIN / 2)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Too few faults since the last quiet time to tell which set the guest uses.
    Quiet,
    /// The last set is being recorded, or was replayed and is being refined.
    Recording,
    /// Nothing is recorded until the next quiet time.
    GivenUp,
}

/// The recordings of one machine: at most five bits a page.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Recordings {
    pages: u32,
    /// Least recently used first.
    sets: Vec<Set>,
    phase: Phase,
    /// The last faults, newest last.
    recent: Vec<PageIndex>,
    /// Pages left out of the last replay and not touched so far, ascending.
    examined: Vec<PageIndex>,
    /// How many of them were touched.
    proven: usize,
}

/// What a fault was to the recordings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing to do.
    Noted,
    /// A page left out on purpose: its fault says nothing about its neighbours.
    Examined,
    /// A set was asked for.
    Replayed,
}

impl Recordings {
    pub(super) fn new(pages: u32) -> Self {
        Self {
            pages,
            sets: Vec::with_capacity(KEPT + 1),
            phase: Phase::Quiet,
            recent: Vec::with_capacity(RECENT),
            examined: Vec::new(),
            proven: 0,
        }
    }

    /// Sets known, the one being recorded included.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.sets.len()).unwrap_or(u32::MAX)
    }

    /// Bytes beside the value itself.
    pub(super) fn table_bytes(&self) -> usize {
        let sets: usize = self.sets.iter().map(|set| set.pages.bytes()).sum();
        let lists = self.recent.capacity() + self.examined.capacity();
        sets + self.sets.capacity() * size_of::<Set>() + lists * size_of::<PageIndex>()
    }

    /// A touch brought the page from the store.
    pub(super) fn faulted(
        &mut self,
        page: PageIndex,
        stored: &impl Fn(PageIndex) -> bool,
        out: &mut Vec<Run>,
    ) -> Heard {
        let is_examined = self.examined.binary_search(&page).map(|place| self.examined.remove(place)).is_ok();
        self.proven += usize::from(is_examined);
        self.came(page);
        if self.recent.len() == RECENT {
            self.recent.remove(0);
        }
        self.recent.push(page);

        let others = self.sets.len() - usize::from(self.phase == Phase::Recording);
        let known =
            self.sets[..others].iter().rposition(|set| set.is_worth_replaying() && self.is_returning_to(set));
        if let Some(known) = known {
            let set = self.sets.remove(known);
            self.hand_over(&set);
            self.close();
            self.bring(set, stored, out);
            return Heard::Replayed;
        }
        self.limit();
        if self.phase == Phase::Quiet && self.recent.len() == RECENT {
            let mut pages = Bits::new(self.pages);
            self.recent.iter().for_each(|page| {
                pages.insert(*page);
            });
            self.sets.push(Set::new(pages));
            self.phase = Phase::Recording;
        }
        if is_examined { Heard::Examined } else { Heard::Noted }
    }

    /// A page was brought ahead: of an examined one it will not be known whether it would have been touched.
    pub(super) fn brought(&mut self, page: PageIndex) {
        if let Ok(place) = self.examined.binary_search(&page) {
            self.examined.remove(place);
        }
        self.came(page);
    }

    /// A page came back from limbo: it is in use, whether or not it has been in the store.
    pub(super) fn used(&mut self, page: PageIndex) {
        if let Some(set) = self.current() {
            set.pages.insert(page);
        }
    }

    fn came(&mut self, page: PageIndex) {
        for set in self.sets.iter_mut().filter(|set| set.pages.contains(page)) {
            set.gone = set.gone.saturating_sub(1);
        }
        self.used(page);
    }

    /// A page went to the store.
    pub(super) fn left(&mut self, page: PageIndex) {
        for set in self.sets.iter_mut().filter(|set| set.pages.contains(page)) {
            set.gone = (set.gone + 1).min(set.pages.len());
        }
    }

    /// A page that was brought ahead went to the store unproven: it is not of the set that is being recorded.
    pub(super) fn left_unused(&mut self, page: PageIndex) {
        if let Some(set) = self.current() {
            set.pages.remove(page);
        }
    }

    /// The guest gave pages back.
    pub(super) fn discarded(&mut self, pages: &Range<u32>) {
        for set in &mut self.sets {
            set.pages.remove_range(pages.clone());
            set.gone = set.gone.min(set.pages.len());
        }
        self.examined.retain(|page| !pages.contains(&page.0));
    }

    /// Nothing came from the store for a while: what was being recorded is complete.
    pub(super) fn quiet(&mut self) {
        self.close();
        self.phase = Phase::Quiet;
        self.recent.clear();
    }

    /// Asks for the set used last. False when none is known.
    pub(super) fn replay(&mut self, stored: &impl Fn(PageIndex) -> bool, out: &mut Vec<Run>) -> bool {
        self.close();
        let newest = self.sets.pop();
        newest.map(|set| self.bring(set, stored, out)).is_some()
    }

    fn is_returning_to(&self, set: &Set) -> bool {
        let inside: u64 = self.recent.iter().map(|page| u64::from(set.pages.contains(*page))).sum();
        let by_size = u64::from(set.pages.len()) * RECENT_IN_SET_WHOLE / u64::from(self.pages);
        inside >= RECENT_IN_SET + by_size
    }

    fn current(&mut self) -> Option<&mut Set> {
        self.sets.last_mut().filter(|_| self.phase == Phase::Recording)
    }

    /// Gives up a set that is no working set.
    fn limit(&mut self) {
        let most = self.pages / 2;
        if self.current().is_some_and(|set| set.pages.len() > most) {
            self.sets.pop();
            self.examined.clear();
            self.phase = Phase::GivenUp;
        }
    }

    /// The faults that showed the guest's return to a set are not of the set it comes from.
    fn hand_over(&mut self, to: &Set) {
        for page in core::mem::take(&mut self.recent).into_iter().filter(|page| to.pages.contains(*page)) {
            if let Some(from) = self.current() {
                from.pages.remove(page);
            }
        }
    }

    /// Completes the current set: keeps it if it has done well, and the most recent of the others.
    fn close(&mut self) {
        let untouched = core::mem::take(&mut self.examined);
        let proven = core::mem::take(&mut self.proven);
        let Some(set) = self.current() else { return };
        untouched.iter().for_each(|page| {
            set.pages.remove(*page);
        });
        let drifts = untouched.len() * DRIFT_SHARE > untouched.len() + proven;
        let every = if drifts { set.every / 2 } else { set.every * 2 };
        set.every = every.clamp(EXAMINE_EVERY.start, EXAMINE_EVERY.end);
        if untouched.len() > proven || set.pages.len() < PAGES_MIN {
            self.sets.pop();
        } else if self.sets.len() > KEPT {
            self.sets.remove(0);
        }
        self.phase = Phase::GivenUp;
    }

    /// Asks for a set's stored pages in address order and goes on refining it.
    fn bring(&mut self, mut set: Set, stored: &impl Fn(PageIndex) -> bool, out: &mut Vec<Run>) {
        let every = (set.gone / EXAMINED_MIN).clamp(8, set.every).max(set.gone / EXAMINED_AIM);
        for page in set.pages.iter().filter(|page| stored(*page)) {
            // By page, so that each has its turn, and mixed, so that a set of one stride is not examined all at once.
            let turn = (page.0.wrapping_mul(0x9e37_79b9) >> 16).wrapping_add(set.replays) % every;
            if turn == 0 && self.examined.len() < EXAMINED_MAX {
                self.examined.push(page);
            } else {
                ask(out, page);
            }
        }
        set.replays += 1;
        self.recent.clear();
        self.sets.push(set);
        self.phase = Phase::Recording;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;

    const PAGES: u32 = 8192;

    /// A machine with all the memory it needs, parked at will.
    struct Guest {
        recordings: Recordings,
        here: BTreeSet<u32>,
    }

    impl Guest {
        fn new() -> Self {
            Self { recordings: Recordings::new(PAGES), here: BTreeSet::new() }
        }

        /// Touches pages, brings what is asked for, and returns how many faults that took.
        fn touch(&mut self, pages: impl Iterator<Item = u32>) -> usize {
            let mut faults = 0;
            for page in pages {
                if self.here.insert(page) {
                    faults += 1;
                    let mut out = Vec::new();
                    let here = &self.here;
                    self.recordings.faulted(PageIndex(page), &|other| !here.contains(&other.0), &mut out);
                    for page in out.iter().flat_map(|run| run.first.0..run.first.0 + run.pages) {
                        self.recordings.brought(PageIndex(page));
                        self.here.insert(page);
                    }
                }
            }
            faults
        }

        fn park(&mut self) {
            self.recordings.quiet();
            core::mem::take(&mut self.here)
                .into_iter()
                .for_each(|page| self.recordings.left(PageIndex(page)));
        }
    }

    fn set(number: u32) -> impl Iterator<Item = u32> {
        (number * 1024..).step_by(5).take(200)
    }

    #[test]
    fn four_sets_are_kept_and_the_one_not_used_for_longest_goes() {
        let mut guest = Guest::new();
        for number in [0, 1, 2, 3, 0, 4] {
            guest.touch(set(number));
            guest.park();
        }
        let faults = [0, 2, 3, 4].map(|number| {
            let faults = guest.touch(set(number));
            guest.park();
            faults
        });
        assert!(faults.iter().all(|faults| *faults < 40), "{faults:?}");
        assert_eq!(guest.touch(set(1)), 200);
        assert_eq!(guest.recordings.len(), 5);
    }

    #[test]
    fn small_sets_and_those_of_half_a_machine_are_no_working_sets() {
        for few_or_many in [0..PAGES_MIN - 1, 0..PAGES / 2 + 1] {
            let mut guest = Guest::new();
            guest.touch(few_or_many);
            guest.park();
            assert_eq!(guest.recordings.len(), 0);
        }
    }

    #[test]
    fn a_replayed_set_that_is_not_used_is_dropped() {
        let mut guest = Guest::new();
        guest.touch(set(0));
        guest.park();
        guest.touch(set(0).take(RECENT));
        guest.park();
        assert_eq!(guest.recordings.len(), 0);
    }

    #[test]
    fn pages_that_a_set_has_lost_are_found_out_and_new_ones_added() {
        let mut guest = Guest::new();
        let now = || set(0).skip(40).chain(set(1).take(40));
        guest.touch(set(0));
        guest.park();
        for _ in 0..40 {
            guest.touch(now());
            guest.park();
        }
        let recorded: BTreeSet<u32> = guest.recordings.sets[0].pages.iter().map(|page| page.0).collect();
        let used: BTreeSet<u32> = now().collect();
        assert!(recorded.is_superset(&used));
        assert_eq!(recorded.len(), used.len(), "each page has been examined in its turn");
    }

    #[test]
    fn pages_given_back_and_pages_brought_in_vain_leave_their_sets() {
        let mut guest = Guest::new();
        guest.touch(set(0));
        guest.recordings.brought(PageIndex(7000));
        guest.recordings.left_unused(PageIndex(7000));
        guest.park();
        guest.recordings.discarded(&(0..500));
        let expected: Vec<u32> = set(0).filter(|page| *page >= 500).collect();
        let recorded: Vec<u32> = guest.recordings.sets[0].pages.iter().map(|page| page.0).collect();
        assert_eq!(recorded, expected);
        assert_eq!(guest.recordings.sets[0].gone as usize, expected.len());
    }
}
