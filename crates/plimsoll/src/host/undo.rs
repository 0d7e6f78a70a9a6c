//! `plimsoll host undo`: what is on record, taken back step by step.
use super::{RecordArgs, say, table};
use indicatif::{ProgressBar, ProgressStyle};
use plimsoll_linux::explain;
use plimsoll_linux::prepare::{
    Change, Fit, PrepareError, Progress, Undo, Undone, Verdict, outlook, require_rights, undo,
};
use plimsoll_linux::system::Linux;
use std::process::ExitCode;

const REBOOTED: &str = "the host was booted since it was prepared, so nothing of that is left";

#[derive(clap::Args)]
pub(super) struct UndoArgs {
    /// Show what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Read swap back even if it does not seem to fit into memory: the kernel may then end processes.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    record: RecordArgs,
}

pub(super) fn run(args: &UndoArgs) -> Result<ExitCode, String> {
    let told = |error: PrepareError| explain(&error);
    let place = args.record.place();
    let nothing = format!("nothing to undo: there is no {}", place.path().display());
    let steps = match outlook(&Linux, &place).map_err(told)? {
        Undo::Nothing => {
            say(&nothing);
            return Ok(ExitCode::SUCCESS);
        }
        Undo::Rebooted if args.dry_run => {
            say(&format!("{REBOOTED}, and its record would be removed"));
            return Ok(ExitCode::SUCCESS);
        }
        Undo::Rebooted => Vec::new(),
        Undo::Steps(steps) => steps,
    };
    if args.dry_run {
        let rows: Vec<[String; 3]> = steps.iter().map(|(change, verdict)| row(change, verdict)).collect();
        say(&table(["what", "back to", "found"], &rows));
        say("nothing was changed");
        return Ok(ExitCode::SUCCESS);
    }
    require_rights().map_err(told)?;
    let fit = if args.force { Fit::Forced } else { Fit::Required };
    let mut bar = ReadBack(None);
    let undone = undo(&Linux, &place, fit, &mut |progress| match progress {
        Progress::ReadBack { left, of } => bar.show(left.0, of.0),
        Progress::Step(change, verdict) => {
            bar.clear();
            let [what, back, found] = row(change, verdict);
            say(&format!("{what}: {back} ({found})"));
        }
    });
    bar.clear();
    Ok(match undone.map_err(told)? {
        Undone::Nothing => {
            say(&nothing);
            ExitCode::SUCCESS
        }
        Undone::Rebooted => {
            say(&format!("{REBOOTED}, and its record is removed"));
            ExitCode::SUCCESS
        }
        Undone::All => {
            say("undone: this host is as it was before it was prepared");
            ExitCode::SUCCESS
        }
        Undone::SomeLeft => {
            say("undone, but for what others have changed since: that is left, and no longer on record");
            ExitCode::FAILURE
        }
    })
}

/// What is changed back, to what, and what was found.
fn row(change: &Change, verdict: &Verdict) -> [String; 3] {
    let row = change.row();
    let (back, found) = match verdict {
        Verdict::Revert => (row.old, row.new),
        Verdict::WithDevice => ("gone with its device".to_owned(), row.new),
        Verdict::Gone(found) => ("nothing to do".to_owned(), found.clone()),
        Verdict::Left(found) => ("left".to_owned(), found.clone()),
    };
    [row.what, back, found]
}

/// How far swap is read back; drawn on terminals only.
struct ReadBack(Option<ProgressBar>);

impl ReadBack {
    fn show(&mut self, left: u64, of: u64) {
        let bar = self.0.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("reading swap back: {bytes} of {total_bytes} {bar:40}");
            ProgressBar::new(of).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_position(of.saturating_sub(left));
    }

    fn clear(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}
