//! What the daemon's two processes may do, by what the kernel says of them while they run.
use super::daemon::{Directory, kill_manager, manager_of, start, wait_for_another};
use super::run::can;
use plimsoll_host::daemon::rights::table::{KEPT, set};
use plimsoll_sys::process::CapabilitySet;
use rustix::process::Signal;
use std::fs;
use std::path::PathBuf;

/// What a thread may do.
#[derive(Debug, PartialEq, Eq)]
struct Rights {
    effective: CapabilitySet,
    permitted: CapabilitySet,
    bounding: CapabilitySet,
    inheritable: CapabilitySet,
    ambient: CapabilitySet,
    is_held_down: bool,
    filters: u64,
}

fn rights_of(thread: &str) -> Option<Rights> {
    let text = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let value = |name: &str| Some(text.lines().find_map(|line| line.strip_prefix(name))?.trim_start());
    let number = |name, radix| u64::from_str_radix(value(name)?, radix).ok();
    let set = |name| number(name, 16).map(CapabilitySet::from_bits_retain);
    Some(Rights {
        effective: set("CapEff:")?,
        permitted: set("CapPrm:")?,
        bounding: set("CapBnd:")?,
        inheritable: set("CapInh:")?,
        ambient: set("CapAmb:")?,
        is_held_down: number("NoNewPrivs:", 10)? == 1,
        filters: number("Seccomp_filters:", 10)?,
    })
}

/// What each thread of a process may do.
fn threads(pid: u32) -> Vec<Rights> {
    let threads: Vec<PathBuf> =
        fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|thread| thread.unwrap().path()).collect();
    // One that has ended meanwhile may do nothing.
    threads
        .iter()
        .filter_map(|thread| rights_of(thread.strip_prefix("/proc").unwrap().to_str().unwrap()))
        .collect()
}

#[test]
fn keeper_and_managers_have_the_rights_of_the_table_also_after_a_crash_and_upgrades() {
    if !can("userfaultfd") || !can("root") {
        return;
    }
    let own = rights_of("self").unwrap();
    assert!(own.effective.contains(CapabilitySet::SETPCAP), "root without it cannot cut its bounding set");
    let kept = own.permitted & set(KEPT);
    let manager = |filters| Rights {
        effective: kept,
        permitted: kept,
        bounding: own.bounding & set(KEPT),
        inheritable: CapabilitySet::empty(),
        ambient: CapabilitySet::empty(),
        is_held_down: true,
        filters,
    };
    let directory = Directory::new("rights");
    let daemon = start(&directory);
    for round in 0..3 {
        let keeper = Rights { effective: CapabilitySet::empty(), ..manager(own.filters + 1) };
        assert_eq!(threads(daemon.pid()), [keeper], "round {round}");
        let found = threads(manager_of(&directory).unwrap());
        assert!(found.len() > 2, "the loop and the API are threads of their own");
        found.iter().for_each(|thread| assert_eq!(*thread, manager(own.filters + 2), "round {round}"));
        let before = kill_manager(&directory);
        assert_ne!(manager_of(&directory), Some(before));
        let before = manager_of(&directory).unwrap();
        daemon.signal(Signal::USR2);
        wait_for_another(&directory, before);
    }
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}
