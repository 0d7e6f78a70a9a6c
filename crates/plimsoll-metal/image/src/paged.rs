//! One guest's memory: what `plimsoll-core` says of it, done with frames.
//!
//! Enters: faults, discards, wishes for pages. Leaves: pages in the nested tables, in limbo, in the store. Moving a page to limbo and
//! back moves a frame from a table to a slot and back, and no byte. What must never happen: a frame whose word says another
//! place than it is in; each step here is the core's own, in the order that `plimsoll_core::machine` states.
mod guard;

use crate::cpu::Features;
use crate::memory::{Frame, Memory};
use crate::nested::{Nested, PAGED, Taken};
use crate::paging::PagingError;
use crate::slabs::{Shared, Slabs};
use crate::svm::Translations;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
pub use guard::{Forbidden, Guard};
use plimsoll_core::airlock::Shape;
use plimsoll_core::frames::buddy::FramesError;
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_core::machine::{FaultEffect, Machine, Released, Source};
use plimsoll_core::map::{HeapWords, MapError};
use plimsoll_core::replacement::Run;
use plimsoll_core::word::{ObjectRef, PageState, StateKind};
use plimsoll_mmu::{Input, Span};
use plimsoll_store::{Encoder, GetError, Handle, Store, StoreError};
use plimsoll_types::{BLOCK_PAGES, Gpa, Hpa, PAGE_SIZE, PageBytes, PageCount, PageIndex, SlotPage};

/// How often pages are asked for when every page has just paid a credit: after four such answers there are none.
const ASKED: u32 = 4;

/// Memory was not brought or taken.
#[derive(Clone, Copy, Debug)]
pub enum PagedError {
    /// The guest has no memory there.
    Outside {
        /// Where.
        gpa: Gpa,
    },
    /// It may not do that with its memory.
    Forbidden(Forbidden),
    /// There is no memory for it now.
    NoMemory,
    /// The store takes no more.
    StoreFull,
    /// The stored bytes failed their check: the page is poisoned.
    Lost {
        /// The page.
        page: PageIndex,
        /// What the store says.
        cause: GetError,
    },
    /// The page was poisoned before.
    Poisoned {
        /// The page.
        page: PageIndex,
    },
    /// A bug: the core refuses a step.
    Core(MapError),
    /// A bug: the tables refuse a step.
    Tables(PagingError),
    /// A bug: the allocator refuses a frame.
    Frames(FramesError),
    /// A bug: the store refuses a step.
    Store(StoreError),
    /// A bug: a slot page is empty, or the page's word and its tables contradict each other.
    Contradiction {
        /// The page.
        page: PageIndex,
        /// What its word says.
        state: PageState,
    },
}

impl fmt::Display for PagedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside { gpa } => write!(f, "it accessed {gpa}, where it has no memory"),
            Self::Forbidden(why) => write!(f, "{why}"),
            Self::NoMemory => f.write_str("there is no memory for it"),
            Self::StoreFull => f.write_str("the store takes no more pages"),
            Self::Lost { page, cause } => write!(f, "{page} is poisoned: {cause}"),
            Self::Poisoned { page } => write!(f, "it touched {page}, whose bytes are lost"),
            Self::Core(error) => write!(f, "{error}"),
            Self::Tables(error) => write!(f, "{error}"),
            Self::Frames(error) => write!(f, "{error}"),
            Self::Store(error) => write!(f, "{error}"),
            Self::Contradiction { page, state } => {
                write!(f, "{page} is {state:?} by its word and not by its tables")
            }
        }
    }
}

impl From<MapError> for PagedError {
    fn from(error: MapError) -> Self {
        Self::Core(error)
    }
}

impl From<FramesError> for PagedError {
    fn from(error: FramesError) -> Self {
        match error {
            FramesError::NoMemory { .. } => Self::NoMemory,
            error => Self::Frames(error),
        }
    }
}

impl From<PagingError> for PagedError {
    fn from(error: PagingError) -> Self {
        match error {
            PagingError::Frames(error) => error.into(),
            error => Self::Tables(error),
        }
    }
}

/// What all guests share.
pub struct Pool {
    /// Frames.
    pub memory: Shared,
    /// Pages that are kept.
    pub store: Store<Slabs>,
    encoder: Encoder,
}

