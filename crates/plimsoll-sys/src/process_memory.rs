//! Another process's memory from outside: reading it, and advising the kernel about it.
//!
//! What enters: a process and addresses in it. What leaves: how far the call came and why no further. What must
//! never happen: this process's memory written beyond the caller's buffer.
//!
//! **Reading waits where the owner would wait.** A page that is absent from a registered range of a kernel-mode
//! userfaultfd blocks the reader until somebody installs it. A manager must never read a range whose faults it
//! serves itself unless it knows every page to be there. While a read is in flight, MOVE of its pages says busy.
#![expect(unsafe_code, reason = "process_vm_readv(2) and process_madvise(2) have no safe wrapper")]

use crate::pidfd::Pidfd;
use crate::{HvaRange, ProcessId, to_usize};
use plimsoll_types::{ByteCount, Hva};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// UIO_MAXIOV: more ranges in one call are refused whole.
const RANGES_PER_CALL: usize = 1024;

/// How far a call came. `stop` is `None` exactly when all was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a call may have done only part of its ranges, or nothing"]
pub struct Transfer {
    /// Bytes done, counted through the ranges in their order.
    pub done: ByteCount,
    /// Why no more were done.
    pub stop: Option<Refusal>,
}

/// Why the kernel went no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nothing is mapped there, or the page is poisoned.
    #[error("nothing readable is mapped there")]
    NotMapped,
    /// The process is gone.
    #[error("the process is gone")]
    NoProcess,
    /// The process belongs to somebody else.
    #[error(
        "not permitted: run as the user of the process, or with CAP_SYS_PTRACE (and CAP_SYS_NICE for advice)"
    )]
    NotPermitted,
    /// The buffer is shorter than the ranges, or longer.
    #[error("the buffer's length is not the sum of the ranges")]
    LengthMismatch,
    /// The kernel does not know the advice, or it does not apply to this memory, or a range is not page-aligned.
    #[error("the advice does not apply to this memory, or is unknown to this kernel")]
    Unsuitable,
    /// The pages are in use in a way that forbids it, or memory is short; later it may work.
    #[error("the pages are busy or memory is short: try again later")]
    TryLater,
    /// Anything else.
    #[error("unexpected error {0} from the kernel")]
    Other(i32),
}

impl Refusal {
    fn last() -> Self {
        match io::Error::last_os_error().raw_os_error().unwrap_or(0) {
            libc::EFAULT | libc::ENOMEM | libc::EHWPOISON => Self::NotMapped,
            libc::ESRCH => Self::NoProcess,
            libc::EPERM | libc::EACCES => Self::NotPermitted,
            libc::EINVAL => Self::Unsuitable,
            libc::EAGAIN | libc::EBUSY => Self::TryLater,
            errno => Self::Other(errno),
        }
    }
}

/// Reads from `address` on until `bytes` is full. Needs the right to ptrace the process.
pub fn read(process: ProcessId, address: Hva, bytes: &mut [u8]) -> Transfer {
    match HvaRange::new(address, ByteCount(bytes.len() as u64)) {
        Some(range) => read_vectored(process, &[range], bytes),
        None => Transfer { done: ByteCount(0), stop: Some(Refusal::NotMapped) },
    }
}

/// Reads all ranges, one after the other, into `bytes`, whose length is their sum.
///
/// Bytes of `bytes` beyond `done` may or may not have been written.
pub fn read_vectored(process: ProcessId, ranges: &[HvaRange], bytes: &mut [u8]) -> Transfer {
    let sum = ranges.iter().try_fold(0u64, |sum, range| sum.checked_add(range.len().0));
    if sum != Some(bytes.len() as u64) {
        return Transfer { done: ByteCount(0), stop: Some(Refusal::LengthMismatch) };
    }
    let mut cursor = Cursor::new(ranges);
    let mut rest = bytes;
    let stop = loop {
        let Some((remote, len)) = cursor.next_call() else { break None };
        let local =
            libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: to_usize(len).min(rest.len()) };
        // SAFETY: one local vector over `rest`, which is exclusively borrowed, and no longer than it. The remote
        // vectors are only numbers here; the kernel checks them against the other process. If that is this very
        // process, memory is only read, through the kernel.
        let status = unsafe {
            libc::process_vm_readv(
                process.as_raw(),
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as u64,
                0,
            )
        };
        // After a partial read the next round starts at the byte that failed, and so learns the reason.
        match usize::try_from(status) {
            Ok(0) => break Some(Refusal::NotMapped),
            Ok(read) => {
                cursor.advance(read as u64);
                rest = rest.split_at_mut_checked(read).map_or(&mut [], |(_, rest)| rest);
            }
            Err(_) => break Some(Refusal::last()),
        }
    };
    Transfer { done: cursor.done(), stop }
}

/// What the kernel should do with memory of another process. None of these changes what a byte reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Write it to swap and free it (MADV_PAGEOUT).
    PageOut,
    /// Make it the next to be reclaimed (MADV_COLD).
    Cold,
    /// Read it back from swap (MADV_WILLNEED).
    WillNeed,
    /// Make huge pages of it (MADV_COLLAPSE).
    Collapse,
}

