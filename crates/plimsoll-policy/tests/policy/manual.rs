//! One machine or two, and the decision that a manual would describe.
use crate::world::{
    MIB, STALLED, World, entitlement, limited, machine, rungs, sampled, steps, target, tree, view, why,
};
use plimsoll_policy::costs::{Cost, Losses};
use plimsoll_policy::demand::{Basis, SampleFault};
use plimsoll_policy::host_state::{HostState, min_free};
use plimsoll_policy::plan::Note;
use plimsoll_policy::settings::{Face, GroupSettings, MachineSettings, Settings};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{GuestStatistics, HostView, MachineView, Phase, Reading};
use plimsoll_policy::{Costs, Plan, PolicyState, Ppm, Reason, Rung, Rungs, Step, decide};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};

/// A host of 16 GiB, which keeps 655 MiB free.
const TOTAL: u64 = 16 << 10;

fn look(machines: Vec<MachineView>, free: u64, state: &mut PolicyState, now_ms: u64) -> Plan {
    decide(&HostView { free: MIB(free), ..HostView::of(now_ms, MIB(TOTAL), MIB(0), machines) }, state)
}

fn faults(plan: &Plan) -> Vec<SampleFault> {
    let fault = |note: &Note| match note.reason {
        Reason::BadSample { fault } => Some(fault),
        _ => None,
    };
    plan.reasons.iter().filter_map(fault).collect()
}

#[test]
fn nothing_is_taken_while_memory_is_plentiful() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 0, 1000)];
    let mut state = PolicyState::new(tree(&settings));
    let plan = look(vec![view(1, 4096, 10), view(2, 4096, 4096)], 8000, &mut state, 0);
    assert_eq!((rungs(&plan, 1), plan.state), (vec![], HostState::High));
    assert_eq!(target(&plan, 1), MIB(4096), "what nobody wants stays where it is");
}

#[test]
fn a_limit_holds_however_much_memory_is_free() {
    let settings = [limited(1, 8192, 2048), machine(2, 8192, 0, 1000)];
    let mut world = World::new(TOTAL, 0, &settings, vec![view(1, 4096, 100), view(2, 4096, 100)]);
    let first = world.step();
    assert_eq!(
        (first.state, rungs(&first, 1), rungs(&first, 2)),
        (HostState::High, vec![Rung::Compress], vec![])
    );
    let said = why(&first, 1).join("\n");
    assert!(said.contains("it takes up 2G more than its limit, which holds however much is free"), "{said}");
    let rested = (0..5).map(|_| world.step()).last().unwrap();
    assert_eq!((world.consumed(1), world.consumed(2)), (MIB(2048), MIB(4096)));
    assert_eq!((rungs(&rested, 1), why(&rested, 1)), (vec![], vec![]));
    // Where nothing else is allowed it is said.
    let never = MachineSettings { highest: Rung::NEVER_PAGE, ..limited(1, 8192, 2048) };
    let plan = look(vec![view(1, 4096, 100)], 8000, &mut PolicyState::new(tree(&[never])), 0);
    assert!(rungs(&plan, 1).is_empty() && why(&plan, 1).iter().any(|text| text.contains("cannot be taken")));
}

#[test]
fn a_groups_limit_holds_however_much_memory_is_free() {
    let group = GroupSettings { limit: Some(MIB(3000)), ..GroupSettings::new(GroupId(1)) };
    let member = |id| MachineSettings { parent: Some(GroupId(1)), ..machine(id, 8192, 0, 1000) };
    let machines = vec![member(1), member(2), machine(3, 8192, 0, 1000)];
    let settings = Settings { groups: vec![group], machines, ..Settings::new(MIB(TOTAL)) };
    let mut state = PolicyState::new(Tree::new(settings).unwrap());
    let plan = look([1, 2, 3].map(|id| view(id, 2000, 100)).to_vec(), 8000, &mut state, 0);
    let frees = |id| {
        let of = |step| if let Step::Take { frees, .. } = step { frees } else { ByteCount(0) };
        steps(&plan, id).into_iter().map(of).sum::<ByteCount>()
    };
    assert_eq!(([1, 2, 3].map(frees), plan.state), ([MIB(500), MIB(500), MIB(0)], HostState::High));
    let said = why(&plan, 1).join("\n");
    assert!(said.contains("the machines of group1 take up 1000M more than its limit"), "{said}");
}

