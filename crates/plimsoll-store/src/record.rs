//! The record of an object, and the handle that names it.
//!
//! A record is 24 bytes of slab memory, little endian:
//!
//! ```text
//!  byte 0        8       12       16                      24
//!       +--------+--------+--------+-----------------------+
//!       |identity| check  | count  |         place         |
//!       +--------+--------+--------+-----------------------+
//!        64 bits  32 bits  32 bits          64 bits
//!
//!  identity  bits 0 to 63 of the page's xxh3-128; of a same-filled page the word itself
//!  check     bits 64 to 95 of the page's xxh3-128; of a same-filled page those of its word's
//!  count     references; 0 in a free record, whose other bytes are then 0 too
//!
//!  place, from bit 0 up:
//!       0         25     26        36           48     50               64
//!       +---------+------+---------+------------+------+----------------+
//!       |  slab   | away |  slot   | length - 1 |codec |   generation   |
//!       +---------+------+---------+------------+------+----------------+
//!         25 bits  1 bit   10 bits    12 bits    2 bits     14 bits
//!
//!  slab, slot, length   where the data is; all 0 in a same-filled page's record
//!  away                 1 where the data is outside of slab memory: slab and slot are then the 25 low and 10 high bits of
//!                       an [`Away`]
//!  codec                0 dense, 1 same-filled, 2 lz4, 3 raw
//!  generation           of the insertion that made the record
//! ```
//!
//! An object whose data moves, to be packed densely, to empty a slab, or out of memory, keeps its record and all of it but
//! the place.
//! That is one aligned word, written by one store after the data is in its new slot and before the old one is free:
//! whenever the manager dies, the record names one slot that holds the whole page. Records themselves, which handles
//! name by number, never move.
//!
//! A page word keeps a handle, of 60 bits: it names the record by number, and repeats enough of it to notice
//! that the record is now another object's:
//!
//! ```text
//!       0                      32               46              60
//!       +----------------------+----------------+---------------+
//!       |    record number     |   generation   | check, 14 low |
//!       +----------------------+----------------+---------------+
//! ```
//!
//! Generations count insertions into the store, modulo 2^14, so they survive the release of a record slab. A
//! stale handle is taken for good only where its record was reused a multiple of 16,384 insertions later *and*
//! for a page that agrees in 14 bits of hash.
use crate::{
    codec::Codec,
    digest::Fingerprint,
    memory::{SLAB_BYTES, SlabId},
};
use core::fmt;
use plimsoll_types::PAGE_SIZE;

/// Bytes in a record.
pub(crate) const RECORD_SIZE: usize = RECORD_BYTES as usize;
const RECORD_BYTES: u32 = 24;
/// Where in a record its place is: a multiple of 8, as records and slabs are, so that one store writes it.
pub(crate) const PLACE_OFFSET: usize = 16;
/// Records in a record slab.
pub(crate) const RECORDS_PER_SLAB: u32 = SLAB_BYTES / RECORD_BYTES;
/// Bits of a [`Handle`].
pub const HANDLE_BITS: u32 = RECORD_BITS + GENERATION_BITS + TAIL_BITS;

/// Bits of an [`Away`].
pub const AWAY_BITS: u32 = SlabId::BITS + SLOT_BITS;

const RECORD_BITS: u32 = 32;
const SLOT_BITS: u32 = 10;
const LENGTH_BITS: u32 = 12;
const CODEC_BITS: u32 = 2;
const GENERATION_BITS: u32 = 14;
const TAIL_BITS: u32 = 14;

const AWAY_SHIFT: u32 = SlabId::BITS;
const SLOT_SHIFT: u32 = AWAY_SHIFT + 1;
const LENGTH_SHIFT: u32 = SLOT_SHIFT + SLOT_BITS;
const CODEC_SHIFT: u32 = LENGTH_SHIFT + LENGTH_BITS;
const GENERATION_SHIFT: u32 = CODEC_SHIFT + CODEC_BITS;

const _: () = assert!(HANDLE_BITS == 60);
const _: () = assert!(GENERATION_SHIFT + GENERATION_BITS == 64);
const _: () = assert!(crate::class::SLOTS_MAX == 1 << SLOT_BITS);
const _: () = assert!(PAGE_SIZE == 1 << LENGTH_BITS);
const _: () = assert!(RECORDS_PER_SLAB == 2730);

/// Names an object in one store: a record, and what distinguishes its present object from earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(u64);

/// Bits `shift` to `shift + width - 1` of `word`.
const fn field(word: u64, shift: u32, width: u32) -> u64 {
    word >> shift & ((1 << width) - 1)
}

/// A field of at most 32 bits as a number of 32.
fn narrow(field: u64) -> u32 {
    debug_assert!(u32::try_from(field).is_ok(), "fields are narrower than 33 bits");
    u32::try_from(field).unwrap_or(u32::MAX)
}

