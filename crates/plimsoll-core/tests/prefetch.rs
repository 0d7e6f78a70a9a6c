//! Prefetch beside a guest with a small memory: what it saves, what it brings in vain, what it must never ask for.
//!
//! Enters: patterns of touches. Leaves: a table of faults without and with prefetch, and failures where a promise is
//! not kept. The guest's memory is a first-in-first-out queue, a tenth of it limbo; unlike the prefetch, the test sees
//! every touch, so it knows which pages were brought in vain. The pager brings a few pages after each touch.
#![expect(clippy::unwrap_used, reason = "an unexpected refusal is a failure of the test")]
use plimsoll_core::prefetch::Prefetch;
use plimsoll_core::replacement::Run;
use plimsoll_types::PageIndex;
use std::collections::{BTreeSet, VecDeque};

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

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.next() % (last as u64 + 1);
            items.swap(last, usize::try_from(other).unwrap());
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Resident,
    Limbo,
    Stored,
}

#[derive(Clone, Copy)]
enum Prefetching {
    Off,
    On,
}

/// A machine with less memory than pages.
struct Guest {
    prefetch: Prefetch,
    mode: Prefetching,
    memory: usize,
    place: Vec<Place>,
    /// Pages in memory, oldest first; entries of pages that have moved since are stale.
    resident: VecDeque<(u32, u64)>,
    limbo: VecDeque<(u32, u64)>,
    stamp: Vec<u64>,
    clock: u64,
    in_memory: usize,
    queue: VecDeque<u32>,
    untouched: BTreeSet<u32>,
    /// Pages the pager brings between two touches, and while a fault is on its way.
    pace: usize,
    pace_fault: usize,
    faults: u64,
    brought: u64,
    in_vain: u64,
}

impl Guest {
    fn new(pages: u32, memory: usize, mode: Prefetching) -> Self {
        Self {
            prefetch: Prefetch::new(pages),
            mode,
            memory,
            place: vec![Place::Stored; pages as usize],
            resident: VecDeque::new(),
            limbo: VecDeque::new(),
            stamp: vec![0; pages as usize],
            clock: 0,
            in_memory: 0,
            queue: VecDeque::new(),
            untouched: BTreeSet::new(),
            pace: 4,
            pace_fault: 32,
            faults: 0,
            brought: 0,
            in_vain: 0,
        }
    }

    fn install(&mut self, page: u32) {
        self.clock += 1;
        self.in_memory += usize::from(self.place[page as usize] == Place::Stored);
        self.place[page as usize] = Place::Resident;
        self.stamp[page as usize] = self.clock;
        self.resident.push_back((page, self.clock));
    }

    fn store(&mut self, page: u32) {
        self.place[page as usize] = Place::Stored;
        self.in_memory -= 1;
        self.in_vain += u64::from(self.untouched.remove(&page));
        self.prefetch.left(PageIndex(page));
    }

    /// Takes pages until memory is enough; limbo is a tenth of it.
    fn reclaim(&mut self, memory: usize) {
        while self.in_memory > memory {
            while self.limbo.len() <= memory / 10
                && let Some((page, stamp)) = self.resident.pop_front()
            {
                if self.place[page as usize] == Place::Resident && self.stamp[page as usize] == stamp {
                    self.place[page as usize] = Place::Limbo;
                    self.limbo.push_back((page, stamp));
                }
            }
            let Some((page, stamp)) = self.limbo.pop_front() else { break };
            if self.place[page as usize] == Place::Limbo && self.stamp[page as usize] == stamp {
                self.store(page);
            }
        }
    }

    fn touch(&mut self, page: u32) {
        self.untouched.remove(&page);
        let mut pace = self.pace;
        match self.place[page as usize] {
            Place::Resident => {}
            Place::Limbo => {
                self.install(page);
                self.prefetch.used(PageIndex(page));
            }
            Place::Stored => {
                self.faults += 1;
                pace = self.pace_fault;
                self.install(page);
                self.reclaim(self.memory);
                if matches!(self.mode, Prefetching::On) {
                    let place = &self.place;
                    let mut out: Vec<Run> = Vec::new();
                    let replays = self.prefetch.stats().replays;
                    self.prefetch.faulted(
                        PageIndex(page),
                        |page| place[page.get()] == Place::Stored,
                        &mut out,
                    );
                    let asked: Vec<u32> = pages_of(&out);
                    assert!(
                        asked.len() <= 511 || self.prefetch.stats().replays > replays,
                        "{} pages for one fault",
                        asked.len()
                    );
                    assert_eq!(
                        asked.iter().collect::<BTreeSet<_>>().len(),
                        asked.len(),
                        "asked twice at once"
                    );
                    assert!(
                        asked.iter().all(|asked| *asked != page && place[*asked as usize] == Place::Stored)
                    );
                    // The newest request is the most urgent.
                    asked.into_iter().rev().for_each(|page| self.queue.push_front(page));
                }
            }
        }
        self.bring(pace);
    }

