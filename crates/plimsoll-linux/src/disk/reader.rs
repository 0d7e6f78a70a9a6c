//! Who reads the disk: one thread for all pagers, with several reads under way.
//!
//! Enters: reads that [`Desk`]s ask for, one desk a pager. Leaves: bytes as the disk gave them, with a kick for the pager, who
//! decrypts and believes them or not. What must never happen: a machine whose one fault waits until all that another asked for is
//! read; memory in flight without a bound; a manager that cannot stop because a disk does not answer.
//!
//! # The protocol
//! ```text
//! pager    Desk::ask        into the inbox; if that was empty, the bell
//! reader                    takes the inbox; a read a desk in turn, as long as the queue has room, and a desk half of it at most
//!          Queue::begin     the memory for it is made, and is the queue's
//!          Queue::wait      until a read has ended, or the bell
//!          Pieces           a short one goes on, an interrupted one begins again
//!          the desk's box   its blocks and how much of them came, or an error; then the pager's kick
//! pager    Desk::answer     bytes that nobody else has
//! ```
//! What has ended is nobody's if its desk is gone by then, and is dropped. A desk that goes does not wait for what it has asked
//! for, because no more than the reader is concerned by it: not the domain, not its store, not the machine. So a machine can be
//! buried and a manager can stop while the disk does not answer.
//!
//! # Without a ring
//! there are threads ([`queue`](super::queue)), from the beginning or from when the ring has failed: what was under way in it is
//! begun again, in memory of its own, because the ring may still write to what it had.
use super::device::{BLOCK_SIZE, Blocks, Disk, Pieces};
use super::queue::{Ended, PATIENCE, Queue, Read, Threads};
use parking_lot::Mutex;
use plimsoll_sys::eventfd::{Bell, EventFd};
use plimsoll_sys::ring::ReadRing;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::Duration;

/// How long a queue that has no memory for now is left alone.
const AGAIN: Duration = Duration::from_millis(1);

/// A part of the disk that somebody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The asker's own number.
    pub ticket: u64,
    /// Where it begins.
    pub offset: u64,
    /// How many blocks.
    pub blocks: usize,
    /// How many bytes of them are enough.
    pub needed: usize,
}

/// What was asked for: its blocks, and how many bytes of them came.
pub type Came = io::Result<(Blocks, usize)>;

/// How a disk is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// By a queue of its own: a ring.
    Ring,
    /// By threads, because there is no ring.
    Threads {
        /// Why.
        cause: String,
    },
}

enum News {
    Opened { desk: u64, answers: Sender<(u64, Came)>, kick: Arc<EventFd> },
    Asked { desk: u64, wanted: Wanted },
    Closed { desk: u64 },
    Over,
}

struct Shared {
    inbox: Mutex<VecDeque<News>>,
    bell: Arc<Bell>,
    reading: Mutex<Reading>,
}

impl Shared {
    fn tell(&self, news: News) {
        let mut inbox = self.inbox.lock();
        inbox.push_back(news);
        // Else somebody has rung, and the inbox is still to be looked at.
        if inbox.len() == 1 {
            // A counter that is full wakes as well.
            let _ = self.bell.ring();
        }
    }
}

/// See the file's head.
pub struct Reader {
    shared: Arc<Shared>,
    desks: Mutex<u64>,
    thread: Option<JoinHandle<()>>,
    /// Says when the thread is about to end.
    over: Mutex<Receiver<()>>,
}

