//! Guests under a daemon whose manager is killed again and again, as a process, at random instants.
//!
//! Enters: a plan and a number of kills. Leaves: how long guests waited for the next manager, and exit status 0 only if no
//! word was wrong, no guest ended that was not killed on purpose, and at the end every descriptor and byte was
//! accounted for: the keeper holds what it held before the first machine, stores and ledger are empty, the control group
//! is as full as it was.
//!
//! Some managers are killed before they have taken over, some while a machine is being handed over, some while a machine's pages
//! are on their way to the disk, and VMMs are killed beside them. What is counted as *kill to service* is the time from the signal to the first page that a later manager brings; what
//! keeper, start, take-over and the guests' own next touch take is all in it.
use super::bad_disk::BadDisk;
use super::{Plan, schedule};
use crate::demo::Interrupt;
use crate::demo::fleet::{self, Guest};
use crate::demo::meter::Accounting;
use plimsoll_guest::random::{Rng, hash3};
use plimsoll_host::daemon::milestones::now_ns;
use plimsoll_host::daemon::place;
use plimsoll_host::daemon::status::{Answer, DiskStatus, Request, Status};
use plimsoll_linux::explain;
use plimsoll_sys::ProcessId;
use plimsoll_sys::fdpass;
use plimsoll_sys::pidfd::{Liveness, Pidfd, Signal};
use plimsoll_sys::process::end_with_parent;
use plimsoll_types::ByteCount;
use plimsoll_vmm::control::StopMode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything takes that is waited for; what hangs fails.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition is looked at again.
const LOOK_PERIOD: Duration = Duration::from_millis(5);
/// How long the last check of every page may take.
const CHECK_PATIENCE: Duration = Duration::from_secs(300);
const REAP_PATIENCE: Duration = Duration::from_secs(15);
const PROGRESS_PERIOD: Duration = Duration::from_secs(5);
/// Allowed above the budget.
const TOLERANCE_PERCENT: u64 = 2;
/// And for the VMM that takes the place of a killed one: of the memory it starts in nobody can say a word before it has it. At a
/// full host that is the line crossed until as much is taken from others.
const STARTING: ByteCount = ByteCount::mib(6);
/// What the control group may hold at the end that it did not before: page cache of programs, and batches of the kernel's.
const RESIDUE: ByteCount = ByteCount::mib(8);
/// What a manager says of a disk that takes nothing.
const DISK_TROUBLE: &str = "the disk tier takes no more for now";
/// The longest answer: machines, domains and incidents of this run fit several times.
const ANSWER_MAX: usize = 64 << 10;

/// What was counted and found.
#[derive(Debug, Default, Serialize)]
struct ChaosReport {
    version: u32,
    seed: u64,
    run_by_release: bool,
    guests: usize,
    size_bytes: u64,
    budget_bytes: u64,
    peak_bytes: u64,
    kills: u64,
    /// Of these, as soon as the one before had been killed, served or not.
    hasty_kills: u64,
    /// Of these, while a machine was being handed over.
    kills_at_handover: u64,
    vmms_killed: u64,
    /// Of the kills, while pages of a machine that was parked went to the disk; and what was there at most.
    kills_at_parking: u64,
    disk_bytes_max: u64,
    /// Of the disk tier: pages that came from there, how often it had no room and was refused, what it has given up at the end, and
    /// how often the disk was filled, emptied or made to refuse. All as far as managers lived to tell.
    disk_pages_read: u64,
    disk_no_room: u64,
    disk_refused: u64,
    disk_failed_bytes: u64,
    disk_changes: u64,
    /// How often the keeper was upgraded.
    upgrades: u64,
    /// From a kill to the first page that the next manager brought, in milliseconds.
    service_ms_median: f64,
    service_ms_p99: f64,
    service_ms_max: f64,
    /// The part of it until the next manager's program began, and until it had taken over.
    start_ms_median: f64,
    takeover_ms_median: f64,
    verified_pages: u64,
    wrong_words: u64,
    keeper_descriptors_before: usize,
    keeper_descriptors_after: usize,
    residue_bytes: u64,
    failures: Vec<String>,
}

/// A kill that was followed by service.
#[derive(Clone, Copy, Debug)]
struct Service {
    start_ns: u64,
    takeover_ns: u64,
    page_ns: u64,
}