impl Handle {
    fn new(number: RecordNumber, generation: Generation, check: u32) -> Self {
        let generation = u64::from(generation.0) << RECORD_BITS;
        let tail = field(u64::from(check), 0, TAIL_BITS) << (RECORD_BITS + GENERATION_BITS);
        Self(tail | generation | u64::from(number.0))
    }

    /// The handle as a page word keeps it: below 2^60.
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// The handle that a page word kept; `None` where the bits are more than a handle has. Any other bits are
    /// a handle, if a stale one.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        if bits >> HANDLE_BITS == 0 { Some(Self(bits)) } else { None }
    }

    pub(crate) fn number(self) -> RecordNumber {
        RecordNumber(narrow(field(self.0, 0, RECORD_BITS)))
    }

    pub(crate) fn generation(self) -> Generation {
        Generation::wrap(narrow(field(self.0, RECORD_BITS, GENERATION_BITS)))
    }
}

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "object {} (handle {:#x})", self.number().0, self.0)
    }
}

/// The number of a record in its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RecordNumber(pub(crate) u32);

/// Counts insertions, modulo 2^14.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Generation(u16);

impl Generation {
    fn wrap(count: u32) -> Self {
        let low = count & ((1 << GENERATION_BITS) - 1);
        Self(u16::try_from(low).unwrap_or(0))
    }

    pub(crate) fn next(self) -> Self {
        Self::wrap(u32::from(self.0) + 1)
    }
}

/// A slot of a data slab and how much of it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) slab: SlabId,
    pub(crate) slot: u32,
    /// 1 to 4,096.
    pub(crate) length: usize,
}

/// Where encoded bytes lie outside of slab memory. What the bits mean is known to whoever keeps the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Away(u64);

impl Away {
    /// `None` for more bits than a record has room for.
    pub const fn new(bits: u64) -> Option<Self> {
        if bits >> AWAY_BITS == 0 { Some(Self(bits)) } else { None }
    }

    /// The bits given to [`new`](Self::new).
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// Encoded bytes outside of slab memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Remote {
    /// Where they are.
    pub at: Away,
    /// How many: 1 to 4,096.
    pub length: usize,
}

/// What an object's page is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// The word that fills it.
    Same(u64),
    /// Encoded bytes; never with [`Codec::Same`].
    Data {
        codec: Codec,
        extent: Extent,
        /// Bits 0 to 63 of the page's hash.
        key: u64,
    },
    /// The same outside of slab memory.
    Away { codec: Codec, remote: Remote, key: u64 },
}

/// A record that is in use. Holding one does not prove that its place exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) body: Body,
    pub(crate) check: u32,
    /// References; never 0.
    pub(crate) count: u32,
    pub(crate) generation: Generation,
}

/// Bytes that are not a record in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotARecord;

impl Record {
    pub(crate) fn handle(&self, number: RecordNumber) -> Handle {
        Handle::new(number, self.generation, self.check)
    }

    /// The key under which the index has the object.
    pub(crate) fn key(&self) -> u64 {
        match self.body {
            Body::Same(word) => Fingerprint::of_word(word).key,
            Body::Data { key, .. } | Body::Away { key, .. } => key,
        }
    }

    pub(crate) const fn codec(&self) -> Codec {
        match self.body {
            Body::Same(_) => Codec::Same,
            Body::Data { codec, .. } | Body::Away { codec, .. } => codec,
        }
    }

    /// How many encoded bytes there are, wherever they are; none of a page that is one word repeated.
    pub(crate) const fn length(&self) -> usize {
        match self.body {
            Body::Same(_) => 0,
            Body::Data { extent, .. } => extent.length,
            Body::Away { remote, .. } => remote.length,
        }
    }

    /// The word that says where the data is and how it is kept.
    pub(crate) fn place(&self) -> u64 {
        let place = match self.body {
            Body::Same(_) => 0,
            Body::Data { extent, .. } => u64::from(extent.slab.0) | u64::from(extent.slot) << SLOT_SHIFT,
            Body::Away { remote: Remote { at, .. }, .. } => {
                let high = field(at.0, SlabId::BITS, SLOT_BITS) << SLOT_SHIFT;
                field(at.0, 0, SlabId::BITS) | 1 << AWAY_SHIFT | high
            }
        };
        let place = place | (self.length().saturating_sub(1) as u64) << LENGTH_SHIFT;
        place | self.codec().to_bits() << CODEC_SHIFT | u64::from(self.generation.0) << GENERATION_SHIFT
    }

