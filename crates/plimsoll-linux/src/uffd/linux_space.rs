//! The memory of a machine, or of one shard of it, on Linux: its two userfaultfds, its agent's socket, its process.
//!
//! Enters: what a VMM handed over, checked. Leaves: the calls of [`Space`], made from here where the kernel allows it
//! from outside (COPY, ZEROPAGE, WAKE, POISON, reading the airlock) and by the VMM's agent where it does not (MOVE,
//! discarding the airlock).
//!
//! A hostile VMM can make a call fail, answer nonsense or not at all. Each of these ends the management of that one
//! machine, on the thread that serves nobody else. Before the airlock is read it is checked to be filled; a VMM that
//! empties it after that makes that one thread wait in the kernel, from which [`Custody::release_readers`]
//! frees it.
use super::space::{Access, InstallStop, Installed, Presence, Space, SpaceError, SpaceEvent};
use super::wire::{self, DATAGRAM_MAX, Hello, Item, Op, Outcome, Ticket};
use plimsoll_core::replacement::Run;
use plimsoll_sys::fdpass::{self, RecvError, SendError};
use plimsoll_sys::pagemap::{Categories, Filter, Pagemap, PagemapError};
use plimsoll_sys::pidfd::{Pidfd, Signal};
use plimsoll_sys::process_memory::{self, Advice, Refusal};
use plimsoll_sys::uffd::{self, Event, Journal, Stop, Userfaultfd, Wake};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{
    BLOCK_SIZE, ByteCount, Hva, PAGE_SHIFT, PAGE_SIZE, PageBytes, PageCount, PageIndex, SlotPage,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Events taken in one read.
const EVENTS_PER_READ: usize = 64;
/// How long an agent may take to answer. A block is moved in under a millisecond; a VMM whose cgroup is frozen or
/// that is being dumped takes longer, and a machine should survive that.
pub(super) const AGENT_PATIENCE: Duration = Duration::from_secs(30);

/// Reads of the event queue in one go: what a storm of faults leaves over is read in the next turn.
const READS_MAX: usize = 4;
/// How long after its socket closed a process may take to be seen as ended.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Everything about a shard of a machine that must outlive a manager: as long as this lives, absent pages of the guest wait.
#[derive(Debug)]
pub struct Custody {
    /// What the VMM said, checked.
    pub hello: Hello,
    process: Arc<Pidfd>,
    ram: Userfaultfd,
    /// Kept because the last copy of a userfaultfd must not close while pages are absent.
    airlock: Userfaultfd,
    socket: OwnedFd,
}

impl Custody {
    /// What was handed over as `hello` says, driven through `socket`.
    pub(super) fn new(
        hello: Hello,
        process: Arc<Pidfd>,
        [ram, airlock]: [Userfaultfd; 2],
        socket: OwnedFd,
    ) -> Self {
        Self { hello, process, ram, airlock, socket }
    }

    /// Sends to the VMM, with descriptors.
    pub(super) fn tell(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        fdpass::send(&self.socket, message, descriptors).map(drop)
    }

    /// What has to be kept: RAM's userfaultfd, the airlock's, the agent's socket, the process.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 4] {
        [self.ram.as_fd(), self.airlock.as_fd(), self.socket.as_fd(), self.process.as_fd()]
    }

    /// The process as another open file, while it runs.
    pub(super) fn process_reopened(&self) -> Option<Pidfd> {
        self.process.reopened().ok()
    }

    /// The VMM's process id.
    pub fn process(&self) -> ProcessId {
        self.process.process()
    }

    /// Readable when events wait.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.ram.as_fd()
    }

    /// Readable when the VMM has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// Frees whoever waits in the kernel for an airlock page that is not there: such pages fail to be read from now on.
    /// For a machine whose VMM has ended or is being ended.
    pub fn release_readers(&self) {
        let mut rest = HvaRange::new(self.hello.airlock_base, self.hello.airlock_bytes());
        while let Some(range) = rest.filter(|range| !range.is_empty()) {
            let outcome = self.airlock.poison(range);
            let done = match outcome.stop {
                None => return,
                Some(_) if outcome.done.0 > 0 => outcome.done,
                // The page is there: nobody waits for it.
                Some(Stop::Exists) => ByteCount(PAGE_SIZE as u64),
                // That the process is gone altogether is as good.
                Some(_) => return,
            };
            rest = range.skip(done);
        }
    }

    /// Ends the VMM and frees whoever waits for it: for a machine that keeps its manager from stopping.
    pub fn end(&self) {
        let _ = self.process.send_signal(Signal::KILL);
        let _ = self.process.wait_exit(END_PATIENCE);
        self.release_readers();
    }

    /// True once the VMM's process has ended; waits for that at most `patience`.
    pub fn has_ended(&self, patience: Duration) -> bool {
        is_readable(self.process.as_fd(), patience).unwrap_or(false)
    }

    /// Pages the VMM has put in place already.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn presence(&self) -> Result<Presence, SpaceError> {
        let pagemap = Pagemap::open(self.process()).map_err(|error| looked(self, error))?;
        let look = |base, bytes, first, found: &mut Vec<Range<u32>>| {
            let wraps = || looking(std::io::Error::other("the range wraps around"));
            populated(self, &pagemap, HvaRange::new(base, bytes).ok_or_else(wraps)?, first, found)
        };
        let mut ram = Vec::new();
        let mut first = 0;
        for (region, hva) in self.hello.layout.regions().iter().zip(&self.hello.hvas) {
            look(*hva, region.bytes, first, &mut ram)?;
            first += pages_of(region.bytes);
        }
        let mut slots = Vec::new();
        look(self.hello.airlock_base, self.hello.airlock_bytes(), 0, &mut slots)?;
        Ok(Presence::new(ram, slots))
    }

    /// Has the kernel make huge pages of a run of whole blocks, all of which must be there. True if it did.
    pub(super) fn collapse(&self, run: Run) -> bool {
        let bytes = PageCount(u64::from(run.pages)).bytes();
        let Some(range) = self.locate(run.first).and_then(|(hva, _)| HvaRange::new(hva, bytes)) else {
            return false;
        };
        process_memory::advise(&self.process, &[range], Advice::Collapse).stop.is_none()
    }

    /// What an event says of the machine's pages.
    fn understand(&self, event: &Event, found: &mut Vec<SpaceEvent>) -> Result<(), SpaceError> {
        match *event {
            Event::PageFault { address, access, .. } => {
                let access = match access {
                    uffd::Access::Read => Access::Read,
                    uffd::Access::Write => Access::Write,
                };
                let pages = self.pages_in(address, Hva(address.0.saturating_add(1)));
                found.extend(pages.map(|pages| SpaceEvent::Fault { page: PageIndex(pages.start), access }));
            }
            Event::Remove { start, end } => {
                let discard = |pages: Range<u32>| SpaceEvent::Discard {
                    first: PageIndex(pages.start),
                    pages: pages.end - pages.start,
                };
                found.extend(self.pages_in(start, end).map(discard));
            }
            ref event => return Err(SpaceError::MapChanged { what: format!("{event:?}") }),
        }
        Ok(())
    }

    /// A page's address in the VMM and how many pages follow in its region, itself included.
    fn locate(&self, page: PageIndex) -> Option<(Hva, u32)> {
        let (region, offset) = self.hello.layout.locate(page)?;
        let hva = self.hello.hvas[region].checked_add(offset)?;
        Some((hva, pages_of(ByteCount(self.hello.layout.regions()[region].bytes.0 - offset))))
    }

    /// The pages of an address range, region by region. Addresses outside guest RAM belong to nothing we manage.
    fn pages_in(&self, start: Hva, end: Hva) -> impl Iterator<Item = Range<u32>> + '_ {
        let regions = self.hello.layout.regions().iter().zip(&self.hello.hvas);
        let mut first = 0;
        regions.filter_map(move |(region, hva)| {
            let base = first;
            first += pages_of(region.bytes);
            let from = start.0.max(hva.0);
            let to = end.0.min(hva.0 + region.bytes.0);
            let page =
                |address: u64| u32::try_from((address - hva.0) >> PAGE_SHIFT).ok().map(|page| base + page);
            if from < to { Some(page(from)?..page(to)?) } else { None }
        })
    }
}

