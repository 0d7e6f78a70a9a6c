//! A guest's second stage: which frame is behind which of its pages.
//!
//! Enters: frames. Leaves: the same frames, and which pages were used. The tables are the owner of the frames they map: this is the
//! only place that makes an address of a frame and a frame of an address. What must never happen: a frame taken out while
//! the processor still translates to it; so the guest is not run before its translations are forgotten, and its shadows, if it has
//! any, forget the page with its entry. Nothing is taken out of the tables of a guest whose own tables name frames.
use crate::cpu::Features;
use crate::direct::Owner;
use crate::memory::{Frame, Memory, address};
use crate::paging::{PagingError, UNCACHED};
use crate::shadow::{self, Behind, Shadowed};
use crate::svm::Translations;
use core::ptr::with_exposed_provenance_mut;
use plimsoll_core::frames::Rights;
use plimsoll_core::frames::buddy::{FramesError, Kind};
use plimsoll_mmu::format::x86::{Caps, Npt};
use plimsoll_mmu::mapper::{Clear, MapError, Mapper, Translation};
use plimsoll_mmu::shadow::Invalidation;
use plimsoll_mmu::{Input, Invalidate, Leaf, Memory as Type, Output, Permissions, Span};
use plimsoll_types::{Gpa, Hpa, PAGE_SHIFT, PAGE_SIZE, PageBytes, PageCount};

/// What guests' pages are taken for: they belong to no extent.
pub const PAGED: Kind = Kind::Guest { extent: u32::MAX };

/// The guest does not run while this does, and its translations are forgotten before it runs again.
struct BeforeItRuns<'a>(&'a mut Translations);

impl Invalidate for BeforeItRuns<'_> {
    fn invalidate(&mut self, _: Span) {
        *self.0 = Translations::Stale;
    }
}

/// A page as its tables had it.
#[derive(Debug)]
pub struct Taken {
    /// What was there.
    pub frame: Frame,
    /// Whether it was used since that was looked at.
    pub accessed: bool,
}

/// What a guest's processor walks.
enum Walked {
    /// Its own tables, and these.
    Both,
    /// Shadows of both.
    Shadows(Shadowed),
    /// Its own tables alone, which name frames: these are the record of where its memory is.
    Named(Owner),
}

/// A guest's nested tables.
pub struct Nested {
    root: Frame,
    caps: Caps,
    translations: Translations,
    walked: Walked,
}

/// The page of an address.
pub fn page(gpa: Gpa) -> Result<Span, PagingError> {
    let start = gpa.0 & !(PAGE_SIZE as u64 - 1);
    Span::new(Input(start), PAGE_SIZE as u64).ok_or_else(|| MapError::Span(Span::one(gpa.into())).into())
}

