//! Intel's extended page tables.
//!
//! Intel SDM vol. 3, "The Extended Page Table Mechanism (EPT)": "EPT Translation Mechanism" (the formats), "EPT
//! Misconfigurations", "EPT and Memory Typing"; chapter 28 of older editions, 30 of newer ones.
//!
//! ```text
//! bit  63..52  51..12   11    10    9     8     7     6     5..3  2  1  0
//!      ign.    address  ign.  ign.  D     A     ign.  IPAT  type  X  W  R    level 1
//!      ign.    address  ign.  ign.  D     A     1     IPAT  type  X  W  R    levels 2 and 3
//!      ign.    address  ign.  ign.  ign.  A     0     0     0     X  W  R    a table
//! ```
//!
//! An entry is absent when R, W and X are all clear. Bits 52 and above belong to features that this crate does not speak
//! of (suppress #VE, supervisor shadow stacks, sub-page write, paging-write): they are kept as software's.
use crate::address::{Level, Output};
use crate::entry::{Cache, Entry, GuestPat, Leaf, Malformed, Memory, Permissions, Table, Unencodable};
use crate::format::{
    Bits, Extension, Feature, Format, Plain, Words, aligned, beyond, field, low_byte, names_next, set,
    software,
};

const READ: u64 = 1;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const TYPE_SHIFT: u32 = 3;
const TYPE: u64 = field(TYPE_SHIFT, 3);
const WRITE_BACK: u64 = (Cache::WriteBack.number() as u64) << TYPE_SHIFT;
const IGNORE_PAT: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const ADDRESS: u64 = field(12, 40);
/// Ignored in every entry. Bit 10 is another execute permission under mode-based execute control, which is taken as off.
const IGNORED: u64 = field(10, 2) | field(52, 12);

/// What a processor has: IA32_VMX_EPT_VPID_CAP, and bit 6 of the EPT pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// MAXPHYADDR.
    pub physical_bits: u32,
    /// Bit 0: entries that let execute and nothing else.
    pub execute_only: Feature,
    /// Bits 16 and 17: the highest level that may map memory. 2 for 2 MiB pages, 3 for 1 GiB pages.
    pub largest_leaf: Level,
    /// Bit 21, and switched on in the EPT pointer: accessed and dirty bits. Switched off, both are software's.
    pub accessed_dirty: Feature,
}

impl Caps {
    /// A processor with everything and 52 bits of physical addresses.
    pub const FULL: Self = Self {
        physical_bits: 52,
        execute_only: Feature::On,
        largest_leaf: Level(3),
        accessed_dirty: Feature::On,
    };

    const fn beyond(&self) -> u64 {
        beyond(ADDRESS, self.physical_bits)
    }

