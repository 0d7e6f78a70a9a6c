//! The kernel takes guests' memory again and again, from outside, while they verify it.
use crate::common::{PATIENCE, alone, ask, can, options, page_out, swap, sweep};
use plimsoll_stock::{Backing, Command, Guest, Libvirt, Options};
use plimsoll_sys::procfs;
use plimsoll_types::{ByteCount, PageCount};
use std::time::{Duration, Instant};

const PAGES: u64 = 12_000;
const ROUNDS: u64 = 100;
/// Verified operations between two rounds, at least.
const OPERATIONS: u64 = 20;

/// A hundred times: everything goes, the guest comes back to it. In the end all of it must be right.
fn survive(guest: &mut Guest) {
    ask(guest, Command::Alloc { pages: PAGES });
    ask(guest, Command::Hot { pages: 1000, per_second: 1000 });
    ask(guest, Command::Disk { per_second: 200 });
    let full = procfs::statm(guest.process()).unwrap().resident;
    let start = Instant::now();
    let mut last = guest.console().report(PATIENCE).unwrap();
    let (mut least, mut slowest) = (full, Duration::ZERO);
    for round in 0..ROUNDS {
        page_out(guest);
        least = least.min(procfs::statm(guest.process()).unwrap().resident);
        let asked = Instant::now();
        ask(guest, Command::Ping);
        slowest = slowest.max(asked.elapsed());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = guest.console().report(PATIENCE).unwrap();
            assert_eq!(now.wrong, 0, "round {round}: {:?}", guest.console().wrongs());
            if now.operations >= last.operations + OPERATIONS && now.disk_reads > last.disk_reads {
                last = now;
                break;
            }
            assert!(Instant::now() < deadline, "round {round}: the guest stands still: {now:?}");
        }
    }
    assert_eq!(sweep(guest), 0, "{:?}", guest.console().wrongs());
    println!(
        "{ROUNDS} rounds in {:.1} s: {} resident before, at least {} during; {} operations, {} blocks read, {} written; \
         slowest answer {} ms",
        start.elapsed().as_secs_f64(),
        full.bytes(),
        least.bytes(),
        last.operations,
        last.disk_reads,
        last.disk_writes,
        slowest.as_millis()
    );
    // The guest's kernel, its pages and its buffers are more than half of what there was.
    assert!(least < PageCount(full.0 / 2), "{least} of {full}: nothing was taken");
}

fn survives(options: Options) {
    if !can(&["qemu", "cloud-kernel", "root", "zram"]) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    survive(&mut Guest::start(options).unwrap());
}

#[test]
fn a_plain_guest_survives_being_paged_out() {
    survives(options(21));
}

#[test]
fn a_guest_in_a_memfd_survives_being_paged_out() {
    let mut options = options(22);
    options.nodes.iter_mut().for_each(|node| node.backing = Backing::Memfd);
    survives(options);
}

#[test]
fn a_guest_of_libvirts_survives_being_paged_out() {
    if !can(&["qemu", "libvirt", "cloud-kernel", "root", "zram"]) {
        return;
    }
    let _alone = alone();
    let libvirt = Libvirt::start().unwrap();
    let _swap = swap(ByteCount::mib(512));
    survive(&mut Guest::start_domain(&libvirt, options(23)).unwrap());
}
