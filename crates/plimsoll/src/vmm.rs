//! The hidden verb that runs one machine in this process.
//!
//! Enters: the numbers of two inherited sockets and a configuration (JSON) on standard input. Leaves: the machine's
//! end as exit status; everything else goes over the control socket. The process has one thread when the machine
//! starts, as its sandbox needs.
use plimsoll_linux::explain;
use plimsoll_sys::process::adopt_inherited;
use plimsoll_vmm::{Manager, VmmConfig};
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

/// How it is called.
pub(crate) const VERB: &str = "vmm";

/// Run one machine: started by the other verbs, with its configuration on standard input.
#[derive(clap::Parser)]
#[command(bin_name = "plimsoll vmm")]
pub(crate) struct VmmArgs {
    /// Descriptor of a connected SOCK_SEQPACKET socket to a manager.
    #[arg(long)]
    handover_fd: Option<i32>,
    /// The socket of a daemon that is to manage the machine.
    #[arg(long, conflicts_with = "handover_fd")]
    daemon: Option<PathBuf>,
    /// Descriptor of a connected SOCK_STREAM socket to the starter.
    #[arg(long)]
    control_fd: i32,
}

pub(crate) fn main(args: &VmmArgs) -> ExitCode {
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &VmmArgs) -> Result<ExitCode, String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|error| format!("no configuration: {error}"))?;
    let config: VmmConfig =
        serde_json::from_str(&text).map_err(|error| format!("the configuration makes no sense: {error}"))?;
    let adopt = |number| adopt_inherited(number).map_err(|error| explain(&error));
    let inherited = args.handover_fd.map(adopt).transpose()?;
    let handover = inherited.map(Manager::Socket).or_else(|| args.daemon.clone().map(Manager::Daemon));
    let control = adopt(args.control_fd)?;
    let report = plimsoll_vmm::run(&config, handover, control).map_err(|error| explain(&error))?;
    if report.abandoned > 0 {
        // Threads still wait in the kernel for pages; only the end of the process frees them.
        std::process::exit(1);
    }
    Ok(if report.died.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
