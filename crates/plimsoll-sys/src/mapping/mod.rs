//! Memory of this process, in four kinds that differ in who may change the bytes, and so in what they hand out:
//!
//! | type | changed by | hands out |
//! |---|---|---|
//! | [`AnonymousMapping`]: guest RAM, the airlock | guest, kernel, userfaultfd | copies, [`UnborrowedRange`](crate::UnborrowedRange)s |
//! | [`SharedMapping`]: memory of a memfd shared with another process | that process | atomics |
//! | [`SecretPage`]: a page that nobody reads who does not map it | whoever maps it | atomics |
//! | [`ExclusiveMapping`]: a file in memory that only this process maps | this process | slices |
//!
//! What must never happen here: a reference into memory of the first kind, a plain one into the second, or a mapping
//! that shrinks under its user.

mod anonymous;
mod memfd;
mod secret;
mod shared;

pub use anonymous::{AnonymousMapping, HugePages, MapError, Merging, RangeError};
pub use memfd::{Memfd, MemfdError};
pub use secret::SecretPage;
pub use shared::{ExclusiveMapping, SharedMapping, large_folio_folder, make_files_in};
