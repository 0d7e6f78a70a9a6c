//! The memory manager of a hypervisor as a pure state machine: no I/O, no clock, no unsafe, no std.
//!
//! A host (Linux/KVM, bare metal, the simulator, the model checker) tells it what happened and does what it says:
//!
//! * [`word`]: eight bytes a page that say where the page's bytes are, and which changes are legal.
//! * [`map`]: all words of a machine, with counts that always add up to its size.
//! * [`layout`]: guest physical memory with holes, as dense page indices.
//! * [`airlock`]: captured pages, oldest first (limbo), and the memory to give back.
//! * [`replacement`]: which pages to take next. [`sampler`]: how much a machine really uses.
//! * [`prefetch`]: which pages to bring back from the store before they are touched.
//! * [`twins`]: which blocks hold pages that have their like elsewhere, for sharing while they are in use.
//! * [`machine`]: all of these as one state machine of events and effects. Start reading there.
//! * [`outside`]: which pages to take from a machine whose pages can only be looked up, never followed.
//! * [`ledger`]: host, group and machine; budgets, watermarks, the hard line.
//! * [`frames`]: a whole host's memory, for a host that owns it: the firmware's map, an allocator, extents that machines
//!   donate, lend and share.
//!
//! Words live in memory that outlives the manager; everything else is derived and is rebuilt by
//! [`machine::Machine::recover`].
//!
//! Known holes: one thread drives a machine; replacement looks at every word of a block it considers, so its cost per
//! page taken grows as a machine's resident share shrinks; layouts are made of whole 2 MiB blocks.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

pub mod airlock;
pub mod bits;
pub mod frames;
pub mod layout;
pub mod ledger;
pub mod machine;
pub mod map;
pub mod outside;
pub mod prefetch;
pub mod replacement;
pub mod sampler;
pub mod twins;
pub mod word;
