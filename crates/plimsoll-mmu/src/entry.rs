//! What an entry of a page table says, in words that every format shares.
//!
//! Enters: nothing. Leaves: the value that [`crate::Format::decode`] gives and [`crate::Format::encode`] takes. A format
//! gives no value it would not take back, [`Malformed`] and leaves that nobody could use apart.
use crate::address::{Level, Output};
use core::fmt;

bitflags::bitflags! {
    /// What an entry lets be done through it. A walk ends up with the intersection over its entries where the format is
    /// hierarchical.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Permissions: u8 {
        /// Data may be read.
        const READ = 1;
        /// Data may be written.
        const WRITE = 1 << 1;
        /// Users may fetch instructions.
        const EXECUTE_USER = 1 << 2;
        /// User code is concerned. Always there in formats that do not know users.
        const USER = 1 << 3;
        /// Privileged code may fetch instructions.
        const EXECUTE_PRIVILEGED = 1 << 4;
        /// Instructions may be fetched, by whom else the page is for. Formats other than Arm's know no half of it.
        const EXECUTE = Self::EXECUTE_USER.bits() | Self::EXECUTE_PRIVILEGED.bits();
    }
}

impl Permissions {
    /// Whether users and privileged code differ in what they may execute.
    pub const fn execute_differs(self) -> bool {
        self.intersects(Self::EXECUTE) && !self.contains(Self::EXECUTE)
    }
}

/// How a processor may cache memory: the types of the PAT (SDM vol. 3 "Page Attribute Table") and of EPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cache {
    /// Not cached, strongly ordered (UC).
    Uncacheable,
    /// Not cached, writes combined (WC).
    WriteCombining,
    /// Cached, writes go through (WT).
    WriteThrough,
    /// Reads cached, writes not (WP).
    WriteProtected,
    /// Cached (WB).
    WriteBack,
    /// UC that a range register may weaken (UC-, in the PAT only).
    UncacheableMinus,
}

impl Cache {
    /// The type that a byte of the PAT or an EPT entry's field stands for; `None` for reserved numbers.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Uncacheable,
            1 => Self::WriteCombining,
            4 => Self::WriteThrough,
            5 => Self::WriteProtected,
            6 => Self::WriteBack,
            7 => Self::UncacheableMinus,
            _ => return None,
        })
    }

    /// What an access is whose page has the type `page` by the PAT, where physical memory has this type by range registers
    /// or by EPT (SDM vol. 3, table "Effective Page-Level Memory Types for Pentium III and More Recent Processor
    /// Families"). UC- is a page's type only: memory that claims it is taken as UC.
    #[must_use]
    pub const fn with_page(self, page: Self) -> Self {
        use Cache::{Uncacheable, UncacheableMinus, WriteBack, WriteCombining, WriteProtected, WriteThrough};
        match (self, page) {
            (_, WriteCombining) => WriteCombining,
            (WriteCombining | WriteProtected, UncacheableMinus) => WriteCombining,
            (_, Uncacheable | UncacheableMinus) | (Uncacheable | UncacheableMinus, _) => Uncacheable,
            (memory, WriteBack) => memory,
            (WriteCombining, _) => Uncacheable,
            (_, WriteThrough | WriteProtected) => page,
        }
    }

    /// Its number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Uncacheable => 0,
            Self::WriteCombining => 1,
            Self::WriteThrough => 4,
            Self::WriteProtected => 5,
            Self::WriteBack => 6,
            Self::UncacheableMinus => 7,
        }
    }
}

/// IA32_PAT: what the index in an x86-64 entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pat(pub u64);

impl Pat {
    /// What processors begin with.
    pub const RESET: Self = Self(0x0007_0406_0007_0406);

    /// The type at `index`, 0 to 7; `None` for a reserved one, which the register does not take.
    pub const fn cache(self, index: u8) -> Option<Cache> {
        Cache::from_number(self.0.to_le_bytes()[(index & 7) as usize])
    }
}

/// Whether the guest's PAT has a say in the type that EPT gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestPat {
    /// Both are combined.
    Combined,
    /// EPT's alone counts ("ignore PAT").
    Ignored,
}

/// How memory is accessed, as the format says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// The format's entry says nothing: physical memory's own attributes.
    Physical,
    /// x86-64: index into the [`Pat`], 0 to 7; of a table, 0 to 3.
    Pat(u8),
    /// Intel EPT.
    Ept(Cache, GuestPat),
    /// RISC-V Svpbmt NC: not cached, idempotent, weakly ordered.
    NonCacheable,
    /// RISC-V Svpbmt IO: not cached, not idempotent, strongly ordered.
    Io,
    /// VT-d, SNP; AMD-Vi, FC: caches are snooped, even where the device says that they need not be.
    Snooped,
    /// Arm, first stage: index into MAIR_ELx, 0 to 7, and who else is to see what is cached.
    Mair(u8, Shareability),
    /// Arm, second stage: MemAttr, 0 to 15, whose meaning depends on HCR_EL2.FWB.
    MemAttr(u8, Shareability),
}

/// Arm's SH field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shareability {
    /// This processor alone.
    Non,
    /// A value that must not be written.
    Reserved,
    /// All observers.
    Outer,
    /// The processors of one operating system.
    Inner,
}

/// An entry that names the next table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Where the next table is.
    pub at: Output,
    /// What may be done through it at most; everything in formats that say so only in leaves.
    pub permissions: Permissions,
    /// How the next table is read.
    pub memory: Memory,
    /// A walk went through it since this was cleared.
    pub accessed: bool,
    /// All below is in every address space (RISC-V only).
    pub global: bool,
    /// Bits the hardware ignores, where they are.
    pub software: u64,
    /// How many levels are left out between the entry's and the next table's: addresses whose bits of those levels are not all zero
    /// do not go through it (AMD-Vi only, 0 elsewhere).
    pub skips: u8,
}

