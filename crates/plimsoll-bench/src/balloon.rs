//! Three ways to take memory that a guest has free, and to give it back: a balloon that lists pages of 4 KiB, one that lists
//! frames of 2 MiB, and frames taken out of the allocator that guest and host share.
//!
//! Enters: nothing but the machine. Leaves: a ratio for each row; the peer is always the balloon of 4 KiB. Every run starts a new
//! KVM guest of the kernel's memory, with huge pages advised, and takes and returns the same amount. What must never happen: a
//! time for memory that did not go: the page map has to show that it went, and at the end the guest verifies what it has.
use crate::contents::{MIX, SEED};
use crate::guest::{self, Guest};
use crate::report::{Better, Comparison, Machine, Report, Run, Sample, Subject, higher};
use crate::session::{BenchError, Interrupt, timed};
use anyhow::{Context, anyhow};
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::random::Permutation;
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_sys::HvaRange;
use plimsoll_sys::mapping::{self, AnonymousMapping};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE};
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::config::HugePages;
use plimsoll_vmm::control::{BalloonPiece, FrameOrder, FrameVerb};
use serde::Serialize;
use std::time::Duration;

/// A guest's memory: 6 MiB are image and stacks, 2 MiB the allocator's tables.
const RAM: ByteCount = ByteCount::mib(520);
/// What is taken and returned of it.
const AMOUNT: ByteCount = ByteCount::mib(448);
/// Odd, so that the median of ours is a measurement.
const ROUNDS: usize = 3;
const GIB: f64 = 1_073_741_824.0;

const NOTES: [&str; 7] = [
    "time is the machine's, from the command's arrival to the answer: the guest's work, exits and discards, not the socket",
    "a listing has up to 256 pieces, one exit each; adjacent pieces of a listing become one discard",
    "rows called in-order: the peer's guest lists pages one after the other, so that its discards have 1 MiB, the best case of any \
     balloon; the other rows: its free memory is fragmented, no two pages of a listing are neighbours, and each is a discard, as \
     it is in QEMU anyway",
    "taken by shared state are the frames for good; touched memory goes by one discard for up to 128 MiB",
    "install is the guest's first write of every page after the return; it includes making the contents",
    "kernel-alone: no guest and no KVM; a loop of madvise(MADV_DONTNEED) over memory of huge pages in this process, 2 MiB a call against \
     the peer's pieces. It is the kernel's own part of reclaim-touched: what is left of the ratio if all else cost nothing",
    "KVM exits are dear on a nested host, which weighs on the 4 KiB balloon",
];

/// A way to take memory and to give it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Balloon(BalloonPiece),
    Shared,
}

/// What is timed in the life of one guest.
#[derive(Clone, Copy, Debug)]
enum Step {
    Untouched,
    Touched,
    Return,
    Install,
}

impl Step {
    const ALL: [Self; 4] = [Self::Untouched, Self::Touched, Self::Return, Self::Install];

    const fn name(self) -> &'static str {
        match self {
            Self::Untouched => "reclaim-untouched",
            Self::Touched => "reclaim-touched",
            Self::Return => "return",
            Self::Install => "return-install",
        }
    }
}

/// Ours, its name in the rows, and what reclaim of touched memory must reach against either peer.
const OURS: [(Way, &str, f64); 2] =
    [(Way::Balloon(BalloonPiece::Frame), "frames", 20.0), (Way::Shared, "shared", 100.0)];
/// The peers: the balloon of 4 KiB in a guest whose free memory is fragmented, and in one whose is not; and what is added to the
/// names of their rows.
const PEERS: [(Way, &str); 2] =
    [(Way::Balloon(BalloonPiece::ScatteredPage), ""), (Way::Balloon(BalloonPiece::Page), "-in-order")];

fn subject(step: Step, peer: &str, name: &str, goal: f64) -> Subject {
    let goal = matches!(step, Step::Touched).then_some(goal);
    Subject { name: format!("{}{peer}/{name}", step.name()), unit: "GiB/s", better: Better::Higher, goal }
}

fn take(guest: &mut Guest, way: Way) -> Result<Duration, BenchError> {
    match way {
        Way::Balloon(piece) => guest.balloon(AMOUNT.0, piece),
        Way::Shared => guest.frames(FrameOrder { order: FrameVerb::TakeForGood, bytes: AMOUNT.0 }),
    }
}

fn give_back(guest: &mut Guest, way: Way) -> Result<Duration, BenchError> {
    match way {
        Way::Balloon(piece) => guest.balloon(0, piece),
        Way::Shared => guest.frames(FrameOrder { order: FrameVerb::GiveBack, bytes: AMOUNT.0 }),
    }
}

