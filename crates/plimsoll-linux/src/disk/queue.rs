//! Reads of a disk that are under way together: a ring where there is one, or threads.
//!
//! Enters: reads, each with the memory that it fills. Leaves: that memory, and what became of the read, in the order in which the
//! disk is done. What must never happen: memory that is somebody's while a disk may still write to it. So it is the queue's from
//! the beginning of a read to its end, and a queue that is dropped before that keeps it: the ring by
//! [never freeing it](plimsoll_sys::ring), a thread by having it.
//!
//! Like [`Disk`], of which a queue is a part, this is a boundary: tests put queues behind it that end their reads late, in another
//! order, short, failed, or never.
use super::device::Disk;
use parking_lot::Mutex;
use plimsoll_sys::eventfd::Bell;
use plimsoll_sys::ring::ReadRing;
pub use plimsoll_sys::ring::{Ended, Read};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Reads under way at once, by a ring: four read 1.9 times what one does here (fio, random reads). A faster disk has use for more; each may
/// have 256 KiB.
pub const DEPTH: usize = 16;
/// The same, by threads: each has a stack.
const THREADS: usize = 4;
/// How long a disk is waited for at the end.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// See the file's head. Used by one thread, which waits in it; others ring its bell.
pub trait Queue: Send {
    /// Wakes who [waits](Self::wait).
    fn bell(&self) -> Arc<Bell>;

    /// Reads that can be under way at once.
    fn depth(&self) -> usize;

    /// Has a read begun, now or when it is [waited](Self::wait) for.
    ///
    /// # Errors
    /// The read, if there are as many as can be.
    fn begin(&mut self, read: Read) -> Result<(), Read>;

    /// Waits until a read has ended or the bell was rung, and gives what has ended.
    ///
    /// # Errors
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) and [`ResourceBusy`](io::ErrorKind::ResourceBusy) are to be tried again. Any other says
    /// that there is no use in this queue any more.
    fn wait(&mut self, ended: &mut Vec<Ended>) -> io::Result<()>;
}

impl Queue for ReadRing {
    fn bell(&self) -> Arc<Bell> {
        Arc::clone(Self::bell(self))
    }

    fn depth(&self) -> usize {
        Self::depth(self)
    }

    fn begin(&mut self, read: Read) -> Result<(), Read> {
        Self::begin(self, read)
    }

    fn wait(&mut self, ended: &mut Vec<Ended>) -> io::Result<()> {
        Self::wait(self, ended)
    }
}

/// Where there is no ring: threads, as many as are needed at once, each with one read at a time. One that a disk does not answer
/// is left behind when this is dropped.
pub(super) struct Threads {
    disk: Arc<dyn Disk>,
    bell: Arc<Bell>,
    asks: Sender<Read>,
    asked: Arc<Mutex<Receiver<Read>>>,
    answer: Sender<Ended>,
    answers: Receiver<Ended>,
    started: Vec<JoinHandle<()>>,
    under_way: usize,
}

impl Threads {
    pub(super) fn new(disk: Arc<dyn Disk>, bell: Arc<Bell>) -> Self {
        let (asks, asked) = channel();
        let (answer, answers) = channel();
        let asked = Arc::new(Mutex::new(asked));
        Self { disk, bell, asks, asked, answer, answers, started: Vec::new(), under_way: 0 }
    }

    /// One more of them.
    fn start(&mut self) -> io::Result<()> {
        let (disk, bell) = (Arc::clone(&self.disk), Arc::clone(&self.bell));
        let (asked, answer) = (Arc::clone(&self.asked), self.answer.clone());
        let work = move || {
            // The others wait for the lock meanwhile, and so for the next read.
            let next = || asked.lock().recv();
            while let Ok(read) = next() {
                if answer.send(made(&*disk, read)).is_err() {
                    break;
                }
                let _ = bell.ring();
            }
        };
        let name = format!("disk-{}", self.started.len());
        self.started.push(Builder::new().name(name).spawn(work)?);
        Ok(())
    }
}

/// Makes a read, and waits for it: what is left of it, as one call.
pub fn made(disk: &dyn Disk, mut read: Read) -> Ended {
    let at = read.offset + read.done as u64;
    let rest = read.blocks.bytes_mut().get_mut(read.done..).unwrap_or_default();
    let outcome = disk.read_at(at, rest);
    Ended { read, outcome }
}

impl Queue for Threads {
    fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    fn depth(&self) -> usize {
        THREADS
    }

    fn begin(&mut self, read: Read) -> Result<(), Read> {
        if self.under_way == THREADS {
            return Err(read);
        }
        if self.under_way == self.started.len() {
            // Those that there are do.
            let _ = self.start();
        }
        self.under_way += 1;
        if !self.started.is_empty() {
            // They end after this.
            return self.asks.send(read).map_err(|refused| refused.0);
        }
        // Not one is to be had: slow is better than never.
        let _ = self.answer.send(made(&*self.disk, read));
        let _ = self.bell.ring();
        Ok(())
    }

    fn wait(&mut self, ended: &mut Vec<Ended>) -> io::Result<()> {
        self.bell.wait()?;
        let before = ended.len();
        ended.extend(self.answers.try_iter());
        self.under_way -= ended.len() - before;
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.asks = channel().0;
        let until = Instant::now() + PATIENCE;
        while self.under_way > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if self.answers.recv_timeout(left).is_err() {
                return;
            }
            self.under_way -= 1;
        }
        for thread in self.started.drain(..) {
            // Nobody asks it any more, and it is in no read.
            let _ = thread.join();
        }
    }
}
