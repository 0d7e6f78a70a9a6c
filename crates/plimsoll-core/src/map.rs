//! All page words of one machine, and how many pages are in each state.
//!
//! Enters: transitions of pages. Leaves: what the page was before, so that the caller can release what the old word
//! named. The words live in memory given by the host, which outlives this value: dropping it loses only the counts.
//! The counts always add up to the number of pages; [`PageMap::audit`] recounts.
//!
//! Words are changed by compare-and-swap. One thread changes a machine's words at a time; the swap still has to
//! succeed against the word that was examined, so a second writer shows as [`MapError::Contended`], not as a lost
//! update.
use crate::word::{IllegalTransition, PageState, PageWord, StateKind, Transition};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use plimsoll_types::{PageCount, PageIndex};

/// Memory that holds page words and outlives the manager.
pub trait Words {
    /// One word per page, always the same ones.
    fn words(&self) -> &[AtomicU64];
}

impl Words for [AtomicU64] {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

impl<T: Words + ?Sized> Words for &T {
    fn words(&self) -> &[AtomicU64] {
        T::words(self)
    }
}

impl<T: Words + ?Sized> Words for alloc::sync::Arc<T> {
    fn words(&self) -> &[AtomicU64] {
        T::words(self)
    }
}

/// Page words on the heap, for hosts whose manager never restarts: tests, the model checker, the simulator.
#[derive(Debug)]
pub struct HeapWords(Vec<AtomicU64>);

impl HeapWords {
    /// `pages` words, all [`PageState::Zero`].
    pub fn new(pages: usize) -> Self {
        Self((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    fn snapshot(&self) -> impl Iterator<Item = u64> {
        self.0.iter().map(|word| word.load(Ordering::Relaxed))
    }
}

impl Words for HeapWords {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

impl Clone for HeapWords {
    fn clone(&self) -> Self {
        Self(self.snapshot().map(AtomicU64::new).collect())
    }
}

impl PartialEq for HeapWords {
    fn eq(&self, other: &Self) -> bool {
        self.snapshot().eq(other.snapshot())
    }
}

impl Eq for HeapWords {}

impl core::hash::Hash for HeapWords {
    fn hash<H: core::hash::Hasher>(&self, hasher: &mut H) {
        self.snapshot().for_each(|word| word.hash(hasher));
    }
}

/// How many pages are in each state: of a machine, or of a part of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Census([u32; StateKind::ALL.len()]);

impl Census {
    /// Pages in `kind`.
    pub fn of(&self, kind: StateKind) -> PageCount {
        PageCount(u64::from(self.0[kind as usize]))
    }

    /// Pages that may take guest RAM: those whose bytes are there, and those that the kernel may have put there unseen.
    pub fn in_ram(&self) -> PageCount {
        [StateKind::Resident, StateKind::Pinned, StateKind::NeverPage, StateKind::Unwatched]
            .map(|kind| self.of(kind))
            .into_iter()
            .sum()
    }

    /// Pages in all states: the machine's size.
    pub fn total(&self) -> PageCount {
        StateKind::ALL.map(|kind| self.of(kind)).into_iter().sum()
    }

    fn count(words: &[AtomicU64]) -> Result<Self, MapError> {
        let mut census = Self::default();
        for (page, word) in (0..).map(PageIndex).zip(words) {
            let word = PageWord(word.load(Ordering::Acquire));
            let state = word.state().ok_or(MapError::Damaged { page, word })?;
            census.0[state.kind() as usize] += 1;
        }
        Ok(census)
    }
}

impl core::ops::AddAssign for Census {
    /// Of another part of the same machine: together they have no more pages than a layout may.
    fn add_assign(&mut self, other: Self) {
        for (sum, pages) in self.0.iter_mut().zip(other.0) {
            *sum += pages;
        }
    }
}

/// Why a page's word was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// The page is past the machine's last one.
    NoSuchPage {
        /// The page asked for.
        page: PageIndex,
    },
    /// The state does not allow it: a bug of the caller.
    Illegal {
        /// The page.
        page: PageIndex,
        /// What was refused.
        refusal: IllegalTransition,
    },
    /// Somebody else changed the word at the same moment: a bug, since a machine has one writer.
    Contended {
        /// The page.
        page: PageIndex,
    },
    /// The word is not one any transition writes: memory was damaged.
    Damaged {
        /// The page.
        page: PageIndex,
        /// What stands there.
        word: PageWord,
    },
    /// The counts differ from a recount of the words.
    Miscounted {
        /// The first state of which they differ.
        kind: StateKind,
        /// What was kept.
        kept: PageCount,
        /// What was counted.
        counted: PageCount,
    },
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchPage { page } => write!(f, "the machine has no {page}"),
            Self::Illegal { page, refusal } => write!(f, "{page}: {refusal}"),
            Self::Contended { page } => write!(f, "{page} was changed by a second writer"),
            Self::Damaged { page, word } => write!(f, "the word of {page} is damaged: {:#x}", word.0),
            Self::Miscounted { kind, kept, counted } => {
                write!(f, "{} pages are counted as {kept}, and the words say {counted}", kind.name())
            }
        }
    }
}

impl core::error::Error for MapError {}

/// The words of one machine with their census.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageMap<W> {
    words: W,
    census: Census,
}

impl<W: Words> PageMap<W> {
    /// Adopts the words as they stand, counting them.
    ///
    /// # Errors
    /// [`MapError::Damaged`] for a word that no transition writes.
    pub fn adopt(words: W) -> Result<Self, MapError> {
        let census = Census::count(words.words())?;
        Ok(Self { words, census })
    }

