//! Targets that do not swing: whatever a host shows, none moves back and forth by more than the dead band within a minute unless
//! there is no other way, and what that is can be seen in the plan.
use crate::invariants::{config, first, is_in_a_group_above, machines_in, moment, taken_in_use, tree};
use crate::world::{MIB, STALLED, World, machine, sampled, target, view};
use plimsoll_policy::damper::{DEAD_BAND, REVERSAL_MS};
use plimsoll_policy::host_state::HostState;
use plimsoll_policy::settings::GroupSettings;
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::HostView;
use plimsoll_policy::{Plan, PolicyState, Ppm, Reason, decide};
use plimsoll_types::{ByteCount, MachineId, PageCount};
use proptest::prelude::{prop, prop_assert, proptest};
use std::collections::{BTreeMap, VecDeque};

const PAGE: ByteCount = PageCount(1).bytes();

/// The targets of a machine's last minute.
#[derive(Default)]
struct Minute {
    target: Option<ByteCount>,
    /// When it moved, from where to where.
    moves: VecDeque<(u64, ByteCount, ByteCount)>,
}

impl Minute {
    /// Its target is this now. True where it has moved back and forth: where what it rose and what it sank are both more than the
    /// dead band of the highest it was.
    fn swings(&mut self, now_ms: u64, target: ByteCount) -> bool {
        let Some(before) = self.target.replace(target).filter(|before| *before != target) else {
            return false;
        };
        self.moves.push_back((now_ms, before, target));
        while self.moves.front().is_some_and(|(then, ..)| now_ms - then >= REVERSAL_MS) {
            self.moves.pop_front();
        }
        let sum = |part: fn(ByteCount, ByteCount) -> ByteCount| -> u64 {
            self.moves.iter().map(|(_, from, to)| part(*from, *to).0).sum()
        };
        let (up, down) = (sum(|from, to| to.saturating_sub(from)), sum(ByteCount::saturating_sub));
        let highest = self.moves.iter().map(|(_, from, to)| *from.max(to)).max().unwrap_or_default();
        up.min(down) > DEAD_BAND.apply(highest.0)
    }
}

/// Each machine whose target swung at that decision, and where it was before.
fn swung(minutes: &mut BTreeMap<MachineId, Minute>, now_ms: u64, plan: &Plan) -> Vec<(MachineId, ByteCount)> {
    let swing = |one: &plimsoll_policy::Position| {
        let minute = minutes.entry(one.machine).or_default();
        let before = minute.target;
        minute.swings(now_ms, one.target).then_some((one.machine, before?))
    };
    plan.machines.iter().filter_map(swing).collect()
}

/// Whether there was no other way: it has what it is guaranteed, and no more; or the host is at its end; or the targets on the host,
/// or in a group around it, are all that may be there, but for the page of each machine that rounding leaves; or what such a group
/// takes up is more than that.
fn had_to(tree: &Tree, plan: &Plan, id: MachineId, before: ByteCount, view: &HostView) -> bool {
    let target = target(plan, id.0);
    if target > before {
        return target <= tree.terms(id).unwrap().floor.bytes();
    }
    let settings = tree.settings();
    let is_full = |inside: &dyn Fn(MachineId) -> bool, most: ByteCount| {
        let targets = plan.machines.iter().filter(|one| inside(one.machine)).map(|one| one.target + PAGE);
        targets.sum::<ByteCount>() >= most
    };
    let is_full_group = |group: &GroupSettings| {
        let inside = machines_in(settings, group.id);
        inside.contains(&id) && group.limit.is_some_and(|limit| is_full(&|id| inside.contains(&id), limit))
    };
    plan.state == HostState::Low
        || is_full(&|_| true, plan.budget)
        || settings.groups.iter().any(is_full_group)
        || is_in_a_group_above(tree, plan, id, view)
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn no_target_swings_unless_nobody_else_can_give_way(
        tree in tree(), moments in prop::collection::vec((moment(), 500..25_000u64), 2..12), scale in 1..8u64,
        are_the_same in prop::bool::ANY,
    ) {
        let mut state = PolicyState::new(tree);
        let (mut now_ms, mut minutes) = (0, BTreeMap::new());
        // The same machines on the same host, of which what is free comes and goes; or all of it changes.
        let first_view = moments[0].0.clone();
        for (view, after_ms) in moments {
            now_ms += after_ms / scale;
            let (free, overdrawn) = (view.free, view.overdrawn);
            let view = if are_the_same { first_view.clone() } else { view };
            let view = HostView { now_ms, free, overdrawn, ..view };
            let plan = decide(&view, &mut state);
            for (id, before) in swung(&mut minutes, now_ms, &plan) {
                prop_assert!(had_to(state.tree(), &plan, id, before, &view), "{id} from {before} to {} in {plan:?}", target(&plan, id.0));
            }
            // Nor does what is taken go below where a target is held.
            for (id, taken) in taken_in_use(&plan) {
                let left = first(&view, id).consumed.saturating_sub(ByteCount(taken));
                prop_assert!(left >= target(&plan, id.0), "{id} was left {left} of {}", target(&plan, id.0));
            }
        }
    }

    /// So it swings by no more than what is due does.
    #[test]
    fn a_target_moves_towards_what_is_due_and_not_past_it(
        tree in tree(), moments in prop::collection::vec((moment(), 500..25_000u64), 2..12),
    ) {
        let mut state = PolicyState::new(tree);
        let (mut now_ms, mut targets) = (0, BTreeMap::new());
        for (view, after_ms) in moments {
            now_ms += after_ms;
            let plan = decide(&HostView { now_ms, ..view }, &mut state);
            for action in &plan.actions {
                let Reason::TargetMoved { from, to, due, .. } = action.reason else { continue };
                // The first one is where it is due, wherever the machine is.
                let from = targets.insert(action.machine, to).map_or(due, |before| { assert_eq!(from, before); before });
                prop_assert!(from.min(due) <= to && to <= from.max(due), "{} from {from} to {to}, due {due}", action.machine);
            }
        }
    }
}

