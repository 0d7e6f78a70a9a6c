//! Mappings of files in memory: of a [`Memfd`] as atomics where another process may write too, as bytes where none does.
//!
//! # Why slices of a file in memory can be sound
//!
//! `&[u8]` promises the compiler that nobody writes the bytes, `&mut [u8]` that nobody else touches them, and both
//! that the memory stays. A mapped file breaks these in four ways, each closed here:
//!
//! 1. *Another process maps or writes it.* The file has no name. Its descriptor leaves only to be kept until this process has
//!    ended ([`ExclusiveMapping::keepsake`]), and comes back through [`ExclusiveMapping::inherit`]. Both ways of making a
//!    mapping take a lock on the file that the kernel holds for exactly as long as the mapping's process or the mapping
//!    lives, so there are never two, in whatever processes. That a keeper writes nothing through the descriptor it keeps is
//!    its promise.
//! 2. *This process maps it twice.* The mapping owns the file and never gives it back; the lock above keeps a second one away.
//! 3. *A child inherits the mapping.* MADV_DONTFORK, set before the mapping is handed out.
//! 4. *It shrinks, or a hole is punched.* Both need the descriptor, and nothing here shrinks. Punching needs `&mut`,
//!    during which no slice is alive. Slices end where the file does, however far the mapping reaches.
//!
//! What /proc/PID/mem, /proc/PID/fd, ptrace and a keeper that breaks its promise can do is out of scope, as the first is for
//! all memory of Rust programs.
#![expect(unsafe_code, reason = "maps memory and makes references to it")]

use super::memfd::{Memfd, MemfdError, check_pages};
use crate::to_usize;
use plimsoll_types::{ByteCount, Hva};
use rustix::fs::{
    FallocateFlags, FlockOperation, MemfdFlags, Mode, OFlags, fallocate, flock, fstat, ftruncate,
    memfd_create, open, openat,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, munmap};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

/// How often it is tried to lock a file that another process has.
const LOCK_AGAIN: Duration = Duration::from_millis(1);

/// The addresses of a mapped file. Makes no references itself.
#[derive(Debug)]
pub(super) struct Mapped {
    base: NonNull<u64>,
    size: ByteCount,
}

// SAFETY: an address and a length of memory the value owns; any thread may use and unmap it.
unsafe impl Send for Mapped {}
// SAFETY: `&Mapped` gives access to nothing; its users say what they hand out.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `size` bytes from the file's beginning, which may be more than it has.
    pub(super) fn new(file: impl AsFd, size: ByteCount) -> Result<Self, MemfdError> {
        let len = to_usize(size.0);
        // SAFETY: no address is asked for, so the kernel picks one where nothing is mapped.
        let base = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)
        }
        .map_err(MemfdError::kernel("mmap", size))?;
        let base = NonNull::new(base.cast()).ok_or(MemfdError::Size { size })?;
        let mapped = Self { base, size };
        // SAFETY: the mapping just made; the advice concerns future children only.
        unsafe { madvise(mapped.base.as_ptr().cast(), len, Advice::LinuxDontFork) }
            .map_err(MemfdError::kernel("madvise", size))?;
        Ok(mapped)
    }

    /// The first of them.
    pub(super) const fn base(&self) -> *mut u64 {
        self.base.as_ptr()
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the memory is owned by this value, whose borrows have ended. A failure leaves it mapped: a leak.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), to_usize(self.size.0)) };
    }
}

/// A memfd mapped where other processes may change it: accessible as atomics.
#[derive(Debug)]
pub struct SharedMapping(Mapped);

impl SharedMapping {
    /// Maps all of it.
    pub fn new(memfd: &Memfd) -> Result<Self, MemfdError> {
        Mapped::new(memfd, memfd.size()).map(Self)
    }

    /// The first address.
    pub fn base(&self) -> Hva {
        Hva(self.0.base.as_ptr().expose_provenance() as u64)
    }

    /// The length in bytes.
    pub const fn size(&self) -> ByteCount {
        self.0.size
    }

    /// Keeps the first `len` bytes, whole pages, out of swap and of core dumps for as long as they are mapped.
    ///
    /// # Errors
    /// [`MemfdError::Range`] where that is not whole pages of the mapping, [`MemfdError::Kernel`] where the process may lock no
    /// more memory.
    pub fn lock(&self, len: ByteCount) -> Result<(), MemfdError> {
        check_pages(ByteCount(0), len, self.0.size)?;
        let (base, bytes) = (self.0.base.as_ptr().cast(), to_usize(len.0));
        // SAFETY: the range lies in the mapping, as just checked, and locking it changes no byte of it.
        unsafe { mlock(base, bytes) }.map_err(MemfdError::kernel("mlock", self.0.size))?;
        // SAFETY: the same; the advice concerns core dumps only.
        unsafe { madvise(base, bytes, Advice::LinuxDontDump) }
            .map_err(MemfdError::kernel("madvise", self.0.size))
    }