/// One guest's life, with a sample for each step.
fn life(way: Way, interrupt: &Interrupt) -> Result<[Sample; 4], BenchError> {
    let config = VmmConfig {
        ram_bytes: RAM.0,
        huge_pages: HugePages::Advise,
        report_ms: 60_000,
        ..guest::config(WorkloadKind::Frames, MIX)
    };
    let mut guest = Guest::unmanaged(config, interrupt)?;
    let cpu = |guest: &Guest| guest.cpu_seconds();

    let before = cpu(&guest)?;
    let untouched = sample(take(&mut guest, way)?, cpu(&guest)? - before);
    give_back(&mut guest, way)?;

    // Everything is touched, so that whatever is taken has memory.
    let everything = ProbeCommand { stride: 512, ..ProbeCommand::new(Task::Allocate, Order::Ascending) };
    guest.probe(everything)?;
    guest.probe(ProbeCommand::new(Task::Free, Order::Ascending))?;
    let full = guest.present()?;
    let before = cpu(&guest)?;
    let touched = sample(take(&mut guest, way)?, cpu(&guest)? - before);
    let gone = full.saturating_sub(guest.present()?);
    let expected = usize::try_from(AMOUNT.pages_floor().0).context("a count of pages")?;
    if gone != expected {
        let gone = ByteCount((gone * PAGE_SIZE) as u64);
        return Err(anyhow!("{way:?}: {gone} left RAM where {AMOUNT} were to").into());
    }
    let before = cpu(&guest)?;
    let time = give_back(&mut guest, way)?;
    let returned = sample(time, cpu(&guest)? - before);
    let installed = guest.probe(everything)?;
    let installed = sample(time + Duration::from_nanos(installed.ns), cpu(&guest)? - before);
    let verified = guest.probe(ProbeCommand::new(Task::Verify, Order::Ascending))?;
    if verified.pages < AMOUNT.pages_floor().0 {
        return Err(anyhow!("{way:?}: the guest has only {} pages in the end", verified.pages).into());
    }
    Ok([untouched, touched, returned, installed])
}

/// A balloon's frames.
const FRAME: ByteCount = ByteCount::mib(2);
/// What the discards of the peers have, in the order of [`PEERS`]: pages that come in no order, and lists of neighbours.
const PIECES: [ByteCount; 2] = [ByteCount(PAGE_SIZE as u64), ByteCount::mib(1)];

/// Frees as much memory of huge pages as the rows do, so much in a call, without a guest.
fn alone(piece: ByteCount) -> anyhow::Result<Sample> {
    let memory =
        AnonymousMapping::new(AMOUNT, mapping::HugePages::Prefer).context("no memory for the bare loop")?;
    memory.populate_write(memory.range()).context("cannot fill memory")?;
    let pieces = AMOUNT.0 / piece.0;
    let order = Permutation::new(pieces, SEED);
    let place = |at: u64| if piece == PIECES[0] { order.apply(at) } else { at };
    let range = |at: u64| HvaRange::new(Hva(memory.base().0 + place(at) * piece.0), piece);
    let ranges: Vec<HvaRange> = (0..pieces).filter_map(range).collect();
    let (done, elapsed) = timed(|| ranges.iter().try_for_each(|range| memory.discard(*range)));
    done.context("the bare loop cannot free")?;
    Ok(sample(Duration::from_secs_f64(elapsed.seconds), elapsed.cpu_seconds))
}

/// The samples of two guests.
type Lives = [[Sample; 4]; 2];

fn lives([one, other]: [Way; 2], interrupt: &Interrupt) -> Result<Lives, BenchError> {
    Ok([life(one, interrupt)?, life(other, interrupt)?])
}

fn sample(time: Duration, cpu_seconds: f64) -> Sample {
    #[expect(clippy::cast_precision_loss, reason = "less than 2^53 bytes")]
    let gib = AMOUNT.0 as f64 / GIB;
    Sample { value: gib / time.as_secs_f64(), cpu_seconds: Some(cpu_seconds) }
}

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
struct Settings {
    ram_bytes: u64,
    amount_bytes: u64,
    rounds: usize,
    seed: u64,
    mix: String,
}

/// Measures all rows, which come from the same runs, and says those whose names begin so.
pub(crate) fn run(prefix: &str, interrupt: &Interrupt) -> Result<Report, BenchError> {
    guest::check_kvm()?;
    let machine = Machine::here();
    println!("{AMOUNT} of a guest of {RAM} that it has free, against a balloon of 4 KiB: {ROUNDS} rounds");
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let (mut rounds, mut loops) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        eprintln!("round {round}");
        let before = lives(PEERS.map(|(way, _)| way), interrupt)?;
        let ours = lives(OURS.map(|(way, ..)| way), interrupt)?;
        let again = lives(PEERS.map(|(way, _)| way), interrupt)?;
        rounds.push((before, ours, again));
        let before = [alone(PIECES[0])?, alone(PIECES[1])?];
        let ours = alone(FRAME)?;
        loops.push((before, ours, [alone(PIECES[0])?, alone(PIECES[1])?]));
    }
    let mut results = Vec::new();
    for (peer, (_, added)) in PEERS.into_iter().enumerate() {
        for (our, (_, name, goal)) in OURS.into_iter().enumerate() {
            for (at, step) in Step::ALL.into_iter().enumerate() {
                let run = |(before, ours, again): &(Lives, Lives, Lives)| Run {
                    peer: before[peer][at],
                    ours: ours[our][at],
                    peer_again: again[peer][at],
                };
                let subject = subject(step, added, name, goal);
                let comparison = Comparison::new(subject, rounds.iter().map(run).collect())?;
                if comparison.name().starts_with(prefix) {
                    println!("  {comparison}");
                    results.push(comparison);
                }
            }
        }
    }
    for (peer, (_, added)) in PEERS.into_iter().enumerate() {
        let run = |(before, ours, again): &([Sample; 2], Sample, [Sample; 2])| Run {
            peer: before[peer],
            ours: *ours,
            peer_again: again[peer],
        };
        let subject = higher(&format!("kernel-alone{added}/frames"), "GiB/s", None);
        let comparison = Comparison::new(subject, loops.iter().map(run).collect())?;
        if comparison.name().starts_with(prefix) {
            println!("  {comparison}");
            results.push(comparison);
        }
    }
    let settings = Settings {
        ram_bytes: RAM.0,
        amount_bytes: AMOUNT.0,
        rounds: ROUNDS,
        seed: SEED,
        mix: MIX.to_string(),
    };
    Ok(Report::new(machine, &settings, &NOTES, results)?)
}
