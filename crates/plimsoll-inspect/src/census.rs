//! What the host has of a range: a range of the VMM's addresses enters, sums of pages by state leave, which add up to its length.
use crate::host::State;
use core::ops::AddAssign;
use plimsoll_sys::HvaRange;
use plimsoll_sys::frames::{FrameError, FrameFlags, Frames};
use plimsoll_sys::pagemap::{Categories, Filter, Pagemap, PagemapError};
use plimsoll_types::{ByteCount, Pfn};

/// Frames looked up at once: those of 64 MiB of a range.
const STEP: ByteCount = ByteCount::mib(64);

/// Bytes by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// In RAM.
    pub present: ByteCount,
    /// Of these, mapped as huge pages.
    pub huge: ByteCount,
    /// Only ever read: the one page of zeros.
    pub zero: ByteCount,
    /// In swap.
    pub swapped: ByteCount,
    /// Nowhere.
    pub absent: ByteCount,
}

impl Census {
    /// Counts a range of whole pages. The machine goes on meanwhile: a page counts as it was when the count came by.
    ///
    /// # Errors
    /// The page map cannot be read.
    pub fn take(pagemap: &Pagemap, range: HvaRange) -> Result<Self, PagemapError> {
        let mut sum = Self::default();
        let filter = Filter {
            all_of: Categories::empty(),
            any_of: Categories::PRESENT | Categories::SWAPPED,
            report: Categories::PRESENT | Categories::SWAPPED | Categories::ZERO_PAGE | Categories::HUGE,
        };
        pagemap.scan(range, filter, |run| {
            let bytes = run.range.len();
            match State::of(run.categories) {
                State::Present => {
                    sum.present += bytes;
                    sum.huge += if run.categories.contains(Categories::HUGE) { bytes } else { ByteCount(0) };
                }
                State::Zero => sum.zero += bytes,
                State::Swapped => sum.swapped += bytes,
                State::Absent => {}
            }
        })?;
        sum.absent = range.len().saturating_sub(sum.present + sum.zero + sum.swapped);
        Ok(sum)
    }

    /// All of it.
    pub fn total(&self) -> ByteCount {
        self.present + self.zero + self.swapped + self.absent
    }
}

impl AddAssign for Census {
    fn add_assign(&mut self, other: Self) {
        let Self { present, huge, zero, swapped, absent } = other;
        self.present += present;
        self.huge += huge;
        self.zero += zero;
        self.swapped += swapped;
        self.absent += absent;
    }
}

/// Why merged pages cannot be counted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergedError {
    /// The page map.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The frames.
    #[error(transparent)]
    Frames(#[from] FrameError),
}

/// Bytes of a range whose pages KSM has merged, with others or with the page of zeros; `None` if the kernel names no frames. Takes a
/// look at each frame.
///
/// # Errors
/// Page map or frames cannot be read: both are root's.
pub fn merged(pagemap: &Pagemap, frames: &Frames, range: HvaRange) -> Result<Option<ByteCount>, MergedError> {
    let mut sum = ByteCount(0);
    for part in steps(range) {
        let Some(present) = named(pagemap.frames(part)?) else { return Ok(None) };
        frames.each(&present, |_, flags| {
            if flags.contains(FrameFlags::KSM) {
                sum += ByteCount(4096);
            }
        })?;
    }
    Ok(Some(sum))
}

/// The range in parts whose frames are looked up at once.
pub(crate) fn steps(range: HvaRange) -> impl Iterator<Item = HvaRange> {
    let mut rest = range;
    core::iter::from_fn(move || {
        let len = rest.len().min(STEP);
        let part = HvaRange::new(rest.start(), len).filter(|part| !part.is_empty())?;
        rest = rest.skip(len)?;
        Some(part)
    })
}

/// The frames of those pages that are in RAM; `None` if one has no name, as without CAP_SYS_ADMIN.
fn named(frames: Vec<Option<Pfn>>) -> Option<Vec<Pfn>> {
    frames.into_iter().flatten().map(|frame| (frame != Pfn(0)).then_some(frame)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::ProcessId;
    use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
    use plimsoll_types::{Hva, PAGE_SIZE};

    #[test]
    fn a_census_adds_up_to_the_range_whatever_was_touched() {
        let page = PAGE_SIZE as u64;
        let mapping = AnonymousMapping::new(ByteCount(64 * page), HugePages::Never).unwrap();
        let pagemap = Pagemap::open(ProcessId::own()).unwrap();
        let empty = Census::take(&pagemap, mapping.range()).unwrap();
        assert_eq!(empty, Census { absent: ByteCount(64 * page), ..Census::default() });
        for place in [0, 1, 7, 40] {
            mapping.write_u64(ByteCount(place * page), 1).unwrap();
        }
        for place in [9, 10, 11] {
            mapping.read_u64(ByteCount(place * page)).unwrap();
        }
        let found = Census::take(&pagemap, mapping.range()).unwrap();
        assert_eq!((found.present, found.zero), (ByteCount(4 * page), ByteCount(3 * page)));
        assert_eq!((found.total(), found.huge), (ByteCount(64 * page), ByteCount(0)));
    }

    #[test]
    fn steps_are_the_whole_range_one_after_the_other() {
        let range = |start, end| HvaRange::between(Hva(start), Hva(end)).unwrap();
        let (first, end) = (4096, 4096 + 2 * STEP.0 + 8192);
        let cuts = [first, first + STEP.0, first + 2 * STEP.0, end];
        let expected: Vec<HvaRange> = cuts.windows(2).map(|ends| range(ends[0], ends[1])).collect();
        assert_eq!(steps(range(first, end)).collect::<Vec<_>>(), expected);
        assert_eq!(steps(range(first, first)).count(), 0);
    }

    #[test]
    fn frames_without_names_are_unknown_and_not_unmerged() {
        assert_eq!(named(vec![Some(Pfn(7)), None, Some(Pfn(9))]), Some(vec![Pfn(7), Pfn(9)]));
        assert_eq!(named(vec![None, Some(Pfn(0))]), None);
    }

    #[test]
    fn a_huge_page_counts_as_huge() {
        let mapping = AnonymousMapping::new(ByteCount::mib(4), HugePages::Prefer).unwrap();
        let start = mapping.range().start().0.next_multiple_of(2 << 20);
        let block = HvaRange::new(Hva(start), ByteCount::mib(2)).unwrap();
        if mapping.populate_write(block).and_then(|()| mapping.collapse(block)).is_err() {
            return println!("SKIPPED: this kernel makes no huge page here");
        }
        let found = Census::take(&Pagemap::open(ProcessId::own()).unwrap(), block).unwrap();
        assert_eq!((found.present, found.huge), (ByteCount::mib(2), ByteCount::mib(2)));
    }
}
