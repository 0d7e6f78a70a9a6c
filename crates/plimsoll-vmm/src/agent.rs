//! An agent: the thread that does for the manager of one shard what only this process can do.
//!
//! Enters: requests of the hand-over protocol (`plimsoll_linux::uffd::wire`), from a manager that is trusted with the
//! guest's memory and with nothing else: every range is checked against what was handed over, so that no request
//! reaches another byte of this process. Leaves: a reply to each request, in order. What must never happen here: touching
//! guest RAM (the touch would be a fault that waits for the manager, which waits for this thread), waiting for a
//! lock under which somebody faults (see [`crate::memory`], "Locks"), or doing anything unasked.
//!
//! When the manager closes its end the agent ends and closes nothing: pages that are away stay out of reach and the
//! guest stalls. Where it said before that the machine is given back, no page is away. A discard that began before that
//! waits for somebody to read its event, which nobody else does now: the agent reads until there is none.
//! A datagram that makes no sense is counted and not answered: without a sequence number there is
//! nothing to answer to, and a manager that sends such has to notice by itself.
use crate::memory::{Managed, Memory, Shard};
use crate::pins::PageRun;
use crate::shards::Cut;
use crate::wire::{self, Item, Op, Outcome, Stop, Ticket, Welcome};
use plimsoll_sys::HvaRange;
use plimsoll_sys::fdpass::{self, RecvError, SendError};
use plimsoll_sys::mapping::RangeError;
use plimsoll_sys::pagemap::Entry;
use plimsoll_sys::uffd::{
    EventBuffer, Holes, MoveMode, Outcome as Moved, RegisterError, RegisterMode, Stop as KernelStop, Wake,
};
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, Hva, PAGE_SIZE, PageCount, PageIndex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::TryLockError;

/// How long the last discards are waited for between two looks.
const DISCARD_PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
const EVENTS_PER_READ: usize = 16;

/// Why the agent ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The manager closed its end, or this process did.
    Closed {
        /// Datagrams that made no sense.
        malformed: u64,
    },
    /// The manager has given the shard back: the kernel brings its pages from now on.
    GivenBack {
        /// Datagrams that made no sense.
        malformed: u64,
    },
    /// The socket failed.
    Failed(io::Error),
}

/// Serves requests about a shard, counted from 0, until its socket is closed.
pub(crate) fn serve(socket: BorrowedFd<'_>, memory: &Memory, shard: usize, epoch: u64) -> Ended {
    let Some(Shard { cut, managed }) = memory.shards().get(shard) else {
        return Ended::Closed { malformed: 0 };
    };
    let mut agent = Agent { memory, cut, managed, epoch };
    let mut buffer = [0; wire::DATAGRAM_MAX];
    let mut reply = Vec::with_capacity(wire::DATAGRAM_MAX);
    let mut malformed = 0;
    loop {
        let bytes = match fdpass::recv(socket, &mut buffer, 0) {
            Ok(Some(received)) => buffer.get(..received.bytes).unwrap_or_default(),
            // An empty datagram looks like the end of the connection; the socket's state tells them apart.
            Ok(None) if is_open(socket) => &[],
            Ok(None) | Err(RecvError::Reset) => return Ended::Closed { malformed },
            Err(RecvError::DescriptorsTruncated { .. }) if is_welcome(&buffer) => continue,
            Err(RecvError::BytesTruncated { .. } | RecvError::DescriptorsTruncated { .. }) => &[],
            Err(RecvError::Other(source)) => return Ended::Failed(source),
            Err(other) => return Ended::Failed(io::Error::other(other)),
        };
        let Ok((ticket, items)) = wire::decode_request(bytes) else {
            if told(bytes) == Some(Welcome::GivenBack) {
                agent.see_discards_off();
                // Whoever takes over from a manager that died meanwhile learns at once that nobody is here.
                let _ = shutdown(socket, Shutdown::Both);
                return Ended::GivenBack { malformed };
            }
            malformed += u64::from(!is_welcome(bytes));
            continue;
        };
        let outcomes = agent.execute(ticket, &items);
        wire::encode_reply(&mut reply, ticket, &outcomes);
        match fdpass::send(socket, &reply, &[]) {
            Ok(_) => {}
            Err(SendError::Closed) => return Ended::Closed { malformed },
            Err(SendError::Other(source)) => return Ended::Failed(source),
            Err(other) => return Ended::Failed(io::Error::other(other)),
        }
    }
}

/// What a manager says beside its requests.
fn told(bytes: &[u8]) -> Option<Welcome> {
    Welcome::decode(bytes.get(..wire::WELCOME_SIZE)?).ok()
}

/// A manager that takes over from one that died while it welcomed the machine does so once more.
fn is_welcome(bytes: &[u8]) -> bool {
    matches!(told(bytes), Some(Welcome::Accepted { .. }))
}

