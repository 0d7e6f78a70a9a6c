//! That there is one manager: a record lock on the directory's lock file, which the kernel ends with the process that has it.
//!
//! Enters: that file; whether this manager's keeper lives. Leaves: this manager as the only one, or as none. What must never happen: two
//! managers that take over the same machines.
//!
//! A keeper starts a manager when the one before has ended. But one whose keeper died goes on alone, and the next keeper cannot know which process
//! that is: the one that died may have had no time to tell anybody. So each manager takes the lock before it takes anything over, and ends whoever has
//! it, unless its own keeper is gone; then it is the one that is too late. Of two that are started by a keeper that dies and by the one
//! after it, whoever comes second sees the other, and only the second keeper's has a keeper.
use plimsoll_sys::ProcessId;
use plimsoll_sys::pidfd::{Liveness, Pidfd, PidfdError, Signal};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;
use rustix::process::{Flock, FlockType, fcntl_getlk};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use thiserror::Error;

/// How long an earlier manager may take to end once it is killed: what it has mapped is freed meanwhile.
const END_MAX: Duration = Duration::from_secs(60);

/// This manager is not the only one.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SoleError {
    /// It came too late.
    #[error("another manager goes on with these machines, and the keeper of this one is gone")]
    Late,
    /// Another one does not go.
    #[error("an earlier manager, {process}, does not end")]
    Stays {
        /// Its process.
        process: ProcessId,
    },
    /// Whoever has the lock is not to be found.
    #[error("the lock of the machines' manager cannot be had")]
    Lock(#[source] io::Error),
}

/// Takes the lock, which this process keeps until it ends or closes any descriptor of that file, and ends who had it.
///
/// # Errors
/// [`SoleError`]; nothing may be taken over then.
pub fn claim(lock: BorrowedFd<'_>, is_alone: impl Fn() -> bool) -> Result<(), SoleError> {
    loop {
        match fcntl_lock(lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::AGAIN | Errno::ACCESS) => {}
            Err(errno) => return Err(SoleError::Lock(errno.into())),
        }
        if is_alone() {
            return Err(SoleError::Late);
        }
        let Some(process) = holder(lock)? else { continue };
        let earlier = match Pidfd::open(process) {
            Ok(earlier) => earlier,
            Err(PidfdError::NoProcess(_)) => continue,
            Err(error) => return Err(SoleError::Lock(io::Error::other(error))),
        };
        // It had the lock still when that was opened: the number is no other's.
        if holder(lock)? != Some(process) {
            continue;
        }
        let _ = earlier.send_signal(Signal::KILL);
        let ended = earlier.wait_exit(END_MAX).map_err(|error| SoleError::Lock(io::Error::other(error)))?;
        if ended == Liveness::Alive {
            return Err(SoleError::Stays { process });
        }
    }
}

/// Who has the lock, if anybody.
fn holder(lock: BorrowedFd<'_>) -> Result<Option<ProcessId>, SoleError> {
    let found = fcntl_getlk(lock, &Flock::from(FlockType::WriteLock));
    let Some(found) = found.map_err(|errno| SoleError::Lock(errno.into()))? else { return Ok(None) };
    let unseen = || SoleError::Lock(io::Error::other("whoever has it cannot be seen from here"));
    found.pid.map(|pid| Some(pid.into())).ok_or_else(unseen)
}
