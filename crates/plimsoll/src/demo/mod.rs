//! `plimsoll demo`: the main job, shown and checked.
//!
//! Real guests own more memory than the budget and verify every page they touch. First they run under plimsoll, then
//! the same guests run at the same budget under the kernel alone. Everything made for it (processes, control groups, a
//! swap device) is announced, and gone at the end, whichever way it ends.
mod compare;
pub(crate) mod fleet;
mod linux;
mod managed;
mod metal;
pub(crate) mod meter;
pub(crate) mod plan;
mod report;
mod sharing;
mod swap;
mod view;

use crate::verb::ended;
use plan::{HostLimits, Plan};
use plimsoll_linux::explain;
use plimsoll_sys::procfs::parse_meminfo;
use plimsoll_types::ByteCount;
use plimsoll_vmm::config::AccelChoice;
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit status when damage done on purpose went unnoticed.
const UNNOTICED: u8 = 3;

#[derive(clap::Args)]
pub(crate) struct DemoArgs {
    /// How many guests.
    #[arg(long, default_value_t = 8)]
    guests: u32,
    /// Memory of each guest, a multiple of 2M.
    #[arg(long, default_value = "256M")]
    size: ByteCount,
    /// What all of it together may use: guests, their VMMs and the manager. Default: the guests' memory / 2.5, or what they
    /// need at least; with --linux half of it, for the guests' RAM alone.
    #[arg(long)]
    budget: Option<ByteCount>,
    /// How long the guests work, each time.
    #[arg(long, default_value_t = 15)]
    seconds: u64,
    /// vCPUs of each guest.
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// What the guests' pages contain, in percent.
    #[arg(long, default_value = "zero=25,dup=20,text=45,random=10")]
    mix: String,
    /// Makes contents and work repeatable.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What the guests' memory is managed on.
    #[arg(long, value_enum, default_value_t = Host::Linux)]
    host: Host,
    /// What runs the guests.
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    accel: Accel,
    /// Stock Linux guests under QEMU (TCG), managed from outside, instead of programs without a kernel. Needs what
    /// `cargo xtask setup` brings.
    #[arg(long, conflicts_with_all = ["accel", "vcpus", "prefault", "sabotage", "share"])]
    linux: bool,
    /// Keep pages once that guests have in common while they stay in use: KSM, over the blocks that have twins and no others. The
    /// guests have no huge pages then.
    #[arg(long)]
    share: bool,
    /// Have all guest memory in place before the guests start.
    #[arg(long)]
    prefault: bool,
    /// With --host metal: count the guests' instructions, and how often guests leave for the hypervisor in a million of them; then also of
    /// one kernel with nested, shadow and direct paging. Time then passes as instructions do.
    #[arg(long)]
    exits: bool,
    /// Skip the same guests under the kernel alone.
    #[arg(long)]
    no_compare: bool,
    /// Flip one bit of one stored page. The damage must be reported: a guest then dies of it rather than read it.
    #[arg(long)]
    sabotage: bool,
    /// Write the report as JSON, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Host {
    /// This one: its kernel, and userfaultfd.
    Linux,
    /// The bare-metal hypervisor, in a machine that QEMU emulates. Needs qemu-system-x86_64, and no rights.
    Metal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Accel {
    /// KVM where it works, else in-process.
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Threads over the same managed memory, without KVM.
    InProcess,
}

pub(crate) fn main(args: &DemoArgs) -> ExitCode {
    ended(
        "demo",
        match args.host {
            Host::Metal => metal::run(args),
            Host::Linux if args.exits => Err("--exits is for --host metal; leave it out".to_owned()),
            Host::Linux if args.linux => linux::run(args),
            Host::Linux => run(args),
        },
    )
}

/// What interrupts a run: a signal, once.
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub(crate) fn install() -> Result<Self, String> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        let interrupt = Self(Arc::new(AtomicBool::new(false)));
        [SIGINT, SIGTERM, SIGHUP].into_iter().try_for_each(|signal| interrupt.add(signal))?;
        Ok(interrupt)
    }

    /// Another signal asks for the end, too.
    pub(crate) fn add(&self, signal: i32) -> Result<(), String> {
        signal_hook::flag::register(signal, Arc::clone(&self.0)).map(drop).map_err(|error| explain(&error))
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

fn run(args: &DemoArgs) -> Result<ExitCode, String> {
    let choice = match args.accel {
        Accel::Auto => AccelChoice::Auto,
        Accel::Kvm => AccelChoice::Kvm,
        Accel::InProcess => AccelChoice::InProcess,
    };
    let run_by = match choice {
        AccelChoice::InProcess => "in-process, because it was asked for".to_owned(),
        _ => plimsoll_vmm::probe().to_string(),
    };
    println!("guests: user-mode programs without a kernel of their own; run by {run_by}");
    let plan = plan::plan(args, choice, limits()?)?;
    announce(&plan);
    if let Some(file) = &args.json {
        // Found out before a minute has passed, not after it.
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(file)
            .map_err(|error| format!("--json {}: {error}", file.display()))?;
    }
    let interrupt = Interrupt::install()?;
    let mut report = managed::run(&plan, run_by, args.sabotage, &interrupt)?;
    if !interrupt.is_set() && !args.no_compare && !args.sabotage {
        match compare::run(&plan, &interrupt) {
            Ok(without) => report.without = Some(without),
            Err(why) => report.no_comparison = Some(why),
        }
    }
    finish(args, &plan, report, &interrupt)
}

/// Says what will be run.
fn announce(plan: &Plan) {
    plan.fitted.iter().for_each(|note| println!("{note}"));
    println!(
        "{} guests of {} own {}; budget {}; content {}; seed {}; {} s",
        plan.guests.len(),
        ByteCount(plan.guests[0].ram_bytes),
        plan.asked(),
        plan.budget,
        plan.mix,
        plan.seed,
        plan.seconds
    );
}

fn finish(
    args: &DemoArgs,
    plan: &Plan,
    mut report: Report,
    interrupt: &Interrupt,
) -> Result<ExitCode, String> {
    if interrupt.is_set() {
        report.failures.push("interrupted before the end".to_owned());
    }
    println!("\n{}", report.text());
    write_json(args, &report)?;
    if !report.failures.is_empty() {
        println!(
            "repeat with: plimsoll demo --seed {} --guests {} --size {} --budget {}",
            plan.seed,
            plan.guests.len(),
            ByteCount(plan.guests[0].ram_bytes),
            plan.budget.0
        );
    }
    let noticed = report.poisoned_pages > 0 || report.wrong_words > 0;
    Ok(match () {
        () if args.sabotage && !noticed => ExitCode::from(UNNOTICED),
        () if report.failures.is_empty() => ExitCode::SUCCESS,
        () => ExitCode::FAILURE,
    })
}

/// Writes the report where `--json` says.
fn write_json(args: &DemoArgs, report: &impl serde::Serialize) -> Result<(), String> {
    let Some(file) = &args.json else { return Ok(()) };
    let text = serde_json::to_string_pretty(report).map_err(|error| explain(&error))?;
    std::fs::write(file, text + "\n").map_err(|error| format!("--json {}: {error}", file.display()))
}

pub(crate) fn limits() -> Result<HostLimits, String> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| format!("/proc/meminfo: {error}"))?;
    let available = parse_meminfo(&text, "MemAvailable").ok_or("/proc/meminfo does not say MemAvailable")?;
    let descriptors =
        rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    Ok(HostLimits { available, descriptors })
}
