//! Private anonymous memory that a guest or a userfaultfd fills: guest RAM and the airlock.
//!
//! What enters: a size. What leaves: addresses, copies of bytes, and proofs ([`UnborrowedRange`]) that no reference
//! points inside. What must never happen here: a reference to the memory, since vCPUs, the kernel and other
//! processes' COPYs change it at any moment.
//!
//! All accesses from Rust are relaxed atomic operations on aligned 8-byte words. That is what makes concurrent use
//! from several threads defined (mixing sizes, or plain copies, would not be), and costs nothing on x86-64.
//! An access may block for as long as a page is absent from a registered range, and raises SIGBUS on a poisoned one.
#![expect(unsafe_code, reason = "maps, advises and unmaps memory, and accesses it through raw pointers")]

use crate::numa::{Mask, NodeId};
use crate::{HvaRange, UnborrowedRange, to_usize};
use plimsoll_types::{BLOCK_SIZE, ByteCount, Hva, PAGE_SIZE};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

const WORD: usize = size_of::<u64>();

/// Whether the kernel may back memory with huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// It should (MADV_HUGEPAGE).
    Prefer,
    /// It must not (MADV_NOHUGEPAGE).
    Never,
    /// The host's default decides.
    HostDefault,
}

/// Whether the kernel's samepage merging (KSM) may merge pages with others of the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merging {
    /// It may (MADV_MERGEABLE). Whoever can time writes to the memory can then tell whether somebody else has its bytes.
    Offered,
    /// It may not, and what was merged becomes the process's own again (MADV_UNMERGEABLE), which needs memory.
    Withdrawn,
}

