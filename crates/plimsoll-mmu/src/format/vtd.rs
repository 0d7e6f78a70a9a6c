//! Intel VT-d's second-stage tables: what a device's addresses go through.
//!
//! Intel Virtualization Technology for Directed I/O, Architecture Specification: 3.7 "Second-Stage Translation", 9.8
//! "Second-Stage Paging Entries".
//!
//! ```text
//! bit  63    62  61..52  51..12   11   10    9     8  7     6..2  1  0
//!      ign.  TM  ign.    address  SNP  ign.  D     A  ign.  ign.  W  R    level 1
//!      ign.  TM  ign.    address  SNP  ign.  D     A  1     ign.  W  R    levels 2 and 3
//!      ign.  0   ign.    address  0    ign.  ign.  A  0     ign.  W  R    a table
//! ```
//!
//! TM was removed in revision 3.2: 0 since then.
//!
//! An entry is absent when R and W are both clear. Rights are hierarchical, and a device neither is a user nor executes: both
//! permissions are always there. Bits 6:2 belong to what this crate does not speak of (execute requests, memory types of
//! scalable mode): they are kept as software's, as is TM, which is a hint to the device's own cache.
use crate::address::{Input, Level, Output};
use crate::entry::{Entry, Leaf, Malformed, Memory, Permissions, Table, Unencodable};
use crate::format::{
    Bits, Extension, Feature, Format, Plain, Words, aligned, beyond, field, names_next, set, software,
};

const READ: u64 = 1;
const WRITE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const SNOOP: u64 = 1 << 11;
const TRANSIENT: u64 = 1 << 62;
const ADDRESS: u64 = field(12, 40);
/// Ignored in every entry.
const IGNORED: u64 = field(2, 5) | 1 << 10 | field(52, 10) | 1 << 63;

/// What a remapping unit has, by its capability registers and ACPI's DMAR table, and SSADE of the PASID-table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// HAW of the DMAR table: bits of a host physical address.
    pub physical_bits: u32,
    /// CAP.MGAW, plus one: bits of a device's address, where the format has as many. Walks heed it; who maps more maps it for
    /// nobody.
    pub input_bits: u32,
    /// CAP.SSLPS: the highest level that may map memory. 2 for 2 MiB pages, 3 for 1 GiB pages.
    pub largest_leaf: Level,
    /// ECAP.SC: a leaf can have caches snooped whatever the device asks for.
    pub snoop_control: Feature,
    /// A unit of a revision before 3.2, with ECAP.DT: a leaf may say that it is not for long (TM), which devices with caches of
    /// their own may heed.
    pub transient: Feature,
    /// ECAP.SSADS, and switched on: accessed and dirty bits. Switched off, both are software's.
    pub accessed_dirty: Feature,
}

impl Caps {
    /// A unit of today with everything, 52 bits of physical addresses and 57 of devices'.
    pub const FULL: Self = Self {
        physical_bits: 52,
        input_bits: 57,
        largest_leaf: Level(3),
        snoop_control: Feature::On,
        transient: Feature::Off,
        accessed_dirty: Feature::On,
    };

    const fn beyond(&self) -> u64 {
        beyond(ADDRESS, self.physical_bits)
    }

    /// Whether `input` has more bits than the unit translates.
    pub(crate) fn beyond_input(&self, input: Input) -> bool {
        beyond(input.0, self.input_bits) != 0
    }

    fn largest_leaf(&self) -> Level {
        self.largest_leaf.min(Level(3))
    }

    fn keeps(&self) -> bool {
        self.accessed_dirty == Feature::On
    }

    /// What must be zero in an entry of `level`.
    fn reserved(&self, level: Level, kind: Kind) -> u64 {
        self.beyond()
            | match kind {
                Kind::Table => SNOOP | TRANSIENT | set(level > Level(3), LARGE),
                Kind::Leaf => {
                    field(12, Second4::shift(level) - 12)
                        | set(level > self.largest_leaf(), LARGE)
                        | set(self.snoop_control == Feature::Off, SNOOP)
                        | set(self.transient == Feature::Off, TRANSIENT)
                }
            }
    }

