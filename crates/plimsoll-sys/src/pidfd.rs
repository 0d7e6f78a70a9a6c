//! A hold on one process: a process id enters, and what leaves refers to that process and never to a later one of
//! the same number. Reaping is not done here; whoever started a child owns its exit status.

use crate::ProcessId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open, pidfd_send_signal};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::process::Child;
use std::time::{Duration, Instant};

pub use rustix::process::Signal;

/// A process could not be opened, signalled or asked for a descriptor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PidfdError {
    /// There is no such process.
    #[error("{0} does not exist (any more)")]
    NoProcess(ProcessId),
    /// The process exists and this one may not do that to it.
    #[error(
        "not permitted on {process}: run as its user, or with CAP_SYS_PTRACE (descriptors) or CAP_KILL (signals)"
    )]
    NotPermitted {
        /// The process asked about.
        process: ProcessId,
    },
    /// The process has no descriptor of that number.
    #[error("{process} has no file descriptor {number}")]
    NoDescriptor {
        /// The process asked.
        process: ProcessId,
        /// The number asked for.
        number: RawFd,
    },
    /// Something else failed.
    #[error("pidfd call on {process} failed")]
    Other {
        /// The process asked about.
        process: ProcessId,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl PidfdError {
    fn new(process: ProcessId, errno: Errno) -> Self {
        match errno {
            Errno::SRCH => Self::NoProcess(process),
            Errno::PERM | Errno::ACCESS => Self::NotPermitted { process },
            errno => Self::Other { process, source: errno.into() },
        }
    }
}

/// What [`Pidfd::wait_exit`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// The process is running.
    Alive,
    /// The process has ended; its parent may not have reaped it yet.
    Exited,
}

/// A descriptor that refers to one process. It becomes readable when the process ends.
#[derive(Debug)]
pub struct Pidfd {
    fd: OwnedFd,
    process: ProcessId,
}

/// What the kernel says of which process a descriptor is.
fn pid_of(fd: &OwnedFd) -> io::Result<Option<String>> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    Ok(text.lines().find_map(|line| line.strip_prefix("Pid:")).map(|id| id.trim().to_owned()))
}

impl Pidfd {
    /// Opens the process that has the id now.
    pub fn open(process: ProcessId) -> Result<Self, PidfdError> {
        let pid = process.to_rustix().ok_or(PidfdError::NoProcess(process))?;
        let fd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| PidfdError::new(process, errno))?;
        Ok(Self { fd, process })
    }

    /// Opens a child. Since the caller has not reaped it (`&mut` shows that nobody is doing so meanwhile), the number
    /// cannot have been reused: this cannot open the wrong process.
    pub fn from_child(child: &mut Child) -> Result<Self, PidfdError> {
        let process = ProcessId::new(child.id()).ok_or(PidfdError::Other {
            process: ProcessId::own(),
            source: io::Error::other("the child has an impossible process id"),
        })?;
        if child.try_wait().map_err(|source| PidfdError::Other { process, source })?.is_some() {
            return Err(PidfdError::NoProcess(process));
        }
        Self::open(process)
    }

    /// Takes over a descriptor that somebody else opened on `process`, after checking that it is one. The process may have
    /// ended since.
    ///
    /// # Errors
    /// [`PidfdError::Other`] where the descriptor is something else, or of another process.
    pub fn adopt(fd: OwnedFd, process: ProcessId) -> Result<Self, PidfdError> {
        let failed = |source| PidfdError::Other { process, source };
        let found = pid_of(&fd).map_err(failed)?;
        // A process that was reaped has no id any more.
        if found.as_deref() == Some("-1")
            || found.as_ref().and_then(|id| id.parse().ok()) == Some(process.get())
        {
            return Ok(Self { fd, process });
        }
        Err(failed(io::Error::other(format!("the descriptor is not one of that process: {found:?}"))))
    }

    /// Opens the same process once more: another open file, where a copy of the descriptor would be the same.
    ///
    /// # Errors
    /// [`PidfdError::NoProcess`] where it has ended.
    pub fn reopened(&self) -> Result<Self, PidfdError> {
        let again = Self::open(self.process)?;
        // It had its number still when that was opened.
        match self.wait_exit(Duration::ZERO)? {
            Liveness::Alive => Ok(again),
            Liveness::Exited => Err(PidfdError::NoProcess(self.process)),
        }
    }

    /// The id the process had when it was opened.
    pub const fn process(&self) -> ProcessId {
        self.process
    }

    /// Takes a copy of the process's descriptor `number`. Needs the right to ptrace the process.
    ///
    /// The number was named by another process: check what kind of file came before using it.
    pub fn getfd(&self, number: RawFd) -> Result<OwnedFd, PidfdError> {
        pidfd_getfd(&self.fd, number, PidfdGetfdFlags::empty()).map_err(|errno| match errno {
            Errno::BADF => PidfdError::NoDescriptor { process: self.process, number },
            errno => PidfdError::new(self.process, errno),
        })
    }

    /// Sends a signal.
    pub fn send_signal(&self, signal: Signal) -> Result<(), PidfdError> {
        pidfd_send_signal(&self.fd, signal).map_err(|errno| PidfdError::new(self.process, errno))
    }

    /// Waits until the process has ended, at most `limit` (for ever if that is beyond what the clock can count).
    pub fn wait_exit(&self, limit: Duration) -> Result<Liveness, PidfdError> {
        let deadline = Instant::now().checked_add(limit);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], timeout.as_ref()) {
                Ok(0) => return Ok(Liveness::Alive),
                Ok(_) => return Ok(Liveness::Exited),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(PidfdError::new(self.process, errno)),
            }
        }
    }

    /// True while the process runs; a zombie is not alive.
    pub fn is_alive(&self) -> Result<bool, PidfdError> {
        Ok(self.wait_exit(Duration::ZERO)? == Liveness::Alive)
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
