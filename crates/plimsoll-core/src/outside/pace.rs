//! How fast pages may be taken: a token bucket whose rate follows what becomes of the pages.
//!
//! Enters: the caller's clock, pages taken, and once a period the signs of thrashing. Leaves: how many pages may be taken
//! now. The rate grows by a fixed step with each good period and is halved by each bad one, as TCP's window does
//! (Chiu and Jain, 1989): several machines that compete for one swap device come to equal shares of it.
use core::time::Duration;
use plimsoll_types::PageCount;

/// Pages a second: 1 MiB, so that even a thrashing machine gives a little.
const RATE_MIN: u64 = 256;
/// 256 MiB a second. A page costs 13.5 us to zram with lz4 (FACTS.md): at this rate about nine tenths of a processor.
const RATE_MAX: u64 = 65_536;
/// The rate at the beginning: a quarter.
const RATE_START: u64 = RATE_MAX / 4;
/// What a good period adds: from the lowest rate to the first in a minute at two seconds a period.
const STEP: u64 = 512;
/// Pages that come back per second although nothing is wrong: a guest changes what it does.
const REFAULTS_FREE: u64 = 64;
/// Of pages taken lately, more than one in so many came back: they were the wrong ones.
const REFAULT_SHARE: u64 = 4;
/// Share of time some task waited for memory, in 1/10,000, above which the machine or its host is short of memory.
const STALL_MAX: u32 = 1000;

/// What is seen once a period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signs {
    /// How long the period was.
    pub period: Duration,
    /// Pages that came back in it, samples not counted.
    pub refaults: PageCount,
    /// The share of time some task waited for memory lately, in 1/10,000, where the kernel tells (PSI's `some avg10`).
    pub stall: Option<u32>,
}

/// What the signs say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on, a little faster.
    Steady,
    /// Too many of the pages taken lately came back.
    Refaults,
    /// Tasks wait for memory.
    Stall,
}

/// The bucket. Times are the caller's, counted from any fixed moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pace {
    rate: u64,
    /// Pages that may be taken at `at`.
    tokens: u64,
    at: Duration,
    /// Pages taken, halved with each period.
    lately: u64,
}

impl Pace {
    /// A bucket that is full at `now`.
    pub const fn new(now: Duration) -> Self {
        Self { rate: RATE_START, tokens: RATE_START, at: now, lately: 0 }
    }

    /// Pages that may be taken now; the bucket holds those of one second.
    pub fn allowed(&mut self, now: Duration) -> PageCount {
        let elapsed = now.saturating_sub(self.at).as_micros();
        let earned = u64::try_from(elapsed * u128::from(self.rate) / 1_000_000).unwrap_or(u64::MAX);
        let room = self.rate.saturating_sub(self.tokens);
        // Time that has not earned a whole page yet is kept, unless the bucket is full.
        self.at = if earned < room { self.at + self.time_for(earned) } else { now.max(self.at) };
        self.tokens += earned.min(room);
        PageCount(self.tokens)
    }

    /// How long so many pages take to earn, rounded up.
    const fn time_for(&self, pages: u64) -> Duration {
        Duration::from_micros(pages.saturating_mul(1_000_000).div_ceil(self.rate))
    }

    /// So many were taken.
    pub const fn spent(&mut self, pages: PageCount) {
        self.tokens = self.tokens.saturating_sub(pages.0);
        self.lately = self.lately.saturating_add(pages.0);
    }

    /// Judges a period and changes the rate.
    pub fn judge(&mut self, signs: Signs) -> Verdict {
        let free = u128::from(REFAULTS_FREE) * signs.period.as_millis() / 1000;
        let refaults = signs.refaults.0;
        let verdict = if u128::from(refaults) > free && refaults > self.lately / REFAULT_SHARE {
            Verdict::Refaults
        } else if signs.stall.is_some_and(|stall| stall > STALL_MAX) {
            Verdict::Stall
        } else {
            Verdict::Steady
        };
        self.lately /= 2;
        self.rate = match verdict {
            Verdict::Steady => (self.rate + STEP).min(RATE_MAX),
            Verdict::Refaults | Verdict::Stall => (self.rate / 2).max(RATE_MIN),
        };
        self.tokens = self.tokens.min(self.rate);
        verdict
    }

    /// Pages a second.
    pub const fn rate(&self) -> PageCount {
        PageCount(self.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(2);

    fn signs(refaults: u64, stall: Option<u32>) -> Signs {
        Signs { period: PERIOD, refaults: PageCount(refaults), stall }
    }

    #[test]
    fn no_more_is_allowed_than_the_rate_over_time_and_a_second_ahead() {
        let mut pace = Pace::new(Duration::ZERO);
        let mut taken = 0;
        for step in 0..10_000_u32 {
            let allowed = pace.allowed(step * Duration::from_micros(700));
            pace.spent(allowed);
            taken += allowed.0;
        }
        let most = RATE_START * 8;
        assert!((most - most / 100..=most).contains(&taken), "{taken} of {most}");
    }

    #[test]
    fn an_hour_of_idleness_does_not_fill_the_bucket_beyond_a_second() {
        let mut pace = Pace::new(Duration::ZERO);
        assert_eq!(pace.allowed(Duration::from_secs(3600)), PageCount(RATE_START));
        pace.spent(PageCount(RATE_START));
        assert_eq!(pace.allowed(Duration::from_secs(3600)), PageCount(0));
        assert_eq!(pace.allowed(Duration::ZERO), PageCount(0), "a clock that goes back earns nothing");
    }

    #[test]
    fn a_bad_period_halves_and_good_ones_add_up() {
        let mut pace = Pace::new(Duration::ZERO);
        pace.spent(PageCount(1000));
        assert_eq!(pace.judge(signs(200, None)), Verdict::Steady, "a fifth of what was taken");
        assert_eq!(pace.judge(signs(200, None)), Verdict::Refaults, "what was taken counts half by now");
        assert_eq!(pace.rate(), PageCount((RATE_START + STEP) / 2));
        assert_eq!(pace.judge(signs(0, Some(STALL_MAX + 1))), Verdict::Stall);
        (0..20).for_each(|_| assert_eq!(pace.judge(signs(1 << 20, None)), Verdict::Refaults));
        assert_eq!(pace.rate(), PageCount(RATE_MIN));
        (0..1000).for_each(|_| assert_eq!(pace.judge(signs(100, Some(0))), Verdict::Steady));
        assert_eq!(pace.rate(), PageCount(RATE_MAX));
    }
}
