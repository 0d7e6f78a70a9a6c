//! Why: what was decided about a machine, put together so that a sentence that holds for a while is there once.
//!
//! Enters: decisions, one after the other. Leaves: entries, each with how often in a row it was so. What must never happen: a
//! movement of a target, or a stall, that is lost among repetitions.
use crate::backend::Done;
use crate::trace::Tick;
use plimsoll_policy::{Reason, Step};
use plimsoll_types::MachineId;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::mem::discriminant;

/// Something that was decided or found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Entry {
    /// When it was last so, in milliseconds since the loop began.
    pub at_ms: u64,
    /// For how many decisions in a row.
    pub times: u64,
    /// What was to be done; nothing for what was only found.
    #[schema(value_type = Value)]
    pub step: Option<Step>,
    /// Why, with all its numbers.
    #[schema(value_type = Value)]
    pub reason: Reason,
    /// The same as a sentence.
    pub sentence: String,
    /// Why it was not done, if it was not.
    pub refused: Option<String>,
}

/// Adds what a decision says about the machine.
pub fn add(entries: &mut VecDeque<Entry>, id: MachineId, tick: &Tick) {
    let actions = tick.plan.actions.iter().filter(|action| action.machine == id);
    let notes = tick.plan.reasons.iter().filter(|note| note.machine == Some(id));
    let done = actions.map(|action| (Some(action.step), action.reason));
    add_each(entries, id, tick, done.chain(notes.map(|note| (None, note.reason))));
}

/// Adds these of what a decision says about the machine.
pub(crate) fn add_each(
    entries: &mut VecDeque<Entry>,
    id: MachineId,
    tick: &Tick,
    said: impl Iterator<Item = (Option<Step>, Reason)>,
) {
    let refusal = |step: Step| {
        let outcome = tick.outcomes.iter().find(|one| one.machine == id && one.step == step)?;
        match &outcome.done {
            Done::Refused(why) => Some(why.to_string()),
            Done::Begun => None,
        }
    };
    let before = entries.len();
    for (step, reason) in said {
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
