//! What it costs a guest that so much of its memory is taken: by its balloon, by the kernel's paging, by our pager.
//!
//! Enters: nothing but the machine. Leaves: a ratio for each guest, each way and each tenth of the guest's memory: its operations a
//! second against those of the same guest from which nothing is taken; and the losses as a file of costs that the policy reads. What
//! must never happen: a rate of a guest that was left more than it was to be left; what is taken is measured while the guest works,
//! and where it falls short there is no row but a sentence.
//!
//! Both guests have touched all of their memory once. The *busy* one uses up to half of it at a time: it allocates pages, compares
//! and frees them in random order, so that what it uses moves through all of its memory, as in a kernel's page allocator. The *idle*
//! one keeps three tenths, works on these alone, and has the rest free. Outside nobody sees which pages they have free but the balloon.
use crate::contents::{MIX, SEED};
use crate::guest::{self, Guest};
use crate::pager::keepers::Ours;
use crate::pager::measures::pages_per_second;
use crate::report::{Comparison, Machine, Report, Run, Sample, higher, write_json};
use crate::session::{BenchError, Interrupt};
use crate::swap;
use anyhow::{Context, anyhow};
use plimsoll_core::ledger::Budget;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_linux::cgroup::{MemoryCgroup, sweep_stale};
use plimsoll_linux::uffd::waiting::Waiting;
use plimsoll_linux::zram::ZramSwap;
use plimsoll_policy::Ppm;
use plimsoll_policy::costs::{CostsFile, Losses, RungFile};
use plimsoll_sys::ProcessId;
use plimsoll_sys::pidfd::Signal;
use plimsoll_types::{ByteCount, PageCount};
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::control::BalloonPiece;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// A guest's memory: 6 MiB are image and stacks, 2 MiB the allocator's tables.
const RAM: ByteCount = ByteCount::mib(104);
/// What the busy guest uses at most.
const USED_MOST: ByteCount = ByteCount::mib(48);
/// What the idle guest keeps and works on: three tenths.
const KEPT: ByteCount = ByteCount(RAM.0 / 10 * 3);
/// What is taken, in percent of its memory.
const TAKEN: [u64; 6] = [10, 20, 30, 40, 50, 60];
/// Odd, so that the median of ours is a measurement.
const ROUNDS: usize = 3;
/// How long it works before it counts, and how long it counts, each with the number of the window that ends it.
const WARM: (u64, Duration) = (1, Duration::from_millis(700));
const WORK: (u64, Duration) = (2, Duration::from_secs(1));
/// How often is looked at what is taken.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What a guest may have beyond what it was to be left, at the median look: 1 % of its memory, and what the kernel counts in batches.
const SLACK: ByteCount = ByteCount(RAM.0 / 100 + (1 << 20));
/// What our control groups are called.
const PREFIX: &str = "plimsoll-cost";
/// How often a guest of the kernel's is looked at: it takes a page in 11 us (FACTS), so 0.4 MiB meanwhile.
const WATCH_EVERY: Duration = Duration::from_millis(1);
/// By how much its limit is lowered at a time: what is taken is in RAM again in part, compressed.
const STEP: ByteCount = ByteCount(1 << 19);
/// No limit.
const LIFTED: ByteCount = ByteCount(RAM.0 * 2);

const NOTES: [&str; 6] = [
    "ours is the guest from which something is taken, by whatever way; the peer is the same guest left alone",
    "what the host keeps for the guest counts as the guest's: compressed pages, and the store's tables; so 30 means that 30 % of its \
     memory are there for others",
    "busy: what the guest uses moves through all of its memory; idle: it works on three tenths and has the rest free",
    "kernel: a guest that is above what it is left is stopped until the kernel has paged out of its memory cgroup, to zram (lz4), what \
     brings it a 32nd below: what memory.high does to a task, and what a fault that has to reclaim waits for",
    "pager: our manager with what the guest is left as its budget",
    "CPU is user and system time of this process and of the guest's, all threads",
];

/// How a guest uses its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Usage {
    Busy,
    Idle,
}

impl Usage {
    const ALL: [Self; 2] = [Self::Busy, Self::Idle];

