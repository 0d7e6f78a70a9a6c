//! `plimsoll demo --host metal` as a user starts it.
use super::demo::{INTERRUPTED_WITHIN, expect_good_report};
use super::run::{Run, alone, can};
use rustix::process::Signal;
use serde_json::Value;

/// Guests small and few enough for an emulated machine.
const SMALL: [&str; 7] = ["demo", "--host", "metal", "--guests", "2", "--size", "96M"];

fn small<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SMALL.iter().chain(more).copied().collect()
}

#[test]
fn the_demo_on_the_bare_metal_host_passes_with_the_same_report_and_leaves_nothing() {
    let _alone = alone();
    if !can("qemu") {
        return;
    }
    let ended = Run::new(&small(&["--seconds", "3", "--json", "report.json"])).start().wait();
    ended.expect_code(0);
    assert!(ended.stdout.contains("passed: 0 wrong words"), "{}", ended.stdout);
    expect_good_report(&ended, 2);
    ended.expect_nothing_left();
}

#[test]
fn how_often_guests_leave_is_reported_for_each_kind_of_paging_when_it_is_asked_for() {
    let _alone = alone();
    if !can("qemu") {
        return;
    }
    let small = ["demo", "--host", "metal", "--guests", "1", "--size", "64M", "--seconds", "1"];
    let ended = Run::new(&[&small[..], &["--exits", "--json", "report.json"]].concat()).start().wait();
    ended.expect_code(0);
    assert!(
        ended.stdout.contains("exits in a million of the guests' instructions: kv1 "),
        "{}",
        ended.stdout
    );
    let report = ended.json("report.json");
    let number = |of: &Value, field: &str| of[field].as_u64().unwrap_or_else(|| panic!("no {field} in {of}"));
    assert!(number(&report["guests"][0], "exits_per_million") > 0, "{report}");
    let modes = report["modes"].as_array().unwrap();
    let names: Vec<_> = modes.iter().map(|mode| mode["paging"].as_str().unwrap()).collect();
    assert_eq!(names, ["nested", "shadow", "direct"]);
    let [nested, shadow, direct] = [0, 1, 2].map(|mode| number(&modes[mode], "exits_per_million"));
    assert!(nested > direct && shadow > nested && direct > 0, "{report}");
    for name in names {
        assert!(ended.stdout.lines().any(|line| line.starts_with(name)), "{}", ended.stdout);
    }
    expect_good_report(&ended, 1);
    let elsewhere = Run::new(&["demo", "--exits"]).start().wait();
    elsewhere.expect_code(2);
}

#[test]
fn what_a_plan_records_is_decided_again_here_and_on_bare_metal() {
    let _alone = alone();
    if !can("qemu") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record");
    let record = record.to_str().unwrap();
    let scenario = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/scenarios/three-hosts.toml");
    let planned = Run::new(&["plan", scenario, "--record", record]).output();
    assert!(planned.stdout.contains("no guarantee was broken"), "{}", planned.stdout);
    for host in ["linux", "metal"] {
        let ended = Run::new(&["replay", record, "--host", host, "--json"]).start().wait();
        ended.expect_code(0);
        let outcome: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert!(outcome["identical"].as_u64().unwrap() > 5 && outcome["difference"].is_null(), "{outcome}");
    }
}

#[test]
fn an_interrupted_demo_on_the_bare_metal_host_says_so_and_leaves_nothing() {
    let _alone = alone();
    if !can("qemu") {
        return;
    }
    let mut running = Run::new(&small(&["--seconds", "600"])).start();
    running.wait_for_machines(1);
    running.signal(Signal::INT);
    let ended = running.wait();
    ended.expect_code(1);
    assert!(ended.took < INTERRUPTED_WITHIN, "{:?}", ended.took);
    assert!(ended.stdout.contains("interrupted"), "{}", ended.stdout);
    ended.expect_nothing_left();
}

#[test]
fn what_the_bare_metal_host_lacks_is_refused_by_the_option_s_name() {
    for option in ["--share", "--prefault", "--sabotage"] {
        let ended = Run::new(&small(&[option])).start().wait();
        ended.expect_code(2);
        let all = format!("{}{}", ended.stdout, ended.stderr);
        assert!(all.contains(&format!("{option} is not for the bare-metal host")), "{all}");
    }
}
