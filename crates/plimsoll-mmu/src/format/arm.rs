//! Arm's VMSAv8-64: both halves of the first stage and the second, with granules of 4, 16 and 64 KiB.
//!
//! Arm Architecture Reference Manual (DDI 0487), D8.3 "Translation table descriptor formats", D8.4 "Memory access
//! control", D8.2 "Translation process" (D8.2.2 for joined roots of the second stage), D8.7.1 "The Contiguous bit".
//!
//! ```text
//! bit  63..59  58..55  54   53   52    51   50  47..n    11   10  9..8  7..6  5   4..2  1  0
//!      ign.    soft.   UXN  PXN  cont  DBM  GP  address  nG   AF  SH    AP    NS  Attr  t  1   the first stage's leaf
//!      ign.    soft.   XN1  XN0  cont  DBM  0   address  0    AF  SH    S2AP  MemAttr   t  1   the second stage's leaf
//!      T*      ign.    ign. ign. ign.  ign. 0   address  ign. ign ign.  ign.  ign ign.  1  1   a table
//! ```
//!
//! t is 1 at the last level and 0 above it. T* are NSTable, APTable\[1:0\], UXNTable and PXNTable, in the first stage only.
//! cont joins a naturally aligned run of leaves. In a root that has fewer entries than such a run it is misprogrammed: some
//! processors fault, others, and this crate, ignore it and keep it.
//! Levels are counted as everywhere in this crate: what the manual calls level 3 is [`Level`] 1, its level 0 is 4.
//!
//! What is writable but clean is DBM with write permission withheld; hardware grants it at the first write (D8.5.2). The
//! hardware has no word for what was written and may be written no longer: that is kept in bit 55, as Linux does.
use crate::address::{Level, Output};
use crate::entry::{Entry, Leaf, Malformed, Memory, Permissions, Shareability, Table, Unencodable};
use crate::format::{
    Bits, Extension, Feature, Format, Plain, Stage, Words, aligned, beyond, field, low_byte, names_next, set,
    software,
};
use crate::walk::Access;

const VALID: u64 = 1;
/// A table above the last level, a page at it.
const TABLE: u64 = 1 << 1;
const ATTRIBUTES_SHIFT: u32 = 2;
/// First stage: unprivileged code may access it. Second stage: it may be read.
const AP_LOW: u64 = 1 << 6;
/// First stage: it may not be written. Second stage: it may be.
const AP_HIGH: u64 = 1 << 7;
const SHARE_SHIFT: u32 = 8;
const ACCESSED: u64 = 1 << 10;
const NOT_GLOBAL: u64 = 1 << 11;
const DIRTY_MANAGED: u64 = 1 << 51;
const CONTIGUOUS: u64 = 1 << 52;
/// Of what may not be written: it was, before.
const WAS_DIRTY: u64 = 1 << 55;
/// PXN, and XN\[0\] of the second stage.
const XN_LOW: u64 = 1 << 53;
/// UXN, and XN\[1\] of the second stage.
const XN_HIGH: u64 = 1 << 54;
const ADDRESS_BITS: u32 = 48;
/// What software may keep in a leaf: 58:55 are reserved for it, the bits above are ignored.
const LEAF_SOFTWARE: u64 = field(55, 8) | 1 << 63;
/// And in an entry that names a table; the bits above are the first stage's.
const TABLE_SOFTWARE: u64 = field(51, 8) | field(2, 10);
const PXN_TABLE: u64 = 1 << 59;
const UXN_TABLE: u64 = 1 << 60;
const NO_USER_TABLE: u64 = 1 << 61;
const NO_WRITE_TABLE: u64 = 1 << 62;

/// What a processor has, as set up in TCR_ELx or VTCR_EL2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// IPS or PS: bits of an output address, up to 48.
    pub physical_bits: u32,
    /// HD (FEAT_HAFDBS): hardware makes what is DBM writable.
    pub dirty_management: Feature,
    /// FEAT_XNX: the second stage tells users from privileged code.
    pub separate_execute: Feature,
    /// FEAT_BBM at level 2: sizes may change without the entry being absent in between.
    pub direct_resize: Feature,
}

impl Caps {
    /// A processor with everything but [`direct_resize`](Self::direct_resize), and 48 bits of physical addresses.
    pub const FULL: Self = Self {
        physical_bits: ADDRESS_BITS,
        dirty_management: Feature::On,
        separate_execute: Feature::On,
        direct_resize: Feature::Off,
    };

