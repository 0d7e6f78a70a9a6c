//! x86-64 with four and five levels, and AMD's nested tables, which have the same entries.
//!
//! Intel SDM vol. 3, "Paging" (4.5 "4-Level Paging and 5-Level Paging", 4.6.2 "Protection Keys"); AMD APM vol. 2, 5.3
//! "Long-Mode Page Translation", 15.25 "Nested Paging".
//!
//! ```text
//! bit  63  62..59  58..52  51..12   11..9  8     7    6    5    4    3    2    1    0
//!      NX  key     ign.    address  ign.   G     PAT  D    A    PCD  PWT  U/S  R/W  P    level 1
//!      NX  key     ign.    address  ign.   G     PS=1 D    A    PCD  PWT  U/S  R/W  P    levels 2 and 3; PAT is bit 12
//!      NX  ign.    ign.    address  ign.   ign.  PS=0 ign. A    PCD  PWT  U/S  R/W  P    a table
//! ```
use crate::address::{Level, Output};
use crate::entry::{Entry, Leaf, Malformed, Memory, Permissions, Table, Unencodable};
use crate::format::{
    Bits, Extension, Feature, Format, Plain, Stage, Words, aligned, beyond, field, low_byte, names_next, set,
    software,
};
use crate::walk::Access;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const PWT_SHIFT: u32 = 3;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// PS above level 1, where level 1 has PAT.
const SIZE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const PAT_SMALL_SHIFT: u32 = 7;
const PAT_LARGE_SHIFT: u32 = 12;
const KEY_SHIFT: u32 = 59;
const KEY: u64 = field(KEY_SHIFT, 4);
const NO_EXECUTE: u64 = 1 << 63;
/// Where an address may be: 51:12. How much of it is reserved says MAXPHYADDR.
const ADDRESS: u64 = field(12, 40);
/// Ignored in leaves; the key too where keys are off.
const LEAF_IGNORED: u64 = field(9, 3) | field(52, 7);
/// Ignored in entries that name a table.
const TABLE_IGNORED: u64 = DIRTY | GLOBAL | LEAF_IGNORED | KEY;

/// Whose processor it is, where the manuals differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// Bit 8 of entries of levels 4 and 5 is ignored.
    Intel,
    /// Bit 8 of entries of levels 4 and 5 must be zero (APM figures "PML4E" and "PML5E, Long Mode").
    Amd,
}

/// What a processor has, as set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// MAXPHYADDR: bits of a physical address, 32 to 52. CPUID 8000_0008.EAX\[7:0\].
    pub physical_bits: u32,
    /// Pages of 1 GiB. CPUID 8000_0001.EDX\[26\].
    pub gib_pages: Feature,
    /// EFER.NXE.
    pub no_execute: Feature,
    /// CR4.PKE: bits 62:59 of a leaf are its key.
    pub keys: Feature,
    /// Whose it is.
    pub maker: Maker,
}

impl Caps {
    /// A processor with everything and 52 bits of physical addresses.
    pub const FULL: Self = Self {
        physical_bits: 52,
        gib_pages: Feature::On,
        no_execute: Feature::On,
        keys: Feature::On,
        maker: Maker::Intel,
    };

    /// Bits reserved in every present entry.
    const fn reserved(&self) -> u64 {
        let high = beyond(ADDRESS, self.physical_bits);
        if matches!(self.no_execute, Feature::On) { high } else { high | NO_EXECUTE }
    }

    const fn leaf_ignored(&self) -> u64 {
        if matches!(self.keys, Feature::On) { LEAF_IGNORED } else { LEAF_IGNORED | KEY }
    }

    /// What else is reserved in an entry of `level` that names a table.
    const fn table_reserved(&self, level: Level) -> u64 {
        match (level.0, self.maker) {
            (4.., Maker::Amd) => SIZE | GLOBAL,
            (4.., Maker::Intel) => SIZE,
            _ => 0,
        }
    }

    fn largest_leaf(&self) -> Level {
        Level(if self.gib_pages == Feature::On { 3 } else { 2 })
    }
}

/// A format with x86-64's entries, which the walk of [`crate::x86`] understands.
pub trait X86Format: Format<Caps = Caps> {}

