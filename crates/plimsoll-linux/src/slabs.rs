//! Slab memory in a file without a name: what a sharing domain's store lives in, and what outlives the manager.
//!
//! ```text
//! 0                                  head                     head + capacity * 64 KiB
//! +----------------------------------+------------------------+
//! | tag u64 of slab 0, 1, ... (0 =   | slab 0 | slab 1 | ...  |
//! | free), padded to a slab          |                        |
//! +----------------------------------+------------------------+
//! ```
//!
//! The file ends with the highest slab there ever was. A slab takes all of its memory when it is acquired, and lies so that
//! this can be one folio of the kernel's: that costs an eighth of 16 pages. Not so the first few of a store: they take it page by
//! page, because a host may have a thousand stores with some pages each. A released slab is punched out: the kernel gives its memory
//! back and the next user finds zeros. On a host of several NUMA nodes a slab of a lane takes the memory of that lane's node
//! ([`crate::nodes`]) by the policy of the thread that takes it: one of the file's would cut the mapping at each change of node.
//!
//! # Known hole
//! Where a slab is acquired again and its neighbours are free too, the kernel may give it a larger folio, at most 2 MiB, of
//! which the rest is charged to this process and not to the store until it is acquired, which happens next.
use crate::nodes;
use plimsoll_store::{SLAB_SIZE, SlabId, SlabMemory, SlabTag, SlabsExhausted};
use plimsoll_sys::mapping::{ExclusiveMapping, MemfdError};
use plimsoll_sys::numa;
use plimsoll_types::{ByteCount, PAGE_SIZE};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

const TAG: usize = size_of::<u64>();
/// Slabs of a store that take their memory page by page: records, and data of as many classes as pages of a kind mostly have.
const SMALL: usize = 4;

const _: () = assert!(SLAB_SIZE / PAGE_SIZE == u16::BITS as usize, "a bit a page");

/// The slabs of one domain.
#[derive(Debug)]
pub struct MemfdSlabs {
    memory: ExclusiveMapping,
    capacity: usize,
    held: usize,
    /// No slab below this one is free.
    lowest: usize,
    /// The pages of each slab that are known to have memory. Of what an earlier manager left nothing is, and asking the kernel
    /// again does no harm.
    backed: Vec<u16>,
}

impl MemfdSlabs {
    /// Room for `limit` bytes of slabs, none of it in use yet.
    ///
    /// # Errors
    /// [`MemfdError`] when the kernel gives no memfd of that size.
    pub fn create(name: &str, limit: ByteCount) -> Result<Self, MemfdError> {
        Self::with_head(limit, |size| ExclusiveMapping::create(name, size))
    }

    /// Goes on with the slabs of an earlier manager, made with the same limit, which may take as long as `patience` to let go of
    /// them. What that one had begun to acquire, or to give back, is given back.
    ///
    /// # Errors
    /// [`MemfdError`] when the file cannot be mapped, or somebody has it mapped after that.
    pub fn inherit(file: OwnedFd, limit: ByteCount, patience: Duration) -> Result<Self, MemfdError> {
        let mut slabs = Self::with_head(limit, |size| ExclusiveMapping::inherit(file, size, patience))?;
        let present = slabs.present();
        let free: Vec<usize> = (0..present).filter(|slab| slabs.tag(*slab) == 0).collect();
        slabs.held = present - free.len();
        for run in free.chunk_by(|one, next| one + 1 == *next) {
            let (offset, length) = Self::extent(slabs.capacity, run[0]);
            slabs.memory.punch_hole(offset, ByteCount(length.0 * run.len() as u64))?;
        }
        Ok(slabs)
    }

    /// Slabs in a mapping of the size that `limit` bytes of them take, which has at least their tags.
    fn with_head(
        limit: ByteCount,
        map: impl FnOnce(ByteCount) -> Result<ExclusiveMapping, MemfdError>,
    ) -> Result<Self, MemfdError> {
        let capacity = usize::try_from(limit.0).unwrap_or(usize::MAX).div_ceil(SLAB_SIZE).max(1);
        let head = Self::head(capacity);
        let mut memory = map(ByteCount((head + capacity * SLAB_SIZE) as u64))?;
        memory.grow(ByteCount(head as u64))?;
        Ok(Self { memory, capacity, held: 0, lowest: 0, backed: Vec::new() })
    }

