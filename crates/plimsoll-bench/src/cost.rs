//! What it costs a guest that so much of its memory is taken: by its balloon, by the kernel's paging, by our pager.
//!
//! Enters: nothing but the machine. Leaves: a ratio for each way and each tenth of the guest's memory: its operations a second
//! against those of the same guest from which nothing is taken. What must never happen: a rate of a guest that was left more than
//! it was to be left; what is taken is measured while the guest works, and where it falls short there is no row but a sentence.
//!
//! The guest uses up to half of its memory: it allocates pages, compares and frees them in random order, so that what it uses
//! moves through all of its memory, as in a kernel's page allocator. Outside nobody sees which pages it has free but its balloon.
use crate::contents::{MIX, SEED};
use crate::guest::{self, Guest};
use crate::pager::keepers::Ours;
use crate::pager::measures::pages_per_second;
use crate::report::{Comparison, Machine, Report, Run, Sample, higher};
use crate::session::{BenchError, Interrupt};
use crate::swap;
use anyhow::{Context, anyhow};
use plimsoll_core::ledger::Budget;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_linux::uffd::waiting::Waiting;
use plimsoll_linux::zram::ZramSwap;
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::Entry;
use plimsoll_sys::process_memory::{self, Advice, Refusal};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE, PageCount};
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::control::BalloonPiece;
use serde::Serialize;
use std::time::{Duration, Instant};

/// A guest's memory: 6 MiB are image and stacks, 2 MiB the allocator's tables.
const RAM: ByteCount = ByteCount::mib(104);
/// What it uses at most.
const USED_MOST: ByteCount = ByteCount::mib(48);
/// What is taken, in percent of its memory.
const TAKEN: [u64; 6] = [10, 20, 30, 40, 50, 60];
/// Odd, so that the median of ours is a measurement.
const ROUNDS: usize = 3;
/// How long it works before it counts, and how long it counts, each with the number of the window that ends it.
const WARM: (u64, Duration) = (1, Duration::from_millis(700));
const WORK: (u64, Duration) = (2, Duration::from_secs(1));
/// How often the kernel is asked for what is too much, and what is taken is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What a guest may have beyond what it was to be left, at the median look: 1 % of its memory, and what the kernel counts in batches.
const SLACK: ByteCount = ByteCount(RAM.0 / 100 + (1 << 20));

const NOTES: [&str; 5] = [
    "ours is the guest from which something is taken, by whatever way; the peer is the same guest left alone",
    "what the host keeps for the guest counts as the guest's: compressed pages, and the store's tables; so 30 means that 30 % of its \
     memory are there for others",
    "kernel: MADV_PAGEOUT from outside of as much as the guest has above what it is left, in the order of its memory, to a zram device (lz4)",
    "pager: our manager with what the guest is left as its budget",
    "CPU is user and system time of this process and of the guest's, all threads",
];

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

/// A row: so many percent taken that way.
#[derive(Clone, Copy, Debug)]
struct Row {
    way: Way,
    percent: u64,
}

impl Row {
    fn name(self) -> String {
        format!("cost/{}/{}", self.way.name(), self.percent)
    }

    const fn taken(self) -> ByteCount {
        ByteCount(RAM.0 / 100 * self.percent).pages_floor().bytes()
    }

    /// What the guest is left.
    const fn left(self) -> ByteCount {
        RAM.saturating_sub(self.taken())
    }
}

/// A guest, and what holds it to what it is left. The guest ends first.
enum Held {
    Free(Guest),
    /// The hand is the page of the guest's memory at which taking goes on.
    Paged {
        guest: Guest,
        device: ZramSwap,
        hand: usize,
    },
    Managed(Ours),
}

impl Held {
    fn guest(&mut self) -> &mut Guest {
        match self {
            Self::Free(guest) | Self::Paged { guest, .. } => guest,
            Self::Managed(ours) => ours.first(),
        }
    }

    /// What the guest takes of the host, compressed pages included.
    fn takes(&mut self) -> Result<ByteCount, BenchError> {
        Ok(match self {
            Self::Free(guest) => bytes(guest.present()?),
            Self::Paged { guest, device, .. } => {
                bytes(guest.present()?) + device.memory_used().context("zram's use")?
            }
            Self::Managed(ours) => ours.charged()?,
        })
    }

    /// Has the kernel keep to what the guest is left: takes what is too much, in the order of the guest's memory, round and round. What
    /// it takes up compressed goes the next time.
    fn keep_to(&mut self, left: ByteCount) -> Result<(), BenchError> {
        let Self::Paged { guest, device, hand } = self else { return Ok(()) };
        let present = present(guest)?;
        let takes = bytes(present.len()) + device.memory_used().context("zram's use")?;
        let excess = from_hand(present, hand, takes.saturating_sub(left).pages_ceil());
        let transfer = process_memory::advise(guest.process(), &excess, Advice::PageOut);
        match transfer.stop {
            // The page at hand was in use just then.
            None | Some(Refusal::TryLater) => Ok(()),
            Some(refusal) => Err(anyhow!(refusal).context("the kernel refused MADV_PAGEOUT").into()),
        }
    }
}

const fn bytes(pages: usize) -> ByteCount {
    PageCount(pages as u64).bytes()
}

/// The pages that are in memory: which of the guest's, and where.
fn present(guest: &Guest) -> Result<Vec<(usize, Hva)>, BenchError> {
    let pages_of = |range: HvaRange| {
        (0..range.len().pages_floor().0).map(move |page| Hva(range.start().0 + PageCount(page).bytes().0))
    };
    let places = guest.ram().into_iter().flat_map(pages_of);
    let is_present = |(place, entry): ((usize, Hva), Entry)| entry.contains(Entry::PRESENT).then_some(place);
    Ok((0..).zip(places).zip(guest.entries()?).filter_map(is_present).collect())
}

