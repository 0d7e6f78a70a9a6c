//! QEMU's control interface (QMP): commands and their results, and the events between them.
//!
//! Enters: commands. Leaves: what QEMU returned, as JSON. Events that arrive meanwhile wait until they are asked for.
use crate::wire::{Wire, WireError};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long QEMU may take over a command. It answers when its main loop comes to it, under emulation and load too.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// The connection failed.
    #[error("QEMU's monitor does not answer to {command}")]
    Wire {
        /// The command.
        command: String,
        /// Why.
        #[source]
        source: WireError,
    },
    /// QEMU will not do it.
    #[error("QEMU refuses {command}: {why}")]
    Refused {
        /// The command.
        command: String,
        /// What it said.
        why: String,
    },
    /// QEMU said something that is not JSON.
    #[error("QEMU's monitor said {0:?}, which is no QMP")]
    NoJson(String),
}

/// Something QEMU tells of its own accord.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, `MIGRATION` for example.
    pub name: String,
    /// What belongs to it.
    pub data: Value,
}

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub struct Monitor {
    wire: Wire,
    events: VecDeque<Event>,
}

impl Monitor {
    /// Greets, as QMP demands.
    pub(crate) fn new(wire: Wire) -> Result<Self, MonitorError> {
        let mut monitor = Self { wire, events: VecDeque::new() };
        monitor.call("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Runs a command and returns its result.
    ///
    /// # Errors
    /// When QEMU refuses, or does not answer.
    pub fn call(&mut self, command: &str, arguments: &Value) -> Result<Value, MonitorError> {
        let failed = |source| MonitorError::Wire { command: command.to_owned(), source };
        let deadline = Instant::now() + PATIENCE;
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.wire.say(&line).map_err(failed)?;
        loop {
            let line = self.wire.next(deadline).map_err(failed)?;
            let message: Value = serde_json::from_str(&line).map_err(|_| MonitorError::NoJson(line))?;
            if let Some(result) = message.get("return") {
                return Ok(result.clone());
            }
            if let Some(error) = message.get("error") {
                let why = error.get("desc").and_then(Value::as_str).unwrap_or("no reason").to_owned();
                return Err(MonitorError::Refused { command: command.to_owned(), why });
            }
            self.note(&message);
        }
    }

    /// The next event, if there is one within so long.
    ///
    /// # Errors
    /// When QEMU has ended.
    pub fn event(&mut self, within: Duration) -> Result<Option<Event>, MonitorError> {
        let deadline = Instant::now() + within;
        while self.events.is_empty() {
            let line = match self.wire.next(deadline) {
                Ok(line) => line,
                Err(WireError::Silent) => return Ok(None),
                Err(source) => return Err(MonitorError::Wire { command: "nothing".to_owned(), source }),
            };
            let message = serde_json::from_str(&line).map_err(|_| MonitorError::NoJson(line))?;
            self.note(&message);
        }
        Ok(self.events.pop_front())
    }

    /// Keeps an event. The greeting is none.
    fn note(&mut self, message: &Value) {
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            let data = message.get("data").cloned().unwrap_or_default();
            self.events.push_back(Event { name: name.to_owned(), data });
        }
    }
}
