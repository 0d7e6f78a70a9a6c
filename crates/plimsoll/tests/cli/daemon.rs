//! `plimsoll daemon`: what it refuses, how it ends, and what its parts do without each other.
use super::run::{Ended, GOING, Run, Running, alone, can, wait_until};
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_sys::fdpass;
use plimsoll_sys::process::make_inheritable;
use plimsoll_sys::psi::HOST_MEMORY;
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::config::Workload;
use plimsoll_vmm::control::{Command as Order, Event, StopMode};
use plimsoll_vmm::report::Summary;
use rustix::process::{Pid, Signal, getpriority_process};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that is removed at the end.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("plimsoll-daemon-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    pub(crate) fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn start(directory: &Directory) -> Running {
    start_with(directory, &["--budget", "64M"])
}

pub(crate) fn start_with(directory: &Directory, words: &[&str]) -> Running {
    let running = Run::new(&[&["daemon", "--directory", directory.text()][..], words].concat()).start();
    wait_until("its manager serves", || manager_of(directory).is_some());
    running
}

/// A verb about that daemon, to its end.
pub(crate) fn plimsoll(directory: &Directory, words: &[&str]) -> Ended {
    Run::new(&[words, &["--directory", directory.text()]].concat()).output()
}

/// The process of the manager that answers, if one does.
pub(crate) fn manager_of(directory: &Directory) -> Option<u32> {
    u32::try_from(status_of(directory)?["pid"].as_u64()?).ok()
}

