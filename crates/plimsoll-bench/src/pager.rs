//! The pager against the kernel's swapping to zram and against a userfaultfd loop that does nothing but serve faults.
//!
//! Enters: nothing but the machine. Leaves: a ratio for each row. Every run starts a new KVM guest and writes its pages,
//! the same on both sides; the guest's own clock says what a touch took; and at the end of every run the guest compares
//! every word of its pages with what it must be. What must never happen: pages counted that did not go, or a time for
//! pages that were not away.
//!
//! `keepers`: the three ways to keep a guest's pages elsewhere. `measures`: what is done with any of them. `special`:
//! what only the pager can be asked. `sampled`: what a guest notices of being sampled. The table of rows is here.
pub(crate) mod keepers;
pub(crate) mod measures;
mod sampled;
mod special;

use crate::contents::{MIX, NO_DUPLICATE, NO_ZERO_NO_DUPLICATE, POOL_PAGES, RANDOM, SEED};
use crate::guest::{self, RAM};
use crate::report::{Machine, Report, Run, Sample, Subject, Way, higher, lower};
use crate::session::{BenchError, Interrupt};
use crate::swap::check_host;
use keepers::{Bare, Ours, Zram};
use measures::{capture, refault_random, refault_sequential, working_set_return};
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_linux::uffd::waiting::Waiting;
use plimsoll_sys::uffd::{Mode, Userfaultfd};
use plimsoll_vmm::VmmConfig;
use serde::Serialize;

/// Odd, so that the median of ours is a measurement.
const ROUNDS: usize = 3;

const NOTES: [&str; 4] = [
    "CPU is user and system time of this process and of the guest's, all threads; of capture against zram, of the thread \
     that asks",
    "the bare loop reads one event, copies one page that lies ready in a buffer, and waits as the pager does: awake for up \
     to 100 us after a fault, then in poll; in the row called asleep, in poll only",
    "in huge-kept the peer is the same guest unmanaged, from which nothing is taken; sampling-cost is measured once, in slices \
     of one managed guest's life, and its peer is the slices in which it is not sampled",
    "sixteen-guests compares plimsoll with itself: the peer is one guest, and of the tail the median",
];

/// Everything a measurement needs to know.
pub(super) struct Scene<'a> {
    mix: Mix,
    /// How the pager and the bare loop wait for faults.
    waiting: Waiting,
    interrupt: &'a Interrupt,
}

impl Scene<'_> {
    /// A guest of this kind with these contents and nothing written yet.
    fn config(&self, kind: WorkloadKind) -> VmmConfig {
        guest::config(kind, self.mix)
    }
}

/// One measurement of one side.
type Measure = fn(&Scene<'_>) -> Result<Sample, BenchError>;

/// One round of what is measured together.
type Round<'a> = fn(&Scene<'a>) -> Result<Vec<Run>, BenchError>;

/// One or more ratios that are measured together.
struct Trial<'a> {
    subjects: Vec<Subject>,
    mix: Mix,
    waiting: Waiting,
    way: Way<Scene<'a>>,
}

impl<'a> Trial<'a> {
    fn new(subjects: Vec<Subject>, round: Round<'a>) -> Self {
        Self::of(subjects, Way::Rounds(ROUNDS, round))
    }

    fn of(subjects: Vec<Subject>, way: Way<Scene<'a>>) -> Self {
        Self { subjects, mix: MIX, waiting: Waiting::Adaptive, way }
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.subjects.iter().map(|subject| subject.name.as_str()).collect();
        names.join(", ")
    }
}

/// The peer, ours, the peer again.
fn against(scene: &Scene<'_>, peer: Measure, ours: Measure) -> Result<Vec<Run>, BenchError> {
    Ok(vec![Run { peer: peer(scene)?, ours: ours(scene)?, peer_again: peer(scene)? }])
}

/// The same with two peers, around the same measurement of ours.
fn against_both(
    scene: &Scene<'_>,
    [outer, inner]: [Measure; 2],
    ours: Measure,
) -> Result<Vec<Run>, BenchError> {
    let outer_before = outer(scene)?;
    let [run] = against(scene, inner, ours)?[..] else { return Ok(Vec::new()) };
    let outer_after = outer(scene)?;
    Ok(vec![run, Run { peer: outer_before, peer_again: outer_after, ..run }])
}

