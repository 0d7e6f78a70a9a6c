//! What the tests need from this machine: guests, swap, and `plimsoll attach` as a process that is read line by line.
pub(crate) use crate::machine::{alone, can, page_out, swap};
use plimsoll_stock::{Command, Counts, Guest};
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_types::{ByteCount, PageCount};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long anything may take: much where nothing else runs, enough where much does.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// What every test here needs but those of libvirt's.
pub(crate) const STOCK: [&str; 4] = ["qemu", "cloud-kernel", "root", "zram"];

/// Asks, and insists on an answer.
pub(crate) fn ask(guest: &mut Guest, command: Command) -> Counts {
    match guest.console().ask(command, PATIENCE) {
        Ok(counts) => counts,
        Err(error) => panic!("{error}: {:?}; {}", std::error::Error::source(&error), guest.logs()),
    }
}

/// Verifies everything once; nothing may be wrong.
pub(crate) fn sweep(guest: &mut Guest) {
    let wrong = ask(guest, Command::Sweep).get("wrong").unwrap();
    assert_eq!(wrong, 0, "{:?}", guest.console().wrongs());
    let report = guest.console().report(PATIENCE).unwrap();
    assert_eq!(report.wrong, 0, "{:?}", guest.console().wrongs());
}

/// Guest RAM that is in the host's memory, and in its swap.
pub(crate) fn backed(guest: &Guest) -> (ByteCount, ByteCount) {
    let pagemap = Pagemap::open(guest.process()).unwrap();
    let (mut entries, mut present, mut swapped) = (Vec::new(), PageCount(0), PageCount(0));
    for range in guest.ram().unwrap() {
        pagemap.read(range, &mut entries).unwrap();
        let count = |flag: Entry| entries.iter().filter(|entry| entry.contains(flag)).count();
        present += PageCount(count(Entry::PRESENT).try_into().unwrap());
        swapped += PageCount(count(Entry::SWAPPED).try_into().unwrap());
    }
    (present.bytes(), swapped.bytes())
}

/// A run of `plimsoll`, whose lines of JSON are read.
pub(crate) struct Manager {
    child: Child,
    lines: Receiver<Value>,
    reader: Option<JoinHandle<()>>,
    seen: Vec<Value>,
}

impl Manager {
    /// `plimsoll attach --json` with these words.
    pub(crate) fn attach(words: &[&str]) -> Self {
        Self::start("attach", words, usize::MAX)
    }

    /// The same, of which the first line is read and then no more.
    pub(crate) fn attach_unheard(words: &[&str]) -> Self {
        Self::start("attach", words, 1)
    }

    /// One of plimsoll's verbs with `--json` and these words.
    pub(crate) fn run(verb: &str, words: &[&str]) -> Self {
        Self::start(verb, words, usize::MAX)
    }

    fn start(verb: &str, words: &[&str], lines_max: usize) -> Self {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command.arg(verb).args(words).arg("--json");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (sender, lines) = channel();
        let stdout: ChildStdout = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok).take(lines_max) {
                let value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
                if sender.send(value).is_err() {
                    break;
                }
            }
        });
        Self { child, lines, reader: Some(reader), seen: Vec::new() }
    }

    /// The first line from now on that is as wanted.
    pub(crate) fn until(&mut self, what: &str, mut is_wanted: impl FnMut(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if is_wanted(&line) {
                        return line;
                    }
                }
                Err(error) => {
                    let _ = self.child.kill();
                    let mut words = String::new();
                    let _ = self.child.stderr.take().unwrap().read_to_string(&mut words);
                    let last = self.seen.iter().rev().take(5).collect::<Vec<_>>();
                    panic!("waited in vain for {what} ({error}); the last lines were {last:?}; {words}");
                }
            }
        }
    }

    /// The next period.
    pub(crate) fn period(&mut self) -> Value {
        self.until("a period", |line| line["event"] == "period")
    }

    /// Ends it without a word, and gives all it has said.
    pub(crate) fn kill(mut self) -> Vec<Value> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // Of its last line there may be a part only.
        let _ = self.reader.take().unwrap().join();
        let mut lines = std::mem::take(&mut self.seen);
        lines.extend(self.lines.try_iter());
        lines
    }

    /// Asks it to end, as a terminal does.
    pub(crate) fn signal(&self) {
        self.send(rustix::process::Signal::INT);
    }

    /// Sends it that signal.
    pub(crate) fn send(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Asks it to end and reads its last word.
    pub(crate) fn interrupt(mut self) -> Value {
        self.signal();
        let last = self.until("its last word", |line| line["event"] == "ended");
        assert!(self.child.wait().unwrap().success());
        last
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> (ExitStatus, Vec<Value>, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it hangs; it said {:?}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        };
        self.reader.take().unwrap().join().unwrap();
        let mut lines = std::mem::take(&mut self.seen);
        lines.extend(self.lines.try_iter());
        let mut words = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut words).unwrap();
        (status, lines, words)
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes that a line says.
pub(crate) fn bytes(line: &Value, field: &str) -> u64 {
    line[field].as_u64().unwrap_or_else(|| panic!("no {field} in {line}"))
}

/// What the machine takes, compressed pages included.
pub(crate) fn taken(line: &Value) -> ByteCount {
    ByteCount(bytes(line, "resident_bytes") + bytes(line, "compressed_bytes"))
}
