//! A machine moves from one QEMU to another while it is managed.
use crate::manager::{Manager, PATIENCE, STOCK, alone, ask, bytes, can, swap, sweep};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::json;
use std::time::Instant;

/// Waits until the migration is so far.
fn wait_for(source: &mut Guest, status: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = source.monitor().unwrap().call("query-migrate", &json!({})).unwrap();
        if answer["status"] == status {
            return;
        }
        assert!(Instant::now() < deadline, "it never came to {status}: {answer}");
    }
}

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
    // It waits, copied and stopped, until it is told to go on.
    let monitor = source.monitor().unwrap();
    let waits = json!({ "capabilities": [{ "capability": "pause-before-switchover", "state": true }] });
    monitor.call("migrate-set-capabilities", &waits).unwrap();
    source.migrate_to(&target).unwrap();
    manager.until("the migration to be noticed", |line| {
        line["event"] == "note" && line["text"].as_str().is_some_and(|text| text.contains("migrated"))
    });
    wait_for(&mut source, "pre-switchover");
    let go_on = json!({ "state": "pre-switchover" });
    source.monitor().unwrap().call("migrate-continue", &go_on).unwrap();
    assert!(source.has_migrated(PATIENCE).unwrap());
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
