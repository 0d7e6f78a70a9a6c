//! What became of the guests, as numbers.
//!
//! Enters: what guests say before and after, what machines had meanwhile, the targets they were given. Leaves: figures. What
//! must never happen: a guest that died counted as if it had not been there; it has done nothing since.
use crate::figures::float;
use plimsoll_policy::damper::{DEAD_BAND, REVERSAL_MS};
use plimsoll_types::ByteCount;
use plimsoll_vmm::report::Summary;
use std::collections::BTreeMap;
use std::time::Duration;

/// A bucket of the guests' histograms ends so much above where it begins: four to each power of two.
const BUCKET: f64 = 1.19;
/// A target that goes back by more than the policy's dead band within this time has moved back and forth.
const SWING_WITHIN: Duration = Duration::from_millis(REVERSAL_MS);

/// What a guest did while time was taken.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) operations_per_second: f64,
    /// What an operation took on average.
    pub(super) mean_us: f64,
    /// Whether it ended meanwhile.
    pub(super) has_died: bool,
    pub(super) latency: BTreeMap<u64, u64>,
}

impl Work {
    /// Of a guest whose reports before and after were these. Of one that died, so long has passed.
    pub(super) fn between(before: &Summary, after: &Summary, died_in: Option<Duration>) -> Self {
        // One that died has no clock any more.
        let by_its_clock = || Duration::from_nanos(after.running_ns.saturating_sub(before.running_ns));
        let elapsed = died_in.unwrap_or_else(by_its_clock);
        let operations = float(after.operations.saturating_sub(before.operations));
        let mut latency: BTreeMap<u64, u64> = after.latency.buckets.iter().copied().collect();
        for (floor, count) in &before.latency.buckets {
            if let Some(now) = latency.get_mut(floor) {
                *now = now.saturating_sub(*count);
            }
        }
        latency.retain(|_, count| *count > 0);
        Self {
            operations_per_second: operations / elapsed.as_secs_f64().max(f64::MIN_POSITIVE),
            mean_us: mean_us(&latency),
            has_died: died_in.is_some(),
            latency,
        }
    }
}

/// What guests did in all of these runs, guest by guest.
pub(super) fn mean(runs: &[&[Work]]) -> Vec<Work> {
    let guests = runs.iter().map(|works| works.len()).min().unwrap_or(0);
    let guest = |nth: usize| {
        let works = || runs.iter().filter_map(move |works| works.get(nth));
        let latency = pooled(works());
        Work {
            operations_per_second: works().map(|work| work.operations_per_second).sum::<f64>()
                / float(runs.len() as u64),
            mean_us: mean_us(&latency),
            has_died: works().any(|work| work.has_died),
            latency,
        }
    };
    (0..guests).map(guest).collect()
}

/// All histograms as one.
pub(super) fn pooled<'a>(works: impl IntoIterator<Item = &'a Work>) -> BTreeMap<u64, u64> {
    let mut all = BTreeMap::new();
    for (floor, count) in works.into_iter().flat_map(|work| &work.latency) {
        *all.entry(*floor).or_default() += count;
    }
    all
}

/// The time below which that share of the operations lie, interpolated inside its bucket; 0 where there are none.
pub(super) fn quantile_us(latency: &BTreeMap<u64, u64>, share: f64) -> f64 {
    let wanted = float(latency.values().sum()) * share;
    let mut seen = 0.0;
    for (floor, count) in latency {
        if seen + float(*count) >= wanted {
            return float(*floor) * BUCKET.powf((wanted - seen) / float(*count)) / 1000.0;
        }
        seen += float(*count);
    }
    0.0
}

fn mean_us(latency: &BTreeMap<u64, u64>) -> f64 {
    let sum: f64 = latency.iter().map(|(floor, count)| float(*floor) * BUCKET.sqrt() * float(*count)).sum();
    sum / float(latency.values().sum::<u64>().max(1)) / 1000.0
}

/// Jain's index of numbers that should be equal: 1 where they are, 1/n where one has everything.
pub(super) fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) =
        shares.iter().fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
    sum * sum / (float(shares.len() as u64) * f64::max(squares, f64::MIN_POSITIVE))
}

/// Counts how often targets moved back and forth.
#[derive(Clone, Debug, Default)]
pub(super) struct Swings {
    /// Of each machine: where its target turned last, and when it was seen there.
    last: BTreeMap<usize, Leg>,
    pub(super) count: u64,
}

