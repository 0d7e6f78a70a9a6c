//! The pin table: which guest pages must not leave because somebody other than a vCPU is about to use them.
//!
//! Enters: ranges of pages a device model, or the VMM itself, wants to read or write. Leaves: a [`PinGuard`] for as
//! long as which the pages are present. What must never happen: a page moved out while a guard for it lives, because
//! `UFFDIO_MOVE` does not see every kind of reference, and a device would go on writing to a page that is no longer
//! the guest's.
//!
//! # Protocol
//!
//! One mutex guards one table of counts. It is the only lock the agent ever waits for, so nobody may fault while
//! holding it.
//!
//! ```text
//! pin(range)                                agent, for each run of pages
//!   1 lock; count[range] += 1; unlock         a lock; n = pages up to the first one counted
//!   2 touch each page of the range            b UFFDIO_MOVE of those n pages; unlock
//!   3 guard lives: use the pages              c report n, and Pinned if n falls short
//!   4 lock; count[range] -= 1; unlock
//! ```
//!
//! Interleavings of one pin and one move of the same page:
//!
//! * 1 before a: the agent sees the count and stops. The page stays.
//! * b before 1: the page is gone when it is touched. Step 2 then is an ordinary fault: whoever serves the memory brings
//!   the page back, and since 1 has happened, no later a..b takes it again. When 2 returns, the page is present.
//! * 1 between a and b cannot be: the mutex is held from a to b.
//! * 2 while the agent waits in a: 2 holds no lock, so the agent goes on and can bring the page back (step 2 may wait
//!   for exactly that). If 2 happened under the mutex, the two would wait for each other for ever.
//!
//! Moving *in* needs no lock: it only makes present what is absent. A discard by the guest is not stopped either:
//! a guest that frees a page it has given to a device gets what it asked for, a page that reads as zero, and the
//! next touch through the guard is again an ordinary fault. The pages that the VMM itself depends on (parameters,
//! channels) are pinned for life and their discard is refused before it gets here.
use plimsoll_types::PageIndex;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A mutex around the table. A trait so that the very same protocol runs under a model checker's scheduler.
pub trait TableLock {
    /// An unlocked table.
    fn new(table: PinTable) -> Self;
    /// Calls `inside` with the table locked.
    fn with<R>(&self, inside: impl FnOnce(&mut PinTable) -> R) -> R;
}

impl TableLock for Mutex<PinTable> {
    fn new(table: PinTable) -> Self {
        Self::new(table)
    }

    fn with<R>(&self, inside: impl FnOnce(&mut PinTable) -> R) -> R {
        // A panic inside leaves counts that are too high at worst, and a page that never leaves is safe.
        inside(&mut self.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How often each page is pinned; pages that are not are not listed.
#[derive(Debug, Default)]
pub struct PinTable {
    counts: BTreeMap<u32, u32>,
}

impl PinTable {
    fn add(&mut self, pages: PageRun) {
        for page in pages.indices() {
            let count = self.counts.entry(page).or_insert(0);
            // At the top the count sticks, see `remove`: such a page is never released, which is safe.
            *count = count.saturating_add(1);
        }
    }

    fn remove(&mut self, pages: PageRun) {
        for page in pages.indices() {
            match self.counts.get_mut(&page) {
                Some(1) => {
                    self.counts.remove(&page);
                }
                Some(&mut u32::MAX) | None => {}
                Some(count) => *count -= 1,
            }
        }
    }

    /// Pages from the start of `pages` up to the first one that is pinned.
    fn free_prefix(&self, pages: PageRun) -> u32 {
        let first_pinned = self.counts.range(pages.indices()).next();
        first_pinned.map_or(pages.count, |(page, _)| page - pages.first.0)
    }
}

/// A run of pages that does not overflow the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    first: PageIndex,
    count: u32,
}

impl PageRun {
    /// `count` pages from `first`, or `None` if there are no such indices.
    pub const fn new(first: PageIndex, count: u32) -> Option<Self> {
        match first.0.checked_add(count) {
            Some(_) => Some(Self { first, count }),
            None => None,
        }
    }

    /// The first page.
    pub const fn first(self) -> PageIndex {
        self.first
    }

    /// How many pages.
    pub const fn count(self) -> u32 {
        self.count
    }

    fn indices(self) -> std::ops::Range<u32> {
        self.first.0..self.first.0 + self.count
    }

    /// The pages, one by one.
    pub fn pages(self) -> impl Iterator<Item = PageIndex> {
        self.indices().map(PageIndex)
    }
}

/// All pins of one machine.
#[derive(Debug)]
pub struct Pins<L = Mutex<PinTable>> {
    table: L,
}

impl<L: TableLock> Default for Pins<L> {
    fn default() -> Self {
        Self { table: L::new(PinTable::default()) }
    }
}

impl<L: TableLock> Pins<L> {
    /// Pins `pages` and makes each present by calling `touch`, which may block until somebody has brought the page.
    pub fn pin(&self, pages: PageRun, touch: impl FnMut(PageIndex)) -> PinGuard<'_, L> {
        self.table.with(|table| table.add(pages));
        let guard = PinGuard { pins: self, pages };
        pages.pages().for_each(touch);
        guard
    }

    /// Pins `pages` until the end of the machine. For pages that nobody serves yet: they are not touched.
    pub fn pin_for_life(&self, pages: PageRun) {
        self.table.with(|table| table.add(pages));
    }

    /// Calls `take` with the pages from the start of `pages` that are not pinned, none of which becomes pinned before
    /// `take` returns. `take` must not fault. It is called only if there is a page to take.
    pub fn take_unpinned<R>(&self, pages: PageRun, take: impl FnOnce(PageRun) -> R) -> Option<R> {
        self.table.with(|table| {
            let run = PageRun { first: pages.first, count: table.free_prefix(pages) };
            (run.count > 0).then(|| take(run))
        })
    }

    /// True when a page of `pages` is pinned at the moment.
    pub fn any(&self, pages: PageRun) -> bool {
        self.table.with(|table| table.free_prefix(pages) < pages.count)
    }
}

/// Pages that stay where they are while this lives.
#[derive(Debug)]
#[must_use = "the pages are pinned only as long as the guard lives"]
pub struct PinGuard<'a, L: TableLock = Mutex<PinTable>> {
    pins: &'a Pins<L>,
    pages: PageRun,
}

