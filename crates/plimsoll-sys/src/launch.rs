//! A program that is started again and again, or takes this process's place.
//!
//! Enters: path, arguments and environment, once. Leaves: a child, as a pidfd, each time it is started; that allocates no
//! memory. What must never happen: a child with a descriptor that it was not meant to have. Everything this workspace opens is
//! close-on-exec; the one exception is what the child gets as its descriptor [`HANDED`].
#![expect(unsafe_code, reason = "posix_spawn and execve take arrays of pointers to strings")]

use crate::ProcessId;
use crate::pidfd::{Pidfd, PidfdError};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus, waitid};
use std::ffi::{CString, OsStr, c_char};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr;

/// The number under which a child finds what it was handed.
pub const HANDED: RawFd = 3;
/// Where it is put before: the number is part of what is prepared.
const STAGED: RawFd = crate::slots::FIRST - 1;

/// Strings as the kernel takes them.
struct Strings {
    /// Owns what `pointers` points to.
    _strings: Vec<CString>,
    pointers: Vec<*mut c_char>,
}

impl Strings {
    fn new<'a>(strings: impl Iterator<Item = &'a OsStr>) -> io::Result<Self> {
        let strings = strings.map(|text| CString::new(text.as_bytes())).collect::<Result<Vec<_>, _>>()?;
        let ends = [ptr::null_mut()];
        let pointers = strings.iter().map(|text| text.as_ptr().cast_mut()).chain(ends).collect();
        Ok(Self { _strings: strings, pointers })
    }
}

/// A program with its arguments and environment.
pub struct Program {
    path: CString,
    arguments: Strings,
    environment: Strings,
    actions: libc::posix_spawn_file_actions_t,
}

impl Program {
    /// Prepares the program at `path`, which may be replaced by another between two starts.
    ///
    /// # Errors
    /// When a string holds a NUL, or there is no memory.
    pub fn new<'a>(
        path: &OsStr,
        arguments: impl Iterator<Item = &'a OsStr>,
        environment: impl Iterator<Item = &'a OsStr>,
    ) -> io::Result<Self> {
        let path = CString::new(path.as_bytes())?;
        let (arguments, environment) = (Strings::new(arguments)?, Strings::new(environment)?);
        let mut actions = MaybeUninit::uninit();
        // SAFETY: initialises what it is given, or fails.
        check(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        // SAFETY: it did not fail.
        let mut actions = unsafe { actions.assume_init() };
        // SAFETY: initialised above; copies two numbers.
        check(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut actions, STAGED, HANDED) })?;
        Ok(Self { path, arguments, environment, actions })
    }

    /// Starts it with `handed` as its descriptor [`HANDED`].
    ///
    /// # Errors
    /// What the kernel said.
    pub fn start(&self, handed: BorrowedFd<'_>) -> Result<Pidfd, StartError> {
        let staged = fcntl_dupfd_cloexec(handed, STAGED).map_err(|errno| StartError::Spawn(errno.into()))?;
        if staged.as_raw_fd() != STAGED {
            return Err(StartError::Spawn(Errno::EXIST.into()));
        }
        let mut number = 0;
        // SAFETY: path, arguments and environment are strings that end, the arrays end with null, and all of them live as long
        // as `self`; the actions were initialised; no attributes are given.
        let status = unsafe {
            libc::posix_spawn(
                &raw mut number,
                self.path.as_ptr(),
                &raw const self.actions,
                ptr::null(),
                self.arguments.pointers.as_ptr(),
                self.environment.pointers.as_ptr(),
            )
        };
        check(status).map_err(StartError::Spawn)?;
        let process = u32::try_from(number).ok().and_then(ProcessId::new);
        let process =
            process.ok_or_else(|| StartError::Spawn(io::Error::other("a child without a number")))?;
        // Nobody has reaped the child, so the number is its own.
        Ok(Pidfd::open(process)?)
    }

    /// Becomes it. Returns only if that fails. What catches signals here does not outlive this program, and by default
    /// signals end a process: [hold](hold_signals) them before.
    pub fn become_it(&self) -> io::Error {
        // SAFETY: as for `start`.
        unsafe {
            libc::execve(
                self.path.as_ptr(),
                self.arguments.pointers.as_ptr().cast(),
                self.environment.pointers.as_ptr().cast(),
            )
        };
        io::Error::last_os_error()
    }
}

/// Has signals wait from now on, also in a program that this process becomes, for a process with one thread.
///
/// # Errors
/// What the kernel said.
pub fn hold_signals() -> io::Result<()> {
    set_mask(libc::sigfillset)
}

/// Takes the signals that wait, and later ones.
///
/// # Errors
/// What the kernel said.
pub fn accept_signals() -> io::Result<()> {
    set_mask(libc::sigemptyset)
}

/// Has those signals wait with which `fill`, one of libc's two, fills a set.
fn set_mask(fill: unsafe extern "C" fn(*mut libc::sigset_t) -> libc::c_int) -> io::Result<()> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: both initialise what they are given, and cannot fail.
    let set = unsafe {
        fill(set.as_mut_ptr());
        set.assume_init()
    };
    // SAFETY: the set is initialised, and the one there was is not asked for.
    check(unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut()) })
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: initialised by `new`, and not used after this.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.actions) };
    }
}

/// A program could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is no child.
    #[error("the program cannot be started")]
    Spawn(#[source] io::Error),
    /// There is one, and it cannot be watched.
    #[error("the program was started and cannot be watched")]
    Watch(#[from] PidfdError),
}

fn check(status: i32) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(status)) }
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With an exit status.
    Status(i32),
    /// By a signal.
    Signal(i32),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exit status {status}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Waits for the end of a child of this process and reaps it.
///
/// # Errors
/// What the kernel said: it is no child, or was reaped.
pub fn reap(child: &Pidfd) -> io::Result<Ending> {
    loop {
        match waitid(WaitId::PidFd(child.as_fd()), WaitIdOptions::EXITED) {
            Ok(status) => return Ok(ending(status.as_ref())),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn ending(status: Option<&WaitIdStatus>) -> Ending {
    let exited = status.and_then(WaitIdStatus::exit_status).map(Ending::Status);
    let killed = status.and_then(WaitIdStatus::terminating_signal).map(Ending::Signal);
    exited.or(killed).unwrap_or(Ending::Status(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventfd::EventFd;

    fn shell(script: &str) -> Program {
        let arguments = ["sh", "-c", script].map(OsStr::new);
        Program::new(OsStr::new("/bin/sh"), arguments.into_iter(), [OsStr::new("WORD=7")].into_iter())
            .unwrap()
    }

    /// One test: what is staged has one number in a process.
    #[test]
    fn a_child_finds_what_it_was_handed_and_nothing_else_and_its_end_is_told() {
        let event = EventFd::new().unwrap();
        let program = shell("test -e /proc/self/fd/3 && test ! -e /proc/self/fd/63 && exit $WORD");
        for _ in 0..2 {
            let child = program.start(event.as_fd()).unwrap();
            assert_eq!(reap(&child).unwrap(), Ending::Status(7));
            assert!(reap(&child).is_err(), "reaped twice");
        }
        let child = shell("kill -9 $$").start(event.as_fd()).unwrap();
        assert_eq!(reap(&child).unwrap(), Ending::Signal(9));
        let missing =
            Program::new(OsStr::new("/nonexistent"), std::iter::empty(), std::iter::empty()).unwrap();
        assert!(matches!(missing.start(event.as_fd()), Err(StartError::Spawn(_))));
    }
}