    fn bring(&mut self, most: usize) {
        let mut brought = 0;
        while brought < most
            && let Some(page) = self.queue.pop_front()
        {
            if self.place[page as usize] == Place::Stored {
                self.install(page);
                self.prefetch.brought(PageIndex(page));
                self.untouched.insert(page);
                self.brought += 1;
                brought += 1;
            }
        }
        self.reclaim(self.memory);
    }

    fn quiet(&mut self) {
        self.bring(usize::MAX);
        self.prefetch.quiet();
    }

    /// The machine is parked: everything goes to the store.
    fn park(&mut self) {
        self.quiet();
        self.reclaim(0);
    }
}

fn pages_of(runs: &[Run]) -> Vec<u32> {
    runs.iter().flat_map(|run| run.first.0..run.first.0 + run.pages).collect()
}

/// What a pattern cost.
struct Cost {
    bare: u64,
    faults: u64,
    brought: u64,
    in_vain: u64,
}

/// Runs a pattern without and with prefetch and prints a row of the table.
fn cost(name: &str, pages: u32, memory: usize, pattern: impl Fn(&mut Guest)) -> Cost {
    let run = |mode| {
        let mut guest = Guest::new(pages, memory, mode);
        pattern(&mut guest);
        let most = pages as usize * 3 / 4 + 4096;
        assert!(guest.prefetch.table_bytes() <= most, "{} bytes", guest.prefetch.table_bytes());
        // What is there at the end and was never touched was brought in vain too.
        guest.in_vain += guest.untouched.len() as u64;
        guest
    };
    let (bare, with) = (run(Prefetching::Off), run(Prefetching::On));
    let cost = Cost { bare: bare.faults, faults: with.faults, brought: with.brought, in_vain: with.in_vain };
    println!(
        "{name:34} faults {:7} -> {:6}, brought {:7}, in vain {:6}  {:?}",
        cost.bare,
        cost.faults,
        cost.brought,
        cost.in_vain,
        with.prefetch.stats()
    );
    cost
}

/// At most a `1/faults`th of the faults is left, and at most a `1/vain`th of the pages was brought in vain.
fn assert_saves(cost: &Cost, faults: u64, vain: u64) {
    assert!(cost.faults * faults <= cost.bare, "{} of {} faults are left", cost.faults, cost.bare);
    assert!(cost.in_vain * vain <= cost.brought, "{} of {} pages in vain", cost.in_vain, cost.brought);
}

#[test]
fn a_sequential_reader_faults_once_in_hundreds_of_pages_in_either_direction() {
    let up = cost("sequential up", 65536, 4096, |guest| (0..65536).for_each(|page| guest.touch(page)));
    assert_saves(&up, 150, 50);
    let down =
        cost("sequential down", 65536, 4096, |guest| (0..65536).rev().for_each(|page| guest.touch(page)));
    assert_saves(&down, 150, 50);
}

#[test]
fn a_cyclic_scan_of_more_than_memory_is_a_stream_each_time() {
    let scan = cost("cyclic scan, 3 rounds", 16384, 4096, |guest| {
        (0..3).for_each(|_| (0..16384).for_each(|page| guest.touch(page)));
    });
    assert_saves(&scan, 60, 20);
}

#[test]
fn a_strided_reader_is_followed_in_its_stride() {
    let stride =
        cost("stride 7", 65536, 4096, |guest| (0..65536).step_by(7).for_each(|page| guest.touch(page)));
    assert_saves(&stride, 60, 10);
}

#[test]
fn interleaved_readers_each_keep_their_stream() {
    for readers in [2, 8] {
        let share = 65536 / readers;
        let name = format!("{readers} interleaved readers");
        let readers = cost(&name, 65536, 8192, |guest| {
            (0..share).for_each(|place| {
                (0..readers).for_each(|reader| guest.touch(reader * share + place));
            });
        });
        assert_saves(&readers, 60, 10);
    }
}

#[test]
fn random_touches_are_left_alone() {
    for (memory, name) in [(2048, "random, memory 1/32"), (32768, "random, memory 1/2")] {
        let random = cost(name, 65536, memory, |guest| {
            let mut random = Random(3);
            (0..100_000).for_each(|_| guest.touch(random.below(65536)));
        });
        assert!(random.in_vain * 200 < random.bare, "{} in vain", random.in_vain);
        assert!(random.faults * 99 < random.bare * 100);
    }
}

