//! Which pages of a process exist, and where: ranges enter, typed entries or runs of like pages leave. Reads only;
//! the answer is already old when it arrives unless the process stands still.
//!
//! *Populated* is what recovery has to ask for, not *present*: a page that is swapped out or just migrating has
//! contents although its present bit is off. The kernel reports both of these as swapped, and also the marks that
//! write protection and poison leave in an empty place: a poisoned page counts as populated.
#![expect(unsafe_code, reason = "PAGEMAP_SCAN is an ioctl that writes into a vector")]

use crate::{HvaRange, ProcessId};
use bitflags::bitflags;
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE, Pfn};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Entries read per system call: 32 KiB of entries, 16 MiB of address space.
const ENTRIES_PER_READ: usize = 4096;
/// Where a present page's entry holds its frame number.
const FRAME_BITS: u64 = (1 << 55) - 1;
/// Runs fetched per PAGEMAP_SCAN: 12 KiB on the heap.
const RUNS_PER_SCAN: usize = 512;

/// The argument of PAGEMAP_SCAN (linux/fs.h, since 6.7).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// One run as PAGEMAP_SCAN writes it.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRun {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanArgument>(b'f', 16);
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);
const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<RawRun>() == 24);

bitflags! {
    /// What PAGEMAP_SCAN tells apart (PAGE_IS_*).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Categories: u64 {
        /// Its mapping is set up for asynchronous write protection.
        const WRITE_PROTECT_ALLOWED = 1 << 0;
        /// Written since it was last write-protected.
        const WRITTEN = 1 << 1;
        /// Belongs to a file or to shared memory.
        const FILE = 1 << 2;
        /// In RAM.
        const PRESENT = 1 << 3;
        /// Swapped out, migrating, or a mark in an empty place.
        const SWAPPED = 1 << 4;
        /// The shared zero page.
        const ZERO_PAGE = 1 << 5;
        /// Part of a huge page.
        const HUGE = 1 << 6;
        /// Soft-dirty.
        const SOFT_DIRTY = 1 << 7;
    }
}

bitflags! {
    /// One page's entry in /proc/PID/pagemap, without the frame number (which only root sees).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Entry: u64 {
        /// Soft-dirty.
        const SOFT_DIRTY = 1 << 55;
        /// Mapped by this process only.
        const EXCLUSIVE = 1 << 56;
        /// Write-protected by a userfaultfd.
        const WRITE_PROTECTED = 1 << 57;
        /// Belongs to a file or to shared memory.
        const FILE_OR_SHARED = 1 << 61;
        /// Swapped out, migrating, or a mark in an empty place.
        const SWAPPED = 1 << 62;
        /// In RAM.
        const PRESENT = 1 << 63;
    }
}

impl Entry {
    /// True when the page has contents, wherever they are.
    pub const fn is_populated(self) -> bool {
        self.intersects(Self::PRESENT.union(Self::SWAPPED))
    }
}

/// Consecutive pages of the same categories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The pages.
    pub range: HvaRange,
    /// Those of the categories asked to be returned that the pages have.
    pub categories: Categories,
}

/// Which pages a scan reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Pages must have all of these.
    pub all_of: Categories,
    /// Pages must have at least one of these, if there are any.
    pub any_of: Categories,
    /// What is told about a page that matches. Runs are split where it changes.
    pub report: Categories,
}

/// A pagemap could not be opened or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagemapError {
    /// There is no such process (any more).
    #[error("{0} is gone")]
    NoProcess(ProcessId),
    /// The process belongs to somebody else.
    #[error("not permitted to see the page map of {0}: run as its user, or with CAP_SYS_PTRACE")]
    NotPermitted(ProcessId),
    /// The range is not page-aligned.
    #[error("{range} is not whole pages")]
    Unaligned {
        /// The range.
        range: HvaRange,
    },
    /// The kernel has no PAGEMAP_SCAN.
    #[error("this kernel cannot scan page maps: PAGEMAP_SCAN needs Linux 6.7")]
    NoScan,
    /// The kernel returned something that makes no sense; going on could mean never coming to an end.
    #[error("the page map scan of {range} came to a stop at {stopped}")]
    Stuck {
        /// What was scanned.
        range: HvaRange,
        /// Where it made no progress.
        stopped: Hva,
    },
    /// Something else failed.
    #[error("reading the page map of {process} failed")]
    Other {
        /// The process.
        process: ProcessId,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The page map of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    process: ProcessId,
}

