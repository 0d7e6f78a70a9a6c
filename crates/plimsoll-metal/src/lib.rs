//! The bare-metal host, and what runs it under QEMU.
//!
//! The hypervisor itself is the program in `image/`: a freestanding x86-64 ELF file that owns a machine's memory from the firmware's
//! map on. It is embedded here, [`IMAGE`].
//!
//! Enters: settings. Leaves: what the hypervisor says, line by line, and how it ended. What must never happen: a QEMU that outlives the
//! [`Run`] it belongs to; it ends with it, and with the thread that started it.
//!
//! QEMU emulates the processor (TCG), nested paging included, so nothing here says how fast anything is.
extern crate alloc;

mod digest;
mod run;
pub mod wire;

pub use digest::Digest;
pub use run::{Board, Event, Guest, MetalError, Options, Run, Ticks};

/// The hypervisor, to be booted by PVH: `qemu-system-x86_64 -kernel`.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/image"));
