//! `plimsoll why`: the last decisions about a machine, and the numbers behind them.
//!
//! Enters: a record and a name. Leaves: where the machine stands, and each thing that was done or found since it last changed.
//! A sentence that is repeated decision after decision, numbers apart, is shown once with how often it was.
use crate::trace::TraceArgs;
use crate::verb::ended;
use plimsoll_host::backend::Done;
use plimsoll_host::trace::{Record, Tick, TraceError};
use plimsoll_linux::explain;
use plimsoll_policy::{Position, Reason, Step};
use plimsoll_types::{ByteCount, MachineId};
use serde::Serialize;
use std::collections::VecDeque;
use std::fmt;
use std::mem::discriminant;
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
    record: TraceArgs,
}

pub(crate) fn main(args: &WhyArgs) -> ExitCode {
    ended("why", run(args))
}

/// Where a machine stands, and why.
#[derive(Serialize)]
struct Why {
    name: String,
    at_ms: u64,
    consumed_bytes: u64,
    active_bytes: u64,
    entitlement_bytes: u64,
    target_bytes: u64,
    entries: VecDeque<Entry>,
}

/// Something that was decided or found.
#[derive(Serialize)]
struct Entry {
    /// When it was last so.
    at_ms: u64,
    /// For how many decisions in a row.
    times: u64,
    /// What was to be done; nothing for what was only found.
    step: Option<Step>,
    /// Why, with all its numbers.
    reason: Reason,
    sentence: String,
    /// Why it was not done, if it was not.
    refused: Option<String>,
}

fn run(args: &WhyArgs) -> Result<ExitCode, String> {
    let (mut id, mut known, mut last, mut entries) = (None, Vec::new(), None, VecDeque::new());
    for found in args.record.open().map_err(|error| explain(&error))? {
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
    let Position { consumed, active, entitlement, target, .. } = position;
    args.record.show(&Why {
        name: args.name.clone(),
        at_ms,
        consumed_bytes: consumed.0,
        active_bytes: active.0,
        entitlement_bytes: entitlement.0,
        target_bytes: target.0,
        entries,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Adds what a decision says about the machine.
fn add(entries: &mut VecDeque<Entry>, id: MachineId, tick: &Tick) {
    let actions = tick.plan.actions.iter().filter(|action| action.machine == id);
    let notes = tick.plan.reasons.iter().filter(|note| note.machine == Some(id));
    let refusal = |step: Step| {
        let outcome = tick.outcomes.iter().find(|one| one.machine == id && one.step == step)?;
        match &outcome.done {
            Done::Refused(why) => Some(why.to_string()),
            Done::Begun => None,
        }
    };
    let done = actions.map(|action| (Some(action.step), action.reason));
    let before = entries.len();
    for (step, reason) in done.chain(notes.map(|note| (None, note.reason))) {
        let at_ms = tick.view.now_ms;
        let refused = step.and_then(refusal);
        let sentence = reason.to_string();
        let is_same = |entry: &&mut Entry| {
            discriminant(&entry.reason) == discriminant(&reason) && entry.refused == refused
        };
        // Several things are said of one decision: the same one of the decision before may stand some entries back.
        let again = entries.iter_mut().take(before).rev().take(4).find(is_same);
        let times = again.as_ref().map_or(1, |entry| entry.times + 1);
        let entry = Entry { at_ms, times, step, reason, sentence, refused };
        match again {
            Some(old) if is_repeated(&reason) => *old = entry,
            _ => entries.push_back(Entry { times: 1, ..entry }),
        }
    }
}

/// Whether it holds for a while, so that only its last numbers are of interest. Each movement of a target is.
const fn is_repeated(reason: &Reason) -> bool {
    !matches!(reason, Reason::TargetMoved { .. } | Reason::Stalled { .. } | Reason::Resumed { .. })
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, at_ms, entries, .. } = self;
        let size = ByteCount;
        writeln!(f, "{name}, {} s after recording began:", at_ms / 1000)?;
        writeln!(
            f,
            "  it takes up {}, uses {}, is entitled to {}, and is to come to {}",
            size(self.consumed_bytes),
            size(self.active_bytes),
            size(self.entitlement_bytes),
            size(self.target_bytes)
        )?;
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
fn wrapped(text: &str, width: usize) -> Vec<String> {
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
