//! Memory of the page store: slabs of frames that need not lie side by side.
//!
//! Enters: a wish for a slab. Leaves: 64 KiB of zeros, in one piece as the store sees them, through a window of the hypervisor's own
//! address space. Sixteen frames in a row are rare where guests come and go page by page; sixteen frames are not. What must never
//! happen: bytes of one slab seen in another: frames are zeroed when they are taken, and the window's entries are unmapped and
//! forgotten before their frames are given back.
use crate::memory::{Frame, Memory, address};
use crate::paging::Space;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use plimsoll_core::frames::buddy::Kind;
use plimsoll_mmu::Input;
use plimsoll_store::{SLAB_SIZE, SlabId, SlabMemory, SlabTag, SlabsExhausted};
use plimsoll_types::{PAGE_SIZE, PageCount};

/// The upper half of the address space, where nothing else is.
const WINDOW: u64 = 0xffff_8000_0000_0000;
const FRAMES: usize = SLAB_SIZE / PAGE_SIZE;

/// Memory that the store shares with the rest of the hypervisor. One processor: it is never borrowed twice at a time.
pub type Shared = Rc<RefCell<Memory>>;

struct Slab {
    tag: SlabTag,
    frames: Vec<Frame>,
}

/// The slabs of one sharing domain.
pub struct Slabs {
    memory: Shared,
    space: Space,
    slabs: Vec<Option<Slab>>,
    held: usize,
}

fn place(slab: SlabId) -> u64 {
    WINDOW + u64::from(slab.0) * SLAB_SIZE as u64
}

impl Slabs {
    /// No slabs yet.
    pub const fn new(memory: Shared, space: Space) -> Self {
        Self { memory, space, slabs: Vec::new(), held: 0 }
    }

    fn is_held(&self, slab: SlabId) -> bool {
        usize::try_from(slab.0).ok().and_then(|number| self.slabs.get(number)).is_some_and(Option::is_some)
    }

    /// Unmaps the frames from the window and gives them back.
    fn drop_frames(&self, memory: &mut Memory, slab: SlabId, frames: Vec<Frame>) {
        let pages = PageCount(frames.len() as u64);
        // A window that cannot be unmapped keeps its frames: lost, but nobody else's. The audit at the end finds them missing.
        if pages.0 > 0 && self.space.unmap(memory, Input(place(slab)), pages).is_err() {
            return;
        }
        for frame in frames {
            if memory.give(frame, Kind::Host).is_err() {
                return;
            }
        }
    }
}

impl SlabMemory for Slabs {
    fn acquire(&mut self, tag: SlabTag) -> Result<SlabId, SlabsExhausted> {
        let number = self.slabs.iter().position(Option::is_none).unwrap_or(self.slabs.len());
        let slab = SlabId(u32::try_from(number).map_err(|_| SlabsExhausted)?);
        let mut memory = self.memory.borrow_mut();
        let mut frames = Vec::with_capacity(FRAMES);
        for at in (place(slab)..).step_by(PAGE_SIZE).take(FRAMES) {
            let Ok(frame) = memory.take_zeroed(Kind::Host) else { break };
            if self.space.map_page(&mut memory, Input(at), frame.at()).is_err() {
                // Not mapped, so not among those that are unmapped.
                let _ = memory.give(frame, Kind::Host);
                break;
            }
            frames.push(frame);
        }
        if frames.len() < FRAMES {
            self.drop_frames(&mut memory, slab, frames);
            return Err(SlabsExhausted);
        }
        drop(memory);
        let held = Some(Slab { tag, frames });
        match self.slabs.get_mut(number) {
            Some(place) => *place = held,
            None => self.slabs.push(held),
        }
        self.held += 1;
        Ok(slab)
    }

    fn release(&mut self, slab: SlabId) {
        let number = usize::try_from(slab.0).unwrap_or(usize::MAX);
        let Some(held) = self.slabs.get_mut(number).and_then(Option::take) else { return };
        self.held -= 1;
        self.drop_frames(&mut self.memory.borrow_mut(), slab, held.frames);
    }

    fn bytes(&self, slab: SlabId) -> &[u8] {
        if !self.is_held(slab) {
            return &[];
        }
        // SAFETY: the window maps the slab's frames there, readable, until it is released, which takes `self` for writing. No
        // one else has the frames.
        unsafe { core::slice::from_raw_parts(with_exposed_provenance(address(place(slab))), SLAB_SIZE) }
    }

    fn bytes_mut(&mut self, slab: SlabId) -> &mut [u8] {
        if !self.is_held(slab) {
            return &mut [];
        }
        // SAFETY: as in `bytes`, writable, borrowed for writing.
        unsafe {
            core::slice::from_raw_parts_mut(with_exposed_provenance_mut(address(place(slab))), SLAB_SIZE)
        }
    }

    fn live(&self) -> impl Iterator<Item = (SlabId, SlabTag)> {
        (0..).map(SlabId).zip(&self.slabs).filter_map(|(id, slab)| slab.as_ref().map(|slab| (id, slab.tag)))
    }

    fn capacity(&self) -> usize {
        1 << SlabId::BITS
    }

    fn held(&self) -> usize {
        self.held
    }
}
