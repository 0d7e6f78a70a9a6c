//! A machine is saved and brought back by its own QEMU while it is managed.
use crate::manager::{Manager, PATIENCE, STOCK, alone, ask, backed, bytes, can, swap, sweep};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Between two looks at what the machine has in swap.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What is read of a snapshot between two pauses: it takes seconds in all.
const PIECE: u64 = 256 << 10;
const PAUSE: Duration = Duration::from_millis(20);

fn options(seed: u64) -> Options {
    let mut options = Options::new(ByteCount::mib(192));
    options.seed = seed;
    options.work = vec![Command::Alloc { pages: 12_000 }, Command::Hot { pages: 500, per_second: 200 }];
    options
}

/// A manager with a monitor of its own, which has taken some of the guest.
fn squeezed(guest: &Guest) -> Manager {
    let (pid, qmp) = (guest.process().get().to_string(), guest.qmp());
    let mut manager = Manager::attach(&[&pid, "--budget", "64M", "--qmp", qmp.to_str().unwrap()]);
    takes_more(&mut manager, 2000);
    manager
}

/// Waits until so many pages more are taken, and says how many are in all.
fn takes_more(manager: &mut Manager, pages: u64) -> u64 {
    let goal = bytes(&manager.period(), "taken_pages") + pages;
    let what = format!("{goal} pages to be taken");
    bytes(
        &manager.until(&what, |line| line["event"] == "period" && bytes(line, "taken_pages") >= goal),
        "taken_pages",
    )
}

/// Waits for the manager's word that it takes nothing, and sees to it that it keeps it until `is_over`.
fn takes_nothing(
    guest: &mut Guest,
    manager: &mut Manager,
    why: &str,
    mut is_over: impl FnMut(&mut Guest) -> bool,
) {
    manager.until(why, |line| {
        line["event"] == "note" && line["text"].as_str().is_some_and(|text| text.contains(why))
    });
    let deadline = Instant::now() + PATIENCE;
    let (mut looks, mut swapped) = (0, backed(guest).1);
    while !is_over(guest) {
        let now = backed(guest).1;
        assert!(now <= swapped, "{now} are in swap where {swapped} were, after {looks} looks");
        (looks, swapped) = (looks + 1, now);
        assert!(Instant::now() < deadline, "it takes too long");
    }
    println!("{looks} looks, {swapped} in swap at last");
    assert!(looks > 3, "it was over too soon to be looked at");
}

/// Runs a job of QEMU's and waits for its end, which is no failure.
fn finish(guest: &mut Guest, id: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = guest.monitor().unwrap().call("query-jobs", &json!({})).unwrap();
        let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == id).unwrap();
        if job["status"] == "concluded" {
            assert!(job["error"].is_null(), "{job}");
            break;
        }
        assert!(Instant::now() < deadline, "it never ended: {job}");
    }
    guest.monitor().unwrap().call("job-dismiss", &json!({ "id": id })).unwrap();
}

/// Makes an image, or the file of one.
fn create_image(guest: &mut Guest, options: Value) {
    let arguments = json!({ "job-id": "create", "options": options });
    guest.monitor().unwrap().call("blockdev-create", &arguments).unwrap();
    finish(guest, "create");
}

/// Gives QEMU a disk for snapshots, which is not the guest's.
fn add_snapshot_disk(guest: &mut Guest, file: &Path) {
    create_image(guest, json!({ "driver": "file", "filename": file, "size": 0 }));
    let node = json!({ "driver": "file", "node-name": "file", "filename": file });
    guest.monitor().unwrap().call("blockdev-add", &node).unwrap();
    create_image(guest, json!({ "driver": "qcow2", "file": "file", "size": 1_u64 << 30 }));
    let disk = json!({ "driver": "qcow2", "node-name": "snapshots", "file": "file" });
    guest.monitor().unwrap().call("blockdev-add", &disk).unwrap();
}

