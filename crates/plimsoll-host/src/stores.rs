//! What the stores of machines under our own pager hold, all domains together, and how much of that holds nothing.
//!
//! Enters: a manager. Leaves: sums for the API, the metrics and `plimsoll line`; and what storing pages took of processors.
use plimsoll_linux::uffd::host::Host;
use plimsoll_linux::uffd::manager::Manager;
use plimsoll_store::{Fragmentation, Stats};
use plimsoll_types::PageCount;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;
use utoipa::ToSchema;

/// The page stores of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stores {
    /// Memory they take, records and index included.
    pub held_bytes: u64,
    /// Of that, what is for pages' compressed bytes.
    pub data_slab_bytes: u64,
    /// Of that, slots that hold nothing: what compaction can win back.
    pub free_slot_bytes: u64,
    /// And what lies behind the bytes in slots that do: what a choice of few sizes costs.
    pub slot_waste_bytes: u64,
    /// The part of `data_slab_bytes` that holds no byte of a page, in millionths.
    pub fragmentation_ppm: u32,
    /// About how much of what is stored differs from another page only a little, by a sample.
    pub near_duplicate_bytes: u64,
    /// What it takes of processors to fill them.
    #[serde(default)]
    pub storing: Storing,
}

/// What storing pages has taken of processors since this manager began, and may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Storing {
    /// CPU time of pages stored ahead of demand, in microseconds.
    pub ahead_cpu_us: u64,
    /// Of pages stored while somebody waited for memory or was about to, or because an operator said so.
    pub demand_cpu_us: u64,
    /// The share of one processor that the former has, in millionths; none is without limit.
    pub ahead_share_ppm: Option<u32>,
}

impl Storing {
    /// That of a manager's pagers.
    pub fn of(host: &Host) -> Self {
        let storing = host.storing();
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Self {
            ahead_cpu_us: us(storing.ahead),
            demand_cpu_us: us(storing.demand),
            ahead_share_ppm: storing.share_ppm,
        }
    }
}

impl Stores {
    /// The stores of all domains of a manager.
    pub fn of(manager: &Manager) -> Self {
        let sum = Self::sum(manager.domains().map(|domain| domain.store(|store| store.stats())));
        Self { storing: Storing::of(manager.host()), ..sum }
    }

    fn sum(stores: impl Iterator<Item = Stats>) -> Self {
        let (mut sum, mut all) = (Self::default(), Fragmentation::default());
        for stats in stores {
            all += stats.fragmentation();
            sum.held_bytes += stats.held().0;
            sum.near_duplicate_bytes += PageCount(stats.near_duplicate.0).bytes().0;
        }
        Self {
            data_slab_bytes: all.data_slabs.0,
            free_slot_bytes: all.free_slots.0,
            slot_waste_bytes: all.slot_waste.0,
            fragmentation_ppm: u32::try_from(all.in_parts_of(1_000_000)).unwrap_or(u32::MAX),
            ..sum
        }
    }
}

impl fmt::Display for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "taken up by compressed pages; {:.1} % of its slabs hold none",
            f64::from(self.fragmentation_ppm) / 1e4
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_types::ByteCount;

    #[test]
    fn the_stores_of_all_domains_are_one_sum_and_the_part_that_holds_nothing_is_of_all() {
        let stats = |data: u64, free: u64, slabs: u64| Stats {
            data: ByteCount(data),
            free_slots: ByteCount(free),
            data_slabs: ByteCount(slabs),
            metadata: ByteCount(7),
            near_duplicate: PageCount(2),
            ..Stats::default()
        };
        let sum = Stores::sum([stats(60, 30, 100), stats(280, 0, 300)].into_iter());
        let expected = Stores {
            held_bytes: 414,
            data_slab_bytes: 400,
            free_slot_bytes: 30,
            slot_waste_bytes: 30,
            fragmentation_ppm: 150_000,
            near_duplicate_bytes: 4 * 4096,
            storing: Storing::default(),
        };
        assert_eq!(sum, expected);
        assert_eq!(Stores::sum(std::iter::empty()), Stores::default());
    }
}
