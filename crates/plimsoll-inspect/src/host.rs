//! What the host has under a page of the guest's. An address in the VMM's process enters, the page's state and frame leave; both are as
//! old as the look.
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::{Categories, Filter, Pagemap, PagemapError};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE, Pfn};

/// Where a page's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In RAM.
    Present,
    /// The one page of zeros that all share: it was read and never written.
    Zero,
    /// In swap, or on the way to it.
    Swapped,
    /// Nowhere: it was never touched, or was given back. Shared memory that was swapped out looks the same.
    Absent,
}

impl State {
    /// What these categories make of a page.
    pub const fn of(categories: Categories) -> Self {
        if categories.contains(Categories::ZERO_PAGE) {
            Self::Zero
        } else if categories.contains(Categories::PRESENT) {
            Self::Present
        } else if categories.contains(Categories::SWAPPED) {
            Self::Swapped
        } else {
            Self::Absent
        }
    }

    /// In one word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Zero => "zero",
            Self::Swapped => "swapped",
            Self::Absent => "absent",
        }
    }
}

/// A page of the VMM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage {
    /// Where its bytes are.
    pub state: State,
    /// Whether the host maps it as a part of a huge page.
    pub is_huge: bool,
    /// Its frame, if it is in RAM and this process may know.
    pub frame: Option<Pfn>,
}

impl HostPage {
    /// Looks at the page that holds `hva`.
    ///
    /// # Errors
    /// The page map cannot be read.
    pub fn look(pagemap: &Pagemap, hva: Hva) -> Result<Self, PagemapError> {
        let page = PAGE_SIZE as u64;
        let start = Hva(hva.0 / page * page);
        let range = HvaRange::new(start, ByteCount(page));
        let mut found = Categories::empty();
        let Some(range) = range else {
            return Ok(Self { state: State::Absent, is_huge: false, frame: None });
        };
        let nothing = Categories::empty();
        let told = Categories::PRESENT | Categories::SWAPPED | Categories::ZERO_PAGE | Categories::HUGE;
        pagemap.scan(range, Filter { all_of: nothing, any_of: nothing, report: told }, |run| {
            found |= run.categories
        })?;
        let frame = pagemap.frames(range)?.first().copied().flatten().filter(|frame| frame.0 != 0);
        Ok(Self { state: State::of(found), is_huge: found.contains(Categories::HUGE), frame })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::ProcessId;
    use plimsoll_sys::mapping::{AnonymousMapping, HugePages};

    #[test]
    fn a_page_is_absent_until_it_is_written() {
        let mapping = AnonymousMapping::new(ByteCount(16 * PAGE_SIZE as u64), HugePages::Never).unwrap();
        let pagemap = Pagemap::open(ProcessId::own()).unwrap();
        let at = Hva(mapping.range().start().0 + 5 * PAGE_SIZE as u64 + 7);
        let before = HostPage::look(&pagemap, at).unwrap();
        assert_eq!(before, HostPage { state: State::Absent, is_huge: false, frame: None });
        mapping.write_u64(ByteCount(5 * PAGE_SIZE as u64), 1).unwrap();
        let after = HostPage::look(&pagemap, at).unwrap();
        assert_eq!((after.state, after.is_huge), (State::Present, false));
    }

    #[test]
    fn what_is_zero_is_not_counted_as_present() {
        assert_eq!(State::of(Categories::PRESENT | Categories::ZERO_PAGE), State::Zero);
        assert_eq!(State::of(Categories::SWAPPED | Categories::FILE), State::Swapped);
        assert_eq!(State::of(Categories::FILE), State::Absent);
    }
}
