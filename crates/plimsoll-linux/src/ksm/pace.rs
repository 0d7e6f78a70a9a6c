//! How fast KSM should scan, and when it should stop: a pure controller.
//!
//! Enters: what KSM has saved, at what processor time, in how many passes. Leaves: a rate, or the order to stop. What must
//! never happen: KSM running where it does not pay. The kernel never stops it by itself.
//!
//! A page merges at the second pass over it at the earliest: the first remembers its checksum. So nothing is held
//! against KSM before it has been over everything twice after there was something new; the pass that was under way
//! then counts for nothing.
use super::control::{Counters, Rate};
use core::fmt;
use plimsoll_types::PageCount;
use std::time::Duration;

/// From slow to fast. At about 6 us a page (FACTS: two passes, most of it spent on looking for its like) they take about 3, 10, 30
/// and 65 % of a processor.
const RATES: [Rate; 4] = [
    Rate { pages: 100, sleep_ms: 20 },
    Rate { pages: 400, sleep_ms: 20 },
    Rate { pages: 1600, sleep_ms: 20 },
    Rate { pages: 6400, sleep_ms: 20 },
];
/// The rate to begin with.
const FIRST: usize = 2;
/// Passes after which all has been looked at twice: the rest of one, and two.
const PASSES: u64 = 3;
/// Time of ksmd that says something about what it saves: its scan of some hundred pages.
const MEASURE: Duration = Duration::from_millis(5);

/// What merging is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Pages that a second of ksmd must save. Compressing a page takes 10 us and bringing it back 8 (FACTS), each
    /// time it is used; a merged page stays in use.
    pub pays: PageCount,
}

impl Default for Policy {
    /// 50 us for a page: what compressing it costs that is brought back and taken again now and then.
    fn default() -> Self {
        Self { pays: PageCount(20_000) }
    }
}

/// What KSM shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Scan at this rate.
    Run(Rate),
    /// Rest. What is merged stays so.
    Stop,
}

/// Why the last order was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing new to merge.
    Idle,
    /// What is new has not been looked at twice yet.
    Learning,
    /// It saves at least twice what it must.
    PaysWell,
    /// It saves what it must.
    Pays,
    /// It saves too little, and all has been looked at twice.
    DoesNotPay,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "KSM rests: there is nothing new to merge",
            Self::Learning => "KSM runs: what is new has not been looked at twice yet",
            Self::PaysWell => "KSM runs: it saves at least twice what it must",
            Self::Pays => "KSM runs: it saves what it must",
            Self::DoesNotPay => "KSM rests: it saves too little for its time",
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Work {
    /// When there was something new.
    full_scans: u64,
    /// The beginning of what is being measured.
    since: Counters,
    rate: usize,
}

/// The controller.
#[derive(Clone, Debug)]
pub struct Pace {
    policy: Policy,
    work: Option<Work>,
    reason: Reason,
}

impl Pace {
    /// At rest.
    pub const fn new(policy: Policy) -> Self {
        Self { policy, work: None, reason: Reason::Idle }
    }

    /// There is something new to merge.
    pub fn wake(&mut self, now: &Counters) {
        let rate = self.work.map_or(FIRST, |work| work.rate);
        self.work = Some(Work { full_scans: now.full_scans, since: *now, rate });
        self.reason = Reason::Learning;
    }

    /// Whatever there was to merge, it is not to be.
    pub const fn rest(&mut self) {
        self.work = None;
        self.reason = Reason::Idle;
    }

    /// Decides by what was saved since the last decision.
    pub fn decide(&mut self, now: &Counters) -> Order {
        let Some(work) = &mut self.work else { return Order::Stop };
        let is_over = now.full_scans >= work.full_scans + PASSES;
        let cpu = now.cpu.saturating_sub(work.since.cpu);
        if cpu < MEASURE && !is_over {
            return Order::Run(RATES[work.rate]);
        }
        let saved = now.saved().saturating_sub(work.since.saved());
        let due = |times: u128| u128::from(self.policy.pays.0) * cpu.as_micros() * times / 1_000_000;
        let saved = u128::from(saved.0);
        self.reason = match () {
            () if saved > 0 && saved >= due(2) => Reason::PaysWell,
            () if saved > 0 && saved >= due(1) => Reason::Pays,
            () if is_over => Reason::DoesNotPay,
            () if now.full_scans > work.full_scans + 1 => Reason::DoesNotPay,
            () => Reason::Learning,
        };
        match self.reason {
            Reason::PaysWell => work.rate = (work.rate + 1).min(RATES.len() - 1),
            Reason::DoesNotPay if is_over => {
                self.work = None;
                return Order::Stop;
            }
            Reason::DoesNotPay => work.rate = work.rate.saturating_sub(1),
            Reason::Idle | Reason::Learning | Reason::Pays => {}
        }
        work.since = *now;
        Order::Run(RATES[work.rate])
    }

