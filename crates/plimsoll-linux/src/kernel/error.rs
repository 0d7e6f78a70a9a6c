//! Why a machine cannot be managed from outside (any more).
use plimsoll_sys::pagemap::PagemapError;
use plimsoll_sys::pidfd::PidfdError;
use plimsoll_sys::process_memory::Refusal;
use plimsoll_sys::procfs::ProcfsError;
use plimsoll_sys::{HvaRange, ProcessId};

use crate::zram::ZramError;

/// A machine could not be attached to, looked at or taken from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The process has ended, or executed another program: its memory is not there any more.
    #[error("{0} is gone: it has ended, or executed another program")]
    ProcessGone(ProcessId),
    /// A right is missing.
    #[error(
        "not permitted to manage the memory of {0}: process_madvise(2) on another process needs CAP_SYS_PTRACE and \
         CAP_SYS_NICE; run as root, or give these capabilities"
    )]
    Permission(ProcessId),
    /// A range of guest memory that is none.
    #[error("{range} cannot be guest memory: {why}")]
    BadRange {
        /// The range.
        range: HvaRange,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The kernel refuses advice to this process.
    #[error("the kernel refuses advice about the memory of {process}")]
    Refused {
        /// The process.
        process: ProcessId,
        /// What it said.
        #[source]
        refusal: Refusal,
    },
    /// Its page map cannot be read.
    #[error("cannot see where the pages of the machine are")]
    Pagemap(#[source] PagemapError),
    /// Its descriptor does not work.
    #[error("cannot see whether the machine's process runs")]
    Pidfd(#[source] PidfdError),
    /// Its statistics cannot be read.
    #[error("cannot see how often the machine faults")]
    Faults(#[source] ProcfsError),
    /// The host's swap cannot be seen.
    #[error("cannot see what swap the host has")]
    Swap(#[source] ZramError),
}

impl From<PagemapError> for KernelError {
    fn from(error: PagemapError) -> Self {
        match error {
            PagemapError::NoProcess(process) => Self::ProcessGone(process),
            PagemapError::NotPermitted(process) => Self::Permission(process),
            other => Self::Pagemap(other),
        }
    }
}

impl From<ProcfsError> for KernelError {
    fn from(error: ProcfsError) -> Self {
        match error {
            ProcfsError::NoProcess(process) => Self::ProcessGone(process),
            ProcfsError::NotPermitted { process, .. } => Self::Permission(process),
            other => Self::Faults(other),
        }
    }
}

impl KernelError {
    /// What a refusal that concerns the whole process means.
    pub(super) const fn refused(process: ProcessId, refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoProcess => Self::ProcessGone(process),
            Refusal::NotPermitted => Self::Permission(process),
            refusal => Self::Refused { process, refusal },
        }
    }
}
