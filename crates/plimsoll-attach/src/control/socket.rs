//! A QMP socket of a machine's as the connection of its driver.
//!
//! Enters: a socket that nobody else uses. Leaves: answers and errors in the driver's terms. What must never happen: two tries of
//! one command. The client skips late answers by their ids, so one that stalled leaves the connection whole.
use super::error::{ControlError, quote};
use super::qmp::{Qmp, QmpEvent};
use crate::qmp::{self, Limits, QmpError};
use serde_json::{Value, json};
use std::io;
use std::path::Path;
use std::time::Duration;

/// What has arrived is read without waiting; a wait of zero would not read at all.
const AT_ONCE: Duration = Duration::from_millis(1);

/// A connection to QEMU's monitor. As long as it lasts, nobody else is served there.
#[derive(Debug)]
pub struct QmpSocket {
    client: qmp::Qmp,
    interface: String,
}

impl QmpSocket {
    /// Connects to the monitor that listens at `path`.
    ///
    /// # Errors
    /// When nobody listens or answers there, or it is no QMP monitor.
    pub fn connect(path: &Path, limits: Limits) -> Result<Self, ControlError> {
        let interface = format!("QMP at {}", path.display());
        match qmp::Qmp::connect(path, limits) {
            Ok(client) => Ok(Self { client, interface }),
            Err(error) => Err(translated(error, &interface, "qmp_capabilities")),
        }
    }
}

impl Qmp for QmpSocket {
    fn interface(&self) -> &str {
        &self.interface
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        let arguments = if arguments.is_null() { json!({}) } else { arguments };
        self.client.execute(command, arguments).map_err(|error| translated(error, &self.interface, command))
    }

    fn events(&mut self) -> Result<Vec<QmpEvent>, ControlError> {
        let mut events = Vec::new();
        loop {
            match self.client.next_event(AT_ONCE) {
                Ok(Some(event)) => {
                    events.push(QmpEvent { name: event.name, data: Value::Object(event.data) });
                }
                Ok(None) => return Ok(events),
                Err(error) => return Err(translated(error, &self.interface, "events")),
            }
        }
    }
}

/// The client's error in the driver's terms.
fn translated(error: QmpError, interface: &str, request: &str) -> ControlError {
    let (interface, request) = (interface.to_owned(), request.to_owned());
    match error {
        QmpError::Stalled { limit, .. } => ControlError::Stalled { interface, request, patience: limit },
        QmpError::Closed { .. } => ControlError::Lost { interface, request, source: None },
        QmpError::Transfer { source, .. } => ControlError::Lost { interface, request, source: Some(source) },
        QmpError::Command { command, description, .. } => {
            ControlError::Refused { interface, request: command, text: quote(&description) }
        }
        QmpError::Garbage { found, .. } | QmpError::Unexpected { found, .. } => {
            ControlError::Garbage { interface, request, expected: "QMP", found: quote(&found) }
        }
        QmpError::LineTooLong { limit, .. } => {
            let found = format!("a line of more than {limit} bytes");
            ControlError::Garbage { interface, request, expected: "QMP", found }
        }
        QmpError::Missing(_)
        | QmpError::Refused(_)
        | QmpError::NotPermitted(_)
        | QmpError::Connect { .. } => {
            ControlError::Unreachable { interface, source: io::Error::other(error) }
        }
    }
}
