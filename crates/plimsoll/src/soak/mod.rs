//! `plimsoll soak`: guests that check every byte, while everything that can go wrong with their memory is made to.
//!
//! Enters: a seed. Leaves: a tally, and exit status 0 only if no word was wrong, nothing died that was not killed, the
//! budget was kept and at the end nothing was left: no object in the store, no charge in the ledger, no process, no
//! control group.
//!
//! The seed decides what is done and in which order ([`schedule`]), and is printed first. When it is done in a guest's
//! life is up to the machine: a replay does the same again, but threads meet as they meet.
mod bad_disk;
mod chaos;
mod report;
mod saboteur;
mod schedule;
mod session;

use crate::demo::{Accel, Interrupt, limits, plan};
use crate::verb::ended;
use plimsoll_guest::abi;
use plimsoll_guest::random::hash3;
use plimsoll_linux::explain;
use plimsoll_types::{BLOCK_SIZE, ByteCount};
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::config::AccelChoice;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(clap::Args)]
pub(crate) struct SoakArgs {
    /// How long things go wrong; then every guest reads every page once more.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Repeats the schedule of an earlier run. Default: another one each time; it is printed.
    #[arg(long)]
    seed: Option<u64>,
    /// How many guests run at any time.
    #[arg(long, default_value_t = 4)]
    guests: u32,
    /// Memory of each guest, a multiple of 2M.
    #[arg(long, default_value = "96M")]
    size: ByteCount,
    /// What all of it together may use. Default: the least in which such guests can run.
    #[arg(long)]
    budget: Option<ByteCount>,
    /// Run the guests under a daemon, and kill its manager's process that often, at random instants, for as long as that takes.
    #[arg(long, value_name = "TIMES", conflicts_with = "seconds")]
    kill_daemon: Option<u64>,
    /// Have the daemon's disk tier on a disk that has no room or refuses writes at random instants. Needs root, loop devices and
    /// mkfs.ext4.
    #[arg(long, requires = "kill_daemon")]
    bad_disk: bool,
    /// What runs the guests.
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    accel: Accel,
    /// Write the tally as JSON, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is soaked.
pub(crate) struct Plan {
    seed: u64,
    seconds: u64,
    guests: usize,
    size: ByteCount,
    budget: ByteCount,
    accel: AccelChoice,
}

pub(crate) fn main(args: &SoakArgs) -> ExitCode {
    ended("soak", run(args))
}

fn run(args: &SoakArgs) -> Result<ExitCode, String> {
    let seed = args.seed.unwrap_or_else(fresh_seed);
    println!("seed {seed}");
    let (accel, run_by) = match args.accel {
        Accel::Auto => (AccelChoice::Auto, plimsoll_vmm::probe().to_string()),
        Accel::Kvm => (AccelChoice::Kvm, plimsoll_vmm::probe().to_string()),
        Accel::InProcess => (AccelChoice::InProcess, "in-process, because it was asked for".to_owned()),
    };
    println!("guests: user-mode programs without a kernel of their own; run by {run_by}");
    let plan = plan(args, seed, accel)?;
    if let Some(kills) = args.kill_daemon {
        println!("{} guests of {} at a time; budget {}; {kills} kills", plan.guests, plan.size, plan.budget);
        return chaos::run(&plan, kills, args.bad_disk, args.json.as_deref());
    }
    println!("{} guests of {} at a time; budget {}; {} s", plan.guests, plan.size, plan.budget, plan.seconds);
    if let Some(file) = &args.json {
        // Found out before minutes have passed, not after them.
        let opened = std::fs::OpenOptions::new().create(true).append(true).open(file);
        opened.map_err(|error| format!("--json {}: {error}", file.display()))?;
    }
    let interrupt = Interrupt::install()?;
    let mut report = session::run(&plan, run_by, &interrupt)?;
    if interrupt.is_set() {
        report.failures.push("interrupted before the end".to_owned());
    }
    println!("\n{}", report.text());
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report).map_err(|error| explain(&error))?;
        std::fs::write(file, text + "\n").map_err(|error| format!("--json {}: {error}", file.display()))?;
    }
    if report.failures.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "the same schedule again: plimsoll soak --seed {seed} --seconds {} --guests {} --size {} --budget {}{}",
        plan.seconds,
        plan.guests,
        plan.size,
        plan.budget.0,
        if args.accel == Accel::InProcess { " --accel in-process" } else { "" }
    );
    Ok(ExitCode::FAILURE)
}

/// A seed that another run will not have.
fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Short enough to be read out.
    hash3(now.as_secs(), u64::from(now.subsec_nanos()), u64::from(std::process::id())) >> 32
}

fn plan(args: &SoakArgs, seed: u64, accel: AccelChoice) -> Result<Plan, String> {
    let guests = usize::try_from(args.guests).unwrap_or(usize::MAX);
    if guests == 0 || args.seconds == 0 {
        return Err("--guests 0 or --seconds 0: there is nothing to run; use at least 1".to_owned());
    }
    let least = ByteCount(abi::WORKLOAD_GPA + 16 * BLOCK_SIZE as u64);
    if args.size < least || !args.size.is_multiple_of(BLOCK_SIZE) {
        return Err(format!(
            "--size {}: a guest of the soak needs a multiple of 2M and at least {least}",
            args.size
        ));
    }
    let limits = limits()?;
    plan::descriptors(args.guests, limits)?;
    // Any guest may be replaced by any other, so all count as the least compressible.
    let machine = schedule::machine(seed, 0, args.size, accel);
    let machines: Vec<VmmConfig> = vec![machine; guests];
    let need = plan::need(&machines, schedule::WORST_MIX);
    let budget = args.budget.unwrap_or_else(|| need.total());
    if budget < need.total() {
        return Err(format!(
            "--budget {budget} is below what such guests need at least: {need}; raise --budget, or use fewer or smaller guests"
        ));
    }
    if budget.0 > limits.available.0 / 4 * 3 {
        return Err(format!(
            "a budget of {budget} does not fit this host, which has {} available; use a smaller --budget, --size or --guests",
            limits.available
        ));
    }
    Ok(Plan { seed, seconds: args.seconds, guests, size: args.size, budget, accel })
}
