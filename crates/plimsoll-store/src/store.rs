//! The store: pages in, handles out, and back.
//!
//! Everything here runs under the owner's lock; hashing and compressing do not (see the crate's head). What must
//! never happen: bytes leave that are not the page that came in; an error leaves something half done.
//!
//! # Order of writes
//! Slab memory outlives the manager, which may die between any two instructions. An insertion writes data, then
//! the record, and only then has the caller a handle to put into a page word; a release zeroes the record and
//! gives slabs back after the caller's word names the object no longer. So at any instant, what a word names is
//! whole. `repack` says how data moves.
use crate::{
    codec::{Codec, Encoded, Encoder, decode},
    compact::Compaction,
    dense::NoDense,
    digest::{self, Digest, Fingerprint, digest},
    error::{Damage, GetError, StoreError},
    fetch::{Confirmed, Fetched, Found},
    index::Index,
    memory::{Lane, SLAB_SIZE, SlabId, SlabMemory},
    record::{Body, Extent, Generation, Handle, Record, RecordNumber, Remote},
    records::{RecordTable, Walk},
    similar::Similar,
    slots::SlotTable,
    stats::Stats,
};
use alloc::vec::Vec;
use core::fmt;
use plimsoll_types::{ByteCount, PAGE_SIZE, PageBytes, PageCount};

/// The pages of one sharing domain, in slab memory `M`.
#[derive(Clone)]
pub struct Store<M> {
    pub(crate) memory: M,
    pub(crate) records: RecordTable,
    pub(crate) slots: SlotTable,
    pub(crate) index: Index,
    pub(crate) tally: Tally,
    /// Of the last insertion.
    pub(crate) generation: Generation,
    /// The hash that was sought last, in vain, while no object has been inserted since.
    pub(crate) missed: Option<Digest>,
    pub(crate) similar: Similar,
    /// Of the search for cold objects.
    pub(crate) cold: Walk,
    pub(crate) compaction: Compaction,
}

/// Counters that change with every object.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) references: u64,
    same: u64,
    lz4: u64,
    raw: u64,
    dense: u64,
    away: u64,
    data_bytes: u64,
    dense_bytes: u64,
    away_bytes: u64,
}

/// How [`Store::insert`] kept a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum How {
    /// As one word, without data.
    Same,
    /// As one more reference to an equal page.
    Duplicate,
    /// Compressed.
    Lz4,
    /// As it was.
    Raw,
}

/// What [`Store::seek`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    /// The page, which has one more reference now.
    Shared(Handle),
    /// An object with the page's hash that is packed densely. Its bytes were fetched: [`Fetched::confirm`] says whether
    /// it is the page.
    Candidate,
    /// Nothing.
    Absent,
}

/// Objects with a page's hash.
struct Likes {
    /// The first that has the very bytes.
    equal: Option<(RecordNumber, Record)>,
    /// The first that is packed densely, so that it takes longer to find out.
    packed: Option<Handle>,
}

/// A page that is now in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Names it; one reference is the holder's.
    pub handle: Handle,
    /// How it is kept.
    pub how: How,
}

impl Tally {
    pub(crate) fn add(&mut self, record: &Record) {
        let length = record.length() as u64;
        let (objects, bytes) = self.counters(record);
        *objects += 1;
        *bytes += length;
        if let Body::Data { codec: Codec::Dense, .. } = record.body {
            self.dense_bytes += length;
        }
    }

    pub(crate) fn subtract(&mut self, record: &Record) {
        let length = record.length() as u64;
        let (objects, bytes) = self.counters(record);
        *objects = objects.saturating_sub(1);
        *bytes = bytes.saturating_sub(length);
        if let Body::Data { codec: Codec::Dense, .. } = record.body {
            self.dense_bytes = self.dense_bytes.saturating_sub(length);
        }
    }

    /// Objects with data in slab memory.
    const fn with_data(&self) -> u64 {
        self.lz4 + self.raw + self.dense
    }

