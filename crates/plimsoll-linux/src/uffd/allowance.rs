//! How much processor time pagers may take for storing pages that nobody waits for: a share of one processor, for all of a host's
//! pagers together.
//!
//! Enters: what storing took, for whom, and when. Leaves: whether there is time left for more, and what was taken in all.
//!
//! *Who spends.* A pager, whenever it has moved pages from limbo to the store: reading, comparing and compressing them. It says what
//! its own thread's CPU clock has counted, so that waiting, and what else the host does, cost it nothing. What it does **ahead**
//! (the host is above its high mark, and room is left) it does only while there is time. What it does on **demand** it does at once,
//! and says so afterwards: a fault of its machine waits for memory, the host is so full that somebody's soon will
//! ([`Ledger::is_demand_near`](plimsoll_core::ledger::Ledger::is_demand_near)), or an operator ordered it, as parking does.
//!
//! *Who refills it.* Time does: each question and each entry first adds what came since the last one. So much as comes in `KEPT`
//! is kept at most, or a night's rest would be a storm in the morning.
//!
//! *Debt.* Work ahead goes below nothing by the step that each pager is in, and all of that is missing afterwards: over any time it
//! takes its share, and no more than those steps besides. Demand goes as far below as it must, and only `KEPT` of that is
//! remembered: reclaim goes on soon after a rush, however long it was.
//!
//! *What must never happen:*
//! * Somebody who waits for memory waits for this. Whether demand is on is asked before this is, of the ledger as it is then; and
//!   the governor wakes pagers that sleep without time as soon as the host comes near its line.
//! * A machine that gives nothing because there is no time is taken for one that has nothing to give
//!   ([`Orders::is_out_of_time`](super::host::Orders::is_out_of_time)).
//! * A pager sleeps longer than `KEPT` while it is out of time: what came beyond that would be lost.
//!
//! A host without a governor has no share: it stores what it is told to, and no clock decides about it.
use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// All of one processor: about 40,000 pages a second (2,016 in 50 ms on a nested machine that pages in software, one in three of zeros).
/// Guests that fill a host faster than that bring it near its line, where nothing is kept from them.
pub(super) const WHOLE_PPM: u32 = 1_000_000;
/// For how long unspent time is kept, and debt remembered: twice as long as a pager with something to do sleeps.
const KEPT: Duration = Duration::from_millis(100);

/// For whom pages are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Whoever will want memory later.
    Ahead,
    /// Somebody who waits for it, or is about to.
    Demand,
}

/// What storing has taken of processors, and may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Storing {
    /// CPU time taken ahead of demand.
    pub ahead: Duration,
    /// CPU time taken on demand.
    pub demand: Duration,
    /// The share of one processor that the former has, in millionths; none is without limit.
    pub share_ppm: Option<u32>,
}

/// See above.
#[derive(Debug, Default)]
pub(super) struct Allowance(Mutex<Account>);

impl Allowance {
    /// From now on it is that share of one processor, in millionths.
    pub(super) fn set(&self, ppm: u32) {
        self.0.lock().set(ppm, Instant::now());
    }

    /// True while there is some left.
    pub(super) fn has_time(&self) -> bool {
        self.0.lock().has_time(Instant::now())
    }

    /// So much was taken.
    pub(super) fn spend(&self, cause: Cause, took: Duration) {
        self.0.lock().spend(cause, took, Instant::now());
    }

    /// All that was taken, ever.
    pub(super) fn storing(&self) -> Storing {
        let account = self.0.lock();
        Storing { share_ppm: account.share.as_ref().map(|share| share.ppm), ..account.spent }
    }
}

/// The allowance as a value. Whoever has it brings the time; one that is earlier than the last is taken for the last.
#[derive(Debug, Default)]
struct Account {
    share: Option<Share>,
    spent: Storing,
}

#[derive(Debug)]
struct Share {
    ppm: u32,
    /// What is left, in nanoseconds of which each is as many parts as a millionth has; below zero it is debt. So nothing is lost by rounding,
    /// however often it is asked.
    left: i128,
    since: Instant,
}

/// The parts of a nanosecond.
const PARTS: i128 = 1_000_000;

impl Share {
    fn comes_in(&self, time: Duration) -> i128 {
        nanoseconds(time) * i128::from(self.ppm)
    }

    fn refill(&mut self, now: Instant) {
        let come = self.comes_in(now.saturating_duration_since(self.since));
        self.left = (self.left + come).min(self.comes_in(KEPT));
        self.since = self.since.max(now);
    }
}

impl Account {
    fn set(&mut self, ppm: u32, now: Instant) {
        self.share = Some(Share { ppm, left: 0, since: now });
    }

    fn has_time(&mut self, now: Instant) -> bool {
        self.share.as_mut().is_none_or(|share| {
            share.refill(now);
            share.left > 0
        })
    }

    fn spend(&mut self, cause: Cause, took: Duration, now: Instant) {
        let sum = match cause {
            Cause::Ahead => &mut self.spent.ahead,
            Cause::Demand => &mut self.spent.demand,
        };
        *sum = sum.saturating_add(took);
        let Some(share) = &mut self.share else { return };
        share.refill(now);
        let then = share.left - nanoseconds(took) * PARTS;
        share.left = match cause {
            Cause::Ahead => then,
            Cause::Demand => then.max(share.left.min(-share.comes_in(KEPT))),
        };
    }
}

