//! Turns: what is observed is decided on, what is decided is applied, and one machine's trouble is its own.
use super::fake::{Fake, Host, MIB, SECOND, body, settings, target};
use plimsoll_host::backend::Trouble;
use plimsoll_host::control::{Control, Event, Happened, Hurry, PERIOD, Pool, Wakers, run};
use plimsoll_policy::host_state::min_free;
use plimsoll_policy::settings::Settings;
use plimsoll_policy::{Costs, Reason, Rung, Step};
use plimsoll_types::{ByteCount, MachineId};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Two machines of 1 GiB on a host of 1.5: one idle, one that comes to use 1 GiB.
fn idle_and_busy() -> Host {
    Host::new(1536, &[(1024, 128, 900, 100), (1024, 128, 300, 1000)])
}

#[test]
fn memory_goes_from_who_does_not_use_it_to_who_does_and_stays_there() {
    let mut host = idle_and_busy();
    let turns: Vec<_> = (0..120).map(|_| host.turn()).collect();
    assert!(host.consumed(1) > MIB(850), "{}", host.consumed(1));
    assert!(host.consumed(0) >= MIB(128), "{}", host.consumed(0));
    let used = host.consumed(0) + host.consumed(1);
    assert!(used < MIB(1536), "{used}");
    let targets = |turn| host.ids.iter().map(|id| target(turn, *id)).collect::<Vec<_>>();
    let last = targets(&turns[119]);
    assert!(turns[60..].iter().all(|turn| targets(turn) == last), "what does not change is left alone");
    for turn in &turns {
        assert!(
            turn.plan.machines.iter().map(|machine| machine.target).sum::<ByteCount>() <= turn.plan.budget
        );
    }
}

/// What machines may use is a part of a host: what is beyond it is there, and they have grown into it.
#[test]
fn machines_that_have_outgrown_their_part_of_a_host_are_to_come_down_to_it() {
    let mut host = Host::new(1024, &[(1024, 0, 900, 900), (1024, 0, 900, 900)]);
    let turn = host.turn();
    assert_eq!((turn.view.free, turn.view.overdrawn), (MIB(0), MIB(1800 - 1024)));
    assert_eq!(turn.plan.budget, MIB(1024).saturating_sub(min_free(MIB(1024))).pages_floor().bytes());
    let targets = host.ids.iter().map(|id| target(&turn, *id)).sum::<ByteCount>();
    assert!(targets <= turn.plan.budget, "{targets} of {}", turn.plan.budget);
}

#[test]
fn every_machine_is_told_of_every_plan_also_when_it_says_nothing_about_it() {
    let mut host = idle_and_busy();
    (0..10).for_each(|_| drop(host.turn()));
    host.bodies.iter().for_each(|body| assert_eq!(body.lock().unwrap().turns, 10));
}

#[test]
fn a_back_end_knows_what_taking_memory_costs_before_each_look_by_the_settings_in_force() {
    let mut host = idle_and_busy();
    let told = |host: &Host| host.bodies[1].lock().unwrap().back_ns;
    host.turn();
    assert_eq!(told(&host), Some(Costs::MEASURED.of(Rung::Compress).back_ns));
    let mut settings = host.control.tree().settings().clone();
    settings.costs.0[Rung::Compress as usize].back_ns = 3_000;
    host.control.settle(settings).unwrap();
    host.turn();
    assert_eq!(told(&host), Some(3_000));
}

#[test]
fn a_machine_that_cannot_be_looked_at_is_left_out_and_that_is_said_once() {
    let mut host = idle_and_busy();
    host.turn();
    let why = Trouble::Unseen("its page map is busy".to_owned());
    host.set(0, |body| body.trouble = Some(why.clone()));
    let name = || "m0".to_owned();
    let first = host.turn();
    assert_eq!(first.events, [Event::LeftOut { name: name(), why }]);
    assert_eq!(first.plan.machines.len(), 1, "the other is decided about");
    let told = host.bodies[0].lock().unwrap().turns;
    assert!(host.turn().events.is_empty());
    assert_eq!(host.bodies[0].lock().unwrap().turns, told, "nothing is asked of what was not seen");
    host.set(0, |body| body.trouble = None);
    assert_eq!(host.turn().events, [Event::Back { name: name() }]);
}

#[test]
fn absurd_samples_are_named_and_change_nothing_for_the_others() {
    let mut sane = Host::new(4096, &[(1024, 0, 500, 400), (1024, 0, 500, 400)]);
    let mut other = Host::new(4096, &[(1024, 0, 500, 400), (1024, 0, 500, 400)]);
    for active in [-1, i64::MIN, i64::MAX] {
        other.set(0, |body| body.active = active);
        let (expected, turn) = (sane.turn(), other.turn());
        assert!(turn.plan.reasons.iter().any(|note| {
            note.machine == Some(other.ids[0]) && matches!(note.reason, Reason::BadSample { .. })
        }));
        assert_eq!(target(&turn, other.ids[1]), target(&expected, sane.ids[1]));
    }
    // More than it owns, by far: no budget can be made with it.
    other.set(0, |body| (body.active, body.consumed) = (0, ByteCount(u64::MAX / 2)));
    let turn = other.turn();
    assert_eq!(turn.plan.machines.len(), 1);
    assert_eq!(turn.plan.machines[0].machine, other.ids[1]);
}

