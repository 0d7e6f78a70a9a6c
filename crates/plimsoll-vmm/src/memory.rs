//! Guest RAM, airlocks, and the userfaultfds that make both somebody else's business.
//!
//! Enters: a layout and how to treat it. Leaves: one value that everybody in this process shares, through which alone
//! guest memory is reached. Between [`Memory::map`] and [`Memory::register`] the memory is the kernel's, pages come on
//! first touch, and the image is loaded; after it, an absent page is whoever holds the descriptors' to bring. What must
//! never happen: the last copy of RAM's descriptor closing while a vCPU can still run, because absent pages would then
//! read as zeros. So the descriptors live in this value, every thread that runs the guest holds it, and when the last
//! of them is gone the memory goes with it.
//!
//! # The two descriptors of a shard
//!
//! RAM is one mapping for each region, and managed in shards ([`crate::shards`]), each of which has its part of RAM, an
//! airlock and two descriptors.
//!
//! * RAM's is opened with `EVENT_REMOVE` and `EVENT_UNMAP`, so the manager hears of every page that goes away, in order
//!   with the faults. `EVENT_FORK` and `EVENT_REMAP` are left out because neither can happen: the mapping is
//!   `MADV_DONTFORK`, nothing here forks or moves a mapping, and the seccomp filter knows no `fork` and no `mremap`.
//! * The airlock's has no events: the agent itself discards there, and would wait for the manager, which waits for the
//!   agent.
//!
//! Both are registered for missing pages; `UFFDIO_MOVE` asks that of its destination only, so out needs the airlock's
//! and in needs RAM's.
//!
//! # Locks
//!
//! * The pin table's mutex, see [`crate::pins`]: the agent holds it during a move. Nobody faults under it.
//! * The discard gate, a readers-writer lock without waiting writers. A discard holds it for reading and may wait there
//!   for the manager to read its event. The agent only ever *tries* to take it for writing, and reports `Again` if it
//!   cannot, so it waits for nobody; while it has it, a page that is present stays so, and `MADV_POPULATE_WRITE` on it
//!   cannot become a fault that would wait for the agent itself.
use crate::config::{HugePages, Prefault};
use crate::gifts::Gifts;
use crate::pins::{PageRun, PinGuard, Pins};
use crate::shards::{self, Cut};
use plimsoll_core::layout::{GuestLayout, LayoutError, Region};
use plimsoll_core::word::Gift;
use plimsoll_sys::mapping::{self, AnonymousMapping, MapError, Merging, RangeError};
use plimsoll_sys::numa::NodeId;
use plimsoll_sys::pagemap::{Pagemap, PagemapError};
use plimsoll_sys::uffd::{
    Features, HandshakeError, Mode, OpenError, ProbeError, RegisterError, RegisterMode, Userfaultfd,
};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{BLOCK_SIZE, ByteCount, Gpa, Hva, PAGE_SIZE, PageIndex};
use std::sync::RwLock;
use thiserror::Error;

/// What RAM's descriptor is opened with. POISON is for pages whose bytes are lost.
const RAM_FEATURES: Features =
    Features::EVENT_REMOVE.union(Features::EVENT_UNMAP).union(Features::MOVE).union(Features::POISON);
/// What the airlock's descriptor is opened with.
const AIRLOCK_FEATURES: Features = Features::MOVE;
/// Bytes touched between two calls of a prefault's progress callback.
const PREFAULT_STEP: u64 = 64 << 20;