proptest! {
    #![proptest_config(config(40))]

    #[test]
    fn machines_that_fill_a_host_and_stall_by_turns_do_not_swing(
        starts in prop::collection::vec((0..400u64, 200..1500u64, 0..6u64), 8..24), free in 500..4000u64,
    ) {
        // Each begins at its time, grows by 64 MiB a second to what it keeps, and stalls now and then.
        let settings: Vec<_> = (1..).zip(&starts).map(|(id, _)| machine(id, 4096, 100, 1000)).collect();
        let machines = (1..).zip(&starts).map(|(id, _)| view(id, 0, 0)).collect();
        let all: u64 = starts.iter().map(|(_, keeps, _)| keeps).sum();
        let mut world = World::new(64 << 10, 0, &settings, machines);
        world.pool = MIB((all * 4 / 5).max(free) + 1300);
        let mut minutes = BTreeMap::new();
        for second in 0..600 {
            for (id, (from, keeps, stalls)) in (1..).zip(&starts) {
                let grown = (second + 1u64).saturating_sub(*from).saturating_mul(64).min(*keeps);
                world.touch(id, grown);
                world.machine(id).stalled = if second % 7 == *stalls { STALLED } else { Ppm::ZERO };
            }
            let view = world.view.clone();
            let plan = world.step();
            for (id, before) in swung(&mut minutes, view.now_ms, &plan) {
                prop_assert!(had_to(world.state.tree(), &plan, id, before, &view), "{id} from {before} to {}", target(&plan, id.0));
            }
        }
    }
}

/// The second machine has had what the first is guaranteed and did not want, and its target has just risen; the first wakes up.
#[test]
fn a_guarantee_is_not_kept_waiting_by_a_target_that_has_just_risen() {
    let settings = [machine(1, 4096, 1000, 1000), machine(2, 4096, 0, 1000)];
    let mut world = World::new(16 << 10, 0, &settings, vec![view(1, 200, 200), view(2, 1000, 1000)]);
    // 655 MiB of 16 GiB stay free, and 3300 are shared.
    world.pool = MIB(3955);
    world.step();
    world.touch(2, 3050);
    world.machine(2).active = sampled(3050);
    assert!(target(&world.step(), 2) >= MIB(3040));
    world.touch(1, 800);
    world.machine(1).active = sampled(800);
    let plan = world.step();
    assert!(target(&plan, 1) >= MIB(800), "{} of the 1000 it is guaranteed", target(&plan, 1));
    assert!(target(&plan, 2) < MIB(3050 - 500) && plan.state < HostState::Low, "{}", target(&plan, 2));
}

