//! The formats: one zero-sized type each, and what a processor may lack as a value beside it.
//!
//! Enters: the word of an entry, its level, and the processor's capabilities. Leaves: an [`Entry`], or the word again.
//! Nothing here reads memory, and nothing depends on the processor this is compiled for.
pub mod amdvi;
pub mod arm;
pub mod ept;
mod plain;
pub mod riscv;
pub mod vtd;
pub mod x86;

use crate::address::{Input, Level, MAX_LEVELS, Output, Span};
use crate::entry::{Entry, Leaf, Memory, Permissions, Table, Unencodable};
use crate::walk::Access;
use core::fmt;
pub use plain::{Bits, Plain, Words};
pub(crate) use plain::{Plains, Row};

/// Whether a feature is there and switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// It is.
    On,
    /// It is not.
    Off,
}

/// What the bits of an input address above those that are translated must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Copies of the highest translated bit.
    Sign,
    /// Zero.
    Zero,
    /// One.
    Ones,
}

/// A format of page tables, whose entries are words of eight bytes.
///
/// In every format zero is absent, and so is any word whose three lowest bits are clear: what a dropped table holds until
/// nobody can walk it any more. A word that names a table and leaves levels out names the same one in a table of the first level it
/// leaves out.
pub trait Format: Copy + fmt::Debug + 'static {
    /// What differs from processor to processor.
    type Caps: Copy + fmt::Debug;
    /// What people call it.
    const NAME: &'static str;
    /// Levels of tables.
    const LEVELS: u8;
    /// log2 of the bytes of a page.
    const PAGE_SHIFT: u32 = 12;
    /// log2 of a table's entries.
    const INDEX_BITS: u32 = 9;
    /// log2 of the root's entries: more than of other tables where roots are joined, fewer where addresses end.
    const ROOT_BITS: u32 = Self::INDEX_BITS;
    /// What is above the translated bits.
    const EXTENSION: Extension;
    /// How tables are read, where the entry that names one says so.
    const TABLE_MEMORY: Memory = Memory::Physical;
    /// Where the address is in a plain word, down to the bits of a page.
    const ADDRESS: u64 = 0;
    /// How many bits lower it is there than it is as an address.
    const ADDRESS_DOWN: u32 = 0;
    /// Bits of an input address that are translated.
    const INPUT_BITS: u32 = {
        let bits = Self::PAGE_SHIFT + Self::INDEX_BITS * (Self::LEVELS as u32 - 1) + Self::ROOT_BITS;
        assert!(bits < 64, "a format translates less than 64 bits");
        assert!(Self::LEVELS >= 1 && Self::LEVELS as usize <= MAX_LEVELS, "one to five levels");
        bits
    };

    /// What `raw` says in a table of `level`.
    fn decode(raw: u64, level: Level, caps: &Self::Caps) -> Entry;

    /// The words of `level` that a walk need not decode; none in a format that does not say.
    fn plain(_: Level, _: &Self::Caps) -> Plain {
        Plain::NONE
    }

    /// What plain words that name tables permit together.
    fn through(_: Words) -> Permissions {
        Permissions::all()
    }

    /// What they and a plain word that maps memory permit together: the same bits of it, unless the format says otherwise. Where it leads
    /// ([`ADDRESS`](Self::ADDRESS)) has no say.
    fn permits(tables: Words, leaf: u64, _: &Self::Caps) -> Permissions {
        Self::through(tables.and(leaf))
    }

    /// The word that says `entry` in a table of `level`.
    ///
    /// # Errors
    /// What the format or the processor cannot say.
    fn encode(entry: &Entry, level: Level, caps: &Self::Caps) -> Result<u64, Unencodable>;

    /// What hardware makes of `raw`, an entry of `level` that names a table or maps memory, after `access` went through it: accessed,
    /// and if it maps memory, dirty after a write, as far as the entry keeps that.
    ///
    /// Where hardware passes over bits that [`encode`](Self::encode) does not write, a format says itself what becomes of them.
    fn marked(raw: u64, level: Level, caps: &Self::Caps, access: Access) -> u64 {
        let entry = match Self::decode(raw, level, caps) {
            Entry::Table(table) => Entry::Table(Table { accessed: true, ..table }),
            Entry::Leaf(leaf) => {
                Entry::Leaf(Leaf { accessed: true, dirty: leaf.dirty || access == Access::Write, ..leaf })
            }
            other => other,
        };
        // A format that has no such bit in this entry says so, and there is nothing to set.
        Self::encode(&entry, level, caps).unwrap_or(raw)
    }

    /// The highest level whose entries may map memory.
    fn largest_leaf(caps: &Self::Caps) -> Level;

    /// Whether an entry that is mapped by other sizes, or to other memory, has to be absent and forgotten in between (Arm).
    fn break_before_make(_: &Self::Caps) -> bool {
        false
    }

    /// How much more the word of a leaf of `level` by itself is when it maps the memory behind: the same everywhere in the output.
    fn step(level: Level) -> u64 {
        1 << Self::shift(level)
    }

    /// The root's level.
    fn root() -> Level {
        Level(Self::LEVELS)
    }

    /// log2 of the bytes that an entry of `level` covers.
    fn shift(level: Level) -> u32 {
        Self::PAGE_SHIFT + Self::INDEX_BITS * u32::from(level.0.saturating_sub(1))
    }

    /// Whether `input` goes through `table`, which an entry of `level` names: where levels are left out, all bits of them must be
    /// zero.
    fn passes(input: Input, level: Level, table: &Table) -> bool {
        let skipped = Self::INDEX_BITS * u32::from(table.skips);
        let bits = Self::shift(level).saturating_sub(skipped);
        skipped == 0 || (Self::offset(input) & ((1 << Self::shift(level)) - 1)) >> bits == 0
    }

    /// Entries of a table of `level`.
    fn entries(level: Level) -> u64 {
        1 << if level == Self::root() { Self::ROOT_BITS } else { Self::INDEX_BITS }
    }

    /// Which entry of a table of `level` translates `input`.
    fn index(input: Input, level: Level) -> u64 {
        (Self::offset(input) >> Self::shift(level)) & (Self::entries(level) - 1)
    }

    /// The translated bits alone.
    fn offset(input: Input) -> u64 {
        input.0 & ((1 << Self::INPUT_BITS) - 1)
    }

    /// The input address with these translated bits.
    fn extend(offset: u64) -> Input {
        let ones = match Self::EXTENSION {
            Extension::Sign => offset >> (Self::INPUT_BITS - 1) & 1 == 1,
            Extension::Zero => false,
            Extension::Ones => true,
        };
        Input(if ones { offset | (u64::MAX << Self::INPUT_BITS) } else { offset })
    }

    /// Whether the format translates `input` at all (x86-64: it is canonical).
    fn accepts(input: Input) -> bool {
        let above = input.0 >> Self::INPUT_BITS;
        match Self::EXTENSION {
            // From the middle on, the addresses that are translated are one run that begins at zero.
            Extension::Sign => input.0.wrapping_add(1 << (Self::INPUT_BITS - 1)) >> Self::INPUT_BITS == 0,
            Extension::Zero => above == 0,
            Extension::Ones => above == u64::MAX >> Self::INPUT_BITS,
        }
    }

    /// Whether every address of `span` is translated.
    fn accepts_span(span: Span) -> bool {
        let (first, last) = (span.first(), span.last());
        Self::accepts(first)
            && Self::accepts(last)
            && last.0 - first.0 < 1 << Self::INPUT_BITS
            && first.0 >> 63 == last.0 >> 63
    }
}

