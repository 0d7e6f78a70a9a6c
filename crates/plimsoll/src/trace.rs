//! What the verbs that read a record have in common: where it is, and how what follows from it is said.
use plimsoll_host::trace::{Reader, TraceError};
use plimsoll_linux::explain;
use serde::Serialize;
use std::fmt::Display;
use std::io::{Write, stdout};
use std::path::PathBuf;

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