#[test]
fn a_stream_goes_on_through_partly_resident_memory() {
    let partly = cost("every third page resident", 65536, 40000, |guest| {
        (0..65536).step_by(3).for_each(|page| guest.install(page));
        (0..65536).for_each(|page| guest.touch(page));
    });
    assert_saves(&partly, 80, 20);
}

#[test]
fn one_random_fault_in_four_does_not_break_a_stream() {
    for stride in [1, 7] {
        let noisy = cost(&format!("stride {stride}, noise 1 in 4"), 262_144, 16384, |guest| {
            let mut random = Random(11);
            (0..131_072 / stride).for_each(|place| {
                guest.touch(place * stride);
                if random.below(3) == 0 {
                    guest.touch(131_072 + random.below(131_072));
                }
            });
        });
        let noise = noisy.bare / 4;
        assert!(noisy.faults < noise + noisy.bare / 25, "{} faults, {noise} of noise", noisy.faults);
        assert!(noisy.in_vain * 10 < noisy.brought);
    }
}

#[test]
fn neighbours_are_brought_where_they_are_used_and_not_any_more_when_they_are_not() {
    let objects = cost("objects of 16 pages, then random", 65536, 8192, |guest| {
        let mut random = Random(5);
        for _ in 0..4000 {
            let object = random.below(4096) * 16;
            let mut pages: Vec<u32> = (object..object + 16).collect();
            random.shuffle(&mut pages);
            pages.into_iter().for_each(|page| guest.touch(page));
        }
        (0..50_000).for_each(|_| guest.touch(random.below(65536)));
    });
    let random = 50_000 * 7 / 8;
    assert!(objects.faults < random + (objects.bare - random) / 2, "{} faults", objects.faults);
    assert!(objects.in_vain * 10 < objects.brought, "{} of {}", objects.in_vain, objects.brought);
}

/// `count` pages, spread so that neither stream nor neighbourhood helps.
fn scattered(seed: u64, from: u32, span: u32, count: usize) -> Vec<u32> {
    let mut random = Random(seed);
    let mut pages = BTreeSet::new();
    while pages.len() < count {
        pages.insert(from + random.below(span));
    }
    let mut pages: Vec<u32> = pages.into_iter().collect();
    random.shuffle(&mut pages);
    pages
}

#[test]
fn a_working_set_comes_back_whole_after_parking() {
    let phases = cost("phases A/B/A/B with parks", 65536, 8192, |guest| {
        let sets = [scattered(1, 0, 32768, 4000), scattered(2, 32768, 32768, 4000)];
        for round in 0..8 {
            let set = &sets[round % 2];
            (0..3).for_each(|_| set.iter().for_each(|page| guest.touch(*page)));
            guest.park();
        }
    });
    // The first two phases are faulted page by page, and one replayed page in 64 is left out.
    assert!(phases.faults < phases.bare / 4 + phases.bare / 20, "{}", phases.faults);
    assert!(phases.in_vain * 20 < phases.brought);
}

#[test]
fn a_known_working_set_comes_back_without_a_quiet_time() {
    let phases = cost("phases A/B/A/B, quiet once each", 65536, 4500, |guest| {
        let sets = [scattered(1, 0, 32768, 4000), scattered(2, 32768, 32768, 4000)];
        for round in 0..12 {
            let set = &sets[round % 2];
            (0..3).for_each(|_| set.iter().for_each(|page| guest.touch(*page)));
            if round < 2 {
                guest.quiet();
            }
        }
    });
    assert!(phases.faults * 2 < phases.bare, "{}", phases.faults);
    assert!(phases.in_vain * 4 < phases.brought);
}

#[test]
fn a_working_set_that_drifts_is_followed() {
    let drift = cost("drifting set with parks", 65536, 8192, |guest| {
        let set = scattered(1, 0, 65536, 8000);
        for round in 0..16 {
            set[round * 250..round * 250 + 4000].iter().for_each(|page| guest.touch(*page));
            guest.park();
        }
    });
    assert!(drift.faults * 4 < drift.bare, "{}", drift.faults);
    assert!(drift.in_vain * 2 < drift.brought, "{} of {}", drift.in_vain, drift.brought);
}

#[test]
fn a_set_that_is_not_used_any_more_is_dropped() {
    let dropped = cost("sets used once each", 65536, 8192, |guest| {
        for seed in 0..12 {
            scattered(seed, 0, 65536, 1000).iter().for_each(|page| guest.touch(*page));
            guest.park();
        }
    });
    assert!(dropped.in_vain < dropped.bare / 2, "{}", dropped.in_vain);
}

