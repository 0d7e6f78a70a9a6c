//! The hypervisor's own tables.
//!
//! Enters: the parts of the image and the regions of memory. Leaves: tables in which nothing is both written and executed, address 0
//! and the page below the stack are nowhere, and no page is a user's. What must never happen: the first tables used after
//! this, for they let everything be written and executed.
use crate::cpu::Features;
use crate::memory::{Memory, Outside};
use crate::start::Parts;
use core::fmt;
use plimsoll_core::frames::buddy::FramesError;
use plimsoll_core::frames::firmware::HostRegion;
use plimsoll_mmu::direct::Refused;
use plimsoll_mmu::format::x86::{Caps, Long4};
use plimsoll_mmu::mapper::{MapError, Mapper, UnalignedRoot};
use plimsoll_mmu::{
    Input, Invalidate, Leaf, Memory as Type, NothingCached, Output, Permissions, Span, shadow,
};
use plimsoll_types::{Gpa, Hpa, PAGE_SHIFT, PAGE_SIZE, PageCount};
use x86_64::PhysAddr;
use x86_64::registers::control::{Cr3, Cr3Flags, Cr4, Cr4Flags};
use x86_64::structures::paging::PhysFrame;

/// Pages of up to 1 GiB, where alignment allows it.
const LARGEST_SHIFT: u32 = 30;

/// By the PAT as it is after reset.
pub const UNCACHED: Type = Type::Pat(3);

/// Tables could not be made.
#[derive(Clone, Copy, Debug)]
pub enum PagingError {
    /// For want of memory.
    Frames(FramesError),
    /// A mapping was refused.
    Map(MapError<Outside>),
    /// A bug: the root.
    Root(UnalignedRoot),
    /// Shadow tables cannot go on.
    Shadow(shadow::Error<Outside>),
    /// A bug: frames that a guest's tables name are not what they must be.
    Direct(Refused<Outside>),
    /// Nothing is behind a page.
    Absent {
        /// The page.
        gpa: Gpa,
    },
    /// The guest's tables may name the page's frame.
    Named {
        /// The page.
        gpa: Gpa,
    },
}

impl fmt::Display for PagingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frames(error) => write!(f, "{error}"),
            Self::Map(error) => write!(f, "{error}"),
            Self::Root(error) => write!(f, "{error}"),
            Self::Shadow(error) => write!(f, "{error}"),
            Self::Direct(error) => write!(f, "{error}"),
            Self::Absent { gpa } => write!(f, "there is no memory behind {gpa}"),
            Self::Named { gpa } => {
                write!(f, "the page at {gpa} stays where it is: the guest's tables may name its frame")
            }
        }
    }
}

impl From<FramesError> for PagingError {
    fn from(error: FramesError) -> Self {
        Self::Frames(error)
    }
}

impl From<MapError<Outside>> for PagingError {
    fn from(error: MapError<Outside>) -> Self {
        Self::Map(error)
    }
}

impl From<shadow::Error<Outside>> for PagingError {
    fn from(error: shadow::Error<Outside>) -> Self {
        Self::Shadow(error)
    }
}

impl From<Refused<Outside>> for PagingError {
    fn from(error: Refused<Outside>) -> Self {
        Self::Direct(error)
    }
}

impl From<UnalignedRoot> for PagingError {
    fn from(error: UnalignedRoot) -> Self {
        Self::Root(error)
    }
}

/// One address space: the hypervisor's.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    root: Output,
    caps: Caps,
}

/// This processor's translations, the only one's there are.
struct ThisProcessor;

impl Invalidate for ThisProcessor {
    fn invalidate(&mut self, span: Span) {
        for page in (span.first().0..=span.last().0).step_by(PAGE_SIZE) {
            x86_64::instructions::tlb::flush(x86_64::VirtAddr::new_truncate(page));
        }
    }
}

impl Space {
    /// Makes the tables and has the processor use them.
    ///
    /// # Errors
    /// [`PagingError`]; the first tables are then still in use.
    pub fn enter(
        memory: &mut Memory,
        regions: &[Option<HostRegion>],
        parts: &Parts,
        features: &Features,
    ) -> Result<Self, PagingError> {
        let root = Output(memory.take_root()?.into_address().0);
        let space = Self { root, caps: features.paging };
        let data = Permissions::READ | Permissions::WRITE;
        let mut map =
            |start: u64, end: u64, permissions| match Span::new(Input(start), end.saturating_sub(start)) {
                Some(span) => {
                    space.map(memory, span, (Output(start), Type::Pat(0)), permissions, &mut NothingCached)
                }
                None => Ok(()),
            };
        map(parts.code, parts.constants, Permissions::READ | Permissions::EXECUTE)?;
        map(parts.constants, parts.data, Permissions::READ)?;
        map(parts.data, parts.guard, data)?;
        map(parts.guard + PAGE_SIZE as u64, parts.end, data)?;
        for region in regions.iter().flatten() {
            map(region.first.0 << PAGE_SHIFT, region.end().0 << PAGE_SHIFT, data)?;
        }
        let guards = Cr4Flags::from_bits_truncate(features.guards);
        // SAFETY: the tables map all that is used from here on where it was: the image by its parts, stack and data among them,
        // and all memory that frames, their table and the heap are in. SMEP and SMAP concern users' pages, of which there are
        // none, and UMIP users' code, which there is none of.
        unsafe {
            Cr3::write(PhysFrame::containing_address(PhysAddr::new(root.0)), Cr3Flags::empty());
            Cr4::update(|flags| flags.insert(guards));
        }
        Ok(space)
    }

    fn map(
        &self,
        memory: &mut Memory,
        span: Span,
        (output, kind): (Output, Type),
        permissions: Permissions,
        caches: &mut impl Invalidate,
    ) -> Result<(), PagingError> {
        memory.stock_tables()?;
        let physical = memory.physical();
        let leaf = Leaf::new(output, LARGEST_SHIFT, permissions, kind);
        Ok(Mapper::<Long4, _, _, _>::new(self.root, self.caps, physical, memory, caches)?.map(span, leaf)?)
    }

    /// Maps a frame at an address of the window, to read and write.
    ///
    /// # Errors
    /// [`PagingError`]; the frame is then not mapped.
    pub fn map_page(&self, memory: &mut Memory, at: Input, frame: Hpa) -> Result<(), PagingError> {
        self.map_one(memory, at, (Output(frame.0), Type::Pat(0)))
    }

    /// Maps a page of hardware's registers to itself, uncached.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn map_registers(&self, memory: &mut Memory, at: Hpa) -> Result<(), PagingError> {
        self.map_one(memory, Input(at.0), (Output(at.0), UNCACHED))
    }

    /// Maps a page, to read and write.
    fn map_one(&self, memory: &mut Memory, at: Input, to: (Output, Type)) -> Result<(), PagingError> {
        let span = Span::new(at, PAGE_SIZE as u64).ok_or(MapError::Span(Span::one(at)))?;
        self.map(memory, span, to, Permissions::READ | Permissions::WRITE, &mut ThisProcessor)
    }

    /// Takes pages out of the window.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn unmap(&self, memory: &mut Memory, at: Input, pages: PageCount) -> Result<(), PagingError> {
        let span = Span::new(at, pages.bytes().0).ok_or(MapError::Span(Span::one(at)))?;
        let physical = memory.physical();
        Mapper::<Long4, _, _, _>::new(self.root, self.caps, physical, memory, &mut ThisProcessor)?
            .unmap(span)?;
        Ok(())
    }
}
