//! The machine's memory: who has which frame, the words of page tables, the heap.
//!
//! Enters: the firmware's claims. Leaves: frames, each to one owner. **The hard line is here:** there are no frames but those of the
//! map, so that whoever asks for more is refused, and nothing is reserved that is not counted. All memory is mapped to itself.
//! What must never happen: a frame with two owners. [`Frame`] is a value that cannot be copied, and nobody but this file and
//! guests' tables ([`crate::nested`]) makes a frame of an address.
use crate::direct::{self, Kinds};
use crate::start::Parts;
use crate::wire::GUESTS_MAX;
use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;
use core::num::NonZeroU64;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicU64, Ordering};
use linked_list_allocator::LockedHeap;
use plimsoll_core::frames::buddy::{
    Cpu, FrameEntry, Frames, FramesError, Kind, Order, Piece, TableLevel, entries_for,
};
use plimsoll_core::frames::extents::{ExtentError, Extents, Slot, Task, Work};
use plimsoll_core::frames::firmware::{Claim, HostMap, HostMapError, HostRegion, Repairs, Use};
use plimsoll_mmu::format::x86::Caps;
use plimsoll_mmu::{Level, Output, TableFrames, TableMemory};
use plimsoll_types::{ByteCount, Hpa, PAGE_SHIFT, PAGE_SIZE, PageBytes, PageCount, Pfn};

/// Regions the map has room for: twice the entries firmware makes.
pub const REGIONS: usize = 128;
/// Claims: firmware's, and the hypervisor's own.
const CLAIMS: usize = 160;
/// The hypervisor's own, which come first: the first MiB, its image, the settings.
const OWN_CLAIMS: usize = 3;
/// Machines that may own memory.
pub const GUESTS: usize = GUESTS_MAX as usize;
/// Extents there may be.
const EXTENTS: usize = 1024;
/// What belongs to firmware and to real-mode leftovers, whatever the map says.
const LOW: u64 = 1 << 20;
/// Frames for tables of a level that are kept ready: what one mapping may need, and what splitting one may.
const POOLED: u32 = 4;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Memory cannot be had.
#[derive(Clone, Copy, Debug)]
pub enum MemoryError {
    /// Firmware's claims cannot be used.
    Map(HostMapError),
    /// Too little of it.
    TooLittle {
        /// For the frame table and the heap.
        fixed: ByteCount,
        /// The guests' least.
        guests: ByteCount,
        /// The largest run of memory.
        largest: ByteCount,
        /// All of it.
        usable: ByteCount,
    },
    /// The allocator refuses.
    Frames(FramesError),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(error) => write!(f, "{error}"),
            Self::TooLittle { fixed, guests, largest, usable } => write!(
                f,
                "{} = {fixed} for the hypervisor's own tables (in one piece) + {guests} for the guests to run in is needed at \
                 least, and firmware gives {usable} ({largest} in one piece); give the machine more memory, or fewer or \
                 smaller guests",
                ByteCount(fixed.0 + guests.0)
            ),
            Self::Frames(error) => write!(f, "{error}"),
        }
    }
}

impl From<FramesError> for MemoryError {
    fn from(error: FramesError) -> Self {
        Self::Frames(error)
    }
}

/// One frame, and the right to use it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a frame that is dropped is lost: give it back"]
pub struct Frame(NonZeroU64);

impl Frame {
    /// Where it is.
    pub const fn at(&self) -> Hpa {
        Hpa(self.0.get() << PAGE_SHIFT)
    }

    /// Gives the right to use it to whoever keeps the address.
    pub fn into_address(self) -> Hpa {
        self.at()
    }

    /// The frame of an address that was kept.
    ///
    /// # Safety
    /// The address came from [`Frame::into_address`], and nobody keeps it any more.
    pub unsafe fn from_address(at: Hpa) -> Option<Self> {
        NonZeroU64::new(at.0 >> PAGE_SHIFT).map(Self)
    }

    /// Gives the right to use it to the allocator.
    fn into_piece(self) -> Piece {
        Piece { first: Pfn(self.0.get()), order: Order::PAGE }
    }

    fn place(&self) -> usize {
        address(self.at().0)
    }

    /// What is in it.
    pub fn bytes(&self) -> &PageBytes {
        // SAFETY: a frame is memory, mapped to itself and aligned, for as long as the machine runs. This value is the only right
        // to use it, borrowed for reading; a guest that has it mapped does not run while the hypervisor does.
        unsafe { &*with_exposed_provenance(self.place()) }
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self) -> &mut PageBytes {
        // SAFETY: as in `bytes`, borrowed for writing.
        unsafe { &mut *with_exposed_provenance_mut(self.place()) }
    }
}

