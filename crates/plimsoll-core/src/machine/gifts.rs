//! How the guest gave pages back.
//!
//! Enters: what the VMM says of pages that were given back. Leaves: page words that say it, and runs of those that do not yet. It
//! is for counting only: where a page's bytes are does not depend on it, so a word that is told late, or of which nobody ever
//! hears, costs nobody anything. What must never happen: a page that the guest has used since being counted as given.
use super::Machine;
use crate::map::{MapError, Words};
use crate::replacement::Run;
use crate::word::{Gift, PageState, Transition};
use alloc::vec::Vec;
use core::ops::Range;
use plimsoll_types::PageIndex;

impl<W: Words> Machine<W> {
    /// It was heard how the guest gave these pages back. Nothing changes of those that it has used since.
    ///
    /// # Errors
    /// [`MapError`] past the last page or for a damaged word.
    pub fn explained(&mut self, pages: Range<u32>, gift: Gift) -> Result<(), MapError> {
        for page in pages.map(PageIndex) {
            if self.map.state(page)? == PageState::Absent {
                self.map.apply(page, Transition::Explain(gift))?;
            }
        }
        Ok(())
    }

    /// Runs of pages that the guest gave back nobody knows how.
    pub fn unexplained(&self, of: Run) -> Vec<Run> {
        self.runs(of, PageState::Absent)
    }

    /// Runs of pages of that state.
    pub(super) fn runs(&self, of: Run, state: PageState) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for page in (of.first.0..of.first.0.saturating_add(of.pages)).map(PageIndex) {
            match runs.last_mut() {
                _ if self.map.state(page) != Ok(state) => {}
                Some(run) if run.first.0 + run.pages == page.0 => run.pages += 1,
                _ => runs.push(Run { first: page, pages: 1 }),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::airlock::Shape;
    use crate::layout::{GuestLayout, Region};
    use crate::machine::{FaultEffect, Source};
    use crate::map::HeapWords;
    use crate::word::{PinCause, StateKind};
    use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, Gpa, PageCount};

    #[test]
    fn what_was_given_is_counted_by_how_until_it_is_used_and_whoever_takes_over() {
        let bytes = ByteCount(BLOCK_SIZE as u64);
        let layout = || GuestLayout::new(alloc::vec![Region { start: Gpa(0), bytes }]).unwrap();
        let words = HeapWords::new(BLOCK_PAGES as usize);
        let mut machine = Machine::new(layout(), &words, Shape::blocks(1), 1, |page| page.0 < 100).unwrap();
        machine.discarded(10..60, |_| {}).unwrap();
        machine.explained(0..20, Gift::Reported).unwrap();
        machine.explained(15..30, Gift::Ballooned).unwrap();
        let run = |first, pages| Run { first: PageIndex(first), pages };
        assert_eq!(machine.unexplained(run(0, BLOCK_PAGES)), [run(30, 30)], "told once each");
        let kinds = [StateKind::Reported, StateKind::Hinted, StateKind::Ballooned, StateKind::Absent];
        let counts = |machine: &Machine<&HeapWords>| kinds.map(|kind| machine.census().of(kind));
        assert_eq!(counts(&machine), [10, 0, 10, 30].map(PageCount));
        assert_eq!(machine.fault(PageIndex(25)), Ok(FaultEffect::Install(Source::Zero)));
        machine.installed(PageIndex(25)).unwrap();
        machine.explained(25..26, Gift::Ballooned).unwrap();
        assert_eq!(counts(&machine), [10, 0, 9, 30].map(PageCount), "what is used again is not given");
        drop(machine);
        // Page 12 was discarded and has not gone yet.
        let is_there = |page: PageIndex| page.0 < 10 || page.0 >= 60 || [12, 25].contains(&page.0);
        let mut machine =
            Machine::recover(layout(), &words, Shape::blocks(1), 1, is_there, |_| false).unwrap();
        assert_eq!(counts(&machine), [9, 0, 9, 30].map(PageCount));
        assert_eq!(machine.state(PageIndex(12)), Ok(PageState::Pinned(PinCause::Kernel)));
        let [asked] = machine.unexplained(run(0, BLOCK_PAGES))[..] else { panic!("nothing to ask about") };
        machine.explained(asked.first.0..asked.first.0 + asked.pages, Gift::Hinted).unwrap();
        assert_eq!(counts(&machine), [9, 30, 9, 0].map(PageCount));
        machine.audit().unwrap();
    }
}
