//! The table: which capabilities and which system calls the daemon's processes need, and for what.
//!
//! Enters: nothing. Leaves: the lists from which filters are made, with which the unit is compared, and which docs/rights.md prints. What
//! must never happen: a call listed without a reason, or a second list. A call belongs to the group that needs it; of two groups
//! that name one, the looser counts.
use plimsoll_sys::process::CapabilitySet;
use std::fmt::Write as _;

/// A capability, and what for.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Its name.
    pub name: &'static str,
    /// The bit.
    pub bit: CapabilitySet,
    /// What it is needed for.
    pub why: &'static str,
}

/// What is left once the daemon has begun: a manager uses it, the keeper has it for its managers.
pub const KEPT: &[Capability] = &[
    Capability {
        name: "CAP_DAC_OVERRIDE",
        bit: CapabilitySet::DAC_OVERRIDE,
        why: "sockets, page maps and control groups of VMMs that run as other users",
    },
    Capability {
        name: "CAP_SYS_PTRACE",
        bit: CapabilitySet::SYS_PTRACE,
        why: "to read other processes' mappings and page maps, and a machine's airlock",
    },
    Capability {
        name: "CAP_SYS_NICE",
        bit: CapabilitySet::SYS_NICE,
        why: "process_madvise(2) on a machine that is attached to, and to be ahead of guests while they have no manager",
    },
    Capability {
        name: "CAP_CHOWN",
        bit: CapabilitySet::CHOWN,
        why: "to give the API's socket to the group that may use it",
    },
];

/// What is used before that, and gone after. Without it stores lie in memfds, which cost more to fill, and the bounding set stays as it is.
pub const BEGINNING: &[Capability] = &[
    Capability {
        name: "CAP_SYS_ADMIN",
        bit: CapabilitySet::SYS_ADMIN,
        why: "to mount the tmpfs in which stores lie, which nobody else sees",
    },
    Capability {
        name: "CAP_SETPCAP",
        bit: CapabilitySet::SETPCAP,
        why: "to take the others out of the bounding set",
    },
];

/// Those capabilities as the kernel's set.
pub fn set(capabilities: &[Capability]) -> CapabilitySet {
    capabilities.iter().fold(none(), |set, capability| set | capability.bit)
}

/// No capability.
pub const fn none() -> CapabilitySet {
    CapabilitySet::empty()
}

/// Who makes a group's calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Everybody.
    All,
    /// Whoever starts programs: the keeper, and a manager on a host with virsh.
    Starters,
    /// The keeper, and programs at their start.
    Keeper,
}

impl Whose {
    const fn managers(self) -> &'static str {
        match self {
            Self::All => "yes",
            Self::Starters => "with virsh",
            Self::Keeper => "no",
        }
    }
}

/// System calls that are needed for one thing.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// What for.
    pub why: &'static str,
    /// By whom.
    pub whose: Whose,
    /// Which.
    pub calls: &'static [Call],
}

/// A system call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its constant's name in libc.
    constant: &'static str,
    /// Its number.
    pub number: i64,
    /// With which arguments.
    pub only: Only,
}

impl Call {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.constant.strip_prefix("SYS_").unwrap_or(self.constant)
    }
}

/// Arguments with which a call may be made. Each is looked at as the kernel takes it, 32 bits.
#[derive(Clone, Copy, Debug)]
pub enum Only {
    /// Any.
    Any,
    /// One argument is one of these.
    These {
        /// Counted from 0.
        argument: u8,
        /// Name and value.
        values: &'static [(&'static str, u32)],
    },
    /// One argument has none of some bits.
    Without {
        /// Counted from 0.
        argument: u8,
        /// Their name and value.
        bits: (&'static str, u32),
    },
}

macro_rules! calls {
    ($($constant:ident $(($only:expr))?),+ $(,)?) => {
        &[$(Call { constant: stringify!($constant), number: libc::$constant, only: calls!(@only $($only)?) }),+]
    };
    (@only) => { Only::Any };
    (@only $only:expr) => { $only };
}

/// `named![NAME, ...]`: constants of libc that the kernel takes as 32 bits, with their names.
macro_rules! named {
    ($($constant:ident),+ $(,)?) => { &[$((stringify!($constant), libc::$constant.cast_unsigned())),+] };
}

const UNIX: Only = Only::These { argument: 0, values: named![AF_UNIX] };
/// TCP is for the API over TLS only, which connects to nobody.
const SOCKETS: Only = Only::These { argument: 0, values: named![AF_UNIX, AF_INET, AF_INET6] };
const NOT_EXECUTABLE: Only =
    Only::Without { argument: 2, bits: ("PROT_EXEC", libc::PROT_EXEC.cast_unsigned()) };

