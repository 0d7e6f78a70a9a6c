//! Linux back ends of plimsoll.
//!
//! * [`uffd`]: our own pager, for machines that hand their memory over. Its documentation is the protocol.
//! * [`slabs`]: the memory that stores live in. [`dense`]: how they pack what is cold.
//! * [`cgroup`], [`procsum`]: what the kernel counts. [`zram`]: a swap device made for one run.
pub mod cgroup;
pub mod dense;
pub mod procsum;
pub mod slabs;
pub mod uffd;
pub mod zram;

/// An error with its causes, in one sentence for an operator. A cause whose text its effect repeats is told once.
pub fn explain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}
