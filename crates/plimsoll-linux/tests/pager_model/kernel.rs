//! The simulated kernel: guest RAM, airlock, fault and event queues of one machine, and what its guest may see.
//!
//! Everything is in one [`State`] behind one shuttle mutex, so each effect is atomic and every lock is a scheduling
//! point. Waiting is on shuttle condition variables: a wake-up that never comes is a deadlock that shuttle reports.
use super::content::{Content, Expected};
use super::world::SEEN;
use plimsoll_core::map::{HeapWords, Words};
use plimsoll_core::word::{PageState, PageWord};
use plimsoll_linux::uffd::space::{Access, SpaceEvent};
use plimsoll_linux::uffd::wire::{Item, Outcome};
use plimsoll_types::{PAGE_SIZE, PageBytes, PageIndex, SlotPage};
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Lets every other thread run, without the loss of priority that a yield means to the PCT scheduler.
pub(crate) fn point() {
    shuttle::thread::sleep(Duration::ZERO);
}

/// The same, and now and then the thread is off its processor for long.
fn preempted() {
    point();
    if one_in(3) {
        (0..thread_rng().gen_range(5..30)).for_each(|_| shuttle::thread::yield_now());
    }
}

/// True one time in `n`.
pub(crate) fn one_in(n: u32) -> bool {
    thread_rng().gen_ratio(1, n)
}

/// One page of guest RAM.
pub(crate) enum Ram {
    /// A touch waits for the manager.
    Absent,
    /// There.
    Present(Box<PageBytes>),
    /// A touch fails.
    Poisoned,
}

/// What keeps a page from being moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pin {
    /// Nothing.
    Free,
    /// A reference the kernel sees, until it is dropped.
    Kernel,
    /// Once shared with a forked child: until it is written or populated.
    Shared,
    /// The VMM's pin table, until the device is done.
    Device,
}

/// An agent's task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Adopt the epoch.
    SetEpoch,
    /// Move RAM to the airlock.
    MoveOut,
    /// Make pages movable.
    Populate,
    /// Empty slot pages.
    Zap,
    /// Move the airlock to RAM.
    MoveIn,
    /// Register RAM.
    Watch,
    /// Unregister RAM.
    Unwatch,
}

/// A task with its sender.
pub(crate) struct Request {
    /// Names the reply.
    pub(crate) ticket: u64,
    /// The sender's epoch.
    pub(crate) epoch: u64,
    /// What.
    pub(crate) op: Op,
    /// Of what.
    pub(crate) items: Vec<Item>,
}

/// A fault whose vCPU waits.
#[derive(Clone, Copy)]
pub(crate) struct Fault {
    ticket: u64,
    /// The page.
    pub(crate) page: u32,
    /// How.
    pub(crate) access: Access,
    /// Its event was taken.
    pub(crate) is_read: bool,
}

/// Whether a manager hears of a discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// Its event is queued.
    Unread,
    /// Its event was taken.
    Read,
    /// It began where nothing is registered: there is no event.
    Silent,
}

/// A discard: queued, then read, then its pages go one by one. A silent one only does the last.
#[derive(Clone)]
pub(crate) struct Discard {
    /// Its name.
    pub(crate) ticket: u64,
    /// First page.
    pub(crate) first: u32,
    /// Writes of each page when it began.
    writes: Vec<u32>,
    /// Pages zapped.
    zapped: usize,
    /// Who hears of it.
    pub(crate) notice: Notice,
    is_swallowed: bool,
}

impl Discard {
    /// How many pages.
    pub(crate) fn pages(&self) -> u32 {
        u32::try_from(self.writes.len()).expect("a few pages")
    }

    /// What a manager reads of it.
    pub(crate) fn event(&self) -> SpaceEvent {
        SpaceEvent::Discard { first: PageIndex(self.first), pages: self.pages() }
    }
}