/// Memory that cannot be set up. The host is at fault unless it says otherwise.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The kernel refuses a mapping.
    #[error("cannot map guest memory")]
    Map(#[from] MapError),
    /// A part of a mapping cannot be used as intended.
    #[error("guest memory cannot be accessed")]
    Range(#[from] RangeError),
    /// No userfaultfd.
    #[error("guest memory cannot be managed")]
    Open(#[from] OpenError),
    /// The kernel's features are not known.
    #[error("guest memory cannot be managed")]
    Probe(#[from] ProbeError),
    /// The kernel is too old.
    #[error("this kernel's userfaultfd lacks {missing:?}: moving pages needs Linux 6.8 or newer")]
    Features {
        /// What it lacks.
        missing: Features,
    },
    /// The kernel refuses the features.
    #[error("guest memory cannot be managed")]
    Handshake(#[from] HandshakeError),
    /// The kernel refuses to register the memory.
    #[error("guest memory cannot be managed")]
    Register(#[from] RegisterError),
    /// Present pages cannot be told from absent ones.
    #[error("guest memory cannot be managed")]
    Pagemap(#[from] PagemapError),
    /// There is too little of it.
    #[error("guest memory cannot be cut into so many shards")]
    Cut(#[from] LayoutError),
    /// An address is in no region.
    #[error("{len} at {gpa} do not lie in one region of guest memory")]
    OutsideRam {
        /// The first byte.
        gpa: Gpa,
        /// How many.
        len: ByteCount,
    },
}

/// A discard the guest must not make. The guest is at fault.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiscardError {
    /// Not whole pages of one region.
    #[error("it gave back {len:#x} bytes at {gpa}, which are not whole pages of one region")]
    NotPages {
        /// The first byte.
        gpa: Gpa,
        /// How many.
        len: u64,
    },
    /// Pages the VMM depends on.
    #[error("it gave back {len:#x} bytes at {gpa}, where a page is in use by a device or by the VMM")]
    Pinned {
        /// The first byte.
        gpa: Gpa,
        /// How many.
        len: u64,
    },
    /// The kernel refused; the host is at fault.
    #[error("its pages could not be given back")]
    Kernel(#[from] RangeError),
}

/// What a manager gets hold of for one shard.
#[derive(Debug)]
pub(crate) struct Managed {
    /// RAM's descriptor: faults and discards of the guest.
    pub(crate) ram: Userfaultfd,
    /// The airlock's descriptor.
    pub(crate) airlock_uffd: Userfaultfd,
    /// Where captured pages rest.
    pub(crate) airlock: AnonymousMapping,
    /// Its size in slots.
    pub(crate) slots: u32,
    /// Which pages are present.
    pub(crate) pagemap: Pagemap,
}

impl Managed {
    /// Opens both descriptors and maps the airlock. Nothing is registered yet.
    pub(crate) fn open(mode: Mode, slots: u32) -> Result<Self, MemoryError> {
        // One answer holds for both: the features of a kernel do not depend on the descriptor.
        let wanted = RAM_FEATURES | AIRLOCK_FEATURES;
        let missing = wanted - Userfaultfd::supported()?.features;
        if !missing.is_empty() {
            return Err(MemoryError::Features { missing });
        }
        let open = |features| -> Result<Userfaultfd, MemoryError> {
            let uffd = Userfaultfd::open(mode)?;
            uffd.handshake(features)?;
            Ok(uffd)
        };
        let bytes = ByteCount(u64::from(slots) * BLOCK_SIZE as u64);
        Ok(Self {
            ram: open(RAM_FEATURES)?,
            airlock_uffd: open(AIRLOCK_FEATURES)?,
            // Huge pages that arrive stay huge; none are ever made here.
            airlock: AnonymousMapping::new(bytes, mapping::HugePages::HostDefault)?,
            slots,
            pagemap: Pagemap::open(ProcessId::own())?,
        })
    }

    /// What the manager is told RAM's descriptor can do.
    pub(crate) const fn features(&self) -> u64 {
        RAM_FEATURES.bits()
    }
}

/// A part of RAM that is managed by itself.
#[derive(Debug)]
pub(crate) struct Shard {
    /// Where it is.
    pub(crate) cut: Cut,
    /// What it is managed with.
    pub(crate) managed: Managed,
}

/// All memory of one machine.
#[derive(Debug)]
pub struct Memory {
    layout: GuestLayout,
    /// One mapping for each region of the layout, in the same order.
    mappings: Vec<AnonymousMapping>,
    /// None for a machine of the kernel's.
    shards: Vec<Shard>,
    pins: Pins,
    gifts: Gifts,
    /// See "Locks".
    pub(crate) discard_gate: RwLock<()>,
}

impl Memory {
    /// Maps all regions, bound to `nodes` in equal parts ([`shards::parts`]), or to none. `managed` is what
    /// [`register`](Self::register) will use, one for each shard; none for a machine of the kernel's.
    pub(crate) fn map(
        layout: GuestLayout,
        huge: HugePages,
        managed: Vec<Managed>,
        nodes: &[NodeId],
    ) -> Result<Self, MemoryError> {
        let huge = match huge {
            HugePages::Advise => mapping::HugePages::Prefer,
            HugePages::Never => mapping::HugePages::Never,
        };
        let map = |bytes| AnonymousMapping::new(bytes, huge);
        let mappings =
            layout.regions().iter().map(|region| map(region.bytes)).collect::<Result<Vec<_>, _>>()?;
        let cuts = match managed.len() {
            0 => Vec::new(),
            count => shards::cut(&layout, count, nodes.len())?,
        };
        let shards = cuts.into_iter().zip(managed).map(|(cut, managed)| Shard { cut, managed }).collect();
        let (pins, gifts) = (Pins::default(), Gifts::new(layout.pages()));
        let memory = Self { layout, mappings, shards, pins, gifts, discard_gate: RwLock::new(()) };
        for (node, part) in nodes.iter().zip(shards::parts(&memory.layout, nodes.len().max(1))) {
            for region in part {
                let (mapping, range) = memory.mapped(&region)?;
                mapping.bind(range, *node)?;
            }
        }
        Ok(memory)
    }

    /// Touches every page, calling `progress` with the bytes done so far.
    pub(crate) fn prefault(
        &self,
        prefault: Prefault,
        mut progress: impl FnMut(ByteCount),
    ) -> Result<(), MemoryError> {
        if prefault == Prefault::OnDemand {
            return Ok(());
        }
        let mut done = ByteCount(0);
        for mapping in &self.mappings {
            let mut rest = Some(mapping.range()).filter(|range| !range.is_empty());
            while let Some(range) = rest {
                let step = ByteCount(range.len().0.min(PREFAULT_STEP));
                if let Some(part) = HvaRange::new(range.start(), step) {
                    mapping.populate_write(part)?;
                }
                done += step;
                progress(done);
                rest = range.skip(step).filter(|range| !range.is_empty());
            }
        }
        Ok(())
    }

    /// Hands absent pages over to whoever reads the descriptors. Nothing for a machine of the kernel's.
    pub(crate) fn register(&self) -> Result<(), MemoryError> {
        for shard in &self.shards {
            for (mapping, range) in self.parts(shard)? {
                shard.managed.ram.register(mapping.unborrowed(range)?, RegisterMode::MISSING)?;
            }
            let airlock = &shard.managed.airlock;
            shard
                .managed
                .airlock_uffd
                .register(airlock.unborrowed(airlock.range())?, RegisterMode::MISSING)?;
        }
        Ok(())
    }

    /// Where the regions of a shard are mapped, in the order of its layout, and the mapping of each.
    pub(crate) fn parts(&self, shard: &Shard) -> Result<Vec<(&AnonymousMapping, HvaRange)>, MemoryError> {
        shard.cut.layout.regions().iter().map(|region| self.mapped(region)).collect()
    }

    /// Where guest memory that lies in one region is mapped.
    fn mapped(&self, region: &Region) -> Result<(&AnonymousMapping, HvaRange), MemoryError> {
        let outside = || MemoryError::OutsideRam { gpa: region.start, len: region.bytes };
        let (mapping, offset) = self.locate(region.start, region.bytes)?;
        let start = mapping.base().checked_add(offset.0);
        let range = start.and_then(|start| HvaRange::new(start, region.bytes)).ok_or_else(outside)?;
        Ok((mapping, range))
    }

    /// Where everything lies in the guest.
    pub fn layout(&self) -> &GuestLayout {
        &self.layout
    }

    /// Where each region is mapped here.
    pub(crate) fn hvas(&self) -> Vec<Hva> {
        self.mappings.iter().map(AnonymousMapping::base).collect()
    }

    pub(crate) fn mappings(&self) -> &[AnonymousMapping] {
        &self.mappings
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    /// The guest address of something at a host address, for messages.
    pub(crate) fn gpa_of(&self, hva: Hva) -> Option<Gpa> {
        let inside = |mapping: &AnonymousMapping| hva >= mapping.base() && hva < mapping.range().end();
        let (region, mapping) =
            self.layout.regions().iter().zip(&self.mappings).find(|(_, mapping)| inside(mapping))?;
        region.start.checked_add(hva.0 - mapping.base().0)
    }

    /// The mapping and the offset in it of `len` bytes that must lie in one region.
    fn locate(&self, gpa: Gpa, len: ByteCount) -> Result<(&AnonymousMapping, ByteCount), MemoryError> {
        let found = self.layout.regions().iter().zip(&self.mappings).find_map(|(region, mapping)| {
            let offset = gpa.0.checked_sub(region.start.0)?;
            let end = offset.checked_add(len.0)?;
            (end <= region.bytes.0 && offset < region.bytes.0).then_some((mapping, ByteCount(offset)))
        });
        found.ok_or(MemoryError::OutsideRam { gpa, len })
    }

    /// Pins the pages of `len` bytes at `gpa` and makes them present: what a device does before it uses them.
    ///
    /// # Errors
    /// [`MemoryError::OutsideRam`].
    pub fn pin(&self, gpa: Gpa, len: ByteCount) -> Result<PinGuard<'_>, MemoryError> {
        let run = self.pages(gpa, len)?;
        Ok(self.pins.pin(run, |page| self.touch(page)))
    }

    /// Pins the pages for as long as the machine lives. Call it before [`register`](Self::register).
    pub(crate) fn pin_for_life(&self, gpa: Gpa, len: ByteCount) -> Result<(), MemoryError> {
        let run = self.pages(gpa, len)?;
        run.pages().for_each(|page| self.touch(page));
        self.pins.pin_for_life(run);
        Ok(())
    }

    /// The run of pages that `len` bytes at `gpa` touch.
    fn pages(&self, gpa: Gpa, len: ByteCount) -> Result<PageRun, MemoryError> {
        let outside = || MemoryError::OutsideRam { gpa, len };
        self.locate(gpa, len)?;
        let last = gpa.checked_add(len.0.saturating_sub(1)).ok_or_else(outside)?;
        let first = self.layout.index_of(gpa).ok_or_else(outside)?;
        let last = self.layout.index_of(last).ok_or_else(outside)?;
        let count = last.0.checked_sub(first.0).and_then(|pages| pages.checked_add(1));
        count.and_then(|count| PageRun::new(first, count)).ok_or_else(outside)
    }

    /// Reads a word of a page so that it is present afterwards. Waits for whoever serves the memory.
    fn touch(&self, page: PageIndex) {
        if let Some((region, offset)) = self.layout.locate(page)
            && let Some(mapping) = self.mappings.get(region)
        {
            // In bounds by construction; the value does not matter.
            let _ = mapping.read_u64(ByteCount(offset));
        }
    }

    /// Copies bytes into guest memory; address and length are multiples of 8. After registration the
    /// range must be pinned.
    ///
    /// # Errors
    /// [`MemoryError::OutsideRam`], [`MemoryError::Range`].
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let (mapping, offset) = self.locate(gpa, ByteCount(bytes.len() as u64))?;
        Ok(mapping.copy_into(offset, bytes)?)
    }

    /// Copies bytes out of guest memory, as [`write`](Self::write) does into it.
    ///
    /// # Errors
    /// [`MemoryError::OutsideRam`], [`MemoryError::Range`].
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let (mapping, offset) = self.locate(gpa, ByteCount(bytes.len() as u64))?;
        Ok(mapping.copy_from(offset, bytes)?)
    }

    /// Stores one aligned word at once.
    pub(crate) fn write_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryError> {
        let (mapping, offset) = self.locate(gpa, ByteCount(8))?;
        Ok(mapping.write_u64(offset, value)?)
    }

    /// Loads one aligned word at once.
    pub(crate) fn read_u64(&self, gpa: Gpa) -> Result<u64, MemoryError> {
        let (mapping, offset) = self.locate(gpa, ByteCount(8))?;
        Ok(mapping.read_u64(offset)?)
    }

    /// Puts `new` in the place of `old` in an aligned word, or fails with what it holds, at once for vCPUs too.
    pub(crate) fn exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, MemoryError> {
        let (mapping, offset) = self.locate(gpa, ByteCount(8))?;
        Ok(mapping.exchange_u64(offset, old, new)?)
    }

    /// Offers pages to the kernel's samepage merging, or makes them this machine's own again. Touches none that is absent.
    ///
    /// # Errors
    /// [`MemoryError::OutsideRam`]; [`MemoryError::Range`] where the kernel has no KSM or no memory.
    pub(crate) fn advise_merging(
        &self,
        gpa: Gpa,
        len: ByteCount,
        merging: Merging,
    ) -> Result<(), MemoryError> {
        let (mapping, offset) = self.locate(gpa, len)?;
        let start = mapping.base().checked_add(offset.0);
        let range = start.and_then(|start| HvaRange::new(start, len));
        Ok(mapping.advise_merging(range.ok_or(MemoryError::OutsideRam { gpa, len })?, merging)?)
    }

    /// How the guest gave pages back.
    pub(crate) fn gifts(&self) -> &Gifts {
        &self.gifts
    }

    /// Gives pages back of which the guest says, unasked, that it does not need them. As [`give`](Self::give).
    pub(crate) fn discard(&self, gpa: Gpa, len: u64) -> Result<(), DiscardError> {
        self.give(gpa, len, Gift::Reported)
    }

    /// Gives pages back that the guest does not need. Waits until the manager has read the event, so the
    /// caller holds no lock that anybody else waits for.
    pub(crate) fn give(&self, gpa: Gpa, len: u64, gift: Gift) -> Result<(), DiscardError> {
        let not_pages = DiscardError::NotPages { gpa, len };
        let aligned = gpa.is_page_aligned() && ByteCount(len).is_multiple_of(PAGE_SIZE) && len > 0;
        let (true, Ok(run)) = (aligned, self.pages(gpa, ByteCount(len))) else { return Err(not_pages) };
        if self.pins.any(run) {
            return Err(DiscardError::Pinned { gpa, len });
        }
        let Ok((mapping, offset)) = self.locate(gpa, ByteCount(len)) else { return Err(not_pages) };
        let start = mapping.base().checked_add(offset.0);
        let Some(range) = start.and_then(|start| HvaRange::new(start, ByteCount(len))) else {
            return Err(not_pages);
        };
        self.gifts.note(run, gift);
        // Nothing is protected by the gate that a panic could leave half done.
        let gate = self.discard_gate.read();
        let done = mapping.discard(range);
        drop(gate);
        Ok(done?)
    }
}

impl Drop for Memory {
    /// Nobody runs the guest any more. Unregistering first keeps the unmapping from waiting for a manager to read the
    /// event; it has the same effect as the end of the process.
    fn drop(&mut self) {
        for shard in &self.shards {
            for (_, range) in self.parts(shard).unwrap_or_default() {
                // What was never registered is refused or ignored, and either is right here.
                let _ = shard.managed.ram.unregister(range);
            }
            let _ = shard.managed.airlock_uffd.unregister(shard.managed.airlock.range());
        }
    }
}
