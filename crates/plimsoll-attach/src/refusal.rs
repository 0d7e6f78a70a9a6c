//! Why a machine is not attached: one enum, a sentence each with what was found and what to do.

use crate::control::ControlError;
use crate::qmp::QmpError;
use crate::ram::RamError;
use plimsoll_sys::procfs::ProcfsError;
use plimsoll_sys::{ProcessId, pidfd::PidfdError};
use std::io;
use std::path::PathBuf;

/// A process cannot be attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is none of that number.
    #[error("there is no process {0}: it has ended, or the number is wrong")]
    NoProcess(u32),
    /// The number is that of a thread.
    #[error("{thread} is a thread of {process}: attach that")]
    Thread {
        /// The thread.
        thread: ProcessId,
        /// Its process.
        process: ProcessId,
    },
    /// The process is the kernel's.
    #[error("{0} is a thread of the kernel and has no memory of its own")]
    KernelThread(ProcessId),
    /// The process is this one.
    #[error("{0} is plimsoll itself")]
    Ourselves(ProcessId),
    /// It runs something else.
    #[error(
        "{process} is no virtual machine that is known here: it runs {program:?}; known are QEMU, Cloud Hypervisor, \
         Firecracker, crosvm and plimsoll's own"
    )]
    NotVmm {
        /// The process.
        process: ProcessId,
        /// What it runs.
        program: PathBuf,
    },
    /// It is a device of a crosvm.
    #[error("{process} is a device process of the crosvm that is {main}: attach that")]
    DeviceProcess {
        /// The process.
        process: ProcessId,
        /// The machine's main process.
        main: ProcessId,
    },
    /// It has no RAM, and will not have any.
    #[error("{0} is a VMM without a machine (-machine none, or one that waits for its configuration)")]
    NoMachine(ProcessId),
    /// Its addresses are too short.
    #[error("{process} runs {program:?}, which is not a 64-bit program: only 64-bit VMMs can be attached")]
    NotSixtyFourBits {
        /// The process.
        process: ProcessId,
        /// What it runs.
        program: PathBuf,
    },
    /// A right is missing.
    #[error(
        "not permitted to read /proc/{}/{file}: run as the user of that process, or with {capability}",
        .process.get()
    )]
    NotPermitted {
        /// The process.
        process: ProcessId,
        /// What was read.
        file: &'static str,
        /// What would permit it.
        capability: &'static str,
    },
    /// The number belongs to another process now.
    #[error(
        "{process} is not the process it was: it started at tick {found} and not {expected}, the number was reused"
    )]
    Reused {
        /// The number.
        process: ProcessId,
        /// When the wanted one had started, in clock ticks since boot.
        expected: u64,
        /// When the present one did.
        found: u64,
    },
    /// It ended.
    #[error("{0} ended while it was looked at")]
    Ended(ProcessId),
    /// It does not hold still.
    #[error("{0} executed another program each time it was looked at: try again when it has settled")]
    Restless(ProcessId),
    /// RAM could not be told.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Another plimsoll has it.
    #[error("{process} is attached already, by {holder}: end that first")]
    AlreadyAttached {
        /// The process.
        process: ProcessId,
        /// Who has it, as far as the lock file says.
        holder: String,
    },
    /// The lock could not be taken.
    #[error("cannot lock {path:?}, which keeps two managers from one machine: check who owns its directory")]
    Lock {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// QMP failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The API failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The control socket is of another machine.
    #[error(
        "{socket:?} belongs to another machine: its {what} is {found}, and that of {process} is {expected}"
    )]
    WrongSocket {
        /// The socket.
        socket: PathBuf,
        /// The process.
        process: ProcessId,
        /// What differs.
        what: &'static str,
        /// What the process says.
        expected: String,
        /// What the socket says.
        found: String,
    },
    /// No machine has that name.
    #[error("no machine is called {name:?}; there are {known}")]
    NoSuchName {
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
    /// Several machines have that name.
    #[error("several machines are called {name:?}: {candidates}; give the process id")]
    SharedName {
        /// The name.
        name: String,
        /// Their process ids and kinds.
        candidates: String,
    },
    /// /proc cannot be listed.
    #[error("cannot list /proc: it must be mounted, and be this host's")]
    Listing(#[source] io::Error),
    /// /proc says something strange.
    #[error("cannot make sense of what /proc says about the process")]
    Procfs(#[source] ProcfsError),
    /// The process cannot be held.
    #[error("cannot hold the process")]
    Pidfd(#[source] PidfdError),
}

impl From<ProcfsError> for Refusal {
    fn from(error: ProcfsError) -> Self {
        match error {
            ProcfsError::NoProcess(process) => Self::Ended(process),
            ProcfsError::NotPermitted { process, file } => {
                Self::NotPermitted { process, file, capability: "CAP_SYS_PTRACE" }
            }
            error => Self::Procfs(error),
        }
    }
}
