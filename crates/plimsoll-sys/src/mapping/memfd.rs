//! Memory with a descriptor: it can be passed to another process and outlives the one that made it.
//!
//! What enters: a name and a size, or a descriptor from elsewhere. What leaves: a memfd that is proven to be sealed
//! against shrinking, so that a mapping of it cannot raise SIGBUS because a peer truncated it.

use crate::HvaRange;
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE};
use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, SealFlags, fallocate, fchmod, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The size is fixed, and that it is fixed is fixed too. Writing stays possible.
const SEALS: SealFlags = SealFlags::GROW.union(SealFlags::SHRINK).union(SealFlags::SEAL);

/// A memfd could not be made, adopted, mapped or punched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemfdError {
    /// The size is zero or not whole pages.
    #[error("a memfd of {size} cannot be mapped: its size must be a positive number of 4 KiB pages")]
    Size {
        /// The size asked for or found.
        size: ByteCount,
    },
    /// A descriptor from elsewhere is not sealed against a change of size.
    #[error(
        "the memfd is not sealed against shrinking and growing: whoever has it could pull memory away under us"
    )]
    Unsealed,
    /// A descriptor from elsewhere is no memfd.
    #[error("the descriptor is no memfd: it has no seals")]
    NotMemfd,
    /// Another mapping of the same memory is alive.
    #[error("the memory is in use by another process, which has to end first")]
    InUse,
    /// The range is not whole pages inside the memfd.
    #[error("{len} at offset {offset:#x} are not whole pages of a memfd of {size}")]
    Range {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: ByteCount,
        /// Size of the memfd.
        size: ByteCount,
    },
    /// The kernel refused.
    #[error("{call} failed on a memfd of {size}")]
    Kernel {
        /// The system call.
        call: &'static str,
        /// Size of the memfd.
        size: ByteCount,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl MemfdError {
    pub(super) fn kernel(call: &'static str, size: ByteCount) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Kernel { call, size, source: errno.into() }
    }
}

/// A memfd of fixed size, close-on-exec, not executable, open to its owner only.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    size: ByteCount,
}

impl Memfd {
    /// Makes one of `size` zero bytes, a multiple of the page size. The name is for /proc only.
    pub fn create(name: &str, size: ByteCount) -> Result<Self, MemfdError> {
        let kernel = |call| MemfdError::kernel(call, size);
        if size.0 == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(MemfdError::Size { size });
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
        let fd = memfd_create(name, flags).map_err(kernel("memfd_create"))?;
        fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(kernel("fchmod"))?;
        ftruncate(&fd, size.0).map_err(kernel("ftruncate"))?;
        fcntl_add_seals(&fd, SEALS).map_err(kernel("adding seals"))?;
        Ok(Self { fd, size })
    }

    /// Its size.
    pub const fn size(&self) -> ByteCount {
        self.size
    }

    /// Gives the memory of whole pages back to the host; they read as zeros afterwards, in every mapping.
    pub fn punch_hole(&self, offset: ByteCount, len: ByteCount) -> Result<(), MemfdError> {
        check_pages(offset, len, self.size)?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.fd, mode, offset.0, len.0).map_err(MemfdError::kernel("fallocate", self.size))
    }

    /// Another descriptor of the same memory.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, size: self.size })
    }
}

/// An error where that is not a positive number of whole pages inside of `size`.
pub(super) fn check_pages(offset: ByteCount, len: ByteCount, size: ByteCount) -> Result<(), MemfdError> {
    let inside = HvaRange::new(Hva(offset.0), len).is_some_and(|range| range.end().0 <= size.0);
    if !inside || len.0 == 0 || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
        return Err(MemfdError::Range { offset: offset.0, len, size });
    }
    Ok(())
}

impl TryFrom<OwnedFd> for Memfd {
    type Error = MemfdError;

    /// Takes a descriptor that came from elsewhere after checking that it is a memfd whose size is sealed.
    fn try_from(fd: OwnedFd) -> Result<Self, MemfdError> {
        let seals = fcntl_get_seals(&fd).map_err(|_| MemfdError::NotMemfd)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(MemfdError::Unsealed);
        }
        // The size is read after the seals were seen, so it cannot change any more.
        let stat = fstat(&fd).map_err(MemfdError::kernel("fstat", ByteCount(0)))?;
        let size = ByteCount(u64::try_from(stat.st_size).unwrap_or(0));
        if size.0 == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(MemfdError::Size { size });
        }
        Ok(Self { fd, size })
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Memfd> for OwnedFd {
    fn from(memfd: Memfd) -> Self {
        memfd.fd
    }
}
