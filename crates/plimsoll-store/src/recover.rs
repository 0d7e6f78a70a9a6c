//! A store rebuilt from its slabs and from the handles that page words name.
//!
//! Slabs whose bytes nobody vouches for enter, and one handle for every page word that names one. A store leaves,
//! with a report of the handles that name nothing good: their pages are lost and are to be poisoned. What must
//! never happen: two objects in one slot; a count that is not the number of handles; a panic.
//!
//! Checksums are not verified here: faults wait for the end of this, and [`Store::get`] verifies what it returns.
use crate::{
    compact::Compaction,
    index::Index,
    memory::{SlabKind, SlabMemory},
    record::{Body, Generation, Handle, Record, RecordNumber},
    records::{RecordTable, Walk},
    similar::Similar,
    slots::SlotTable,
    store::{Store, Tally},
};
use alloc::vec::Vec;
use core::fmt;

/// Why a handle was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rejection {
    /// No such record, or one that is free, unreadable or now another object's.
    Stale,
    /// The record names a slot that does not exist, or one of the wrong size.
    Damaged,
    /// The record names a slot that another record, named earlier, has already.
    Overlap,
    /// The object has as many references as can be counted.
    TooMany,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stale => "it names no object",
            Self::Damaged => "the object's record is damaged",
            Self::Overlap => "the object's data belongs to another object as well",
            Self::TooMany => "the object has too many references",
        })
    }
}

/// A handle that names nothing good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RejectedHandle {
    /// As a page word named it.
    pub handle: Handle,
    /// What is wrong.
    pub why: Rejection,
}

/// What [`Store::recover`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Objects that live.
    pub objects: u64,
    /// References to them.
    pub references: u64,
    /// Objects freed because no handle names them, or only rejected ones: leaks of the manager that died.
    pub freed_objects: u64,
    /// Slabs released because nothing in them lives, rejected ones included.
    pub released_slabs: u64,
    /// Slabs whose tag was not one of ours, or claimed another slab's place.
    pub rejected_slabs: u64,
    /// Handles to poison, in the order given, as often as given.
    pub rejected: Vec<RejectedHandle>,
    /// One reference each that no page word that was read has: see [`Store::recover_partly`].
    pub pinned: Vec<Handle>,
}

/// How many of the page words that name objects could be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    All,
    Some,
}

impl<M: SlabMemory> Store<M> {
    /// Rebuilds a store from memory that a manager left, and from one handle for each page word that has one.
    /// Objects that no handle names are freed.
    pub fn recover(memory: M, handles: impl IntoIterator<Item = Handle>) -> (Self, RecoveryReport) {
        Self::recover_known(memory, handles, Known::All)
    }

    /// The same where page words exist that cannot be read: every object gets one reference more, which is
    /// [the caller's](RecoveryReport::pinned). So all that is there stays until these are released, because whoever had
    /// those words is gone, or until the store is recovered anew.
    pub fn recover_partly(memory: M, handles: impl IntoIterator<Item = Handle>) -> (Self, RecoveryReport) {
        Self::recover_known(memory, handles, Known::Some)
    }

    fn recover_known(
        memory: M,
        handles: impl IntoIterator<Item = Handle>,
        known: Known,
    ) -> (Self, RecoveryReport) {
        let mut store = Self {
            memory,
            records: RecordTable::new(),
            slots: SlotTable::new(),
            index: Index::new(),
            tally: Tally::default(),
            generation: Generation::default(),
            missed: None,
            similar: Similar::new(),
            cold: Walk::default(),
            compaction: Compaction::default(),
        };
        let mut report = RecoveryReport::default();
        store.adopt_slabs(&mut report);
        for handle in handles {
            match store.adopt_reference(handle) {
                Ok(()) => report.references += 1,
                Err(why) => report.rejected.push(RejectedHandle { handle, why }),
            }
        }
        if known == Known::Some {
            // After those that a word names: of two records that claim one slot, theirs is believed.
            for number in store.records.numbers() {
                if let Ok(record) = store.records.peek(&store.memory, number)
                    && store.adopt_reference(record.handle(number)).is_ok()
                {
                    report.references += 1;
                    report.pinned.push(record.handle(number));
                }
            }
        }
        let (freed_objects, record_slabs) = store.records.sweep(&mut store.memory);
        let data_slabs = store.slots.release_empty(&mut store.memory);
        report.objects = store.stats().objects();
        report.freed_objects = freed_objects;
        report.released_slabs += record_slabs + data_slabs;
        (store, report)
    }

    fn adopt_slabs(&mut self, report: &mut RecoveryReport) {
        let live: Vec<_> = self.memory.live().collect();
        // Sequence numbers are given lowest first, so none exceeds the slabs there can be.
        let sequence_limit = self.memory.capacity().max(live.len());
        for (slab, tag) in live {
            let adopted = match tag.kind() {
                Some(SlabKind::Records { sequence }) => self.records.adopt(slab, sequence, sequence_limit),
                Some(SlabKind::Data { class, lane }) if slab.is_nameable() => {
                    self.slots.adopt(slab, class, lane);
                    true
                }
                Some(SlabKind::Data { .. }) | None => false,
            };
            if !adopted {
                self.memory.release(slab);
                report.rejected_slabs += 1;
                report.released_slabs += 1;
            }
        }
    }

    fn adopt_reference(&mut self, handle: Handle) -> Result<(), Rejection> {
        let number = handle.number();
        let record = self.records.peek(&self.memory, number).map_err(|_| Rejection::Stale)?;
        if record.handle(number) != handle {
            return Err(Rejection::Stale);
        }
        let count = match self.records.read(&self.memory, number) {
            Some(_) => record.count.checked_add(1).ok_or(Rejection::TooMany)?,
            None => {
                self.adopt_object(number, &record)?;
                1
            }
        };
        self.records.write(&mut self.memory, number, &Record { count, ..record });
        self.tally.references += 1;
        self.generation = self.generation.max(handle.generation());
        Ok(())
    }

    /// The first reference to an object was found: its slot and its record are taken from here on.
    fn adopt_object(&mut self, number: RecordNumber, record: &Record) -> Result<(), Rejection> {
        if let Body::Data { extent, .. } = record.body
            && !self.slots.claim(extent)
        {
            let taken = self.slots.range(extent).is_some();
            return Err(if taken { Rejection::Overlap } else { Rejection::Damaged });
        }
        self.records.claim(number);
        let Self { memory, records, index, .. } = self;
        index.insert(record.key(), number, |number| records.key(memory, number));
        self.tally.add(record);
        Ok(())
    }
}
