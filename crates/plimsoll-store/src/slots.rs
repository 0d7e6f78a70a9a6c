//! Which slots of which data slab are taken.
//!
//! Lengths enter, extents leave. All of it is derived: the slabs' tags and the records say the same, and
//! [`claim`](SlotTable::claim) rebuilds the table from them. No extent of a record is believed here before
//! [`range`](SlotTable::range) has found it inside a slab of ours, of the right class, in a slot that is taken.
use crate::{
    bits,
    class::{SLOTS_MAX, SizeClass},
    memory::{Lane, SlabId, SlabKind, SlabMemory, SlabTag, SlabsExhausted},
    record::Extent,
    stats::{TREE_ENTRY_SIZE, reserve_eighth, shrink_idle},
};
use alloc::{boxed::Box, collections::BTreeSet, vec::Vec};
use core::{array, ops::Range, slice};

const WORDS_MAX: usize = (SLOTS_MAX / u64::BITS) as usize;
/// Steps in which slabs are told apart by how full they are.
const TIERS: u32 = 8;
/// Emptying slabs means walking all records: worth it when a 32nd of the slabs can be had.
const WORTH_SHARE: usize = 32;

/// The taken slots of one slab, without an allocation for the classes most pages are in.
#[derive(Clone, Debug)]
enum Taken {
    Few(u64),
    Many(Box<[u64; WORDS_MAX]>),
}

#[derive(Clone, Debug)]
struct DataSlab {
    class: SizeClass,
    lane: Lane,
    duty: Duty,
    used: u16,
    taken: Taken,
}

/// What a slab's free slots are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Duty {
    /// To be filled.
    Filling,
    /// To become all of them: only where no other slab of the class has room is one filled.
    Emptying,
}

/// What is in use, of all classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) slabs: usize,
    pub(crate) slots: usize,
}

/// The slabs of one class and lane. One with free slots is in one of the two sets.
#[derive(Clone, Debug, Default)]
struct Room {
    /// The lowest is filled first, so that the highest empty first.
    filling: BTreeSet<SlabId>,
    emptying: BTreeSet<SlabId>,
    slabs: usize,
    /// Slots taken.
    taken: usize,
}

const _: () = assert!(size_of::<Option<DataSlab>>() == 24);

/// See the file's head.
#[derive(Clone, Debug)]
pub(crate) struct SlotTable {
    /// By slab number.
    slabs: Vec<Option<DataSlab>>,
    /// By lane, up to the last that there was, and by class.
    rooms: Vec<Rooms>,
}

/// Of one lane, by class.
type Rooms = [Room; SizeClass::COUNT];

impl DataSlab {
    fn new(class: SizeClass, lane: Lane) -> Self {
        let taken =
            if class.slots() <= u64::BITS { Taken::Few(0) } else { Taken::Many(Box::new([0; WORDS_MAX])) };
        Self { class, lane, duty: Duty::Filling, used: 0, taken }
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

    /// How full it is, in so many steps: the last is full.
    fn tier(&self) -> u32 {
        u32::from(self.used) * TIERS / self.class.slots()
    }
}

impl Room {
    /// The slabs of that duty that have free slots.
    const fn with(&mut self, duty: Duty) -> &mut BTreeSet<SlabId> {
        match duty {
            Duty::Filling => &mut self.filling,
            Duty::Emptying => &mut self.emptying,
        }
    }

    /// Slabs without which the others still hold all that is taken, whichever they are.
    fn excess(&self, class: SizeClass) -> usize {
        self.slabs.saturating_sub(self.taken.div_ceil(class.slots() as usize))
    }

    fn metadata_size(&self, class: SizeClass) -> usize {
        let words = if class.slots() <= u64::BITS { 0 } else { WORDS_MAX * size_of::<u64>() };
        self.slabs * words + (self.filling.len() + self.emptying.len()) * TREE_ENTRY_SIZE
    }
}

impl SlotTable {
    pub(crate) fn new() -> Self {
        Self { slabs: Vec::new(), rooms: Vec::new() }
    }

    /// Takes up a slab that is acquired and empty, or whose slots are yet to be claimed.
    pub(crate) fn adopt(&mut self, slab: SlabId, class: SizeClass, lane: Lane) {
        if self.slabs.len() <= slab.get() {
            reserve_eighth(&mut self.slabs, slab.get() + 1);
            self.slabs.resize(slab.get() + 1, None);
        }
        if let Some(entry @ None) = self.slabs.get_mut(slab.get()) {
            *entry = Some(DataSlab::new(class, lane));
            let room = self.room(class, lane);
            room.slabs += 1;
            room.filling.insert(slab);
        }
    }

