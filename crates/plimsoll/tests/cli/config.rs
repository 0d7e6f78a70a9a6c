//! Settings: checked, described, and read again by a daemon that runs.
use super::attach::Fake;
use super::daemon::{Directory, Machine, has_told, kill_manager, plimsoll, start_with};
use super::run::{Run, alone, can, wait_until};
use plimsoll_host::api::client::Client;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::path::Path;

#[test]
fn checking_settings_tells_every_mistake_on_a_line_of_its_own_and_the_description_has_every_table() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("host.toml");
    let shown = file.to_str().unwrap();
    fs::write(&file, "[machine.a]\nlimit = 5\n[machine.b]\nshares = 0\n").unwrap();
    let ended = Run::new(&["config", "check", shown]).output();
    ended.expect_code(2);
    let told: Vec<&str> = ended.stderr.strip_prefix("plimsoll config: ").unwrap().lines().collect();
    assert!(told[0].starts_with(&format!("{shown}:2: limit = 5: write a size")), "{told:?}");
    assert_eq!(told[1..], [format!("{shown}:4: b has 0 shares: give it at least 1")]);
    fs::write(&file, "[machine.a]\n[[rule]]\nname = \"*\"\n").unwrap();
    let ended = Run::new(&["config", "check", shown]).output();
    ended.expect_code(0);
    assert_eq!(ended.stdout, format!("{shown}: 1 machines, 0 groups, 1 rules; no mistakes\n"));
    let ended = Run::new(&["config", "docs"]).output();
    ended.expect_code(0);
    for heading in ["## `[host]`", "## `[group.", "## `[machine.", "## `[[rule]]`", "| `stall-objective` |"] {
        assert!(ended.stdout.contains(heading), "{heading}");
    }
}

#[test]
fn whoever_asks_why_is_told_which_rule_speaks_for_a_machine() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let (directory, folder) = (Directory::new("ruled"), tempfile::tempdir().unwrap());
    let file = folder.path().join("host.toml");
    fs::write(&file, "[[rule]]\nname = \"other\"\n[[rule]]\nvmm = \"plimsoll\"\nshares = 700\n").unwrap();
    let shown = file.to_str().unwrap();
    let daemon = start_with(&directory, &["--budget", "256M", "--config", shown]);
    let mut machine = Machine::start(&directory);
    machine.verifies(100);
    let told = format!("it is managed by rule 2 ({shown}:3)");
    wait_until("the rule is told", || plimsoll(&directory, &["why", "lonely"]).stdout.contains(&told));
    machine.finish();
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn a_daemon_has_the_budget_that_its_settings_say_unless_a_person_says_otherwise() {
    if !can("userfaultfd") {
        return;
    }
    let (directory, folder) = (Directory::new("budgeted"), tempfile::tempdir().unwrap());
    let file = folder.path().join("host.toml");
    let shown = file.to_str().unwrap();
    let words = ["daemon", "--directory", directory.text(), "--config", shown];
    fs::write(&file, "[group.a]\n").unwrap();
    let refused = Run::new(&words).output();
    refused.expect_code(2).expect_nothing_left();
    assert!(refused.stderr.contains("Say --budget SIZE, or budget in [host]"), "{}", refused.stderr);
    let say = |budget: &str| fs::write(&file, format!("[host]\nbudget = \"{budget}\"\n")).unwrap();
    say("64M");
    let daemon = start_with(&directory, &["--config", shown]);
    let is = |budget: &str| {
        let ended = plimsoll(&directory, &["budget"]);
        ended.code() == Some(0) && ended.stdout.starts_with(budget)
    };
    wait_until("it is what the settings say", || is("64M"));
    say("96M");
    daemon.signal(Signal::HUP);
    wait_until("it is what they say now", || is("96M"));
    // Settings that make no sense any more are no reason to be without a budget.
    fs::write(&file, "[host]\nbudget = 5\n").unwrap();
    kill_manager(&directory);
    wait_until("it is what was accepted last", || is("96M"));
    let told = |text: &str| has_told(&directory, text);
    fs::write(&file, "[group.a]\n").unwrap();
    daemon.signal(Signal::HUP);
    wait_until("settings without a budget are refused", || told("`budget` is gone"));
    plimsoll(&directory, &["budget", "72M"]).expect_code(0);
    say("80M");
    daemon.signal(Signal::HUP);
    // This manager has told nothing of the kind before.
    wait_until("the settings are in force", || told("host.toml\" are in force"));
    assert!(is("72M"), "{}", plimsoll(&directory, &["budget"]).stdout);
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn a_running_daemon_follows_its_rules_and_reads_its_settings_again_at_sighup() {
    if !can("userfaultfd") {
        return;
    }
    let name = format!("ruled-{}", std::process::id());
    let machine = Fake::start(&name);
    let (directory, folder) = (Directory::new("settings"), tempfile::tempdir().unwrap());
    let file = folder.path().join("host.toml");
    let shown = file.to_str().unwrap();
    let rule = format!("[[rule]]\nvmm = \"qemu\"\ncommand-line = \"*-name {name} *\"\nuser = \"*\"\n");
    fs::write(&file, format!("{rule}[host]\nstoring-share = \"7%\"\n")).unwrap();
    // The flag comes before the variable, which could not be.
    let words = ["daemon", "--directory", directory.text(), "--budget", "64M"];
    let run = Run::new(&words).with("PLIMSOLL_CONFIG", &file).with("PLIMSOLL_BUDGET", Path::new("1M"));
    let daemon = run.start();
    let told = |text: &str| has_told(&directory, text);
    // It has no memory of the size it claims, which is found out by attaching to it.
    let refusal = format!(
        "{name}, process {}, is not managed, as rule 1 ({shown}:1) says it should be: ",
        machine.pid()
    );
    wait_until("the rule has been followed", || told(&refusal));
    let shares = |ppm: u64| {
        let host = Client::of(&directory.0).get::<Value>("/v1/host");
        host.is_ok_and(|host| host["stores"]["storing"]["ahead_share_ppm"] == ppm)
    };
    wait_until("the share of a processor is in force", || shares(70_000));

    fs::write(&file, "[group.a]\nshares = 0\n").unwrap();
    daemon.signal(Signal::HUP);
    let kept = format!("those of before stay in force: {shown}:2: a has 0 shares");
    wait_until("the mistake is told", || told(&kept));
    fs::write(&file, "[host]\nmemory = \"1G\"\n").unwrap();
    daemon.signal(Signal::HUP);
    wait_until("what a daemon cannot be told is told", || told("leave memory and reserve out"));
    // What was refused is not in force for the next manager either.
    kill_manager(&directory);
    wait_until("the settings of before are in force", || {
        told("the settings that were accepted last are in force")
    });
    wait_until("the rule has been followed", || told(&refusal));
    wait_until("so is the share", || shares(70_000));
    fs::write(&file, "[group.a]\nshares = 7\n[host]\nstoring-share = \"250%\"\n").unwrap();
    daemon.signal(Signal::HUP);
    wait_until("the settings are in force", || told(&format!("the settings {shown:?} are in force")));
    wait_until("the share is another", || shares(2_500_000));
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}
