//! `plimsoll plan`: what would happen, before it does.
//!
//! Enters: a scenario. Leaves: what came of simulating it, as text or JSON, and as an HTML page if one is asked for. Exit
//! status 0 when it holds, 1 when a guarantee would be broken or a machine finds no host, 2 when the scenario is refused.
use crate::verb::ended;
use indicatif::{ProgressBar, ProgressStyle};
use plimsoll_host::trace::{Basis, Recorder, Tick, TraceError};
use plimsoll_linux::explain;
use plimsoll_sim::time::Millis;
use plimsoll_sim::trace::Record;
use plimsoll_sim::{Options, Scenario, Stage, html, run, text};
use std::error::Error;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct PlanArgs {
    /// The scenario, in TOML: docs/planning.md, docs/scenarios.
    #[arg(required_unless_present = "against")]
    scenario: Option<PathBuf>,
    /// Simulate the host and the demands of a record of `plimsoll manage --record`, and hold it against the record.
    #[arg(long, value_name = "RECORD", conflicts_with_all = ["scenario", "html", "record", "seed", "threads", "every_second"])]
    against: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write a page with pictures, too.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write down each decision about the first host, too: for `plimsoll replay`.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Another seed than the scenario's.
    #[arg(long)]
    seed: Option<u64>,
    /// Threads; what comes of it is the same with any number. Default: one for each processor.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Decide every second, as on a host, whether or not anything moves: slower, to check the steps.
    #[arg(long)]
    every_second: bool,
}

pub(crate) fn main(args: &PlanArgs) -> ExitCode {
    ended("plan", plan(args).map_err(|error| explain(&*error)))
}

fn plan(args: &PlanArgs) -> Result<ExitCode, Box<dyn Error>> {
    if let Some(record) = &args.against {
        let comparison = Record::read(record)?.compare();
        print!(
            "{}",
            if args.json {
                serde_json::to_string_pretty(&comparison)? + "\n"
            } else {
                comparison.to_string()
            }
        );
        return Ok(ExitCode::SUCCESS);
    }
    let path = args.scenario.as_deref().ok_or("there is no scenario: name one")?;
    let mut scenario = Scenario::read(path)?;
    scenario.seed = args.seed.unwrap_or(scenario.seed);
    let mut options = Options::default();
    options.threads = args.threads.unwrap_or(options.threads);
    if args.every_second {
        options.longest = plimsoll_sim::host::SECOND;
    }
    // On the error output, and only where that is a terminal: it disturbs nobody who reads the other.
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} hosts, {eta} to go")?;
    let bar = ProgressBar::new(scenario.hosts.count as u64).with_style(style);
    let report = run(&scenario, options, &|| bar.inc(1))?;
    bar.finish_and_clear();
    if let Some(path) = &args.html {
        std::fs::write(path, html(&report))
            .map_err(|error| format!("{} cannot be written: {error}", path.display()))?;
    }
    if let Some(path) = &args.record {
        record(&scenario, options.longest, path)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(if report.holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Simulates the first host once more, and writes down what is decided about it.
fn record(scenario: &Scenario, longest: Millis, path: &Path) -> Result<(), Box<dyn Error>> {
    let stage = Stage::of(scenario, 0)?.ok_or("--record: the scenario has no host")?;
    let names: Vec<_> = stage.machines().map(|(id, class)| (id, format!("{}{}", class.name, id.0))).collect();
    let mut recorder = Recorder::create(path)?;
    let mut written: Result<(), TraceError> = Ok(());
    stage.run(longest, &mut |state, view, plan| {
        if written.is_err() {
            return;
        }
        let own = scenario.hosts.capacity.own;
        let basis = state.map(|state| Basis { state: state.clone(), names: names.clone(), own });
        let tick =
            Tick { view: view.clone(), plan: plan.clone(), outcomes: Vec::new(), overheads: Vec::new() };
        written = basis.map_or(Ok(()), |basis| recorder.settings(&basis)).and_then(|()| recorder.tick(&tick));
    });
    written?;
    Ok(recorder.finish()?)
}
