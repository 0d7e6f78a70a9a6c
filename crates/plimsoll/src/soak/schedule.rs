//! What is done to the manager and its guests, and in which order: a function of the seed alone.
//!
//! Enters: a seed and a number of guests. Leaves: an endless sequence of [`Action`]s, and machines to be started. What
//! must never happen: a choice made by anything else than the seed. How an action meets what the guests do at that
//! moment is up to the machine it runs on, so a replay repeats what is done, not every interleaving of it.
use plimsoll_guest::abi;
use plimsoll_guest::content::Mix;
use plimsoll_guest::random::{Rng, hash3};
use plimsoll_guest::spec::{DISCARD_PAGES_LIMIT, WorkloadKind, WorkloadSpec};
use plimsoll_linux::uffd::probe::Step;
use plimsoll_types::{BLOCK_SIZE, ByteCount, PAGE_SIZE};
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::config::{AccelChoice, Workload};

/// Share of a guest's memory that it fills: all of it is evicted and brought back again and again, so more would only
/// mean fewer rounds.
const FOOTPRINT_PERCENT: u64 = 50;
/// Pages in the pool of pages that guests have in common.
const POOL_PAGES: u64 = 512;
/// Machines are cut into so many shards at most.
const SHARDS: u64 = 2;
/// The least compressible contents that [`machine`] gives a guest: the budget has to hold them.
pub(super) const WORST_MIX: Mix = Mix { zero: 10, duplicate: 10, text: 70, random: 10 };

/// One thing that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing is asked of anybody.
    Rest { ms: u64 },
    /// A guest is evicted as often as it comes back.
    SqueezeOne { guest: usize, ms: u64 },
    /// All guests are.
    SqueezeAll { ms: u64 },
    /// All guests are, and then all but one: what came back to that one soon after it was taken, all of it, has room and is hot.
    Feast { guest: usize, ms: u64 },
    /// A guest is evicted as often as it comes back, and then somebody else seems to use all that is free and a little more: it is
    /// the others' to give.
    Contend { guest: usize, ms: u64 },
    /// A guest is put to sleep, goes on all the same, and is woken: what it used last is brought back while it runs.
    Park { guest: usize, ms: u64 },
    /// Somebody else seems to use that share of the budget: everything is evicted, and faults have to wait.
    Famine { percent: u64, ms: u64 },
    /// All pagers die as soon as one has passed a step that often, and a new manager takes over.
    CrashManager { step: Step, after: u64 },
    /// The manager ends in good order, and a new one takes over.
    RestartManager,
    /// A guest's process is killed, and another guest takes its place.
    KillGuest { guest: usize, then: Aftermath },
    /// Until further notice, pagers are held up at some of their steps.
    Delay { permille: u64, longest_us: u64 },
    /// Until further notice, a process reads the guest's memory, so that its pages cannot be moved.
    Read { guest: usize },
    /// No more delays and no more reading.
    Calm,
}

/// What happens right after a guest was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aftermath {
    /// Its pager has to notice.
    Wait,
    /// The manager is restarted, and the next one has to notice.
    Restart,
}

/// What every run begins with, in a guest that is the same in each: what follows may be too short for its manager to make a
/// block huge, or to see that somebody thrashes.
pub(super) const OPENING: [Action; 2] =
    [Action::Feast { guest: 0, ms: 3000 }, Action::Contend { guest: 0, ms: 1000 }];

/// The sequence of actions that belongs to a seed.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    rng: Rng,
    guests: u64,
}

impl Schedule {
    pub(super) const fn new(seed: u64, guests: usize) -> Self {
        Self { rng: Rng::new(hash3(seed, 1, 0)), guests: guests as u64 }
    }

    fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.rng.below(most - least + 1)
    }

    fn guest(&mut self) -> usize {
        usize::try_from(self.rng.below(self.guests)).unwrap_or(0)
    }
}

impl Iterator for Schedule {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        Some(match self.rng.below(100) {
            0..2 => Action::Rest { ms: self.between(20, 300) },
            2..4 => Action::Feast { guest: self.guest(), ms: self.between(1000, 2000) },
            4 => Action::Contend { guest: self.guest(), ms: self.between(600, 1000) },
            5..10 => Action::Park { guest: self.guest(), ms: self.between(20, 400) },
            10..25 => Action::SqueezeOne { guest: self.guest(), ms: self.between(20, 400) },
            25..40 => Action::SqueezeAll { ms: self.between(20, 600) },
            40..50 => Action::Famine { percent: self.between(20, 100), ms: self.between(20, 400) },
            50..70 => {
                let steps = Step::ALL.len() as u64;
                let step = Step::ALL[usize::try_from(self.rng.below(steps)).unwrap_or(0)];
                // Small numbers crash a manager in what it does first: recovering from the last crash.
                let longest = [1, 20, 2000][usize::try_from(self.rng.below(3)).unwrap_or(0)];
                Action::CrashManager { step, after: self.rng.below(longest) }
            }
            70..76 => Action::RestartManager,
            76..80 => {
                let then = if self.rng.below(2) == 0 { Aftermath::Wait } else { Aftermath::Restart };
                Action::KillGuest { guest: self.guest(), then }
            }
            80..87 => Action::Delay { permille: self.between(1, 30), longest_us: self.between(1, 4000) },
            87..95 => Action::Read { guest: self.guest() },
            _ => Action::Calm,
        })
    }
}