    /// Whether it has KSM rest.
    pub const fn is_idle(&self) -> bool {
        self.work.is_none()
    }

    /// Why the last order was given.
    pub const fn reason(&self) -> Reason {
        self.reason
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ksmd over so many pages, of which some merge at the second pass, some later, one after the other.
    struct Kernel {
        now: Counters,
        pages: u64,
        at: u64,
        /// Pages that will merge.
        twins: u64,
        us_per_page: u64,
    }

    impl Kernel {
        fn new(pages: u64, twins: u64) -> Self {
            Self { now: Counters::default(), pages, at: 0, twins, us_per_page: 6 }
        }

        /// Scans for a while; `pass` is the number of the pass since the wake.
        fn scan(&mut self, pages: u64) {
            for _ in 0..pages {
                self.at += 1;
                self.now.scanned.0 += 1;
                self.now.cpu += Duration::from_micros(self.us_per_page);
                if self.now.full_scans >= 1 && self.now.sharing.0 < self.twins {
                    self.now.sharing.0 += 1;
                }
                if self.at == self.pages {
                    self.at = 0;
                    self.now.full_scans += 1;
                }
            }
        }
    }

    /// Runs until the controller stops, and returns the rates on the way.
    fn run(pace: &mut Pace, kernel: &mut Kernel) -> Vec<Rate> {
        let mut rates = Vec::new();
        loop {
            match pace.decide(&kernel.now) {
                Order::Stop => return rates,
                Order::Run(rate) => {
                    rates.push(rate);
                    kernel.scan(u64::from(rate.pages));
                }
            }
            assert!(rates.len() < 100_000, "it never stops");
        }
    }

    #[test]
    fn it_stops_where_nothing_merges_once_all_was_looked_at_twice() {
        let (mut pace, mut kernel) = (Pace::new(Policy::default()), Kernel::new(50_000, 0));
        assert_eq!(pace.decide(&kernel.now), Order::Stop);
        kernel.scan(20_000);
        pace.wake(&kernel.now);
        let rates = run(&mut pace, &mut kernel);
        assert_eq!(pace.reason(), Reason::DoesNotPay);
        assert!(kernel.now.full_scans >= 3 && kernel.now.scanned.0 < 50_000 * 3 + 20_000, "{:?}", kernel.now);
        assert!(rates.iter().all(|rate| rate.pages <= RATES[FIRST].pages), "nothing called for more");
        assert_eq!(pace.decide(&kernel.now), Order::Stop);
    }

    #[test]
    fn it_hurries_where_it_pays_and_still_stops_when_all_is_merged() {
        let (mut pace, mut kernel) = (Pace::new(Policy::default()), Kernel::new(50_000, 40_000));
        pace.wake(&kernel.now);
        let rates = run(&mut pace, &mut kernel);
        assert_eq!(kernel.now.sharing, PageCount(40_000));
        assert!(rates.contains(&RATES[3]));
        assert!(pace.is_idle());
    }

    #[test]
    fn it_goes_on_after_two_passes_for_as_long_as_it_pays() {
        // Three pages in a hundred looked at merge: 200 us a page, which only a generous policy pays for.
        let yielding = |policy| {
            let (mut pace, mut kernel) = (Pace::new(policy), Kernel::new(1000, 0));
            pace.wake(&kernel.now);
            for _ in 0..200 {
                let Order::Run(_) = pace.decide(&kernel.now) else { return false };
                kernel.scan(1000);
                kernel.now.sharing.0 += 30;
            }
            true
        };
        assert!(!yielding(Policy::default()));
        assert!(yielding(Policy { pays: PageCount(4000) }));
    }

    #[test]
    fn unmerging_counts_as_saving_nothing() {
        let (mut pace, mut kernel) = (Pace::new(Policy::default()), Kernel::new(1000, 0));
        kernel.now.sharing = PageCount(5000);
        pace.wake(&kernel.now);
        for _ in 0..4 {
            kernel.scan(1000);
            kernel.now.sharing.0 -= 1000;
            pace.decide(&kernel.now);
        }
        assert!(pace.is_idle());
    }
}
