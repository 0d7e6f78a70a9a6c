//! `plimsoll demo --host metal` as a user starts it.
use super::demo::expect_good_report;
use super::run::{Run, alone, can};
use rustix::process::Signal;
use std::time::Duration;

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
    assert!(ended.took < Duration::from_secs(30), "{:?}", ended.took);
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
