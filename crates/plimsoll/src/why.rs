//! `plimsoll why`: the last decisions about a machine, and the numbers behind them.
//!
//! Enters: a name, and a running daemon or a record. Leaves: where the machine stands, and each thing that was done or found since it last changed.
//! A sentence that is repeated decision after decision, numbers apart, is shown once with how often it was.
use crate::live::escaped;
use crate::trace::{Found, SourceArgs};
use crate::verb::ended;
use plimsoll_host::api::Why;
use plimsoll_host::trace::{Record, TraceError};
use plimsoll_host::why::add;
use plimsoll_linux::explain;
use plimsoll_types::ByteCount;
use serde::Serialize;
use std::collections::VecDeque;
use std::fmt;
use std::process::ExitCode;

/// Columns of a terminal.
const WIDTH: usize = 100;
/// Where sentences begin.
const INDENT: usize = 12;

#[derive(clap::Args)]
pub(crate) struct WhyArgs {
    /// The machine's name.
    name: String,
    /// How many decisions to show at most.
    #[arg(long, value_name = "COUNT", default_value_t = 10)]
    last: usize,
    #[command(flatten)]
    source: SourceArgs,
}

pub(crate) fn main(args: &WhyArgs) -> ExitCode {
    ended("why", run(args))
}

/// Where a machine stands, and why.
#[derive(Serialize)]
#[serde(transparent)]
struct Told {
    why: Why,
    /// What its times are counted from.
    #[serde(skip)]
    since: &'static str,
}

fn run(args: &WhyArgs) -> Result<ExitCode, String> {
    let record = match args.source.ask::<Why>(&format!("/v1/machines/{}/why", escaped(&args.name)))? {
        Found::Live(mut why) => {
            why.entries.drain(..why.entries.len().saturating_sub(args.last.max(1)));
            return args
                .source
                .show(&Told { why, since: "the daemon began to decide" })
                .map(|()| ExitCode::SUCCESS);
        }
        Found::Record(record) => record,
    };
    let (mut id, mut known, mut last, mut entries) = (None, Vec::new(), None, VecDeque::new());
    for found in record {
        match found {
            Ok(Record::Settings(basis)) => {
                // A name may come again as another machine: the last one counts.
                let found = basis.names.iter().find(|(_, name)| *name == args.name).map(|(id, _)| *id);
                if found.is_some() && found != id {
                    (id, last) = (found, None);
                    entries.clear();
                }
                known = basis.names;
            }
            Ok(Record::Tick(tick)) => {
                let Some(id) = id else { continue };
                let position = tick.plan.machines.iter().find(|machine| machine.machine == id);
                last = position.map(|position| (tick.view.now_ms, *position)).or(last);
                add(&mut entries, id, &tick);
                entries.drain(..entries.len().saturating_sub(args.last.max(1)));
            }
            Err(TraceError::Truncated { .. }) => {}
            Err(error) => return Err(explain(&error)),
        }
    }
    let Some((at_ms, position)) = last else {
        let names: Vec<&str> = known.iter().map(|(_, name)| &**name).collect();
        let names = if names.is_empty() { "no machines".to_owned() } else { names.join(", ") };
        return Err(format!(
            "nothing was decided about {:?}; at the end of the record there are {names}",
            args.name
        ));
    };
    let why = Why::of(args.name.clone(), at_ms, &position, entries.into());
    args.source.show(&Told { why, since: "recording began" })?;
    Ok(ExitCode::SUCCESS)
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { why, since } = self;
        let Why { name, at_ms, entries, .. } = why;
        let size = ByteCount;
        writeln!(f, "{name}, {} s after {since}:", at_ms / 1000)?;
        writeln!(
            f,
            "  it takes up {}, uses {}, is entitled to {}, and is to come to {}",
            size(why.consumed_bytes),
            size(why.active_bytes),
            size(why.entitlement_bytes),
            size(why.target_bytes)
        )?;
        if let Some(rule) = &why.rule {
            writeln!(f, "  it is managed by {rule}")?;
        }
        for entry in entries {
            let seconds = entry.at_ms / 1000;
            let often = if entry.times > 1 { format!(" ({} times)", entry.times) } else { String::new() };
            let refused = entry.refused.as_ref().map_or_else(String::new, |why| format!("; not done: {why}"));
            let text = format!("{}{refused}{often}", entry.sentence);
            let mut lines = wrapped(&text, WIDTH - INDENT).into_iter();
            writeln!(f, "{seconds:>8} s  {}", lines.next().unwrap_or_default())?;
            lines.try_for_each(|line| writeln!(f, "{:INDENT$}{line}", ""))?;
        }
        Ok(())
    }
}

/// Lines of at most so many characters, broken at spaces.
pub(crate) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_broken_at_spaces_and_nothing_is_lost() {
        let text = "its target goes from 1G to 512M: it has 900M, uses 100M and wants 512M";
        let lines = wrapped(text, 20);
        assert!(lines.iter().all(|line| line.len() <= 20), "{lines:?}");
        assert_eq!(lines.join(" "), text);
        assert_eq!(wrapped("", 20), [""]);
    }
}
