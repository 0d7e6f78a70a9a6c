//! A client of QMP, QEMU's machine protocol: a socket enters, commands go out, answers and events leave.
//!
//! The protocol, line by line, each a JSON object:
//!
//! ```text
//! <- {"QMP": {"version": …, "capabilities": […]}}          the greeting, once
//! -> {"execute": "qmp_capabilities", "id": 0}              without it, every other command is refused
//! <- {"return": {}, "id": 0}
//! -> {"execute": "query-status", "id": 1}
//! <- {"event": "STOP", "data": …, "timestamp": …}          at any time, also between command and answer
//! <- {"return": {…}, "id": 1}                              or {"error": {"class": …, "desc": …}, "id": 1}
//! ```
//!
//! What must never happen here: waiting without a limit, memory that grows with what the other side sends, or an answer
//! taken for that to another command. An answer that comes after its command was given up is skipped by its id.
//!
//! A QMP monitor serves one client at a time: while another has it, connecting succeeds and the greeting does not come.
//! So nothing connects unasked, and nobody keeps a connection longer than needed.

mod processors;
mod queries;

pub use processors::{
    FlatKind, FlatRange, GENERAL, Registers, SEGMENTS, Segment, parse_flat_view, parse_registers,
};
pub use queries::{MemoryBackend, MemoryDevice, MemorySize, Migration, RamBlock, RunState, parse_ram_blocks};

use crate::unix::{connect_within, is_timeout, limit_to};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Events that are kept until somebody asks for them; the oldest go first.
const EVENTS_KEPT: usize = 1024;
/// What is asked of the kernel at once.
const READ_SIZE: usize = 16 << 10;

/// What a client puts up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest wait for a connection and the greeting.
    pub connect: Duration,
    /// The longest wait for the answer to a command.
    pub reply: Duration,
    /// The longest line, in bytes.
    pub line: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // QEMU answers queries in milliseconds unless its main loop is stuck. The longest answers (query-qmp-schema)
        // have 200 KB.
        Self { connect: Duration::from_secs(3), reply: Duration::from_secs(5), line: 4 << 20 }
    }
}

