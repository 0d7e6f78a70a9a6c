//! Every request is one of the description's, and every answer the description allows is understood.
use crate::PATIENCE;
use crate::description::{Description, Fullness};
use crate::server::{Reply, Request, Server};
use plimsoll_attach::control::{
    CloudHypervisor, Control, ControlError, Firecracker, HintingCommand, HotMemoryId, RunState,
};
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

const FULLNESS: [Fullness; 2] = [Fullness::Minimal, Fullness::Full];

/// Answers each request with an example of what the description promises; `edit` may make it a more sensible one.
fn conforming(description: Description, fullness: Fullness, edit: fn(&Request, &mut Value)) -> Server {
    Server::start(move |request| {
        let wrong = description.violations_of_request(&request.method, &request.path, request.body.as_ref());
        if !wrong.is_empty() {
            return Reply::Json(400, json!({ "fault_message": wrong.join(", ") }));
        }
        let Some(schema) = description.answer(&request.method, &request.path) else {
            return Reply::Json(204, Value::Null);
        };
        let mut answer = description.example(schema, fullness);
        edit(request, &mut answer);
        let wrong = description.violations(schema, &answer);
        assert_eq!(wrong, [""; 0], "the test's own answer is not schema-true");
        Reply::Json(200, answer)
    })
}

fn asked(server: &Server) -> BTreeSet<String> {
    server.requests().iter().map(|request| format!("{} {}", request.method, request.path)).collect()
}

/// All requests that are common to the drivers.
fn ask_everything(control: &mut dyn Control) -> Result<(), ControlError> {
    control.probe()?;
    control.run_state()?;
    control.pause()?;
    control.resume()?;
    control.set_balloon(ByteCount::mib(300))?;
    control.hot_memory().map(drop)
}

#[test]
fn firecrackers_requests_and_answers_are_those_of_its_description() {
    for fullness in FULLNESS {
        let server = conforming(Description::firecracker(), fullness, |request, answer| {
            if request.path == "/hotplug/memory" && answer.get("total_size_mib").is_some() {
                answer["total_size_mib"] = json!(1024);
            }
        });
        let mut driver = Firecracker::new(server.socket(), PATIENCE);
        ask_everything(&mut driver).unwrap();
        driver.balloon().unwrap();
        driver.statistics().unwrap();
        driver.statistics_interval().unwrap();
        driver.poll_statistics(Duration::from_millis(100)).unwrap();
        driver.hint(HintingCommand::Start).unwrap();
        driver.hinting().unwrap();
        driver.hint(HintingCommand::Stop).unwrap();
        assert_eq!(driver.version().unwrap(), "text");
        let mut expected = vec![
            "GET /",
            "GET /balloon",
            "GET /balloon/hinting/status",
            "GET /balloon/statistics",
            "GET /hotplug/memory",
            "GET /machine-config",
            "GET /version",
            "PATCH /balloon",
            "PATCH /balloon/hinting/start",
            "PATCH /balloon/hinting/stop",
            "PATCH /balloon/statistics",
            "PATCH /vm",
        ];
        // A status of which every field is left out is no device.
        let plugged = driver.request_hot_memory(&HotMemoryId("virtio-mem".into()), ByteCount::mib(512));
        if fullness == Fullness::Full {
            plugged.unwrap();
            expected.push("PATCH /hotplug/memory");
        } else {
            assert!(matches!(plugged, Err(ControlError::Unsupported { .. })), "{plugged:?}");
        }
        assert_eq!(asked(&server), expected.into_iter().map(ToOwned::to_owned).collect());
    }
}

