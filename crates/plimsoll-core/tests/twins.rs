//! The search for twins against hosts whose contents are known.
//!
//! A host is a function from a page to its hash. What the search marks is compared with what truly has twins, over many
//! rounds, with contents that lie alike, are shuffled, change, or are zero.
use plimsoll_core::twins::{Limits, Look, Place, Twins, Verdict, Worth};
use plimsoll_types::{BLOCK_PAGES, BlockIndex, MachineId, PageCount, PageIndex};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn mix(value: u64) -> u64 {
    let mut mixed = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

fn hash(value: u64) -> Look {
    Look::Hash(u128::from(mix(value)) << 64 | u128::from(mix(!value)))
}

/// A page that nobody else has.
fn unique(place: Place, version: u64) -> Look {
    hash(u64::from(place.machine.0) << 48 ^ u64::from(place.page.0) << 8 ^ version << 40 ^ 1 << 63)
}

const MACHINES: u32 = 4;
const BLOCKS: u32 = 24;

fn search(limits: Limits, seed: u64) -> Twins {
    let mut twins = Twins::new(limits, seed);
    (0..MACHINES).for_each(|machine| twins.add(MachineId(machine), BLOCKS));
    twins
}

/// One round over a host; the blocks marked in it.
fn round(twins: &mut Twins, host: impl Fn(Place) -> Look) -> Vec<Worth> {
    let mut places = Vec::new();
    twins.draw(&mut places);
    places.iter().for_each(|place| twins.saw(*place, host(*place)));
    twins.turn()
}

fn rounds(twins: &mut Twins, count: u64, host: impl Fn(u64, Place) -> Look) -> Vec<Worth> {
    (0..count).flat_map(|number| round(twins, |place| host(number, place))).collect()
}

fn is_shared(block: BlockIndex) -> bool {
    block.0.is_multiple_of(3)
}

/// A third of the blocks of machines 0 and 1, and of 2 and 3, is the same pages, those of a block in another order and another
/// block of the other machine; the rest is unique.
fn shuffled(place: Place) -> Look {
    let block = place.page.block();
    if !is_shared(block) {
        return unique(place, 0);
    }
    let pair = place.machine.0 / 2;
    let (block, page) = if place.machine.0.is_multiple_of(2) {
        (block.0, place.page.in_block())
    } else {
        ((block.0 + 9) % BLOCKS, (place.page.in_block() * 77 + 5) % BLOCK_PAGES)
    };
    hash(u64::from(pair) << 32 | u64::from(block * BLOCK_PAGES + page))
}

fn keys(marked: &[Worth]) -> BTreeSet<(u32, u32)> {
    marked.iter().map(|worth| (worth.machine.0, worth.block.0)).collect()
}

fn shared_keys() -> BTreeSet<(u32, u32)> {
    let all = (0..MACHINES).flat_map(|machine| (0..BLOCKS).map(move |block| (machine, block)));
    all.filter(|(_, block)| is_shared(BlockIndex(*block))).collect()
}

#[test]
fn blocks_with_twins_in_another_order_are_all_found_and_no_other() {
    for seed in 0..20 {
        let mut twins = search(Limits::default(), mix(seed));
        let marked = rounds(&mut twins, 8, |_, place| shuffled(place));
        assert_eq!(keys(&marked), shared_keys(), "seed {seed}");
        assert_eq!(marked.len(), shared_keys().len(), "seed {seed}: a block was marked twice");
        // A pair saves half a page at either end: no more may be claimed.
        assert!(marked.iter().all(|worth| (1..=256).contains(&worth.saves.0)), "seed {seed}: {marked:?}");
    }
}

#[test]
fn twins_that_lie_alike_are_found_by_looking_at_a_tenth_of_memory() {
    let mut twins = search(Limits::default(), 7);
    let host = |place: Place| {
        if is_shared(place.page.block()) { hash(u64::from(place.page.0)) } else { unique(place, 0) }
    };
    let found = rounds(&mut twins, 2, |_, place| host(place));
    assert_eq!(keys(&found), shared_keys());
    let all = u64::from(MACHINES * BLOCKS * BLOCK_PAGES);
    assert!(twins.seen().looks * 10 <= all, "{} of {all}", twins.seen().looks);
    // Four machines hold each page: three quarters of it are saved at each.
    assert!(found.iter().all(|worth| (376..=384).contains(&worth.saves.0)), "{found:?}");
}

#[test]
fn pages_that_change_are_not_marked_and_those_that_come_to_rest_are() {
    let mut twins = search(Limits::default(), 3);
    // Alike in all machines at every moment, and others in each round.
    let restless = |round: u64, place: Place| {
        if place.page.block() == BlockIndex(0) {
            hash(round << 32 | u64::from(place.page.in_block()))
        } else {
            unique(place, 0)
        }
    };
    assert_eq!(rounds(&mut twins, 40, restless), []);
    assert!(twins.seen().changed > 100);
    let marked = rounds(&mut twins, 20, |_, place| restless(0, place));
    assert_eq!(keys(&marked), (0..MACHINES).map(|machine| (machine, 0)).collect());
}

#[test]
fn zero_pages_and_pages_that_are_away_are_nobodys_twins() {
    let mut twins = search(Limits::default(), 1);
    let host = |place: Place| if place.page.0.is_multiple_of(2) { Look::Zero } else { Look::Away };
    assert_eq!(rounds(&mut twins, 40, |_, place| host(place)), []);
    let seen = twins.seen();
    assert_eq!((seen.zeros, seen.samples), (seen.looks, 0));
    assert!(seen.zeros > 0);
}

#[test]
fn twins_inside_one_machine_count() {
    let mut twins = Twins::new(Limits::default(), 5);
    twins.add(MachineId(9), 2);
    let marked = rounds(&mut twins, 8, |_, place| hash(u64::from(place.page.in_block())));
    assert_eq!(keys(&marked), [(9, 0), (9, 1)].into());
}

#[test]
fn a_mark_that_does_not_pay_is_taken_back_and_the_block_rests() {
    let mut twins = search(Limits::default(), 2);
    let marked = rounds(&mut twins, 8, |_, place| shuffled(place));
    let (good, bad) = (marked[0], marked[1]);
    assert_eq!(twins.judge(good.machine, good.block, PageCount(32)), Verdict::Keep);
    assert_eq!(twins.judge(bad.machine, bad.block, PageCount(31)), Verdict::Unmark);
    assert_eq!(twins.seen().marked, shared_keys().len() as u64 - 1);
    assert_eq!(rounds(&mut twins, 60, |_, place| shuffled(place)), [], "it was not left alone");
    // In the end it is looked at again.
    let again = rounds(&mut twins, 60, |_, place| shuffled(place));
    assert_eq!(keys(&again), [(bad.machine.0, bad.block.0)].into());
}

#[test]
fn marked_blocks_are_not_looked_at_and_still_prove_the_twins_of_a_newcomer() {
    let mut twins = search(Limits::default(), 4);
    let marked = keys(&rounds(&mut twins, 8, |_, place| shuffled(place)));
    let mut places = Vec::new();
    twins.draw(&mut places);
    assert!(!places.iter().any(|place| marked.contains(&(place.machine.0, place.page.block().0))));
    twins.add(MachineId(MACHINES), BLOCKS);
    // It is what machine 0 is.
    let host = |place: Place| {
        let of = if place.machine.0 == MACHINES { Place { machine: MachineId(0), ..place } } else { place };
        if is_shared(place.page.block()) { shuffled(of) } else { unique(place, 0) }
    };
    let late = keys(&rounds(&mut twins, 10, |_, place| host(place)));
    assert_eq!(
        late,
        (0..BLOCKS).filter(|block| is_shared(BlockIndex(*block))).map(|block| (MACHINES, block)).collect()
    );
}

#[test]
fn a_machine_that_is_gone_is_nobodys_twin() {
    let mut twins = search(Limits::default(), 6);
    let mut places = Vec::new();
    twins.draw(&mut places);
    places.iter().for_each(|place| twins.saw(*place, shuffled(*place)));
    (1..MACHINES).for_each(|machine| twins.remove(MachineId(machine)));
    assert_eq!(rounds(&mut twins, 40, |_, place| shuffled(place)), []);
}

proptest! {
    #[test]
    fn neither_memory_nor_a_round_exceeds_its_limits(seed: u64, samples in 64usize..4096, looks in 100u32..2000) {
        let limits = Limits { samples, looks };
        let mut twins = search(limits, seed);
        let mut places = Vec::new();
        for _ in 0..30 {
            twins.draw(&mut places);
            prop_assert!(places.len() <= looks as usize);
            prop_assert!(places.is_sorted() && places.windows(2).all(|pair| pair[0] != pair[1]));
            prop_assert!(places.iter().all(|place| place.page < PageIndex(BLOCKS * BLOCK_PAGES)));
            places.iter().for_each(|place| twins.saw(*place, shuffled(*place)));
            let marked = twins.turn();
            prop_assert!(keys(&marked).is_subset(&shared_keys()));
            // Which hashes are remembered is chance: four standard deviations above what is expected at most.
            let most = samples as f64 + 4.0 * (samples as f64).sqrt();
            prop_assert!(twins.seen().samples as f64 <= most, "{} of {samples}", twins.seen().samples);
        }
    }

    #[test]
    fn whatever_is_thinned_away_twins_are_still_found(seed: u64) {
        // One page in sixteen is remembered: 32 of a block, of which a few suffice.
        let mut twins = search(Limits { samples: (MACHINES * BLOCKS * BLOCK_PAGES / 16) as usize, looks: 1 << 16 }, seed);
        let marked = keys(&rounds(&mut twins, 80, |_, place| shuffled(place)));
        prop_assert!(marked.is_subset(&shared_keys()));
        prop_assert!(marked.len() * 10 >= shared_keys().len() * 9, "{} of {}", marked.len(), shared_keys().len());
    }
}
