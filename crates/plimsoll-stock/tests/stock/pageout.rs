//! The kernel takes guests' memory again and again, from outside, while they verify it.
use crate::common::{PATIENCE, alone, ask, can, options, page_out, swap, sweep};
use plimsoll_stock::{Backing, Command, Guest, Libvirt, Options};
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_types::{ByteCount, PageCount};
use std::time::{Duration, Instant};

const PAGES: u64 = 12_000;
const ROUNDS: u64 = 100;
/// Verified operations between two rounds, at least.
const OPERATIONS: u64 = 40;
/// Of so many rounds, one verifies all of memory.
const SWEEP_EVERY: u64 = 10;

/// The pages of guest RAM that are in the host's memory.
fn present(guest: &Guest) -> PageCount {
    let pagemap = Pagemap::open(guest.process()).unwrap();
    let mut entries = Vec::new();
    let mut pages = 0;
    for range in guest.ram().unwrap() {
        pagemap.read(range, &mut entries).unwrap();
        pages += entries.iter().filter(|entry| entry.contains(Entry::PRESENT)).count() as u64;
    }
    PageCount(pages)
}

/// A hundred times: everything goes, the guest comes back to it. In the end all of it must be right.
fn survive(guest: &mut Guest) {
    ask(guest, Command::Alloc { pages: PAGES });
    ask(guest, Command::Hot { pages: 1000, per_second: 1000 });
    ask(guest, Command::Disk { per_second: 200 });
    let start = Instant::now();
    let full = present(guest);
    let mut last = guest.console().report(PATIENCE).unwrap();
    let (mut taken, mut most_left, mut slowest) = (PageCount(0), PageCount(0), Duration::ZERO);
    for round in 0..ROUNDS {
        let before = present(guest);
        page_out(guest);
        let left = present(guest);
        taken += before.saturating_sub(left);
        most_left = most_left.max(left);
        let asked = Instant::now();
        ask(guest, Command::Ping);
        slowest = slowest.max(asked.elapsed());
        if round % SWEEP_EVERY == 0 {
            assert_eq!(sweep(guest), 0, "{:?}", guest.console().wrongs());
        }
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
        "{ROUNDS} rounds in {:.1} s: {} present before, at most {} after one, {} taken in all; {} operations, {} blocks read, {} \
         written; slowest answer {} ms",
        start.elapsed().as_secs_f64(),
        full.bytes(),
        most_left.bytes(),
        taken.bytes(),
        last.operations,
        last.disk_reads,
        last.disk_writes,
        slowest.as_millis()
    );
    // What it works with while the kernel takes it comes back at once; all the rest must be gone each time.
    assert!(most_left < PageCount(full.0 / 2), "{most_left} of {full} were left");
    assert!(taken > PageCount(PAGES * ROUNDS / SWEEP_EVERY), "{taken} were taken");
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
