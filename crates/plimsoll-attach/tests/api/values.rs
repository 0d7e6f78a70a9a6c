//! What the drivers make of answers, and what they send, in figures.
use crate::PATIENCE;
use crate::server::{Reply, Server};
use plimsoll_attach::control::{
    Balloon, CloudHypervisor, Control, ControlError, Feature, Firecracker, Hinting, HotMemory, HotMemoryId,
    HotplugMethod,
};
use plimsoll_types::ByteCount;
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;

/// A path and what is answered there.
type Answer = (&'static str, fn() -> Value);

/// Answers each path from a table and anything that is told with 204.
fn table(answers: &'static [Answer]) -> Server {
    Server::start(move |request| {
        let found =
            answers.iter().find(|(path, _)| *path == request.path).filter(|_| request.method == "GET");
        match found {
            Some((_, answer)) => Reply::Json(200, answer()),
            None if request.method == "GET" => {
                Reply::Json(400, json!({ "fault_message": "Device not configured." }))
            }
            None => Reply::Json(204, Value::Null),
        }
    })
}

fn sent(server: &Server) -> Vec<Value> {
    server
        .requests()
        .into_iter()
        .filter(|request| request.method != "GET")
        .filter_map(|told| told.body)
        .collect()
}

#[test]
fn firecrackers_balloon_is_read_in_bytes_and_asked_for_in_mib_rounded_down() {
    let server = table(&[
        ("/machine-config", || json!({ "vcpu_count": 2, "mem_size_mib": 1024 })),
        ("/balloon", || json!({ "amount_mib": 300, "deflate_on_oom": true, "stats_polling_interval_s": 1 })),
        ("/balloon/statistics", || {
            json!({ "target_pages": 76800, "actual_pages": 64000, "target_mib": 300, "actual_mib": 250,
                    "available_memory": 5 << 20, "major_faults": 7, "oom_kill": 1 })
        }),
    ]);
    let mut driver = Firecracker::new(server.socket(), PATIENCE);
    let capabilities = driver.probe().unwrap();
    assert!(capabilities.has(Feature::Statistics) && !capabilities.has(Feature::FreePageReporting));
    assert_eq!(capabilities.hot_memory, []);
    let expected = Balloon {
        memory: ByteCount(GIB),
        target: Some(ByteCount::mib(300)),
        actual: Some(ByteCount::mib(250)),
    };
    assert_eq!(driver.balloon().unwrap(), expected);
    let said = driver.statistics().unwrap();
    assert_eq!(
        (said.available, said.major_faults, said.oom_kills),
        (Some(ByteCount::mib(5)), Some(7), Some(1))
    );
    assert_eq!((said.age, said.free), (None, None));
    driver.set_balloon(ByteCount(ByteCount::mib(301).0 - 1)).unwrap();
    assert_eq!(sent(&server), [json!({ "amount_mib": 300 })]);
}

#[test]
fn a_firecracker_machine_without_devices_has_no_capabilities_and_says_so() {
    let server = table(&[]);
    let mut driver = Firecracker::new(server.socket(), PATIENCE);
    let capabilities = driver.probe().unwrap();
    assert_eq!((capabilities.balloon, capabilities.hot_memory), (None, Vec::new()));
    let refused = driver.set_balloon(ByteCount(0)).and_then(|()| driver.statistics().map(drop)).unwrap_err();
    assert!(
        refused.to_string().ends_with("refused GET /balloon/statistics: Device not configured."),
        "{refused}"
    );
}

#[test]
fn sizes_in_mib_that_do_not_fit_are_garbage() {
    let server = table(&[
        ("/machine-config", || json!({ "vcpu_count": 2, "mem_size_mib": u64::MAX })),
        ("/balloon", || json!({ "amount_mib": 0, "deflate_on_oom": true })),
    ]);
    let error = Firecracker::new(server.socket(), PATIENCE).balloon().unwrap_err();
    assert!(matches!(error, ControlError::Garbage { .. }), "{error}");
}

#[test]
fn hinting_is_running_until_the_guest_has_told_all() {
    for (status, expected) in [
        (json!({ "host_cmd": 0 }), Hinting::Stopped),
        (json!({ "host_cmd": 3 }), Hinting::Running),
        (json!({ "host_cmd": 3, "guest_cmd": 3 }), Hinting::Running),
        (json!({ "host_cmd": 3, "guest_cmd": 0 }), Hinting::Done),
        (json!({ "host_cmd": 1, "guest_cmd": 0 }), Hinting::Done),
    ] {
        let server = Server::start(move |_| Reply::Json(200, status.clone()));
        assert_eq!(Firecracker::new(server.socket(), PATIENCE).hinting().unwrap(), expected);
    }
}

#[test]
fn firecrackers_hot_memory_is_requested_in_whole_blocks_within_its_size() {
    let server = table(&[("/hotplug/memory", || {
        json!({ "total_size_mib": 1024, "slot_size_mib": 128, "block_size_mib": 2, "plugged_size_mib": 64,
                "requested_size_mib": 128 })
    })]);
    let mut driver = Firecracker::new(server.socket(), PATIENCE);
    let expected = HotMemory {
        id: HotMemoryId("virtio-mem".into()),
        method: HotplugMethod::VirtioMem,
        block: ByteCount::mib(2),
        maximum: Some(ByteCount(GIB)),
        requested: ByteCount::mib(128),
        plugged: Some(ByteCount::mib(64)),
    };
    assert_eq!(driver.hot_memory().unwrap(), std::slice::from_ref(&expected));
    for size in [ByteCount::mib(1025), ByteCount::mib(3), ByteCount(1)] {
        let error = driver.request_hot_memory(&expected.id, size).unwrap_err();
        assert!(matches!(error, ControlError::OutOfRange { .. }), "{error}");
    }
    driver.request_hot_memory(&expected.id, ByteCount(0)).unwrap();
    assert_eq!(sent(&server), [json!({ "requested_size_mib": 0 })]);
}

#[test]
fn cloud_hypervisors_balloon_is_what_is_missing_of_all_its_memory() {
    let server = table(&[("/api/v1/vm.info", || {
        json!({
            "state": "Running", "memory_actual_size": 4 * GIB - 123_456_789,
            "config": { "payload": {}, "balloon": { "size": GIB / 2, "free_page_reporting": true },
                        "memory": { "size": 0, "zones": [
                            { "id": "a", "size": 2 * GIB, "hotplug_size": 2 * GIB, "hotplugged_size": GIB },
                            { "id": "b", "size": GIB } ] } }
        })
    })]);
    let mut driver = CloudHypervisor::new(server.socket(), PATIENCE);
    let expected = Balloon {
        memory: ByteCount(4 * GIB),
        target: Some(ByteCount(GIB / 2)),
        actual: Some(ByteCount(123_456_789)),
    };
    assert_eq!(driver.balloon().unwrap(), expected);
    let capabilities = driver.probe().unwrap();
    assert!(capabilities.has(Feature::FreePageReporting) && !capabilities.has(Feature::Statistics));
    let [zone] = &capabilities.hot_memory[..] else { panic!("{capabilities:?}") };
    assert_eq!((&*zone.id.0, zone.requested, zone.plugged), ("zone:a", ByteCount(GIB), None));
    driver.set_balloon(ByteCount(GIB + 4097)).unwrap();
    driver.request_hot_memory(&HotMemoryId("zone:a".into()), ByteCount::mib(512)).unwrap();
    let expected =
        [json!({ "desired_balloon": GIB + 4096 }), json!({ "id": "a", "desired_ram": 2 * GIB + GIB / 2 })];
    assert_eq!(sent(&server), expected);
}

#[test]
fn memory_modules_are_added_to_what_was_there_first_and_never_taken_out() {
    // The VMM folds what was added into the size, as the real one does.
    let mut size = GIB;
    let server = Server::start(move |request| match &request.body {
        Some(body) => {
            size = body["desired_ram"].as_u64().unwrap();
            Reply::Json(204, Value::Null)
        }
        None => Reply::Json(
            200,
            json!({ "state": "Running", "config": { "payload": {}, "memory": { "size": size,
                    "hotplug_method": "Acpi", "hotplug_size": 2 * GIB } } }),
        ),
    });
    let mut driver = CloudHypervisor::new(server.socket(), PATIENCE);
    let id = HotMemoryId("memory".into());
    for _ in 0..2 {
        driver.request_hot_memory(&id, ByteCount::mib(256)).unwrap();
    }
    assert_eq!(driver.hot_memory().unwrap()[0].requested, ByteCount::mib(256));
    let error = driver.request_hot_memory(&id, ByteCount(0)).unwrap_err();
    assert!(matches!(error, ControlError::Unsupported { .. }), "{error}");
    assert_eq!(sent(&server), vec![json!({ "desired_ram": GIB + GIB / 4 }); 2]);
}

#[test]
fn more_memory_left_than_there_is_is_garbage() {
    let server = table(&[("/api/v1/vm.info", || {
        json!({ "state": "Running", "memory_actual_size": 2 * GIB,
                "config": { "payload": {}, "balloon": { "size": 0 }, "memory": { "size": GIB } } })
    })]);
    let error = CloudHypervisor::new(server.socket(), PATIENCE).balloon().unwrap_err();
    assert!(
        matches!(error, ControlError::Garbage { .. }) && error.to_string().contains("2G left of 1G"),
        "{error}"
    );
}