/// A target's way since it turned, and when it moved that way last.
#[derive(Clone, Copy, Debug)]
struct Leg {
    from: ByteCount,
    to: ByteCount,
    since: Duration,
}

impl Swings {
    /// A machine's target is this now. A move of more than the twentieth part that undoes one of more than it is a swing.
    pub(super) fn note(&mut self, machine: usize, target: ByteCount, now: Duration) {
        let Some(leg) = self.last.get_mut(&machine) else {
            self.last.insert(machine, Leg { from: target, to: target, since: now });
            return;
        };
        let apart = |one: ByteCount, other: ByteCount| one.0.abs_diff(other.0) > DEAD_BAND.apply(one.0);
        let goes_on = (target >= leg.to) == (leg.to >= leg.from);
        if target == leg.to {
        } else if goes_on || leg.from == leg.to {
            (leg.to, leg.since) = (target, now);
        } else if apart(leg.to, target) {
            let is_swing = apart(leg.from, leg.to) && now.saturating_sub(leg.since) <= SWING_WITHIN;
            self.count += u64::from(is_swing);
            *leg = Leg { from: leg.to, to: target, since: now };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_vmm::report::Latency;

    fn summary(operations: u64, seconds: u64, buckets: &[(u64, u64)]) -> Summary {
        let latency = Latency { max_ns: 0, buckets: buckets.to_vec() };
        Summary { operations, running_ns: seconds * 1_000_000_000, latency, ..Summary::default() }
    }

    #[test]
    fn only_what_was_done_between_the_two_reports_counts() {
        let before = summary(100, 1, &[(1000, 90), (1_000_000, 10)]);
        let after = summary(300, 3, &[(1000, 289), (1_000_000, 11)]);
        let work = Work::between(&before, &after, None);
        assert!((work.operations_per_second - 100.0).abs() < 1e-9);
        assert_eq!(work.latency, BTreeMap::from([(1000, 199), (1_000_000, 1)]));
        let p99_us = quantile_us(&work.latency, 0.99);
        assert!((1.0..1.2).contains(&p99_us), "{p99_us}");
        assert!((5.5..6.8).contains(&work.mean_us), "{}", work.mean_us);
    }

    #[test]
    fn a_guest_that_died_has_done_nothing_in_the_rest_of_the_time() {
        let after = summary(100, 2, &[]);
        let work = Work::between(&summary(0, 1, &[]), &after, Some(Duration::from_secs(10)));
        assert!((work.operations_per_second - 10.0).abs() < 1e-9);
    }

    #[test]
    fn the_mean_of_runs_is_each_guests_own() {
        let run = |slow, fast| {
            [(slow, 1000), (fast, 3000)].map(|(operations, floor)| {
                Work::between(&summary(0, 0, &[]), &summary(operations, 1, &[(floor, operations)]), None)
            })
        };
        let mean = mean(&[&run(10, 100), &run(30, 300)]);
        let figures: Vec<_> =
            mean.iter().map(|work| (work.operations_per_second, work.latency.clone())).collect();
        assert_eq!(figures, [(20.0, BTreeMap::from([(1000, 40)])), (200.0, BTreeMap::from([(3000, 400)]))]);
        assert!(super::mean(&[]).is_empty());
    }

    #[test]
    fn fairness_is_one_where_all_are_equal_and_a_share_where_one_has_all() {
        assert!((jain(&[0.5, 0.5, 0.5, 0.5]) - 1.0).abs() < 1e-9);
        assert!((jain(&[1.0, 0.0, 0.0, 0.0]) - 0.25).abs() < 1e-9);
    }

    #[test]
    fn a_swing_is_a_large_move_that_is_undone_within_a_minute() {
        let swings = |targets: &[(u64, u64)]| {
            let mut swings = Swings::default();
            targets
                .iter()
                .for_each(|(at, mib)| swings.note(0, ByteCount::mib(*mib), Duration::from_secs(*at)));
            swings.count
        };
        assert_eq!(swings(&[(0, 100), (1, 120), (2, 140), (3, 150)]), 0, "one way");
        assert_eq!(swings(&[(0, 100), (1, 120), (2, 100)]), 1);
        assert_eq!(swings(&[(0, 100), (1, 120), (2, 100), (3, 120)]), 2);
        assert_eq!(swings(&[(0, 100), (1, 104), (2, 100)]), 0, "small ones do not count");
        assert_eq!(swings(&[(0, 100), (1, 120), (62, 100)]), 0, "over a minute apart");
        assert_eq!(swings(&[(0, 100), (1, 80), (2, 81), (3, 100)]), 1);
    }
}
