//! Events in memory that outlives the process that reads them.
//!
//! Enters: memory of a memfd. Leaves: events, which stay in that memory until they are [forgotten](Journal::forget). The
//! kernel itself writes them there: between the moment at which an event leaves its queue (and the discarder goes on) and
//! the moment at which it is in the journal no code of this process runs, so a reader that is killed at whatever instant
//! loses none. What must never happen: an event overwritten before it was forgotten.
//!
//! ```text
//! message  0 event u8 (0: none) | 1 reserved [u8; 7] | 8 arguments [u64; 3]      = 32 bytes, the kernel's `struct uffd_msg`
//! ```
#![expect(unsafe_code, reason = "the kernel writes into shared memory")]

use super::abi::Message;
use super::event::Event;
use crate::mapping::SharedMapping;
use plimsoll_types::ByteCount;
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const WORDS: usize = size_of::<Message>() / size_of::<u64>();

/// Room for events, in the order in which they were read.
#[derive(Debug)]
pub struct Journal {
    memory: Arc<SharedMapping>,
    /// The first word of the first message.
    first: usize,
    /// Messages there is room for.
    capacity: usize,
    /// Messages that are not forgotten.
    filled: usize,
}

impl Journal {
    /// Bytes that a journal of so many messages takes.
    pub const fn size(messages: usize) -> ByteCount {
        ByteCount((messages * size_of::<Message>()) as u64)
    }

    /// Goes on with what is in the memory from `offset`, a multiple of 8, on. `None` where there is no room for
    /// `capacity` messages.
    pub fn open(memory: Arc<SharedMapping>, offset: ByteCount, capacity: usize) -> Option<Self> {
        let first = usize::try_from(offset.0).ok()? / size_of::<u64>();
        let words = memory.as_atomic_u64s().get(first..)?.get(..capacity * WORDS)?;
        let filled =
            words.chunks(WORDS).rposition(|message| load(message).event != 0).map_or(0, |last| last + 1);
        Some(Self { memory, first, capacity, filled })
    }

    /// In memory that nobody has written yet: [`open`](Self::open), which would look for what is there and so take memory for it.
    pub fn fresh(memory: Arc<SharedMapping>, offset: ByteCount, capacity: usize) -> Option<Self> {
        let first = usize::try_from(offset.0).ok()? / size_of::<u64>();
        memory.as_atomic_u64s().get(first..)?.get(..capacity * WORDS)?;
        Some(Self { memory, first, capacity, filled: 0 })
    }

    /// What an earlier reader has left. A descriptor that came with an event was that process's and is not among it.
    pub fn left(&self) -> Vec<Event> {
        self.messages(0..self.filled).filter_map(|message| Event::without_descriptor(&message)).collect()
    }

    /// All events read so far have come into effect. Order does not matter: each is one word.
    pub fn forget(&mut self) {
        for message in self.words(0..self.filled).chunks(WORDS) {
            message.iter().for_each(|word| word.store(0, Ordering::Release));
        }
        self.filled = 0;
    }

    fn words(&self, messages: Range<usize>) -> &[AtomicU64] {
        let [start, end] = [messages.start, messages.end].map(|message| self.first + message * WORDS);
        &self.memory.as_atomic_u64s()[start..end]
    }

    pub(super) fn messages(&self, which: Range<usize>) -> impl Iterator<Item = Message> + '_ {
        self.words(which).chunks(WORDS).map(load)
    }

    /// Reads at most `most` messages behind those that are there, without waiting, and says which of the journal they are. None
    /// when there is no room: the reader forgets first.
    pub(super) fn read(&mut self, from: impl AsFd, most: usize) -> Result<Range<usize>, Errno> {
        let until = self.capacity.min(self.filled + most);
        let room = self.words(self.filled..until);
        if room.is_empty() {
            return Ok(self.filled..self.filled);
        }
        let iov = libc::iovec { iov_base: room.as_ptr().cast_mut().cast(), iov_len: size_of_val(room) };
        // SAFETY: the kernel writes at most `iov_len` bytes from `iov_base`, which is the memory of `room`: atomics, which may
        // be written through a shared reference, and of which every bit pattern is one.
        let read =
            unsafe { libc::preadv2(from.as_fd().as_raw_fd(), &raw const iov, 1, -1, libc::RWF_NOWAIT) };
        let bytes = match usize::try_from(read) {
            Ok(bytes) => bytes,
            Err(_) => return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        };
        let was = self.filled;
        self.filled += bytes / size_of::<Message>();
        Ok(was..self.filled)
    }
}

/// A message as it lies there.
fn load(words: &[AtomicU64]) -> Message {
    let word = |at: usize| words.get(at).map_or(0, |word| word.load(Ordering::Acquire));
    let [event, ..] = word(0).to_le_bytes();
    Message { event, reserved: [0; 7], arg: [word(1), word(2), word(3)] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Memfd;
    use crate::uffd::abi;
    use plimsoll_types::Hva;

    fn memory() -> Arc<SharedMapping> {
        Arc::new(SharedMapping::new(&Memfd::create("test-journal", ByteCount(4096)).unwrap()).unwrap())
    }

    #[test]
    fn what_was_read_and_not_forgotten_is_there_for_the_next_reader() {
        let memory = memory();
        let offset = ByteCount(64);
        let (mut reading, writing) =
            (Journal::open(Arc::clone(&memory), offset, 4).unwrap(), rustix::pipe::pipe());
        let (source, sink) = writing.unwrap();
        // A pipe stands for the queue: what counts is that the bytes land where the next reader looks.
        let remove = |start: u64| {
            let words = [u64::from(abi::EVENT_REMOVE), start, start + 4096, 0];
            rustix::io::write(&sink, &words.map(u64::to_le_bytes).concat()).unwrap();
        };
        remove(0x1000);
        remove(0x3000);
        assert_eq!(reading.read(&source, 1).unwrap().len(), 1);
        assert_eq!(reading.read(&source, 9).unwrap().len(), 1);
        drop(reading);

        let mut next = Journal::open(Arc::clone(&memory), offset, 4).unwrap();
        let starts = |events: Vec<Event>| {
            let start =
                |event| if let Event::Remove { start, .. } = event { start } else { panic!("{event:?}") };
            events.into_iter().map(start).collect::<Vec<Hva>>()
        };
        assert_eq!(starts(next.left()), [Hva(0x1000), Hva(0x3000)]);
        remove(0x5000);
        remove(0x7000);
        remove(0x9000);
        assert_eq!(next.read(&source, 9).unwrap().len(), 2, "there is room for two more");
        assert_eq!(next.read(&source, 9).unwrap().len(), 0, "full");
        next.forget();
        assert_eq!(next.read(&source, 9).unwrap().len(), 1, "the fifth has waited in the queue");
        next.forget();
        assert!(Journal::open(memory, offset, 4).unwrap().left().is_empty());
    }

    #[test]
    fn a_journal_does_not_leave_its_memory() {
        let memory = memory();
        assert!(Journal::open(Arc::clone(&memory), ByteCount(0), 128).is_some());
        assert!(Journal::open(Arc::clone(&memory), ByteCount(8), 128).is_none());
        assert!(Journal::open(memory, ByteCount(8192), 1).is_none());
    }
}