    /// The memory as words. What is read there is whatever the other side wrote: check it like any message.
    pub fn as_atomic_u64s(&self) -> &[AtomicU64] {
        let words = to_usize(self.0.size.0) / size_of::<AtomicU64>();
        // SAFETY: the memory is mapped, page-aligned and as long as that for the life of `self`, and cannot shrink
        // (`Memfd` is sealed). Every bit pattern is an `AtomicU64`, and atomics may be changed by others at any time.
        unsafe { slice::from_raw_parts(self.0.base.as_ptr().cast::<AtomicU64>(), words) }
    }
}

/// A file in memory that nobody but this value maps or writes: plain bytes, of which there can come to be more. The module
/// documentation argues why.
#[derive(Debug)]
pub struct ExclusiveMapping {
    mapped: Mapped,
    file: OwnedFd,
    /// Holds the lock on the file, and is given to nobody.
    _lock: OwnedFd,
    /// The file's length: what there is of the mapping.
    len: usize,
}

impl ExclusiveMapping {
    /// Makes an empty file and maps room for it to grow to `limit`, whole pages. The name is for /proc only.
    ///
    /// # Errors
    /// [`MemfdError`] when the kernel gives no such file or no address space of that size.
    pub fn create(name: &str, limit: ByteCount) -> Result<Self, MemfdError> {
        let file = match FOLDER.get() {
            Some(folder) => file_in(folder),
            None => large_folio_folder().and_then(file_in),
        };
        // Without the right to mount, or on a kernel without the option, it is an ordinary memfd.
        let file = file.or_else(|_| memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL));
        let file = file.map_err(MemfdError::kernel("memfd_create", limit))?;
        let lock = lock(&file, limit)?;
        Ok(Self { mapped: Mapped::new(&file, limit)?, file, _lock: lock, len: 0 })
    }

    /// Maps a file that an earlier process made and somebody kept, with room to grow to `limit`. One that is ending has it still
    /// for a moment after its locks of records and its memory are gone: its files are let go at the very end, and `patience` is how
    /// long that may take. With none left it is tried once: whoever inherits several has one patience for all of them.
    ///
    /// # Errors
    /// [`MemfdError::InUse`] when another mapping of it is alive after that; [`MemfdError`] when it cannot be mapped, or is
    /// longer than that.
    pub fn inherit(file: OwnedFd, limit: ByteCount, patience: Duration) -> Result<Self, MemfdError> {
        let until = Instant::now() + patience;
        let lock = loop {
            match lock(&file, limit) {
                Err(MemfdError::InUse) if Instant::now() < until => std::thread::sleep(LOCK_AGAIN),
                done => break done?,
            }
        };
        // The length is read under the lock: nobody else changes it.
        let stat = fstat(&file).map_err(MemfdError::kernel("fstat", limit))?;
        let len = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        if len > limit.0 {
            return Err(MemfdError::Size { size: ByteCount(len) });
        }
        Ok(Self { mapped: Mapped::new(&file, limit)?, file, _lock: lock, len: to_usize(len) })
    }

    /// The file's descriptor, for whoever keeps a copy of it until this process has ended and gives that to the next one. To
    /// write to it, or map it, other than by [`inherit`](Self::inherit) is to write to this process's memory.
    pub fn keepsake(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Lets it be `len` bytes long, whole pages, if it is shorter. What is added are zeros and takes no memory yet.
    ///
    /// # Errors
    /// [`MemfdError::Range`] where the mapping has no room for that, [`MemfdError::Kernel`].
    pub fn grow(&mut self, len: ByteCount) -> Result<(), MemfdError> {
        check_pages(ByteCount(0), len, self.mapped.size)?;
        if self.len < to_usize(len.0) {
            ftruncate(&self.file, len.0).map_err(MemfdError::kernel("ftruncate", len))?;
            self.len = to_usize(len.0);
        }
        Ok(())
    }

    /// Gives the memory of whole pages back to the host; they are zeros afterwards.
    ///
    /// # Errors
    /// [`MemfdError::Range`] where that is not whole pages of what there is, [`MemfdError::Kernel`].
    pub fn punch_hole(&mut self, offset: ByteCount, len: ByteCount) -> Result<(), MemfdError> {
        check_pages(offset, len, ByteCount(self.len as u64))?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.allocate(mode, offset, len)
    }

    /// Takes memory for whole pages at once, where writing them would fault page by page, and lets the file grow to the end
    /// of them. Bytes that were there stay as they are; the others are zeros.
    ///
    /// What is allocated in one call at the file's end comes in folios of about that size if the kernel has them: 64 KiB
    /// in one call cost 0.3 us a page instead of 2.5 (kernel 6.18).
    ///
    /// # Errors
    /// [`MemfdError::Range`] where that is not whole pages of the mapping, [`MemfdError::Kernel`] where the host has no
    /// memory or no such call; some pages may be populated then.
    pub fn populate(&mut self, offset: ByteCount, len: ByteCount) -> Result<(), MemfdError> {
        check_pages(offset, len, self.mapped.size)?;
        self.allocate(FallocateFlags::empty(), offset, len)?;
        self.len = self.len.max(to_usize(offset.0 + len.0));
        self.touch(offset, len)
    }

    /// Takes memory for whole pages of what there is, page by page, as writing them would: of no folio is more than that taken.
    ///
    /// # Errors
    /// As for [`populate`](Self::populate).
    pub fn touch(&mut self, offset: ByteCount, len: ByteCount) -> Result<(), MemfdError> {
        check_pages(offset, len, ByteCount(self.len as u64))?;
        // SAFETY: the range lies in the mapping and in the file, as just checked, and populating changes no byte of it.
        unsafe {
            let start = self.mapped.base.as_ptr().wrapping_byte_add(to_usize(offset.0));
            madvise(start.cast(), to_usize(len.0), Advice::LinuxPopulateWrite)
        }
        .map_err(MemfdError::kernel("madvise", self.mapped.size))
    }

    /// The memory it takes, mapped or not.
    ///
    /// # Errors
    /// [`MemfdError::Kernel`].
    pub fn allocated(&self) -> Result<ByteCount, MemfdError> {
        let stat = fstat(&self.file).map_err(MemfdError::kernel("fstat", self.mapped.size))?;
        // Blocks are of 512 bytes, whatever the file system's are.
        Ok(ByteCount(u64::try_from(stat.st_blocks).unwrap_or(0) * 512))
    }

    fn allocate(&self, mode: FallocateFlags, offset: ByteCount, len: ByteCount) -> Result<(), MemfdError> {
        fallocate(&self.file, mode, offset.0, len.0)
            .map_err(MemfdError::kernel("fallocate", self.mapped.size))
    }
}