/// The other side did not behave, or said no.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// There is no such socket.
    #[error("there is no QMP socket {0:?}: check the path, or start QEMU with -qmp unix:PATH,server,nowait")]
    Missing(PathBuf),
    /// Nobody listens.
    #[error("nobody listens on {0:?}: its QEMU has ended, and another may have taken its place")]
    Refused(PathBuf),
    /// A right is missing.
    #[error("not permitted to connect to {0:?}: run as the user of that QEMU, or as root")]
    NotPermitted(PathBuf),
    /// Something else was in the way.
    #[error("cannot connect to {path:?}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Nothing came in time.
    #[error(
        "{path:?} has not sent {awaited} for {limit:?}: another client may be connected, or QEMU is stuck"
    )]
    Stalled {
        /// The socket.
        path: PathBuf,
        /// What should have come.
        awaited: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The other side hung up.
    #[error("{path:?} was closed by the other side, which owed {awaited}")]
    Closed {
        /// The socket.
        path: PathBuf,
        /// What should have come.
        awaited: String,
    },
    /// What came is not QMP.
    #[error("{path:?} does not speak QMP: it sent {found:?}, not {awaited}")]
    Garbage {
        /// The socket.
        path: PathBuf,
        /// What should have come.
        awaited: String,
        /// The beginning of what came.
        found: String,
    },
    /// A line has no end.
    #[error("{path:?} sent a line of more than {limit} bytes")]
    LineTooLong {
        /// The socket.
        path: PathBuf,
        /// What is put up with.
        limit: usize,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command}: {description} ({class})")]
    Command {
        /// The command.
        command: String,
        /// QEMU's class of the error: `GenericError`, `CommandNotFound`, `DeviceNotActive`, …
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// An answer lacks what it should have.
    #[error("QEMU's answer to {command} lacks {expected}: {found}")]
    Unexpected {
        /// The command.
        command: &'static str,
        /// What should be there.
        expected: &'static str,
        /// The beginning of the answer.
        found: String,
    },
    /// Reading or writing failed.
    #[error("talking to {path:?} failed")]
    Transfer {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `STOP`, `RESUME`, `SHUTDOWN`, `MIGRATION`, `MEMORY_DEVICE_SIZE_CHANGE`, `DEVICE_DELETED`, …
    pub name: String,
    /// What belongs to it.
    pub data: Map<String, Value>,
}

/// A connection to a QMP monitor, ready for commands.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    limits: Limits,
    stream: UnixStream,
    received: Vec<u8>,
    next_id: u64,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects, waits for the greeting and negotiates.
    pub fn connect(path: &Path, limits: Limits) -> Result<Self, QmpError> {
        let stream = connect_within(path, limits.connect).map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => QmpError::Missing(path),
                io::ErrorKind::ConnectionRefused => QmpError::Refused(path),
                io::ErrorKind::PermissionDenied => QmpError::NotPermitted(path),
                io::ErrorKind::TimedOut => QmpError::Stalled {
                    path,
                    awaited: "an accepted connection".to_owned(),
                    limit: limits.connect,
                },
                _ => QmpError::Connect { path, source },
            }
        })?;
        let (received, events) = (Vec::new(), VecDeque::new());
        let mut client = Self { path: path.to_owned(), limits, stream, received, next_id: 0, events };
        let greeting = client.message("a greeting", limits.connect)?;
        if !greeting.get("QMP").is_some_and(Value::is_object) {
            return Err(client.garbage("a greeting", &Value::Object(greeting).to_string()));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Executes a command with its arguments, an object, and gives what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let awaited = format!("the answer to {command}");
        let deadline = Instant::now() + self.limits.reply;
        let sent = limit_to(&self.stream, deadline).and_then(|()| self.stream.write_all(line.as_bytes()));
        sent.map_err(|source| self.failed(&awaited, self.limits.reply, source))?;
        loop {
            let mut answer = self.message_until(&awaited, deadline, self.limits.reply)?;
            if let Some(event) = event(&mut answer) {
                self.keep(event);
                continue;
            }
            match answer.get("id").and_then(Value::as_u64) {
                Some(other) if other < id => continue,
                // QEMU leaves the id out where it could not read the command.
                Some(other) if other == id => {}
                None if answer.contains_key("error") => {}
                _ => return Err(self.garbage(&awaited, &Value::Object(answer).to_string())),
            }
            if let Some(value) = answer.remove("return") {
                return Ok(value);
            }
            let Some(error) = answer.get("error").and_then(Value::as_object) else {
                return Err(self.garbage(&awaited, &Value::Object(answer).to_string()));
            };
            let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let command = command.to_owned();
            return Err(QmpError::Command { command, class: text("class"), description: text("desc") });
        }
    }

    /// The next event, or `None` if none came within `limit`.
    pub fn next_event(&mut self, limit: Duration) -> Result<Option<Event>, QmpError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now() + limit;
        loop {
            match self.message_until("an event", deadline, limit) {
                Ok(mut message) => {
                    if let Some(event) = event(&mut message) {
                        return Ok(Some(event));
                    }
                    // The answer to a command that was given up.
                }
                Err(QmpError::Stalled { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// From now on waits so long for the answer to a command.
    pub fn wait_for_replies(&mut self, limit: Duration) {
        self.limits.reply = limit;
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() == EVENTS_KEPT {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn message(&mut self, awaited: &str, limit: Duration) -> Result<Map<String, Value>, QmpError> {
        self.message_until(awaited, Instant::now() + limit, limit)
    }

    fn message_until(
        &mut self,
        awaited: &str,
        deadline: Instant,
        limit: Duration,
    ) -> Result<Map<String, Value>, QmpError> {
        let line = self.line(awaited, deadline, limit)?;
        match serde_json::from_slice(&line) {
            Ok(Value::Object(message)) => Ok(message),
            _ => Err(self.garbage(awaited, &String::from_utf8_lossy(&line))),
        }
    }

    fn line(&mut self, awaited: &str, deadline: Instant, limit: Duration) -> Result<Vec<u8>, QmpError> {
        let mut looked_at = 0;
        loop {
            if let Some(place) = self.received[looked_at..].iter().position(|byte| *byte == b'\n') {
                let rest = self.received.split_off(looked_at + place + 1);
                return Ok(std::mem::replace(&mut self.received, rest));
            }
            looked_at = self.received.len();
            if looked_at > self.limits.line {
                return Err(QmpError::LineTooLong { path: self.path.clone(), limit: self.limits.line });
            }
            let mut bytes = [0; READ_SIZE];
            let read = limit_to(&self.stream, deadline).and_then(|()| self.stream.read(&mut bytes));
            match read {
                Ok(0) => {
                    return Err(QmpError::Closed { path: self.path.clone(), awaited: awaited.to_owned() });
                }
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(awaited, limit, error)),
            }
        }
    }

    fn failed(&self, awaited: &str, limit: Duration, source: io::Error) -> QmpError {
        let (path, awaited) = (self.path.clone(), awaited.to_owned());
        match source.kind() {
            _ if is_timeout(&source) => QmpError::Stalled { path, awaited, limit },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => QmpError::Closed { path, awaited },
            _ => QmpError::Transfer { path, source },
        }
    }

    fn garbage(&self, awaited: &str, found: &str) -> QmpError {
        QmpError::Garbage { path: self.path.clone(), awaited: awaited.to_owned(), found: beginning(found) }
    }
}

/// Takes an event out of a message, if it is one.
fn event(message: &mut Map<String, Value>) -> Option<Event> {
    let Some(Value::String(name)) = message.remove("event") else { return None };
    let data = match message.remove("data") {
        Some(Value::Object(data)) => data,
        _ => Map::new(),
    };
    Some(Event { name, data })
}

/// As much of a text as an error message should repeat.
fn beginning(text: &str) -> String {
    text.trim_end().chars().take(80).collect()
}
