//! Linux back ends of plimsoll.
//!
//! * [`uffd`]: our own pager, for machines that hand their memory over. Its documentation is the protocol.
//! * [`kernel`]: the kernel's own mechanisms from outside, for machines that do not. [`ksm`]: resident sharing.
//! * [`reclaimer`]: what every back end that takes memory can do.
//! * [`nodes`]: what NUMA nodes a host has, and where each pager belongs.
//! * [`prepare`]: what this kernel offers for it, and setting up swap with consent.
//! * [`slabs`]: the memory that stores live in. [`dense`]: how they pack what is cold. [`disk`]: where
//!   that goes at last.
//! * [`cgroup`], [`procsum`]: what the kernel counts. [`zram`]: compressed swap devices. [`system`]: the boundary that
//!   tests put another kernel behind.
pub mod cgroup;
pub mod dense;
pub mod disk;
pub mod kernel;
pub mod ksm;
pub mod nodes;
pub mod prepare;
pub mod procsum;
pub mod reclaimer;
pub mod slabs;
pub mod system;
pub mod uffd;
pub mod zram;

/// An error with its causes, in one sentence for an operator. A cause whose text its effect repeats is told once.
pub fn explain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}
