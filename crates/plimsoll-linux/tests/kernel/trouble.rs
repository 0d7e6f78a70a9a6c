//! Machines that cannot be managed, or not as wanted: what is said, and that nothing else happens.
use crate::guest::Started;
use crate::steady::{PATIENCE, attach};
use crate::{Outcome, no_other_swap, outcome, swap};
use plimsoll_linux::cgroup::{MemoryCgroup, Swappiness};
use plimsoll_linux::kernel::{KernelError, KernelMachine};
use plimsoll_linux::reclaimer::{Reclaimer, Short};
use plimsoll_sys::pidfd::{Pidfd, Signal};
use plimsoll_sys::process::{GroupId, UserId, drop_privileges};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva, PageCount};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const ALL: PageCount = PageCount(u64::MAX);
/// The first argument of a process that tries to attach without rights.
pub(crate) const ROLE: &str = "attach-without-rights";

fn is_gone<T: std::fmt::Debug>(result: Result<T, KernelError>) -> bool {
    matches!(result, Err(KernelError::ProcessGone(_)))
}

fn assert_gone(machine: &mut KernelMachine) {
    assert!(machine.is_gone().unwrap());
    assert!(is_gone(machine.tick(Instant::now())));
    assert!(is_gone(machine.reclaim(ALL, Instant::now())));
    assert!(is_gone(machine.usage()) && is_gone(machine.collapse_hot(1)));
}

pub(crate) fn ends() -> Outcome {
    outcome(|| {
        let mut guest = Started::new("private", 8);
        let process = guest.process();
        let mut machine = attach(&mut guest);
        assert!(!machine.is_gone().unwrap());
        guest.kill();
        assert_gone(&mut machine);
        let attached = KernelMachine::attach(process, vec![guest.ram], 1, Instant::now());
        assert!(is_gone(attached));
        Ok(())
    })
}

pub(crate) fn executes() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(64))?;
        let mut guest = Started::new("private", 8);
        let mut machine = attach(&mut guest);
        machine.tick(Instant::now()).unwrap();
        guest.tell("exec");
        let deadline = Instant::now() + PATIENCE;
        while !machine.is_gone().unwrap() {
            assert!(Instant::now() < deadline, "the other program is not noticed");
            std::thread::yield_now();
        }
        assert!(guest.process().is_alive().unwrap(), "the process itself goes on");
        assert_gone(&mut machine);
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}

pub(crate) fn stopped() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(64))?;
        let mut guest = Started::new("private", 16);
        let mut machine = attach(&mut guest);
        guest.process().send_signal(Signal::STOP).unwrap();
        machine.tick(Instant::now()).unwrap();
        let got = machine.reclaim(ALL, Instant::now()).unwrap();
        assert!(matches!(got.short, Some(Short::NothingLeft | Short::InUse)), "{got:?}");
        // Pages the stopped process touched last still wait in its CPU's batch for the kernel's lists.
        assert!(machine.usage().unwrap().resident < PageCount(64), "{:?}", machine.usage());
        guest.process().send_signal(Signal::CONT).unwrap();
        assert_eq!(guest.number("verify"), 0);
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}

pub(crate) fn locked() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(64))?;
        let mut guest = Started::new("private", 32);
        guest.ask("lock");
        let mut machine = attach(&mut guest);
        let got = machine.reclaim(ALL, Instant::now()).unwrap();
        println!("{got:?}");
        assert_eq!(got.taken, PageCount(0));
        let Some(Short::Held { pages }) = got.short else { panic!("{got:?}") };
        assert!(pages.0 >= 1024, "{pages}");
        // What cannot be taken counts as used.
        machine.tick(Instant::now()).unwrap();
        machine.tick(Instant::now()).unwrap();
        assert_eq!(machine.working_set(), Some(guest.ram.len().pages_floor()));
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}

pub(crate) fn no_swap() -> Outcome {
    outcome(|| {
        no_other_swap()?;
        let mut guest = Started::new("huge", 16);
        let huge = || plimsoll_sys::procfs::smaps_rollup(guest.id()).unwrap().anon_huge_pages;
        let before = huge();
        let process = Pidfd::open(guest.id()).unwrap();
        let mut machine = KernelMachine::attach(process, vec![guest.ram], 1, Instant::now()).unwrap();
        let got = machine.reclaim(ALL, Instant::now()).unwrap();
        assert_eq!((got.taken, &got.short), (PageCount(0), &Some(Short::NoSwap)));
        println!("{}", got.short.unwrap());
        for _ in 0..3 {
            let tick = machine.tick(Instant::now()).unwrap();
            assert_eq!((tick.sampled, tick.short), (PageCount(0), Some(Short::NoSwap)));
        }
        assert_eq!(machine.working_set(), None, "nothing is claimed without samples");
        assert_eq!(huge(), before, "no huge page was split in vain");
        assert_eq!(guest.number("verify"), 0);
        Ok(())
    })
}

