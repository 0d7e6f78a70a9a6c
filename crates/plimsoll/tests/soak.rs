//! `plimsoll soak`: a fixed seed, a fresh one, and what it refuses.
//!
//! `PLIMSOLL_SOAK_SECONDS` says how long the fresh seed may go on; without it, 20 seconds.
//!
//! A test program of its own, beside which others run: it takes minutes and needs nothing of the host that they change.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails the test")]

#[path = "cli/run.rs"]
#[expect(dead_code, reason = "these tests use a part of it")]
mod run;

use run::{Run, alone, can, wait_until};
use rustix::process::Signal;

/// Long enough for a crash a second and every kind of trouble.
const SECONDS: u64 = 20;
/// Long enough for all that there is to happen on any host.
const LONG: u64 = 120;

fn soak_seconds() -> u64 {
    match std::env::var("PLIMSOLL_SOAK_SECONDS") {
        Ok(text) => text.parse::<u64>().expect("PLIMSOLL_SOAK_SECONDS is a number").max(1),
        Err(_) => SECONDS,
    }
}

fn soak(seed: Option<u64>, seconds: u64, accel: &str) {
    let seconds_text = seconds.to_string();
    let seed_text = seed.unwrap_or_default().to_string();
    let mut words = vec!["soak", "--seconds", &seconds_text, "--accel", accel, "--json", "soak.json"];
    if seed.is_some() {
        words.extend(["--seed", &seed_text]);
    }
    let ended = Run::new(&words).lasting(seconds).output();
    // The seed is in it: whoever reads a failure can repeat it.
    println!("{}", ended.stdout);
    ended.expect_code(0);
    let report = ended.json("soak.json");
    let number = |field: &str| report[field].as_u64().unwrap_or_else(|| panic!("no {field} in {report}"));
    assert_eq!(ended.first_line(), format!("seed {}", number("seed")));
    assert!(seed.is_none_or(|seed| seed == number("seed")));
    assert_eq!(number("wrong_words"), 0);
    assert!(number("takeovers") > 0 && number("actions") > 0, "{report}");
    let pages = &report["pages"];
    for (kind, least) in
        [("captured", 1000), ("verified", 1000), ("brought_ahead", 1000), ("replayed", 1), ("taken_whole", 1)]
    {
        assert!(pages[kind].as_u64().is_some_and(|count| count >= least), "{kind}: {report}");
    }
    assert!(number("packed") > 100 && number("moved") > 100, "{report}");
    // On a busy host it takes longer than a short run to see that a block is hot, or that somebody thrashes.
    if seconds >= LONG {
        assert!(number("collapsed") > 0 && number("backoffs") > 0, "{report}");
    }
    ended.remove("soak.json");
    ended.expect_nothing_of_its_own_left();
}

#[test]
fn a_known_schedule_of_crashes_and_evictions_costs_no_byte() {
    let _alone = alone();
    if can("userfaultfd") && can("kvm") {
        soak(Some(1), SECONDS, "kvm");
    }
}

#[test]
fn a_known_schedule_costs_no_byte_without_kvm_either() {
    let _alone = alone();
    if can("userfaultfd") {
        soak(Some(2), SECONDS, "in-process");
    }
}

#[test]
fn a_fresh_schedule_costs_no_byte() {
    let _alone = alone();
    if can("userfaultfd") {
        soak(None, soak_seconds(), "auto");
    }
}

/// As Ctrl-C does: the guests end by themselves, while somebody waits for a page of theirs that nobody will bring.
#[test]
fn a_soak_ends_although_a_reader_waits_for_a_page_of_a_guest_that_is_gone() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    for seed in ["1", "2", "3", "4"] {
        let words = ["soak", "--seconds", "60", "--accel", "in-process", "--seed", seed];
        let running = Run::new(&words).in_a_group_of_its_own().start();
        wait_until("a guest's memory is read from outside", || running.has_thread("reader"));
        running.signal_group(Signal::TERM);
        let ended = running.wait();
        ended.expect_code(1);
        ended.expect_nothing_of_its_own_left();
    }
}

/// Few kills: `cargo xtask chaos` has 500.
#[test]
fn guests_outlive_a_daemon_whose_manager_is_killed_and_everything_is_accounted_for() {
    let _alone = alone();
    if !(can("userfaultfd") && can("cgroup")) {
        return;
    }
    let words = ["soak", "--kill-daemon", "40", "--guests", "3", "--json", "chaos.json"];
    let ended = Run::new(&words).lasting(60).output();
    println!("{}", ended.stdout);
    ended.expect_code(0);
    let report = ended.json("chaos.json");
    let number = |field: &str| report[field].as_u64().unwrap_or_else(|| panic!("no {field} in {report}"));
    assert_eq!((number("kills"), number("wrong_words")), (40, 0));
    assert!(number("verified_pages") > 1000, "{report}");
    assert_eq!(number("keeper_descriptors_before"), number("keeper_descriptors_after"));
    ended.remove("chaos.json");
    ended.expect_nothing_of_its_own_left();
}

/// A file system that others fill, and a device that refuses writes: which it is depends on the seed.
#[test]
fn guests_outlive_managers_that_are_killed_while_their_disk_fails_and_fills() {
    let _alone = alone();
    if !(can("userfaultfd") && can("cgroup") && can("root")) {
        return;
    }
    for seed in ["2", "3"] {
        let words = [
            "soak",
            "--kill-daemon",
            "12",
            "--guests",
            "2",
            "--bad-disk",
            "--seed",
            seed,
            "--json",
            "bad.json",
        ];
        let ended = Run::new(&words).lasting(60).output();
        println!("{}", ended.stdout);
        ended.expect_code(0);
        let report = ended.json("bad.json");
        assert_eq!(
            (report["kills"].as_u64(), report["wrong_words"].as_u64()),
            (Some(12), Some(0)),
            "{report}"
        );
        ended.remove("bad.json");
        ended.expect_nothing_of_its_own_left();
    }
}

#[test]
fn a_soak_that_cannot_run_is_refused_in_one_sentence_and_nothing_is_left() {
    for (words, option) in [
        (["--budget", "20M"], "--budget"),
        (["--guests", "0"], "--guests"),
        (["--guests", "100000"], "--guests"),
        (["--seconds", "0"], "--seconds"),
        (["--size", "0"], "--size"),
        (["--size", "4M"], "--size"),
        (["--json", "missing/soak.json"], "--json"),
    ] {
        let ended = Run::new(&[&["soak"][..], &words[..]].concat()).output();
        ended.expect_code(2);
        assert_eq!(ended.stderr.trim().lines().count(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains(option), "{}", ended.stderr);
        ended.expect_nothing_of_its_own_left();
    }
}
