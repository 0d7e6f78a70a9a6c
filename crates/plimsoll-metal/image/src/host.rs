//! Several guests on one processor, in less memory than they own.
//!
//! Enters: guests. Leaves: what became of them. Who gives memory up is the ledger's decision, which pages the core's, as on Linux; that
//! no more is used than there is, the frame allocator's. Guests take turns by the timer. A guest for whose page there is no
//! memory stalls until there is; if that is so for everybody, and nothing is left to be stored, they end with a sentence.
use crate::calls::{CallError, Status};
use crate::console::say;
use crate::cpu;
use crate::device::Devices;
use crate::guest::{Death, Guest, State};
use crate::paged::{PagedError, Pool};
use crate::policy::Decider;
use crate::svm::{Exit, Svm};
use crate::wire::ProgramKind;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use plimsoll_core::ledger::{Budget, Kind, Ledger, LedgerError, Purpose, Terms};
use plimsoll_core::word::StateKind;
use plimsoll_guest::abi::{self, Report};
use plimsoll_types::{ByteCount, DomainId, Gpa, GroupId, PAGE_SIZE, PageCount};

const GROUP: GroupId = GroupId(1);
/// All guests share one store: they are one tenant's, as in the demo on Linux.
const DOMAIN: DomainId = DomainId(1);
/// Pages stored between two looks at guests: about 2 ms of emulated work.
const STEP: usize = 32;
/// Limbo has this part of memory: what is touched there comes back at the price of a table entry.
const LIMBO_PART: u64 = 16;
/// Windows of the working set, as the demo has them.
const WINDOW_SECONDS: u64 = 2;
/// How long filling may take, and how long the last check, beyond what a machine that does much else needs.
const PATIENCE_SECONDS: u64 = 600;
/// Turns without a fault served in which there was no memory for a guest, after which it ends: others have had time to give some up.
const STALLED_TURNS: u32 = 200;

/// Exceptions of guests' that may be the hypervisor's.
const DEBUG: u64 = 1;
const PAGE_FAULT: u64 = 14;
/// A page and the tables on the way to it. If they are taken again meanwhile, the guest faults again.
const PAGES_OF_A_FAULT: usize = 5;

/// What a run has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Guests write each page for the first time. That is not work: emulated, it takes as long as it takes.
    Filling,
    /// Guests work, until then.
    Working {
        /// Ticks of the time-stamp counter.
        until: u64,
    },
    /// Guests read every page once more.
    Checking,
}

/// All guests and what they share.
pub struct Host {
    /// Frames and the store.
    pub pool: Pool,
    /// Who is charged for what.
    pub ledger: Ledger,
    /// The guests.
    pub guests: Vec<Guest>,
    /// Nested page faults.
    pub nested_faults: u64,
    /// Devices that guests own, if there is hardware that contains them.
    pub devices: Option<Devices>,
    /// Who decides how much each guest is to have, if anybody does: else each has an equal share.
    pub decider: Option<Decider>,
    /// What went wrong beside guests' deaths.
    pub failures: Vec<String>,
    svm: Svm,
    turn: usize,
    /// Whose order was worked on last.
    worked: usize,
    tsc_hz: u64,
    window: u64,
    store_full: bool,
}

impl Host {
    /// A host without guests.
    pub fn new(pool: Pool, svm: Svm, tsc_hz: u64) -> Self {
        let total = pool.memory.borrow().total().bytes();
        let mut ledger = Ledger::new(Budget::of(total));
        ledger.add_group(GROUP);
        Self {
            pool,
            ledger,
            guests: Vec::new(),
            nested_faults: 0,
            devices: None,
            decider: None,
            failures: Vec::new(),
            svm,
            turn: 0,
            worked: 0,
            tsc_hz,
            window: 0,
            store_full: false,
        }
    }

