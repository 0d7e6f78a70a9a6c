//! Mappings of a [`Memfd`]: as atomics where another process may write too, as bytes where none does.
//!
//! # Why slices of a memfd can be sound
//!
//! `&[u8]` promises the compiler that nobody writes the bytes, `&mut [u8]` that nobody else touches them, and both
//! that the memory stays. A memfd breaks these in four ways, each closed here:
//!
//! 1. *Another process maps or writes it.* [`ExclusiveMapping::create`] makes the memfd itself and never shows its
//!    descriptor, so nobody can. For a memfd that came from elsewhere (a keeper held it while the manager was
//!    restarted) somebody has to vouch: [`ExclusiveMapping::assume`] is unsafe.
//! 2. *This process maps it twice.* The mapping owns the memfd, and only `into_memfd` gives it back, after unmapping.
//! 3. *A child inherits the mapping.* MADV_DONTFORK, set before the mapping is handed out.
//! 4. *It shrinks, or a hole is punched.* A `Memfd` is sealed against the first by construction. Punching needs the
//!    descriptor, or `&mut` here, during which no slice is alive.
//!
//! What /proc/PID/mem, /proc/PID/fd and ptrace can do is out of scope, as it is for all memory of Rust programs.
#![expect(unsafe_code, reason = "maps memory and makes references to it")]

use super::memfd::{Memfd, MemfdError};
use crate::to_usize;
use plimsoll_types::{ByteCount, Hva};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::AtomicU64;

/// The addresses of a whole mapped memfd. Makes no references itself.
#[derive(Debug)]
struct Mapped {
    base: NonNull<u64>,
    size: ByteCount,
}

// SAFETY: an address and a length of memory the value owns; any thread may use and unmap it.
unsafe impl Send for Mapped {}
// SAFETY: `&Mapped` gives access to nothing; its two users say what they hand out.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(memfd: &Memfd) -> Result<Self, MemfdError> {
        let size = memfd.size();
        let len = to_usize(size.0);
        // SAFETY: no address is asked for, so the kernel picks one where nothing is mapped.
        let base = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, memfd, 0)
        }
        .map_err(MemfdError::kernel("mmap", size))?;
        let base = NonNull::new(base.cast()).ok_or(MemfdError::Size { size })?;
        let mapped = Self { base, size };
        // SAFETY: the mapping just made; the advice concerns future children only.
        unsafe { madvise(mapped.base.as_ptr().cast(), len, Advice::LinuxDontFork) }
            .map_err(MemfdError::kernel("madvise", size))?;
        Ok(mapped)
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
        Mapped::new(memfd).map(Self)
    }

    /// The first address.
    pub fn base(&self) -> Hva {
        Hva(self.0.base.as_ptr().expose_provenance() as u64)
    }

    /// The length in bytes.
    pub const fn size(&self) -> ByteCount {
        self.0.size
    }

    /// The memory as words. What is read there is whatever the other side wrote: check it like any message.
    pub fn as_atomic_u64s(&self) -> &[AtomicU64] {
        let words = to_usize(self.0.size.0) / size_of::<AtomicU64>();
        // SAFETY: the memory is mapped, page-aligned and as long as that for the life of `self`, and cannot shrink
        // (`Memfd` is sealed). Every bit pattern is an `AtomicU64`, and atomics may be changed by others at any time.
        unsafe { slice::from_raw_parts(self.0.base.as_ptr().cast::<AtomicU64>(), words) }
    }
}

/// A memfd that nobody but this value maps or writes: plain bytes. The module documentation argues why.
#[derive(Debug)]
pub struct ExclusiveMapping {
    mapped: Mapped,
    memfd: Memfd,
}

impl ExclusiveMapping {
    /// Makes a memfd of zeros and maps it.
    pub fn create(name: &str, size: ByteCount) -> Result<Self, MemfdError> {
        let memfd = Memfd::create(name, size)?;
        Ok(Self { mapped: Mapped::new(&memfd)?, memfd })
    }

    /// Maps a memfd that somebody vouches for.
    ///
    /// # Safety
    ///
    /// While the value lives nobody else (no other mapping, no holder of another descriptor, in this process or any
    /// other) writes the memory or punches holes in it. A copy of the descriptor may exist if its holder only keeps
    /// it.
    pub unsafe fn assume(memfd: Memfd) -> Result<Self, MemfdError> {
        Ok(Self { mapped: Mapped::new(&memfd)?, memfd })
    }

    /// Unmaps it and gives the memfd, with its contents, to whoever wants it.
    pub fn into_memfd(self) -> Memfd {
        self.memfd
    }

    /// Gives the memory of whole pages back to the host; they are zeros afterwards.
    pub fn punch_hole(&mut self, offset: ByteCount, len: ByteCount) -> Result<(), MemfdError> {
        self.memfd.punch_hole(offset, len)
    }

    /// Takes memory for whole pages in one call, where writing them would fault page by page. Their bytes stay as they
    /// are.
    ///
    /// # Errors
    /// [`MemfdError::Range`] where that is not whole pages of the mapping, [`MemfdError::Kernel`] where the host has no
    /// memory or no such call; some pages may be populated then.
    pub fn populate_write(&mut self, offset: ByteCount, len: ByteCount) -> Result<(), MemfdError> {
        self.memfd.check_pages(offset, len)?;
        // SAFETY: the range lies in the mapping, as just checked, and populating changes no byte of it.
        unsafe {
            let start = self.mapped.base.as_ptr().wrapping_byte_add(to_usize(offset.0));
            madvise(start.cast(), to_usize(len.0), Advice::LinuxPopulateWrite)
        }
        .map_err(MemfdError::kernel("madvise", self.mapped.size))
    }
}

impl Deref for ExclusiveMapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped and that long for the life of `self`; every bit pattern is a byte; nobody writes while this
        // borrow lasts, for the four reasons in the module documentation.
        unsafe { slice::from_raw_parts(self.mapped.base.as_ptr().cast(), to_usize(self.mapped.size.0)) }
    }
}

impl DerefMut for ExclusiveMapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` excludes every other borrow.
        unsafe { slice::from_raw_parts_mut(self.mapped.base.as_ptr().cast(), to_usize(self.mapped.size.0)) }
    }
}
