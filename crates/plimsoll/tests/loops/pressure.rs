//! Guests that own more than there is: guarantees are kept, targets stay, memory goes where it is used.
use super::fleet::{Fleet, MIB, PATIENCE, guest, swings, violations};
use super::run::{alone, can};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_policy::Ppm;
use plimsoll_policy::settings::{Face, Shares};
use plimsoll_types::ByteCount;
use std::time::{Duration, Instant};

const SECONDS: fn(u64) -> Duration = Duration::from_secs;

/// Turns in which guests that have just populated their memory show what they use: a newborn is taken to use all it has, until
/// it was sampled.
const SETTLING: usize = 12;

fn can_run() -> bool {
    ["root", "kvm", "userfaultfd", "cgroup"].into_iter().all(can)
}

fn guaranteed(size: u64, reservation: u64) -> Face {
    let size = MIB(size);
    Face::Guarantee { size, reservation: MIB(reservation), limit: size, shares: Shares::NORMAL }
}

fn at_rate(kind: WorkloadKind, ops_per_second: u64) -> WorkloadSpec {
    WorkloadSpec { ops_per_second, ..WorkloadSpec::new(kind) }
}

#[test]
fn four_guests_that_own_more_than_the_budget_keep_their_guarantees_and_their_targets() {
    let _alone = alone();
    if !can_run() {
        return;
    }
    let budget = MIB(304);
    let mut fleet = Fleet::new(budget);
    let hot = WorkloadSpec { hot_permille: 50, ..at_rate(WorkloadKind::Zipf, 2000) };
    let guests = [
        ("zipf", hot),
        ("idle", at_rate(WorkloadKind::Idle, 10)),
        ("sweep", at_rate(WorkloadKind::Sweep, 2000)),
        ("other", hot),
    ];
    let kept = MIB(32);
    for (name, spec) in guests {
        fleet.start(&guest(name, 128, spec), guaranteed(128, 32));
    }
    fleet.populate();
    let mut turns = fleet.turns(SECONDS(40));
    // One a second; a busy machine takes longer.
    let begun = Instant::now();
    while turns.len() < 38 {
        assert!(begun.elapsed() < PATIENCE, "{} turns", turns.len());
        turns.extend(fleet.turns(SECONDS(1)));
    }
    for (place, id) in fleet.ids.iter().enumerate() {
        let name = guests[place].0;
        let last = turns.last().unwrap().plan.machines.iter().find(|one| one.machine == *id).unwrap();
        println!("{name}: takes up {}, target {}, uses {}", last.consumed, last.target, last.active);
        assert_eq!(violations(&turns, *id, kept), 0, "{name} was below its guarantee");
        let (all, settled) = (swings(&turns, *id), swings(&turns[SETTLING..], *id));
        println!("  its target turned back {all} times, of which {settled} after the first {SETTLING} s");
        assert_eq!(settled, 0, "the target of {name} swings");
    }
    let (used, peak) = (fleet.used(), fleet.peak());
    println!("{} turns; used {used}, peak {peak} of {budget}", turns.len());
    assert!(peak <= budget, "{peak}");
    let worked = fleet.guests.iter().filter(|guest| guest.said().summary.operations > 0).count();
    assert_eq!(worked, 4);
    fleet.finish();
}

#[test]
fn a_machine_restarts_on_a_full_host_and_nobody_falls_below_its_reservation() {
    let _alone = alone();
    if !can_run() {
        return;
    }
    // Startup 1 GiB, minimum 256 MiB and three others on a host of 3 GiB, each about an eighth.
    let mut fleet = Fleet::new(MIB(352));
    let hot = WorkloadSpec { hot_permille: 100, ..at_rate(WorkloadKind::Zipf, 1000) };
    let kept = MIB(48);
    for name in ["one", "two", "three"] {
        fleet.start(&guest(name, 128, hot), guaranteed(128, 48));
    }
    let face = Face::Dynamic {
        startup: MIB(112),
        minimum: MIB(32),
        maximum: MIB(128),
        buffer: Ppm::percent(20),
        weight: 5000,
    };
    let restarted = guest("restarted", 128, hot);
    fleet.start(&restarted, face);
    fleet.populate();
    let mut turns = fleet.turns(SECONDS(8));
    // What is taken at first is more than what has to be; guests then have it back.
    for _ in 0..120 {
        if fleet.used() > MIB(300) {
            break;
        }
        turns.extend(fleet.turns(SECONDS(1)));
    }
    let full = fleet.used();
    assert!(full > MIB(300), "the host is not full: {full}");
    fleet.guests.pop().unwrap().kill();
    fleet.ids.pop();
    turns.extend(fleet.turns(SECONDS(1)));
    let again = fleet.start(&restarted, face);
    fleet.populate();
    turns.extend(fleet.turns(SECONDS(12)));
    for id in &fleet.ids[..3] {
        assert_eq!(violations(&turns, *id, kept), 0, "{id} was below its reservation");
    }
    assert_eq!(violations(&turns, again, MIB(32)), 0);
    let last = turns.last().unwrap().plan.machines.iter().find(|one| one.machine == again).unwrap();
    println!("restarted: takes up {}, target {}", last.consumed, last.target);
    assert!(last.consumed > ByteCount(0));
    let peak = fleet.peak();
    assert!(peak <= MIB(352), "{peak}");
    fleet.finish();
}