impl Reader {
    /// Starts reading a disk. A ring that was made before is used, if the disk can use one.
    ///
    /// # Errors
    /// [`io::Error`] when there is no thread to be had.
    pub fn start(disk: Arc<dyn Disk>, ring: Option<ReadRing>) -> io::Result<Self> {
        let (queue, reading): (Box<dyn Queue>, Reading) = match disk.queue(ring) {
            Ok(queue) => (queue, Reading::Ring),
            Err(error) => {
                let threads = Threads::new(Arc::clone(&disk), Arc::new(Bell::new()?));
                (Box::new(threads), Reading::Threads { cause: crate::explain(&error) })
            }
        };
        let shared = Shared { inbox: Mutex::default(), bell: queue.bell(), reading: Mutex::new(reading) };
        let shared = Arc::new(shared);
        let (ends, over) = channel();
        let mut work = Work::new(disk, queue, Arc::clone(&shared));
        let run = move || {
            work.run();
            drop(work);
            let _ = ends.send(());
        };
        let thread = Builder::new().name("disk-reads".to_owned()).spawn(run)?;
        Ok(Self { shared, desks: Mutex::new(0), thread: Some(thread), over: Mutex::new(over) })
    }

    /// Where somebody asks for reads, and is kicked when they have come.
    pub fn desk(&self, kick: Arc<EventFd>) -> Desk {
        let mut desks = self.desks.lock();
        *desks += 1;
        let (answer, answers) = channel();
        self.shared.tell(News::Opened { desk: *desks, answers: answer, kick });
        Desk { number: *desks, shared: Arc::clone(&self.shared), answers }
    }

    /// How the disk is read now.
    pub fn reading(&self) -> Reading {
        self.shared.reading.lock().clone()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.tell(News::Over);
        // The queue waits for the disk, for so long at most.
        let is_over = self.over.get_mut().recv_timeout(2 * PATIENCE).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| is_over) {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("reading", &self.reading()).finish_non_exhaustive()
    }
}

/// One asker's place at a [`Reader`].
pub struct Desk {
    number: u64,
    shared: Arc<Shared>,
    answers: Receiver<(u64, Came)>,
}

impl Desk {
    /// Asks for a read.
    pub fn ask(&self, wanted: Wanted) {
        self.shared.tell(News::Asked { desk: self.number, wanted });
    }

    /// What has come next, if anything has, by the asker's number.
    pub fn answer(&self) -> Option<(u64, Came)> {
        self.answers.try_recv().ok()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.shared.tell(News::Closed { desk: self.number });
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("number", &self.number).finish_non_exhaustive()
    }
}

/// A desk, as the reader sees it.
struct Asker {
    asks: VecDeque<Wanted>,
    under_way: usize,
    answers: Sender<(u64, Came)>,
    kick: Arc<EventFd>,
}

/// A read that the queue has.
struct Flight {
    desk: u64,
    wanted: Wanted,
    pieces: Pieces,
}

impl Flight {
    fn new(desk: u64, wanted: Wanted) -> Self {
        let length = wanted.blocks * BLOCK_SIZE;
        let pieces = Pieces { length, needed: wanted.needed.min(length), done: 0, vain: 0 };
        Self { desk, wanted, pieces }
    }
}

/// What the thread has.
struct Work {
    disk: Arc<dyn Disk>,
    queue: Box<dyn Queue>,
    shared: Arc<Shared>,
    askers: BTreeMap<u64, Asker>,
    /// Desks that want something, the next first.
    turns: VecDeque<u64>,
    flights: BTreeMap<u64, Flight>,
    next: u64,
    ended: Vec<Ended>,
}

impl Work {
    fn new(disk: Arc<dyn Disk>, queue: Box<dyn Queue>, shared: Arc<Shared>) -> Self {
        let (askers, turns, flights) = (BTreeMap::new(), VecDeque::new(), BTreeMap::new());
        Self { disk, queue, shared, askers, turns, flights, next: 0, ended: Vec::new() }
    }

