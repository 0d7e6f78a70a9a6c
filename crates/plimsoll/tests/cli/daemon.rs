//! `plimsoll daemon`: what it refuses, how it ends, and what its parts do without each other.
use super::run::{Run, Running, can, wait_until};
use rustix::process::Signal;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A directory that is removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("plimsoll-daemon-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn start(directory: &Directory) -> Running {
    let running = Run::new(&["daemon", "--budget", "64M", "--directory", directory.text()]).start();
    wait_until("its manager runs", || manager_of(&running).is_some());
    running
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|child| child.parse().unwrap()).collect()
}

/// The manager, once it catches signals and so can be told to stop.
fn manager_of(daemon: &Running) -> Option<u32> {
    let manager = children(daemon.pid()).first().copied()?;
    let status = fs::read_to_string(format!("/proc/{manager}/status")).ok()?;
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
    let terminate = 1 << (rustix::process::Signal::TERM.as_raw() - 1);
    (u64::from_str_radix(caught.trim(), 16).ok()? & terminate != 0).then_some(manager)
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok()
}

fn signal(pid: u32, signal: Signal) {
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

#[test]
fn a_killed_manager_is_replaced_and_an_upgrade_keeps_the_keepers_process() {
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("replaced");
    let daemon = start(&directory);
    for by in [Signal::KILL, Signal::USR2, Signal::USR2, Signal::KILL] {
        let before = manager_of(&daemon).unwrap();
        match by {
            Signal::KILL => signal(before, Signal::KILL),
            by => daemon.signal(by),
        }
        wait_until("another manager runs", || manager_of(&daemon).is_some_and(|manager| manager != before));
        assert!(!exists(before));
    }
    // However close they follow: none finds the keeper without anything that catches it.
    (0..200).for_each(|_| daemon.signal(Signal::USR2));
    wait_until("a manager runs", || manager_of(&daemon).is_some());
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
    let manager = manager_of(&daemon).unwrap();
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
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let heard = || {
        let mut bytes = [0; 1000];
        let length = socket.recv(&mut bytes).expect("nothing is said");
        String::from_utf8(bytes[..length].to_vec()).unwrap()
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