    /// True where a slot for `length` bytes can be taken without another slab.
    pub(crate) fn has_room(&self, length: usize, lane: Lane) -> bool {
        let rooms = self.rooms.get(usize::from(lane.0));
        let room = SizeClass::holding(length).and_then(|class| rooms?.get(usize::from(class.number())));
        room.is_some_and(|room| !room.filling.is_empty() || !room.emptying.is_empty())
    }

    /// Takes a free slot for `length` bytes: one of another lane rather than none.
    pub(crate) fn take(
        &mut self,
        memory: &mut impl SlabMemory,
        length: usize,
        lane: Lane,
    ) -> Result<Extent, SlabsExhausted> {
        let class = SizeClass::holding(length).ok_or(SlabsExhausted)?;
        if self.room(class, lane).filling.is_empty() && !self.keep_one(class, lane) {
            match memory.acquire(SlabTag::new(SlabKind::Data { class, lane })) {
                Ok(slab) if slab.is_nameable() => self.adopt(slab, class, lane),
                Ok(slab) => {
                    memory.release(slab);
                    return self.take_elsewhere(length).ok_or(SlabsExhausted);
                }
                Err(SlabsExhausted) => return self.take_elsewhere(length).ok_or(SlabsExhausted),
            }
        }
        self.take_from_filling(length, lane).ok_or(SlabsExhausted)
    }

    /// Takes a free slot of whichever lane has one.
    fn take_elsewhere(&mut self, length: usize) -> Option<Extent> {
        let class = SizeClass::holding(length)?;
        let lane = self.lanes().find(|lane| self.has_room(length, *lane))?;
        if self.room(class, lane).filling.is_empty() {
            self.keep_one(class, lane);
        }
        self.take_from_filling(length, lane)
    }

    /// Takes a free slot of a slab that is held and not being emptied.
    pub(crate) fn take_from_filling(&mut self, length: usize, lane: Lane) -> Option<Extent> {
        let class = SizeClass::holding(length)?;
        let slab = *self.room(class, lane).filling.first()?;
        let slot = bits::first_absent(self.slab(slab)?.words(), class.slots())?;
        let extent = Extent { slab, slot, length };
        self.claim(extent).then_some(extent)
    }

    /// The lane whose slab the extent is in; the first where it is in none.
    pub(crate) fn lane(&self, extent: Extent) -> Lane {
        self.slab(extent.slab).map_or(Lane::default(), |slab| slab.lane)
    }

    /// Picks the slabs that are to be emptied into the others of their classes and lanes: of each the sparsest, so many that
    /// the others can take all. How many; 0, and nothing changes, where that is less than a thirty-second of all.
    pub(crate) fn pick_sparse(&mut self) -> usize {
        let excess_of = |rooms: &Rooms| -> [usize; SizeClass::COUNT] {
            let mut left = [0; SizeClass::COUNT];
            for ((class, room), left) in SizeClass::all().zip(rooms).zip(&mut left) {
                *left = room.excess(class);
            }
            left
        };
        let mut left: Vec<_> = self.rooms.iter().map(excess_of).collect();
        let excess: usize = left.iter().flatten().sum();
        if excess == 0 || excess * WORTH_SHARE < self.usage().slabs {
            return 0;
        }
        // The sparsest are in the lowest tiers. One pass takes a tier of every class, the highest slabs first, so that the
        // table gets shorter.
        for tier in 0..TIERS {
            for (number, slab) in self.slabs.iter_mut().enumerate().rev() {
                let Some(slab) = slab.as_mut().filter(|slab| slab.tier() == tier) else { continue };
                let (lane, class) = (usize::from(slab.lane.0), usize::from(slab.class.number()));
                let (left, room) = match (left.get_mut(lane), self.rooms.get_mut(lane)) {
                    (Some(left), Some(rooms)) if left[class] > 0 => (&mut left[class], &mut rooms[class]),
                    _ => continue,
                };
                let Ok(number) = u32::try_from(number) else { continue };
                *left -= 1;
                slab.duty = Duty::Emptying;
                room.filling.remove(&SlabId(number));
                room.emptying.insert(SlabId(number));
            }
        }
        excess
    }

