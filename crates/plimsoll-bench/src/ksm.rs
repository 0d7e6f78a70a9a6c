//! Guided KSM against KSM over everything: the same processes, the same contents.
//!
//! Enters: nothing but the machine. Leaves: what a merged page cost in processor time, and how many pages were merged. What
//! must never happen: KSM set otherwise than it was found, or a figure of it with somebody else's pages in it.
//!
//! Time is told in *rounds*, since both sides may go as fast as they like and only processor time is compared. In each
//! round a part of the memory changes. The peer then looks at everything once, which is one pass of ksmd; ours looks at its
//! samples once and lets ksmd work as long as the guide says. Neither knows that nothing new comes after the wave. What
//! one pass costs and what it finds does not depend on how fast it is, so the peer's are made without sleeping.
mod sharer;

use crate::figures::float;
use crate::report::{Better, Comparison, Machine, Report, Run, Sample, Subject};
use crate::session::{BenchError, Interrupt, timed};
use anyhow::{Context, anyhow};
use plimsoll_linux::ksm::control::{ControlError, Counters, Ksm, Rate, Takeover};
use plimsoll_linux::ksm::domains::{self, Domain, DomainError, Party};
use plimsoll_linux::ksm::pace::Order;
use plimsoll_linux::ksm::{Guide, KsmError, Marker, Member, Merged, Options};
use plimsoll_sys::HvaRange;
use plimsoll_sys::mapping::Merging;
use plimsoll_types::{BLOCK_PAGES, DomainId, MachineId};
use serde::Serialize;
use sharer::{BLOCKS, Sharer, WAVE};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use sharer::role;

const PROCESSES: u64 = 4;
/// Passes of the peer. The kernel's own advisor makes one in 200 s by default: 40 minutes.
const ROUNDS: u64 = 12;
/// Odd, so that the median of ours is a measurement.
const REPEATS: usize = 3;
const DOMAIN: DomainId = DomainId(1);
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether the peer is through a pass, which costs nobody that is measured.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How often the guide looks how KSM does: one of its sleeps.
const TICK: Duration = Duration::from_millis(20);
/// The share of what can be merged at which the first merging counts as done.
const DONE: f64 = 0.95;

pub(crate) const NOTES: [&str; 4] = [
    "one pass of KSM over everything is set against one look of the guide at its samples; how often either happens is the \
     operator's choice, so a longer life without anything new moves the ratio of `lasting` further",
    "`once` ends when 95 % of what can be merged at first is merged, which the peer does in its second pass; KSM itself \
     does not stop there",
    "CPU is ksmd's, and on our side this thread's in all calls of the guide",
    "a page that two processes hold counts as one page saved",
];

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
pub(crate) struct Settings {
    processes: u64,
    bytes_each: u64,
    rounds: u64,
    wave: u64,
    repeats: usize,
    peer: &'static str,
}

/// Those of this benchmark.
pub(crate) const SETTINGS: Settings = Settings {
    processes: PROCESSES,
    bytes_each: BLOCKS * plimsoll_types::BLOCK_SIZE as u64,
    rounds: ROUNDS,
    wave: WAVE,
    repeats: REPEATS,
    peer: "KSM over all memory of the processes, smart_scan as the host has it",
};

/// How things stood at the end of a round.
#[derive(Clone, Copy, Debug)]
struct Mark {
    cpu: Duration,
    saved: u64,
}

/// What one side did.
#[derive(Clone, Debug)]
struct Outcome {
    marks: Vec<Mark>,
}

impl Outcome {
    fn last(&self) -> Option<Mark> {
        self.marks.last().copied()
    }

    /// When the first merging was done.
    fn once(&self) -> Option<Mark> {
        let whole = float(pairs(0));
        self.marks.iter().find(|mark| float(mark.saved) >= DONE * whole).copied()
    }
}

/// Pages that can be saved in a round.
fn pairs(round: u64) -> u64 {
    PROCESSES / 2 * sharer::shared_blocks(round) * u64::from(BLOCK_PAGES)
}

/// Measures the rows whose names begin so.
pub(crate) fn run(prefix: &str, interrupt: &Interrupt) -> Result<Report, BenchError> {
    let machine = Machine::here();
    println!(
        "guided KSM against KSM over everything: {PROCESSES} processes, {ROUNDS} rounds, {REPEATS} times peer, ours, peer"
    );
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let results = measure(prefix, interrupt)?;
    Ok(Report::new(machine, &SETTINGS, &NOTES, results)?)
}

