//! `plimsoll manage`: several running machines, managed from outside as one host.
//!
//! Enters: a settings file, and which machines. Leaves: decisions that are carried out while this runs, and what is shown and
//! recorded of them. Ending lets all machines go: nothing of ours stays in one of them. A machine that is to be managed and is
//! not there yet is taken in when it comes.
mod view;

use crate::signals::signals;
use crate::trace::USUAL;
use crate::verb::ended;
use plimsoll_attach::{AttachLock, Follower, Held, Identity, NoInterface, Request, discover, find, join};
use plimsoll_host::backend::balloon::{Balloon, of_interface};
use plimsoll_host::backend::{Attached, why_counted_only};
use plimsoll_host::config::Config;
use plimsoll_host::control::{Control, PERIOD, Pool, Wakers, run};
use plimsoll_host::trace::Recorder;
use plimsoll_linux::explain;
use plimsoll_sys::psi::{self, PressureTrigger};
use plimsoll_types::MachineId;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use view::View;

/// How often is looked for machines that are not there yet: finding one reads all of /proc.
const FIND_EVERY: Duration = Duration::from_secs(5);
/// Tasks that wait this long in a second are worth a decision of their own.
const PRESSURE: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub(crate) struct ManageArgs {
    /// The settings of the host and its machines.
    #[arg(long, value_name = "FILE")]
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
    let config = Config::read(&args.config).map_err(|error| explain(&error))?;
    let mut wanted = Wanted::new(&args.machines, &config);
    if wanted.waiting.is_empty() {
        return Err(format!("{} names no machine: add one, or name some here", args.config.display()));
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
    wanted.take_in(&mut control, &config, &mut view);
    if !args.machines.is_empty() && !wanted.waiting.is_empty() {
        // Who names a machine wants that one, now.
        let told: Vec<String> = wanted.waiting.values().flatten().cloned().collect();
        return Err(told.join("; "));
    }
    if let Some(path) = &args.record {
        control.record(recorder(path)?);
    }
    let (signals, over) = (signals()?, args.seconds.map(|seconds| began + Duration::from_secs(seconds)));
    // Without it, the loop looks ten times a second.
    let pressure = PressureTrigger::open(psi::HOST_MEMORY.as_ref(), PRESSURE, PERIOD).ok();
    let wakers = Wakers { end: Some(signals.as_fd()), pressure: pressure.as_ref() };
    let mut find_at = began + FIND_EVERY;
    run(&mut control, wakers, |control, turn| {
        view.turn(turn, control);
        let now = Instant::now();
        if now >= find_at {
            find_at = now + FIND_EVERY;
            wanted.take_in(control, &config, &mut view);
        }
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

/// Machines that are to be managed.
struct Wanted {
    /// Those that are not, with what was last said of them.
    waiting: BTreeMap<String, Option<String>>,
    /// Those that are.
    managed: BTreeMap<MachineId, String>,
}

impl Wanted {
    fn new(named: &[String], config: &Config) -> Self {
        let all: Vec<&String> =
            if named.is_empty() { config.machines.keys().collect() } else { named.iter().collect() };
        Self { waiting: all.into_iter().map(|name| (name.clone(), None)).collect(), managed: BTreeMap::new() }
    }

    /// Takes in whoever is there, and says of each other why not, once. One that went is waited for again.
    fn take_in(&mut self, control: &mut Control, config: &Config, view: &mut View) {
        let here: BTreeSet<MachineId> = control.names().map(|(id, _)| id).collect();
        let gone = self.managed.extract_if(.., |id, _| !here.contains(id)).map(|(_, name)| (name, None));
        self.waiting.extend(gone);
        if self.waiting.is_empty() {
            return;
        }
        // All of /proc is read once for all, not once for each, between two decisions.
        let seen = discover();
        self.waiting.retain(|wanted, told| {
            // Where that failed, it says so of each.
            let found = seen.as_ref().map_or_else(|_| find(wanted), |seen| seen.find(wanted));
            let opened = found.map_err(|refusal| explain(&refusal));
            match opened.and_then(|found| open(found.identity, wanted, control, config, view)) {
                Ok(id) => {
                    self.managed.insert(id, wanted.clone());
                    return false;
                }
                Err(why) if told.as_ref() == Some(&why) => {}
                Err(why) => {
                    view.note(&format!("{wanted} is not managed: {why}"));
                    *told = Some(why);
                }
            }
            true
        });
    }
}

/// Attaches to a machine and has it taken in.
fn open(
    identity: Identity,
    wanted: &str,
    control: &mut Control,
    config: &Config,
    view: &mut View,
) -> Result<MachineId, String> {
    let held = Held::reopen(identity.process, identity.start).map_err(|refusal| explain(&refusal))?;
    let lock = AttachLock::acquire(&held).map_err(|refusal| explain(&refusal))?;
    // The monitor serves one client, which is the balloon's thread: it also tells of migrations.
    let follower = Follower::new(held, Request::default()).map_err(|refusal| explain(&refusal))?;
    let dossier = follower.dossier();
    let (name, size) = (dossier.name.clone(), dossier.size());
    let said =
        if config.machines.contains_key(wanted) { config.machine(wanted) } else { config.machine(&name) };
    let request = Request { qmp: said.qmp.clone(), api: said.api.clone(), ..Request::default() };
    let balloon = balloon(&follower, &request).unwrap_or_else(|why| {
        view.note(&format!("{name} is managed without its balloon: {why}"));
        None
    });
    if let Some(why) = why_counted_only(dossier) {
        view.note(&format!("{name} is counted, and no page is taken from it: {why}"));
    }
    let now = Instant::now();
    let backend = Attached::new(follower, lock, balloon, now)?;
    let id = control
        .admit(&name, said.settings(MachineId(0), size), Box::new(backend))
        .map_err(|error| explain(&error))?;
    view.note(&format!("{name} is managed: {size}, process {}", identity.process.get()));
    Ok(id)
}

/// The machine's balloon, where somebody may be asked about it. That nobody may is no news.
fn balloon(follower: &Follower, request: &Request) -> Result<Option<Balloon>, String> {
    let control = match join(follower.held(), follower.dossier(), request) {
        Ok(control) => control,
        Err(
            NoInterface::MonitorNotOffered(_)
            | NoInterface::NoMonitor
            | NoInterface::NoApi(_)
            | NoInterface::NotSpoken(_),
        ) => return Ok(None),
        Err(error) => return Err(explain(&error)),
    };
    let Some(interface) = of_interface(control).map_err(|error| explain(&error))? else { return Ok(None) };
    Balloon::start(interface, follower.held().process()).map(Some).map_err(|error| explain(&error))
}