fn pages_of(bytes: ByteCount) -> u32 {
    // Layouts are checked to have fewer than 2^32 pages.
    u32::try_from(bytes.pages_floor().0).unwrap_or(u32::MAX)
}

fn populated(
    custody: &Custody,
    pagemap: &Pagemap,
    range: HvaRange,
    first: u32,
    found: &mut Vec<Range<u32>>,
) -> Result<(), SpaceError> {
    let index = |address: Hva| first + pages_of(ByteCount(address.0 - range.start().0));
    pagemap
        .populated(range, |run| found.push(index(run.start())..index(run.end())))
        .map_err(|error| looked(custody, error))
}

/// What looking at a page map that failed means: a process that has ended has none.
fn looked(custody: &Custody, error: PagemapError) -> SpaceError {
    match error {
        PagemapError::NoProcess(_) => SpaceError::Gone,
        _ if custody.has_ended(Duration::ZERO) => SpaceError::Gone,
        error => looking(std::io::Error::other(error)),
    }
}

const fn looking(source: std::io::Error) -> SpaceError {
    SpaceError::Io { what: "looking at the VMM's page map", source }
}

pub(super) fn is_readable(descriptor: BorrowedFd<'_>, patience: Duration) -> std::io::Result<bool> {
    let limit = Timespec::try_from(patience).map_err(std::io::Error::other)?;
    loop {
        match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&limit)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// [`Space`] over a [`Custody`]. One per manager and machine; making a second is a take-over.
pub struct LinuxSpace {
    custody: Arc<Custody>,
    epoch: u64,
    sequence: u32,
    /// Outlives the manager, like the words.
    journal: Journal,
    datagram: Vec<u8>,
    /// Opened when first needed, and the process's for good: the file stays with the memory it was opened on.
    pagemap: Option<Pagemap>,
    /// Slot pages that were seen to hold bytes since the agent was asked for anything last.
    filled: Option<HvaRange>,
    /// Whether what an earlier manager left unapplied has been read again.
    has_replayed: bool,
    /// By when the agent must have answered, however much it is asked until then.
    due: Option<Instant>,
}

impl LinuxSpace {
    /// Speaks with `epoch` from now on; an earlier manager's requests need [`Space::begin_epoch`].
    pub fn new(custody: Arc<Custody>, journal: Journal, epoch: u64) -> Self {
        Self {
            custody,
            epoch,
            sequence: 0,
            journal,
            datagram: Vec::new(),
            pagemap: None,
            filled: None,
            has_replayed: false,
            due: None,
        }
    }

    /// From now on the agent must have answered everything by then, or, with `None`, each request in [`AGENT_PATIENCE`].
    pub(super) fn expect_answers_by(&mut self, due: Option<Instant>) {
        self.due = due;
    }

    /// What it works on.
    pub fn custody(&self) -> &Arc<Custody> {
        &self.custody
    }

    /// Asks the agent and waits for its answer. Answers to an earlier manager's requests are passed over.
    fn ask(&mut self, op: Op, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
        self.filled = None;
        self.sequence = self.sequence.wrapping_add(1);
        let ticket = Ticket { epoch: self.epoch, sequence: self.sequence, op };
        wire::encode_request(&mut self.datagram, ticket, items);
        let io = |what, source| SpaceError::Io { what, source };
        let asked = Instant::now();
        let due = self.due.unwrap_or(asked + AGENT_PATIENCE);
        match fdpass::send(&self.custody.socket, &self.datagram, &[]) {
            Ok(_) => {}
            Err(SendError::Closed) => return Err(self.closed()),
            Err(error) => return Err(io("asking the agent", std::io::Error::other(error))),
        }
        loop {
            let patience = due.saturating_duration_since(Instant::now());
            let readable = is_readable(self.custody.socket.as_fd(), patience);
            if !readable.map_err(|error| io("waiting for the agent", error))? {
                return Err(SpaceError::Silent { seconds: asked.elapsed().as_secs() });
            }
            self.datagram.resize(DATAGRAM_MAX, 0);
            let received = match fdpass::recv(&self.custody.socket, &mut self.datagram, 0) {
                Ok(Some(received)) => received.bytes,
                Ok(None) | Err(RecvError::Reset) => return Err(self.closed()),
                Err(error) => return Err(io("hearing the agent", std::io::Error::other(error))),
            };
            if let Some(outcomes) = wire::decode_reply(&self.datagram[..received], ticket, items)? {
                return Ok(outcomes);
            }
        }
    }

    /// What a closed socket means: a process that ends closes it, but closing it does not end a process.
    fn closed(&self) -> SpaceError {
        if self.custody.has_ended(END_PATIENCE) { SpaceError::Gone } else { SpaceError::Closed }
    }

    /// What a slot page without bytes means: the VMM's memory goes before its process does.
    fn empty_slot(&self, first: SlotPage) -> SpaceError {
        if self.custody.has_ended(END_PATIENCE) {
            SpaceError::Gone
        } else {
            SpaceError::EmptySlot { first: first.0 }
        }
    }

    /// Asks for a single item.
    fn ask_one(&mut self, op: Op, item: Item) -> Result<Outcome, SpaceError> {
        // Replies are checked to have as many outcomes as there were items.
        Ok(self.ask(op, &[item])?.first().copied().unwrap_or(Outcome { done: 0, stop: None }))
    }

    fn pagemap(&mut self) -> Result<&Pagemap, SpaceError> {
        Ok(match &mut self.pagemap {
            Some(pagemap) => pagemap,
            unopened => {
                let opened = Pagemap::open(self.custody.process());
                unopened.insert(opened.map_err(|error| looked(&self.custody, error))?)
            }
        })
    }

    /// Whether all of a run of slot pages holds bytes. What else its slot holds is seen at the same time: one look at that costs
    /// about as much as reading five pages, and the next run is mostly the next one of the slot. A single page is mostly
    /// one that a guest waits for, and the next such page lies elsewhere.
    fn is_filled(&mut self, run: HvaRange) -> Result<bool, SpaceError> {
        if self.filled.is_none_or(|filled| !filled.contains(run)) {
            let rest = match run.len() {
                ByteCount(PAGE_BYTES) => PAGE_BYTES,
                ByteCount(bytes) => bytes.max(BLOCK_SIZE as u64 - run.start().0 % BLOCK_SIZE as u64),
            };
            let look = HvaRange::new(run.start(), ByteCount(rest)).unwrap_or(run);
            let mut filled = None;
            let looked_at = self.pagemap()?.populated(look, |found| {
                filled.get_or_insert(found);
            });
            looked_at.map_err(|error| looked(&self.custody, error))?;
            self.filled = filled;
        }
        Ok(self.filled.is_some_and(|filled| filled.contains(run)))
    }

    fn address(&self, first: PageIndex, pages: u32, call: &'static str) -> Result<Hva, SpaceError> {
        let located = self.custody.locate(first).filter(|(_, left)| pages <= *left);
        let cause = || "the run leaves its region".to_owned();
        let failed = || SpaceError::Call { call, first: first.0, pages, cause: cause() };
        located.map(|(hva, _)| hva).ok_or_else(failed)
    }

    fn range(&self, first: PageIndex, pages: u32, call: &'static str) -> Result<HvaRange, SpaceError> {
        let start = self.address(first, pages, call)?;
        let bytes = PageCount(u64::from(pages)).bytes();
        let cause = || "the run wraps around".to_owned();
        HvaRange::new(start, bytes).ok_or_else(|| SpaceError::Call {
            call,
            first: first.0,
            pages,
            cause: cause(),
        })
    }
}

/// What an install that stopped means. A call that made some progress does not say why it stopped: trying the rest
/// again does. A VMM that ends unregisters its memory before its process goes: pages may be brought ahead until then.
fn installed(
    custody: &Custody,
    call: &'static str,
    first: PageIndex,
    pages: u32,
    outcome: uffd::Outcome,
) -> Result<Installed, SpaceError> {
    let done = pages_of(outcome.done);
    let stop = match outcome.stop {
        None => None,
        Some(Stop::Again) => Some(InstallStop::Again),
        Some(Stop::Exists) => Some(InstallStop::Present),
        Some(Stop::NoMemory) => Some(InstallStop::NoMemory),
        Some(Stop::NoProcess) => return Err(SpaceError::Gone),
        Some(_) if custody.has_ended(END_PATIENCE) => return Err(SpaceError::Gone),
        Some(stop) => {
            return Err(SpaceError::Call { call, first: first.0, pages, cause: format!("{stop:?}") });
        }
    };
    Ok(Installed { pages: done, stop })
}

impl Space for LinuxSpace {
    fn read_events(&mut self, found: &mut Vec<SpaceEvent>) -> Result<(), SpaceError> {
        if !std::mem::replace(&mut self.has_replayed, true) {
            // Whoever waits for a page is woken by the take-over and asks again.
            let left = self.journal.left().into_iter();
            let mut discards = left.filter(|event| !matches!(event, Event::PageFault { .. }));
            discards.try_for_each(|event| self.custody.understand(&event, found))?;
        }
        for _ in 0..READS_MAX {
            let read = self.custody.ram.read_journaled(&mut self.journal, EVENTS_PER_READ);
            let events = read.map_err(|source| SpaceError::Io { what: "reading events", source })?;
            events.iter().try_for_each(|event| self.custody.understand(event, found))?;
            if events.len() < EVENTS_PER_READ {
                break;
            }
        }
        Ok(())
    }
    fn applied(&mut self) {
        self.journal.forget();
    }

    fn copy(&mut self, first: PageIndex, pages: &[PageBytes]) -> Result<Installed, SpaceError> {
        let count = u32::try_from(pages.len()).unwrap_or(u32::MAX);
        let at = self.address(first, count, "copy")?;
        let outcome = self.custody.ram.copy(at, pages.as_flattened(), Wake::Yes);
        installed(&self.custody, "copy", first, count, outcome)
    }

    fn zero(&mut self, first: PageIndex, pages: u32) -> Result<Installed, SpaceError> {
        let range = self.range(first, pages, "zero")?;
        let outcome = self.custody.ram.zeropage(range, Wake::Yes);
        installed(&self.custody, "zero", first, pages, outcome)
    }

    fn wake(&mut self, first: PageIndex, pages: u32) -> Result<(), SpaceError> {
        let mut next = first;
        let end = first.0.saturating_add(pages);
        while next.0 < end {
            let Some((_, left)) = self.custody.locate(next) else { return Ok(()) };
            let run = left.min(end - next.0);
            match self.custody.ram.wake(self.range(next, run, "wake")?) {
                Ok(()) => {}
                Err(Stop::NoProcess) => return Err(SpaceError::Gone),
                Err(_) if self.custody.has_ended(END_PATIENCE) => return Err(SpaceError::Gone),
                Err(stop) => {
                    let cause = format!("{stop:?}");
                    return Err(SpaceError::Call { call: "wake", first: next.0, pages: run, cause });
                }
            }
            next.0 += run;
        }
        Ok(())
    }

    fn poison(&mut self, page: PageIndex) -> Result<Installed, SpaceError> {
        let range = self.range(page, 1, "poison")?;
        installed(&self.custody, "poison", page, 1, self.custody.ram.poison(range))
    }

    fn move_out(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
        self.ask(Op::MoveOut, items)
    }

    fn move_in(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
        self.ask(Op::MoveIn, items)
    }

    fn unwatch(&mut self, run: Run) -> Result<Outcome, SpaceError> {
        self.ask_one(Op::Unwatch, Item::new(run.first, SlotPage(0), run.pages))
    }

    fn watch(&mut self, run: Run) -> Result<Outcome, SpaceError> {
        self.ask_one(Op::Watch, Item::new(run.first, SlotPage(0), run.pages))
    }

    fn gifts(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
        self.ask(Op::Gifts, items)
    }

    fn run_presence(&mut self, run: Run) -> Result<Presence, SpaceError> {
        let range = self.range(run.first, run.pages, "look")?;
        let mut ram = Vec::new();
        let custody = Arc::clone(&self.custody);
        populated(&custody, self.pagemap()?, range, run.first.0, &mut ram)?;
        Ok(Presence::new(ram, Vec::new()))
    }

    fn is_huge(&mut self, run: Run) -> Result<bool, SpaceError> {
        let range = self.range(run.first, run.pages, "look")?;
        let all_of = Categories::PRESENT | Categories::HUGE;
        let filter = Filter { all_of, any_of: Categories::empty(), report: Categories::empty() };
        let mut huge = ByteCount(0);
        let scanned = self.pagemap()?.scan(range, filter, |run| huge += run.range.len());
        scanned.map_err(|error| looked(&self.custody, error))?;
        Ok(huge == range.len())
    }

    fn has_events(&mut self) -> Result<bool, SpaceError> {
        is_readable(self.custody.events(), Duration::ZERO)
            .map_err(|source| SpaceError::Io { what: "looking for events", source })
    }

    fn populate(&mut self, items: &[Item]) -> Result<(), SpaceError> {
        // Whether it helped shows when the move is tried again.
        self.ask(Op::Populate, items).map(drop)
    }

    fn zap(&mut self, items: &[Item]) -> Result<(), SpaceError> {
        for (outcome, item) in self.ask(Op::Zap, items)?.iter().zip(items) {
            if let Some(stop) = outcome.stop {
                let cause = format!("{stop:?}");
                return Err(SpaceError::Call { call: "zap", first: item.slot().0, pages: item.pages, cause });
            }
        }
        Ok(())
    }

    fn read_slots(&mut self, first: SlotPage, pages: &mut [PageBytes]) -> Result<(), SpaceError> {
        let bytes = pages.as_flattened_mut();
        let offset = u64::from(first.0) * PAGE_SIZE as u64;
        let at = Hva(self.custody.hello.airlock_base.0 + offset);
        let count = u32::try_from(bytes.len() / PAGE_SIZE).unwrap_or(u32::MAX);
        let run = HvaRange::new(at, ByteCount(bytes.len() as u64))
            .ok_or(SpaceError::EmptySlot { first: first.0 })?;
        match self.is_filled(run) {
            Ok(true) => {}
            Ok(false) => return Err(self.empty_slot(first)),
            // The page map of a process that has ended cannot be looked at.
            Err(_) if self.custody.has_ended(END_PATIENCE) => return Err(SpaceError::Gone),
            Err(error) => return Err(error),
        }
        match process_memory::read(self.custody.process(), at, bytes).stop {
            // A process id can be another's by now; while the VMM lives it is not.
            None if self.custody.has_ended(Duration::ZERO) => Err(SpaceError::Gone),
            None => Ok(()),
            Some(Refusal::NoProcess) => Err(SpaceError::Gone),
            Some(Refusal::NotMapped) => Err(self.empty_slot(first)),
            Some(refusal) => {
                let cause = refusal.to_string();
                Err(SpaceError::Call { call: "read airlock", first: first.0, pages: count, cause })
            }
        }
    }

    fn begin_epoch(&mut self, epoch: u64) -> Result<(), SpaceError> {
        self.epoch = epoch;
        self.ask(Op::SetEpoch, &[]).map(drop)
    }

    fn presence(&mut self) -> Result<Presence, SpaceError> {
        self.custody.presence()
    }

    fn rest(&mut self) {
        self.datagram = Vec::new();
    }

    fn has_buffers(&self) -> bool {
        self.datagram.capacity() > 0
    }
}