    const fn name(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Idle => "idle",
        }
    }

    /// What it does before its work: all memory is touched.
    fn prepare(self, guest: &mut Guest) -> Result<(), BenchError> {
        guest.probe(ProbeCommand { stride: 512, ..ProbeCommand::new(Task::Allocate, Order::Ascending) })?;
        guest.probe(ProbeCommand::new(Task::Free, Order::Ascending))?;
        if self == Self::Idle {
            let pages = KEPT.pages_floor().0;
            guest.probe(ProbeCommand { pages, ..ProbeCommand::new(Task::Allocate, Order::Ascending) })?;
        }
        Ok(())
    }

    /// Its work, until the window changes.
    const fn work(self) -> ProbeCommand {
        let (pages, passes) = (USED_MOST.pages_floor().0, 0);
        match self {
            Self::Busy => ProbeCommand { pages, passes, ..ProbeCommand::new(Task::Churn, Order::Random) },
            Self::Idle => {
                let stride = WorkloadKind::Zipf as u64;
                ProbeCommand { stride, passes, ..ProbeCommand::new(Task::Work, Order::Random) }
            }
        }
    }
}

/// A way to take memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Balloon,
    Kernel,
    Pager,
}

impl Way {
    const ALL: [Self; 3] = [Self::Balloon, Self::Kernel, Self::Pager];

    const fn name(self) -> &'static str {
        match self {
            Self::Balloon => "balloon",
            Self::Kernel => "kernel",
            Self::Pager => "pager",
        }
    }
}

/// A row: of such a guest so many percent taken that way.
#[derive(Clone, Copy, Debug)]
struct Row {
    usage: Usage,
    way: Way,
    percent: u64,
}

impl Row {
    fn all() -> impl Iterator<Item = Self> {
        let of = |usage| {
            Way::ALL.into_iter().flat_map(move |way| TAKEN.map(|percent| Self { usage, way, percent }))
        };
        Usage::ALL.into_iter().flat_map(of)
    }

    fn name(self) -> String {
        format!("cost/{}/{}/{}", self.usage.name(), self.way.name(), self.percent)
    }

    const fn taken(self) -> ByteCount {
        ByteCount(RAM.0 / 100 * self.percent).pages_floor().bytes()
    }

    /// What the guest is left.
    const fn left(self) -> ByteCount {
        RAM.saturating_sub(self.taken())
    }
}

/// A guest, and what holds it to what it is left. The guest ends first, and the cgroup before swap, so that nothing is read back.
enum Held {
    Free(Guest),
    Caged {
        guest: Guest,
        cgroup: MemoryCgroup,
        device: ZramSwap,
        /// What the cgroup is charged for beside the guest's memory.
        beside: ByteCount,
    },
    Managed(Box<Ours>),
}

impl Held {
    fn guest(&mut self) -> &mut Guest {
        match self {
            Self::Free(guest) | Self::Caged { guest, .. } => guest,
            Self::Managed(ours) => ours.first(),
        }
    }

    /// What the guest takes of the host, compressed pages included.
    fn takes(&mut self) -> Result<ByteCount, BenchError> {
        Ok(match self {
            Self::Free(guest) => present(guest)?,
            Self::Caged { guest, device, .. } => {
                present(guest)? + device.memory_used().context("zram's use")?
            }
            Self::Managed(ours) => ours.charged()?,
        })
    }

    /// Has the kernel keep to what the guest is left, until it is time to look again. A limit that a guest at work meets cannot be
    /// kept: it takes pages faster than the kernel gives them up, and is killed at last (docs/bench.md). So it does not work
    /// meanwhile, and its limit is lifted when it does.
    fn keep_to(&mut self, left: ByteCount) -> Result<(), BenchError> {
        let start = Instant::now();
        if let Self::Caged { guest, cgroup, beside, .. } = self {
            *beside = cgroup.used().context("a cgroup's use")?.saturating_sub(present(guest)?);
        }
        while start.elapsed() < LOOK_EVERY {
            let Self::Caged { guest, cgroup, device, beside } = &*self else {
                std::thread::sleep(LOOK_EVERY);
                break;
            };
            std::thread::sleep(WATCH_EVERY);
            if Self::excess(cgroup, device, *beside, left)? > ByteCount(0) {
                guest.process().send_signal(Signal::STOP).context("cannot stop a guest")?;
                let paged = Self::page_out(cgroup, device, *beside, ByteCount(left.0 - left.0 / 32));
                guest.process().send_signal(Signal::CONT).context("cannot let a guest go on")?;
                paged?;
            }
        }
        Ok(())
    }