/// An address as a pointer's: 64 bits both.
#[expect(clippy::cast_possible_truncation, reason = "the image exists for x86-64 only")]
pub const fn address(at: u64) -> usize {
    at as usize
}

/// Words of tables, by their address.
#[derive(Clone, Copy, Debug)]
pub struct Physical {
    /// Behind the last byte of memory.
    end: Hpa,
}

/// An entry of a table that is not in memory.
#[derive(Clone, Copy, Debug)]
pub struct Outside;

impl Physical {
    fn word(&self, at: Output) -> Result<&AtomicU64, Outside> {
        if at.0 < LOW || at.0 + 8 > self.end.0 || !at.0.is_multiple_of(8) {
            return Err(Outside);
        }
        // SAFETY: memory, mapped to itself; aligned (checked). Tables are reached by whole words only, here and by processors.
        Ok(unsafe { AtomicU64::from_ptr(with_exposed_provenance_mut(address(at.0))) })
    }
}

impl TableMemory for Physical {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        Ok(self.word(at)?.load(Ordering::Acquire))
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let exchanged = self.word(at)?.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire);
        Ok(exchanged.unwrap_or_else(|found| found))
    }
}

/// Frames, and the extents that machines own of them.
pub type Owned = Extents<&'static mut [FrameEntry], Vec<Slot>, GUESTS>;

/// All frames.
pub struct Memory {
    owned: Owned,
    physical: &'static Physical,
    /// Image, frame table and heap.
    fixed: PageCount,
    peak: PageCount,
    /// What frames are used as, once a guest's tables name some.
    kinds: Option<Rc<RefCell<Kinds>>>,
}

/// What the hypervisor takes for itself before there are frames, in one piece.
#[derive(Clone, Copy, Debug)]
struct Own {
    table: Hpa,
    entries: usize,
    heap: Hpa,
    heap_bytes: usize,
    end: Hpa,
}

/// What memory there is, and what became of the firmware's claims.
pub struct Found {
    /// The frames.
    pub memory: Memory,
    /// Memory to be mapped, read and written: all but the image.
    pub regions: [Option<HostRegion>; REGIONS],
    /// What had to be repaired.
    pub repairs: Repairs,
}

