//! `plimsoll config`: settings checked before a daemon sees them, and what may be said in them.
//!
//! Enters: a file. Leaves: what it says in one line, or every mistake, each in a line with its place, and exit status 2. Nothing is changed.
use crate::verb::ended;
use plimsoll_host::api::Access;
use plimsoll_host::config::{Config, Mistakes, keys};
use plimsoll_linux::explain;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Where the settings of a host are, unless it is said otherwise.
pub(crate) const USUAL: &str = "/etc/plimsoll/plimsoll.toml";

#[derive(clap::Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Check settings, with machines.d and groups.d beside them: all mistakes at once.
    Check {
        /// The file.
        #[arg(default_value = USUAL, env = "PLIMSOLL_CONFIG")]
        file: PathBuf,
    },
    /// Say what may be said: every key with its unit, what it is where it is left out, and what it means.
    Docs,
}

pub(crate) fn main(args: &ConfigArgs) -> ExitCode {
    match &args.verb {
        Verb::Check { file } => check(file),
        Verb::Docs => {
            // A reader that wants no more is not in the wrong.
            let _ = stdout().write_all(keys::reference().as_bytes());
            ExitCode::SUCCESS
        }
    }
}

fn check(file: &Path) -> ExitCode {
    let read = Config::read(file).map_err(|mistakes| all(&mistakes));
    // What a daemon says of the files that they name, it says when it starts.
    let read = read.and_then(|config| {
        let checked =
            Access::check(&config.api).map_err(|error| format!("{}: {}", file.display(), explain(&error)));
        checked.map(|()| config)
    });
    ended(
        "config",
        read.map(|config| {
            let Config { machines, groups, rules, .. } = config;
            let shown = file.display();
            println!(
                "{shown}: {} machines, {} groups, {} rules; no mistakes",
                machines.len(),
                groups.len(),
                rules.len()
            );
            ExitCode::SUCCESS
        }),
    )
}

/// Every mistake in a line of its own.
pub(crate) fn all(mistakes: &Mistakes) -> String {
    mistakes.each().map(|error| explain(error)).collect::<Vec<_>>().join("\n")
}
