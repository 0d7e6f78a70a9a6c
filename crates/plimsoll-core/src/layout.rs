//! Where a guest's memory lies in its physical address space, holes and all.
//!
//! Enters: regions as a VMM states them. Leaves: a checked layout that turns guest physical addresses into dense page
//! indices and back. Every region starts and ends on a 2 MiB boundary, so a block never spans a hole and index
//! arithmetic inside a block is address arithmetic; smaller holes (the PC's 640 KiB one) are the VMM's to keep out of
//! use.
use alloc::vec::Vec;
use core::fmt;
use plimsoll_types::{BLOCK_SIZE, ByteCount, Gpa, PageCount, PageIndex};

/// Most pages a layout may have: page indices above it are not pages (the airlock's table uses some as marks).
pub const PAGES_MAX: u32 = u32::MAX - 511;

/// One contiguous piece of guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Its first address.
    pub start: Gpa,
    /// Its length.
    pub bytes: ByteCount,
}

/// A guest's memory: regions in ascending order, none empty, none overlapping, all made of whole blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GuestLayout {
    regions: Vec<Region>,
    /// The page index of each region's first page.
    first: Vec<u32>,
    pages: u32,
}

/// A layout that cannot be used. The VMM that stated it is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no region at all.
    Empty,
    /// A region is empty or does not start and end on a multiple of 2 MiB.
    Unaligned {
        /// The region.
        region: Region,
    },
    /// A region starts before the one listed ahead of it ends, or reaches past the end of the address space.
    OutOfOrder {
        /// The region.
        region: Region,
    },
    /// All regions together have more than [`PAGES_MAX`] pages (16 TiB).
    TooLarge,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("a machine needs at least one memory region"),
            Self::Unaligned { region } => write!(
                f,
                "the region of {} bytes at {} is empty or not made of whole 2 MiB blocks",
                region.bytes.0, region.start
            ),
            Self::OutOfOrder { region } => {
                write!(
                    f,
                    "the region of {} bytes at {} overlaps another, is out of order or wraps around",
                    region.bytes.0, region.start
                )
            }
            Self::TooLarge => f.write_str("the machine has more than 16 TiB of memory"),
        }
    }
}

impl core::error::Error for LayoutError {}

impl GuestLayout {
    /// Checks the regions.
    ///
    /// # Errors
    /// [`LayoutError`] names the first region that is wrong.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        let mut first = Vec::with_capacity(regions.len());
        let mut pages = 0u32;
        let mut free_from = Gpa(0);
        for region in &regions {
            let aligned =
                region.start.0.is_multiple_of(BLOCK_SIZE as u64) && region.bytes.is_multiple_of(BLOCK_SIZE);
            if !aligned || region.bytes.0 == 0 {
                return Err(LayoutError::Unaligned { region: *region });
            }
            let end = region.start.checked_add(region.bytes.0);
            free_from = end
                .filter(|_| region.start >= free_from)
                .ok_or(LayoutError::OutOfOrder { region: *region })?;
            first.push(pages);
            let count = u32::try_from(region.bytes.pages_floor().0).ok();
            let pages_so_far =
                count.and_then(|count| pages.checked_add(count)).filter(|pages| *pages <= PAGES_MAX);
            let pages_so_far = pages_so_far.ok_or(LayoutError::TooLarge)?;
            pages = pages_so_far;
        }
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        Ok(Self { regions, first, pages })
    }

    /// A layout of a few pages for the model checker and simulator: one region that need not be whole blocks.
    pub fn dense(pages: u32) -> Self {
        let bytes = ByteCount(PageCount(u64::from(pages)).byte_offset());
        Self { regions: alloc::vec![Region { start: Gpa(0), bytes }], first: alloc::vec![0], pages }
    }

    /// The regions, in ascending order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// All pages of all regions.
    pub fn pages(&self) -> PageCount {
        PageCount(u64::from(self.pages))
    }

    /// The same as a subscript bound: page indices are below it.
    pub fn page_limit(&self) -> PageIndex {
        PageIndex(self.pages)
    }

    /// The region a page lies in and its byte offset there, or `None` past the last page.
    pub fn locate(&self, page: PageIndex) -> Option<(usize, u64)> {
        if page >= self.page_limit() {
            return None;
        }
        let region = self.first.partition_point(|first| *first <= page.0).checked_sub(1)?;
        Some((region, PageCount(u64::from(page.0 - self.first[region])).byte_offset()))
    }

    /// A page's guest physical address, or `None` past the last page.
    pub fn gpa_of(&self, page: PageIndex) -> Option<Gpa> {
        let (region, offset) = self.locate(page)?;
        self.regions[region].start.checked_add(offset)
    }

    /// The page at a guest physical address, or `None` in a hole.
    pub fn index_of(&self, gpa: Gpa) -> Option<PageIndex> {
        let region = self.regions.partition_point(|region| region.start <= gpa).checked_sub(1)?;
        let offset = ByteCount(gpa.0 - self.regions[region].start.0);
        let page = u32::try_from(offset.pages_floor().0).ok()?;
        (offset < self.regions[region].bytes).then_some(PageIndex(self.first[region] + page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    const MIB: u64 = 1 << 20;

    fn region(start_mib: u64, mib: u64) -> Region {
        Region { start: Gpa(start_mib * MIB), bytes: ByteCount::mib(mib) }
    }

    #[test]
    fn indices_are_dense_across_a_hole_and_addresses_in_it_have_none() {
        let layout = GuestLayout::new(vec![region(0, 4), region(256, 2)]).unwrap();
        assert_eq!(layout.pages(), PageCount(1536));
        assert_eq!(layout.index_of(Gpa(4 * MIB - 1)), Some(PageIndex(1023)));
        assert_eq!(layout.index_of(Gpa(4 * MIB)), None);
        assert_eq!(layout.index_of(Gpa(256 * MIB)), Some(PageIndex(1024)));
        assert_eq!(layout.index_of(Gpa(258 * MIB)), None);
        assert_eq!(layout.locate(PageIndex(1025)), Some((1, 4096)));
        assert_eq!(layout.locate(PageIndex(1536)), None);
        for page in (0..1536).map(PageIndex) {
            assert_eq!(layout.gpa_of(page).and_then(|gpa| layout.index_of(gpa)), Some(page));
        }
    }

    #[test]
    fn layouts_that_cannot_be_are_refused_by_region() {
        assert_eq!(GuestLayout::new(vec![]), Err(LayoutError::Empty));
        let odd = Region { start: Gpa(4096), bytes: ByteCount::mib(2) };
        assert_eq!(GuestLayout::new(vec![odd]), Err(LayoutError::Unaligned { region: odd }));
        let zero = region(2, 0);
        assert_eq!(GuestLayout::new(vec![region(0, 2), zero]), Err(LayoutError::Unaligned { region: zero }));
        for second in [
            region(2, 2),
            region(0, 2),
            Region { start: Gpa(u64::MAX - (2 << 20) + 1), bytes: ByteCount::mib(4) },
        ] {
            assert_eq!(
                GuestLayout::new(vec![region(0, 4), second]),
                Err(LayoutError::OutOfOrder { region: second })
            );
        }
        let huge = Region { start: Gpa(0), bytes: ByteCount(1 << 45) };
        assert_eq!(GuestLayout::new(vec![huge]), Err(LayoutError::TooLarge));
    }
}
