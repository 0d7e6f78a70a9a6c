//! What the verbs that read a record have in common: where it is, and how what follows from it is said.
use crate::live::LiveArgs;
use plimsoll_host::api::client::ClientError;
use plimsoll_host::trace::{Reader, TraceError};
use plimsoll_linux::explain;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

/// Where `manage --record` puts its record when it is not told.
pub(crate) const USUAL: &str = "/var/lib/plimsoll/trace";

/// Which record is read, and how what follows from it is said.
#[derive(clap::Args)]
pub(crate) struct TraceArgs {
    /// The record of decisions, as `plimsoll manage --record` writes it.
    #[arg(long, value_name = "FILE", default_value = USUAL)]
    trace: PathBuf,
    /// JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A running daemon, or a record.
#[derive(clap::Args)]
pub(crate) struct SourceArgs {
    /// A record of decisions, as `plimsoll manage --record` writes it. Left out: the running daemon, and where there is none,
    /// /var/lib/plimsoll/trace.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["directory", "host"])]
    trace: Option<PathBuf>,
    #[command(flatten)]
    live: LiveArgs,
}

/// Where an answer comes from.
pub(crate) enum Found<T> {
    /// The running daemon gave it.
    Live(T),
    /// It is to be had from a record.
    Record(Reader),
}

impl SourceArgs {
    /// Asks the daemon, or opens the record.
    pub(crate) fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<Found<T>, String> {
        let open = |path: &Path| Reader::open(path).map(Found::Record).map_err(|error| explain(&error));
        if let Some(trace) = &self.trace {
            return open(trace);
        }
        match self.live.client().and_then(|client| client.get(path)) {
            Ok(answer) => Ok(Found::Live(answer)),
            Err(ClientError::NoDaemon { .. }) if Path::new(USUAL).exists() => open(Path::new(USUAL)),
            Err(error @ ClientError::NoDaemon { .. }) => {
                Err(format!("{error}; a record is read with --trace FILE"))
            }
            Err(error) => Err(explain(&error)),
        }
    }

    /// Says it.
    pub(crate) fn show(&self, value: &(impl Serialize + Display)) -> Result<(), String> {
        self.live.show(value)
    }
}

impl TraceArgs {
    pub(crate) fn open(&self) -> Result<Reader, TraceError> {
        Reader::open(&self.trace)
    }

    /// Says it.
    pub(crate) fn show(&self, value: &(impl Serialize + Display)) -> Result<(), String> {
        say(self.json, value)
    }
}

/// Says a value as text or as JSON.
pub(crate) fn say(json: bool, value: &(impl Serialize + Display)) -> Result<(), String> {
    let text = match json {
        true => serde_json::to_string(value).map_err(|error| explain(&error))? + "\n",
        false => value.to_string(),
    };
    // A reader that wants no more is not in the wrong.
    let _ = stdout().write_all(text.as_bytes());
    Ok(())
}
