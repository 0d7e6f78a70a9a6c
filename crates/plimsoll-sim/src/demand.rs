//! What a guest demands over time.
//!
//! Enters: a curve of the scenario, a machine's seed, a moment. Leaves: its working set, and what it keeps contents in.
//! Both are functions of the moment alone: a step of a second and one of five minutes see the same guest.
//!
//! How often the pages of a working set are touched is as uneven as in Zipf's law: of its `x` most used parts,
//! `x^(1 - s)` of the touches are to them. So a guest that lacks its least used tenth misses far fewer than a tenth of
//! its touches, and one that lacks half of it waits all the time.
use crate::chance::below;
use crate::time::{DAY, Millis};
use plimsoll_policy::Ppm;
use plimsoll_types::PageCount;
use std::sync::Arc;

/// What a guest needs at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Pages it touches within a sampling period.
    pub active: PageCount,
    /// Pages it keeps contents in, if the curve says; else as many as it has ever been active in.
    pub keeps: Option<PageCount>,
}

/// How a demand goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Curve {
    /// Always the same.
    Constant {
        /// The working set.
        active: PageCount,
    },
    /// Up and down once a day, smoothly.
    Daily {
        /// The working set twelve hours from the peak.
        low: PageCount,
        /// That at the peak.
        high: PageCount,
        /// When the peak is.
        peak: Millis,
        /// Each machine's peak is up to so much earlier or later.
        jitter: Millis,
    },
    /// Low, with one burst somewhere in each interval.
    Bursts {
        /// The working set between bursts.
        low: PageCount,
        /// That in a burst.
        high: PageCount,
        /// An interval.
        every: Millis,
        /// How long a burst lasts; at most the interval.
        lasts: Millis,
    },
    /// A working set that stays, in memory that grows until the machine is restarted.
    Leak {
        /// The working set.
        active: PageCount,
        /// What is kept on top of it after an hour, after two hours twice that.
        hourly: PageCount,
    },
    /// What was recorded.
    Trace(Arc<Track>),
}

/// A recorded demand: ascending moments, each with the demand from then on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Track(pub Vec<(Millis, Demand)>);

impl Curve {
    /// The demand at a moment, of a machine that was started at another.
    pub fn at(&self, now: Millis, started: Millis, seed: u64) -> Demand {
        let active = |active| Demand { active, keeps: None };
        match self {
            Self::Constant { active: pages } => active(*pages),
            Self::Daily { low, high, peak, jitter } => {
                let early = below(seed, 0, 2 * jitter.0 + 1);
                let phase = (now.0 + DAY.0 + jitter.0).wrapping_sub(peak.0 + early) % DAY.0;
                active(*low + wave(phase).part_of(high.saturating_sub(*low)))
            }
            Self::Bursts { low, high, every, lasts } => {
                let (start, end) = burst(now, *every, *lasts, seed);
                active(if (start..end).contains(&now.0) { *high } else { *low })
            }
            Self::Leak { active, hourly } => {
                let age = u128::from(now.0.saturating_sub(started.0));
                let leaked = u128::from(hourly.0) * age / 3_600_000;
                let keeps = active.0.saturating_add(u64::try_from(leaked).unwrap_or(u64::MAX));
                Demand { active: *active, keeps: Some(PageCount(keeps)) }
            }
            Self::Trace(track) => {
                let next = track.0.partition_point(|(moment, _)| *moment <= now);
                track.0.get(next.saturating_sub(1)).map(|(_, demand)| *demand).unwrap_or_default()
            }
        }
    }

    /// The first moment after `now` at which it jumps; `None` where it never does.
    pub(crate) fn jumps(&self, now: Millis, seed: u64) -> Option<Millis> {
        match self {
            Self::Constant { .. } | Self::Daily { .. } | Self::Leak { .. } => None,
            Self::Bursts { every, lasts, .. } => {
                let (start, end) = burst(now, *every, *lasts, seed);
                let (next, _) = burst(Millis((now.0 / every.0 + 1) * every.0), *every, *lasts, seed);
                [start, end, next].into_iter().find(|edge| *edge > now.0).map(Millis)
            }
            Self::Trace(track) => {
                let next = track.0.partition_point(|(moment, _)| *moment <= now);
                track.0.get(next).map(|(moment, _)| *moment)
            }
        }
    }
}

