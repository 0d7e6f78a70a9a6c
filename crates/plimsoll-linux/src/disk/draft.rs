//! A segment that is being filled.
//!
//! Enters: encoded pages, one after the other. Leaves: a segment as it is to be written, everything in it encrypted the moment
//! it was put there. What must never happen: a byte of a guest in clear in memory that is about to be written.
use super::device::{BLOCK_SIZE, Blocks};
use super::format::{
    Entry, GRANULE, Header, ROOM, SEGMENT_SIZE, TAG_SIZE, directory_end, room_of, sealed_size,
};
use super::seal::{Key, Seat};
use plimsoll_store::Handle;
use plimsoll_types::DomainId;
use std::collections::BTreeMap;
use zerocopy::IntoBytes;

/// See the file's head.
pub struct Draft {
    pub(super) sequence: u64,
    blocks: Blocks,
    entries: Vec<Entry>,
    /// Where the next entry begins.
    used: usize,
    /// What entries take, by whose they are.
    owned: BTreeMap<DomainId, u64>,
}

/// A segment that is complete.
pub(super) struct Closed {
    pub(super) draft: Draft,
    directory: u16,
}

impl Draft {
    pub(super) fn new(sequence: u64) -> Self {
        let blocks = Blocks::new(SEGMENT_SIZE / BLOCK_SIZE);
        Self { sequence, blocks, entries: Vec::new(), used: GRANULE, owned: BTreeMap::new() }
    }

    /// True when nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// True when so many encoded bytes more fit into it.
    pub(super) fn has_room(&self, length: usize) -> bool {
        let lines = self.entries.len() * size_of::<Entry>();
        self.used - GRANULE + lines + room_of(length) <= ROOM
    }

    /// What it has of a domain, and of all.
    pub(super) fn owned(&self, domain: DomainId) -> u64 {
        self.owned.get(&domain).copied().unwrap_or(0)
    }

    pub(super) fn owners(&self) -> impl Iterator<Item = (DomainId, u64)> + '_ {
        self.owned.iter().map(|(domain, room)| (*domain, *room))
    }

    /// Encrypts an object's encoded bytes into it, and says at which granule; `None` where it has no room for them.
    pub(super) fn add(&mut self, key: &Key, domain: DomainId, handle: Handle, bytes: &[u8]) -> Option<u16> {
        if !self.has_room(bytes.len()) {
            return None;
        }
        let granule = u16::try_from(self.used / GRANULE).ok()?;
        let length = u16::try_from(bytes.len()).ok()?;
        self.seal(key, domain.0, granule, bytes)?;
        self.entries.push(Entry { handle: handle.to_bits(), domain: domain.0, granule, length });
        *self.owned.entry(domain).or_default() += room_of(bytes.len()) as u64;
        Some(granule)
    }

    /// Nothing more comes into it: its directory takes the place, and with it the nonce, that the next entry would have had.
    pub(super) fn close(mut self, key: &Key) -> Option<Closed> {
        let directory = u16::try_from(self.used / GRANULE).ok()?;
        let end = directory_end(self.used, self.entries.len());
        let mut lines = self.entries.as_bytes().to_vec();
        lines.resize(end - self.used - TAG_SIZE, 0);
        self.seal(key, DIRECTORY_OWNER, directory, &lines)?;
        Some(Closed { draft: self, directory })
    }

    /// Puts bytes where the next entry begins, encrypted.
    fn seal(&mut self, key: &Key, domain: u32, granule: u16, bytes: &[u8]) -> Option<()> {
        let end = self.used + sealed_size(bytes.len());
        let room = self.blocks.bytes_mut().get_mut(self.used..end)?;
        let (tag, rest) = room.split_at_mut(TAG_SIZE);
        let (sealed, padding) = rest.split_at_mut(bytes.len());
        sealed.copy_from_slice(bytes);
        let Some(proof) = key.seal(Seat { sequence: self.sequence, granule, domain }, sealed) else {
            sealed.fill(0);
            return None;
        };
        tag.copy_from_slice(&proof);
        padding.fill(0);
        self.used = end;
        Some(())
    }
}

/// Whose directories are: no object's, and nobody confuses one with an entry, whose granule is another.
pub(super) const DIRECTORY_OWNER: u32 = u32::MAX;

impl Closed {
    /// The segment, as it is to be written there: whole blocks. For another place only the header is another.
    pub(super) fn at(&mut self, segment: u32) -> &[u8] {
        let Self { draft, directory } = self;
        let entries = u32::try_from(draft.entries.len()).unwrap_or(u32::MAX);
        Header::new(segment, draft.sequence, entries, (*directory).into()).write(draft.blocks.bytes_mut());
        draft.blocks.bytes().get(..draft.used).unwrap_or(&[])
    }
}

impl std::fmt::Debug for Draft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Draft").field("entries", &self.entries.len()).finish_non_exhaustive()
    }
}
