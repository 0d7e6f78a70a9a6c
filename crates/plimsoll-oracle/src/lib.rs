//! The walks of `plimsoll-mmu` against models of processors that others wrote: QEMU's.
//!
//! Enters: a seed. Leaves: what the processor made of thousands of addresses, and where that is not what the crate says. What
//! must never happen: a case that is compared in part without a stated rule, a mismatch that cannot be looked at again, or a QEMU
//! that outlives its test.
//!
//! A [`Case`] is self-contained: a few words of memory, a processor's registers, one access. A [`Hardware`] is a QEMU and a small
//! assembly program in it, which executes a batch of cases one after the other: it writes a case's words, sets the registers,
//! accesses, notes the exception, and reads the words back, so that accessed and dirty bits are compared as well. Guest RAM is a
//! file: the batch is in it before the program starts, and its outcomes are when QEMU has ended ([`mod@batch`] has the form).
//!
//! * [`tree`]: words that lead an address to memory, made by the crate's own encoders.
//! * [`grown`]: words that the mapper wrote, in a history of changes.
//! * [`x86`]: four and five levels, as ring 0 and ring 3 see them.
//! * [`npt`]: the same in guests, through AMD's nested tables.
//! * [`vtd`]: what a device reaches through the tables of remapping hardware.
//! * [`arm`]: granules of 4, 16 and 64 KiB, stage 1, stage 2 and both, by the instructions that translate for EL2.
//! * [`riscv`]: Sv39 to Sv57 and their x4 forms, alone and one over the other, as VS, VU and HS mode see them.
//! * [`verdict`]: expectations, mismatches, and how often each kind of end was seen.
//!
//! Words are damaged after they were encoded, at most once a case, so that most walks get far and each fault is seen at each
//! level. Cases whose walk leaves RAM are drawn anew: what is there is not the processor's affair.
pub mod arm;
pub mod batch;
mod chance;
pub mod grown;
mod hardware;
mod memory;
pub mod npt;
pub mod riscv;
pub mod tree;
pub mod verdict;
pub mod vtd;
pub mod x86;

pub use chance::Chance;
pub use hardware::{Hardware, HardwareError, Run, Source};
pub use memory::{Outside, Ram, Region};
pub use verdict::{Case, Expected, Mismatch, Outcome, Report};