/// How the manager that answers, if one does, says things are.
pub(crate) fn status_of(directory: &Directory) -> Option<serde_json::Value> {
    Some(ask(directory, r#"{"do":"status"}"#)?["status"].take())
}

/// The least that a machine has in the store, in bytes.
pub(crate) fn stored_by_all(directory: &Directory) -> u64 {
    let status = status_of(directory).unwrap();
    let machines = status["machines"].as_array().unwrap().iter();
    machines.map(|machine| machine["stored_bytes"].as_u64().unwrap()).min().unwrap_or(0)
}

/// What the manager answers, if one does.
pub(crate) fn ask(directory: &Directory, request: &str) -> Option<serde_json::Value> {
    ask_at(&directory.0, request)
}

/// The same, of a daemon in that directory.
pub(crate) fn ask_at(directory: &Path, request: &str) -> Option<serde_json::Value> {
    let socket = fdpass::seqpacket_connect(&directory.join("control.sock")).ok()?;
    fdpass::send(&socket, request.as_bytes(), &[]).ok()?;
    let mut bytes = vec![0; 64 << 10];
    let received = fdpass::recv(&socket, &mut bytes, 0).ok()??;
    Some(serde_json::from_slice(&bytes[..received.bytes]).unwrap())
}

/// Kills the manager that answers, and waits for the one after it. Which one that was.
pub(crate) fn kill_manager(directory: &Directory) -> u32 {
    let killed = manager_of(directory).unwrap();
    signal(killed, Signal::KILL);
    wait_for_another(directory, killed);
    killed
}

/// Waits for the manager after that one.
pub(crate) fn wait_for_another(directory: &Directory, before: u32) {
    wait_until("another manager serves", || manager_of(directory).is_some_and(|manager| manager != before));
}

/// Whether the manager that answers has told that.
pub(crate) fn has_told(directory: &Directory, text: &str) -> bool {
    let incidents = status_of(directory).map(|mut status| status["incidents"].take());
    incidents
        .is_some_and(|them| them.as_array().unwrap().iter().any(|one| one.as_str().unwrap().contains(text)))
}

pub(crate) fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok()
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn a_daemon_that_cannot_be_is_refused_in_one_sentence() {
    for (words, expected) in [
        (&["--budget", "1M"][..], "--budget"),
        (&["--budget", "1000000G"], "--budget"),
        (&["--budget", "64M", "--store", "1M"], "--store"),
        (&["--budget", "64M", "--directory", "here"], "--directory"),
        (&["--budget", "64M", "--disk", "/tmp/x", "--disk-limit", "1M"], "--disk-limit 1M"),
        (&["--budget", "64M", "--disk", "x", "--disk-limit", "64M"], "use a path from /"),
        (&["--budget", "64M", "--disk", "/nonexistent/x", "--disk-limit", "64M"], "--disk: /nonexistent/x"),
        (&["--budget", "64M", "--disk", "/etc/hostname", "--disk-limit", "64M"], "not a disk tier"),
        (&["--budget", "64M", "--directory", "/nonexistent/run"], "cannot make the directory"),
    ] {
        let ended = Run::new(&[&["daemon"][..], words].concat()).output();
        ended.expect_code(2);
        assert_eq!(ended.stderr.trim().lines().count(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{}", ended.stderr);
        ended.expect_nothing_left();
    }
    let ended = Run::new(&["manager", "--budget", "64M", "--keeper", "9"]).output();
    ended.expect_code(2);
    assert!(ended.stderr.contains("version 9"), "{}", ended.stderr);
}

#[test]
fn a_second_daemon_is_refused_and_the_first_one_stops_when_told_to() {
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("second");
    let first = start(&directory);
    let second = Run::new(&["daemon", "--budget", "64M", "--directory", directory.text()]).output();
    second.expect_code(2);
    assert!(second.stderr.contains("another plimsoll daemon runs on"), "{}", second.stderr);
    first.signal(Signal::TERM);
    let ended = first.wait();
    ended.expect_code(0).expect_nothing_left();
    assert!(!directory.0.join("handover.sock").exists(), "its socket is left");
}

/// The niceness of each thread of a process.
fn niceness_of(pid: u32) -> Vec<i32> {
    // A process that has ended has none.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let numbers = threads.flatten().map(|thread| thread.file_name().to_str().unwrap().parse().unwrap());
    numbers.filter_map(|number| getpriority_process(Pid::from_raw(number)).ok()).collect()
}

/// Kills a manager and looks at the next one, which is ahead of others for some time. Whether it was seen to be.
fn next_one_is_seen_ahead(directory: &Directory, keeper: u32) -> bool {
    let killed = manager_of(directory).unwrap();
    signal(killed, Signal::KILL);
    let mut seen = false;
    wait_until("the next manager serves", || {
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
        let next = children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|pid| *pid != killed);
        // One that has just ended has no threads to look at.
        seen |= next.is_some_and(|next| exists(next) && niceness_of(next).contains(&-10));
        seen || manager_of(directory).is_some_and(|manager| manager != killed)
    });
    seen
}

/// A manager goes back once machines are served, and nothing of it stays ahead of them.
fn goes_back(manager: u32) {
    let own = getpriority_process(None).unwrap();
    wait_until("the manager goes back", || niceness_of(manager).iter().all(|nice| *nice == own));
}

/// What the keeper has of it is what the manager has, which has asked for no other: to end, it need not close it.
fn tells_its_manager_of_pressure(keeper: u32, manager: u32) {
    let has = |pid: u32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|open| open.unwrap().path());
        open.filter(|link| fs::read_link(link).is_ok_and(|path| path == Path::new(HOST_MEMORY))).count()
    };
    assert_eq!([has(keeper), has(manager)], [usize::from(can("pressure")); 2]);
}

#[test]
fn a_killed_manager_is_replaced_and_an_upgrade_keeps_the_keepers_process() {
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("replaced");
    let daemon = start(&directory);
    for by in [Signal::KILL, Signal::USR2, Signal::USR2, Signal::KILL] {
        let before = manager_of(&directory).unwrap();
        match by {
            Signal::KILL => signal(before, Signal::KILL),
            by => daemon.signal(by),
        }
        wait_for_another(&directory, before);
        assert!(!exists(before));
        let manager = manager_of(&directory).unwrap();
        goes_back(manager);
        tells_its_manager_of_pressure(daemon.pid(), manager);
    }
    if can("root") && getpriority_process(None).unwrap() == 0 {
        wait_until("a manager begins ahead", || next_one_is_seen_ahead(&directory, daemon.pid()));
        wait_until("its manager serves", || manager_of(&directory).is_some());
        goes_back(manager_of(&directory).unwrap());
    }
    // However close they follow: none finds the keeper without anything that catches it.
    (0..200).for_each(|_| daemon.signal(Signal::USR2));
    wait_until("a manager runs", || manager_of(&directory).is_some());
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn an_upgraded_keeper_goes_on_where_the_host_does_not_say_what_it_has() {
    if !can("userfaultfd") || !can("root") {
        return;
    }
    let directory = Directory::new("upgraded");
    // In a mount namespace of its own, so that a file of /proc can be covered for it alone.
    let words = ["--mount", env!("CARGO_BIN_EXE_plimsoll"), "daemon", "--budget", "64M", "--directory"];
    let daemon = Run::of(Path::new("unshare"), &[&words[..], &[directory.text()]].concat()).start();
    wait_until("its manager serves", || manager_of(&directory).is_some());
    let before = manager_of(&directory).unwrap();
    let covered = Command::new("nsenter")
        .args(["--target", &daemon.pid().to_string(), "--mount"])
        .args(["mount", "--bind", "/dev/null", "/proc/meminfo"])
        .status();
    assert!(covered.unwrap().success());
    daemon.signal(Signal::USR2);
    wait_for_another(&directory, before);
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn a_manager_without_keeper_and_machines_ends_and_the_next_daemon_finds_a_stale_socket() {
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("alone");
    let daemon = start(&directory);
    let manager = manager_of(&directory).unwrap();
    daemon.signal(Signal::KILL);
    let ended = daemon.wait();
    assert_eq!(ended.code(), None);
    assert!(ended.stderr.contains("the keeper is gone"), "{}", ended.stderr);
    wait_until("the manager ends", || !exists(manager));
    assert!(directory.0.join("handover.sock").exists());
    let next = start(&directory);
    next.signal(Signal::TERM);
    next.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn a_supervisor_is_told_when_machines_are_served_and_when_not_any_more() {
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("supervised");
    let path = std::env::temp_dir().join(format!("plimsoll-notify-{}", std::process::id()));
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(GOING)).unwrap();
    let heard = || {
        let mut bytes = [0; 1000];
        loop {
            let length = socket.recv(&mut bytes).expect("nothing is said");
            let text = String::from_utf8(bytes[..length].to_vec()).unwrap();
            if !text.starts_with("FDSTORE") {
                return text;
            }
        }
    };
    let words = ["daemon", "--budget", "64M", "--directory", directory.text()];
    let daemon = Run::new(&words).with("NOTIFY_SOCKET", &path).start();
    let ready = heard();
    assert!(ready.contains("READY=1") && ready.contains("STATUS=0 machines"), "{ready}");
    daemon.signal(Signal::TERM);
    assert!(heard().contains("STOPPING=1"));
    fs::remove_file(path).unwrap();
    daemon.wait().expect_code(0).expect_nothing_left();
}

/// A machine that hands itself over to a daemon and works in more memory than that has.
pub(crate) struct Machine {
    child: Child,
    control: UnixStream,
    events: BufReader<UnixStream>,
    /// Where tools ask it for its registers.
    pub(crate) inspect: PathBuf,
}

impl Machine {
    pub(crate) fn start(directory: &Directory) -> Self {
        Self::that_uses(directory, 48 << 20)
    }

    pub(crate) fn that_uses(directory: &Directory, footprint_bytes: u64) -> Self {
        Self::with(directory, WorkloadSpec { footprint_bytes, ..WorkloadSpec::new(WorkloadKind::Sweep) })
    }

    /// One whose reports nobody has to read for minutes: what is unread keeps it from answering elsewhere.
    pub(crate) fn that_says_little(directory: &Directory, footprint_bytes: u64) -> Self {
        let spec = WorkloadSpec { footprint_bytes, ..WorkloadSpec::new(WorkloadKind::Sweep) };
        Self::reporting(directory, spec, 2000)
    }

    fn with(directory: &Directory, spec: WorkloadSpec) -> Self {
        Self::reporting(directory, spec, 20)
    }

    fn reporting(directory: &Directory, spec: WorkloadSpec, report_ms: u32) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let inspect = format!("inspect-{}.sock", STARTED.fetch_add(1, Ordering::Relaxed));
        let inspect = Some(directory.0.join(inspect));
        Self::of(directory, &VmmConfig { report_ms, inspect, ..Self::config(spec) })
    }

    /// One of 96M that works like that.
    pub(crate) fn config(spec: WorkloadSpec) -> VmmConfig {
        let spec = WorkloadSpec { final_check: 1, ..spec };
        let mix = Mix { zero: 10, duplicate: 10, text: 80, random: 0 };
        let workload = Workload { spec, mix, seed: 1, pool_seed: 2, pool_pages: 64 };
        VmmConfig { report_ms: 20, ..VmmConfig::new("lonely", 96 << 20, workload) }
    }

    pub(crate) fn of(directory: &Directory, config: &VmmConfig) -> Self {
        Self::by(Command::new(env!("CARGO_BIN_EXE_plimsoll")), &directory.0, config)
    }

    /// One whose program is started like that, and finds the daemon in that directory.
    pub(crate) fn by(mut command: Command, directory: &Path, config: &VmmConfig) -> Self {
        let (control, theirs) = UnixStream::pair().unwrap();
        control.set_read_timeout(Some(GOING)).unwrap();
        make_inheritable(&theirs).unwrap();
        command.args(["vmm", "--control-fd", &theirs.as_raw_fd().to_string(), "--daemon"]);
        command.arg(directory.join("handover.sock")).stdin(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(&serde_json::to_vec(config).unwrap()).unwrap();
        let events = BufReader::new(control.try_clone().unwrap());
        Self { child, control, events, inspect: config.inspect.clone().unwrap_or_default() }
    }

    /// Waits until it says anything.
    pub(crate) fn has_begun(&mut self) {
        self.until(|_| true);
    }

    /// The first word of the machine that is as wanted.
    fn until(&mut self, mut wanted: impl FnMut(&Event) -> bool) -> Event {
        loop {
            let mut line = String::new();
            self.events.read_line(&mut line).expect("the machine says nothing");
            let event = serde_json::from_str(&line).expect("the machine ended");
            if wanted(&event) {
                return event;
            }
        }
    }

    /// Waits until it has verified so many more pages.
    pub(crate) fn verifies(&mut self, more: u64) {
        let mut first = None;
        self.until(|event| {
            let Event::Report(Summary { verified_pages, .. }) = event else { return false };
            *verified_pages >= *first.get_or_insert(*verified_pages) + more
        });
    }

    /// Waits until it says that it is alone with its memory.
    pub(crate) fn is_given_back(&mut self) {
        self.until(|event| matches!(event, Event::GivenBack));
    }

    /// The process of its VMM.
    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Has it check every page once more.
    pub(crate) fn finish(self) {
        self.stops(StopMode::Finish);
    }

    /// Has it end like that.
    pub(crate) fn stops(mut self, mode: StopMode) {
        self.is_to_stop(mode);
        self.finishes();
    }

    /// Hangs up, which has it end.
    pub(crate) fn hangs_up(mut self) {
        self.control.shutdown(std::net::Shutdown::Both).unwrap();
        self.child.wait().unwrap();
    }

    fn is_to_stop(&mut self, mode: StopMode) {
        let order = serde_json::to_string(&Order::Stop { mode }).unwrap();
        self.control.write_all(format!("{order}\n").as_bytes()).unwrap();
    }

    fn finishes(mut self) {
        let Event::Done(summary) = self.until(|event| matches!(event, Event::Done(_))) else {
            unreachable!()
        };
        assert_eq!(summary.wrong_words, 0);
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_manager_whose_keeper_is_killed_goes_on_with_its_machines_until_they_have_ended() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("orphan");
    let daemon = start(&directory);
    let manager = manager_of(&directory).unwrap();
    let mut machine = Machine::start(&directory);
    machine.verifies(1000);
    daemon.signal(Signal::KILL);
    // More than the budget holds: each round brings back what the one before has moved out.
    machine.verifies(30_000);
    assert!(exists(manager));
    let second = plimsoll(&directory, &["daemon", "--budget", "64M"]);
    second.expect_code(2);
    assert!(second.stderr.contains("another plimsoll daemon runs on"), "{}", second.stderr);
    machine.verifies(1000);
    machine.finish();
    wait_until("the manager ends", || !exists(manager));
    assert!(daemon.wait().stderr.contains("the keeper is gone: this manager goes on"));
}

#[test]
fn a_daemon_with_machines_refuses_to_stop_and_says_what_is_where() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("busy");
    let daemon = start(&directory);
    let mut machine = Machine::that_uses(&directory, 80 << 20);
    wait_until("what it uses is more than the budget", || stored_by_all(&directory) > 16 << 20);
    daemon.signal(Signal::TERM);
    machine.verifies(30_000);
    machine.finish();
    daemon.signal(Signal::TERM);
    let ended = daemon.wait();
    ended.expect_code(0).expect_nothing_left();
    let refusals: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("not stopped")).collect();
    let [refusal, ..] = refusals[..] else { panic!("it did not refuse: {}", ended.stderr) };
    println!("{refusal}");
    assert!(refusal.contains("1 machines run") && refusal.contains("the budget of 64M"), "{refusal}");
}

#[test]
fn a_daemon_to_which_nobody_listens_any_more_replaces_its_manager_all_the_same() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("unheard");
    let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
    command.args(["daemon", "--budget", "64M", "--directory", directory.text()]);
    let mut daemon = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("its manager serves", || manager_of(&directory).is_some());
    let mut machine = Machine::start(&directory);
    machine.verifies(100);
    drop(daemon.stderr.take());
    for _ in 0..2 {
        // The keeper says so, and the next manager which machines it has.
        kill_manager(&directory);
        machine.verifies(100);
        assert!(daemon.try_wait().unwrap().is_none());
    }
    machine.finish();
    signal(daemon.id(), Signal::TERM);
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn a_daemon_that_has_room_gives_its_machines_back_and_they_go_on_without_it() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("parting");
    let daemon = start_with(&directory, &["--budget", "256M"]);
    let mut machines = [(); 2].map(|()| Machine::start(&directory));
    machines.iter_mut().for_each(|machine| machine.verifies(1000));
    wait_until("some of both is stored", || {
        for machine in status_of(&directory).unwrap()["machines"].as_array().unwrap() {
            let order = format!(r#"{{"do":"squeeze","machine":{},"pages":8000}}"#, machine["id"]);
            assert_eq!(ask(&directory, &order).unwrap(), "done");
        }
        stored_by_all(&directory) > 1 << 20
    });
    daemon.signal(Signal::TERM);
    let ended = daemon.wait();
    ended.expect_code(0).expect_nothing_left();
    println!("{}", ended.stderr);
    assert!(ended.stderr.contains("stopping: 2 machines are given back"), "{}", ended.stderr);
    for mut machine in machines {
        // It says so before anything that comes later.
        machine.is_given_back();
        machine.verifies(30_000);
        machine.finish();
    }
}

#[test]
fn a_manager_has_no_more_open_when_machines_were_given_back_than_before_they_came() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("many");
    let daemon = start_with(&directory, &["--budget", "256M"]);
    let open = || fs::read_dir(format!("/proc/{}/fd", manager_of(&directory)?)).ok().map(Iterator::count);
    // What the control loop opens is open once it has decided.
    wait_until("something is decided", || plimsoll(&directory, &["budget"]).code() == Some(0));
    let before = open().unwrap();
    for round in 0..6 {
        let mut machine = Machine::that_uses(&directory, 16 << 20);
        machine.verifies(1000);
        assert!(open().unwrap() > before);
        // Also where it was an earlier manager's.
        if round % 2 == 1 {
            kill_manager(&directory);
        }
        wait_until("its loop knows it", || {
            plimsoll(&directory, &["vm", "release", "lonely"]).code() == Some(0)
        });
        machine.is_given_back();
        machine.finish();
        wait_until("nothing of it is open", || open().is_some_and(|open| open <= before));
    }
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

/// A daemon with a disk tier, and an idle machine of its.
fn start_with_disk(directory: &Directory, disk: &Path) -> (Running, Machine) {
    let words = ["--budget", "256M", "--disk", disk.to_str().unwrap(), "--disk-limit", "128M"];
    let daemon = start_with(directory, &words);
    let idle = WorkloadSpec::new(WorkloadKind::Idle);
    let idle = WorkloadSpec { footprint_bytes: 48 << 20, ops_per_second: 10, ..idle };
    let mut machine = Machine::with(directory, idle);
    machine.until(|event| matches!(event, Event::Report(summary) if summary.phase == "running"));
    (daemon, machine)
}

#[test]
fn a_parked_machine_is_given_back_from_the_disk() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("brought-home");
    let disk = std::env::temp_dir().join(format!("plimsoll-disk-home-{}", std::process::id()));
    let (daemon, mut machine) = start_with_disk(&directory, &disk);
    // Made before its filter was, which lets it make none.
    assert_eq!(status_of(&directory).unwrap()["disk"]["reads_by"], "ring");
    plimsoll(&directory, &["park", "lonely"]).expect_code(0);
    wait_until("most of it is on the disk", || {
        status_of(&directory).is_some_and(|status| status["domains"][0]["away"].as_u64() > Some(5000))
    });
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
    machine.is_given_back();
    machine.finish();
    fs::remove_file(disk).unwrap();
}

#[test]
fn pages_on_a_disk_tier_that_a_manager_cannot_have_wait_for_one_that_can() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("tierless");
    let disk = std::env::temp_dir().join(format!("plimsoll-disk-tierless-{}", std::process::id()));
    let (daemon, mut machine) = start_with_disk(&directory, &disk);
    plimsoll(&directory, &["park", "lonely"]).expect_code(0);
    wait_until("most of it is on the disk", || {
        status_of(&directory).is_some_and(|status| status["domains"][0]["away"].as_u64() > Some(5000))
    });
    // The tier's table, in the keeper's slot 5.
    let table = format!("/proc/{}/fd/{}", daemon.pid(), plimsoll_sys::slots::FIRST + 5);
    let table = File::options().read(true).write(true).open(table).unwrap();
    let mut good = [0; 8];
    table.read_exact_at(&mut good, 0).unwrap();
    assert_eq!(&good, b"PLIMDISK");
    table.write_all_at(&[0; 8], 0).unwrap();
    kill_manager(&directory);
    let told = status_of(&directory).unwrap()["incidents"].to_string();
    assert!(told.contains("the disk tier cannot be had, and machines wait"), "{told}");
    machine.is_to_stop(StopMode::Finish);
    // It gets no further than to the first page that is there.
    let (mut verified, mut reports) = (0, 0);
    machine.until(|event| {
        if let Event::Report(summary) = event {
            reports = if summary.verified_pages == verified { reports + 1 } else { 0 };
            verified = summary.verified_pages;
        }
        reports >= 50
    });
    let told = status_of(&directory).unwrap()["incidents"].to_string();
    assert!(!told.contains("poisoned"), "{told}");
    table.write_all_at(&good, 0).unwrap();
    kill_manager(&directory);
    machine.finishes();
    assert_eq!(status_of(&directory).unwrap()["incidents"], serde_json::json!([]));
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
    fs::remove_file(disk).unwrap();
}