    /// What a guest has above what it is left, compressed pages included.
    fn excess(
        cgroup: &MemoryCgroup,
        device: &ZramSwap,
        beside: ByteCount,
        left: ByteCount,
    ) -> Result<ByteCount, BenchError> {
        let used = cgroup.used().context("a cgroup's use")? + device.memory_used().context("zram's use")?;
        Ok(used.saturating_sub(left + beside))
    }

    fn page_out(
        cgroup: &MemoryCgroup,
        device: &ZramSwap,
        beside: ByteCount,
        left: ByteCount,
    ) -> Result<(), BenchError> {
        loop {
            let excess = Self::excess(cgroup, device, beside, left)?;
            let used = cgroup.used().context("a cgroup's use")?;
            let next = used.saturating_sub(excess.min(STEP));
            // What cannot be reached has been paged out in part, and is tried again at the next look.
            if excess == ByteCount(0) || cgroup.set_limit(next).is_err() {
                break;
            }
            cgroup.set_limit(LIFTED).context("cannot lift a limit")?;
        }
        Ok(cgroup.set_limit(LIFTED).context("cannot lift a limit")?)
    }
}

/// What of a guest's memory is in RAM.
fn present(guest: &Guest) -> Result<ByteCount, BenchError> {
    Ok(PageCount(guest.present()? as u64).bytes())
}

fn config() -> VmmConfig {
    VmmConfig { ram_bytes: RAM.0, report_ms: 60_000, ..guest::config(WorkloadKind::Frames, MIX) }
}

fn start(row: Option<Row>, interrupt: &Interrupt) -> Result<Held, BenchError> {
    let config = config();
    match row {
        Some(row @ Row { way: Way::Pager, .. }) => {
            let budget = Budget::of(row.left());
            let mut ours = Ours::within(budget, &config, Waiting::Adaptive, interrupt)?;
            ours.govern(Duration::from_secs(2))?;
            Ok(Held::Managed(Box::new(ours)))
        }
        Some(Row { way: Way::Kernel, .. }) => {
            let device = swap::device(ByteCount(RAM.0 * 2)).context("cannot make a zram device")?;
            let cgroup = MemoryCgroup::create(PREFIX, ProcessId::own()).context("cannot make a cgroup")?;
            let guest = Guest::unmanaged_in(&cgroup, config, interrupt)?;
            Ok(Held::Caged { guest, cgroup, device, beside: ByteCount(0) })
        }
        Some(Row { way: Way::Balloon, .. }) | None => Ok(Held::Free(Guest::unmanaged(config, interrupt)?)),
    }
}

/// What came of a run.
enum Outcome {
    Measured(Sample),
    /// The guest had more than it was to be left: so much, at the median look.
    Short(ByteCount),
}

/// Has the guest work for so long, and looks at what it takes meanwhile.
fn work(
    held: &mut Held,
    command: ProbeCommand,
    left: ByteCount,
    (window, length): (u64, Duration),
) -> Result<(f64, Vec<ByteCount>), BenchError> {
    held.guest().ask(command)?;
    let (start, mut looks) = (Instant::now(), Vec::new());
    while start.elapsed() < length {
        held.keep_to(left)?;
        looks.push(held.takes()?);
    }
    let guest = held.guest();
    guest.window(window)?;
    let report = guest.answer()?;
    Ok((pages_per_second(&report), looks))
}

