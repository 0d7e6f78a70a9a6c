//! What is done when: commands, and between them slices of the jobs and paces that commands have begun.
//!
//! Enters: the parameters and, from the console, commands. Leaves: answers. No slice takes long, so that a command is looked
//! at within milliseconds of its arrival unless the machine itself stands still, which is what is to be measured.
use crate::console::Console;
use crate::disk::Disk;
use crate::memory::{Memory, Wrongs};
use crate::pace::Pace;
use crate::parameter;
use crate::protocol::{Command, Counts, Line, UnknownCommand, content};
use plimsoll_guest::content::{Content, Mix};
use plimsoll_guest::random::Rng;
use std::collections::VecDeque;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

/// Pages of one slice: well under a millisecond where memory is present.
const SLICE: usize = 32;
/// How long to listen when there is nothing to do.
const REST: Duration = Duration::from_secs(1);
/// What the guest's kernel keeps for itself when memory is taken.
const KEPT_KIB: u64 = 16 << 10;
/// One operation of so many rewrites its page.
const WRITE_ONE_IN: u64 = 5;
/// The number of the questions that came with the kernel's command line.
const UNASKED: u64 = 0;

/// What a command comes to: counts, or a sentence about what is wrong with it.
type Answer = Result<Counts, String>;

/// Something that takes many slices.
#[derive(Debug)]
struct Job {
    question: u64,
    kind: JobKind,
    next: usize,
    wrong: u64,
}

#[derive(Clone, Copy, Debug)]
enum JobKind {
    Alloc { pages: usize },
    Fill,
    Sweep,
    Free,
}

#[derive(Debug)]
struct Hot {
    pages: u64,
    pace: Pace,
}

/// Everything the guest is at.
#[derive(Debug)]
pub(crate) struct Work {
    memory: Memory,
    disk: Option<Disk>,
    disk_content: (Content, u64),
    disk_pace: Option<Pace>,
    hot: Option<Hot>,
    jobs: VecDeque<Job>,
    wrongs: Wrongs,
    rng: Rng,
    operations: u64,
    rewrites: u64,
    started: Instant,
    /// Commands of the kernel's command line.
    orders: Vec<String>,
}

impl Work {
    /// Reads the parameters `seed`, `disk` (the disk's seed), `mix` and `work` of the command line. `work` is a list of
    /// commands: `alloc:20000,hot:500:1000`.
    pub(crate) fn new(line: &str) -> Result<Self, String> {
        let number = |name| match parameter(line, name) {
            Some(text) => text.parse().map_err(|_| format!("parameter {name}={text} is not a number")),
            None => Ok(1),
        };
        let mix: Mix = match parameter(line, "mix") {
            Some(text) => text.parse().map_err(|error| format!("parameter mix={text}: {error}"))?,
            None => Mix::default(),
        };
        let (seed, disk_seed) = (number("seed")?, number("disk")?);
        let content = |seed, mix| content(seed, mix).map_err(|error| error.to_string());
        let orders = parameter(line, "work").unwrap_or_default().split(',').filter(|one| !one.is_empty());
        Ok(Self {
            memory: Memory::new(content(seed, mix)?, seed),
            disk: None,
            disk_content: (content(disk_seed, Mix::default())?, disk_seed),
            disk_pace: None,
            hot: None,
            jobs: VecDeque::new(),
            wrongs: Wrongs::default(),
            rng: Rng::new(seed),
            operations: 0,
            rewrites: 0,
            started: Instant::now(),
            orders: orders.map(|one| one.replace(':', " ")).collect(),
        })
    }

    /// Works until told to switch off.
    pub(crate) fn go_on(&mut self, console: &mut Console) -> io::Result<()> {
        for order in std::mem::take(&mut self.orders) {
            let parsed = order.parse().map_err(|error: UnknownCommand| error.to_string());
            // Nobody waits for these answers, but a reader of the kernel's log wants to know.
            if let Err(why) | Ok(Some(Err(why))) = parsed.map(|command| self.obey(UNASKED, command)) {
                eprintln!("plimsoll-stock-init: {order}: {why}");
            }
        }
        loop {
            if let Some(line) = console.next(self.rest())? {
                let (question, text) = numbered(&line);
                let answer = match text.parse() {
                    Ok(Command::Off) => return Ok(()),
                    Ok(command) => self.obey(question, command),
                    Err(error) => Some(Err(error.to_string())),
                };
                if let Some(answer) = answer {
                    console.say(&Line::Answer(question, answer))?;
                }
            }
            if let Some((question, counts)) = self.slice() {
                console.say(&Line::Answer(question, counts))?;
            }
            for place in std::mem::take(&mut self.wrongs.untold) {
                console.say(&Line::Wrong(place))?;
            }
        }
    }

    /// Does what a command says, or begins to. What is only begun is answered later.
    fn obey(&mut self, question: u64, command: Command) -> Option<Answer> {
        let now = Instant::now();
        match command {
            Command::Alloc { pages } => {
                // More than can be counted is more than there is.
                let pages = usize::try_from(pages).unwrap_or(usize::MAX);
                self.begin(question, JobKind::Alloc { pages });
            }
            Command::Fill => self.begin(question, JobKind::Fill),
            Command::Sweep => self.begin(question, JobKind::Sweep),
            Command::Free => self.begin(question, JobKind::Free),
            Command::Hot { pages, per_second } => {
                self.hot = Pace::new(per_second, now).map(|pace| Hot { pages, pace });
                return Some(Ok(Counts::default()));
            }
            Command::Disk { per_second } => return Some(self.start_disk(per_second, now)),
            Command::Idle => {
                (self.hot, self.disk_pace) = (None, None);
                return Some(Ok(Counts::default()));
            }
            Command::Report => return Some(Ok(self.report())),
            // Whoever reads commands ends the loop for `off`.
            Command::Ping | Command::Off => return Some(Ok(Counts::default())),
        }
        None
    }

