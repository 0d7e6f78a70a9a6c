//! Guests that do the same all the time: what is kept, what goes, what is believed of them.
use crate::guest::Started;
use crate::{Outcome, outcome, swap};
use plimsoll_linux::kernel::KernelMachine;
use plimsoll_linux::reclaimer::{Reclaimer, Short};
use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, PageCount};
use std::ops::Range;
use std::time::{Duration, Instant};

const ALL: PageCount = PageCount(u64::MAX);
const SEED: u64 = 42;
/// Pages of a guest of 64 MiB that are used ten times in a period.
const HOT: u64 = 4000;
const PERIOD: Duration = Duration::from_millis(500);
/// Longer than anything here takes, on a busy machine too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) fn attach(guest: &mut Started) -> KernelMachine {
    KernelMachine::attach(guest.process(), vec![guest.ram], SEED, Instant::now()).unwrap()
}

/// Sleeps to the next period, which is what the machine is told too.
fn next_period(at: &mut Instant) {
    *at += PERIOD;
    std::thread::sleep(at.saturating_duration_since(Instant::now()));
}

pub(crate) fn private() -> Outcome {
    outcome(|| again_and_again("private"))
}

pub(crate) fn memfd() -> Outcome {
    outcome(|| again_and_again("memfd"))
}

fn again_and_again(kind: &str) -> Result<(), Outcome> {
    let swap = swap(ByteCount::mib(256))?;
    let mut guest = Started::new(kind, 64);
    guest.ask(&format!("sweep {HOT} scattered 50"));
    let mut machine = attach(&mut guest);
    let mut at = Instant::now();
    let (mut refaults, mut estimates) = (Vec::new(), Vec::new());
    for round in 0..30 {
        let tick = machine.tick(Instant::now()).unwrap();
        let got = machine.reclaim(ALL, Instant::now()).unwrap();
        refaults.push(tick.refaults.0);
        estimates.extend(machine.working_set().map(|pages| pages.0));
        if round % 5 == 0 {
            let usage = machine.usage().unwrap();
            println!("{round:3}: {usage:?} {tick:?} {got:?}");
        }
        next_period(&mut at);
    }
    let mean = |values: &[u64]| values.iter().sum::<u64>() / u64::try_from(values.len()).unwrap().max(1);
    // The first request took half of the machine, which is all a second allows, hot pages among it.
    let (early, late) = (mean(&refaults[1..4]), mean(&refaults[20..]));
    let believed = mean(&estimates[estimates.len() / 3..]);
    println!("{kind}: {early} refaults a period, later {late}, of {HOT} hot pages; estimate {believed}");
    assert!(late * 4 < early, "{refaults:?}");
    assert!(believed * 5 >= HOT * 4 && believed * 5 <= HOT * 6, "{estimates:?}");
    assert!(machine.usage().unwrap().resident.0 < HOT + HOT / 4, "{:?}", machine.usage());

    guest.ask("idle");
    let deadline = Instant::now() + PATIENCE;
    let floor = ByteCount::mib(2).pages_floor();
    let mut rounds = 0;
    while machine.usage().unwrap().resident > floor {
        assert!(Instant::now() < deadline, "{:?} {:?}", machine.usage(), machine.rate());
        machine.tick(Instant::now()).unwrap();
        machine.reclaim(ALL, Instant::now()).unwrap();
        rounds += 1;
    }
    let usage = machine.usage().unwrap();
    println!("{kind}: idle after {rounds} more rounds: {usage:?}; {:?}", swap.stat().unwrap());
    assert_eq!(usage.resident + usage.elsewhere, guest.ram.len().pages_floor());
    let left = machine.reclaim(ALL, Instant::now() + Duration::from_secs(1)).unwrap().short;
    assert!(matches!(left, Some(Short::NothingLeft | Short::InUse)), "{left:?}");
    assert_eq!(guest.number("verify"), 0, "wrong words");
    assert!(machine.totals().taken > guest.ram.len().pages_floor(), "{:?}", machine.totals());
    drop(guest);
    swap.remove().unwrap();
    Ok(())
}

