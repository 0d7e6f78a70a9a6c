//! The QEMU driver against recorded answers, against a real QEMU, and through `virsh`.
mod live;
mod recorded;
mod through_virsh;

use plimsoll_attach::control::{
    Balloon, BalloonDevice, Control, ControlError, ControlEvent, Feature, HotMemoryId, HotplugMethod,
    Migration, Qemu, Qmp, QmpEvent, RunState,
};
use plimsoll_types::ByteCount;
use recorded::Recorded;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

/// The machine of the recording that has everything.
const EVERYTHING: &str = "deflate-on-oom=on";

fn hot(id: &str) -> HotMemoryId {
    HotMemoryId(id.to_owned())
}

/// A monitor that answers by a function.
struct Scripted<F>(F);

impl<F: FnMut(&str, &Value) -> Option<Value> + Send> Qmp for Scripted<F> {
    fn interface(&self) -> &str {
        "the scripted monitor"
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        (self.0)(command, &arguments).ok_or_else(|| ControlError::Refused {
            interface: "the scripted monitor".to_owned(),
            request: command.to_owned(),
            text: "no".to_owned(),
        })
    }

    fn events(&mut self) -> Result<Vec<QmpEvent>, ControlError> {
        Err(ControlError::Unsupported { interface: self.interface().to_owned(), what: "events" })
    }
}

#[test]
fn what_a_machine_can_do_is_found_by_asking() {
    let mut qemu = Qemu::new(Recorded::machine(EVERYTHING));
    let found = qemu.probe().unwrap();
    let balloon = BalloonDevice { granularity: ByteCount(4096), deflate_on_oom: Some(true) };
    assert_eq!(found.balloon, Some(balloon));
    let expected = [
        Feature::Statistics,
        Feature::FreePageReporting,
        Feature::Pause,
        Feature::Migration,
        Feature::Events,
    ];
    assert_eq!(found.features, expected.into());
    let [device, modules] = &found.hot_memory[..] else { panic!("{found:?}") };
    assert_eq!(
        (&device.id, device.method, device.block),
        (&hot("vm0"), HotplugMethod::VirtioMem, ByteCount::mib(2))
    );
    assert_eq!((device.requested, device.plugged), (ByteCount::mib(128), Some(ByteCount(0))));
    assert_eq!(modules.method, HotplugMethod::Acpi);
    assert_eq!(modules.maximum, Some(ByteCount::mib(4096 - 512 - 1024)));
}

#[test]
fn a_balloon_without_a_name_is_found_too_and_a_machine_may_have_none() {
    let found = Qemu::new(Recorded::machine("-device virtio-balloon-pci")).probe().unwrap();
    assert_eq!(found.balloon.unwrap().deflate_on_oom, Some(false));
    assert!(!found.has(Feature::FreePageReporting) && found.has(Feature::Statistics));
    assert_eq!(found.hot_memory, []);

    let none = |_: &str, arguments: &Value| match arguments["path"].as_str() {
        Some(_) => Some(json!([{ "name": "type", "type": "string" }])),
        None => Some(json!([])),
    };
    let mut bare = Qemu::new(Scripted(none));
    let found = bare.probe().unwrap();
    assert_eq!((found.balloon, found.hot_memory.len()), (None, 0));
    assert!(!found.has(Feature::Events));
    assert!(matches!(bare.statistics(), Err(ControlError::Unsupported { .. })));
    let error = Qemu::new(Recorded::machine("-m 512M")).balloon();
    assert!(error.is_err_and(|error| error.to_string().ends_with("No balloon device has been activated")));
}

