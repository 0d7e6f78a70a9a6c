//! Reading the tier: what a place has is what was written there, or an error says why not.
//!
//! Enters: what a record names. Leaves: its bytes, decrypted and proven, or what is to be read of the disk first. What must never
//! happen: bytes believed of which the tag is wrong.
use super::device::{Blocks, Disk, read_blocks};
use super::fetch::Progress;
use super::format::{Place, SEGMENT_SIZE, TAG_SIZE, offset_of};
use super::reader::{Came, Desk, Reader, Reading, Wanted};
use super::seal::Seat;
use super::table::Holds;
use super::tier::{ReadError, Tier};
use super::window::{Seen, Window};
use parking_lot::Mutex;
use plimsoll_store::Remote;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::ring::ReadRing;
use plimsoll_types::DomainId;
use std::io;
use std::sync::Arc;

/// Who reads the disk for pagers, once somebody wants to.
#[derive(Debug, Default)]
pub(super) struct Reads(Mutex<Option<Reader>>);

impl Reads {
    fn with<T>(
        &self,
        disk: &Arc<dyn Disk>,
        ring: Option<ReadRing>,
        then: impl FnOnce(&Reader) -> T,
    ) -> io::Result<T> {
        let mut reader = self.0.lock();
        if reader.is_none() {
            *reader = Some(Reader::start(Arc::clone(disk), ring)?);
        }
        Ok(then(reader.as_ref().ok_or(io::ErrorKind::Other)?))
    }
}

impl Tier {
    /// Starts who reads the disk for pagers, and says how. A ring that was made before is used where it can be.
    ///
    /// # Errors
    /// [`io::Error`] when there is no thread to be had.
    pub fn start_reading(&self, ring: Option<ReadRing>) -> io::Result<Reading> {
        self.reads.with(&self.disk, ring, Reader::reading)
    }

    /// How the disk is read for pagers, once it is.
    pub fn reading(&self) -> Option<Reading> {
        self.reads.0.lock().as_ref().map(Reader::reading)
    }

    /// Where a pager has the disk read, and is kicked when something has come.
    ///
    /// # Errors
    /// [`io::Error`] when there is no thread to be had.
    pub fn desk(&self, kick: Arc<EventFd>) -> io::Result<Desk> {
        self.reads.with(&self.disk, None, |reader| reader.desk(kick))
    }

    /// Makes a read here and now.
    pub(super) fn read_now(&self, wanted: Wanted) -> Came {
        let mut blocks = Blocks::new(wanted.blocks);
        let bytes = read_blocks(&*self.disk, wanted.offset, blocks.bytes_mut(), wanted.needed)?;
        Ok((blocks, bytes))
    }

    /// Which writing of its segment the place is in.
    pub fn writing(&self, remote: Remote) -> Option<u64> {
        match self.table.holds(Place::of(remote.at).segment) {
            Holds::Sequence(sequence) => Some(sequence),
            Holds::Nothing | Holds::Writing(_) | Holds::Spoilt => None,
        }
    }

    /// An object's encoded bytes, `into` as many as the record says, proven to be what was written in that
    /// [writing](Self::writing) of the segment; or what is to be read first. What the window has from before its read `since` may
    /// be older than the segment.
    ///
    /// # Errors
    /// [`ReadError`]; `into` is then arbitrary. Where the record names another place by now, that one is to be read.
    pub(super) fn look(
        &self,
        domain: DomainId,
        remote: Remote,
        writing: Option<u64>,
        since: u64,
        into: &mut [u8],
        window: &mut Window,
    ) -> Result<Progress, ReadError> {
        let place = Place::of(remote.at);
        let Some(sequence) = writing else { return Err(ReadError::Nothing) };
        let range = place.offset()..place.offset() + TAG_SIZE + into.len();
        if range.end > SEGMENT_SIZE || into.len() != remote.length {
            return Err(ReadError::Nothing);
        }
        let seat = Seat { sequence, granule: place.granule, domain: domain.0 };
        let offset = offset_of(place.segment) + place.offset() as u64;
        loop {
            let seen = window.bytes(place.segment, sequence, range.clone());
            let (bytes, ticket) = match seen.map_err(|source| ReadError::Failed { offset, source })? {
                Seen::Here(bytes, ticket) => (bytes, ticket),
                Seen::UnderWay(ticket) => return Ok(Progress::Waits(ticket)),
                Seen::Wanted(wanted) => return Ok(Progress::Wants(wanted)),
            };
            if self.open(seat, bytes, into).is_some() {
                let mut state = self.state.lock();
                state.stats.reads += std::mem::take(&mut window.reads);
                state.stats.pages_read += 1;
                return Ok(Progress::Here);
            }
            window.forget();
            if ticket >= since {
                return Err(ReadError::Damaged { offset });
            }
        }
    }

    /// The same at once, however long the disk takes.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read(
        &self,
        domain: DomainId,
        remote: Remote,
        writing: Option<u64>,
        into: &mut [u8],
        window: &mut Window,
    ) -> Result<(), ReadError> {
        let since = window.next;
        loop {
            match self.look(domain, remote, writing, since, into, window)? {
                Progress::Here => return Ok(()),
                // Of another's window.
                Progress::Waits(_) => return Err(ReadError::Nothing),
                Progress::Wants(wanted) => {
                    let came = window.came(wanted.ticket, self.read_now(wanted));
                    came.map_err(|source| ReadError::Failed { offset: wanted.offset, source })?;
                }
            }
        }
    }

    /// Decrypts what a place holds.
    pub(super) fn open(&self, seat: Seat, bytes: &[u8], into: &mut [u8]) -> Option<()> {
        let (tag, sealed) = bytes.split_first_chunk::<TAG_SIZE>()?;
        into.copy_from_slice(sealed.get(..into.len())?);
        self.table.with_key(|key| key.open(seat, tag, into).ok())?
    }
}
