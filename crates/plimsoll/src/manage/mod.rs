//! `plimsoll manage`: several running machines, managed from outside as one host.
//!
//! Enters: a settings file, and which machines. Leaves: decisions that are carried out while this runs, and what is shown and
//! recorded of them. Ending lets all machines go: nothing of ours stays in one of them. A machine that is to be managed and is
//! not there yet is taken in when it comes.
mod view;

use crate::config::{USUAL as USUAL_CONFIG, all};
use crate::signals::signals;
use crate::trace::USUAL;
use crate::verb::ended;
use plimsoll_attach::Sighting;
use plimsoll_host::config::Config;
use plimsoll_host::control::{Control, Happened, Pool, Wakers, host_pressure, run};
use plimsoll_host::roster::{Roster, Ruled, Rules};
use plimsoll_host::trace::Recorder;
use plimsoll_linux::explain;
use plimsoll_linux::prepare::{Place, Repacking};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use view::View;

#[derive(clap::Args)]
pub(crate) struct ManageArgs {
    /// The settings of the host and its machines.
    #[arg(long, value_name = "FILE", default_value = USUAL_CONFIG, env = "PLIMSOLL_CONFIG")]
    config: PathBuf,
    /// The machines: names, UUIDs or process ids. Without any: all that the settings name.
    machines: Vec<String>,
    /// Put every decision on record, in /var/lib/plimsoll/trace or in `=FILE`.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = USUAL)]
    record: Option<PathBuf>,
    /// Let the machines go after so long, instead of at a signal.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// One JSON object a line instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &ManageArgs) -> ExitCode {
    ended("manage", manage(args))
}

fn manage(args: &ManageArgs) -> Result<ExitCode, String> {
    let config = Config::read(&args.config).map_err(|mistakes| all(&mistakes))?;
    let named = &args.machines;
    let mut wanted =
        Roster::new(if named.is_empty() { config.machines.keys().cloned().collect() } else { named.clone() });
    let rules = |one: &Sighting| Ruled::of(&config, one.identity.process, one.vmm, &one.name);
    // Who names machines wants those.
    let has_rules = named.is_empty() && !config.rules.is_empty();
    let rules: Option<&Rules<'_>> = if has_rules { Some(&rules) } else { None };
    if wanted.waiting().next().is_none() && rules.is_none() {
        let file = args.config.display();
        return Err(format!("{file} names no machine and has no rule: add one, or name some machines here"));
    }
    let pool = match config.memory {
        Some(memory) => Pool::of(memory.saturating_sub(config.reserve)),
        None => Pool::host().map_err(|error| explain(&error))?,
    };
    // Where the size was said, what is reserved is no part of it any more.
    let own = if config.memory.is_some() { plimsoll_types::ByteCount(0) } else { config.reserve };
    let began = Instant::now();
    let mut control =
        Control::new(config.settings(pool.total()), pool, own, began).map_err(|error| explain(&error))?;
    let mut view = View::new(args.json);
    let said = |name: &str| config.machines.get(name).cloned();
    wanted.take_in(&mut control, began, &said, rules, &mut |text| view.note(text));
    // Who names a machine wants that one, now.
    let told: Vec<&str> = wanted.waiting().filter_map(|(_, why)| why).collect();
    if !named.is_empty() && !told.is_empty() {
        return Err(told.join("; "));
    }
    if let Some(path) = &args.record {
        control.record(recorder(path)?);
    }
    let (signals, over) = (signals()?, args.seconds.map(|seconds| began + Duration::from_secs(seconds)));
    let pressure = host_pressure();
    let repacking = Repacking::start(Place::default()).map_err(|error| explain(&error))?;
    let wakers = Wakers { end: Some(signals.as_fd()), pressure: pressure.as_ref(), ..Wakers::default() };
    run(&mut control, wakers, |control, happened| {
        if let Happened::Turn(turn) = happened {
            view.turn(turn, control);
            repacking.heard().iter().for_each(|why| view.note(why));
        }
        let now = Instant::now();
        wanted.take_in(control, now, &said, rules, &mut |text| view.note(text));
        let is_over = over.is_some_and(|over| now >= over) || view.is_broken();
        if is_over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .map_err(|error| explain(&error))?;
    control.finish().map_err(|error| explain(&error))?;
    view.end();
    Ok(ExitCode::SUCCESS)
}

fn recorder(path: &Path) -> Result<Recorder, String> {
    if let (Some(folder), true) = (path.parent(), path == Path::new(USUAL)) {
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    }
    Recorder::create(path).map_err(|error| explain(&error))
}