#[test]
fn the_balloon_is_asked_for_by_what_it_leaves() {
    let mut qemu = Qemu::new(Recorded::machine(EVERYTHING));
    let empty = Balloon { memory: ByteCount::mib(512), target: None, actual: Some(ByteCount(0)) };
    assert_eq!(qemu.balloon().unwrap(), empty);
    qemu.set_balloon(ByteCount(ByteCount::mib(256).0 + 4095)).unwrap();
    assert_eq!(qemu.balloon().unwrap().target, Some(ByteCount::mib(256)));
    let error = qemu.set_balloon(ByteCount::mib(512)).unwrap_err();
    assert!(matches!(error, ControlError::OutOfRange { .. }), "{error}");
}

#[test]
fn memory_modules_count_for_the_balloon_and_virtio_mem_does_not() {
    let mut qemu = Qemu::new(Recorded::machine(EVERYTHING));
    qemu.set_balloon(ByteCount::mib(256)).unwrap();
    qemu.request_hot_memory(&hot("vm0"), ByteCount::mib(256)).unwrap();
    assert_eq!(qemu.hot_memory().unwrap()[0].requested, ByteCount::mib(256));
    qemu.request_hot_memory(&hot("memory modules"), ByteCount::mib(128)).unwrap();
    assert_eq!(qemu.balloon().unwrap().memory, ByteCount::mib(640));
    assert_eq!(qemu.balloon().unwrap().actual, Some(ByteCount(0)));
    // The same again is there already; more is another module, under another name; then the slots are full.
    qemu.request_hot_memory(&hot("memory modules"), ByteCount::mib(128)).unwrap();
    qemu.request_hot_memory(&hot("memory modules"), ByteCount::mib(256)).unwrap();
    for (size, is_range) in [(ByteCount::mib(384), true), (ByteCount::mib(128), false)] {
        let error = qemu.request_hot_memory(&hot("memory modules"), size).unwrap_err();
        assert_eq!(matches!(error, ControlError::OutOfRange { .. }), is_range, "{error}");
    }
}

#[test]
fn a_memory_module_that_is_refused_leaves_no_back_end_behind() {
    let mut told = Vec::new();
    let answer = |command: &str, arguments: &Value| match command {
        "query-memory-devices" => Some(json!([])),
        "qom-list" => Some(json!([{ "name": "memory", "type": "MemorySizeConfiguration" }])),
        "qom-get" => Some(json!({ "size": 1u64 << 30, "slots": 1, "max-size": 1u64 << 31 })),
        "device_add" => None,
        _ => {
            told.push((command.to_owned(), arguments["id"].clone()));
            Some(json!({}))
        }
    };
    let error = Qemu::new(Scripted(answer)).request_hot_memory(&hot("memory modules"), ByteCount::mib(128));
    assert!(error.unwrap_err().to_string().contains("refused device_add: no"));
    let name = json!("plimsoll-dimm0-backend");
    assert_eq!(told, [("object-add".to_owned(), name.clone()), ("object-del".to_owned(), name)]);
}

#[test]
fn statistics_that_were_never_told_are_missing_and_have_no_age() {
    let mut qemu = Qemu::new(Recorded::machine(EVERYTHING));
    qemu.poll_statistics(Duration::from_millis(1)).unwrap();
    let said = qemu.statistics().unwrap();
    assert_eq!(said, plimsoll_attach::control::GuestStatistics::default());
}

#[test]
fn each_statistic_stands_for_itself_and_has_the_age_of_its_update() {
    let told = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() - 100;
    for (update, is_aged) in [(told, true), (told + 100_000, false), (u64::MAX, false), (0, false)] {
        let answer = move |command: &str, arguments: &Value| match (command, arguments["path"].as_str()) {
            ("qom-list", Some("/machine/peripheral")) => {
                Some(json!([{ "name": "b", "type": "child<virtio-balloon-pci>" }]))
            }
            ("qom-list", _) => Some(json!([{ "name": "guest-stats", "type": "guest statistics" }])),
            _ => Some(json!({ "last-update": update, "stats": {
                "stat-available-memory": 4096, "stat-free-memory": -1, "stat-total-memory": u64::MAX,
                "stat-major-faults": 7, "stat-swap-in": "many", "stat-disk-caches": 1.5 } })),
        };
        let said = Qemu::new(Scripted(answer)).statistics().unwrap();
        assert_eq!((said.available, said.major_faults), (Some(ByteCount(4096)), Some(7)));
        assert_eq!((said.free, said.total, said.swapped_in, said.caches), (None, None, None, None));
        assert_eq!(
            said.age.is_some_and(|age| (100..200).contains(&age.as_secs())),
            is_aged,
            "{:?}",
            said.age
        );
    }
}

