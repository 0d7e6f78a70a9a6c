//! `plimsoll line`: how deep the host is loaded, by the last decision on record.
use crate::trace::TraceArgs;
use crate::verb::ended;
use plimsoll_host::line::Line;
use plimsoll_host::trace::{Record, TraceError};
use plimsoll_linux::explain;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct LineArgs {
    #[command(flatten)]
    record: TraceArgs,
}

pub(crate) fn main(args: &LineArgs) -> ExitCode {
    ended("line", run(args))
}

fn run(LineArgs { record }: &LineArgs) -> Result<ExitCode, String> {
    let (mut basis, mut last) = (None, None);
    for found in record.open().map_err(|error| explain(&error))? {
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
    record.show(&Line::of(&last, &basis))?;
    Ok(ExitCode::SUCCESS)
}