    /// True when the extent is in a slab that is being emptied.
    pub(crate) fn is_emptying(&self, extent: Extent) -> bool {
        self.slab(extent.slab).is_some_and(|slab| slab.duty == Duty::Emptying)
    }

    /// Gives up emptying: what is left in those slabs stays, and they are filled again.
    pub(crate) fn keep_all(&mut self) {
        for lane in self.lanes() {
            for class in SizeClass::all() {
                while self.keep_one(class, lane) {}
            }
        }
    }

    /// Has one slab of the class and lane, the lowest, filled again instead of emptied; false where there is none.
    fn keep_one(&mut self, class: SizeClass, lane: Lane) -> bool {
        let room = self.room(class, lane);
        let Some(slab) = room.emptying.pop_first() else { return false };
        room.filling.insert(slab);
        if let Some(Some(held)) = self.slabs.get_mut(slab.get()) {
            held.duty = Duty::Filling;
        }
        true
    }

    /// Marks a slot as taken; false where it is taken already or cannot be.
    pub(crate) fn claim(&mut self, extent: Extent) -> bool {
        let Some(slab) = self.fitting_mut(extent) else { return false };
        if !bits::insert(slab.words_mut(), extent.slot) {
            return false;
        }
        slab.used += 1;
        let (class, lane, duty, is_full) = (slab.class, slab.lane, slab.duty, slab.is_full());
        let room = self.room(class, lane);
        room.taken += 1;
        if is_full {
            room.with(duty).remove(&extent.slab);
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
        let (class, lane, duty, used) = (slab.class, slab.lane, slab.duty, slab.used);
        let room = self.room(class, lane);
        room.taken = room.taken.saturating_sub(1);
        room.with(duty).insert(extent.slab);
        if used == 0 {
            self.drop_slab(memory, extent.slab);
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
                self.drop_slab(memory, SlabId(id));
                released += 1;
            }
        }
        released
    }

    /// What is in use.
    pub(crate) fn usage(&self) -> Usage {
        let sum = |of: fn(&Room) -> usize| self.rooms.iter().flatten().map(of).sum();
        Usage { slabs: sum(|room| room.slabs), slots: sum(|room| room.taken) }
    }

    /// Bytes of the slots that are free.
    pub(crate) fn free_bytes(&self) -> usize {
        let free = |(class, room): (SizeClass, &Room)| {
            (room.slabs * class.slots() as usize).saturating_sub(room.taken) * class.size()
        };
        self.rooms().map(free).sum()
    }

    /// Bytes of the table itself.
    pub(crate) fn metadata_size(&self) -> usize {
        let rooms: usize = self.rooms().map(|(class, room)| room.metadata_size(class)).sum();
        self.slabs.capacity() * size_of::<Option<DataSlab>>()
            + self.rooms.capacity() * size_of::<Rooms>()
            + rooms
    }

    fn rooms(&self) -> impl Iterator<Item = (SizeClass, &Room)> {
        self.rooms.iter().flat_map(|rooms| SizeClass::all().zip(rooms))
    }

    /// Those that there are or were slabs of.
    fn lanes(&self) -> impl Iterator<Item = Lane> + use<> {
        let count = self.rooms.len();
        (0..=u8::MAX).map(Lane).take(count)
    }

    fn drop_slab(&mut self, memory: &mut impl SlabMemory, slab: SlabId) {
        if let Some(entry) = self.slabs.get_mut(slab.get())
            && let Some(held) = entry.take()
        {
            let room = self.room(held.class, held.lane);
            room.slabs = room.slabs.saturating_sub(1);
            room.with(held.duty).remove(&slab);
            memory.release(slab);
        }
        while let Some(None) = self.slabs.last() {
            self.slabs.pop();
        }
        shrink_idle(&mut self.slabs);
    }

    fn room(&mut self, class: SizeClass, lane: Lane) -> &mut Room {
        let lane = usize::from(lane.0);
        if self.rooms.len() <= lane {
            // Nodes are few.
            self.rooms.reserve_exact(lane + 1 - self.rooms.len());
            self.rooms.resize_with(lane + 1, || array::from_fn(|_| Room::default()));
        }
        &mut self.rooms[lane][usize::from(class.number())]
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
