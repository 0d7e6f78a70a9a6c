//! `plimsoll host`: what this host offers for taking guests' memory, and setting its swap up and down again.
//!
//! Enters: options. Leaves: a table, and with consent a changed host. What must never happen here: a change that was
//! not shown and agreed to.
mod check;
mod prepare;
mod undo;

use plimsoll_linux::prepare::Place;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct HostArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Say what this kernel offers and lacks; ends with 0 if machines can be attached with kernel paging. Changes nothing.
    Check(check::CheckArgs),
    /// Set up swap to page machines out to, after showing what would change and asking.
    Prepare(prepare::PrepareArgs),
    /// Take back what `prepare` has set up.
    Undo(undo::UndoArgs),
}

/// Where the record of what was changed is kept.
#[derive(clap::Args)]
struct RecordArgs {
    /// The directory of the record of what was changed. Undo with the same.
    #[arg(long, value_name = "DIR", default_value = STANDARD)]
    record: PathBuf,
}

const STANDARD: &str = "/var/lib/plimsoll";

impl RecordArgs {
    fn place(&self) -> Place {
        Place::at(&self.record)
    }

    /// The command that takes back what is on record here.
    fn undo(&self) -> String {
        let option =
            (self.record != Path::new(STANDARD)).then(|| format!(" --record {}", self.record.display()));
        format!("plimsoll host undo{}", option.unwrap_or_default())
    }
}

pub(crate) fn main(args: &HostArgs) -> ExitCode {
    let (name, done) = match &args.verb {
        Verb::Check(args) => ("check", check::run(args)),
        Verb::Prepare(args) => ("prepare", prepare::run(args)),
        Verb::Undo(args) => ("undo", undo::run(args)),
    };
    done.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "plimsoll host {name}: {error}");
        ExitCode::from(2)
    })
}

/// Says something. That nobody listens any more (`| head`) stops nothing.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Rows under headings, each column as wide as its widest cell.
fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let all = || std::iter::once(headings).chain(rows.iter().map(|row| row.each_ref().map(String::as_str)));
    let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: [&str; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    all().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_without_spaces() {
        let rows = [["a".to_owned(), "long cell".to_owned()], ["bcd".to_owned(), String::new()]];
        assert_eq!(table(["x", "y"], &rows), "x    y\na    long cell\nbcd\n");
    }
}
