//! A segment that was read whole, to be cleaned.
//!
//! Enters: where a segment is. Leaves: what its directory says is in it, and the bytes of each of these, proven to be what was
//! written. Which of them somebody still needs, the stores know.
use super::device::{BLOCK_SIZE, Blocks, Disk, read_blocks};
use super::draft::DIRECTORY_OWNER;
use super::format::{Entry, GRANULE, Header, Place, SEGMENT_SIZE, TAG_SIZE, directory_end, offset_of};
use super::seal::Seat;
use super::tier::{ReadError, Tier};
use plimsoll_store::{Away, Handle};
use plimsoll_types::DomainId;
use zerocopy::{FromZeros, IntoBytes};

/// See the file's head.
pub struct Image {
    pub(super) segment: u32,
    pub(super) sequence: u64,
    blocks: Blocks,
    entries: Vec<Entry>,
}

/// What a directory says of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// Whose object it was.
    pub domain: DomainId,
    /// Which.
    pub handle: Handle,
    /// Where it is.
    pub at: Away,
    /// Encoded bytes.
    pub length: usize,
}

impl Image {
    pub(super) fn read(disk: &dyn Disk, tier: &Tier, segment: u32, sequence: u64) -> Result<Self, ReadError> {
        let offset = offset_of(segment);
        let mut blocks = Blocks::new(SEGMENT_SIZE / BLOCK_SIZE);
        let read = |blocks: &mut Blocks, needed| read_blocks(disk, offset, blocks.bytes_mut(), needed);
        let failed = |source| ReadError::Failed { offset, source };
        let damaged = ReadError::Damaged { offset };
        // The last segment may end where the file does.
        let here = read(&mut blocks, GRANULE).map_err(failed)?;
        let header = Header::read(blocks.bytes(), segment, sequence).ok_or(damaged)?;
        let start = header.directory as usize * GRANULE;
        let named = (header.entries as usize).min(SEGMENT_SIZE / GRANULE);
        let end = directory_end(start, named).min(SEGMENT_SIZE);
        if here < end {
            read(&mut blocks, end).map_err(failed)?;
        }
        let room = end.saturating_sub(start + TAG_SIZE) / size_of::<Entry>();
        let mut entries = vec![Entry::new_zeroed(); room];
        let granule = u16::try_from(header.directory).unwrap_or(u16::MAX);
        let seat = Seat { sequence, granule, domain: DIRECTORY_OWNER };
        let sealed = blocks.bytes().get(start..).unwrap_or_default();
        tier.open(seat, sealed, entries.as_mut_bytes()).ok_or(ReadError::Damaged { offset })?;
        entries.truncate(named);
        Ok(Self { segment, sequence, blocks, entries })
    }

    /// Everything that was written into the segment.
    pub fn lines(&self) -> impl Iterator<Item = Line> + '_ {
        self.entries.iter().filter_map(|entry| {
            Some(Line {
                domain: DomainId(entry.domain),
                handle: Handle::from_bits(entry.handle)?,
                at: Place { segment: self.segment, granule: entry.granule }.to_away()?,
                length: usize::from(entry.length),
            })
        })
    }

    /// True when every sector that was written is there: each has a part of something that is looked at here, or was before.
    pub(super) fn is_whole(&self, tier: &Tier) -> bool {
        self.lines().all(|line| self.bytes(tier, &line, &mut vec![0; line.length]).is_ok())
    }

    /// The encoded bytes of one of them, as many as `into` has.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] where they are not what was written; the segment is then left alone, see [`Tier::image`].
    pub fn bytes(&self, tier: &Tier, line: &Line, into: &mut [u8]) -> Result<(), ReadError> {
        let place = Place::of(line.at);
        let offset = offset_of(self.segment) + place.offset() as u64;
        let sealed = self.blocks.bytes().get(place.offset()..).unwrap_or_default();
        let sealed = sealed.get(..TAG_SIZE + into.len()).unwrap_or_default();
        let seat = Seat { sequence: self.sequence, granule: place.granule, domain: line.domain.0 };
        let opened = tier.open(seat, sealed, into);
        opened.ok_or(ReadError::Damaged { offset }).inspect_err(|_| tier.set_stuck(self.segment))
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("segment", &self.segment).finish_non_exhaustive()
    }
}
