//! What a guest may do with its own pages: write one or execute it, write it no more, have a device reach it.
//!
//! Enters: accesses that its tables refuse, and its calls. Leaves: rights in its nested tables, or why there are none. What must never
//! happen: a page that is both written and executed, by processor and device together, in a guest whose code is to be known; a byte
//! of a sealed page changed by anybody.
//!
//! Which pages may be executed is kept nowhere but in the tables. A page that was taken comes back to be written, not executed, and is
//! looked at again when it is: so what the store, limbo or a discard made of it is never taken on trust. Only what is sealed is kept, a
//! bit a page, for it must outlast the entry.
//!
//! | a page | may be | becomes |
//! |---|---|---|
//! | that arrives | written | executed, when it is fetched from and its digest is known |
//! | that is executed | executed | written, when it is written; a device is let write it |
//! | that a device may write | written | nothing else before the device has parted from it |
//! | that is sealed | read | executed, when it is fetched from and its digest is known; never written |
//!
//! A processor's walk of the guest's own tables counts as writing them (AMD APM vol. 2, 15.25.5): tables can neither be sealed nor executed.
use super::{Paged, PagedError};
use crate::digest::Digest;
use crate::memory::Memory;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use plimsoll_core::bits::Bits;
use plimsoll_core::word::PageState;
use plimsoll_mmu::{Access, Leaf, Permissions};
use plimsoll_types::{Gpa, Hpa, PAGE_SIZE, PageBytes, PageCount, PageIndex};

/// What every page of a guest's may be.
const READ: Permissions = Permissions::READ.union(Permissions::USER);

/// What a guest may not do with its own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forbidden {
    /// To change what it has sealed.
    Sealed {
        /// Where.
        gpa: Gpa,
    },
    /// To execute what is on none of its lists.
    Unknown {
        /// Where.
        gpa: Gpa,
    },
    /// To execute, seal or give back what its device or the hypervisor may write at any time.
    Held {
        /// Where.
        gpa: Gpa,
    },
}

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sealed { gpa } => write!(f, "it would have changed {gpa}, which it had sealed"),
            Self::Unknown { gpa } => {
                write!(f, "it executed {gpa}, in a page whose bytes are on no list of its")
            }
            Self::Held { gpa } => {
                write!(f, "it used {gpa} as its own, which a device or the hypervisor may write")
            }
        }
    }
}

/// What is decided about a guest's pages beside where they are.
pub struct Guard {
    /// What it may execute, sorted; `None`: anything.
    code: Option<Vec<Digest>>,
    sealed: Bits,
    device_writes: Bits,
    /// Pages that its device reaches.
    pub reached: PageCount,
    /// Pages whose digest was found to be known, each time counted.
    pub verified: u64,
    /// What it was refused: writes of sealed pages by any way, and code that is not known.
    pub refused: u64,
}

impl Guard {
    /// A guest that may do everything with its pages, which end before that one.
    pub fn new(end: PageIndex) -> Self {
        let (sealed, device_writes) = (Bits::new(end.0), Bits::new(end.0));
        Self { code: None, sealed, device_writes, reached: PageCount(0), verified: 0, refused: 0 }
    }

    /// From now on it executes pages with these digests only. Nothing of it has arrived yet.
    pub fn only(&mut self, code: impl Iterator<Item = Digest>) {
        let mut code: Vec<_> = code.collect();
        code.sort_unstable();
        self.code = Some(code);
    }

    /// Whether it executes what is known only.
    pub const fn is_strict(&self) -> bool {
        self.code.is_some()
    }

    /// Bytes of this.
    pub fn table_bytes(&self) -> usize {
        self.sealed.bytes()
            + self.device_writes.bytes()
            + self.code.as_ref().map_or(0, |code| code.len() * size_of::<Digest>())
    }

    /// What may be done with a page that has just been brought.
    pub(super) fn arrives(&self, page: PageIndex) -> Permissions {
        let mut rights = READ;
        rights.set(Permissions::WRITE, !self.sealed.contains(page));
        rights.set(Permissions::EXECUTE, !self.is_strict());
        rights
    }

    fn knows(&self, page: &PageBytes) -> bool {
        self.code.as_ref().is_none_or(|code| code.binary_search(&Digest::of(page)).is_ok())
    }
}

impl Paged {
    /// The pages of a range that is whole pages of its memory, side by side in its words as in its addresses.
    ///
    /// # Errors
    /// [`PagedError::Outside`].
    pub fn whole(&self, gpa: Gpa, bytes: u64) -> Result<Range<u32>, PagedError> {
        let outside = PagedError::Outside { gpa };
        let is_whole = gpa.is_page_aligned() && bytes.is_multiple_of(PAGE_SIZE as u64);
        let last =
            gpa.checked_add(bytes.checked_sub(1).ok_or(outside)?).filter(|_| is_whole).ok_or(outside)?;
        let ends = self.core.layout().index_of(gpa).zip(self.core.layout().index_of(last));
        let (first, last) = ends.ok_or(outside)?;
        if u64::from(last.0 - first.0) != (bytes - 1) / PAGE_SIZE as u64 {
            return Err(outside);
        }
        Ok(first.0..last.0 + 1)
    }

    /// Whether the page of an address is in its tables, by its word.
    pub fn is_there(&self, gpa: Gpa) -> bool {
        let page = self.core.layout().index_of(gpa);
        page.is_some_and(|page| self.core.state(page).is_ok_and(PageState::is_in_ram))
    }

    /// Whether its device or the hypervisor may write the page at any time.
    fn is_written_by_others(&self, page: PageIndex) -> Result<bool, PagedError> {
        Ok(self.core.state(page)? == PageState::NeverPage || self.guard.device_writes.contains(page))
    }