    /// The file, for whoever keeps a copy of its descriptor for the next manager.
    pub fn keepsake(&self) -> BorrowedFd<'_> {
        self.memory.keepsake()
    }

    /// Slabs that the file is long enough for: beyond those none was ever acquired.
    fn present(&self) -> usize {
        (self.memory.len() - Self::head(self.capacity)) / SLAB_SIZE
    }

    const fn head(capacity: usize) -> usize {
        (capacity * TAG).next_multiple_of(SLAB_SIZE)
    }

    /// Where in the file a slab is.
    const fn extent(capacity: usize, slab: usize) -> (ByteCount, ByteCount) {
        let offset = Self::head(capacity) + slab * SLAB_SIZE;
        (ByteCount(offset as u64), ByteCount(SLAB_SIZE as u64))
    }

    fn tag(&self, slab: usize) -> u64 {
        let bytes = self.memory.get(slab * TAG..(slab + 1) * TAG);
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    fn set_tag(&mut self, slab: usize, tag: u64) {
        if let Some(bytes) = self.memory.get_mut(slab * TAG..(slab + 1) * TAG) {
            bytes.copy_from_slice(&tag.to_le_bytes());
        }
    }

    fn backed_mut(&mut self, slab: usize) -> &mut u16 {
        if self.backed.len() <= slab {
            self.backed.resize(slab + 1, 0);
        }
        &mut self.backed[slab]
    }

    fn place(&self, slab: SlabId) -> Option<usize> {
        let index = slab.0 as usize;
        let is_held = index < self.capacity && self.tag(index) != 0;
        is_held.then_some(Self::head(self.capacity) + index * SLAB_SIZE)
    }
}

/// Has memory taken where a slab of such a tag is to be, whoever takes it: a housekeeper packs what is of all nodes.
fn at_node_of<T>(tag: SlabTag, take: impl FnOnce() -> T) -> T {
    match nodes::of_tag(tag) {
        Some(node) => numa::preferring(node, take),
        None => take(),
    }
}

impl SlabMemory for MemfdSlabs {
    fn acquire(&mut self, tag: SlabTag) -> Result<SlabId, SlabsExhausted> {
        let free = (self.lowest..self.capacity).find(|slab| self.tag(*slab) == 0).ok_or(SlabsExhausted)?;
        let id = u32::try_from(free).map_err(|_| SlabsExhausted)?;
        let (offset, length) = Self::extent(self.capacity, free);
        let is_small = self.held < SMALL;
        let taken = if is_small {
            self.memory.grow(ByteCount(offset.0 + length.0))
        } else {
            at_node_of(tag, || self.memory.populate(offset, length))
        };
        taken.map_err(|_| SlabsExhausted)?;
        *self.backed_mut(free) = if is_small { 0 } else { u16::MAX };
        self.set_tag(free, tag.to_bits());
        self.lowest = free + 1;
        self.held += 1;
        Ok(SlabId(id))
    }

