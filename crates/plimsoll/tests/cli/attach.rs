//! `plimsoll attach` of what it cannot attach to: it says so in one sentence, and leaves nothing.
//!
//! What looks like a QEMU here is a copy of the shell under that name, which waits for a line that never comes.
use super::run::{Ended, Run};
use plimsoll_attach::lock_folder;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// A process that looks like a QEMU from outside, until it is dropped.
pub(crate) struct Fake {
    child: Child,
    _folder: TempDir,
}

impl Fake {
    pub(crate) fn start(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("qemu-system-x86_64");
        // Not written by this process, whose other children would inherit the file open for writing: it could not be run.
        assert!(Command::new("cp").arg("/bin/sh").arg(&program).status().unwrap().success());
        let words = ["-c", "echo up; read never", "-name", name, "-m", "64"];
        let mut command = Command::new(&program);
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut up = [0; 3];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
        Self { child, _folder: folder }
    }

    pub(crate) fn pid(&self) -> String {
        self.child.id().to_string()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn attach(words: &[&str]) -> Ended {
    Run::new(&[&["attach"], words].concat()).output()
}

/// Locks of processes that were refused.
fn locks_of(process: &str) -> Vec<String> {
    let entries = fs::read_dir(lock_folder()).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&format!("{process}-"))).collect()
}

/// Refused with one sentence that contains `part`.
fn expect_refused(process: &str, words: &[&str], part: &str) {
    let ended = attach(&[&[process], words].concat());
    ended.expect_code(2).expect_nothing_left();
    assert_eq!((ended.stdout.as_str(), ended.stderr.lines().count()), ("", 1), "{}", ended.stderr);
    let said = ended.stderr.strip_prefix("plimsoll attach: ").unwrap();
    assert!(said.contains(part), "{part:?} is not in {said:?}");
    assert_eq!(locks_of(process), Vec::<String>::new());
}

#[test]
fn what_is_no_machine_is_refused_with_what_it_is() {
    let mut ended = Command::new("true").spawn().unwrap();
    let gone = ended.id().to_string();
    ended.wait().unwrap();
    expect_refused(&gone, &[], "there is no process");
    expect_refused("0", &[], "there is no process 0");
    expect_refused(&std::process::id().to_string(), &[], "is no virtual machine that is known here");
    expect_refused("no-such-name", &["--reclaim", "16M"], "no machine is called \"no-such-name\"");
    // kthreadd, where this is not a namespace of its own.
    if fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd") {
        expect_refused("2", &["--budget", "1G"], "is a thread of the kernel");
    } else {
        println!("SKIPPED: process 2 is not the kernel's here");
    }
}

#[test]
fn it_does_not_attach_to_itself() {
    let program = Path::new("/bin/sh");
    let script = "exec \"$0\" attach $$";
    let ended = Run::of(program, &["-c", script, env!("CARGO_BIN_EXE_plimsoll")]).output();
    ended.expect_code(2).expect_nothing_left();
    assert!(ended.stderr.contains("is plimsoll itself"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
}

#[test]
fn words_that_mean_nothing_are_refused_before_anything_is_looked_at() {
    for words in [
        ["1", "--budget", "lots"],
        ["1", "--budget", "12X"],
        ["1", "--reclaim", "half"],
        ["1", "--range", "7f0000000000"],
        ["1", "--range", "2000-1000"],
        ["1", "--seconds", "soon"],
    ] {
        let ended = attach(&words);
        ended.expect_code(2).expect_nothing_left();
        assert_eq!(ended.stdout, "");
        assert!(ended.stderr.contains(words[1]), "{}", ended.stderr);
    }
    let both = attach(&["1", "--reclaim", "1M", "--budget", "1M"]);
    both.expect_code(2);
    assert!(both.stderr.contains("cannot be used with"), "{}", both.stderr);
}

#[test]
fn what_concerns_one_machine_asks_for_its_name() {
    let _fake = Fake::start("named");
    for words in [
        ["--reclaim", "16M"],
        ["--budget", "auto"],
        ["--range", "1000-2000"],
        ["--seconds", "5"],
        ["--qmp", "x"],
        ["--api", "x"],
    ] {
        let ended = attach(&words);
        ended.expect_code(2).expect_nothing_left();
        assert_eq!((ended.stdout.as_str(), ended.stderr.lines().count()), ("", 1));
        let is_helped = ended.stderr.starts_with("plimsoll attach: name the machine: ");
        assert!(is_helped && ended.stderr.contains("named"), "{words:?}: {}", ended.stderr);
    }
}

#[test]
fn a_name_of_two_machines_is_refused_with_the_process_ids_of_both() {
    let (one, other) = (Fake::start("twin"), Fake::start("twin"));
    for process in [one.pid(), other.pid()] {
        expect_refused("twin", &["--reclaim", "16M"], &format!("pid {process} (QEMU)"));
        assert_eq!(locks_of(&process), Vec::<String>::new());
    }
}

#[test]
fn a_machine_whose_ram_cannot_be_told_is_refused_and_its_lock_given_back() {
    let fake = Fake::start("empty");
    for words in
        [&["--reclaim", "16M"][..], &["--budget", "16M"], &["--dry-run"], &["--range", "1000-2000"], &[]]
    {
        expect_refused(&fake.pid(), words, "guest RAM");
    }
}
