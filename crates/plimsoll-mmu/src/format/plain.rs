//! Plain words: those of most entries, which a walk tells from all others by one mask and takes as they are.
//!
//! Enters: a format's level and the processor's capabilities. Leaves: which bits of a word have to be what for it to name the table of
//! the level below, or to map a page of the level's size, with nothing reserved set and nothing else to be looked at. What must never
//! happen: a word that fits and is something else by [`Format::decode`]. One that fits nothing is decoded: time is lost, and no more.
use crate::address::{Level, MAX_LEVELS};
use crate::format::Format;

/// Some bits of a word, and what they have to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits {
    mask: u64,
    value: u64,
}

impl Bits {
    /// No word fits.
    pub const NONE: Self = Self { mask: 0, value: 1 };

    /// All of `set` are set and all of `clear` are clear.
    pub const fn new(set: u64, clear: u64) -> Self {
        if set & clear == 0 { Self { mask: set | clear, value: set } } else { Self::NONE }
    }

    /// Whether `word` has them.
    pub const fn fits(self, word: u64) -> bool {
        word & self.mask == self.value
    }
}

/// The plain words of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plain {
    /// Those that name a table.
    pub table: Bits,
    /// Those that map memory.
    pub leaf: Bits,
}

impl Plain {
    /// There are none.
    pub const NONE: Self = Self { table: Bits::NONE, leaf: Bits::NONE };
}

/// A level, as walks need it: its plain words, and log2 of what an entry covers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) plain: Plain,
    pub(crate) shift: u32,
}

impl Row {
    const NONE: Self = Self { plain: Plain::NONE, shift: 0 };

    #[inline(always)]
    pub(crate) fn of<F: Format>(level: Level, caps: &F::Caps) -> Self {
        Self { plain: F::plain(level, caps), shift: F::shift(level) }
    }
}

/// The levels of a format, for one processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plains([Row; MAX_LEVELS]);

impl Plains {
    #[inline(always)]
    pub(crate) fn of<F: Format>(caps: &F::Caps) -> Self {
        let mut plains = Self([Row::NONE; MAX_LEVELS]);
        for level in (1..=F::LEVELS).map(Level) {
            if let Some(place) = plains.0.get_mut(level.subscript()) {
                *place = Row::of::<F>(level, caps);
            }
        }
        plains
    }

    #[inline(always)]
    pub(crate) fn at(&self, level: Level) -> Row {
        self.0.get(level.subscript()).copied().unwrap_or(Row::NONE)
    }
}

/// What a walk keeps of the plain words that it went through: what they have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    /// Bits that all have.
    pub all: u64,
    /// Bits that one has, or more.
    pub any: u64,
}

impl Words {
    /// Of no word.
    pub const NONE: Self = Self { all: u64::MAX, any: 0 };

    /// These and `word`.
    #[must_use]
    pub const fn and(self, word: u64) -> Self {
        Self { all: self.all & word, any: self.any | word }
    }
}