/// More than any thread lives are as many as fit.
fn nanoseconds(time: Duration) -> i128 {
    i128::from(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    /// One of so many millionths.
    fn account(ppm: u32, begun: Instant) -> Account {
        let mut account = Account::default();
        account.set(ppm, begun);
        account
    }

    /// What somebody gets in so many milliseconds who asks each time and takes 2 ms when there is some.
    fn taken(account: &mut Account, begun: Instant, millis: u32) -> Duration {
        let before = account.spent.ahead;
        for now in (0..millis).map(|millis| begun + MS * millis) {
            if account.has_time(now) {
                account.spend(Cause::Ahead, 2 * MS, now);
            }
        }
        account.spent.ahead - before
    }

    #[test]
    fn a_share_is_what_can_be_taken_of_a_processor_and_no_more() {
        let begun = Instant::now();
        for (percent, most) in [(25, 250), (100, 1000), (1, 10), (0, 0)] {
            let taken = taken(&mut account(percent * 10_000, begun), begun, 1000);
            assert!(taken <= MS * most + 2 * MS && taken + 4 * MS >= MS * most, "{taken:?} of {percent} %");
        }
        // Of two processors a thread that takes turns has one.
        let mut two = account(2 * WHOLE_PPM, begun);
        let now = begun + MS * 50;
        assert!(two.has_time(now));
        two.spend(Cause::Ahead, 99 * MS, now);
        assert!(two.has_time(now));
    }

    #[test]
    fn what_was_not_taken_is_kept_for_a_moment() {
        let begun = Instant::now();
        let mut account = account(WHOLE_PPM / 2, begun);
        let later = begun + MS * 10_000;
        account.spend(Cause::Ahead, 49 * MS, later);
        assert!(account.has_time(later));
        account.spend(Cause::Ahead, MS, later);
        assert!(!account.has_time(later), "50 of 5,000 ms were kept");
    }

    #[test]
    fn demand_is_counted_and_holds_what_is_done_ahead_up_for_a_moment_only() {
        let begun = Instant::now();
        let mut account = account(WHOLE_PPM / 2, begun);
        account.spend(Cause::Demand, 3000 * MS, begun);
        assert!(!account.has_time(begun + KEPT));
        assert!(account.has_time(begun + KEPT + MS), "3 s of debt are 50 ms");
        assert_eq!((account.spent.ahead, account.spent.demand), (Duration::ZERO, 3000 * MS));
    }

    #[test]
    fn debt_of_what_was_done_ahead_is_paid_whole_and_demand_forgives_none_of_it() {
        let begun = Instant::now();
        let mut account = account(WHOLE_PPM / 2, begun);
        account.spend(Cause::Ahead, 500 * MS, begun);
        account.spend(Cause::Demand, 500 * MS, begun);
        assert!(!account.has_time(begun + MS * 1000));
        assert!(account.has_time(begun + MS * 1001));
    }

    #[test]
    fn without_a_share_there_is_always_time_and_what_is_taken_is_told_all_the_same() {
        let begun = Instant::now();
        assert_eq!(taken(&mut Account::default(), begun, 100), 200 * MS);
        let allowance = Allowance::default();
        allowance.spend(Cause::Ahead, MS);
        assert!(allowance.has_time());
        assert_eq!(allowance.storing(), Storing { ahead: MS, demand: Duration::ZERO, share_ppm: None });
        allowance.set(7);
        assert_eq!(allowance.storing().share_ppm, Some(7));
    }

    /// What happens to an account: time passes, or somebody works.
    #[derive(Clone, Copy, Debug)]
    enum Happens {
        Passes(u64),
        Ahead(u64),
        Demand(u64),
    }

    fn happens() -> impl Strategy<Value = Happens> {
        // From less than a question takes to more than is kept.
        prop_oneof![
            (1..300_000_000_u64).prop_map(Happens::Passes),
            (1..2_000_u64).prop_map(Happens::Passes),
            (1..5_000_000_u64).prop_map(Happens::Ahead),
            (1..500_000_000_u64).prop_map(Happens::Demand),
        ]
    }

    proptest! {
        /// Whatever the others do, what is done ahead takes its share and one step more, over all the time and over any part of it; and
        /// soon after demand has ended, and debt is paid, it goes on.
        #[test]
        fn work_ahead_takes_its_share_and_always_goes_on(
            ppm in prop_oneof![1..50_u32, 1_000..4_000_000_u32],
            happens in prop::collection::vec(happens(), 1..200),
        ) {
            let begun = Instant::now();
            let (mut account, mut now, mut longest) = (account(ppm, begun), begun, Duration::ZERO);
            // Since when, and what had been taken by then: from each question on.
            let mut marks = vec![(begun, Duration::ZERO)];
            for one in happens {
                match one {
                    Happens::Passes(ns) => now += Duration::from_nanos(ns),
                    Happens::Demand(ns) => account.spend(Cause::Demand, Duration::from_nanos(ns), now),
                    Happens::Ahead(ns) if account.has_time(now) => {
                        let took = Duration::from_nanos(ns);
                        account.spend(Cause::Ahead, took, now);
                        longest = longest.max(took);
                        marks.push((now, account.spent.ahead));
                        for (since, before) in &marks {
                            let share = nanoseconds(now - *since + KEPT) * i128::from(ppm) / PARTS;
                            let taken = account.spent.ahead - *before;
                            prop_assert!(nanoseconds(taken) <= share + nanoseconds(longest) + 1);
                        }
                    }
                    Happens::Ahead(_) => {}
                }
            }
            // The last step, and a rush of demand before or after it.
            let debt = Duration::from_nanos(u64::try_from(nanoseconds(longest) * PARTS / i128::from(ppm)).unwrap());
            prop_assert!(account.has_time(now + debt + KEPT + MS));
        }
    }
}
