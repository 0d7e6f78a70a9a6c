//! How the guest gave pages back, for a manager that counts them apart.
//!
//! Enters: which pages are being given back, before they go. Leaves: how a page was given last. A manager is told of discards by the
//! kernel, which knows no reasons, and asks for these later, when it has nothing better to do. What must never happen: a page of
//! which the manager hears before its mark is there. A mark of a page that the guest uses again says nothing: its word does.
use crate::pins::PageRun;
use plimsoll_core::word::Gift;
use plimsoll_types::{PageCount, PageIndex};
use std::sync::atomic::{AtomicU8, Ordering};

const NONE: u8 = 0;

/// A mark for each page of the machine.
#[derive(Debug)]
pub(crate) struct Gifts(Vec<AtomicU8>);

impl Gifts {
    /// Of so many pages, none of which was given.
    pub(crate) fn new(pages: PageCount) -> Self {
        let pages = usize::try_from(pages.0).unwrap_or(0);
        Self((0..pages).map(|_| AtomicU8::new(NONE)).collect())
    }

    /// These pages are about to be given so.
    pub(crate) fn note(&self, run: PageRun, gift: Gift) {
        let mark = match gift {
            Gift::Reported => 1,
            Gift::Hinted => 2,
            Gift::Ballooned => 3,
        };
        self.mark(run, mark);
    }

    /// Nobody is to be told of these pages any more how they were given.
    pub(crate) fn forget(&self, run: PageRun) {
        self.mark(run, NONE);
    }

    fn mark(&self, run: PageRun, mark: u8) {
        let first = run.first().get();
        let marks = self.0.get(first..first.saturating_add(run.count() as usize)).unwrap_or_default();
        marks.iter().for_each(|page| page.store(mark, Ordering::Release));
    }

    /// How the page was given last, if it ever was.
    pub(crate) fn of(&self, page: PageIndex) -> Option<Gift> {
        match self.0.get(page.get())?.load(Ordering::Acquire) {
            1 => Some(Gift::Reported),
            2 => Some(Gift::Hinted),
            3 => Some(Gift::Ballooned),
            _ => None,
        }
    }
}
