//! AMD-Vi's host tables: what a device's addresses go through.
//!
//! AMD I/O Virtualization Technology (IOMMU) Specification (48882), 2.2.3 "I/O Page Tables for Host Translations".
//!
//! ```text
//! bit  63    62  61  60  59  58..52  51..12   11..9  8..7  6     5  4..1  0
//!      ign.  IW  IR  FC  U   0       address  0      ign.  D     A  ign.  PR   a page of the level's size
//!      ign.  IW  IR  FC  U   0       *        7      ign.  D     A  ign.  PR   a page of more
//!      ign.  IW  IR  0   0   0       address  1..6   ign.  ign.  A  ign.  PR   a table of that level
//! ```
//!
//! \* The lowest zero from bit 12 on ends the size: ones below it, and bit n - 1 clear, are a page of 2^n bytes, which is more than the
//! level's and less than that of the level above. All entries that such a page covers say the same: here they are a group of leaves.
//!
//! An entry may name a table of any level below its own. Rights are hierarchical, and a device neither is a user nor executes: both
//! permissions are always there. U (untranslated accesses only) is for devices that translate by themselves, and kept as software's.
//! Address bits below a level's page are taken as reserved; QEMU's and VirtualBox's models do not look at them.
use crate::address::{Level, Output};
use crate::entry::{Entry, Leaf, Malformed, Memory, Permissions, Table, Unencodable};
use crate::format::{Bits, Extension, Format, Plain, Words, aligned, beyond, field, low_byte, set, software};

const PRESENT: u64 = 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NEXT_SHIFT: u32 = 9;
const UNTRANSLATED: u64 = 1 << 59;
const COHERENT: u64 = 1 << 60;
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;
const ADDRESS: u64 = field(12, 40);
const RESERVED: u64 = field(52, 7);
/// Next Level of a page whose size its address says.
const SIZED: u8 = 7;
/// Ignored in every entry.
const IGNORED: u64 = field(1, 4) | field(7, 2) | 1 << 63;

/// Which marks accesses leave: HAD of the device table entry, where the unit can (EFR.HASup, EFR.HDSup).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// None: A and D are software's.
    Nothing,
    /// Accessed.
    Accessed,
    /// Accessed and dirty.
    AccessedAndDirty,
}

/// What a unit has, and is set up to do for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// PAsize of ACPI's IVRS: bits of a physical address.
    pub physical_bits: u32,
    /// Marks.
    pub keeps: Keeps,
}

impl Caps {
    /// A unit with everything and 52 bits of physical addresses.
    pub const FULL: Self = Self { physical_bits: 52, keeps: Keeps::AccessedAndDirty };

    const fn beyond(&self) -> u64 {
        beyond(ADDRESS, self.physical_bits)
    }

    fn keeps_accessed(&self) -> bool {
        self.keeps != Keeps::Nothing
    }

    fn keeps_dirty(&self) -> bool {
        self.keeps == Keeps::AccessedAndDirty
    }

    fn leaf_software(&self) -> u64 {
        IGNORED | UNTRANSLATED | set(!self.keeps_accessed(), ACCESSED) | set(!self.keeps_dirty(), DIRTY)
    }

    fn table_software(&self) -> u64 {
        IGNORED | DIRTY | set(!self.keeps_accessed(), ACCESSED)
    }
}

/// A format with these entries, which the walk of [`crate::amdvi`] understands.
pub trait AmdViFormat: Format<Caps = Caps> {}

/// Tables of so many levels, one to five: addresses of 21 to 57 bits. The sixth level, which no address of this crate has, is not
/// spoken.
#[derive(Clone, Copy, Debug)]
pub struct Host<const LEVELS: u8>;

impl<const LEVELS: u8> AmdViFormat for Host<LEVELS> {}

impl<const LEVELS: u8> Format for Host<LEVELS> {
    type Caps = Caps;
    const NAME: &'static str = "AMD-Vi host tables";
    const LEVELS: u8 = LEVELS;
    const EXTENSION: Extension = Extension::Zero;
    const ADDRESS: u64 = ADDRESS;

    #[inline]
    fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
        decode(raw, level, caps)
    }

    /// No level is left out, and a page has its level's size.
    #[inline]
    fn plain(level: Level, caps: &Caps) -> Plain {
        let low = field(0, shift_of(level));
        let leaf = field(NEXT_SHIFT, 3) | RESERVED | ADDRESS & low | caps.beyond();
        let table = match level.below() {
            None => Bits::NONE,
            Some(below) => {
                let next = u64::from(below.0) << NEXT_SHIFT;
                let reserved = RESERVED | caps.beyond() | UNTRANSLATED | COHERENT;
                Bits::new(PRESENT | next, field(NEXT_SHIFT, 3) & !next | reserved)
            }
        };
        Plain { table, leaf: Bits::new(PRESENT, leaf) }
    }

    #[inline]
    fn through(words: Words) -> Permissions {
        permissions(words.all)
    }

    fn encode(entry: &Entry, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
        encode(entry, level, caps)
    }

    fn largest_leaf(_: &Caps) -> Level {
        Self::root()
    }
}

/// log2 of what an entry of `level` covers.
fn shift_of(level: Level) -> u32 {
    Host::<5>::shift(level)
}