/// The daemon of a run. Dropping it ends it.
struct Daemon {
    keeper: Child,
    directory: PathBuf,
    bad_disk: Option<BadDisk>,
}

impl Daemon {
    fn start(plan: &Plan, has_bad_disk: bool) -> Result<Self, String> {
        let directory = std::env::temp_dir().join(format!("plimsoll-chaos-{}", std::process::id()));
        std::fs::create_dir(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        let log = std::fs::File::create(directory.join("log")).map_err(|error| explain(&error))?;
        let executable = std::env::current_exe().map_err(|error| explain(&error))?;
        let mut command = Command::new(executable);
        // The store can hold more than all guests own, so that it is never what runs out.
        let store = ByteCount(plan.size.0 * 2 * plan.guests as u64);
        command.arg("daemon").arg("--directory").arg(&directory).args(["--share", "--count", "group"]);
        let disk = ByteCount(store.0.max(64 << 20));
        let made = has_bad_disk.then(|| BadDisk::create(&directory, plan.seed, disk)).transpose();
        let bad_disk = made.inspect_err(|_| drop(std::fs::remove_dir_all(&directory)))?;
        let path = bad_disk.as_ref().map_or_else(|| directory.join("disk"), |disk| disk.path().to_owned());
        command.arg("--disk").arg(path).arg("--disk-limit").arg(disk.0.to_string());
        command.arg("--budget").arg(plan.budget.0.to_string()).arg("--store").arg(store.0.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        end_with_parent(&mut command, Signal::KILL);
        let keeper = command.spawn().map_err(|error| format!("no daemon: {error}"))?;
        Ok(Self { keeper, directory, bad_disk })
    }

    fn handover(&self) -> PathBuf {
        self.directory.join(place::HANDOVER)
    }

    /// Asks the manager how it is; `None` while there is none, or it is killed meanwhile.
    fn status(&self) -> Option<Status> {
        match self.ask(&Request::Status)? {
            Answer::Status(status) => Some(*status),
            Answer::Done | Answer::Refused(_) => None,
        }
    }

    fn ask(&self, request: &Request) -> Option<Answer> {
        let socket = fdpass::seqpacket_connect(&self.directory.join(place::CONTROL)).ok()?;
        fdpass::send(&socket, &serde_json::to_vec(request).ok()?, &[]).ok()?;
        let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&limit)).ok().filter(|ready| *ready > 0)?;
        let mut bytes = vec![0; ANSWER_MAX];
        let received = fdpass::recv(&socket, &mut bytes, 0).ok()??;
        serde_json::from_slice(bytes.get(..received.bytes)?).ok()
    }

    /// Asks until the answer is as wanted.
    fn until(&self, wanted: impl Fn(&Status) -> bool) -> Option<Status> {
        let since = Instant::now();
        while since.elapsed() < PATIENCE {
            if let Some(status) = self.status().filter(&wanted) {
                return Some(status);
            }
            std::thread::sleep(LOOK_PERIOD);
        }
        None
    }

    /// The manager's process, whatever it is doing.
    fn manager(&self) -> Option<Pidfd> {
        let keeper = self.keeper.id();
        let children = std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).ok()?;
        let child = children.split_whitespace().next()?.parse().ok().and_then(ProcessId::new)?;
        Pidfd::open(child).ok()
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.keeper.id())).map_or(0, Iterator::count)
    }

    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        let is_expected = |line: &&str| {
            line.contains("starting another") || self.bad_disk.is_some() && line.contains(DISK_TROUBLE)
        };
        let lines = text.lines().filter(|line| !is_expected(line));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Tells it to stop, which it does when it has no machine.
    fn stop(&mut self) -> Result<(), String> {
        let pidfd = Pidfd::from_child(&mut self.keeper).map_err(|error| explain(&error))?;
        pidfd.send_signal(Signal::TERM).map_err(|error| explain(&error))?;
        if pidfd.wait_exit(REAP_PATIENCE).map_err(|error| explain(&error))? == Liveness::Alive {
            return Err("the daemon does not stop".to_owned());
        }
        match self.keeper.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("the daemon ended with {status}")),
            Err(error) => Err(explain(&error)),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // First the manager: it would go on without its keeper.
        let manager = self.manager();
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        if let Some(manager) = manager {
            let _ = manager.send_signal(Signal::KILL);
            let _ = manager.wait_exit(REAP_PATIENCE);
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

struct Chaos<'a> {
    plan: &'a Plan,
    rng: Rng,
    accounting: Accounting,
    daemon: Daemon,
    guests: Vec<Guest>,
    started: u64,
    report: ChaosReport,
    services: Vec<Service>,
    /// What the managers have told of the disk, by when they began.
    disks: BTreeMap<u64, DiskStatus>,
}

