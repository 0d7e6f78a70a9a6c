//! Machines that come and go under one daemon leave nothing with it, however many they were.
//!
//! `PLIMSOLL_CYCLES` says how many, 10 or more; without it, 50 (`cargo xtask test --cycles 1000 churn`).
use super::daemon::{Directory, Machine, manager_of, start_with, status_of, stored_by_all};
use super::run::{alone, can, wait_until};
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_host::api::Machines;
use plimsoll_host::api::client::Client;
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::config::Workload;
use plimsoll_vmm::control::StopMode;
use rustix::process::Signal;
use std::fs;
use std::path::Path;

const CYCLES: u32 = 50;
/// What a process may take up more than after the first machines: what allocators of its threads hold free. That comes to an end: an arena
/// is 132 KiB, and there are eight for each processor at most.
const SLACK_KIB: u64 = 2048;
/// The same from the middle on, when most of that is there. What each machine left would go on: 2 KiB for each of 1,000 are noticed.
const SLACK_LATER_KIB: u64 = 1024;
/// The least that a daemon can be given, and what machines use: some more than that.
const BUDGET: &str = "32M";
const FOOTPRINTS: [u64; 2] = [8 << 20, 36 << 20];
const RAM: u64 = 48 << 20;

fn cycles() -> u32 {
    match std::env::var("PLIMSOLL_CYCLES") {
        Ok(text) => text.parse::<u32>().expect("PLIMSOLL_CYCLES is a number").max(10),
        Err(_) => CYCLES,
    }
}

/// What a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holds {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    /// Memory of its own.
    own_kib: u64,
    /// All that it has in RAM.
    resident_kib: u64,
}

impl Holds {
    fn of(process: u32) -> Self {
        let place = |name: &str| format!("/proc/{process}/{name}");
        let count = |name| fs::read_dir(place(name)).unwrap().count();
        let status = fs::read_to_string(place("status")).unwrap();
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_matches(|mark: char| !mark.is_ascii_digit()).parse::<u64>().unwrap()
        };
        Self {
            descriptors: count("fd"),
            threads: count("task"),
            mappings: fs::read_to_string(place("maps")).unwrap().lines().count(),
            own_kib: kib("RssAnon:"),
            resident_kib: kib("VmRSS:"),
        }
    }
}

/// What keeper and manager have, and what is in their directory, while they have no machine.
#[derive(Clone, Debug)]
struct Left {
    processes: [Holds; 2],
    files: Vec<(String, u64)>,
}

impl Left {
    /// Once nothing is left of the machines; `before` is how it was when nothing was left last.
    fn when_empty(directory: &Directory, processes: [u32; 2], before: Option<&Self>) -> Self {
        wait_until("the manager has forgotten its machines", || {
            let status = status_of(directory).unwrap();
            let is_empty = |what: &str| status[what].as_array().unwrap().is_empty();
            let charged = status["charged_bytes"].as_array().unwrap();
            is_empty("machines") && is_empty("domains") && charged.iter().all(|bytes| *bytes == 0)
        });
        let client = Client::of(&directory.0);
        wait_until("so has its loop", || client.get::<Machines>("/v1/machines").unwrap().total == 0);
        let mut left = Self::now(directory, processes);
        // Connections of the API's, and threads that have no more work, go a little later.
        wait_until(&format!("no more is held than before: {left:?} to {before:?}"), || {
            left = Self::now(directory, processes);
            before.is_none_or(|before| left.is_within(before))
        });
        left
    }

    fn is_within(&self, other: &Self) -> bool {
        let mut both = self.processes.iter().zip(&other.processes);
        both.all(|(own, other)| own.descriptors <= other.descriptors && own.threads <= other.threads)
    }

    fn now(directory: &Directory, processes: [u32; 2]) -> Self {
        Self { processes: processes.map(Holds::of), files: files(&directory.0) }
    }
}

/// Names and sizes of the files in a directory.
fn files(directory: &Path) -> Vec<(String, u64)> {
    let files = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let named =
        |file: fs::DirEntry| (file.file_name().into_string().unwrap(), file.metadata().unwrap().len());
    let mut files: Vec<_> = files.map(named).collect();
    files.sort();
    files
}

/// Runs a machine that no other is called like, and ends it in one of the ways there are.
fn cycle(directory: &Directory, number: u32) {
    let way = number % 5;
    let footprint_bytes = FOOTPRINTS[usize::from(matches!(way, 1 | 2))];
    let spec = WorkloadSpec { footprint_bytes, ..WorkloadSpec::new(WorkloadKind::Sweep) };
    let mix = Mix { zero: 10, duplicate: 10, text: 80, random: 0 };
    let workload = Workload { spec, mix, seed: u64::from(number), pool_seed: 2, pool_pages: 64 };
    let config = VmmConfig { report_ms: 10, ..VmmConfig::new(format!("churn-{number}"), RAM, workload) };
    let mut machine = Machine::of(directory, &config);
    match way {
        // Killed while it is handed over, or before.
        0 => machine.has_begun(),
        // Killed while a part of it is stored.
        1 => {
            machine.verifies(100);
            wait_until("a part of it is stored", || stored_by_all(directory) > 0);
        }
        2 => {
            machine.verifies(100);
            return machine.stops(StopMode::Finish);
        }
        3 => {
            machine.verifies(1);
            return machine.stops(StopMode::Now);
        }
        // Its starter hangs up.
        _ => {
            machine.verifies(1);
            return machine.hangs_up();
        }
    }
    drop(machine);
}

#[test]
fn machines_that_come_and_go_leave_nothing_with_the_daemon() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("churn");
    let daemon = start_with(&directory, &["--budget", BUDGET]);
    let manager = manager_of(&directory).unwrap();
    let processes = [daemon.pid(), manager];
    let cycles = cycles();
    let mut seen: Vec<(u32, Left)> = Vec::new();
    for number in 0..=cycles {
        if [(cycles / 5).clamp(1, 100), cycles / 2, cycles].contains(&number) {
            let before = seen.first().map(|(_, left)| left);
            seen.push((number, Left::when_empty(&directory, processes, before)));
        }
        if number < cycles {
            cycle(&directory, number);
        }
    }
    seen.iter().for_each(|(number, left)| println!("after {number}: {left:?}"));
    assert_eq!(manager_of(&directory), Some(manager), "it was replaced meanwhile");
    let [(_, first), (_, middle), (_, last)] = &seen[..] else { panic!("it was looked at three times") };
    for (before, slack_kib) in [(first, SLACK_KIB), (middle, SLACK_LATER_KIB)] {
        assert_eq!(before.files, last.files);
        for (before, after) in before.processes.iter().zip(&last.processes) {
            assert!(after.own_kib <= before.own_kib + slack_kib, "{before:?}, then {after:?}");
            assert!(after.resident_kib <= before.resident_kib + slack_kib, "{before:?}, then {after:?}");
            // What an allocator maps for threads that allocate at the same time.
            assert!(after.mappings <= before.mappings + 16, "{before:?}, then {after:?}");
        }
    }
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

/// As one with a thousand machines behind it has.
#[test]
fn a_daemon_that_has_run_for_long_is_given_as_much_time_to_end_as_any() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("old");
    let mut daemon = start_with(&directory, &["--budget", BUDGET]);
    daemon.age();
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}
