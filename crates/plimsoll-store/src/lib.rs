//! A compressed, deduplicated page store for **one** sharing domain.
//!
//! Pages come in whole and leave whole. In between they are recognised as zero (never stored), as one word
//! repeated (24 bytes and no data), as a duplicate of a page already here (confirmed byte by byte, one more
//! reference), or they are compressed with lz4, or kept raw where lz4 does not take them below three quarters. What lz4
//! compressed and nobody wanted for long is packed again, densely, with a codec that the caller brings.
//!
//! | file | what it is |
//! |---|---|
//! | `memory` | [`SlabMemory`]: 64 KiB slabs that outlive the manager, and the tag each carries |
//! | `heap` | [`HeapSlabs`]: that memory on the heap, for tests, the model checker and the simulator |
//! | `record` | the 24-byte record of an object, byte by byte; [`Handle`], which names one |
//! | `class`, `slots` | size classes, and which slots of which data slab are taken |
//! | `records` | which records of which record slab are taken |
//! | `index` | from a page's hash to the records that may hold it |
//! | `digest`, `codec`, `lz4` | the work on bytes, done outside the store's lock |
//! | `store`, `recover` | the store, and the store rebuilt after a crash |
//! | `fetch` | reading: bytes are copied under the lock, decoded and checked outside of it |
//! | `dense` | the caller's denser codec, and the proof that it loses no page |
//! | `repack`, `compact` | data that moves: cold objects packed densely, sparse slabs emptied |
//! | `away` | data that leaves slab memory, to a disk say, and keeps its record here |
//! | `stats`, `similar` | what is held and what is lost; how many pages are nearly duplicates |
//!
//! # What is durable and what is derived
//! Slab memory holds the tags, the records and the data, and nothing else. Free lists, reference counts, the
//! index and all counters are derived: [`Store::recover`] rebuilds them from the handles that page words name.
//! So an insertion that dies half way leaves an object that no word names, and recovery frees it.
//!
//! # Phases, so that nobody compresses, decodes or packs under a lock
//! What is done with the store is done under its owner's lock; the rest without it.
//!
//! | | with the store | without it |
//! |---|---|---|
//! | in | | [`digest()`] |
//! | | [`Store::seek`]: done if the page is here | |
//! | | | [`Fetched::confirm`], if it may be here densely |
//! | | [`Store::share_confirmed`]: done if it is | |
//! | | | [`Encoder::encode`] |
//! | | [`Store::insert`] looks for a duplicate once more | |
//! | out | [`Store::fetch`] | [`Fetched::unpack`] |
//! | packing | [`Store::next_cold`] | [`Packer::pack`] |
//! | | [`Store::replace`] | |
//! | compaction | [`Store::compact`], a bounded step | |
//! | out of memory | [`Store::fetch`] | the bytes are written elsewhere |
//! | | [`Store::send_away`] | |
//!
//! Where the store has no dense objects, [`Store::share`] and [`Store::get`] are all it takes.
//!
//! # What must never happen
//! * Wrong bytes. [`Fetched::unpack`] and [`Store::get`] check 96 bits of hash over the page they are about to return.
//! * A page lost to a bad compressor: [`Packer::pack`] decompresses and compares before anything is replaced.
//! * A moment at which a crash would lose a page that moves (`repack` has the order of writes).
//! * A panic on bad bytes, be they in records, data or tags.
//! * A page of one domain in a slab of another without the slab having been zeroed ([`SlabMemory`]'s contract).
//!
//! # Memory
//! An object costs a 24-byte record (2,730 to a slab: 24.006 bytes) and three bits beside it (0.4 bytes), an index entry
//! with its share of the bucket (at most 5.3 bytes), and its share of the slab table (24 bytes a data slab, 27 with the
//! idle eighth: 1.7 bytes an object when all are raw, less otherwise). Plus one record slab that is only begun, and
//! 4 KiB for the store.
//! Measured at their worst sizes, that slab apart: 30.0 bytes a same-filled, 30.3 a small compressed, 31.7 a raw
//! object; from 128 Ki objects on never more than 32 bytes, that slab included. [`Stats::metadata`] counts it all.
//!
//! # Known holes
//! * A record's reference count and place have no checksum of their own. A damaged place is found when the
//!   page is read; a damaged count can free the object early, which later handles notice as stale.
//! * A bit flipped in a record's generation or fingerprint makes good handles look stale rather than corrupt.
//! * When two records claim one slot after a crash, the one named first keeps it; if that was the damaged
//!   one, the other page is lost too. Both are reported, neither gives wrong bytes.
//! * A damaged place that names another object's slot takes that slot along when its object is released or moves. The
//!   other object is then lost too: reported as corrupt, never as wrong bytes.
//! * Records, which handles name by number, cannot move: after most pages of a store were released in random order, 32
//!   bytes an object are a bound on the most objects there were. Data does move ([`Store::compact`]).
//! * Raw objects are never packed densely, though a codec with entropy coding might take some below three quarters.
//! * A dense page that is stored again while its object is being packed or moved is kept twice. So is a page whose object
//!   lies away: to compare it would take a read.
//! * The near-duplicates are a sample: give or take a tenth of all objects, and low for pages with many differences.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod away;
mod bits;
mod class;
mod codec;
mod compact;
mod dense;
mod digest;
mod error;
mod fetch;
mod heap;
mod index;
mod lz4;
mod memory;
mod record;
mod records;
mod recover;
mod repack;
mod similar;
mod slots;
mod stats;
mod store;
#[cfg(test)]
mod tests;

pub use away::Hand;
pub use class::SizeClass;
pub use codec::{Encoded, Encoder};
pub use compact::{Compacted, Progress};
pub use dense::{DenseCodec, DenseError, NoDense, PackError, Packed, Packer};
pub use digest::{Digest, digest};
pub use error::{Damage, GetError, StoreError};
pub use fetch::{Confirmed, Fetched, Ticket, Whereabouts};
pub use heap::HeapSlabs;
pub use memory::{Lane, SLAB_SIZE, SlabId, SlabKind, SlabMemory, SlabTag, SlabsExhausted};
pub use record::{AWAY_BITS, Away, HANDLE_BITS, Handle, Remote};
pub use recover::{RecoveryReport, RejectedHandle, Rejection};
pub use repack::{Cold, Replacement};
pub use stats::{Fragmentation, Stats};
pub use store::{How, Sought, Store, Stored};
