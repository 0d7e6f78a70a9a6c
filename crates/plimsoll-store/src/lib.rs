//! A compressed, deduplicated page store for **one** sharing domain.
//!
//! Pages come in whole and leave whole. In between they are recognised as zero (never stored), as one word
//! repeated (24 bytes and no data), as a duplicate of a page already here (confirmed byte by byte, one more
//! reference), or they are compressed with lz4, or kept raw where lz4 does not take them below three quarters.
//!
//! | file | what it is |
//! |---|---|
//! | `memory` | [`SlabMemory`]: 64 KiB slabs that outlive the manager, and the tag each carries |
//! | `heap` | [`HeapSlabs`]: that memory on the heap, for tests, the model checker and the simulator |
//! | `record` | the 24-byte record of an object, byte by byte; [`Handle`], which names one |
//! | `class`, `slots` | size classes, and which slots of which data slab are taken |
//! | `records` | which records of which record slab are taken |
//! | `index` | from a page's hash to the records that may hold it |
//! | `digest`, `codec` | the work on bytes, done outside the store's lock |
//! | `store`, `recover` | the store, and the store rebuilt after a crash |
//!
//! # What is durable and what is derived
//! Slab memory holds the tags, the records and the data, and nothing else. Free lists, reference counts, the
//! index and all counters are derived: [`Store::recover`] rebuilds them from the handles that page words name.
//! So an insertion that dies half way leaves an object that no word names, and recovery frees it.
//!
//! # Two phases, so that nobody compresses under a lock
//! 1. [`digest()`] the page, without the store.
//! 2. [`Store::share`], with the store: done if the page is here already.
//! 3. [`Encoder::encode`], without the store.
//! 4. [`Store::insert`], with the store; it looks for a duplicate once more.
//!
//! # What must never happen
//! * Wrong bytes. [`Store::get`] checks 96 bits of hash over the page it is about to return.
//! * A panic on bad bytes, be they in records, data or tags.
//! * A page of one domain in a slab of another without the slab having been zeroed ([`SlabMemory`]'s contract).
//!
//! # Memory
//! An object costs a 24-byte record (2,730 to a slab: 24.006 bytes), an index entry with its share of the
//! bucket (at most 5.3 bytes), and its share of the slab table (24 bytes a data slab, 27 with the idle eighth: 1.7
//! bytes an object when all are raw, less otherwise). Plus one record slab that is only begun.
//! Measured at their worst sizes, that slab apart: 29.8 bytes a same-filled, 30.1 a small compressed, 31.4 a raw
//! object; from 128 Ki objects on never more than 32 bytes, that slab included. [`Stats::metadata`] counts it all.
//!
//! # Known holes
//! * A record's reference count and place have no checksum of their own. A damaged place is found when the
//!   page is read; a damaged count can free the object early, which later handles notice as stale.
//! * A bit flipped in a record's generation or fingerprint makes good handles look stale rather than corrupt.
//! * When two records claim one slot after a crash, the one named first keeps it; if that was the damaged
//!   one, the other page is lost too. Both are reported, neither gives wrong bytes.
//! * Slots are not moved yet, and records, which handles name, cannot be: after most pages of a store were
//!   released in random order, slabs stay part empty, and 32 bytes an object is then a bound on the most objects
//!   there were.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod bits;
mod class;
mod codec;
mod digest;
mod error;
mod heap;
mod index;
mod memory;
mod record;
mod records;
mod recover;
mod slots;
mod stats;
mod store;
#[cfg(test)]
mod tests;

pub use class::SizeClass;
pub use codec::{Encoded, Encoder};
pub use digest::{Digest, digest};
pub use error::{Damage, GetError, StoreError};
pub use heap::HeapSlabs;
pub use memory::{SLAB_SIZE, SlabId, SlabKind, SlabMemory, SlabTag, SlabsExhausted};
pub use record::{HANDLE_BITS, Handle};
pub use recover::{RecoveryReport, RejectedHandle, Rejection};
pub use stats::Stats;
pub use store::{How, Store, Stored};
