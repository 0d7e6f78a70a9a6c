//! How much of its memory a machine uses: ESX's estimate by random samples (Waldspurger, OSDI '02, section 5.3).
//!
//! Enters: page installs, and the end of each period. Leaves: pages to take so that their use shows, and an estimate.
//! At the start of a period pages are drawn at random from the whole machine. The host takes those that are in RAM;
//! a drawn page that is in RAM at the end of the period was used. One that could not be taken does not count. The share
//! of used samples times the machine's size estimates what it touches in one period. Three averages are kept, slow,
//! fast and instant, and the largest is reported: quick to see growth, slow to believe in idleness.
use alloc::vec::Vec;
use plimsoll_types::{PageCount, PageIndex};

/// Weight of the newest period in the slow and the fast average, in 1/16.
const SLOW_WEIGHT: u32 = 2;
const FAST_WEIGHT: u32 = 6;
/// Samples that make an estimate: fewer are added to those of the next period. A machine of huge pages is sampled by
/// whole blocks, which cost more, so by few.
const SAMPLES_MIN: u32 = 32;
/// Fixed-point one.
const ONE: u32 = 1 << 16;

/// The estimator of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sampler {
    pages: u32,
    drawn: Vec<PageIndex>,
    seed: u64,
    /// Of samples that have not made an estimate yet: how many, and how many of them were used.
    open: (u32, u32),
    /// Averages in 1/65,536 of the machine; `None` before the first full period.
    averages: Option<Averages>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Averages {
    slow: u32,
    fast: u32,
    instant: u32,
}

impl Sampler {
    /// For a machine of `pages` pages. The seed makes the draw repeatable.
    pub fn new(pages: u32, seed: u64) -> Self {
        Self { pages, drawn: Vec::new(), seed, open: (0, 0), averages: None }
    }

    /// Ends a period: `is_used` tells of each drawn page whether it is in RAM now. Starts the next with `count` newly
    /// drawn pages and returns them, ascending; the host takes those that are resident.
    pub fn turn(&mut self, count: u32, is_used: impl Fn(PageIndex) -> bool) -> &[PageIndex] {
        for page in &self.drawn {
            self.open = (self.open.0 + 1, self.open.1 + u32::from(is_used(*page)));
        }
        let (total, used) = self.open;
        if total >= SAMPLES_MIN.min(self.pages).max(1) {
            self.record(u32::try_from(u64::from(used) * u64::from(ONE) / u64::from(total)).unwrap_or(ONE));
            self.open = (0, 0);
        }
        self.drawn.clear();
        for _ in 0..count.min(self.pages) {
            let draw = self.next_random();
            // The high half of a 64-bit product maps the draw onto 0..pages without a division's bias.
            let page = (u128::from(draw) * u128::from(self.pages)) >> 64;
            self.drawn.push(PageIndex(u32::try_from(page).unwrap_or(0)));
        }
        self.drawn.sort_unstable();
        self.drawn.dedup();
        &self.drawn
    }

    /// The pages drawn for the period that runs, ascending.
    pub fn drawn(&self) -> &[PageIndex] {
        &self.drawn
    }

    /// The same machine after its size has changed: the averages stay, the open draw is dropped.
    pub fn resize(&mut self, pages: u32) {
        self.pages = pages;
        self.drawn.clear();
    }

    /// The drawn page tells nothing.
    pub fn forget(&mut self, page: PageIndex) {
        if let Ok(place) = self.drawn.binary_search(&page) {
            self.drawn.remove(place);
        }
    }

    fn record(&mut self, instant: u32) {
        let weigh = |old: u32, weight: u32| (old * (16 - weight) + instant * weight) / 16;
        self.averages = Some(match self.averages {
            None => Averages { slow: instant, fast: instant, instant },
            Some(old) => {
                Averages { slow: weigh(old.slow, SLOW_WEIGHT), fast: weigh(old.fast, FAST_WEIGHT), instant }
            }
        });
    }

    /// Pages the machine uses in a period, or `None` before the first full one.
    pub fn estimate(&self) -> Option<PageCount> {
        let Averages { slow, fast, instant } = self.averages?;
        let share = slow.max(fast).max(instant);
        Some(PageCount(u64::from(share) * u64::from(self.pages) / u64::from(ONE)))
    }

    /// splitmix64 (Steele, Lea, Flood, OOPSLA '14): every seed is a good one.
    fn next_random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.seed;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_use_is_estimated_within_the_error_of_the_sample() {
        let pages = 1 << 16;
        let mut sampler = Sampler::new(pages, 7);
        let is_used = |page: PageIndex| page.0 % 10 < 3;
        for _ in 0..64 {
            sampler.turn(512, is_used);
        }
        let share = sampler.estimate().unwrap().0 as f64 / f64::from(pages);
        assert!((0.27..0.37).contains(&share), "{share}");
    }

    #[test]
    fn growth_shows_at_once_and_idleness_is_believed_slowly() {
        let mut sampler = Sampler::new(1000, 1);
        sampler.turn(100, |_| false);
        sampler.turn(100, |_| false);
        assert_eq!(sampler.estimate(), Some(PageCount(0)));
        sampler.turn(100, |_| true);
        assert_eq!(sampler.estimate(), Some(PageCount(1000)));
        sampler.turn(100, |_| false);
        assert!(sampler.estimate().unwrap() > PageCount(200));
    }

    #[test]
    fn few_samples_wait_for_more_and_forgotten_ones_do_not_count() {
        let mut sampler = Sampler::new(1_000_000, 1);
        for period in 0..8 {
            assert_eq!(sampler.estimate(), None, "period {period}");
            let drawn = sampler.turn(9, |page| page.0.is_multiple_of(2)).to_vec();
            drawn.into_iter().filter(|page| page.0.is_multiple_of(2)).for_each(|page| sampler.forget(page));
        }
        sampler.turn(200, |_| true);
        sampler.turn(0, |_| false);
        assert!(sampler.estimate().unwrap() < PageCount(900_000));
    }

    #[test]
    fn nothing_is_claimed_before_a_full_period() {
        let mut sampler = Sampler::new(1_000_000, 1);
        assert_eq!(sampler.turn(10, |_| true).len(), 10);
        assert_eq!(sampler.estimate(), None);
    }
}
