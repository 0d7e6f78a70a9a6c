//! Where everything lies in workload memory, and which vCPU owns it.
//!
//! What enters is a parameter page, of which nothing is believed; what leaves are addresses inside its
//! regions. What must never happen: two vCPUs owning a byte of the same page, or an address in a hole.
//!
//! Workload memory is counted densely in pages, holes skipped:
//!
//! ```text
//! page 0                                                        tables_end                       workload end
//! | vCPU 0: versions, bitmap | vCPU 1: versions, bitmap | ...   | data pages 0 .. data_pages | unused |
//! ```
//!
//! * *versions*: a word for each data page of the vCPU, see [`crate::versions`].
//! * *bitmap*: a bit for each data page of the vCPU: touched in the current window.
//! * *data pages* belong to vCPUs in groups of 16: group `g` to vCPU `g % vcpus`. Inside a vCPU its pages are
//!   counted densely: *local page* `l` is page `l % 16` of the vCPU's group `l / 16`. So vCPUs meet in every
//!   2 MiB block, and a vCPU still has runs of pages to give back at once.
use crate::abi::{
    ABI_VERSION, MAX_REGIONS, MAX_VCPUS, PAGE_SIZE, PARAMS_MAGIC, Params, Region, WORKLOAD_GPA,
};
use core::fmt;

/// Pages of a group: the unit of ownership and of locality.
pub const GROUP_PAGES: u64 = 16;
/// Version words in a page.
const VERSIONS_PER_PAGE: u64 = PAGE_SIZE / 8;
/// Bits of a bitmap in a page.
const BITS_PER_PAGE: u64 = PAGE_SIZE * 8;
/// One past the highest address any x86-64 processor has.
const ADDRESS_LIMIT: u64 = 1 << 52;

/// A region of workload memory with the number of its first page.
#[derive(Clone, Copy, Debug, Default)]
struct Extent {
    first_page: u64,
    gpa: u64,
}

/// Where everything lies.
#[derive(Clone, Debug)]
pub struct Layout {
    extents: [Extent; MAX_REGIONS],
    extent_count: usize,
    vcpus: u64,
    data_pages: u64,
    version_pages: u64,
    bitmap_pages: u64,
}

impl Layout {
    /// The layout of this guest, if its parameters make sense.
    pub fn new(params: &Params) -> Result<Self, LayoutError> {
        if params.magic != PARAMS_MAGIC || params.version != ABI_VERSION {
            return Err(LayoutError::OtherAbi { magic: params.magic, version: params.version });
        }
        if !(1..=MAX_VCPUS).contains(&params.vcpus) {
            return Err(LayoutError::Vcpus { found: params.vcpus });
        }
        if params.tsc_hz == 0 {
            return Err(LayoutError::NoClock);
        }
        let regions = usize::try_from(params.region_count)
            .ok()
            .and_then(|count| params.regions.get(..count))
            .filter(|regions| !regions.is_empty())
            .ok_or(LayoutError::RegionCount { found: params.region_count })?;
        let (extents, extent_count, pages) = extents(regions)?;

        let vcpus = u64::from(params.vcpus);
        let wanted = params.workload.footprint_bytes.div_ceil(PAGE_SIZE);
        let most = most_data_pages(pages, vcpus);
        let data_pages = if wanted == 0 { most } else { wanted };
        if data_pages > most {
            return Err(LayoutError::TooLarge { wanted_pages: wanted, most_pages: most });
        }
        // Every vCPU must own a page, or it would have nothing to do.
        let least = (vcpus - 1) * GROUP_PAGES + 1;
        if data_pages < least {
            return Err(LayoutError::TooSmall { found_pages: data_pages, least_pages: least });
        }
        let (version_pages, bitmap_pages) = table_pages(data_pages, vcpus);
        Ok(Self { extents, extent_count, vcpus, data_pages, version_pages, bitmap_pages })
    }

    /// Pages with contents, of all vCPUs.
    pub const fn data_pages(&self) -> u64 {
        self.data_pages
    }

    /// Pages that the programs use for themselves: versions and bitmaps of all vCPUs.
    pub const fn table_pages(&self) -> u64 {
        (self.version_pages + self.bitmap_pages) * self.vcpus
    }

    /// Data pages that a vCPU owns.
    pub const fn owned_pages(&self, vcpu: u32) -> u64 {
        let vcpu = vcpu as u64;
        let whole_groups = self.data_pages / GROUP_PAGES;
        let rest = self.data_pages % GROUP_PAGES;
        let owned_whole = (whole_groups + self.vcpus - 1 - vcpu) / self.vcpus;
        let owns_rest = whole_groups % self.vcpus == vcpu;
        owned_whole * GROUP_PAGES + if owns_rest { rest } else { 0 }
    }

    /// The number, in the whole guest, of a vCPU's local page.
    #[inline]
    pub const fn data_page(&self, vcpu: u32, local: u64) -> u64 {
        (local / GROUP_PAGES * self.vcpus + vcpu as u64) * GROUP_PAGES + local % GROUP_PAGES
    }

    /// Where a data page lies.
    #[inline]
    pub fn data_gpa(&self, data_page: u64) -> u64 {
        self.gpa(self.table_pages() + data_page)
    }

