//! Settings: checked, described, and read again by a daemon that runs.
use super::attach::Fake;
use super::daemon::{Directory, kill_manager, status_of};
use super::run::{Run, can, wait_until};
use rustix::process::Signal;
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
fn a_running_daemon_follows_its_rules_and_reads_its_settings_again_at_sighup() {
    if !can("userfaultfd") {
        return;
    }
    let name = format!("ruled-{}", std::process::id());
    let machine = Fake::start(&name);
    let (directory, folder) = (Directory::new("settings"), tempfile::tempdir().unwrap());
    let file = folder.path().join("host.toml");
    let shown = file.to_str().unwrap();
    fs::write(&file, format!("[[rule]]\nvmm = \"qemu\"\ncommand-line = \"*-name {name} *\"\nuser = \"*\"\n"))
        .unwrap();
    // The flag comes before the variable, which could not be.
    let words = ["daemon", "--directory", directory.text(), "--budget", "64M"];
    let run = Run::new(&words).with("PLIMSOLL_CONFIG", &file).with("PLIMSOLL_BUDGET", Path::new("1M"));
    let daemon = run.start();
    let told = |text: &str| {
        let incidents = status_of(&directory).map(|mut status| status["incidents"].take());
        incidents.is_some_and(|them| {
            them.as_array().unwrap().iter().any(|one| one.as_str().unwrap().contains(text))
        })
    };
    // It has no memory of the size it claims, which is found out by attaching to it.
    let refusal = format!(
        "{name}, process {}, is not managed, as rule 1 ({shown}:1) says it should be: ",
        machine.pid()
    );
    wait_until("the rule has been followed", || told(&refusal));

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
    fs::write(&file, "[group.a]\nshares = 7\n").unwrap();
    daemon.signal(Signal::HUP);
    wait_until("the settings are in force", || told(&format!("the settings {shown:?} are in force")));
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}
