//! The auction beside one that is held page by page, its properties, and what it costs.
//!
//! A failing case is shrunk and kept in `proptest-regressions`, from where it is run again first.
extern crate std;
use super::*;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_assert, prop_assert_eq, proptest};
use std::cell::Cell;
use std::{println, thread_local, vec};

thread_local! {
    static COMPARISONS: Cell<u64> = const { Cell::new(0) };
}

pub(super) fn count_comparison() {
    COMPARISONS.with(|count| count.set(count.get() + 1));
}

/// A page at a time, each to the lowest cost per share, by search through all bidders: slow, and plainly what is meant.
/// Costs are worked out anew, as fractions over `100 - tax`, from the paper's formula.
fn page_by_page(pages: u64, bidders: &[Bidder], tax_percent: u64) -> Vec<u64> {
    let cost = |bidder: &Bidder, held: u64| -> u128 {
        (1..=held)
            .map(|page| if page <= bidder.active.0 { 100 - tax_percent } else { 100 })
            .sum::<u64>()
            .into()
    };
    let mut held: Vec<u64> = bidders.iter().map(|bidder| bidder.floor.0).collect();
    for _ in held.iter().sum()..pages {
        let mut best: Option<(usize, u128, u128)> = None;
        for (index, bidder) in
            bidders.iter().enumerate().filter(|(index, bidder)| held[*index] < bidder.cap.0)
        {
            let (offer, shares) = (cost(bidder, held[index] + 1), u128::from(bidder.shares));
            if best.is_none_or(|(_, lowest, of)| offer * of < lowest * shares) {
                best = Some((index, offer, shares));
            }
        }
        let Some((winner, ..)) = best else { break };
        held[winner] += 1;
    }
    held
}

fn bidder(most: u64) -> impl Strategy<Value = Bidder> {
    (
        0..=most,
        0..=most,
        0..=most + most / 4,
        prop::sample::select(vec![1, 2, 3, 500, 1000, 999_983, SHARES_MAX]),
    )
        .prop_map(|(one, other, active, shares)| Bidder {
            floor: PageCount(one.min(other) / 2),
            cap: PageCount(one.max(other)),
            active: PageCount(active),
            shares,
        })
}

/// Bidders and pages, from too few for their floors to more than they can have.
fn auctions(most: u64, bidders: usize) -> impl Strategy<Value = (u64, Vec<Bidder>, u32)> {
    let taxes = prop::sample::select(vec![0, 1, 50, 75, 99]);
    prop::collection::vec(bidder(most), 1..=bidders).prop_flat_map(move |bidders| {
        let caps: u64 = bidders.iter().map(|bidder| bidder.cap.0).sum();
        (0..=caps + 2, Just(bidders), taxes.clone())
    })
}

