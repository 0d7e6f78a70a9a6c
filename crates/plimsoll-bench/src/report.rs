//! What a benchmark says: lines to read and one JSON object.
//!
//! Enters: the runs of each comparison. Leaves: text and JSON, described in `docs/bench.md`. What must never happen: a
//! ratio without the runs it came from.
use crate::figures::{interval, median, ratio, spread};
use crate::session::BenchError;
use anyhow::{Context, ensure};
use plimsoll_sys::procfs::parse_meminfo;
use plimsoll_types::ByteCount;
use serde::Serialize;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// More of it.
    Higher,
    /// Less of it.
    Lower,
}

/// A value and the CPU time it took, where it took any that was measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Sample {
    /// In the unit of the comparison.
    pub(crate) value: f64,
    /// User and system time of the threads that the benchmark names.
    pub(crate) cpu_seconds: Option<f64>,
}

impl Sample {
    /// A value alone.
    pub(crate) const fn untimed(value: f64) -> Self {
        Self { value, cpu_seconds: None }
    }
}

/// One round: the peer, ours, the peer again.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Run {
    /// Plimsoll.
    pub(crate) ours: Sample,
    /// The peer, before ours.
    pub(crate) peer: Sample,
    /// The peer, after ours.
    pub(crate) peer_again: Sample,
}

impl Run {
    /// The peer about when ours was measured.
    const fn beside(&self) -> f64 {
        f64::midpoint(self.peer.value, self.peer_again.value)
    }
}

/// What is compared, before anything is measured.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// `what/content`.
    pub(crate) name: String,
    /// Of the values.
    pub(crate) unit: &'static str,
    /// Which way is good.
    pub(crate) better: Better,
    /// What the ratio must reach; none where it is only reported.
    pub(crate) goal: Option<f64>,
}

/// More of it is better.
pub(crate) fn higher(name: &str, unit: &'static str, goal: Option<f64>) -> Subject {
    Subject { name: name.to_owned(), unit, better: Better::Higher, goal }
}

/// Less of it is better.
pub(crate) fn lower(name: &str, unit: &'static str, goal: Option<f64>) -> Subject {
    Subject { better: Better::Lower, ..higher(name, unit, goal) }
}

/// One named ratio.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Comparison {
    name: String,
    ours: f64,
    peer: f64,
    unit: &'static str,
    ratio: f64,
    goal: Option<f64>,
    better: Better,
    spread: f64,
    /// Where the ratio lies in 95 of 100 cases; none where there are too few runs to say.
    interval: Option<(f64, f64)>,
    /// The ratio of each run, where the ratio is their median and they are too few for an interval; else nothing.
    each: Vec<f64>,
    runs: Vec<Run>,
}

impl Comparison {
    /// The medians of all runs, and how they compare. An error where there are no runs, or a value is not a positive
    /// number.
    pub(crate) fn new(subject: Subject, runs: Vec<Run>) -> anyhow::Result<Self> {
        let name = subject.name.clone();
        Self::of(subject, runs).with_context(|| format!("{name}: a measured value is not a positive number"))
    }

    fn of(subject: Subject, runs: Vec<Run>) -> Option<Self> {
        let ours = median(&runs.iter().map(|run| run.ours.value).collect::<Vec<_>>())?;
        let peer: Vec<f64> = runs.iter().flat_map(|run| [run.peer.value, run.peer_again.value]).collect();
        let peer = median(&peer)?;
        let pairs: Vec<_> = runs.iter().map(|run| (run.peer.value, run.peer_again.value)).collect();
        let Subject { name, unit, better, goal } = subject;
        let (ratio, spread) = (ratio(ours, peer)?, spread(&pairs)?);
        Some(Self {
            name,
            ours,
            peer,
            unit,
            ratio,
            goal,
            better,
            spread,
            interval: None,
            each: Vec::new(),
            runs,
        })
    }

    /// Of a few long runs, each of which has its own ratio, to the mean of the peer before and after it.
    pub(crate) fn beside(subject: Subject, runs: Vec<Run>) -> anyhow::Result<Self> {
        let all = Self::new(subject, runs)?;
        let each: Option<Vec<f64>> = all.runs.iter().map(|run| ratio(run.ours.value, run.beside())).collect();
        let found = each.and_then(|each| Some(Self { ratio: median(&each)?, each, ..all }));
        found.context("a ratio is not a positive number")
    }