impl Memory {
    /// Makes the frames of what firmware claims, less what the hypervisor keeps: the first MiB, its image, the settings, the frame
    /// table, and a heap, whose size `heap` says for memory up to there. `guests` is the least that guests need beside.
    ///
    /// # Safety
    /// Once, while the first tables are in use and before anything is allocated; `claims` are firmware's.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub unsafe fn of(
        claims: impl Iterator<Item = Claim>,
        parts: &Parts,
        settings: &[u8],
        heap: impl FnOnce(Pfn) -> ByteCount,
        guests: ByteCount,
    ) -> Result<Found, MemoryError> {
        let reserved = |start: u64, bytes: u64| Claim {
            start: Hpa(start),
            bytes: ByteCount(bytes),
            what: Use::Reserved,
        };
        let mut all = [reserved(0, LOW); CLAIMS];
        let mut count = 1;
        let own = [
            reserved(parts.code, parts.end - parts.code),
            reserved(settings.as_ptr().addr() as u64, settings.len() as u64),
        ];
        for (place, claim) in all.iter_mut().skip(1).zip(own.into_iter().chain(claims)) {
            *place = claim;
            count += 1;
        }
        // What is wrong with firmware's claims alone: the hypervisor's own overlap them, as they must.
        let repairs = HostMap::<REGIONS>::new(&all[OWN_CLAIMS..count]).map_err(MemoryError::Map)?.repairs();
        let map = HostMap::<REGIONS>::new(&all[..count]).map_err(MemoryError::Map)?;
        let regions = map.usable().copied().map(Some);
        let end = map.usable().next_back().map_or(Pfn(0), HostRegion::end);
        let own = Own::in_map(&map, heap(end), guests)?;
        all[count] = reserved(own.table.0, own.end.0 - own.table.0);
        let rest = HostMap::<REGIONS>::new(&all[..=count]).map_err(MemoryError::Map)?;

        // SAFETY: `own` is usable memory that the rest of the map does not have, below what the first tables map (`in_map`), used
        // for nothing before (the caller's promise). A zeroed entry is not needed: `of_map` fills the table; but the slice must
        // hold values, and `FrameEntry`'s are written before it exists.
        let table = unsafe {
            let first: *mut FrameEntry = with_exposed_provenance_mut(address(own.table.0));
            (0..own.entries).for_each(|entry| first.add(entry).write(FrameEntry::default()));
            HEAP.lock().init(with_exposed_provenance_mut(address(own.heap.0)), own.heap_bytes);
            core::slice::from_raw_parts_mut(first, own.entries)
        };
        let mut frames = Frames::of_map(table, &rest)?;
        frames.serve(Some(Cpu::FIRST));
        let image = PageCount((parts.end - parts.code) >> PAGE_SHIFT);
        let fixed = image + PageCount((own.end.0 - own.table.0) >> PAGE_SHIFT);
        let owned = Extents::new(frames, alloc::vec![Slot::default(); EXTENTS]);
        // Memory's end does not change, and what reads tables outlives this value.
        let physical = Box::leak(Box::new(Physical { end: Hpa(end.0 << PAGE_SHIFT) }));
        let memory = Self { owned, physical, fixed, peak: fixed, kinds: None };
        let mut found = Found { memory, regions: [None; REGIONS], repairs };
        found.regions.iter_mut().zip(regions).for_each(|(place, region)| *place = region);
        Ok(found)
    }

    /// The words of tables.
    pub const fn physical(&self) -> &'static Physical {
        self.physical
    }

    /// What frames are used as by guests whose tables name them. One processor: it is never borrowed twice at a time.
    pub fn kinds(&mut self, caps: Caps) -> Rc<RefCell<Kinds>> {
        let (physical, end) = (self.physical, Pfn(self.physical.end.0 >> PAGE_SHIFT));
        Rc::clone(self.kinds.get_or_insert_with(|| direct::kinds(physical, caps, end)))
    }

    /// All memory: the frames, and what the hypervisor keeps.
    pub fn total(&self) -> PageCount {
        self.frames().pages() + self.fixed
    }

    /// What is in use of it, tables that wait included.
    pub fn used(&self) -> PageCount {
        self.total().saturating_sub(self.frames().free_pages())
    }

    /// The most there ever was in use.
    pub const fn peak(&self) -> PageCount {
        self.peak
    }

    /// Recounts.
    ///
    /// # Errors
    /// [`ExtentError`]: a bug.
    pub fn audit(&self) -> Result<(), ExtentError> {
        self.owned.audit()
    }

    fn frames(&self) -> &Frames<&'static mut [FrameEntry]> {
        self.owned.frames()
    }

    fn frames_mut(&mut self) -> &mut Frames<&'static mut [FrameEntry]> {
        self.owned.frames_mut()
    }

    /// Does something with extents.
    pub fn with_extents<T>(&mut self, with: impl FnOnce(&mut Owned) -> T) -> T {
        let result = with(&mut self.owned);
        self.peak = self.peak.max(self.used());
        result
    }

    /// Zeroes an extent, if that is what is to be done with it now.
    pub fn zero(&mut self, task: Task) {
        if task.work != Work::Zero || !self.owned.tasks().any(|current| current == task) {
            return;
        }
        for page in (task.piece.first.0..).take(address(task.piece.order.pages().0)) {
            // SAFETY: the extent's frames are in use as its own (extents and frames agree, see `audit`), and nobody reaches them:
            // that is when a change asks for this.
            if let Some(mut frame) = unsafe { Frame::from_address(Hpa(page << PAGE_SHIFT)) } {
                frame.bytes_mut().fill(0);
                frame.into_address();
            }
        }
    }

    fn allocate(&mut self, order: Order, kind: Kind) -> Result<Piece, FramesError> {
        let piece = self.frames_mut().allocate(order, kind)?;
        self.peak = self.peak.max(self.used());
        Ok(piece)
    }

    /// A frame, with what its last owner left in it.
    ///
    /// # Errors
    /// [`FramesError::NoMemory`]: the hard line.
    pub fn take(&mut self, kind: Kind) -> Result<Frame, FramesError> {
        let piece = self.allocate(Order::PAGE, kind)?;
        // Frame 0 is in the first MiB, which is never given to the allocator.
        NonZeroU64::new(piece.first.0).map(Frame).ok_or(FramesError::NoSuchFrame { frame: piece.first })
    }

    /// A frame of zeros.
    ///
    /// # Errors
    /// Those of [`take`](Self::take).
    pub fn take_zeroed(&mut self, kind: Kind) -> Result<Frame, FramesError> {
        let mut frame = self.take(kind)?;
        frame.bytes_mut().fill(0);
        Ok(frame)
    }

    /// Takes a frame back as what it was taken for.
    ///
    /// # Errors
    /// [`FramesError::Mistaken`].
    pub fn give(&mut self, frame: Frame, kind: Kind) -> Result<(), FramesError> {
        self.frames_mut().free(frame.into_piece(), kind)
    }

    /// A root for tables of four levels, zeroed.
    ///
    /// # Errors
    /// Those of [`take`](Self::take).
    pub fn take_root(&mut self) -> Result<Frame, FramesError> {
        self.take_zeroed(root())
    }

    /// Takes a root back.
    ///
    /// # Errors
    /// [`FramesError::Mistaken`].
    pub fn give_root(&mut self, frame: Frame) -> Result<(), FramesError> {
        self.give(frame, root())
    }

    /// Has as many frames ready for tables as one mapping may need.
    ///
    /// # Errors
    /// Those of [`take`](Self::take).
    pub fn stock_tables(&mut self) -> Result<(), FramesError> {
        for level in (1..=3).filter_map(TableLevel::new) {
            while self.frames().pooled(level) < POOLED {
                let frame = self.take_zeroed(Kind::Table(level))?;
                self.frames_mut().pool(frame.into_piece(), level)?;
            }
        }
        Ok(())
    }

    /// Frames that wait to be tables.
    pub fn pooled(&self) -> PageCount {
        PageCount(
            (1..=3).filter_map(TableLevel::new).map(|level| u64::from(self.frames().pooled(level))).sum(),
        )
    }
}