impl Pagemap {
    /// Opens it. Needs the right to ptrace the process. It follows the process, not a later one of the same number.
    pub fn open(process: ProcessId) -> Result<Self, PagemapError> {
        let file = File::open(format!("/proc/{}/pagemap", process.get()))
            .map_err(|source| Self::error(process, source))?;
        Ok(Self { file, process })
    }

    /// Whether the address space it was opened on still exists: not once the process has ended or executed another program,
    /// although its id may go on. Scans of an address space that is gone find nothing, without an error.
    pub fn is_alive(&self) -> Result<bool, PagemapError> {
        match self.file.read_at(&mut [0; size_of::<u64>()], 0) {
            Ok(bytes) => Ok(bytes > 0),
            Err(source) => Err(Self::error(self.process, source)),
        }
    }

    /// One entry per page of the range, in order, replacing what was in `entries`.
    pub fn read(&self, range: HvaRange, entries: &mut Vec<Entry>) -> Result<(), PagemapError> {
        entries.clear();
        self.read_raw(range, |bits| entries.push(Entry::from_bits_truncate(bits)))
    }

    /// The frame of each page of the range, in order, `None` for one that is not in RAM. Without CAP_SYS_ADMIN the kernel
    /// names frame 0 for all that are.
    pub fn frames(&self, range: HvaRange) -> Result<Vec<Option<Pfn>>, PagemapError> {
        let mut frames = Vec::new();
        self.read_raw(range, |bits| {
            let is_present = Entry::from_bits_truncate(bits).contains(Entry::PRESENT);
            frames.push(is_present.then_some(Pfn(bits & FRAME_BITS)));
        })?;
        Ok(frames)
    }

    fn read_raw(&self, range: HvaRange, mut report: impl FnMut(u64)) -> Result<(), PagemapError> {
        check_aligned(range)?;
        let page = PAGE_SIZE as u64;
        let mut next = range.start().0 / page;
        let end = range.end().0 / page;
        let at_once = |next: u64| {
            usize::try_from(end - next).map_or(ENTRIES_PER_READ, |left| left.min(ENTRIES_PER_READ))
        };
        let mut raw = vec![0u64; at_once(next)];
        while next < end {
            let wanted = at_once(next);
            let Some(batch) = raw.get_mut(..wanted) else { break };
            // A process that has ended reads as an empty file.
            let bytes = self
                .file
                .read_at(batch.as_mut_bytes(), next * size_of::<u64>() as u64)
                .map_err(|source| Self::error(self.process, source))?;
            let got = bytes / size_of::<u64>();
            if got == 0 {
                return Err(PagemapError::NoProcess(self.process));
            }
            batch.iter().take(got).for_each(|bits| report(*bits));
            next += got as u64;
        }
        Ok(())
    }

