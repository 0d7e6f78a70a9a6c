//! Memory that is plugged into a machine while it is managed.
use crate::manager::{Manager, PATIENCE, STOCK, alone, can, swap, sweep};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::json;
use std::time::{Duration, Instant};

#[test]
fn memory_that_is_plugged_in_is_found_and_managed_from_then_on() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    let mut options = Options::new(ByteCount::mib(192));
    options.work = vec![Command::Alloc { pages: 8000 }];
    options.arguments = vec!["-m".to_owned(), "slots=2,maxmem=1G".to_owned()];
    let mut guest = Guest::start(options).unwrap();
    let (pid, qmp) = (guest.process().get().to_string(), guest.qmp());
    let mut manager = Manager::attach(&[&pid, "--budget", "64M", "--qmp", qmp.to_str().unwrap()]);
    let attached = manager.until("to be attached", |line| line["event"] == "attached");
    assert_eq!(attached["machine"]["size"], 192 << 20);
    manager.period();

    let backend = json!({ "qom-type": "memory-backend-ram", "id": "plugged", "size": 128 << 20 });
    guest.monitor().unwrap().call("object-add", &backend).unwrap();
    let device = json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "plugged" });
    guest.monitor().unwrap().call("device_add", &device).unwrap();
    manager.until("the new memory to be found", |line| {
        line["event"] == "note" && line["text"].as_str().is_some_and(|text| text.contains("128M of plugged"))
    });
    manager.period();
    manager.interrupt();
    sweep(&mut guest);
}

#[test]
fn a_machine_that_is_to_have_more_than_is_plugged_in_gets_it_by_virtio_mem_and_gives_it_back_in_the_end() {
    const RESERVED: ByteCount = ByteCount::mib(256);
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let mut options = Options::new(ByteCount::mib(192));
    options.seed = 71;
    options.work = vec![Command::Alloc { pages: 8000 }];
    let words = ["-m", "maxmem=1G", "-object", "memory-backend-ram,id=pool,size=256M"];
    options.arguments = words.map(str::to_owned).to_vec();
    options.devices.push("virtio-mem-pci,id=vm0,memdev=pool,requested-size=0".to_owned());
    let mut guest = Guest::start(options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("host.toml");
    let (name, qmp) = (format!("qemu-{}", guest.process().get()), guest.qmp());
    let machine = format!("[machine.{name}]\nreservation = \"256M\"\nqmp = {qmp:?}\n");
    std::fs::write(&config, format!("[host]\nmemory = \"2G\"\n{machine}")).unwrap();
    let mut manager = Manager::run("manage", &["--config", config.to_str().unwrap()]);
    let turn = manager.until("it to be managed", |line| {
        line["event"] == "turn" && line["machines"].as_array().unwrap().len() == 1
    });
    println!("{turn}");
    // What was asked for, and what the guest's own driver has plugged of it.
    let mut device = |what: &str, wanted: ByteCount| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = guest.monitor().unwrap().call("query-memory-devices", &json!({})).unwrap();
            let data = &answer[0]["data"];
            if [&data["requested-size"], &data["size"]].iter().all(|size| size.as_u64() == Some(wanted.0)) {
                return;
            }
            assert!(Instant::now() < deadline, "waited in vain for {what}: {answer}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    device("more to be plugged in", RESERVED.saturating_sub(ByteCount::mib(192)));
    manager.interrupt();
    device("it to be as it was before", ByteCount(0));
    sweep(&mut guest);
}