/// What the kernel, the VMM and the guest of one machine know.
pub(crate) struct State {
    /// Whose.
    pub(crate) machine: u32,
    /// Guest RAM.
    pub(crate) ram: Vec<Ram>,
    /// Which of it is registered. Where it is not, the kernel fills what is touched.
    pub(crate) watched: Vec<bool>,
    /// The airlock.
    pub(crate) slots: Vec<Option<Box<PageBytes>>>,
    /// What keeps each page in place.
    pub(crate) pins: Vec<Pin>,
    /// Waiting vCPUs, in the order in which they came.
    pub(crate) faults: Vec<Fault>,
    /// Discards under way, in the order in which they came.
    pub(crate) discards: Vec<Discard>,
    ended: Vec<Discard>,
    /// Discards that were read and are not in the page words yet.
    pub(crate) unapplied: Vec<Discard>,
    /// Discards that keep installs out (`mmap_changing`).
    pub(crate) changing: u32,
    /// Installs that keep discards from beginning (`map_changing_lock`).
    pub(crate) installing: u32,
    /// What the agent is to do.
    pub(crate) requests: VecDeque<Request>,
    /// What it has done.
    pub(crate) replies: Vec<(u64, Vec<Outcome>)>,
    /// The agent's epoch.
    pub(crate) epoch: u64,
    /// No more refusals out of the blue: the run is being checked.
    pub(crate) is_calm: bool,
    /// Managers and agent may end.
    pub(crate) is_over: bool,
    /// The machine is being given back, or was: then words say what was there when it was.
    pub(crate) is_leaving: bool,
    /// Pages discarded so far, of which words tell something else.
    pub(crate) discarded_pages: u64,
    /// Bytes the guest may see.
    pub(crate) expected: Vec<Expected>,
    words: Arc<HeapWords>,
    tickets: u64,
    /// What happened to which pages, for whoever has to understand a failure.
    pub(crate) trace: Vec<(&'static str, u32, u32)>,
}

impl State {
    /// Remembers what happened to pages.
    pub(crate) fn note(&mut self, what: &'static str, first: u32, pages: u32) {
        self.trace.push((what, first, pages));
    }

    /// What happened to a page, and its word.
    pub(crate) fn story(&self, page: u32) -> String {
        let about = self.trace.iter().filter(|(_, first, pages)| (*first..first + pages).contains(&page));
        let steps: Vec<&str> = about.map(|(what, ..)| *what).collect();
        let word = PageWord(self.words.words()[page as usize].load(Ordering::Relaxed));
        format!("{}; its word is {word:?}", steps.join(", "))
    }

    /// A number nobody had.
    pub(crate) const fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    /// Something happens that need not: a refusal, a partial result.
    pub(crate) fn mischief(&self, n: u32) -> bool {
        !self.is_calm && one_in(n)
    }

    /// An event can be read.
    pub(crate) fn has_event(&self) -> bool {
        self.faults.iter().any(|fault| !fault.is_read)
            || self.discards.iter().any(|discard| discard.notice == Notice::Unread)
    }

    /// A discard nobody hears of has yet to end: it holds the lock that registering takes.
    pub(crate) fn has_silent_discard(&self) -> bool {
        self.discards.iter().any(|discard| discard.notice == Notice::Silent)
    }

    /// The kernel fills a page that is not registered; of an empty machine, now and then all, as a huge page.
    fn fill(&mut self, page: usize) {
        let is_empty = |(ram, watched): (&Ram, &bool)| matches!(ram, Ram::Absent) && !watched;
        let takes_all = self.ram.iter().zip(&self.watched).all(is_empty) && one_in(2);
        let pages = if takes_all { 0..self.ram.len() } else { page..page + 1 };
        SEEN.filled.fetch_add(1, Ordering::Relaxed);
        for page in pages {
            self.ram[page] = Ram::Present(zeros());
            self.note("filled by the kernel", u32::try_from(page).expect("a few pages"), 1);
        }
    }

    /// Whoever waits for the pages tries again; unread events of theirs are never delivered.
    pub(crate) fn wake(&mut self, first: u32, pages: u32) {
        self.faults.retain(|fault| !(first..first + pages).contains(&fault.page));
    }

    /// Fails if a page word says that bytes of the guest are in the slot page.
    pub(crate) fn check_unnamed(&self, at: SlotPage, what: &str) {
        for (page, word) in self.words.words().iter().enumerate() {
            let state = PageWord(word.load(Ordering::Relaxed)).state();
            let names =
                matches!(state, Some(PageState::Limbo(named) | PageState::Capturing(named)) if named == at);
            let machine = self.machine;
            assert!(
                !names,
                "model: {what} of slot page {} of machine {machine}, which page {page} names",
                at.0
            );
        }
    }

