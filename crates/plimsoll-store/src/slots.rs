//! Which slots of which data slab are taken.
//!
//! Lengths enter, extents leave. All of it is derived: the slabs' tags and the records say the same, and
//! [`claim`](SlotTable::claim) rebuilds the table from them. No extent of a record is believed here before
//! [`range`](SlotTable::range) has found it inside a slab of ours, of the right class, in a slot that is taken.
use crate::{
    bits,
    class::{SLOTS_MAX, SizeClass},
    memory::{SlabId, SlabKind, SlabMemory, SlabTag, SlabsExhausted},
    record::Extent,
    stats::{TREE_ENTRY_SIZE, reserve_eighth, shrink_idle},
};
use alloc::{boxed::Box, collections::BTreeSet, vec::Vec};
use core::{array, ops::Range, slice};

const WORDS_MAX: usize = (SLOTS_MAX / u64::BITS) as usize;

/// The taken slots of one slab, without an allocation for the classes most pages are in.
#[derive(Clone, Debug)]
enum Taken {
    Few(u64),
    Many(Box<[u64; WORDS_MAX]>),
}

#[derive(Clone, Debug)]
struct DataSlab {
    class: SizeClass,
    used: u16,
    taken: Taken,
}

const _: () = assert!(size_of::<Option<DataSlab>>() == 24);

/// See the file's head.
#[derive(Clone, Debug)]
pub(crate) struct SlotTable {
    /// By slab number.
    slabs: Vec<Option<DataSlab>>,
    /// By class: slabs with free slots. The lowest is filled first, so that the highest empty first.
    with_room: [BTreeSet<SlabId>; SizeClass::COUNT],
    held: usize,
}

impl DataSlab {
    fn new(class: SizeClass) -> Self {
        let taken =
            if class.slots() <= u64::BITS { Taken::Few(0) } else { Taken::Many(Box::new([0; WORDS_MAX])) };
        Self { class, used: 0, taken }
    }

    fn words(&self) -> &[u64] {
        match &self.taken {
            Taken::Few(word) => slice::from_ref(word),
            Taken::Many(words) => words.as_slice(),
        }
    }

    fn words_mut(&mut self) -> &mut [u64] {
        match &mut self.taken {
            Taken::Few(word) => slice::from_mut(word),
            Taken::Many(words) => words.as_mut_slice(),
        }
    }

    fn is_full(&self) -> bool {
        u32::from(self.used) >= self.class.slots()
    }
}

impl SlotTable {
    pub(crate) fn new() -> Self {
        Self { slabs: Vec::new(), with_room: array::from_fn(|_| BTreeSet::new()), held: 0 }
    }

    /// Takes up a slab that is acquired and empty, or whose slots are yet to be claimed.
    pub(crate) fn adopt(&mut self, slab: SlabId, class: SizeClass) {
        if self.slabs.len() <= slab.get() {
            reserve_eighth(&mut self.slabs, slab.get() + 1);
            self.slabs.resize(slab.get() + 1, None);
        }
        if let Some(entry @ None) = self.slabs.get_mut(slab.get()) {
            *entry = Some(DataSlab::new(class));
            self.held += 1;
            self.room(class).insert(slab);
        }
    }

    /// Takes a free slot for `length` bytes.
    pub(crate) fn take(
        &mut self,
        memory: &mut impl SlabMemory,
        length: usize,
    ) -> Result<Extent, SlabsExhausted> {
        let class = SizeClass::holding(length).ok_or(SlabsExhausted)?;
        let slab = match self.room(class).first() {
            Some(slab) => *slab,
            None => {
                let slab = memory.acquire(SlabTag::new(SlabKind::Data { class }))?;
                if !slab.is_nameable() {
                    memory.release(slab);
                    return Err(SlabsExhausted);
                }
                self.adopt(slab, class);
                slab
            }
        };
        let free = self.slab(slab).and_then(|held| bits::first_absent(held.words(), class.slots()));
        let extent = Extent { slab, slot: free.ok_or(SlabsExhausted)?, length };
        if self.claim(extent) { Ok(extent) } else { Err(SlabsExhausted) }
    }

