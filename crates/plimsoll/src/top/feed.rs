//! What a daemon says of itself, asked once a second.
//!
//! Enters: which machine is looked at. Leaves: snapshots, or why there is none. It is on a thread of its own, and goes on asking a
//! daemon that has gone.
use crate::live::{escaped, machines};
use plimsoll_host::api::client::{Client, ClientError};
use plimsoll_host::api::{Host, Machine, Map, Why};
use plimsoll_linux::explain;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// The loop decides once a second.
const PERIOD: Duration = Duration::from_secs(1);

/// A daemon at one moment.
pub(super) struct Snapshot {
    pub(super) host: Host,
    pub(super) machines: Vec<Machine>,
    pub(super) detail: Option<Detail>,
}

/// More about one machine.
pub(super) struct Detail {
    pub(super) name: String,
    /// Nothing before the first decision about it.
    pub(super) why: Option<Why>,
    pub(super) map: Option<Map>,
}

/// Asks for the host, all machines, and more about one of them.
pub(super) fn ask(client: &Client, chosen: Option<&str>) -> Result<Snapshot, ClientError> {
    let host = client.get("/v1/host")?;
    let machines = machines(client, None)?;
    let detail = chosen.map(|name| {
        let of = |what: &str| format!("/v1/machines/{}/{what}", escaped(name));
        // One that has gone meanwhile is not in the next snapshot.
        let (why, map) = (client.get(&of("why")).ok(), client.get(&of("map")).ok());
        Detail { name: name.to_owned(), why, map }
    });
    Ok(Snapshot { host, machines, detail })
}

/// Tells what is heard, until nobody listens any more.
pub(super) fn run(
    client: &Client,
    choices: &Receiver<Option<String>>,
    mut tell: impl FnMut(Result<Snapshot, String>) -> bool,
) {
    let mut chosen = None;
    while tell(ask(client, chosen.as_deref()).map_err(|error| explain(&error))) {
        match choices.recv_timeout(PERIOD) {
            // Of a held key only the last choice counts.
            Ok(choice) => chosen = choices.try_iter().last().unwrap_or(choice),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
