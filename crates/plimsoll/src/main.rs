//! plimsoll: a memory manager for Linux/KVM hosts.
//!
//! Enters: a command line. Leaves: exit status 0 when all went well, 1 when something went wrong that the output
//! explains, 2 when what was asked cannot be done (nothing was started, nothing is left behind).
mod advise;
mod attach;
mod config;
mod daemon;
mod dashboard;
mod demo;
mod guest;
mod host;
mod line;
mod live;
mod manage;
mod manual;
mod park;
mod plan;
mod replay;
mod share;
mod signals;
mod soak;
mod surface;
mod tools;
mod top;
mod trace;
mod verb;
mod vm;
mod vmm;
mod why;

use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "plimsoll", version, about = "More virtual machines than RAM, every guarantee kept")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run real guests that own more memory than the budget, and check every byte.
    Demo(demo::DemoArgs),
    /// Manage the memory of a running machine from outside: QEMU, Cloud Hypervisor, Firecracker, crosvm.
    Attach(attach::AttachArgs),
    /// Manage the memory of several running machines by their settings, as one host.
    Manage(manage::ManageArgs),
    /// Say why the last decisions about a machine were made, with the numbers behind them.
    Why(why::WhyArgs),
    /// Say how deep the host is loaded, how much more it may safely take, and what would break first.
    Line(line::LineArgs),
    /// Say what size each machine should have been, checked against what was recorded.
    Advise(advise::AdviseArgs),
    /// Make the decisions of a record again, and compare.
    Replay(replay::ReplayArgs),
    /// Keep equal pages of machines of one sharing domain once, while that pays (KSM).
    Share(share::ShareArgs),
    /// Follow guest virtual addresses of a running machine through both stages to the host's frames.
    Translate(tools::translate::TranslateArgs),
    /// Show a running machine's physical address space, and what the host has under each piece of it.
    Maps(tools::maps::MapsArgs),
    /// Say how many large pages of a running guest are large in the host too, and what the rest costs in TLB reach.
    Splinter(tools::splinter::SplinterArgs),
    /// Check that machines' frames are disjoint, but for what a sharing domain shares.
    Audit(tools::audit::AuditArgs),
    /// Write a running machine's memory and registers as an ELF core file.
    Dump(tools::dump::DumpArgs),
    /// See what a machine's balloon and hot memory offer, and bring them to where they are wanted.
    Guest(guest::GuestArgs),
    /// Qualify a host: crash, squeeze, delay and refuse at random while guests check every byte.
    Soak(soak::SoakArgs),
    /// See what this host offers for taking guests' memory, and set up swap for it.
    Host(host::HostArgs),
    /// Simulate hosts and machines with the policy of this program: what fits, who waits, what breaks first.
    Plan(plan::PlanArgs),
    /// Manage the machines of VMMs that hand their memory over, and outlive a crash of the manager.
    Daemon(daemon::DaemonArgs),
    /// Have a daemon's machine that is going to sleep leave memory, for the disk where the daemon has one.
    Park(park::ParkArgs),
    /// Have a daemon's parked machine come back: what it used last, at once.
    Wake(park::ParkArgs),
    /// The machines of a running daemon: list, show, set, attach, release, pause, resume, reclaim.
    Vm(vm::VmArgs),
    /// Watch a running daemon: the host, its machines, where their memory is, and why.
    Top(top::TopArgs),
    /// Serve a page about a running daemon to browsers on this host.
    Dashboard(dashboard::DashboardArgs),
    /// Say what the machines of a running daemon may use, or change it.
    Budget(vm::BudgetArgs),
    /// Check settings before a daemon sees them, or say what may be said in them.
    Config(config::ConfigArgs),
    /// Completions for a shell, on standard output.
    #[command(hide = true)]
    Completions(manual::CompletionsArgs),
    /// Man pages, one a verb.
    #[command(hide = true)]
    Man(manual::ManArgs),
    /// The daemon's manager: started by its keeper.
    #[command(hide = true)]
    Manager(daemon::ManagerArgs),
}

fn main() -> ExitCode {
    // A command line of its own: what all the verbs take to be parsed would stay in the memory of every machine.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == vmm::VERB) {
        return vmm::main(&vmm::VmmArgs::parse_from(std::env::args_os().skip(1)));
    }
    match Cli::parse().verb {
        Verb::Demo(args) => demo::main(&args),
        Verb::Attach(args) => attach::main(&args),
        Verb::Manage(args) => manage::main(&args),
        Verb::Why(args) => why::main(&args),
        Verb::Line(args) => line::main(&args),
        Verb::Advise(args) => advise::main(&args),
        Verb::Replay(args) => replay::main(&args),
        Verb::Share(args) => share::main(&args),
        Verb::Translate(args) => tools::translate::main(&args),
        Verb::Maps(args) => tools::maps::main(&args),
        Verb::Splinter(args) => tools::splinter::main(&args),
        Verb::Audit(args) => tools::audit::main(&args),
        Verb::Dump(args) => tools::dump::main(&args),
        Verb::Guest(args) => guest::main(&args),
        Verb::Soak(args) => soak::main(&args),
        Verb::Host(args) => host::main(&args),
        Verb::Plan(args) => plan::main(&args),
        Verb::Daemon(args) => daemon::main(&args),
        Verb::Park(args) => park::park(&args),
        Verb::Wake(args) => park::wake(&args),
        Verb::Vm(args) => vm::main(&args),
        Verb::Top(args) => top::main(&args),
        Verb::Dashboard(args) => dashboard::main(&args),
        Verb::Budget(args) => vm::budget(&args),
        Verb::Config(args) => config::main(&args),
        Verb::Completions(args) => manual::completions(&args, Cli::command()),
        Verb::Man(args) => manual::man(&args, Cli::command()),
        Verb::Manager(args) => daemon::manager(&args),
    }
}
