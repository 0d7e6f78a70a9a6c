//! A tree of tables of one format, and changes to ranges of it.
//!
//! Enters: ranges of input addresses. Leaves: changed tables, forgotten translations, frames taken and given back. The
//! mapper is the tree's only writer, apart from processors that set accessed and dirty bits: no such bit is ever lost.
//!
//! Each change of a range has two passes. The first only reads: it finds what stands in the way and counts the frames
//! that are needed, so that what fails for want of a frame has changed nothing. The second goes down the tree and
//! touches each table once. The order of writes is such that a processor that walks meanwhile sees the old
//! translation or the new one:
//!
//! 1. a new table is filled before an entry names it;
//! 2. an entry is changed by compare-exchange, and once more from what it has become when a processor set a bit in it;
//! 3. where the format asks for it ([`Format::break_before_make`]), an entry whose sizes change is absent, and its
//!    translations are forgotten, before it says the new thing: a processor that comes by in between faults, and finds
//!    everything in place when it tries again;
//! 4. a table that is dropped is kept on a list, linked through its own first word (which reads as absent), until the range
//!    has been invalidated; only then its frame is given back.
mod change;
mod look;
mod shape;

pub use look::{Clear, Mapping, Touched, Translation};

use crate::address::{Level, MAX_LEVELS, Output, Span};
use crate::entry::{Entry, Leaf, Malformed, Permissions, Table, Unencodable};
use crate::format::{Format, Plains};
use crate::memory::{Invalidate, TableFrames, TableMemory};
use core::fmt;

/// How often an entry may change under our hands: a processor sets accessed, then dirty. Beyond that it is not a processor.
const TRIES: usize = 4;

/// Why a range was not changed, or not looked at. `E` is what the tables' memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError<E> {
    /// The format does not translate all of it, or it does not consist of whole pages: the caller's fault.
    Span(Span),
    /// A table cannot be reached.
    Memory {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Output,
        /// Why.
        error: E,
    },
    /// The hardware refuses an entry.
    Malformed {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Output,
        /// Why.
        reason: Malformed,
    },
    /// Something is mapped there: unmap it first. Nothing has been changed.
    Mapped {
        /// What was to be mapped.
        wanted: Span,
        /// The first leaf that is in the way.
        there: Span,
    },
    /// There are fewer frames than the change takes. Nothing has been changed.
    Exhausted {
        /// What the tables are for.
        level: Level,
        /// How many it takes.
        needed: usize,
        /// How many there are.
        left: usize,
    },
    /// The format has no word for it.
    Unencodable {
        /// The entry's level.
        level: Level,
        /// Why.
        reason: Unencodable,
    },
    /// Somebody else writes this entry.
    Contended {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Output,
    },
}

impl<E: fmt::Debug> fmt::Display for MapError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Span(span) => write!(f, "{span} is not a range of whole pages that these tables translate"),
            Self::Memory { level, at, error } => {
                write!(f, "the entry of {level} at {at} cannot be reached: {error:?}")
            }
            Self::Malformed { level, at, reason } => {
                write!(f, "the entry of {level} at {at} is malformed: {reason}")
            }
            Self::Mapped { wanted, there } => {
                write!(f, "{wanted} cannot be mapped where {there} is mapped already; unmap that first")
            }
            Self::Exhausted { level, needed, left } => {
                write!(
                    f,
                    "{needed} frames for tables of {level} are needed and {left} are left; nothing was changed"
                )
            }
            Self::Unencodable { level, reason } => write!(f, "an entry of {level} cannot say this: {reason}"),
            Self::Contended { level, at } => {
                write!(f, "the entry of {level} at {at} is written by somebody else; tables have one writer")
            }
        }
    }
}

impl<E: fmt::Debug> core::error::Error for MapError<E> {}

/// A root that is not aligned to its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnalignedRoot(pub Output);

impl fmt::Display for UnalignedRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be a root; align it to the root's size", self.0)
    }
}

impl core::error::Error for UnalignedRoot {}

/// The frames a change needs, by level of the table.
type Need = [usize; MAX_LEVELS];

/// One tree of tables, its memory, its supply of frames, and the processors that walk it.
#[derive(Debug)]
pub struct Mapper<'a, F: Format, M, P, I> {
    root: Output,
    caps: F::Caps,
    plains: Plains,
    memory: &'a M,
    frames: &'a mut P,
    caches: &'a mut I,
}

