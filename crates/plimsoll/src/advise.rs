//! `plimsoll advise`: what size each machine should have been.
use crate::trace::TraceArgs;
use crate::verb::ended;
use plimsoll_linux::explain;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct AdviseArgs {
    #[command(flatten)]
    record: TraceArgs,
}

pub(crate) fn main(args: &AdviseArgs) -> ExitCode {
    ended("advise", run(args))
}

fn run(AdviseArgs { record }: &AdviseArgs) -> Result<ExitCode, String> {
    let reader = record.open().map_err(|error| explain(&error))?;
    let report = plimsoll_host::advise::advise(reader).map_err(|error| explain(&error))?;
    record.show(&report)?;
    Ok(ExitCode::SUCCESS)
}