    /// The managers are gone, with their process or alone. A discard whose event died with the process, or whose pages
    /// have not gone yet although its event was applied, may leave old bytes: nobody who comes later can know of it.
    pub(crate) fn manager_died(&mut self) {
        let pages = u32::try_from(self.ram.len()).expect("a few pages");
        self.note("MANAGER DIED", 0, pages);
        let dies_alone = one_in(2);
        let unapplied: Vec<u64> = self.unapplied.iter().map(|discard| discard.ticket).collect();
        for discard in self.discards.iter_mut().filter(|discard| discard.notice == Notice::Read) {
            discard.is_swallowed |= !dies_alone || !unapplied.contains(&discard.ticket);
        }
        if dies_alone {
            return;
        }
        self.unapplied.clear();
        let started = self.ended.iter().chain(&self.discards);
        for discard in started.filter(|discard| unapplied.contains(&discard.ticket)) {
            for (page, writes) in (discard.first as usize..).zip(&discard.writes).take(discard.zapped) {
                self.expected[page].swallowed(*writes);
            }
        }
    }
}

/// One machine: its state, and who waits for it to change.
pub(crate) struct Kernel {
    state: Mutex<State>,
    /// Guests wait here for pages, for events to be read, for installs to end.
    guests: Condvar,
    /// Managers wait here for events and replies.
    managers: Condvar,
    /// The agent waits here for requests.
    agents: Condvar,
}

impl Kernel {
    /// A machine that was never touched.
    pub(crate) fn new(machine: u32, pages: u32, slot_pages: u32, words: Arc<HeapWords>) -> Self {
        let state = State {
            machine,
            ram: (0..pages).map(|_| Ram::Absent).collect(),
            watched: vec![true; pages as usize],
            slots: (0..slot_pages).map(|_| None).collect(),
            pins: vec![Pin::Free; pages as usize],
            faults: Vec::new(),
            discards: Vec::new(),
            ended: Vec::new(),
            unapplied: Vec::new(),
            changing: 0,
            installing: 0,
            requests: VecDeque::new(),
            replies: Vec::new(),
            epoch: 0,
            is_calm: false,
            is_over: false,
            is_leaving: false,
            discarded_pages: 0,
            expected: vec![Expected::untouched(); pages as usize],
            words,
            tickets: 0,
            trace: Vec::new(),
        };
        let (guests, managers, agents) = (Condvar::new(), Condvar::new(), Condvar::new());
        Self { state: Mutex::new(state), guests, managers, agents }
    }

    /// The state, for as long as the guard lives.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics and lives on")
    }

    /// Everybody looks again, at flags outside the state, too: hence the lock.
    pub(crate) fn ring(&self) {
        let _state = self.state();
        self.guests.notify_all();
        self.managers.notify_all();
        self.agents.notify_all();
    }

