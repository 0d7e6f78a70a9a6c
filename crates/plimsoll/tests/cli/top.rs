//! `plimsoll top` on a terminal of its own, which this test holds the other end of.
use super::daemon::{Directory, Machine, plimsoll, start};
use super::run::{alone, can, wait_until};
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// A terminal and what is drawn on it.
struct Terminal {
    ours: File,
    theirs: File,
    before: Termios,
    /// Everything that was written, and the picture it makes.
    seen: Arc<Mutex<(Vec<u8>, vt100::Parser)>>,
    reader: JoinHandle<()>,
}

impl Terminal {
    fn new(rows: u16, columns: u16) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let theirs = OpenOptions::new().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let ours = File::from(ours);
        let seen = Arc::new(Mutex::new((Vec::new(), vt100::Parser::new(rows, columns, 0))));
        let (mut from, into) = (ours.try_clone().unwrap(), Arc::clone(&seen));
        let reader = thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                let mut seen = into.lock().unwrap();
                seen.0.extend_from_slice(&bytes[..count]);
                seen.1.process(&bytes[..count]);
            }
        });
        let terminal = Self { before: tcgetattr(&theirs).unwrap(), ours, theirs, seen, reader };
        terminal.resize(rows, columns);
        terminal
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.ours, size).unwrap();
        self.seen.lock().unwrap().1.screen_mut().set_size(rows, columns);
    }

    fn top(&self, directory: &Directory, variables: &[(&str, &str)]) -> Child {
        let end = || self.theirs.try_clone().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command
            .args(["top", "--directory", directory.text()])
            .env_remove("NO_COLOR")
            .env("TERM", "xterm-256color");
        command.envs(variables.iter().copied()).stdin(end()).stdout(end()).stderr(end());
        command.spawn().unwrap()
    }

    fn press(&mut self, keys: &str) {
        self.ours.write_all(keys.as_bytes()).unwrap();
    }

    fn picture(&self) -> String {
        self.seen.lock().unwrap().1.screen().contents()
    }

    fn shows(&self, what: &str) {
        wait_until(&format!("the terminal shows {what:?}"), || self.picture().contains(what));
    }

    /// The terminal is as it was before, whoever had it meanwhile. Gives what was written on it.
    fn expect_given_back(self) -> String {
        let after = tcgetattr(&self.theirs).unwrap();
        assert_eq!(
            (after.local_modes, after.input_modes, after.output_modes),
            (self.before.local_modes, self.before.input_modes, self.before.output_modes)
        );
        drop(self.theirs);
        // The reader ends when the other side is closed.
        self.reader.join().unwrap();
        let seen = self.seen.lock().unwrap();
        assert!(!seen.1.screen().alternate_screen(), "the other screen is left on");
        assert!(!seen.1.screen().hide_cursor(), "the cursor is left hidden");
        String::from_utf8_lossy(&seen.0).into_owned()
    }
}

fn signal(child: &Child, signal: Signal) {
    rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
}

fn ended(mut child: Child) -> ExitStatus {
    wait_until("it ends", || child.try_wait().unwrap().is_some());
    child.wait().unwrap()
}

#[test]
fn top_follows_a_daemon_that_goes_and_comes_back_and_leaves_the_terminal_as_it_was() {
    let _alone = alone();
    if !can("userfaultfd") {
        return;
    }
    let directory = Directory::new("top");
    let daemon = start(&directory);
    let mut machine = Machine::start(&directory);
    machine.verifies(1000);
    let mut terminal = Terminal::new(24, 80);
    let top = terminal.top(&directory, &[]);
    for what in ["budget 64M", "lonely", "█ resident", "handed over by its VMM", "96M"] {
        terminal.shows(what);
    }
    terminal.shows("s ago");
    terminal.press("n");
    terminal.shows("by name");
    assert!(!terminal.picture().contains("last reason"), "{}", terminal.picture());
    terminal.resize(40, 140);
    signal(&top, Signal::WINCH);
    terminal.shows("last reason");
    println!("{}", terminal.picture());
    let once = plimsoll(&directory, &["top", "--once"]);
    once.expect_code(0);
    println!("{}", once.stdout);
    assert!(once.stdout.lines().all(|line| line.chars().count() <= 80), "{}", once.stdout);
    let json: serde_json::Value =
        serde_json::from_str(&plimsoll(&directory, &["top", "--json"]).stdout).unwrap();
    let (pages, size) = (&json["machines"][0]["pages"], 96_u64 << 20);
    let of = |name: &str| pages[name].as_u64().unwrap();
    let places = ["resident_bytes", "limbo_bytes", "stored_bytes", "disk_bytes", "free_bytes"];
    assert_eq!(places.map(of).iter().sum::<u64>(), size, "{pages}");
    assert!(json["machines"][0]["faults_per_second"].is_u64(), "{json}");
    machine.finish();
    terminal.shows("no machine is managed");
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0);
    terminal.shows("no answer, what is shown is old");
    let daemon = start(&directory);
    terminal.shows("the daemon answers again");
    signal(&top, Signal::TERM);
    assert!(ended(top).success());
    assert!(terminal.expect_given_back().contains("\u{1b}[38;"), "it has colours");
    daemon.signal(Signal::TERM);
    daemon.wait().expect_code(0).expect_nothing_left();
}

#[test]
fn top_without_colours_has_none_and_ends_with_q_also_without_a_daemon() {
    let directory = Directory::new("top-nobody");
    let mut terminal = Terminal::new(24, 80);
    let top = terminal.top(&directory, &[("NO_COLOR", "1")]);
    terminal.shows("no daemon answers");
    terminal.press("q");
    assert!(ended(top).success());
    let written = terminal.expect_given_back();
    assert!(!written.contains("\u{1b}[38;") && !written.contains("\u{1b}[3"), "{written:?}");
    let once = plimsoll(&directory, &["top", "--once"]);
    once.expect_code(2).expect_nothing_left();
    assert!(once.stderr.contains("no daemon answers"), "{}", once.stderr);
}