/// Start and end of the burst in the interval that `now` is in.
fn burst(now: Millis, every: Millis, lasts: Millis, seed: u64) -> (u64, u64) {
    let interval = now.0 / every.0;
    // Whole seconds, so that steps of a second meet them.
    let late = below(seed, interval, (every.0.saturating_sub(lasts.0)) / 1000 + 1) * 1000;
    let start = interval * every.0 + late;
    (start, start + lasts.0)
}

/// A day's wave: all at phase 0, nothing half a day later, smooth between (3x^2 - 2x^3).
fn wave(phase: u64) -> Part {
    let half = DAY.0 / 2;
    let near = half.saturating_sub(phase.min(DAY.0 - phase));
    let x = u128::from(near) * u128::from(Part::WHOLE.0) / u128::from(half);
    let one = u128::from(Part::WHOLE.0);
    let smooth = x * x * (3 * one - 2 * x) / (one * one);
    Part(u32::try_from(smooth).unwrap_or(Part::WHOLE.0))
}

/// A part of a whole in 2^-30: finer than millionths, which a miss rate of few pages needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Part(pub(crate) u32);

impl Part {
    pub(crate) const WHOLE: Self = Self(1 << 30);

    /// How much of the whole a part is; all of it where the whole is nothing.
    pub(crate) fn of(part: PageCount, whole: PageCount) -> Self {
        let parts = (u128::from(part.0) << 30).checked_div(u128::from(whole.0));
        parts
            .and_then(|parts| u32::try_from(parts).ok())
            .map_or(Self::WHOLE, |parts| Self(parts).min(Self::WHOLE))
    }

    /// This part of so many pages, rounded down.
    pub(crate) fn part_of(self, pages: PageCount) -> PageCount {
        PageCount(self.apply(pages.0))
    }

    pub(crate) fn apply(self, amount: u64) -> u64 {
        u64::try_from((u128::from(amount) * u128::from(self.0)) >> 30).unwrap_or(u64::MAX)
    }

    pub(crate) const fn rest(self) -> Self {
        Self(Self::WHOLE.0.saturating_sub(self.0))
    }
}

/// Points of a locality's table.
const POINTS: usize = 256;

/// How unevenly a working set is used: what part of the touches its most used part gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locality(Box<[Part]>);

impl Locality {
    /// Zipf's law with exponent `s` in millionths, below 1: `x^(1 - s)`. 0 is every page alike.
    pub fn zipf(s: Ppm) -> Self {
        let exponent = u64::from(s.rest().0);
        let table = (0..=POINTS as u64)
            .map(|point| power(Part::of(PageCount(point), PageCount(POINTS as u64)), exponent));
        Self(table.collect())
    }

    /// The part of the touches that miss where only that part of the working set, the most used one, is in place.
    pub(crate) fn misses(&self, in_place: Part) -> Part {
        let (step, shift) = (1 << 22, 22);
        let point = (in_place.0 >> shift) as usize;
        let Some(above) = self.0.get(point + 1) else { return Part(0) };
        let (below, into) = (self.0[point], u64::from(in_place.0 % step));
        let hits = u64::from(below.0) + ((u64::from(above.0 - below.0) * into) >> shift);
        Part(u32::try_from(hits).unwrap_or(Part::WHOLE.0)).rest()
    }
}

