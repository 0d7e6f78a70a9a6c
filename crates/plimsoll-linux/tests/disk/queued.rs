//! A disk with a queue whose reads end when, how and in which order they are told to.
use crate::faulty::FaultyDisk;
use parking_lot::{Condvar, Mutex};
use plimsoll_linux::disk::device::Disk;
use plimsoll_linux::disk::queue::{Ended, Queue, Read, made};
use plimsoll_sys::eventfd::Bell;
use plimsoll_sys::ring::ReadRing;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

/// No condition is waited for longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

#[derive(Default)]
struct State {
    /// Reads that were begun and do not end yet.
    held: Vec<Read>,
    ended: Vec<Ended>,
    /// Reads do not end by themselves.
    holds: bool,
    /// The next wait fails with this.
    refusal: Option<io::ErrorKind>,
    /// The most reads that were under way.
    most: usize,
}

/// See the file's head. Clones are the same disk.
#[derive(Clone)]
pub(crate) struct QueuedDisk {
    pub(crate) disk: FaultyDisk,
    state: Arc<(Mutex<State>, Condvar)>,
    bell: Arc<Bell>,
    depth: usize,
}

impl QueuedDisk {
    pub(crate) fn new(depth: usize) -> Self {
        let bell = Arc::new(Bell::new().unwrap());
        Self { disk: FaultyDisk::default(), state: Arc::default(), bell, depth }
    }

    /// Reads that are begun from now on end when they are [`released`](Self::release), or at once.
    pub(crate) fn hold(&self, holds: bool) {
        self.state.0.lock().holds = holds;
    }

    /// Waits until so many reads are held, and says where they are.
    pub(crate) fn until_held(&self, reads: usize) -> Vec<u64> {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        let waited = changed.wait_while_for(&mut state, |state| state.held.len() < reads, LIMIT);
        assert!(!waited.timed_out(), "{} of {reads} reads are under way", state.held.len());
        state.held.iter().map(|read| read.offset).collect()
    }

    /// Ends one of those that are held.
    pub(crate) fn release(&self, which: usize) {
        let read = self.state.0.lock().held.remove(which);
        self.end(read);
    }

    /// Ends those that are held, and all from now on.
    pub(crate) fn release_all(&self) {
        self.hold(false);
        let held = std::mem::take(&mut self.state.0.lock().held);
        held.into_iter().for_each(|read| self.end(read));
    }

    /// The queue is of no use from now on.
    pub(crate) fn refuse(&self, error: io::ErrorKind) {
        self.state.0.lock().refusal = Some(error);
        self.bell.ring().unwrap();
    }

    pub(crate) fn most_under_way(&self) -> usize {
        self.state.0.lock().most
    }

    fn end(&self, read: Read) {
        let ended = made(&self.disk, read);
        self.state.0.lock().ended.push(ended);
        self.bell.ring().unwrap();
    }
}

impl Queue for QueuedDisk {
    fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn begin(&mut self, read: Read) -> Result<(), Read> {
        let (state, changed) = &*self.state;
        let mut state = state.lock();
        if state.holds {
            assert!(state.held.len() < self.depth, "no more is under way than the queue takes");
            state.held.push(read);
            state.most = state.most.max(state.held.len());
            changed.notify_all();
        } else {
            drop(state);
            self.end(read);
        }
        Ok(())
    }

    fn wait(&mut self, ended: &mut Vec<Ended>) -> io::Result<()> {
        self.bell.wait()?;
        let mut state = self.state.0.lock();
        ended.append(&mut state.ended);
        state.refusal.take().map_or(Ok(()), |refusal| Err(refusal.into()))
    }
}

impl Disk for QueuedDisk {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.disk.read_at(offset, into)
    }

    fn queue(&self, _: Option<ReadRing>) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(self.clone()))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.disk.write_at(offset, bytes)
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.disk.reserve(offset, bytes)
    }

    fn shows_what_has_landed(&self) -> bool {
        self.disk.shows_what_has_landed()
    }

    fn empty(&self) -> io::Result<()> {
        self.disk.empty()
    }

    fn keepsake(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
