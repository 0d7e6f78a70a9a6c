//! Emptying sparse slabs into fuller ones, so that they can be given back.
//!
//! After most pages of a store were released in random order its slabs are part empty. A round picks the sparsest slabs
//! of each class, so many that the others can take what they hold, and walks the records: data found in a slab that was
//! picked moves into one that was not, as `repack` says, and a slab goes back with the last slot. A step is bounded, and
//! between two steps anything may happen to the store.
//!
//! What must never happen: more memory is held than before. So nothing here acquires a slab, and while a round lasts,
//! pages that find no room elsewhere go into slabs that were picked. What cannot be moved, for want of room or because
//! its record is damaged, stays where it is.
//!
//! Records are found by walking them, since a slot does not say whose it is: 24 bytes read per object and round, where a
//! map from slots to records would cost 4 bytes an object for good. Records themselves, which handles name by number,
//! cannot move: their slabs go back only when all their objects have gone.
use crate::{
    memory::{SLAB_SIZE, SlabMemory},
    record::{Body, RecordNumber},
    records::{Visit, Walk},
    slots::Usage,
    store::Store,
};
use plimsoll_types::{ByteCount, PAGE_SIZE};

/// What moving an object costs in records looked at: 2.5 us, with its share of giving slabs back, against some 40 ns
/// where the record is in no cache.
const MOVE_COST: u32 = 64;

/// Where compaction is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Compaction {
    /// In a round.
    walk: Option<Walk>,
    /// Slabs given back in this round.
    released: usize,
    /// What was in use when a round ended that gave no slab back. As long as that is so, another would not either.
    futile: Option<Usage>,
}

/// What [`Store::compact`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Objects moved.
    pub moved: u64,
    /// Slabs given back.
    pub released: ByteCount,
    /// Whether to go on.
    pub progress: Progress,
}

/// Where compaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is nothing worth a round, or the last one won nothing: look again when pages were released.
    Idle,
    /// In a round: go on.
    Working,
    /// A round has ended.
    Round,
}

impl<M: SlabMemory> Store<M> {
    /// A bounded step of compaction: `work` is the number of records looked at, of which moving an object counts 64.
    /// Begins a round where at least a thirty-second of the data slabs can be won.
    pub fn compact(&mut self, work: u32) -> Compacted {
        let Some(mut walk) = self.compaction.walk.or_else(|| self.begin_round()) else {
            return Compacted { moved: 0, released: ByteCount(0), progress: Progress::Idle };
        };
        let before = self.slots.usage().slabs;
        let (mut left, mut moved, mut progress) = (work, 0, Progress::Working);
        while left > 0 && progress == Progress::Working {
            left -= 1;
            match self.records.visit(&mut walk) {
                Visit::Free => {}
                Visit::Round => progress = Progress::Round,
                Visit::Taken(number) => {
                    if self.leave_sparse(number).is_some() {
                        moved += 1;
                        left = left.saturating_sub(MOVE_COST);
                    }
                }
            }
        }
        let released = before.saturating_sub(self.slots.usage().slabs);
        self.compaction.released += released;
        self.compaction.walk = Some(walk);
        if progress == Progress::Round {
            self.slots.keep_all();
            let futile = Some(self.slots.usage()).filter(|_| self.compaction.released == 0);
            self.compaction = Compaction { futile, ..Compaction::default() };
        }
        Compacted { moved, released: ByteCount((released * SLAB_SIZE) as u64), progress }
    }

    fn begin_round(&mut self) -> Option<Walk> {
        let is_futile = self.compaction.futile == Some(self.slots.usage());
        (!is_futile && self.slots.pick_sparse() > 0).then(Walk::default)
    }

    /// Moves an object's data out of a slab that is being emptied; `None` where it is in none, or cannot be moved.
    fn leave_sparse(&mut self, number: RecordNumber) -> Option<()> {
        let record = self.records.read(&self.memory, number)?.ok()?;
        let Body::Data { codec, extent: old, key } = record.body else { return None };
        if !self.slots.is_emptying(old) {
            return None;
        }
        let mut buffer = [0; PAGE_SIZE];
        let bytes = buffer.get_mut(..old.length)?;
        bytes.copy_from_slice(self.data(old)?);
        let new = self.slots.take_from_filling(old.length, self.slots.lane(old))?;
        self.fill_slot(new, bytes).ok()?;
        self.name_place(number, &record, Body::Data { codec, extent: new, key });
        Some(())
    }
}
