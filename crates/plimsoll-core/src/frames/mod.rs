//! The memory of a whole host, for a host that owns it from the firmware's map on: nothing below it gives frames out.
//!
//! * [`firmware`]: what firmware says of memory, repaired by stated rules; [`devicetree`]: where it says so in a device tree.
//! * [`buddy`]: frames in pieces of 4 KiB to 1 GiB, each of one kind; pages that processors have at hand; pools of frames for page tables.
//! * [`extents`]: pieces with one owner, which machines donate, lend, share and take back.
//!
//! ```text
//! claims of firmware -> HostMap -> Frames -> Extents -> tasks for the host: unmap, fence, zero
//! ```
//!
//! Nothing here allocates: tables are memory that the host gives, as slices or as vectors. Nothing here touches a frame's
//! bytes: whoever takes a piece from [`buddy`] finds in it what its last user left, and [`extents`] says when to zero.
//!
//! Known holes: one lock for all processors, since the table is one; gaps in the host's map
//! cost table entries like memory does; [`extents`] looks at every slot when a machine dies and to list its tasks.
pub mod buddy;
pub mod devicetree;
pub mod extents;
pub mod firmware;
mod reach;

pub use reach::{REACH_MAX, Reach, Rights};
