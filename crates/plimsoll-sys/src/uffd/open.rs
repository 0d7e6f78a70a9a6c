//! Getting a userfaultfd: by system call or from /dev/userfaultfd, or one that another process passed on. What
//! leaves is non-blocking, closed on exec, and known to be a userfaultfd. A refusal says which right is missing.
#![expect(unsafe_code, reason = "userfaultfd(2) and the device's ioctl return a descriptor as a bare number")]

use super::abi::{UFFD_USER_MODE_ONLY, USERFAULTFD_IOC_NEW};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use std::ffi::c_void;
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Whose faults a userfaultfd catches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Those of user code and of the kernel working for it. KVM needs this: it reaches guest memory from the kernel.
    KernelAndUser,
    /// Those of user code alone; the kernel gets EFAULT. Any process may have this.
    UserOnly,
}

/// Why /dev/userfaultfd did not help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceObstacle {
    /// The device does not exist (Linux before 6.1, or a container without it).
    Missing,
    /// The device's permissions do not let this user open it for reading and writing.
    Denied,
    /// It failed in another way, with this errno.
    Other(i32),
}

impl fmt::Display for DeviceObstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("is missing"),
            Self::Denied => f.write_str("is not readable and writable for this user"),
            Self::Other(errno) => write!(f, "failed: {}", io::Error::from_raw_os_error(*errno)),
        }
    }
}

/// No userfaultfd could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Neither way is open to this process.
    #[error(
        "no right to catch the kernel's page faults: userfaultfd(2) is refused and /dev/userfaultfd {device}; \
         grant CAP_SYS_PTRACE, or give this user read and write permission on /dev/userfaultfd, \
         or set sysctl vm.unprivileged_userfaultfd=1"
    )]
    NotPermitted {
        /// What became of the device.
        device: DeviceObstacle,
    },
    /// Not even user-mode faults: that needs no right, so a filter refuses.
    #[error("userfaultfd(2) is refused although user-mode faults need no right: a seccomp filter forbids it")]
    Filtered,
    /// The kernel was built without it.
    #[error("this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD")]
    Unsupported,
    /// Something else failed.
    #[error("userfaultfd(2) failed")]
    Other(#[source] io::Error),
}

/// A descriptor from elsewhere was not a usable userfaultfd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// It is some other file.
    #[error("expected a userfaultfd, found a descriptor of {found}")]
    NotUserfaultfd {
        /// What it is instead.
        found: String,
    },
    /// What it is could not be found out, or its flags not set.
    #[error("cannot examine a descriptor through /proc/self/fd")]
    Examine(#[source] io::Error),
}

pub(super) fn open(mode: Mode) -> Result<OwnedFd, OpenError> {
    let base = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    let flags = match mode {
        Mode::KernelAndUser => base,
        Mode::UserOnly => base | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY),
    };
    // SAFETY: the call itself touches no memory. What the descriptor can do to memory is argued call by call in
    // the module above, and only its `Userfaultfd` gets hold of it.
    let refused = match unsafe { userfaultfd(flags) } {
        Ok(fd) => return Ok(fd),
        Err(errno) => errno,
    };
    match (refused, mode) {
        (Errno::NOSYS, _) => Err(OpenError::Unsupported),
        (Errno::PERM | Errno::ACCESS, mode) => open_device(flags).map_err(|device| match mode {
            Mode::KernelAndUser => OpenError::NotPermitted { device },
            Mode::UserOnly => OpenError::Filtered,
        }),
        (errno, _) => Err(OpenError::Other(errno.into())),
    }
}

fn open_device(flags: UserfaultfdFlags) -> Result<OwnedFd, DeviceObstacle> {
    let obstacle = |error: &io::Error| match error.kind() {
        io::ErrorKind::NotFound => DeviceObstacle::Missing,
        io::ErrorKind::PermissionDenied => DeviceObstacle::Denied,
        _ => DeviceObstacle::Other(error.raw_os_error().unwrap_or(0)),
    };
    let device =
        OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").map_err(|e| obstacle(&e))?;
    // SAFETY: the device was opened by its fixed name, and `NewDescriptor` describes the one ioctl it has.
    let created = unsafe { rustix::ioctl::ioctl(&device, NewDescriptor { flags }) };
    created.map_err(|errno| obstacle(&errno.into()))
}

/// USERFAULTFD_IOC_NEW: flags by value in, a new descriptor as the result.
struct NewDescriptor {
    flags: UserfaultfdFlags,
}

// SAFETY: the request takes an integer where a pointer could be, so no memory is read or written, and its
// non-negative result is a descriptor that the kernel has just made for the caller alone.
unsafe impl Ioctl for NewDescriptor {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        USERFAULTFD_IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.flags.bits() as usize)
    }

    unsafe fn output_from_ptr(number: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: only called after success, when `number` is a new descriptor nobody owns yet.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }
}

/// Checks a descriptor from elsewhere. A peer that sends something else must not make us issue ioctls on it, and one
/// that sends a blocking userfaultfd must not make our reader wait.
pub(super) fn adopt(fd: OwnedFd) -> Result<OwnedFd, AdoptError> {
    let examine = |errno: Errno| AdoptError::Examine(errno.into());
    let link = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()).map_err(examine)?;
    if link.as_bytes() != b"anon_inode:[userfaultfd]" {
        return Err(AdoptError::NotUserfaultfd { found: link.to_string_lossy().into_owned() });
    }
    let flags = fcntl_getfl(&fd).map_err(examine)?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(examine)?;
    fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(examine)?;
    Ok(fd)
}
