//! How many guests a host bears: the same guests in the same memory, under plimsoll, under the kernel alone, under a loop that
//! turns balloons only, and with enough memory for all.
//!
//! Enters: which rows. Leaves: ratios, a table, a file for each row, and a plot of all rows there are. Every way runs the same
//! guests with the same contents and seeds in one memory cgroup; whatever a way needs itself is in its budget. What must never
//! happen: a wrong word, a way with more memory than another, or a figure of a row that was not run.
//!
//! `mix`: the guests. `ways`: how they are run. `fleet`: one run. `score`: what it came to. `plot`: the picture.
mod fleet;
mod mix;
mod plot;
mod score;
mod ways;

use crate::figures::ratio;
use crate::report::{Comparison, Machine, Report, Run, Sample, Subject, higher, lower, write_json};
use crate::session::{BenchError, Interrupt};
use crate::swap::check_host;
use anyhow::Context;
use fleet::{MEASURED, Outcome};
use mix::{MIXES, Mix, Role};
use plimsoll_types::ByteCount;
use score::{Work, jain, mean, pooled, quantile_us};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use ways::ours::Plimsoll;
use ways::{Alone, Host};

/// What guests own for each byte of the budget, in tenths.
const OVERCOMMIT_TENTHS: [u64; 4] = [10, 15, 20, 30];

const NOTES: [&str; 7] = [
    "overcommit is the guests' RAM over the budget; the budget holds the VMMs, the manager and zram, too",
    "a throughput is the sum of all guests' operations a second; a p99 is that of all their operations together",
    "stall is the part of operations' time that they would not have taken with enough memory",
    "guaranteed is how the guest fared that fared worst of those whose reservation holds all they keep; the peer's is that of a run with enough memory",
    "fairness is Jain's index of what each guest did against what it did with enough memory",
    "KSM scans 1000 pages every 20 ms, so that it has merged what it can when time is taken",
    "the balloon loop runs a cycle in one second instead of ten, with the kernel's reclaim and KSM beneath it, as hosts have it",
];

/// A way to run the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Way {
    /// With enough memory.
    Enough,
    /// Plimsoll.
    Plimsoll,
    /// The kernel alone.
    Kernel,
    /// The kernel, and balloons.
    Balloon,
}

impl Way {
    /// Those in which memory is short.
    const SHORT: [Self; 3] = [Self::Plimsoll, Self::Kernel, Self::Balloon];

    const fn about(self) -> &'static str {
        match self {
            Self::Enough => "enough memory",
            Self::Plimsoll => "plimsoll",
            Self::Kernel => "kernel alone",
            Self::Balloon => "balloon loop",
        }
    }

    fn host(self, row: &Row, rows: &Path, interrupt: &Interrupt) -> anyhow::Result<Box<dyn Host>> {
        let (asked, budget) = (row.mix.asked(), row.budget());
        Ok(match self {
            Self::Enough => Box::new(Alone::enough(asked, interrupt)?),
            Self::Plimsoll => Box::new(Plimsoll::new(row.mix, budget, &row.record(rows), interrupt)?),
            Self::Kernel => Box::new(Alone::short(asked, budget, interrupt)?),
            Self::Balloon => Box::new(Alone::ballooned(asked, budget, interrupt)?),
        })
    }
}

/// The order of a round: what plimsoll is held against comes right before and right after it, since machines are faster at one time
/// than at another.
const ORDER: [Way; 7] =
    [Way::Enough, Way::Plimsoll, Way::Enough, Way::Kernel, Way::Plimsoll, Way::Kernel, Way::Balloon];

/// Rounds of a row that has to reach something: two runs of the same, a minute apart, differ by more than what some goals leave.
const ROUNDS: usize = 3;

/// How often a run is repeated in which the kernel killed a guest for want of memory.
const REPEATS: usize = 2;

/// A mix at an overcommit.
struct Row {
    mix: &'static Mix,
    tenths: u64,
}

/// What one run came to, for the table and the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Figures {
    way: Way,
    operations_per_second: f64,
    /// Against enough memory.
    throughput: f64,
    /// What half of all operations take: of one that touches a page that is there.
    #[serde(default)]
    p50_us: f64,
    p99_us: f64,
    p99: f64,
    fairness: f64,
    stall: f64,
    /// Of the guest that fared worst, against itself with enough memory; of those with a reservation that holds all they keep.
    worst_guaranteed: Option<f64>,
    violations: u64,
    swings: u64,
    died: usize,
    /// In use on average, and at most.
    #[serde(default)]
    mean_bytes: u64,
    peak_bytes: u64,
}

/// One of them.
type Figure = fn(&Figures) -> f64;