#[test]
fn idle_memory_goes_to_who_uses_it() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 0, 1000)];
    let mut world = World::new(TOTAL, 6000, &settings, vec![view(1, 5000, 500), view(2, 4000, 4000)]);
    for _ in 0..300 {
        // What its working set lacks it touches, and the sampler sees it want more than it has.
        world.touch(2, 8000);
        let wants = (world.consumed(2).0 >> 20) + 500;
        world.machine(2).active = sampled(wants.min(8000));
        world.step();
    }
    // 9729 MiB for both: at the level of used pages w, 500 + (w - 500) / 4 + w = 9729.
    let idle = world.consumed(1).0 >> 20;
    assert!((2200..2450).contains(&idle), "the idle machine has {idle} MiB");
    assert!(world.view.free >= HostState::Soft.line(MIB(TOTAL)), "{} free", world.view.free);
}

#[test]
fn what_is_guaranteed_is_not_taken_however_idle_it_is() {
    let settings = [machine(1, 8192, 3000, 1), machine(2, 8192, 0, 1_000_000)];
    let mut state = PolicyState::new(tree(&settings));
    let plan = look(vec![view(1, 8000, 0), view(2, 8000, 8000)], 0, &mut state, 0);
    assert_eq!(target(&plan, 1).0 >> 20, 16_000 - 656 - 8000);
    let mut state = PolicyState::new(tree(&settings));
    let plan = look(vec![view(1, 3500, 0), view(2, 8000, 8000)], 0, &mut state, 0);
    assert_eq!(target(&plan, 1), MIB(3000));
    assert_eq!(entitlement(&plan, 1), MIB(3000));
}

#[test]
fn a_machine_that_must_not_be_paged_is_not_and_the_rest_is_said() {
    let never = MachineSettings { highest: Rung::NEVER_PAGE, ..machine(1, 8192, 0, 1000) };
    let mut state = PolicyState::new(tree(&[never]));
    let mut shown = view(1, 8000, 10);
    shown.rungs = Rungs::ALL;
    shown.reported_free = MIB(100);
    let plan = look(vec![shown], 0, &mut state, 0);
    assert_eq!(rungs(&plan, 1), [Rung::GuestFree]);
    let uncovered = plan.reasons.iter().find(|note| matches!(note.reason, Reason::Uncovered { .. })).unwrap();
    assert!(
        uncovered.reason.to_string().ends_with("the last way allowed is merging twins"),
        "{}",
        uncovered.reason
    );
}

#[test]
fn twins_are_merged_inside_a_domain_only() {
    let settings = |domain| {
        let group = GroupSettings { domain, ..GroupSettings::new(GroupId(1)) };
        let member = MachineSettings { parent: Some(GroupId(1)), ..machine(1, 8192, 0, 1000) };
        Settings { groups: vec![group], machines: vec![member], ..Settings::new(MIB(TOTAL)) }
    };
    for (domain, expected) in [(None, vec![]), (Some(DomainId(7)), vec![Rung::Sharing])] {
        let mut state = PolicyState::new(Tree::new(settings(domain)).unwrap());
        let mut shown = view(1, 8000, 10);
        (shown.rungs, shown.mergeable) = (Rungs::NONE.with(Rung::Sharing), MIB(50));
        assert_eq!(rungs(&look(vec![shown], 0, &mut state, 0), 1), expected);
    }
}

#[test]
fn static_and_dedicated_machines_keep_all_and_are_not_touched() {
    let settings = [
        MachineSettings::new(MachineId(1), Face::Static { size: MIB(2048) }),
        MachineSettings::new(MachineId(2), Face::Dedicated { size: MIB(2048) }),
        machine(3, 8192, 0, 1000),
    ];
    let mut state = PolicyState::new(tree(&settings));
    let shown = [(1, 2048), (2, 2048), (3, 8000)].map(|(id, consumed)| MachineView {
        rungs: Rungs::ALL,
        reported_free: MIB(64),
        ..view(id, consumed, 0)
    });
    let plan = look(shown.to_vec(), 0, &mut state, 0);
    assert_eq!((rungs(&plan, 1), rungs(&plan, 2)), (vec![], vec![]));
    assert_eq!((target(&plan, 1), target(&plan, 2)), (MIB(2048), MIB(2048)));
    assert!(!rungs(&plan, 3).is_empty());
}