    /// What the hardware ignores, or does not depend on.
    fn ignored(&self, level: Level, kind: Kind) -> u64 {
        match kind {
            Kind::Table => IGNORED | DIRTY | set(!self.keeps(), ACCESSED),
            Kind::Leaf => {
                IGNORED
                    | set(level == Level::PAGES, LARGE)
                    | set(!self.keeps(), ACCESSED | DIRTY)
                    | set(self.transient == Feature::On, TRANSIENT)
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Leaf,
    Table,
}

/// A format with these entries, which the walk of [`crate::vtd`] understands.
pub trait VtdFormat: Format<Caps = Caps> {}

macro_rules! vtd {
    ($(#[$doc:meta])* $name:ident, $text:literal, $levels:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl VtdFormat for $name {}

        impl Format for $name {
            type Caps = Caps;
            const NAME: &'static str = $text;
            const LEVELS: u8 = $levels;
            const EXTENSION: Extension = Extension::Zero;
            const ADDRESS: u64 = ADDRESS;

            #[inline]
            fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
                decode(raw, level, caps)
            }

            /// Readable: what devices only write is decoded.
            #[inline]
            fn plain(level: Level, caps: &Caps) -> Plain {
                let leaf = match level {
                    Level::PAGES => Bits::new(READ, caps.reserved(level, Kind::Leaf)),
                    _ if level > caps.largest_leaf() => Bits::NONE,
                    _ => Bits::new(READ | LARGE, caps.reserved(level, Kind::Leaf)),
                };
                let table = match level {
                    Level::PAGES => Bits::NONE,
                    _ => Bits::new(READ, LARGE | caps.reserved(level, Kind::Table)),
                };
                Plain { table, leaf }
            }

            #[inline]
            fn through(words: Words) -> Permissions {
                permissions(words.all)
            }

            fn encode(entry: &Entry, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
                encode(entry, level, caps)
            }

            fn largest_leaf(caps: &Caps) -> Level {
                caps.largest_leaf()
            }
        }
    };
}

vtd!(
    /// Three levels: an adjusted guest address width of 39 bits.
    Second3, "Intel VT-d second stage, three levels", 3
);
vtd!(
    /// Four levels: 48 bits.
    Second4, "Intel VT-d second stage, four levels", 4
);
vtd!(
    /// Five levels: 57 bits.
    Second5, "Intel VT-d second stage, five levels", 5
);

#[inline]
fn permissions(raw: u64) -> Permissions {
    let mut permissions = Permissions::all();
    permissions.set(Permissions::READ, raw & READ != 0);
    permissions.set(Permissions::WRITE, raw & WRITE != 0);
    permissions
}

#[inline]
fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
    if raw & (READ | WRITE) == 0 {
        return Entry::Absent { software: raw };
    }
    let maps = level == Level::PAGES || (raw & LARGE != 0 && level <= Level(3));
    let kind = if maps { Kind::Leaf } else { Kind::Table };
    let reserved = raw & caps.reserved(level, kind);
    if reserved != 0 {
        return Entry::Malformed(Malformed::Reserved(reserved));
    }
    let permissions = permissions(raw);
    let (output, software) = (Output(raw & ADDRESS), raw & caps.ignored(level, kind));
    let accessed = caps.keeps() && raw & ACCESSED != 0;
    if !maps {
        let table = Table::new(output, permissions, Memory::Physical);
        return Entry::Table(Table { accessed, software, ..table });
    }
    let memory = if raw & SNOOP != 0 { Memory::Snooped } else { Memory::Physical };
    Entry::Leaf(Leaf {
        accessed,
        dirty: caps.keeps() && raw & DIRTY != 0,
        software,
        ..Leaf::new(output, Second4::shift(level), permissions, memory)
    })
}

fn encode_permissions(permissions: Permissions) -> Result<u64, Unencodable> {
    let can = |permission| permissions.contains(permission);
    let always = Permissions::EXECUTE | Permissions::USER;
    if !can(always) || (permissions - always).is_empty() {
        return Err(Unencodable::Permissions(permissions));
    }
    Ok(set(can(Permissions::READ), READ) | set(can(Permissions::WRITE), WRITE))
}

fn encode_flags(accessed: bool, dirty: bool, caps: &Caps) -> Result<u64, Unencodable> {
    if (accessed || dirty) && !caps.keeps() {
        return Err(Unencodable::Flag);
    }
    Ok(set(accessed, ACCESSED) | set(dirty, DIRTY))
}

fn encode(entry: &Entry, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    match *entry {
        Entry::Absent { software: word } => software(word, !(READ | WRITE)),
        Entry::Table(table) => encode_table(&table, level, caps),
        Entry::Leaf(leaf) => encode_leaf(&leaf, level, caps),
        Entry::Malformed(_) => Err(Unencodable::Kind),
    }
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
    Ok(encode_permissions(table.permissions)? | at | encode_flags(table.accessed, false, caps)? | software)
}

fn encode_leaf(leaf: &Leaf, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
    let shift = Second4::shift(level);
    if leaf.shift != shift || level > caps.largest_leaf() {
        return Err(Unencodable::Size { shift: leaf.shift });
    }
    let output = aligned(leaf.output, ADDRESS & !caps.beyond() & !field(0, shift))?;
    let snoop = match leaf.memory {
        Memory::Physical => 0,
        Memory::Snooped if caps.snoop_control == Feature::On => SNOOP,
        other => return Err(Unencodable::Memory(other)),
    };
    if leaf.key != 0 {
        return Err(Unencodable::Key(leaf.key));
    }
    if leaf.global {
        return Err(Unencodable::Flag);
    }
    let software = software(leaf.software, caps.ignored(level, Kind::Leaf))?;
    Ok(encode_permissions(leaf.permissions)?
        | output
        | set(level > Level::PAGES, LARGE)
        | snoop
        | encode_flags(leaf.accessed, leaf.dirty, caps)?
        | software)
}
