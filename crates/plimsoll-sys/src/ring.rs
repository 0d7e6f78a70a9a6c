//! Reads of one file by io_uring: several under way at once, handed over and taken back by one call.
//!
//! Enters: a file, reads of it with the memory that each is to fill. Leaves: the same memory, and what became of its read, in the
//! order in which they end. What must never happen: memory that the kernel may still write to and somebody else has.
//!
//! # Whose the memory is
//! [`ReadRing::begin`] takes a read's blocks and puts them into a place of their own, where nobody can reach them; the place's number
//! goes to the kernel with the read. The kernel reports each read once, with that number, after the last byte that it writes for
//! it; [`ReadRing::wait`] empties the place then, and only then. A ring that is dropped waits for what is under way. What a disk
//! does not answer in time is left to the kernel for good: the memory is never freed, which costs memory and harms nobody. A process
//! that is killed needs none of this: the kernel ends its reads before it takes its memory.
//!
//! # What a ring can do
//! A filter of system calls sees none of what a ring is asked for. So a ring is made disabled, told what it may ever do, and
//! enabled, by the kernel's own restrictions (IORING_REGISTER_RESTRICTIONS): nothing but IORING_OP_READ, of nothing but its two
//! registered files, the one that is read and the [`Bell`] that wakes who waits; and of registrations nothing but another file in
//! a place of these two. Everything else is refused with EACCES, whoever asks. A process makes its ring before it gives up making
//! any, and names the file later.
#![expect(unsafe_code, reason = "the kernel is given addresses that it writes to after the call")]

use crate::blocks::Blocks;
use crate::eventfd::Bell;
use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Reads that a ring can have under way at most.
pub const DEPTH_MAX: usize = 1024;
/// How long a ring that is dropped waits for a disk.
const PATIENCE: Duration = Duration::from_secs(5);
/// The registered files.
const FILE: u32 = 0;
const BELL: u32 = 1;
/// A registered place without a file.
const NONE: i32 = -1;
/// IORING_REGISTER_FILES_UPDATE of linux/io_uring.h: the one registration that a ring allows.
pub const FILES_UPDATE: u8 = 6;

/// A read that is to be made.
pub struct Read {
    /// The asker's own number.
    pub ticket: u64,
    /// Where the blocks begin in the file.
    pub offset: u64,
    /// What it fills.
    pub blocks: Blocks,
    /// How many bytes of them are there already: the read goes on behind these.
    pub done: usize,
}

/// A read that has ended.
pub struct Ended {
    /// As it was begun.
    pub read: Read,
    /// How many bytes have come, or why none.
    pub outcome: io::Result<usize>,
}

/// There is no ring to be had here.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed: there is no io_uring to be had")]
pub struct RingError {
    /// Which part of making it.
    pub call: &'static str,
    /// What the kernel said: ENOSYS where it has none or a filter denies it, EPERM where an operator has switched it off.
    #[source]
    pub source: io::Error,
}

fn failed(call: &'static str) -> impl Fn(io::Error) -> RingError {
    move |source| RingError { call, source }
}

/// See the file's head.
pub struct ReadRing {
    ring: IoUring,
    bell: Arc<Bell>,
    /// What the kernel may write to, by the number that it was given with. The last place is the bell's.
    places: Vec<Option<Read>>,
    /// Places of the others that are empty.
    free: Vec<usize>,
    patience: Duration,
}

