//! What of a tier outlives its manager: the key, the counter of sequence numbers, and which segment was written last where.
//!
//! Enters: segments as they are written and freed. Leaves: the same, for whoever manages them next. What lies in the segments
//! is known from the records of the stores, which outlive the manager as well. What must never happen: a sequence number that
//! is given twice, or a key on any disk. So the page that has the key is locked in memory, and zeroed when the tier ends.
//!
//! A file in memory, words of 8 bytes:
//!
//! ```text
//! 0    magic | version u32, segments u32 | next sequence | key, 4 words | zeros to 4096
//! 4096 word of segment 0, 1, ...: 0 nothing of value | the sequence that lies there | 2^63 + the sequence that may be under way
//!      there | 2^64 - 1 more than one may be
//! ```
//!
//! That a segment is being written is said before the disk is asked to, and stays said unless the disk has taken all of it: a
//! write may go on without the manager that has died in it, and after the disk has refused it.
use super::seal::KEY_SIZE;
use plimsoll_sys::mapping::{Memfd, MemfdError, SharedMapping};
use plimsoll_types::{ByteCount, PAGE_SIZE};
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;
use zeroize::Zeroizing;

const MAGIC: u64 = u64::from_le_bytes(*b"PLIMDISK");
const VERSION: u32 = 1;
const SHAPE: usize = 1;
const NEXT: usize = 2;
const KEY: usize = 3;
const KEY_WORDS: usize = KEY_SIZE / size_of::<u64>();
const SEGMENTS: usize = PAGE_SIZE / size_of::<u64>();

const NOTHING: u64 = 0;
const SPOILT: u64 = u64::MAX;
const WRITING: u64 = 1 << 63;

/// The table of a tier could not be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TableError {
    /// No memory for it, or what was kept cannot be mapped.
    #[error("the table of the disk tier cannot be mapped")]
    Memory(#[from] MemfdError),
    /// The page with the key could be written to swap.
    #[error(
        "the key of the disk tier cannot be locked in memory: raise the limit on locked memory (ulimit -l)"
    )]
    Lock(#[source] MemfdError),
    /// The kernel gives no key.
    #[error("the kernel gives no random key")]
    Random(#[source] io::Error),
    /// What was kept is no table, or one of another version.
    #[error(
        "what was kept of the disk tier is none that this build knows: it begins with {magic:#x}, {shape:#x}"
    )]
    Unknown {
        /// What it begins with.
        magic: u64,
        /// Its version and size.
        shape: u64,
    },
}

/// What lies in a segment, as the table knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    Nothing,
    Sequence(u64),
    /// That sequence is being written there, or may be although its manager has died or the disk has refused it.
    Writing(u64),
    /// More than one may be.
    Spoilt,
}

#[derive(Debug)]
pub(super) struct Table {
    file: Memfd,
    memory: SharedMapping,
    segments: u32,
}

impl Table {
    /// For so many segments, of which none holds anything, with a key of its own.
    pub(super) fn create(segments: u32) -> Result<Self, TableError> {
        let bytes = PAGE_SIZE + segments as usize * size_of::<u64>();
        let file = Memfd::create("plimsoll-disk", ByteCount(bytes.next_multiple_of(PAGE_SIZE) as u64))?;
        let table = Self { memory: locked(&file)?, file, segments };
        let mut key = Zeroizing::new([0; KEY_SIZE]);
        // As many bytes as these come at once, or not at all.
        getrandom(&mut *key, GetRandomFlags::empty()).map_err(|errno| TableError::Random(errno.into()))?;
        let (words, _) = key.as_chunks();
        for (place, word) in words.iter().enumerate() {
            table.word(KEY + place).store(u64::from_le_bytes(*word), Ordering::Relaxed);
        }
        table.word(NEXT).store(1, Ordering::Relaxed);
        table.word(SHAPE).store(u64::from(VERSION) | u64::from(segments) << 32, Ordering::Relaxed);
        table.word(0).store(MAGIC, Ordering::Release);
        Ok(table)
    }

    /// That of an earlier manager.
    pub(super) fn inherit(file: OwnedFd) -> Result<Self, TableError> {
        let file = Memfd::try_from(file)?;
        let memory = locked(&file)?;
        let word = |at: usize| memory.as_atomic_u64s().get(at).map_or(0, |word| word.load(Ordering::Acquire));
        let (magic, shape) = (word(0), word(SHAPE));
        let segments = u32::try_from(shape >> 32).unwrap_or(0);
        let room = memory.as_atomic_u64s().len().saturating_sub(SEGMENTS);
        let is_known = magic == MAGIC && shape & u64::from(u32::MAX) == u64::from(VERSION);
        if !is_known || room < segments as usize {
            return Err(TableError::Unknown { magic, shape });
        }
        Ok(Self { file, memory, segments })
    }