    /// Puts a job behind those that were begun before.
    fn begin(&mut self, question: u64, kind: JobKind) {
        self.jobs.push_back(Job { question, kind, next: 0, wrong: 0 });
    }

    /// Makes room for more pages, unless the guest would run out of memory.
    fn reserve(&mut self, pages: usize) -> Result<(), String> {
        let free = available_kib().saturating_sub(KEPT_KIB) / 4;
        if pages as u64 > free {
            return Err(format!("{pages} pages were asked for and {free} are free: ask for fewer"));
        }
        self.memory.reserve(pages)
    }

    fn start_disk(&mut self, per_second: u64, now: Instant) -> Answer {
        if self.disk.is_none() {
            let (content, seed) = self.disk_content.clone();
            self.disk = Some(Disk::open(content, seed).map_err(|error| format!("no disk: {error}"))?);
        }
        self.disk_pace = Pace::new(per_second, now);
        Ok(Counts::default())
    }

    /// How long there is nothing to do.
    fn rest(&self) -> Duration {
        if !self.jobs.is_empty() {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let paces = [self.hot.as_ref().map(|hot| hot.pace), self.disk_pace];
        paces.into_iter().flatten().map(|pace| pace.wait(now)).min().unwrap_or(REST)
    }

    /// A little of everything that is due. Returns the answer to a job that is done with it.
    fn slice(&mut self) -> Option<(u64, Answer)> {
        let now = Instant::now();
        let due = |pace: Option<&mut Pace>| pace.is_some_and(|pace| pace.take(now));
        let (is_hot_due, is_disk_due) =
            (due(self.hot.as_mut().map(|hot| &mut hot.pace)), due(self.disk_pace.as_mut()));
        if is_hot_due {
            self.touch();
        }
        if is_disk_due
            && let Some(disk) = &mut self.disk
            && let Err(error) = disk.operate(&mut self.wrongs)
        {
            // A block that cannot be read is as wrong as one that reads wrong.
            self.wrongs.note(|| format!("disk error={error}"));
        }
        let job = self.jobs.pop_front()?;
        let question = job.question;
        self.work_on(job).map(|answer| (question, answer))
    }

    /// A little of a job. Returns its answer when it is done; otherwise it is the next again.
    fn work_on(&mut self, mut job: Job) -> Option<Answer> {
        let end = match job.kind {
            JobKind::Alloc { pages } => pages,
            JobKind::Fill | JobKind::Sweep => self.memory.len(),
            JobKind::Free => 0,
        };
        if let (JobKind::Alloc { pages }, 0) = (job.kind, job.next)
            && let Err(why) = self.reserve(pages)
        {
            return Some(Err(why));
        }
        let before = self.wrongs.count;
        let stop = end.min(job.next.saturating_add(SLICE));
        for index in job.next..stop {
            match job.kind {
                JobKind::Alloc { .. } => self.memory.push(),
                JobKind::Fill => self.memory.rewrite(index, &mut self.wrongs),
                JobKind::Sweep => self.memory.verify(index, &mut self.wrongs),
                JobKind::Free => {}
            }
        }
        job.next = stop;
        job.wrong += self.wrongs.count - before;
        if job.next < end {
            self.jobs.push_front(job);
            return None;
        }
        if let JobKind::Free = job.kind {
            self.memory.free();
        }
        Some(Ok([("pages", job.next as u64), ("wrong", job.wrong)].into()))
    }

    /// One operation on the hot set.
    fn touch(&mut self) {
        let Some(hot) = &self.hot else { return };
        if self.memory.len() == 0 {
            return;
        }
        let index = self.memory.hot_page(self.rng.below(hot.pages.clamp(1, self.memory.len() as u64)));
        self.memory.verify(index, &mut self.wrongs);
        self.operations += 1;
        if self.rng.below(WRITE_ONE_IN) == 0 {
            self.memory.rewrite(index, &mut self.wrongs);
            self.rewrites += 1;
        }
    }

    fn report(&mut self) -> Counts {
        let (reads, writes) = self.disk.as_ref().map_or((0, 0), |disk| (disk.reads, disk.writes));
        let milliseconds = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        [
            ("operations", self.operations),
            ("rewrites", self.rewrites),
            ("disk_reads", reads),
            ("disk_writes", writes),
            ("wrong", self.wrongs.count),
            ("pages", self.memory.len() as u64),
            ("touched", self.memory.close_window()),
            ("available_kib", available_kib()),
            ("uptime_ms", milliseconds),
        ]
        .into()
    }
}

/// A question's number and the rest of its line. What has no number is answered to nobody.
fn numbered(line: &str) -> (u64, &str) {
    let split = line.split_once(' ').and_then(|(number, rest)| Some((number.parse().ok()?, rest)));
    split.unwrap_or((UNASKED, line))
}

/// What the guest's kernel says is left; 0 if it does not.
fn available_kib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0)
}