/// Runs it.
pub(super) fn run(
    plan: &Plan,
    kills: u64,
    has_bad_disk: bool,
    json: Option<&Path>,
) -> Result<ExitCode, String> {
    let interrupt = Interrupt::install()?;
    let accounting = Accounting::start()?;
    let before = accounting.used();
    let daemon = Daemon::start(plan, has_bad_disk)?;
    let report = ChaosReport {
        version: 1,
        seed: plan.seed,
        run_by_release: !cfg!(debug_assertions),
        guests: plan.guests,
        size_bytes: plan.size.0,
        budget_bytes: plan.budget.0,
        ..ChaosReport::default()
    };
    let (rng, guests, services) = (Rng::new(hash3(plan.seed, 7, 0)), Vec::new(), Vec::new());
    let disks = BTreeMap::new();
    let mut chaos = Chaos { plan, rng, accounting, daemon, guests, started: 0, report, services, disks };
    let outcome = chaos.work(kills, &interrupt);
    chaos.report.failures.extend(outcome.err());
    if interrupt.is_set() {
        chaos.report.failures.push("interrupted before the end".to_owned());
    }
    let report = chaos.conclude(before);
    print(&report);
    if let Some(file) = json {
        let text = serde_json::to_string_pretty(&report).map_err(|error| explain(&error))?;
        std::fs::write(file, text + "\n").map_err(|error| format!("--json {}: {error}", file.display()))?;
    }
    if report.failures.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let Plan { seed, guests, size, budget, .. } = plan;
    println!(
        "the same choices again: plimsoll soak --kill-daemon {kills} --seed {seed} --guests {guests} --size {size} --budget {}{}",
        budget.0,
        if has_bad_disk { " --bad-disk" } else { "" }
    );
    Ok(ExitCode::FAILURE)
}

