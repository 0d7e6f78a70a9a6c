//! The disk tier: pages that nobody has wanted for long, encrypted, in a file.
//!
//! Enters: objects of the stores, as they are compressed there. Leaves: memory, and the same bytes again when they are wanted.
//! What must never happen: a page that is only on the disk before the disk has taken it; wrong bytes, whatever the disk does;
//! a byte of a guest on the disk in clear.
//!
//! | file | what it is |
//! |---|---|
//! | [`device`] | [`Disk`](device::Disk), the boundary; a real file, direct I/O, buffers for it |
//! | `format` | a segment byte by byte, and why no nonce is used twice |
//! | `seal` | ChaCha20-Poly1305 |
//! | `table` | what outlives the manager: key, counter, which segment holds what |
//! | `draft` | a segment that is being filled |
//! | `doubt` | writes that may still be under way, and why none is done over anything that came later |
//! | [`tier`] | which segment holds what and for whom; room, quotas, what is worth cleaning |
//! | `look` | what a place has, decrypted and proven, or what is to be read first |
//! | [`window`] | what was written together is read together |
//! | [`reader`] | who reads the disk for all pagers, several reads at once |
//! | [`queue`] | by a ring, or by threads: the boundary again |
//! | `image` | a segment read whole, to be cleaned |
//! | [`fetch()`] | an object's bytes, wherever they are |
//! | [`release()`] | a reference given back, with the place on the disk or without |
//! | [`mover`] | what joins tier and stores: objects on their way out of memory, and from sparse segments to full ones |
//!
//! # Where the index is
//! In the stores. An object keeps its record when its bytes leave ([`Store::send_away`](plimsoll_store::Store::send_away)): the
//! record says where they are, page words name the record as before, and both outlive the manager. So a handle stays good
//! however often its bytes are moved, and after a crash the tier is put together from its table, which has the key, and from
//! what the records name. An object on disk costs memory 24 bytes and its share of the index, about 30 in all.
//!
//! # The order of things
//! ```text
//! out    1 the object's bytes, encrypted, into a draft        it is in memory
//!        2 the segment, written whole                         it is in memory, and on the disk for nobody
//!        3 the segment's sequence into the table              the same
//!        4 the record's place, one word                       it is on the disk
//!        5 the slot freed
//! clean  as out, from 1 with the bytes of the old place; then the old place is forgotten, and a segment is free when nobody
//!        needs anything in it
//! in     record, bytes, tag, page, hash; if a tag is wrong and the record names another place by now, once more from there
//! ```
//! A manager that dies between any two of these leaves a page whole in one place that its record names.
//!
//! # Known holes
//! * Reads are by io_uring ([`reader`]), writes are not: one thread writes for all, and a segment of 1 MiB a call leaves little to be
//!   won by queueing. What a killed manager's thread was writing has been written, or refused, by the time that it has ended, or is
//!   one place in doubt; of a ring it would be as many as it had requests. A disk that never answers a write keeps a manager from
//!   stopping.
//! * A pager keeps what it has read last, at most 1 MiB, as long as it lives.
//! * An object that lies away is not compared with pages that come in: an equal one is stored once more.
//! * A file system that never writes in place may have no room for cleaning although the segments had theirs.
//! * A place that the disk refused and of which not all is ever seen is lost to the tier, 1 MiB of its limit, until it ends. A tier
//!   as small as some such places can come to be full for good.
//! * What a lost page took of its segment stays taken until a manager takes over. A record whose place was damaged and that
//!   nobody reads before it is released gives up a place that is not its own.
//! * Segments are given back to the tier, not to the file system: the file is as long as it ever was.
pub mod device;
mod doubt;
mod draft;
mod error;
mod fetch;
mod format;
mod image;
mod look;
pub mod mover;
pub mod queue;
pub mod reader;
mod release;
mod seal;
mod table;
pub mod tier;
pub mod window;

pub use draft::Draft;
pub use error::{ReadError, TierError, WriteError};
pub use fetch::{Fetch, FetchError, Progress, fetch};
pub use format::{SEGMENT_SIZE, SEGMENTS_MAX};
pub use image::{Image, Line};
pub use release::{abandon, release};
pub use table::TableError;
