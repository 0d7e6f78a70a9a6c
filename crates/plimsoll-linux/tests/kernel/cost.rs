//! What being managed costs the guest, and managing costs the host.
use crate::guest::Started;
use crate::steady::attach;
use crate::{Outcome, outcome, swap};
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_linux::kernel::{KernelMachine, PERIOD};
use plimsoll_linux::reclaimer::Reclaimer;
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_sys::process_memory::{Advice, advise};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva, PageCount};
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// How long each of the alternating parts lasts: a period with samples, and one without.
const PART: Duration = PERIOD;
const PARTS: usize = 6;
/// What a guest that is sampled keeps of its pace at least.
const KEPT: f64 = 0.85;
/// How long this machine may be too busy to tell.
const PATIENCE: Duration = Duration::from_secs(150);

/// Operations a second while `PART` passes.
fn pace(guest: &mut Started) -> f64 {
    let (start, before) = (Instant::now(), guest.number("operations"));
    std::thread::sleep(PART);
    (guest.number("operations") - before) as f64 / start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(crate) fn throughput() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(256))?;
        let mut guest = Started::new("private", 64);
        let mut machine = attach(&mut guest);
        guest.ask("flat 8192 scattered");
        let mut ratio = || {
            let (mut with, mut without) = (Vec::new(), Vec::new());
            for _ in 0..PARTS {
                let tick = machine.tick(Instant::now()).unwrap();
                assert!(tick.short.is_none(), "{tick:?}");
                with.push(pace(&mut guest));
                without.push(pace(&mut guest));
            }
            let ratios: Vec<f64> = with.iter().zip(&without).map(|(with, without)| with / without).collect();
            println!("operations a second: {:.0} sampled, {:.0} not", median(with), median(without.clone()));
            let spread: Vec<f64> = without.windows(2).map(|pair| pair[1] / pair[0]).collect();
            let ratio = median(ratios.clone());
            println!("ratio {ratio:.3} (each: {ratios:.3?}); of the unsampled to each other {spread:.3?}");
            ratio
        };
        // What else this machine does costs one part more than the other as it pleases: it is measured until that leaves the guest alone.
        let begun = Instant::now();
        let mut found = ratio();
        while found <= KEPT && begun.elapsed() < PATIENCE {
            found = ratio();
        }
        assert!(found > KEPT, "sampling costs the guest {:.1} %", (1.0 - found) * 100.0);
        assert_eq!(guest.number("verify"), 0);
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}

/// What MADV_COLD does that MADV_PAGEOUT does not: nothing leaves by it, and what the kernel itself takes later it takes from
/// there first. Both halves of a guest that was touched from beginning to end; the younger half is advised.
pub(crate) fn cold() -> Outcome {
    const SIZE: ByteCount = ByteCount::mib(64);
    outcome(|| {
        let swap = swap(ByteCount::mib(256))?;
        let cgroup = match MemoryCgroup::create("plimsoll-cold", ProcessId::own()) {
            Err(error) => return Err(Outcome::Skipped("cgroup", error.to_string())),
            made => made.unwrap(),
        };
        let taken_from = |is_advised: bool| {
            cgroup.join_self().unwrap();
            let mut guest = Started::new("private", 64);
            cgroup.leave_self().unwrap();
            assert_eq!(guest.number("verify"), 0);
            let half = ByteCount(SIZE.0 / 2);
            let younger = HvaRange::new(Hva(guest.ram.start().0 + half.0), half).unwrap();
            let pagemap = Pagemap::open(guest.id()).unwrap();
            let present = |range| {
                let mut entries = Vec::new();
                pagemap.read(range, &mut entries).unwrap();
                entries.iter().filter(|entry| entry.contains(Entry::PRESENT)).count()
            };
            let start = Instant::now();
            if is_advised {
                assert_eq!(advise(&guest.process(), &[younger], Advice::Cold).stop, None);
            }
            let each = start.elapsed().as_nanos() / u128::from(half.pages_floor().0);
            assert_eq!(
                present(guest.ram),
                usize::try_from(SIZE.pages_floor().0).unwrap(),
                "nothing has left"
            );
            // The kernel's own reclaim takes a quarter of the guest.
            cgroup.set_limit(ByteCount(cgroup.used().unwrap().0 - SIZE.0 / 4)).unwrap();
            let gone =
                |range: HvaRange| usize::try_from(range.len().pages_floor().0).unwrap() - present(range);
            let (of_all, of_younger) = (gone(guest.ram), gone(younger));
            println!(
                "advised: {is_advised}, {each} ns a page; {of_younger} of the {of_all} taken are younger"
            );
            cgroup.set_limit(ByteCount(SIZE.0 * 4)).unwrap();
            assert_eq!(guest.number("verify"), 0);
            (of_all, of_younger)
        };
        let (_, without) = taken_from(false);
        let (all, with) = taken_from(true);
        assert!(with > without && with * 10 > all * 8, "{with} of {all}, {without} without advice");
        swap.remove().unwrap();
        Ok(())
    })
}

fn cpu() -> Duration {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(spent.tv_sec).unwrap(), u32::try_from(spent.tv_nsec).unwrap())
}

/// Machines of 64 MiB. They are parts of one process's memory: what a look costs does not depend on whose it is.
pub(crate) fn idle_fleet() -> Outcome {
    const MACHINES: u64 = 200;
    const SIZE: ByteCount = ByteCount::mib(64);
    outcome(|| {
        let swap = swap(ByteCount::mib(4096))?;
        // As many as fit into a guest of 2 GiB, each attached to several times.
        let mut guest = Started::new("private", 2048);
        let parts = guest.ram.len().0 / SIZE.0;
        let start = Instant::now();
        let part =
            |number: u64| HvaRange::new(Hva(guest.ram.start().0 + number % parts * SIZE.0), SIZE).unwrap();
        let ranges: Vec<HvaRange> = (0..MACHINES).map(part).collect();
        let attach =
            |(range, seed)| KernelMachine::attach(guest.process(), vec![range], seed, start).unwrap();
        let mut machines: Vec<KernelMachine> = ranges.into_iter().zip(0..).map(attach).collect();
        // A third of a machine stays in RAM, with nobody to use it.
        for machine in machines.iter_mut().take(usize::try_from(parts).unwrap()) {
            machine.reclaim(PageCount(SIZE.pages_floor().0 * 2 / 3), start).unwrap();
        }
        println!("{:?} after {:?}", machines[0].usage().unwrap(), start.elapsed());
        let mut run = |name: &str, from: Duration, length: Duration, is_eager: bool| {
            let (mut at, end, before, mut ticks) = (start + from, start + from + length, cpu(), 0_u32);
            while at < end {
                for machine in machines.iter_mut().filter(|machine| is_eager || machine.due() <= at) {
                    machine.tick(at).unwrap();
                    ticks += 1;
                }
                at += PERIOD;
            }
            let spent = (cpu() - before).as_secs_f64();
            let share = spent * 100.0 / length.as_secs_f64();
            println!(
                "{name}: {ticks} ticks, {:.0} us each, {share:.2} % of a processor",
                spent * 1e6 / f64::from(ticks)
            );
            share
        };
        let minute = Duration::from_secs(60);
        run("every 2 s, with pages in RAM to sample", Duration::ZERO, minute, true);
        let settling = run("with the machines' own rhythm, from the start", minute, minute, false);
        let settled = run("with the machines' own rhythm, settled", minute * 2, minute * 2, false);
        assert!(settled < 2.0, "{settled:.2} % of a processor, {settling:.2} % before");
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}
