//! How long a decision takes.
//!
//! What has to be small is the time of a host that is full and short, where everything there is to compute is
//! computed: nested groups above their limits, machines that give, machines that are given to. `cargo test --release -p plimsoll-policy
//! cost -- --nocapture` prints it; the goal is for a release build, and holds in the tests' own as well.
use crate::world::{MIB, machine, view};
use plimsoll_policy::settings::{GroupSettings, MachineSettings, Settings};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{HostView, MachineView};
use plimsoll_policy::{PolicyState, Rung, Rungs, decide};
use plimsoll_types::GroupId;
use std::time::{Duration, Instant};

/// A thousand machines are decided about once a second: a hundredth of a processor.
const GOAL: Duration = Duration::from_millis(10);

/// A full host of so many machines in groups of ten, which has a tenth too little.
fn host(machines: u32) -> (HostView, PolicyState) {
    let group = |id| GroupId(id / 10 + 1);
    // Their machines have 14,000 MiB and more: all are above.
    let limited = |id| GroupSettings { limit: Some(MIB(13_000)), ..GroupSettings::new(id) };
    let settings = Settings {
        groups: (1..=machines.div_ceil(10)).map(|id| limited(GroupId(id))).collect(),
        machines: (0..machines)
            .map(|id| MachineSettings {
                parent: Some(group(id)),
                ..machine(id, 4096, u64::from(id % 7) * 10, id % 97 + 1)
            })
            .collect(),
        ..Settings::new(MIB(1 << 40))
    };
    // Half of them give; the others want what their balloons hold.
    let shown = |id: u32| {
        let (holds, has) = if id.is_multiple_of(2) {
            (u64::from(id % 3) * 100, 2000 + u64::from(id % 13) * 100)
        } else {
            (3600, 400)
        };
        MachineView {
            balloon: Some(MIB(holds)),
            rungs: Rungs::ALL.without(Rung::Sharing),
            ..view(id, has, u64::from(id % 31) * 120)
        }
    };
    let view = HostView {
        now_ms: 0,
        total: MIB(u64::from(machines) * 3000),
        free: MIB(u64::from(machines)),
        overdrawn: MIB(0),
        machines: (0..machines).map(shown).collect(),
    };
    (view, PolicyState::new(Tree::new(settings).unwrap()))
}

/// What this thread has had of processors, as of the last tick: a decision that takes longer than others leave it one is not slower for it.
fn spent() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// The fastest of some decisions about so many machines, by that clock.
fn fastest(machines: u32, decisions: u32, clock: impl Fn() -> Duration) -> Duration {
    let (mut view, mut state) = host(machines);
    let (mut fastest, mut actions) = (Duration::MAX, 0);
    for _ in 0..decisions {
        view.now_ms += 1000;
        let start = clock();
        let plan = decide(&view, &mut state);
        fastest = fastest.min(clock() - start);
        actions = actions.max(plan.actions.len());
    }
    println!("{machines} machines: {fastest:?} a decision, up to {actions} actions");
    assert!(actions as u64 >= u64::from(machines), "it has work to do");
    fastest
}

#[test]
fn a_thousand_machines_are_decided_about_in_milliseconds() {
    let begun = Instant::now();
    let fastest = fastest(1_000, 20, || begun.elapsed());
    assert!(fastest < GOAL, "{fastest:?}");
}

#[test]
fn a_hundred_times_the_machines_take_no_thousand_times_as_long() {
    let begun = Instant::now();
    let (few, many) = (fastest(1_000, 20, || begun.elapsed()), fastest(100_000, 3, spent));
    // 100 times for the machines, twice for the logarithm, and as much again for caches that do not hold them.
    assert!(many < few * 1000, "{many:?}, {few:?} for a hundredth");
}