impl Nested {
    /// Tables that map nothing.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(memory: &mut Memory, features: &Features) -> Result<Self, FramesError> {
        Ok(Self {
            root: memory.take_root()?,
            caps: features.paging,
            translations: Translations::Stale,
            walked: Walked::Both,
        })
    }

    /// Where the tables are.
    pub const fn root(&self) -> Hpa {
        self.root.at()
    }

    /// From now on the processor walks shadows of the tables at `cr3` instead. The root of those.
    ///
    /// # Errors
    /// There is no memory.
    pub fn shadow(&mut self, memory: &mut Memory, pages: PageCount, cr3: u64) -> Result<Hpa, PagingError> {
        let shadow = Shadowed::new(memory, self.caps, pages, (self.root(), cr3))?;
        let root = shadow.root();
        self.walked = Walked::Shadows(shadow);
        Ok(root)
    }

    /// From now on the processor walks the guest's own tables alone, whose frames are this owner's.
    pub fn walks_frames(&mut self, owner: Owner) {
        self.walked = Walked::Named(owner);
    }

    /// The owner of the frames, if the guest's tables name them, and whether translations are stale.
    pub const fn owner(&mut self) -> Option<(&mut Owner, &mut Translations)> {
        match &mut self.walked {
            Walked::Named(owner) => Some((owner, &mut self.translations)),
            _ => None,
        }
    }

    /// The same for good: nothing walks the guest's tables any more.
    pub fn take_owner(&mut self) -> Option<Owner> {
        match core::mem::replace(&mut self.walked, Walked::Both) {
            Walked::Named(owner) => Some(owner),
            other => {
                self.walked = other;
                None
            }
        }
    }

    /// The shadows, if there are any, and whether translations are stale.
    pub fn shadows(&mut self) -> Option<(&mut Shadowed, &mut Translations)> {
        match &mut self.walked {
            Walked::Shadows(shadow) => Some((shadow, &mut self.translations)),
            _ => None,
        }
    }

    /// The bytes of the guest's instruction at `rip`, by its tables at `cr3`.
    pub fn instruction(&self, memory: &Memory, cr3: u64, rip: u64) -> Option<[u8; 15]> {
        match self.walked {
            Walked::Named(_) => shadow::instruction(memory.physical(), cr3, self.caps, rip),
            _ => {
                let behind = Behind::new(memory.physical(), self.root(), self.caps);
                shadow::instruction(&behind, cr3, self.caps, rip)
            }
        }
    }

    /// The guest has all translations forgotten.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn forget_everything(&mut self) -> Result<(), PagingError> {
        self.translations = Translations::Stale;
        self.shadows().map_or(Ok(()), |(shadow, stale)| shadow.invalidate(Invalidation::Everything, stale))
    }

    /// What the processor can do.
    pub const fn caps(&self) -> Caps {
        self.caps
    }

    /// Nothing keeps what was made of the page's entry.
    fn forget(&mut self, page: Gpa) -> Result<(), PagingError> {
        self.shadows().map_or(Ok(()), |(shadow, translations)| shadow.taken(page, translations))
    }

    /// Whether the processor must forget translations; the caller has it do so.
    pub fn take_translations(&mut self) -> Translations {
        core::mem::replace(&mut self.translations, Translations::Good)
    }

    fn with<T>(
        &mut self,
        memory: &mut Memory,
        work: impl FnOnce(
            &mut Mapper<'_, Npt, crate::memory::Physical, Memory, BeforeItRuns<'_>>,
        ) -> Result<T, MapError<crate::memory::Outside>>,
    ) -> Result<T, PagingError> {
        let physical = memory.physical();
        let mut caches = BeforeItRuns(&mut self.translations);
        let root = Output(self.root.at().0);
        let mut mapper = Mapper::new(root, self.caps, physical, memory, &mut caches)?;
        Ok(work(&mut mapper)?)
    }

    /// Has an address translated.
    fn put(
        &mut self,
        memory: &mut Memory,
        (gpa, at): (Gpa, Hpa),
        permissions: Permissions,
        kind: Type,
    ) -> Result<(), PagingError> {
        memory.stock_tables()?;
        let leaf = Leaf::new(Output(at.0), PAGE_SHIFT, permissions, kind);
        let span = page(gpa)?;
        self.with(memory, |mapper| mapper.map(span, leaf))
    }

    /// Puts a frame behind a page. It is given back when that fails.
    ///
    /// # Errors
    /// [`PagingError`]: there is no memory for tables, or something is mapped there.
    pub fn map(
        &mut self,
        memory: &mut Memory,
        gpa: Gpa,
        frame: Frame,
        permissions: Permissions,
    ) -> Result<(), PagingError> {
        match self.put(memory, (gpa, frame.at()), permissions, Type::Pat(0)) {
            Ok(()) => {
                frame.into_address();
                Ok(())
            }
            Err(error) => {
                memory.give(frame, PAGED)?;
                Err(error)
            }
        }
    }

    /// Gives what is behind a page other permissions.
    ///
    /// # Errors
    /// [`PagingError`]: a bug.
    pub fn protect(
        &mut self,
        memory: &mut Memory,
        gpa: Gpa,
        permissions: Permissions,
    ) -> Result<(), PagingError> {
        let span = page(gpa)?;
        self.with(memory, |mapper| mapper.protect(span, permissions))?;
        self.forget(gpa)
    }

    /// Where a page goes, and whether it was used.
    ///
    /// # Errors
    /// [`PagingError`]: a bug.
    pub fn leaf(&mut self, memory: &mut Memory, gpa: Gpa) -> Result<Option<Leaf>, PagingError> {
        match self.with(memory, |mapper| mapper.walk(gpa.into()))? {
            Translation::Mapped(_, mapping) => Ok(Some(mapping.leaf)),
            Translation::Absent { .. } => Ok(None),
        }
    }

    /// The frame behind a page.
    ///
    /// # Errors
    /// [`PagingError::Absent`].
    pub fn frame(&mut self, memory: &mut Memory, gpa: Gpa) -> Result<Hpa, PagingError> {
        let leaf = self.leaf(memory, gpa)?.ok_or(PagingError::Absent { gpa })?;
        Ok(Hpa(leaf.output.0))
    }

    /// Takes the frame from behind a page, if there is one.
    ///
    /// # Errors
    /// [`PagingError::Named`] if the guest's tables may name it. Others are bugs.
    pub fn unmap(&mut self, memory: &mut Memory, gpa: Gpa) -> Result<Option<Taken>, PagingError> {
        if matches!(self.walked, Walked::Named(_)) {
            return Err(PagingError::Named { gpa });
        }
        let Some(leaf) = self.leaf(memory, gpa)? else { return Ok(None) };
        let span = page(gpa)?;
        self.with(memory, |mapper| mapper.unmap(span))?;
        self.forget(gpa)?;
        // SAFETY: `map` made the address of a frame; the tables named it, no longer do, and name each frame once.
        let frame = unsafe { Frame::from_address(Hpa(leaf.output.0)) };
        Ok(frame.map(|frame| Taken { frame, accessed: leaf.accessed }))
    }

    /// The bytes of a page, if it is there.
    ///
    /// # Errors
    /// [`PagingError`]: a bug.
    pub fn bytes(&mut self, memory: &mut Memory, gpa: Gpa) -> Result<Option<&mut PageBytes>, PagingError> {
        let leaf = self.leaf(memory, gpa)?;
        // SAFETY: the tables own the frame they name, borrowed with them; the guest, which could write it, does not run.
        Ok(leaf.map(|leaf| unsafe { &mut *with_exposed_provenance_mut(address(leaf.output.0)) }))
    }

    /// Clears all accessed bits of a span and shows the pages that had one.
    ///
    /// # Errors
    /// [`PagingError`]: a bug.
    pub fn harvest(
        &mut self,
        memory: &mut Memory,
        span: Span,
        mut used: impl FnMut(Gpa),
    ) -> Result<(), PagingError> {
        self.with(memory, |mapper| {
            mapper.harvest(span, Clear::Accessed, |touched| used(Gpa(touched.input.0)))
        })
    }

    /// Maps pages of an extent, with what its reacher may do: all, or none. The extent keeps its frames.
    ///
    /// # Errors
    /// [`PagingError`]: there is no memory for tables, or something is mapped there.
    pub fn map_extent(
        &mut self,
        memory: &mut Memory,
        pages: impl Iterator<Item = (Gpa, Hpa)> + Clone,
        rights: Rights,
    ) -> Result<(), PagingError> {
        let mut permissions = Permissions::READ | Permissions::USER;
        permissions.set(Permissions::WRITE, rights.contains(Rights::WRITE));
        permissions.set(Permissions::EXECUTE, rights.contains(Rights::EXECUTE));
        self.map_all(memory, pages, permissions, Type::Pat(0))
    }

    /// Maps pages of a device's registers, uncached, to be read and written: all, or none.
    ///
    /// # Errors
    /// [`PagingError`]: there is no memory for tables, or something is mapped there.
    pub fn map_registers(
        &mut self,
        memory: &mut Memory,
        pages: impl Iterator<Item = (Gpa, Hpa)> + Clone,
    ) -> Result<(), PagingError> {
        let permissions = Permissions::READ | Permissions::WRITE | Permissions::USER;
        self.map_all(memory, pages, permissions, UNCACHED)
    }

    /// Maps pages that are not the guest's memory: all, or none.
    fn map_all(
        &mut self,
        memory: &mut Memory,
        pages: impl Iterator<Item = (Gpa, Hpa)> + Clone,
        permissions: Permissions,
        kind: Type,
    ) -> Result<(), PagingError> {
        for to in pages.clone() {
            if let Err(error) = self.put(memory, to, permissions, kind) {
                // What is not mapped yet is not unmapped either.
                for (gpa, _) in pages {
                    self.unmap_extent(memory, gpa)?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes a page of an extent, or of registers, out of the tables.
    ///
    /// # Errors
    /// [`PagingError`]: a bug.
    pub fn unmap_extent(&mut self, memory: &mut Memory, gpa: Gpa) -> Result<(), PagingError> {
        let span = page(gpa)?;
        self.with(memory, |mapper| mapper.unmap(span))?;
        self.forget(gpa)
    }

    /// Takes the tables back, which map nothing any more.
    ///
    /// # Errors
    /// [`FramesError`]: a bug.
    pub fn end(self, memory: &mut Memory) -> Result<(), FramesError> {
        if let Walked::Shadows(shadow) = self.walked {
            shadow.end(memory)?;
        }
        memory.give_root(self.root)
    }
}
