//! RISC-V Sv39, Sv48 and Sv57, and the second stages Sv39x4, Sv48x4 and Sv57x4.
//!
//! The RISC-V Instruction Set Manual, volume II: "Sv39: Page-Based 39-bit Virtual-Memory System" (format), "Virtual
//! Address Translation Process" (what faults), "Svnapot", "Svpbmt", and "Two-Stage Address Translation" of the H extension.
//!
//! ```text
//! bit  63  62..61  60..54  53..10  9..8  7  6  5  4  3  2  1  0
//!      N   PBMT    0       PPN     RSW   D  A  G  U  X  W  R  V    a leaf
//!      0   0       0       PPN     RSW   0  0  G  0  0  0  0  V    a table
//! ```
//!
//! Whether the processor sets A and D (Svadu) or faults so that software does (Svade) is not the format's concern: a
//! leaf with A clear, or written with D clear, is well-formed either way.
use crate::address::{Level, Output};
use crate::entry::{Entry, Leaf, Malformed, Memory, Permissions, Table, Unencodable};
use crate::format::{
    Bits, Extension, Feature, Format, Plain, Stage, Words, aligned, field, low_byte, names_next, set,
    software,
};

const VALID: u64 = 1;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const GLOBAL: u64 = 1 << 5;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
const SOFTWARE: u64 = field(8, 2);
const PPN_SHIFT: u32 = 10;
const PPN: u64 = field(PPN_SHIFT, 44);
/// Zero until an extension says otherwise; set, they fault.
const RESERVED: u64 = field(54, 7);
const PBMT_SHIFT: u32 = 61;
const PBMT: u64 = field(PBMT_SHIFT, 2);
const NAPOT: u64 = 1 << 63;
/// Svnapot has one size: 64 KiB, said by these low bits of the PPN.
const NAPOT_SHIFT: u32 = 16;
const NAPOT_PPN: u64 = 0b1000;
const NAPOT_FIELD: u64 = field(PPN_SHIFT, NAPOT_SHIFT - 12);
/// How far bits of the PPN stand from those of the address.
const DOWN: u32 = 12 - PPN_SHIFT;

/// Which extensions a hart has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Svnapot: sixteen pages as one.
    pub napot: Feature,
    /// Svpbmt, and menvcfg or henvcfg switch it on: memory types.
    pub memory_types: Feature,
}

impl Caps {
    /// A hart with both.
    pub const FULL: Self = Self { napot: Feature::On, memory_types: Feature::On };
}

macro_rules! sv {
    ($(#[$doc:meta])* $name:ident, $text:literal, $levels:literal, $root:literal, $extension:ident, $stage:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl Format for $name {
            type Caps = Caps;
            const NAME: &'static str = $text;
            const LEVELS: u8 = $levels;
            const ROOT_BITS: u32 = $root;
            const EXTENSION: Extension = Extension::$extension;
            const ADDRESS: u64 = PPN;
            const ADDRESS_DOWN: u32 = DOWN;

            #[inline]
            fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
                decode(raw, level, caps)
            }

            /// Readable if it maps memory, by itself, of no memory type.
            #[inline]
            fn plain(level: Level, _: &Caps) -> Plain {
                let extended = RESERVED | PBMT | NAPOT;
                let table = match level {
                    Level::PAGES => Bits::NONE,
                    _ => Bits::new(VALID, extended | READ | WRITE | EXECUTE | USER | ACCESSED | DIRTY),
                };
                let leaf = Bits::new(VALID | READ, extended | unaligned(level));
                Plain { table, leaf }
            }

            #[inline]
            fn permits(_: Words, leaf: u64, _: &Caps) -> Permissions {
                permissions(leaf)
            }

            fn encode(entry: &Entry, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
                encode(entry, level, caps, Stage::$stage)
            }

            fn step(level: Level) -> u64 {
                1 << (Self::shift(level) - 2)
            }

            fn largest_leaf(_: &Caps) -> Level {
                Self::root()
            }
        }
    };
}

sv!(
    /// Three levels, 39-bit virtual addresses.
    Sv39, "RISC-V Sv39", 3, 9, Sign, First
);
sv!(
    /// Four levels, 48-bit virtual addresses.
    Sv48, "RISC-V Sv48", 4, 9, Sign, First
);
sv!(
    /// Five levels, 57-bit virtual addresses.
    Sv57, "RISC-V Sv57", 5, 9, Sign, First
);
sv!(
    /// The second stage with three levels: 41-bit guest physical addresses, a root of 16 KiB.
    Sv39x4, "RISC-V Sv39x4", 3, 11, Zero, Second
);
sv!(
    /// The second stage with four levels: 50-bit guest physical addresses, a root of 16 KiB.
    Sv48x4, "RISC-V Sv48x4", 4, 11, Zero, Second
);
sv!(
    /// The second stage with five levels: 59-bit guest physical addresses, a root of 16 KiB.
    Sv57x4, "RISC-V Sv57x4", 5, 11, Zero, Second
);

/// A superpage that is not aligned to its size faults like reserved bits: step 5 of the translation process.
fn unaligned(level: Level) -> u64 {
    field(PPN_SHIFT, Sv39::shift(level) - 12)
}

#[inline]
fn permissions(raw: u64) -> Permissions {
    let mut permissions = Permissions::empty();
    permissions.set(Permissions::READ, raw & READ != 0);
    permissions.set(Permissions::WRITE, raw & WRITE != 0);
    permissions.set(Permissions::EXECUTE, raw & EXECUTE != 0);
    permissions.set(Permissions::USER, raw & USER != 0);
    permissions
}