    /// How many pages are in each state.
    pub fn census(&self) -> &Census {
        &self.census
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.words.words().len()
    }

    /// True for a machine without pages.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A page's state.
    ///
    /// # Errors
    /// [`MapError::NoSuchPage`], [`MapError::Damaged`].
    #[inline]
    pub fn state(&self, page: PageIndex) -> Result<PageState, MapError> {
        let word = self.words.words().get(page.get()).ok_or(MapError::NoSuchPage { page })?;
        let word = PageWord(word.load(Ordering::Acquire));
        word.state().ok_or(MapError::Damaged { page, word })
    }

    /// Changes a page's word and returns the state it had.
    ///
    /// # Errors
    /// [`MapError::Illegal`] and the other kinds; the word is then unchanged.
    #[inline]
    pub fn apply(&mut self, page: PageIndex, transition: Transition) -> Result<PageState, MapError> {
        let slot = self.words.words().get(page.get()).ok_or(MapError::NoSuchPage { page })?;
        let found = PageWord(slot.load(Ordering::Acquire));
        let before = found.state().ok_or(MapError::Damaged { page, word: found })?;
        let next = found.after(transition).map_err(|refusal| MapError::Illegal { page, refusal })?;
        let after = next.state().ok_or(MapError::Damaged { page, word: next })?;
        slot.compare_exchange(found.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            .map_err(|_| MapError::Contended { page })?;
        self.census.0[before.kind() as usize] -= 1;
        self.census.0[after.kind() as usize] += 1;
        Ok(before)
    }

    /// Writes a state found by looking at the memory itself, whatever the word said: recovery only.
    pub(crate) fn overwrite(&mut self, page: PageIndex, state: PageState) -> Result<(), MapError> {
        let before = self.state(page)?;
        self.words.words()[page.get()].store(PageWord::new(state).0, Ordering::Release);
        self.census.0[before.kind() as usize] -= 1;
        self.census.0[state.kind() as usize] += 1;
        Ok(())
    }

    /// Recounts the words and compares.
    ///
    /// # Errors
    /// [`MapError::Miscounted`] or [`MapError::Damaged`].
    pub fn audit(&self) -> Result<(), MapError> {
        let counted = Census::count(self.words.words())?;
        let differs = |kind: &StateKind| self.census.of(*kind) != counted.of(*kind);
        match StateKind::ALL.into_iter().find(differs) {
            None => Ok(()),
            Some(kind) => {
                let (kept, counted) = (self.census.of(kind), counted.of(kind));
                Err(MapError::Miscounted { kind, kept, counted })
            }
        }
    }
}