/// One guest's life: it has touched all of its memory once, then works.
fn life(usage: Usage, row: Option<Row>, interrupt: &Interrupt) -> Result<Outcome, BenchError> {
    let mut held = start(row, interrupt)?;
    let held = &mut held;
    let left = row.map_or(RAM, Row::left);
    usage.prepare(held.guest())?;
    if let Some(row @ Row { way: Way::Balloon, .. }) = row {
        held.guest().balloon(row.taken().0, BalloonPiece::Page)?;
    }
    work(held, usage.work(), left, WARM)?;
    let before = held.guest().cpu_seconds()?;
    let (rate, mut looks) = work(held, usage.work(), left, WORK)?;
    let cpu_seconds = held.guest().cpu_seconds()? - before;
    looks.sort_unstable();
    let taken = looks.get(looks.len() / 2).copied().context("nobody looked")?;
    held.guest().probe(ProbeCommand::new(Task::Verify, Order::Ascending))?;
    if taken > left + SLACK {
        return Ok(Outcome::Short(taken));
    }
    Ok(Outcome::Measured(Sample { value: rate, cpu_seconds: Some(cpu_seconds) }))
}

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
struct Settings {
    ram_bytes: u64,
    busy_bytes: u64,
    idle_bytes: u64,
    rounds: usize,
    seed: u64,
    mix: String,
}

/// Measures the rows whose names begin so, and writes what they say of costs into the folder, as a file that the policy reads.
pub(crate) fn run(prefix: &str, folder: &Path, interrupt: &Interrupt) -> Result<Report, BenchError> {
    guest::check_kvm()?;
    swap::check_host()?;
    sweep_stale(PREFIX).map_err(|error| BenchError::NotHere(error.to_string()))?;
    let machine = Machine::here();
    println!(
        "what taking memory costs a guest of {RAM}, busy with up to {USED_MOST} or idle with {KEPT}: {ROUNDS} rounds"
    );
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let wanted = Row::all().filter(|row| row.name().starts_with(prefix));
    let mut rows: Vec<(Row, Option<Vec<Run>>)> = wanted.map(|row| (row, Some(Vec::new()))).collect();
    for round in 1..=ROUNDS {
        eprintln!("round {round}");
        for usage in Usage::ALL {
            measure(usage, &mut rows, interrupt)?;
        }
    }
    let mut results = Vec::new();
    for (row, runs) in rows {
        let subject = || higher(&row.name(), "ops/s", None);
        let comparison = runs.map(|runs| Comparison::new(subject(), runs)).transpose()?;
        comparison.iter().for_each(|comparison| println!("  {comparison}"));
        results.push((row, comparison));
    }
    let path = write_json(&file_of(&machine, &results), folder.join("costs.json"))?;
    println!("costs for the policy are in {}", path.display());
    let settings = Settings {
        ram_bytes: RAM.0,
        busy_bytes: USED_MOST.0,
        idle_bytes: KEPT.0,
        rounds: ROUNDS,
        seed: SEED,
        mix: MIX.to_string(),
    };
    let results = results.into_iter().filter_map(|(_, comparison)| comparison).collect();
    Ok(Report::new(machine, &settings, &NOTES, results)?)
}

/// A round of the rows of one guest: the guest left alone, each row, the guest left alone again. Rows that cannot be had lose their
/// runs.
fn measure(
    usage: Usage,
    rows: &mut [(Row, Option<Vec<Run>>)],
    interrupt: &Interrupt,
) -> Result<(), BenchError> {
    let mut rows: Vec<_> =
        rows.iter_mut().filter(|(row, runs)| row.usage == usage && runs.is_some()).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let peer = alone(usage, interrupt)?;
    let mut outcomes = Vec::new();
    for (row, _) in &rows {
        eprintln!("  {}", row.name());
        outcomes.push(life(row.usage, Some(*row), interrupt)?);
    }
    let peer_again = alone(usage, interrupt)?;
    for ((row, runs), outcome) in rows.iter_mut().zip(outcomes) {
        let why = match outcome {
            Outcome::Measured(ours) => {
                runs.iter_mut().for_each(|runs| runs.push(Run { ours, peer, peer_again }));
                continue;
            }
            Outcome::Short(taken) => format!("left {}, the guest takes {taken}", row.left()),
        };
        println!("  {}: not to be had: {why}", row.name());
        *runs = None;
    }
    Ok(())
}