    const fn beyond(&self) -> u64 {
        beyond(field(0, ADDRESS_BITS), self.physical_bits)
    }
}

/// What of a tree's shape decides about entries.
#[derive(Clone, Copy)]
struct Shape {
    stage: Stage,
    granule: u32,
    level: Level,
    /// log2 of what a leaf of this level maps.
    shift: u32,
    /// log2 of what a group of leaves maps that the contiguous hint joins; `None` where a table has fewer entries.
    joined: Option<u32>,
    /// The hint's bit, if the root maps memory in fewer entries than the hint joins: there it is misprogrammed, and ignored.
    idle: u64,
}

impl Shape {
    const fn maps(self) -> bool {
        self.level.0 <= largest_leaf(self.granule).0
    }

    const fn address(self, shift: u32) -> u64 {
        field(0, ADDRESS_BITS) & !field(0, shift)
    }
}

/// 1 GiB with pages of 4 KiB; 32 MiB and 512 MiB with the others, whose larger leaves need 52-bit addresses.
const fn largest_leaf(granule: u32) -> Level {
    if granule == 12 { Level(3) } else { Level(2) }
}

/// log2 of how many leaves of `level` the contiguous hint joins.
const fn group_bits(granule: u32, level: Level) -> u32 {
    match (granule, level) {
        (12, _) => 4,
        (14, Level::PAGES) => 7,
        _ => 5,
    }
}

/// Levels that translate `bits` bits.
const fn levels(granule: u32, bits: u32) -> u8 {
    (bits - granule).div_ceil(granule - 3).to_le_bytes()[0]
}

