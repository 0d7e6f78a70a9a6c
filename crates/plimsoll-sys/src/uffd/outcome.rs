//! What became of a call on a range: how far it came and why it went no further. Both are in one value because the
//! kernel stops where it must (a hole, a pinned page, an event) and what it did until there stays done.

use plimsoll_types::ByteCount;
use rustix::io::Errno;
use std::io;

/// How far a call came. `stop` is `None` exactly when all was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a call may have done only part of its range, or nothing"]
pub struct Outcome {
    /// Bytes done, from the start of the range.
    pub done: ByteCount,
    /// Why no more were done.
    pub stop: Option<Stop>,
}

impl Outcome {
    /// True when the whole range was done.
    pub const fn is_complete(&self) -> bool {
        self.stop.is_none()
    }

    /// From an ioctl's status and its progress field. The kernel writes there the bytes done, or a negated errno if
    /// there are none, or leaves the 0 we put there.
    pub(super) fn new(status: Result<(), Errno>, progress: i64, asked: ByteCount) -> Self {
        let done = ByteCount(u64::try_from(progress).unwrap_or(0));
        let stop = match status {
            Ok(()) if done == asked => None,
            // Not what the interface promises; taking it for a partial success keeps the caller's loop right.
            Ok(()) => Some(Stop::Again),
            Err(errno) => Some(Stop::from(errno)),
        };
        Self { done, stop }
    }
}

/// Why the kernel went no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Stop {
    /// With nothing done: an event (remove, remap, unmap, fork) waits to be read, and calls on the descriptor are
    /// refused until it has been. With something done: the kernel does not say what stopped it; calling again for
    /// the rest either goes on or says.
    #[error("the kernel asks to try again: read the pending events, then take up the rest")]
    Again,
    /// A page is there already (COPY, ZEROPAGE, MOVE's destination, CONTINUE, POISON).
    #[error("a page is there already")]
    Exists,
    /// The range is not (or no longer) mapped and registered with this descriptor, or MOVE's source has a hole.
    #[error("the range is not registered with this userfaultfd, or the page to move is not there")]
    NotMapped,
    /// MOVE: the page is pinned for I/O, merged by KSM, or was shared with a forked child.
    #[error("the page is held by somebody else (pinned, merged, or once shared with a forked child)")]
    Busy,
    /// No memory: the host's, or the memory cgroup's of the process that owns the range.
    #[error("no memory left on the host or in the memory cgroup of the process")]
    NoMemory,
    /// The process is gone.
    #[error("the process that owns the range is gone")]
    NoProcess,
    /// The range is not page-aligned or is empty, crosses mappings, or does not support the call. MOVE also says
    /// this when called from another process than the descriptor's.
    #[error("the range is unaligned, empty, crosses mappings or does not support this call")]
    Invalid,
    /// The page was poisoned or the bytes to copy could not be read.
    #[error("the source bytes cannot be read")]
    Unreadable,
    /// Anything else.
    #[error("unexpected error {0} from the kernel")]
    Other(OsError),
}

/// An errno the calls are not known to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OsError(pub i32);

impl std::fmt::Display for OsError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::Again,
            Errno::EXIST => Self::Exists,
            Errno::NOENT => Self::NotMapped,
            Errno::BUSY => Self::Busy,
            Errno::NOMEM => Self::NoMemory,
            Errno::SRCH => Self::NoProcess,
            Errno::INVAL => Self::Invalid,
            Errno::FAULT | Errno::HWPOISON => Self::Unreadable,
            errno => Self::Other(OsError(errno.raw_os_error())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_and_reason_are_kept_apart() {
        let asked = ByteCount(0x4000);
        let all = Outcome::new(Ok(()), 0x4000, asked);
        assert!(all.is_complete());
        let part = Outcome::new(Err(Errno::AGAIN), 0x3000, asked);
        assert_eq!(part, Outcome { done: ByteCount(0x3000), stop: Some(Stop::Again) });
        let none = Outcome::new(Err(Errno::EXIST), -17, asked);
        assert_eq!(none, Outcome { done: ByteCount(0), stop: Some(Stop::Exists) });
        // A success that did less than asked must not look complete.
        assert!(!Outcome::new(Ok(()), 0x1000, asked).is_complete());
    }
}
