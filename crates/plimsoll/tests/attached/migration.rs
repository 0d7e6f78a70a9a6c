//! A machine moves from one QEMU to another while it is managed.
use crate::manager::{Manager, PATIENCE, STOCK, alone, ask, bytes, can, swap, sweep};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::json;
use std::time::{Duration, Instant};

#[test]
fn nothing_is_taken_while_a_machine_moves_and_taking_goes_on_where_it_arrives() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let mut options = Options::new(ByteCount::mib(192));
    options.seed = 51;
    options.work = vec![Command::Alloc { pages: 12_000 }, Command::Hot { pages: 500, per_second: 200 }];
    let mut source = Guest::start(options.clone()).unwrap();
    let pid = source.process().get().to_string();
    let qmp = source.qmp();
    let mut manager = Manager::attach(&[&pid, "--budget", "48M", "--qmp", qmp.to_str().unwrap()]);
    manager.until("something to be taken", |line| {
        line["event"] == "period" && bytes(line, "taken_pages") > 2000
    });

    let mut target = Guest::await_migration(options).unwrap();
    // Slow enough to be seen: 8 MiB a second.
    let slow = json!({ "max-bandwidth": 8 << 20 });
    source.monitor().unwrap().call("migrate-set-parameters", &slow).unwrap();
    source.migrate_to(&target).unwrap();
    let is_note = |line: &serde_json::Value| {
        line["event"] == "note" && line["text"].as_str().is_some_and(|text| text.contains("migrated"))
    };
    manager.until("the migration to be noticed", is_note);
    let start = Instant::now();
    while !source.has_migrated(Duration::from_millis(100)).unwrap() {
        assert!(start.elapsed() < PATIENCE, "it is still moving");
    }
    // Not a period in between: nothing was looked at, so nothing was taken.
    let next = manager.until("what comes next", |_| true);
    assert_eq!((&next["event"], &next["how"]), (&"ended".into(), &"migrated".into()), "{next}");
    assert!(manager.end().0.success());
    drop(source);

    let pid = target.process().get().to_string();
    let mut manager = Manager::attach(&[&pid, "--budget", "48M"]);
    manager.until("something to be taken at the target", |line| {
        line["event"] == "period" && bytes(line, "taken_pages") > 2000
    });
    ask(&mut target, Command::Ping);
    manager.interrupt();
    sweep(&mut target);
}