#[test]
fn thrashing_is_no_working_set() {
    let thrash = cost("random over 2x memory", 65536, 8192, |guest| {
        let mut random = Random(9);
        let set = scattered(4, 0, 65536, 16384);
        (0..200_000).for_each(|_| guest.touch(set[random.below(16384) as usize]));
    });
    assert!(thrash.in_vain * 5 < thrash.bare, "{} in vain", thrash.in_vain);
    assert!(thrash.faults < thrash.bare * 102 / 100);
}

#[test]
fn windows_shrink_to_what_a_tiny_memory_can_hold() {
    let tiny = cost("4 readers, 300 pages of memory", 65536, 300, |guest| {
        guest.pace = 64;
        (0..16384).for_each(|place| (0..4).for_each(|reader| guest.touch(reader * 16384 + place)));
    });
    assert!(tiny.faults * 4 < tiny.bare, "{}", tiny.faults);
    assert!(tiny.in_vain * 2 < tiny.brought, "{} of {}", tiny.in_vain, tiny.brought);
}

#[test]
fn short_streams_are_not_overrun_by_long_windows() {
    let short = cost("streams of 30 pages", 262_144, 8192, |guest| {
        let mut random = Random(21);
        for _ in 0..3000 {
            let start = random.below(8192) * 32;
            (start..start + 30).for_each(|page| guest.touch(page));
        }
    });
    assert!(short.faults * 3 < short.bare, "{}", short.faults);
    assert!(short.in_vain * 2 < short.brought, "{} of {}", short.in_vain, short.brought);
}

#[test]
fn the_operator_wakes_a_machine_with_the_set_it_used_last() {
    let mut guest = Guest::new(65536, 4096, Prefetching::On);
    let set = scattered(8, 0, 65536, 500);
    let mut out = Vec::new();
    guest.prefetch.replay(|_| true, &mut out);
    assert!(out.is_empty(), "nothing is known yet");
    set.iter().for_each(|page| guest.touch(*page));
    guest.park();
    guest.prefetch.discarded(0..8192);
    let place = &guest.place;
    guest.prefetch.replay(|page| place[page.get()] == Place::Stored, &mut out);
    let asked = pages_of(&out);
    assert!(asked.is_sorted() && asked.iter().all(|page| *page >= 8192));
    let strangers = asked.iter().filter(|page| !set.contains(page)).count();
    assert!(strangers * 20 <= asked.len(), "{strangers} of {} are not of the set", asked.len());
    let kept = set.iter().filter(|page| **page >= 8192).count();
    assert!((kept - kept / 10..=kept).contains(&asked.len()), "{} of {kept}", asked.len());
}

#[test]
fn whatever_happens_only_stored_pages_of_the_machine_are_asked_for() {
    for seed in 0..40 {
        println!("seed {seed}");
        let mut random = Random(seed);
        let pages = 1 + random.below(3000);
        let mut guest = Guest::new(pages, 1 + random.below(pages) as usize, Prefetching::On);
        let mut at = 0;
        for _ in 0..20_000 {
            let page = match random.below(64) {
                0 => random.below(pages),
                1 => pages - 1,
                2..40 => (at + 1) % pages,
                40..50 => at.saturating_sub(3),
                _ => at / 2 + random.below(pages) / 2,
            };
            at = page.min(pages - 1);
            guest.touch(at);
            match random.below(2000) {
                0 => guest.quiet(),
                1 => guest.park(),
                2 => guest.prefetch.discarded(at..at.saturating_add(random.below(5000))),
                3 => guest.prefetch.discarded(0..u32::MAX),
                // Reports that contradict each other, or name no page of the machine, must do no harm.
                4 => guest.prefetch.left(PageIndex(random.below(pages * 2))),
                5 => guest.prefetch.used(PageIndex(random.below(pages * 2))),
                6 => guest.prefetch.brought(PageIndex(random.below(pages * 2))),
                7 => guest.prefetch.faulted(PageIndex(pages), |_| true, &mut Vec::new()),
                _ => {}
            }
        }
        assert!(guest.prefetch.table_bytes() <= pages as usize * 3 / 4 + 4096);
    }
}

#[test]
fn the_same_events_give_the_same_answers() {
    let run = || {
        let mut guest = Guest::new(4096, 512, Prefetching::On);
        let mut random = Random(77);
        (0..20_000).for_each(|turn| guest.touch((turn * (1 + random.below(2))) % 4096));
        guest.prefetch
    };
    assert_eq!(run(), run());
}