#[test]
fn cloud_hypervisors_requests_and_answers_are_those_of_its_description() {
    for fullness in FULLNESS {
        let server = conforming(Description::cloud_hypervisor(), fullness, |request, answer| {
            if request.path.ends_with("vm.info") && answer["config"].get("memory").is_some() {
                let memory = &mut answer["config"]["memory"];
                memory["hotplug_method"] = json!("VirtioMem");
                memory["hotplug_size"] = json!(1 << 30);
                memory["zones"][0]["hotplug_size"] = json!(1 << 30);
            }
        });
        let mut driver = CloudHypervisor::new(server.socket(), PATIENCE);
        ask_everything(&mut driver).unwrap();
        driver.ping().unwrap();
        driver.counters().unwrap();
        let mut expected = vec![
            "GET /api/v1/vm.counters",
            "GET /api/v1/vm.info",
            "GET /api/v1/vmm.ping",
            "PUT /api/v1/vm.pause",
            "PUT /api/v1/vm.resize",
            "PUT /api/v1/vm.resume",
        ];
        let balloon = driver.balloon();
        if fullness == Fullness::Full {
            balloon.unwrap();
            driver.request_hot_memory(&HotMemoryId("memory".into()), ByteCount::mib(512)).unwrap();
            driver.request_hot_memory(&HotMemoryId("zone:text".into()), ByteCount::mib(512)).unwrap();
            expected.push("PUT /api/v1/vm.resize-zone");
        } else {
            assert!(matches!(balloon, Err(ControlError::Unsupported { .. })), "{balloon:?}");
        }
        assert_eq!(asked(&server), expected.into_iter().map(ToOwned::to_owned).collect());
    }
}

#[test]
fn every_state_of_the_descriptions_is_known() {
    let description = Description::firecracker();
    for state in description.schema("InstanceInfo")["properties"]["state"]["enum"].as_array().unwrap().clone()
    {
        let answer = json!({ "app_name": "", "id": "", "vmm_version": "", "state": state });
        let server = Server::start(move |_| Reply::Json(200, answer.clone()));
        Firecracker::new(server.socket(), PATIENCE).run_state().unwrap();
    }
    let description = Description::cloud_hypervisor();
    for state in description.schema("VmState")["enum"].as_array().unwrap().clone() {
        let answer = json!({ "state": state, "config": { "payload": {} } });
        let server = Server::start(move |_| Reply::Json(200, answer.clone()));
        let found = CloudHypervisor::new(server.socket(), PATIENCE).run_state().unwrap();
        assert_eq!(found == RunState::Running, state == "Running");
    }
}

/// Each field of each answer in turn is made something else: the driver may not need it, or it says what it found.
#[test]
fn an_answer_with_a_field_of_another_type_is_understood_or_called_garbage() {
    let requests = [
        (Description::firecracker(), "/balloon", "Balloon"),
        (Description::firecracker(), "/balloon/statistics", "BalloonStats"),
        (Description::firecracker(), "/hotplug/memory", "MemoryHotplugStatus"),
        (Description::firecracker(), "/machine-config", "MachineConfiguration"),
    ];
    let strange = [json!("text"), json!(-1), json!(1.5), json!(1e300), json!([]), json!({}), Value::Null];
    for (description, path, name) in requests {
        let whole = description.example(description.schema(name), Fullness::Full);
        let fields: Vec<String> = whole.as_object().unwrap().keys().cloned().collect();
        for (field, value) in fields.iter().flat_map(|field| strange.iter().map(move |value| (field, value)))
        {
            let (base, mut spoiled) = (Description::firecracker(), whole.clone());
            spoiled[field] = value.clone();
            let server = Server::start(move |request| {
                let schema = base.answer("GET", &request.path).expect("a documented path");
                let answer =
                    if request.path == path { spoiled.clone() } else { base.example(schema, Fullness::Full) };
                Reply::Json(200, answer)
            });
            let mut driver = Firecracker::new(server.socket(), PATIENCE);
            let outcomes = [
                driver.probe().err(),
                driver.balloon().err(),
                driver.statistics().err(),
                driver.hot_memory().err(),
            ];
            for error in outcomes.into_iter().flatten() {
                assert!(matches!(error, ControlError::Garbage { .. }), "{field} = {value}: {error}");
            }
        }
    }
}
