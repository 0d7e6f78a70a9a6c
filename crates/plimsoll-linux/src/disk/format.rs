//! What a segment looks like on disk.
//!
//! A segment is 1 MiB at a multiple of 1 MiB, written once and whole. Places in it are counted in granules of 64 bytes.
//! All integers are little endian.
//!
//! ```text
//! granule 0   header, in clear
//!             magic u64 | 8 version u32 | 12 segment u32 | 16 sequence u64 | 24 entries u32 | 28 directory u32 (granule)
//!             32 check u64: xxh3 of the first 32 bytes | 40 zeros
//! granule 1.. entries, each at a granule of its own
//!             tag [16] | encoded bytes of a page, encrypted | zeros to the next granule
//! directory   tag [16] | 16 bytes an entry, then zeros to the end of the block, encrypted
//!             handle u64 | 8 domain u32 | 12 granule u16 | 14 length u16
//! then        not written: whatever an earlier segment left there
//!
//! So there is no sector in what is written of which a tag, or the header's check, does not tell whether it is there.
//! ```
//!
//! The header is for people and for whoever looks whether a file is a tier's: nothing is believed of it. What is read is
//! what a record in memory names, and it is believed if its tag is right.
//!
//! # What is encrypted how
//! ChaCha20-Poly1305 (RFC 8439) under one key a tier, 256 random bits that are in memory only. The nonce of an entry and of a
//! directory is `sequence u64 | granule u32`, the associated data `domain u32 | length u32`.
//!
//! *A nonce is used once.* A sequence number is taken from a counter in memory that outlives the manager by one atomic
//! addition before anything is encrypted under it, by one writer that fills one segment with it; whoever dies in between
//! leaves a number that nobody takes again. Counter and key are made, kept and lost together. At a segment a nanosecond the
//! counter lasts 584 years. Within a segment every entry and the directory have granules of their own, because what is added
//! starts behind what was there. A segment that was not written is written elsewhere with the same bytes, which reveals
//! nothing that the first attempt did not.
//!
//! *A place is read as itself only.* An entry of an earlier segment in the same place has another sequence number, one of
//! another place another granule or sequence, one of another domain other associated data: its tag is wrong.
use super::device::BLOCK_SIZE;
use plimsoll_store::{AWAY_BITS, Away};
use plimsoll_types::PAGE_SIZE;
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in a segment. A disk that seeks in 8 ms and writes 200 MB a second spends 40 % of its time writing, an SSD all of it;
/// and a draft of one is a megabyte of memory.
pub const SEGMENT_SIZE: usize = 1 << 20;
/// What places are counted in: half of it, 32 bytes, is lost an entry on average.
pub(super) const GRANULE: usize = 64;
const GRANULE_BITS: u32 = 14;
const SEGMENT_BITS: u32 = AWAY_BITS - GRANULE_BITS;
/// Segments that a record can name: 2 TiB of them.
pub const SEGMENTS_MAX: u32 = 1 << SEGMENT_BITS;
/// Bytes of an authentication tag.
pub(super) const TAG_SIZE: usize = 16;
/// The version of the layout. In 1 the directory ended with its last entry.
const VERSION: u32 = 2;
const MAGIC: u64 = u64::from_le_bytes(*b"PLIMSEGM");

const _: () = assert!(SEGMENT_SIZE == GRANULE << GRANULE_BITS);
const _: () = assert!(SEGMENT_SIZE.is_multiple_of(BLOCK_SIZE) && BLOCK_SIZE.is_multiple_of(GRANULE));
const _: () = assert!(PAGE_SIZE + TAG_SIZE < SEGMENT_SIZE / 4);

/// Where an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    pub(super) segment: u32,
    pub(super) granule: u16,
}

impl Place {
    /// As a record keeps it.
    pub(super) fn to_away(self) -> Option<Away> {
        Away::new(u64::from(self.segment) << GRANULE_BITS | u64::from(self.granule))
    }