    fn reserve(&mut self, slab: SlabId, bytes: Range<usize>) -> Result<(), SlabsExhausted> {
        let pages = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE).min(SLAB_SIZE / PAGE_SIZE);
        if pages.is_empty() {
            return Ok(());
        }
        let wanted = (u16::MAX >> (SLAB_SIZE / PAGE_SIZE - pages.len())) << pages.start;
        if *self.backed_mut(slab.0 as usize) & wanted == wanted {
            return Ok(());
        }
        let place = self.place(slab).ok_or(SlabsExhausted)? + pages.start * PAGE_SIZE;
        let (offset, length) = (ByteCount(place as u64), ByteCount((pages.len() * PAGE_SIZE) as u64));
        let tag = SlabTag::from_bits(self.tag(slab.0 as usize));
        at_node_of(tag, || self.memory.touch(offset, length)).map_err(|_| SlabsExhausted)?;
        *self.backed_mut(slab.0 as usize) |= wanted;
        Ok(())
    }

    fn release(&mut self, slab: SlabId) {
        let Some(place) = self.place(slab) else { return };
        *self.backed_mut(slab.0 as usize) = 0;
        let (offset, length) = Self::extent(self.capacity, slab.0 as usize);
        if self.memory.punch_hole(offset, length).is_err() {
            // The contract is zeros, with or without the kernel's help.
            self.memory[place..place + SLAB_SIZE].fill(0);
        }
        self.set_tag(slab.0 as usize, 0);
        self.lowest = self.lowest.min(slab.0 as usize);
        self.held -= 1;
    }

    fn bytes(&self, slab: SlabId) -> &[u8] {
        self.place(slab).and_then(|place| self.memory.get(place..place + SLAB_SIZE)).unwrap_or(&[])
    }

    fn bytes_mut(&mut self, slab: SlabId) -> &mut [u8] {
        let place = self.place(slab);
        place.and_then(|place| self.memory.get_mut(place..place + SLAB_SIZE)).unwrap_or(&mut [])
    }

    fn live(&self) -> impl Iterator<Item = (SlabId, SlabTag)> {
        // The tags of others were never written, and reading them would take memory for them.
        let tags = (0..self.present()).map(|slab| (slab, self.tag(slab))).filter(|(_, tag)| *tag != 0);
        tags.filter_map(|(slab, tag)| Some((SlabId(u32::try_from(slab).ok()?), SlabTag::from_bits(tag))))
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn held(&self) -> usize {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_store::SlabKind;
    use plimsoll_sys::pagemap::{Entry, Pagemap};
    use plimsoll_sys::{HvaRange, ProcessId};
    use plimsoll_types::Hva;

    #[test]
    fn a_released_slab_comes_back_as_zeros_and_untouched_room_costs_nothing() {
        let mut slabs = MemfdSlabs::create("test-slabs", ByteCount::mib(1024)).unwrap();
        let tag = SlabTag::new(SlabKind::Records { sequence: 0 });
        let first = slabs.acquire(tag).unwrap();
        let second = slabs.acquire(tag).unwrap();
        slabs.bytes_mut(first).fill(7);
        slabs.release(first);
        assert!(slabs.bytes(first).is_empty());
        assert_eq!(slabs.acquire(tag), Ok(first), "the lowest free slab is given");
        assert!(slabs.bytes(first).iter().all(|byte| *byte == 0));
        assert_eq!(slabs.live().map(|(slab, _)| slab).collect::<Vec<_>>(), [first, second]);
    }

    #[test]
    fn looking_which_slabs_there_are_takes_no_memory_for_those_there_never_were() {
        // Tags of 512 KiB.
        let mut slabs = MemfdSlabs::create("test-slabs", ByteCount::mib(4096)).unwrap();
        let first = slabs.acquire(SlabTag::new(SlabKind::Records { sequence: 0 })).unwrap();
        let before = slabs.memory.allocated().unwrap();
        assert_eq!(slabs.live().map(|(slab, _)| slab).collect::<Vec<_>>(), [first]);
        assert_eq!(slabs.memory.allocated().unwrap(), before);
    }

    #[test]
    fn a_slab_but_the_first_few_has_all_its_memory_when_it_is_acquired_and_no_other_slab_has() {
        let mut slabs = MemfdSlabs::create("test-slabs", ByteCount::mib(1)).unwrap();
        let tag = SlabTag::new(SlabKind::Records { sequence: 0 });
        (0..SMALL).for_each(|_| assert!(slabs.acquire(tag).is_ok()));
        let slab = slabs.acquire(tag).unwrap();
        let start = Hva(slabs.bytes(slab).as_ptr().addr() as u64);
        let range = HvaRange::new(start, ByteCount(2 * SLAB_SIZE as u64)).unwrap();
        let mut entries = Vec::new();
        Pagemap::open(ProcessId::own()).unwrap().read(range, &mut entries).unwrap();
        let is_present = |entry: &Entry| entry.contains(Entry::PRESENT);
        let (first, second) = entries.split_at(SLAB_SIZE / PAGE_SIZE);
        assert!(first.iter().all(is_present) && !second.iter().any(is_present));
    }

    #[test]
    fn the_first_slabs_of_a_store_take_the_pages_that_are_written() {
        let mut slabs = MemfdSlabs::create("test-slabs", ByteCount::mib(64)).unwrap();
        let tag = SlabTag::new(SlabKind::Records { sequence: 0 });
        let held: Vec<SlabId> = (0..SMALL).map(|_| slabs.acquire(tag).unwrap()).collect();
        let pages = |slabs: &MemfdSlabs| slabs.memory.allocated().unwrap().0 / PAGE_SIZE as u64;
        assert_eq!((pages(&slabs), slabs.live().count()), (1, SMALL), "their tags");
        slabs.reserve(held[0], 4000..4096).unwrap();
        assert_eq!(pages(&slabs), 2);
        slabs.reserve(held[0], 4000..4097).unwrap();
        slabs.reserve(held[1], 65_535..65_536).unwrap();
        assert_eq!(pages(&slabs), 4);
        slabs.bytes_mut(held[0])[4096] = 7;
        slabs.reserve(held[0], 0..8192).unwrap();
        assert_eq!((slabs.bytes(held[0])[4096], pages(&slabs)), (7, 4), "what there is stays");
        slabs.release(held[0]);
        assert_eq!(pages(&slabs), 2);
        assert_eq!(slabs.reserve(held[0], 0..1), Err(SlabsExhausted), "it is nobody's");
    }

    #[test]
    fn slabs_take_no_more_memory_than_they_have_bytes() {
        let mut slabs = MemfdSlabs::create("test-slabs", ByteCount::mib(64)).unwrap();
        let tag = SlabTag::new(SlabKind::Records { sequence: 0 });
        let held: Vec<SlabId> = (0..70).map(|_| slabs.acquire(tag).unwrap()).collect();
        let tags = ByteCount(PAGE_SIZE as u64);
        let (first, others) = held.split_at(SMALL);
        first.iter().for_each(|slab| slabs.reserve(*slab, 0..SLAB_SIZE).unwrap());
        others.iter().for_each(|slab| slabs.reserve(*slab, 0..1).unwrap());
        let of = |count: u64| ByteCount(count * SLAB_SIZE as u64) + tags;
        assert_eq!(slabs.memory.allocated().unwrap(), of(70));
        held.iter().step_by(2).for_each(|slab| slabs.release(*slab));
        assert_eq!(slabs.memory.allocated().unwrap(), of(35));
        for _ in 0..35 {
            slabs.acquire(tag).unwrap();
        }
        assert_eq!(slabs.memory.allocated().unwrap(), of(70), "what was released is taken again");
    }
}