    /// For whoever keeps a copy for the next manager.
    pub(super) fn keepsake(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) const fn segments(&self) -> u32 {
        self.segments
    }

    pub(super) fn key(&self) -> Zeroizing<[u8; KEY_SIZE]> {
        let mut key = Zeroizing::new([0; KEY_SIZE]);
        let (words, _) = key.as_chunks_mut();
        for (place, word) in words.iter_mut().enumerate() {
            *word = self.word(KEY + place).load(Ordering::Relaxed).to_le_bytes();
        }
        key
    }

    /// A number that was never given before and never will be again.
    pub(super) fn next_sequence(&self) -> u64 {
        self.word(NEXT).fetch_add(1, Ordering::Relaxed)
    }

    /// The number that will be given next: how old others are, relative to it.
    pub(super) fn now(&self) -> u64 {
        self.word(NEXT).load(Ordering::Relaxed)
    }

    /// What the segment holds; nothing where there is no such segment.
    pub(super) fn holds(&self, segment: u32) -> Holds {
        let word = if segment < self.segments { self.segment(segment).load(Ordering::Acquire) } else { 0 };
        match word {
            NOTHING => Holds::Nothing,
            SPOILT => Holds::Spoilt,
            word if word & WRITING != 0 => Holds::Writing(word & !WRITING),
            sequence => Holds::Sequence(sequence),
        }
    }

    pub(super) fn set(&self, segment: u32, holds: Holds) {
        let word = match holds {
            Holds::Nothing => NOTHING,
            Holds::Sequence(sequence) => sequence,
            Holds::Writing(sequence) => sequence | WRITING,
            Holds::Spoilt => SPOILT,
        };
        if segment < self.segments {
            self.segment(segment).store(word, Ordering::Release);
        }
    }

    /// The tier is over: from here on nobody can read what it has written, and nobody goes on with a key of zeros.
    pub(super) fn forget(&self) {
        self.word(0).store(0, Ordering::SeqCst);
        (KEY..KEY + KEY_WORDS).for_each(|place| self.word(place).store(0, Ordering::SeqCst));
    }

    fn segment(&self, segment: u32) -> &AtomicU64 {
        self.word(SEGMENTS + segment as usize)
    }

    /// A word that both ways of making a table have seen to be there.
    fn word(&self, at: usize) -> &AtomicU64 {
        &self.memory.as_atomic_u64s()[at]
    }
}

fn locked(file: &Memfd) -> Result<SharedMapping, TableError> {
    let memory = SharedMapping::new(file)?;
    memory.lock(ByteCount(PAGE_SIZE as u64)).map_err(TableError::Lock)?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_manager_finds_key_counter_and_segments_and_gives_no_number_again() {
        let table = Table::create(1000).unwrap();
        let given: Vec<u64> = (0..3).map(|_| table.next_sequence()).collect();
        table.set(999, Holds::Sequence(given[2]));
        table.set(0, Holds::Spoilt);
        table.set(7, Holds::Writing(given[1]));
        let next = Table::inherit(table.keepsake().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(next.segments(), 1000);
        assert_eq!(*next.key(), *table.key());
        assert_ne!(*next.key(), [0; KEY_SIZE]);
        assert_eq!([next.holds(999), next.holds(0)], [Holds::Sequence(given[2]), Holds::Spoilt]);
        assert_eq!(next.holds(7), Holds::Writing(given[1]));
        assert_eq!([next.holds(1), next.holds(1000)], [Holds::Nothing; 2]);
        assert!(!given.contains(&next.next_sequence()));
        table.forget();
        assert_eq!(*next.key(), [0; KEY_SIZE]);
        let file = table.keepsake().try_clone_to_owned().unwrap();
        assert!(matches!(Table::inherit(file), Err(TableError::Unknown { .. })), "a key of zeros is none");
        assert_ne!(*Table::create(1).unwrap().key(), *Table::create(1).unwrap().key());
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let file = Memfd::create("test", ByteCount(PAGE_SIZE as u64 * 2)).unwrap();
        assert!(matches!(Table::inherit(file.into()), Err(TableError::Unknown { .. })));
        let table = Table::create(1000).unwrap();
        table.word(SHAPE).store(u64::from(VERSION) | 100_000 << 32, Ordering::Relaxed);
        let file = table.keepsake().try_clone_to_owned().unwrap();
        assert!(
            matches!(Table::inherit(file), Err(TableError::Unknown { .. })),
            "more segments than it has room for"
        );
    }
}