fn is_open(socket: BorrowedFd<'_>) -> bool {
    let mut ready = [PollFd::new(&socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let closed = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
    poll(&mut ready, Some(&now)).is_ok() && !ready[0].revents().intersects(closed)
}

struct Agent<'a> {
    memory: &'a Memory,
    cut: &'a Cut,
    managed: &'a Managed,
    /// The newest epoch adopted.
    epoch: u64,
}

const fn stopped(done: u32, stop: Stop) -> Outcome {
    Outcome { done, stop: Some(stop) }
}

/// Pages that fit into `bytes`, which are those of an item or less.
fn whole_pages(bytes: ByteCount) -> u32 {
    u32::try_from(bytes.pages_floor().0).unwrap_or(0)
}

fn failed(error: &RangeError) -> Stop {
    match error {
        RangeError::Advise { source, .. } => {
            let errno = source.raw_os_error().and_then(|errno| u16::try_from(errno).ok()).unwrap_or(0);
            Stop::Failed { errno }
        }
        _ => Stop::Invalid,
    }
}

fn stop_of(stop: KernelStop) -> Stop {
    let failed =
        |errno: rustix::io::Errno| Stop::Failed { errno: u16::try_from(errno.raw_os_error()).unwrap_or(0) };
    match stop {
        KernelStop::Again => Stop::Again,
        KernelStop::Exists => Stop::Exists,
        // The destination is registered for as long as this process lives, so it is the source that is not there.
        KernelStop::NotMapped => Stop::Missing,
        KernelStop::Busy => Stop::Busy,
        KernelStop::NoMemory => failed(rustix::io::Errno::NOMEM),
        KernelStop::NoProcess => failed(rustix::io::Errno::SRCH),
        KernelStop::Invalid => failed(rustix::io::Errno::INVAL),
        KernelStop::Other(error) => Stop::Failed { errno: u16::try_from(error.0).unwrap_or(0) },
        _ => failed(rustix::io::Errno::FAULT),
    }
}

impl Agent<'_> {
    fn execute(&mut self, ticket: Ticket, items: &[Item]) -> Vec<Outcome> {
        if ticket.op == Op::SetEpoch {
            // Never back: whoever asks for an older one learns it from its next request.
            self.epoch = self.epoch.max(ticket.epoch);
        }
        items.iter().map(|item| self.one(ticket, item)).collect()
    }

    fn one(&self, ticket: Ticket, item: &Item) -> Outcome {
        if item.pages == 0 {
            return Outcome { done: 0, stop: None };
        }
        if ticket.epoch < self.epoch {
            return stopped(0, Stop::StaleEpoch);
        }
        let outcome = match ticket.op {
            Op::MoveOut => self.move_out(item),
            Op::MoveIn => self.move_in(item),
            Op::Zap => self.zap(item),
            Op::Populate => self.populate(item),
            Op::Watch => self.watch(item),
            Op::Unwatch => self.unwatch(item),
            Op::Gifts => self.gifts(item),
            Op::SetEpoch => None,
        };
        outcome.unwrap_or(stopped(0, Stop::Invalid))
    }

    /// Which of the machine's pages an item names by their index in the shard, and where they lie, if they are all in one
    /// region of the shard.
    fn guest_range(&self, item: &Item) -> Option<(PageRun, HvaRange)> {
        if item.page().0.checked_add(item.pages)? > self.cut.layout.page_limit().0 {
            return None;
        }
        let first = self.cut.first.0.checked_add(item.page().0)?;
        let run = PageRun::new(PageIndex(first), item.pages)?;
        let (region, offset) = self.memory.layout().locate(run.first())?;
        let mapping = self.memory.mappings().get(region)?;
        let bytes = PageCount(u64::from(run.count())).bytes();
        let range = HvaRange::new(mapping.base().checked_add(offset)?, bytes)?;
        mapping.range().contains(range).then_some((run, range))
    }

    /// Where the airlock pages of an item lie, if there are that many.
    fn airlock_range(&self, item: &Item) -> Option<HvaRange> {
        let offset = PageCount(u64::from(item.slot().0)).byte_offset();
        let bytes = PageCount(u64::from(item.pages)).bytes();
        let range = HvaRange::new(self.managed.airlock.base().checked_add(offset)?, bytes)?;
        self.managed.airlock.range().contains(range).then_some(range)
    }

    /// Block by block, so that nobody waits for the pin table longer than one block takes, and huge pages move whole.
    fn move_out(&self, item: &Item) -> Option<Outcome> {
        let (run, ram) = self.guest_range(item)?;
        let airlock = self.airlock_range(item)?;
        let mut done = 0;
        while done < run.count() {
            let page = run.first().0.checked_add(done)?;
            let in_block = BLOCK_PAGES - page % BLOCK_PAGES;
            let step = PageRun::new(PageIndex(page), in_block.min(run.count() - done))?;
            let offset = PageCount(u64::from(done)).byte_offset();
            let (from, to) = (ram.start().checked_add(offset)?, airlock.start().checked_add(offset)?);
            let moved =
                self.memory.pins().take_unpinned(step, |free| self.move_pages_out(from, to, free.count()));
            let Some(outcome) = moved else { return Some(stopped(done, Stop::Pinned)) };
            done += outcome.done;
            if outcome.stop.is_some() {
                return Some(Outcome { done, ..outcome });
            }
        }
        Some(Outcome { done, stop: None })
    }

    fn move_pages_out(&self, from: Hva, to: Hva, pages: u32) -> Outcome {
        move_all(pages, |skip, bytes| {
            let source = HvaRange::new(from.checked_add(skip)?, bytes)?;
            let to = HvaRange::new(to.checked_add(skip)?, bytes)?;
            let mapping = self.memory.mappings().iter().find(|mapping| mapping.range().contains(source))?;
            let mode = MoveMode { wake: Wake::Yes, holes: Holes::Refuse };
            let uffd = &self.managed.airlock_uffd;
            let outcome = uffd.move_pages(to.start(), mapping.unborrowed(source).ok()?, mode);
            // Nobody waits for a page of the airlock.
            Some(self.settled(outcome, source, to))
        })
    }

    /// Waiters go on. No lock: a page only becomes present.
    fn move_in(&self, item: &Item) -> Option<Outcome> {
        let (run, ram) = self.guest_range(item)?;
        let airlock = self.airlock_range(item)?;
        Some(move_all(run.count(), |skip, bytes| {
            // A block of the destination at a time: huge pages move back whole.
            let to = ram.start().checked_add(skip)?;
            let in_block = BLOCK_SIZE as u64 - to.0 % BLOCK_SIZE as u64;
            let bytes = ByteCount(bytes.0.min(in_block));
            let source = HvaRange::new(airlock.start().checked_add(skip)?, bytes)?;
            let mode = MoveMode { wake: Wake::Yes, holes: Holes::Refuse };
            let uffd = &self.managed.ram;
            let outcome = uffd.move_pages(to, self.managed.airlock.unborrowed(source).ok()?, mode);
            let settled = self.settled(outcome, source, HvaRange::new(to, bytes)?);
            if settled != outcome {
                uffd.wake(HvaRange::new(to, settled.done)?).ok()?;
            }
            Some(settled)
        }))
    }

    /// What a move did. Linux 6.18 tells less than that: `move_pages` (mm/userfaultfd.c) tries a page again whose entry
    /// changed under it, as it does when the page is touched, and after the second try, which moved the page, still holds
    /// the first one's error. So it tries a third time, finds the page in its new place and answers EEXIST, without
    /// waking anybody. About one page in forty thousand that are touched meanwhile.
    ///
    /// The manager names only empty places and brings no page before it has our answer, so a page that is gone from
    /// where it was and is where it was to go has been moved by this call. Where the source is still there, the place was
    /// taken before, and the error stands.
    fn settled(&self, outcome: Moved, source: HvaRange, to: HvaRange) -> Moved {
        if outcome != (Moved { done: ByteCount(0), stop: Some(KernelStop::Exists) }) {
            return outcome;
        }
        let (mut left, mut come) = (Vec::new(), Vec::new());
        let pagemap = &self.managed.pagemap;
        if pagemap.read(source, &mut left).and_then(|()| pagemap.read(to, &mut come)).is_err() {
            return outcome;
        }
        let is_moved = |(left, come): &(&Entry, &Entry)| !left.is_populated() && come.is_populated();
        match left.iter().zip(&come).take_while(is_moved).count() {
            0 => outcome,
            pages => Moved { done: PageCount(pages as u64).bytes(), stop: None },
        }
    }

    /// The airlock's descriptor has no events, so this waits for nobody.
    fn zap(&self, item: &Item) -> Option<Outcome> {
        let range = self.airlock_range(item)?;
        Some(match self.managed.airlock.discard(range) {
            Ok(()) => Outcome { done: item.pages, stop: None },
            Err(error) => stopped(0, failed(&error)),
        })
    }

    /// Registering what is registered already changes nothing.
    fn watch(&self, item: &Item) -> Option<Outcome> {
        let (_, range) = self.guest_range(item)?;
        let mapping = self.memory.mappings().iter().find(|mapping| mapping.range().contains(range))?;
        let watched = self.managed.ram.register(mapping.unborrowed(range).ok()?, RegisterMode::MISSING);
        Some(whole(item, watched.map(drop)))
    }

    /// Waiters go on, and find the kernel in the manager's place.
    fn unwatch(&self, item: &Item) -> Option<Outcome> {
        let (run, range) = self.guest_range(item)?;
        // Nothing of it is anywhere. What is missing later has gone later, or is as it was before it was ever given.
        self.memory.gifts().forget(run);
        Some(whole(item, self.managed.ram.unregister(range)))
    }

    /// How pages were given back.
    fn gifts(&self, item: &Item) -> Option<Outcome> {
        if item.page().0.checked_add(item.pages)? > self.cut.layout.page_limit().0 {
            return None;
        }
        let first = self.cut.first.0.checked_add(item.page().0)?;
        first.checked_add(item.pages)?;
        let gift = |offset: u32| self.memory.gifts().of(PageIndex(first + offset));
        let Some((done, given)) = (0..item.pages).find_map(|offset| Some((offset, gift(offset)?))) else {
            return Some(Outcome { done: item.pages, stop: None });
        };
        let alike = (done..item.pages).take_while(|offset| gift(*offset) == Some(given));
        let pages = u16::try_from(alike.take(usize::from(u16::MAX)).count()).unwrap_or(u16::MAX);
        Some(stopped(done, Stop::Given { gift: given, pages }))
    }

    /// Returns when no discard is left that may have seen memory registered: those that begin now make no events. All shards
    /// are unregistered when the first of them is told, and a discard of any of them holds the gate.
    fn see_discards_off(&self) {
        let mut events = EventBuffer::new(EVENTS_PER_READ);
        while matches!(self.memory.discard_gate.try_write(), Err(TryLockError::WouldBlock)) {
            let ram = self.memory.shards().iter().map(|shard| &shard.managed.ram);
            let mut ready: Vec<_> = ram.clone().map(|ram| PollFd::new(ram, PollFlags::IN)).collect();
            // Whatever fails here: the next look is as good, and there is no other way.
            let _ = poll(&mut ready, Some(&DISCARD_PATIENCE));
            for ram in ram {
                // What they tell is nobody's business any more.
                let _ = ram.read_events(&mut events).map(|events| events.for_each(drop));
            }
        }
    }

    /// Only pages that are present, and with discards shut out, so that it cannot become a fault.
    fn populate(&self, item: &Item) -> Option<Outcome> {
        let (run, range) = self.guest_range(item)?;
        let mapping = self.memory.mappings().iter().find(|mapping| mapping.range().contains(range))?;
        let mut entries = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let done = run.count() - whole_pages(rest.len());
            // A block at a time keeps the list of entries small and discards waiting only briefly.
            let part = HvaRange::new(rest.start(), ByteCount(rest.len().0.min(BLOCK_SIZE as u64)))?;
            let Ok(_gate) = self.memory.discard_gate.try_write() else {
                return Some(stopped(done, Stop::Again));
            };
            if self.managed.pagemap.read(part, &mut entries).is_err() {
                return Some(stopped(done, Stop::Failed { errno: 0 }));
            }
            let present = entries.iter().take_while(|entry| entry.is_populated()).count();
            let bytes = PageCount(present as u64).bytes();
            if present > 0
                && let Err(error) = mapping.populate_write(HvaRange::new(part.start(), bytes)?)
            {
                return Some(stopped(done, failed(&error)));
            }
            if bytes < part.len() {
                return Some(stopped(done + whole_pages(bytes), Stop::Missing));
            }
            rest = rest.skip(part.len())?;
        }
        Some(Outcome { done: run.count(), stop: None })
    }
}