#[test]
fn a_parked_machine_is_on_the_disk_outlives_its_manager_and_wakes_right() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("parked");
    let disk = std::env::temp_dir().join(format!("plimsoll-disk-{}", std::process::id()));
    let (daemon, machine) = start_with_disk(&directory, &disk);
    let unknown = plimsoll(&directory, &["park", "nobody"]);
    unknown.expect_code(2);
    assert!(unknown.stderr.contains("the daemon has lonely (1)"), "{}", unknown.stderr);
    let parked = plimsoll(&directory, &["park", "lonely"]);
    parked.expect_code(0);
    assert!(parked.stdout.contains("for the disk"), "{}", parked.stdout);
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or(u64::MAX);
    let is_parked = || {
        let Some(status) = status_of(&directory) else { return false };
        let (machine, domain) = (&status["machines"][0], &status["domains"][0]);
        let kept = number(&machine["resident_bytes"]) + number(&machine["limbo_bytes"]);
        kept.saturating_add(number(&domain["held_bytes"])) < 4 << 20 && number(&domain["away"]) > 5000
    };
    // Killed on the way: the next one has what was there, and knows of no machine that is parked.
    wait_until("some of the machine to be on the disk", || {
        status_of(&directory).is_some_and(|status| number(&status["disk"]["live_bytes"]) > 1 << 20)
    });
    kill_manager(&directory);
    plimsoll(&directory, &["park", "lonely"]).expect_code(0);
    wait_until("the machine to be on the disk", is_parked);
    kill_manager(&directory);
    let status = status_of(&directory).unwrap();
    assert!(number(&status["domains"][0]["away"]) > 5000, "the next manager does not know: {status}");
    plimsoll(&directory, &["wake", "1"]).expect_code(0);
    machine.finish();
    wait_until("nothing of it to be on the disk", || {
        status_of(&directory).is_some_and(|status| number(&status["disk"]["live_bytes"]) == 0)
    });
    assert_eq!(status_of(&directory).unwrap()["incidents"], serde_json::json!([]));
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
    assert_eq!(fs::metadata(&disk).unwrap().len(), 0, "the file is emptied");
    fs::remove_file(disk).unwrap();
}
