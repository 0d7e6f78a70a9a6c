//! What holds for every guest, every target and every lie.
use crate::guest::{Guest, Kind};
use crate::reversals;
use plimsoll_attach::balloon::{Controller, Observation, REST_MIN, State};
use plimsoll_attach::control::GuestStatistics;
use plimsoll_types::ByteCount;
use proptest::prelude::*;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn guests() -> impl Strategy<Value = Guest> {
    (128u64..65_536, 1u64..90, 1u64..50).prop_map(|(mib, used, speed)| {
        let memory = ByteCount::mib(mib);
        let mut guest = Guest::new(Kind::Honest, memory, ByteCount(memory.0 / 100 * used));
        guest.speed = ByteCount(memory.0 / 100 * speed);
        guest
    })
}

/// Numbers a guest might invent: nothing, plausible ones, and the edges of what a number can be.
fn numbers() -> impl Strategy<Value = Option<u64>> {
    prop_oneof![
        Just(None),
        Just(Some(0)),
        Just(Some(u64::MAX)),
        Just(Some(u64::MAX - 4095)),
        (0u64..65_536).prop_map(|mib| Some(mib * MIB)),
        any::<u64>().prop_map(Some),
    ]
}

fn lies() -> impl Strategy<Value = GuestStatistics> {
    let sizes = (numbers(), numbers(), numbers(), numbers(), numbers());
    (sizes, numbers(), numbers(), numbers()).prop_map(
        |((available, free, total, caches, swapped), faults, kills, age)| {
            let size = |number: Option<u64>| number.map(ByteCount);
            GuestStatistics {
                age: age.map(Duration::from_secs),
                available: size(available),
                free: size(free),
                total: size(total),
                caches: size(caches),
                swapped_in: size(swapped),
                swapped_out: size(swapped),
                major_faults: faults,
                minor_faults: faults,
                oom_kills: kills,
            }
        },
    )
}