/// A host that is hard has a target sink at once to what is due, but for one that has just risen, as long as there is room for it.
#[test]
fn a_target_that_has_just_risen_is_held_though_the_host_is_hard() {
    let settings = [machine(1, 4096, 0, 1000), machine(2, 12_000, 0, 1000)];
    let mut world = World::new(16 << 10, 0, &settings, vec![view(1, 1000, 1000), view(2, 10_000, 10_000)]);
    world.pool = MIB(12_180);
    world.step();
    world.touch(1, 2000);
    world.machine(1).active = sampled(2000);
    let risen = target(&world.step(), 1);
    assert!(risen > MIB(1900), "{risen}");
    // It gives three quarters back, and the host has 180 MiB free of 655. The other's target has sunk to make room.
    *world.machine(1) = plimsoll_policy::view::MachineView { reported_free: MIB(1500), ..view(1, 2000, 400) };
    *world.machine(2) = view(2, 10_000, 10_000);
    let plan = world.step();
    assert_eq!(plan.state, HostState::Hard);
    let held = target(&plan, 1);
    assert!(held < risen && held >= risen.saturating_sub(MIB(60)), "from {risen} to {held}");
}

/// What there is to take goes by what is due and by the damped target, whichever is more: the first machine's target has just risen
/// and is held above what is due, the second's is still on its way up to it.
#[test]
fn nothing_is_taken_below_what_is_due_nor_below_where_a_target_is_held() {
    let settings = [machine(1, 4096, 0, 1000), machine(2, 8192, 0, 1000)];
    let mut state = PolicyState::new(crate::world::tree(&settings));
    let mut decided = |second: u64, free, machines| {
        let (now_ms, total, free) = (second * 1000, MIB(16 << 10), MIB(free));
        decide(&HostView { now_ms, total, free, overdrawn: MIB(0), machines }, &mut state)
    };
    decided(0, 8000, vec![view(1, 1000, 1000), view(2, 3000, 3000)]);
    decided(1, 8000, vec![view(1, 2000, 2000), view(2, 3000, 3000)]);
    // Of 16 GiB 655 MiB are to be free, and 6745 are left for both.
    let plan = decided(2, 400, vec![view(1, 2000, 400), view(2, 5000, 5000)]);
    assert_eq!((plan.state, target(&plan, 1)), (HostState::Soft, MIB(2000)));
    assert!(target(&plan, 2) < MIB(4750), "{}", target(&plan, 2));
    assert_eq!(taken_in_use(&plan), BTreeMap::new());
}

/// Its target has just sunk: while it stalls it rises by no more than is no swing, and is granted by what is due.
#[test]
fn a_target_that_has_just_sunk_is_held_though_its_machine_stalls() {
    let mut state = PolicyState::new(crate::world::tree(&[machine(1, 4096, 0, 1000)]));
    let mut decided = |second: u64, one| {
        let view = HostView::of(second * 1000, MIB(16 << 10), MIB(8384), vec![one]);
        target(&decide(&view, &mut state), 1)
    };
    decided(0, view(1, 2000, 2000));
    assert_eq!(decided(1, view(1, 1000, 1000)), MIB(1000));
    let risen = decided(2, plimsoll_policy::view::MachineView { stalled: STALLED, ..view(1, 1500, 1500) });
    assert!(risen > MIB(1000) && risen <= MIB(1025), "{risen}");
}

/// Pages were merged, and are written again: for some seconds there is more, and everybody waits for it. What stays is shared out.
#[test]
fn what_is_there_for_some_seconds_raises_no_target_that_would_sink_again() {
    let settings = [1, 2, 3, 4].map(|id| machine(id, 4096, 0, 1000));
    let machines = [1, 2, 3, 4].map(|id| view(id, 900, 2000));
    // 656 MiB of 16 GiB stay free.
    let mut world = World::new(16 << 10, 0, &settings, machines.to_vec());
    let mut minutes = BTreeMap::new();
    let mut decided = |shared: u64| {
        world.pool = MIB(shared + 656);
        (1..=4).for_each(|id| world.machine(id).stalled = STALLED);
        let now_ms = world.view.now_ms;
        let plan = world.step();
        assert_eq!(swung(&mut minutes, now_ms, &plan), [], "at {now_ms}");
        target(&plan, 1)
    };
    let before = decided(3600);
    for shared in [3600, 3950, 3850, 3700, 3600] {
        decided(shared);
    }
    assert!(decided(3600) >= before.saturating_sub(MIB(20)), "as much as before, or nearly");
    // Nor a minute after the least there ever was.
    for second in 0..200 {
        decided(if (57..63).contains(&second) { 3950 } else { 3601 });
    }
    (0..130).for_each(|_| assert!(decided(4000) >= before.saturating_sub(MIB(20))));
    assert!(decided(4000) >= MIB(980), "a quarter of what has been there for two minutes");
}
