//! Linux back ends of plimsoll.
//!
//! * [`uffd`]: our own pager, for machines that hand their memory over. Its documentation is the protocol.
//! * [`slabs`]: the memory that stores live in.
//! * [`cgroup`], [`procsum`]: what the kernel counts. [`zram`]: a swap device made for one run.
pub mod cgroup;
pub mod procsum;
pub mod slabs;
pub mod uffd;
pub mod zram;