    /// Where the record's object and where its bytes are counted.
    const fn counters(&mut self, record: &Record) -> (&mut u64, &mut u64) {
        match record.body {
            Body::Same(_) => (&mut self.same, &mut self.data_bytes),
            Body::Away { .. } => (&mut self.away, &mut self.away_bytes),
            Body::Data { codec, .. } => {
                let kind = match codec {
                    Codec::Same => &mut self.same,
                    Codec::Lz4 => &mut self.lz4,
                    Codec::Raw => &mut self.raw,
                    Codec::Dense => &mut self.dense,
                };
                (kind, &mut self.data_bytes)
            }
        }
    }
}

impl<M: SlabMemory> Store<M> {
    /// An empty store. Memory that holds slabs already belongs to [`Store::recover`], which this is with no
    /// handles: whatever the slabs hold is dropped.
    pub fn new(memory: M) -> Self {
        Self::recover(memory, core::iter::empty()).0
    }

    /// The handle of a page that is here already, with one more reference; `None` where it is not, lies away, or is packed
    /// densely: [`seek`](Self::seek) finds it then too.
    ///
    /// # Errors
    /// [`StoreError::ZeroPage`], [`StoreError::WrongDigest`].
    pub fn share(&mut self, page: &PageBytes, digest: &Digest) -> Result<Option<Handle>, StoreError> {
        let Likes { equal, .. } = self.find(page, digest)?;
        Ok(equal.map(|(number, record)| self.add_reference(number, record)))
    }

    /// Like [`share`](Self::share); where the page may be here densely packed, its bytes are fetched into `candidate`,
    /// to be confirmed without the store and then shared by [`share_confirmed`](Self::share_confirmed).
    ///
    /// # Errors
    /// As for `share`.
    pub fn seek(
        &mut self,
        page: &PageBytes,
        digest: &Digest,
        candidate: &mut Fetched,
    ) -> Result<Sought, StoreError> {
        let Likes { equal, packed } = self.find(page, digest)?;
        if let Some((number, record)) = equal {
            return Ok(Sought::Shared(self.add_reference(number, record)));
        }
        let fetched = packed.is_some_and(|handle| self.fetch(handle, candidate).is_ok());
        Ok(if fetched { Sought::Candidate } else { Sought::Absent })
    }

    /// One more reference to an object that was confirmed to be the page; `None` where it is gone, or no longer where it
    /// was when it was fetched.
    pub fn share_confirmed(&mut self, confirmed: Confirmed) -> Option<Handle> {
        let (number, record) = self.still(&confirmed.0)?;
        (record.count < u32::MAX).then(|| self.add_reference(number, record))
    }

    /// Slab memory that an [`insert`](Self::insert) of `encoded` would acquire at most: none where there is room for it.
    pub fn growth(&self, encoded: Encoded<'_>, lane: Lane) -> ByteCount {
        let length = encoded.bytes().len();
        let slabs = usize::from(!self.records.has_room())
            + usize::from(length > 0 && !self.slots.has_room(length, lane));
        ByteCount((slabs * SLAB_SIZE) as u64)
    }

    /// Stores a page: as one more reference where it came to be here since [`share`](Self::share) was asked,
    /// else as `encoded`, in memory of a lane.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`], [`StoreError::ZeroPage`], [`StoreError::WrongDigest`]; the store is then as
    /// it was.
    pub fn insert(
        &mut self,
        page: &PageBytes,
        digest: &Digest,
        encoded: Encoded<'_>,
        lane: Lane,
    ) -> Result<Stored, StoreError> {
        if self.missed != Some(*digest)
            && let Some(handle) = self.share(page, digest)?
        {
            return Ok(Stored { handle, how: How::Duplicate });
        }
        let (handle, how) = match (*digest, encoded.codec()) {
            (Digest::Zero, _) => return Err(StoreError::ZeroPage),
            (Digest::Same(word), _) => {
                (self.insert_body(Body::Same(word), Fingerprint::of_word(word))?, How::Same)
            }
            (Digest::Hashed(hash), codec @ (Codec::Lz4 | Codec::Raw)) => {
                let how = if codec == Codec::Raw { How::Raw } else { How::Lz4 };
                let fingerprint = Fingerprint::of_hash(hash);
                (self.insert_data(fingerprint, codec, encoded, lane)?, how)
            }
            (Digest::Hashed(_), Codec::Same | Codec::Dense) => return Err(StoreError::WrongDigest),
        };
        Ok(Stored { handle, how })
    }

