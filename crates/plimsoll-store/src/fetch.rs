//! Reading in two steps: bytes are copied out under the store's lock, and decoded and checked outside of it.
//!
//! A handle enters, a page leaves. Under the lock only the record is resolved and its encoded bytes, at most 4 KiB, are
//! copied; what became of the object afterwards does not matter to who has the copy. Of an object that lies away the caller
//! brings the bytes, which nobody vouches for. What must never happen: a page leaves that was not checked.
use crate::{
    codec::decode,
    dense::DenseCodec,
    digest::{self, Fingerprint},
    error::{Damage, GetError},
    memory::SlabMemory,
    record::{Body, Handle, Record, Remote},
    store::Store,
};
use alloc::boxed::Box;
use core::fmt;
use plimsoll_types::{PAGE_SIZE, PageBytes};

/// An object's encoded bytes outside of the store. Made once and filled again and again.
pub struct Fetched {
    found: Option<Found>,
    bytes: Box<PageBytes>,
}

/// An object as it was when it was fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) handle: Handle,
    pub(crate) record: Record,
}

/// Where a fetched object's encoded bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// In the [`Fetched`].
    Here,
    /// Outside of the store: whoever keeps them is to put them into [`Fetched::room`].
    Away(Remote),
}

/// An object as it was when it was fetched, to be sent away: see [`Store::send_away`](Store::send_away).
#[derive(Clone, Copy, Debug)]
pub struct Ticket(pub(crate) Found);

/// An object whose page was compared byte by byte with the one to be stored: see
/// [`Store::share_confirmed`](Store::share_confirmed).
#[derive(Clone, Copy, Debug)]
pub struct Confirmed(pub(crate) Found);

impl Fetched {
    /// With nothing in it.
    pub fn new() -> Self {
        Self { found: None, bytes: Box::new([0; PAGE_SIZE]) }
    }

    /// The object that was fetched last; `None` where that failed.
    pub fn handle(&self) -> Option<Handle> {
        self.found.map(|found| found.handle)
    }

    /// Where the encoded bytes of an object that lies away belong; as long as they are.
    pub fn room(&mut self) -> &mut [u8] {
        let length = self.length();
        self.bytes.get_mut(..length).unwrap_or(&mut [])
    }

    /// Takes the bytes of an object that was fetched earlier, if it is the same one; false, and nothing changes, if not.
    pub fn adopt(&mut self, earlier: &Self) -> bool {
        let identity = |fetched: &Self| {
            let Found { handle, record } = fetched.found?;
            Some((handle, record.key(), record.check, record.codec()))
        };
        let is_same = identity(self).is_some() && identity(self) == identity(earlier);
        if is_same && self.length() == earlier.length() {
            self.bytes.copy_from_slice(&*earlier.bytes);
            return true;
        }
        false
    }

    /// What [`Store::send_away`](Store::send_away) has to know of the object that was fetched last, and how many references
    /// it had; `None` where it has no data that could lie elsewhere.
    pub fn ticket(&self) -> Option<(Ticket, u32)> {
        let found = self.found?;
        (self.length() > 0).then_some((Ticket(found), found.record.count))
    }

    /// Decodes the page and checks it, with the codec of the objects that are packed densely ([`NoDense`] where there
    /// are none). Where this fails, `page` holds arbitrary bytes of this domain.
    ///
    /// # Errors
    /// [`GetError::Corrupt`] where the page is not the one that was stored, [`GetError::Nothing`] where nothing was
    /// fetched.
    ///
    /// [`NoDense`]: crate::NoDense
    pub fn unpack(&self, page: &mut PageBytes, dense: &mut dyn DenseCodec) -> Result<(), GetError> {
        self.found.ok_or(GetError::Nothing)?.unpack(self.bytes(), page, dense)
    }

    /// Proof that the object is this very page; `None` where it is not, or cannot be read. Compares bytes, and hashes
    /// nothing. `scratch` is overwritten.
    pub fn confirm(
        &self,
        page: &PageBytes,
        scratch: &mut PageBytes,
        dense: &mut dyn DenseCodec,
    ) -> Option<Confirmed> {
        let found = self.found?;
        decode(found.record.codec(), self.bytes(), scratch, dense).ok()?;
        (scratch == page).then_some(Confirmed(found))
    }

    pub(crate) const fn found(&self) -> Option<Found> {
        self.found
    }

