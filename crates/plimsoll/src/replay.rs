//! `plimsoll replay`: the decisions of a record, made again.
use crate::trace::say;
use crate::verb::ended;
use plimsoll_host::trace::{Difference, Reader, Replayed, replay};
use plimsoll_linux::explain;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct ReplayArgs {
    /// The record, as `plimsoll manage --record` writes it.
    file: PathBuf,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

/// Status 0 where all came out the same, 1 where one did not or the record is not whole.
pub(crate) fn main(args: &ReplayArgs) -> ExitCode {
    ended("replay", run(args))
}

fn run(ReplayArgs { file, json }: &ReplayArgs) -> Result<ExitCode, String> {
    let reader = Reader::open(file).map_err(|error| explain(&error))?;
    let Replayed { identical, difference, damage } = replay(reader);
    let outcome = Outcome { identical, difference, damage: damage.map(|error| explain(&error)) };
    say(*json, &outcome)?;
    let is_whole = outcome.difference.is_none() && outcome.damage.is_none();
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
