//! Guests come up in each of the ways there are, work, and leave nothing behind.
use crate::common::{PATIENCE, alone, ask, can, options, sweep};
use plimsoll_stock::{Backing, Command, Guest, Libvirt, Merge, Node, Options};
use plimsoll_sys::process::{GroupId, UserId};
use plimsoll_sys::procfs;
use plimsoll_types::ByteCount;
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
    println!("exercised in {:.1} s", start.elapsed().as_secs_f64());
    let process = guest.process();
    let folder = guest.qmp().parent().unwrap().to_owned();
    let disk = guest.options().disk.as_ref().unwrap().path().to_owned();
    assert!(folder.exists() && disk.exists());
    drop(guest);
    assert!(procfs::status(process).is_err());
    assert!(!folder.exists() && !disk.exists());
}