pub(crate) fn collapse() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(256))?;
        let mut guest = Started::new("huge", 64);
        let mut machine = attach(&mut guest);
        let huge_before = plimsoll_sys::procfs::smaps_rollup(guest.id()).unwrap().anon_huge_pages;
        machine.reclaim(ALL, Instant::now()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while machine.usage().unwrap().resident.0 > 0 {
            assert!(Instant::now() < deadline, "{:?}", machine.usage());
            machine.reclaim(ALL, Instant::now()).unwrap();
        }
        // All pages come back, one by one.
        assert_eq!(guest.number("verify"), 0);
        let usage = machine.usage().unwrap();
        assert_eq!(usage.elsewhere, PageCount(0), "{usage:?}");
        let huge = || plimsoll_sys::procfs::smaps_rollup(guest.id()).unwrap().anon_huge_pages;
        let (small, start) = (huge(), Instant::now());
        let done = machine.collapse_hot(4).unwrap();
        println!("{huge_before} huge, then {small}; {done:?} in {:?}", start.elapsed());
        // At least: the kernel makes some by itself, now and then.
        assert!(
            huge() >= small + ByteCount::mib(2 * u64::from(done.made)),
            "{small} and {done:?}: {}",
            huge()
        );
        assert_eq!(done.made + done.refused, 4);
        assert!(done.made > 0, "{done:?}");
        let rest = machine.collapse_hot(100).unwrap();
        assert!(rest.made <= 28, "{rest:?}: the other blocks, and no huge one again");
        let refused = ByteCount::mib(2 * u64::from(done.refused + rest.refused));
        assert!(huge() + refused >= guest.ram.len(), "{rest:?}: {}", huge());
        assert_eq!(guest.number("verify"), 0);
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}

/// Memory of this process in place of a guest's, so that pages of it can be given back from inside.
pub(crate) fn given_back() -> Outcome {
    const PAGES: u64 = 2048;
    outcome(|| {
        let swap = swap(ByteCount::mib(64))?;
        let memory = AnonymousMapping::new(PageCount(PAGES).bytes(), HugePages::Never).unwrap();
        let own = Pidfd::open(ProcessId::own()).unwrap();
        let mut machine = KernelMachine::attach(own, vec![memory.range()], SEED, Instant::now()).unwrap();
        let at = |page: u64| PageCount(page).bytes();
        let write = |pages: Range<u64>| pages.for_each(|page| memory.write_u64(at(page), page + 1).unwrap());
        let give = |first: u64, pages: u64| {
            let start = memory.base().checked_add(at(first).0).unwrap();
            memory.discard(HvaRange::new(start, at(pages)).unwrap()).unwrap();
        };
        let mut gone = || {
            machine.usage().unwrap();
            machine.gone()
        };
        assert_eq!(gone(), PageCount(0), "what was never there did not go");
        write(0..1000);
        assert_eq!(gone(), PageCount(0));
        give(0, 300);
        assert_eq!(gone(), PageCount(300));
        // What is paged out has not been given back.
        let got = machine.reclaim(ALL, Instant::now()).unwrap();
        assert!(got.taken >= PageCount(600), "{got:?}");
        let mut gone = || {
            machine.usage().unwrap();
            machine.gone()
        };
        assert_eq!(gone(), PageCount(300));
        // What of that goes counts as taken until it is used: too little is counted, never too much.
        give(900, 100);
        let some = gone();
        assert!((PageCount(300)..=PageCount(400)).contains(&some), "{some}");
        // What is used again is not gone any more.
        write(0..300);
        assert_eq!(gone(), some.saturating_sub(PageCount(300)));
        drop(memory);
        swap.remove().unwrap();
        Ok(())
    })
}

pub(crate) fn hot_plug() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(256))?;
        let mut guest = Started::new("private", 32);
        let half = HvaRange::new(guest.ram.start(), ByteCount::mib(16)).unwrap();
        let mut machine = KernelMachine::attach(guest.process(), vec![half], SEED, Instant::now()).unwrap();
        let got = machine.reclaim(ALL, Instant::now()).unwrap();
        assert_eq!((got.taken, got.short), (half.len().pages_floor(), Some(Short::NothingLeft)));
        machine.set_ranges(vec![guest.ram]).unwrap();
        assert_eq!(machine.ranges().collect::<Vec<_>>(), [guest.ram]);
        let usage = machine.usage().unwrap();
        assert_eq!((usage.resident, usage.elsewhere), (PageCount(4096), PageCount(4096)));
        assert!(machine.set_ranges(vec![guest.ram, half]).is_err());
        assert_eq!(machine.usage().unwrap(), usage, "as before");
        machine.set_ranges(vec![half]).unwrap();
        assert_eq!(machine.usage().unwrap().elsewhere, PageCount(4096));
        assert_eq!(guest.number("verify"), 0);
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}