    /// The place that a record names.
    pub(super) fn of(away: Away) -> Self {
        let granule = away.bits() & ((1 << GRANULE_BITS) - 1);
        // Away has no bits above those of a segment and a granule.
        let segment = u32::try_from(away.bits() >> GRANULE_BITS).unwrap_or(u32::MAX);
        Self { segment, granule: u16::try_from(granule).unwrap_or(u16::MAX) }
    }

    /// Where in its segment its bytes are.
    pub(super) fn offset(self) -> usize {
        usize::from(self.granule) * GRANULE
    }
}

/// Where on the disk a segment is.
pub(super) fn offset_of(segment: u32) -> u64 {
    u64::from(segment) * SEGMENT_SIZE as u64
}

/// What an entry of so many encoded bytes takes of a segment, its part of the directory included.
pub(super) const fn room_of(length: usize) -> usize {
    sealed_size(length) + size_of::<Entry>()
}

/// What so many bytes take in their place.
pub(super) const fn sealed_size(length: usize) -> usize {
    (TAG_SIZE + length).next_multiple_of(GRANULE)
}

/// Where a directory of so many entries ends that begins there: with a block.
pub(super) const fn directory_end(start: usize, entries: usize) -> usize {
    (start + sealed_size(entries * size_of::<Entry>())).next_multiple_of(BLOCK_SIZE)
}

/// What entries can take of a segment.
pub(super) const ROOM: usize = SEGMENT_SIZE - GRANULE - sealed_size(0);

/// A line of a segment's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Entry {
    /// Of the object.
    pub(super) handle: u64,
    /// Of whose store.
    pub(super) domain: u32,
    pub(super) granule: u16,
    /// Encoded bytes.
    pub(super) length: u16,
}
const _: () = assert!(size_of::<Entry>() == 16);

/// The first bytes of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    magic: u64,
    version: u32,
    segment: u32,
    sequence: u64,
    pub(super) entries: u32,
    pub(super) directory: u32,
    check: u64,
}
const _: () = assert!(size_of::<Header>() == 40 && size_of::<Header>() <= GRANULE);
const CHECKED: usize = 32;

impl Header {
    pub(super) fn new(segment: u32, sequence: u64, entries: u32, directory: u32) -> Self {
        let header = Self { magic: MAGIC, version: VERSION, segment, sequence, entries, directory, check: 0 };
        Self { check: xxh3_64(&header.as_bytes()[..CHECKED]), ..header }
    }

    /// Puts it where it belongs in a segment.
    pub(super) fn write(&self, segment: &mut [u8]) {
        if let Some(room) = segment.get_mut(..size_of::<Self>()) {
            room.copy_from_slice(self.as_bytes());
        }
    }

    /// The header of a segment with that number and sequence; `None` where the bytes are not its.
    pub(super) fn read(bytes: &[u8], segment: u32, sequence: u64) -> Option<Self> {
        let (header, _) = Self::read_from_prefix(bytes).ok()?;
        (header == Self::new(segment, sequence, header.entries, header.directory)).then_some(header)
    }
}

/// True when what a file begins with is nothing, or a segment of any version.
pub(super) fn may_be_overwritten(start: &[u8]) -> bool {
    start.starts_with(&MAGIC.to_le_bytes()) || start.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_survives_its_record() {
        for (segment, granule) in [(0, 1), (1, 0), (SEGMENTS_MAX - 1, (1 << GRANULE_BITS) - 1)] {
            let place = Place { segment, granule };
            assert_eq!(place.to_away().map(Place::of), Some(place));
        }
        assert_eq!(Place { segment: SEGMENTS_MAX, granule: 0 }.to_away(), None);
    }

    #[test]
    fn a_header_is_that_of_one_segment_and_one_sequence_and_no_bit_of_it_may_change() {
        let header = Header::new(7, 9, 3, 100);
        let mut bytes = [0; GRANULE];
        header.write(&mut bytes);
        assert_eq!(Header::read(&bytes, 7, 9), Some(header));
        assert_eq!(Header::read(&bytes, 8, 9), None);
        assert_eq!(Header::read(&bytes, 7, 8), None);
        for bit in 0..8 * size_of::<Header>() {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::read(&damaged, 7, 9), None, "bit {bit}");
        }
    }
}
