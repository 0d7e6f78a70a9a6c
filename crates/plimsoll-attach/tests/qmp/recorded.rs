//! A monitor that answers as QEMU 7.2 did when `recorded.txt` was recorded.
//!
//! A machine's part of the recording is a row of states, each entered by a command that changes something. A query is
//! answered as it was in the present state, or else in the latest earlier one; a change that was not recorded is a failure.
use plimsoll_attach::control::{ControlError, Qmp, QmpEvent};
use serde_json::{Value, json};

pub(crate) struct Recorded {
    entries: Vec<Entry>,
    /// Entries before this one have happened.
    position: usize,
    events: Vec<QmpEvent>,
}

struct Entry {
    request: Value,
    reply: Value,
    /// Came before the reply.
    events: Vec<QmpEvent>,
}

impl Recorded {
    /// The machine whose command line ends so.
    pub(crate) fn machine(ending: &str) -> Self {
        let recording = include_str!("recorded.txt");
        let machines = recording.split("# qemu-system-x86_64");
        let lines = machines
            .into_iter()
            .find(|lines| lines.lines().next().is_some_and(|line| line.ends_with(ending)));
        let mut entries: Vec<Entry> = Vec::new();
        let mut events = Vec::new();
        for line in lines.expect("the machine was recorded").lines().skip(1) {
            let (direction, text) = line.split_at(2);
            let value: Value = serde_json::from_str(text).expect("the recording is JSON");
            if direction == "> " {
                entries.push(Entry { request: value, reply: Value::Null, events: Vec::new() });
            } else if let Some(name) = value["event"].as_str() {
                events.push(QmpEvent { name: name.to_owned(), data: value["data"].clone() });
            } else {
                let entry = entries.last_mut().expect("replies follow requests");
                entry.reply = value;
                entry.events.append(&mut events);
            }
        }
        Self { entries, position: 0, events: Vec::new() }
    }

    fn find(&mut self, request: &Value) -> &Entry {
        let is_query = |request: &Value| {
            let command = request["execute"].as_str().unwrap_or_default();
            command.starts_with("query-") || command == "qom-get" || command == "qom-list"
        };
        let later = &self.entries[self.position..];
        let found = if is_query(request) {
            let in_state = later.iter().take_while(|entry| is_query(&entry.request));
            let here = in_state.map(|entry| &entry.request).position(|other| other == request);
            let before = || self.entries[..self.position].iter().rposition(|entry| entry.request == *request);
            here.map(|place| self.position + place).or_else(before)
        } else {
            let place = later.iter().position(|entry| entry.request == *request);
            let found = place.map(|place| self.position + place);
            self.position = found.map_or(self.position, |found| found + 1);
            found
        };
        &self.entries[found.unwrap_or_else(|| panic!("{request} was not recorded in this state"))]
    }
}

impl Qmp for Recorded {
    fn interface(&self) -> &str {
        "the recorded monitor"
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let entry = self.find(&request);
        let (reply, events) = (entry.reply.clone(), entry.events.clone());
        self.events.extend(events);
        reply_of(command, &reply)
    }

    fn events(&mut self) -> Result<Vec<QmpEvent>, ControlError> {
        Ok(std::mem::take(&mut self.events))
    }
}

/// What a monitor's reply is to its caller.
pub(crate) fn reply_of(command: &str, reply: &Value) -> Result<Value, ControlError> {
    match reply.get("return") {
        Some(value) => Ok(value.clone()),
        None => Err(ControlError::Refused {
            interface: "the monitor".to_owned(),
            request: command.to_owned(),
            text: reply["error"]["desc"].as_str().unwrap_or_default().to_owned(),
        }),
    }
}