    /// Marks a slot as taken; false where it is taken already or cannot be.
    pub(crate) fn claim(&mut self, extent: Extent) -> bool {
        let Some(slab) = self.fitting_mut(extent) else { return false };
        if !bits::insert(slab.words_mut(), extent.slot) {
            return false;
        }
        slab.used += 1;
        if slab.is_full() {
            let class = slab.class;
            self.room(class).remove(&extent.slab);
        }
        true
    }

    /// Frees a slot, and its slab with the last one; false where the slot was not taken.
    pub(crate) fn give_back(&mut self, memory: &mut impl SlabMemory, extent: Extent) -> bool {
        let Some(slab) = self.fitting_mut(extent) else { return false };
        if !bits::remove(slab.words_mut(), extent.slot) {
            return false;
        }
        slab.used = slab.used.saturating_sub(1);
        let (class, used) = (slab.class, slab.used);
        self.room(class).insert(extent.slab);
        if used == 0 {
            self.drop_slab(memory, extent.slab, class);
        }
        true
    }

    /// Where in its slab the extent's bytes are, or `None` where there is no such extent in use.
    pub(crate) fn range(&self, extent: Extent) -> Option<Range<usize>> {
        let slab = self.slab(extent.slab).filter(|slab| fits(slab, extent))?;
        let start = extent.slot as usize * slab.class.size();
        bits::contains(slab.words(), extent.slot).then(|| start..start + extent.length)
    }

    /// Releases every slab in which nothing is taken; how many there were.
    pub(crate) fn release_empty(&mut self, memory: &mut impl SlabMemory) -> u64 {
        let mut released = 0;
        for number in 0..self.slabs.len() {
            let Some(Some(slab)) = self.slabs.get(number) else { continue };
            if slab.used == 0
                && let Ok(id) = u32::try_from(number)
            {
                let class = slab.class;
                self.drop_slab(memory, SlabId(id), class);
                released += 1;
            }
        }
        released
    }

    /// Slabs held.
    pub(crate) const fn held(&self) -> usize {
        self.held
    }

    /// Bytes of the table itself.
    pub(crate) fn metadata_size(&self) -> usize {
        let mut bytes = self.slabs.capacity() * size_of::<Option<DataSlab>>();
        for slab in self.slabs.iter().flatten() {
            if let Taken::Many(words) = &slab.taken {
                bytes += size_of_val(words.as_slice());
            }
        }
        bytes + self.with_room.iter().map(BTreeSet::len).sum::<usize>() * TREE_ENTRY_SIZE
    }

    fn drop_slab(&mut self, memory: &mut impl SlabMemory, slab: SlabId, class: SizeClass) {
        self.room(class).remove(&slab);
        if let Some(entry) = self.slabs.get_mut(slab.get())
            && entry.take().is_some()
        {
            self.held -= 1;
            memory.release(slab);
        }
        while let Some(None) = self.slabs.last() {
            self.slabs.pop();
        }
        shrink_idle(&mut self.slabs);
    }

    fn room(&mut self, class: SizeClass) -> &mut BTreeSet<SlabId> {
        &mut self.with_room[usize::from(class.number())]
    }

    fn slab(&self, slab: SlabId) -> Option<&DataSlab> {
        self.slabs.get(slab.get())?.as_ref()
    }

    fn fitting_mut(&mut self, extent: Extent) -> Option<&mut DataSlab> {
        self.slabs.get_mut(extent.slab.get())?.as_mut().filter(|slab| fits(slab, extent))
    }
}

/// True when the slab has such a slot, and is of the very class that bytes of that length go into.
fn fits(slab: &DataSlab, extent: Extent) -> bool {
    extent.slot < slab.class.slots() && SizeClass::holding(extent.length) == Some(slab.class)
}
