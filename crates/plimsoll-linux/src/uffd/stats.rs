//! What the pagers count about a machine: each about its shard, and all of them together.
use super::times::Times;
use plimsoll_core::machine::Anomalies;
use plimsoll_core::map::Census;
use plimsoll_core::prefetch::PrefetchStats;
use plimsoll_types::PageCount;
use std::time::Duration;

/// Counts since the machine was admitted, and its state when they were published.
#[derive(Clone, Debug, Default)]
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
    /// From reading a fault to waking its waiter.
    pub fault_times: Times,
    /// The sum of the same, and the part of it spent waiting for memory below the hard line.
    pub waited: Duration,
    /// Faults that waited for memory below the hard line: what reclaim ahead of demand had not freed in time.
    pub stalls: u64,
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

impl MachineStats {
    /// Counts one fault that was served.
    pub(crate) fn served(&mut self, waited: Duration) {
        self.fault_times.record(waited);
        self.waited += waited;
    }

    /// The sums over a machine's shards. The census and the working set are known when those of each shard are: a pager
    /// publishes for the first time when it has taken its shard over. Take-overs are those of the machine, not of its shards.
    pub fn merge(shards: impl IntoIterator<Item = Self>) -> Self {
        let mut shards = shards.into_iter();
        let mut sums = Self::default();
        let mut all_known = true;
        if let Some(first) = shards.next() {
            sums.working_set = Some(PageCount(0));
            all_known &= first.census.total().0 > 0;
            sums.add(first);
        }
        for shard in shards {
            all_known &= shard.census.total().0 > 0;
            sums.add(shard);
        }
        if !all_known {
            sums.census = Census::default();
        }
        sums
    }

    fn add(&mut self, shard: Self) {
        // Field by field, so that none is forgotten.
        let Self {
            census,
            limbo,
            ram,
            working_set,
            anomalies,
            table_bytes,
            faults,
            ahead,
            blocks,
            captured,
            refused,
            stored,
            discarded,
            poisoned,
            takeovers,
            fault_times,
            waited,
            stalls,
            stalled,
        } = shard;
        self.census += census;
        self.limbo += limbo;
        self.ram += ram;
        self.working_set = self.working_set.zip(working_set).map(|(sum, pages)| sum + pages);
        self.anomalies.missing += anomalies.missing;
        self.anomalies.lost += anomalies.lost;
        self.table_bytes += table_bytes;
        self.faults.add(faults);
        self.ahead += ahead;
        self.blocks.add(blocks);
        self.captured += captured;
        self.refused += refused;
        self.stored.add(stored);
        self.discarded += discarded;
        self.poisoned += poisoned;
        self.takeovers = self.takeovers.max(takeovers);
        self.fault_times.merge(fault_times);
        self.waited += waited;
        self.stalls += stalls;
        self.stalled += stalled;
    }
}

impl FaultCounts {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.zero + self.limbo + self.stored + self.present
    }

    const fn add(&mut self, Self { zero, limbo, stored, present }: Self) {
        self.zero += zero;
        self.limbo += limbo;
        self.stored += stored;
        self.present += present;
    }
}

impl BlockCounts {
    const fn add(&mut self, Self { left, watched, taken, returned }: Self) {
        self.left += left;
        self.watched += watched;
        self.taken += taken;
        self.returned += returned;
    }
}

impl StoredCounts {
    const fn add(&mut self, Self { zero, same, duplicate, compressed, raw }: Self) {
        self.zero += zero;
        self.same += same;
        self.duplicate += duplicate;
        self.compressed += compressed;
        self.raw += raw;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_core::map::{HeapWords, PageMap};

    #[test]
    fn a_machines_counts_are_the_sums_of_its_shards() {
        let shard = |faults: u32, working_set| {
            let mut stats = MachineStats::default();
            (0..faults).for_each(|_| stats.served(Duration::from_micros(50)));
            stats.faults.stored = u64::from(faults);
            stats.working_set = working_set;
            stats.takeovers = 2;
            stats
        };
        let known = |pages| Some(PageCount(pages));
        let sums = MachineStats::merge([shard(3, known(10)), shard(4, known(20))]);
        assert_eq!((sums.faults.stored, sums.fault_times.count()), (7, 7));
        assert_eq!((sums.waited, sums.takeovers), (Duration::from_micros(350), 2));
        assert_eq!(sums.working_set, known(30));
        assert_eq!(MachineStats::merge([shard(1, known(10)), shard(1, None)]).working_set, None);
        assert_eq!(MachineStats::merge([]).working_set, None);
    }

    #[test]
    fn a_machines_census_is_known_when_that_of_every_shard_is() {
        let published = |pages| {
            let map = PageMap::adopt(HeapWords::new(pages)).expect("words of zeros");
            MachineStats { census: *map.census(), ..MachineStats::default() }
        };
        let total = |shards: [MachineStats; 2]| MachineStats::merge(shards).census.total();
        assert_eq!(total([published(3), published(4)]), PageCount(7));
        assert_eq!(total([published(3), MachineStats::default()]), PageCount(0));
        assert_eq!(total([MachineStats::default(), published(4)]), PageCount(0));
    }
}
