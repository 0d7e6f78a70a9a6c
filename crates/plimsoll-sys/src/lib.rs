//! The only Linux room with unsafe kernel interfaces: each module turns one of them into a face that cannot be
//! misused from safe code, or names precisely what its caller must promise.
//!
//! What enters: file descriptors, process ids and host virtual addresses, many of them named by other processes.
//! What leaves: typed results in which partial progress cannot be overlooked. What must never happen here: policy,
//! knowledge of guests, a thread, a panic, or a Rust reference into memory that somebody else changes.
//!
//! How the parts relate:
//!
//! * [`range::HvaRange`] is an address range that does not overflow. [`range::UnborrowedRange`] is one of *this*
//!   process's memory into which no Rust reference points. It is the proof that every destructive call asks for,
//!   and its one unsafe constructor is where the memory-safety obligation of userfaultfd lives: see [`uffd`].
//! * [`mapping::AnonymousMapping`] (guest RAM, the airlock) hands out such ranges safely because it never hands out
//!   references. [`mapping::SharedMapping`] hands out atomics only. [`mapping::ExclusiveMapping`] hands out slices.
//! * [`ring::ReadRing`] reads a disk with several reads under way. It owns the memory that the kernel writes to until that has ended.
//! * [`uffd`], [`pagemap`] and [`process_memory`] work on this process or, through a descriptor or a process id, on
//!   another one, whose memory safety is that process's own affair.
//!
//! Known holes:
//!
//! * Only 64-bit little-endian Linux is considered, and only x86-64 was tried.
//! * Process ids are taken as given: between reading one and opening a [`pidfd::Pidfd`] on it the process may end
//!   and the number be reused. Compare [`procfs::start_time`] before and after where that matters.
//! * Reading through `/proc/PID/mem` or writing with `ptrace` can change any memory behind every type's back; so
//!   can root. Rust's own standard library draws the line at the same place.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", target_endian = "little")))]
compile_error!("plimsoll-sys speaks to 64-bit little-endian Linux kernels only");

pub mod blocks;
pub mod eventfd;
pub mod fdpass;
pub mod frames;
pub mod heap;
pub mod launch;
pub mod mapping;
pub mod numa;
pub mod pagemap;
pub mod pidfd;
pub mod process;
pub mod process_id;
pub mod process_memory;
pub mod procfs;
pub mod psi;
pub mod range;
pub mod rights;
pub mod ring;
pub mod slots;
pub mod swap;
pub mod uffd;

pub use process_id::ProcessId;
pub use range::{HvaRange, UnborrowedRange};

/// An address or length as the pointer-sized number it is on the only targets this crate compiles for.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, or lib.rs refuses to compile")]
const fn to_usize(value: u64) -> usize {
    value as usize
}
