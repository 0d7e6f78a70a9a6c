//! `plimsoll demo` as a user starts it: what it says, how it ends, what it leaves.
use super::daemon::exists;
use super::run::{Ended, Run, alone, can, cgroups_of, is_root, wait_until};
use plimsoll_sys::mapping::{AnonymousMapping, HugePages, Merging};
use plimsoll_types::ByteCount;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long a run may take, on a busy machine too, that is refused before it starts anything.
const AT_ONCE: Duration = Duration::from_secs(60);
/// And one that is told to take 600 s and interrupted when its machines run.
pub(crate) const INTERRUPTED_WITHIN: Duration = Duration::from_secs(200);

/// Guests small and few enough to run in seconds, which own more than their budget.
const SMALL: [&str; 8] = ["demo", "--no-compare", "--guests", "2", "--size", "128M", "--budget", "128M"];

fn small<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SMALL.iter().chain(more).copied().collect()
}

/// What the report says in its documented fields, and that it agrees with itself.
pub(crate) fn expect_good_report(ended: &Ended, guests: usize) {
    let report = ended.json("report.json");
    let number = |of: &Value, field: &str| of[field].as_u64().unwrap_or_else(|| panic!("no {field} in {of}"));
    let (budget, peak) = (number(&report, "budget_bytes"), number(&report, "peak_bytes"));
    assert!(peak <= budget + budget / 50, "peak {peak}, budget {budget}");
    assert!(peak > budget / 10, "a peak of {peak} was not measured");
    assert_eq!(number(&report, "version"), 1);
    assert_eq!(number(&report, "wrong_words"), 0);
    assert!(report["failures"].as_array().unwrap().is_empty(), "{report}");
    let list = report["guests"].as_array().unwrap();
    assert_eq!(list.len(), guests);
    for guest in list {
        assert!(!guest["name"].as_str().unwrap().is_empty());
        assert!(number(guest, "size_bytes") > 0 && number(guest, "operations") > 0);
        assert!(number(guest, "faults") > 0, "{guest}");
        assert_eq!(number(guest, "wrong_words"), 0);
        assert!(guest["died"].is_null());
    }
    let owned: u64 = list.iter().map(|guest| number(guest, "size_bytes")).sum();
    assert_eq!(owned, number(&report, "asked_bytes"));
    ended.remove("report.json");
}

#[test]
fn guests_that_own_more_than_the_budget_run_within_it() {
    let _alone = alone();
    if !can("kvm") || !can("userfaultfd") {
        return;
    }
    let ended = Run::new(&small(&["--seconds", "4", "--accel", "kvm", "--json", "report.json"])).output();
    ended.expect_code(0);
    assert!(ended.first_line().contains("user-mode programs without a kernel"), "{}", ended.first_line());
    assert!(ended.first_line().contains("KVM"), "{}", ended.first_line());
    expect_good_report(&ended, 2);
    ended.expect_nothing_left();
}

#[test]
fn the_shortest_command_that_names_only_guests_runs() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let words =
        ["demo", "--no-compare", "--guests", "2", "--size", "64M", "--seconds", "4", "--json", "report.json"];
    let ended = Run::new(&words).output();
    ended.expect_code(0);
    expect_good_report(&ended, 2);
    ended.expect_nothing_left();
}

#[test]
fn the_same_guests_run_without_kvm_and_the_first_line_says_so() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let ended =
        Run::new(&small(&["--seconds", "4", "--accel", "in-process", "--json", "report.json"])).output();
    ended.expect_code(0);
    assert!(ended.first_line().contains("in-process"), "{}", ended.first_line());
    expect_good_report(&ended, 2);
    ended.expect_nothing_left();
}

#[test]
fn a_user_without_rights_gets_the_guests_in_process_or_one_sentence_that_names_the_right() {
    let _alone = alone();
    if !can("root") {
        return;
    }
    // The build may lie where only root may go.
    let folder = std::env::temp_dir().join(format!("plimsoll-test-copy-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.join("plimsoll");
    fs::copy(env!("CARGO_BIN_EXE_plimsoll"), &program).unwrap();
    let ended = Run::of(&program, &small(&["--seconds", "2"])).by(65534).output();
    fs::remove_dir_all(&folder).unwrap();
    match ended.code() {
        Some(0) => {
            assert!(ended.first_line().contains("in-process"), "{}", ended.first_line());
            assert!(ended.stdout.contains("passed: 0 wrong words"), "{}", ended.stdout);
        }
        _ => {
            ended.expect_code(2);
            let sentence = ended.stderr.trim();
            assert_eq!(sentence.lines().count(), 1, "{sentence}");
            let names_it = ["CAP_", "userfaultfd", "root"].iter().any(|right| sentence.contains(right));
            assert!(names_it, "{sentence}");
        }
    }
    ended.expect_nothing_left();
}

/// Whether KSM could not be had, which is said.
fn lacks_ksm(ended: &Ended) -> bool {
    let lacks = ended.code() == Some(2) && ended.stderr.contains("--share");
    if lacks {
        let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name == "ksm"), "{}", ended.stderr);
        println!("SKIPPED: {}", ended.stderr.trim());
    }
    lacks
}

