//! Decisions: those of the simulator made again by the hypervisor, and the hypervisor's own made again here.
use crate::common::{can, guest, run};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_metal::wire::{Decision, Given, Line};
use plimsoll_metal::{Event, Options};
use plimsoll_policy::view::HostView;
use plimsoll_policy::{PolicyState, Rung, Step, decide};
use plimsoll_sim::host::SECOND;
use plimsoll_sim::{Scenario, Stage};
use plimsoll_types::{ByteCount, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

fn scenario(name: &str) -> Scenario {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/scenarios");
    Scenario::read(&folder.join(name).with_extension("toml")).unwrap()
}

fn decisions(report: &[Line]) -> impl Iterator<Item = &Decision> {
    report.iter().filter_map(|line| match line {
        Line::Decision(decision) => Some(&**decision),
        _ => None,
    })
}

/// Who gives, and how.
fn gives<'a>(decisions: impl Iterator<Item = &'a Decision>) -> BTreeSet<(MachineId, Rung)> {
    let actions = decisions.flat_map(|decision| &decision.plan.actions);
    let takes = actions.filter_map(|action| match action.step {
        Step::Take { rung, .. } => Some((action.machine, rung)),
        _ => None,
    });
    takes.collect()
}

/// What the simulator sees and decides, and what that rests on; the first so many decisions.
fn simulated(scenario: &Scenario, most: usize) -> (Vec<Given>, Vec<Decision>) {
    let (mut given, mut decisions) = (Vec::new(), Vec::new());
    Stage::of(scenario, 0).unwrap().unwrap().run(SECOND, &mut |basis, view, plan| {
        if decisions.len() < most {
            given.extend(basis.map(|state| Given::Settings(Box::new(state.clone()))));
            given.push(Given::View(Box::new(view.clone())));
            decisions.push(Decision { view: view.clone(), plan: plan.clone() });
        }
    });
    (given, decisions)
}

#[test]
fn the_hypervisor_decides_to_the_bit_what_the_simulator_decides() {
    if !can() {
        return;
    }
    // In the second, a machine goes and is admitted again, with settings that have changed.
    for (name, most) in [("three-hosts", 60), ("restart-under-pressure", 300)] {
        let (mut given, expected) = simulated(&scenario(name), most);
        assert!(!gives(expected.iter()).is_empty(), "{name}: nothing is decided");
        // A view that the simulator did not see: that a difference is one shows that plans are looked at.
        let last = expected.last().unwrap();
        let other = HostView { free: ByteCount(last.view.free.0 / 2), ..last.view.clone() };
        given.push(Given::View(Box::new(other)));
        let heard = run(&Options::of_decisions(given).unwrap());
        assert!(matches!(heard.end, Event::Done), "{:#?}", heard.said);
        let found: Vec<_> = decisions(&heard.report).collect();
        assert_eq!(found.len(), expected.len() + 1, "{name}: {:#?}", heard.said);
        for (number, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(*found, expected, "decision {number} of {name}");
        }
        assert_ne!(found[expected.len()].plan, last.plan);
        println!("{name}: {} decisions, {:?} gave", expected.len(), gives(expected.iter()));
    }
}

/// Guests of a scenario's sizes, with its settings: those that are to have less than they keep anything in are those of the simulator, pages are
/// taken from nobody else, and every decision comes out again here.
#[test]
fn guests_on_bare_metal_are_decided_about_as_the_same_guests_are_in_the_simulator() {
    if !can() {
        return;
    }
    let scenario = scenario("three-hosts");
    let stage = Stage::of(&scenario, 0).unwrap().unwrap();
    let mut state = PolicyState::new(stage.tree().clone());
    let mut options = Options::new(scenario.hosts.capacity.total);
    (options.seconds, options.policy) = (4, vec![Given::Settings(Box::new(state.clone()))]);
    let mut keeps = BTreeMap::new();
    for (id, class) in stage.machines() {
        keeps.insert(id, class.keeps.unwrap().bytes());
        let kind = if class.name == "idle" { WorkloadKind::Idle } else { WorkloadKind::Sweep };
        let mut guest = guest(kind, class.size(), 10, id.0.into());
        guest.params.workload.footprint_bytes = keeps[&id].0;
        options.guests.push(guest);
    }
    // The last decision about all of them.
    let full = |decisions: &[Decision]| -> Decision {
        decisions.iter().rev().find(|one| one.plan.machines.len() == keeps.len()).unwrap().clone()
    };
    // The target of one that is due more follows what it takes up: a little less while some of it is in the store from before the
    // first decision.
    let held_down = |decision: &Decision| -> BTreeSet<MachineId> {
        let machines = decision.plan.machines.iter();
        let below = machines.filter(|one| one.target.max(one.entitlement) < keeps[&one.machine]);
        below.map(|one| one.machine).collect()
    };
    let (_, expected) = simulated(&scenario, usize::MAX);
    let heard = run(&options);
    heard.assert_well();
    let found: Vec<Decision> = decisions(&heard.report).cloned().collect();
    let (those, last) = (held_down(&full(&expected)), full(&found));
    println!("{} decisions of the hypervisor's, {those:?} are to have less than they keep", found.len());
    assert!(those.len() == 2 && held_down(&last) == those, "{last:#?}");
    assert!(gives(found.iter()).iter().all(|(id, _)| those.contains(id)), "{:?}", gives(found.iter()));
    // Nor does the hypervisor take them of itself, when it is short between decisions: some at most from before the first of them.
    let (from_those, from_others): (Vec<_>, Vec<_>) =
        last.view.machines.iter().partition(|one| those.contains(&one.id));
    let least = from_those.iter().map(|one| one.stored).min().unwrap();
    assert!(from_others.iter().all(|one| one.stored.0 < least.0 / 4), "{last:#?}");
    for (number, Decision { view, plan }) in found.iter().enumerate() {
        assert_eq!(decide(view, &mut state), *plan, "decision {number}");
    }
}
