//! What comes of many decisions: fixed points, noise, and a loop closed over a host that does what it is told.
use crate::world::{MIB, STALLED, World, machine, sampled, target, view};
use plimsoll_policy::host_state::HostState;
use plimsoll_policy::settings::MachineSettings;
use plimsoll_policy::view::MachineView;
use plimsoll_policy::{Plan, Ppm, Rung, Rungs};
use plimsoll_types::{ByteCount, MachineId};
use proptest::prelude::{ProptestConfig, Strategy, any, prop, prop_assert, prop_assert_eq, proptest};
use proptest::test_runner::FileFailurePersistence;
use std::collections::BTreeMap;

/// A host of 16 GiB.
const TOTAL: u64 = 16 << 10;

#[derive(Clone, Debug)]
struct Kind {
    consumed: u64,
    active: u64,
    reservation: u64,
    shares: u32,
    has_balloon: bool,
}

fn kinds() -> impl Strategy<Value = Vec<Kind>> {
    let kind = (500..4000u64, 0..4000u64, 0..500u64, 1..10_000u32, any::<bool>()).prop_map(
        |(consumed, active, reservation, shares, has_balloon)| Kind {
            consumed,
            active: active.min(consumed),
            reservation,
            shares,
            has_balloon,
        },
    );
    prop::collection::vec(kind, 2..8)
}

/// A host on which those machines are, with so much free.
fn world(kinds: &[Kind], free: u64) -> World {
    let settings: Vec<MachineSettings> =
        kinds.iter().zip(1..).map(|(kind, id)| machine(id, 4096, kind.reservation, kind.shares)).collect();
    let machines: Vec<MachineView> = kinds
        .iter()
        .zip(1..)
        .map(|(kind, id)| MachineView {
            balloon: kind.has_balloon.then_some(ByteCount(0)),
            rungs: Rungs::NONE.with(Rung::Compress).with(Rung::Balloon),
            ..view(id, kind.consumed, kind.active)
        })
        .collect();
    let used: u64 = kinds.iter().map(|kind| kind.consumed).sum();
    let mut world = World::new(TOTAL, 0, &settings, machines);
    world.pool = MIB(used + free);
    world
}

fn config(cases: u32) -> ProptestConfig {
    let persistence = FileFailurePersistence::WithSource("proptest-regressions");
    ProptestConfig { cases, failure_persistence: Some(Box::new(persistence)), ..ProptestConfig::default() }
}

/// For each machine, its targets over time.
fn record(history: &mut BTreeMap<MachineId, Vec<ByteCount>>, plan: &Plan) {
    for one in &plan.machines {
        history.entry(one.machine).or_default().push(one.target);
    }
}