#[test]
fn a_snapshot_that_is_saved_and_loaded_under_a_manager_is_right() {
    const SNAPSHOTS: u32 = 5;
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::start(options(71)).unwrap();
    add_snapshot_disk(&mut guest, &folder.path().join("snapshots.qcow2"));
    let mut manager = squeezed(&guest);
    for round in 0..SNAPSHOTS {
        let saved = guest.console().report(PATIENCE).unwrap();
        let tag = format!("number {round}");
        let snapshot =
            |id| json!({ "job-id": id, "tag": tag, "vmstate": "snapshots", "devices": ["snapshots"] });
        let start = Instant::now();
        guest.monitor().unwrap().call("snapshot-save", &snapshot("save")).unwrap();
        finish(&mut guest, "save");
        let took = start.elapsed();
        // Everything is written anew, and some of it taken, before what was saved replaces it.
        ask(&mut guest, Command::Fill);
        takes_more(&mut manager, 1000);
        sweep(&mut guest);
        let later = guest.console().report(PATIENCE).unwrap();
        guest.monitor().unwrap().call("snapshot-load", &snapshot("load")).unwrap();
        finish(&mut guest, "load");
        let back = guest.console().report(PATIENCE).unwrap();
        println!(
            "saved in {} ms at {} operations; {} later, {} when loaded",
            took.as_millis(),
            saved.operations,
            later.operations,
            back.operations
        );
        assert!(saved.operations <= back.operations && back.operations < later.operations);
        sweep(&mut guest);
        takes_more(&mut manager, 1000);
    }
    manager.interrupt();
    sweep(&mut guest);
}

/// Only what it does is seen: page after page comes back to its main thread, and to no other.
#[test]
fn taking_stops_during_a_snapshot_also_where_there_is_no_monitor_to_ask() {
    const READ_OUT: &str = "all of its memory seems to be read";
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::start(options(74)).unwrap();
    add_snapshot_disk(&mut guest, &folder.path().join("snapshots.qcow2"));
    let pid = guest.process().get().to_string();
    let mut manager = Manager::attach(&[&pid, "--budget", "48M"]);
    takes_more(&mut manager, 10_000);
    let snapshot =
        json!({ "job-id": "save", "tag": "one", "vmstate": "snapshots", "devices": ["snapshots"] });
    guest.monitor().unwrap().call("snapshot-save", &snapshot).unwrap();
    manager.until(READ_OUT, |line| {
        line["event"] == "note" && line["text"].as_str().is_some_and(|text| text.contains(READ_OUT))
    });
    finish(&mut guest, "save");
    takes_more(&mut manager, 1000);
    manager.interrupt();
    sweep(&mut guest);
}

/// As it is while QEMU saves or loads a snapshot, which holds its main loop.
#[test]
fn nothing_is_taken_while_the_monitor_is_silent() {
    const SILENT: &str = "nothing is taken until its monitor answers";
    const LOOKS: u32 = 100;
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let mut guest = Guest::start(options(73)).unwrap();
    let mut manager = squeezed(&guest);
    // It has one client at a time. The manager lets it go after each question, so this one's turn comes.
    let mut other = BufReader::new(UnixStream::connect(guest.qmp()).unwrap());
    other.read_line(&mut String::new()).unwrap();
    ask(&mut guest, Command::Sweep);
    let mut left = LOOKS;
    takes_nothing(&mut guest, &mut manager, SILENT, |_| {
        std::thread::sleep(LOOK_EVERY);
        left -= 1;
        left == 0
    });
    drop(other);
    takes_more(&mut manager, 1000);
    manager.interrupt();
    sweep(&mut guest);
}

#[test]
fn nothing_is_taken_during_a_background_snapshot_and_it_is_right_when_it_is_restored() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state");
    let mut guest = Guest::start(options(72)).unwrap();
    let mut manager = squeezed(&guest);

    let before = guest.console().report(PATIENCE).unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let reader = {
        let mut file = File::create(&file).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            while std::io::copy(&mut (&stream).take(PIECE), &mut file).unwrap() > 0 {
                std::thread::sleep(PAUSE);
            }
        })
    };
    guest.save_to(&socket).unwrap();
    takes_nothing(&mut guest, &mut manager, "is being migrated", |guest| {
        guest.has_migrated(LOOK_EVERY).unwrap()
    });
    takes_more(&mut manager, 1000);
    manager.interrupt();
    sweep(&mut guest);
    reader.join().unwrap();
    let after = guest.console().report(PATIENCE).unwrap();
    drop(guest);

    let mut restored = Guest::restore(options(72), &file).unwrap();
    let back = restored.console().report(PATIENCE).unwrap();
    println!(
        "{} operations before, {} after, {} restored",
        before.operations, after.operations, back.operations
    );
    assert!(before.operations <= back.operations && back.operations < after.operations);
    let pid = restored.process().get().to_string();
    let mut manager = Manager::attach(&[&pid, "--budget", "48M"]);
    takes_more(&mut manager, 1000);
    manager.interrupt();
    sweep(&mut restored);
}