#[test]
fn a_balloon_is_asked_first_and_the_next_rung_when_it_stands_still() {
    let mut state = PolicyState::new(tree(&[machine(1, 8192, 0, 1000)]));
    let shown = || MachineView {
        balloon: Some(MIB(0)),
        rungs: Rungs::NONE.with(Rung::Balloon).with(Rung::Compress),
        ..view(1, 8000, 10)
    };
    let mut at = |second: u64| look(vec![shown()], 400, &mut state, second * 1000);
    let first = at(0);
    assert_eq!(rungs(&first, 1), []);
    // Down to its target of 8000 - 255: what it never touched goes first.
    let asked = 8192 - (8000 - 255);
    assert!(
        steps(&first, 1).iter().any(|step| matches!(step, Step::Balloon(to) if to.0 >> 20 == asked)),
        "{first:?}"
    );
    assert_eq!((rungs(&at(1), 1), rungs(&at(4), 1)), (vec![], vec![]));
    assert_eq!(rungs(&at(5), 1), [Rung::Compress]);
    let given_up = at(20);
    assert_eq!(rungs(&given_up, 1), [Rung::Compress]);
    assert!(steps(&given_up, 1).contains(&Step::Balloon(MIB(0))));
    assert!(why(&given_up, 1).iter().any(|text| text.contains("uncooperative")));
    assert_eq!(rungs(&at(79), 1), [Rung::Compress]);
    let again = at(80);
    assert!(steps(&again, 1).iter().any(|step| matches!(step, Step::Balloon(to) if to.0 > 0)), "{again:?}");
}

#[test]
fn a_balloon_that_is_still_growing_is_stopped_when_its_machine_wakes_up() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 0, 1000)];
    let mut state = PolicyState::new(tree(&settings));
    let shown = |consumed, active, holds| MachineView {
        balloon: Some(MIB(holds)),
        rungs: Rungs::NONE.with(Rung::Balloon),
        ..view(1, consumed, active)
    };
    let asked = |plan: &Plan| {
        let to = |step: Step| match step {
            Step::Balloon(to) => Some(to.0 >> 20),
            _ => None,
        };
        steps(plan, 1).into_iter().find_map(to)
    };
    // 500 MiB are missing, and it is idle.
    let asleep = look(vec![shown(7000, 100, 0), view(2, 8000, 8000)], 156, &mut state, 0);
    assert!(asked(&asleep).is_some_and(|to| to > 1600), "{asleep:?}");
    let awake = look(vec![shown(6900, 8000, 300), view(2, 8000, 8000)], 700, &mut state, 1000);
    // It is due more than it has: the balloon may hold what is left of its size, and does not hold that much yet.
    assert_eq!(asked(&awake), Some(MIB(8192).saturating_sub(target(&awake, 1)).0 >> 20), "{awake:?}");
    assert!(target(&awake, 1) > MIB(7400));
}

/// What is free in the guest is more than it has beyond what it is guaranteed, and there is no other way to take that.
#[test]
fn a_balloon_leaves_a_guest_what_it_is_guaranteed_though_it_wants_less() {
    let settings = [machine(1, 1000, 450, 1000), machine(2, 12_000, 0, 1000)];
    let shown = MachineView {
        balloon: Some(MIB(0)),
        reported_free: MIB(400),
        rungs: Rungs::NONE.with(Rung::Balloon),
        ..view(1, 500, 50)
    };
    let plan = look(vec![shown, view(2, 8000, 8000)], 400, &mut PolicyState::new(tree(&settings)), 0);
    // A quarter more than it wants is not lent to others, and 100 of what is beyond are not free in the guest.
    assert_eq!((plan.state, target(&plan, 1)), (HostState::Soft, MIB(125)));
    let asked: Vec<Step> =
        steps(&plan, 1).into_iter().filter(|step| matches!(step, Step::Balloon(_))).collect();
    assert_eq!(asked, [Step::Balloon(MIB(1000 - 450))]);
}