/// All of an item or nothing of it.
fn whole(item: &Item, result: Result<(), RegisterError>) -> Outcome {
    let errno = |errno: i32| u16::try_from(errno).unwrap_or(0);
    match result {
        Ok(()) => Outcome { done: item.pages, stop: None },
        Err(RegisterError::Other { source, .. }) => {
            stopped(0, Stop::Failed { errno: errno(source.raw_os_error().unwrap_or(0)) })
        }
        Err(RegisterError::NoMemoryOrProcess { .. }) => {
            stopped(0, Stop::Failed { errno: errno(rustix::io::Errno::NOMEM.raw_os_error()) })
        }
        Err(_) => stopped(0, Stop::Invalid),
    }
}

/// Moves `pages` pages with as many calls as the kernel needs: a call that did some stopped for a reason that only the
/// next one tells. `call` gets the bytes done and the bytes left; it may do fewer than those.
fn move_all(pages: u32, call: impl Fn(u64, ByteCount) -> Option<Moved>) -> Outcome {
    let all = PageCount(u64::from(pages)).bytes();
    let mut done = ByteCount(0);
    while done < all {
        let Some(outcome) = call(done.0, all - done) else {
            return stopped(whole_pages(done), Stop::Invalid);
        };
        if outcome.done.0 < PAGE_SIZE as u64 {
            let stop = outcome.stop.map_or(Stop::Again, stop_of);
            return stopped(whole_pages(done), stop);
        }
        done += outcome.done;
    }
    Outcome { done: pages, stop: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;
    use plimsoll_core::layout::{GuestLayout, Region};
    use plimsoll_core::word::Gift;
    use plimsoll_sys::uffd::{Event, EventBuffer, Mode};
    use plimsoll_types::{Gpa, SlotPage};
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;
    use std::thread::{self, JoinHandle};

    const PAGE: u64 = PAGE_SIZE as u64;

    /// A machine with two regions of 2 MiB and two slots, the agent of its only shard, and the test in the manager's place.
    struct Bench {
        memory: Arc<Memory>,
        socket: OwnedFd,
        shard: usize,
        agent: JoinHandle<Ended>,
        epoch: u64,
        sequence: u32,
    }

    fn word(page: u64) -> [u8; PAGE_SIZE] {
        let mut bytes = [0; PAGE_SIZE];
        bytes
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(page * 1000..)
            .for_each(|(word, value)| *word = value.to_le_bytes());
        bytes
    }

    /// Waits until RAM's descriptor has something to say, and reads nothing of it.
    fn until_event(managed: &Managed) {
        let mut ready = [PollFd::new(&managed.ram, PollFlags::IN)];
        assert_eq!(poll(&mut ready, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap(), 1);
    }

    impl Bench {
        /// Pages 0 to 9 are present and hold `word`; the others are absent.
        fn new() -> Option<Self> {
            Self::of_shard(0, 1)
        }

        /// The same with the agent of another shard of several.
        fn of_shard(shard: usize, shards: usize) -> Option<Self> {
            let region = |mib: u64| Region { start: Gpa(mib << 20), bytes: ByteCount::mib(2) };
            let layout = GuestLayout::new(vec![region(0), region(16)]).unwrap();
            let open = |_| Managed::open(Mode::UserOnly, 2);
            let managed = match (0..shards).map(open).collect::<Result<Vec<_>, _>>() {
                Ok(managed) => managed,
                Err(error) => {
                    println!("SKIPPED: {}", plimsoll_linux::explain(&error));
                    return None;
                }
            };
            let memory = Memory::map(layout, HugePages::Never, managed, &[]).unwrap();
            (0..10).for_each(|page| memory.write(Gpa(page * PAGE), &word(page)).unwrap());
            memory.register().unwrap();
            let memory = Arc::new(memory);
            let (socket, agents) = fdpass::seqpacket_pair().unwrap();
            let shared = Arc::clone(&memory);
            let agent = thread::spawn(move || serve(agents.as_fd(), &shared, shard, 1));
            Some(Self { memory, socket, shard, agent, epoch: 1, sequence: 0 })
        }

        fn managed(&self) -> &Managed {
            &self.memory.shards()[self.shard].managed
        }

        fn ask(&mut self, op: Op, items: &[Item]) -> Vec<Outcome> {
            self.sequence += 1;
            let ticket = Ticket { epoch: self.epoch, sequence: self.sequence, op };
            let mut bytes = Vec::new();
            wire::encode_request(&mut bytes, ticket, items);
            fdpass::send(&self.socket, &bytes, &[]).unwrap();
            let mut buffer = [0; wire::DATAGRAM_MAX];
            let received = fdpass::recv(&self.socket, &mut buffer, 0).unwrap().unwrap();
            wire::decode_reply(&buffer[..received.bytes], ticket, items).unwrap().unwrap()
        }

        fn one(&mut self, op: Op, page: u32, slot: u32, pages: u32) -> Outcome {
            self.ask(op, &[Item::new(PageIndex(page), SlotPage(slot), pages)])[0]
        }

        /// Waits until RAM's descriptor has something to say.
        fn events(&self) -> Vec<Event> {
            until_event(self.managed());
            self.managed().ram.read_events(&mut EventBuffer::new(16)).unwrap().collect()
        }

        fn end(self) -> u64 {
            drop(self.socket);
            match self.agent.join().unwrap() {
                Ended::Closed { malformed } | Ended::GivenBack { malformed } => malformed,
                Ended::Failed(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn pages_moved_out_and_in_again_keep_their_bytes() {
        let Some(mut bench) = Bench::new() else { return };
        assert_eq!(bench.one(Op::MoveOut, 2, 512, 4), Outcome { done: 4, stop: None });
        let mut bytes = [0; PAGE_SIZE];
        bench.managed().airlock.copy_from(ByteCount(513 * PAGE), &mut bytes).unwrap();
        assert_eq!(bytes, word(3));
        assert_eq!(bench.one(Op::MoveOut, 2, 0, 1), stopped(0, Stop::Missing));
        assert_eq!(bench.one(Op::MoveIn, 2, 512, 4), Outcome { done: 4, stop: None });
        for page in 0..10 {
            bench.memory.read(Gpa(page * PAGE), &mut bytes).unwrap();
            assert_eq!(bytes, word(page), "page {page}");
        }
        assert_eq!(bench.end(), 0);
    }

    #[test]
    fn a_run_stops_at_a_hole_and_at_an_occupied_place() {
        let Some(mut bench) = Bench::new() else { return };
        assert_eq!(bench.one(Op::MoveOut, 7, 0, 8), stopped(3, Stop::Missing));
        assert_eq!(bench.one(Op::MoveOut, 0, 2, 2), stopped(0, Stop::Exists));
        assert_eq!(bench.one(Op::MoveIn, 6, 0, 2), stopped(0, Stop::Exists));
        assert_eq!(bench.one(Op::Zap, 0, 0, 3), Outcome { done: 3, stop: None });
        assert_eq!(bench.one(Op::MoveIn, 7, 0, 3), stopped(0, Stop::Missing));
        bench.end();
    }

    #[test]
    fn a_page_that_the_kernel_has_moved_and_says_was_there_counts_as_moved() {
        // An order done twice finds what the kernel's lost count leaves: empty where it was, there where it was to go.
        let Some(mut bench) = Bench::new() else { return };
        for _ in 0..2 {
            assert_eq!(bench.one(Op::MoveOut, 2, 512, 4), Outcome { done: 4, stop: None });
        }
        assert_eq!(bench.one(Op::MoveOut, 3, 513, 4), Outcome { done: 4, stop: None }, "some of them");
        assert_eq!(bench.one(Op::MoveOut, 7, 514, 1), stopped(0, Stop::Exists), "another page's place");
        let mut bytes = [0; PAGE_SIZE];
        for slot in 0..5 {
            bench.managed().airlock.copy_from(ByteCount((512 + slot) * PAGE), &mut bytes).unwrap();
            assert_eq!(bytes, word(2 + slot));
        }
        for _ in 0..2 {
            assert_eq!(bench.one(Op::MoveIn, 2, 512, 5), Outcome { done: 5, stop: None });
        }
        for page in 0..10 {
            bench.memory.read(Gpa(page * PAGE), &mut bytes).unwrap();
            assert_eq!(bytes, word(page), "page {page}");
        }
        bench.end();
    }

    #[test]
    fn whoever_waits_for_a_page_that_the_kernel_moved_without_waking_is_woken() {
        let Some(mut bench) = Bench::new() else { return };
        assert_eq!(bench.one(Op::MoveOut, 2, 512, 1), Outcome { done: 1, stop: None });
        let memory = Arc::clone(&bench.memory);
        let guest = thread::spawn(move || memory.read_u64(Gpa(2 * PAGE)).unwrap());
        assert!(matches!(bench.events()[..], [Event::PageFault { .. }]));
        let (ram, airlock) = (bench.memory.mappings()[0].base(), &bench.managed().airlock);
        let slot = HvaRange::new(airlock.base().checked_add(512 * PAGE).unwrap(), ByteCount(PAGE)).unwrap();
        let mode = MoveMode { wake: Wake::No, holes: Holes::Refuse };
        let place = ram.checked_add(2 * PAGE).unwrap();
        let moved = bench.managed().ram.move_pages(place, airlock.unborrowed(slot).unwrap(), mode);
        assert!(moved.is_complete() && !guest.is_finished());
        assert_eq!(bench.one(Op::MoveIn, 2, 512, 1), Outcome { done: 1, stop: None });
        assert_eq!(guest.join().unwrap(), 2000);
        bench.end();
    }

    #[test]
    fn a_pinned_page_stops_a_move_until_it_is_released() {
        let Some(mut bench) = Bench::new() else { return };
        let memory = Arc::clone(&bench.memory);
        let guard = memory.pin(Gpa(3 * PAGE), ByteCount(2 * PAGE)).unwrap();
        assert_eq!(bench.one(Op::MoveOut, 1, 0, 5), stopped(2, Stop::Pinned));
        assert_eq!(bench.one(Op::MoveOut, 3, 4, 1), stopped(0, Stop::Pinned));
        drop(guard);
        assert_eq!(bench.one(Op::MoveOut, 3, 2, 3), Outcome { done: 3, stop: None });
        bench.end();
    }

    #[test]
    fn a_pin_waits_for_a_page_that_is_away_and_then_holds_it() {
        let Some(mut bench) = Bench::new() else { return };
        assert_eq!(bench.one(Op::MoveOut, 5, 0, 1), Outcome { done: 1, stop: None });
        let memory = Arc::clone(&bench.memory);
        let (pinned, ready) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let device = thread::spawn(move || {
            let guard = memory.pin(Gpa(5 * PAGE), ByteCount(PAGE)).unwrap();
            let mut bytes = [0; PAGE_SIZE];
            memory.read(Gpa(5 * PAGE), &mut bytes).unwrap();
            pinned.send(bytes).unwrap();
            let _ = released.recv();
            drop(guard);
        });
        // The device's touch is an ordinary fault, which only this test can answer.
        assert!(matches!(bench.events()[..], [Event::PageFault { .. }]));
        assert!(ready.try_recv().is_err());
        assert_eq!(bench.one(Op::MoveIn, 5, 0, 1), Outcome { done: 1, stop: None });
        assert_eq!(ready.recv().unwrap(), word(5));
        assert_eq!(bench.one(Op::MoveOut, 5, 0, 1), stopped(0, Stop::Pinned));
        release.send(()).unwrap();
        device.join().unwrap();
        assert_eq!(bench.one(Op::MoveOut, 5, 0, 1), Outcome { done: 1, stop: None });
        bench.end();
    }

    #[test]
    fn an_older_epoch_is_refused_item_by_item() {
        let Some(mut bench) = Bench::new() else { return };
        bench.epoch = 5;
        assert_eq!(bench.ask(Op::SetEpoch, &[]), []);
        bench.epoch = 4;
        assert_eq!(bench.one(Op::MoveOut, 0, 0, 1), stopped(0, Stop::StaleEpoch));
        assert_eq!(bench.ask(Op::SetEpoch, &[]), []);
        assert_eq!(bench.one(Op::MoveOut, 0, 0, 1), stopped(0, Stop::StaleEpoch));
        bench.epoch = 6;
        assert_eq!(bench.one(Op::MoveOut, 0, 0, 1), Outcome { done: 1, stop: None });
        bench.end();
    }

    #[test]
    fn pages_are_told_of_by_how_they_were_given_run_by_run() {
        let Some(mut bench) = Bench::new() else { return };
        assert_eq!(bench.one(Op::Gifts, 4, 0, 8), Outcome { done: 8, stop: None });
        for (first, pages, gift) in [(4, 2, Gift::Reported), (6, 3, Gift::Hinted), (10, 1, Gift::Ballooned)] {
            let memory = Arc::clone(&bench.memory);
            let guest = thread::spawn(move || memory.give(Gpa(first * PAGE), pages * PAGE, gift).unwrap());
            assert!(matches!(bench.events()[..], [Event::Remove { .. }]));
            guest.join().unwrap();
        }
        let run = |done, gift, pages| stopped(done, Stop::Given { gift, pages });
        assert_eq!(bench.one(Op::Gifts, 2, 0, 9), run(2, Gift::Reported, 2));
        assert_eq!(bench.one(Op::Gifts, 6, 0, 2), run(0, Gift::Hinted, 2));
        assert_eq!(bench.one(Op::Gifts, 9, 0, 9), run(1, Gift::Ballooned, 1));
        assert_eq!(bench.one(Op::Gifts, 500, 0, u32::MAX), stopped(0, Stop::Invalid));
        // From a block that is left to the kernel nothing is told later of how it was given before.
        assert_eq!(bench.one(Op::Unwatch, 0, 0, 8), Outcome { done: 8, stop: None });
        assert_eq!(bench.one(Op::Gifts, 0, 0, 8), Outcome { done: 8, stop: None });
        assert_eq!(bench.one(Op::Gifts, 8, 0, 3), run(0, Gift::Hinted, 1));
        bench.end();
    }

    #[test]
    fn nothing_outside_of_what_was_handed_over_is_touched() {
        let Some(mut bench) = Bench::new() else { return };
        for (page, slot, pages) in [
            (511, 0, 2),
            (1024, 0, 1),
            (u32::MAX, 0, 1),
            (1, 0, u32::MAX),
            (0, 1024, 1),
            (0, u32::MAX, 1),
            (0, 1023, 2),
        ] {
            assert_eq!(
                bench.one(Op::MoveOut, page, slot, pages),
                stopped(0, Stop::Invalid),
                "{page} {slot} {pages}"
            );
            assert_eq!(
                bench.one(Op::MoveIn, page, slot, pages),
                stopped(0, Stop::Invalid),
                "{page} {slot} {pages}"
            );
        }
        assert_eq!(bench.one(Op::Zap, 0, 1023, 2), stopped(0, Stop::Invalid));
        assert_eq!(bench.one(Op::Populate, 511, 0, 2), stopped(0, Stop::Invalid));
        assert_eq!(bench.one(Op::MoveOut, 0, 0, 0), Outcome { done: 0, stop: None });
        bench.end();
    }

    #[test]
    fn an_agent_counts_pages_from_its_shards_first_and_reaches_no_other_shard() {
        // The second of two shards is the second region; the pages that are present are the first one's.
        let Some(mut bench) = Bench::of_shard(1, 2) else { return };
        assert_eq!(bench.one(Op::MoveOut, 0, 0, 1), stopped(0, Stop::Missing));
        for op in [Op::MoveOut, Op::MoveIn, Op::Populate, Op::Watch, Op::Unwatch] {
            assert_eq!(bench.one(op, 512, 0, 1), stopped(0, Stop::Invalid), "{op:?}");
            assert_eq!(bench.one(op, 511, 0, 2), stopped(0, Stop::Invalid), "{op:?}");
        }
        let memory = Arc::clone(&bench.memory);
        let guest = thread::spawn(move || memory.pin(Gpa((16 << 20) + PAGE), ByteCount(PAGE)).map(drop));
        assert!(matches!(bench.events()[..], [Event::PageFault { .. }]));
        let place = bench.memory.mappings()[1].base().checked_add(PAGE).unwrap();
        assert!(bench.managed().ram.copy(place, &word(513), Wake::Yes).is_complete());
        guest.join().unwrap().unwrap();
        assert_eq!(bench.one(Op::MoveOut, 1, 3, 1), Outcome { done: 1, stop: None });
        let mut bytes = [0; PAGE_SIZE];
        bench.managed().airlock.copy_from(ByteCount(3 * PAGE), &mut bytes).unwrap();
        assert_eq!(bytes, word(513));
        bench.end();
    }

    #[test]
    fn a_discard_across_two_shards_is_an_event_of_each_and_returns_when_both_were_read() {
        let region = Region { start: Gpa(0), bytes: ByteCount::mib(4) };
        let managed = match (0..2).map(|_| Managed::open(Mode::UserOnly, 1)).collect() {
            Ok(managed) => managed,
            Err(error) => {
                let error: crate::MemoryError = error;
                return println!("SKIPPED: {}", plimsoll_linux::explain(&error));
            }
        };
        let layout = GuestLayout::new(vec![region]).unwrap();
        let memory = Arc::new(Memory::map(layout, HugePages::Never, managed, &[]).unwrap());
        memory.register().unwrap();
        let border = memory.mappings()[0].base().0 + BLOCK_SIZE as u64;
        let shared = Arc::clone(&memory);
        let discard = thread::spawn(move || shared.discard(Gpa(BLOCK_SIZE as u64 - PAGE), 3 * PAGE));
        for (shard, bounds) in
            memory.shards().iter().zip([(border - PAGE, border), (border, border + 2 * PAGE)])
        {
            assert!(!discard.is_finished());
            let ram = &shard.managed.ram;
            until_event(&shard.managed);
            let events: Vec<_> = ram.read_events(&mut EventBuffer::new(16)).unwrap().collect();
            let [Event::Remove { start, end }] = events[..] else { panic!("{events:?}") };
            assert_eq!((start.0, end.0), bounds);
        }
        discard.join().unwrap().unwrap();
    }

    #[test]
    fn an_agent_that_is_told_sees_discards_of_other_shards_off_and_shuts_its_socket() {
        let Some(bench) = Bench::of_shard(0, 2) else { return };
        let memory = Arc::clone(&bench.memory);
        // A page of the second shard, whose agent is never told.
        let discard = thread::spawn(move || memory.discard(Gpa(16 << 20), PAGE));
        let other = &bench.memory.shards()[1];
        until_event(&other.managed);
        for shard in bench.memory.shards() {
            for (_, range) in bench.memory.parts(shard).unwrap() {
                shard.managed.ram.unregister(range).unwrap();
            }
        }
        fdpass::send(&bench.socket, &Welcome::GivenBack.encode(), &[]).unwrap();
        discard.join().unwrap().unwrap();
        let Bench { socket, agent, .. } = bench;
        assert!(matches!(agent.join().unwrap(), Ended::GivenBack { malformed: 0 }));
        assert!(!is_open(socket.as_fd()));
    }

    #[test]
    fn populate_touches_present_pages_only_and_never_waits_for_a_discard() {
        let Some(mut bench) = Bench::new() else { return };
        assert_eq!(bench.one(Op::Populate, 6, 0, 10), stopped(4, Stop::Missing));
        assert_eq!(bench.one(Op::Populate, 100, 0, 1), stopped(0, Stop::Missing));
        let memory = Arc::clone(&bench.memory);
        let discard = thread::spawn(move || memory.discard(Gpa(0), 2 * PAGE));
        // The discard is in the kernel, waiting for its event to be read: poll says so without reading it.
        until_event(bench.managed());
        assert_eq!(bench.one(Op::Populate, 6, 0, 1), stopped(0, Stop::Again));
        assert_eq!(bench.one(Op::MoveOut, 6, 0, 1), Outcome { done: 1, stop: None });
        assert_eq!(bench.one(Op::MoveIn, 6, 0, 1), stopped(0, Stop::Again));
        assert!(matches!(bench.events()[..], [Event::Remove { .. }]));
        discard.join().unwrap().unwrap();
        assert_eq!(bench.one(Op::MoveIn, 6, 0, 1), Outcome { done: 1, stop: None });
        assert_eq!(bench.one(Op::Populate, 6, 0, 1), Outcome { done: 1, stop: None });
        bench.end();
    }

    #[test]
    fn nonsense_is_counted_and_the_next_request_is_served() {
        let Some(mut bench) = Bench::new() else { return };
        for bytes in
            [&b"x"[..], &[0xff; 24], &[0; 24], &[7; wire::DATAGRAM_MAX], &[7; wire::DATAGRAM_MAX + 100]]
        {
            fdpass::send(&bench.socket, bytes, &[]).unwrap();
        }
        rustix::net::send(&bench.socket, &[], rustix::net::SendFlags::NOSIGNAL).unwrap();
        fdpass::send(&bench.socket, b"with a descriptor", &[bench.socket.as_fd()]).unwrap();
        assert_eq!(bench.one(Op::MoveOut, 0, 0, 1), Outcome { done: 1, stop: None });
        assert_eq!(bench.end(), 7);
    }

    #[test]
    fn a_discard_whose_event_nobody_has_read_when_the_memory_is_given_back_comes_to_its_end() {
        let Some(mut bench) = Bench::new() else { return };
        let memory = Arc::clone(&bench.memory);
        let discard = thread::spawn(move || memory.discard(Gpa(0), 2 * PAGE));
        until_event(bench.managed());
        assert_eq!(bench.one(Op::Unwatch, 0, 0, 512), Outcome { done: 512, stop: None });
        assert!(!discard.is_finished());
        fdpass::send(&bench.socket, &Welcome::GivenBack.encode(), &[]).unwrap();
        discard.join().unwrap().unwrap();
        // From now on a page that is not there is the kernel's to bring, and a discard is nobody's business.
        let memory = Arc::clone(&bench.memory);
        memory.discard(Gpa(3 * PAGE), PAGE).unwrap();
        assert_eq!([0, 3, 4].map(|page| memory.read_u64(Gpa(page * PAGE)).unwrap()), [0, 0, 4000]);
        let Bench { socket, agent, .. } = bench;
        assert!(matches!(agent.join().unwrap(), Ended::GivenBack { malformed: 0 }));
        drop(socket);
    }

    #[test]
    fn when_the_manager_is_gone_an_absent_page_is_waited_for_and_not_zero() {
        let Some(bench) = Bench::new() else { return };
        let memory = Arc::clone(&bench.memory);
        assert_eq!(bench.end(), 0);
        let shared = Arc::clone(&memory);
        let guest = thread::spawn(move || shared.read_u64(Gpa(100 * PAGE)).unwrap());
        let managed = &memory.shards()[0].managed;
        until_event(managed);
        assert!(!guest.is_finished());
        // Somebody who holds a copy of the descriptor can still bring the page.
        let place = memory.mappings()[0].base().checked_add(100 * PAGE).unwrap();
        assert!(managed.ram.copy(place, &word(100), Wake::Yes).is_complete());
        assert_eq!(guest.join().unwrap(), 100_000);
    }
}
