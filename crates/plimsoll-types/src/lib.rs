//! Addresses, sizes and identities: the words every plimsoll crate shares.
//!
//! Each is a newtype, so that a guest physical address cannot be taken for a host virtual one, nor a count of
//! pages for a count of bytes. Nothing here allocates, fails loudly or knows an operating system.
//!
//! Terms that are ours and are used everywhere with one meaning:
//!
//! * **page**: 4 KiB, the unit of accounting. **block**: 2 MiB, 512 pages, aligned; the unit of heat and of
//!   whole-huge-page capture.
//! * **page index**: the number of a guest page counted *densely*, holes of the guest's physical layout skipped.
//!   Everything per-page is an array over it.
//! * **airlock**: memory of the guest's own process, outside guest RAM, into which captured pages are moved before
//!   their bytes are read. It is divided into **slots** of one block each; a **slot page** is one page of it.
//! * **limbo**: a captured page resting in the airlock: unmapped from the guest, not yet stored, cheap to return.
#![no_std]
#![forbid(unsafe_code)]

mod address;
mod identity;
mod size;

pub use address::{BlockIndex, Gpa, Hpa, Hva, PageIndex, Pfn, SlotPage};
pub use identity::{DomainId, GroupId, MachineId};
pub use size::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, PAGE_SHIFT, PAGE_SIZE, PageCount, ParseByteCountError};

/// The bytes of one page.
pub type PageBytes = [u8; PAGE_SIZE];
