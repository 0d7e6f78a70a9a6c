//! What a machine costs besides its guest's pages, as the kernel counts it.
//!
//! Enters: a process. Leaves: bytes by kind. What must never happen: guest memory counted as overhead; who knows how much
//! of the process that is takes it off.
use plimsoll_policy::admission::Overheads;
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::maps::{MeasuredMapping, smaps};
use plimsoll_sys::procfs::{ProcfsError, smaps_rollup, status};
use plimsoll_types::ByteCount;
use serde::{Deserialize, Serialize};
use std::iter::Sum;
use std::ops::Add;
use thiserror::Error;

/// What a machine of our own VMM costs, measured with 1, 4 and 16 of them of 96 MiB (`tests/loops/overhead.rs` of plimsoll):
/// 740 KiB of heap, stacks, queues and what the program's size has written at its start; page tables of 8 bytes a page and 120 KiB for
/// whatever else is mapped; words of 8 bytes a page, and 2.7 of the rest, 12 KiB of which are there however small the machine is. Its store is part of what it takes up.
pub(super) const OWN_VMM: Overheads =
    Overheads { tables_per_page: 10, page_tables_per_page: 8, store_per_page: 0, vmm: ByteCount(876 << 10) };

/// What a machine costs, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Overhead {
    /// The VMM's own memory: heap, stacks, buffers. Its program and libraries are there once, whatever the number of machines,
    /// and the page cache's.
    #[schema(value_type = u64)]
    pub vmm: ByteCount,
    /// The kernel's page tables of its process. Those of the second stage are counted by nobody.
    #[schema(value_type = u64)]
    pub page_tables: ByteCount,
    /// Our page words and what is beside them.
    #[schema(value_type = u64)]
    pub tables: ByteCount,
}

impl Overhead {
    /// All of it.
    pub fn total(&self) -> ByteCount {
        self.vmm + self.page_tables + self.tables
    }
}

impl Add for Overhead {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            vmm: self.vmm + other.vmm,
            page_tables: self.page_tables + other.page_tables,
            tables: self.tables + other.tables,
        }
    }
}

impl Sum for Overhead {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

/// A process could not be measured.
#[derive(Debug, Error)]
#[error("its memory cannot be measured")]
pub struct OverheadError(#[from] ProcfsError);

/// Measures a process, leaving out the mappings that are its guest's memory. Walks its page tables twice, about a millisecond
/// for 100 MiB.
///
/// # Errors
/// When it has ended, or may not be looked at.
pub fn measure(
    process: ProcessId,
    is_guest: impl Fn(&MeasuredMapping) -> bool,
) -> Result<Overhead, OverheadError> {
    let (mappings, sizes, status) = (smaps(process)?, smaps_rollup(process)?, status(process)?);
    let guest = mappings.iter().filter(|mapping| is_guest(mapping)).map(|mapping| mapping.resident).sum();
    let vmm = (sizes.pss_anon + sizes.pss_shmem).saturating_sub(guest);
    Ok(Overhead { vmm, page_tables: status.page_tables, tables: ByteCount(0) })
}
