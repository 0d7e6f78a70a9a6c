//! `plimsoll replay`: the decisions of a record, made again, here or by the bare-metal hypervisor.
use crate::demo::Host;
use crate::trace::say;
use crate::verb::ended;
use plimsoll_host::trace::{Difference, Reader, Record, Replayed, compare, replay};
use plimsoll_linux::explain;
use plimsoll_metal::wire::{Given, Line};
use plimsoll_metal::{Event, Options, Run};
use plimsoll_policy::Plan;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How long the hypervisor may be silent: it says each decision when it is made.
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(clap::Args)]
pub(crate) struct ReplayArgs {
    /// The record, as `plimsoll manage --record` or `plimsoll plan --record` writes it.
    file: PathBuf,
    /// Who decides again.
    #[arg(long, value_enum, default_value_t = Host::Linux)]
    host: Host,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// Status 0 where all came out the same, 1 where one did not or the record is not whole.
pub(crate) fn main(args: &ReplayArgs) -> ExitCode {
    ended("replay", run(args))
}

fn run(ReplayArgs { file, host, json }: &ReplayArgs) -> Result<ExitCode, String> {
    let open = || Reader::open(file).map_err(|error| explain(&error));
    let Replayed { identical, difference, damage } = match host {
        Host::Linux => replay(open()?),
        Host::Metal => {
            let mut plans = on_bare_metal(open()?)?.into_iter();
            compare(open()?, |record| match record {
                Record::Settings(_) => None,
                Record::Tick(_) => plans.next(),
            })
        }
    };
    let outcome = Outcome { identical, difference, damage: damage.map(|error| explain(&error)) };
    say(*json, &outcome)?;
    let is_whole = outcome.difference.is_none() && outcome.damage.is_none();
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the bare-metal hypervisor decides about the views of a record, as far as that can be read.
fn on_bare_metal(reader: Reader) -> Result<Vec<Plan>, String> {
    let records: Vec<_> = reader.map_while(Result::ok).collect();
    let views = records.iter().filter(|record| matches!(record, Record::Tick(_))).count();
    let given = records.into_iter().map(|record| match record {
        Record::Settings(basis) => Given::Settings(Box::new(basis.state)),
        Record::Tick(tick) => Given::View(Box::new(tick.view)),
    });
    let options = Options::of_decisions(given.collect()).map_err(|error| explain(&error))?;
    let (mut plans, mut last) = (Vec::new(), String::new());
    let ended =
        Run::start(&options).map_err(|error| explain(&error))?.finish(PATIENCE, |event| match event {
            Event::Report(line) => plans.extend(match *line {
                Line::Decision(decision) => Some(decision.plan),
                _ => None,
            }),
            Event::Said(line) => last = line,
            _ => {}
        });
    match ended {
        Ok(()) if plans.len() == views => Ok(plans),
        Ok(()) => Err(format!("the hypervisor decided {} times about {views} views", plans.len())),
        Err(error) => Err(format!("{}: {last}", explain(&error))),
    }
}

#[derive(Serialize)]
struct Outcome {
    identical: u64,
    difference: Option<Difference>,
    damage: Option<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} decisions came out as recorded", self.identical)?;
        if let Some(Difference { tick, at_ms, machine, recorded, decided }) = &self.difference {
            let whose = machine.as_deref().unwrap_or("the host");
            writeln!(f, "decision {tick}, at {} s, differs about {whose}:", at_ms / 1000)?;
            writeln!(f, "  recorded  {recorded}\n  decided   {decided}")?;
        }
        self.damage.iter().try_for_each(|damage| writeln!(f, "{damage}"))
    }
}