/// The rows whose names begin so, each printed.
pub(crate) fn measure(prefix: &str, interrupt: &Interrupt) -> Result<Vec<Comparison>, BenchError> {
    let rows: Vec<Row> = rows().into_iter().filter(|row| row.name.starts_with(prefix)).collect();
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let mut runs = Vec::new();
    for _ in 0..REPEATS {
        runs.push((blanket(interrupt)?, guided(interrupt)?, blanket(interrupt)?));
    }
    let mut results = Vec::new();
    for row in rows {
        let sample = |outcome: &Outcome| {
            let mark = (row.at)(outcome).context("too little was merged to tell what it cost")?;
            let cpu = mark.cpu.as_secs_f64();
            anyhow::Ok(Sample { value: (row.value)(mark), cpu_seconds: Some(cpu) })
        };
        let run = |(before, ours, after): &(Outcome, Outcome, Outcome)| {
            anyhow::Ok(Run { ours: sample(ours)?, peer: sample(before)?, peer_again: sample(after)? })
        };
        let runs = runs.iter().map(run).collect::<anyhow::Result<Vec<_>>>()?;
        let Row { name, unit, better, goal, .. } = row;
        let subject = Subject { name: name.to_owned(), unit, better, goal };
        let comparison = Comparison::new(subject, runs)?;
        println!("  {comparison}");
        results.push(comparison);
    }
    Ok(results)
}

struct Row {
    name: &'static str,
    unit: &'static str,
    better: Better,
    goal: Option<f64>,
    at: fn(&Outcome) -> Option<Mark>,
    value: fn(Mark) -> f64,
}

fn rows() -> [Row; 3] {
    let cost = |mark: Mark| mark.cpu.as_secs_f64() * 1e6 / float(mark.saved);
    let row = |name, unit, better, goal, at, value| Row { name, unit, better, goal, at, value };
    [
        row("ksm-cost/lasting", "us/page", Better::Lower, Some(0.2), Outcome::last, cost),
        row("ksm-cost/once", "us/page", Better::Lower, None, Outcome::once, cost),
        row("ksm-merged", "pages", Better::Higher, Some(0.9), Outcome::last, |mark| float(mark.saved)),
    ]
}

fn start(interrupt: &Interrupt) -> Result<Vec<Sharer>, BenchError> {
    interrupt.check()?;
    let sharers = (0..PROCESSES).map(Sharer::start).collect::<anyhow::Result<_>>();
    Ok(sharers.context("cannot start a process to share with")?)
}

/// KSM over everything, as fast as it goes.
fn blanket(interrupt: &Interrupt) -> Result<Outcome, BenchError> {
    let mut sharers = start(interrupt)?;
    let party = |sharer: &Sharer| Party {
        name: "sharer".to_owned(),
        process: sharer.process(),
        domain: Domain::Shared(DOMAIN),
    };
    domains::check(&sharers.iter().map(party).collect::<Vec<_>>())
        .map_err(KsmError::from)
        .map_err(not_here_or_failed)?;
    let mut ksm = Ksm::take(Takeover::IfIdle).map_err(KsmError::from).map_err(not_here_or_failed)?;
    ksm.unmerge_all().map_err(failed)?;
    for sharer in &mut sharers {
        sharer.mark(sharer.memory(), Merging::Offered)?;
    }
    let began = ksm.counters().map_err(failed)?;
    let mut marks = Vec::new();
    for round in 0..ROUNDS {
        change(&mut sharers, round, interrupt)?;
        let before = ksm.counters().map_err(failed)?;
        ksm.run(Rate { pages: 5000, sleep_ms: 0 }).map_err(failed)?;
        until("a pass of KSM", LOOK_EVERY, interrupt, || {
            Ok(ksm.counters().map_err(failed)?.full_scans > before.full_scans)
        })?;
        ksm.stop().map_err(failed)?;
        marks.push(mark(&began, &until_at_rest(&ksm, interrupt)?, Duration::ZERO));
    }
    verify(&mut sharers)?;
    ksm.unmerge_all().map_err(failed)?;
    ksm.restore().map_err(failed)?;
    Ok(Outcome { marks })
}