#[test]
fn a_balloon_gives_back_only_what_is_free_already() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 0, 1000)];
    let mut state = PolicyState::new(tree(&settings));
    let hungry = || MachineView {
        balloon: Some(MIB(6000)),
        rungs: Rungs::NONE.with(Rung::Balloon),
        ..view(2, 2192, 6000)
    };
    // 700 MiB are free; the line of soft is at 419.
    let plan = look(vec![view(1, 8000, 100), hungry()], 700, &mut state, 0);
    let granted: Vec<u64> = steps(&plan, 2)
        .iter()
        .filter_map(|step| match step {
            Step::Balloon(to) => Some(6000 - (to.0 >> 20)),
            _ => None,
        })
        .collect();
    assert_eq!(granted, [700 - 419], "{plan:?}");
    assert!(plan.reasons.iter().any(|note| matches!(note.reason, Reason::WaitsForFree { .. })));
}

#[test]
fn a_guarantee_is_granted_deeper_into_what_is_kept_free() {
    let settings = [machine(1, 8192, 3000, 1000)];
    let mut state = PolicyState::new(tree(&settings));
    let shown = MachineView { balloon: Some(MIB(6000)), ..view(1, 2192, 6000) };
    let plan = look(vec![shown], 300, &mut state, 0);
    // 808 MiB to its guarantee; 300 free less the 104 of the line of low are there for that, nothing beyond.
    let expected = 300 - (655 * 16 / 100);
    assert!(
        steps(&plan, 1)
            .iter()
            .any(|step| matches!(step, Step::Balloon(to) if (6000 - (to.0 >> 20)).abs_diff(expected) <= 1)),
        "{plan:?}"
    );
}

#[test]
fn a_machine_that_waits_too_long_gets_a_higher_floor_and_gives_less() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 0, 1000)];
    let mut state = PolicyState::new(tree(&settings));
    let mut at = |second: u64, stalled| {
        let mut one = view(1, 8000, 300);
        one.stalled = stalled;
        look(vec![one, view(2, 7000, 300)], 400, &mut state, second * 1000)
    };
    let calm = at(0, Ppm::ZERO);
    let stalling = at(1, STALLED);
    assert!(target(&stalling, 1) > target(&calm, 1), "its floor rose");
    let taken = |plan: &Plan| {
        let frees = |step: Step| match step {
            Step::Take { frees, .. } => Some(frees),
            _ => None,
        };
        steps(plan, 1).into_iter().filter_map(frees).sum::<ByteCount>()
    };
    assert!(taken(&stalling) < taken(&calm), "{} after {}", taken(&stalling), taken(&calm));
    assert!(why(&stalling, 1).iter().any(|text| text.starts_with("its processors wait 5 % of the time")));
    // Long after, nothing of it is left.
    let recovered = (2..1000).map(|second| at(second, Ppm::ZERO)).last().unwrap();
    assert_eq!(entitlement(&recovered, 1), entitlement(&calm, 1));
}

#[test]
fn at_the_end_of_the_host_who_has_too_much_is_stalled_until_it_is_over() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 7000, 1000)];
    let mut state = PolicyState::new(tree(&settings));
    let low = look(vec![view(1, 8000, 100), view(2, 7000, 7000)], 50, &mut state, 0);
    assert_eq!(low.state, HostState::Low);
    assert!(steps(&low, 1).contains(&Step::Stall) && !steps(&low, 2).contains(&Step::Stall));
    let still = look(vec![view(1, 8000, 100), view(2, 7000, 7000)], 60, &mut state, 1000);
    assert!(!steps(&still, 1).contains(&Step::Stall), "it is stalled once");
    let over = look(vec![view(1, 7000, 100), view(2, 7000, 7000)], 1050, &mut state, 2000);
    assert!(steps(&over, 1).contains(&Step::Resume));
}