macro_rules! vmsa {
    ($(#[$doc:meta])* $name:ident, $text:literal, $extension:ident, $stage:ident, $joined:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name<const GRANULE: u32, const BITS: u32>;

        impl<const GRANULE: u32, const BITS: u32> $name<GRANULE, BITS> {
            #[inline(always)]
            fn shape(level: Level) -> Shape {
                let joins = |level| group_bits(GRANULE, level);
                let fits = |level| Self::entries(level) >> joins(level) != 0;
                let shift = Self::shift(level);
                Shape {
                    stage: Stage::$stage,
                    granule: GRANULE,
                    level,
                    shift,
                    joined: fits(level).then(|| shift + joins(level)),
                    idle: set(Self::root() <= largest_leaf(GRANULE) && !fits(Self::root()), CONTIGUOUS),
                }
            }
        }

        impl<const GRANULE: u32, const BITS: u32> Format for $name<GRANULE, BITS> {
            type Caps = Caps;
            const NAME: &'static str = $text;
            const LEVELS: u8 = {
                assert!(GRANULE == 12 || GRANULE == 14 || GRANULE == 16, "granules have 2^12, 2^14 or 2^16 bytes");
                assert!(BITS > GRANULE + $joined && BITS <= ADDRESS_BITS, "an address has up to 48 bits");
                levels(GRANULE, BITS - $joined)
            };
            const PAGE_SHIFT: u32 = GRANULE;
            const INDEX_BITS: u32 = GRANULE - 3;
            const ROOT_BITS: u32 = BITS - GRANULE - (GRANULE - 3) * (Self::LEVELS as u32 - 1);
            const EXTENSION: Extension = Extension::$extension;
            const ADDRESS: u64 = field(0, ADDRESS_BITS) & !field(0, GRANULE);

            #[inline(always)]
            fn decode(raw: u64, level: Level, caps: &Caps) -> Entry {
                decode(raw, Self::shape(level), caps)
            }

            #[inline(always)]
            fn plain(level: Level, caps: &Caps) -> Plain {
                plain(Self::shape(level), caps)
            }

            #[inline(always)]
            fn through(words: Words) -> Permissions {
                table_permissions(words.any, Stage::$stage)
            }

            #[inline(always)]
            fn permits(tables: Words, leaf: u64, caps: &Caps) -> Permissions {
                Self::through(tables) & leaf_permissions(leaf, Stage::$stage, caps).0
            }

            fn encode(entry: &Entry, level: Level, caps: &Caps) -> Result<u64, Unencodable> {
                encode(entry, Self::shape(level), caps)
            }

            fn marked(raw: u64, level: Level, caps: &Caps, access: Access) -> u64 {
                marked(raw, Self::shape(level), caps, access)
            }

            fn largest_leaf(_: &Caps) -> Level {
                largest_leaf(GRANULE).min(Self::root())
            }

            fn break_before_make(caps: &Caps) -> bool {
                caps.direct_resize == Feature::Off
            }
        }
    };
}

vmsa!(
    /// The half of TTBR0: addresses of `BITS` bits, zero above; granules of 2^`GRANULE` bytes.
    Lower, "Arm VMSAv8-64, lower half", Zero, First, 0
);
vmsa!(
    /// The half of TTBR1: addresses whose bits above `BITS` are ones.
    Upper, "Arm VMSAv8-64, upper half", Ones, First, 0
);
vmsa!(
    /// The second stage: intermediate physical addresses of `BITS` bits. Where a level less will do with up to 16
    /// joined roots, it has a level less.
    Second, "Arm VMSAv8-64, second stage", Zero, Second, 4
);

#[inline(always)]
fn decode(raw: u64, shape: Shape, caps: &Caps) -> Entry {
    let last = shape.level == Level::PAGES;
    match (raw & VALID != 0, raw & TABLE != 0) {
        (false, _) => Entry::Absent { software: raw },
        (true, true) if !last => decode_table(raw, shape, caps),
        (true, typed) if typed == last && shape.maps() => decode_leaf(raw, shape, caps),
        _ => Entry::Malformed(Malformed::LeafAtThisLevel),
    }
}

/// By itself: a contiguous hint is decoded.
#[inline(always)]
fn plain(shape: Shape, caps: &Caps) -> Plain {
    let last = shape.level == Level::PAGES;
    let beyond = |shift| caps.beyond() & shape.address(shift);
    let table = if last { Bits::NONE } else { Bits::new(VALID | TABLE, beyond(shape.granule)) };
    let leaf = match (shape.maps(), last) {
        (false, _) => Bits::NONE,
        (true, true) => Bits::new(VALID | TABLE, CONTIGUOUS | beyond(shape.shift)),
        (true, false) => Bits::new(VALID, TABLE | CONTIGUOUS | beyond(shape.shift)),
    };
    Plain { table, leaf }
}

/// What entries that name tables permit, whose withholding bits are those of `raw`.
#[inline(always)]
fn table_permissions(raw: u64, stage: Stage) -> Permissions {
    let mut permissions = Permissions::all();
    if stage == Stage::First {
        for (bit, right) in TABLE_RIGHTS {
            permissions.set(right, raw & bit == 0);
        }
    }
    permissions
}

#[inline(always)]
fn decode_table(raw: u64, shape: Shape, caps: &Caps) -> Entry {
    let at = raw & shape.address(shape.granule);
    if at & caps.beyond() != 0 {
        return Entry::Malformed(Malformed::Beyond(Output(at)));
    }
    let permissions = table_permissions(raw, shape.stage);
    Entry::Table(Table {
        // NSTable, address bits below the granule, and in the second stage the bits that are only the first's: reserved,
        // and kept to be seen.
        software: raw & !(VALID | TABLE | shape.address(shape.granule) | table_rights(shape.stage)),
        ..Table::new(Output(at), permissions, Memory::Physical)
    })
}

const TABLE_RIGHTS: [(u64, Permissions); 4] = [
    (PXN_TABLE, Permissions::EXECUTE_PRIVILEGED),
    (UXN_TABLE, Permissions::EXECUTE_USER),
    (NO_USER_TABLE, Permissions::USER),
    (NO_WRITE_TABLE, Permissions::WRITE),
];

const fn table_rights(stage: Stage) -> u64 {
    match stage {
        Stage::First => PXN_TABLE | UXN_TABLE | NO_USER_TABLE | NO_WRITE_TABLE,
        Stage::Second => 0,
    }
}

/// D8.5: tables keep nothing; of a leaf all bits but these stay as they are, reserved ones too.
fn marked(raw: u64, shape: Shape, caps: &Caps, access: Access) -> u64 {
    let Entry::Leaf(_) = decode(raw, shape, caps) else { return raw };
    let dirties = access == Access::Write && caps.dirty_management == Feature::On && raw & DIRTY_MANAGED != 0;
    match (dirties, shape.stage) {
        (false, _) => raw | ACCESSED,
        (true, Stage::First) => (raw | ACCESSED) & !AP_HIGH,
        (true, Stage::Second) => raw | ACCESSED | AP_HIGH,
    }
}

/// Bits of a leaf that say something, apart from its address.
const fn leaf_bits(stage: Stage, caps: &Caps) -> u64 {
    let managed = if matches!(caps.dirty_management, Feature::On) { DIRTY_MANAGED } else { 0 };
    let common = VALID | TABLE | AP_LOW | AP_HIGH | field(SHARE_SHIFT, 2) | ACCESSED | CONTIGUOUS;
    let common = common | managed | WAS_DIRTY;
    match (stage, caps.separate_execute) {
        (Stage::First, _) => common | field(ATTRIBUTES_SHIFT, 3) | NOT_GLOBAL | XN_LOW | XN_HIGH,
        (Stage::Second, Feature::On) => common | field(ATTRIBUTES_SHIFT, 4) | XN_LOW | XN_HIGH,
        (Stage::Second, Feature::Off) => common | field(ATTRIBUTES_SHIFT, 4) | XN_HIGH,
    }
}

/// What a leaf permits, and whether it is clean: writable, and not written.
#[inline(always)]
fn leaf_permissions(raw: u64, stage: Stage, caps: &Caps) -> (Permissions, bool) {
    let set = |bit: u64| raw & bit != 0;
    let (low, high) = (set(AP_LOW), set(AP_HIGH));
    let mut permissions = Permissions::empty();
    let withheld = match stage {
        Stage::First => {
            permissions.set(Permissions::READ, true);
            permissions.set(Permissions::USER, low);
            permissions.set(Permissions::EXECUTE_PRIVILEGED, !set(XN_LOW));
            permissions.set(Permissions::EXECUTE_USER, !set(XN_HIGH));
            high
        }
        Stage::Second => {
            permissions.set(Permissions::READ, low);
            permissions.set(Permissions::USER, true);
            // XN[1:0]: 00 all, 01 users, 10 nobody, 11 privileged code.
            let differs = caps.separate_execute == Feature::On && set(XN_LOW);
            permissions.set(Permissions::EXECUTE_USER, !set(XN_HIGH));
            permissions.set(Permissions::EXECUTE_PRIVILEGED, set(XN_HIGH) == differs);
            !high
        }
    };
    let clean = caps.dirty_management == Feature::On && set(DIRTY_MANAGED) && withheld;
    permissions.set(Permissions::WRITE, !withheld || clean);
    (permissions, clean)
}

#[inline(always)]
fn decode_leaf(raw: u64, shape: Shape, caps: &Caps) -> Entry {
    let output = raw & shape.address(shape.shift);
    if output & caps.beyond() != 0 {
        return Entry::Malformed(Malformed::Beyond(Output(output)));
    }
    let set = |bit: u64| raw & bit != 0;
    let share = match raw >> SHARE_SHIFT & 3 {
        0 => Shareability::Non,
        1 => Shareability::Reserved,
        2 => Shareability::Outer,
        _ => Shareability::Inner,
    };
    let manages = caps.dirty_management == Feature::On;
    let (permissions, clean) = leaf_permissions(raw, shape.stage, caps);
    let writable = permissions.contains(Permissions::WRITE);
    // What is writable keeps DBM when it is written, and bit 55, which says something elsewhere only.
    let kept = match (manages, writable) {
        (true, true) => DIRTY_MANAGED | WAS_DIRTY,
        (true, false) => 0,
        (false, _) => WAS_DIRTY,
    };
    let (shift, hint) = match shape.joined {
        Some(joined) => (if set(CONTIGUOUS) { joined } else { shape.shift }, 0),
        None => (shape.shift, CONTIGUOUS),
    };
    let software = raw & (kept | hint | !(leaf_bits(shape.stage, caps) | shape.address(shape.shift)));
    let attributes = raw >> ATTRIBUTES_SHIFT;
    let memory = match shape.stage {
        Stage::First => Memory::Mair(low_byte(attributes & 7), share),
        Stage::Second => Memory::MemAttr(low_byte(attributes & 15), share),
    };
    Entry::Leaf(Leaf {
        accessed: set(ACCESSED),
        dirty: manages && if writable { !clean } else { set(WAS_DIRTY) },
        global: shape.stage == Stage::First && !set(NOT_GLOBAL),
        software,
        ..Leaf::new(Output(output), shift, permissions, memory)
    })
}

fn encode(entry: &Entry, shape: Shape, caps: &Caps) -> Result<u64, Unencodable> {
    match *entry {
        Entry::Absent { software: word } => software(word, !VALID),
        Entry::Table(table) => encode_table(&table, shape, caps),
        Entry::Leaf(leaf) => encode_leaf(&leaf, shape, caps),
        Entry::Malformed(_) => Err(Unencodable::Kind),
    }
}

fn encode_table(table: &Table, shape: Shape, caps: &Caps) -> Result<u64, Unencodable> {
    names_next(table, shape.level)?;
    let at = aligned(table.at, shape.address(shape.granule) & !caps.beyond())?;
    if table.memory != Memory::Physical {
        return Err(Unencodable::Memory(table.memory));
    }
    if table.accessed || table.global {
        return Err(Unencodable::Flag);
    }
    let software = software(table.software, TABLE_SOFTWARE)?;
    let withheld = Permissions::all() - table.permissions;
    let rights = TABLE_RIGHTS.iter().filter(|(_, right)| withheld.contains(*right));
    let word = rights.fold(VALID | TABLE | at | software, |word, (bit, _)| word | bit);
    if withheld.contains(Permissions::READ) || (shape.stage == Stage::Second && !withheld.is_empty()) {
        return Err(Unencodable::Permissions(table.permissions));
    }
    Ok(word)
}

fn encode_leaf(leaf: &Leaf, shape: Shape, caps: &Caps) -> Result<u64, Unencodable> {
    let shift = shape.shift;
    let contiguous = shape.joined == Some(leaf.shift);
    if !shape.maps() || !(leaf.shift == shift || contiguous) {
        return Err(Unencodable::Size { shift: leaf.shift });
    }
    let output = aligned(leaf.output, shape.address(shift) & !caps.beyond())?;
    if leaf.key != 0 {
        return Err(Unencodable::Key(leaf.key));
    }
    let can = |permission| leaf.permissions.contains(permission);
    let manages = caps.dirty_management == Feature::On;
    if (leaf.dirty && !manages) || (leaf.global && shape.stage == Stage::Second) {
        return Err(Unencodable::Flag);
    }
    let software = software(leaf.software, LEAF_SOFTWARE | DIRTY_MANAGED | shape.idle)?;
    let writable = can(Permissions::WRITE);
    let clean = manages && writable && !leaf.dirty;
    // Left in what may no longer be written, DBM would let it be written again.
    let software = if manages && !writable { software & !DIRTY_MANAGED } else { software };
    // A hint that was idle in the root would say something further down.
    let software = if shape.joined.is_some() { software & !shape.idle } else { software };
    Ok(VALID
        | set(shape.level == Level::PAGES, TABLE)
        | output
        | encode_rights(leaf, shape.stage, writable && !clean, caps)?
        | encode_memory(leaf.memory, shape.stage)?
        | set(leaf.accessed, ACCESSED)
        | set(shape.stage == Stage::First && !leaf.global, NOT_GLOBAL)
        | set(contiguous, CONTIGUOUS)
        | set(clean, DIRTY_MANAGED)
        | set(leaf.dirty && !writable, WAS_DIRTY)
        | software)
}

fn encode_rights(leaf: &Leaf, stage: Stage, writable: bool, caps: &Caps) -> Result<u64, Unencodable> {
    let can = |permission| leaf.permissions.contains(permission);
    let (by_users, by_privileged) = (can(Permissions::EXECUTE_USER), can(Permissions::EXECUTE_PRIVILEGED));
    match stage {
        Stage::First if can(Permissions::READ) => Ok(set(can(Permissions::USER), AP_LOW)
            | set(!writable, AP_HIGH)
            | set(!by_privileged, XN_LOW)
            | set(!by_users, XN_HIGH)),
        Stage::Second
            if can(Permissions::USER)
                && (by_users == by_privileged || caps.separate_execute == Feature::On) =>
        {
            Ok(set(can(Permissions::READ), AP_LOW)
                | set(writable, AP_HIGH)
                | set(by_users != by_privileged, XN_LOW)
                | set(!by_users, XN_HIGH))
        }
        _ => Err(Unencodable::Permissions(leaf.permissions)),
    }
}

fn encode_memory(memory: Memory, stage: Stage) -> Result<u64, Unencodable> {
    let (number, share) = match (memory, stage) {
        (Memory::Mair(index @ 0..=7, share), Stage::First) => (index, share),
        (Memory::MemAttr(number @ 0..=15, share), Stage::Second) => (number, share),
        _ => return Err(Unencodable::Memory(memory)),
    };
    let share = match share {
        Shareability::Non => 0,
        Shareability::Outer => 2,
        Shareability::Inner => 3,
        Shareability::Reserved => return Err(Unencodable::Memory(memory)),
    };
    Ok(u64::from(number) << ATTRIBUTES_SHIFT | share << SHARE_SHIFT)
}
