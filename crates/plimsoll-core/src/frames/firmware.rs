//! What firmware says of a host's memory, made into a map one can rely on.
//!
//! Enters: claims, as E820, PVH, multiboot or a device tree's memory and reserved-memory nodes make them, and the host's
//! own (its image, its tables) beside them. Leaves: regions in ascending order, disjoint, of whole pages. What no claim
//! names is a gap and never used. Firmware is not believed where it contradicts itself:
//!
//! | found | done |
//! |---|---|
//! | claims overlap | the later of [`Use`] wins: what is doubtful is not used |
//! | a border inside a page | the page goes to what is not usable, or to nobody |
//! | no bytes, or usable and no whole page | left out |
//! | usable, wraps around the address space | left out: its length is wrong, so nothing of it is known |
//! | another use, wraps around | reaches to the end of the address space |
//! | past the last address processors have (52 bits) | cut off there |
//! | neighbours of one use | joined |
//! | more claims than [`CLAIMS_MAX`], more regions than the map holds | refused |
//! | no usable page | refused |
use core::{fmt, ops::Range};
use plimsoll_types::{ByteCount, Hpa, PAGE_SHIFT, PAGE_SIZE, PageCount, Pfn};

/// Bytes of an E820 entry: address (8), length (8), type (4), all little-endian. PVH and ACPI 3.0 add four more, which mean
/// different things and are not looked at.
pub const E820_ENTRY: usize = 20;
/// Most claims looked at. Firmware makes dozens, and the work is quadratic.
pub const CLAIMS_MAX: usize = 1024;
/// Pages below the end of 52 bits of address, the most that x86-64 and Arm have.
const PAGES_END: u64 = 1 << (52 - PAGE_SHIFT);

/// What memory is for, the stronger claim last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Use {
    /// RAM that is free.
    Usable,
    /// Memory that keeps its bytes without power: not used.
    Persistent,
    /// ACPI tables, free once they have been read.
    AcpiTables,
    /// Kept over ACPI sleep states.
    AcpiNvs,
    /// Firmware's, a device's, the host's own, or of a type nobody knows.
    Reserved,
    /// RAM that is broken.
    Bad,
}

/// One statement about memory. Any values may be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// The first address.
    pub start: Hpa,
    /// How much.
    pub bytes: ByteCount,
    /// For what.
    pub what: Use,
}

/// What is wrong with a claim by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Empty,
    Wraps,
    Beyond,
}

impl Claim {
    /// Reads an E820 entry. Types: ACPI 6.5, table 15.4; what it does not name is reserved.
    pub fn from_e820(entry: &[u8; E820_ENTRY]) -> Self {
        let what = match u32::from_le_bytes(core::array::from_fn(|byte| entry[16 + byte])) {
            1 => Use::Usable,
            3 => Use::AcpiTables,
            4 => Use::AcpiNvs,
            5 => Use::Bad,
            7 => Use::Persistent,
            _ => Use::Reserved,
        };
        let start = Hpa(u64::from_le_bytes(core::array::from_fn(|byte| entry[byte])));
        let bytes = ByteCount(u64::from_le_bytes(core::array::from_fn(|byte| entry[8 + byte])));
        Self { start, bytes, what }
    }

    /// The whole pages it is about, and what was wrong with it. No pages are `0..0`.
    fn pages(&self) -> (Range<u64>, Option<Trouble>) {
        const NONE: Range<u64> = 0..0;
        let Some(past_first) = self.bytes.0.checked_sub(1) else { return (NONE, Some(Trouble::Empty)) };
        let last = self.start.0.checked_add(past_first);
        let is_usable = self.what == Use::Usable;
        if last.is_none() && is_usable {
            return (NONE, Some(Trouble::Wraps));
        }
        let last_byte = last.unwrap_or(u64::MAX);
        let (start, end) = if is_usable {
            let is_whole = last_byte % PAGE_SIZE as u64 == PAGE_SIZE as u64 - 1;
            (self.start.0.div_ceil(PAGE_SIZE as u64), (last_byte >> PAGE_SHIFT) + u64::from(is_whole))
        } else {
            (self.start.0 >> PAGE_SHIFT, (last_byte >> PAGE_SHIFT) + 1)
        };
        let trouble = match last {
            None => Some(Trouble::Wraps),
            Some(_) if start >= end => Some(Trouble::Empty),
            Some(_) if end > PAGES_END => Some(Trouble::Beyond),
            Some(_) => None,
        };
        let pages = start..end.min(PAGES_END);
        (if pages.is_empty() { NONE } else { pages }, trouble)
    }
}

