//! Swap areas on and off: a path enters, the host's swap changes. Needs CAP_SYS_ADMIN. Nothing is formatted here.
#![expect(unsafe_code, reason = "swapon(2) and swapoff(2) have no safe wrapper")]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Set in swapon's flags when the low bits are a priority (linux/swap.h).
const SWAP_FLAG_PREFER: i32 = 0x8000;

/// How eagerly the kernel uses an area; it fills the highest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapPriority {
    /// Below all areas with a fixed priority, in the order they were added.
    Lowest,
    /// 0 to 32,767.
    Fixed(SwapRank),
}

/// A fixed priority: 0 to 32,767.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SwapRank(i16);

impl SwapRank {
    /// The priority of that number, or `None` if it is negative.
    pub const fn new(rank: i16) -> Option<Self> {
        if rank < 0 { None } else { Some(Self(rank)) }
    }
}

/// A swap area could not be switched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwapError {
    /// The path holds a zero byte.
    #[error("{0:?} cannot be a path: it holds a zero byte")]
    Path(PathBuf),
    /// The process lacks the right.
    #[error("switching swap on {0:?} needs CAP_SYS_ADMIN: run as root")]
    NotPermitted(PathBuf),
    /// The file is no swap area, or lies on a file system that cannot hold one, or is not in use (for swapoff).
    #[error("{0:?} is not a usable swap area: format it with mkswap, and check /proc/swaps")]
    NotSwap(PathBuf),
    /// The area is in use already.
    #[error("{0:?} is already in use")]
    Busy(PathBuf),
    /// Something else failed; for swapoff, out of memory means that the pages in it do not fit into RAM.
    #[error("switching swap on {path:?} failed")]
    Other {
        /// The area.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Adds the swap area at `path`.
pub fn swapon(path: &Path, priority: SwapPriority) -> Result<(), SwapError> {
    let flags = match priority {
        SwapPriority::Lowest => 0,
        SwapPriority::Fixed(SwapRank(rank)) => SWAP_FLAG_PREFER | i32::from(rank),
    };
    let text = c_path(path)?;
    // SAFETY: `text` is a terminated string that outlives the call, which only reads it.
    check(path, unsafe { libc::swapon(text.as_ptr(), flags) })
}

/// Removes the swap area at `path`, reading back all that is in it, which can take long.
pub fn swapoff(path: &Path) -> Result<(), SwapError> {
    let text = c_path(path)?;
    // SAFETY: `text` is a terminated string that outlives the call, which only reads it.
    check(path, unsafe { libc::swapoff(text.as_ptr()) })
}

fn c_path(path: &Path) -> Result<CString, SwapError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| SwapError::Path(path.to_owned()))
}

fn check(path: &Path, status: i32) -> Result<(), SwapError> {
    if status == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    let path = path.to_owned();
    Err(match source.raw_os_error() {
        Some(libc::EPERM) => SwapError::NotPermitted(path),
        Some(libc::EINVAL) => SwapError::NotSwap(path),
        Some(libc::EBUSY) => SwapError::Busy(path),
        _ => SwapError::Other { path, source },
    })
}