/// `x` to the power of an exponent of at most 1 in millionths, by square roots: `x^(1/2) x^(1/4) ...` for the bits of
/// the exponent. Integers alone, so that it is the same on every machine, as no library's `pow` is.
fn power(x: Part, exponent_ppm: u64) -> Part {
    if exponent_ppm >= 1_000_000 {
        return x;
    }
    let bits = (exponent_ppm << 16) / 1_000_000;
    let (mut root, mut product) = (u64::from(x.0), u64::from(Part::WHOLE.0));
    for bit in (0..16).rev() {
        root = (root << 30).isqrt();
        if bits >> bit & 1 == 1 {
            product = (product * root) >> 30;
        }
    }
    Part(u32::try_from(product).unwrap_or(Part::WHOLE.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;

    fn active(curve: &Curve, hour: u64) -> u64 {
        curve.at(Millis(hour * HOUR), Millis(0), 1).active.0
    }

    #[test]
    fn a_day_peaks_at_its_hour_and_comes_again() {
        let (low, high) = (PageCount(100), PageCount(1100));
        let curve = Curve::Daily { low, high, peak: Millis(14 * HOUR), jitter: Millis(0) };
        assert_eq!([2, 14, 26, 38].map(|hour| active(&curve, hour)), [100, 1100, 100, 1100]);
        assert_eq!(active(&curve, 8), 600);
        assert!((2..14).all(|hour| active(&curve, hour) < active(&curve, hour + 1)));
        let spread = Curve::Daily { low, high, peak: Millis(14 * HOUR), jitter: Millis(2 * HOUR) };
        let peaks: Vec<u64> =
            (0..50).map(|seed| spread.at(Millis(14 * HOUR), Millis(0), seed).active.0).collect();
        // Two hours from the peak are a sixth of the way down: 1100 - 1000 (1 - (3 (5/6)^2 - 2 (5/6)^3)).
        assert!(
            peaks.iter().all(|pages| (1025..=1100).contains(pages))
                && peaks.iter().any(|pages| *pages < 1090)
        );
    }

    #[test]
    fn a_burst_comes_once_an_interval_and_its_edges_are_known_before() {
        let curve = Curve::Bursts {
            low: PageCount(1),
            high: PageCount(9),
            every: Millis(600_000),
            lasts: Millis(60_000),
        };
        let at = |second: u64| curve.at(Millis(second * 1000), Millis(0), 5).active.0;
        assert_eq!((0..6000).filter(|second| at(*second) == 9).count(), 600);
        let mut now = Millis(0);
        for _ in 0..20 {
            let next = curve.jumps(now, 5).unwrap();
            let (before, after) = (at(now.0 / 1000), at(next.0 / 1000));
            assert!((now.0 / 1000..next.0 / 1000).all(|second| at(second) == before));
            assert_ne!(before, after);
            now = next;
        }
    }

    #[test]
    fn a_leak_grows_from_its_start() {
        let curve = Curve::Leak { active: PageCount(100), hourly: PageCount(50) };
        let keeps = |now, started| curve.at(Millis(now * HOUR), Millis(started * HOUR), 0).keeps.unwrap().0;
        assert_eq!((keeps(0, 0), keeps(3, 0), keeps(10, 9)), (100, 250, 150));
    }

    #[test]
    fn a_recorded_demand_is_that_of_the_last_record() {
        let demand = |pages| Demand { active: PageCount(pages), keeps: None };
        let track = Track(vec![(Millis(10), demand(1)), (Millis(20), demand(2))]);
        let curve = Curve::Trace(Arc::new(track));
        let at = |now| curve.at(Millis(now), Millis(0), 0).active.0;
        assert_eq!([0, 10, 19, 20, 99].map(at), [1, 1, 1, 2, 2]);
        assert_eq!(curve.jumps(Millis(10), 0), Some(Millis(20)));
        assert_eq!(curve.jumps(Millis(20), 0), None);
    }

    #[test]
    fn powers_are_what_they_are() {
        let of = |part, whole| Part::of(PageCount(part), PageCount(whole));
        for (x, exponent_ppm, power_of) in [
            (of(1, 4), 500_000, 0.5),
            (of(1, 2), 250_000, 0.840_896),
            (of(1, 10), 100_000, 0.794_328),
            (of(3, 10), 1_000_000, 0.3),
        ] {
            let found = f64::from(power(x, exponent_ppm).0) / f64::from(1 << 30);
            assert!((found - power_of).abs() < 1e-3, "{x:?}^{exponent_ppm} ppm = {found}");
        }
    }

    #[test]
    fn the_less_is_in_place_the_more_misses_and_little_for_the_least_used() {
        let locality = Locality::zipf(Ppm::percent(80));
        let misses = |percent| locality.misses(Part::of(PageCount(percent), PageCount(100))).0;
        assert!((0..100).all(|percent| misses(percent) > misses(percent + 1)));
        assert_eq!((misses(100), misses(0)), (0, Part::WHOLE.0));
        // Without its least used tenth: 1 - 0.9^0.2 = 2.1 %.
        assert!((20..22).contains(&((u64::from(misses(90)) * 1000) >> 30)));
    }
}