impl Table {
    /// An entry that names the table at `at`, with nothing set but what is given.
    pub const fn new(at: Output, permissions: Permissions, memory: Memory) -> Self {
        Self { at, permissions, memory, accessed: false, global: false, software: 0, skips: 0 }
    }

    /// The next table's level, where the entry is one of `level`; `None` where the tables have ended.
    pub fn leads_to(&self, level: Level) -> Option<Level> {
        let below = level.0.checked_sub(1)?.checked_sub(self.skips)?;
        (below > 0).then_some(Level(below))
    }
}

/// An entry that maps memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Where the memory begins; of one in a group, where it or the group begins, as the format writes it.
    pub output: Output,
    /// log2 of the bytes it maps: the level's, or more where a group of neighbours maps one naturally aligned run (Svnapot,
    /// Arm's contiguous hint).
    pub shift: u32,
    /// What may be done.
    pub permissions: Permissions,
    /// How it is cached.
    pub memory: Memory,
    /// It was used since this was cleared.
    pub accessed: bool,
    /// It was written since this was cleared.
    pub dirty: bool,
    /// It is in every address space.
    pub global: bool,
    /// Protection key, 0 where there are none.
    pub key: u8,
    /// Bits the hardware ignores, where they are.
    pub software: u64,
}

impl Leaf {
    /// Where the memory begins that it maps, by itself or in a group.
    pub const fn base(&self) -> Output {
        Output(self.output.0 >> self.shift << self.shift)
    }

    /// A leaf of `1 << shift` bytes with nothing set but what is given.
    pub const fn new(output: Output, shift: u32, permissions: Permissions, memory: Memory) -> Self {
        Self {
            output,
            shift,
            permissions,
            memory,
            accessed: false,
            dirty: false,
            global: false,
            key: 0,
            software: 0,
        }
    }
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing is mapped; the word is software's.
    Absent {
        /// The whole word.
        software: u64,
    },
    /// The next table.
    Table(Table),
    /// Memory.
    Leaf(Leaf),
    /// Something the hardware refuses.
    Malformed(Malformed),
}

/// Why the hardware refuses an entry: a page fault with RSVD on x86-64, a misconfiguration in EPT, a page fault on RISC-V, a
/// translation or address size fault on Arm, a fault for reserved fields on VT-d, an I/O page fault with PR on AMD-Vi.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Malformed {
    /// These bits are set and must not be.
    Reserved(u64),
    /// It lets write but not read.
    WriteWithoutRead,
    /// It lets execute but not read, which this processor does not do.
    ExecuteWithoutRead,
    /// The memory type has a reserved number.
    MemoryType(u8),
    /// It names a table where the tables end.
    TableAtLastLevel,
    /// It maps memory at a level that maps none.
    LeafAtThisLevel,
    /// It leads beyond physical memory, which on Arm is a fault of its own.
    Beyond(Output),
    /// It names a table of this level, which is not below its own (AMD-Vi).
    NextLevel(Level),
    /// It maps a page of a size that is not this level's (AMD-Vi). log2 of its bytes; 52 or more if no size is said.
    PageSize(u32),
    /// It leaves levels out, and the address has bits of them set (AMD-Vi).
    Skipped,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved(bits) => write!(f, "reserved bits {bits:#x} are set"),
            Self::WriteWithoutRead => f.write_str("it lets write and not read"),
            Self::ExecuteWithoutRead => {
                f.write_str("it lets execute and not read, which this processor does not do")
            }
            Self::MemoryType(number) => write!(f, "memory type {number} is reserved"),
            Self::TableAtLastLevel => f.write_str("it names a table below the last level"),
            Self::LeafAtThisLevel => f.write_str("nothing can be mapped at this level"),
            Self::Beyond(at) => write!(f, "{at} is beyond physical memory"),
            Self::NextLevel(level) => write!(f, "it names a table of {level}, which is not below its own"),
            Self::PageSize(shift) => write!(f, "2^{shift} bytes are no page of this level"),
            Self::Skipped => f.write_str("the address has bits set that belong to levels it leaves out"),
        }
    }
}

/// What of an entry a format, or this processor, has no bits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unencodable {
    /// An address that is not aligned to what it names, or beyond the processor's physical addresses.
    Address(Output),
    /// A combination of permissions.
    Permissions(Permissions),
    /// A memory type.
    Memory(Memory),
    /// A table that leaves so many levels out.
    Skips(u8),
    /// A size at this level.
    Size {
        /// log2 of its bytes.
        shift: u32,
    },
    /// A protection key.
    Key(u8),
    /// "Accessed", "dirty" or "global" where the format does not keep it.
    Flag,
    /// Software bits that are not software's, or a word that is not absent.
    Software(u64),
    /// A malformed entry, or a table at the last level.
    Kind,
}

impl fmt::Display for Unencodable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(at) => write!(f, "{at} is not aligned, or beyond physical memory"),
            Self::Permissions(permissions) => write!(f, "the format has no permissions {permissions:?}"),
            Self::Memory(memory) => write!(f, "the format has no memory type {memory:?}"),
            Self::Skips(levels) => write!(f, "{levels} levels cannot be left out here"),
            Self::Size { shift } => write!(f, "2^{shift} bytes cannot be mapped at this level"),
            Self::Key(key) => write!(f, "there is no protection key {key}"),
            Self::Flag => f.write_str("the format does not keep accessed, dirty or global here"),
            Self::Software(bits) => write!(f, "bits {bits:#x} are not software's"),
            Self::Kind => f.write_str("such an entry must not be written at this level"),
        }
    }
}

impl core::error::Error for Unencodable {}
