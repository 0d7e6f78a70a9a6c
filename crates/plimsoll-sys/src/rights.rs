//! What a process may do, made less for good: its capabilities, and the system calls it may make.
//!
//! Enters: what is to be left. Leaves: nothing; this thread, its later threads, and every program that any of them executes have no
//! more. What must never happen: a right gained. So sets are only ever cut, and "no new privileges" is set before anything else: without
//! it a program executed by root would have all of the bounding set again.
#![expect(unsafe_code, reason = "a filter is given to the kernel as a pointer to its instructions")]

use crate::process::{CapabilitySet, no_new_privileges};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySets, SecureComputingMode, capabilities, capability_is_in_bounding_set,
    remove_capability_from_bounding_set, secure_computing_mode, set_capabilities,
};
use std::io;

pub use libc::sock_filter as Instruction;

/// Rights could not be given up. Some may be gone and some not: the process must end.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed: rights cannot be given up")]
pub struct RightsError {
    /// The call.
    pub call: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

fn failed<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> RightsError {
    move |error| RightsError { call, source: error.into() }
}

/// Gives up every capability that is not in `kept`, and the use of those not in `used` until a program is executed. Threads started
/// later inherit it; call it first.
///
/// A program executed by root has what is kept; one executed by another user, what was ambient and is kept. Where this process may not
/// cut its bounding set, "no new privileges" does the same for it: a program gets nothing that this process has not.
///
/// # Errors
/// [`RightsError`].
pub fn keep_capabilities(used: CapabilitySet, kept: CapabilitySet) -> Result<(), RightsError> {
    no_new_privileges().map_err(failed("prctl(PR_SET_NO_NEW_PRIVS)"))?;
    for capability in (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        match capability_is_in_bounding_set(capability) {
            Ok(true) if !kept.contains(capability) => match remove_capability_from_bounding_set(capability) {
                Ok(()) | Err(Errno::PERM) => {}
                Err(errno) => return Err(failed("prctl(PR_CAPBSET_DROP)")(errno)),
            },
            Ok(_) => {}
            // The kernel knows no more of them.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(failed("prctl(PR_CAPBSET_READ)")(errno)),
        }
    }
    let sets = capabilities(None).map_err(failed("capget"))?;
    let cut = CapabilitySets {
        effective: sets.effective & used & kept,
        permitted: sets.permitted & kept,
        // What leaves this set or the one above leaves the ambient set with it.
        inheritable: sets.inheritable & kept,
    };
    set_capabilities(None, cut).map_err(failed("capset"))
}

/// True when this thread is under a filter, whoever installed it.
///
/// # Errors
/// [`RightsError`] on a kernel without filters.
pub fn is_filtered() -> Result<bool, RightsError> {
    let mode = secure_computing_mode().map_err(failed("prctl(PR_GET_SECCOMP)"))?;
    Ok(mode == SecureComputingMode::Filter)
}

/// Has the kernel ask `program` about each system call of every thread of this process from now on, and of whatever they start or
/// execute. What it does not allow is told to the kernel's log.
///
/// # Errors
/// [`RightsError`]: a program that is none, a kernel without filters, or so many filters that it takes no more.
pub fn filter_calls(program: &[Instruction]) -> Result<(), RightsError> {
    const CALL: &str = "seccomp(SECCOMP_SET_MODE_FILTER)";
    no_new_privileges().map_err(failed("prctl(PR_SET_NO_NEW_PRIVS)"))?;
    let too_long = |_| RightsError { call: CALL, source: Errno::INVAL.into() };
    let len = u16::try_from(program.len()).map_err(too_long)?;
    let flags = libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_TSYNC;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `len` instructions from where they are, which is borrowed until it returns, writes nothing there, and
    // refuses a program that is none.
    let status =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    match status {
        0 => Ok(()),
        -1 => Err(failed(CALL)(io::Error::last_os_error())),
        thread => {
            Err(failed(CALL)(io::Error::other(format!("thread {thread} is under a filter of its own"))))
        }
    }
}
