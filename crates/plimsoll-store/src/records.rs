//! Which records of which record slab are taken, and the records themselves.
//!
//! Record number `n` is the `n % 2730`-th of the slab whose tag has sequence number `n / 2730`. Low numbers are
//! given first, so that the highest slabs empty and go back. A record is zeroed when it is freed.
//!
//! Beside what is taken, two bits of each record say what the walk that looks for cold objects knows of it: whether it
//! has met it before, and whether it is settled, which is to say offered once or not fit to be. They are derived like the
//! rest; after a recovery every object counts as new.
use crate::{
    bits,
    memory::{SLAB_SIZE, SlabId, SlabKind, SlabMemory, SlabTag, SlabsExhausted},
    record::{NotARecord, PLACE_OFFSET, RECORD_SIZE, RECORDS_PER_SLAB, Record, RecordNumber},
    stats::{TREE_ENTRY_SIZE, reserve_eighth, shrink_idle},
};
use alloc::{boxed::Box, collections::BTreeSet, vec::Vec};

const WORDS: usize = RECORDS_PER_SLAB.div_ceil(u64::BITS) as usize;

/// Sequence numbers are below this, so that every record has a number of 32 bits.
const SEQUENCES: u32 = u32::MAX / RECORDS_PER_SLAB;

#[derive(Clone, Debug)]
struct RecordSlab {
    slab: SlabId,
    used: u32,
    marks: Box<Marks>,
}

/// Sets of records of one slab.
#[derive(Clone, Debug)]
struct Marks {
    taken: [u64; WORDS],
    met: [u64; WORDS],
    settled: [u64; WORDS],
}

/// How far a walk over all records has come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Walk(u32);

/// What a step of a walk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Visit {
    /// A record that is not taken, or a slab that is not there.
    Free,
    Taken(RecordNumber),
    /// The end; the walk begins anew.
    Round,
}

/// See the file's head.
#[derive(Clone, Debug)]
pub(crate) struct RecordTable {
    /// By sequence number.
    slabs: Vec<Option<RecordSlab>>,
    /// Sequence numbers of slabs with free records.
    with_room: BTreeSet<u32>,
    held: usize,
}

impl RecordTable {
    pub(crate) const fn new() -> Self {
        Self { slabs: Vec::new(), with_room: BTreeSet::new(), held: 0 }
    }

    /// Takes up a slab as number `sequence`; false where that number is taken or absurd.
    pub(crate) fn adopt(&mut self, slab: SlabId, sequence: u32, sequence_limit: usize) -> bool {
        let place = sequence as usize;
        if place >= sequence_limit || sequence >= SEQUENCES {
            return false;
        }
        if self.slabs.len() <= place {
            reserve_eighth(&mut self.slabs, place + 1);
            self.slabs.resize_with(place + 1, || None);
        }
        let Some(entry @ None) = self.slabs.get_mut(place) else { return false };
        let marks = Marks { taken: [0; WORDS], met: [0; WORDS], settled: [0; WORDS] };
        *entry = Some(RecordSlab { slab, used: 0, marks: Box::new(marks) });
        self.held += 1;
        self.with_room.insert(sequence);
        true
    }

    /// True where a record can be taken without another slab.
    pub(crate) fn has_room(&self) -> bool {
        !self.with_room.is_empty()
    }

    /// Takes a free record, whose bytes are zero.
    pub(crate) fn take(&mut self, memory: &mut impl SlabMemory) -> Result<RecordNumber, SlabsExhausted> {
        let sequence = match self.with_room.first() {
            Some(sequence) => *sequence,
            None => self.extend(memory)?,
        };
        let held = self.slabs.get(sequence as usize).and_then(Option::as_ref).ok_or(SlabsExhausted)?;
        let free = bits::first_absent(&held.marks.taken, RECORDS_PER_SLAB).ok_or(SlabsExhausted)?;
        let start = free as usize * RECORD_SIZE;
        if let Err(exhausted) = memory.reserve(held.slab, start..start + RECORD_SIZE) {
            if held.used == 0 {
                self.drop_slab(memory, sequence);
            }
            return Err(exhausted);
        }
        let number = RecordNumber(sequence * RECORDS_PER_SLAB + free);
        if self.claim(number) { Ok(number) } else { Err(SlabsExhausted) }
    }

