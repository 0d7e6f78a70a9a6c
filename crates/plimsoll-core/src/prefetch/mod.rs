//! Which pages to bring back from the store before they are touched.
//!
//! Enters: what happened to pages: a touch brought one back, one was installed ahead, one came back from limbo, one
//! went to the store, some were given back, nothing happened for a while. Leaves: runs of stored pages, most urgent
//! first, for the pager to bring in small pieces between faults. What must never happen: a page asked for that is not
//! stored, and pages asked for again and again that nobody uses.
//!
//! There are no access bits: a page that was brought ahead and is used causes no event. Every part therefore leaves
//! some pages out to see whether they are touched, and follows that evidence, not what becomes of the pages brought:
//!
//! | part | asks for | leaves out | stops when |
//! |---|---|---|---|
//! | `streams` | the next pages of a reader in steps | the middle of each window | that page is not touched |
//! | `recordings` | a working set the guest has returned to | some pages of each replay | most of them are not touched |
//! | `around` | the neighbours of any other page | one of some groups | most of them are not touched |
//!
//! A fault is offered to the recordings, then the streams, then the neighbours; the first that has something for it
//! takes it. The answer may name pages that were named before and are not there yet, and a page may be gone or touched
//! when its turn comes: the pager looks at each page again before bringing it.
//!
//! Memory: one bit a page, and one for each of at most five recordings: 0.75 byte a page and under 4 KiB.
//!
//! Known holes: streams do not cross holes of the guest's layout knowingly, since page indices are dense; the pages of a
//! stream's last half window are never proven used, and in [`PrefetchStats::in_vain`] used-once pages look unused.
mod around;
mod recordings;
mod streams;

use crate::bits::Bits;
use crate::replacement::Run;
use alloc::vec::Vec;
use around::Around;
use core::ops::Range;
use plimsoll_types::PageIndex;
use recordings::{Heard, Recordings};
use streams::Streams;

/// Most pages of a run that goes down: the pager brings a run upwards, and its upper end is needed first.
const DOWN_MAX: u32 = 16;

/// Asks for one more page, as part of the last run where it can be.
fn ask(out: &mut Vec<Run>, page: PageIndex) {
    match out.last_mut() {
        Some(run) if run.first.0 + run.pages == page.0 => run.pages += 1,
        Some(run) if page.0 + 1 == run.first.0 && run.pages < DOWN_MAX => {
            *run = Run { first: page, pages: run.pages + 1 };
        }
        _ => out.push(Run { first: page, pages: 1 }),
    }
}

/// What a machine's prefetch has done, in pages unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PrefetchStats {
    /// Touches that brought a page from the store.
    pub faulted: u64,
    /// Asked for because a stream goes there.
    pub asked_stream: u64,
    /// Asked for because a neighbour was touched.
    pub asked_around: u64,
    /// Asked for because the guest returned to a working set.
    pub asked_replay: u64,
    /// Installed ahead of their touch.
    pub brought: u64,
    /// Of those, proven used.
    pub used: u64,
    /// Of those, gone to the store without a proof of use. A page used only once is among them unless a stream's
    /// marker proved it: an upper bound of what was brought in vain.
    pub in_vain: u64,
    /// Working sets brought back, in number.
    pub replays: u64,
    /// Streams followed now, in number.
    pub streams: u32,
    /// Working sets known now, in number.
    pub recordings: u32,
    /// Pages in a fault-around group now; 1 brings none.
    pub around: u32,
}

impl core::ops::AddAssign for PrefetchStats {
    /// Of several machines together; the size of a fault-around group is the largest of any.
    fn add_assign(&mut self, other: Self) {
        // Field by field, so that none is forgotten.
        let Self {
            faulted,
            asked_stream,
            asked_around,
            asked_replay,
            brought,
            used,
            in_vain,
            replays,
            streams,
            recordings,
            around,
        } = other;
        self.faulted += faulted;
        self.asked_stream += asked_stream;
        self.asked_around += asked_around;
        self.asked_replay += asked_replay;
        self.brought += brought;
        self.used += used;
        self.in_vain += in_vain;
        self.replays += replays;
        self.streams += streams;
        self.recordings += recordings;
        self.around = self.around.max(around);
    }
}