    fn run(&mut self) {
        loop {
            let news = std::mem::take(&mut *self.shared.inbox.lock());
            for news in news {
                match news {
                    News::Opened { desk, answers, kick } => {
                        let asker = Asker { asks: VecDeque::new(), under_way: 0, answers, kick };
                        self.askers.insert(desk, asker);
                    }
                    News::Asked { desk, wanted } => self.add(desk, wanted),
                    // What it has under way ends for nobody.
                    News::Closed { desk } => drop(self.askers.remove(&desk)),
                    News::Over => return,
                }
            }
            self.begin();
            match self.queue.wait(&mut self.ended) {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy) =>
                {
                    sleep(AGAIN);
                }
                Err(error) => {
                    self.deliver();
                    self.fall_back(&error);
                    continue;
                }
                Ok(()) => {}
            }
            self.deliver();
        }
    }

    fn add(&mut self, desk: u64, wanted: Wanted) {
        let Some(asker) = self.askers.get_mut(&desk) else { return };
        if asker.asks.is_empty() {
            self.turns.push_back(desk);
        }
        asker.asks.push_back(wanted);
    }

    /// Has as much begun as the queue takes: of each desk in turn one, and of one at most half of what can be under way.
    fn begin(&mut self) {
        let each = (self.queue.depth() / 2).max(1);
        let mut passed = 0;
        while self.flights.len() < self.queue.depth() && passed < self.turns.len() {
            let Some(desk) = self.turns.pop_front() else { return };
            let Some(asker) = self.askers.get_mut(&desk) else { continue };
            if asker.under_way >= each {
                self.turns.push_back(desk);
                passed += 1;
                continue;
            }
            let Some(wanted) = asker.asks.pop_front() else { continue };
            asker.under_way += 1;
            if !asker.asks.is_empty() {
                self.turns.push_back(desk);
            }
            passed = 0;
            let flight = Flight::new(desk, wanted);
            self.launch(flight, None);
        }
    }

    /// Gives a read to the queue, with the memory that it has already or with new.
    fn launch(&mut self, flight: Flight, blocks: Option<Blocks>) {
        let blocks = blocks.unwrap_or_else(|| Blocks::new(flight.wanted.blocks));
        let (offset, done) = (flight.wanted.offset, flight.pieces.begun());
        let ticket = self.next;
        self.next += 1;
        match self.queue.begin(Read { ticket, offset, blocks, done }) {
            Ok(()) => drop(self.flights.insert(ticket, flight)),
            // A queue is given no more than it says that it takes.
            Err(_) => self.answer(&flight, Err(io::ErrorKind::ResourceBusy.into())),
        }
    }

    fn deliver(&mut self) {
        for Ended { read, outcome } in std::mem::take(&mut self.ended) {
            let Some(mut flight) = self.flights.remove(&read.ticket) else { continue };
            match flight.pieces.took(outcome) {
                None => self.launch(flight, Some(read.blocks)),
                Some(came) => self.answer(&flight, came.map(|bytes| (read.blocks, bytes))),
            }
        }
    }

    fn answer(&mut self, flight: &Flight, came: Came) {
        let Some(asker) = self.askers.get_mut(&flight.desk) else { return };
        asker.under_way = asker.under_way.saturating_sub(1);
        if asker.answers.send((flight.wanted.ticket, came)).is_ok() {
            // It looks when it comes by in any case.
            let _ = asker.kick.signal();
        }
    }

    /// There is no use in the queue any more. What it has it keeps, and other memory is filled in its place.
    fn fall_back(&mut self, error: &io::Error) {
        let cause = crate::explain(error);
        *self.shared.reading.lock() = Reading::Threads { cause };
        let threads = Threads::new(Arc::clone(&self.disk), Arc::clone(&self.shared.bell));
        self.queue = Box::new(threads);
        for flight in std::mem::take(&mut self.flights).into_values().rev() {
            let Flight { desk, wanted, .. } = flight;
            let Some(asker) = self.askers.get_mut(&desk) else { continue };
            asker.under_way = asker.under_way.saturating_sub(1);
            if asker.asks.is_empty() {
                self.turns.push_front(desk);
            }
            asker.asks.push_front(wanted);
        }
    }
}
