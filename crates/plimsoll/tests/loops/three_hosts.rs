//! One scenario file on three hosts: Linux with KVM, the bare-metal host under QEMU, and the simulator. docs/metal.md says what is the same.
use super::fleet::{Fleet, guest};
use super::run::{alone, can};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_host::trace::{Basis, Reader, Record, Recorder, Tick, replay};
use plimsoll_metal::wire::{Decision, Given, GuestLine, Line};
use plimsoll_metal::{Event, Guest, Options, Run};
use plimsoll_policy::{PolicyState, Rung, Step};
use plimsoll_sim::host::SECOND;
use plimsoll_sim::machine::Class;
use plimsoll_sim::{Scenario, Stage};
use plimsoll_types::{ByteCount, MachineId, PAGE_SIZE};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a hypervisor may be silent: it says each decision, but a busy machine may emulate it at a tenth of its pace.
const PATIENCE: Duration = Duration::from_secs(240);
/// What this process and VMMs take beside what the scenario has for the host itself.
const LINUX_OWN: ByteCount = ByteCount::mib(32);
/// How long is decided once guests work: longer than it takes to come to rest.
const WORK: u32 = 8;

/// What a host decided, with all that it rests on, in order.
#[derive(Default)]
struct Trace {
    given: Vec<Given>,
    decisions: Vec<Decision>,
}

impl Trace {
    fn add(&mut self, decision: Decision) {
        self.given.push(Given::View(Box::new(decision.view.clone())));
        self.decisions.push(decision);
    }

    /// What the simulator decides.
    fn simulated(scenario: &Scenario) -> Self {
        let mut trace = Self::default();
        let stage = Stage::of(scenario, 0).unwrap().expect("there is a host");
        stage.run(SECOND, &mut |basis, view, plan| {
            trace.given.extend(basis.map(|state| Given::Settings(Box::new(state.clone()))));
            trace.add(Decision { view: view.clone(), plan: plan.clone() });
        });
        trace
    }

    /// What is on record.
    fn recorded(path: &Path) -> Self {
        let mut trace = Self::default();
        for record in Reader::open(path).unwrap() {
            match record.unwrap() {
                Record::Settings(basis) => trace.given.push(Given::Settings(Box::new(basis.state))),
                Record::Tick(tick) => trace.add(Decision { view: tick.view, plan: tick.plan }),
            }
        }
        trace
    }

    /// Puts it on record, as `plimsoll manage --record` does.
    fn record(&self, path: &Path) {
        let mut recorder = Recorder::create(path).unwrap();
        let mut decisions = self.decisions.iter();
        for given in &self.given {
            match given {
                Given::Settings(state) => {
                    let (state, names, own) = (PolicyState::clone(state), Vec::new(), ByteCount(0));
                    recorder.settings(&Basis { state, names, own }).unwrap();
                }
                Given::View(_) => {
                    let Decision { view, plan } = decisions.next().unwrap().clone();
                    let tick = Tick { view, plan, outcomes: Vec::new(), overheads: Vec::new() };
                    recorder.tick(&tick).unwrap();
                }
            }
        }
        recorder.finish().unwrap();
    }

    /// Decides it again on bare metal.
    fn expect_same_on_bare_metal(&self, whose: &str) {
        let options = Options::of_decisions(self.given.clone()).unwrap();
        let (again, _) = run_metal(&options);
        assert_eq!(again.len(), self.decisions.len(), "{whose}");
        for (number, (again, first)) in again.iter().zip(&self.decisions).enumerate() {
            assert_eq!(again, first, "decision {number} of {whose}");
        }
    }

    /// Decides it again on Linux.
    fn expect_same_on_linux(&self, whose: &str, folder: &Path) {
        let path = folder.join(whose);
        self.record(&path);
        let replayed = replay(Reader::open(&path).unwrap());
        let all = self.decisions.len() as u64;
        assert!(replayed.identical == all && replayed.difference.is_none(), "{whose}: {replayed:?}");
    }

    /// Who is to have less than it keeps anything in, as of the last decision about all machines, and is due no more. The target of one
    /// that is due more follows what it takes up, which is a little less while some of it is in the store from before the first decision.
    fn gives(&self, keeps: &BTreeMap<MachineId, ByteCount>) -> BTreeSet<MachineId> {
        let is_about_all = |decision: &&Decision| decision.plan.machines.len() == keeps.len();
        let last = self.decisions.iter().rev().find(is_about_all).expect("a decision about all machines");
        let gives =
            last.plan.machines.iter().filter(|one| one.target.max(one.entitlement) < keeps[&one.machine]);
        gives.map(|one| one.machine).collect()
    }

    /// From whom pages were to be taken at once, at any time, and how.
    fn takes(&self) -> BTreeSet<(MachineId, Rung)> {
        let actions = self.decisions.iter().flat_map(|decision| &decision.plan.actions);
        let takes = actions.filter_map(|action| match action.step {
            Step::Take { rung, .. } => Some((action.machine, rung)),
            _ => None,
        });
        takes.collect()
    }
}

