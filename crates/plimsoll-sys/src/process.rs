//! What a process gives up about itself: user, privileges, life without its parent. Rights go, none are gained; a
//! change that is only half made is an error after which the process must end.
#![expect(
    unsafe_code,
    reason = "setgroups, setresgid and setresuid for all threads exist in libc only; inherited descriptors are numbers; \
              what a child does before its program is for its parent to vouch for"
)]

use crate::{ProcessId, procfs};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::DumpableBehavior;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

pub use rustix::process::Signal;
pub use rustix::thread::CapabilitySet;

/// A user id that is not root's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UserId(u32);

/// A group id that is not root's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupId(u32);

macro_rules! unprivileged_id {
    ($name:ident) => {
        impl $name {
            /// The id of that number, or `None` for root and for the number that means "no change".
            pub const fn new(number: u32) -> Option<Self> {
                if number == 0 || number == u32::MAX { None } else { Some(Self(number)) }
            }

            /// The number.
            pub const fn get(self) -> u32 {
                self.0
            }
        }
    };
}
unprivileged_id!(UserId);
unprivileged_id!(GroupId);

/// Privileges could not be dropped. Some may be gone and some not: the process must end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DropError {
    /// A call failed.
    #[error("{call} failed: dropping privileges needs CAP_SETUID and CAP_SETGID")]
    Call {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The calls succeeded, and yet a thread has other ids than asked for.
    #[error("thread {thread} still has user ids {uids:?} and group ids {gids:?}")]
    ThreadKeeps {
        /// The thread's directory name in /proc/self/task.
        thread: String,
        /// Its user ids.
        uids: [u32; 4],
        /// Its group ids.
        gids: [u32; 4],
    },
    /// The calls succeeded, and yet capabilities are left (a secure bit keeps them).
    #[error("capabilities are left after the change of user: {0:?}")]
    CapabilitiesLeft(CapabilitySet),
    /// Whether it worked could not be found out.
    #[error("cannot verify in /proc/self/task that privileges are gone")]
    Verify(#[source] io::Error),
    /// What /proc says about a thread cannot be understood.
    #[error("cannot verify in /proc/self/task that privileges are gone")]
    VerifyIds(#[from] procfs::ProcfsError),
}

/// Becomes another user for good, in all threads, without supplementary groups and capabilities, and verifies it.
pub fn drop_privileges(user: UserId, group: GroupId) -> Result<(), DropError> {
    let call = |call, status: i32| match status {
        0 => Ok(()),
        _ => Err(DropError::Call { call, source: io::Error::last_os_error() }),
    };
    // Groups first: without the user's rights they could not be given up any more.
    // SAFETY: no groups, so nothing is read at the pointer. libc applies each of these to all threads.
    call("setgroups", unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: takes numbers only.
    call("setresgid", unsafe { libc::setresgid(group.0, group.0, group.0) })?;
    // SAFETY: takes numbers only.
    call("setresuid", unsafe { libc::setresuid(user.0, user.0, user.0) })?;
    verify_dropped(user, group)
}

fn verify_dropped(user: UserId, group: GroupId) -> Result<(), DropError> {
    for thread in std::fs::read_dir("/proc/self/task").map_err(DropError::Verify)? {
        let thread = thread.map_err(DropError::Verify)?;
        let text = match std::fs::read(thread.path().join("status")) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            // The thread has ended since the directory was read.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(DropError::Verify(error)),
        };
        let (uids, gids) = procfs::parse_ids(&text)?;
        if uids != [user.0; 4] || gids != [group.0; 4] {
            let thread = thread.file_name().to_string_lossy().into_owned();
            return Err(DropError::ThreadKeeps { thread, uids, gids });
        }
    }
    let sets = rustix::thread::capabilities(None).map_err(|errno| DropError::Verify(errno.into()))?;
    let left = sets.effective | sets.permitted;
    if left.is_empty() { Ok(()) } else { Err(DropError::CapabilitiesLeft(left)) }
}

/// Has the kernel write no core dump of this process, and let no other of its user read its memory or take its descriptors: only
/// those that may trace any process can from now on, until it executes another program.
///
/// # Errors
/// What the kernel says.
pub fn refuse_dumps() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// A process could not be tied to its parent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParentError {
    /// The parent ended before the tie was made; the signal will never come.
    #[error("the parent, {expected}, is gone already")]
    Gone {
        /// Who should have been the parent.
        expected: ProcessId,
    },
    /// The kernel refused.
    #[error("cannot ask for a signal at the parent's death")]
    Kernel(#[source] io::Error),
}

/// Asks for `signal` when the parent dies, and checks that it has not done so already.
///
/// Call it **after** [`drop_privileges`]: a change of user clears the request. "Parent" is the *thread* that started
/// this process: if a parent starts children from a short-lived thread, the signal comes when that thread ends.
pub fn set_parent_death_signal(expected: ProcessId, signal: Signal) -> Result<(), ParentError> {
    rustix::process::set_parent_process_death_signal(Some(signal))
        .map_err(|errno| ParentError::Kernel(errno.into()))?;
    // Only now: a parent that died before the request was made sends nothing.
    if ProcessId::parent() == Some(expected) { Ok(()) } else { Err(ParentError::Gone { expected }) }
}

/// Has whatever `command` starts get `signal` when the thread that starts it ends, if it does not itself ask otherwise.
///
/// For programs that know nothing of it; what [`set_parent_death_signal`] says about threads holds here too. A program that
/// changes its user, or is one that runs as its owner (set-user-id), loses the tie.
pub fn end_with_parent(command: &mut Command, signal: Signal) {
    let expected = ProcessId::own();
    let tie = move || {
        rustix::process::set_parent_process_death_signal(Some(signal))?;
        let is_there = ProcessId::parent() == Some(expected);
        if is_there { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    };
    // SAFETY: between fork and exec only calls that are safe in a signal handler may be made, and no memory may be
    // allocated. The closure makes two system calls and compares numbers; it captures two numbers, and both of its errors
    // are made of a number.
    unsafe { command.pre_exec(tie) };
}

/// Makes sure that no program this thread executes gains rights. Threads started later inherit it; call it first.
pub fn no_new_privileges() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Lets a descriptor live on in the programs this process executes. Set it as late as possible: every program that
/// any thread starts from now on gets it.
pub fn make_inheritable(descriptor: impl AsFd) -> io::Result<()> {
    Ok(fcntl_setfd(descriptor, FdFlags::empty())?)
}

/// A descriptor that the starter of this process left open for it, by number: a close-on-exec copy of it. The
/// original stays open, so nothing here can close what somebody else in this process owns.
pub fn adopt_inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the number is not negative, and is borrowed for this one call: the kernel refuses one that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(fcntl_dupfd_cloexec(borrowed, 3)?)
}

/// What this thread may do now, for example
/// `effective_capabilities()?.contains(CapabilitySet::SYS_PTRACE)`.
pub fn effective_capabilities() -> io::Result<CapabilitySet> {
    Ok(rustix::thread::capabilities(None)?.effective)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_no_change_are_not_ids_to_drop_to() {
        assert_eq!(UserId::new(0), None);
        assert_eq!(GroupId::new(u32::MAX), None);
        assert_eq!(UserId::new(65534).map(UserId::get), Some(65534));
    }
}
