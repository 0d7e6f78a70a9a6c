//! Slab memory on the heap, with a limit that tests can move to inject exhaustion, and tags they can damage.
use crate::memory::{SLAB_SIZE, SlabId, SlabMemory, SlabTag, SlabsExhausted};
use alloc::{boxed::Box, vec, vec::Vec};
use core::fmt;

/// [`SlabMemory`] in ordinary memory: it outlives a store (see [`Store::into_memory`](crate::Store::into_memory)),
/// not a process.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HeapSlabs {
    slabs: Vec<HeapSlab>,
    capacity: usize,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct HeapSlab {
    /// `None` while the slab is free; its bytes are zero then.
    tag: Option<SlabTag>,
    bytes: Box<[u8]>,
}

impl HeapSlabs {
    /// Memory of at most `capacity` slabs, none of them acquired.
    pub const fn new(capacity: usize) -> Self {
        Self { slabs: Vec::new(), capacity }
    }

    /// Moves the limit. Slabs above it that are acquired stay so.
    pub const fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    /// Overwrites the tag of an acquired slab, as damage to it would.
    pub fn retag(&mut self, slab: SlabId, tag: SlabTag) {
        if let Some(held) = self.slabs.get_mut(slab.get()).filter(|held| held.tag.is_some()) {
            held.tag = Some(tag);
        }
    }
}

impl fmt::Debug for HeapSlabs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeapSlabs")
            .field("held", &self.held())
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

impl SlabMemory for HeapSlabs {
    fn acquire(&mut self, tag: SlabTag) -> Result<SlabId, SlabsExhausted> {
        if self.held() >= self.capacity {
            return Err(SlabsExhausted);
        }
        let free = self.slabs.iter().position(|slab| slab.tag.is_none());
        let number = free.unwrap_or(self.slabs.len());
        let id = SlabId(u32::try_from(number).map_err(|_| SlabsExhausted)?);
        match self.slabs.get_mut(number) {
            Some(slab) => slab.tag = Some(tag),
            None => {
                self.slabs.push(HeapSlab { tag: Some(tag), bytes: vec![0; SLAB_SIZE].into_boxed_slice() })
            }
        }
        Ok(id)
    }

    fn release(&mut self, slab: SlabId) {
        if let Some(slab) = self.slabs.get_mut(slab.get()) {
            slab.tag = None;
            slab.bytes.fill(0);
        }
    }

    fn bytes(&self, slab: SlabId) -> &[u8] {
        match self.slabs.get(slab.get()) {
            Some(HeapSlab { tag: Some(_), bytes }) => bytes,
            _ => &[],
        }
    }

    fn bytes_mut(&mut self, slab: SlabId) -> &mut [u8] {
        match self.slabs.get_mut(slab.get()) {
            Some(HeapSlab { tag: Some(_), bytes }) => bytes,
            _ => &mut [],
        }
    }

    fn live(&self) -> impl Iterator<Item = (SlabId, SlabTag)> {
        (0..).zip(&self.slabs).filter_map(|(number, slab)| Some((SlabId(number), slab.tag?)))
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn held(&self) -> usize {
        self.slabs.iter().filter(|slab| slab.tag.is_some()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SlabKind;

    const TAG: SlabTag = SlabTag::new(SlabKind::Records { sequence: 7 });

    #[test]
    fn a_released_slab_comes_back_zeroed() {
        let mut slabs = HeapSlabs::new(2);
        let slab = slabs.acquire(TAG).unwrap();
        slabs.bytes_mut(slab).fill(0xaa);
        slabs.release(slab);
        assert_eq!(slabs.acquire(TAG), Ok(slab), "the lowest free number is given");
        assert!(slabs.bytes(slab).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_slab_that_is_not_held_has_no_bytes() {
        let mut slabs = HeapSlabs::new(1);
        let slab = slabs.acquire(TAG).unwrap();
        assert_eq!(slabs.acquire(TAG), Err(SlabsExhausted));
        slabs.release(slab);
        assert!(slabs.bytes(slab).is_empty());
        assert!(slabs.bytes_mut(SlabId(u32::MAX)).is_empty());
        slabs.release(SlabId(9));
        assert_eq!(slabs.held(), 0);
    }
}
