//! What the crate needs from outside: the words of tables, frames for new tables, and forgetting cached translations.
//!
//! Enters: addresses of entries. Leaves: words. What these traits stand for is whoever holds the tables: host memory,
//! guest memory behind a second stage ([`crate::nested`]), an array in a test.
use crate::address::{Level, MAX_LEVELS, Output, Span};
use core::fmt;

/// Words of tables by address.
///
/// Both operations are atomic with respect to processors that walk the tables meanwhile.
pub trait TableMemory {
    /// Why a word cannot be had.
    type Error: Copy + fmt::Debug;

    /// The word at `at`, which is a multiple of eight.
    ///
    /// # Errors
    /// There is no such word, or it must not be read.
    fn read(&self, at: Output) -> Result<u64, Self::Error>;

    /// Writes `new` if the word is `current`, and says what it was: `current` if it was written.
    ///
    /// # Errors
    /// There is no such word, or it must not be written.
    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Self::Error>;
}

/// Frames for tables.
///
/// A frame is as large as a table of its level, aligned to that, and all zero: when it is taken, and again when it is
/// given back. A frame is given back after every translation through it has been forgotten.
pub trait TableFrames {
    /// At least so many more calls of [`take`](Self::take) for `level` will succeed.
    fn left(&self, level: Level) -> usize;

    /// A frame for a table of `level`, or `None` if there is none left.
    fn take(&mut self, level: Level) -> Option<Output>;

    /// Takes back a frame that was taken for a table of `level`.
    fn give(&mut self, level: Level, frame: Output);
}

/// Forgetting what processors keep of translations.
pub trait Invalidate {
    /// When this returns, no processor uses a translation of an address of `span`, nor an entry of a table on the way
    /// there, that it read before the call.
    fn invalidate(&mut self, span: Span);
}

/// Nobody caches anything: tables that no processor walks yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct NothingCached;

impl Invalidate for NothingCached {
    fn invalidate(&mut self, _: Span) {}
}

/// A fixed number of frames for each level, no more than `N`.
#[derive(Clone, Debug)]
pub struct Pools<const N: usize> {
    levels: [Pool<N>; MAX_LEVELS],
}

#[derive(Clone, Copy, Debug)]
struct Pool<const N: usize> {
    frames: [Output; N],
    left: usize,
}

impl<const N: usize> Default for Pools<N> {
    fn default() -> Self {
        Self { levels: [Pool { frames: [Output(0); N], left: 0 }; MAX_LEVELS] }
    }
}

impl<const N: usize> Pools<N> {
    /// Adds a zeroed frame for tables of `level`, and says whether there was room for it.
    pub fn add(&mut self, level: Level, frame: Output) -> bool {
        let Some(pool) = self.levels.get_mut(level.subscript()) else { return false };
        let Some(slot) = pool.frames.get_mut(pool.left) else { return false };
        *slot = frame;
        pool.left += 1;
        true
    }
}

impl<const N: usize> TableFrames for Pools<N> {
    fn left(&self, level: Level) -> usize {
        self.levels.get(level.subscript()).map_or(0, |pool| pool.left)
    }

    fn take(&mut self, level: Level) -> Option<Output> {
        let pool = self.levels.get_mut(level.subscript())?;
        pool.left = pool.left.checked_sub(1)?;
        pool.frames.get(pool.left).copied()
    }

    fn give(&mut self, level: Level, frame: Output) {
        // Frames that came from here have room here. Others are not kept.
        let _ = self.add(level, frame);
    }
}