/// The part of a range that one entry translates. Addresses are translated bits only.
#[derive(Clone, Copy)]
struct Slot {
    index: u64,
    first: u64,
    last: u64,
    covered: Covered,
}

impl Slot {
    /// All that the entry of `level` translates.
    fn span<F: Format>(&self, level: Level) -> Option<Span> {
        let shift = F::shift(level);
        Span::new(F::extend(self.first >> shift << shift), 1 << shift)
    }
}

/// Whether a range covers all that an entry translates.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Covered {
    Wholly,
    Partly,
}

/// The entries of one table of `level` that translate `first` to `last`.
fn slots<F: Format>(level: Level, first: u64, last: u64) -> impl Iterator<Item = Slot> {
    let shift = F::shift(level);
    (first >> shift..=last >> shift).map(move |number| slot::<F>(level, number, (first, last)))
}

/// The entry of a table of `level` that translates the block of its size with this number, and its part of a range.
fn slot<F: Format>(level: Level, number: u64, (first, last): (u64, u64)) -> Slot {
    let shift = F::shift(level);
    let (begin, end) = (number << shift, (number << shift) + ((1 << shift) - 1));
    let covered = if first <= begin && end <= last { Covered::Wholly } else { Covered::Partly };
    Slot { index: number & (F::entries(level) - 1), first: first.max(begin), last: last.min(end), covered }
}

/// The level of the table that an entry of `level` names, and which part of `slot`, the entry's, goes through it: less than all where
/// the entry leaves levels out.
fn through<F: Format>(table: &Table, level: Level, slot: &Slot) -> Option<(Level, (u64, u64))> {
    let below = table.leads_to(level)?;
    let skipped = F::INDEX_BITS * u32::from(table.skips);
    let shift = F::shift(level);
    let last = (slot.first >> shift << shift) + ((1 << (shift - skipped)) - 1);
    (slot.first <= last).then_some((below, (slot.first, slot.last.min(last))))
}

/// Tables that nothing names any more and that are still to be invalidated: one list a level.
#[derive(Default)]
struct Dropped([Option<Output>; MAX_LEVELS]);

impl<'a, F: Format, M: TableMemory, P: TableFrames, I: Invalidate> Mapper<'a, F, M, P, I> {
    /// The tree below the table at `root`, for processors with `caps`.
    ///
    /// # Errors
    /// The root is not aligned to its size.
    pub fn new(
        root: Output,
        caps: F::Caps,
        memory: &'a M,
        frames: &'a mut P,
        caches: &'a mut I,
    ) -> Result<Self, UnalignedRoot> {
        if !root.0.is_multiple_of(F::entries(F::root()) << 3) {
            return Err(UnalignedRoot(root));
        }
        let plains = Plains::of::<F>(&caps);
        Ok(Self { root, caps, plains, memory, frames, caches })
    }

    /// The first and last translated bits of `span`, if it is one of whole pages that the format translates.
    fn offsets(span: Span) -> Result<(u64, u64), MapError<M::Error>> {
        let page = (1 << F::PAGE_SHIFT) - 1;
        let (first, last) = (F::offset(span.first()), F::offset(span.last()));
        if F::accepts_span(span) && first & page == 0 && last & page == page {
            Ok((first, last))
        } else {
            Err(MapError::Span(span))
        }
    }

    fn read(&self, level: Level, at: Output) -> Result<u64, MapError<M::Error>> {
        self.memory.read(at).map_err(|error| MapError::Memory { level, at, error })
    }

    /// The word at `at` and what it says.
    fn entry(&self, level: Level, at: Output) -> Result<(u64, Entry), MapError<M::Error>> {
        let raw = self.read(level, at)?;
        Ok((raw, self.decode(level, at, raw)?))
    }

    /// What the word at `at` says.
    fn decode(&self, level: Level, at: Output, raw: u64) -> Result<Entry, MapError<M::Error>> {
        match F::decode(raw, level, &self.caps) {
            Entry::Malformed(reason) => Err(MapError::Malformed { level, at, reason }),
            entry => Ok(entry),
        }
    }

    fn encode(&self, entry: &Entry, level: Level) -> Result<u64, MapError<M::Error>> {
        F::encode(entry, level, &self.caps).map_err(|reason| MapError::Unencodable { level, reason })
    }

