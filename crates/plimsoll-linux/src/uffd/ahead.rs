//! Bringing pages back before they are touched: the slow half of what [`Prefetch`](plimsoll_core::prefetch) decides.
//!
//! Enters: runs of pages that are likely to be touched. Leaves: these pages in guest RAM, a few at a time, between faults
//! that wait. What must never happen: a fault that waits for more than one such piece; memory taken for pages nobody has
//! asked for while somebody lacks it ([`Purpose::Ahead`]).
//!
//! A page that turns out not to be stored any more is passed over. So is one whose bytes are damaged: the touch that
//! needs it finds out.
use super::pager::{Loaded, Pager, PagerError};
use super::probe::Step;
use super::space::{InstallStop, Space};
use plimsoll_core::ledger::Purpose;
use plimsoll_core::machine::{Machine, Released};
use plimsoll_core::map::Words;
use plimsoll_core::replacement::Run;
use plimsoll_core::word::{ObjectRef, PageState};
use plimsoll_store::SlabMemory;
use plimsoll_types::{BLOCK_PAGES, PageIndex};
use std::collections::VecDeque;

/// Pages brought in one piece: long enough to share a system call, short enough for a guest that follows close behind.
pub(super) const PIECE: u32 = 16;
/// More pages than any answer to a touch has but that which brings a working set back.
const SOON_MAX: u64 = 512;

/// What is to be brought.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// What a reader in steps or a neighbour's touch asks for: the guest follows close behind.
    soon: VecDeque<Run>,
    /// Working sets.
    later: VecDeque<Run>,
}

impl Queue {
    fn add(&mut self, wanted: Vec<Run>) {
        let pages: u64 = wanted.iter().map(|run| u64::from(run.pages)).sum();
        let queue = if pages < SOON_MAX { &mut self.soon } else { &mut self.later };
        queue.extend(wanted);
    }

    fn next(&mut self) -> Option<(Run, Evidence)> {
        let soon = self.soon.pop_front().map(|run| (run, Evidence::Expected));
        soon.or_else(|| self.later.pop_front().map(|run| (run, Evidence::Used)))
    }