    /// A manager waits until the answer is not `None`.
    pub(crate) fn manager_waits<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        Self::wait(self.state(), &self.managers, &mut look)
    }

    /// The VMM is alone with the machine: it reads events for those who wait for that, and nobody learns of them.
    pub(crate) fn is_alone_until(&self, is_over: impl Fn() -> bool) {
        loop {
            let goes_on = self.manager_waits(|state| match (state.has_event(), is_over()) {
                (true, _) => Some(true),
                (false, is_over) => is_over.then_some(false),
            });
            let mut state = self.state();
            if !goes_on {
                return;
            }
            assert!(
                state.faults.is_empty(),
                "model: somebody waits for a page of a machine that is given back"
            );
            for discard in &mut state.discards {
                discard.notice = if discard.notice == Notice::Unread { Notice::Read } else { discard.notice };
            }
            drop(state);
            self.ring();
        }
    }

    /// The agent waits until the answer is not `None`.
    pub(crate) fn agent_waits<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        Self::wait(self.state(), &self.agents, &mut look)
    }

    fn guest_waits<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        Self::wait(self.state(), &self.guests, &mut look)
    }

    fn wait<T>(
        mut state: MutexGuard<'_, State>,
        on: &Condvar,
        look: &mut impl FnMut(&mut State) -> Option<T>,
    ) -> T {
        loop {
            if let Some(seen) = look(&mut state) {
                return seen;
            }
            state = on.wait(state).expect("no thread panics and lives on");
        }
    }

    /// A vCPU checks the page's bytes and, given a content, overwrites them. Waits for the page if it must.
    pub(crate) fn touch(&self, page: u32, write: Option<Content>) {
        loop {
            point();
            let Some(ticket) = self.try_touch(page, write) else { return };
            self.guest_waits(|state| state.faults.iter().all(|fault| fault.ticket != ticket).then_some(()));
        }
    }

    /// The same without waiting: `None` when it is done, else the fault to wait for.
    pub(crate) fn try_touch(&self, page: u32, write: Option<Content>) -> Option<u64> {
        let mut state = self.state();
        let at = page as usize;
        if matches!(state.ram[at], Ram::Absent) && !state.watched[at] {
            state.fill(at);
        }
        let State { machine, ram, expected, .. } = &mut *state;
        let machine = *machine;
        match &mut ram[at] {
            Ram::Present(bytes) => {
                if let Err(complaint) = expected[at].read(bytes) {
                    let story = state.story(page);
                    panic!("model: machine {machine} reads page {page}: {complaint}; what happened: {story}");
                }
                if let Some(content) = write {
                    *bytes = content.bytes();
                    expected[at].wrote(content);
                    state.note("written", page, 1);
                    if state.pins[at] == Pin::Shared {
                        state.pins[at] = Pin::Free;
                    }
                }
                None
            }
            Ram::Poisoned => panic!("model: machine {machine} touched page {page}, which was poisoned"),
            Ram::Absent => {
                let ticket = state.ticket();
                let access = if write.is_some() { Access::Write } else { Access::Read };
                state.note("fault", page, 1);
                state.faults.push(Fault { ticket, page, access, is_read: false });
                drop(state);
                self.managers.notify_all();
                Some(ticket)
            }
        }
    }

    /// The VMM gives pages of a block back: waits until its event is read, if there is one; then the pages go, one by one.
    pub(crate) fn discard(&self, first: u32, pages: u32) {
        point();
        let range = first as usize..(first + pages) as usize;
        let begun = self.guest_waits(|state| {
            let is_heard = state.watched[range.start];
            if is_heard && state.installing > 0 {
                return None;
            }
            if state.pins[range.clone()].contains(&Pin::Device) {
                return Some(None);
            }
            let ticket = state.ticket();
            let writes = state.expected[range.clone()].iter_mut().map(Expected::discarding).collect();
            let notice = if is_heard { Notice::Unread } else { Notice::Silent };
            if is_heard || state.is_leaving {
                state.discarded_pages += u64::from(pages);
            }
            if is_heard {
                state.changing += 1;
                state.note("discard queued", first, pages);
            } else {
                SEEN.silent.fetch_add(1, Ordering::Relaxed);
                state.note("silent discard", first, pages);
            }
            let discard = Discard { ticket, first, writes, zapped: 0, notice, is_swallowed: false };
            state.discards.push(discard);
            Some(Some((ticket, is_heard)))
        });
        let Some((ticket, is_heard)) = begun else { return };
        if is_heard {
            self.managers.notify_all();
            self.guest_waits(|state| {
                let own = state.discards.iter().find(|own| own.ticket == ticket)?;
                (own.notice == Notice::Read).then_some(())
            });
            point();
            self.state().changing -= 1;
        }
        preempted();
        for page in range {
            point();
            let mut state = self.state();
            state.ram[page] = Ram::Absent;
            state.pins[page] = Pin::Free;
            state.note("discard zaps", u32::try_from(page).expect("a few pages"), 1);
            let State { discards, expected, .. } = &mut *state;
            let own =
                discards.iter_mut().find(|own| own.ticket == ticket).expect("only its maker removes it");
            expected[page].discarded(own.writes[own.zapped], own.is_swallowed);
            own.zapped += 1;
        }
        let mut state = self.state();
        let place = state.discards.iter().position(|own| own.ticket == ticket).expect("as above");
        let own = state.discards.remove(place);
        state.ended.push(own);
        drop(state);
        // Who registers waits for discards that nobody hears of.
        self.agents.notify_all();
    }

    /// Something takes hold of a page that is there.
    pub(crate) fn pin(&self, page: u32, pin: Pin) {
        point();
        let mut state = self.state();
        let is_discarding = state
            .discards
            .iter()
            .any(|discard| (discard.first..discard.first + discard.pages()).contains(&page));
        if matches!(state.ram[page as usize], Ram::Present(_)) && !is_discarding {
            state.pins[page as usize] = pin;
        }
    }
}

/// A page of zeros.
pub(crate) fn zeros() -> Box<PageBytes> {
    Box::new([0; PAGE_SIZE])
}