    /// Where the version word of a vCPU's local page lies.
    #[inline]
    pub fn version_gpa(&self, vcpu: u32, local: u64) -> u64 {
        let page = self.tables_of(vcpu) + local / VERSIONS_PER_PAGE;
        self.gpa(page) + local % VERSIONS_PER_PAGE * 8
    }

    /// Where the word of the bitmap lies that holds the bit of a vCPU's local page: bit `local % 64`.
    #[inline]
    pub fn bitmap_gpa(&self, vcpu: u32, local: u64) -> u64 {
        let page = self.tables_of(vcpu) + self.version_pages + local / BITS_PER_PAGE;
        self.gpa(page) + local % BITS_PER_PAGE / 64 * 8
    }

    const fn tables_of(&self, vcpu: u32) -> u64 {
        vcpu as u64 * (self.version_pages + self.bitmap_pages)
    }

    /// The address of a page of workload memory, which must be below the number of pages `new` found.
    #[inline]
    fn gpa(&self, page: u64) -> u64 {
        let mut extent = self.extents[0];
        for next in self.extents.iter().take(self.extent_count) {
            if next.first_page <= page {
                extent = *next;
            }
        }
        extent.gpa + (page - extent.first_page) * PAGE_SIZE
    }
}

/// The parts of the regions that are workload memory, how many, and their pages together.
fn extents(regions: &[Region]) -> Result<([Extent; MAX_REGIONS], usize, u64), LayoutError> {
    let mut extents = [Extent::default(); MAX_REGIONS];
    let (mut count, mut pages, mut previous_end) = (0, 0, 0);
    for &region in regions {
        let Region { gpa, len } = region;
        let end = gpa.checked_add(len).filter(|&end| end <= ADDRESS_LIMIT);
        let end = end.ok_or(LayoutError::Region { region })?;
        let aligned = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        if !aligned || len == 0 || gpa < previous_end {
            return Err(LayoutError::Region { region });
        }
        previous_end = end;
        let start = gpa.max(WORKLOAD_GPA);
        if start < end {
            extents[count] = Extent { first_page: pages, gpa: start };
            count += 1;
            pages += (end - start) / PAGE_SIZE;
        }
    }
    Ok((extents, count, pages))
}

/// Pages of one vCPU's versions and bitmap. Every vCPU gets what the one with the most pages needs.
const fn table_pages(data_pages: u64, vcpus: u64) -> (u64, u64) {
    let owned_most = data_pages.div_ceil(GROUP_PAGES).div_ceil(vcpus) * GROUP_PAGES;
    (owned_most.div_ceil(VERSIONS_PER_PAGE), owned_most.div_ceil(BITS_PER_PAGE))
}

/// The most data pages that fit beside their tables, by bisection: the need grows with the number.
const fn most_data_pages(pages: u64, vcpus: u64) -> u64 {
    let (mut fits, mut too_many) = (0, pages + 1);
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        let (versions, bitmap) = table_pages(middle, vcpus);
        if middle + (versions + bitmap) * vcpus <= pages {
            fits = middle;
        } else {
            too_many = middle;
        }
    }
    fits
}

/// Why a parameter page describes no guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// The page was written by something that speaks another version, or is no parameter page.
    OtherAbi {
        /// The first word.
        magic: u64,
        /// The version.
        version: u32,
    },
    /// No vCPU, or too many.
    Vcpus {
        /// How many.
        found: u32,
    },
    /// The clock does not run.
    NoClock,
    /// No region, or too many.
    RegionCount {
        /// How many.
        found: u32,
    },
    /// A region is empty, unaligned, out of order or beyond the end of physical memory.
    Region {
        /// The region.
        region: Region,
    },
    /// The footprint does not fit.
    TooLarge {
        /// Pages asked for.
        wanted_pages: u64,
        /// Pages that fit.
        most_pages: u64,
    },
    /// There is not a page for every vCPU.
    TooSmall {
        /// Pages there are.
        found_pages: u64,
        /// Pages needed.
        least_pages: u64,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::OtherAbi { magic, version } => write!(
                f,
                "found magic {magic:#x} and version {version}: this guest needs {PARAMS_MAGIC:#x} and {ABI_VERSION}"
            ),
            Self::Vcpus { found } => {
                write!(f, "{found} vCPUs were asked for: use 1 to {MAX_VCPUS}")
            }
            Self::NoClock => f.write_str("the clock has 0 ticks to a second: state its frequency"),
            Self::RegionCount { found } => {
                write!(f, "{found} regions of memory were given: use 1 to {MAX_REGIONS}")
            }
            Self::Region { region: Region { gpa, len } } => write!(
                f,
                "region {gpa:#x}+{len:#x} is empty, unaligned, out of order or too high: use ascending whole pages"
            ),
            Self::TooLarge { wanted_pages, most_pages } => write!(
                f,
                "a footprint of {wanted_pages} pages does not fit: ask for at most {most_pages} or give more memory"
            ),
            Self::TooSmall { found_pages, least_pages } => write!(
                f,
                "a footprint of {found_pages} pages is too small for the vCPUs: give at least {least_pages}"
            ),
        }
    }
}

impl core::error::Error for LayoutError {}