/// The most that targets of one minute moved back: the smaller of all that they rose and all that they sank.
fn back_and_forth(targets: &[ByteCount]) -> u64 {
    let minute = |window: &[ByteCount]| {
        let (mut up, mut down) = (0, 0);
        for pair in window.windows(2) {
            up += pair[1].saturating_sub(pair[0]).0;
            down += pair[0].saturating_sub(pair[1]).0;
        }
        up.min(down)
    };
    targets.windows(60.min(targets.len())).map(minute).max().unwrap_or(0)
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn constant_input_comes_to_rest_and_stays(kinds in kinds(), free in 0..1500u64) {
        let mut world = world(&kinds, free);
        // Balloons move at once here, and the state needs its lines to be reached: both within few decisions.
        for _ in 0..100 {
            world.step();
        }
        let rested = world.step();
        for _ in 0..200 {
            let plan = world.step();
            prop_assert_eq!(&plan.actions, &[]);
            prop_assert_eq!(&plan.machines, &rested.machines);
        }
    }

    #[test]
    fn steady_input_with_noise_moves_no_target_back_and_forth(
        kinds in kinds(), free in 300..1500u64, noise in prop::collection::vec(-5..=5i64, 200),
    ) {
        let mut world = world(&kinds, free);
        let mut history = BTreeMap::new();
        for second in 0..300usize {
            for (index, kind) in kinds.iter().enumerate() {
                // The estimate errs by up to 5 % either way, of each machine differently.
                let percent = 100 + noise[(second * 7 + index * 31) % noise.len()];
                let active = kind.active * u64::try_from(percent).unwrap() / 100;
                world.view.machines[index].active = sampled(active);
            }
            record(&mut history, &world.step());
        }
        for (id, targets) in &history {
            // What it takes to free what the host lacks at first is no flutter.
            let steady = &targets[30..];
            let most = steady.iter().copied().max().unwrap();
            prop_assert!(back_and_forth(steady) <= most.0 / 20, "{id}: {steady:?}");
        }
    }

    #[test]
    fn the_host_is_never_left_short_while_anybody_can_give(kinds in kinds(), free in 0..300u64) {
        let mut world = world(&kinds, free);
        let plan = (0..100).map(|_| world.step()).last().unwrap();
        // Where more is guaranteed than there is, all come down to their guarantees and the rest is said.
        let mut all = kinds.iter().zip(&world.view.machines);
        let can_anybody_give = all.any(|(kind, shown)| shown.consumed > MIB(kind.reservation));
        prop_assert!(plan.state <= HostState::Clear || !can_anybody_give, "{plan:?}");
        for (kind, shown) in kinds.iter().zip(&world.view.machines) {
            prop_assert!(shown.consumed >= MIB(kind.reservation.min(kind.consumed)));
        }
    }
}

/// Two equal machines, of which the first wakes up after the second has taken its idle memory.
#[test]
fn a_machine_that_wakes_up_has_its_memory_back_while_it_stalls() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 0, 1000)];
    let shown = |id, consumed, active| MachineView {
        balloon: Some(MIB(0)),
        rungs: Rungs::NONE.with(Rung::Balloon).with(Rung::Compress),
        ..view(id, consumed, active)
    };
    let mut world = World::new(TOTAL, 6000, &settings, vec![shown(1, 5000, 100), shown(2, 4500, 4500)]);
    let serve = |world: &mut World, seconds, idle: u64| {
        for _ in 0..seconds {
            world.touch(1, idle.max(100));
            world.touch(2, 8000);
            for (id, wants) in [(1, idle), (2, 8000)] {
                let has = world.consumed(id).0 >> 20;
                world.machine(id).active = sampled((has + 300).min(wants));
                world.machine(id).stalled = if has + 100 < wants { STALLED } else { Ppm::ZERO };
            }
            world.step();
        }
    };
    serve(&mut world, 200, 100);
    let asleep = world.consumed(1);
    assert!(asleep < MIB(3500), "it had {asleep} asleep");
    serve(&mut world, 300, 8000);
    let awake = world.consumed(1);
    // Both want more than half of the 9729 MiB there are: both have about half.
    assert!(
        awake > MIB(4200) && world.consumed(2) > MIB(4200),
        "{awake} awake, the other {}",
        world.consumed(2)
    );
}

/// A machine that stalls whatever it has does not take what is guaranteed to others, nor everything else.
#[test]
fn a_machine_that_always_stalls_evens_out_with_its_siblings() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 2000, 1000), machine(3, 8192, 0, 1000)];
    let mut world = World::new(
        TOTAL,
        4000,
        &settings,
        vec![view(1, 5000, 5000), view(2, 2500, 2500), view(3, 4000, 4000)],
    );
    for _ in 0..600 {
        world.touch(1, 8000);
        world.touch(3, 4000);
        let has = world.consumed(1).0 >> 20;
        world.machine(1).active = sampled((has + 100).min(8000));
        world.machine(1).stalled = STALLED;
        let short = world.consumed(3) < MIB(2000);
        world.machine(3).stalled = if short { STALLED } else { Ppm::ZERO };
        let plan = world.step();
        assert!(target(&plan, 2) >= MIB(2000));
    }
    assert!(world.consumed(2) >= MIB(2000), "{}", world.consumed(2));
    assert!(world.consumed(3) >= MIB(1500), "{}", world.consumed(3));
}