/// The prefetch state of one machine. One thread drives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Prefetch {
    pages: u32,
    /// Pages brought ahead of which it is not known whether they are used.
    trial: Bits,
    streams: Streams,
    around: Around,
    recordings: Recordings,
    stats: PrefetchStats,
}

impl Prefetch {
    /// For a machine of `pages` pages.
    pub fn new(pages: u32) -> Self {
        Self {
            pages,
            trial: Bits::new(pages),
            streams: Streams::new(),
            around: Around::new(),
            recordings: Recordings::new(pages),
            stats: PrefetchStats::default(),
        }
    }

    /// A touch brought `page` from the store. `is_stored` tells of a page whether its bytes are in the store now.
    /// Appends what to bring, most urgent first: at most 511 pages, or all of a working set.
    pub fn faulted(&mut self, page: PageIndex, is_stored: impl Fn(PageIndex) -> bool, out: &mut Vec<Run>) {
        if page.0 >= self.pages {
            return;
        }
        let pages = self.pages;
        let stored = |other: PageIndex| other.0 < pages && other != page && is_stored(other);
        let mut asked = Vec::new();
        self.stats.faulted += 1;
        self.trial.remove(page);
        self.around.touched(page);
        let heard = self.recordings.faulted(page, &stored, &mut asked);
        let counted = match heard {
            Heard::Examined => return,
            Heard::Replayed => {
                self.stats.replays += 1;
                &mut self.stats.asked_replay
            }
            Heard::Noted => {
                if let Some(proven) = self.streams.faulted(page, &mut self.trial, &stored, &mut asked) {
                    self.stats.used += u64::from(proven);
                    &mut self.stats.asked_stream
                } else {
                    self.around.faulted(page, &stored, &mut asked);
                    &mut self.stats.asked_around
                }
            }
        };
        *counted += asked.iter().map(|run| u64::from(run.pages)).sum::<u64>();
        out.append(&mut asked);
    }

    /// A page was installed ahead of its touch: it is on trial.
    pub fn brought(&mut self, page: PageIndex) {
        if page.0 < self.pages {
            self.stats.brought += 1;
            self.trial.insert(page);
            self.around.brought(page);
            self.recordings.brought(page);
        }
    }

    /// A page came back from limbo, so it is in use.
    pub fn used(&mut self, page: PageIndex) {
        self.stats.used += u64::from(self.trial.remove(page));
        self.recordings.used(page);
    }

    /// A page went to the store.
    pub fn left(&mut self, page: PageIndex) {
        if self.trial.remove(page) {
            self.stats.in_vain += 1;
            self.streams.left_unused(page);
            self.recordings.left_unused(page);
        }
        self.around.left(page);
        self.recordings.left(page);
    }

    /// The guest gave pages back.
    pub fn discarded(&mut self, pages: Range<u32>) {
        self.trial.remove_range(pages.clone());
        self.recordings.discarded(&pages);
    }

    /// Nothing has come from the store for a while, or the machine is being parked: the working set that was being
    /// recorded is complete.
    pub fn quiet(&mut self) {
        self.recordings.quiet();
    }

    /// The machine is being woken: appends the stored pages of the working set it used last. Nothing if none is known.
    pub fn replay(&mut self, is_stored: impl Fn(PageIndex) -> bool, out: &mut Vec<Run>) {
        let pages = self.pages;
        let stored = |page: PageIndex| page.0 < pages && is_stored(page);
        let mut asked = Vec::new();
        self.stats.replays += u64::from(self.recordings.replay(&stored, &mut asked));
        self.stats.asked_replay += asked.iter().map(|run| u64::from(run.pages)).sum::<u64>();
        out.append(&mut asked);
    }

    /// What has been done, and what is known now.
    pub fn stats(&self) -> PrefetchStats {
        PrefetchStats {
            streams: self.streams.len(),
            recordings: self.recordings.len(),
            around: self.around.width(),
            ..self.stats
        }
    }

