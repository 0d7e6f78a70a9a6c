//! `plimsoll attach`: the memory of a running machine, managed from outside.
//!
//! Enters: which machine, and how much it may take. Leaves: a machine that takes no more, as long as this runs, and lines
//! that say how. The machine is neither stopped nor entered, so detaching is ending: nothing of ours remains in it or
//! beside it. What must never happen: a page asked for where the dossier says the rung is off.
//!
//! [`budget`]: what "no more" means. [`session`]: one machine over time. [`view`]: what is shown. What of a machine may be taken,
//! and when not, is told by [`plimsoll_host::backend`].
mod budget;
mod session;
mod view;

use crate::verb::ended;
use budget::Budget;
use plimsoll_attach::{
    AttachLock, Discovery, Follower, Hazard, Held, Refusal, Request, discover, find, parse_range,
};
use plimsoll_linux::explain;
use plimsoll_sys::HvaRange;
use plimsoll_types::ByteCount;
use session::{Session, Settings};
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use view::View;

#[derive(clap::Args)]
pub(crate) struct AttachArgs {
    /// The machine: its process id, its name or its UUID. Without one: list the machines of this host.
    machine: Option<String>,
    /// What it may take in RAM, compressed pages included: a size, or `auto` for what it uses and a fifth more. Without:
    /// it is watched, and nothing is taken but samples.
    #[arg(long, value_name = "SIZE|auto")]
    budget: Option<Budget>,
    /// Take that much once, say what came of it, and end: with status 1 if it was less. Gives up after a minute, or after
    /// --seconds.
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["budget", "dry_run"])]
    reclaim: Option<ByteCount>,
    /// Say what would be managed and why, which rungs are off, and end.
    #[arg(long)]
    dry_run: bool,
    /// A QMP socket of the machine's that nobody else uses: tells of migrations, of plugged memory, and of names.
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// The API socket of Cloud Hypervisor or Firecracker, instead of the one its command line names.
    #[arg(long, value_name = "SOCKET")]
    api: Option<PathBuf>,
    /// Where guest RAM lies, as START-END in hexadecimal, when it cannot be told from outside. May be repeated.
    #[arg(long = "range", value_name = "START-END", value_parser = parse_range)]
    ranges: Vec<HvaRange>,
    /// Have the kernel's DAMON watch the machine, and take first what it sees no use of. A kernel has one DAMON for all its users:
    /// it is refused while somebody else has it, and given back at the end. Needs CONFIG_DAMON_VADDR and CONFIG_DAMON_SYSFS.
    #[arg(long, conflicts_with = "dry_run")]
    damon: bool,
    /// Detach after so long, instead of at a signal.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// One JSON object a line instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &AttachArgs) -> ExitCode {
    ended("attach", run(args))
}

fn run(args: &AttachArgs) -> Result<ExitCode, String> {
    let Some(wanted) = &args.machine else { return list(args) };
    let machine = find(wanted).map_err(refused)?.identity;
    let held = Held::reopen(machine.process, machine.start).map_err(refused)?;
    let request = Request { ranges: args.ranges.clone(), qmp: args.qmp.clone(), api: args.api.clone() };
    if args.dry_run {
        let mut dossier = plimsoll_attach::inspect(&held, &request).map_err(refused)?;
        if plimsoll_linux::zram::host_swap().is_ok_and(|areas| areas.is_empty()) {
            // A manager would ask again each time it takes something: swap may be added meanwhile.
            dossier.hazards.push(Hazard::NoSwap);
        }
        return shown(args, &dossier.to_string(), &dossier);
    }
    // The lock comes first: a second manager is refused before it asks the machine anything.
    let lock = AttachLock::acquire(&held).map_err(refused)?;
    let follower = Follower::new(held, request).map_err(refused)?;
    let settings = Settings {
        budget: args.budget,
        once: args.reclaim,
        lasting: args.seconds.map(Duration::from_secs),
        qmp: args.qmp.clone(),
        has_damon: args.damon,
    };
    let mut view = View::new(args.json);
    let end = Session::begin(follower, lock, &settings, &mut view)?.run(&settings, &mut view);
    view.end(&end);
    Ok(end.status())
}

/// Lists the machines of this host.
fn list(args: &AttachArgs) -> Result<ExitCode, String> {
    let AttachArgs { machine: _, budget, reclaim, dry_run, qmp, api, ranges, damon, seconds, json: _ } = args;
    let asks_more = budget.is_some() || reclaim.is_some() || seconds.is_some() || *dry_run || *damon;
    let found = discover().map_err(refused)?;
    if asks_more || qmp.is_some() || api.is_some() || !ranges.is_empty() {
        return Err(format!("name the machine: {}", view::names(&found)));
    }
    shown(args, &table(&found), &found)
}

fn table(found: &Discovery) -> String {
    let mut text = String::new();
    if found.machines.is_empty() {
        text.push_str("no virtual machine runs on this host that this user may see\n");
    } else {
        text.push_str(&format!("{:>8}  {:<18} {:<24} uuid\n", "process", "vmm", "name"));
    }
    for machine in &found.machines {
        let uuid = machine.uuid.as_deref().unwrap_or("");
        let (process, vmm) = (machine.identity.process.get(), machine.vmm.to_string());
        text.push_str(&format!("{process:>8}  {vmm:<18} {:<24} {uuid}\n", machine.name));
    }
    if found.unreadable > 0 {
        text.push_str(&format!(
            "{} more belong to other users: it takes CAP_SYS_PTRACE, or root, to look at them\n",
            found.unreadable
        ));
    }
    text
}

fn shown(args: &AttachArgs, text: &str, value: &impl serde::Serialize) -> Result<ExitCode, String> {
    let said = match args.json {
        true => serde_json::to_string(value).map_err(|error| explain(&error))? + "\n",
        false => text.to_owned(),
    };
    // A reader that wants no more is not in the wrong.
    let _ = stdout().write_all(said.as_bytes());
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn refused(refusal: Refusal) -> String {
    explain(&refusal)
}
