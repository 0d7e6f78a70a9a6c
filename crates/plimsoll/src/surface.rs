//! Where verbs that watch running machines show them: drawn anew on a terminal, every few seconds elsewhere, JSON lines when
//! asked for.
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::fmt::Display;
use std::io::{self, IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

/// Without a terminal, how often what is shown is printed.
const PLAIN_PERIOD: Duration = Duration::from_secs(5);

enum Kind {
    Live(ProgressBar),
    Plain { printed: Option<Instant> },
    Json,
}

pub(crate) struct Surface {
    kind: Kind,
    /// Why nothing more can be said, if so.
    broken: Option<io::Error>,
}

impl Surface {
    pub(crate) fn new(json: bool) -> Self {
        let style =
            || ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
        let kind = match (json, io::stderr().is_terminal()) {
            (true, _) => Kind::Json,
            (false, false) => Kind::Plain { printed: None },
            (false, true) => Kind::Live(ProgressBar::new_spinner().with_style(style())),
        };
        Self { kind, broken: None }
    }

    /// Why nobody can be told anything any more, if so.
    pub(crate) const fn broken(&self) -> Option<&io::Error> {
        self.broken.as_ref()
    }

    pub(crate) const fn is_json(&self) -> bool {
        matches!(self.kind, Kind::Json)
    }

    /// Something happened.
    pub(crate) fn note(&mut self, text: &str) {
        if self.is_json() { self.say(json!({ "event": "note", "text": text })) } else { self.say(text) }
    }

    /// How things stand: as a terminal shows it, as it is printed elsewhere, and for programs.
    pub(crate) fn show(
        &mut self,
        live: impl FnOnce() -> String,
        plain: impl FnOnce() -> String,
        value: impl FnOnce() -> Value,
    ) {
        match &mut self.kind {
            Kind::Live(bar) => {
                bar.set_message(live());
                bar.tick();
            }
            Kind::Plain { printed } => {
                if printed.is_none_or(|printed| printed.elapsed() >= PLAIN_PERIOD) {
                    *printed = Some(Instant::now());
                    self.say(plain());
                }
            }
            Kind::Json => self.say(value()),
        }
    }

    /// Nothing is drawn anew any more.
    pub(crate) fn finish(&self) {
        if let Kind::Live(bar) = &self.kind {
            bar.finish();
        }
    }

    /// A line, or some, on standard output.
    pub(crate) fn say(&mut self, what: impl Display) {
        let print = || writeln!(stdout(), "{what}");
        let printed = match &self.kind {
            Kind::Live(bar) => bar.suspend(print),
            Kind::Plain { .. } | Kind::Json => print(),
        };
        self.broken = self.broken.take().or(printed.err());
    }
}
