//! What each shipped scenario shows, in a smaller version of it.
use crate::{folder, report, shipped};
use plimsoll_policy::Ppm;
use plimsoll_sim::report::{ClassReport, Report};
use plimsoll_sim::time::Millis;
use plimsoll_sim::{Options, Scenario, run};

const HOUR: u64 = 3_600_000;

/// As shipped, for fewer hours.
fn for_hours(name: &str, hours: u64) -> Scenario {
    let scenario = shipped(name);
    Scenario { duration: scenario.duration.min(Millis(hours * HOUR)), ..scenario }
}

fn class<'a>(report: &'a Report, name: &str) -> &'a ClassReport {
    report.classes.iter().find(|class| class.class == name).unwrap()
}

fn state(report: &Report, name: &str) -> Ppm {
    Ppm(report.states.iter().find(|state| state.state == name).unwrap().time_ppm)
}

/// It holds, and somebody was on the hosts.
fn holds(report: &Report) {
    assert!(report.holds, "{}", report.verdict);
    assert_eq!(report.violations.machines, 0);
    assert!(report.density.machines > 0 && report.unplaced.is_empty());
}

#[test]
fn an_idle_fleet_owns_three_times_the_memory_and_hardly_waits() {
    let report = report(&for_hours("idle-fleet", 4), 2);
    holds(&report);
    assert_eq!(Ppm(report.density.overcommit_ppm), Ppm::percent(300));
    // More is kept than there is, so much was compressed; and hosts were short on the way there.
    assert!(report.density.contents_bytes > 256 << 30, "{}", report.density.contents_bytes);
    assert!(state(&report, "soft") > Ppm::ZERO);
    assert!(Ppm(report.stall.mean_ppm) < Ppm(1000), "{}", report.verdict);
}

/// What is left is what had to be: see `swings`.
#[test]
fn targets_move_back_and_forth_only_while_hosts_fill() {
    let [filling, hours] = [1, 4].map(|hours| report(&for_hours("idle-fleet", hours), 2).oscillations);
    assert_eq!(filling, hours);
}

#[test]
fn day_and_night_share_memory_and_nobody_waits() {
    let report = report(&shipped("daily-cycle"), 2);
    holds(&report);
    assert_eq!((report.oscillations, report.stall.mean_ppm), (0, 0));
    let use_at = |hour: u64| {
        report.timeline.iter().find(|moment| moment.at_seconds >= hour * 3600).unwrap().active_bytes
    };
    assert!(use_at(13) > use_at(1), "{} at one, {} at night", use_at(13), use_at(1));
}

#[test]
fn a_boot_storm_is_let_in_and_breaks_no_guarantee() {
    let report = report(&shipped("boot-storm"), 2);
    holds(&report);
    assert_eq!((report.restarts.machines, report.restarts.refusals), (120, 0));
}

#[test]
fn a_leak_takes_nothing_from_those_who_are_guaranteed() {
    let report = report(&for_hours("leak", 10), 2);
    holds(&report);
    let (leaky, service) = (class(&report, "leaky"), class(&report, "service"));
    assert!(leaky.contents_bytes > 2 * leaky.active_bytes);
    // What leaks is cold and goes first: of its contents less is in RAM than of the services'.
    let part = |class: &ClassReport| Ppm::of(class.consumed_bytes, class.contents_bytes);
    assert!(part(leaky) < part(service), "{} {}", part(leaky), part(service));
}

#[test]
fn a_machine_restarts_on_a_full_host_and_nobody_falls_below_its_reservation() {
    let report = report(&shipped("restart-under-pressure"), 1);
    holds(&report);
    assert_eq!((report.restarts.machines, report.restarts.refusals), (1, 0));
    // The host was full: it had less than minFree, and nearly all of its memory is taken up.
    assert!(state(&report, "high") < Ppm::percent(10), "{}", state(&report, "high"));
    let phoenix = class(&report, "phoenix");
    assert!(phoenix.contents_bytes >= 200 << 20, "it runs: {}", phoenix.contents_bytes);
    assert!(class(&report, "neighbour").consumed_bytes >= 768 << 20);
}

#[test]
fn a_noisy_neighbour_costs_those_within_their_reservation_nothing() {
    let report = report(&for_hours("noisy-neighbour", 3), 2);
    holds(&report);
    let (quiet, noisy) = (class(&report, "quiet"), class(&report, "noisy"));
    assert!(noisy.stall_ppm > 0, "the noisy ones got all they wanted: this shows nothing");
    assert!(Ppm(quiet.stall_ppm) < Ppm(100), "quiet machines waited {}", Ppm(quiet.stall_ppm));
}

#[test]
fn the_largest_scenario_runs_in_a_small_version_with_every_host_filled_alike() {
    let mut scenario = for_hours("ten-thousand-hosts", 3);
    let parts = scenario.hosts.count / 2;
    scenario.hosts.count = 2;
    for class in &mut scenario.classes {
        class.count /= u32::try_from(parts).unwrap();
    }
    let report = report(&scenario, 2);
    holds(&report);
    assert_eq!((report.density.machines, report.density.most_machines), (200, 100));
}

#[test]
fn every_shipped_scenario_is_one_that_can_be_read() {
    let files: Vec<_> = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 7);
    files.iter().for_each(|file| drop(Scenario::read(file).unwrap()));
}

#[test]
fn the_same_seed_gives_the_same_report_with_any_number_of_threads_and_another_one_another() {
    let scenario = for_hours("idle-fleet", 2);
    let one = report(&scenario, 1);
    assert_eq!(report(&scenario, 3), one);
    assert_ne!(report(&Scenario { seed: 2, ..scenario }, 1), one);
}

/// Long steps are no other simulation: what they leave out would have brought nothing. They are fewer the more a fleet is at rest; one
/// that is held to a limit is at work every second of it.
#[test]
fn long_steps_come_to_what_steps_of_a_second_come_to() {
    for (name, times_fewer) in [("idle-fleet", 2), ("noisy-neighbour", 1)] {
        let scenario = for_hours(name, 2);
        let long = report(&scenario, 2);
        let short = run(&scenario, Options { longest: Millis(1000), ..Options::default() }, &|| {}).unwrap();
        let (few, many) = (long.steps.decisions, short.steps.decisions);
        assert!(few * times_fewer < many, "{name}: {few} decisions of {many}");
        let near = |one: u64, other: u64, percent: u64| one.abs_diff(other) * 100 <= one.max(other) * percent;
        assert!(near(long.density.consumed_bytes, short.density.consumed_bytes, 3), "{name}");
        assert!(near(long.density.contents_bytes, short.density.contents_bytes, 3), "{name}");
        assert!(
            long.stall.mean_ppm.abs_diff(short.stall.mean_ppm) < 200,
            "{} {}",
            long.verdict,
            short.verdict
        );
        assert_eq!(long.holds, short.holds);
    }
}