#[test]
fn a_starting_machine_has_what_it_starts_with() {
    let face = Face::Dynamic {
        startup: MIB(2048),
        minimum: MIB(512),
        maximum: MIB(8192),
        buffer: Ppm::percent(20),
        weight: 1,
    };
    let settings = [MachineSettings::new(MachineId(1), face), machine(2, 16 << 10, 0, 10_000)];
    let shown = |phase| vec![MachineView { phase, ..view(1, 600, 600) }, view(2, 14_000, 14_000)];
    let mut state = PolicyState::new(tree(&settings));
    assert_eq!(target(&look(shown(Phase::Starting), 400, &mut state, 0), 1), MIB(2048));
    let mut state = PolicyState::new(tree(&settings));
    let running = target(&look(shown(Phase::Running), 400, &mut state, 0), 1);
    assert!((MIB(512)..MIB(700)).contains(&running), "{running}");
}

#[test]
fn the_buffer_is_granted_while_there_is_memory_and_goes_first_when_there_is_not() {
    let face = |maximum| Face::Dynamic {
        startup: MIB(512),
        minimum: MIB(512),
        maximum: MIB(maximum),
        buffer: Ppm::percent(50),
        weight: 5000,
    };
    let settings =
        [1, 2].map(|id| MachineSettings::new(MachineId(id), face(if id == 1 { 8192 } else { 12 << 10 })));
    let mut state = PolicyState::new(tree(&settings));
    let plenty = look(vec![view(1, 2000, 2000), view(2, 1000, 1000)], 10_000, &mut state, 0);
    assert_eq!((target(&plenty, 1), target(&plenty, 2)), (MIB(3000), MIB(1500)));
    let mut state = PolicyState::new(tree(&settings));
    let scarce = look(vec![view(1, 6000, 4000), view(2, 9000, 9000)], 655, &mut state, 0);
    // Both have all they use; of the 2000 for both buffers, idle memory, the larger machine's cost the more.
    assert_eq!(target(&scarce, 1).0.div_ceil(1 << 20), 5625);
    let mut state = PolicyState::new(tree(&settings));
    let scarcer = look(vec![view(1, 6000, 4000), view(2, 9000, 11_000)], 655, &mut state, 0);
    assert!(target(&scarcer, 1) < MIB(6000) && target(&scarcer, 1) >= MIB(4000), "{}", target(&scarcer, 1));
    assert!(target(&scarcer, 2) > MIB(9000));
}

#[test]
fn guests_only_lower_their_own_demand_and_only_with_numbers_that_can_be() {
    let settings = [machine(1, 8192, 0, 1000)];
    let active = |total: i64, free: i64, age_ms| {
        let mut state = PolicyState::new(tree(&settings));
        let guest = Some(GuestStatistics { total: total << 20, free: free << 20, age_ms });
        let plan = look(vec![MachineView { guest, ..view(1, 4000, 3000) }], 400, &mut state, 0);
        (plan.machines[0].active.0 >> 20, faults(&plan).len())
    };
    assert_eq!(active(4000, 3000, 0), (1000, 0), "it keeps nothing in 3000 of 4000");
    assert_eq!(active(8192, 0, 0), (3000, 0), "a claim raises nothing");
    assert_eq!(active(8192, -1, 0), (3000, 1));
    assert_eq!(active(100_000, 0, 0), (3000, 1));
    assert_eq!(active(1000, 2000, 0), (3000, 1), "more free than there is");
    assert_eq!(active(4000, 3000, 60_000), (3000, 1), "a minute old");
}

#[test]
fn without_a_sample_the_last_one_stands_and_without_any_the_guarantee() {
    let mut state = PolicyState::new(tree(&[machine(1, 8192, 1000, 1000)]));
    let mut basis = |active, second: u64| {
        let shown = MachineView { active, ..view(1, 4000, 0) };
        let plan = look(vec![shown], 400, &mut state, second * 1000);
        (plan.machines[0].active.0 >> 20, faults(&plan).len())
    };
    assert_eq!(basis(None, 0), (4000, 1), "it is new");
    assert_eq!(basis(None, 60), (1000, 1), "it is not new any more");
    assert_eq!(basis(sampled(2000), 61), (2000, 0));
    assert_eq!(basis(None, 62), (2000, 1));
    assert_eq!(basis(Some(Reading { bytes: -5, age_ms: 0 }), 63), (2000, 1));
    assert_eq!(basis(Some(Reading { bytes: 1 << 40, age_ms: 0 }), 64), (2000, 1));
    assert_eq!(basis(Some(Reading { bytes: 0, age_ms: 100_000 }), 65), (2000, 1));
    assert_eq!(basis(None, 5000), (2000, 1), "long ago, and all there is");
    assert_eq!(Basis::Remembered { age_ms: 9000 }.to_string(), "sampled 9 s ago");
}

