//! What a back end that takes a machine's memory can do, whichever way it does it.
//!
//! Enters: how much is wanted. Leaves: what was really taken and, where that is less, why. What must never happen: a page
//! counted as taken that is still in RAM.
//!
//! [`KernelMachine`](crate::kernel::KernelMachine) implements it. A machine of the userfaultfd manager does not: there a
//! request is an order that the machine's own pager thread carries out while it serves faults
//! ([`uffd::manager`](crate::uffd::manager)), so what was taken is seen in its statistics later, not returned. What joins
//! the two is a policy that reads [`Usage`] and working sets and gives targets, whoever works towards them.
use plimsoll_sys::process_memory::Refusal;
use plimsoll_types::{ByteCount, PageCount};
use std::path::PathBuf;
use std::time::Instant;

/// Hot blocks to make huge again in a period: 7 ms each (FACTS.md).
pub const COLLAPSED_MAX: u32 = 4;

/// One machine's memory, as far as it can be taken. Driven by one thread.
pub trait Reclaimer {
    /// Why a call failed altogether.
    type Error: std::error::Error + 'static;

    /// Where the machine's pages are now.
    ///
    /// # Errors
    /// When the machine is gone or cannot be looked at.
    fn usage(&mut self) -> Result<Usage, Self::Error>;

    /// Takes pages, the least used first, and says how many left RAM.
    ///
    /// # Errors
    /// When the machine is gone or may not be managed. Having taken less than wanted is no error.
    fn reclaim(&mut self, want: PageCount, now: Instant) -> Result<Reclaimed, Self::Error>;

    /// Pages the machine uses in a period; `None` before enough is known.
    fn working_set(&self) -> Option<PageCount>;

    /// Makes huge pages of at most so many blocks that have become hot page by page.
    ///
    /// # Errors
    /// When the machine is gone or may not be managed.
    fn collapse_hot(&mut self, blocks_max: u32) -> Result<Collapsed, Self::Error>;
}

/// Where a machine's pages are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In RAM, mapped by the machine's process. Pages that were read and never written take none.
    pub resident: PageCount,
    /// Anywhere else: in swap, or in a store.
    pub elsewhere: PageCount,
}

/// What a request for memory came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reclaimed {
    /// Pages that left RAM.
    pub taken: PageCount,
    /// Why they are fewer than wanted, if they are.
    pub short: Option<Short>,
}

impl Reclaimed {
    /// Whether another request soon gets more.
    pub const fn goes_on(&self) -> bool {
        self.taken.0 > 0 || matches!(self.short, Some(Short::Paced { .. } | Short::Unseen))
    }
}

/// What collapsing came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collapsed {
    /// Blocks that are huge pages now.
    pub made: u32,
    /// Blocks the kernel could make none of: pages of them are pinned, or there is no free huge page.
    pub refused: u32,
}

/// Why less was taken than wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Short {
    /// The host has no swap.
    #[error("this host has no swap, so no page can be taken: add some, as zram or on a disk")]
    NoSwap,
    /// The host's swap is used up.
    #[error("the host's swap is full ({left} of {size} left): add some, or take from somewhere else")]
    SwapFull {
        /// What is left.
        left: ByteCount,
        /// What it holds.
        size: ByteCount,
    },
    /// The machine's cgroup may not swap.
    #[error(
        "its memory cgroup {cgroup:?} forbids swap: raise memory.swap.max (v2), or memory.swappiness and \
         memory.memsw.limit_in_bytes (v1)"
    )]
    CgroupForbidsSwap {
        /// The cgroup's directory.
        cgroup: PathBuf,
    },
    /// The machine's cgroup has swapped as much as it may.
    #[error("its memory cgroup {cgroup:?} may not swap more than {limit}")]
    CgroupSwapFull {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// Its limit.
        limit: ByteCount,
    },
    /// Pages did not leave although the kernel was asked.
    #[error("{pages} did not leave: locked, pinned by a device, or mapped by another process too")]
    Held {
        /// How many in a row.
        pages: PageCount,
    },
    /// The kernel refused for another reason.
    #[error("the kernel refused to page out")]
    Refused(#[source] Refusal),
    /// What is left has just been used.
    #[error("the rest has been in use lately")]
    InUse,
    /// Taking is slowed down.
    #[error("at most {rate} a second are taken from it at the moment")]
    Paced {
        /// The rate.
        rate: PageCount,
    },
    /// The call looked at as much memory as one may.
    #[error(
        "nothing else was found in the part of it that was looked at: the next request goes on from there"
    )]
    Unseen,
    /// There is no more.
    #[error("nothing else of it is in RAM")]
    NothingLeft,
}