#[test]
fn a_clock_that_jumps_is_said_and_the_loop_goes_on() {
    let mut host = idle_and_busy();
    host.now += 100 * SECOND;
    host.turn();
    host.now -= 50 * SECOND;
    let turn = host.turn();
    assert!(turn.plan.reasons.iter().any(|note| matches!(note.reason, Reason::ClockWentBack { .. })));
    assert_eq!(host.control.due(), host.now + PERIOD, "it neither waits for the old time nor hurries");
    host.now += Duration::from_secs(1 << 40);
    assert_eq!(host.turn().plan.machines.len(), 2);
    host.now -= Duration::from_secs((1 << 40) + 1_000_000);
    assert_eq!(host.turn().plan.machines.len(), 2, "even before the loop began");
}

#[test]
fn what_a_machine_refuses_is_said_once_and_told_in_every_turn() {
    let mut host = Host::new(1024, &[(1024, 0, 1000, 100)]);
    host.set(0, |body| body.obeys = false);
    let turns: Vec<_> = (0..20).map(|_| host.turn()).collect();
    let said = turns.iter().flat_map(|turn| &turn.events);
    assert_eq!(said.filter(|event| matches!(event, Event::Refused { .. })).count(), 1);
    assert!(
        turns
            .iter()
            .filter(|turn| turn.outcomes.iter().any(|one| matches!(one.step, Step::Take { .. })))
            .count()
            > 5
    );
}

#[test]
fn a_machine_that_comes_or_goes_is_decided_about_at_once() {
    let mut host = idle_and_busy();
    assert_eq!(host.control.hurry(), Some(Hurry::Came));
    assert_eq!(host.turn().hurry, Some(Hurry::Came));
    assert_eq!(host.control.hurry(), None);
    host.set(0, |body| body.trouble = Some(Trouble::Gone("its process has ended".to_owned())));
    assert_eq!(host.control.hurry(), Some(Hurry::Went));
    let turn = host.turn();
    assert!(matches!(&turn.events[..], [Event::Left { name, .. }] if name == "m0"));
    assert_eq!(host.control.names().map(|(id, _)| id).collect::<Vec<_>>(), host.ids[1..]);
    assert!(host.control.tree().terms(host.ids[0]).is_none(), "and nothing is promised to it any more");
    host.turn();
    assert_eq!(host.control.hurry(), None, "it went once");
}

#[test]
fn a_host_that_is_nearly_used_up_does_not_wait_for_the_second() {
    let mut host = idle_and_busy();
    host.turn();
    assert_eq!(host.control.hurry(), None);
    host.set(1, |body| body.consumed = MIB(1000));
    host.set(0, |body| body.consumed = MIB(520));
    assert_eq!(host.control.hurry(), Some(Hurry::Short));
    let turn = host.control.turn(host.now + Duration::from_millis(100));
    assert_eq!(turn.hurry, Some(Hurry::Short));
    assert!(turn.plan.actions.iter().any(|action| matches!(action.step, Step::Take { .. })));
}

/// How long after its beginning a running loop decides about memory that has run out.
fn hurried() -> Duration {
    let Host { mut control, bodies, .. } = idle_and_busy();
    let (end, told) = std::io::pipe().unwrap();
    let began = Instant::now();
    let mut hurried = None;
    let mut told = Some(told);
    let wakers = Wakers { end: Some(std::os::fd::AsFd::as_fd(&end)), ..Wakers::default() };
    run(&mut control, wakers, |_, happened| {
        let Happened::Turn(turn) = happened else { panic!("nobody asked for anything") };
        match turn.hurry {
            Some(Hurry::Came) => {
                bodies.iter().for_each(|body| body.lock().unwrap().consumed = MIB(765));
            }
            Some(Hurry::Short) => {
                hurried = Some(began.elapsed());
                told = None;
            }
            other => panic!("a turn that nobody waited for: {other:?} after {:?}", began.elapsed()),
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    hurried.unwrap()
}

#[test]
fn the_running_loop_hurries_when_memory_runs_out_and_ends_when_it_is_told_to() {
    // A machine that does something else for a second keeps a loop waiting that would have hurried, now and then.
    const TRIES: usize = 20;
    assert!(std::iter::repeat_with(hurried).take(TRIES).any(|took| took < PERIOD), "it waits for the second");
}

#[test]
fn more_than_the_host_can_promise_is_refused_with_the_arithmetic_and_changes_nothing() {
    let mut control =
        Control::new(Settings::new(MIB(1024)), Pool::of(MIB(1024)), MIB(100), Instant::now()).unwrap();
    let mut admit =
        |reservation| control.admit("web", settings(1024, reservation), Box::new(Fake(body(0, 0))));
    let refused = admit(900).unwrap_err().to_string();
    assert!(refused.contains("needs") && refused.contains("are left"), "{refused}");
    assert_eq!(admit(500).unwrap(), MachineId(1));
    assert_eq!(control.names().count(), 1);
}