#[inline]
fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
    if raw & PRESENT == 0 {
        return Entry::Absent { software: raw };
    }
    let shift = shift_of(level);
    match low_byte(raw >> NEXT_SHIFT & 7) {
        0 => decode_leaf(raw, shift, field(12, shift - 12), caps),
        SIZED => match (raw | field(0, 12)).trailing_ones() + 1 {
            size if size > shift && size < shift + 9 && size <= 52 => decode_leaf(raw, size, 0, caps),
            size => Entry::Malformed(Malformed::PageSize(size)),
        },
        next if next < level.0 => decode_table(raw, level.0 - next - 1, caps),
        next => Entry::Malformed(Malformed::NextLevel(Level(next))),
    }
}

#[inline]
fn permissions(raw: u64) -> Permissions {
    let mut permissions = Permissions::all();
    permissions.set(Permissions::READ, raw & READ != 0);
    permissions.set(Permissions::WRITE, raw & WRITE != 0);
    permissions
}

/// A page of 2^`shift` bytes. `low` are the address's bits that must be zero although the page's own are above them.
#[inline]
fn decode_leaf(raw: u64, shift: u32, low: u64, caps: &Caps) -> Entry {
    let within = field(0, shift);
    let reserved = raw & (RESERVED | low | caps.beyond() & !within);
    if reserved != 0 {
        return Entry::Malformed(Malformed::Reserved(reserved));
    }
    let memory = if raw & COHERENT != 0 { Memory::Snooped } else { Memory::Physical };
    Entry::Leaf(Leaf {
        accessed: caps.keeps_accessed() && raw & ACCESSED != 0,
        dirty: caps.keeps_dirty() && raw & DIRTY != 0,
        software: raw & caps.leaf_software(),
        ..Leaf::new(Output(raw & ADDRESS & !within), shift, permissions(raw), memory)
    })
}

#[inline]
fn decode_table(raw: u64, skips: u8, caps: &Caps) -> Entry {
    let reserved = raw & (RESERVED | caps.beyond() | UNTRANSLATED | COHERENT);
    if reserved != 0 {
        return Entry::Malformed(Malformed::Reserved(reserved));
    }
    Entry::Table(Table {
        accessed: caps.keeps_accessed() && raw & ACCESSED != 0,
        software: raw & caps.table_software(),
        skips,
        ..Table::new(Output(raw & ADDRESS), permissions(raw), Memory::Physical)
    })
}

fn encode_permissions(permissions: Permissions) -> Result<u64, Unencodable> {
    let can = |permission| permissions.contains(permission);
    if !can(Permissions::EXECUTE | Permissions::USER) {
        return Err(Unencodable::Permissions(permissions));
    }
    Ok(PRESENT | set(can(Permissions::READ), READ) | set(can(Permissions::WRITE), WRITE))
}

fn encode(entry: &Entry, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    match *entry {
        Entry::Absent { software: word } => software(word, !PRESENT),
        Entry::Table(table) => encode_table(&table, level, caps),
        Entry::Leaf(leaf) => encode_leaf(&leaf, level, caps),
        Entry::Malformed(_) => Err(Unencodable::Kind),
    }
}

fn encode_table(table: &Table, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    let next = match (table.leads_to(level), table.skips) {
        (Some(next), _) => next,
        (None, 0) => return Err(Unencodable::Kind),
        (None, skips) => return Err(Unencodable::Skips(skips)),
    };
    let at = aligned(table.at, ADDRESS & !caps.beyond())?;
    if table.memory != Memory::Physical {
        return Err(Unencodable::Memory(table.memory));
    }
    if table.global || (table.accessed && !caps.keeps_accessed()) {
        return Err(Unencodable::Flag);
    }
    let software = software(table.software, caps.table_software())?;
    Ok(encode_permissions(table.permissions)?
        | at
        | u64::from(next.0) << NEXT_SHIFT
        | set(table.accessed, ACCESSED)
        | software)
}

fn encode_leaf(leaf: &Leaf, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    let shift = shift_of(level);
    let size = match leaf.shift.checked_sub(shift) {
        Some(0) => 0,
        Some(1..=8) if leaf.shift <= 52 => u64::from(SIZED) << NEXT_SHIFT | field(12, leaf.shift - 1 - 12),
        _ => return Err(Unencodable::Size { shift: leaf.shift }),
    };
    let output = aligned(leaf.output, ADDRESS & !caps.beyond() & !field(0, leaf.shift))?;
    let coherent = match leaf.memory {
        Memory::Physical => 0,
        Memory::Snooped => COHERENT,
        other => return Err(Unencodable::Memory(other)),
    };
    if leaf.key != 0 {
        return Err(Unencodable::Key(leaf.key));
    }
    if leaf.global || (leaf.accessed && !caps.keeps_accessed()) || (leaf.dirty && !caps.keeps_dirty()) {
        return Err(Unencodable::Flag);
    }
    let software = software(leaf.software, caps.leaf_software())?;
    Ok(encode_permissions(leaf.permissions)?
        | output
        | size
        | coherent
        | set(leaf.accessed, ACCESSED)
        | set(leaf.dirty, DIRTY)
        | software)
}