    /// All phases at once, for callers without a lock to leave; `None` for a zero page.
    ///
    /// # Errors
    /// [`StoreError::Exhausted`]; the store is then as it was.
    pub fn put(&mut self, page: &PageBytes, encoder: &mut Encoder) -> Result<Option<Stored>, StoreError> {
        let digest = digest(page);
        if digest == Digest::Zero {
            return Ok(None);
        }
        if let Some(handle) = self.share(page, &digest)? {
            return Ok(Some(Stored { handle, how: How::Duplicate }));
        }
        self.insert(page, &digest, encoder.encode(page, &digest), Lane::default()).map(Some)
    }

    /// Drops one reference, and the object with the last one. The caller's page word must name it no longer. Of an object
    /// that lay away, the bytes that nobody needs any more are returned: whoever keeps them is to be told.
    ///
    /// # Errors
    /// [`StoreError::Stale`] where the handle names no object, [`StoreError::Corrupt`] where its record was
    /// damaged.
    pub fn release(&mut self, handle: Handle) -> Result<Option<Remote>, StoreError> {
        let (number, mut record) = match self.resolve(handle) {
            Ok(found) => found,
            Err(GetError::Stale { .. } | GetError::Away { .. } | GetError::Nothing) => {
                return Err(StoreError::Stale { handle });
            }
            Err(GetError::Corrupt { .. }) => {
                self.drop_record(handle.number(), None);
                return Err(StoreError::Corrupt { handle });
            }
        };
        self.tally.references = self.tally.references.saturating_sub(1);
        if record.count > 1 {
            record.count -= 1;
            self.records.write(&mut self.memory, number, &record);
            return Ok(None);
        }
        self.tally.subtract(&record);
        self.drop_record(number, Some(record.key()));
        match record.body {
            Body::Data { extent, .. } if !self.slots.give_back(&mut self.memory, extent) => {
                Err(StoreError::Corrupt { handle })
            }
            Body::Data { .. } | Body::Same(_) => Ok(None),
            Body::Away { remote, .. } => Ok(Some(remote)),
        }
    }

    /// Flips one stored bit of the object, one that [`get`](Self::get) will notice, to show that damage is
    /// reported. False, with nothing changed, where the handle is stale or no single bit matters.
    pub fn sabotage(&mut self, handle: Handle) -> bool {
        let Ok((number, record)) = self.resolve(handle) else { return false };
        match record.body {
            Body::Same(word) => {
                let damaged = Record { body: Body::Same(word ^ 1), ..record };
                self.records.write(&mut self.memory, number, &damaged);
                true
            }
            // Without the codec, or without the data, nobody knows which bits of it matter; all of the check do, and the
            // handle has not this one.
            Body::Away { .. } | Body::Data { codec: Codec::Dense, .. } => {
                let damaged = Record { check: record.check ^ 1 << (u32::BITS - 1), ..record };
                self.records.write(&mut self.memory, number, &damaged);
                true
            }
            // A flipped bit of lz4 may decode to the same page, where two matches are as good as one another.
            Body::Data { extent, .. } => (0..extent.length).any(|place| {
                self.flip(extent, place);
                let noticed = self.is_damaged(handle);
                if !noticed {
                    self.flip(extent, place);
                }
                noticed
            }),
        }
    }

    /// What is held and what it costs. A few hundred instructions, whatever is held.
    pub fn stats(&self) -> Stats {
        let Tally { references, same, lz4, raw, dense, away, data_bytes, dense_bytes, away_bytes } =
            self.tally;
        let bytes = |count: usize| ByteCount(count as u64);
        let metadata = self.records.metadata_size()
            + self.slots.metadata_size()
            + self.index.metadata_size()
            + Similar::metadata_size()
            + size_of::<Self>();
        Stats {
            pages: PageCount(references),
            same: PageCount(same),
            lz4: PageCount(lz4),
            raw: PageCount(raw),
            dense: PageCount(dense),
            away: PageCount(away),
            duplicate: PageCount(references.saturating_sub(same + lz4 + raw + dense + away)),
            near_duplicate: PageCount(self.similar.estimate(lz4 + raw + dense)),
            data: ByteCount(data_bytes),
            dense_data: ByteCount(dense_bytes),
            away_data: ByteCount(away_bytes),
            free_slots: bytes(self.slots.free_bytes()),
            data_slabs: bytes(self.slots.usage().slabs * SLAB_SIZE),
            record_slabs: bytes(self.records.held() * SLAB_SIZE),
            metadata: bytes(metadata),
        }
    }

