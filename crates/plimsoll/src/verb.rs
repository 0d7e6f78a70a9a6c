//! How verbs end.
use std::process::ExitCode;

/// The exit status of a verb: 2 where what was asked cannot be done.
pub(crate) fn ended(verb: &str, outcome: Result<ExitCode, String>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("plimsoll {verb}: {error}");
        ExitCode::from(2)
    })
}