/// So many of the pages that are in memory, from the hand on, which moves behind the last of them.
fn from_hand(mut present: Vec<(usize, Hva)>, hand: &mut usize, pages: PageCount) -> Vec<HvaRange> {
    let behind = present.partition_point(|(place, _)| place < hand);
    present.rotate_left(behind);
    present.truncate(usize::try_from(pages.0).unwrap_or(usize::MAX));
    *hand = present.last().map_or(*hand, |(place, _)| place + 1);
    present.into_iter().filter_map(|(_, at)| HvaRange::new(at, ByteCount(PAGE_SIZE as u64))).collect()
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
            Ok(Held::Managed(ours))
        }
        Some(Row { way: Way::Kernel, .. }) => {
            let device = swap::device(ByteCount(RAM.0 * 2)).context("cannot make a zram device")?;
            let guest = Guest::unmanaged(config, interrupt)?;
            Ok(Held::Paged { guest, device, hand: 0 })
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
    left: ByteCount,
    (window, length): (u64, Duration),
) -> Result<(f64, Vec<ByteCount>), BenchError> {
    let pages = USED_MOST.pages_floor().0;
    let churn = ProbeCommand { pages, passes: 0, ..ProbeCommand::new(Task::Churn, Order::Random) };
    held.guest().ask(churn)?;
    let (start, mut looks) = (Instant::now(), Vec::new());
    while start.elapsed() < length {
        held.keep_to(left)?;
        std::thread::sleep(LOOK_EVERY);
        looks.push(held.takes()?);
    }
    let guest = held.guest();
    guest.window(window)?;
    let report = guest.answer()?;
    Ok((pages_per_second(&report), looks))
}

/// One guest's life: it has touched all of its memory once, then works.
fn life(row: Option<Row>, interrupt: &Interrupt) -> Result<Outcome, BenchError> {
    let left = row.map_or(RAM, Row::left);
    let mut held = start(row, interrupt)?;
    let everything = ProbeCommand { stride: 512, ..ProbeCommand::new(Task::Allocate, Order::Ascending) };
    held.guest().probe(everything)?;
    held.guest().probe(ProbeCommand::new(Task::Free, Order::Ascending))?;
    if let Some(row @ Row { way: Way::Balloon, .. }) = row {
        held.guest().balloon(row.taken().0, BalloonPiece::Page)?;
    }
    work(&mut held, left, WARM)?;
    let before = held.guest().cpu_seconds()?;
    let (rate, mut looks) = work(&mut held, left, WORK)?;
    let cpu_seconds = held.guest().cpu_seconds()? - before;
    held.guest().probe(ProbeCommand::new(Task::Verify, Order::Ascending))?;
    looks.sort_unstable();
    let taken = looks.get(looks.len() / 2).copied().context("nobody looked")?;
    if taken > left + SLACK {
        return Ok(Outcome::Short(taken));
    }
    Ok(Outcome::Measured(Sample { value: rate, cpu_seconds: Some(cpu_seconds) }))
}

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
pub(crate) struct Settings {
    ram_bytes: u64,
    used_most_bytes: u64,
    rounds: usize,
    seed: u64,
    mix: String,
}

/// Measures the rows whose names begin so.
pub(crate) fn run(prefix: &str, interrupt: &Interrupt) -> Result<Report<Settings>, BenchError> {
    guest::check_kvm()?;
    swap::check_host()?;
    let machine = Machine::here();
    println!("what taking memory costs a guest of {RAM} that uses up to {USED_MOST}: {ROUNDS} rounds");
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let all = Way::ALL.into_iter().flat_map(|way| TAKEN.map(|percent| Row { way, percent }));
    let wanted = all.filter(|row| row.name().starts_with(prefix));
    let mut rows: Vec<(Row, Vec<Run>)> = wanted.map(|row| (row, Vec::new())).collect();
    for round in 1..=ROUNDS {
        eprintln!("round {round}");
        let peer = alone(interrupt)?;
        let mut ours = Vec::new();
        for (row, _) in &rows {
            eprintln!("  {}", row.name());
            ours.push(life(Some(*row), interrupt)?);
        }
        let peer_again = alone(interrupt)?;
        let mut outcomes = ours.into_iter();
        rows.retain_mut(|(row, runs)| match outcomes.next() {
            Some(Outcome::Measured(ours)) => {
                runs.push(Run { ours, peer, peer_again });
                true
            }
            Some(Outcome::Short(taken)) => {
                println!("  {}: not to be had: left {}, the guest takes {taken}", row.name(), row.left());
                false
            }
            None => false,
        });
    }
    let mut results = Vec::new();
    for (row, runs) in rows {
        let comparison = Comparison::new(higher(&row.name(), "ops/s", None), runs)?;
        println!("  {comparison}");
        results.push(comparison);
    }
    let settings = Settings {
        ram_bytes: RAM.0,
        used_most_bytes: USED_MOST.0,
        rounds: ROUNDS,
        seed: SEED,
        mix: MIX.to_string(),
    };
    Ok(Report { machine, settings, notes: NOTES.to_vec(), results })
}

/// The guest left alone.
fn alone(interrupt: &Interrupt) -> Result<Sample, BenchError> {
    match life(None, interrupt)? {
        Outcome::Measured(sample) => Ok(sample),
        Outcome::Short(taken) => Err(anyhow!("a guest of {RAM} takes {taken}").into()),
    }
}
