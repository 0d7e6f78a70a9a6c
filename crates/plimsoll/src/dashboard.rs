//! `plimsoll dashboard`: the page for a browser on this host, as long as this runs.
//!
//! Enters: where to listen, a daemon. Leaves: an address on standard output. Whoever has that address may use the page, so it
//! is on no command line and in no file.
use crate::live::DaemonAt;
use crate::signals::signals;
use crate::verb::ended;
use plimsoll_host::api::Host;
use plimsoll_host::dashboard::Dashboard;
use plimsoll_linux::explain;
use std::io::{Read, Write, stdout};
use std::net::SocketAddr;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct DashboardArgs {
    /// Where to listen: an address of this host's own. Port 0 is any that is free.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    #[command(flatten)]
    daemon: DaemonAt,
}

pub(crate) fn main(args: &DashboardArgs) -> ExitCode {
    ended("dashboard", run(args).map(|()| ExitCode::SUCCESS))
}

fn run(args: &DashboardArgs) -> Result<(), String> {
    let client = args.daemon.client().map_err(|error| explain(&error))?;
    // Without a daemon, or the right to ask it, there is nothing to show.
    let _: Host = client.get("/v1/host").map_err(|error| explain(&error))?;
    let mut end = signals()?;
    let dashboard = Dashboard::start(args.listen, client).map_err(|error| explain(&error))?;
    let said = writeln!(stdout(), "{}", dashboard.url()).and_then(|()| stdout().flush());
    said.map_err(|error| format!("the address cannot be told: {error}"))?;
    eprintln!(
        "whoever has this address may see this host's machines and change their settings, until this ends"
    );
    end.read(&mut [0]).map(|_| ()).map_err(|error| explain(&error))
}