/// Whose accesses a tree translates.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Of whoever runs.
    First,
    /// A guest's, and those to its tables.
    Second,
}

/// A field of at most eight bits as a number.
pub(crate) const fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

const fn set(condition: bool, bit: u64) -> u64 {
    if condition { bit } else { 0 }
}

/// `kept`, if it has only bits that are software's.
fn software(kept: u64, its: u64) -> Result<u64, Unencodable> {
    match kept & !its {
        0 => Ok(kept),
        foreign => Err(Unencodable::Software(foreign)),
    }
}

/// Whether an entry of `level` can name the table that `table` does, where no level can be left out.
const fn names_next(table: &Table, level: Level) -> Result<(), Unencodable> {
    match (level, table.skips) {
        (Level::PAGES, _) => Err(Unencodable::Kind),
        (_, 0) => Ok(()),
        (_, skips) => Err(Unencodable::Skips(skips)),
    }
}

/// What of an address is beyond so many `bits`.
const fn beyond(address: u64, bits: u32) -> u64 {
    match address.checked_shr(bits) {
        Some(above) => above << bits,
        None => 0,
    }
}

/// The address `at`, if it has only these bits: it is aligned, and not beyond physical memory.
fn aligned(at: Output, bits: u64) -> Result<u64, Unencodable> {
    if at.0 & !bits == 0 { Ok(at.0) } else { Err(Unencodable::Address(at)) }
}

/// A field of `bits` bits from bit `low` on.
pub(crate) const fn field(low: u32, bits: u32) -> u64 {
    ((1 << bits) - 1) << low
}
