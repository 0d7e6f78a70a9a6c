//! Prints what is known about machines: `dossier [--json] [--qmp SOCKET] [--api SOCKET] [--range A-B]… [NAME|PID]`.
//! Without a name, lists the machines of the host.

use plimsoll_attach::{Held, Request, discover, find, inspect, parse_range};
use std::error::Error;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", plimsoll_linux::explain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let (mut request, mut wanted, mut json) = (Request::default(), None, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--json" => json = true,
            "--qmp" => request.qmp = Some(value()?.into()),
            "--api" => request.api = Some(value()?.into()),
            "--range" => request.ranges.push(parse_range(&value()?)?),
            _ => wanted = Some(argument),
        }
    }
    let Some(wanted) = wanted else {
        println!("{}", serde_json::to_string_pretty(&discover()?)?);
        return Ok(());
    };
    let seen = find(&wanted)?.identity;
    let dossier = inspect(&Held::reopen(seen.process, seen.start)?, &request)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&dossier)?);
    } else {
        print!("{dossier}");
    }
    Ok(())
}
