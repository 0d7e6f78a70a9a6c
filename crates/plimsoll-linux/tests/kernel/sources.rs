//! Every way this kernel has to see which pages are used, on one guest whose hot set is known.
use crate::guest::Started;
use crate::steady::attach;
use crate::{Outcome, outcome, swap};
use plimsoll_linux::kernel::Layout;
use plimsoll_linux::kernel::source::{Damon, IdleBitmap, Source, SourceError};
use plimsoll_linux::reclaimer::Reclaimer;
use plimsoll_linux::system::Linux;
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_sys::procfs::major_faults;
use plimsoll_types::{ByteCount, PageCount};
use std::time::{Duration, Instant};

/// Pages of a guest of 64 MiB that are used forty times in a period.
const HOT: u64 = 4000;
const PERIOD: Duration = Duration::from_secs(2);
const PERIODS: u64 = 4;

pub(crate) fn compare() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(256))?;
        let mut guest = Started::new("private", 64);
        guest.ask(&format!("sweep {HOT} scattered 50"));
        let layout = Layout::new(vec![guest.ram]).unwrap();
        let mut taking = attach(&mut guest);
        taking.ignore_idle_flags();
        let mut sources: Vec<(Box<dyn Source>, u64)> = vec![(Box::new(taking), 20)];
        match IdleBitmap::open(guest.id(), &layout) {
            Ok(idle) => {
                let watching = attach(&mut guest);
                assert!(watching.has_idle_flags());
                sources.push((Box::new(watching), 20));
                sources.push((Box::new(idle), 35));
            }
            Err(error @ SourceError::NotTracked) => {
                println!("the source of idle flags is not compared: {error}")
            }
            Err(error) => panic!("{error}"),
        }
        // Its settings are the whole kernel's, so somebody has to say that they may be changed; regions tell no single pages.
        if std::env::var_os("PLIMSOLL_DAMON").is_none() {
            println!("DAMON is not compared: PLIMSOLL_DAMON is not set");
        } else {
            match Damon::open(&Linux, guest.id(), &layout) {
                Ok(damon) => sources.push((Box::new(damon), 400)),
                Err(error) => println!("DAMON is not compared: {error}"),
            }
        }
        for (source, tolerance) in &mut sources {
            let mut sum = 0;
            for _ in 0..PERIODS {
                source.begin().unwrap();
                // The period itself: what is measured is what the guest does in it.
                std::thread::sleep(PERIOD);
                let used = source.end().unwrap().unwrap();
                println!("{}: {used}", source.name());
                sum += used.0;
            }
            let mean = sum / PERIODS;
            println!("{}: {} of {HOT} pages", source.name(), PageCount(mean));
            assert!(mean.abs_diff(HOT) * 100 <= HOT * *tolerance, "{}: {mean}", source.name());
        }
        if std::env::var_os("PLIMSOLL_DAMON").is_some() {
            drop(std::mem::take(&mut sources));
            hints_spare_the_hot_set(&mut guest, &layout);
        }
        // Why there is no source by physical regions: see the documentation of `source`.
        guest.ask("idle");
        let mut machine = attach(&mut guest);
        machine.reclaim(guest.ram.len().pages_floor(), Instant::now()).unwrap();
        assert_eq!(guest.number("verify"), 0);
        let frames = Pagemap::open(guest.id()).unwrap().frames(guest.ram).unwrap();
        let mut frames: Vec<u64> = frames.into_iter().flatten().map(|frame| frame.0).collect();
        frames.sort_unstable();
        let runs = frames.chunk_by(|one, next| one + 1 == *next).count();
        println!("{} frames lie in {runs} runs", frames.len());
        drop((guest, sources, machine));
        swap.remove().unwrap();
        Ok(())
    })
}

/// A third of a machine goes, whose hot set lies together at the machine's beginning, where taking begins.
fn hints_spare_the_hot_set(guest: &mut Started, layout: &Layout) {
    let damon = match Damon::open(&Linux, guest.id(), layout) {
        Ok(damon) => damon,
        Err(error) => return println!("DAMON gives no hints: {error}"),
    };
    guest.ask(&format!("sweep {HOT} together 20"));
    let without = faults_of_taking(guest, &[]);
    damon.start().unwrap();
    let pages = layout.pages().0;
    let mut used = Vec::new();
    // It begins with ten regions and splits them from second to second.
    for _ in 0..30 {
        std::thread::sleep(PERIOD);
        used = damon.used().unwrap();
        let seen: u64 = used.iter().map(|range| range.len().pages_ceil().0).sum();
        println!("DAMON: {seen} of {pages} pages lie in used regions");
        if (HOT * 9 / 10..pages / 2).contains(&seen) {
            break;
        }
    }
    let with = faults_of_taking(guest, &used);
    println!("of a third of the machine {without} pages came back, with DAMON's hints {with}");
    assert!(with * 4 < without, "{with} of {without}");
}

/// Takes a third of the machine, and counts what comes back. All of it is in RAM before and after.
fn faults_of_taking(guest: &mut Started, used: &[HvaRange]) -> u64 {
    assert_eq!(guest.number("verify"), 0);
    let mut machine = attach(guest);
    machine.heed(used);
    let wanted = PageCount(guest.ram.len().pages_floor().0 / 3);
    let before = major_faults(guest.id()).unwrap();
    let mut taken = PageCount(0);
    // Two minutes at most, at the pace that is allowed.
    for _ in 0..2400 {
        taken += machine.reclaim(wanted.saturating_sub(taken), Instant::now()).unwrap().taken;
        if taken >= wanted {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(taken >= wanted, "{taken} of {wanted}");
    std::thread::sleep(PERIOD);
    let faults = major_faults(guest.id()).unwrap() - before;
    assert_eq!(guest.number("verify"), 0);
    faults
}