/// A row as its file holds it.
#[derive(Debug, Serialize, Deserialize)]
struct RowFile {
    mix: String,
    overcommit: f64,
    budget_bytes: u64,
    ways: Vec<Figures>,
}

impl Row {
    fn all() -> impl Iterator<Item = Self> {
        MIXES.iter().flat_map(|mix| OVERCOMMIT_TENTHS.map(|tenths| Self { mix, tenths }))
    }

    fn name(&self) -> String {
        format!("{}/{}.{}", self.mix.name, self.tenths / 10, self.tenths % 10)
    }

    /// Its file in that folder.
    fn path(&self, rows: &Path) -> PathBuf {
        rows.join(format!("{}.json", self.name().replace('/', "-")))
    }

    /// Where the decisions of plimsoll are recorded, for `plimsoll replay`.
    fn record(&self, rows: &Path) -> PathBuf {
        self.path(rows).with_extension("record")
    }

    fn budget(&self) -> ByteCount {
        ByteCount(self.mix.asked().0 * 10 / self.tenths)
    }

    #[expect(clippy::cast_precision_loss, reason = "tens")]
    fn overcommit(&self) -> f64 {
        self.tenths as f64 / 10.0
    }

    fn rounds(&self) -> usize {
        if self.subjects().iter().any(|(subject, ..)| subject.goal.is_some()) { ROUNDS } else { 1 }
    }

    /// What is compared, what must be reached, and where both come from.
    fn subjects(&self) -> Vec<(Subject, Way, Figure)> {
        let name = |what: &str| format!("{}/{what}", self.name());
        let at_two = self.tenths == 20;
        let beats = matches!(self.mix.name, "mostly-idle" | "phase-shifting" | "noisy-neighbour");
        let sparse = self.mix.name == "mostly-idle" && self.tenths >= 20;
        let kernel = at_two.then_some(if beats { 1.3 } else { 1.0 });
        let throughput: Figure = |figures| figures.operations_per_second;
        let p99: Figure = |figures| figures.p99_us;
        // One that did nothing at all is the worst there can be, and a ratio needs a number.
        let worst: Figure = |figures| figures.worst_guaranteed.unwrap_or(0.0).max(0.001);
        let is_guaranteed = self.mix.roles().any(Role::is_guaranteed);
        let guaranteed = (higher(&name("guaranteed-enough"), "of (d)", Some(0.95)), Way::Enough, worst);
        let mut subjects = vec![
            (higher(&name("throughput-enough"), "ops/s", sparse.then_some(0.95)), Way::Enough, throughput),
            (higher(&name("throughput-kernel"), "ops/s", kernel), Way::Kernel, throughput),
            (lower(&name("p99-enough"), "us", None), Way::Enough, p99),
            (lower(&name("p99-kernel"), "us", at_two.then_some(1.0)), Way::Kernel, p99),
        ];
        subjects.extend(is_guaranteed.then_some(guaranteed));
        subjects
    }
}

/// Runs the guests one way.
fn run_once(row: &Row, way: Way, rows: &Path, interrupt: &Interrupt) -> Result<Outcome, BenchError> {
    eprintln!("{}: {}", row.name(), way.about());
    let context = || format!("{}: {}", row.name(), way.about());
    let mut host = way.host(row, rows, interrupt).with_context(context)?;
    let outcome = fleet::run(row.mix, &mut *host, interrupt);
    let ended = host.end();
    let outcome = outcome.map_err(|error| match error {
        BenchError::Failed(error) => BenchError::Failed(error.context(context())),
        other => other,
    })?;
    ended?;
    Ok(outcome)
}

/// The figures of an outcome, against what the same guests did with enough memory.
fn figures(way: Way, row: &Row, outcome: &Outcome, enough: &[Work]) -> Figures {
    let sum = |works: &[Work]| works.iter().map(|work| work.operations_per_second).sum::<f64>();
    let against = |ours: f64, theirs: f64| ratio(ours, theirs).unwrap_or(0.0);
    let fared: Vec<f64> = outcome
        .works
        .iter()
        .zip(enough)
        .map(|(work, enough)| against(work.operations_per_second, enough.operations_per_second))
        .collect();
    let guaranteed = row.mix.roles().zip(&fared).filter(|(role, _)| role.is_guaranteed());
    let (pooled, p99_enough) = (pooled(&outcome.works), quantile_us(&pooled(enough), 0.99));
    let p99 = quantile_us(&pooled, 0.99);
    // The time that as many operations take with enough memory is no stall.
    let time = |work: &Work, mean_us: f64| mean_us * work.operations_per_second;
    let spent: f64 = outcome.works.iter().map(|work| time(work, work.mean_us)).sum();
    let needed: f64 = outcome
        .works
        .iter()
        .zip(enough)
        .map(|(work, enough)| time(work, enough.mean_us.min(work.mean_us)))
        .sum();
    Figures {
        way,
        operations_per_second: sum(&outcome.works),
        throughput: against(sum(&outcome.works), sum(enough)),
        p50_us: quantile_us(&pooled, 0.5),
        p99_us: p99,
        p99: against(p99, p99_enough),
        fairness: jain(&fared),
        stall: (1.0 - against(needed, spent)).max(0.0),
        worst_guaranteed: guaranteed.map(|(_, share)| *share).min_by(f64::total_cmp),
        violations: outcome.violations,
        swings: outcome.swings,
        died: outcome.works.iter().filter(|work| work.has_died).count(),
        mean_bytes: outcome.used.mean().0,
        peak_bytes: outcome.used.peak.0,
    }
}