    /// The slab memory.
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// The slab memory, to change its limits. Its slabs and their bytes are the store's.
    pub const fn memory_mut(&mut self) -> &mut M {
        &mut self.memory
    }

    /// Leaves the slabs as a crash would, for a successor to [`recover`](Self::recover).
    pub fn into_memory(self) -> M {
        self.memory
    }

    /// Drops every page and releases every slab: the end of a domain.
    pub fn dismantle(self) -> M {
        Store::new(self.memory).memory
    }

    /// Drops every page and releases every slab, and says what of them lay away: the end of a domain whose store others
    /// still look into. They find handles that are stale.
    pub fn clear(&mut self) -> Vec<Remote> {
        let remotes = self.remotes().collect();
        let slabs: Vec<SlabId> = self.memory.live().map(|(slab, _)| slab).collect();
        slabs.into_iter().for_each(|slab| self.memory.release(slab));
        self.records = RecordTable::new();
        self.slots = SlotTable::new();
        self.index = Index::new();
        self.tally = Tally::default();
        self.missed = None;
        self.similar = Similar::new();
        self.cold = Walk::default();
        self.compaction = Compaction::default();
        remotes
    }

    /// The live object that a handle names, its record well formed.
    pub(crate) fn resolve(&self, handle: Handle) -> Result<(RecordNumber, Record), GetError> {
        let number = handle.number();
        match self.records.read(&self.memory, number) {
            None => Err(GetError::Stale { handle }),
            Some(Err(_)) => Err(GetError::Corrupt { handle, damage: Damage::Record }),
            Some(Ok(record)) if record.handle(number) != handle => Err(GetError::Stale { handle }),
            Some(Ok(record)) => Ok((number, record)),
        }
    }

    /// The record of an object that is as it was when it was found, but for its references.
    pub(crate) fn still(&self, found: &Found) -> Option<(RecordNumber, Record)> {
        let (number, record) = self.resolve(found.handle).ok()?;
        let is_same = record == Record { count: record.count, ..found.record };
        is_same.then_some((number, record))
    }

    /// The encoded bytes of an object, or `None` where its record names no slot in use.
    pub(crate) fn data(&self, extent: Extent) -> Option<&[u8]> {
        self.memory.bytes(extent.slab).get(self.slots.range(extent)?)
    }

    /// The records that have a key.
    fn records_of(&self, key: u64) -> impl Iterator<Item = RecordNumber> {
        self.index.find(key, |number| self.records.key(&self.memory, number))
    }

    /// The objects that may be the page and take one more reference. Takes note where none has been found to be.
    fn find(&mut self, page: &PageBytes, digest: &Digest) -> Result<Likes, StoreError> {
        let wanted = match *digest {
            Digest::Zero => return Err(StoreError::ZeroPage),
            Digest::Same(word) if !digest::is_filled(page, word) => return Err(StoreError::WrongDigest),
            Digest::Same(word) => Fingerprint::of_word(word),
            Digest::Hashed(hash) => Fingerprint::of_hash(hash),
        };
        let mut packed = None;
        let equal = self.records_of(wanted.key).find_map(|number| {
            let record = self.records.read(&self.memory, number)?.ok()?;
            if record.check != wanted.check || record.count == u32::MAX {
                return None;
            }
            let equal = match (record.body, *digest) {
                // That the word fills the page was seen above.
                (Body::Same(here), Digest::Same(word)) => here == word,
                (Body::Data { codec: Codec::Dense, .. }, Digest::Hashed(_)) => {
                    packed.get_or_insert(record.handle(number));
                    false
                }
                (Body::Data { codec, extent, .. }, Digest::Hashed(_)) => {
                    let mut candidate = [0; PAGE_SIZE];
                    decode(codec, self.data(extent)?, &mut candidate, &mut NoDense).ok()?;
                    candidate == *page
                }
                _ => false,
            };
            equal.then_some((number, record))
        });
        // Of same-filled pages nothing is noted: who inserts one is asked for the page again.
        self.missed = Some(*digest).filter(|digest| equal.is_none() && matches!(digest, Digest::Hashed(_)));
        Ok(Likes { equal, packed })
    }

