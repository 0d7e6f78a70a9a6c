//! How long faults took, in as little memory as there were different times: most machines are idle, and there may be a thousand.
//!
//! Enters: times. Leaves: how many there were, and quantiles of two significant digits. What must never happen: a time that is not
//! counted. Times are counted by class: 128 between a power of two and the next. Only classes with a time in them are kept.
use std::time::Duration;

/// Bits of a time that tell classes apart.
const DIGITS: u32 = 8;
/// Classes between a power of two and the next.
const HALF: u64 = 1 << (DIGITS - 1);

/// Counts of times, by class.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Ascending, none of them empty.
    classes: Vec<(u16, u64)>,
}

impl Times {
    /// Counts one.
    pub(crate) fn record(&mut self, time: Duration) {
        self.add(class_of(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)), 1);
    }

    /// Counts those of another, too.
    pub(crate) fn merge(&mut self, other: Self) {
        if self.classes.is_empty() {
            *self = other;
        } else {
            other.classes.into_iter().for_each(|(class, count)| self.add(class, count));
        }
    }

    fn add(&mut self, class: u16, count: u64) {
        match self.classes.binary_search_by_key(&class, |(class, _)| *class) {
            Ok(place) => self.classes[place].1 = self.classes[place].1.saturating_add(count),
            Err(place) => self.classes.insert(place, (class, count)),
        }
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.classes.iter().fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    /// What `permille` thousandths of them did not take longer than: the longest time of its class. Nothing where there were none.
    pub fn permille(&self, permille: u32) -> Duration {
        let wanted = u128::from(self.count()) * u128::from(permille);
        let mut reached = 0;
        let is_it = |(_, count): &&(u16, u64)| {
            reached += u128::from(*count) * 1000;
            reached >= wanted
        };
        let found = self.classes.iter().find(is_it);
        found.map_or(Duration::ZERO, |(class, _)| Duration::from_nanos(longest_of(*class)))
    }
}

/// Below 256 ns each is a class of its own; above, all that have their first eight bits in common are.
fn class_of(nanoseconds: u64) -> u16 {
    let shift = (u64::BITS - nanoseconds.leading_zeros()).saturating_sub(DIGITS);
    // At most 56 * 128 + 255.
    u16::try_from(u64::from(shift) * HALF + (nanoseconds >> shift)).unwrap_or(u16::MAX)
}

/// The longest time of a class.
fn longest_of(class: u16) -> u64 {
    let shift = (u64::from(class) / HALF).saturating_sub(1);
    let digits = u64::from(class) - shift * HALF;
    (digits << shift) | ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_ends_where_the_next_one_begins_and_is_of_less_than_a_hundredth() {
        let last = class_of(u64::MAX);
        assert_eq!(longest_of(last), u64::MAX);
        for class in 0..last {
            let longest = longest_of(class);
            assert_eq!((class_of(longest), class_of(longest + 1)), (class, class + 1));
            let width = longest_of(class + 1) - longest;
            assert!(longest < 256 || width <= longest / 100, "{width} above {longest}");
        }
    }

    #[test]
    fn quantiles_are_those_of_all_times_of_two_machines() {
        let mut both = Times::default();
        assert_eq!((both.count(), both.permille(500)), (0, Duration::ZERO));
        for machine in 0..2 {
            let mut times = Times::default();
            (1..=500).for_each(|us| times.record(Duration::from_micros(us + 500 * machine)));
            both.merge(times);
        }
        assert_eq!(both.count(), 1000);
        for (permille, us) in [(1, 1), (500, 500), (990, 990), (1000, 1000)] {
            let (found, expected) = (both.permille(permille), Duration::from_micros(us));
            assert!(found >= expected && found <= expected + expected / 100, "{found:?} for {expected:?}");
        }
    }

    #[test]
    fn a_machine_with_few_faults_keeps_few_counts() {
        let mut times = Times::default();
        (0..10_000).for_each(|fault| times.record(Duration::from_nanos(20_000 + fault % 4)));
        assert_eq!(times.classes.len(), 1);
        times.record(Duration::MAX);
        assert_eq!(times.count(), 10_001);
    }
}
