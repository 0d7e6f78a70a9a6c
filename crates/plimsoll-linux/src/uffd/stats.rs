//! What the pager counts about one machine.
use hdrhistogram::Histogram;
use plimsoll_core::machine::Anomalies;
use plimsoll_core::map::Census;
use plimsoll_core::prefetch::PrefetchStats;
use plimsoll_types::PageCount;
use std::time::Duration;

/// Faults that take longer than a minute are counted as taking a minute.
const FAULT_NS_MAX: u64 = 60_000_000_000;

/// Counts since the machine was admitted, and its state when they were published.
#[derive(Clone, Debug)]
pub struct MachineStats {
    /// Pages by state.
    pub census: Census,
    /// Pages in limbo.
    pub limbo: PageCount,
    /// Pages that hold RAM: in the guest, in limbo, or waiting to be zapped.
    pub ram: PageCount,
    /// Pages the machine uses in a sampling period, if one has passed.
    pub working_set: Option<PageCount>,
    /// What looking found that words could not explain.
    pub anomalies: Anomalies,
    /// Bookkeeping beside the words, in bytes.
    pub table_bytes: usize,
    /// Faults answered with zeros, from limbo, from the store.
    pub faults: FaultCounts,
    /// Pages brought back before they were touched, and what became of them.
    pub ahead: PrefetchStats,
    /// Huge pages.
    pub blocks: BlockCounts,
    /// Pages moved out.
    pub captured: u64,
    /// Pages that could not be moved.
    pub refused: u64,
    /// Pages stored, zero pages dropped, by how.
    pub stored: StoredCounts,
    /// Pages the guest gave back.
    pub discarded: u64,
    /// Pages whose touch now fails.
    pub poisoned: u64,
    /// Times a manager took the machine over.
    pub takeovers: u64,
    /// From reading a fault to waking its waiter, in nanoseconds.
    pub fault_ns: Histogram<u64>,
    /// The sum of the same, and the part of it spent waiting for memory below the hard line.
    pub waited: Duration,
    /// Time in which a fault could not be served because the hard line was reached.
    pub stalled: Duration,
}

/// Faults by where the bytes were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Nowhere: never touched, or given back.
    pub zero: u64,
    /// Limbo.
    pub limbo: u64,
    /// The store.
    pub stored: u64,
    /// In RAM already: two vCPUs touched the page at once.
    pub present: u64,
}

/// What became of blocks of 2 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Left to the kernel when they were first touched.
    pub left: u64,
    /// Taken back from it.
    pub watched: u64,
    /// Taken as one huge page.
    pub taken: u64,
    /// Brought back from limbo as one.
    pub returned: u64,
}

/// Pages that left limbo, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredCounts {
    /// All zero: nothing kept.
    pub zero: u64,
    /// One word repeated.
    pub same: u64,
    /// The same bytes were there.
    pub duplicate: u64,
    /// Compressed.
    pub compressed: u64,
    /// Incompressible.
    pub raw: u64,
}

impl Default for MachineStats {
    fn default() -> Self {
        Self {
            census: Census::default(),
            limbo: PageCount(0),
            ram: PageCount(0),
            working_set: None,
            anomalies: Anomalies::default(),
            table_bytes: 0,
            faults: FaultCounts::default(),
            ahead: PrefetchStats::default(),
            blocks: BlockCounts::default(),
            captured: 0,
            refused: 0,
            stored: StoredCounts::default(),
            discarded: 0,
            poisoned: 0,
            takeovers: 0,
            fault_ns: fault_histogram(),
            waited: Duration::ZERO,
            stalled: Duration::ZERO,
        }
    }
}

/// Two significant digits from 1 ns to the longest fault told apart.
fn fault_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, FAULT_NS_MAX, 2)
        .expect("the bounds and digits are ones the constructor takes")
}

impl MachineStats {
    /// Counts one fault that was served.
    pub(crate) fn served(&mut self, waited: Duration) {
        self.fault_ns.saturating_record(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX));
        self.waited += waited;
    }
}