/// The guest left alone.
fn alone(usage: Usage, interrupt: &Interrupt) -> Result<Sample, BenchError> {
    match life(usage, None, interrupt)? {
        Outcome::Measured(sample) => Ok(sample),
        Outcome::Short(taken) => Err(anyhow!("a guest of {RAM} takes {taken}").into()),
    }
}

/// What was measured, as the policy reads it. Of our pager nothing: it is a machine's only rung, so nothing is to be chosen.
fn file_of(machine: &Machine, results: &[(Row, Option<Comparison>)]) -> CostsFile {
    let measured = results.iter().filter_map(|(_, comparison)| comparison.as_ref());
    let spread = measured.map(Comparison::spread).fold(0.0, f64::max);
    let losses = |usage, way| {
        let of = results.iter().filter(|(row, _)| row.usage == usage && row.way == way);
        // A guest from which that much cannot be had so does not work with that much away. Rows that nobody asked for are no losses.
        let loss = |comparison: &Comparison| lost(comparison.ratio());
        let losses = of.map(|(_, comparison)| comparison.as_ref().map_or(Ppm::WHOLE, loss));
        Losses::try_from(losses.collect::<Vec<_>>()).ok()
    };
    let rung = |way| RungFile {
        busy_ppm: losses(Usage::Busy, way),
        idle_ppm: losses(Usage::Idle, way),
        ..RungFile::default()
    };
    CostsFile {
        source: format!("cargo xtask bench cost, A/A {:.1} %: {machine}", spread * 100.0),
        balloon: rung(Way::Balloon),
        compress: rung(Way::Kernel),
        ..CostsFile::default()
    }
}

/// The part of its work that a guest loses which does this part of it. One that does more loses nothing.
fn lost(ratio: f64) -> Ppm {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to a million")]
    Ppm(((1.0 - ratio).clamp(0.0, 1.0) * 1e6).round() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_policy::{Costs, Rung};

    fn row(usage: Usage, way: Way, percent: u64, ratio: f64) -> (Row, Option<Comparison>) {
        let row = Row { usage, way, percent };
        let sample = Sample::untimed;
        let run = Run { ours: sample(ratio * 1000.0), peer: sample(1000.0), peer_again: sample(1010.0) };
        (row, Some(Comparison::new(higher(&row.name(), "ops/s", None), vec![run]).unwrap()))
    }

    #[test]
    fn what_is_written_is_what_the_policy_reads() {
        let ratio = |at: usize| 1.1 - 0.1005 * at as f64;
        let mut results: Vec<_> =
            (1..).zip(TAKEN).map(|(at, percent)| row(Usage::Busy, Way::Kernel, percent, ratio(at))).collect();
        // The last could not be had, and the idle guest's rows were not all asked for.
        results[5].1 = None;
        results.extend(TAKEN[1..].iter().map(|percent| row(Usage::Idle, Way::Kernel, *percent, 0.5)));
        let written = serde_json::to_string(&file_of(&Machine::here(), &results)).unwrap();
        let read: CostsFile = serde_json::from_str(&written).unwrap();
        let (costs, usual) = (Costs::from(&read), Costs::MEASURED);
        let compress = costs.of(Rung::Compress);
        let percent = [0, 10, 20, 30, 40].map(Ppm::percent);
        let Losses([losses @ .., last]) = compress.busy.unwrap();
        let near = |(found, percent): (Ppm, Ppm)| found.0.abs_diff(percent.0) < 6_000;
        assert!(losses.into_iter().zip(percent).all(near) && last == Ppm::WHOLE, "{compress:?}");
        assert_eq!(compress.idle, usual.of(Rung::Compress).idle, "what was not measured stays as it was");
        assert_eq!(costs.of(Rung::Balloon), usual.of(Rung::Balloon));
        assert!(read.source.starts_with("cargo xtask bench cost"), "{}", read.source);
    }

    #[test]
    fn a_guest_that_does_more_loses_nothing() {
        assert_eq!((lost(4.1), lost(1.0), lost(0.9), lost(-1.0)), (Ppm(0), Ppm(0), Ppm(100_000), Ppm::WHOLE));
    }
}