    /// The guest has reached a page of a working set before its turn came: what follows it there is next. When its turn
    /// comes it is not away any more, and passed over.
    fn hurry(&mut self, page: PageIndex) {
        // Sets are asked for in the order of their pages. Where two are mixed the page may not be found.
        let after = self.later.partition_point(|run| run.first <= page);
        let run = after.checked_sub(1).and_then(|place| self.later.get(place));
        let rest = run.map_or(0, |run| (run.first.0 + run.pages).saturating_sub(page.0 + 1));
        if rest > 0 {
            self.soon.push_front(Run { first: PageIndex(page.0 + 1), pages: rest.min(PIECE) });
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.soon.is_empty() && self.later.is_empty()
    }

    fn put_back(&mut self, run: Run, evidence: Evidence) {
        match evidence {
            Evidence::Expected => self.soon.push_front(run),
            Evidence::Used => self.later.push_front(run),
        }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Why pages are to be brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evidence {
    /// The guest seems to be on its way there. Zero pages are brought among others, but memory that was never touched must
    /// not be taken for more of the same.
    Expected,
    /// They are of a working set: the guest has used each of them.
    Used,
}

/// Where the bytes of a page to bring are.
#[derive(Clone, Copy)]
enum Bytes {
    Nowhere,
    In(ObjectRef),
}

/// `None` for a page that is not away. Zero pages lie among stored ones in any memory: a run that left them out would be
/// many runs.
fn bytes_of<W: Words>(machine: &Machine<W>, page: PageIndex) -> Option<Bytes> {
    match machine.state(page) {
        Ok(PageState::Zero) => Some(Bytes::Nowhere),
        Ok(PageState::Stored(object)) => Some(Bytes::In(object)),
        _ => None,
    }
}

impl<S: Space, M: SlabMemory, W: Words> Pager<S, M, W> {
    /// A touch brought the page back: decides what else to bring.
    pub(super) fn look_ahead(&mut self, page: PageIndex) {
        self.ahead.hurry(page);
        let mut wanted = Vec::new();
        self.prefetch.faulted(page, |page| bytes_of(&self.machine, page).is_some(), &mut wanted);
        self.ahead.add(wanted);
    }

    /// Brings back the working set the machine used last: it is about to go on.
    pub(super) fn replay(&mut self) {
        let mut wanted = Vec::new();
        self.prefetch.replay(|page| bytes_of(&self.machine, page).is_some(), &mut wanted);
        self.ahead.add(wanted);
    }

    /// Brings one piece of what is wanted. False when nothing is, or the next is being read from the disk.
    pub(super) fn bring(&mut self) -> Result<bool, PagerError> {
        let Some((piece, evidence)) = self.next_piece() else { return Ok(false) };
        if !self.is_piece_near(piece) {
            self.ahead.put_back(piece, evidence);
            return Ok(false);
        }
        if !self.charge(piece.pages, Purpose::Ahead) {
            // Whoever is short of memory is not to be kept from it by guesses.
            self.ahead.clear();
            return Ok(false);
        }
        self.reached(Step::BringBegun)?;
        let pages = self.load_piece(piece);
        if pages == 0 {
            self.put_back(piece, 1, evidence);
            return Ok(true);
        }
        self.reached(Step::SourceRead)?;
        let installed = self.space.copy(piece.first, self.kit.tools().room(pages as usize))?;
        self.reached(Step::Copied)?;
        for page in (piece.first.0..piece.first.0 + installed.pages).map(PageIndex) {
            self.mark_brought(page)?;
        }
        let next = PageIndex(piece.first.0 + installed.pages);
        match installed.stop {
            // What comes after a page that could not be loaded is tried without it.
            None if pages < piece.pages => self.put_back(piece, pages + 1, evidence),
            None => {}
            Some(InstallStop::Again) => self.put_back(piece, installed.pages, evidence),
            Some(InstallStop::NoMemory) => self.ahead.clear(),
            // Looking beats remembering, as for a page that was touched.
            Some(InstallStop::Present) => {
                self.mark_installed(next)?;
                self.put_back(piece, installed.pages + 1, evidence);
            }
        }
        Ok(true)
    }

    fn put_back(&mut self, piece: Run, done: u32, evidence: Evidence) {
        let first = PageIndex(piece.first.0 + done);
        if done < piece.pages {
            self.ahead.put_back(Run { first, pages: piece.pages - done }, evidence);
        }
    }

    /// The next pages to bring, consecutive.
    fn next_piece(&mut self) -> Option<(Run, Evidence)> {
        while let Some((run, evidence)) = self.ahead.next() {
            let pages = run.first.0..run.first.0.saturating_add(run.pages);
            let first = pages.clone().find(|page| bytes_of(&self.machine, PageIndex(*page)).is_some());
            let Some(first) = first else { continue };
            // A piece lies in one block, and so in one region.
            let block_end = (first / BLOCK_PAGES + 1).saturating_mul(BLOCK_PAGES);
            let end = pages.end.min(first + PIECE).min(block_end);
            let away = (first..end).map_while(|page| bytes_of(&self.machine, PageIndex(page)));
            let (mut count, mut stored) = (0, 0);
            for bytes in away {
                count += 1;
                stored += u32::from(matches!(bytes, Bytes::In(_)));
            }
            self.put_back(Run { first: PageIndex(first), pages: pages.end - first }, count, evidence);
            if stored > 0 || evidence == Evidence::Used {
                return Some((Run { first: PageIndex(first), pages: count }, evidence));
            }
        }
        None
    }

    /// True when all of the piece can be read without waiting for the disk. What cannot is asked for, all at once.
    fn is_piece_near(&mut self, piece: Run) -> bool {
        let pages = (piece.first.0..piece.first.0 + piece.pages).map(PageIndex);
        pages.fold(true, |is_near, page| match bytes_of(&self.machine, page) {
            Some(Bytes::In(object)) => self.is_near(object) && is_near,
            _ => is_near,
        })
    }

    /// Reads the piece into the buffer; how many pages of it came.
    fn load_piece(&mut self, piece: Run) -> u32 {
        for place in 0..piece.pages {
            match bytes_of(&self.machine, PageIndex(piece.first.0 + place)) {
                Some(Bytes::Nowhere) => self.kit.tools().room(place as usize + 1)[place as usize].fill(0),
                Some(Bytes::In(object)) if matches!(self.load(object, place as usize), Ok(Loaded::Here)) => {}
                _ => return place,
            }
        }
        piece.pages
    }

    fn mark_brought(&mut self, page: PageIndex) -> Result<(), PagerError> {
        let released = self.machine.brought(page)?;
        self.reached(Step::InstalledMarked)?;
        self.prefetch.brought(page);
        if let Released::Object(object) = released {
            self.release(object);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u32, pages: u32) -> Run {
        Run { first: PageIndex(first), pages }
    }

    #[test]
    fn what_follows_a_page_that_was_touched_before_its_turn_is_brought_next() {
        let mut queue = Queue::default();
        queue.later.extend([run(10, 4), run(100, 900), run(2000, 8)]);
        for (touched, hurried) in [(2003, run(2004, 4)), (100, run(101, PIECE)), (12, run(13, 1))] {
            queue.hurry(PageIndex(touched));
            assert_eq!(queue.next(), Some((hurried, Evidence::Expected)), "page {touched}");
        }
        for alone in [9, 13, 14, 1000, 2007] {
            queue.hurry(PageIndex(alone));
            assert!(queue.soon.is_empty(), "page {alone}");
        }
        assert_eq!(queue.next(), Some((run(10, 4), Evidence::Used)), "a set stays in its order");
    }
}