    /// Acquires a slab for the lowest sequence number without one.
    fn extend(&mut self, memory: &mut impl SlabMemory) -> Result<u32, SlabsExhausted> {
        let vacant = self.slabs.iter().position(Option::is_none).unwrap_or(self.slabs.len());
        let sequence =
            u32::try_from(vacant).ok().filter(|vacant| *vacant < SEQUENCES).ok_or(SlabsExhausted)?;
        let slab = memory.acquire(SlabTag::new(SlabKind::Records { sequence }))?;
        self.adopt(slab, sequence, usize::MAX);
        Ok(sequence)
    }

    /// Marks a record as taken; false where it is taken already or cannot be.
    pub(crate) fn claim(&mut self, number: RecordNumber) -> bool {
        let (sequence, place) = split(number);
        let Some(Some(held)) = self.slabs.get_mut(sequence as usize) else { return false };
        if !bits::insert(&mut held.marks.taken, place) {
            return false;
        }
        bits::remove(&mut held.marks.met, place);
        bits::remove(&mut held.marks.settled, place);
        held.used += 1;
        if held.used == RECORDS_PER_SLAB {
            self.with_room.remove(&sequence);
        }
        true
    }

    /// Zeroes and frees a record, and its slab with the last one.
    pub(crate) fn free(&mut self, memory: &mut impl SlabMemory, number: RecordNumber) {
        let (sequence, place) = split(number);
        let Some(Some(held)) = self.slabs.get_mut(sequence as usize) else { return };
        if !bits::remove(&mut held.marks.taken, place) {
            return;
        }
        held.used = held.used.saturating_sub(1);
        if let Some(bytes) = record_mut(memory, held.slab, place) {
            bytes.fill(0);
        }
        let used = held.used;
        self.with_room.insert(sequence);
        if used == 0 {
            self.drop_slab(memory, sequence);
        }
    }

    /// The record with that number; `None` where it is not taken.
    pub(crate) fn read(
        &self,
        memory: &impl SlabMemory,
        number: RecordNumber,
    ) -> Option<Result<Record, NotARecord>> {
        let (sequence, place) = split(number);
        let held = self.slabs.get(sequence as usize)?.as_ref()?;
        bits::contains(&held.marks.taken, place).then(|| read_at(memory, held.slab, place))
    }

    /// The record with that number, taken or not; for recovery, which is about to find out.
    pub(crate) fn peek(&self, memory: &impl SlabMemory, number: RecordNumber) -> Result<Record, NotARecord> {
        let (sequence, place) = split(number);
        let held = self.slabs.get(sequence as usize).and_then(Option::as_ref).ok_or(NotARecord)?;
        read_at(memory, held.slab, place)
    }