/// What the report says of sharing, of guests with that content. `None` where KSM cannot be had, which is said.
fn shared(mix: &str) -> Option<Value> {
    const KSM: &str = "/sys/kernel/mm/ksm";
    let settings =
        || ["run", "pages_to_scan", "sleep_millisecs"].map(|name| fs::read(format!("{KSM}/{name}")).unwrap());
    let before = settings();
    let words = ["--seconds", "16", "--share", "--mix", mix, "--json", "report.json"];
    let words: Vec<&str> = ["demo", "--no-compare", "--guests", "3", "--size", "96M", "--budget", "240M"]
        .into_iter()
        .chain(words)
        .collect();
    let ended = Run::new(&words).output();
    if lacks_ksm(&ended) {
        return None;
    }
    ended.expect_code(0);
    let sharing = ended.json("report.json")["host"]["sharing"].clone();
    expect_good_report(&ended, 3);
    ended.expect_nothing_left();
    assert_eq!(settings(), before, "KSM is not as it was found");
    println!("{mix}: {sharing}");
    Some(sharing)
}

#[test]
fn blocks_of_our_own_guests_that_have_twins_are_marked_and_merged_and_others_are_not() {
    let _alone = alone();
    if !can("userfaultfd") || !can("ksm") {
        return;
    }
    let Some(alike) = shared("zero=10,dup=60,text=20,random=10") else { return };
    let Some(different) = shared("zero=10,dup=0,text=70,random=20") else { return };
    let number = |of: &Value, field: &str| of[field].as_u64().unwrap_or_else(|| panic!("no {field} in {of}"));
    assert!(number(&alike, "merged_bytes") > 8 << 20, "{alike}");
    assert!(
        number(&alike, "marked_blocks") > 0 && alike["us_a_merged_page"].as_f64().unwrap() > 0.0,
        "{alike}"
    );
    assert_eq!(number(&alike, "refused_blocks"), 0, "{alike}");
    // What all guests have alike is their program, less than a block.
    assert!(number(&different, "marked_blocks") <= 3 && number(&different, "blocks") == 144, "{different}");
    assert!(number(&different, "merged_bytes") < 1 << 20, "{different}");
}

#[test]
fn guests_do_not_share_where_a_stranger_could_be_merged_with_them() {
    let _alone = alone();
    if !can("userfaultfd") || !can("ksm") {
        return;
    }
    let stranger = AnonymousMapping::new(ByteCount::mib(2), HugePages::Never).unwrap();
    stranger.advise_merging(stranger.range(), Merging::Offered).unwrap();
    let ended = Run::new(&small(&["--seconds", "4", "--share"])).output();
    drop(stranger);
    ended.expect_code(2);
    let words = ended.stderr.trim();
    assert!(words.contains("KSM knows no domains") && words.lines().count() == 1, "{words}");
    ended.expect_nothing_left();
}

#[test]
fn a_stranger_that_comes_later_is_named_beside_what_was_not_merged() {
    let _alone = alone();
    if !can("userfaultfd") || !can("ksm") {
        return;
    }
    let words =
        ["--seconds", "12", "--share", "--mix", "zero=10,dup=60,text=20,random=10", "--json", "report.json"];
    let running = Run::new(&small(&words)).start();
    // What KSM was before is on record from when nobody was found in the way.
    wait_until("the guests share, or cannot", || {
        Path::new("/run/plimsoll/ksm").exists() || !exists(running.pid())
    });
    let stranger = AnonymousMapping::new(ByteCount::mib(2), HugePages::Never).unwrap();
    stranger.advise_merging(stranger.range(), Merging::Offered).unwrap();
    let ended = running.wait();
    drop(stranger);
    if lacks_ksm(&ended) {
        return;
    }
    ended.expect_code(0);
    let sharing = ended.json("report.json")["host"]["sharing"].clone();
    assert_eq!(sharing["merged_bytes"], 0, "{sharing}");
    let why = sharing["hindered"].as_str().unwrap_or_else(|| panic!("no reason in {sharing}"));
    assert!(why.contains("KSM knows no domains"), "{why}");
    assert!(ended.stdout.contains(why), "{}", ended.stdout);
    ended.remove("report.json");
    ended.expect_nothing_left();
}

