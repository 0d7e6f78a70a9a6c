//! The settings file read again: all of it in force, or nothing.
use super::estate::{CONFIG, Estate, MIB, wait_until};
use plimsoll_host::api::Fault;
use plimsoll_host::api::exchange::Order;
use plimsoll_host::config::Config;
use serde_json::Value;

fn reload(estate: &Estate, text: &str) -> Result<(), Fault> {
    let config = Config::parse(text, "host.toml").unwrap();
    estate.bell.order(Order::Reload(Box::new(config))).map(drop)
}

/// Everything of an estate that settings decide about.
fn in_force(estate: &Estate) -> (Value, Value) {
    let machines = estate.json("/v1/machines")["machines"].take();
    let settings = machines.as_array().unwrap().iter().map(|machine| machine["settings"].clone()).collect();
    let mut groups = estate.json("/v1/groups")["groups"].take();
    for group in groups.as_array_mut().unwrap() {
        // What machines take up is decided anew each second.
        group.as_object_mut().unwrap().retain(|key, _| !["active_bytes", "consumed_bytes"].contains(&&**key));
    }
    (settings, groups)
}

#[test]
fn what_a_file_says_is_in_force_after_it_was_read_again_and_a_groups_new_neighbour_changes_no_member() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 3, 1024);
    let text = format!("{CONFIG}[machine.m1]\ngroup = \"tenant\"\nreservation = \"8M\"\nshares = 77\n");
    reload(&estate, &text).unwrap();
    let m1 = estate.json("/v1/machines/m1")["settings"].take();
    assert_eq!((&m1["group"], &m1["shares"]), (&Value::from("tenant"), &Value::from(77)));
    assert_eq!(m1["reservation_bytes"], Value::from(8 * MIB));
    // One that sorts before the others would have their numbers.
    reload(&estate, &format!("[group.a]\n{text}")).unwrap();
    assert_eq!(estate.json("/v1/machines/m1")["settings"], m1);
    assert_eq!(estate.json("/v1/groups")["groups"].as_array().map(Vec::len), Some(3));
    // What the file says no more is not in force any more.
    reload(&estate, &format!("{CONFIG}[machine.m1]\n")).unwrap();
    assert_eq!(estate.json("/v1/machines/m1")["settings"]["shares"], Value::from(5000));
    // Nor is a machine managed that it names no more; nobody has ever named the others.
    reload(&estate, CONFIG).unwrap();
    assert_eq!([1, 2].map(|number| estate.get(&format!("/v1/machines/m{number}")).status), [404, 200]);
}

#[test]
fn a_file_the_host_cannot_keep_changes_nothing_and_the_sentence_names_who_and_what() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 2, 1024);
    reload(&estate, &format!("{CONFIG}[machine.m1]\nshares = 7\n")).unwrap();
    let before = in_force(&estate);
    for (text, expected) in [
        // It contradicts what the running machine is: only the loop knows its size.
        (
            "[machine.m1]\nlimit = \"1G\"\n[machine.m2]\nshares = 9\n",
            "m1 has a limit of 1G, more than its size of 64M",
        ),
        (
            "[group.new]\nreservation = \"2G\"\n[machine.m2]\nshares = 9\n",
            "the host has 1G for machines, but 2G is reserved",
        ),
        (
            "[group.new]\nreservation = \"960M\"\n[machine.m2]\nshares = 9\n",
            "are missing: 0 are left: 1G - 61.4M kept free",
        ),
    ] {
        let fault = reload(&estate, text).unwrap_err();
        assert!(fault.message.contains(expected), "{text}: {fault}");
        assert_eq!(in_force(&estate), before, "{text}");
    }
}

#[test]
fn what_was_said_by_the_api_comes_before_a_file_that_is_read_again_and_that_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 2, 1024);
    assert_eq!(estate.send("PATCH", "/v1/machines/m1", r#"{"shares": 11}"#).status, 200);
    reload(&estate, &format!("{CONFIG}[machine.m1]\nshares = 7\n[machine.m2]\nshares = 7\n")).unwrap();
    let shares = |name: &str| estate.json(&format!("/v1/machines/{name}"))["settings"]["shares"].take();
    assert_eq!((shares("m1"), shares("m2")), (Value::from(11), Value::from(7)));
    let is_told =
        |note: &String| note == "m1 keeps what was said by the API, which comes before the settings";
    wait_until("that is told", || estate.notes.lock().iter().any(is_told));
    // The same again is no news.
    estate.notes.lock().clear();
    reload(&estate, &format!("{CONFIG}[machine.m1]\nshares = 7\n[machine.m2]\nshares = 8\n")).unwrap();
    assert!(!estate.notes.lock().iter().any(is_told));
}

#[test]
fn a_machine_that_the_file_names_no_more_is_awaited_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1, 1024);
    let waiting = || {
        let host = estate.json("/v1/host");
        host["waiting"].as_array().unwrap().iter().map(|one| one["name"].clone()).collect::<Vec<_>>()
    };
    reload(&estate, "[machine.soon]\n").unwrap();
    assert_eq!(waiting(), [Value::from("soon")]);
    reload(&estate, "[machine.later]\n").unwrap();
    assert_eq!(waiting(), [Value::from("later")]);
}
