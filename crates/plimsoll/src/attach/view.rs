//! What `attach` shows: one live line on a terminal, a line every few seconds otherwise, JSON lines when asked for.
use super::budget::{Budget, Taken};
use super::session::End;
use crate::surface::Surface;
use plimsoll_attach::{Discovery, Dossier};
use plimsoll_linux::explain;
use plimsoll_linux::kernel::Totals;
use plimsoll_types::{ByteCount, PageCount};
use serde_json::{Value, json};
use std::io;

/// One machine at one moment.
pub(super) struct Line {
    pub(super) seconds: f64,
    pub(super) taken: Taken,
    pub(super) budget: Option<Budget>,
    /// What the budget comes to, when that is known.
    pub(super) limit: Option<ByteCount>,
    pub(super) working_set: Option<PageCount>,
    pub(super) totals: Totals,
    pub(super) short: Option<String>,
}

pub(super) struct View(Surface);

impl View {
    pub(super) fn new(json: bool) -> Self {
        Self(Surface::new(json))
    }

    /// Why nobody can be told anything any more, if so.
    pub(super) const fn broken(&self) -> Option<&io::Error> {
        self.0.broken()
    }

    /// The machine was attached to; `counted_only` says why nothing is taken from it.
    pub(super) fn begin(&mut self, dossier: &Dossier, counted_only: Option<String>) {
        if self.0.is_json() {
            return self
                .0
                .say(json!({ "event": "attached", "machine": dossier, "counted_only": counted_only }));
        }
        self.0.say(dossier.to_string().trim_end());
        if let Some(why) = counted_only {
            self.0.say(format!("it is counted and nothing is taken from it: {why}"));
        }
    }

    /// Something happened.
    pub(super) fn note(&mut self, text: &str) {
        self.0.note(text);
    }

    /// A period has passed.
    pub(super) fn show(&mut self, dossier: &Dossier, line: &Line) {
        let live = || format!("{} {}", drawn(line, dossier.size()), text(dossier, line));
        let plain = || format!("{:>5.0} s  {}", line.seconds, text(dossier, line));
        self.0.show(live, plain, || values(line));
    }

    /// It is over.
    pub(super) fn end(&mut self, end: &End) {
        self.0.finish();
        let (word, said) = match end {
            End::Interrupted => {
                ("interrupted", "detached; the machine goes on, nothing of plimsoll remains".to_owned())
            }
            End::Over => ("over", "detached after the time asked for; the machine goes on".to_owned()),
            End::Once { wanted, got } => ("once", once(*wanted, got)),
            End::Gone(why) => ("gone", format!("the machine is gone: {why}")),
            End::Migrated => ("migrated", "the machine has moved away and runs elsewhere now".to_owned()),
            End::Failed(why) => ("failed", format!("detached; the machine goes on: {why}")),
        };
        match (self.0.is_json(), end) {
            (true, End::Once { wanted, got }) => {
                let (wanted, taken) = (wanted.bytes().0, got.taken.bytes().0);
                self.0.say(
                    json!({ "event": "ended", "how": word, "text": said, "wanted": wanted, "taken": taken }),
                );
            }
            (true, _) => self.0.say(json!({ "event": "ended", "how": word, "text": said })),
            (false, End::Failed(_)) => {}
            (false, _) => self.0.say(&said),
        }
        // Also where lines are JSON: it may be that nobody reads those.
        if let End::Failed(_) = end {
            eprintln!("plimsoll attach: {said}");
        }
    }
}

fn once(wanted: PageCount, got: &plimsoll_linux::reclaimer::Reclaimed) -> String {
    let (wanted, taken) = (wanted.bytes(), got.taken.bytes());
    match &got.short {
        Some(short) if taken < wanted => format!("took {taken} of {wanted}: {}", explain(short)),
        None if taken < wanted => format!("took {taken} of {wanted}"),
        _ => format!("took {taken}"),
    }
}

fn text(dossier: &Dossier, line: &Line) -> String {
    let Line { taken, working_set, totals, .. } = line;
    let used = working_set.map_or_else(|| "not known yet".to_owned(), |pages| pages.bytes().to_string());
    let limit = match (line.budget, line.limit) {
        (None, _) => String::new(),
        (Some(_), Some(limit)) => format!(" of {limit}"),
        (Some(_), None) => " (its budget waits for what it uses)".to_owned(),
    };
    let short = line.short.as_ref().map_or_else(String::new, |short| format!("; {short}"));
    format!(
        "{}: takes {}{limit} ({} in RAM, {} in swap as {}), uses {used}; taken {}, came back {}{short}",
        dossier.name,
        taken.total(),
        taken.resident,
        taken.elsewhere,
        taken.compressed,
        totals.taken.bytes(),
        totals.refaults.bytes(),
    )
}

fn values(line: &Line) -> Value {
    let Line { taken, totals, .. } = line;
    json!({
        "event": "period",
        "seconds": line.seconds,
        "resident_bytes": taken.resident.0,
        "elsewhere_bytes": taken.elsewhere.0,
        "compressed_bytes": taken.compressed.0,
        "budget_bytes": line.limit.map(|limit| limit.0),
        "working_set_bytes": line.working_set.map(|pages| pages.bytes().0),
        "taken_pages": totals.taken.0,
        "sampled_pages": totals.sampled.0,
        "refaulted_pages": totals.refaults.0,
        "short": line.short,
    })
}

/// `#` in RAM, `:` what swap costs, blank what the machine takes not.
fn drawn(line: &Line, size: ByteCount) -> String {
    const WIDTH: u64 = 32;
    let width = |part: ByteCount| (part.0 * WIDTH).div_ceil(size.0.max(1));
    let mut bar = String::from("[");
    (0..width(line.taken.resident)).for_each(|_| bar.push('#'));
    (0..width(line.taken.compressed)).for_each(|_| bar.push(':'));
    format!("{bar:<33}]")
}

/// For the operator who named none.
pub(super) fn names(found: &Discovery) -> String {
    let names: Vec<&str> = found.machines.iter().map(|machine| machine.name.as_str()).collect();
    if names.is_empty() { "there is none on this host".to_owned() } else { names.join(", ") }
}