impl Chaos<'_> {
    fn work(&mut self, kills: u64, interrupt: &Interrupt) -> Result<(), String> {
        let dead = || "the daemon does not answer".to_owned();
        self.daemon.until(|status| status.serving_ns > 0).ok_or_else(dead)?;
        self.report.keeper_descriptors_before = self.daemon.descriptors();
        self.daemon.bad_disk.iter().for_each(BadDisk::begin);
        for _ in 0..self.plan.guests {
            let guest = self.spawn()?;
            self.guests.push(guest);
        }
        self.until_all_run()?;
        let mut printed = Instant::now();
        while self.report.kills < kills && !interrupt.is_set() {
            self.strike()?;
            self.look()?;
            if printed.elapsed() >= PROGRESS_PERIOD {
                printed = Instant::now();
                let (kills, vmms) = (self.report.kills, self.report.vmms_killed);
                println!("{kills:>5} managers and {vmms} VMMs killed; {} pages verified", self.verified());
            }
        }
        if let Some(disk) = &mut self.daemon.bad_disk {
            self.report.disk_changes = disk.end();
        }
        self.check(interrupt)
    }

    fn spawn(&mut self) -> Result<Guest, String> {
        let config = schedule::machine(self.plan.seed, self.started, self.plan.size, self.plan.accel);
        self.started += 1;
        let guest = Guest::spawn_under(&config, &self.daemon.handover())?;
        self.accounting.add(guest.pid());
        Ok(guest)
    }

    fn until_all_run(&mut self) -> Result<(), String> {
        let since = Instant::now();
        while !self.guests.iter().all(|guest| guest.state().accel.is_some()) {
            self.look()?;
            if since.elapsed() > PATIENCE {
                return Err("a guest was not taken by the daemon".to_owned());
            }
            std::thread::sleep(LOOK_PERIOD);
        }
        Ok(())
    }

    fn pause(&mut self, most_us: u64) {
        std::thread::sleep(Duration::from_micros(self.rng.below(most_us + 1)));
    }

    /// Kills a manager in one of the ways that there are.
    fn strike(&mut self) -> Result<(), String> {
        // On a bad disk half of all are killed while a machine goes there.
        let is_bad = self.daemon.bad_disk.is_some();
        match self.rng.below(if is_bad { 40 } else { 20 }) {
            // As soon as there is one: while it starts or takes over.
            0..6 => {
                self.report.hasty_kills += 1;
                self.pause(40_000);
                self.kill().map(drop)
            }
            // A machine's process is killed; another takes its place, and the manager is killed while it does.
            6 => {
                let place = usize::try_from(self.rng.below(self.guests.len() as u64)).unwrap_or(0);
                self.replace(place)?;
                self.report.kills_at_handover += 1;
                self.pause(60_000);
                let killed = self.kill()?;
                self.until_all_run()?;
                self.serve(killed)
            }
            // The keeper executes its program anew, which ends the manager, too.
            7 => {
                self.report.upgrades += 1;
                self.pause(150_000);
                let asked = self.upgrade()?;
                self.serve(asked)
            }
            8 | 20.. => {
                self.park()?;
                self.report.kills_at_parking += 1;
                self.pause(if is_bad { 400_000 } else { 50_000 });
                self.note_disk();
                let killed = self.kill()?;
                self.serve(killed)
            }
            _ => {
                self.pause(150_000);
                self.note_disk();
                let killed = self.kill()?;
                self.serve(killed)
            }
        }
    }

    /// Parks a machine, and waits until something more is on the disk. The manager's death ends it: the next one wakes it.
    fn park(&mut self) -> Result<(), String> {
        let dead = || "the daemon does not answer".to_owned();
        let status = self.daemon.until(|status| !status.machines.is_empty()).ok_or_else(dead)?;
        let place = usize::try_from(self.rng.below(status.machines.len() as u64)).unwrap_or(0);
        let (machine, before) = (status.machines[place].id, written(&status));
        let ordered = self.daemon.ask(&Request::Park { machine });
        if !matches!(ordered, Some(Answer::Done)) {
            return Err(format!("machine {machine} is not parked: {ordered:?}"));
        }
        // A disk that takes nothing is told of instead.
        let is_told = |status: &Status| status.incidents.iter().any(|told| told.contains(DISK_TROUBLE));
        let parked = self.daemon.until(|status| written(status) > before || is_told(status));
        let status = parked.ok_or("nothing of a parked machine goes to the disk")?;
        let used = status.disk.map_or(0, |disk| disk.used_bytes);
        self.report.disk_bytes_max = self.report.disk_bytes_max.max(used);
        Ok(())
    }

    /// Remembers what the manager tells of the disk, if there is one that tells.
    fn note_disk(&mut self) {
        if self.daemon.bad_disk.is_some()
            && let Some(status) = self.daemon.status()
        {
            self.disks.extend(status.disk.map(|disk| (status.started_ns, disk)));
        }
    }

    fn replace(&mut self, place: usize) -> Result<(), String> {
        let guest = &mut self.guests[place];
        let summary = guest.state().summary;
        self.report.verified_pages += summary.verified_pages;
        guest.pidfd()?.send_signal(Signal::KILL).map_err(|error| explain(&error))?;
        self.report.vmms_killed += 1;
        self.guests[place] = self.spawn()?;
        Ok(())
    }

    /// Kills whatever manager there is, and says when.
    fn kill(&mut self) -> Result<u64, String> {
        let since = Instant::now();
        loop {
            // One that has ended and was not reaped yet is no manager to kill.
            let manager = self.daemon.manager().filter(|manager| manager.is_alive().unwrap_or(false));
            if let Some(manager) = manager {
                let now = now_ns();
                if manager.send_signal(Signal::KILL).is_ok() {
                    let _ = manager.wait_exit(REAP_PATIENCE);
                    self.report.kills += 1;
                    return Ok(now);
                }
            }
            if since.elapsed() > PATIENCE {
                return Err(format!("the keeper starts no manager\n{}", self.daemon.log()));
            }
            std::thread::yield_now();
        }
    }

    fn upgrade(&mut self) -> Result<u64, String> {
        let keeper = Pidfd::from_child(&mut self.daemon.keeper).map_err(|error| explain(&error))?;
        let now = now_ns();
        keeper.send_signal(Signal::USR2).map_err(|error| explain(&error))?;
        Ok(now)
    }

    /// Waits until a manager that began after that instant has brought a page.
    fn serve(&mut self, killed_ns: u64) -> Result<(), String> {
        let served = self.daemon.until(|status| status.started_ns > killed_ns && status.first_page_ns > 0);
        let Some(status) = served else {
            return Err(format!(
                "no manager serves {} s after a kill\n{}",
                PATIENCE.as_secs(),
                self.daemon.log()
            ));
        };
        self.services.push(Service {
            start_ns: status.started_ns - killed_ns,
            takeover_ns: status.serving_ns.saturating_sub(status.started_ns),
            page_ns: status.first_page_ns.saturating_sub(killed_ns),
        });
        if let Some(machine) = status.machines.iter().find(|machine| machine.lost > 0) {
            return Err(format!("{}: {} pages are lost", machine.name, machine.lost));
        }
        Ok(())
    }

    fn verified(&self) -> u64 {
        let now: u64 = self.guests.iter().map(|guest| guest.state().summary.verified_pages).sum();
        self.report.verified_pages + now
    }

    /// Ends the run at the first thing that is wrong.
    fn look(&mut self) -> Result<(), String> {
        for place in 0..self.guests.len() {
            let (state, name) = (self.guests[place].state(), self.guests[place].name.clone());
            if let Some(word) = state.summary.wrong.first() {
                let (gpa, expected, found) = (word.gpa, word.expected, word.found);
                return Err(format!(
                    "{name}: wrong word at {gpa:#x}: expected {expected:#x}, found {found:#x}"
                ));
            }
            let ended = state.died.or_else(|| (state.closed && !state.done).then(String::new));
            if let Some(why) = ended {
                let words = self.guests[place].last_words();
                return Err(format!("{name} ended: {why} {words}\n{}", self.daemon.log()));
            }
        }
        Ok(())
    }

    /// Has every guest read every page once more.
    fn check(&mut self, interrupt: &Interrupt) -> Result<(), String> {
        let mode = if interrupt.is_set() { StopMode::Now } else { StopMode::Finish };
        fleet::stop(&self.guests, mode);
        let since = Instant::now();
        while !self.guests.iter().all(|guest| guest.state().done) {
            self.look()?;
            if since.elapsed() > CHECK_PATIENCE {
                return Err(format!("the last check did not end within {} s", CHECK_PATIENCE.as_secs()));
            }
            std::thread::sleep(LOOK_PERIOD);
        }
        self.look()?;
        for guest in &mut self.guests {
            guest.reap(REAP_PATIENCE)?;
        }
        self.account()
    }

    /// Looks whether anything is left of the machines.
    fn account(&mut self) -> Result<(), String> {
        let is_empty = |status: &Status| status.machines.is_empty() && status.domains.is_empty();
        let Some(status) = self.daemon.until(is_empty) else {
            return Err(format!(
                "all guests have ended, and the daemon still has: {:?}",
                self.daemon.status()
            ));
        };
        if let Some(disk) = status.disk {
            if disk.live_bytes > 0 {
                let live = ByteCount(disk.live_bytes);
                return Err(format!("nobody is left, and {live} on the disk are somebody's"));
            }
            self.disks.insert(status.started_ns, disk);
            self.report.disk_failed_bytes = disk.failed_bytes;
            if disk.used_bytes > 0 || disk.failed_bytes > disk.limit_bytes {
                return Err(format!("nobody is left, and the disk tier has {disk:?}"));
            }
        }
        if status.charged_bytes != [0; 4] {
            return Err(format!("nobody is left and the ledger charges {:?}", status.charged_bytes));
        }
        let after = self.daemon.descriptors();
        self.report.keeper_descriptors_after = after;
        if after != self.report.keeper_descriptors_before {
            let before = self.report.keeper_descriptors_before;
            return Err(format!(
                "the keeper had {before} descriptors before the first machine and has {after}"
            ));
        }
        let log = self.daemon.log();
        if !log.is_empty() {
            self.report.failures.push(format!("the daemon said:\n{log}"));
        }
        self.daemon.stop()
    }

    fn conclude(mut self, before: ByteCount) -> ChaosReport {
        let verified = self.verified();
        let wrong: u64 = self.guests.iter().map(|guest| guest.state().summary.wrong_words).sum();
        (self.report.verified_pages, self.report.wrong_words) = (verified, wrong);
        let Self { plan, accounting, daemon, guests, mut report, services, disks, .. } = self;
        let told = |which: fn(&DiskStatus) -> u64| disks.values().map(which).sum();
        report.disk_pages_read = told(|disk| disk.pages_read);
        report.disk_no_room = told(|disk| disk.no_room);
        report.disk_refused = told(|disk| disk.refused);
        drop(guests);
        drop(daemon);
        let of = |which: fn(&Service) -> u64, permille: usize| {
            let mut times: Vec<u64> = services.iter().map(which).collect();
            times.sort_unstable();
            let at = (times.len().saturating_sub(1) * permille).div_ceil(1000);
            times.get(at).map_or(0.0, |ns| *ns as f64 / 1e6)
        };
        report.service_ms_median = of(|service| service.page_ns, 500);
        report.service_ms_p99 = of(|service| service.page_ns, 990);
        report.service_ms_max = of(|service| service.page_ns, 1000);
        report.start_ms_median = of(|service| service.start_ns, 500);
        report.takeover_ms_median = of(|service| service.takeover_ns, 500);
        let (peak, residue) = (accounting.peak(), accounting.used().saturating_sub(before));
        (report.peak_bytes, report.residue_bytes) = (peak.0, residue.0);
        let allowed = ByteCount(plan.budget.0 + plan.budget.0 / 100 * TOLERANCE_PERCENT) + STARTING;
        if peak > allowed {
            let budget = plan.budget;
            report
                .failures
                .push(format!("the hard line was crossed: peak {peak}, budget {budget}, {allowed} allowed"));
        }
        if residue > RESIDUE {
            report.failures.push(format!("{residue} more are in use than before the daemon was started"));
        }
        report.failures.extend(accounting.finish().err());
        report
    }
}