/// The kind of a root.
fn root() -> Kind {
    TableLevel::new(4).map_or(Kind::Host, Kind::Table)
}

impl TableFrames for Memory {
    fn left(&self, level: Level) -> usize {
        TableLevel::new(level.0).map_or(0, |level| usize::try_from(self.frames().pooled(level)).unwrap_or(0))
    }

    fn take(&mut self, level: Level) -> Option<Output> {
        let piece = self.frames_mut().take_pooled(TableLevel::new(level.0)?)?;
        Some(Output(piece.first.0 << PAGE_SHIFT))
    }

    fn give(&mut self, level: Level, frame: Output) {
        let piece = Piece { first: Pfn(frame.0 >> PAGE_SHIFT), order: Order::PAGE };
        let Some(level) = TableLevel::new(level.0) else { return };
        // The pool's stock is for the next mapping; what is beyond it is memory again.
        let kept = if self.frames().pooled(level) < POOLED {
            self.frames_mut().pool(piece, level)
        } else {
            self.frames_mut().free(piece, Kind::Table(level))
        };
        debug_assert!(kept.is_ok(), "a table's frame is of its level");
    }
}

impl Own {
    fn in_map(map: &HostMap<REGIONS>, heap: ByteCount, guests: ByteCount) -> Result<Self, MemoryError> {
        let page = PAGE_SIZE as u64;
        let entries = address(entries_for(map));
        let table_bytes = ((entries * size_of::<FrameEntry>()) as u64).next_multiple_of(page);
        let heap_bytes = heap.0.next_multiple_of(page);
        let fixed = table_bytes + heap_bytes;
        let reachable = |region: &HostRegion| {
            let end = (region.end().0 << PAGE_SHIFT).min(crate::boot::MAPPED);
            (region.first.0 << PAGE_SHIFT, end)
        };
        let largest = map.usable().map(reachable).max_by_key(|(start, end)| end.saturating_sub(*start));
        let (start, end) = largest.unwrap_or((0, 0));
        let usable: PageCount = map.usable().map(|region| region.pages).sum();
        let largest = ByteCount(end.saturating_sub(start));
        if largest.0 < fixed || usable.bytes().0 < fixed + guests.0 {
            let (fixed, usable) = (ByteCount(fixed), usable.bytes());
            return Err(MemoryError::TooLittle { fixed, guests, largest, usable });
        }
        let heap = Hpa(start + table_bytes);
        Ok(Self {
            table: Hpa(start),
            entries,
            heap,
            heap_bytes: address(heap_bytes),
            end: Hpa(heap.0 + heap_bytes),
        })
    }
}

/// Bytes of the heap in use.
pub fn heap_used() -> ByteCount {
    ByteCount(HEAP.lock().used() as u64)
}