/// All runs of a row, each against those of its round with enough memory.
fn measure(row: &Row, rows: &Path, interrupt: &Interrupt) -> Result<Vec<Figures>, BenchError> {
    let mut all = Vec::new();
    for _ in 0..row.rounds() {
        all.extend(measure_once(row, rows, interrupt)?);
    }
    Ok(all)
}

/// All runs of a round.
fn measure_once(row: &Row, rows: &Path, interrupt: &Interrupt) -> Result<Vec<Figures>, BenchError> {
    let mut outcomes = Vec::new();
    for way in ORDER {
        let mut outcome = run_once(row, way, rows, interrupt)?;
        for _ in 0..REPEATS {
            // Others do better where one has died: such a run counts only if there is no other.
            if outcome.works.iter().all(|work| !work.has_died) {
                break;
            }
            outcome = run_once(row, way, rows, interrupt)?;
        }
        outcomes.push((way, outcome));
    }
    let with_enough =
        outcomes.iter().filter(|(way, _)| *way == Way::Enough).map(|(_, outcome)| &outcome.works[..]);
    let enough = mean(&with_enough.collect::<Vec<_>>());
    Ok(outcomes.iter().map(|(way, outcome)| figures(*way, row, outcome, &enough)).collect())
}

fn print(row: &Row, all: &[Figures]) {
    println!("{}, budget {}", row.name(), row.budget());
    println!(
        "  {:<14} {:>9} {:>6} {:>7} {:>7} {:>7} {:>5} {:>6} {:>6} {:>5} {:>5} {:>4} {:>8} {:>8}",
        "way",
        "ops/s",
        "of (d)",
        "p50 us",
        "p99 us",
        "of (d)",
        "Jain",
        "stall",
        "worst",
        "viol.",
        "swing",
        "died",
        "mean",
        "peak"
    );
    for figures in all {
        let Figures { way, operations_per_second, throughput, p50_us, p99_us, p99, fairness, stall, .. } =
            figures;
        let worst = figures.worst_guaranteed.map_or("-".to_owned(), |worst| format!("{worst:.2}"));
        let [mean, peak] = [figures.mean_bytes, figures.peak_bytes].map(|bytes| ByteCount(bytes).to_string());
        let Figures { violations, swings, died, .. } = figures;
        println!(
            "  {:<14} {operations_per_second:>9.0} {throughput:>6.2} {p50_us:>7.2} {p99_us:>7.1} {p99:>7.2} {fairness:>5.2} {:>5.1}% \
             {worst:>6} {violations:>5} {swings:>5} {died:>4} {mean:>8} {peak:>8}",
            way.about(),
            stall * 100.0
        );
    }
}

fn compare(row: &Row, all: &[Figures]) -> Result<Vec<Comparison>, BenchError> {
    let mut results = Vec::new();
    for (subject, peer, value) in row.subjects() {
        let is_between = |runs: &&[Figures]| runs.iter().map(|one| one.way).eq([peer, Way::Plimsoll, peer]);
        let run = |runs: &[Figures]| Run {
            peer: Sample::untimed(value(&runs[0])),
            ours: Sample::untimed(value(&runs[1])),
            peer_again: Sample::untimed(value(&runs[2])),
        };
        results.push(Comparison::beside(subject, all.windows(3).filter(is_between).map(run).collect())?);
    }
    Ok(results)
}

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
struct Settings {
    asked_bytes: u64,
    measured_seconds: u64,
    seed: u64,
    mix: String,
}

