//! The hypervisor under QEMU. Each test boots its own.
#![expect(clippy::unwrap_used, reason = "what helpers of tests unwrap is what the tests are about")]
mod boards;
mod boot;
mod calls;
mod common;
mod device;
mod direct;
mod guard;
mod overcommit;
mod paging;
mod policy;