macro_rules! x86 {
    ($(#[$doc:meta])* $name:ident, $text:literal, $levels:literal, $extension:ident, $stage:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl X86Format for $name {}

        impl Format for $name {
            type Caps = Caps;
            const NAME: &'static str = $text;
            const LEVELS: u8 = $levels;
            const EXTENSION: Extension = Extension::$extension;
            const TABLE_MEMORY: Memory = Memory::Pat(0);
            const ADDRESS: u64 = ADDRESS;

            #[inline(always)]
            fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
                decode(raw, level, caps)
            }

            #[inline(always)]
            fn plain(level: Level, caps: &Caps) -> Plain {
                plain(level, caps)
            }

            #[inline(always)]
            fn through(words: Words) -> Permissions {
                // NX takes away where one word has it, the others give where all have them.
                permissions(words.all & !NO_EXECUTE | words.any & NO_EXECUTE)
            }

            fn encode(entry: &Entry, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
                encode(entry, level, caps, Stage::$stage)
            }

            #[inline]
            fn marked(raw: u64, level: Level, _: &Caps, access: Access) -> u64 {
                let dirties = access == Access::Write && maps(raw, level);
                raw | ACCESSED | set(dirties, DIRTY)
            }

            fn largest_leaf(caps: &Caps) -> Level {
                caps.largest_leaf()
            }
        }
    };
}

x86!(
    /// 48-bit linear addresses, four levels.
    Long4, "x86-64, four levels", 4, Sign, First
);
x86!(
    /// 57-bit linear addresses, five levels (CR4.LA57).
    Long5, "x86-64, five levels", 5, Sign, First
);
x86!(
    /// AMD nested tables: as [`Long4`], but every access is a user's, so that a leaf without [`Permissions::USER`] would
    /// serve nobody and is not written (APM vol. 2, 15.25.5).
    Npt, "AMD nested page tables", 4, Zero, Second
);

/// Whether a present entry maps memory.
#[inline(always)]
fn maps(raw: u64, level: Level) -> bool {
    level == Level::PAGES || (raw & SIZE != 0 && level <= Level(3))
}

#[inline(always)]
fn permissions(raw: u64) -> Permissions {
    let mut permissions = Permissions::READ;
    permissions.set(Permissions::WRITE, raw & WRITABLE != 0);
    permissions.set(Permissions::USER, raw & USER != 0);
    permissions.set(Permissions::EXECUTE, raw & NO_EXECUTE == 0);
    permissions
}

#[inline(always)]
fn plain(level: Level, caps: &Caps) -> Plain {
    let reserved = caps.reserved();
    let leaf = match level {
        Level::PAGES => Bits::new(PRESENT, reserved),
        _ if level > caps.largest_leaf() => Bits::NONE,
        _ => Bits::new(PRESENT | SIZE, reserved | large_reserved(level)),
    };
    let table = match level {
        Level::PAGES => Bits::NONE,
        _ => Bits::new(PRESENT, SIZE | reserved | caps.table_reserved(level)),
    };
    Plain { table, leaf }
}

/// From bit 13 to where the address of a large page begins: SDM tables "PDPTE that maps a 1-GByte page", "PDE that maps a 2-MByte".
fn large_reserved(level: Level) -> u64 {
    field(13, Long4::shift(level) - 13)
}

#[inline(always)]
fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
    if raw & PRESENT == 0 {
        return Entry::Absent { software: raw };
    }
    if !maps(raw, level) {
        let reserved = raw & (caps.reserved() | caps.table_reserved(level));
        if reserved != 0 {
            return Entry::Malformed(Malformed::Reserved(reserved));
        }
        let memory = Memory::Pat(low_byte(raw >> PWT_SHIFT & 3));
        return Entry::Table(Table {
            accessed: raw & ACCESSED != 0,
            software: raw & TABLE_IGNORED,
            ..Table::new(Output(raw & ADDRESS), permissions(raw), memory)
        });
    }
    let shift = Long4::shift(level);
    let large = level > Level::PAGES;
    let (pat_shift, address) =
        if large { (PAT_LARGE_SHIFT, ADDRESS & !field(12, shift - 12)) } else { (PAT_SMALL_SHIFT, ADDRESS) };
    let mut reserved = caps.reserved();
    if large {
        reserved |= large_reserved(level);
    }
    if level > caps.largest_leaf() {
        reserved |= SIZE;
    }
    if raw & reserved != 0 {
        return Entry::Malformed(Malformed::Reserved(raw & reserved));
    }
    Entry::Leaf(Leaf {
        output: Output(raw & address),
        shift,
        permissions: permissions(raw),
        memory: Memory::Pat(low_byte((raw >> PWT_SHIFT & 3) | (raw >> pat_shift & 1) << 2)),
        accessed: raw & ACCESSED != 0,
        dirty: raw & DIRTY != 0,
        global: raw & GLOBAL != 0,
        key: if caps.keys == Feature::On { low_byte((raw & KEY) >> KEY_SHIFT) } else { 0 },
        software: raw & caps.leaf_ignored(),
    })
}