impl<L: TableLock> Drop for PinGuard<'_, L> {
    fn drop(&mut self) {
        self.pins.table.with(|table| table.remove(self.pages));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u32, count: u32) -> PageRun {
        PageRun::new(PageIndex(first), count).unwrap()
    }

    #[test]
    fn a_page_pinned_twice_stays_until_both_guards_are_gone() {
        let pins: Pins = Pins::default();
        let first = pins.pin(run(10, 4), |_| ());
        let second = pins.pin(run(12, 1), |_| ());
        let taken = |at: PageRun| pins.take_unpinned(at, PageRun::count);
        assert_eq!(taken(run(8, 8)), Some(2));
        drop(first);
        assert_eq!(taken(run(8, 8)), Some(4));
        assert_eq!(taken(run(12, 1)), None);
        drop(second);
        assert_eq!(taken(run(8, 8)), Some(8));
        pins.pin_for_life(run(8, 1));
        assert_eq!(taken(run(8, 8)), None);
        assert!(pins.any(run(0, 9)) && !pins.any(run(9, 100)));
    }

    #[test]
    fn a_run_past_the_last_index_cannot_be_made() {
        assert_eq!(PageRun::new(PageIndex(u32::MAX), 1), None);
        assert!(PageRun::new(PageIndex(u32::MAX), 0).is_some());
    }
}

/// The protocol under a scheduler that tries interleavings. Memory is a row of flags; the agent takes pages, the
/// manager brings back what somebody waits for.
#[cfg(test)]
mod interleavings {
    use super::*;
    use shuttle::sync::atomic::{AtomicBool, Ordering};
    use shuttle::sync::{Arc, Mutex as CheckedMutex};
    use shuttle::thread;

    impl TableLock for CheckedMutex<PinTable> {
        fn new(table: PinTable) -> Self {
            Self::new(table)
        }

        fn with<R>(&self, inside: impl FnOnce(&mut PinTable) -> R) -> R {
            inside(&mut self.lock().unwrap_or_else(PoisonError::into_inner))
        }
    }

    const PAGES: u32 = 3;
    const ROUNDS: u32 = 2;

    struct World {
        pins: Pins<CheckedMutex<PinTable>>,
        present: Vec<AtomicBool>,
        wanted: Vec<AtomicBool>,
        over: AtomicBool,
    }

    impl World {
        fn touch(&self, page: PageIndex) {
            while !self.present[page.get()].load(Ordering::SeqCst) {
                self.wanted[page.get()].store(true, Ordering::SeqCst);
                thread::yield_now();
            }
        }

        fn take(&self, run: PageRun) {
            for page in run.pages() {
                self.present[page.get()].store(false, Ordering::SeqCst);
            }
        }
    }

    /// What the agent does to a run of pages.
    type Agent = fn(&World, PageRun);

    fn correct(world: &World, run: PageRun) {
        world.pins.take_unpinned(run, |run| world.take(run));
    }

    /// The mistake the lock is there for: look, unlock, then move.
    fn unlocked(world: &World, run: PageRun) {
        let free = world.pins.take_unpinned(run, |run| run);
        if let Some(run) = free {
            world.take(run);
        }
    }

    fn scenario(agent: Agent) {
        let flags = |value| (0..PAGES).map(|_| AtomicBool::new(value)).collect();
        let world = Arc::new(World {
            pins: Pins::default(),
            present: flags(true),
            wanted: flags(false),
            over: AtomicBool::new(false),
        });
        let taker = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                for _ in 0..ROUNDS {
                    agent(&world, PageRun::new(PageIndex(0), PAGES).unwrap());
                }
            })
        };
        let manager = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                while !world.over.load(Ordering::SeqCst) {
                    for (wanted, present) in world.wanted.iter().zip(&world.present) {
                        if wanted.swap(false, Ordering::SeqCst) {
                            present.store(true, Ordering::SeqCst);
                        }
                    }
                    thread::yield_now();
                }
            })
        };
        let users: Vec<_> = [(0, 2), (1, 2)]
            .into_iter()
            .map(|(first, count)| {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    let run = PageRun::new(PageIndex(first), count).unwrap();
                    let guard = world.pins.pin(run, |page| world.touch(page));
                    for page in run.pages() {
                        thread::yield_now();
                        assert!(world.present[page.get()].load(Ordering::SeqCst), "{page} left while pinned");
                    }
                    drop(guard);
                })
            })
            .collect();
        taker.join().unwrap();
        for user in users {
            user.join().unwrap();
        }
        world.over.store(true, Ordering::SeqCst);
        manager.join().unwrap();
    }

    // 20,000 schedules take about a second; the mistake below is found within a few dozen.
    const SCHEDULES: usize = 20_000;

    #[test]
    fn no_schedule_takes_a_page_while_it_is_pinned() {
        shuttle::check_random(|| scenario(correct), SCHEDULES);
        shuttle::check_pct(|| scenario(correct), SCHEDULES / 4, 3);
    }

    #[test]
    #[should_panic(expected = "left while pinned")]
    fn an_agent_that_moves_after_unlocking_is_caught() {
        shuttle::check_random(|| scenario(unlocked), SCHEDULES);
    }
}