    /// Adds a guest.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn admit(&mut self, guest: Guest) -> Result<(), LedgerError> {
        // What is never taken is reserved.
        let reservation = guest.paged.pages(StateKind::NeverPage).bytes();
        let terms = Terms { size: guest.paged.size().bytes(), reservation };
        self.ledger.admit(guest.id, GROUP, terms)?;
        // There is room for as many as there can be settings for, and each is new.
        let admitted = self.pool.memory.borrow_mut().with_extents(|extents| extents.admit(guest.id));
        debug_assert!(admitted.is_ok(), "{admitted:?}");
        self.guests.push(guest);
        self.settle()
    }

    fn used(&self) -> ByteCount {
        self.pool.memory.borrow().used().bytes()
    }

    /// States in the ledger what is in use, and by whom.
    fn settle(&mut self) -> Result<(), LedgerError> {
        for guest in &self.guests {
            self.ledger.settle(guest.id, Kind::Resident, guest.paged.resident().bytes())?;
            self.ledger.settle(guest.id, Kind::Limbo, guest.paged.limbo().bytes())?;
        }
        let stats = self.pool.store.stats();
        self.ledger.set_store(GROUP, DOMAIN, stats.data_slabs + stats.record_slabs)?;
        self.ledger.set_overhead(ByteCount(0));
        let overhead = self.used().saturating_sub(self.ledger.charged());
        self.ledger.set_overhead(overhead);
        Ok(())
    }

    /// Has guests fill their memory, work for so many seconds, and read every page once more. `seen` is called when the work ends.
    pub fn run(&mut self, seconds: u32, seen: impl FnOnce(&mut Self)) {
        let start = cpu::now();
        let ticks = |seconds: u64| seconds.saturating_mul(self.tsc_hz);
        let (work, window, patience) =
            (ticks(u64::from(seconds)), ticks(WINDOW_SECONDS), ticks(PATIENCE_SECONDS));
        let (mut phase, mut since) = (Phase::Filling, start);
        let mut seen = Some(seen);
        while self.guests.iter().any(|guest| !matches!(guest.state, State::Ended(_))) {
            let now = cpu::now();
            let number = (now - start) / window + 1;
            let is_new_window = number > self.window;
            match phase {
                Phase::Filling if self.guests.iter().all(Guest::is_filled) => {
                    (phase, since) = (Phase::Working { until: now + work }, now);
                }
                Phase::Working { until } if now >= until || self.is_done() => {
                    if let Some(seen) = seen.take() {
                        seen(self);
                    }
                    self.each(|guest, pool| guest.stop(pool, abi::STOP_FINISH).map_err(Death::Memory));
                    (phase, since) = (Phase::Checking, now);
                }
                Phase::Filling | Phase::Working { .. } if is_new_window => self.next_window(number),
                _ => {}
            }
            if is_new_window {
                self.window = number;
                self.say(phase);
            }
            if now - since > patience {
                self.failures.push(alloc::format!("{phase:?} did not end within {PATIENCE_SECONDS} s"));
                break;
            }
            self.decide(now);
            self.take_turn(now);
            self.work_order();
            self.hear();
        }
        // They may all have ended before.
        if let Some(seen) = seen.take() {
            seen(self);
        }
        // Those that have not ended keep theirs no longer than the work lasts.
        (0..self.guests.len()).for_each(|place| self.stop_device(place));
    }

    /// Whether there are guests whose program ends by itself, and all of those have ended: the others worked for their sake.
    fn is_done(&self) -> bool {
        let mut those = self.guests.iter().filter(|guest| guest.program != ProgramKind::WORKLOAD).peekable();
        those.peek().is_some() && those.all(|guest| matches!(guest.state, State::Ended(_)))
    }

    /// Does something for every guest that has not ended; one for which it cannot be done ends.
    fn each(&mut self, mut what: impl FnMut(&mut Guest, &mut Pool) -> Result<(), Death>) {
        for place in 0..self.guests.len() {
            let is_over = matches!(self.guests[place].state, State::Ended(_));
            if !is_over && let Err(death) = what(&mut self.guests[place], &mut self.pool) {
                self.kill(place, death);
            }
        }
    }

    /// A line for people.
    fn say(&self, phase: Phase) {
        let sum = |of: fn(&Report) -> u64| self.guests.iter().map(|guest| of(&guest.report)).sum::<u64>();
        let name = match phase {
            Phase::Filling => "filling",
            Phase::Working { .. } => "working",
            Phase::Checking => "checking",
        };
        say!(
            "{name}: used {} of {}, {} of {} pages written, {} read again, {} operations, {} wrong words",
            self.used(),
            self.ledger.budget().hard,
            sum(|report| report.populated_pages),
            sum(|report| report.footprint_pages),
            sum(|report| report.checked_pages),
            sum(|report| report.operations),
            sum(|report| report.wrong_words)
        );
    }

    fn next_window(&mut self, number: u64) {
        self.each(|guest, pool| {
            guest.paged.harvest(&mut pool.memory.borrow_mut()).map_err(Death::Memory)?;
            guest.paged.next_window();
            guest.window(pool, number).map_err(Death::Memory)
        });
    }

    /// Lets the next guest that can run do so until the timer, or until it has nothing to do. With none, memory is made, or
    /// time passes, unless there is an order to be worked on.
    fn take_turn(&mut self, now: u64) {
        let count = self.guests.len();
        let can_run = |guest: &Guest| match guest.state {
            State::Ready | State::Stalled => true,
            State::Asleep { until } => until <= now,
            State::Ended(_) => false,
        };
        let next =
            (1..=count).map(|step| (self.turn + step) % count).find(|place| can_run(&self.guests[*place]));
        let Some(place) = next else {
            let low = self.ledger.budget().low;
            let is_at_work = self.used() > low && self.relieve(low);
            // An open order is worked on right after this: it need not wait for the timer.
            if !is_at_work && self.next_order().is_none() {
                cpu::wait();
            }
            return;
        };
        self.turn = place;
        self.guests[place].state = State::Ready;
        while matches!(self.guests[place].state, State::Ready) {
            let exit = self.guests[place].run(&self.svm);
            match self.handle(place, exit) {
                Ok(None) => {}
                Ok(Some(State::Stalled)) if self.guests[place].stalls > STALLED_TURNS => {
                    let full = if self.store_full { PagedError::StoreFull } else { PagedError::NoMemory };
                    self.kill(place, Death::Memory(full));
                }
                Ok(Some(state)) => {
                    let is_over = matches!(state, State::Ended(_));
                    self.guests[place].state = state;
                    if is_over {
                        self.bury(place);
                    }
                }
                Err(death) => self.kill(place, death),
            }
            if matches!(exit, Exit::Timer) {
                break;
            }
        }
    }

    /// Whether there is room for so much more, once pages were taken to make some.
    pub fn has_room(&mut self, bytes: ByteCount) -> bool {
        let Budget { install, low, .. } = self.ledger.budget();
        while self.used() + bytes > install {
            if !self.relieve(low) {
                return false;
            }
        }
        true
    }

    fn kill(&mut self, place: usize, death: Death) {
        self.guests[place].state = State::Ended(Err(death));
        // First of all: what a device may still reach is nobody else's yet.
        let ended =
            self.take_device(place).and_then(|()| self.guests[place].paged.discard_all(&mut self.pool));
        if let Err(error) = ended {
            self.failures.push(error.to_string());
        }
        self.store_full = false;
        self.bury(place);
    }

    /// A guest runs no more: what it lent and borrowed goes where it belongs.
    fn bury(&mut self, place: usize) {
        self.stop_device(place);
        if let Err(error) = self.forget(place) {
            self.failures.push(alloc::format!("{}: {error:?}", self.guests[place].name));
        }
    }

    fn stop_device(&mut self, place: usize) {
        if let Err(error) = self.take_device(place) {
            self.failures.push(error.to_string());
        }
    }

    /// Does what an exit asks for. `None`: the guest goes on.
    fn handle(&mut self, place: usize, exit: Exit) -> Result<Option<State>, Death> {
        match exit {
            Exit::Timer => Ok(None),
            Exit::Page { gpa, access } if self.guests[place].paged.is_there(gpa) => {
                let Self { pool, guests, .. } = self;
                let permitted = guests[place].paged.permit(&mut pool.memory.borrow_mut(), gpa, access);
                permitted.map(|()| None).map_err(Death::Memory)
            }
            Exit::Page { gpa, .. } => self.fault(place, gpa),
            Exit::Out { port, bytes } => {
                let state = self.guests[place].port(&mut self.pool, port, bytes)?;
                Ok((!matches!(state, State::Ready)).then_some(state))
            }
            Exit::Call => {
                let arguments = self.guests[place].vcpu.arguments();
                let (status, value) = match self.call(place, arguments) {
                    Ok(value) => (Status::Done, value),
                    Err(CallError::Refused(status)) => (status, 0),
                    Err(CallError::Broken(error)) => return Err(Death::Memory(error)),
                };
                self.guests[place].vcpu.answer(status as u64, value);
                Ok(None)
            }
            Exit::Exception { vector: PAGE_FAULT, error, address } => self.first_stage(place, error, address),
            Exit::Exception { vector: DEBUG, .. } if self.guests[place].end_step()? => Ok(None),
            Exit::Privileged => self.guests[place].privileged(&self.pool).map(|()| None),
            Exit::Exception { vector, error, address } => Err(Death::Exception { vector, error, address }),
            Exit::Other { code } => Err(Death::Other { code }),
        }
    }

    /// A page fault of a guest whose processor has no second stage: whatever pages it wants are brought.
    fn first_stage(&mut self, place: usize, error: u64, address: u64) -> Result<Option<State>, Death> {
        for _ in 0..PAGES_OF_A_FAULT {
            let Some(gpa) = self.guests[place].first_stage(error, address)? else { break };
            if let Some(stalled) = self.fault(place, gpa)? {
                return Ok(Some(stalled));
            }
        }
        Ok(None)
    }

    /// Brings a page for a guest, once there is memory for it; if there is none, it has to wait.
    ///
    /// # Errors
    /// [`Death::Memory`].
    pub fn fault(&mut self, place: usize, gpa: Gpa) -> Result<Option<State>, Death> {
        let since = cpu::now();
        self.nested_faults += 1;
        let Budget { low, high, .. } = self.ledger.budget();
        if self.used() > high {
            self.relieve(low);
        }
        let page = ByteCount(PAGE_SIZE as u64);
        let id = self.guests[place].id;
        let mut outcome = Err(PagedError::NoMemory);
        // Above the install line only what is needed to take pages is taken: so pages are taken until it is not above it.
        loop {
            if self.ledger.charge(id, Kind::Resident, page, Purpose::Demand).is_ok() {
                outcome = self.guests[place].paged.bring(&mut self.pool, gpa);
                if !matches!(outcome, Err(PagedError::NoMemory)) {
                    break;
                }
            }
            if !self.relieve(low) {
                break;
            }
        }
        self.guests[place].faulted(since);
        match outcome {
            Ok(()) => {
                self.guests[place].stalls = 0;
                Ok(None)
            }
            Err(PagedError::NoMemory) => {
                // Its turn may end by the timer before it faults again: that is no progress.
                self.guests[place].stalls += 1;
                Ok(Some(State::Stalled))
            }
            Err(error) => Err(Death::Memory(error)),
        }
    }

    /// Whose order is next. They take turns: the next decision ends what is open, so whoever came after a long order would
    /// never give.
    fn next_order(&self) -> Option<usize> {
        let count = self.guests.len();
        let is_open = |guest: &Guest| guest.ordered > PageCount(0) && !matches!(guest.state, State::Ended(_));
        let mut places = (1..=count).map(|step| (self.worked + step) % count);
        places.find(|place| is_open(&self.guests[*place]))
    }

    /// Takes a few of the pages that a decision wants taken.
    fn work_order(&mut self) {
        let Some(place) = self.next_order() else { return };
        self.worked = place;
        let taken = self.take_from(place);
        let ordered = &mut self.guests[place].ordered;
        // Where there is no more to be had now, an order is over: the next decision sees what came of it.
        *ordered = match taken {
            Ok(0) | Err(_) => PageCount(0),
            Ok(pages) => ordered.saturating_sub(PageCount(pages)),
        };
        if let Err(error) = taken {
            self.note(&error);
        }
    }

    fn take_from(&mut self, place: usize) -> Result<u64, PagedError> {
        let Self { pool, guests, .. } = self;
        let paged = &mut guests[place].paged;
        if paged.limbo() < PageCount(STEP as u64) {
            paged.capture(&mut pool.memory.borrow_mut(), u32::try_from(STEP).unwrap_or(u32::MAX))?;
        }
        let freed = paged.age(pool, STEP);
        // The ledger is ours and knows these machines.
        let _ = self.settle();
        freed
    }

    /// The store is full, for now, or there is a bug to be reported.
    fn note(&mut self, error: &PagedError) {
        self.store_full |= matches!(error, PagedError::StoreFull);
        if !matches!(error, PagedError::StoreFull | PagedError::NoMemory) {
            self.failures.push(error.to_string());
        }
    }

    /// One step towards less memory in use. False when none came free.
    fn relieve(&mut self, target: ByteCount) -> bool {
        match self.try_relieve(target) {
            Ok(freed) => freed > 0,
            Err(error) => {
                self.note(&error);
                false
            }
        }
    }

    fn try_relieve(&mut self, target: ByteCount) -> Result<u64, PagedError> {
        let total = self.pool.memory.borrow().total();
        let kept = PageCount(total.0 / LIMBO_PART);
        let limbo = |host: &Self| -> PageCount { host.guests.iter().map(|guest| guest.paged.limbo()).sum() };
        if limbo(self) < kept + PageCount(STEP as u64) {
            self.capture(target, kept)?;
        }
        // What limbo has beyond its part goes first; all of it when there is nothing else.
        let fullest = self.guests.iter().enumerate().max_by_key(|(_, guest)| guest.paged.limbo());
        let Some((place, _)) = fullest else { return Ok(0) };
        let freed = self.guests[place].paged.age(&mut self.pool, STEP);
        // The ledger is ours and knows these machines.
        let _ = self.settle();
        freed
    }

    /// Has those who use most of their share give pages to limbo: enough to come down to the target when what is there beyond
    /// `kept` is stored.
    fn capture(&mut self, target: ByteCount, kept: PageCount) -> Result<(), PagedError> {
        // The ledger is ours and knows these machines.
        let _ = self.settle();
        let gives = self.ledger.reclaim(target, |_| false);
        let share = PageCount(kept.0 / gives.len().max(1) as u64);
        for (id, pages) in gives {
            let Some(guest) = self.guests.iter_mut().find(|guest| guest.id == id) else { continue };
            let want = (pages + share).saturating_sub(guest.paged.limbo());
            let mut memory = self.pool.memory.borrow_mut();
            guest.paged.capture(&mut memory, u32::try_from(want.0).unwrap_or(u32::MAX))?;
        }
        Ok(())
    }
}