    /// Of what is the same every time, so that the peer against itself has no spread and one run says all.
    pub(crate) fn exact(subject: Subject, ours: f64, peer: f64) -> anyhow::Result<Self> {
        let [ours, peer] = [ours, peer].map(Sample::untimed);
        Self::new(subject, vec![Run { ours, peer, peer_again: peer }])
    }

    /// Of many short runs, each of which has its own ratio, to the mean of the peer before and after it: what changes steadily
    /// is not in the median of them. It is in the spread, which is how far from 1 the peer's median against itself may lie.
    /// A run is this share of what the ratio is of; in the rest of it both are alike.
    pub(crate) fn paired(subject: Subject, runs: Vec<Run>, share: f64) -> anyhow::Result<Self> {
        let name = subject.name.clone();
        Self::of_pairs(subject, runs, share)
            .with_context(|| format!("{name}: too few runs, or a measured value is not a positive number"))
    }

    fn of_pairs(subject: Subject, runs: Vec<Run>, share: f64) -> Option<Self> {
        let whole = |one, other| Some(1.0 + (ratio(one, other)? - 1.0) * share);
        let ratios =
            runs.iter().map(|run| whole(run.ours.value, run.beside())).collect::<Option<Vec<_>>>()?;
        let own = |run: &Run| whole(run.peer_again.value, run.peer.value);
        let (low, high) = interval(&runs.iter().map(own).collect::<Option<Vec<_>>>()?)?;
        let spread = (1.0 - low).max(high - 1.0);
        let all = Self::of(subject, runs)?;
        Some(Self { ratio: median(&ratios)?, interval: interval(&ratios), spread, ..all })
    }

    /// `what/content`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Ours divided by the peer's.
    pub(crate) const fn ratio(&self) -> f64 {
        self.ratio
    }

    /// How far the peer's runs lay apart.
    pub(crate) const fn spread(&self) -> f64 {
        self.spread
    }

    fn is_met(&self, goal: f64) -> bool {
        match self.better {
            Better::Higher => self.ratio >= goal,
            Better::Lower => self.ratio <= goal,
        }
    }

    /// Median CPU seconds of ours and of the peer, where they were measured.
    fn cpu_seconds(&self) -> Option<(f64, f64)> {
        let ours: Option<Vec<f64>> = self.runs.iter().map(|run| run.ours.cpu_seconds).collect();
        let peer: Option<Vec<f64>> =
            self.runs.iter().flat_map(|run| [run.peer.cpu_seconds, run.peer_again.cpu_seconds]).collect();
        Some((median(&ours?)?, median(&peer?)?))
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, ours, peer, unit, ratio, spread, .. } = self;
        let digits = if ours.min(*peer) < 100.0 { 2 } else { 0 };
        // A hundredth of a ratio is all that a few runs can tell.
        let places = if self.interval.is_some() { 3 } else { 2 };
        write!(
            f,
            "{name:<36} ratio {ratio:>5.places$}  ours {ours:>9.digits$} peer {peer:>9.digits$} {unit:<10}"
        )?;
        write!(f, "  A/A {:>4.1} %", spread * 100.0)?;
        if let Some((low, high)) = self.interval {
            write!(f, "  95 % {low:.3} to {high:.3}")?;
        }
        if let [_, _, ..] = self.each[..] {
            let each: Vec<String> = self.each.iter().map(|ratio| format!("{ratio:.2}")).collect();
            write!(f, "  each {}", each.join(" "))?;
        }
        if let Some((ours, peer)) = self.cpu_seconds() {
            write!(f, "  CPU {ours:.3} s and {peer:.3} s")?;
        }
        if let Some(goal) = self.goal {
            let bound = if self.better == Better::Higher { "at least" } else { "at most" };
            write!(f, "  goal {bound} {goal}: {}", if self.is_met(goal) { "met" } else { "MISSED" })?;
        }
        Ok(())
    }
}

