//! What a translation takes and what it gives, and where in a tree of tables one is.
//!
//! Every stage of translation has the same shape, so addresses are named by their side of it and not by what they
//! mean: a guest physical address is the output of the guest's stage and the input of its host's.
use core::fmt;
use plimsoll_types::Gpa;

/// An address before a stage of translation, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Input(pub u64);

/// An address after a stage of translation, in bytes; the tables of the stage are at such addresses too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Output(pub u64);

impl Output {
    /// What the next stage takes.
    pub const fn as_input(self) -> Input {
        Input(self.0)
    }
}

impl From<Gpa> for Input {
    fn from(gpa: Gpa) -> Self {
        Self(gpa.0)
    }
}

impl From<Gpa> for Output {
    fn from(gpa: Gpa) -> Self {
        Self(gpa.0)
    }
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "in:{:#x}", self.0)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "out:{:#x}", self.0)
    }
}

/// Where the entry of a table is that has this index. Tables are aligned to their size, so that this does not overflow.
pub(crate) const fn entry_at(table: Output, index: u64) -> Output {
    Output(table.0 | index << 3)
}

/// A level of tables, counted from the leaves: entries of level 1 map pages. The root has the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(pub u8);

/// The most levels a format of this crate has.
pub const MAX_LEVELS: usize = 5;

impl Level {
    /// Where the pages are mapped.
    pub const PAGES: Self = Self(1);

    /// The level as a subscript, 0 for [`Level::PAGES`].
    pub const fn subscript(self) -> usize {
        self.0.saturating_sub(1) as usize
    }

    /// The next level towards the leaves, or `None` at [`Level::PAGES`].
    pub const fn below(self) -> Option<Self> {
        if self.0 > 1 { Some(Self(self.0 - 1)) } else { None }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {}", self.0)
    }
}

/// A non-empty run of input addresses, both ends included, so that it can reach the end of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    first: Input,
    last: Input,
}

impl Span {
    /// The `bytes` from `first` on; `None` when there are none or they do not fit in 64 bits.
    pub const fn new(first: Input, bytes: u64) -> Option<Self> {
        if bytes == 0 {
            return None;
        }
        match first.0.checked_add(bytes - 1) {
            Some(last) => Some(Self { first, last: Input(last) }),
            None => None,
        }
    }

    /// One address.
    pub const fn one(input: Input) -> Self {
        Self { first: input, last: input }
    }

    /// The first address.
    pub const fn first(self) -> Input {
        self.first
    }

    /// The last address.
    pub const fn last(self) -> Input {
        self.last
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {:#x}", self.first, self.last.0)
    }
}