fn run_metal(options: &Options) -> (Vec<Decision>, Vec<GuestLine>) {
    let (mut decisions, mut guests) = (Vec::new(), Vec::new());
    let run = Run::start(options).unwrap();
    let end = run.finish(PATIENCE, |event| match event {
        Event::Report(line) => match *line {
            Line::Decision(decision) => decisions.push(*decision),
            Line::Guest(guest) => guests.push(guest),
            Line::Failure { why } => panic!("{why}"),
            Line::Host(_) => {}
        },
        Event::Said(line) => println!("{line}"),
        _ => {}
    });
    end.unwrap();
    (decisions, guests)
}

fn scenario(name: &str) -> Scenario {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/scenarios");
    Scenario::read(&folder.join(name).with_extension("toml")).unwrap()
}

/// What a guest does to demand what its class demands: it keeps so much, and uses so much of it.
fn workload(class: &Class) -> WorkloadSpec {
    let keeps = class.keeps.expect("the scenario says so").bytes();
    let active = class.curve.at(SECOND, SECOND, 0).active.bytes();
    let is_idle = active.0 * 8 < keeps.0;
    let kind = if is_idle { WorkloadKind::Idle } else { WorkloadKind::Sweep };
    WorkloadSpec {
        footprint_bytes: keeps.0 / PAGE_SIZE as u64 * PAGE_SIZE as u64,
        hot_permille: u32::try_from(active.0 * 1000 / keeps.0).unwrap(),
        ops_per_second: if is_idle { 10 } else { 20_000 },
        ..WorkloadSpec::new(kind)
    }
}

/// The scenario's guests under KVM, and the daemon's loop.
fn on_linux(scenario: &Scenario, folder: &Path) -> Trace {
    let path: PathBuf = folder.join("linux");
    let mut fleet = Fleet::new(scenario.hosts.capacity.total + LINUX_OWN);
    fleet.control.record(Recorder::create(&path).unwrap());
    let stage = Stage::of(scenario, 0).unwrap().unwrap();
    for (id, class) in stage.machines() {
        let config = guest(&format!("{}{}", class.name, id.0), class.size().0 >> 20, workload(class));
        assert_eq!(fleet.start(&config, class.face), id);
    }
    fleet.populate();
    fleet.turns(Duration::from_secs(WORK.into()));
    fleet.finish();
    Trace::recorded(&path)
}

/// The same guests on bare metal, which decides what it is told to by the same settings.
fn on_bare_metal(scenario: &Scenario) -> Trace {
    let stage = Stage::of(scenario, 0).unwrap().unwrap();
    let given = Given::Settings(Box::new(PolicyState::new(stage.tree().clone())));
    let mut options = Options::new(scenario.hosts.capacity.total);
    (options.seconds, options.policy) = (WORK, vec![given.clone()]);
    for (id, class) in stage.machines() {
        let spec = WorkloadSpec { final_check: 1, ..workload(class) };
        options.guests.push(Guest::new(format!("{}{}", class.name, id.0), class.size(), id.0.into(), spec));
    }
    let (decisions, guests) = run_metal(&options);
    assert_eq!(guests.len(), options.guests.len());
    for guest in &guests {
        assert_eq!((&guest.died, guest.wrong_words), (&None, 0), "{guest:?}");
        assert!(guest.verified_pages > 0, "{guest:?}");
    }
    let mut trace = Trace { given: vec![given], decisions: Vec::new() };
    decisions.into_iter().for_each(|decision| trace.add(decision));
    trace
}

#[test]
fn one_scenario_gives_the_same_decisions_on_linux_on_bare_metal_and_in_the_simulator() {
    let _alone = alone();
    if !["root", "kvm", "userfaultfd", "cgroup", "qemu"].into_iter().all(can) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let scenario = scenario("three-hosts");
    let traces = [
        ("simulator", Trace::simulated(&scenario)),
        ("linux", on_linux(&scenario, folder.path())),
        ("metal", on_bare_metal(&scenario)),
    ];
    let stage = Stage::of(&scenario, 0).unwrap().unwrap();
    let idle = stage.machines().filter(|(_, class)| class.name == "idle");
    let expected: BTreeSet<_> = idle.map(|(id, _)| id).collect();
    let keeps: BTreeMap<_, _> =
        stage.machines().map(|(id, class)| (id, class.keeps.expect("it says so").bytes())).collect();
    for (whose, trace) in &traces {
        let (gives, takes) = (trace.gives(&keeps), trace.takes());
        println!("{whose}: {} decisions; {gives:?} give; taken from: {takes:?}", trace.decisions.len());
        trace.expect_same_on_linux(whose, folder.path());
        trace.expect_same_on_bare_metal(whose);
        assert_eq!(gives, expected, "{whose}");
        assert!(takes.iter().all(|(id, rung)| expected.contains(id) && *rung == Rung::Compress), "{takes:?}");
    }
}