/// How subjects are measured together, given what a measurement needs to know.
pub(crate) enum Way<S> {
    /// So many rounds, each of which gives a run for each subject.
    Rounds(usize, fn(&S) -> Result<Vec<Run>, BenchError>),
    /// Once, with many short runs for each subject, which are this share of what is compared.
    Slices(f64, fn(&S) -> Result<Vec<Vec<Run>>, BenchError>),
}

impl<S> Way<S> {
    /// Measures them.
    pub(crate) fn measure(self, subjects: Vec<Subject>, scene: &S) -> Result<Vec<Comparison>, BenchError> {
        match self {
            Self::Rounds(rounds, round) => compare(subjects, rounds, || round(scene)),
            Self::Slices(share, measure) => compare_slices(subjects, measure(scene)?, share),
        }
    }
}

/// Subjects that are measured together, in so many rounds, each of which gives a run for each of them.
pub(crate) fn compare(
    subjects: Vec<Subject>,
    rounds: usize,
    mut round: impl FnMut() -> Result<Vec<Run>, BenchError>,
) -> Result<Vec<Comparison>, BenchError> {
    let mut runs: Vec<Vec<Run>> = subjects.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (all, run) in runs.iter_mut().zip(round()?) {
            all.push(run);
        }
    }
    let comparison = |(subject, runs): (Subject, Vec<Run>)| {
        ensure!(runs.len() == rounds, "{}: measured {} times", subject.name, runs.len());
        Comparison::new(subject, runs)
    };
    Ok(subjects.into_iter().zip(runs).map(comparison).collect::<anyhow::Result<_>>()?)
}

/// Subjects that are measured together, with the runs of each, which are this share of what is compared.
fn compare_slices(
    subjects: Vec<Subject>,
    runs: Vec<Vec<Run>>,
    share: f64,
) -> Result<Vec<Comparison>, BenchError> {
    let comparison = |(subject, runs)| Comparison::paired(subject, runs, share);
    Ok(subjects.into_iter().zip(runs).map(comparison).collect::<anyhow::Result<_>>()?)
}

/// Where it was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cpus: usize,
    memory_bytes: u64,
    kernel: String,
    /// Of the last minute, before the first measurement: what else the machine was doing.
    load_average: f64,
}

impl Machine {
    /// This machine. What /proc does not tell is empty, never guessed.
    pub(crate) fn here() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = cpuinfo.lines().find(|line| line.starts_with("model name"));
        let cpu = cpu.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned());
        let memory = parse_meminfo(&read("/proc/meminfo"), "MemTotal");
        let load = read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok());
        Self {
            cpu: cpu.unwrap_or_default(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: memory.unwrap_or_default().0,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_average: load.unwrap_or_default(),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cpus, memory_bytes, kernel, load_average } = self;
        write!(f, "machine: {cpu}, {cpus} processors, {}, Linux {kernel}", ByteCount(*memory_bytes))?;
        write!(f, "; load average before: {load_average}")
    }
}

/// All that a benchmark says.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    settings: serde_json::Value,
    notes: Vec<&'static str>,
    results: Vec<Comparison>,
}