    /// Calls `report` for each run of pages that match, in ascending order, until the range is done.
    pub fn scan(
        &self,
        range: HvaRange,
        filter: Filter,
        mut report: impl FnMut(Run),
    ) -> Result<(), PagemapError> {
        check_aligned(range)?;
        let mut runs = vec![RawRun::default(); RUNS_PER_SCAN];
        let mut start = range.start().0;
        while start < range.end().0 {
            let mut scan = Scan {
                argument: ScanArgument {
                    size: size_of::<ScanArgument>() as u64,
                    flags: 0,
                    start,
                    end: range.end().0,
                    walk_end: 0,
                    vec: 0,
                    vec_len: 0,
                    max_pages: 0,
                    category_inverted: 0,
                    category_mask: filter.all_of.bits(),
                    category_anyof_mask: filter.any_of.bits(),
                    return_mask: filter.report.bits(),
                },
                runs: &mut runs,
            };
            // SAFETY: the file is a pagemap, and `Scan` describes this ioctl of it. It writes nothing but its
            // argument and the vector: the flags ask for no write protection.
            let (filled, walk_end) = match unsafe { rustix::ioctl::ioctl(&self.file, &mut scan) } {
                Ok(result) => result,
                Err(Errno::INTR) => continue,
                Err(Errno::NOTTY) => return Err(PagemapError::NoScan),
                Err(errno) => return Err(Self::error(self.process, errno.into())),
            };
            for run in runs.iter().take(filled) {
                let pages = HvaRange::between(Hva(run.start), Hva(run.end));
                let Some(pages) = pages.filter(|pages| range.contains(*pages)) else {
                    return Err(PagemapError::Stuck { range, stopped: Hva(run.start) });
                };
                report(Run { range: pages, categories: Categories::from_bits_truncate(run.categories) });
            }
            if walk_end <= start {
                return Err(PagemapError::Stuck { range, stopped: Hva(start) });
            }
            start = walk_end;
        }
        Ok(())
    }

    /// Calls `report` for each run of pages that have contents: present, swapped out or migrating. Neighbouring runs
    /// may touch.
    pub fn populated(&self, range: HvaRange, mut report: impl FnMut(HvaRange)) -> Result<(), PagemapError> {
        let filter = Filter {
            all_of: Categories::empty(),
            any_of: Categories::PRESENT | Categories::SWAPPED,
            // Nothing is told apart, so that the runs are as long as can be.
            report: Categories::empty(),
        };
        self.scan(range, filter, |run| report(run.range))
    }

    /// The bytes of the range that have contents.
    pub fn populated_bytes(&self, range: HvaRange) -> Result<ByteCount, PagemapError> {
        let mut sum = ByteCount(0);
        self.populated(range, |run| sum += run.len())?;
        Ok(sum)
    }

    fn error(process: ProcessId, source: io::Error) -> PagemapError {
        match (source.kind(), source.raw_os_error()) {
            (io::ErrorKind::NotFound, _) | (_, Some(libc::ESRCH)) => PagemapError::NoProcess(process),
            (io::ErrorKind::PermissionDenied, _) => PagemapError::NotPermitted(process),
            _ => PagemapError::Other { process, source },
        }
    }
}

fn check_aligned(range: HvaRange) -> Result<(), PagemapError> {
    if range.start().is_page_aligned() && range.len().is_multiple_of(PAGE_SIZE) {
        Ok(())
    } else {
        Err(PagemapError::Unaligned { range })
    }
}

/// One PAGEMAP_SCAN: the argument and the vector it points to, together so that neither outlives the other.
struct Scan<'a> {
    argument: ScanArgument,
    runs: &'a mut [RawRun],
}

// SAFETY: the kernel reads and updates one `ScanArgument` at the pointer, and writes at most `vec_len` runs at `vec`:
// `as_ptr` sets both from a slice that is borrowed exclusively until the call is over. Any bytes are valid runs.
unsafe impl Ioctl for &mut Scan<'_> {
    type Output = (usize, u64);
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument.vec = self.runs.as_mut_ptr().expose_provenance() as u64;
        self.argument.vec_len = self.runs.len() as u64;
        std::ptr::from_mut(&mut self.argument).cast()
    }

    unsafe fn output_from_ptr(
        filled: IoctlOutput,
        argument: *mut c_void,
    ) -> rustix::io::Result<(usize, u64)> {
        // SAFETY: the pointer is the one from `as_ptr`, to a live argument that the kernel left valid.
        let walk_end = unsafe { (*argument.cast::<ScanArgument>()).walk_end };
        Ok((usize::try_from(filled).unwrap_or(0), walk_end))
    }
}