#[inline]
fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
    if raw & VALID == 0 {
        return Entry::Absent { software: raw };
    }
    if raw & (READ | WRITE) == WRITE {
        return Entry::Malformed(Malformed::WriteWithoutRead);
    }
    let address = (raw & PPN) << DOWN;
    if raw & (READ | WRITE | EXECUTE) == 0 {
        let reserved = raw & (RESERVED | PBMT | NAPOT | DIRTY | ACCESSED | USER);
        return match level {
            _ if reserved != 0 => Entry::Malformed(Malformed::Reserved(reserved)),
            Level::PAGES => Entry::Malformed(Malformed::TableAtLastLevel),
            _ => Entry::Table(Table {
                global: raw & GLOBAL != 0,
                software: raw & SOFTWARE,
                ..Table::new(Output(address), Permissions::all(), Memory::Physical)
            }),
        };
    }
    let mut reserved = RESERVED;
    if caps.memory_types == Feature::Off {
        reserved |= PBMT;
    }
    if caps.napot == Feature::Off || level != Level::PAGES {
        reserved |= NAPOT;
    }
    let shift = Sv39::shift(level);
    reserved |= unaligned(level);
    if raw & reserved != 0 {
        return Entry::Malformed(Malformed::Reserved(raw & reserved));
    }
    let memory = match (raw & PBMT) >> PBMT_SHIFT {
        0 => Memory::Physical,
        1 => Memory::NonCacheable,
        2 => Memory::Io,
        number => return Entry::Malformed(Malformed::MemoryType(low_byte(number))),
    };
    let permissions = permissions(raw);
    let (output, shift) = match raw & NAPOT {
        0 => (address, shift),
        _ if raw & NAPOT_FIELD == NAPOT_PPN << PPN_SHIFT => (address & !field(0, NAPOT_SHIFT), NAPOT_SHIFT),
        _ => return Entry::Malformed(Malformed::Reserved(raw & NAPOT_FIELD | NAPOT)),
    };
    Entry::Leaf(Leaf {
        accessed: raw & ACCESSED != 0,
        dirty: raw & DIRTY != 0,
        global: raw & GLOBAL != 0,
        software: raw & SOFTWARE,
        ..Leaf::new(Output(output), shift, permissions, memory)
    })
}

/// The address as the PPN's bits, if it has no others and is aligned to `shift`.
fn ppn(at: Output, shift: u32) -> Result<u64, Unencodable> {
    aligned(at, (PPN << DOWN) & !field(0, shift)).map(|at| at >> DOWN)
}

fn encode(entry: &Entry, level: Level, caps: &Caps, stage: Stage) -> Result<u64, Unencodable> {
    match *entry {
        Entry::Absent { software: word } => software(word, !VALID),
        Entry::Table(table) => encode_table(&table, level),
        Entry::Leaf(leaf) => encode_leaf(&leaf, level, caps, stage),
        Entry::Malformed(_) => Err(Unencodable::Kind),
    }
}

fn encode_table(table: &Table, level: Level) -> Result<u64, Unencodable> {
    names_next(table, level)?;
    if table.permissions != Permissions::all() {
        return Err(Unencodable::Permissions(table.permissions));
    }
    if table.memory != Memory::Physical {
        return Err(Unencodable::Memory(table.memory));
    }
    if table.accessed {
        return Err(Unencodable::Flag);
    }
    let software = software(table.software, SOFTWARE)?;
    Ok(VALID | ppn(table.at, 12)? | set(table.global, GLOBAL) | software)
}

fn encode_leaf(leaf: &Leaf, level: Level, caps: &Caps, stage: Stage) -> Result<u64, Unencodable> {
    let napot = match leaf.shift {
        shift if shift == Sv39::shift(level) => 0,
        NAPOT_SHIFT if level == Level::PAGES && caps.napot == Feature::On => NAPOT | NAPOT_PPN << PPN_SHIFT,
        shift => return Err(Unencodable::Size { shift }),
    };
    let can = |permission| leaf.permissions.contains(permission);
    // In the second stage all accesses count as a user's: a leaf without U would serve nobody, and is not written.
    let possible = can(Permissions::READ) || (can(Permissions::EXECUTE) && !can(Permissions::WRITE));
    if !possible || leaf.permissions.execute_differs() || (stage == Stage::Second && !can(Permissions::USER))
    {
        return Err(Unencodable::Permissions(leaf.permissions));
    }
    let pbmt = match leaf.memory {
        Memory::Physical => 0,
        Memory::NonCacheable if caps.memory_types == Feature::On => 1,
        Memory::Io if caps.memory_types == Feature::On => 2,
        other => return Err(Unencodable::Memory(other)),
    };
    if leaf.key != 0 {
        return Err(Unencodable::Key(leaf.key));
    }
    let software = software(leaf.software, SOFTWARE)?;
    Ok(VALID
        | set(can(Permissions::READ), READ)
        | set(can(Permissions::WRITE), WRITE)
        | set(can(Permissions::EXECUTE), EXECUTE)
        | set(can(Permissions::USER), USER)
        | set(leaf.global, GLOBAL)
        | set(leaf.accessed, ACCESSED)
        | set(leaf.dirty, DIRTY)
        | software
        | ppn(leaf.output, leaf.shift)?
        | pbmt << PBMT_SHIFT
        | napot)
}