#[test]
fn what_comes_back_is_used_and_makes_paging_dearer() {
    let mut state = PolicyState::new(tree(&[machine(1, 8192, 0, 1000)]));
    let shown = |taken: u64, returned: u64| MachineView {
        taken: MIB(taken).pages_floor(),
        returned: MIB(returned).pages_floor(),
        ..view(1, 8000, 1000)
    };
    let price = |plan: &Plan| {
        plan.actions.iter().find_map(|action| match action.reason {
            Reason::Taken { price_ns, .. } => Some(price_ns),
            _ => None,
        })
    };
    let before = look(vec![shown(0, 0)], 400, &mut state, 0);
    let after = look(vec![shown(400, 300)], 400, &mut state, 1000);
    assert_eq!(after.machines[0].active, MIB(1300));
    assert!(price(&after) > price(&before), "{:?} after {:?}", price(&after), price(&before));
    let faded = look(vec![shown(0, 0)], 400, &mut state, 100_000);
    assert_eq!(faded.machines[0].active, MIB(1000));
}

#[test]
fn why_names_what_a_rung_was_held_against_and_both_figures() {
    let costs = |balloon: u32, compress: u32| {
        let mut costs = Costs::MEASURED;
        for (rung, loss) in [(Rung::Balloon, balloon), (Rung::Compress, compress)] {
            let losses = Some(Losses([Ppm::percent(loss); 6]));
            costs.0[rung as usize] = Cost { busy: losses, idle: losses, ..costs.of(rung) };
        }
        costs
    };
    // A thirtieth of what it uses is taken, so a third of what a tenth costs is lost.
    let said = |costs| {
        let settings =
            Settings { machines: vec![machine(1, 8192, 0, 1000)], costs, ..Settings::new(MIB(1 << 20)) };
        let mut state = PolicyState::new(Tree::new(settings).unwrap());
        let shown = MachineView {
            balloon: Some(ByteCount(0)),
            rungs: Rungs::NONE.with(Rung::Balloon).with(Rung::Compress),
            ..view(1, 8000, 8000)
        };
        why(&look(vec![shown], 400, &mut state, 0), 1).join("\n")
    };
    let balloon = said(costs(2, 90));
    let figures = "this costs 4 us a freed page and 1 % of its work, where compressing pages would cost 33 us and 29 %; ";
    assert!(balloon.contains("its balloon goes from 0") && balloon.contains(figures), "{balloon}");
    let compressed = said(costs(90, 2));
    let figures = "this costs 33 us a freed page where 10 % come back and 1 % of its work, where its balloon would cost 4 us and 29 %; ";
    assert!(compressed.contains("by compressing pages") && compressed.contains(figures), "{compressed}");
    // By what is built in, as docs/costs.md has it.
    let built_in = said(Costs::MEASURED);
    let figures = "this costs 4 us a freed page and 0 % of its work, where compressing pages would cost 33 us and 27 %; the host is soft";
    assert!(built_in.contains("its balloon goes from 0 to 447.3M: its target is 7.5G"), "{built_in}");
    assert!(built_in.contains(figures), "{built_in}");
    // As near as no measurement tells apart: the price decides.
    assert!(said(costs(4, 1)).contains("its balloon goes"), "{}", said(costs(4, 1)));
}

#[test]
fn what_the_host_shows_wrongly_is_said_and_changes_nothing() {
    let settings = [machine(1, 8192, 0, 1000), machine(2, 8192, 0, 1000)];
    let good = || vec![view(1, 7000, 100), view(2, 8000, 8000)];
    let mut state = PolicyState::new(tree(&settings));
    let expected = look(good(), 400, &mut state.clone(), 1000);
    let mut shown = good();
    shown.push(view(2, 1, 1));
    shown.push(view(9, 5000, 5000));
    let plan = look(shown, 400, &mut state, 1000);
    assert_eq!((&plan.actions, &plan.machines), (&expected.actions, &expected.machines));
    assert!(why(&plan, 2).iter().any(|text| text == "the host shows it twice: the first counts"));
    assert!(why(&plan, 9)[0].starts_with("nothing is known about it"));

    let back = look(good(), 400, &mut state, 10);
    assert!(back.reasons.iter().any(|note| matches!(note.reason, Reason::ClockWentBack { .. })));
    let much = look(good(), TOTAL + 1, &mut state, 2000);
    assert!(much.reasons.iter().any(|note| matches!(note.reason, Reason::FreeAboveTotal { .. })));
}

