//! The other role of this test program: a process with memory that is used as it is told, and whose every word it knows.
//!
//! Enters: a kind and a size as arguments, orders line by line. Leaves: an answer for each. A page's words are made of its
//! number; the first one also counts how often the page was used.
use plimsoll_sys::mapping::{AnonymousMapping, HugePages, Memfd, SharedMapping};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE};
use rustix::mm::{MlockAllFlags, mlockall};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

pub(crate) const ROLE: &str = "be-a-guest";
const WORDS: u64 = PAGE_SIZE as u64 / 8;
/// Touches between two looks for orders.
const BATCH: u64 = 1024;

enum Ram {
    Private(AnonymousMapping),
    Shared(SharedMapping),
}

impl Ram {
    fn new(kind: &str, size: ByteCount) -> Self {
        match kind {
            "private" => Self::Private(AnonymousMapping::new(size, HugePages::Never).unwrap()),
            "huge" => Self::Private(AnonymousMapping::new(size, HugePages::Prefer).unwrap()),
            "memfd" => Self::Shared(SharedMapping::new(&Memfd::create("guest", size).unwrap()).unwrap()),
            _ => panic!("{kind:?} is no kind of memory"),
        }
    }

    fn base(&self) -> Hva {
        match self {
            Self::Private(mapping) => mapping.base(),
            Self::Shared(mapping) => mapping.base(),
        }
    }

    fn get(&self, word: u64) -> u64 {
        match self {
            Self::Private(mapping) => mapping.read_u64(ByteCount(word * 8)).unwrap(),
            Self::Shared(mapping) => {
                mapping.as_atomic_u64s()[usize::try_from(word).unwrap()].load(Ordering::Relaxed)
            }
        }
    }

    fn set(&self, word: u64, value: u64) {
        match self {
            Self::Private(mapping) => mapping.write_u64(ByteCount(word * 8), value).unwrap(),
            Self::Shared(mapping) => {
                mapping.as_atomic_u64s()[usize::try_from(word).unwrap()].store(value, Ordering::Relaxed);
            }
        }
    }
}

/// Half of a page is noise, half of it repeats.
fn content(page: u64, word: u64) -> u64 {
    let mixed = (page << 9 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    if word < WORDS / 2 { mixed ^ mixed >> 29 } else { page }
}

/// What the guest does between orders.
enum Work {
    Idle,
    /// Touches all hot pages, then waits until so long after it began.
    Sweep(Duration),
    /// Touches hot pages without pause.
    Flat,
}

struct Guest {
    ram: Ram,
    pages: u64,
    uses: Vec<u64>,
    hot: Vec<u64>,
    work: Work,
    operations: u64,
    wrong: u64,
}

impl Guest {
    fn touch(&mut self, page: u64) {
        let uses = &mut self.uses[usize::try_from(page).unwrap()];
        let word = page * WORDS;
        self.wrong += u64::from(self.ram.get(word) != content(page, 0).wrapping_add(*uses));
        *uses += 1;
        self.ram.set(word, content(page, 0).wrapping_add(*uses));
        self.operations += 1;
    }

    fn verify(&mut self) {
        for page in 0..self.pages {
            self.touch(page);
            let bad =
                (1..WORDS).filter(|word| self.ram.get(page * WORDS + word) != content(page, *word)).count();
            self.wrong += u64::try_from(bad).unwrap();
        }
    }

    /// `count` pages spread over the machine, or from its beginning on.
    fn set_hot(&mut self, count: u64, spread: &str) {
        // An odd factor and a power of two of pages: no page twice.
        let factor = if spread == "scattered" { 40_503 } else { 1 };
        self.hot = (0..count).map(|place| place * factor % self.pages).collect();
    }

    fn obey(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["sweep", count, spread, ms] => {
                self.set_hot(count.parse().unwrap(), spread);
                self.work = Work::Sweep(Duration::from_millis(ms.parse().unwrap()));
                "sweeping".to_owned()
            }
            ["flat", count, spread] => {
                self.set_hot(count.parse().unwrap(), spread);
                self.work = Work::Flat;
                "running".to_owned()
            }
            ["idle"] => {
                self.work = Work::Idle;
                "idle".to_owned()
            }
            ["operations"] => self.operations.to_string(),
            ["verify"] => {
                self.verify();
                self.wrong.to_string()
            }
            ["lock"] => {
                mlockall(MlockAllFlags::CURRENT).unwrap();
                "locked".to_owned()
            }
            ["exec"] => panic!("{}", Command::new("sleep").arg("1000").exec()),
            _ => panic!("{line:?} is no order"),
        }
    }

    fn run(&mut self, orders: &Receiver<String>) {
        let mut next = Instant::now();
        let mut at = 0;
        loop {
            let patience = match self.work {
                Work::Idle => Duration::from_secs(3600),
                Work::Sweep(_) => next.saturating_duration_since(Instant::now()),
                Work::Flat => Duration::ZERO,
            };
            match orders.recv_timeout(patience) {
                Ok(order) => println!("{}", self.obey(&order)),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            match self.work {
                Work::Idle => {}
                Work::Sweep(every) if Instant::now() >= next => {
                    next = Instant::now() + every;
                    (0..self.hot.len()).for_each(|place| self.touch(self.hot[place]));
                }
                Work::Sweep(_) => {}
                Work::Flat => (0..BATCH).for_each(|_| {
                    at = (at + 7_919) % self.hot.len();
                    self.touch(self.hot[at]);
                }),
            }
        }
    }
}

/// Plays the guest until its orders end.
pub(crate) fn role(kind: &str, mib: &str) -> ExitCode {
    let size = ByteCount::mib(mib.parse().unwrap());
    let pages = size.pages_floor().0;
    let ram = Ram::new(kind, size);
    for page in 0..pages {
        (0..WORDS).for_each(|word| ram.set(page * WORDS + word, content(page, word)));
    }
    println!("{}", ram.base().0);
    let (send, orders) = channel();
    std::thread::spawn(move || {
        let lines = std::io::stdin().lines().map_while(Result::ok);
        lines.take_while(|line| send.send(line.clone()).is_ok()).count()
    });
    let uses = vec![0; usize::try_from(pages).unwrap()];
    let (hot, work) = (Vec::new(), Work::Idle);
    Guest { ram, pages, uses, hot, work, operations: 0, wrong: 0 }.run(&orders);
    ExitCode::SUCCESS
}

/// A guest in a process of its own, which ends when this is dropped.
pub(crate) struct Started {
    child: Child,
    output: BufReader<ChildStdout>,
    pub(crate) ram: HvaRange,
}

impl Started {
    pub(crate) fn new(kind: &str, mib: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([ROLE, kind, &mib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let base = Hva(answer(&mut output).parse().unwrap());
        Self { child, output, ram: HvaRange::new(base, ByteCount::mib(mib)).unwrap() }
    }

    pub(crate) fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        answer(&mut self.output)
    }

    pub(crate) fn tell(&mut self, order: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{order}").unwrap();
    }

    pub(crate) fn number(&mut self, order: &str) -> u64 {
        self.ask(order).parse().unwrap()
    }

    pub(crate) fn process(&mut self) -> Pidfd {
        Pidfd::from_child(&mut self.child).unwrap()
    }

    pub(crate) fn id(&self) -> ProcessId {
        ProcessId::new(self.child.id()).unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn answer(output: &mut impl BufRead) -> String {
    let mut line = String::new();
    assert_ne!(output.read_line(&mut line).unwrap(), 0, "the guest ended");
    line.trim().to_owned()
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
