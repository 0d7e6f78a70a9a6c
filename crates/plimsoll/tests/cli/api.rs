//! The verbs that speak to a running daemon, and what the daemon makes of what they say.
use super::daemon::{
    Directory, Machine, ask, exists, kill_manager, manager_of, plimsoll, signal, start, start_with,
    status_of, stored_by_all, wait_for_another,
};
use super::run::{Ended, Run, Running, alone, can, wait_until};
use plimsoll_host::api::client::Client;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// What a verb says for programs, once something has been decided.
fn json(directory: &Directory, words: &[&str]) -> Value {
    let words = [words, &["--json"]].concat();
    let mut ended = plimsoll(directory, &words);
    wait_until("something is decided", || {
        let is_early = ended.stderr.contains("nothing was decided yet");
        if is_early {
            ended = plimsoll(directory, &words);
        }
        !is_early
    });
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
        ("[host]\nmemory = \"4G\"\n", "a daemon has a budget"),
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

/// Has pages of the only machine taken until it has so many bytes in the store.
fn squeeze(directory: &Directory, bytes: u64) {
    wait_until("some of it is stored", || {
        let order = format!(r#"{{"do":"squeeze","machine":{},"pages":8000}}"#, only(directory)["id"]);
        assert_eq!(ask(directory, &order).unwrap(), "done");
        stored_by_all(directory) > bytes
    });
}

/// A daemon with room for all of its machine, of which some is stored and about which it is decided.
fn start_with_stored(directory: &Directory) -> (Running, Machine) {
    let daemon = start_with(directory, &["--budget", "256M"]);
    let mut machine = Machine::start(directory);
    machine.verifies(1000);
    wait_until("it is decided about", || !json(directory, &["vm", "list"])["machines"][0].is_null());
    squeeze(directory, 1 << 20);
    (daemon, machine)
}

/// The only machine, as the manager itself sees it.
fn only(directory: &Directory) -> Value {
    status_of(directory).unwrap()["machines"][0].take()
}

#[test]
fn a_machine_is_released_where_there_is_room_for_it_and_goes_on_alone() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("released");
    let daemon = start(&directory);
    let mut machine = Machine::that_uses(&directory, 80 << 20);
    wait_until("what it uses is more than the budget", || stored_by_all(&directory) > 16 << 20);
    wait_until("it is decided about", || !json(&directory, &["vm", "list"])["machines"][0].is_null());
    let ended = plimsoll(&directory, &["vm", "release", "lonely"]);
    let said = refused(&ended);
    println!("{said}");
    assert!(
        said.contains("of its memory are stored; the budget of 64M has") && said.contains("raise the budget"),
        "{said}"
    );
    json(&directory, &["vm", "set", "lonely", "--weight", "2000", "--min", "16M", "--max", "96M"]);
    plimsoll(&directory, &["budget", "256M"]).expect_code(0);
    let ended = plimsoll(&directory, &["vm", "release", "lonely"]);
    ended.expect_code(0);
    assert!(ended.stdout.contains("lonely was let go, and goes on"), "{}", ended.stdout);
    machine.is_given_back();
    assert_eq!(json(&directory, &["vm", "list"])["machines"], serde_json::json!([]));
    let status = status_of(&directory).unwrap();
    assert_eq!((&status["machines"], &status["domains"]), (&serde_json::json!([]), &serde_json::json!([])));
    assert!(status["used_bytes"].as_u64().unwrap() < 64 << 20, "it counts against the budget: {status}");
    let kept = fs::read_to_string(directory.0.join("said.json")).unwrap();
    assert!(!kept.contains("lonely"), "{kept}");
    // Nobody who comes later has it, and nobody is needed.
    kill_manager(&directory);
    assert_eq!(status_of(&directory).unwrap()["machines"], serde_json::json!([]));
    daemon.signal(Signal::TERM);
    let ended = daemon.wait();
    ended.expect_code(0).expect_nothing_left();
    assert!(ended.stderr.contains("lonely is no longer managed: it was given back"), "{}", ended.stderr);
    machine.verifies(30_000);
    machine.finish();
}

#[test]
fn a_release_is_dropped_whole_when_its_manager_dies_before_the_machine_is_left() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("dropped");
    let (daemon, mut machine) = start_with_stored(&directory);
    // Its agent does nothing, so it cannot come home.
    signal(machine.process(), Signal::STOP);
    let client = Client::of(&directory.0);
    let answer = client.exchange("DELETE", "/v1/machines/lonely", &[], Vec::new()).unwrap();
    assert_eq!(answer.status, 202);
    let leaving: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(leaving["state"], "leaving");
    let again = client.exchange("DELETE", "/v1/machines/lonely", &[], Vec::new()).unwrap();
    assert_eq!(again.status, 202, "asking twice changes nothing");
    let killed = manager_of(&directory).unwrap();
    signal(killed, Signal::KILL);
    signal(machine.process(), Signal::CONT);
    wait_for_another(&directory, killed);
    machine.verifies(1000);
    let shown = || json(&directory, &["vm", "list"])["machines"][0].take();
    wait_until("it is managed as before", || shown()["memory"].is_object());
    assert!(["starting", "running"].contains(&shown()["state"].as_str().unwrap()), "{}", shown());
    squeeze(&directory, 1 << 20);
    plimsoll(&directory, &["vm", "release", "lonely"]).expect_code(0);
    machine.is_given_back();
    machine.verifies(1000);
    machine.finish();
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn how_much_of_the_stores_holds_nothing_is_told_by_the_api_the_metrics_and_the_line() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("fragmented");
    let (daemon, machine) = start_with_stored(&directory);
    let client = Client::of(&directory.0);
    let mut stores = Value::Null;
    wait_until("the loop has seen what is stored, and slots that are free", || {
        squeeze(&directory, 1 << 20);
        stores = client.get::<Value>("/v1/host").unwrap()["stores"].take();
        stores["free_slot_bytes"].as_u64().unwrap() > 0
    });
    let number = |field: &str| stores[field].as_u64().unwrap_or_else(|| panic!("no {field} in {stores}"));
    let (slabs, nothing) =
        (number("data_slab_bytes"), number("free_slot_bytes") + number("slot_waste_bytes"));
    assert!(number("held_bytes") > slabs && slabs > nothing && nothing > 0, "{stores}");
    assert_eq!(number("fragmentation_ppm"), nothing * 1_000_000 / slabs);
    let page = client.exchange("GET", "/metrics", &[], Vec::new()).unwrap();
    let page = String::from_utf8(page.body).unwrap();
    let metric = |name: &str| {
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {page}")).parse::<f64>().unwrap()
    };
    let (held, free) = (metric("plimsoll_store_held_bytes"), metric("plimsoll_store_free_slot_bytes"));
    assert!(held > free && metric("plimsoll_store_slot_waste_bytes") > 0.0, "{page}");
    let ratio = metric("plimsoll_store_fragmentation_ratio");
    assert!(0.0 < ratio && ratio < 1.0, "{ratio}");
    // An operator had it stored: nobody asked whether there was time.
    let storing = &stores["storing"];
    assert!(storing["demand_cpu_us"].as_u64() > Some(0), "{storing}");
    assert!(storing["ahead_cpu_us"].is_u64() && storing["ahead_share_ppm"] == 1_000_000, "{storing}");
    assert!(metric("plimsoll_storing_cpu_seconds_total{cause=\"demand\"}") > 0.0, "{page}");
    assert_eq!(metric("plimsoll_storing_share_ratio"), 1.0);
    let line = plimsoll(&directory, &["line"]);
    line.expect_code(0);
    assert!(line.stdout.contains("taken up by compressed pages; "), "{}", line.stdout);
    let mut status = status_of(&directory).unwrap();
    assert!(status["storing"]["demand_cpu_us"].as_u64() >= storing["demand_cpu_us"].as_u64(), "{status}");
    let domain = status["domains"][0].take();
    assert!(domain["data_slab_bytes"].as_u64() > domain["slot_waste_bytes"].as_u64(), "{domain}");
    machine.finish();
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn who_is_awaited_can_be_let_go_and_who_handed_itself_over_is_not_awaited() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("awaited");
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("host.toml");
    fs::write(&config, "[machine.lonely]\nshares = 500\n[machine.ghost]\nshares = 500\n").unwrap();
    let daemon = start_with(&directory, &["--budget", "256M", "--config", config.to_str().unwrap()]);
    let awaited = || {
        let list = json(&directory, &["vm", "list"])["waiting"].take();
        list.as_array()
            .unwrap()
            .iter()
            .map(|one| one["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    wait_until("the API is served", || plimsoll(&directory, &["budget"]).code() == Some(0));
    assert_eq!(awaited(), ["ghost", "lonely"]);
    let mut machine = Machine::start(&directory);
    machine.verifies(100);
    wait_until("one of them has come", || awaited() == ["ghost"]);
    plimsoll(&directory, &["vm", "release", "ghost"]).expect_code(0);
    assert_eq!(awaited(), [""; 0]);
    assert!(refused(&plimsoll(&directory, &["vm", "release", "ghost"])).contains("no machine is called"));
    kill_manager(&directory);
    wait_until("the next one has met the machine", || {
        json(&directory, &["vm", "list"])["machines"][0]["settings"]["shares"] == 500
    });
    assert_eq!(awaited(), [""; 0]);
    machine.finish();
    wait_until("it is awaited again", || awaited() == ["lonely"]);
    let mut another = Machine::start(&directory);
    another.verifies(100);
    wait_until("another one of that name has come", || awaited().is_empty());
    plimsoll(&directory, &["vm", "release", "lonely"]).expect_code(0);
    another.is_given_back();
    wait_until("it is not awaited: it was released", || {
        json(&directory, &["vm", "list"])["machines"].as_array().unwrap().is_empty() && awaited().is_empty()
    });
    another.finish();
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn nothing_is_taken_from_a_paused_machine_by_this_manager_or_the_next() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("paused");
    let (daemon, mut machine) = start_with_stored(&directory);
    assert_eq!(json(&directory, &["vm", "pause", "lonely"])["state"], "paused");
    kill_manager(&directory);
    let captured = || only(&directory)["captured"].as_u64().unwrap();
    let id = only(&directory)["id"].as_u64().unwrap();
    let order = format!(r#"{{"do":"squeeze","machine":{id},"pages":8000}}"#);
    assert_eq!(ask(&directory, &order).unwrap(), "done");
    let park = plimsoll(&directory, &["park", "lonely"]);
    assert!(refused(&park).contains("resume it first"), "{}", park.stderr);
    let reclaim = || plimsoll(&directory, &["vm", "reclaim", "lonely", "8M"]);
    wait_until("it is decided about again", || !json(&directory, &["vm", "list"])["machines"][0].is_null());
    assert!(refused(&reclaim()).contains("lonely is paused: nothing is taken from it"));
    // More than it has in RAM: what is elsewhere comes back, and several periods of the sampler pass.
    machine.verifies(30_000);
    assert_eq!(captured(), 0, "taken from a paused machine");
    assert_ne!(json(&directory, &["vm", "resume", "lonely"])["state"], "paused");
    wait_until("it gives again", || {
        assert_eq!(ask(&directory, &order).unwrap(), "done");
        captured() > 0
    });
    machine.finish();
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
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
