//! What the tests need from this machine, and the guests they start.
pub(crate) use crate::machine::{alone, can, page_out, swap};
use plimsoll_stock::{Command, Counts, Disk, Guest, Options};
use plimsoll_types::ByteCount;
use std::sync::Arc;
use std::time::Duration;

/// How long anything may take: much where nothing else runs, enough where much does.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A guest of 192 MiB, with pages and a disk of contents of its own.
pub(crate) fn options(seed: u64) -> Options {
    let mut options = Options::new(ByteCount::mib(192));
    options.seed = seed;
    options.disk = Some(Arc::new(Disk::create(ByteCount::mib(16), seed).unwrap()));
    options
}

/// Asks, and insists on an answer.
pub(crate) fn ask(guest: &mut Guest, command: Command) -> Counts {
    match guest.console().ask(command, PATIENCE) {
        Ok(counts) => counts,
        Err(error) => panic!("{error}: {:?}; {}", std::error::Error::source(&error), guest.logs()),
    }
}

/// Verifies everything once and counts the wrong words.
pub(crate) fn sweep(guest: &mut Guest) -> u64 {
    ask(guest, Command::Sweep).get("wrong").unwrap()
}