impl Report {
    /// Where it was measured, with what, what the numbers leave out, and the ratios.
    pub(crate) fn new(
        machine: Machine,
        settings: &impl Serialize,
        notes: &[&'static str],
        results: Vec<Comparison>,
    ) -> anyhow::Result<Self> {
        let settings = serde_json::to_value(settings).context("cannot write settings as JSON")?;
        Ok(Self { machine, settings, notes: notes.to_vec(), results })
    }

    /// True where no row was measured.
    pub(crate) const fn is_empty(&self) -> bool {
        self.results.is_empty()
    }

    /// Writes it as NAME.json into the folder, and says where that is.
    pub(crate) fn write(&self, folder: &Path, name: &str) -> anyhow::Result<PathBuf> {
        write_json(self, folder.join(format!("{name}.json")))
    }
}

/// Writes a file of JSON, and says where it is: a report, or what else a benchmark leaves for others to read.
pub(crate) fn write_json(what: &impl Serialize, path: PathBuf) -> anyhow::Result<PathBuf> {
    let text = serde_json::to_string_pretty(what)
        .with_context(|| format!("cannot make {} of it", path.display()))?;
    fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::Value;

    fn keys(object: &Value) -> Vec<&str> {
        let mut keys: Vec<_> = object.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys
    }

    fn is_positive(value: &Value) -> bool {
        value.as_f64().is_some_and(|value| value > 0.0)
    }

    /// Every field of a line, and no other, as `docs/bench.md` has it.
    pub(crate) fn check_row(row: &Value) {
        let fields =
            ["better", "each", "goal", "interval", "name", "ours", "peer", "ratio", "runs", "spread", "unit"];
        assert_eq!(keys(row), fields, "{row}");
        for text in ["name", "unit"] {
            assert!(row[text].as_str().is_some_and(|text| !text.is_empty()), "{text} of {row}");
        }
        assert!(["ours", "peer", "ratio"].into_iter().all(|number| is_positive(&row[number])), "{row}");
        assert!(row["goal"].is_null() || is_positive(&row["goal"]), "{row}");
        assert!(row["better"] == "higher" || row["better"] == "lower", "{row}");
        assert!(row["spread"].as_f64().is_some_and(|spread| spread >= 0.0), "{row}");
        let ends = row["interval"].as_array().map(|ends| ends.len() == 2 && ends.iter().all(is_positive));
        assert!(ends.unwrap_or(row["interval"].is_null()), "{row}");
        let runs = row["runs"].as_array().unwrap();
        let each = row["each"].as_array().unwrap();
        assert!(each.iter().all(is_positive) && [0, runs.len()].contains(&each.len()), "{row}");
        assert!(!runs.is_empty(), "{row}");
        for run in runs {
            assert_eq!(keys(run), ["ours", "peer", "peer_again"]);
            for sample in ["ours", "peer", "peer_again"].map(|side| &run[side]) {
                assert_eq!(keys(sample), ["cpu_seconds", "value"]);
                assert!(is_positive(&sample["value"]), "{row}");
                assert!(sample["cpu_seconds"].is_null() || sample["cpu_seconds"].is_f64(), "{row}");
            }
        }
    }

    /// The top level, and every line.
    fn check_report(report: &Value) {
        assert_eq!(keys(report), ["machine", "notes", "results", "settings"]);
        let machine = &report["machine"];
        assert_eq!(keys(machine), ["cpu", "cpus", "kernel", "load_average", "memory_bytes"]);
        assert!(["cpu", "kernel"].into_iter().all(|text| machine[text].is_string()), "{machine}");
        assert!(["cpus", "memory_bytes"].into_iter().all(|count| is_positive(&machine[count])), "{machine}");
        assert!(machine["load_average"].is_f64(), "{machine}");
        assert!(report["notes"].as_array().unwrap().iter().all(Value::is_string));
        assert!(report["settings"].is_object());
        report["results"].as_array().unwrap().iter().for_each(check_row);
    }

    fn comparison(better: Better, goal: f64) -> Comparison {
        let subject = Subject { name: "put/mix".to_owned(), unit: "pages/s", better, goal: Some(goal) };
        let run = |ours, peer, again| Run {
            ours: Sample::untimed(ours),
            peer: Sample::untimed(peer),
            peer_again: Sample::untimed(again),
        };
        let runs = vec![run(300.0, 100.0, 110.0), run(200.0, 100.0, 100.0), run(210.0, 90.0, 99.0)];
        Comparison::new(subject, runs).unwrap()
    }

    #[test]
    fn of_a_few_runs_each_is_held_against_those_beside_it() {
        // The machine is twice as fast in the second round, and ours loses a tenth in each.
        let run = |pace: f64| Run {
            ours: Sample::untimed(pace * 0.9),
            peer: Sample::untimed(pace * 0.8),
            peer_again: Sample::untimed(pace * 1.2),
        };
        let found = Comparison::beside(higher("row", "ops/s", Some(0.95)), vec![run(1.0), run(2.0)]).unwrap();
        assert!((found.ratio - 0.9).abs() < 1e-9 && (found.spread - 0.5).abs() < 1e-9, "{found}");
        assert!(found.interval.is_none() && found.to_string().contains("each 0.90 0.90  goal"), "{found}");
        assert!(Comparison::beside(higher("row", "ops/s", None), Vec::new()).is_err());
        assert!(Comparison::beside(higher("row", "ops/s", None), vec![run(0.0)]).is_err());
    }

    #[test]
    fn what_drifts_is_not_in_the_ratio_of_a_run_to_its_neighbours_but_in_the_spread() {
        // The machine loses a fifth from one run of the peer to the next, ours a tenth more.
        let runs = (0..8).scan(1000.0, |pace, _| {
            let (peer, peer_again) = (*pace, *pace * 0.8);
            *pace = peer_again;
            let ours = f64::midpoint(peer, peer_again) * 0.9;
            Some(Run {
                ours: Sample::untimed(ours),
                peer: Sample::untimed(peer),
                peer_again: Sample::untimed(peer_again),
            })
        });
        let found = Comparison::paired(higher("slow", "ops/s", Some(0.96)), runs.collect(), 0.5).unwrap();
        assert!((found.ratio - 0.95).abs() < 1e-9, "{found}");
        assert!((found.spread - 0.1).abs() < 1e-9, "half of what lies between two runs of the peer: {found}");
        let text = found.to_string();
        assert!(text.contains("95 % 0.950 to 0.950") && text.ends_with("MISSED"), "{text}");
        let few = vec![
            Run {
                ours: Sample::untimed(1.0),
                peer: Sample::untimed(1.0),
                peer_again: Sample::untimed(1.0)
            };
            5
        ];
        assert!(Comparison::paired(higher("few", "ops/s", None), few, 1.0).is_err());
    }

    #[test]
    fn medians_are_taken_over_all_runs_of_either_side() {
        let found = comparison(Better::Higher, 2.0);
        assert!((found.ours - 210.0).abs() < 1e-9);
        assert!((found.peer - 100.0).abs() < 1e-9);
        assert!((found.ratio - 2.1).abs() < 1e-9);
        assert!((found.spread - 0.1).abs() < 1e-9);
    }

    #[test]
    fn a_goal_is_met_in_the_direction_that_is_better() {
        for (better, goal, word) in [
            (Better::Higher, 2.0, ": met"),
            (Better::Higher, 2.2, ": MISSED"),
            (Better::Lower, 2.2, ": met"),
            (Better::Lower, 2.0, ": MISSED"),
        ] {
            let text = comparison(better, goal).to_string();
            assert!(text.ends_with(word), "{text}");
        }
    }

    /// All benchmarks give a [`Report`], whose lines come to be in these four ways.
    #[test]
    fn what_is_written_has_every_field_that_readers_rely_on_however_a_line_came_to_be() {
        #[derive(Serialize)]
        struct Settings {
            rounds: usize,
        }
        let sample = Sample { value: 2.0, cpu_seconds: Some(0.5) };
        let rounded = Run { ours: sample, peer: sample, peer_again: sample };
        let slices = vec![rounded; 8];
        let results = vec![
            comparison(Better::Lower, 2.0),
            Comparison::paired(higher("slow", "ops/s", None), slices, 0.25).unwrap(),
            Comparison::exact(lower("map", "instructions/page", Some(1.0)), 25.0, 190.0).unwrap(),
            Comparison::beside(higher("row", "ops/s", None), vec![rounded; 2]).unwrap(),
        ];
        let report = Report::new(Machine::here(), &Settings { rounds: 3 }, &["a note"], results).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = report.write(folder.path(), "store").unwrap();
        assert_eq!(path, folder.path().join("store.json"));
        let json: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        check_report(&json);
        assert_eq!(json["settings"]["rounds"], 3);
        let column = |field| json["results"].as_array().unwrap().iter().map(move |row| row[field].clone());
        assert_eq!(column("better").collect::<Vec<_>>(), ["lower", "higher", "lower", "higher"]);
        assert_eq!(
            column("goal").map(|goal| goal.as_f64()).collect::<Vec<_>>(),
            [Some(2.0), None, Some(1.0), None]
        );
        assert_eq!(
            column("interval").map(|ends| ends.is_null()).collect::<Vec<_>>(),
            [true, false, true, true]
        );
        let runs = column("runs").map(|runs| runs.as_array().map(Vec::len));
        assert_eq!(runs.collect::<Vec<_>>(), [Some(3), Some(8), Some(1), Some(2)]);
        assert_eq!(
            column("each").map(|each| each.as_array().map(Vec::len)).collect::<Vec<_>>(),
            [0, 0, 0, 2].map(Some)
        );
    }
}
