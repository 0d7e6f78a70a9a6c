//! Machines that are managed from outside: what attaching, looking, taking and following cost, and whether the working set
//! that is believed is the one there is.
//!
//! Enters: nothing but the machine. Leaves: a ratio for each row. Everything runs on the calling thread as the `attach`
//! command runs it, on [synthetic machines](machine) that do nothing, or on KVM guests that no other manager serves. What
//! must never happen: pages counted that did not go, or a working set held against anything but what the guest touched.
//!
//! `looks`: attaching and scanning. `taken`: taking. `slices`: what KVM guests notice of it; `guests`: what is believed of them.
//! `fleet`: many machines at rest. `idle`: a stock Debian guest at rest. The rows of KSM are [`ksm`]'s. The table of rows is here.
mod fleet;
mod guests;
mod idle;
mod looks;
mod machine;
mod slices;
mod taken;

use crate::contents::{MIX, POOL_PAGES, SEED};
use crate::guest::{RAM, check_kvm};
use crate::ksm;
use crate::report::{self, Comparison, Report, Subject, Way, higher, lower};
use crate::session::{BenchError, Interrupt};
use crate::swap::check_host;
use anyhow::{Context, Result};
use machine::Disguise;
use plimsoll_attach::{Follower, Held, Request};
use plimsoll_linux::kernel::KernelMachine;
use plimsoll_sys::HvaRange;
use plimsoll_sys::pidfd::Pidfd;
use serde::Serialize;
use std::time::Instant;

pub(crate) use machine::role;

/// Odd, so that the median of ours is a measurement.
const ROUNDS: usize = 3;

const NOTES: [&str; 5] = [
    "CPU is of the thread that looks or takes, in which zram compresses too; of sampling-cost and unpressed, of this \
     process and the guest's, all threads",
    "taken: a machine is no larger than what its pace allows at once, so the pace is not in the way; a larger one gives \
     64 MiB a second at first and at most 256 MiB later",
    "working-set: low and high are the lowest and the highest estimate of the counted periods; the peer is what the guest \
     says it touched in them, and A/A how far the first half of them lies from the second",
    "fleet-200: the peer is one processor; it, idle-debian and the rows of slices are measured once",
    "the rows of ksm are those of the benchmark ksm, and its notes hold for them",
];

/// Everything a measurement needs to know.
struct Stage<'a> {
    disguise: Disguise,
    interrupt: &'a Interrupt,
}

/// One or more ratios that are measured together.
struct Trial<'a> {
    subjects: Vec<Subject>,
    way: Way<Stage<'a>>,
}

fn trials<'a>() -> Vec<Trial<'a>> {
    let trial = |subjects, round| Trial { subjects, way: Way::Rounds(ROUNDS, round) };
    let slices = |subjects, share, measure| Trial { subjects, way: Way::Slices(share, measure) };
    let taken = |name, round| trial(vec![higher(name, "pages/s", None)], round);
    vec![
        trial(
            vec![
                lower("time-to-attach", "ms", None),
                lower("scan-cost/whole", "ms/GiB", None),
                lower("scan-cost/scattered", "ms/GiB", None),
            ],
            looks::round,
        ),
        taken("taken/1", |stage| taken::round(stage, 1)),
        taken("taken/4", |stage| taken::round(stage, 4)),
        taken("taken/16", |stage| taken::round(stage, 16)),
        slices(
            vec![higher("sampling-cost", "ops/s", Some(0.99)), higher("unpressed", "ops/s", Some(0.99))],
            slices::SHARE,
            slices::managed,
        ),
        slices(vec![higher("split-cost", "ops/s", None)], 1.0, slices::split),
        trial(
            vec![
                higher("working-set-low/zipf", "pages", Some(0.85)),
                lower("working-set-high/zipf", "pages", Some(1.15)),
                higher("working-set-low/sweep", "pages", Some(0.85)),
                lower("working-set-high/sweep", "pages", Some(1.15)),
            ],
            guests::working_sets,
        ),
        Trial { subjects: vec![lower("fleet-200", "ms/s", Some(0.02))], way: Way::Rounds(1, fleet::round) },
        Trial {
            subjects: vec![
                lower("idle-debian/size", "MiB", Some(1.0)),
                lower("idle-debian/answer", "ms", Some(1.0)),
            ],
            way: Way::Rounds(1, idle::round),
        },
    ]
}

/// What was measured, and why anything could not be. What was measured is worth more than what cannot be.
#[derive(Default)]
struct Rows {
    measured: Vec<Comparison>,
    left_out: Option<String>,
}