    /// The numbers of all records there can be in the slabs, taken or not.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = RecordNumber> + use<> {
        let sequences = (0..SEQUENCES).take(self.slabs.len());
        sequences.flat_map(|sequence| {
            (0..RECORDS_PER_SLAB).map(move |place| RecordNumber(sequence * RECORDS_PER_SLAB + place))
        })
    }

    /// The key of a record for the index. Of one that is damaged or free, anything.
    pub(crate) fn key(&self, memory: &impl SlabMemory, number: RecordNumber) -> u64 {
        self.peek(memory, number).map_or(0, |record| record.key())
    }

    /// Writes a record that is taken.
    pub(crate) fn write(&self, memory: &mut impl SlabMemory, number: RecordNumber, record: &Record) {
        let (sequence, place) = split(number);
        if let Some(Some(held)) = self.slabs.get(sequence as usize)
            && let Some(bytes) = record_mut(memory, held.slab, place)
        {
            *bytes = record.to_bytes();
        }
    }

    /// Writes the place of a record that is taken, and nothing else of it: one aligned word.
    pub(crate) fn write_place(&self, memory: &mut impl SlabMemory, number: RecordNumber, record: &Record) {
        let (sequence, place) = split(number);
        if let Some(Some(held)) = self.slabs.get(sequence as usize)
            && let Some(bytes) = record_mut(memory, held.slab, place)
        {
            bytes[PLACE_OFFSET..].copy_from_slice(&record.place().to_le_bytes());
        }
    }

    /// Takes a walk one record on, or past a slab that is not there.
    pub(crate) fn visit(&self, walk: &mut Walk) -> Visit {
        let number = RecordNumber(walk.0);
        let (sequence, place) = split(number);
        match self.slabs.get(sequence as usize) {
            None => {
                *walk = Walk::default();
                Visit::Round
            }
            Some(None) => {
                walk.0 = (sequence + 1) * RECORDS_PER_SLAB;
                Visit::Free
            }
            Some(Some(held)) => {
                walk.0 += 1;
                if bits::contains(&held.marks.taken, place) { Visit::Taken(number) } else { Visit::Free }
            }
        }
    }

    /// Notes that the walk for cold objects has met a record. True when it had met it before and it is not settled;
    /// it is then settled.
    pub(crate) fn meet(&mut self, number: RecordNumber) -> bool {
        let (sequence, place) = split(number);
        let Some(Some(held)) = self.slabs.get_mut(sequence as usize) else { return false };
        !bits::insert(&mut held.marks.met, place) && bits::insert(&mut held.marks.settled, place)
    }

    /// True when the walk for cold objects has nothing more to do with a record: it has been there for a whole walk.
    pub(crate) fn is_settled(&self, number: RecordNumber) -> bool {
        let (sequence, place) = split(number);
        let held = self.slabs.get(sequence as usize).and_then(Option::as_ref);
        held.is_some_and(|held| bits::contains(&held.marks.settled, place))
    }

    /// Has the walk for cold objects offer a record once more.
    pub(crate) fn unsettle(&mut self, number: RecordNumber) {
        let (sequence, place) = split(number);
        if let Some(Some(held)) = self.slabs.get_mut(sequence as usize) {
            bits::remove(&mut held.marks.settled, place);
        }
    }

    /// Zeroes every record that is not taken and releases the slabs in which none is. How many objects and how
    /// many slabs that were.
    pub(crate) fn sweep(&mut self, memory: &mut impl SlabMemory) -> (u64, u64) {
        let (mut objects, mut slabs) = (0, 0);
        for sequence in (0..SEQUENCES).take(self.slabs.len()) {
            let Some(Some(held)) = self.slabs.get(sequence as usize) else { continue };
            for place in (0..RECORDS_PER_SLAB).filter(|place| !bits::contains(&held.marks.taken, *place)) {
                objects += u64::from(read_at(memory, held.slab, place).is_ok());
                if let Some(bytes) = record_mut(memory, held.slab, place) {
                    bytes.fill(0);
                }
            }
            if held.used == 0 {
                self.drop_slab(memory, sequence);
                slabs += 1;
            }
        }
        (objects, slabs)
    }

    /// Slabs held.
    pub(crate) const fn held(&self) -> usize {
        self.held
    }

    /// Bytes of the slabs and of the table itself.
    pub(crate) fn metadata_size(&self) -> usize {
        self.held * (SLAB_SIZE + size_of::<Marks>())
            + self.slabs.capacity() * size_of::<Option<RecordSlab>>()
            + self.with_room.len() * TREE_ENTRY_SIZE
    }

    fn drop_slab(&mut self, memory: &mut impl SlabMemory, sequence: u32) {
        self.with_room.remove(&sequence);
        if let Some(entry) = self.slabs.get_mut(sequence as usize)
            && let Some(held) = entry.take()
        {
            self.held -= 1;
            memory.release(held.slab);
        }
        while let Some(None) = self.slabs.last() {
            self.slabs.pop();
        }
        shrink_idle(&mut self.slabs);
    }
}

const fn split(number: RecordNumber) -> (u32, u32) {
    (number.0 / RECORDS_PER_SLAB, number.0 % RECORDS_PER_SLAB)
}

fn read_at(memory: &impl SlabMemory, slab: SlabId, place: u32) -> Result<Record, NotARecord> {
    let tail = memory.bytes(slab).get(place as usize * RECORD_SIZE..).ok_or(NotARecord)?;
    Record::from_bytes(tail.first_chunk().ok_or(NotARecord)?)
}

fn record_mut(memory: &mut impl SlabMemory, slab: SlabId, place: u32) -> Option<&mut [u8; RECORD_SIZE]> {
    memory.bytes_mut(slab).get_mut(place as usize * RECORD_SIZE..)?.first_chunk_mut()
}
