//! `plimsoll share`: equal pages of machines of one sharing domain, kept once while they stay in use.
//!
//! Enters: the machines of one domain. Leaves: KSM run over what their VMMs have offered to it (QEMU does so by default,
//! Cloud Hypervisor with `mergeable=on`), as long as that pays, and lines that say what it saves and costs. At the end KSM is
//! as it was found. What must never happen: pages merged with those of anybody who was not named.
use crate::demo::Interrupt;
use crate::verb::ended;
use plimsoll_attach::{Discovery, Dossier, Held, Refusal, Request, Rung, discover, find, inspect};
use plimsoll_linux::explain;
use plimsoll_linux::ksm::pace::Order;
use plimsoll_linux::ksm::{Guide, KsmError, Member, Merged, Options, Report};
use plimsoll_types::{DomainId, MachineId};
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Between two looks at what is worth merging, and between two at what KSM does while it runs.
const ROUND: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(250);
/// All machines named are of one domain, and nobody else is.
const DOMAIN: DomainId = DomainId(1);

#[derive(clap::Args)]
pub(crate) struct ShareArgs {
    /// The machines that may share with each other: process ids, names or UUIDs.
    #[arg(required = true)]
    machines: Vec<String>,
    /// Stop after so long, instead of at a signal.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// At the end give every machine pages of its own again, instead of leaving what is merged until it is written.
    #[arg(long)]
    undo: bool,
    /// One JSON object a line instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &ShareArgs) -> ExitCode {
    ended("share", run(args).map(|()| ExitCode::SUCCESS))
}

fn run(args: &ShareArgs) -> Result<(), String> {
    let found = discover().map_err(refused)?;
    let members = members(&args.machines, &found)?;
    let interrupt = Interrupt::install()?;
    let mut guide = Guide::start(members, Options::default()).map_err(|error| explain(&error))?;
    let over = args.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let outcome = drive(&mut guide, args, over, &interrupt);
    let last =
        guide.end(if args.undo { Merged::Undo } else { Merged::Keep }).map_err(|error| explain(&error))?;
    outcome?;
    say(args, &last, if args.undo { "ended, pages are unshared" } else { "ended, what is merged stays" });
    Ok(())
}

fn drive(
    guide: &mut Guide,
    args: &ShareArgs,
    over: Option<Instant>,
    interrupt: &Interrupt,
) -> Result<(), String> {
    let (mut next_round, mut said) = (Instant::now(), String::new());
    while !interrupt.is_set() && over.is_none_or(|over| Instant::now() < over) {
        if Instant::now() >= next_round {
            next_round = Instant::now() + ROUND;
            let (why, has_left) = match guide.round() {
                Ok(round) => (guide.reason().to_string(), !round.left.is_empty()),
                // Everything is unmerged, and merged again once nobody is in the way any more.
                Err(error @ KsmError::Domains(_)) => (explain(&error), false),
                Err(error) => return Err(explain(&error)),
            };
            let report = guide.report().map_err(|error| explain(&error))?;
            if args.json || why != said {
                say(args, &report, &why);
                said = why;
            }
            if has_left && report.machines.is_empty() {
                println!("all machines have ended");
                return Ok(());
            }
        }
        let order = guide.tick().map_err(|error| explain(&error))?;
        // Signals are looked for this often; KSM at rest asks for nothing in between.
        std::thread::sleep(if matches!(order, Order::Run(_)) { TICK } else { TICK * 2 });
    }
    Ok(())
}

/// The machines by their names, as members of one domain.
fn members(wanted: &[String], found: &Discovery) -> Result<Vec<Member>, String> {
    let mut members: Vec<Member> = Vec::new();
    for (number, wanted) in (1..).zip(wanted) {
        let machine = found.machines.iter().find(|machine| machine.name == *wanted).cloned();
        let machine = machine.map_or_else(|| find(wanted), Ok).map_err(refused)?;
        if members.iter().any(|member| member.process == machine.identity.process) {
            return Err(format!("{wanted} is named twice"));
        }
        let held = Held::reopen(machine.identity.process, machine.identity.start).map_err(refused)?;
        let dossier = inspect(&held, &Request::default()).map_err(refused)?;
        members.push(member(MachineId(number), &dossier)?);
    }
    Ok(members)
}

fn member(id: MachineId, dossier: &Dossier) -> Result<Member, String> {
    let process = dossier.identity.process;
    if let Some(hazard) = dossier.rungs().off(Rung::ResidentSharing) {
        return Err(format!("pages of {} cannot be shared: {hazard}", dossier.name));
    }
    if !plimsoll_sys::procfs::is_mergeable(process).map_err(|error| explain(&error))? {
        return Err(format!(
            "{} has offered no memory to KSM, and nobody can do that from outside: start it with memory merging on (QEMU: \
             -machine mem-merge=on, its default; Cloud Hypervisor: --memory mergeable=on)",
            dossier.name
        ));
    }
    let allowed = dossier.ram.iter().filter(|range| dossier.rungs_of(range).allows(Rung::ResidentSharing));
    let ranges = allowed.map(|range| range.hva).collect();
    Ok(Member { id, name: dossier.name.clone(), process, domain: Some(DOMAIN), ranges, marker: None })
}

fn say(args: &ShareArgs, report: &Report, why: &str) {
    if args.json {
        println!("{}", values(report, why));
        return;
    }
    let cost =
        report.cost().map_or_else(String::new, |cost| format!(", {:.1} us a page", cost.as_secs_f64() * 1e6));
    println!(
        "{} saved on this host, {} merged since; {:.2} s of CPU{cost}; {why}",
        report.saved.bytes(),
        report.merged.bytes(),
        (report.ksmd + report.scout).as_secs_f64(),
    );
}

fn values(report: &Report, why: &str) -> Value {
    json!({
        "saved_bytes": report.saved.bytes().0,
        "merged_bytes": report.merged.bytes().0,
        "profit_bytes": report.profit_bytes,
        "ksmd_seconds": report.ksmd.as_secs_f64(),
        "scout_seconds": report.scout.as_secs_f64(),
        "machines": report.machines.iter().map(|(_, pages)| pages.bytes().0).collect::<Vec<_>>(),
        "why": why,
    })
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn refused(refusal: Refusal) -> String {
    explain(&refusal)
}
