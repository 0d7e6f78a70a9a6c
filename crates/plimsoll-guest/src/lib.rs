//! Guest programs that verify every page they touch, and the contract with whatever runs them.
//!
//! * [`abi`]: addresses, ports, the parameter page and the channel page. [`spec`]: what a guest shall do.
//! * [`layout`]: where everything lies in guest memory. [`content`]: what every page must contain.
//!   [`versions`]: which version of it.
//! * [`probe`]: what a host may ask of the guest whose program is to do as it is told.
//! * [`frames`]: an allocator whose free memory the host sees and takes without asking; `heap`: the program over it, and its
//!   balloon.
//! * [`Guest`]: the programs themselves, over the trait [`Machine`]. The freestanding image in `image/` runs
//!   them in a virtual machine with volatile accesses and port I/O; where there is no KVM, a VMM runs the
//!   very same code over the same managed memory in its own process.
//!
//! # Known holes
//!
//! * A page that comes back as an older version of *its version word and its contents alike* passes. The two
//!   lie in different pages, so a pager would have to turn both back in step.
//! * The working set counts data pages. Versions and bitmaps add at most 9 bytes to each of them.
//! * Latency is the time of an operation alone. A guest that paces itself and is late starts its pace over,
//!   so a long stall counts as one slow operation.
#![no_std]
#![forbid(unsafe_code)]

pub mod abi;
pub mod content;
pub mod frames;
mod heap;
pub mod layout;
mod machine;
pub mod probe;
mod program;
pub mod random;
mod runner;
pub mod spec;
pub mod versions;
mod window;

pub use machine::{Machine, PAGE_WORDS, PageWords};
pub use runner::{Guest, GuestError};