impl Pool {
    /// A pool with an empty store.
    pub fn new(memory: Shared, slabs: Slabs) -> Self {
        Self { memory, store: Store::new(slabs), encoder: Encoder::new() }
    }

    fn release(&mut self, object: ObjectRef) -> Result<(), PagedError> {
        match Handle::from_bits(object.bits()) {
            // There is no disk here on which its data could be.
            Some(handle) => self.store.release(handle).map(drop).map_err(PagedError::Store),
            None => Ok(()),
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// Pages taken out of its tables.
    pub captured: u64,
    /// Pages that went to the store.
    pub stored: u64,
    /// Pages that came back from there.
    pub returned: u64,
    /// Pages found to be zero on their way to the store.
    pub dropped_zero: u64,
    /// Accessed bits found set.
    pub harvested: u64,
    /// Pages whose word said that they are there and that were not.
    pub anomalies: u64,
}

/// A guest's memory.
pub struct Paged {
    core: Machine<HeapWords>,
    nested: Nested,
    /// What rests in limbo, by slot page.
    slots: Vec<Option<Frame>>,
    window: Window,
    /// What may be done with its pages.
    pub guard: Guard,
    /// What was done.
    pub done: Done,
}

/// Distinct pages seen used in a window.
struct Window {
    seen: Vec<u64>,
    pages: PageCount,
    last: Option<PageCount>,
}

impl Window {
    fn note(&mut self, page: PageIndex) {
        let (word, bit) = (page.get() / 64, 1 << (page.0 % 64));
        if let Some(word) = self.seen.get_mut(word).filter(|word| **word & bit == 0) {
            *word |= bit;
            self.pages += PageCount(1);
        }
    }
}

/// All pages of regions.
pub fn pages(regions: &[Region]) -> impl Iterator<Item = Gpa> + Clone {
    regions.iter().flat_map(|it| (it.start.0..it.start.0 + it.bytes.0).step_by(PAGE_SIZE)).map(Gpa)
}

impl Paged {
    /// A guest's memory in which nothing is. Up to an eighth of it rests in limbo, in slots that may each be half used.
    ///
    /// # Errors
    /// There is no memory for its tables.
    pub fn new(
        memory: &mut Memory,
        layout: GuestLayout,
        seed: u64,
        features: &Features,
    ) -> Result<Self, PagedError> {
        let pages = layout.page_limit();
        let slots = (pages.0 / BLOCK_PAGES / 4).clamp(8, 512);
        let nested = Nested::new(memory, features)?;
        let core = Machine::new(layout, HeapWords::new(pages.get()), Shape::blocks(slots), seed, |_| false)?;
        let window =
            Window { seen: alloc::vec![0; pages.get().div_ceil(64)], pages: PageCount(0), last: None };
        let mut held = Vec::new();
        held.resize_with(SlotPage(slots * BLOCK_PAGES).0 as usize, || None);
        Ok(Self { core, nested, slots: held, window, guard: Guard::new(pages), done: Done::default() })
    }

    /// Where its tables are.
    pub const fn root(&self) -> Hpa {
        self.nested.root()
    }

    /// Has its processor walk shadows of the tables at `cr3`. The root of those.
    ///
    /// # Errors
    /// There is no memory.
    pub fn shadow(&mut self, memory: &mut Memory, cr3: u64) -> Result<Hpa, PagedError> {
        let pages = self.size();
        Ok(self.nested.shadow(memory, pages, cr3)?)
    }

    /// The hypervisor has written to its memory.
    ///
    /// # Errors
    /// A bug.
    pub fn wrote(&mut self, at: Gpa, bytes: u64) -> Result<(), PagedError> {
        match self.nested.shadows() {
            Some((shadow, translations)) => Ok(shadow.wrote(at, bytes, translations)?),
            None => Ok(()),
        }
    }

    /// What it owns.
    pub fn size(&self) -> PageCount {
        self.core.layout().pages()
    }

    /// Its memory's pieces.
    pub fn layout(&self) -> &GuestLayout {
        self.core.layout()
    }

    /// Pages in a state.
    pub fn pages(&self, kind: StateKind) -> PageCount {
        self.core.census().of(kind)
    }

    /// Pages in limbo.
    pub fn limbo(&self) -> PageCount {
        self.core.airlock().limbo()
    }

    /// Pages in its tables.
    pub fn resident(&self) -> PageCount {
        self.core.census().in_ram()
    }

    /// Words and bookkeeping, in bytes.
    pub fn table_bytes(&self) -> u64 {
        (self.core.table_bytes()
            + self.slots.len() * size_of::<Option<Frame>>()
            + self.window.seen.len() * 8
            + self.guard.table_bytes()) as u64
            + self.size().0 * 8
    }

    /// Whether the processor must forget translations before the guest runs.
    pub fn take_translations(&mut self) -> Translations {
        self.nested.take_translations()
    }

    fn gpa(&self, page: PageIndex) -> Result<Gpa, PagedError> {
        self.core.layout().gpa_of(page).ok_or(PagedError::Core(MapError::NoSuchPage { page }))
    }

    /// Brings the page of an address.
    ///
    /// # Errors
    /// [`PagedError`]; with [`PagedError::NoMemory`] nothing has changed.
    pub fn bring(&mut self, pool: &mut Pool, gpa: Gpa) -> Result<(), PagedError> {
        let page = self.core.layout().index_of(gpa).ok_or(PagedError::Outside { gpa })?;
        self.window.note(page);
        match self.core.fault(page)? {
            FaultEffect::Install(Source::Zero) => {
                let frame = pool.memory.borrow_mut().take_zeroed(PAGED)?;
                self.nested.map(&mut pool.memory.borrow_mut(), gpa, frame, self.guard.arrives(page))?;
                self.core.installed(page)?;
            }
            FaultEffect::Install(Source::Limbo(at)) => self.back_from_limbo(pool, page, gpa, at)?,
            FaultEffect::Install(Source::Stored(object)) => {
                let mut frame = pool.memory.borrow_mut().take(PAGED)?;
                let handle = Handle::from_bits(object.bits()).ok_or(GetError::Nothing);
                let got = handle.and_then(|handle| pool.store.get(handle, frame.bytes_mut()));
                if let Err(cause) = got {
                    pool.memory.borrow_mut().give(frame, PAGED)?;
                    // The word names the object no more. That it is damaged has just been said.
                    if let Released::Object(object) = self.core.poisoned(page)? {
                        let _ = pool.release(object);
                    }
                    return Err(PagedError::Lost { page, cause });
                }
                self.nested.map(&mut pool.memory.borrow_mut(), gpa, frame, self.guard.arrives(page))?;
                if let Released::Object(object) = self.core.installed(page)? {
                    pool.release(object)?;
                }
                self.done.returned += 1;
            }
            FaultEffect::Poison => return Err(PagedError::Poisoned { page }),
            // Pages come back one by one, no block is unwatched, no move is ever under way, there is no snapshot, and what is
            // in the tables does not fault.
            FaultEffect::Install(Source::File(_))
            | FaultEffect::Return { .. }
            | FaultEffect::InstallIfMissing
            | FaultEffect::Nothing
            | FaultEffect::Wait => {
                self.done.anomalies += 1;
                return Err(PagedError::Contradiction { page, state: self.core.state(page)? });
            }
        }
        Ok(())
    }

    fn slot(&mut self, at: SlotPage) -> Option<&mut Option<Frame>> {
        self.slots.get_mut(at.0 as usize)
    }

    fn back_from_limbo(
        &mut self,
        pool: &mut Pool,
        page: PageIndex,
        gpa: Gpa,
        at: SlotPage,
    ) -> Result<(), PagedError> {
        // Before the intent is written, so that nothing can be in the way afterwards.
        pool.memory.borrow_mut().stock_tables()?;
        self.core.begin_return(Run { first: page, pages: 1 }, at)?;
        let Some(frame) = self.slot(at).and_then(Option::take) else {
            self.done.anomalies += 1;
            return Err(PagedError::Contradiction { page, state: PageState::Limbo(at) });
        };
        self.nested.map(&mut pool.memory.borrow_mut(), gpa, frame, self.guard.arrives(page))?;
        Ok(self.core.returned(page, at)?)
    }

    /// The bytes of a page, brought if need be, for the hypervisor itself.
    ///
    /// # Errors
    /// Those of [`bring`](Self::bring).
    pub fn bytes(&mut self, pool: &mut Pool, gpa: Gpa) -> Result<&mut PageBytes, PagedError> {
        let page = self.core.layout().index_of(gpa).ok_or(PagedError::Outside { gpa })?;
        if !self.core.state(page)?.is_in_ram() {
            self.bring(pool, gpa)?;
        }
        let state = self.core.state(page)?;
        self.nested
            .bytes(&mut pool.memory.borrow_mut(), gpa)?
            .ok_or(PagedError::Contradiction { page, state })
    }

    /// Keeps a page in its tables from now on.
    ///
    /// # Errors
    /// Those of [`bring`](Self::bring).
    pub fn keep(&mut self, pool: &mut Pool, gpa: Gpa) -> Result<(), PagedError> {
        self.bytes(pool, gpa)?;
        let page = self.core.layout().index_of(gpa).ok_or(PagedError::Outside { gpa })?;
        Ok(self.core.exclude(page)?)
    }

    /// Keeps all pages in its tables from now on.
    ///
    /// # Errors
    /// Those of [`bring`](Self::bring).
    pub fn keep_all(&mut self, pool: &mut Pool) -> Result<(), PagedError> {
        let regions = self.core.layout().regions().to_vec();
        pages(&regions).try_for_each(|gpa| self.keep(pool, gpa))
    }

    /// Looks at the accessed bits: what was used since is worth keeping.
    ///
    /// # Errors
    /// A bug.
    pub fn harvest(&mut self, memory: &mut Memory) -> Result<(), PagedError> {
        let Self { core, nested, window, done, .. } = self;
        for region in 0..core.layout().regions().len() {
            let region = core.layout().regions()[region];
            let Some(span) = Span::new(Input(region.start.0), region.bytes.0) else { continue };
            nested.harvest(memory, span, |gpa| {
                if let Some(page) = core.layout().index_of(gpa) {
                    core.used(page);
                    window.note(page);
                    done.harvested += 1;
                }
            })?;
        }
        Ok(())
    }

    /// Ends a window of the working set and starts the next.
    pub fn next_window(&mut self) {
        self.window.seen.fill(0);
        self.window.last = Some(core::mem::take(&mut self.window.pages));
    }

    /// Distinct pages used in the last whole window.
    pub const fn working_set(&self) -> Option<PageCount> {
        self.window.last
    }

    /// Takes about so many pages, those that show least use, to limbo. Returns how many: fewer when limbo is full or there are no
    /// more.
    ///
    /// # Errors
    /// A bug.
    pub fn capture(&mut self, memory: &mut Memory, want: u32) -> Result<u64, PagedError> {
        self.harvest(memory)?;
        let before = self.done.captured;
        let mut runs = Vec::new();
        for _ in 0..ASKED {
            if self.core.choose(want, &mut runs)?.pages > 0 {
                break;
            }
        }
        for run in runs {
            let Some(start) = self.core.begin_capture(run)? else { break };
            for (page, at) in
                (run.first.0..run.first.0 + run.pages).map(PageIndex).zip((start.0..).map(SlotPage))
            {
                self.move_out(memory, page, at)?;
            }
        }
        Ok(self.done.captured - before)
    }

    fn move_out(&mut self, memory: &mut Memory, page: PageIndex, at: SlotPage) -> Result<(), PagedError> {
        let gpa = self.gpa(page)?;
        let Some(Taken { frame, accessed }) = self.nested.unmap(memory, gpa)? else {
            self.done.anomalies += 1;
            return Ok(self.core.vanished(page, at)?);
        };
        if accessed {
            self.window.note(page);
        }
        if let Some(slot) = self.slot(at) {
            *slot = Some(frame);
        }
        self.done.captured += 1;
        Ok(self.core.captured(page, at)?)
    }

    /// Stores so many of the pages that rest in limbo longest. Returns how many frames came free.
    ///
    /// # Errors
    /// [`PagedError::StoreFull`]: the rest stays in limbo. Others are bugs.
    pub fn age(&mut self, pool: &mut Pool, most: usize) -> Result<u64, PagedError> {
        let oldest: Vec<_> = self.core.oldest_limbo(most).collect();
        let mut freed = 0;
        for (at, page) in oldest {
            let Some(frame) = self.slot(at).and_then(Option::take) else {
                self.done.anomalies += 1;
                return Err(PagedError::Contradiction { page, state: PageState::Limbo(at) });
            };
            match pool.store.put(frame.bytes(), &mut pool.encoder) {
                Ok(None) => {
                    self.core.found_zero(page, at)?;
                    self.done.dropped_zero += 1;
                }
                Ok(Some(stored)) => {
                    let object = ObjectRef::new(stored.handle.to_bits())
                        .ok_or(PagedError::Store(StoreError::Stale { handle: stored.handle }))?;
                    self.core.stored(page, at, object)?;
                    self.done.stored += 1;
                }
                Err(error) => {
                    if let Some(slot) = self.slot(at) {
                        *slot = Some(frame);
                    }
                    self.zap(&mut pool.memory.borrow_mut())?;
                    return Err(match error {
                        StoreError::Exhausted => PagedError::StoreFull,
                        error => PagedError::Store(error),
                    });
                }
            }
            pool.memory.borrow_mut().give(frame, PAGED)?;
            freed += 1;
        }
        self.zap(&mut pool.memory.borrow_mut())?;
        Ok(freed)
    }

    /// Gives back what is in slot pages that no word names, and has slots used again.
    fn zap(&mut self, memory: &mut Memory) -> Result<(), PagedError> {
        for (start, pages) in self.core.zap_runs(usize::MAX) {
            for at in (start.0..start.0 + pages).map(SlotPage) {
                if let Some(frame) = self.slot(at).and_then(Option::take) {
                    memory.give(frame, PAGED)?;
                }
            }
            self.core.zapped(start, pages);
        }
        Ok(())
    }

    /// The guest gives pages back.
    ///
    /// # Errors
    /// [`PagingError::Named`] if its tables name frames, [`PagedError::Outside`] when they are not whole pages of its memory,
    /// [`PagedError::Forbidden`]: nothing has changed then.
    pub fn discard(&mut self, pool: &mut Pool, gpa: Gpa, bytes: u64) -> Result<(), PagedError> {
        let pages = self.whole(gpa, bytes)?;
        self.may_discard(pages.clone())?;
        self.drop_pages(pool, pages)
    }

    fn drop_pages(&mut self, pool: &mut Pool, pages: Range<u32>) -> Result<(), PagedError> {
        for page in pages.clone().map(PageIndex) {
            let gpa = self.gpa(page)?;
            let mut memory = pool.memory.borrow_mut();
            if let Some(Taken { frame, .. }) = self.nested.unmap(&mut memory, gpa)? {
                memory.give(frame, PAGED)?;
            }
        }
        let mut objects = Vec::new();
        self.core.discarded(pages, |object| objects.push(object))?;
        for object in objects {
            pool.release(object)?;
        }
        self.zap(&mut pool.memory.borrow_mut())
    }

    /// The first address behind all of its memory.
    pub fn end_of_memory(&self) -> Gpa {
        self.core.layout().regions().last().map_or(Gpa(0), |region| Gpa(region.start.0 + region.bytes.0))
    }

    /// The tables, for what is not its memory: extents, behind its end.
    pub const fn tables(&mut self) -> &mut Nested {
        &mut self.nested
    }

    /// Checks words against counts.
    ///
    /// # Errors
    /// A bug.
    pub fn audit(&self) -> Result<(), PagedError> {
        Ok(self.core.audit()?)
    }

    /// All of it is given back: by a guest that has ended.
    ///
    /// # Errors
    /// A bug.
    pub fn discard_all(&mut self, pool: &mut Pool) -> Result<(), PagedError> {
        let regions = self.core.layout().regions().to_vec();
        self.nested.forget_frames(&mut pool.memory.borrow_mut(), pages(&regions))?;
        for region in regions {
            let pages = self.whole(region.start, region.bytes.0)?;
            self.drop_pages(pool, pages)?;
        }
        Ok(())
    }

    /// Gives everything back, the tables too.
    ///
    /// # Errors
    /// A bug.
    pub fn end(mut self, pool: &mut Pool) -> Result<(), PagedError> {
        self.discard_all(pool)?;
        Ok(self.nested.end(&mut pool.memory.borrow_mut())?)
    }
}
