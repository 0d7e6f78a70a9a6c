//! Managers that crash at random steps while guests run, and the next ones that take over.
use crate::fleet::{Fleet, Guest, PATIENCE, PLENTY, machine, sweep, until, zipf};
use crate::probes::Crash;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::probe::{NoProbe, Step};
use plimsoll_vmm::config::VmmConfig;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Managers that are replaced at least, of which half are to crash. Where their steps come seldom, as on a busy machine, there are more.
const MANAGERS: u64 = 24;
/// How long a manager works whose step does not come.
const LASTS: Duration = Duration::from_millis(700);
/// Set to the printed seed to repeat a run's choices.
const SEED: &str = "PLIMSOLL_SEED";

/// splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    /// Where a manager is to crash, and how often it comes there before.
    ///
    /// Discards are read and applied by the one pager that is spared there. A guest that has touched all its memory
    /// leaves no more blocks to the kernel, and those of an earlier manager are all watched: these steps come too seldom
    /// to wait for. The pager's model kills at each of them.
    pub(crate) fn crash(&mut self) -> (Step, u64) {
        let seldom = [Step::DiscardApplied, Step::MovedBack, Step::Unwatched, Step::Watched];
        let steps: Vec<Step> = Step::ALL.into_iter().filter(|step| !seldom.contains(step)).collect();
        (steps[self.below(steps.len())], 1 + self.next() % 60)
    }
}

/// The seed asked for, or one from the clock; printed either way.
pub(crate) fn seed() -> u64 {
    let asked = std::env::var(SEED).ok().map(|text| text.parse().unwrap());
    let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let seed = asked.unwrap_or_else(clock);
    println!("{SEED}={seed}");
    seed
}

pub(crate) fn guests_outlive_manager_crashes() {
    let mut random = Random(seed());
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut guests: Vec<Guest> = [
        machine("gives", 48, WorkloadSpec { discard_every_ops: 300, ..zipf() }),
        machine("sweeps", 48, sweep()),
        VmmConfig { vcpus: 2, ..machine("serves", 48, zipf()) },
    ]
    .iter()
    .map(|config| fleet.add(config))
    .collect();
    guests.iter().for_each(Guest::until_running);
    let mut crashes: BTreeMap<String, u64> = BTreeMap::new();
    let mut missing = vec![0; guests.len()];
    let (mut managers, begun) = (0, Instant::now());
    while managers < MANAGERS || crashes.values().sum::<u64>() < MANAGERS / 2 {
        assert!(begun.elapsed() < PATIENCE, "too few of {managers} managers crashed: {crashes:?}");
        let (step, nth) = random.crash();
        println!("manager {managers}: to crash at the {nth}. {step:?}");
        managers += 1;
        let crash = Arc::new(Crash::new(step, nth, vec![guests[0].id]));
        fleet.replace(Arc::clone(&crash) as _);
        let start = Instant::now();
        while !crash.happened() && start.elapsed() < LASTS {
            guests.iter().for_each(|guest| fleet.squeeze(guest.id));
            std::thread::sleep(Duration::from_millis(50));
        }
        if crash.happened() {
            *crashes.entry(format!("{step:?}")).or_default() += 1;
            // A step or two later all pagers are down. One whose guest does nothing at the moment is stopped instead.
            let down = Instant::now();
            while down.elapsed() < LASTS && !guests.iter().all(|guest| fleet.see().is_gone(guest.id)) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        for (sum, guest) in missing.iter_mut().zip(&guests) {
            let anomalies = fleet.view(guest.id).stats.anomalies;
            assert_eq!(anomalies.lost, 0, "{}", guest.name);
            *sum += anomalies.missing;
        }
        assert_eq!(fleet.incidents(), []);
    }
    fleet.replace(Arc::new(NoProbe));
    println!("crashes: {crashes:?}; pages found missing: {missing:?}");
    assert_eq!(missing[1..], [0, 0], "a guest that gives nothing back misses nothing");
    guests.iter().for_each(Guest::goes_on);
    until("all statistics to be published", || {
        guests.iter().all(|guest| fleet.view(guest.id).stats.census.total().0 > 0).then_some(())
    });
    crate::evict::audit(&fleet);
    for guest in &mut guests {
        let state = guest.state();
        assert!(!state.manager_lost, "{}: its socket was closed between two managers", guest.name);
        assert_eq!(fleet.view(guest.id).stats.takeovers, managers + 1, "{}", guest.name);
        guest.finish();
        fleet.until_gone(guest.id);
    }
    assert_eq!(fleet.incidents(), []);
    assert_eq!(fleet.store_pages(), 0, "objects outlived the machines that named them");
}