/// What a manager asks of descriptors. Numbers as the headers have them; `plimsoll-sys` asserts those that it makes itself.
const REQUESTS: Only = Only::These {
    argument: 1,
    values: &[
        ("UFFDIO_REGISTER", 0xc020_aa00),
        ("UFFDIO_UNREGISTER", 0x8010_aa01),
        ("UFFDIO_WAKE", 0x8010_aa02),
        ("UFFDIO_COPY", 0xc028_aa03),
        ("UFFDIO_ZEROPAGE", 0xc020_aa04),
        ("UFFDIO_WRITEPROTECT", 0xc018_aa06),
        ("UFFDIO_CONTINUE", 0xc020_aa07),
        ("UFFDIO_POISON", 0xc020_aa08),
        ("PAGEMAP_SCAN", 0xc060_6610),
        ("FIONBIO", 0x5421),
        ("FIOCLEX", 0x5451),
        ("TCGETS", 0x5401),
        ("TIOCGWINSZ", 0x5413),
    ],
};

/// A ring that was made before is given the file that it reads, and allows nothing else itself.
const RING: Only = Only::These {
    argument: 1,
    values: &[("IORING_REGISTER_FILES_UPDATE", plimsoll_sys::ring::FILES_UPDATE as u32)],
};

const PRCTL: Only = Only::These {
    argument: 0,
    values: named![
        PR_SET_NAME,
        PR_GET_NAME,
        PR_SET_VMA,
        PR_SET_PDEATHSIG,
        PR_SET_NO_NEW_PRIVS,
        PR_GET_NO_NEW_PRIVS,
        PR_GET_SECUREBITS,
        PR_GET_DUMPABLE,
        PR_SET_DUMPABLE,
        PR_CAP_AMBIENT,
        PR_GET_SECCOMP,
        PR_CAPBSET_READ,
        PR_CAPBSET_DROP,
    ],
};

/// A process's threads, each by its number: these are not known before they are started.
const PROCESSES: Only = Only::These { argument: 0, values: &[("PRIO_PROCESS", libc::PRIO_PROCESS)] };
/// Nobody is put ahead of anybody by this.
const TO_USUAL: Only = Only::These { argument: 2, values: &[("to 0", 0)] };

/// Whoever wants another thread moved has to ask that one.
const ITSELF: Only = Only::These { argument: 0, values: &[("the thread itself", 0)] };
const PREFERENCES: Only = Only::These { argument: 0, values: named![MPOL_DEFAULT, MPOL_PREFERRED] };