    /// The word that names the table at `at`: everything is allowed through it, leaves decide.
    fn table_word(&self, at: Output, level: Level) -> Result<u64, MapError<M::Error>> {
        self.encode(&Entry::Table(new_table::<F>(at)), level)
    }

    /// Changes the word at `at` to what `change` makes of it, and again when it changed meanwhile. Returns the old word.
    fn change(
        &self,
        level: Level,
        at: Output,
        mut change: impl FnMut(u64) -> Result<u64, MapError<M::Error>>,
    ) -> Result<u64, MapError<M::Error>> {
        let mut raw = self.read(level, at)?;
        for _ in 0..TRIES {
            let new = change(raw)?;
            if new == raw {
                return Ok(raw);
            }
            let found = self.exchange(level, at, raw, new)?;
            if found == raw {
                return Ok(raw);
            }
            raw = found;
        }
        Err(MapError::Contended { level, at })
    }

    /// Writes `word` over whatever is at `at`.
    fn write(&self, level: Level, at: Output, word: u64) -> Result<u64, MapError<M::Error>> {
        self.change(level, at, |_| Ok(word))
    }

    /// Writes `word` if there is `raw`, and answers what there was.
    fn exchange(&self, level: Level, at: Output, raw: u64, word: u64) -> Result<u64, MapError<M::Error>> {
        self.memory.compare_exchange(at, raw, word).map_err(|error| MapError::Memory { level, at, error })
    }

    /// Writes `word` over `raw`, or whatever has become of it.
    fn replace(&self, level: Level, at: Output, raw: u64, word: u64) -> Result<(), MapError<M::Error>> {
        if self.exchange(level, at, raw, word)? != raw {
            self.write(level, at, word)?;
        }
        Ok(())
    }

    /// Changes the leaf at `at`. Returns the old one.
    fn change_leaf(
        &self,
        level: Level,
        at: Output,
        mut change: impl FnMut(Leaf) -> Leaf,
    ) -> Result<Leaf, MapError<M::Error>> {
        let mut old = None;
        self.change(level, at, |raw| match F::decode(raw, level, &self.caps) {
            Entry::Leaf(leaf) => {
                old = Some(leaf);
                self.encode(&Entry::Leaf(change(leaf)), level)
            }
            _ => Err(MapError::Contended { level, at }),
        })?;
        old.ok_or(MapError::Contended { level, at })
    }

    /// Refuses a change that needs more frames than there are.
    fn afford(&self, need: &Need) -> Result<(), MapError<M::Error>> {
        for (level, &needed) in (1..).map(Level).zip(need) {
            let left = self.frames.left(level);
            if needed > left {
                return Err(MapError::Exhausted { level, needed, left });
            }
        }
        Ok(())
    }

    fn take(&mut self, level: Level) -> Result<Output, MapError<M::Error>> {
        self.frames.take(level).ok_or(MapError::Exhausted { level, needed: 1, left: 0 })
    }

    fn forget(&mut self, span: Option<Span>) {
        if let Some(span) = span {
            self.caches.invalidate(span);
        }
    }

    /// Puts a table whose words are all zero on the list.
    fn drop_table(
        &self,
        dropped: &mut Dropped,
        level: Level,
        table: Output,
    ) -> Result<(), MapError<M::Error>> {
        if let Some(head) = dropped.0.get_mut(level.subscript()) {
            // Bit 3 tells the address 0 from no address; bits 2:0 are clear, which is absent in every format.
            let next = head.map_or(0, |next| next.0 | 8);
            self.write(level, table, next)?;
            *head = Some(table);
        }
        Ok(())
    }

    /// Has translations of `span` forgotten, and gives back what was dropped.
    fn settle(&mut self, span: Span, dropped: &Dropped) -> Result<(), MapError<M::Error>> {
        self.caches.invalidate(span);
        for (level, &head) in (1..).map(Level).zip(&dropped.0) {
            let mut next = head;
            while let Some(table) = next {
                let word = self.write(level, table, 0)?;
                next = (word != 0).then_some(Output(word & !8));
                self.frames.give(level, table);
            }
        }
        Ok(())
    }
}

/// An entry that names the table at `at` and forbids nothing.
fn new_table<F: Format>(at: Output) -> Table {
    Table::new(at, Permissions::all(), F::TABLE_MEMORY)
}
