//! Memory that is plugged into a machine while it is managed.
use crate::manager::{Manager, STOCK, alone, can, swap, sweep};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::json;

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