    /// Bits of a leaf (`DIRTY` with it) or a table (without) that the hardware ignores.
    fn ignored(&self, level: Level, kind: Kind) -> u64 {
        let small = if level == Level::PAGES { LARGE } else { 0 };
        match (kind, self.accessed_dirty) {
            (Kind::Leaf, Feature::On) => IGNORED | small,
            (Kind::Leaf, Feature::Off) => IGNORED | small | ACCESSED | DIRTY,
            (Kind::Table, Feature::On) => IGNORED | DIRTY,
            (Kind::Table, Feature::Off) => IGNORED | DIRTY | ACCESSED,
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Leaf,
    Table,
}

/// Four levels; guest physical addresses of 48 bits.
#[derive(Clone, Copy, Debug)]
pub struct Ept;

impl Format for Ept {
    type Caps = Caps;
    const NAME: &'static str = "Intel extended page tables";
    const LEVELS: u8 = 4;
    const EXTENSION: Extension = Extension::Zero;
    const ADDRESS: u64 = ADDRESS;

    #[inline]
    fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
        match raw & (READ | WRITE | EXECUTE) {
            0 => return Entry::Absent { software: raw },
            bits if bits & READ == 0 && bits & WRITE != 0 => {
                return Entry::Malformed(Malformed::WriteWithoutRead);
            }
            EXECUTE if caps.execute_only == Feature::Off => {
                return Entry::Malformed(Malformed::ExecuteWithoutRead);
            }
            _ => {}
        }
        let maps = level == Level::PAGES || (raw & LARGE != 0 && level <= Level(3));
        let permissions = permissions(raw);
        let keeps = caps.accessed_dirty == Feature::On;
        if !maps {
            let reserved = raw & (caps.beyond() | TYPE | IGNORE_PAT | LARGE);
            if reserved != 0 {
                return Entry::Malformed(Malformed::Reserved(reserved));
            }
            return Entry::Table(Table {
                accessed: keeps && raw & ACCESSED != 0,
                software: raw & caps.ignored(level, Kind::Table),
                ..Table::new(Output(raw & ADDRESS), permissions, Memory::Physical)
            });
        }
        let shift = Self::shift(level);
        let mut reserved = caps.beyond() | field(12, shift - 12);
        if level > Self::largest_leaf(caps) {
            reserved |= LARGE;
        }
        if raw & reserved != 0 {
            return Entry::Malformed(Malformed::Reserved(raw & reserved));
        }
        let number = low_byte((raw & TYPE) >> TYPE_SHIFT);
        let Some(cache) = Cache::from_number(number).filter(|cache| *cache != Cache::UncacheableMinus) else {
            return Entry::Malformed(Malformed::MemoryType(number));
        };
        let guest_pat = if raw & IGNORE_PAT == 0 { GuestPat::Combined } else { GuestPat::Ignored };
        Entry::Leaf(Leaf {
            accessed: keeps && raw & ACCESSED != 0,
            dirty: keeps && raw & DIRTY != 0,
            software: raw & caps.ignored(level, Kind::Leaf),
            ..Leaf::new(Output(raw & ADDRESS), shift, permissions, Memory::Ept(cache, guest_pat))
        })
    }

    /// Readable, and written back if it maps memory: most are.
    #[inline]
    fn plain(level: Level, caps: &Caps) -> Plain {
        let large = if level == Level::PAGES { 0 } else { LARGE };
        let leaf = if level > Self::largest_leaf(caps) {
            Bits::NONE
        } else {
            let set = READ | large | WRITE_BACK;
            Bits::new(set, TYPE & !WRITE_BACK | caps.beyond() | field(12, Self::shift(level) - 12))
        };
        let table = match level {
            Level::PAGES => Bits::NONE,
            _ => Bits::new(READ, caps.beyond() | TYPE | IGNORE_PAT | LARGE),
        };
        Plain { table, leaf }
    }

    #[inline]
    fn through(words: Words) -> Permissions {
        permissions(words.all)
    }

    fn encode(entry: &Entry, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
        match *entry {
            Entry::Absent { software: word } => software(word, !(READ | WRITE | EXECUTE)),
            Entry::Table(table) => encode_table(&table, level, caps),
            Entry::Leaf(leaf) => encode_leaf(&leaf, level, caps),
            Entry::Malformed(_) => Err(Unencodable::Kind),
        }
    }

    fn largest_leaf(caps: &Caps) -> Level {
        caps.largest_leaf.min(Level(3))
    }
}

fn permissions(raw: u64) -> Permissions {
    let mut permissions = Permissions::USER;
    permissions.set(Permissions::READ, raw & READ != 0);
    permissions.set(Permissions::WRITE, raw & WRITE != 0);
    permissions.set(Permissions::EXECUTE, raw & EXECUTE != 0);
    permissions
}

fn encode_permissions(permissions: Permissions, caps: &Caps) -> Result<u64, Unencodable> {
    let can = |permission| permissions.contains(permission);
    let (read, write, execute) = (can(Permissions::READ), can(Permissions::WRITE), can(Permissions::EXECUTE));
    let possible = read || (execute && !write && caps.execute_only == Feature::On);
    if !possible || permissions.execute_differs() || !can(Permissions::USER) {
        return Err(Unencodable::Permissions(permissions));
    }
    Ok(set(read, READ) | set(write, WRITE) | set(execute, EXECUTE))
}

fn encode_flags(accessed: bool, dirty: bool, caps: &Caps) -> Result<u64, Unencodable> {
    if (accessed || dirty) && caps.accessed_dirty == Feature::Off {
        return Err(Unencodable::Flag);
    }
    Ok(set(accessed, ACCESSED) | set(dirty, DIRTY))
}

fn encode_table(table: &Table, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    names_next(table, level)?;
    let at = aligned(table.at, ADDRESS & !caps.beyond())?;
    if table.memory != Memory::Physical {
        return Err(Unencodable::Memory(table.memory));
    }
    if table.global {
        return Err(Unencodable::Flag);
    }
    let software = software(table.software, caps.ignored(level, Kind::Table))?;
    Ok(encode_permissions(table.permissions, caps)?
        | at
        | encode_flags(table.accessed, false, caps)?
        | software)
}

fn encode_leaf(leaf: &Leaf, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    let shift = Ept::shift(level);
    if leaf.shift != shift || level > Ept::largest_leaf(caps) {
        return Err(Unencodable::Size { shift: leaf.shift });
    }
    let output = aligned(leaf.output, ADDRESS & !caps.beyond() & !field(0, shift))?;
    let (cache, guest_pat) = match leaf.memory {
        Memory::Ept(cache, guest_pat) if cache != Cache::UncacheableMinus => (cache, guest_pat),
        other => return Err(Unencodable::Memory(other)),
    };
    if leaf.key != 0 {
        return Err(Unencodable::Key(leaf.key));
    }
    if leaf.global {
        return Err(Unencodable::Flag);
    }
    let software = software(leaf.software, caps.ignored(level, Kind::Leaf))?;
    Ok(encode_permissions(leaf.permissions, caps)?
        | output
        | set(level > Level::PAGES, LARGE)
        | u64::from(cache.number()) << TYPE_SHIFT
        | set(guest_pat == GuestPat::Ignored, IGNORE_PAT)
        | encode_flags(leaf.accessed, leaf.dirty, caps)?
        | software)
}