/// Locks a file for one mapping. The lock belongs to a descriptor that was opened for it alone, so that neither a copy of the
/// file's own descriptor holds it on nor the end of one gives it up.
fn lock(file: &OwnedFd, limit: ByteCount) -> Result<OwnedFd, MemfdError> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let lock = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(MemfdError::kernel("opening once more", limit))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(Errno::AGAIN) => Err(MemfdError::InUse),
        Err(errno) => Err(MemfdError::kernel("flock", limit)(errno)),
    }
}

/// Where this process makes such files, if it was told.
static FOLDER: OnceLock<OwnedFd> = OnceLock::new();

/// Has this process make its [`ExclusiveMapping`]s' files in a [`large_folio_folder`] that another one has made, which takes no right
/// to mount. Told a second time, it keeps to the first.
pub fn make_files_in(folder: OwnedFd) {
    let _ = FOLDER.set(folder);
}

/// A tmpfs without a place in the tree of files, which goes with its last file. Other than a memfd's, the memory of files there may come
/// in folios of many pages, as long as they end before the file does: so what is allocated at its end takes no more memory than was
/// asked for.
///
/// # Errors
/// What the kernel said: without CAP_SYS_ADMIN nobody mounts.
pub fn large_folio_folder() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "huge", "within_size")?;
    // A memfd is not limited to half of the host's memory either.
    fsconfig_set_string(&context, "size", "0")?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOEXEC | MountAttrFlags::MOUNT_ATTR_NOSUID;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// A file without a name, which nobody can reach.
fn file_in(folder: impl AsFd) -> rustix::io::Result<OwnedFd> {
    openat(folder, ".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
}

impl Deref for ExclusiveMapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped and at least that long for the life of `self`; every bit pattern is a byte; nobody writes while
        // this borrow lasts, for the four reasons in the module documentation.
        unsafe { slice::from_raw_parts(self.mapped.base.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for ExclusiveMapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` excludes every other borrow.
        unsafe { slice::from_raw_parts_mut(self.mapped.base.as_ptr().cast(), self.len) }
    }
}