/// KSM where the guide says, for as long as it says.
fn guided(interrupt: &Interrupt) -> Result<Outcome, BenchError> {
    let sharers: Vec<_> = start(interrupt)?.into_iter().map(|sharer| Arc::new(Mutex::new(sharer))).collect();
    let members = (0..).zip(&sharers).map(|(number, sharer)| member(number, sharer)).collect();
    let mut guide = Guide::start(members, Options::default()).map_err(not_here_or_failed)?;
    let mut own = Duration::ZERO;
    let mut marks = Vec::new();
    for round in 0..ROUNDS {
        let mut locked: Vec<_> = sharers.iter().map(|sharer| locked(sharer)).collect();
        for sharer in &mut locked {
            interrupt.check()?;
            sharer.change(round)?;
        }
        drop(locked);
        let mut clocked = |work: &mut dyn FnMut() -> Result<Order, KsmError>| {
            let (order, elapsed) = timed(work);
            own += Duration::from_secs_f64(elapsed.cpu_seconds);
            order.map_err(not_here_or_failed)
        };
        clocked(&mut || guide.round().map(|_| Order::Stop))?;
        until("KSM to rest", TICK, interrupt, || Ok(clocked(&mut || guide.tick())? == Order::Stop))?;
        let report = guide.report().map_err(not_here_or_failed)?;
        marks.push(Mark { cpu: report.ksmd + own, saved: report.merged.0 });
    }
    for sharer in &sharers {
        locked(sharer).verify(ROUNDS - 1)?;
    }
    let report = guide.end(Merged::Undo).map_err(not_here_or_failed)?;
    let seen = report.seen;
    println!(
        "  guided: ksmd {:?}, looking {:?} of {own:?} for {} pages in {} blocks marked",
        report.ksmd, report.scout, seen.looks, seen.marked
    );
    Ok(Outcome { marks })
}

/// Marks through the process itself.
struct Asked(Arc<Mutex<Sharer>>);

impl Marker for Asked {
    fn mark(&mut self, range: HvaRange, merging: Merging) -> io::Result<()> {
        locked(&self.0).mark(range, merging).map_err(io::Error::other)
    }
}

fn member(number: u32, sharer: &Arc<Mutex<Sharer>>) -> Member {
    let (process, memory) = {
        let sharer = locked(sharer);
        (sharer.process(), sharer.memory())
    };
    Member {
        id: MachineId(number),
        name: format!("sharer{number}"),
        process,
        domain: Some(DOMAIN),
        ranges: vec![memory],
        marker: Some(Box::new(Asked(Arc::clone(sharer)))),
    }
}

fn locked(sharer: &Mutex<Sharer>) -> std::sync::MutexGuard<'_, Sharer> {
    sharer.lock().unwrap_or_else(PoisonError::into_inner)
}

fn change(sharers: &mut [Sharer], round: u64, interrupt: &Interrupt) -> Result<(), BenchError> {
    for sharer in sharers {
        interrupt.check()?;
        sharer.change(round)?;
    }
    Ok(())
}

fn verify(sharers: &mut [Sharer]) -> Result<(), BenchError> {
    sharers.iter_mut().try_for_each(|sharer| Ok(sharer.verify(ROUNDS - 1)?))
}

fn mark(began: &Counters, now: &Counters, own: Duration) -> Mark {
    Mark { cpu: now.cpu.saturating_sub(began.cpu) + own, saved: now.saved().saturating_sub(began.saved()).0 }
}

/// The counters once ksmd, which was told to stop, has.
fn until_at_rest(ksm: &Ksm, interrupt: &Interrupt) -> Result<Counters, BenchError> {
    let mut last = ksm.counters().map_err(failed)?;
    until("ksmd to rest", LOOK_EVERY, interrupt, || {
        let now = ksm.counters().map_err(failed)?;
        let is_at_rest = now == last;
        last = now;
        Ok(is_at_rest)
    })?;
    Ok(last)
}

fn until(
    what: &str,
    pause: Duration,
    interrupt: &Interrupt,
    mut is_so: impl FnMut() -> Result<bool, BenchError>,
) -> Result<(), BenchError> {
    let start = Instant::now();
    while !is_so()? {
        interrupt.check()?;
        if start.elapsed() > PATIENCE {
            return Err(anyhow!("waited {} s in vain for {what}", PATIENCE.as_secs()).into());
        }
        std::thread::sleep(pause);
    }
    Ok(())
}

fn failed(error: ControlError) -> BenchError {
    BenchError::Failed(error.into())
}

/// What is missing for KSM, or in its way, cannot be measured here.
pub(crate) fn not_here_or_failed(error: KsmError) -> BenchError {
    match error {
        KsmError::Control(
            ControlError::NoKsm(_)
            | ControlError::Driven(_)
            | ControlError::Guided
            | ControlError::NotPermitted(_),
        )
        | KsmError::Domains(DomainError::Conflict { .. }) => {
            BenchError::NotHere(plimsoll_linux::explain(&error))
        }
        other => BenchError::Failed(other.into()),
    }
}
