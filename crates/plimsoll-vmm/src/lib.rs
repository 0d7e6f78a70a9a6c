//! A small virtual machine monitor, one process for each machine, whose memory is managed from birth.
//!
//! Enters: a [`VmmConfig`], a control socket, and a socket to a memory manager. Leaves: a machine that runs the
//! freestanding guest program of `plimsoll-guest`, under KVM or, where there is none, on threads of this process over
//! the same managed memory; and an [`ExitReport`]. There are no devices: a guest leaves through ports and shared pages.
//!
//! * [`config`]: what a machine shall be. [`mod@probe`]: what can run it here.
//! * `memory`: RAM, and for each of its `shards` an airlock and two userfaultfds. `elf`, `boot`: what memory holds at the start. [`pins`]: which pages must
//!   not leave.
//! * `kvm`, `inprocess`: the two ways to run a vCPU. `machine`: what both share. `signals`: how threads are interrupted.
//! * `balloon`: memory that the guest gives, and frames that are taken from it.
//! * `agent`: serves the manager, one for each shard. [`control`], [`report`]: talk to the starter, `inspection` to tools. `sandbox`: gives up rights.
//!   [`supervise`]: the main thread, once all that runs.
//!
//! # Order
//! Check the configuration; open KVM and the userfaultfds; map; load; prefault if asked; register; hand over and be
//! welcomed; become an unprivileged user; start the threads, which wait; install the filter on all of them; go. Before
//! registration pages are the kernel's, so loading needs no manager; after it nothing is opened any more.
//!
//! # Known holes
//! * After the manager's death the guest stalls at its next absent page until another manager takes over, which only a daemon
//!   has, or the machine is stopped.
//! * An in-process guest that waits for a page cannot be interrupted. It is abandoned, and its process must end.
//! * There is no `immediate_exit`: kicks are repeated every few milliseconds until the vCPU answers.
//! * Memory must lie below 512 GiB and touch at most 254 GiB-aligned gibibytes: the page tables' window is 1 MiB.

pub mod config;
pub mod control;
pub mod pins;
pub mod probe;
pub mod report;
pub mod supervise;

mod agent;
mod balloon;
mod boot;
mod elf;
mod gifts;
mod inprocess;
mod inspection;
mod kvm;
mod machine;
mod memory;
mod sandbox;
mod shards;
mod signals;
mod start;

use plimsoll_linux::uffd::wire;

pub use boot::BootError;
pub use config::{ConfigError, VmmConfig};
pub use elf::ElfError;
pub use kvm::KvmError;
pub use machine::Death;
pub use memory::{DiscardError, Memory, MemoryError};
pub use probe::{Accel, probe};
pub use sandbox::SandboxError;
pub use start::{Manager, run};
pub use supervise::ExitReport;

use std::io;
use thiserror::Error;

/// Why a machine could not be started or kept running.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmmError {
    /// The configuration is wrong.
    #[error("the machine cannot be")]
    Config(#[from] ConfigError),
    /// KVM was asked for and cannot be had.
    #[error("KVM cannot run the machine")]
    Kvm(#[from] KvmError),
    /// Memory cannot be set up or reached.
    #[error("the machine's memory cannot be set up")]
    Memory(#[from] MemoryError),
    /// The guest image cannot be started.
    #[error("the guest cannot be loaded")]
    Boot(#[from] BootError),
    /// A managed machine needs a manager.
    #[error("the machine is to be managed and no hand-over socket was given")]
    NoManager,
    /// The manager could not be spoken to.
    #[error("the hand-over failed")]
    Handover(#[source] io::Error),
    /// The manager refused, or does not speak the protocol.
    #[error("the hand-over failed")]
    Refused(#[from] wire::WireError),
    /// The manager has closed the socket before it said whether it takes the machine.
    #[error("the manager ended before it took the machine")]
    Dropped,
    /// The manager kept silent.
    #[error("the manager did not answer within {seconds} seconds")]
    Silent {
        /// How long it had.
        seconds: u64,
    },
    /// Rights could not be given up.
    #[error("the machine cannot be confined")]
    Sandbox(#[from] SandboxError),
    /// There can be no inspection socket.
    #[error("the inspection socket {} cannot be made", path.display())]
    Inspection {
        /// Where it should be.
        path: std::path::PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The starter could not be spoken to.
    #[error("the control socket failed")]
    Control(#[source] io::Error),
    /// A thread, signal handler or event descriptor could not be had.
    #[error("the machine's threads cannot be started")]
    Threads(#[source] io::Error),
}