fn encode_permissions(permissions: Permissions, caps: &Caps) -> Result<u64, Unencodable> {
    let executable = permissions.contains(Permissions::EXECUTE);
    // Present is readable, and without NX everything can be executed.
    if !permissions.contains(Permissions::READ)
        || permissions.execute_differs()
        || (!executable && caps.no_execute == Feature::Off)
    {
        return Err(Unencodable::Permissions(permissions));
    }
    let flag = |permission, bit| if permissions.contains(permission) { bit } else { 0 };
    Ok(PRESENT
        | flag(Permissions::WRITE, WRITABLE)
        | flag(Permissions::USER, USER)
        | if executable { 0 } else { NO_EXECUTE })
}

fn encode(entry: &Entry, level: Level, caps: &Caps, stage: Stage) -> Result<u64, Unencodable> {
    match *entry {
        // Every access is a user's: what lacks U/S would serve nobody, and is not written.
        Entry::Table(Table { permissions, .. }) | Entry::Leaf(Leaf { permissions, .. })
            if stage == Stage::Second && !permissions.contains(Permissions::USER) =>
        {
            Err(Unencodable::Permissions(permissions))
        }
        Entry::Absent { software: word } => software(word, !PRESENT),
        Entry::Table(table) => encode_table(&table, level, caps),
        Entry::Leaf(leaf) => encode_leaf(&leaf, level, caps),
        Entry::Malformed(_) => Err(Unencodable::Kind),
    }
}

fn encode_table(table: &Table, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    names_next(table, level)?;
    let at = aligned(table.at, ADDRESS & !caps.reserved())?;
    let Memory::Pat(pat @ 0..=3) = table.memory else {
        return Err(Unencodable::Memory(table.memory));
    };
    if table.global {
        return Err(Unencodable::Flag);
    }
    let software = software(table.software, TABLE_IGNORED & !caps.table_reserved(level))?;
    Ok(encode_permissions(table.permissions, caps)?
        | at
        | u64::from(pat) << PWT_SHIFT
        | set(table.accessed, ACCESSED)
        | software)
}

fn encode_leaf(leaf: &Leaf, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    let shift = Long4::shift(level);
    if leaf.shift != shift || level > caps.largest_leaf() {
        return Err(Unencodable::Size { shift: leaf.shift });
    }
    let large = level > Level::PAGES;
    let output = aligned(leaf.output, ADDRESS & !caps.reserved() & !field(0, shift))?;
    let Memory::Pat(pat @ 0..=7) = leaf.memory else {
        return Err(Unencodable::Memory(leaf.memory));
    };
    if leaf.key > 15 || (leaf.key > 0 && caps.keys == Feature::Off) {
        return Err(Unencodable::Key(leaf.key));
    }
    let software = software(leaf.software, caps.leaf_ignored())?;
    let pat_shift = if large { PAT_LARGE_SHIFT } else { PAT_SMALL_SHIFT };
    Ok(encode_permissions(leaf.permissions, caps)?
        | output
        | set(large, SIZE)
        | u64::from(pat & 3) << PWT_SHIFT
        | u64::from(pat >> 2) << pat_shift
        | set(leaf.accessed, ACCESSED)
        | set(leaf.dirty, DIRTY)
        | set(leaf.global, GLOBAL)
        | u64::from(leaf.key) << KEY_SHIFT
        | software)
}