/// The table.
pub const GROUPS: &[Group] = &[
    Group {
        why: "memory of its own, none of it executable",
        whose: Whose::All,
        calls: calls![
            SYS_mmap(NOT_EXECUTABLE),
            SYS_mprotect(NOT_EXECUTABLE),
            SYS_munmap,
            SYS_mremap,
            SYS_brk,
            SYS_madvise,
            SYS_mlock,
            SYS_munlock,
            SYS_memfd_create,
            SYS_memfd_secret,
        ],
    },
    Group {
        why: "machines' memory: from outside, and through descriptors",
        whose: Whose::All,
        calls: calls![SYS_process_madvise, SYS_process_vm_readv, SYS_ioctl(REQUESTS)],
    },
    Group {
        why: "threads",
        whose: Whose::All,
        calls: calls![
            SYS_clone3,
            SYS_clone,
            SYS_futex,
            SYS_set_robust_list,
            SYS_rseq,
            SYS_sched_yield,
            SYS_sched_getaffinity,
            SYS_prctl(PRCTL),
            SYS_gettid,
            SYS_exit,
            SYS_exit_group,
        ],
    },
    Group {
        why: "on a host of several NUMA nodes, the one that a pager works for",
        whose: Whose::All,
        calls: calls![SYS_sched_setaffinity(ITSELF), SYS_get_mempolicy, SYS_set_mempolicy(PREFERENCES)],
    },
    Group {
        why: "to go back from being ahead of guests, once these are served",
        whose: Whose::All,
        calls: calls![SYS_getpriority(PROCESSES), SYS_setpriority(TO_USUAL)],
    },
    Group {
        why: "signals",
        whose: Whose::All,
        calls: calls![
            SYS_rt_sigaction,
            SYS_rt_sigprocmask,
            SYS_rt_sigreturn,
            SYS_sigaltstack,
            SYS_tgkill,
            SYS_restart_syscall,
        ],
    },
    Group {
        why: "time",
        whose: Whose::All,
        calls: calls![
            SYS_clock_gettime,
            SYS_clock_getres,
            SYS_clock_nanosleep,
            SYS_nanosleep,
            SYS_gettimeofday,
            SYS_time,
        ],
    },
    Group {
        why: "waiting",
        whose: Whose::All,
        calls: calls![
            SYS_poll,
            SYS_ppoll,
            SYS_epoll_create1,
            SYS_epoll_ctl,
            SYS_epoll_wait,
            SYS_epoll_pwait,
            SYS_epoll_pwait2,
            SYS_eventfd2,
        ],
    },
    Group {
        why: "files: settings, what was said, /proc, /sys, the disk tier",
        whose: Whose::All,
        calls: calls![
            SYS_openat,
            SYS_open,
            SYS_read,
            SYS_readv,
            SYS_pread64,
            SYS_preadv,
            SYS_preadv2,
            SYS_write,
            SYS_writev,
            SYS_pwrite64,
            SYS_pwritev,
            SYS_pwritev2,
            SYS_lseek,
            SYS_close,
            SYS_close_range,
            SYS_fstat,
            SYS_stat,
            SYS_lstat,
            SYS_newfstatat,
            SYS_statx,
            SYS_statfs,
            SYS_fstatfs,
            SYS_access,
            SYS_faccessat,
            SYS_faccessat2,
            SYS_readlink,
            SYS_readlinkat,
            SYS_getdents64,
            SYS_fcntl,
            SYS_flock,
            SYS_ftruncate,
            SYS_fallocate,
            SYS_fadvise64,
            SYS_fsync,
            SYS_fdatasync,
            SYS_rename,
            SYS_renameat,
            SYS_renameat2,
            SYS_unlink,
            SYS_unlinkat,
            SYS_mkdir,
            SYS_mkdirat,
            SYS_chmod,
            SYS_chown,
            SYS_fchmod,
            SYS_fchmodat,
            SYS_dup,
        ],
    },
    Group {
        why: "reads of the disk tier, by a ring that was made before and can do nothing else",
        whose: Whose::All,
        calls: calls![SYS_io_uring_enter, SYS_io_uring_register(RING)],
    },
    Group {
        why: "sockets: machines, clients, monitors, the supervisor",
        whose: Whose::All,
        calls: calls![
            SYS_socket(SOCKETS),
            SYS_socketpair(UNIX),
            SYS_connect,
            SYS_bind,
            SYS_listen,
            SYS_accept4,
            SYS_sendto,
            SYS_sendmsg,
            SYS_recvfrom,
            SYS_recvmsg,
            SYS_shutdown,
            SYS_getsockname,
            SYS_getpeername,
            SYS_getsockopt,
            SYS_setsockopt,
        ],
    },
    Group {
        why: "processes: whether they live, and the end of a child",
        whose: Whose::All,
        calls: calls![SYS_pidfd_open, SYS_pidfd_send_signal, SYS_waitid, SYS_wait4, SYS_kill],
    },
    Group {
        why: "who and where it is; random numbers",
        whose: Whose::All,
        calls: calls![
            SYS_getpid,
            SYS_getppid,
            SYS_getuid,
            SYS_geteuid,
            SYS_getgid,
            SYS_getegid,
            SYS_getgroups,
            SYS_capget,
            SYS_prlimit64,
            SYS_uname,
            SYS_sysinfo,
            SYS_getcwd,
            SYS_getrandom,
        ],
    },
    Group {
        why: "starting a program, and what one does at its start",
        whose: Whose::Starters,
        calls: calls![
            SYS_execve,
            SYS_vfork,
            SYS_mmap,
            SYS_mprotect,
            SYS_arch_prctl,
            SYS_set_tid_address,
            SYS_getrlimit,
            SYS_dup2,
            SYS_dup3,
            SYS_pipe,
            SYS_pipe2,
            SYS_umask,
            SYS_getpgrp,
            SYS_timerfd_create,
            SYS_timerfd_settime,
            SYS_get_mempolicy,
            SYS_set_mempolicy,
        ],
    },
    Group {
        why: "to be ahead of guests: a manager that begins",
        whose: Whose::Keeper,
        calls: calls![SYS_setpriority(PROCESSES)],
    },
    Group {
        why: "giving up more: a manager, and the next keeper",
        whose: Whose::Keeper,
        calls: calls![SYS_seccomp, SYS_capset],
    },
    Group {
        why: "a manager's ring, which it makes and restricts before it gives up this",
        whose: Whose::Keeper,
        calls: calls![SYS_io_uring_setup, SYS_io_uring_register],
    },
];

/// What docs/rights.md says of the table.
pub fn printed() -> String {
    let mut text = String::from("| capability | keeper | manager | for |\n|---|---|---|---|\n");
    let mut row = |capability: &Capability, keeper, manager| {
        let Capability { name, why, .. } = capability;
        // Writing to a string does not fail.
        let _ = writeln!(text, "| `{name}` | {keeper} | {manager} | {why} |");
    };
    KEPT.iter().for_each(|capability| row(capability, "hands it on", "uses it"));
    BEGINNING.iter().for_each(|capability| row(capability, "at its beginning", "no"));
    text.push_str("\n| system calls | manager | for |\n|---|---|---|\n");
    for Group { why, whose, calls } in GROUPS {
        let calls: Vec<String> = calls.iter().map(shown).collect();
        let _ = writeln!(text, "| {} | {} | {why} |", calls.join(", "), whose.managers());
    }
    text
}

fn shown(call: &Call) -> String {
    let name = call.name();
    match call.only {
        Only::Any => format!("`{name}`"),
        Only::These { values, .. } => {
            let values: Vec<&str> = values.iter().map(|(name, _)| *name).collect();
            format!("`{name}` ({})", values.join(", "))
        }
        Only::Without { bits: (bits, _), .. } => format!("`{name}` (without {bits})"),
    }
}
