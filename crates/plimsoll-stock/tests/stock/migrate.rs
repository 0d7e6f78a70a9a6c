//! A guest moves from one QEMU to another while its memory is taken, at the source before and at the target after.
use crate::common::{PATIENCE, alone, ask, can, options, page_out, swap, sweep};
use plimsoll_stock::{Command, Guest};
use plimsoll_types::ByteCount;
use std::time::{Duration, Instant};

const PAGES: u64 = 12_000;

/// Lets the guest do so many operations more, paging it out all the while.
fn work_on(guest: &mut Guest, operations: u64) {
    let goal = guest.console().report(PATIENCE).unwrap().operations + operations;
    let deadline = Instant::now() + PATIENCE;
    loop {
        page_out(guest);
        let report = guest.console().report(PATIENCE).unwrap();
        assert_eq!(report.wrong, 0, "{:?}", guest.console().wrongs());
        if report.operations >= goal {
            return;
        }
        assert!(Instant::now() < deadline, "{report:?}");
    }
}

#[test]
fn a_guest_moves_while_it_is_paged_out() {
    if !can(&["qemu", "cloud-kernel", "root", "zram"]) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let mut options = options(31);
    options.work = vec![Command::Alloc { pages: PAGES }];
    let mut source = Guest::start(options.clone()).unwrap();
    assert_eq!(sweep(&mut source), 0);
    ask(&mut source, Command::Hot { pages: 500, per_second: 300 });
    ask(&mut source, Command::Disk { per_second: 100 });
    work_on(&mut source, 200);

    let mut target = Guest::await_migration(options).unwrap();
    let before = source.console().report(PATIENCE).unwrap();
    // Asked of the one and, unless it is very quick, answered by the other.
    source.migrate_to(&target).unwrap();
    let (start, mut rounds) = (Instant::now(), 0);
    while !source.has_migrated(Duration::from_millis(20)).unwrap() {
        page_out(&source);
        rounds += 1;
        assert!(start.elapsed() < PATIENCE, "still moving after {rounds} rounds");
    }
    println!("moved in {:.1} s, paged out {rounds} times meanwhile", start.elapsed().as_secs_f64());
    assert!(rounds > 0, "it moved too fast for this test: give it more memory");
    drop(source);

    let after = target.console().report(PATIENCE).unwrap();
    assert!(after.operations > before.operations && after.wrong == 0, "{before:?} {after:?}");
    work_on(&mut target, 400);
    assert_eq!(sweep(&mut target), 0, "{:?}", target.console().wrongs());
}