impl Advice {
    const fn number(self) -> i32 {
        match self {
            Self::WillNeed => libc::MADV_WILLNEED,
            Self::Cold => libc::MADV_COLD,
            Self::PageOut => libc::MADV_PAGEOUT,
            Self::Collapse => libc::MADV_COLLAPSE,
        }
    }
}

/// Whether advice to that process is permitted: the kernel checks that before it looks at what is advised.
///
/// # Errors
/// [`Refusal::NotPermitted`] or [`Refusal::NoProcess`], for example.
pub fn may_advise(process: &Pidfd) -> Result<(), Refusal> {
    // SAFETY: no vectors, so nothing is read at the pointer, and nothing is advised.
    let status = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_fd().as_raw_fd(),
            std::ptr::null::<libc::iovec>(),
            0usize,
            Advice::Cold.number(),
            0,
        )
    };
    if status < 0 { Err(Refusal::last()) } else { Ok(()) }
}

/// Advises about ranges of whole pages of another process. Needs the right to ptrace it, and CAP_SYS_NICE.
///
/// Advice counts as done where the kernel accepted it; whether pages left is seen in the page map.
pub fn advise(process: &Pidfd, ranges: &[HvaRange], advice: Advice) -> Transfer {
    let mut cursor = Cursor::new(ranges);
    let stop = loop {
        let Some((remote, _)) = cursor.next_call() else { break None };
        // SAFETY: the arguments are those of process_madvise(2): descriptor, vectors, count, advice, flags. The
        // vectors live across the call and are only read. None of the four kinds of advice changes what the memory
        // reads as, so even on this process it contradicts no reference.
        let status = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_fd().as_raw_fd(),
                remote.as_ptr(),
                remote.len(),
                advice.number(),
                0,
            )
        };
        match u64::try_from(status) {
            Ok(0) => break Some(Refusal::TryLater),
            Ok(done) => cursor.advance(done),
            Err(_) => break Some(Refusal::last()),
        }
    };
    Transfer { done: cursor.done(), stop }
}

/// A place in a list of ranges, moved on by however many bytes a call did.
struct Cursor<'a> {
    ranges: &'a [HvaRange],
    within: u64,
    done: u64,
}

impl<'a> Cursor<'a> {
    const fn new(ranges: &'a [HvaRange]) -> Self {
        Self { ranges, within: 0, done: 0 }
    }

    const fn done(&self) -> ByteCount {
        ByteCount(self.done)
    }

    /// The vectors of the next call and their length in sum, or `None` when all is done.
    fn next_call(&self) -> Option<(Vec<libc::iovec>, u64)> {
        let mut skip = self.within;
        let mut sum = 0u64;
        let mut vectors = Vec::with_capacity(self.ranges.len().min(RANGES_PER_CALL));
        for range in self.ranges.iter().take(RANGES_PER_CALL) {
            let (start, len) = (range.start().0 + skip, range.len().0 - skip);
            skip = 0;
            // Lengths beyond the address space would be refused anyway; stop before the sum overflows.
            let Some(total) = sum.checked_add(len) else { break };
            sum = total;
            if len > 0 {
                vectors.push(libc::iovec {
                    iov_base: std::ptr::without_provenance_mut(to_usize(start)),
                    iov_len: to_usize(len),
                });
            }
        }
        match (sum, self.ranges.len() > RANGES_PER_CALL) {
            (0, false) => None,
            // 1,024 empty ranges in front of others: let the kernel see the rest.
            (0, true) => Self { ranges: self.ranges.get(RANGES_PER_CALL..)?, within: 0, done: 0 }.next_call(),
            _ => Some((vectors, sum)),
        }
    }

    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        self.within += bytes;
        while let Some((first, rest)) = self.ranges.split_first() {
            if self.within < first.len().0 {
                break;
            }
            self.within -= first.len().0;
            self.ranges = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> HvaRange {
        HvaRange::new(Hva(start), ByteCount(len)).unwrap()
    }

    fn call(cursor: &Cursor<'_>) -> Option<(Vec<(usize, usize)>, u64)> {
        let (vectors, sum) = cursor.next_call()?;
        Some((vectors.iter().map(|v| (v.iov_base.addr(), v.iov_len)).collect(), sum))
    }

    #[test]
    fn a_cursor_takes_up_where_a_call_stopped() {
        let ranges = [range(0x1000, 0x100), range(0x9000, 0), range(0x2000, 0x200)];
        let mut cursor = Cursor::new(&ranges);
        assert_eq!(call(&cursor), Some((vec![(0x1000, 0x100), (0x2000, 0x200)], 0x300)));
        cursor.advance(0x180);
        assert_eq!(call(&cursor), Some((vec![(0x2080, 0x180)], 0x180)));
        cursor.advance(0x180);
        assert_eq!(call(&cursor), None);
        assert_eq!(cursor.done(), ByteCount(0x300));
    }

    #[test]
    fn more_ranges_than_one_call_takes_are_split() {
        let mut ranges = vec![range(0, 0); RANGES_PER_CALL];
        ranges.extend((0..1500).map(|i| range(i * 0x2000, 0x10)));
        let mut cursor = Cursor::new(&ranges);
        let mut bytes = 0;
        while let Some((vectors, sum)) = cursor.next_call() {
            assert!(vectors.len() <= RANGES_PER_CALL);
            cursor.advance(sum);
            bytes += sum;
        }
        assert_eq!(bytes, 1500 * 0x10);
    }
}
