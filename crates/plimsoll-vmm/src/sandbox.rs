//! What a running machine may still ask the kernel for.
//!
//! Enters: a process that is set up: everything opened, mapped, registered, every thread started. Leaves: the same
//! process as an unprivileged user, whose every thread may make the system calls listed here and is killed, with its
//! process, for any other. A guest that breaks out of KVM or of the guest program finds no file to open, no program to
//! start, no memory to make executable, and no other process to reach.
//!
//! Order: user and group first (needs rights), then the signal at the parent's death (a change of user clears it), then
//! "no new privileges", then the filter, on all threads at once.
use crate::config::{Sandbox, VmmConfig};
use crate::probe::Accel;
use plimsoll_sys::ProcessId;
use plimsoll_sys::process::{
    self, DropError, GroupId, ParentError, Signal, UserId, drop_privileges, set_parent_death_signal,
};
use rustix::process::geteuid;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use thiserror::Error;

/// The user and group without rights on every Linux.
const NOBODY: u32 = 65534;

/// `_IO(0xae, 0x80)`: run the guest.
const KVM_RUN: u32 = 0xae80;
/// `_IOR(0xae, 0x81, struct kvm_regs)`: where the guest was when it died.
const KVM_GET_REGS: u32 = 0x8090_ae81;
/// `_IOR(0xae, 0x83, struct kvm_sregs)`: what it touched when it died.
const KVM_GET_SREGS: u32 = 0x8138_ae83;
/// `_IOWR(0xaa, 5, struct uffdio_move)`: the agent's work.
const UFFDIO_MOVE: u32 = 0xc028_aa05;
/// `_IOR(0xaa, 2, struct uffdio_range)`: the agent's, for those whom a move should have woken.
const UFFDIO_WAKE: u32 = 0x8010_aa02;
/// `_IOWR(0xaa, 0, struct uffdio_register)`: the agent's, for a block that the manager watches again.
const UFFDIO_REGISTER: u32 = 0xc020_aa00;
/// `_IOR(0xaa, 1, struct uffdio_range)`: the agent's, for a block left to the kernel; and at the end, before unmapping.
const UFFDIO_UNREGISTER: u32 = 0x8010_aa01;