    /// Bytes of bookkeeping.
    pub fn table_bytes(&self) -> usize {
        size_of::<Self>() + self.trial.bytes() + self.streams.table_bytes() + self.recordings.table_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u32 = 4096;

    /// Every fifth page from one on, each faulted in turn of a machine where `is_stored` pages are stored.
    fn fault(prefetch: &mut Prefetch, from: u32, count: usize, is_stored: impl Fn(u32) -> bool) -> Vec<Run> {
        let mut out = Vec::new();
        for page in (from..PAGES).step_by(5).take(count) {
            prefetch.faulted(PageIndex(page), |other| is_stored(other.0), &mut out);
        }
        out
    }

    fn leave(prefetch: &mut Prefetch, from: u32, count: usize) {
        (from..PAGES).step_by(5).take(count).for_each(|page| prefetch.left(PageIndex(page)));
    }

    /// A machine that has used 200 pages and is parked.
    fn parked() -> Prefetch {
        let mut prefetch = Prefetch::new(PAGES);
        fault(&mut prefetch, 0, 200, |_| false);
        prefetch.quiet();
        leave(&mut prefetch, 0, 200);
        prefetch
    }

    fn names(runs: &[Run], page: u32) -> bool {
        runs.iter().any(|run| (run.first.0..run.first.0 + run.pages).contains(&page))
    }

    #[test]
    fn the_faulting_page_and_pages_past_the_machine_are_not_asked_for_whatever_is_said_of_them() {
        let mut prefetch = parked();
        let mut replayed = 0;
        for page in (0..1000).step_by(5) {
            let mut out = Vec::new();
            prefetch.faulted(PageIndex(page), |_| true, &mut out);
            assert!(!names(&out, page));
            replayed = replayed.max(out.len());
        }
        assert!(replayed > 100, "a replay was among the answers");
        for page in [PAGES - 2, PAGES - 1] {
            let mut out = Vec::new();
            prefetch.faulted(PageIndex(page), |_| true, &mut out);
            assert!(out.iter().all(|run| run.first.0 + run.pages <= PAGES), "{out:?}");
        }
    }

    #[test]
    fn a_set_is_not_replayed_for_a_few_of_its_pages_nor_while_it_is_still_here() {
        let mut prefetch = parked();
        for _ in 0..20 {
            fault(&mut prefetch, 500, 5, |_| false);
            fault(&mut prefetch, 2001, 3, |_| false);
        }
        assert_eq!(prefetch.stats().replays, 0, "five of eight faults");

        let mut prefetch = Prefetch::new(PAGES);
        fault(&mut prefetch, 0, 200, |_| false);
        prefetch.quiet();
        leave(&mut prefetch, 0, 10);
        fault(&mut prefetch, 0, 10, |_| false);
        assert_eq!(prefetch.stats().replays, 0, "ten pages of it had left");
    }

    #[test]
    fn the_operator_gets_the_last_working_set_and_not_the_stray_pages_after_it() {
        let mut prefetch = parked();
        fault(&mut prefetch, 2001, 12, |_| false);
        let mut out = Vec::new();
        prefetch.replay(|_| true, &mut out);
        assert!(names(&out, 500) && !names(&out, 2001));
        assert_eq!(prefetch.stats().recordings, 1);
    }

    #[test]
    fn a_page_on_trial_is_counted_once_as_used_or_in_vain_or_not_at_all() {
        let mut prefetch = Prefetch::new(PAGES);
        (0..30).map(PageIndex).for_each(|page| prefetch.brought(page));
        (0..10).map(PageIndex).for_each(|page| prefetch.used(page));
        prefetch.discarded(10..20);
        (0..30).chain(0..30).map(PageIndex).for_each(|page| prefetch.left(page));
        let PrefetchStats { brought, used, in_vain, .. } = prefetch.stats();
        assert_eq!((brought, used, in_vain), (30, 10, 10));
    }

    #[test]
    fn pages_back_from_limbo_are_of_the_working_set_and_pages_brought_in_vain_are_not() {
        let mut prefetch = Prefetch::new(PAGES);
        fault(&mut prefetch, 0, 100, |_| false);
        prefetch.used(PageIndex(4001));
        prefetch.brought(PageIndex(4003));
        prefetch.left(PageIndex(4003));
        prefetch.quiet();
        let mut out = Vec::new();
        prefetch.replay(|_| true, &mut out);
        assert!(names(&out, 4001) && !names(&out, 4003));
    }
}
