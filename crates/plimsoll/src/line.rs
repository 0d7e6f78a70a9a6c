//! `plimsoll line`: how deep the host is loaded, by the last decision of the running daemon, or the last on record.
use crate::trace::{Found, SourceArgs};
use crate::verb::ended;
use plimsoll_host::line::Line;
use plimsoll_host::trace::{Record, TraceError};
use plimsoll_linux::explain;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct LineArgs {
    #[command(flatten)]
    source: SourceArgs,
}

pub(crate) fn main(args: &LineArgs) -> ExitCode {
    ended("line", run(args))
}

fn run(LineArgs { source }: &LineArgs) -> Result<ExitCode, String> {
    let record = match source.ask::<Line>("/v1/host/line")? {
        Found::Live(line) => return source.show(&line).map(|()| ExitCode::SUCCESS),
        Found::Record(record) => record,
    };
    let (mut basis, mut last) = (None, None);
    for found in record {
        match found {
            Ok(Record::Settings(new)) => basis = Some(new),
            Ok(Record::Tick(tick)) => last = Some(tick),
            // It is being written, or its recorder was killed: the last whole decision is the last.
            Err(TraceError::Truncated { .. }) => {}
            Err(error) => return Err(explain(&error)),
        }
    }
    let (Some(basis), Some(last)) = (basis, last) else {
        return Err(
            "the record holds no decision yet: let `plimsoll manage --record` run for a second".to_owned()
        );
    };
    source.show(&Line::of(&last, &basis))?;
    Ok(ExitCode::SUCCESS)
}