    /// Counts one more reference to a record that is offered only where it can be counted.
    fn add_reference(&mut self, number: RecordNumber, record: Record) -> Handle {
        let record = Record { count: record.count.saturating_add(1), ..record };
        self.records.write(&mut self.memory, number, &record);
        self.tally.references += 1;
        record.handle(number)
    }

    fn insert_data(
        &mut self,
        fingerprint: Fingerprint,
        codec: Codec,
        encoded: Encoded<'_>,
        lane: Lane,
    ) -> Result<Handle, StoreError> {
        let extent = self.place_data(encoded.bytes(), lane)?;
        let body = Body::Data { codec, extent, key: fingerprint.key };
        let handle = self.insert_body(body, fingerprint).inspect_err(|_| {
            self.slots.give_back(&mut self.memory, extent);
        })?;
        let Self { memory, records, similar, .. } = self;
        similar.note(encoded.sketch(), handle, self.tally.with_data(), |handle| {
            let number = handle.number();
            matches!(records.read(memory, number), Some(Ok(record)) if record.handle(number) == handle)
        });
        Ok(handle)
    }

    /// Puts bytes into a slot of their own, which nothing names yet.
    pub(crate) fn place_data(&mut self, bytes: &[u8], lane: Lane) -> Result<Extent, StoreError> {
        let extent = self.slots.take(&mut self.memory, bytes.len(), lane)?;
        self.fill_slot(extent, bytes).map(|()| extent)
    }

    /// Writes a slot that was taken for these bytes, or gives it back.
    pub(crate) fn fill_slot(&mut self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        let range = self.slots.range(extent);
        let range = range.filter(|range| self.memory.reserve(extent.slab, range.clone()).is_ok());
        let target = range.and_then(|range| self.memory.bytes_mut(extent.slab).get_mut(range));
        if let Some(target) = target {
            target.copy_from_slice(bytes);
            return Ok(());
        }
        // No memory for it; and a slab shorter than the contract says is as good as none.
        self.slots.give_back(&mut self.memory, extent);
        Err(StoreError::Exhausted)
    }

    fn insert_body(&mut self, body: Body, fingerprint: Fingerprint) -> Result<Handle, StoreError> {
        let number = self.records.take(&mut self.memory)?;
        self.generation = self.generation.next();
        let record = Record { body, check: fingerprint.check, count: 1, generation: self.generation };
        self.records.write(&mut self.memory, number, &record);
        self.missed = None;
        let Self { memory, records, index, .. } = self;
        index.insert(fingerprint.key, number, |number| records.key(memory, number));
        self.tally.references += 1;
        self.tally.add(&record);
        Ok(record.handle(number))
    }

    fn drop_record(&mut self, number: RecordNumber, key: Option<u64>) {
        self.index.remove(key, number);
        self.records.free(&mut self.memory, number);
    }

    fn flip(&mut self, extent: Extent, place: usize) {
        let range = self.slots.range(extent).unwrap_or(0..0);
        let bytes = self.memory.bytes_mut(extent.slab).get_mut(range);
        if let Some(byte) = bytes.and_then(|bytes| bytes.get_mut(place)) {
            *byte ^= 1;
        }
    }

    fn is_damaged(&self, handle: Handle) -> bool {
        let mut page = [0; PAGE_SIZE];
        self.get(handle, &mut page).is_err()
    }
}

impl<M> fmt::Debug for Store<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("tally", &self.tally).finish_non_exhaustive()
    }
}