/// Rights could not be given up. The process must end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// Another user or group could not be adopted.
    #[error("cannot become an unprivileged user")]
    User(#[from] DropError),
    /// The parent's death would go unnoticed.
    #[error("cannot tie the machine's life to its parent's")]
    Parent(#[from] ParentError),
    /// Set-user-id programs would still raise rights.
    #[error("cannot give up new privileges")]
    NoNewPrivileges(#[source] io::Error),
    /// The filter's description is wrong; a mistake of this module.
    #[error("the seccomp filter cannot be built")]
    Build(#[from] BackendError),
    /// The kernel refuses the filter.
    #[error("the seccomp filter cannot be installed: it needs CONFIG_SECCOMP_FILTER")]
    Install(#[from] seccompiler::Error),
}

/// Becomes an unprivileged user that dies with `parent`. All threads follow; call it before others are started all the
/// same, so that none ever runs with more.
///
/// # Errors
/// [`SandboxError`]: the process must end.
pub(crate) fn drop_rights(sandbox: Sandbox, parent: Option<ProcessId>) -> Result<(), SandboxError> {
    let (uid, gid) = match sandbox {
        Sandbox::Off => return Ok(()),
        Sandbox::Nobody => (NOBODY, NOBODY),
        Sandbox::User { uid, gid } => (uid, gid),
    };
    // Only root can change its user; anybody else has nothing to give up.
    if geteuid().is_root()
        && let (Some(user), Some(group)) = (UserId::new(uid), GroupId::new(gid))
    {
        drop_privileges(user, group)?;
    }
    if let Some(parent) = parent {
        set_parent_death_signal(parent, Signal::KILL)?;
    }
    process::no_new_privileges().map_err(SandboxError::NoNewPrivileges)
}

/// Installs the filter on all threads.
///
/// # Errors
/// [`SandboxError`]: the process must end.
pub(crate) fn restrict(config: &VmmConfig, accel: &Accel) -> Result<(), SandboxError> {
    if config.sandbox == Sandbox::Off {
        return Ok(());
    }
    Ok(seccompiler::apply_filter_all_threads(&filter(config.inspect.as_deref(), accel)?)?)
}

fn filter(inspect: Option<&Path>, accel: &Accel) -> Result<BpfProgram, BackendError> {
    let mut ioctls = vec![UFFDIO_MOVE, UFFDIO_WAKE, UFFDIO_REGISTER, UFFDIO_UNREGISTER];
    if let Accel::Kvm { .. } = accel {
        ioctls.extend([KVM_RUN, KVM_GET_REGS, KVM_GET_SREGS]);
    }
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        free_calls().into_iter().map(|call| (call, vec![])).collect();
    if inspect.is_some() {
        // Clients of the inspection socket, which was made before.
        rules.insert(libc::SYS_accept4, vec![]);
    }
    rules.insert(libc::SYS_ioctl, one_of(1, ioctls.into_iter().map(u64::from))?);
    // DONTNEED: discards of the guest, slots given back, and the allocator's trimming. POPULATE_WRITE: the agent's
    // request of that name. MERGEABLE, UNMERGEABLE: the starter's command.
    let advice =
        [libc::MADV_DONTNEED, libc::MADV_POPULATE_WRITE, libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE];
    rules
        .insert(libc::SYS_madvise, one_of(2, advice.into_iter().map(|code| u64::from(code.unsigned_abs())))?);
    // A build with debug assertions looks whether a descriptor is open before it closes it.
    rules.insert(libc::SYS_fcntl, one_of(1, [u64::from(libc::F_GETFD.unsigned_abs())].into_iter())?);
    // Kicking a vCPU of this process: other machines run as the same user.
    rules.insert(libc::SYS_tgkill, one_of(0, [u64::from(std::process::id())].into_iter())?);
    // The allocator's, and nothing executable.
    let not_executable = || -> Result<Vec<SeccompRule>, BackendError> {
        let mask = SeccompCmpOp::MaskedEq(u64::from(libc::PROT_EXEC.unsigned_abs()));
        let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, mask, 0)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    };
    rules.insert(libc::SYS_mmap, not_executable()?);
    rules.insert(libc::SYS_mprotect, not_executable()?);
    let filter =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    filter.try_into()
}

/// A rule for each value that the argument may have.
fn one_of(argument: u8, values: impl Iterator<Item = u64>) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |value| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
        SeccompRule::new(vec![condition])
    };
    values.map(rule).collect()
}

/// Calls whose arguments are not looked at, each with the reason it is needed.
fn free_calls() -> Vec<i64> {
    vec![
        // Control socket, hand-over socket.
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_shutdown,
        // The main thread waits for the control socket and for vCPUs that end; the agent looks whether its socket is open.
        libc::SYS_poll,
        libc::SYS_ppoll,
        // The event descriptor between them; a panic's message.
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_writev,
        // The agent reads its own page map, opened before.
        libc::SYS_pread64,
        // It reads the last events of memory that was given back.
        libc::SYS_preadv2,
        // Mutexes, condition variables, joining.
        libc::SYS_futex,
        // Sleeping vCPUs and waiting kicks.
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_sched_yield,
        // Time, where the kernel offers it without a call it is not used.
        libc::SYS_clock_gettime,
        // Kicking a vCPU (with tgkill, see above); its handler's return.
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_rt_sigreturn,
        // A wait that was stopped and continued by job control.
        libc::SYS_restart_syscall,
        // The end of a thread: its signal stack, its mask, its memory; a panic that aborts.
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigaction,
        libc::SYS_sigaltstack,
        libc::SYS_exit,
        libc::SYS_exit_group,
        // The allocator, and the end of a mapping or descriptor.
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_close,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{kvm_regs, kvm_sregs};

    /// `_IOC` of `asm-generic/ioctl.h`.
    fn ioc(direction: u32, kind: u32, number: u32, size: usize) -> u32 {
        direction << 30 | u32::try_from(size).unwrap() << 16 | kind << 8 | number
    }

    #[test]
    fn request_numbers_are_those_of_the_structures() {
        assert_eq!(KVM_RUN, ioc(0, 0xae, 0x80, 0));
        assert_eq!(KVM_GET_REGS, ioc(2, 0xae, 0x81, size_of::<kvm_regs>()));
        assert_eq!(KVM_GET_SREGS, ioc(2, 0xae, 0x83, size_of::<kvm_sregs>()));
        assert_eq!(UFFDIO_MOVE, ioc(3, 0xaa, 0x05, 5 * 8));
        assert_eq!(UFFDIO_WAKE, ioc(2, 0xaa, 0x02, 2 * 8));
        assert_eq!(UFFDIO_REGISTER, ioc(3, 0xaa, 0x00, 4 * 8));
        assert_eq!(UFFDIO_UNREGISTER, ioc(2, 0xaa, 0x01, 2 * 8));
    }

    #[test]
    fn both_filters_compile_and_differ() {
        let in_process = filter(None, &Accel::InProcess { because: String::new() }).unwrap();
        let kvm =
            filter(None, &Accel::Kvm { paging: crate::probe::Paging::Ept, module: String::new() }).unwrap();
        assert!(kvm.len() > in_process.len());
    }
}
