//! What `guest` prints: text, or one JSON object a line.
use super::End;
use super::balloon::Look;
use super::show::{Row, hot_json, hot_text, statistics_json};
use plimsoll_attach::Dossier;
use plimsoll_attach::control::HotMemory;
use serde_json::{Map, Value, json};
use std::io::{Write, stdout};

/// Prints to standard output. That nobody listens any more stops nothing.
pub(super) struct View {
    json: bool,
}

impl View {
    pub(super) const fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints one of the two.
    fn say(&self, text: impl FnOnce() -> String, value: impl FnOnce() -> Value) {
        let line = if self.json { value().to_string() } else { text() };
        let _ = writeln!(stdout(), "{line}");
    }

    /// What there is.
    pub(super) fn description(&self, dossier: &Dossier, rows: &[Row]) {
        self.say(|| described(dossier, rows), || description_json(dossier, rows));
    }

    /// Something worth knowing.
    pub(super) fn note(&self, text: &str) {
        self.say(|| format!("note: {text}"), || json!({ "event": "note", "text": text }));
    }

    /// A look at a balloon on its way.
    pub(super) fn balloon(&self, look: &Look) {
        let Look { seconds, memory, actual, asked, target, state, .. } = look;
        let has = memory.saturating_sub(*actual);
        self.say(
            || {
                format!(
                    "{seconds:>5.0} s  the guest has {has}; the balloon holds {actual}, was asked for {asked}, is to \
                     hold {target}: {state}"
                )
            },
            || {
                json!({
                    "event": "balloon",
                    "seconds": seconds,
                    "memory_bytes": memory.0,
                    "actual_bytes": actual.0,
                    "asked_bytes": asked.0,
                    "target_bytes": target.0,
                    "statistics": look.statistics.as_ref().map(statistics_json),
                    "state": state.to_string(),
                    "falls_short": state.falls_short(),
                })
            },
        );
    }

    /// A look at hot memory on its way.
    pub(super) fn plug(&self, seconds: f64, memory: &HotMemory) {
        self.say(
            || format!("{seconds:>5.0} s  {}", hot_text(memory)),
            || json!({ "event": "plug", "seconds": seconds, "memory": hot_json(memory) }),
        );
    }

    /// It is over.
    pub(super) fn end(&self, end: &End) {
        let (how, text) = match end {
            End::There(text) => ("there", text),
            End::Short(text) => ("short", text),
        };
        self.say(|| format!("{how}: {text}"), || json!({ "event": "ended", "how": how, "text": text }));
    }
}

fn described(dossier: &Dossier, rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
    let mut text = format!("{}: {}, {}", dossier.name, dossier.vmm, dossier.identity.process);
    for Row { name, found } in rows {
        let shown = match found {
            Ok(found) => found.text.clone(),
            Err(why) => format!("no: {why}"),
        };
        text += &format!("\n  {name:<width$}  {shown}");
    }
    text
}

/// Names of rows become keys; a row of which there is nothing has only `why_not`.
fn description_json(dossier: &Dossier, rows: &[Row]) -> Value {
    let mut object = Map::new();
    object.insert("name".to_owned(), json!(dossier.name));
    object.insert("vmm".to_owned(), json!(dossier.vmm));
    object.insert("process".to_owned(), json!(dossier.identity.process.get()));
    for Row { name, found } in rows {
        let value = match found {
            Ok(found) => found.value.clone(),
            Err(why) => json!({ "why_not": why }),
        };
        object.insert(name.replace([' ', '-'], "_"), value);
    }
    Value::Object(object)
}