/// On a part of a host, beyond which there is more, machines can have grown to more than there is before anything is decided.
#[test]
fn machines_that_have_more_than_there_is_come_down_to_what_there_is_and_their_targets_do_not_swing() {
    let settings = [1, 2, 3, 4].map(|id| machine(id, 8192, 0, 1000));
    let mut state = PolicyState::new(tree(&settings));
    let mut decided = |second: u64, consumed: u64| {
        let machines = [1, 2, 3, 4].map(|id| view(id, consumed, consumed));
        decide(&HostView::of(second * 1000, MIB(TOTAL), MIB(4 * consumed), machines.to_vec()), &mut state)
    };
    let mut targets = vec![target(&decided(0, 1000), 1)];
    // They boot, have 4 GiB too much, and come down to what is theirs.
    for (second, consumed) in [(1, 5120), (2, 4500), (3, 3932), (4, 3932)] {
        let plan = decided(second, consumed);
        let sum: ByteCount = plan.machines.iter().map(|machine| machine.target).sum();
        assert!(sum <= MIB(TOTAL), "{sum} of {} at {second}", MIB(TOTAL));
        assert!(plan.budget + min_free(MIB(TOTAL)) <= MIB(TOTAL), "{} at {second}", plan.budget);
        targets.push(target(&plan, 1));
    }
    assert!(targets.is_sorted(), "{targets:?}");
}

/// What a machine is said to have that it cannot have is not taken from the others.
#[test]
fn a_machine_that_is_said_to_have_more_than_the_host_empties_nobody() {
    let settings = [1, 2, 3].map(|id| machine(id, 8192, 0, 1000));
    let mut state = PolicyState::new(tree(&settings));
    let machines = vec![view(1, 4096, 4096), view(2, 4096, 4096), view(3, 100 << 10, 0)];
    let plan = decide(&HostView::of(0, MIB(TOTAL), MIB(108 << 10), machines), &mut state);
    assert!(matches!(faults(&plan)[..], [SampleFault::Absurd { .. }]), "{:?}", faults(&plan));
    assert_eq!(plan.budget, MIB(8192).saturating_sub(min_free(MIB(TOTAL))).pages_floor().bytes());
}

#[test]
fn more_guaranteed_than_there_is_keeps_the_guarantees_and_says_what_is_missing() {
    let settings = [machine(1, 8192, 8000, 1000), machine(2, 8192, 8000, 1000)];
    let mut state = PolicyState::new(tree(&settings));
    let plan = look(vec![view(1, 8000, 8000), view(2, 8000, 8000)], 200, &mut state, 0);
    assert_eq!((rungs(&plan, 1), rungs(&plan, 2)), (vec![], vec![]));
    let short = plan.reasons.iter().find(|note| matches!(note.reason, Reason::Short { .. })).unwrap();
    assert!(short.reason.to_string().contains("are guaranteed, but machines have"), "{}", short.reason);
}

#[test]
fn other_settings_take_force_at_once_and_what_was_sampled_stays() {
    let mut state = PolicyState::new(tree(&[machine(1, 8192, 0, 1000), machine(2, 8192, 0, 1000)]));
    look(vec![view(1, 7000, 2000), view(2, 7000, 7000)], 400, &mut state, 0);
    state.set_tree(tree(&[limited(1, 8192, 1024), machine(2, 8192, 0, 1000)]));
    let mut silent = view(1, 7000, 0);
    silent.active = None;
    let plan = look(vec![silent, view(2, 7000, 7000)], 400, &mut state, 1000);
    assert_eq!(target(&plan, 1), MIB(1024));
    assert_eq!(plan.machines[0].active, MIB(2000));
}
