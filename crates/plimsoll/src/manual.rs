//! The hidden verbs that packagers need: completions for shells, and man pages.
//!
//! Enters: the command line's own description. Leaves: text on standard output, or a page a verb in a directory.
use crate::verb::ended;
use clap::Command;
use clap_complete::Shell;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct CompletionsArgs {
    /// For which shell.
    shell: Shell,
}

#[derive(clap::Args)]
pub(crate) struct ManArgs {
    /// Where the pages go; made if there is none.
    directory: PathBuf,
}

pub(crate) fn completions(args: &CompletionsArgs, mut command: Command) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "plimsoll", &mut text);
    // A reader that wants no more is not in the wrong.
    let _ = stdout().write_all(&text);
    ExitCode::SUCCESS
}

pub(crate) fn man(args: &ManArgs, command: Command) -> ExitCode {
    let directory = &args.directory;
    let command = command.disable_help_subcommand(true);
    let written = std::fs::create_dir_all(directory);
    let written = written.and_then(|()| clap_mangen::generate_to(command, directory));
    let written = written.map_err(|error| format!("no man pages in {}: {error}", directory.display()));
    ended("man", written.map(|()| ExitCode::SUCCESS))
}
