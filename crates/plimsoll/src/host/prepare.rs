//! `plimsoll host prepare`: the plan, the question, the changes.
use super::{RecordArgs, say, table};
use plimsoll_linux::explain;
use plimsoll_linux::prepare::{
    Outlook, Plan, PrepareError, Request, ZramRequest, ZswapRequest, apply, default_size, plan,
    require_rights,
};
use plimsoll_linux::system::Linux;
use plimsoll_types::ByteCount;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct PrepareArgs {
    /// Swap to compressed memory: a zram device that holds SIZE before compression. Default: half of the host's memory.
    #[arg(long, value_name = "SIZE", num_args = 0..=1, conflicts_with = "zswap")]
    zram: Option<Option<ByteCount>>,
    /// Put zswap, compressed memory, in front of a disk swap that there is.
    #[arg(long)]
    zswap: bool,
    /// The compression algorithm. Default: for zram the fastest there is, for zswap the one that is set.
    #[arg(long, value_name = "NAME")]
    algorithm: Option<String>,
    /// The most memory that what is compressed may take.
    #[arg(long, value_name = "SIZE")]
    limit: Option<ByteCount>,
    /// A second algorithm, with which pages can be compressed once more.
    #[arg(long, value_name = "NAME", conflicts_with = "zswap")]
    recompress: Option<String>,
    /// A block device that idle pages can be written back to; what is on it is lost.
    #[arg(long, value_name = "DEV", conflicts_with = "zswap")]
    write_back: Option<PathBuf>,
    /// Priority among swap areas: the kernel fills those of high priority first.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i16).range(0..), conflicts_with = "zswap")]
    priority: i16,
    /// Do it without asking.
    #[arg(long)]
    yes: bool,
    /// Show what would change, and change nothing.
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    #[command(flatten)]
    record: RecordArgs,
}

impl PrepareArgs {
    fn request(&self) -> Result<Request, String> {
        if self.zswap {
            return Ok(Request::Zswap(ZswapRequest { algorithm: self.algorithm.clone(), limit: self.limit }));
        }
        let size = match self.zram.flatten() {
            Some(size) => size,
            None => default_size(&Linux).map_err(|error| explain(&error))?,
        };
        // The kernel and /proc know a device by its own name, not by one of its links.
        let canonical = |path: &PathBuf| {
            path.canonicalize().map_err(|error| format!("--write-back {}: {error}", path.display()))
        };
        Ok(Request::Zram(ZramRequest {
            size,
            algorithm: self.algorithm.clone(),
            limit: self.limit,
            recompress: self.recompress.clone(),
            write_back: self.write_back.as_ref().map(canonical).transpose()?,
            priority: self.priority,
        }))
    }
}

pub(super) fn run(args: &PrepareArgs) -> Result<ExitCode, String> {
    let told = |error: PrepareError| explain(&error);
    let place = args.record.place();
    let request = args.request()?;
    let plan = match plan(&Linux, &place, &request).map_err(told)? {
        Outlook::Prepared => {
            say(&format!("this host is prepared already: {request}; `{}` takes it back", args.record.undo()));
            return Ok(ExitCode::SUCCESS);
        }
        Outlook::Changes(plan) => plan,
    };
    say(&text(&plan));
    if args.dry_run {
        say("nothing was changed");
        return Ok(ExitCode::SUCCESS);
    }
    require_rights().map_err(told)?;
    if !args.yes && !consent()? {
        say("nothing was changed");
        return Ok(ExitCode::FAILURE);
    }
    let record = apply(&Linux, &place, &plan, &mut |_| {}).map_err(told)?;
    let done: Vec<String> = record
        .steps
        .iter()
        .map(|change| change.row())
        .map(|row| format!("{} {}", row.what, row.new))
        .collect();
    say(&format!("prepared: {}", done.join(", ")));
    say(&format!("on record in {}; `{}` takes it back", place.path().display(), args.record.undo()));
    Ok(ExitCode::SUCCESS)
}

fn text(plan: &Plan) -> String {
    let rows: Vec<[String; 3]> = plan
        .changes
        .iter()
        .map(|change| {
            let row = change.row();
            [row.what, row.old, row.new]
        })
        .collect();
    let notes: String = plan.notes.iter().map(|note| format!("note: {note}\n")).collect();
    format!("{}\n{notes}", table(["what", "now", "then"], &rows))
}

/// Asks, where somebody can answer.
fn consent() -> Result<bool, String> {
    let mut input = std::io::stdin().lock();
    if !input.is_terminal() {
        return Err("nothing was changed: nobody can be asked here, so agree with --yes".to_owned());
    }
    let mut output = std::io::stdout();
    let asked = output.write_all(b"change this host so? [y/N] ").and_then(|()| output.flush());
    asked.map_err(|error| error.to_string())?;
    let mut answer = String::new();
    input.read_line(&mut answer).map_err(|error| error.to_string())?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