/// The `nth` machine that is started in a run, replacements included.
pub(super) fn machine(seed: u64, nth: u64, size: ByteCount, accel: AccelChoice) -> VmmConfig {
    let mut rng = Rng::new(hash3(seed, 2, nth));
    // The first few are of each kind in turn, so that short runs have all.
    let kinds = WorkloadKind::ALL;
    let kind = kinds[usize::try_from((nth + seed % kinds.len() as u64) % kinds.len() as u64).unwrap_or(0)];
    let mut spec = WorkloadSpec::new(kind);
    let usable = size.0.saturating_sub(abi::WORKLOAD_GPA);
    spec.footprint_bytes = usable / 100 * FOOTPRINT_PERCENT / PAGE_SIZE as u64 * PAGE_SIZE as u64;
    spec.write_permille = narrow(50 + rng.below(850));
    spec.hot_permille = narrow(50 + rng.below(951));
    spec.ops_per_second = [0, 2000, 10_000][usize::try_from(rng.below(3)).unwrap_or(0)];
    spec.final_check = 1;
    // One guest in four keeps what it has.
    spec.discard_every_ops = if rng.below(4) == 0 { 0 } else { 20 + rng.below(1000) };
    spec.discard_pages_max = 1 + rng.below(DISCARD_PAGES_LIMIT);
    spec.phase_ms = 200 + rng.below(2000);
    spec.burst_ops = 100 + rng.below(5000);
    spec.burst_idle_ms = 20 + rng.below(500);
    spec.seed = rng.word();
    // Each share is at least as compressible as in WORST_MIX.
    let zero = 10 + rng.below(30);
    let duplicate = 10 + rng.below(30);
    let random = rng.below(11);
    if nth == 0 {
        // The one of the opening uses all it has, as fast as it can, and keeps it.
        let WorkloadSpec { footprint_bytes, write_permille, seed, .. } = spec;
        let sweep = WorkloadSpec::new(WorkloadKind::Sweep);
        spec = WorkloadSpec { footprint_bytes, write_permille, seed, final_check: 1, ..sweep };
    }
    let mix = Mix {
        zero: narrow(zero),
        duplicate: narrow(duplicate),
        text: narrow(100 - zero - duplicate - random),
        random: narrow(random),
    };
    let workload = Workload { spec, mix, seed: rng.word(), pool_seed: seed, pool_pages: POOL_PAGES };
    let name = if nth == 0 { "first".to_owned() } else { format!("{kind}{nth}") };
    let mut config = VmmConfig::new(name, size.0, workload);
    config.vcpus = narrow(1 + rng.below(3));
    config.shards = Some(narrow(1 + rng.below(SHARDS)));
    config.accel = accel;
    // Few slots run out, many do not: both happen.
    config.airlock_slots = narrow(4 + rng.below(size.0 / BLOCK_SIZE as u64 / 4));
    config
}

fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{Discriminant, discriminant};

    const GUESTS: usize = 4;
    const SIZE: ByteCount = ByteCount::mib(96);

    #[test]
    fn a_seed_decides_everything_that_is_done() {
        let of = |seed| Schedule::new(seed, GUESTS).take(500).collect::<Vec<_>>();
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
        let machines = |seed| {
            let text = |nth| serde_json::to_string(&machine(seed, nth, SIZE, AccelChoice::Auto)).unwrap();
            (0..20).map(text).collect::<Vec<_>>()
        };
        assert_eq!(machines(7), machines(7));
        assert_ne!(machines(7), machines(8));
    }

    #[test]
    fn a_few_minutes_have_every_action_and_crash_at_every_step() {
        let actions: Vec<Action> = Schedule::new(1, GUESTS).take(500).collect();
        let mut kinds: Vec<Discriminant<Action>> = Vec::new();
        let mut steps = Vec::new();
        for action in &actions {
            if !kinds.contains(&discriminant(action)) {
                kinds.push(discriminant(action));
            }
            if let Action::CrashManager { step, .. } = action
                && !steps.contains(step)
            {
                steps.push(*step);
            }
        }
        assert_eq!((kinds.len(), steps.len()), (13, Step::ALL.len()));
    }

    #[test]
    fn every_machine_of_any_seed_can_run_and_fits_the_budget_of_the_worst() {
        for seed in 0..200 {
            for nth in 0..20 {
                let config = machine(seed, nth, SIZE, AccelChoice::Auto);
                config.check().unwrap();
                let mix = config.workload.mix;
                let weight = |mix: Mix| mix.text * 640 + mix.random * 1010;
                assert!(weight(mix) <= weight(WORST_MIX), "{mix:?}");
            }
        }
    }
}