#[test]
fn damage_to_a_stored_page_is_reported_and_never_read() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let ended = Run::new(&small(&["--seconds", "6", "--sabotage"])).output();
    ended.expect_code(1);
    assert!(ended.stdout.contains("poisoned") || ended.stdout.contains("wrong word"), "{}", ended.stdout);
    ended.expect_nothing_left();
}

/// Words that cannot be obeyed, and what the one sentence about them must name.
const BAD: [(&[&str], &str); 13] = [
    (&["--guests", "2", "--size", "64M", "--budget", "10M"], "--budget"),
    (&["--size", "0"], "--size"),
    (&["--size", "3145729"], "--size"),
    (&["--size", "67108865"], "--size"),
    (&["--guests", "0"], "--guests"),
    (&["--guests", "100000"], "--guests"),
    (&["--mix", "zero=50"], "--mix"),
    (&["--mix", "nonsense"], "--mix"),
    (&["--mix", "zero=100,zero=100"], "--mix"),
    (&["--seconds", "0"], "--seconds"),
    (&["--json", "missing/report.json"], "--json"),
    (&["--vcpus", "0"], "vCPUs"),
    (&["--vcpus", "99"], "vCPUs"),
];

#[test]
fn what_cannot_be_run_is_refused_in_one_sentence_that_names_the_option_and_nothing_is_left() {
    let _alone = alone();
    for (words, option) in BAD {
        let words: Vec<&str> = ["demo", "--no-compare"].iter().chain(words).copied().collect();
        let ended = Run::new(&words).output();
        ended.expect_code(2);
        let sentence = ended.stderr.trim();
        assert_eq!(sentence.lines().count(), 1, "{words:?}: {sentence}");
        assert!(sentence.contains(option), "{words:?}: {sentence}");
        assert!(ended.took < AT_ONCE, "{words:?} took {:?}", ended.took);
        ended.expect_nothing_left();
    }
}

#[test]
fn words_that_make_no_sense_are_refused_by_name() {
    for (words, option) in [
        (["demo", "--size", "banana"], "--size"),
        (["demo", "--guests", "-1"], "-1"),
        (["demo", "--accel", "tcg"], "--accel"),
        (["soak", "--seed", "many"], "--seed"),
    ] {
        let ended = Run::new(&words).output();
        ended.expect_code(2);
        assert!(ended.stderr.contains(option), "{}", ended.stderr);
        ended.expect_nothing_left();
    }
}

#[test]
fn an_interrupt_ends_the_run_within_seconds_and_leaves_nothing() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let mut running = Run::new(&small(&["--seconds", "600"])).start();
        running.wait_for_machines(2);
        running.signal(signal);
        let ended = running.wait();
        ended.expect_code(1);
        assert!(ended.took < INTERRUPTED_WITHIN, "{:?}", ended.took);
        assert!(ended.stdout.contains("interrupted"), "{}", ended.stdout);
        ended.expect_nothing_left();
    }
}

#[test]
fn machines_of_a_killed_run_end_by_themselves_and_the_next_run_sweeps_its_control_group() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let mut running = Run::new(&small(&["--seconds", "600"])).start();
    running.wait_for_machines(2);
    let pid = running.pid();
    let has_cgroup = !cgroups_of(pid).is_empty();
    assert!(has_cgroup || !is_root() || !can("cgroup"), "root makes a control group");
    running.signal(Signal::KILL);
    let killed = running.wait();
    assert_eq!(killed.code(), None, "it was killed");
    killed.expect_machines_to_end();
    assert_eq!(!cgroups_of(pid).is_empty(), has_cgroup, "nobody was left to remove it");
    // A process that gives back its memory has no environment to be known by any more, and is still in its group: the
    // next run may begin before the last one has gone, which this one stands for.
    let mut last = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
    for group in cgroups_of(pid) {
        fs::write(group.join("cgroup.procs"), last.id().to_string()).unwrap();
    }
    let mut next = Run::new(&small(&["--seconds", "4"])).start();
    next.wait_for_machines(1);
    assert_eq!(!cgroups_of(pid).is_empty(), has_cgroup, "a group with a process in it is left alone");
    last.kill().unwrap();
    last.wait().unwrap();
    let next = next.wait();
    next.expect_code(0);
    next.expect_nothing_left();
    assert_eq!(cgroups_of(pid), Vec::<PathBuf>::new(), "the killed run's control group");
}
