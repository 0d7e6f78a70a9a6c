//! What the store holds and what that costs.
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, PageCount};

/// Bytes that an entry of a B-tree of 4-byte keys costs at most: nodes of 11 keys are at least half full.
pub(crate) const TREE_ENTRY_SIZE: usize = 12;

/// Makes room for `length` elements in all, and an eighth more: where an allocator doubles, half may lie idle,
/// and the idle half counts against the bytes an object may cost.
pub(crate) fn reserve_eighth<T>(vector: &mut Vec<T>, length: usize) {
    if length > vector.capacity() {
        vector.reserve_exact(length + length / 8 + 4 - vector.len());
    }
}

/// Gives back half of what lies idle once that is an eighth, so that shrinking copies as seldom as growing.
pub(crate) fn shrink_idle<T>(vector: &mut Vec<T>) {
    if vector.len() < vector.capacity() / 8 * 7 {
        vector.shrink_to(vector.len() + vector.len() / 16);
    }
}

/// Counts of one store. Exact as long as no record is damaged; damage makes them approximate, never a panic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pages that handles name: the sum of the six kinds below.
    pub pages: PageCount,
    /// First references to same-filled objects.
    pub same: PageCount,
    /// First references to objects compressed with lz4.
    pub lz4: PageCount,
    /// First references to raw objects.
    pub raw: PageCount,
    /// First references to objects packed densely.
    pub dense: PageCount,
    /// First references to objects whose data lies outside of slab memory, however it is compressed.
    pub away: PageCount,
    /// References beyond an object's first.
    pub duplicate: PageCount,
    /// About how many objects with data differ from another only a little: an estimate from a sample of what was
    /// inserted lately, and a low one.
    pub near_duplicate: PageCount,
    /// Encoded bytes of all objects in slab memory.
    pub data: ByteCount,
    /// Those of objects packed densely; part of `data`.
    pub dense_data: ByteCount,
    /// Encoded bytes outside of slab memory.
    pub away_data: ByteCount,
    /// Slots of data slabs that hold nothing.
    pub free_slots: ByteCount,
    /// Data slabs held: `data` and what is lost in and between slots.
    pub data_slabs: ByteCount,
    /// Record slabs held; part of `metadata`.
    pub record_slabs: ByteCount,
    /// Everything but data slabs: records, index, free lists and the store itself.
    pub metadata: ByteCount,
}

impl Stats {
    /// Objects stored: pages with different contents.
    pub fn objects(&self) -> u64 {
        self.same.0 + self.lz4.0 + self.raw.0 + self.dense.0 + self.away.0
    }

    /// Memory the store holds: slabs and what is beside them.
    pub fn held(&self) -> ByteCount {
        self.data_slabs + self.metadata
    }

    /// The bytes of data slabs in which no object's data is.
    pub fn fragmentation(&self) -> Fragmentation {
        Fragmentation {
            data_slabs: self.data_slabs,
            free_slots: self.free_slots,
            slot_waste: self.data_slabs.saturating_sub(self.data).saturating_sub(self.free_slots),
        }
    }
}

/// Bytes of data slabs that hold no encoded byte, by why they do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragmentation {
    /// All bytes of data slabs.
    pub data_slabs: ByteCount,
    /// In slots that are free: what [`Store::compact`](crate::Store::compact) can win back.
    pub free_slots: ByteCount,
    /// In slots that are taken, behind their data, and at the ends of slabs, behind the last slot: what size classes
    /// cost.
    pub slot_waste: ByteCount,
}

impl Fragmentation {
    /// The share of data slab bytes that hold no encoded byte, in thousandths.
    pub fn per_mille(&self) -> u64 {
        self.in_parts_of(1_000)
    }

    /// The same, in so many parts.
    pub fn in_parts_of(&self, parts: u64) -> u64 {
        ((self.free_slots.0 + self.slot_waste.0) * parts).checked_div(self.data_slabs.0).unwrap_or(0)
    }
}

impl core::ops::AddAssign for Fragmentation {
    fn add_assign(&mut self, Self { data_slabs, free_slots, slot_waste }: Self) {
        self.data_slabs += data_slabs;
        self.free_slots += free_slots;
        self.slot_waste += slot_waste;
    }
}
