//! Address translation: what page tables say, how they are changed, and what a processor makes of them.
//!
//! * [`mod@format`]: x86-64 with four and five levels, AMD's nested tables, Intel's EPT, Arm's VMSAv8-64 in both stages,
//!   RISC-V's Sv39 to Sv57 and Sv39x4 to Sv57x4, the second stage of Intel's VT-d with three to five levels, AMD-Vi's host tables with one
//!   to five. Each is a zero-sized type; what a processor lacks is a value beside it. All decode to one [`Entry`].
//! * [`mapper`]: map, unmap, protect, split, merge, translate, walk, iterate and harvest ranges of a tree of any format.
//! * [`x86`], [`ept`], [`arm`], [`riscv`]: a walk as the processor does it, down to error code, exit qualification, fault
//!   status and cause.
//! * [`vtd`], [`amdvi`], [`smmu`]: a walk as the remapping hardware does it for a device, down to the fault reason or event. Arm's
//!   SMMUv3 has no tables of its own: its second stage is [`format::arm::Second`].
//! * [`nested`]: a guest's tables through a second stage.
//! * [`direct`]: a guest's own tables walked by the processor, and none of them writable by the guest.
//! * [`shadow`]: a guest's tables and where its memory is, as tables that need no second stage.
//! * [`splinter`]: how many large pages two stages leave whole.
//! * [`tlb`]: what processors keep of translations, every fence, and which one a change needs. [`iotlb`]: the same of remapping hardware
//!   and devices.
//!
//! Tables are reached through [`TableMemory`], frames come from [`TableFrames`], and [`Invalidate`] has translations
//! forgotten. The crate allocates nothing, runs on any processor, and treats what it reads as written by an enemy.
//!
//! # Known holes
//!
//! * Arm: addresses of up to 48 bits, the EL1&0 regime, no realms, no permission indirection (S1PIE, S2PIE) or overlays, no
//!   guarded pages (BTI) or tags (MTE), and FEAT_HAFT's accessed bits in tables are not kept. A contiguous hint in a root too
//!   small for it is ignored, where some processors have a translation fault.
//! * RISC-V: no shadow stacks (Zicfiss), and neither stage may be bare.
//! * x86-64: no 32-bit or PAE paging, no supervisor keys (PKS), no shadow stacks, no SMEP or SMAP exemption for enclaves.
//!   A change of the tables between a walk and its marks is seen by their words only.
//! * EPT: four levels; no mode-based execute control, sub-page writes, paging-write, supervisor shadow stacks or #VE.
//! * NPT: no guest-mode execute trap, no SEV bits in addresses; the memory types of both stages are not combined.
//! * VT-d: requests without PASID through the second stage alone; no execute requests, no memory types of scalable mode, and no
//!   fault where an accessed or dirty bit is to be set by accesses that do not snoop (reason 0x7C). Translation requests of
//!   devices (ATS) and reads of no bytes (CAP.ZLR), which some units let through to what may only be written, are not told apart.
//! * AMD-Vi: five levels of six, no guest tables (PASID), no exclusion range; what goes to interrupts or to HyperTransport's own
//!   addresses is not told apart. Modes and marks of a device table entry are taken to be within what the unit has.
//! * SMMUv3: no first stage, no substreams, 48 bits, and the second stage's own attributes as in [`arm`].
//! * [`iotlb`]: requests without PASID; scalable mode's PASID caches, interrupt entries and page requests are not in it.
//! * [`shadow`]: x86-64 with as many levels here as in the guest; leaves of at most 2 MiB; what a guest changes of an entry drops its
//!   shadow, and is not carried over; a fence of the guest's for everything reads every unsync table, whichever root it is below.
//! * [`direct`]: pages of one size, no frames of others by grant, none of the host's own entries in a guest's root, no segment descriptors.
//! * The mapper reads groups of pages (Svnapot, Arm's contiguous hint) and takes them apart, but makes none. It keeps tables in one tree, with one writer.
//! * Memory may fail half-way through a change, unlike frames: what was changed until then stays changed.
#![no_std]
#![forbid(unsafe_code)]

mod address;
pub mod amdvi;
pub mod arm;
pub mod direct;
mod entry;
pub mod ept;
pub mod format;
pub mod iotlb;
pub mod mapper;
mod memory;
pub mod nested;
pub mod riscv;
pub mod shadow;
pub mod smmu;
pub mod splinter;
mod stale;
pub mod tlb;
pub mod vtd;
mod walk;
pub mod x86;

pub use address::{Input, Level, MAX_LEVELS, Output, Span};
pub use entry::{
    Cache, Entry, GuestPat, Leaf, Malformed, Memory, Pat, Permissions, Shareability, Table, Unencodable,
};
pub use format::{Extension, Feature, Format};
pub use mapper::{MapError, Mapper};
pub use memory::{Invalidate, NothingCached, Pools, TableFrames, TableMemory};
pub use walk::{Access, Dead, End, Found, Marks, Step, Walked};