/// What the manager has written to the disk.
fn written(status: &Status) -> u64 {
    status.disk.map_or(0, |disk| disk.written_bytes)
}

fn print(report: &ChaosReport) {
    let ChaosReport { kills, hasty_kills, kills_at_handover, kills_at_parking, .. } = report;
    let ChaosReport { vmms_killed, upgrades, .. } = report;
    println!(
        "\n{kills} managers killed, {hasty_kills} of them as soon as there was one, {kills_at_handover} while a machine was handed \
         over, {kills_at_parking} while one went to the disk (at most {}); {vmms_killed} VMMs killed; {upgrades} upgrades",
        ByteCount(report.disk_bytes_max)
    );
    if report.disk_changes > 0 {
        println!(
            "a bad disk, filled, emptied or made to refuse {} times: the tier found no room {} times, was refused {} times, and brought \
             {} pages; {} of it are given up",
            report.disk_changes,
            report.disk_no_room,
            report.disk_refused,
            report.disk_pages_read,
            ByteCount(report.disk_failed_bytes),
        );
    }
    println!(
        "kill to first page served: median {:.1} ms, p99 {:.1} ms, longest {:.1} ms (to the next manager's first instruction {:.1} ms, \
         to take over {:.1} ms, medians){}",
        report.service_ms_median,
        report.service_ms_p99,
        report.service_ms_max,
        report.start_ms_median,
        report.takeover_ms_median,
        if report.run_by_release { "" } else { "; not a release build" },
    );
    println!(
        "{} pages verified; peak {} of a budget of {}; keeper: {} descriptors before, {} after; {} more in use than before",
        report.verified_pages,
        ByteCount(report.peak_bytes),
        ByteCount(report.budget_bytes),
        report.keeper_descriptors_before,
        report.keeper_descriptors_after,
        ByteCount(report.residue_bytes),
    );
    for failure in &report.failures {
        println!("FAILED: {failure}");
    }
    if report.failures.is_empty() {
        println!("passed: {} wrong words", report.wrong_words);
    }
}
