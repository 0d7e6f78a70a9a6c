//! Packing cold objects densely: which ones, and how an object's data is replaced.
//!
//! A walk over the records offers objects that lie compressed with lz4 and have been here through one whole walk; packed
//! bytes enter, and the object has them. Record, handle, count and generation stay, so no page word changes. What must
//! never happen: an instant at which the record names a slot that does not hold the whole page.
//!
//! # Order of writes
//! 1. The bytes into a slot that nothing names.
//! 2. The record's place: one aligned word.
//! 3. The old slot is free, and its slab perhaps released.
//!
//! A manager that dies before the second step leaves the old object and a slot that recovery finds free; one that dies
//! after it leaves the new object and an old slot that recovery finds free. The steps are kept apart for the compiler,
//! which otherwise may move stores; the processor runs what is before an instruction at which a process dies.
use crate::{
    codec::Codec,
    dense::Packed,
    error::StoreError,
    fetch::{Fetched, Whereabouts},
    memory::{Lane, SlabMemory},
    record::{Body, Record, RecordNumber},
    records::Visit,
    store::Store,
};
use core::sync::atomic::{Ordering, compiler_fence};

/// What [`Store::next_cold`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cold {
    /// An object, which was fetched, is to be packed densely.
    Found,
    /// None among so many records. Go on.
    NotYet,
    /// The walk has come round. The next call begins another: wait as long as an object may be called warm.
    Round,
}

/// What [`Store::replace`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replacement {
    /// The object has the new bytes.
    Made,
    /// The object is gone, or not as it was when it was fetched. Nothing was changed.
    Outdated,
}

impl<M: SlabMemory> Store<M> {
    /// Looks at up to `records` records for an object to be packed densely, and fetches it: one that lies compressed with
    /// lz4 and has been here for one whole walk. Each is offered once, unless [`replace`](Self::replace) then finds no
    /// memory or the data elsewhere; those come again in the next walk.
    pub fn next_cold(&mut self, records: u32, into: &mut Fetched) -> Cold {
        for _ in 0..records {
            match self.records.visit(&mut self.cold) {
                Visit::Free => {}
                Visit::Round => return Cold::Round,
                Visit::Taken(number) => {
                    if self.records.meet(number)
                        && let Some(Ok(record)) = self.records.read(&self.memory, number)
                        && record.codec() == Codec::Lz4
                        && self.fetch(record.handle(number), into) == Ok(Whereabouts::Here)
                    {
                        return Cold::Found;
                    }
                }
            }
        }
        Cold::NotYet
    }

    /// Gives an object the bytes it was packed into. Its handle stays good.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`] where there is no slot for them; the store is then as it was.
    pub fn replace(&mut self, packed: &Packed<'_>) -> Result<Replacement, StoreError> {
        let number = packed.found.handle.number();
        let Some((_, record)) = self.still(&packed.found) else {
            if self.resolve(packed.found.handle).is_ok() {
                self.records.unsettle(number);
            }
            return Ok(Replacement::Outdated);
        };
        let lane = match record.body {
            Body::Data { extent, .. } => self.slots.lane(extent),
            Body::Same(_) | Body::Away { .. } => Lane::default(),
        };
        let extent = self.place_data(packed.bytes, lane).inspect_err(|_| self.records.unsettle(number))?;
        self.name_place(number, &record, Body::Data { codec: Codec::Dense, extent, key: record.key() });
        Ok(Replacement::Made)
    }

    /// Has a record name other data of the same page, which is where `body` says already, and frees the slot it named.
    pub(crate) fn name_place(&mut self, number: RecordNumber, record: &Record, body: Body) {
        let moved = Record { body, ..*record };
        compiler_fence(Ordering::SeqCst);
        self.records.write_place(&mut self.memory, number, &moved);
        compiler_fence(Ordering::SeqCst);
        self.tally.subtract(record);
        self.tally.add(&moved);
        if let Body::Data { extent: old, .. } = record.body {
            self.slots.give_back(&mut self.memory, old);
        }
    }
}
