//! What of a tier outlives its manager: the key, the counter of sequence numbers, and which segment was written last where.
//!
//! Enters: segments as they are written and freed. Leaves: the same, for whoever manages them next. What lies in the segments
//! is known from the records of the stores, which outlive the manager as well. What must never happen: a sequence number that
//! is given twice, or a key on any disk, in a core dump, or in use after its tier has ended.
//!
//! So the key has a page of secret memory of its own, which nothing reads that does not map it. Where the kernel has none it is in
//! the table, whose first page is locked and left out of core dumps. Either way it is zeroed when the tier ends, and is taken from
//! there for each use: see `seal`.
//!
//! A file in memory, words of 8 bytes:
//!
//! ```text
//! 0    magic | version u32 (1, or 2 where the key is elsewhere), segments u32 | next sequence | key, 4 words, or zeros | pair
//!      | zeros to 4096
//! 4096 word of segment 0, 1, ...: 0 nothing of value | the sequence that lies there | 2^63 + the sequence that may be under way
//!      there | 2^64 - 1 more than one may be
//! ```
//!
//! And the secret page: `pair | key, 4 words`. The pair is a random number, other than 0, and the same in both: another tier's key
//! would be used with numbers that it has been used with before.
//!
//! That a segment is being written is said before the disk is asked to, and stays said unless the disk has taken all of it: a
//! write may go on without the manager that has died in it, and after the disk has refused it.
use super::seal::{KEY_SIZE, Key};
use plimsoll_sys::mapping::{Memfd, MemfdError, SecretPage, SharedMapping};
use plimsoll_types::{ByteCount, PAGE_SIZE};
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

const MAGIC: u64 = u64::from_le_bytes(*b"PLIMDISK");
/// The version of a table that has its key, and of one that has not.
const WITH_KEY: u32 = 1;
const WITHOUT_KEY: u32 = 2;
const SHAPE: usize = 1;
const NEXT: usize = 2;
const KEY: usize = 3;
const KEY_WORDS: usize = KEY_SIZE / size_of::<u64>();
const PAIR: usize = KEY + KEY_WORDS;
/// Where both are in a secret page.
const SECRET_PAIR: usize = 0;
const SECRET_KEY: usize = 1;
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
    /// The key is in a page of its own, and that is not there or is another's.
    #[error("the disk tier's key was not kept with its table: what it wrote cannot be read any more")]
    NoKey(#[source] Option<MemfdError>),
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
    /// What has the key, if it is not the table.
    secret: Option<SecretPage>,
    segments: u32,
}

impl Table {
    /// For so many segments, of which none holds anything, with a key of its own.
    pub(super) fn create(segments: u32) -> Result<Self, TableError> {
        Self::with_key_in(SecretPage::create().ok(), segments)
    }

    fn with_key_in(secret: Option<SecretPage>, segments: u32) -> Result<Self, TableError> {
        let bytes = PAGE_SIZE + segments as usize * size_of::<u64>();
        let file = Memfd::create("plimsoll-disk", ByteCount(bytes.next_multiple_of(PAGE_SIZE) as u64))?;
        let table = Self { memory: locked(&file)?, file, secret, segments };
        let mut pair = [0; size_of::<u64>()];
        // As many bytes as these come at once, or not at all.
        let random = |bytes: &mut [u8]| getrandom(bytes, GetRandomFlags::empty()).map(drop);
        let made = random(&mut pair).and_then(|()| {
            Key::fill(random, |place, word| table.key_words()[place].store(word, Ordering::Relaxed))
        });
        made.map_err(|errno| TableError::Random(errno.into()))?;
        let pair = u64::from_le_bytes(pair) | 1;
        table.pair().store(pair, Ordering::Relaxed);
        table.word(PAIR).store(pair, Ordering::Relaxed);
        let version = if table.secret.is_some() { WITHOUT_KEY } else { WITH_KEY };
        table.word(NEXT).store(1, Ordering::Relaxed);
        table.word(SHAPE).store(u64::from(version) | u64::from(segments) << 32, Ordering::Relaxed);
        table.word(0).store(MAGIC, Ordering::Release);
        Ok(table)
    }

    /// That of an earlier manager, and the page that has its key if there was one.
    pub(super) fn inherit(file: OwnedFd, secret: Option<OwnedFd>) -> Result<Self, TableError> {
        let file = Memfd::try_from(file)?;
        let memory = locked(&file)?;
        let word = |at: usize| memory.as_atomic_u64s().get(at).map_or(0, |word| word.load(Ordering::Acquire));
        let (magic, shape) = (word(0), word(SHAPE));
        let segments = u32::try_from(shape >> 32).unwrap_or(0);
        let room = memory.as_atomic_u64s().len().saturating_sub(SEGMENTS);
        let version = u32::try_from(shape & u64::from(u32::MAX)).unwrap_or(0);
        if magic != MAGIC || ![WITH_KEY, WITHOUT_KEY].contains(&version) || room < segments as usize {
            return Err(TableError::Unknown { magic, shape });
        }
        let secret = secret.filter(|_| version == WITHOUT_KEY).map(SecretPage::inherit).transpose();
        let secret = secret.map_err(|error| TableError::NoKey(Some(error)))?;
        let is_there = version == WITH_KEY || secret.is_some();
        let table = Self { file, memory, secret, segments };
        let is_its = version == WITH_KEY
            || table.pair().load(Ordering::Relaxed) == table.word(PAIR).load(Ordering::Relaxed);
        if is_there && is_its { Ok(table) } else { Err(TableError::NoKey(None)) }
    }

