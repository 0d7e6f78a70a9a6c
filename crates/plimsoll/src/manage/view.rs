//! What `manage` shows: a table that is drawn anew on a terminal, every few seconds elsewhere, JSON lines when asked for.
use crate::surface::Surface;
use plimsoll_host::backend::Done;
use plimsoll_host::control::{Control, Outcome, Turn};
use plimsoll_policy::host_state::min_free;
use plimsoll_policy::{Action, Position, Step};
use plimsoll_types::{ByteCount, MachineId};
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub(super) struct View(Surface);

impl View {
    pub(super) fn new(json: bool) -> Self {
        Self(Surface::new(json))
    }

    /// Nobody reads what is said.
    pub(super) const fn is_broken(&self) -> bool {
        self.0.broken().is_some()
    }

    /// Something happened.
    pub(super) fn note(&mut self, text: &str) {
        self.0.note(text);
    }

    /// A turn is over.
    pub(super) fn turn(&mut self, turn: &Turn, control: &Control) {
        turn.events.iter().for_each(|event| self.note(&event.to_string()));
        let names: BTreeMap<MachineId, &str> = control.names().collect();
        let table = || table(turn, control, &names);
        self.0.show(table, table, || values(turn, &names));
    }

    /// It is over.
    pub(super) fn end(&mut self) {
        self.0.finish();
        let text = "all machines were let go, and go on; nothing of plimsoll remains with them";
        if self.0.is_json() {
            self.0.say(json!({ "event": "ended", "text": text }));
        } else {
            self.0.say(text);
        }
    }
}

/// The host in a line, and a line for each machine, at most 100 columns wide.
fn table(turn: &Turn, control: &Control, names: &BTreeMap<MachineId, &str>) -> String {
    let Turn { view, plan, .. } = turn;
    let seconds = view.now_ms / 1000;
    let (free, total, kept) = (view.free, view.total, min_free(view.total));
    let mut text = format!(
        "{seconds:>5} s  the host is {}: {free} free of {total}, {kept} are to be; machines share {}\n",
        plan.state, plan.budget
    );
    text.push_str(&format!(
        "{:<20} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}  now",
        "machine", "size", "reserved", "entitled", "target", "takes up", "stored", "uses"
    ));
    for Position { machine, consumed, active, entitlement, target } in &plan.machines {
        let terms = control.tree().terms(*machine);
        let size = terms.map_or(ByteCount(0), |terms| terms.size.bytes());
        let reserved = terms.map_or(ByteCount(0), |terms| terms.floor.bytes());
        let stored =
            view.machines.iter().find(|seen| seen.id == *machine).map_or(ByteCount(0), |seen| seen.stored);
        let name = names.get(machine).copied().unwrap_or_default();
        text.push_str(&format!(
            "\n{name:<20.20} {size:>8} {reserved:>8} {entitlement:>8} {target:>8} {consumed:>8} {stored:>8} {active:>8}  {}",
            doing(turn, *machine)
        ));
    }
    text
}

/// What is done to a machine, in a few letters.
fn doing(turn: &Turn, machine: MachineId) -> String {
    let is_told = |action: &&Action| action.machine == machine && !matches!(action.step, Step::Target(_));
    let last = turn.plan.actions.iter().rfind(is_told);
    last.map_or_else(String::new, |action| match action.step {
        Step::Take { frees, .. } => format!("-{frees}"),
        Step::Balloon(holds) => format!("balloon {holds}"),
        Step::Stall => "stalled".to_owned(),
        Step::Resume => "resumed".to_owned(),
        Step::Target(_) => String::new(),
    })
}

fn values(turn: &Turn, names: &BTreeMap<MachineId, &str>) -> Value {
    let Turn { view, plan, outcomes, hurry, .. } = turn;
    let name = |id: MachineId| names.get(&id).map_or_else(|| id.to_string(), ToString::to_string);
    let machines = plan.machines.iter().map(|machine| {
        let Position { machine, consumed, active, entitlement, target } = machine;
        json!({
            "name": name(*machine),
            "consumed_bytes": consumed.0,
            "active_bytes": active.0,
            "entitlement_bytes": entitlement.0,
            "target_bytes": target.0,
        })
    });
    let actions = plan.actions.iter().map(|action| {
        let is_its = |one: &&Outcome| one.machine == action.machine && one.step == action.step;
        let refused = outcomes.iter().find(is_its).and_then(|outcome| match &outcome.done {
            Done::Refused(why) => Some(why.to_string()),
            Done::Begun => None,
        });
        let (machine, why) = (name(action.machine), action.reason.to_string());
        json!({ "machine": machine, "step": action.step, "why": why, "refused": refused })
    });
    let notes = plan
        .reasons
        .iter()
        .map(|note| json!({ "machine": note.machine.map(name), "text": note.reason.to_string() }));
    json!({
        "event": "turn",
        "at_ms": view.now_ms,
        "hurry": hurry.map(|hurry| format!("{hurry:?}").to_lowercase()),
        "state": plan.state.to_string(),
        "total_bytes": view.total.0,
        "free_bytes": view.free.0,
        "budget_bytes": plan.budget.0,
        "machines": machines.collect::<Vec<_>>(),
        "actions": actions.collect::<Vec<_>>(),
        "notes": notes.collect::<Vec<_>>(),
    })
}