/// Memory of one use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostRegion {
    /// Its first frame.
    pub first: Pfn,
    /// How many.
    pub pages: PageCount,
    /// For what.
    pub what: Use,
}

/// What had to be repaired, for the operator to see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Repairs {
    /// Claims to no whole page.
    pub empty: u32,
    /// Claims that wrapped around.
    pub wrapped: u32,
    /// Claims past the last address.
    pub beyond: u32,
    /// Pages claimed more than once.
    pub overlapping: PageCount,
}

/// A host's memory: at most `N` regions in ascending order, none empty, none touching another of the same use.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostMap<const N: usize> {
    regions: [HostRegion; N],
    len: usize,
    repairs: Repairs,
}

/// Claims that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostMapError {
    /// More claims than [`CLAIMS_MAX`].
    TooManyClaims {
        /// How many.
        found: usize,
    },
    /// The map has more regions than there is room for.
    TooManyRegions {
        /// The room.
        most: usize,
    },
    /// Nothing is usable.
    NoMemory {
        /// Of so many claims.
        claims: usize,
    },
}

impl fmt::Display for HostMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManyClaims { found } => {
                write!(f, "firmware makes {found} claims about memory; no more than {CLAIMS_MAX} are read")
            }
            Self::TooManyRegions { most } => write!(
                f,
                "firmware's claims divide memory into more than {most} regions; build with room for more"
            ),
            Self::NoMemory { claims } => {
                write!(f, "none of firmware's {claims} claims leaves a page of usable memory")
            }
        }
    }
}

impl core::error::Error for HostMapError {}

impl<const N: usize> HostMap<N> {
    /// Makes a map of claims in any order, by the rules at the top of this file.
    ///
    /// # Errors
    /// [`HostMapError`]: too many, or nothing to use.
    pub fn new(claims: &[Claim]) -> Result<Self, HostMapError> {
        if claims.len() > CLAIMS_MAX {
            return Err(HostMapError::TooManyClaims { found: claims.len() });
        }
        let nothing = HostRegion { first: Pfn(0), pages: PageCount(0), what: Use::Reserved };
        let mut map = Self { regions: [nothing; N], len: 0, repairs: Repairs::default() };
        claims.iter().filter_map(|claim| claim.pages().1).for_each(|trouble| map.repairs.note(trouble));
        // From border to border: between two of them every claim holds for all or for nothing.
        let mut at = 0;
        let borders =
            || claims.iter().map(|claim| claim.pages().0).flat_map(|pages| [pages.start, pages.end]);
        while let Some(next) = borders().filter(|border| *border > at).min() {
            let here = || claims.iter().filter(|claim| claim.pages().0.contains(&at));
            let pages = PageCount(next - at);
            if here().nth(1).is_some() {
                map.repairs.overlapping += pages;
            }
            if let Some(what) = here().map(|claim| claim.what).max() {
                map.push(HostRegion { first: Pfn(at), pages, what })?;
            }
            at = next;
        }
        if map.usable().next().is_none() {
            return Err(HostMapError::NoMemory { claims: claims.len() });
        }
        Ok(map)
    }

    fn push(&mut self, region: HostRegion) -> Result<(), HostMapError> {
        let last = self.regions[..self.len].last_mut();
        if let Some(last) = last.filter(|last| last.what == region.what && last.end() == region.first) {
            last.pages += region.pages;
            return Ok(());
        }
        let slot = self.regions.get_mut(self.len).ok_or(HostMapError::TooManyRegions { most: N })?;
        *slot = region;
        self.len += 1;
        Ok(())
    }

    /// All regions.
    pub fn regions(&self) -> &[HostRegion] {
        &self.regions[..self.len]
    }

    /// The regions of free RAM.
    pub fn usable(&self) -> impl DoubleEndedIterator<Item = &HostRegion> {
        self.regions().iter().filter(|region| region.what == Use::Usable)
    }

    /// What had to be repaired.
    pub fn repairs(&self) -> Repairs {
        self.repairs
    }
}

impl HostRegion {
    /// The frame after its last.
    pub const fn end(&self) -> Pfn {
        Pfn(self.first.0 + self.pages.0)
    }
}

impl Repairs {
    fn note(&mut self, trouble: Trouble) {
        *match trouble {
            Trouble::Empty => &mut self.empty,
            Trouble::Wraps => &mut self.wrapped,
            Trouble::Beyond => &mut self.beyond,
        } += 1;
    }
}