    pub(crate) fn to_bytes(self) -> [u8; RECORD_SIZE] {
        let identity = match self.body {
            Body::Same(word) => word,
            Body::Data { key, .. } | Body::Away { key, .. } => key,
        };
        let mut bytes = [0; RECORD_SIZE];
        bytes[..8].copy_from_slice(&identity.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.check.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.count.to_le_bytes());
        bytes[PLACE_OFFSET..].copy_from_slice(&self.place().to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; RECORD_SIZE]) -> Result<Self, NotARecord> {
        let (identity, rest) = bytes.split_first_chunk().ok_or(NotARecord)?;
        let (check, rest) = rest.split_first_chunk().ok_or(NotARecord)?;
        let (count, rest) = rest.split_first_chunk().ok_or(NotARecord)?;
        let place = u64::from_le_bytes(rest.try_into().map_err(|_| NotARecord)?);
        let identity = u64::from_le_bytes(*identity);
        let count = u32::from_le_bytes(*count);
        let codec = Codec::from_bits(field(place, CODEC_SHIFT, CODEC_BITS));
        if count == 0 {
            return Err(NotARecord);
        }
        let (slab, slot) = (field(place, 0, SlabId::BITS), field(place, SLOT_SHIFT, SLOT_BITS));
        let length = narrow(field(place, LENGTH_SHIFT, LENGTH_BITS)) as usize + 1;
        let body = match codec {
            Codec::Same => Body::Same(identity),
            Codec::Dense | Codec::Lz4 | Codec::Raw if field(place, AWAY_SHIFT, 1) == 1 => {
                let at = Away(slab | slot << SlabId::BITS);
                Body::Away { codec, remote: Remote { at, length }, key: identity }
            }
            Codec::Dense | Codec::Lz4 | Codec::Raw => {
                let extent = Extent { slab: SlabId(narrow(slab)), slot: narrow(slot), length };
                Body::Data { codec, extent, key: identity }
            }
        };
        let generation = Generation::wrap(narrow(field(place, GENERATION_SHIFT, GENERATION_BITS)));
        Ok(Self { body, check: u32::from_le_bytes(*check), count, generation })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Record = Record {
        body: Body::Data {
            codec: Codec::Raw,
            extent: Extent { slab: SlabId((1 << 25) - 1), slot: 1023, length: PAGE_SIZE },
            key: u64::MAX,
        },
        check: u32::MAX,
        count: u32::MAX,
        generation: Generation(0x3fff),
    };

    #[test]
    fn records_read_back_as_written_at_both_ends_of_every_field() {
        let low = Record {
            body: Body::Data {
                codec: Codec::Lz4,
                extent: Extent { slab: SlabId(0), slot: 0, length: 1 },
                key: 0,
            },
            check: 0,
            count: 1,
            generation: Generation(0),
        };
        let same = Record { body: Body::Same(7), ..FULL };
        let Body::Data { extent, key, .. } = FULL.body else { panic!("it has data") };
        let dense = Record { body: Body::Data { codec: Codec::Dense, extent, key }, ..FULL };
        for record in [low, FULL, same, dense] {
            assert_eq!(Record::from_bytes(&record.to_bytes()), Ok(record));
        }
        for (bits, length) in [(0, 1), (1 << 24, 2), (1 << 25, 3), ((1 << AWAY_BITS) - 1, PAGE_SIZE)] {
            let remote = Remote { at: Away::new(bits).unwrap(), length };
            let away = Record { body: Body::Away { codec: Codec::Dense, remote, key }, ..FULL };
            assert_eq!(Record::from_bytes(&away.to_bytes()), Ok(away));
        }
        assert_eq!(Away::new(1 << AWAY_BITS), None);
    }

    #[test]
    fn free_records_are_no_records_whatever_else_they_say() {
        assert_eq!(Record::from_bytes(&[0; RECORD_SIZE]), Err(NotARecord));
        assert_eq!(Record::from_bytes(&Record { count: 0, ..FULL }.to_bytes()), Err(NotARecord));
    }

    #[test]
    fn the_place_is_an_aligned_word_of_its_own() {
        assert!(PLACE_OFFSET.is_multiple_of(8) && RECORD_SIZE.is_multiple_of(8));
        let Body::Data { codec, key, .. } = FULL.body else { panic!("it has data") };
        let extent = Extent { slab: SlabId(5), slot: 6, length: 7 };
        let moved = Record { body: Body::Data { codec, extent, key }, ..FULL };
        let mut bytes = FULL.to_bytes();
        bytes[PLACE_OFFSET..].copy_from_slice(&moved.place().to_le_bytes());
        assert_eq!(Record::from_bytes(&bytes), Ok(moved));
    }

    #[test]
    fn handles_fit_in_60_bits_and_come_back() {
        let handle = FULL.handle(RecordNumber(u32::MAX));
        assert_eq!(handle.to_bits(), (1 << HANDLE_BITS) - 1);
        assert_eq!(Handle::from_bits(handle.to_bits()), Some(handle));
        assert_eq!((handle.number(), handle.generation()), (RecordNumber(u32::MAX), Generation(0x3fff)));
        assert_eq!(Handle::from_bits(1 << HANDLE_BITS), None);
        assert_eq!(Generation(0x3fff).next(), Generation(0));
    }
}
