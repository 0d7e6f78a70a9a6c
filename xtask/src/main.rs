//! The workspace's own commands, started as `cargo xtask COMMAND`.
//!
//! Enters: a command line. Leaves: progress on standard output, one line a step, and an exit status that scripts can
//! rely on. What must never happen: a step that could not run counting as one that passed.
//!
//! * [`setup`]: what a fresh machine lacks. [`machine`]: what this machine can run.
//! * [`suites`]: which tests there are and at which level; [`tally`]: what they said. [`no_std`]: the rooms below the
//!   line, linked without an operating system.
//! * [`ci`]: format, lints, documentation. [`lints`]: the house rules that no other tool knows.
//! * [`mod@bench`]: comparisons with the kernel's own mechanisms. [`chaos`]: a daemon whose manager is killed again and again.
//!   [`mod@metal`]: the bare-metal host, booted.
//! * [`fuzz`]: parsers against what was never meant for them, for as long as is asked for.
//! * [`emulated`]: what this machine cannot show, on a kernel built for it.
//! * [`dist`]: what is shipped, and a package's life on a machine.
//! * [`cargo`]: starting cargo, and what it says about the workspace.
mod bench;
mod cargo;
mod chaos;
mod ci;
mod dist;
mod emulated;
mod fuzz;
mod lints;
mod machine;
mod metal;
mod no_std;
mod setup;
mod suites;
mod tally;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use std::time::Duration;

/// The commands of the plimsoll workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what the tests need and this machine lacks (Debian, as root). Quick when nothing is missing.
    Setup,
    /// Set up, then run the tests; fails when a test fails, or is skipped where it could run.
    Test(TestArguments),
    /// Check format, lints, documentation, licences and the house rules. Runs no tests.
    Ci,
    /// Compare plimsoll with the kernel's own mechanisms; writes NAME.json below target/bench. See docs/bench.md.
    Bench(bench::Choice),
    /// Kill a daemon's manager at random instants while guests verify every page; see docs/daemon.md.
    Chaos(chaos::Choice),
    /// Boot the bare-metal host under QEMU with two guests, or stop it for a debugger; see docs/metal.md.
    Metal(metal::Choice),
    /// Give parsers what was never meant for them, for a while; see docs/fuzzing.md.
    Fuzz(fuzz::Choice),
    /// Compare every way to see which pages are used on a kernel that has them all, built for it and emulated; see
    /// docs/attach.md.
    Idle,
    /// Run machines whose memory is of two NUMA nodes, on that kernel and emulated; see docs/daemon.md.
    Nodes,
    /// Make the Debian package and the archive below target/dist; see docs/packages.md.
    Dist(dist::Choice),
}

#[derive(clap::Args)]
struct TestArguments {
    /// Run one level only. 0: pure crates, no rights needed. 1: real userfaultfd and real KVM guests. 2: stock Linux guests
    /// under QEMU and libvirt. 3: page tables in QEMU's models of processors, and the bare-metal host there.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=3))]
    level: Option<u8>,
    /// How long the randomized soak of level 1 lasts.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    soak: u64,
    /// How many machines come and go under one daemon, with which they must leave nothing.
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(4..))]
    cycles: u32,
    /// Run only tests whose names contain one of these.
    filters: Vec<String>,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Setup => setup::run(None),
        Command::Test(arguments) => setup::run(arguments.level).and_then(|()| {
            suites::run(&suites::Choice {
                level: arguments.level,
                soak: Duration::from_secs(arguments.soak),
                cycles: arguments.cycles,
                filters: arguments.filters,
            })
        }),
        Command::Ci => ci::run(),
        Command::Bench(choice) => bench::run(&choice).map(|never| match never {}),
        Command::Chaos(choice) => chaos::run(&choice).map(|never| match never {}),
        Command::Metal(choice) => metal::run(&choice).map(|never| match never {}),
        Command::Fuzz(choice) => fuzz::run(&choice),
        Command::Idle => emulated::idle(),
        Command::Nodes => emulated::nodes(),
        Command::Dist(choice) => dist::run(&choice),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