#[test]
fn the_machine_runs_stops_and_tells() {
    let mut qemu = Qemu::new(Recorded::machine(EVERYTHING));
    assert_eq!(qemu.run_state().unwrap(), RunState::NotStarted);
    qemu.resume().unwrap();
    assert_eq!(qemu.run_state().unwrap(), RunState::Running);
    // Probing takes events to see whether there are any, and keeps them.
    let mut again = Qemu::new(Recorded::machine(EVERYTHING));
    again.resume().unwrap();
    again.probe().unwrap();
    assert_eq!(again.events().unwrap(), [ControlEvent::RunState]);
    qemu.pause().unwrap();
    assert_eq!(qemu.run_state().unwrap(), RunState::Paused);
    assert_eq!(qemu.events().unwrap(), [ControlEvent::RunState; 2]);
    assert_eq!(qemu.events().unwrap(), []);
}

#[test]
fn a_migration_is_active_until_it_is_known_to_be_over() {
    let cases = [
        (json!({}), "running", Migration::None),
        (json!({ "status": "none" }), "running", Migration::None),
        (json!({ "status": "setup" }), "running", Migration::Active),
        (json!({ "status": "postcopy-paused" }), "paused", Migration::Active),
        (json!({ "status": "a state of the future" }), "running", Migration::Active),
        (json!({ "status": "cancelled" }), "running", Migration::Failed),
        (json!({ "status": "completed" }), "postmigrate", Migration::Completed),
        (json!({ "status": "completed" }), "running", Migration::None),
    ];
    for (migration, status, expected) in cases {
        let shown = migration.to_string();
        let answer = move |command: &str, _: &Value| match command {
            "query-migrate" => Some(migration.clone()),
            _ => Some(json!({ "status": status, "running": false })),
        };
        assert_eq!(Qemu::new(Scripted(answer)).migration().unwrap(), expected, "{shown}, {status}");
    }
}

#[test]
fn answers_of_another_form_are_garbage_and_never_a_panic() {
    let strange = [json!(null), json!("text"), json!(-1), json!([1]), json!({}), json!([{ "type": "dimm" }])];
    for answer in strange {
        let mut qemu = Qemu::new(Scripted(move |_: &str, _: &Value| Some(answer.clone())));
        let outcomes = [
            qemu.probe().err(),
            qemu.balloon().err(),
            qemu.statistics().err(),
            qemu.hot_memory().err(),
            qemu.migration().err(),
            qemu.run_state().err(),
        ];
        for error in outcomes.into_iter().flatten() {
            let is_fair = matches!(error, ControlError::Garbage { .. } | ControlError::Unsupported { .. });
            assert!(is_fair, "{error}");
        }
    }
    // Sizes that cannot be: more left to the guest than there is, and sums beyond 64 bits.
    for (base, module, left) in [(1u64 << 30, 0, 1u64 << 31), (u64::MAX, u64::MAX, 0)] {
        let answer = move |command: &str, _: &Value| match command {
            "query-memory-size-summary" => Some(json!({ "base-memory": base })),
            "query-memory-devices" => Some(json!([{ "type": "dimm", "data": { "size": module } }])),
            _ => Some(json!({ "actual": left })),
        };
        let error = Qemu::new(Scripted(answer)).balloon().unwrap_err();
        assert!(matches!(error, ControlError::Garbage { .. }), "{error}");
    }
}
