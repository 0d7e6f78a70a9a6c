//! Guests come up in each of the ways there are, work, and leave nothing behind.
use crate::common::{PATIENCE, alone, ask, can, options, sweep};
use plimsoll_stock::{Backing, Command, Guest, GuestError, Libvirt, Merge, Node};
use plimsoll_sys::pidfd::{Liveness, Pidfd};
use plimsoll_sys::process::{GroupId, UserId};
use plimsoll_sys::procfs;
use plimsoll_types::ByteCount;
use serde_json::json;
use std::error::Error;
use std::fs;
use std::time::Instant;

const PAGES: u64 = 10_000;

/// Fills memory, works, verifies; then looks for RAM where the guest should have it.
fn exercise(guest: &mut Guest) {
    assert_eq!(ask(guest, Command::Alloc { pages: PAGES }).get("pages"), Some(PAGES));
    ask(guest, Command::Hot { pages: 500, per_second: 400 });
    ask(guest, Command::Disk { per_second: 100 });
    let deadline = Instant::now() + PATIENCE;
    loop {
        let report = guest.console().report(PATIENCE).unwrap();
        assert_eq!(report.wrong, 0, "{:?}", guest.console().wrongs());
        if report.operations > 400 && report.disk_reads > 50 && report.disk_writes > 5 {
            assert_eq!(report.pages.0, PAGES);
            break;
        }
        assert!(Instant::now() < deadline, "{report:?}");
    }
    assert_eq!(sweep(guest), 0, "{:?}", guest.console().wrongs());
    let ram = guest.ram().unwrap();
    let sizes: Vec<ByteCount> = ram.iter().map(|range| range.len()).collect();
    assert_eq!(sizes, guest.options().nodes.iter().map(|node| node.size).collect::<Vec<_>>());
}

fn node(mib: u64, backing: Backing) -> Node {
    Node { size: ByteCount::mib(mib), backing }
}

#[test]
fn a_plain_guest_boots_works_and_leaves_nothing_behind() {
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let _alone = alone();
    let start = Instant::now();
    let mut guest = Guest::start(options(1)).unwrap();
    println!("booted in {:.1} s", start.elapsed().as_secs_f64());
    exercise(&mut guest);
    let process = guest.process();
    let folder = guest.qmp().parent().unwrap().to_owned();
    let disk = guest.options().disk.as_ref().unwrap().path().to_owned();
    assert!(folder.exists() && disk.exists());
    drop(guest);
    assert!(procfs::status(process).is_err());
    assert!(!folder.exists() && !disk.exists());
}

/// Whoever looks at it from outside would find less than it has otherwise, and the more so the slower the machine is.
#[test]
fn a_guest_that_has_started_has_the_memory_it_was_started_with() {
    const ALL: u64 = 25_000;
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let _alone = alone();
    let mut options = options(4);
    options.work = vec![Command::Alloc { pages: ALL }];
    let mut guest = Guest::start(options).unwrap();
    let backed = |guest: &Guest| procfs::smaps_rollup(guest.process()).unwrap().anonymous;
    let started = backed(&guest);
    assert_eq!(sweep(&mut guest), 0);
    let grown = backed(&guest).saturating_sub(started).pages_ceil();
    assert!(grown.0 < ALL / 10, "{grown} came after it had started");
}

#[test]
fn the_working_set_is_what_was_touched_since_the_last_report() {
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let _alone = alone();
    let mut options = options(2);
    options.work = vec![Command::Alloc { pages: PAGES }];
    let mut guest = Guest::start(options).unwrap();
    assert_eq!(sweep(&mut guest), 0);
    assert_eq!(guest.console().report(PATIENCE).unwrap().touched.0, PAGES);
    assert_eq!(guest.console().report(PATIENCE).unwrap().touched.0, 0);
    ask(&mut guest, Command::Hot { pages: 320, per_second: 2000 });
    let deadline = Instant::now() + PATIENCE;
    while guest.console().report(PATIENCE).unwrap().operations < 5000 {
        assert!(Instant::now() < deadline);
    }
    ask(&mut guest, Command::Idle);
    let touched = guest.console().report(PATIENCE).unwrap().touched.0;
    assert!(touched <= 320, "{touched}");

    let before = guest.console().report(PATIENCE).unwrap();
    ask(&mut guest, Command::Free);
    let after = guest.console().report(PATIENCE).unwrap();
    assert_eq!(after.pages.0, 0);
    let freed = after.available.saturating_sub(before.available);
    assert!(freed > ByteCount(PAGES * 4096 / 2), "{freed}");
}