impl Rows {
    /// Adds the rows of this name, or says why they are left out.
    fn add(&mut self, name: &str, rows: Result<Vec<Comparison>, BenchError>) -> Result<(), BenchError> {
        match rows {
            Ok(rows) => self.measured.extend(rows),
            Err(BenchError::NotHere(why)) => {
                println!("  left out: {name}: {why}");
                self.left_out.get_or_insert(why);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// All of them; where nothing but what cannot be measured was wanted, why not.
    fn results(self) -> Result<Vec<Comparison>, BenchError> {
        match self.left_out {
            Some(why) if self.measured.is_empty() => Err(BenchError::NotHere(why)),
            _ => Ok(self.measured),
        }
    }
}

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
struct Settings {
    guest_ram_bytes: u64,
    scanned_bytes: u64,
    taken_bytes_each: u64,
    fleet_bytes_each: u64,
    rounds: usize,
    seed: u64,
    pool_pages: u64,
    mix: String,
    ksm: ksm::Settings,
}

/// Measures the rows whose names begin so, and those that are measured with them.
pub(crate) fn run(prefix: &str, interrupt: &Interrupt) -> Result<Report, BenchError> {
    check_host()?;
    check_kvm()?;
    let machine = report::Machine::here();
    println!("machines managed from outside against the least that could do it: {ROUNDS} rounds");
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let is_wanted = |name: &str| name.starts_with(prefix);
    let stage = Stage { disguise: Disguise::new()?, interrupt };
    let mut rows = Rows::default();
    for trial in trials() {
        if trial.subjects.iter().any(|subject| is_wanted(&subject.name)) {
            let names: Vec<&str> = trial.subjects.iter().map(|subject| subject.name.as_str()).collect();
            let names = names.join(", ");
            eprintln!("measuring {names}");
            let measured = trial.way.measure(trial.subjects, &stage);
            measured.iter().flatten().for_each(|comparison| println!("  {comparison}"));
            rows.add(&names, measured)?;
        }
    }
    rows.add("the rows of ksm", ksm::measure(prefix, interrupt))?;
    let results = rows.results()?;
    let settings = Settings {
        guest_ram_bytes: RAM.0,
        scanned_bytes: looks::SIZE.0,
        taken_bytes_each: taken::SIZE.0,
        fleet_bytes_each: fleet::SIZE.0,
        rounds: ROUNDS,
        seed: SEED,
        pool_pages: POOL_PAGES,
        mix: MIX.to_string(),
        ksm: ksm::SETTINGS,
    };
    Ok(Report::new(machine, &settings, &NOTES, results)?)
}

/// A machine as the `attach` command has it, of which nothing is wanted.
struct Attached {
    follower: Follower,
    machine: KernelMachine,
}

impl Attached {
    /// Attaches and follows. The guest's memory is looked for, unless it is named.
    fn new(held: Held, ranges: Vec<HvaRange>) -> Result<Self> {
        let request = Request { ranges, ..Request::default() };
        let follower = Follower::new(held, request).context("cannot follow a machine")?;
        let ranges = follower.dossier().ram.iter().map(|range| range.hva).collect();
        let machine = attach(follower.held(), ranges)?;
        Ok(Self { follower, machine })
    }

    /// Looks whether it is still the machine it was, and ends a period.
    fn tick(&mut self) -> Result<()> {
        let changes = self.follower.poll().context("cannot follow a machine")?;
        anyhow::ensure!(changes.is_empty(), "a machine changed under the benchmark: {changes:?}");
        self.machine.tick(Instant::now()).context("cannot look at a machine")?;
        Ok(())
    }
}

/// The machine of a process that is held.
fn attach(held: &Held, ranges: Vec<HvaRange>) -> Result<KernelMachine> {
    let process = Pidfd::open(held.process())?;
    // As long as the first descriptor's process lives, the number is its own.
    held.confirm()?;
    KernelMachine::attach(process, ranges, SEED, Instant::now()).context("cannot attach to a machine")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Run, Sample};

    fn row(name: &str) -> Comparison {
        let sample = Sample::untimed(1.0);
        let run = Run { ours: sample, peer: sample, peer_again: sample };
        Comparison::new(lower(name, "ms", None), vec![run]).unwrap()
    }

    fn not_here() -> Result<Vec<Comparison>, BenchError> {
        Err(BenchError::NotHere("no stock guest".to_owned()))
    }

    #[test]
    fn rows_that_cannot_be_measured_here_are_left_out_and_the_others_kept() {
        let mut rows = Rows::default();
        rows.add("taken/1", Ok(vec![row("taken/1")])).unwrap();
        rows.add("idle-debian", not_here()).unwrap();
        rows.add("ksm", Ok(vec![row("ksm-merged")])).unwrap();
        let results = rows.results().unwrap();
        assert_eq!(results.iter().map(Comparison::name).collect::<Vec<_>>(), ["taken/1", "ksm-merged"]);
    }

    #[test]
    fn where_nothing_could_be_measured_the_reason_is_the_answer() {
        let mut rows = Rows::default();
        rows.add("idle-debian", not_here()).unwrap();
        assert!(matches!(rows.results(), Err(BenchError::NotHere(why)) if why == "no stock guest"));
    }

    #[test]
    fn what_went_wrong_is_not_left_out() {
        let mut rows = Rows::default();
        rows.add("taken/1", Ok(vec![row("taken/1")])).unwrap();
        assert!(matches!(rows.add("taken/4", Err(BenchError::Interrupted)), Err(BenchError::Interrupted)));
    }
}