    /// The encoded bytes; none of a page that is one word repeated.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length()).unwrap_or(&[])
    }

    fn length(&self) -> usize {
        self.found.map_or(0, |found| found.record.length())
    }

    /// Takes a copy of what was found.
    pub(crate) fn fill(&mut self, found: Found, bytes: &[u8]) {
        // Extents are at most a page long.
        self.found = self.bytes.get_mut(..bytes.len()).map(|target| {
            target.copy_from_slice(bytes);
            found
        });
    }
}

impl Default for Fetched {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetched").field("found", &self.found).finish_non_exhaustive()
    }
}

impl Found {
    const fn whereabouts(&self) -> Whereabouts {
        match self.record.body {
            Body::Away { remote, .. } => Whereabouts::Away(remote),
            Body::Same(_) | Body::Data { .. } => Whereabouts::Here,
        }
    }

    /// Decodes and checks.
    pub(crate) fn unpack(
        &self,
        bytes: &[u8],
        page: &mut PageBytes,
        dense: &mut dyn DenseCodec,
    ) -> Result<(), GetError> {
        let corrupt = |damage| GetError::Corrupt { handle: self.handle, damage };
        let (found, expected) = match self.record.body {
            Body::Same(word) => {
                digest::fill(page, word);
                let found = Fingerprint::of_word(word);
                (found, Fingerprint { check: self.record.check, ..found })
            }
            Body::Data { codec, key, .. } | Body::Away { codec, key, .. } => {
                decode(codec, bytes, page, dense).map_err(|_| corrupt(Damage::Encoding))?;
                (Fingerprint::of_page(page), Fingerprint { key, check: self.record.check })
            }
        };
        if found == expected { Ok(()) } else { Err(corrupt(Damage::Checksum)) }
    }
}

impl<M: SlabMemory> Store<M> {
    /// Copies an object out of the store, to be decoded and checked by [`Fetched::unpack`] without it. Of one that lies away
    /// the bytes are missing: fill [`Fetched::room`] first.
    ///
    /// # Errors
    /// [`GetError::Stale`] where the handle names no object, [`GetError::Corrupt`] where its record makes no sense;
    /// `into` is then empty.
    pub fn fetch(&self, handle: Handle, into: &mut Fetched) -> Result<Whereabouts, GetError> {
        into.found = None;
        let found = self.found(handle)?;
        let whereabouts = found.whereabouts();
        match whereabouts {
            Whereabouts::Here => into.fill(found, self.bytes(&found)?),
            Whereabouts::Away(_) => into.found = Some(found),
        }
        Ok(whereabouts)
    }

    /// Where an object's encoded bytes are. Copies nothing.
    ///
    /// # Errors
    /// [`GetError::Stale`], [`GetError::Corrupt`]: as for [`fetch`](Self::fetch).
    pub fn whereabouts(&self, handle: Handle) -> Result<Whereabouts, GetError> {
        self.found(handle).map(|found| found.whereabouts())
    }

    /// Reads a page and checks it: [`fetch`](Self::fetch) and [`unpack`](Fetched::unpack) in one, without the copy.
    /// Where this fails, `page` holds arbitrary bytes of this domain.
    ///
    /// # Errors
    /// [`GetError::Stale`] where the handle names no object, [`GetError::Corrupt`] where the page is not the one
    /// that was stored, [`GetError::Away`] where its bytes are not here.
    pub fn get_with(
        &self,
        handle: Handle,
        page: &mut PageBytes,
        dense: &mut dyn DenseCodec,
    ) -> Result<(), GetError> {
        let found = self.found(handle)?;
        found.unpack(self.bytes(&found)?, page, dense)
    }

    /// [`get_with`](Self::get_with) no dense codec: for stores in which nothing is packed densely.
    ///
    /// # Errors
    /// As there; an object that is packed densely is corrupt to this.
    pub fn get(&self, handle: Handle, page: &mut PageBytes) -> Result<(), GetError> {
        self.get_with(handle, page, &mut crate::NoDense)
    }

    fn found(&self, handle: Handle) -> Result<Found, GetError> {
        self.resolve(handle).map(|(_, record)| Found { handle, record })
    }

    /// The encoded bytes of an object, of which a same-filled one has none.
    fn bytes(&self, found: &Found) -> Result<&[u8], GetError> {
        let handle = found.handle;
        match found.record.body {
            Body::Same(_) => Ok(&[]),
            Body::Away { .. } => Err(GetError::Away { handle }),
            Body::Data { extent, .. } => {
                self.data(extent).ok_or(GetError::Corrupt { handle, damage: Damage::Record })
            }
        }
    }
}