    /// For whoever keeps copies for the next manager: the table, and the page that has the key, if it is not in the table.
    pub(super) fn keepsakes(&self) -> (BorrowedFd<'_>, Option<BorrowedFd<'_>>) {
        (self.file.as_fd(), self.secret.as_ref().map(SecretPage::keepsake))
    }

    pub(super) const fn segments(&self) -> u32 {
        self.segments
    }

    /// Does something with the key; `None` once the tier is over.
    pub(super) fn with_key<T>(&self, work: impl FnOnce(&Key) -> T) -> Option<T> {
        let is_known = || self.word(0).load(Ordering::SeqCst) == MAGIC;
        if !is_known() {
            return None;
        }
        // Looked at again when the key was taken: it may have been zeroed meanwhile.
        Key::with(|place| self.key_words()[place].load(Ordering::SeqCst), |key| is_known().then(|| work(key)))
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
        self.pair().store(0, Ordering::SeqCst);
        self.key_words().iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    fn key_words(&self) -> &[AtomicU64] {
        match &self.secret {
            Some(secret) => &secret.as_atomic_u64s()[SECRET_KEY..SECRET_KEY + KEY_WORDS],
            None => &self.memory.as_atomic_u64s()[KEY..KEY + KEY_WORDS],
        }
    }

    fn pair(&self) -> &AtomicU64 {
        self.secret.as_ref().map_or_else(|| self.word(PAIR), |secret| &secret.as_atomic_u64s()[SECRET_PAIR])
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

    fn key(table: &Table) -> Option<Vec<u64>> {
        table.with_key(|_| table.key_words().iter().map(|word| word.load(Ordering::Relaxed)).collect())
    }

    fn next(table: &Table) -> Result<Table, TableError> {
        let (file, secret) = table.keepsakes();
        let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        Table::inherit(owned(file), secret.map(owned))
    }

    /// One with its key in secret memory, where the kernel has that, and one with it in the table.
    fn tables(segments: u32) -> [Table; 2] {
        [Table::create(segments).unwrap(), Table::with_key_in(None, segments).unwrap()]
    }

    #[test]
    fn the_next_manager_finds_key_counter_and_segments_and_gives_no_number_again() {
        for table in tables(1000) {
            let given: Vec<u64> = (0..3).map(|_| table.next_sequence()).collect();
            table.set(999, Holds::Sequence(given[2]));
            table.set(0, Holds::Spoilt);
            table.set(7, Holds::Writing(given[1]));
            let next = next(&table).unwrap();
            assert_eq!(next.segments(), 1000);
            assert_eq!(key(&next), key(&table));
            assert_ne!(key(&next), Some(vec![0; KEY_WORDS]));
            assert_eq!([next.holds(999), next.holds(0)], [Holds::Sequence(given[2]), Holds::Spoilt]);
            assert_eq!(next.holds(7), Holds::Writing(given[1]));
            assert_eq!([next.holds(1), next.holds(1000)], [Holds::Nothing; 2]);
            assert!(!given.contains(&next.next_sequence()));
        }
        assert_ne!(key(&Table::create(1).unwrap()), key(&Table::create(1).unwrap()));
    }

    #[test]
    fn a_key_that_was_forgotten_is_given_to_nobody_and_is_nowhere_any_more() {
        for table in tables(10) {
            let other = next(&table).unwrap();
            table.forget();
            assert_eq!([key(&table), key(&other)], [None, None]);
            assert!(table.key_words().iter().all(|word| word.load(Ordering::Relaxed) == 0));
            let first = &table.memory.as_atomic_u64s()[KEY..KEY + KEY_WORDS];
            assert!(first.iter().all(|word| word.load(Ordering::Relaxed) == 0));
            assert!(matches!(next(&table), Err(TableError::Unknown { .. })), "a key of zeros is none");
        }
    }

    #[test]
    fn a_table_goes_on_with_its_own_key_and_with_no_other() {
        let [table, other] = [Table::create(10).unwrap(), Table::create(10).unwrap()];
        let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let (file, secret) = table.keepsakes();
        if secret.is_none() {
            println!("SKIPPED: no secret memory");
            return;
        }
        assert_eq!(table.memory.as_atomic_u64s()[KEY..KEY + KEY_WORDS].len(), KEY_WORDS);
        let in_table = |at| table.word(KEY + at).load(Ordering::Relaxed);
        assert!((0..KEY_WORDS).all(|at| in_table(at) == 0), "it is in one place");
        assert!(matches!(Table::inherit(owned(file), None), Err(TableError::NoKey(None))));
        let others = other.keepsakes().1.map(owned);
        assert!(matches!(Table::inherit(owned(file), others), Err(TableError::NoKey(None))));
        let no_secret = Some(owned(file));
        assert!(matches!(Table::inherit(owned(file), no_secret), Err(TableError::NoKey(Some(_)))));
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let file = Memfd::create("test", ByteCount(PAGE_SIZE as u64 * 2)).unwrap();
        assert!(matches!(Table::inherit(file.into(), None), Err(TableError::Unknown { .. })));
        let table = Table::create(1000).unwrap();
        table.word(SHAPE).store(u64::from(WITH_KEY) | 100_000 << 32, Ordering::Relaxed);
        assert!(
            matches!(next(&table), Err(TableError::Unknown { .. })),
            "more segments than it has room for"
        );
    }
}
