//! The verbs that speak to a running daemon, and what the daemon makes of what they say.
use super::daemon::{Directory, Machine, exists, kill_manager, plimsoll, start};
use super::run::{Ended, Run, alone, can, wait_until};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// What a verb says for programs.
fn json(directory: &Directory, words: &[&str]) -> Value {
    let ended = plimsoll(directory, &[words, &["--json"]].concat());
    ended.expect_code(0);
    serde_json::from_str(&ended.stdout).unwrap()
}

/// What a verb says when it is refused: one line.
fn refused(ended: &Ended) -> &str {
    ended.expect_code(2).expect_nothing_left();
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    ended.stderr.trim()
}

#[test]
fn without_a_daemon_every_verb_says_so_in_one_sentence() {
    let directory = Directory::new("nobody");
    for words in [
        &["vm", "list"][..],
        &["vm", "show", "web"],
        &["vm", "set", "web", "--limit", "1G"],
        &["vm", "attach", "web"],
        &["vm", "release", "web"],
        &["vm", "pause", "web"],
        &["vm", "resume", "web"],
        &["vm", "reclaim", "web", "64M"],
        &["budget"],
        &["budget", "1G"],
    ] {
        let ended = plimsoll(&directory, words);
        let said = refused(&ended);
        assert!(
            said.contains("no daemon answers") && said.contains("`plimsoll daemon --budget SIZE`"),
            "{said}"
        );
    }
    let ended = plimsoll(&directory, &["vm", "set", "web"]);
    assert!(refused(&ended).contains("nothing to set"));
}

#[test]
fn settings_that_a_daemon_cannot_have_are_refused_before_it_starts() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Directory::new("settings");
    let config = folder.path().join("host.toml");
    for (text, expected) in [
        ("[host]\nmemory = \"4G\"\n", "a daemon has --budget"),
        ("[machine.web]\nshares = 0\n", ":2: web has 0 shares"),
    ] {
        fs::write(&config, text).unwrap();
        let words = ["daemon", "--budget", "64M", "--config", config.to_str().unwrap()];
        let ended = plimsoll(&directory, &words);
        assert!(refused(&ended).contains(expected), "{}", ended.stderr);
    }
    let ended = plimsoll(&directory, &["daemon", "--budget", "64M", "--config", "host.toml"]);
    assert!(refused(&ended).contains("use a path from /"));
}

#[test]
fn what_is_said_about_a_machine_outlives_its_manager() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("said");
    let daemon = start(&directory);
    let mut machine = Machine::start(&directory);
    machine.verifies(1000);
    let list = || json(&directory, &["vm", "list"])["machines"].clone();
    wait_until("it is decided about", || list()[0]["memory"].is_object());
    let shown = list()[0].clone();
    assert_eq!(
        (&shown["name"], &shown["kind"], &shown["size_bytes"]),
        (&"lonely".into(), &"handed_over".into(), &(96u64 << 20).into())
    );
    let set = json(
        &directory,
        &["vm", "set", "lonely", "--min", "16M", "--max", "96M", "--weight", "2000", "--buffer", "20%"],
    );
    assert_eq!(
        (&set["settings"]["minimum_bytes"], &set["settings"]["weight"]),
        (&(16u64 << 20).into(), &2000.into())
    );
    let refusals = [
        (&["vm", "set", "lonely", "--reservation", "80M"][..], "80M"),
        (&["vm", "set", "lonely", "--limit", "1G"], "more than its size of 96M"),
        (&["vm", "pause", "lonely"], "the hard line is kept by taking"),
        (&["vm", "release", "lonely"], "end its VMM"),
        (&["vm", "show", "lonly"], "no machine is called \"lonly\""),
        (&["vm", "attach", "lonly"], "lonly"),
        (&["budget", "1M"], "a machine cannot run in less than 32M"),
    ];
    for (words, expected) in refusals {
        let ended = plimsoll(&directory, words);
        let said = refused(&ended);
        assert!(said.contains(expected), "{words:?}: {said}");
    }
    plimsoll(&directory, &["vm", "reclaim", "lonely", "8M"]).expect_code(0);
    let why = plimsoll(&directory, &["why", "lonely"]);
    why.expect_code(0);
    assert!(
        why.stdout.contains("after the daemon began to decide") && why.stdout.contains("is to come to"),
        "{}",
        why.stdout
    );
    let line = plimsoll(&directory, &["line"]);
    line.expect_code(0);
    assert!(line.stdout.contains("1 machine own"), "{}", line.stdout);
    assert_eq!(json(&directory, &["budget", "72M"])["budget_bytes"], 72u64 << 20);

    let manager = kill_manager(&directory);
    assert!(!exists(manager));
    machine.verifies(1000);
    wait_until("it is decided about again", || list()[0]["memory"].is_object());
    assert_eq!(list()[0]["settings"], set["settings"]);
    assert_eq!(json(&directory, &["budget"])["budget_bytes"], 72u64 << 20);
    machine.finish();
    wait_until("it is gone from the list", || list().as_array().unwrap().is_empty());
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
    assert!(!directory.0.join("said.json").exists() && !directory.0.join("api.sock").exists());
}

#[test]
fn other_users_get_nothing_but_a_refusal() {
    if !can("root") || !can("userfaultfd") {
        return;
    }
    const NOBODY: u32 = 65534;
    let directory = Directory::new("others");
    let daemon = start(&directory);
    wait_until("the API is served", || plimsoll(&directory, &["budget"]).code() == Some(0));
    let words = ["vm", "list", "--directory", directory.text()];
    let ended = Run::new(&words).by(NOBODY).output();
    assert!(refused(&ended).contains("this user may not speak to the daemon"), "{}", ended.stderr);
    // Where the directory lets them in, the daemon itself does not.
    for (path, mode) in [(directory.0.clone(), 0o755), (directory.0.join("api.sock"), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let ended = Run::new(&words).by(NOBODY).output();
    ended.expect_code(2);
    assert!(ended.stderr.contains("user 65534 may not speak to this daemon"), "{}", ended.stderr);
    // A second daemon takes nothing from the first.
    plimsoll(&directory, &["daemon", "--budget", "64M"]).expect_code(2);
    plimsoll(&directory, &["budget"]).expect_code(0);
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn words_of_a_newer_version_are_left_alone_and_machines_are_served_without_the_loop() {
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("newer");
    let daemon = start(&directory);
    wait_until("the API is served", || plimsoll(&directory, &["budget"]).code() == Some(0));
    let newer = r#"{"version": 2}"#;
    fs::write(directory.0.join("said.json"), newer).unwrap();
    kill_manager(&directory);
    assert_eq!(fs::read_to_string(directory.0.join("said.json")).unwrap(), newer);
    daemon.signal(Signal::TERM);
    let ended = daemon.wait();
    ended.expect_code(0).expect_nothing_left();
    assert!(ended.stderr.contains("is of version 2, and this plimsoll reads up to 1"), "{}", ended.stderr);
}

#[test]
fn completions_and_man_pages_cover_the_verbs() {
    for shell in ["bash", "zsh", "fish"] {
        let ended = Run::new(&["completions", shell]).output();
        ended.expect_code(0);
        assert!(ended.stdout.contains("reclaim") && ended.stdout.contains("stall-objective"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    Run::new(&["man", folder.path().to_str().unwrap()]).output().expect_code(0).expect_nothing_left();
    let page = fs::read_to_string(folder.path().join("plimsoll-vm-set.1")).unwrap();
    assert!(page.contains("reservation"), "{page}");
    assert!(folder.path().join("plimsoll.1").exists() && !folder.path().join("plimsoll-manager.1").exists());
}
