//! Choosing from outside beside a guest on a simulated kernel: what is thrashed, what is left, how good the estimate is.
//!
//! Enters: what a guest touches in each period. Leaves: a line a period now and then, and failures where a promise is not
//! kept. The simulated kernel takes what it is asked to take and brings back what the guest touches; like the real one it
//! tells nothing but where pages are. The test sees every touch.
#![expect(clippy::unwrap_used, reason = "an unexpected refusal is a failure of the test")]
use plimsoll_core::outside::{Outside, PageSet, Presence, Want};
use plimsoll_types::{BlockIndex, PageIndex};
use std::collections::BTreeSet;
use std::convert::Infallible;

const SAMPLES: u32 = 512;

/// splitmix64: every seed is a good one.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, end: u32) -> u32 {
        u32::try_from(self.next() % u64::from(end)).unwrap()
    }

    /// Near 0 with high probability, below `end`: each power of two as often as the next, so the density is about 1/x.
    fn zipf(&mut self, end: u32) -> u32 {
        let scale = 1 << self.below(end.ilog2() + 1);
        self.below(end.min(scale))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    Ram,
    Swap,
}

/// A guest and the kernel below it.
struct World {
    machine: Outside,
    blocks: u32,
    places: Vec<Place>,
    /// Pages the guest has touched in this period.
    touched: BTreeSet<u32>,
    refaults: u32,
    looks: u32,
}

/// What a period came to.
struct Period {
    used: usize,
    refaults: u32,
    present: usize,
    estimate: Option<u64>,
}

impl World {
    /// A guest that has touched all of its memory.
    fn new(blocks: u32, seed: u64) -> Self {
        println!("{blocks} blocks, seed {seed}");
        let pages = blocks as usize * 512;
        Self {
            machine: Outside::new(blocks, seed),
            blocks,
            places: vec![Place::Ram; pages],
            touched: BTreeSet::new(),
            refaults: 0,
            looks: 0,
        }
    }

    fn touch(&mut self, page: u32) {
        let place = &mut self.places[page as usize];
        self.refaults += u32::from(*place == Place::Swap);
        *place = Place::Ram;
        self.touched.insert(page);
    }

    fn look(places: &[Place], block: BlockIndex) -> Presence {
        let first = block.first_page().get();
        let mut presence = Presence::default();
        for (place, page) in places[first..first + 512].iter().zip(block.first_page().0..) {
            match place {
                Place::Ram => presence.present = presence.present | PageSet::only(PageIndex(page)),
                Place::Swap => presence.swapped = presence.swapped | PageSet::only(PageIndex(page)),
                Place::Nowhere => {}
            }
        }
        presence
    }

    fn take(&mut self, page: PageIndex) {
        let place = &mut self.places[page.get()];
        if *place == Place::Ram {
            *place = Place::Swap;
            self.machine.took(page.block(), PageSet::only(page));
        }
    }

    /// Ends a period: what comes back is seen, samples are drawn, and as much as `want` is taken.
    fn end(&mut self, want: u32) -> Period {
        for block in (0..self.blocks).map(BlockIndex) {
            self.machine.see(block, &Self::look(&self.places, block));
        }
        let places = &self.places;
        let is_present = |page: PageIndex| Ok::<_, Infallible>(places[page.get()] == Place::Ram);
        let Ok(samples) = self.machine.end_period(SAMPLES, is_present);
        samples.drawn.iter().for_each(|page| self.take(*page));
        let mut runs = Vec::new();
        let places = &self.places;
        let look = |block| Ok::<_, Infallible>(Self::look(places, block));
        let Ok(choice) = self.machine.choose(Want { pages: want, looks: u32::MAX }, look, &mut runs);
        assert!(choice.pages < want.saturating_add(512), "{choice:?} of {want}");
        self.looks += choice.looks;
        for run in runs {
            for page in run.first.0..run.first.0 + run.pages {
                assert!(self.places[page as usize] == Place::Ram, "page {page} is not there to be taken");
                self.take(PageIndex(page));
            }
        }
        Period {
            used: std::mem::take(&mut self.touched).len(),
            refaults: std::mem::take(&mut self.refaults),
            present: self.places.iter().filter(|place| **place == Place::Ram).count(),
            estimate: self.machine.estimate().map(|pages| pages.0),
        }
    }

    /// Many periods of one kind, each printed that is a power of two.
    fn run(&mut self, periods: u32, want: u32, mut touches: impl FnMut(&mut Self)) -> Vec<Period> {
        let all: Vec<Period> = (1..=periods)
            .map(|number| {
                touches(self);
                let period = self.end(want);
                if number.is_power_of_two() || number == periods {
                    println!(
                        "  {number:4}: used {:6}, estimate {:6}, refaults {:6}, present {:6}",
                        period.used,
                        period.estimate.unwrap_or(0),
                        period.refaults,
                        period.present
                    );
                }
                period
            })
            .collect();
        all
    }
}

