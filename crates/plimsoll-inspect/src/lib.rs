//! A guest's own page tables, read from outside, and the host's pages under them.
//!
//! Enters: where guest RAM lies in a process and in the guest, and a processor's registers. Leaves: what the guest's tables say,
//! entry by entry, and what the host has where they lead. The guest is neither stopped nor asked, and writes its tables as it
//! likes meanwhile: what it wrote is a number here until it was looked up in its RAM. What must never happen: a walk that does not
//! end, an address outside of the guest's RAM that is read, or a byte of the guest that is written.
//!
//! * [`GuestRam`]: guest physical addresses, and where they lie in the process. [`Outside`]: tables there, for `plimsoll-mmu`'s walks.
//! * [`Paging`]: what of a processor's registers a walk needs. [`trace()`]: one address, every entry on its way.
//! * [`visit()`]: all that the tables map. [`Under`]: how large the host's pages are under that.
//! * [`HostPage`]: what the host has there. [`Census`]: what it has of a whole range.
//! * [`audit()`]: which frames machines have, and which of them must not be shared.
//! * [`headers()`]: a core file of it all. [`PageStates`]: what a memory manager says of the pages, as a note of that.
//!
//! # Known holes
//!
//! * x86-64 with four and five levels only. How many bits a physical address has is not known from the registers: 52 are taken, so that
//!   what the processor would refuse as reserved is refused here as outside of RAM.
//! * What is read of a running guest is as old as the read. Entries of one walk may be of different moments.
mod census;
mod elf;
mod host;
mod outside;
mod owners;
mod page_states;
mod paging;
mod ram;
mod tables;
mod trace;
mod under;

pub use census::{Census, MergedError, merged};
pub use elf::{Load, headers, note};
pub use host::{HostPage, State};
pub use outside::{Outside, Unreadable};
pub use owners::{Audit, AuditError, Held, Owner, Shared, audit};
pub use page_states::{PageStates, PageStatesError};
pub use paging::{Levels, NotLong, Paging};
pub use ram::{GuestRam, Part, Piece, RamError};
pub use tables::{Mapped, Tables, Visited, Wrong, visit};
pub use trace::{Reached, Seen, Stop, Trace, trace};
pub use under::Under;