/// Memory could not be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The size is zero, not whole pages, or beyond the address space.
    #[error(
        "cannot map {len}: the size must be a positive number of 4 KiB pages that fits in the address space"
    )]
    Size {
        /// What was asked for.
        len: ByteCount,
    },
    /// The kernel refused.
    #[error("cannot map {len}")]
    Kernel {
        /// What was asked for.
        len: ByteCount,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A call on part of a mapping failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The range is not inside the mapping.
    #[error("{range} does not lie in the mapping {mapping}")]
    Outside {
        /// The range.
        range: HvaRange,
        /// The whole mapping.
        mapping: HvaRange,
    },
    /// The offset and length do not lie inside the mapping.
    #[error("{len} at offset {offset:#x} do not lie in a mapping of {mapping_len}")]
    OffsetOutside {
        /// The offset, in bytes.
        offset: u64,
        /// The length.
        len: ByteCount,
        /// The length of the mapping.
        mapping_len: ByteCount,
    },
    /// Memory of this kind is accessed in whole aligned words.
    #[error("{len} at offset {offset:#x} are not whole aligned 8-byte words")]
    Unaligned {
        /// The offset, in bytes.
        offset: u64,
        /// The length.
        len: ByteCount,
    },
    /// The kernel refused.
    #[error("{advice} of {range} failed")]
    Advise {
        /// The name of the madvise(2) call.
        advice: &'static str,
        /// The range.
        range: HvaRange,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Private anonymous read-write memory, aligned to a block, without reserved swap, absent from children and core
/// dumps. Unmapped on drop.
///
/// If the memory is registered with a userfaultfd that reports unmaps, the drop waits until somebody reads that.
#[derive(Debug)]
pub struct AnonymousMapping {
    base: NonNull<u64>,
    range: HvaRange,
}

// SAFETY: the value is an address and a length of memory it owns; any thread may unmap it.
unsafe impl Send for AnonymousMapping {}
// SAFETY: through a shared reference memory is accessed by atomic operations and changed by system calls only.
unsafe impl Sync for AnonymousMapping {}

impl AnonymousMapping {
    /// Maps `len` bytes, a multiple of the page size.
    pub fn new(len: ByteCount, huge: HugePages) -> Result<Self, MapError> {
        if len.0 == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(MapError::Size { len });
        }
        let padded = len.0.checked_add(BLOCK_SIZE as u64).ok_or(MapError::Size { len })?;
        let kernel = |source: io::Error| MapError::Kernel { len, source };
        // SAFETY: no address is asked for, so the kernel picks one where nothing is mapped.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                to_usize(padded),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|errno| kernel(errno.into()))?
        .cast::<u8>();

        let head = start.align_offset(BLOCK_SIZE);
        let tail = BLOCK_SIZE - head;
        // `head` and `tail` add up to the padding, so `base` plus `len` stays inside of what was mapped.
        let base = start.wrapping_add(head);
        for (address, bytes) in [(start, head), (base.wrapping_add(to_usize(len.0)), tail)] {
            if bytes > 0 {
                // SAFETY: part of the mapping just made, outside of the part that is kept; nobody knows of it yet.
                // A failure would leave unused address space behind, nothing worse.
                unsafe { munmap(address.cast(), bytes) }.map_err(|errno| kernel(errno.into()))?;
            }
        }
        let range = HvaRange::new(Hva(base.expose_provenance() as u64), len);
        let (Some(base), Some(range)) = (NonNull::new(base.cast::<u64>()), range) else {
            return Err(MapError::Size { len });
        };
        let mapping = Self { base, range };
        let whole = mapping.range;
        let advice = mapping
            .advise(whole, libc::MADV_DONTFORK, "MADV_DONTFORK")
            .and_then(|()| mapping.advise(whole, libc::MADV_DONTDUMP, "MADV_DONTDUMP"))
            .and_then(|()| mapping.advise_huge_pages(whole, huge));
        match advice {
            Ok(()) => Ok(mapping),
            Err(RangeError::Advise { source, .. }) => Err(kernel(source)),
            Err(_) => Err(MapError::Size { len }),
        }
    }

    /// The first address, a multiple of the block size.
    pub const fn base(&self) -> Hva {
        self.range.start()
    }

    /// The length in bytes.
    pub const fn len(&self) -> ByteCount {
        self.range.len()
    }

    /// Never true: a mapping has at least a page.
    pub const fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The whole range.
    pub const fn range(&self) -> HvaRange {
        self.range
    }

    /// Proof that no reference points into `range`, which must lie in the mapping (it may come from another process).
    pub fn unborrowed(&self, range: HvaRange) -> Result<UnborrowedRange<'_>, RangeError> {
        if !self.range.contains(range) {
            return Err(RangeError::Outside { range, mapping: self.range });
        }
        // SAFETY: this type never creates a reference to its memory, lends none, and owns it: no allocator or
        // library uses it. The result borrows the mapping; a registration that outlives it ends with the munmap.
        Ok(unsafe { UnborrowedRange::assume(range) })
    }

    /// Discards pages: they read as zeros from then on, or fault anew where registered. With remove events enabled it
    /// waits until somebody **else** reads the event.
    pub fn discard(&self, range: HvaRange) -> Result<(), RangeError> {
        self.advise(range, libc::MADV_DONTNEED, "MADV_DONTNEED")
    }

    /// Gives each page memory of its own as if it were written, keeping its bytes. This makes pages that were once
    /// shared with a child or merged movable again. Waits like a touch where pages are absent and registered.
    pub fn populate_write(&self, range: HvaRange) -> Result<(), RangeError> {
        self.advise(range, libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE")
    }

    /// Makes huge pages of the blocks in the range. In a registered range all pages of a block must be present.
    pub fn collapse(&self, range: HvaRange) -> Result<(), RangeError> {
        self.advise(range, libc::MADV_COLLAPSE, "MADV_COLLAPSE")
    }

    /// Says whether huge pages are wanted from now on; pages that exist stay as they are.
    pub fn advise_huge_pages(&self, range: HvaRange, huge: HugePages) -> Result<(), RangeError> {
        match huge {
            HugePages::Prefer => self.advise(range, libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"),
            HugePages::Never => self.advise(range, libc::MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE"),
            HugePages::HostDefault => Ok(()),
        }
    }

    /// Says whether pages may be merged from now on. What they read as does not change.
    pub fn advise_merging(&self, range: HvaRange, merging: Merging) -> Result<(), RangeError> {
        match merging {
            Merging::Offered => self.advise(range, libc::MADV_MERGEABLE, "MADV_MERGEABLE"),
            Merging::Withdrawn => self.advise(range, libc::MADV_UNMERGEABLE, "MADV_UNMERGEABLE"),
        }
    }

    /// Has pages of the range, which is whole pages, be on one node and no other (MPOL_BIND); those that are there stay where they are.
    /// Whoever brings a page, a userfaultfd's COPY too, takes its memory there. Memory of a range is one mapping of the kernel's up to
    /// where the node changes.
    pub fn bind(&self, range: HvaRange, node: NodeId) -> Result<(), RangeError> {
        let range = self.unborrowed(range)?.range();
        let offset = to_usize(range.start().0 - self.base().0);
        let mask = node.mask();
        // SAFETY: the range lies in memory that this value owns, and where pages are taken changes no byte of it. The mask is read only,
        // has as many bits as is said less the one that the kernel takes off, and lives until after the call.
        let status = unsafe {
            let start = self.base.as_ptr().cast::<c_void>().wrapping_byte_add(offset);
            let len = to_usize(range.len().0);
            libc::syscall(libc::SYS_mbind, start, len, libc::MPOL_BIND, mask.as_ptr(), Mask::BITS, 0)
        };
        if status == 0 {
            return Ok(());
        }
        Err(RangeError::Advise { advice: "mbind", range, source: io::Error::last_os_error() })
    }

    fn advise(&self, range: HvaRange, advice: i32, name: &'static str) -> Result<(), RangeError> {
        let range = self.unborrowed(range)?.range();
        let offset = to_usize(range.start().0 - self.base().0);
        // SAFETY: the range lies in memory that this value owns and that no reference points into, so even advice
        // that changes its contents contradicts nothing.
        let status = unsafe {
            let start = self.base.as_ptr().cast::<c_void>().wrapping_byte_add(offset);
            libc::madvise(start, to_usize(range.len().0), advice)
        };
        if status == 0 {
            return Ok(());
        }
        Err(RangeError::Advise { advice: name, range, source: io::Error::last_os_error() })
    }

    /// The word at `offset`, a multiple of 8. Waits if the page is absent from a registered range.
    pub fn read_u64(&self, offset: ByteCount) -> Result<u64, RangeError> {
        self.check_words(offset, WORD)?;
        // SAFETY: checked above.
        Ok(unsafe { self.word(to_usize(offset.0) / WORD) }.load(Ordering::Relaxed))
    }

    /// Sets the word at `offset`, a multiple of 8. Waits if the page is absent from a registered range.
    pub fn write_u64(&self, offset: ByteCount, value: u64) -> Result<(), RangeError> {
        self.check_words(offset, WORD)?;
        // SAFETY: checked above.
        unsafe { self.word(to_usize(offset.0) / WORD) }.store(value, Ordering::Relaxed);
        Ok(())
    }

    /// Puts `new` in the place of `old` in the word at `offset`, a multiple of 8, as one atomic operation that is ordered with all
    /// others of its kind; or fails with what it holds. Waits if the page is absent from a registered range.
    pub fn exchange_u64(&self, offset: ByteCount, old: u64, new: u64) -> Result<Result<(), u64>, RangeError> {
        self.check_words(offset, WORD)?;
        // SAFETY: checked above.
        let word = unsafe { self.word(to_usize(offset.0) / WORD) };
        Ok(word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).map(|_| ()))
    }

    /// Copies memory from `offset` on into `bytes`; both offset and length are multiples of 8. Each word is read
    /// once; if somebody writes meanwhile, words from before and after mix.
    pub fn copy_from(&self, offset: ByteCount, bytes: &mut [u8]) -> Result<(), RangeError> {
        self.check_words(offset, bytes.len())?;
        let first = to_usize(offset.0) / WORD;
        let (words, _) = bytes.as_chunks_mut::<WORD>();
        for (index, word) in words.iter_mut().enumerate() {
            // SAFETY: checked above for all words of the range.
            *word = unsafe { self.word(first + index) }.load(Ordering::Relaxed).to_ne_bytes();
        }
        Ok(())
    }

    /// Copies `bytes` into memory from `offset` on; both offset and length are multiples of 8.
    pub fn copy_into(&self, offset: ByteCount, bytes: &[u8]) -> Result<(), RangeError> {
        self.check_words(offset, bytes.len())?;
        let first = to_usize(offset.0) / WORD;
        let (words, _) = bytes.as_chunks::<WORD>();
        for (index, word) in words.iter().enumerate() {
            // SAFETY: checked above for all words of the range.
            unsafe { self.word(first + index) }.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives the memory up to the end of the process: the addresses stay valid whatever happens to their users.
    pub fn leak(self) -> HvaRange {
        let range = self.range;
        std::mem::forget(self);
        range
    }

    fn check_words(&self, offset: ByteCount, len: usize) -> Result<(), RangeError> {
        let len = ByteCount(len as u64);
        if !offset.is_multiple_of(WORD) || !len.is_multiple_of(WORD) {
            return Err(RangeError::Unaligned { offset: offset.0, len });
        }
        match offset.0.checked_add(len.0) {
            Some(end) if end <= self.len().0 => Ok(()),
            _ => Err(RangeError::OffsetOutside { offset: offset.0, len, mapping_len: self.len() }),
        }
    }

    /// # Safety
    ///
    /// The word of that index lies in the mapping.
    unsafe fn word(&self, index: usize) -> &AtomicU64 {
        // SAFETY: the base is aligned to a block, the word is in bounds (the caller's promise) and mapped for as
        // long as `self` is borrowed. An atomic reference tolerates any change of the memory; the module accesses
        // it in no other way than by atomics of this size.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(index)) }
    }
}

impl Drop for AnonymousMapping {
    fn drop(&mut self) {
        // SAFETY: the memory is owned by this value, and nothing borrowed from it is left. A failure (no memory to
        // split kernel structures) leaves the memory mapped, which is a leak and no danger.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), to_usize(self.len().0)) };
    }
}
