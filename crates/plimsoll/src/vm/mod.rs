//! `plimsoll vm`: the machines of a running daemon, shown and changed.
//!
//! Enters: a name and what to do. Leaves: the machine as the daemon's next decision found it, or the daemon's own sentence about
//! why not. Nothing is decided here.
mod settings;
mod view;

use crate::live::{LiveArgs, escaped, machines};
use crate::verb::ended;
use plimsoll_host::api::{Attach, Budget, Host, Machine, MachineState, Reclaim};
use plimsoll_linux::explain;
use plimsoll_types::ByteCount;
use serde::Serialize;
use settings::SettingsArgs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use view::{All, Done, One};

#[derive(clap::Args)]
pub(crate) struct VmArgs {
    #[command(subcommand)]
    what: What,
}

/// Which machine.
#[derive(clap::Args)]
struct Which {
    /// Its name, or the process id of its VMM.
    name: String,
    #[command(flatten)]
    live: LiveArgs,
}

#[derive(clap::Subcommand)]
enum What {
    /// List the machines.
    List {
        /// Those of this group only.
        #[arg(long)]
        group: Option<String>,
        #[command(flatten)]
        live: LiveArgs,
    },
    /// Show a machine and its settings.
    Show(Which),
    /// Change a machine's settings. What is not named stays.
    Set {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Manage a running machine from outside, from now on.
    Attach {
        #[command(flatten)]
        which: Which,
        /// Its QMP monitor, if nobody else uses it: for its balloon.
        #[arg(long, value_name = "SOCKET")]
        qmp: Option<PathBuf>,
        /// The API socket of a Cloud Hypervisor or Firecracker, if its command line does not name it.
        #[arg(long, value_name = "SOCKET")]
        api: Option<PathBuf>,
        #[command(flatten)]
        settings: SettingsArgs,
    },
    /// Let a machine go. It goes on, and nothing of plimsoll stays with it.
    Release(Which),
    /// Take nothing from a machine until it is resumed.
    Pause(Which),
    /// Take from a machine again.
    Resume(Which),
    /// Have so much taken from a machine, once.
    Reclaim {
        #[command(flatten)]
        which: Which,
        /// How much.
        size: ByteCount,
    },
}

pub(crate) fn main(args: &VmArgs) -> ExitCode {
    ended("vm", run(&args.what).map(|()| ExitCode::SUCCESS))
}

impl Which {
    fn path(&self) -> String {
        format!("/v1/machines/{}", escaped(&self.name))
    }

    /// Shows the machine that an order gave back.
    fn order(&self, method: &str, what: &str, body: Option<&impl Serialize>) -> Result<(), String> {
        let machine: Machine = self.live.send(method, &(self.path() + what), body)?;
        self.live.show(&One(machine))
    }
}

/// How often is looked whether a machine is gone.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// No body.
const NOTHING: Option<&()> = None;

fn run(what: &What) -> Result<(), String> {
    match what {
        What::List { group, live } => live.show(&all(live, group.as_deref())?),
        What::Show(which) => which.live.show(&One(which.live.get(&which.path())?)),
        What::Set { which, settings } => {
            let settings = settings.said();
            if settings == plimsoll_host::api::Settings::default() {
                return Err(
                    "nothing to set: name a setting, such as --limit 2G; --help lists them".to_owned()
                );
            }
            which.order("PATCH", "", Some(&settings))
        }
        What::Attach { which, qmp, api, settings } => {
            let settings = settings.said();
            let path = |path| absolute(path, which.live.is_here());
            let attach = Attach { machine: which.name.clone(), qmp: path(qmp)?, api: path(api)?, settings };
            let machine: Machine = which.live.send("POST", "/v1/machines", Some(&attach))?;
            which.live.show(&One(machine))
        }
        What::Release(which) => {
            let manager = which.live.get::<Host>("/v1/host")?.pid;
            let leaving: Option<Machine> = which.live.send("DELETE", &which.path(), NOTHING)?;
            leaving.map_or(Ok(()), |machine| gone(&which.live, manager, &machine))?;
            which.live.show(&Done { released: which.name.clone() })
        }
        What::Pause(which) => which.order("POST", "/pause", NOTHING),
        What::Resume(which) => which.order("POST", "/resume", NOTHING),
        What::Reclaim { which, size } => which.order("POST", "/reclaim", Some(&Reclaim { bytes: size.0 })),
    }
}

/// Waits for a machine whose memory is brought back to be gone. The daemon gives up on it if it must, so this ends.
fn gone(live: &LiveArgs, manager: u32, leaving: &Machine) -> Result<(), String> {
    let name = &leaving.name;
    let client = live.client().map_err(|error| explain(&error))?;
    loop {
        let there = machines(&client, None).map_err(|error| explain(&error))?;
        let there = there.into_iter().find(|machine| machine.id == leaving.id);
        // Numbers are a manager's, and what one was doing ends with it.
        let host: Host = client.get("/v1/host").map_err(|error| explain(&error))?;
        if host.pid != manager {
            return Err(format!("the manager was replaced meanwhile: if it still has {name}, ask again"));
        }
        match there {
            None => return Ok(()),
            Some(machine) if machine.state != MachineState::Leaving => {
                return Err(format!("{name} is managed as before: {}", machine.trouble.unwrap_or_default()));
            }
            Some(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

/// A path as the daemon, which is elsewhere, finds it.
fn absolute(path: &Option<PathBuf>, is_here: bool) -> Result<Option<PathBuf>, String> {
    if let Some(path) = path.as_ref().filter(|path| !is_here && !path.is_absolute()) {
        return Err(format!("{path:?} is looked for on the daemon's host: use a path from /"));
    }
    let absolute = path.as_ref().map(std::path::absolute).transpose();
    absolute.map_err(|error| format!("where is that socket? {error}"))
}

/// All machines, page by page.
fn all(live: &LiveArgs, group: Option<&str>) -> Result<All, String> {
    let client = live.client().map_err(|error| explain(&error))?;
    let machines = machines(&client, group).map_err(|error| explain(&error))?;
    let host: Host = client.get("/v1/host").map_err(|error| explain(&error))?;
    Ok(All { machines, waiting: host.waiting })
}

/// `plimsoll budget`: what the machines of a running daemon, their VMMs and the daemon may use.
#[derive(clap::Args)]
pub(crate) struct BudgetArgs {
    /// Another one, from now on, also for the next manager.
    size: Option<ByteCount>,
    #[command(flatten)]
    live: LiveArgs,
}

pub(crate) fn budget(BudgetArgs { size, live }: &BudgetArgs) -> ExitCode {
    let host = match size {
        Some(size) => live.send("PUT", "/v1/host/budget", Some(&Budget { bytes: size.0 })),
        None => live.get("/v1/host"),
    };
    ended("budget", host.and_then(|host| live.show(&view::Shared(host))).map(|()| ExitCode::SUCCESS))
}