fn granularities() -> impl Strategy<Value = ByteCount> {
    prop_oneof![Just(ByteCount(4096)), Just(ByteCount::mib(1)), Just(ByteCount::mib(2))]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Towards a fixed target the ask goes one way only, arrives in bounded time, never takes the guest's reserve, and in
    /// all moves no further than it has to.
    #[test]
    fn an_honest_guest_is_brought_to_its_target_or_its_floor_and_stays(
        mut guest in guests(), granularity in granularities(), share in 0u64..=100, tells: bool, period in 0u64..6,
    ) {
        guest.tells = tells;
        guest.period = Duration::from_secs(period);
        let target = ByteCount(guest.memory.0 / 100 * share);
        let floor = guest.memory.saturating_sub(if tells { guest.used } else { ByteCount(0) });
        let goal = target.min(floor.saturating_sub(guest.reserve()));
        // A guest that tells nothing and uses more than would be left pages, and its deeds are what stops us: not here.
        prop_assume!(tells || goal + guest.used <= guest.memory);
        let mut controller = Controller::new(granularity, ByteCount(0));
        // At its own speed or at the first rate, whichever is less, thrice over; and the steps near the goal.
        let seconds = 3 * 100 / (guest.speed.0 * 100 / guest.memory.0).clamp(1, 2) + 60;
        let seen = guest.follow(&mut controller, target, u32::try_from(seconds).unwrap());
        let band = guest.band().max(granularity);
        let (asked, state) = seen[seen.len() - 1];
        prop_assert!(asked <= goal, "{asked} of {goal}");
        prop_assert!(asked + band + granularity >= goal, "{asked} of {goal}, {state}");
        prop_assert!(matches!(state, State::Settled | State::AtFloor), "{state}");
        prop_assert_eq!(reversals(&seen), 0);
        prop_assert!(guest.balloon + band >= asked);
    }

    /// However a guest behaves and whatever it says, of its balloon too, the balloon does not go past the target, nor
    /// faster than its rate, and turns at most twice in a rest.
    #[test]
    fn no_guest_can_make_the_balloon_swing_or_run(
        mut guest in guests(),
        kind in prop_oneof![
            Just(Kind::Honest), Just(Kind::Stuck), Just(Kind::DeflatesOnOom),
            (0u64..1000).prop_map(|mib| Kind::Partial(ByteCount::mib(mib))),
        ],
        words in prop::collection::vec((prop::option::of(lies()), numbers()), 300),
        does_lie_of_its_balloon: bool,
        granularity in granularities(),
        share in 0u64..=100,
    ) {
        guest.kind = kind;
        let target = ByteCount(guest.memory.0 / 100 * share);
        let band = guest.band().max(granularity);
        let mut controller = Controller::new(granularity, ByteCount(0));
        let mut seen = Vec::new();
        for (statistics, claim) in words {
            guest.run(Duration::from_secs(1));
            let (before, truth) = (guest.asked, guest.observation());
            let claim = claim.filter(|_| does_lie_of_its_balloon).map_or(truth.actual, ByteCount);
            let step = controller.step(&Observation { statistics, actual: claim, ..truth }, target);
            guest.asked = step.ask.unwrap_or(before);
            prop_assert!(guest.asked <= target.max(before));
            let rate = ByteCount(guest.memory.0 / 1024 * 165);
            prop_assert!(guest.asked <= before + rate.max(band), "{before} to {}", guest.asked);
            seen.push((guest.asked, step.state));
        }
        let turns = reversals(&seen);
        let most = 2 * (300 / usize::try_from(REST_MIN.as_secs()).unwrap() + 1);
        prop_assert!(turns <= most, "{turns} turns in 300 s");
    }

    /// Whatever a guest says, at no moment has it been asked for more, beyond the dead band, than if it had kept silent. (It is a quick one: a slow
    /// guest that is asked for less is sooner asked for the next step.)
    #[test]
    fn words_only_make_the_controller_more_careful(
        mut silent in guests(), words in prop::collection::vec(prop::option::of(lies()), 1..100), share in 0u64..=100,
    ) {
        silent.speed = silent.memory;
        silent.tells = false;
        let mut talker = silent.clone();
        let target = ByteCount(silent.memory.0 / 100 * share);
        let mut careful = Controller::new(ByteCount(4096), ByteCount(0));
        let mut bold = careful.clone();
        for statistics in words {
            silent.run(Duration::from_secs(1));
            let _ = silent.look(&mut bold, target);
            talker.run(Duration::from_secs(1));
            let step = careful.step(&Observation { statistics, ..talker.observation() }, target);
            talker.asked = step.ask.unwrap_or(talker.asked);
            prop_assert!(talker.asked <= silent.asked + silent.band(), "{} for {}", talker.asked, silent.asked);
        }
    }

    /// A machine that refaults gets no larger balloon, and one that must have memory back gets all of it in one step.
    #[test]
    fn a_balloon_does_not_grow_into_refaults_and_shrinks_at_once(
        mut guest in guests(), share in 1u64..=100, looks in 1u32..40,
    ) {
        let target = ByteCount(guest.memory.0 / 100 * share);
        let mut controller = Controller::new(ByteCount(4096), ByteCount(0));
        guest.follow(&mut controller, target, looks);
        guest.run(Duration::from_secs(1));
        let refaulted = ByteCount(guest.memory.0 / 100);
        let step = controller.step(&Observation { refaulted, ..guest.observation() }, target);
        prop_assert!(step.ask.is_none_or(|ask| ask <= guest.asked));
        guest.asked = step.ask.unwrap_or(guest.asked);
        let half = ByteCount(guest.asked.0 / 2);
        let step = controller.step(&guest.observation(), half);
        if guest.asked > half + guest.band() {
            prop_assert!(step.ask.is_some_and(|ask| ask <= half && ask.0 + 4096 > half.0));
        }
    }

    /// No number from outside, in any order, leads to a panic, and no ask goes beyond the target.
    #[test]
    fn absurd_observations_are_survived(
        looks in prop::collection::vec(
            (numbers(), numbers(), numbers(), prop::option::of(lies()), numbers(), numbers()), 1..80,
        ),
        granularity in numbers(),
    ) {
        let mut controller = Controller::new(ByteCount(granularity.unwrap_or(0)), ByteCount(0));
        for (now, memory, actual, statistics, refaulted, target) in looks {
            let seen = Observation {
                now: Duration::from_millis(now.unwrap_or(0)),
                memory: ByteCount(memory.unwrap_or(0)),
                actual: ByteCount(actual.unwrap_or(0)),
                statistics,
                refaulted: ByteCount(refaulted.unwrap_or(0)),
            };
            let target = ByteCount(target.unwrap_or(0));
            let step = controller.step(&seen, target);
            prop_assert!(step.ask.is_none_or(|ask| ask <= target || ask <= seen.actual));
        }
    }
}