fn held(pages: u64, bidders: &[Bidder], tax_percent: u32) -> Vec<u64> {
    let tax = IdleTax::new(Ppm::percent(tax_percent)).unwrap();
    auction(PageCount(pages), bidders, tax).grants.iter().map(|grant| grant.0).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn it_is_the_auction_of_one_page_at_a_time((pages, bidders, tax) in auctions(60, 7)) {
        prop_assert_eq!(held(pages, &bidders, tax), page_by_page(pages, &bidders, u64::from(tax)));
    }

    #[test]
    fn sums_are_exact_and_everyone_is_between_floor_and_cap((pages, bidders, tax) in auctions(PAGES_MAX.0, 40)) {
        let grants = held(pages, &bidders, tax);
        let floors: u64 = bidders.iter().map(|bidder| bidder.floor.0).sum();
        let caps: u64 = bidders.iter().map(|bidder| bidder.cap.0).sum();
        prop_assert_eq!(grants.iter().sum::<u64>(), pages.clamp(floors, caps));
        for (grant, bidder) in grants.iter().zip(&bidders) {
            prop_assert!((bidder.floor.0..=bidder.cap.0).contains(grant));
        }
    }

    #[test]
    fn more_shares_never_bring_less((pages, bidders, tax) in auctions(PAGES_MAX.0, 12), more in any::<u32>()) {
        let before = held(pages, &bidders, tax)[0];
        let mut richer = bidders;
        richer[0].shares = (richer[0].shares + more % SHARES_MAX).min(SHARES_MAX);
        prop_assert!(held(pages, &richer, tax)[0] >= before);
    }

    #[test]
    fn one_page_more_takes_from_nobody((pages, bidders, tax) in auctions(PAGES_MAX.0, 12)) {
        let before = held(pages, &bidders, tax);
        let after = held(pages + 1, &bidders, tax);
        prop_assert!(before.iter().zip(&after).all(|(before, after)| before <= after));
    }

    #[test]
    fn at_equal_shares_the_tax_moves_memory_from_who_is_idle_to_who_is_active(
        pages in 1..2000u64, active in 0..1000u64, idle in 0..1000u64, tax in 1..=99u32,
    ) {
        let (idle, active) = (idle.min(active), active.max(idle));
        let one = |used| Bidder { floor: PageCount(0), cap: PageCount(1000), active: PageCount(used), shares: 7 };
        let untaxed = held(pages, &[one(idle), one(active)], 0);
        let taxed = held(pages, &[one(idle), one(active)], tax);
        prop_assert!(taxed[0] <= untaxed[0] && taxed[1] >= untaxed[1]);
        // And it does move, where there is idle memory to tax and an active bidder that could use it.
        if untaxed[0] > idle + 200 && untaxed[1] + 200 < active {
            prop_assert!(taxed[0] < untaxed[0] || tax < 3);
        }
    }

    #[test]
    fn all_who_are_between_floor_and_cap_pay_the_same_within_one_page((pages, bidders, tax) in auctions(100_000, 12)) {
        let rate = IdleTax::new(Ppm::percent(tax)).unwrap();
        let grants = held(pages, &bidders, tax);
        // Nobody would pay less for its next page than somebody pays for its last one above its floor.
        for (next, bidder) in grants.iter().zip(&bidders).filter(|(grant, bidder)| **grant < bidder.cap.0) {
            for (last, other) in grants.iter().zip(&bidders).filter(|(grant, bidder)| **grant > bidder.floor.0) {
                prop_assert!(bidder.level(next + 1, rate) >= other.level(*last, rate));
            }
        }
    }
}

#[test]
fn floors_that_exceed_the_pages_are_kept_and_the_shortfall_is_said() {
    let one = Bidder { floor: PageCount(10), cap: PageCount(20), active: PageCount(0), shares: 1 };
    let outcome = auction(PageCount(15), &[one, one], IdleTax::USUAL);
    assert_eq!(outcome, Outcome { grants: vec![PageCount(10); 2], short: PageCount(5) });
    assert_eq!(auction(PageCount(5), &[], IdleTax::USUAL).grants, []);
}

#[test]
fn a_tax_of_nearly_everything_is_refused_with_the_highest() {
    let error = IdleTax::new(Ppm(990_001)).unwrap_err();
    assert_eq!(std::format!("{error}"), "an idle tax of 99.0001 % is too high: use at most 99 %");
    assert_eq!(IdleTax::new(Ppm::percent(75)), Ok(IdleTax::USUAL));
}

/// Bidders that differ in everything, by a fixed rule.
fn crowd(count: u64) -> Vec<Bidder> {
    (0..count)
        .map(|number| {
            let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            Bidder {
                floor: PageCount(mixed >> 50),
                cap: PageCount((mixed >> 50) + (mixed >> 20 & 0xf_ffff)),
                active: PageCount(mixed >> 30 & 0xf_ffff),
                shares: u32::try_from(mixed % 9973).unwrap() + 1,
            }
        })
        .collect()
}

#[test]
fn comparisons_grow_as_n_log_n() {
    for count in [10u64, 1_000, 100_000] {
        let bidders = crowd(count);
        let (floors, caps) =
            bidders.iter().fold((0, 0), |(low, high), one| (low + one.floor.0, high + one.cap.0));
        COMPARISONS.set(0);
        let outcome = auction(PageCount(floors.midpoint(caps)), &bidders, IdleTax::USUAL);
        let comparisons = COMPARISONS.get();
        assert_eq!(outcome.grants.iter().map(|grant| grant.0).sum::<u64>(), floors.midpoint(caps));
        // Three bends a bidder are sorted and passed, one offer a bidder is put on a heap and taken off.
        let bends = 3 * count;
        let bound = bends * u64::from(bends.ilog2() + 1) + bends + count * u64::from(2 * count.ilog2() + 4);
        println!("{count} bidders: {comparisons} comparisons, at most {bound}");
        assert!(comparisons <= bound, "{count} bidders took {comparisons} comparisons");
    }
}
