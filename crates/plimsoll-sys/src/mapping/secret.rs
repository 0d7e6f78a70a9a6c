//! A page of memory that only processes which map it can read: for keys.
//!
//! What enters: nothing, or the descriptor of such a page from an earlier process. What leaves: atomics. What must never happen: a
//! file that is not secret memory taken for it.
//!
//! memfd_secret(2) takes the page out of the kernel's own map of memory. So it is in no core dump and no swap, `/proc/PID/mem`,
//! ptrace and process_vm_readv cannot read it, and neither can a device that writes from it. Whoever is given the descriptor can map it.
//! The page is there from its first touch on, and counts as locked memory.
#![expect(
    unsafe_code,
    reason = "memfd_secret(2) has no safe wrapper, and makes references to the memory it maps"
)]

use super::memfd::MemfdError;
use super::shared::Mapped;
use plimsoll_types::{ByteCount, PAGE_SIZE};
use rustix::fs::{fstat, fstatfs, ftruncate};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::slice;
use std::sync::atomic::AtomicU64;

/// SECRETMEM_MAGIC of linux/magic.h.
const MAGIC: u64 = u64::from_le_bytes(*b"MCES\0\0\0\0");
const _: () = assert!(MAGIC == 0x5345_434d);
const SIZE: ByteCount = ByteCount(PAGE_SIZE as u64);

/// See the file's head.
#[derive(Debug)]
pub struct SecretPage {
    mapped: Mapped,
    file: OwnedFd,
}

impl SecretPage {
    /// Makes one of zeros.
    ///
    /// # Errors
    /// [`MemfdError::Kernel`]: `ENOSYS` where the kernel has no such memory or is told to have none, `EAGAIN` where the process may
    /// lock no more.
    pub fn create() -> Result<Self, MemfdError> {
        // SAFETY: takes flags and touches no memory.
        let made = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        let Ok(made @ 0..) = RawFd::try_from(made) else {
            let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOSYS);
            return Err(MemfdError::kernel("memfd_secret", SIZE)(errno));
        };
        // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
        let file = unsafe { OwnedFd::from_raw_fd(made) };
        ftruncate(&file, SIZE.0).map_err(MemfdError::kernel("ftruncate", SIZE))?;
        Ok(Self { mapped: Mapped::new(&file, SIZE)?, file })
    }

    /// Maps one that an earlier process made and somebody kept.
    ///
    /// # Errors
    /// [`MemfdError::NotMemfd`] where it is not secret memory, [`MemfdError::Size`] where it is not a page.
    pub fn inherit(file: OwnedFd) -> Result<Self, MemfdError> {
        let system = fstatfs(&file).map_err(MemfdError::kernel("fstatfs", SIZE))?;
        if u64::try_from(system.f_type).ok() != Some(MAGIC) {
            return Err(MemfdError::NotMemfd);
        }
        let stat = fstat(&file).map_err(MemfdError::kernel("fstat", SIZE))?;
        let size = ByteCount(u64::try_from(stat.st_size).unwrap_or(0));
        if size != SIZE {
            return Err(MemfdError::Size { size });
        }
        Ok(Self { mapped: Mapped::new(&file, SIZE)?, file })
    }

    /// For whoever keeps a copy for the next process.
    pub fn keepsake(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The memory as words. What is read there is whatever another process wrote that maps it: check it like any message.
    pub fn as_atomic_u64s(&self) -> &[AtomicU64] {
        // SAFETY: a page is mapped, page-aligned, for the life of `self`, and the file has one: both ways of making the value have
        // seen to it, and the kernel refuses to change the length of secret memory that has one. Every bit pattern is an
        // `AtomicU64`, and atomics may be changed by others at any time.
        unsafe {
            slice::from_raw_parts(self.mapped.base().cast::<AtomicU64>(), PAGE_SIZE / size_of::<AtomicU64>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Memfd;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    /// What a kernel without secret memory says; everything else is a failure.
    fn page() -> Option<SecretPage> {
        match SecretPage::create() {
            Err(MemfdError::Kernel { call: "memfd_secret", source, .. }) => {
                println!("SKIPPED: no secret memory: {source}");
                None
            }
            made => Some(made.unwrap()),
        }
    }

    #[test]
    fn what_is_in_it_is_read_by_whoever_maps_it_and_not_through_proc() {
        let Some(page) = page() else { return };
        page.as_atomic_u64s()[3].store(77, Ordering::Relaxed);
        let next = SecretPage::inherit(page.keepsake().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(next.as_atomic_u64s()[3].load(Ordering::Relaxed), 77);
        assert_eq!(next.as_atomic_u64s().len(), 512);
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        let mut word = [0; 8];
        let here = AtomicU64::new(78);
        memory.read_exact_at(&mut word, std::ptr::from_ref(&here).addr() as u64).unwrap();
        assert_eq!(word, 78_u64.to_le_bytes());
        assert!(memory.read_exact_at(&mut word, page.mapped.base().addr() as u64 + 24).is_err());
        assert!(ftruncate(page.keepsake(), 0).is_err(), "its length is for good");
    }

    #[test]
    fn what_is_no_secret_memory_is_refused() {
        let memfd = Memfd::create("test", SIZE).unwrap();
        assert!(matches!(SecretPage::inherit(memfd.into()), Err(MemfdError::NotMemfd)));
    }
}