impl ReadRing {
    /// A ring for so many reads at once, which can do nothing else. It has no file yet.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn new(depth: usize) -> Result<Self, RingError> {
        let depth = depth.clamp(1, DEPTH_MAX);
        // The bell's read too. The queue of what has ended is twice as long, so it cannot overflow.
        let entries = u32::try_from(depth + 1).unwrap_or(u32::MAX);
        let ring = IoUring::builder().setup_r_disabled().dontfork().build(entries);
        let ring = ring.map_err(failed("io_uring_setup"))?;
        let bell = Arc::new(Bell::new().map_err(failed("eventfd"))?);
        let submitter = ring.submitter();
        // By their order: what is in the places of the files.
        let files = [NONE, bell.as_fd().as_raw_fd()];
        submitter.register_files(&files).map_err(failed("registering its files"))?;
        let mut restrictions = [
            Restriction::register_op(FILES_UPDATE),
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ];
        submitter.register_restrictions(&mut restrictions).map_err(failed("restricting it"))?;
        submitter.register_enable_rings().map_err(failed("enabling it"))?;
        let places = (0..=depth).map(|_| None).collect();
        Ok(Self { ring, bell, places, free: (0..depth).collect(), patience: PATIENCE })
    }

    /// What is read from now on; `None` for nothing. What is under way goes on with the file it was begun with.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn set_file(&self, file: Option<BorrowedFd<'_>>) -> Result<(), RingError> {
        let file = file.map_or(NONE, |file| file.as_raw_fd());
        let updated = self.ring.submitter().register_files_update(FILE, &[file]);
        updated.map(drop).map_err(failed("naming its file"))
    }

    /// Wakes who [waits](Self::wait).
    pub fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// Reads that can be under way at once.
    pub const fn depth(&self) -> usize {
        self.places.len() - 1
    }

    /// Reads that are under way.
    pub const fn under_way(&self) -> usize {
        self.depth() - self.free.len()
    }

    /// Has a read begun, by the next [`wait`](Self::wait).
    ///
    /// # Errors
    /// The read, where the ring is full or nothing is left of it to read.
    pub fn begin(&mut self, read: Read) -> Result<(), Read> {
        if read.done >= read.blocks.bytes().len() {
            return Err(read);
        }
        let Some(place) = self.free.pop() else { return Err(read) };
        self.submit(place, FILE, read)
    }

    /// Puts a read into an empty place, and the place's number into the queue.
    fn submit(&mut self, place: usize, file: u32, read: Read) -> Result<(), Read> {
        let (offset, done) = (read.offset + read.done as u64, read.done);
        let room = self.places.get_mut(place).filter(|room| room.is_none());
        let Some(room) = room else { return Err(read) };
        let rest = room.insert(read).blocks.bytes_mut().get_mut(done..).unwrap_or_default();
        let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(Fixed(file), rest.as_mut_ptr(), length).offset(offset).build();
        let entry = entry.user_data(place as u64);
        // SAFETY: The kernel writes to at most `length` bytes at `rest` from now on until it has reported the number. These are the
        // heap memory of blocks that `places` owns, do not move with it, and are handed out by no method: `reap` takes them when it
        // sees the number reported, and `drop` frees none of which it has not. A number is in the queue once, as its place was empty.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => Ok(()),
            // There are as many entries as places, so this is not reached. The kernel has heard of nothing.
            Err(_) => match self.places.get_mut(place).and_then(Option::take) {
                Some(read) => {
                    self.give_back(place);
                    Err(read)
                }
                None => Ok(()),
            },
        }
    }

    fn give_back(&mut self, place: usize) {
        if place < self.depth() {
            self.free.push(place);
        }
    }

    /// Has the kernel begin what is new, and waits until a read has ended or the bell was rung.
    ///
    /// # Errors
    /// What io_uring_enter(2) said. What has ended is in `ended` all the same; what has not is under way as before.
    pub fn wait(&mut self, ended: &mut Vec<Ended>) -> io::Result<()> {
        self.listen();
        let entered = self.ring.submit_and_wait(1);
        self.reap(ended);
        match entered {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            entered => entered.map(drop),
        }
    }

    /// Keeps a read of the bell under way.
    fn listen(&mut self) {
        let place = self.depth();
        if self.places.last().is_some_and(Option::is_none) {
            let read = Read { ticket: 0, offset: 0, blocks: Blocks::new(1), done: 0 };
            // Its place is empty, so it is taken.
            let _ = self.submit(place, BELL, read);
        }
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) {
        let depth = self.depth();
        while let Some(entry) = self.ring.completion().next() {
            let place = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(read) = self.places.get_mut(place).and_then(Option::take) else { continue };
            if place == depth {
                continue;
            }
            self.free.push(place);
            let outcome = match usize::try_from(entry.result()) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(io::Error::from_raw_os_error(entry.result().saturating_neg())),
            };
            ended.push(Ended { read, outcome });
        }
    }

    /// How long a disk is waited for when this is dropped.
    pub const fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Waits for what is under way, the bell's read too, but not for longer than that.
    fn drain(&mut self) {
        let until = Instant::now() + self.patience;
        let mut ended = Vec::new();
        while self.places.iter().any(Option::is_some) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let time = Timespec::new().sec(left.as_secs()).nsec(left.subsec_nanos());
            let entered = self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time));
            self.reap(&mut ended);
            let errno = entered.err().and_then(|error| Errno::from_io_error(&error));
            if errno
                .is_some_and(|errno| ![Errno::TIME, Errno::INTR, Errno::AGAIN, Errno::BUSY].contains(&errno))
            {
                return;
            }
        }
    }
}

impl Drop for ReadRing {
    fn drop(&mut self) {
        // Its read ends with this.
        let _ = self.bell.ring();
        self.drain();
        // The kernel lets go of a ring, and so of its files, some time after it is closed; who waits for the file's lock would
        // have to wait for that.
        let _ = self.set_file(None);
        // What is under way still may be written to as long as the process lives.
        self.places.drain(..).flatten().for_each(std::mem::forget);
    }
}

impl std::fmt::Debug for ReadRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("ReadRing");
        shown.field("depth", &self.depth()).field("under_way", &self.under_way()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