fn trials<'a>() -> Vec<Trial<'a>> {
    let capture = |content, goal, mix| Trial {
        mix,
        ..Trial::new(vec![higher(content, "pages/s", goal)], |scene| {
            against(scene, capture::<Zram>, capture::<Ours>)
        })
    };
    vec![
        capture("capture/mix", Some(2.0), MIX),
        capture("capture/no-duplicate", None, NO_DUPLICATE),
        capture("capture/no-zero-no-duplicate", Some(1.2), NO_ZERO_NO_DUPLICATE),
        capture("capture/random", None, RANDOM),
        Trial::new(vec![higher("refault-sequential/mix", "pages/s", Some(1.5))], |scene| {
            against(scene, refault_sequential::<Zram>, refault_sequential::<Ours>)
        }),
        Trial::new(
            vec![lower("refault-random/mix", "ns", Some(1.3)), lower("refault-random-zram/mix", "ns", None)],
            |scene| {
                let peers: [Measure; 2] = [refault_random::<Zram>, refault_random::<Bare>];
                against_both(scene, peers, refault_random::<Ours>)
            },
        ),
        Trial {
            waiting: Waiting::Asleep,
            ..Trial::new(vec![lower("refault-random-asleep/mix", "ns", Some(1.3))], |scene| {
                against(scene, refault_random::<Bare>, refault_random::<Ours>)
            })
        },
        Trial::new(vec![lower("limbo-touch/mix", "ns", Some(1.15))], |scene| {
            against(scene, special::away_touch::<Bare>, special::limbo_touch)
        }),
        Trial::new(
            vec![
                higher("working-set-return", "pages/s", Some(5.0)),
                higher("working-set-return-zram", "pages/s", Some(1.0)),
            ],
            |scene| {
                let peers: [Measure; 2] = [working_set_return::<Zram>, working_set_return::<Bare>];
                against_both(scene, peers, working_set_return::<Ours>)
            },
        ),
        Trial::new(vec![higher("working-set-woken", "pages/s", None)], |scene| {
            against(scene, working_set_return::<Bare>, special::woken)
        }),
        Trial::new(vec![higher("huge-kept", "share", Some(0.9))], |scene| {
            against(scene, special::huge_untouched, special::huge_kept)
        }),
        Trial::new(vec![higher("fitting-guest", "ops/s", Some(0.95))], |scene| {
            against(scene, special::fitting_unmanaged, special::fitting_managed)
        }),
        Trial::of(
            vec![higher("sampling-cost", "ops/s", Some(0.99))],
            Way::Slices(sampled::SHARE, sampled::slices),
        ),
        Trial::new(
            vec![
                higher("sixteen-guests", "pages/s", Some(1.0)),
                lower("sixteen-guests-tail", "ns", Some(10.0)),
            ],
            special::sixteen_guests,
        ),
    ]
}

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
struct Settings {
    ram_bytes: u64,
    rounds: usize,
    seed: u64,
    pool_pages: u64,
    mix: String,
}

/// Whether guests can be run and managed here.
fn check_guests() -> Result<(), BenchError> {
    guest::check_kvm()?;
    match Userfaultfd::open(Mode::KernelAndUser) {
        Ok(_) => Ok(()),
        Err(error) => Err(BenchError::NotHere(error.to_string())),
    }
}

/// Measures the rows whose names begin so.
pub(crate) fn run(prefix: &str, interrupt: &Interrupt) -> Result<Report, BenchError> {
    check_host()?;
    check_guests()?;
    let machine = Machine::here();
    println!(
        "pager against MADV_PAGEOUT to zram (lz4) and a bare userfaultfd loop: guests of {RAM}, {ROUNDS} rounds"
    );
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let is_wanted = |name: &str| name.starts_with(prefix);
    let mut results = Vec::new();
    for trial in trials() {
        if trial.subjects.iter().any(|subject| is_wanted(&subject.name)) {
            eprintln!("measuring {}", trial.names());
            let scene = Scene { mix: trial.mix, waiting: trial.waiting, interrupt };
            for comparison in trial.way.measure(trial.subjects, &scene)? {
                if is_wanted(comparison.name()) {
                    println!("  {comparison}");
                    results.push(comparison);
                }
            }
        }
    }
    let settings = Settings {
        ram_bytes: RAM.0,
        rounds: ROUNDS,
        seed: SEED,
        pool_pages: POOL_PAGES,
        mix: MIX.to_string(),
    };
    Ok(Report::new(machine, &settings, &NOTES, results)?)
}