/// Measures the rows whose names begin so, and draws all whose files lie in the folder.
pub(crate) fn run(prefix: &str, folder: &Path, interrupt: &Interrupt) -> Result<Report, BenchError> {
    check_host()?;
    crate::guest::check_kvm()?;
    ways::check_here()?;
    let machine = Machine::here();
    let asked = MIXES[0].asked();
    println!("guests of {asked} in all, four ways: {} s each, after they are warm", MEASURED.as_secs());
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let rows = folder.join("density");
    fs::create_dir_all(&rows).with_context(|| format!("cannot make {}", rows.display()))?;
    let mut results = Vec::new();
    for row in Row::all()
        .filter(|row| row.name().starts_with(prefix) || prefix.starts_with(&format!("{}/", row.name())))
    {
        let all = measure(&row, &rows, interrupt)?;
        print(&row, &all);
        let file = RowFile {
            mix: row.mix.name.to_owned(),
            overcommit: row.overcommit(),
            budget_bytes: row.budget().0,
            ways: all.clone(),
        };
        write_json(&file, row.path(&rows))?;
        for comparison in
            compare(&row, &all)?.into_iter().filter(|comparison| comparison.name().starts_with(prefix))
        {
            println!("  {comparison}");
            results.push(comparison);
        }
    }
    if !results.is_empty() {
        let path = folder.join("density.svg");
        fs::write(&path, plot::svg(&panels(&rows)?))
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("drawn in {}", path.display());
    }
    let settings = Settings {
        asked_bytes: asked.0,
        measured_seconds: MEASURED.as_secs(),
        seed: crate::contents::SEED,
        mix: crate::contents::MIX.to_string(),
    };
    Ok(Report::new(machine, &settings, &NOTES, results)?)
}

/// What has been measured of each mix, in this run or an earlier one.
fn panels(rows: &Path) -> anyhow::Result<Vec<(&'static str, Vec<plot::Point>)>> {
    let mut panels: Vec<(&str, Vec<plot::Point>)> = MIXES.iter().map(|mix| (mix.name, Vec::new())).collect();
    for row in Row::all() {
        let path = row.path(rows);
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let file: RowFile = serde_json::from_str(&text)
            .with_context(|| format!("{} is of another version: remove it", path.display()))?;
        let Some((_, points)) = panels.iter_mut().find(|(name, _)| *name == row.mix.name) else { continue };
        for way in Way::SHORT {
            let ratios: Vec<f64> = file
                .ways
                .iter()
                .filter(|figures| figures.way == way)
                .map(|figures| figures.throughput)
                .collect();
            if let Some(ratio) = crate::figures::median(&ratios) {
                points.push(plot::Point { way, overcommit: file.overcommit, ratio });
            }
        }
    }
    Ok(panels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_whose_guests_work_within_reservations_has_a_goal_for_the_worst_of_them() {
        let goal = |mix| {
            let subjects = Row { mix, tenths: 30 }.subjects();
            let subject = subjects.iter().find(|(subject, ..)| subject.name.ends_with("/guaranteed-enough"));
            subject.and_then(|(subject, ..)| subject.goal)
        };
        let goals: Vec<_> = MIXES.iter().filter_map(|mix| Some((mix.name, goal(mix)?))).collect();
        assert_eq!(goals, [("noisy-neighbour", 0.95)]);
    }

    #[test]
    fn a_row_is_compared_within_its_rounds_and_never_across_them() {
        let row = Row { mix: &MIXES[0], tenths: 20 };
        assert_eq!(row.rounds(), ROUNDS);
        assert_eq!(Row { mix: &MIXES[1], tenths: 30 }.rounds(), 1, "it has no goal");
        // Each round is twice as fast as the one before it.
        let one = |way, pace: f64| Figures {
            way,
            operations_per_second: match way {
                Way::Enough => 100.0 * pace,
                Way::Plimsoll => 90.0 * pace,
                Way::Kernel => 60.0 * pace,
                Way::Balloon => 1.0,
            },
            throughput: 1.0,
            p50_us: 1.0,
            p99_us: 2.0 / pace,
            p99: 1.0,
            fairness: 1.0,
            stall: 0.0,
            worst_guaranteed: None,
            violations: 0,
            swings: 0,
            died: 0,
            mean_bytes: 0,
            peak_bytes: 0,
        };
        let all: Vec<Figures> =
            [1.0, 2.0, 4.0].into_iter().flat_map(|pace| ORDER.map(|way| one(way, pace))).collect();
        let found: Vec<f64> = compare(&row, &all).unwrap().iter().map(Comparison::ratio).collect();
        for (found, wanted) in found.iter().zip([0.9, 1.5, 1.0, 1.0]) {
            assert!((found - wanted).abs() < 1e-9, "{found} is not {wanted}");
        }
        let lines: Vec<String> = compare(&row, &all).unwrap().iter().map(Comparison::to_string).collect();
        assert!(lines.iter().all(|line| line.matches("A/A  0.0 %").count() == 1), "{lines:?}");
    }
}