    fn refuse<T>(&mut self, why: Forbidden) -> Result<T, PagedError> {
        self.guard.refused += 1;
        Err(PagedError::Forbidden(why))
    }

    fn leaf_of(&mut self, memory: &mut Memory, page: PageIndex) -> Result<(Gpa, Leaf), PagedError> {
        let (gpa, state) = (self.gpa(page)?, self.core.state(page)?);
        let leaf = self.nested.leaf(memory, gpa)?.ok_or(PagedError::Contradiction { page, state })?;
        Ok((gpa, leaf))
    }

    /// It accessed a page that is there in a way that its tables do not let it. Now they do.
    ///
    /// # Errors
    /// [`PagedError::Forbidden`]; others are bugs.
    pub fn permit(&mut self, memory: &mut Memory, gpa: Gpa, access: Access) -> Result<(), PagedError> {
        let page = self.core.layout().index_of(gpa).ok_or(PagedError::Outside { gpa })?;
        let (start, Leaf { permissions, .. }) = self.leaf_of(memory, page)?;
        let rights = match access {
            Access::Write if self.guard.sealed.contains(page) => {
                return self.refuse(Forbidden::Sealed { gpa });
            }
            Access::Write if !permissions.contains(Permissions::WRITE) => READ | Permissions::WRITE,
            Access::Fetch if !permissions.contains(Permissions::EXECUTE) => {
                if self.is_written_by_others(page)? {
                    return self.refuse(Forbidden::Held { gpa });
                }
                let is_known = self.nested.bytes(memory, start)?.is_some_and(|bytes| self.guard.knows(bytes));
                if !is_known {
                    return self.refuse(Forbidden::Unknown { gpa });
                }
                self.guard.verified += 1;
                READ | Permissions::EXECUTE
            }
            // Its tables let it, and translations were forgotten when they were changed.
            _ => return Err(PagedError::Contradiction { page, state: self.core.state(page)? }),
        };
        Ok(self.nested.protect(memory, start, rights)?)
    }

    /// From now on nobody writes these pages of its memory, for as long as it lives.
    ///
    /// # Errors
    /// [`PagedError::Outside`], [`PagedError::Forbidden`]: nothing is sealed then that was not. Others are bugs.
    pub fn seal(&mut self, memory: &mut Memory, gpa: Gpa, bytes: u64) -> Result<(), PagedError> {
        let pages = self.whole(gpa, bytes)?;
        for page in pages.clone().map(PageIndex) {
            if self.is_written_by_others(page)? {
                return Err(Forbidden::Held { gpa: self.gpa(page)? }.into());
            }
        }
        for page in pages.map(PageIndex) {
            self.guard.sealed.insert(page);
            if self.core.state(page)?.is_in_ram() {
                let (gpa, leaf) = self.leaf_of(memory, page)?;
                self.nested.protect(memory, gpa, leaf.permissions - Permissions::WRITE)?;
            }
        }
        Ok(())
    }

    /// Whether these pages may be given back, by the guest.
    ///
    /// # Errors
    /// [`PagedError::Forbidden`].
    pub(super) fn may_discard(&mut self, pages: Range<u32>) -> Result<(), PagedError> {
        for page in pages.map(PageIndex) {
            let gpa = self.gpa(page)?;
            if self.guard.sealed.contains(page) {
                return self.refuse(Forbidden::Sealed { gpa });
            }
            if matches!(self.core.state(page)?, PageState::Pinned(_)) {
                return Err(Forbidden::Held { gpa }.into());
            }
        }
        Ok(())
    }

    /// Its device is to reach a page that is there, to write it or only to read it. It stays there. Where it is.
    ///
    /// # Errors
    /// [`PagedError::Forbidden`]: nothing has changed. Others are bugs.
    pub fn hold(&mut self, memory: &mut Memory, gpa: Gpa, access: Access) -> Result<Hpa, PagedError> {
        let page = self.core.layout().index_of(gpa).ok_or(PagedError::Outside { gpa })?;
        let writes = access == Access::Write;
        if writes && self.guard.sealed.contains(page) {
            return self.refuse(Forbidden::Sealed { gpa });
        }
        if matches!(self.core.state(page)?, PageState::Pinned(_) | PageState::NeverPage) {
            return Err(Forbidden::Held { gpa }.into());
        }
        let (gpa, leaf) = self.leaf_of(memory, page)?;
        if writes && self.guard.is_strict() {
            self.nested.protect(memory, gpa, READ | Permissions::WRITE)?;
        }
        self.core.hold(page)?;
        if writes {
            self.guard.device_writes.insert(page);
        }
        self.guard.reached += PageCount(1);
        Ok(Hpa(leaf.output.0))
    }

    /// Its device reaches the page no more, nor has a translation to it.
    ///
    /// # Errors
    /// A bug: it was not held.
    pub fn let_go(&mut self, gpa: Gpa) -> Result<(), PagedError> {
        let page = self.core.layout().index_of(gpa).ok_or(PagedError::Outside { gpa })?;
        self.core.let_go(page)?;
        self.guard.device_writes.remove(page);
        self.guard.reached = self.guard.reached.saturating_sub(PageCount(1));
        Ok(())
    }

    /// Whether its device reaches the page.
    pub fn is_held(&self, gpa: Gpa) -> bool {
        let page = self.core.layout().index_of(gpa);
        page.is_some_and(|page| matches!(self.core.state(page), Ok(PageState::Pinned(_))))
    }
}

impl From<Forbidden> for PagedError {
    fn from(why: Forbidden) -> Self {
        Self::Forbidden(why)
    }
}