/// A hot set of `pages` pages: in one piece, or each page somewhere else.
fn hot(random: &mut Random, machine: u32, pages: u32, is_scattered: bool) -> Vec<u32> {
    let mut set = BTreeSet::new();
    let start = random.below(machine - pages);
    while set.len() < pages as usize {
        set.insert(if is_scattered { random.below(machine) } else { start + random.below(pages) });
    }
    set.into_iter().collect()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let values: Vec<f64> = values.collect();
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn a_steady_hot_set_is_thrashed_once_and_then_left_alone_while_the_rest_goes() {
    for (seed, is_scattered) in [(1, false), (2, true), (3, false), (4, true)] {
        let mut world = World::new(64, seed);
        let mut random = Random(seed);
        let set = hot(&mut random, 64 * 512, 4000, is_scattered);
        let periods = world.run(100, u32::MAX, |world| set.iter().for_each(|page| world.touch(*page)));
        let late = mean(periods[40..].iter().map(|period| f64::from(period.refaults)));
        // Samples bring back 512 of 32,768 pages times the share that is hot; tries of proven pages one in 64.
        let samples = f64::from(SAMPLES) * 4000.0 / 32768.0;
        assert!(late < samples + 4000.0 / 16.0, "{late} refaults a period of 4000 hot pages");
        // The hot pages, less what was just taken as samples or on trial; and samples' pages that nobody uses leave too.
        let left = periods.last().unwrap().present;
        assert!((3400..=4400).contains(&left), "{left} pages are left");
    }
}

#[test]
fn the_estimate_is_within_a_fifth_of_the_truth_on_steady_loads() {
    for (seed, blocks, pages, is_scattered) in [
        (1, 32, 4000, true),
        (2, 64, 16000, false),
        (3, 512, 60000, true),
        (4, 1024, 200_000, false),
        (5, 128, 13000, false),
    ] {
        let mut world = World::new(blocks, seed);
        let set = hot(&mut Random(seed), blocks * 512, pages, is_scattered);
        let periods = world.run(60, 0, |world| set.iter().for_each(|page| world.touch(*page)));
        let mean = mean(periods[10..].iter().map(|period| period.estimate.unwrap() as f64));
        let error = mean / f64::from(pages) - 1.0;
        println!("  mean {mean:.0} of {pages}: {:+.1} %", error * 100.0);
        assert!(error.abs() < 0.2);
    }
}

#[test]
fn what_becomes_idle_is_taken_to_the_last_page() {
    let mut world = World::new(64, 9);
    let set = hot(&mut Random(9), 64 * 512, 8000, true);
    // Long enough for the set to have proven itself as often as counts.
    world.run(300, u32::MAX, |world| set.iter().for_each(|page| world.touch(*page)));
    let idle = world.run(80, u32::MAX, |_| ());
    assert_eq!(idle.last().unwrap().present, 0);
    assert_eq!(idle.last().unwrap().estimate.map(|pages| pages < 100), Some(true));
}

#[test]
fn a_zipf_guest_loses_its_tail_and_keeps_its_head() {
    let mut world = World::new(64, 5);
    let mut random = Random(5);
    let order = {
        let mut pages: Vec<u32> = (0..64 * 512).collect();
        (1..pages.len())
            .rev()
            .for_each(|last| pages.swap(last, random.below(u32::try_from(last).unwrap() + 1) as usize));
        pages
    };
    let periods = world.run(120, u32::MAX, |world| {
        (0..20_000).for_each(|_| world.touch(order[random.zipf(64 * 512) as usize]));
    });
    let (used, refaults) = periods[60..]
        .iter()
        .fold((0, 0), |sum, period| (sum.0 + period.used, sum.1 + period.refaults as usize));
    println!("  refaults are {:.1} % of the pages used", refaults as f64 * 100.0 / used as f64);
    // Half of the pages used in a period are used in few others: they cannot be told from idle ones.
    assert!(refaults * 2 < used);
    let head = &order[..100];
    let kept = head.iter().filter(|page| world.places[**page as usize] == Place::Ram).count();
    assert!(kept >= 90, "{kept} of the 100 pages that are always used");
}

#[test]
fn a_guest_that_changes_phase_pays_for_the_new_set_once_and_its_old_set_goes() {
    let mut world = World::new(64, 6);
    let mut random = Random(6);
    for phase in 0..4 {
        println!(" phase {phase}");
        let set = hot(&mut random, 64 * 512, 5000, false);
        let periods = world.run(80, u32::MAX, |world| set.iter().for_each(|page| world.touch(*page)));
        let late = mean(periods[40..].iter().map(|period| f64::from(period.refaults)));
        assert!(late < 500.0, "{late} refaults a period");
        assert!(periods.last().unwrap().present < 6500);
        assert!(periods[1].estimate.unwrap() >= 4000, "growth shows at once");
    }
}

#[test]
fn a_call_takes_at_most_a_block_more_than_wanted_and_looks_no_further_than_it_must() {
    let mut world = World::new(64, 7);
    for _ in 0..32 {
        world.looks = 0;
        let before = world.places.iter().filter(|place| **place == Place::Ram).count();
        let period = world.end(512);
        assert!(before - period.present <= 512 + 511 + SAMPLES as usize);
        assert!(world.looks <= 3, "{} blocks for one", world.looks);
    }
}

#[test]
fn memory_that_was_never_touched_is_neither_taken_nor_counted() {
    let mut world = World::new(64, 8);
    world.places[512 * 16..].fill(Place::Nowhere);
    let periods = world.run(30, u32::MAX, |world| (0..512 * 16).for_each(|page| world.touch(page)));
    let estimate = periods.last().unwrap().estimate.unwrap() as f64;
    assert!((estimate / (512.0 * 16.0) - 1.0).abs() < 0.2, "{estimate}");
    assert!(world.places[512 * 16..].iter().all(|place| *place == Place::Nowhere));
}

#[test]
fn the_same_events_give_the_same_answers() {
    let run = || {
        let mut world = World::new(16, 3);
        let mut random = Random(1);
        world.run(20, 4096, |world| (0..2000).for_each(|_| world.touch(random.below(16 * 512))));
        world.machine
    };
    assert_eq!(run(), run());
}