/// Somebody takes the swap away in which the machine's pages are: all of them are read back, and none was touched.
pub(crate) fn withdrawn() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(256))?;
        let mut guest = Started::new("private", 64);
        let mut machine = attach(&mut guest);
        for _ in 0..4 {
            machine.tick(Instant::now()).unwrap();
        }
        let used = machine.working_set();
        let all = guest.ram.len().pages_floor();
        assert!(used.is_some_and(|used| used.0 < all.0 / 8), "{used:?} of an idle guest");
        let deadline = Instant::now() + PATIENCE;
        while machine.usage().unwrap().resident.0 > 64 {
            assert!(Instant::now() < deadline, "{:?}", machine.usage());
            machine.reclaim(ALL, Instant::now()).unwrap();
        }
        machine.tick(Instant::now()).unwrap();
        swap.remove().unwrap();
        assert_eq!(machine.usage().unwrap().resident, all);
        let tick = machine.tick(Instant::now()).unwrap();
        println!("{tick:?}; uses {:?} of {all}, {used:?} before", machine.working_set());
        assert_eq!((tick.judged, tick.used), (0, 0));
        assert!(machine.working_set() <= used);
        assert_eq!(guest.number("verify"), 0);
        Ok(())
    })
}

pub(crate) fn full_swap() -> Outcome {
    outcome(|| {
        no_other_swap()?;
        let swap = swap(ByteCount::mib(8))?;
        let mut guest = Started::new("private", 32);
        let mut machine = attach(&mut guest);
        let got = machine.reclaim(ALL, Instant::now()).unwrap();
        println!("{got:?}");
        assert!(matches!(got.short, Some(Short::SwapFull { .. })), "{got:?}");
        assert!(got.taken >= ByteCount::mib(6).pages_floor() && got.taken <= ByteCount::mib(8).pages_floor());
        assert_eq!(machine.usage().unwrap().elsewhere, got.taken, "what is counted is gone");
        assert_eq!(guest.number("verify"), 0);
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}

pub(crate) fn forbidden() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(64))?;
        let cgroup = match MemoryCgroup::create("plimsoll-test-forbid", ProcessId::own()) {
            Ok(cgroup) => cgroup,
            Err(error) => return Err(Outcome::Skipped("cgroup", error.to_string())),
        };
        if let Err(error) = cgroup.set_swappiness(Swappiness::new(0).unwrap()) {
            return Err(Outcome::Skipped("cgroup v1", error.to_string()));
        }
        let mut guest = Started::new("private", 16);
        cgroup.enter(guest.id()).unwrap();
        let mut machine = attach(&mut guest);
        let got = machine.reclaim(ALL, Instant::now()).unwrap();
        let Some(Short::CgroupForbidsSwap { cgroup: path }) = &got.short else { panic!("{got:?}") };
        assert_eq!((got.taken, path.as_path()), (PageCount(0), cgroup.path()));
        assert_eq!(machine.usage().unwrap().elsewhere, PageCount(0));
        cgroup.set_swappiness(Swappiness::new(60).unwrap()).unwrap();
        assert!(machine.reclaim(ALL, Instant::now()).unwrap().taken.0 > 0);
        guest.kill();
        cgroup.remove().unwrap();
        swap.remove().unwrap();
        Ok(())
    })
}

/// Drops its rights and tries to attach to the process, which is root's.
pub(crate) fn role(process: &str) -> ExitCode {
    drop_privileges(UserId::new(65_534).unwrap(), GroupId::new(65_534).unwrap()).unwrap();
    let process = Pidfd::open(ProcessId::new(process.parse().unwrap()).unwrap()).unwrap();
    let range = HvaRange::new(Hva(1 << 30), ByteCount::mib(2)).unwrap();
    let error = KernelMachine::attach(process, vec![range], 1, Instant::now()).unwrap_err();
    println!("{error}");
    if matches!(error, KernelError::Permission(_)) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

pub(crate) fn unprivileged() -> Outcome {
    if !rustix::process::geteuid().is_root() {
        return Outcome::Skipped("root", "this process has no rights to drop".to_owned());
    }
    let guest = Started::new("private", 2);
    let output = Command::new(std::env::current_exe().unwrap())
        .args([ROLE, &guest.id().get().to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("CAP_SYS_PTRACE") && said.contains("CAP_SYS_NICE"), "{said}");
    Outcome::Passed
}

pub(crate) fn paced() -> Outcome {
    outcome(|| {
        let swap = swap(ByteCount::mib(256))?;
        let mut guest = Started::new("private", 128);
        let mut machine = attach(&mut guest);
        let now = Instant::now();
        let rate = machine.rate();
        let got = machine.reclaim(ALL, now).unwrap();
        assert_eq!(got.short, Some(Short::Paced { rate }));
        assert!(got.taken >= rate && got.taken.0 < rate.0 + 512, "{got:?}");
        let got = machine.reclaim(ALL, now).unwrap();
        assert_eq!((got.taken, got.short), (PageCount(0), Some(Short::Paced { rate })));
        let got = machine.reclaim(ALL, now + Duration::from_millis(500)).unwrap();
        assert!(got.taken.0 >= rate.0 / 2 && got.taken.0 < rate.0 / 2 + 512, "{got:?}");
        assert_eq!(guest.number("verify"), 0);
        // All of it came back: too fast.
        machine.tick(now + Duration::from_secs(2)).unwrap();
        assert!(machine.rate() < rate, "{}", machine.rate());
        drop(guest);
        swap.remove().unwrap();
        Ok(())
    })
}