#[test]
fn a_guest_refuses_more_than_it_has_and_goes_on() {
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let _alone = alone();
    let mut guest = Guest::start(options(3)).unwrap();
    for pages in [1 << 20, u64::MAX] {
        let error = guest.console().ask(Command::Alloc { pages }, PATIENCE).unwrap_err();
        assert!(error.to_string().contains("ask for fewer"), "{error}");
    }
    // Long ones are done in their order and all of them answered; a short one overtakes them.
    let long = [Command::Alloc { pages: PAGES }, Command::Alloc { pages: 7 }, Command::Sweep, Command::Free];
    let questions = long.map(|command| guest.console().send(command).unwrap());
    ask(&mut guest, Command::Ping);
    let pages = questions.map(|question| guest.console().answer(question, PATIENCE).unwrap().get("pages"));
    assert_eq!(pages, [Some(PAGES), Some(7), Some(PAGES + 7), Some(0)]);
    // Switched off, it ends by itself, and whoever asks is told at once.
    let start = Instant::now();
    guest.console().ask(Command::Off, PATIENCE).unwrap_err();
    assert_eq!(guest.pidfd().wait_exit(PATIENCE).unwrap(), Liveness::Exited);
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn memfd_and_several_nodes_are_ram_too() {
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let _alone = alone();
    for nodes in [
        vec![node(192, Backing::Memfd)],
        vec![node(96, Backing::Anonymous), node(96, Backing::Anonymous), node(64, Backing::Memfd)],
    ] {
        let mut options = options(4);
        options.nodes = nodes;
        options.merge = Merge::Off;
        exercise(&mut Guest::start(options).unwrap());
    }
}

#[test]
fn qemu_can_be_another_users() {
    if !can(&["qemu", "cloud-kernel", "root"]) {
        return;
    }
    let _alone = alone();
    let mut options = options(5);
    options.user = UserId::new(65534).zip(GroupId::new(65534));
    options.arguments = vec!["-sandbox".to_owned(), "on".to_owned()];
    let mut guest = Guest::start(options).unwrap();
    let status = procfs::status(guest.process()).unwrap();
    assert_eq!((status.uids, status.gids), ([65534; 4], [65534; 4]));
    exercise(&mut guest);
}

#[test]
fn a_guest_dies_with_the_thread_that_started_it() {
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let _alone = alone();
    let starter = std::thread::spawn(|| {
        let guest = Guest::start(options(6)).unwrap();
        let left = (Pidfd::open(guest.process()).unwrap(), guest.qmp().parent().unwrap().to_owned());
        let disk = guest.options().disk.as_ref().unwrap().path().to_owned();
        // As if the process had been killed: nothing of it is dropped.
        std::mem::forget(guest);
        (left, disk)
    });
    let ((pidfd, folder), disk) = starter.join().unwrap();
    assert_eq!(pidfd.wait_exit(PATIENCE).unwrap(), Liveness::Exited);
    fs::remove_dir_all(folder).unwrap();
    fs::remove_file(disk).unwrap();
}

#[test]
fn what_qemu_complains_about_is_in_the_error() {
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let mut options = options(7);
    options.devices.push("teapot".to_owned());
    let start = Instant::now();
    let error = Guest::start(options).unwrap_err();
    assert!(matches!(error, GuestError::NotUp { .. }), "{error}");
    assert!(error.to_string().contains("'teapot' is not a valid device model name"), "{error}");
    assert_eq!(error.source().unwrap().to_string(), "the machine has ended");
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn balloon_and_memory_added_later_are_driven_by_the_guests_own_drivers() {
    if !can(&["qemu", "cloud-kernel"]) {
        return;
    }
    let _alone = alone();
    let mut options = options(9);
    // Whole blocks of 128 MiB are what Linux adds at a time.
    let memory = ["-m", "maxmem=1G", "-object", "memory-backend-ram,id=added,size=128M"];
    options.arguments = memory.map(str::to_owned).into();
    options.devices.push("virtio-mem-pci,id=mem0,memdev=added,requested-size=0".to_owned());
    let mut guest = Guest::start(options).unwrap();
    ask(&mut guest, Command::Alloc { pages: 5000 });

    let before = guest.console().report(PATIENCE).unwrap().available;
    let added = json!({ "path": "mem0", "property": "requested-size", "value": 128 << 20 });
    guest.monitor().unwrap().call("qom-set", &added).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while guest.console().report(PATIENCE).unwrap().available < before + ByteCount::mib(64) {
        assert!(Instant::now() < deadline, "{}", guest.logs());
    }

    let target = ByteCount::mib(150).0;
    guest.monitor().unwrap().call("balloon", &json!({ "value": target })).unwrap();
    loop {
        let answer = guest.monitor().unwrap().call("query-balloon", &json!({})).unwrap();
        if answer["actual"] == target {
            break;
        }
        assert!(Instant::now() < deadline, "{answer}");
    }
    assert_eq!(sweep(&mut guest), 0, "{:?}", guest.console().wrongs());
}

#[test]
fn libvirts_guests_are_confined_and_work() {
    if !can(&["qemu", "libvirt", "cloud-kernel", "root"]) {
        return;
    }
    let _alone = alone();
    let libvirt = Libvirt::start().unwrap();
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let mut options = options(8);
        options.nodes = vec![node(192, backing)];
        let mut guest = Guest::start_domain(&libvirt, options).unwrap();
        let process = guest.process();
        let status = procfs::status(process).unwrap();
        assert_eq!(status.uids, [libvirt.user(); 4]);
        let text = fs::read_to_string(format!("/proc/{}/status", process.get())).unwrap();
        assert!(text.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"])), "{text}");
        assert!(guest.domain().is_some() && guest.monitor().is_err());
        exercise(&mut guest);
        drop(guest);
        assert!(procfs::status(process).is_err());
    }
}
