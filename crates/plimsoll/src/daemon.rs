//! `plimsoll daemon`, and the hidden verb of its manager.
//!
//! Enters: what the daemon is to do. Leaves: exit status 0 when it was told to stop and had no machine left, 1 when no manager
//! could be had, 2 when it could not be started. Keeper and manager are told the same: the manager's command line is the
//! keeper's.
use crate::config::all;
use crate::demo::limits;
use crate::live::DIRECTORY;
use crate::verb::ended;
use clap::Args;
use plimsoll_host::api::Access;
use plimsoll_host::config::Config;
use plimsoll_host::daemon::lead::Lead;
use plimsoll_host::daemon::rights::Filter;
use plimsoll_host::daemon::{self, Beginning, BudgetBy, Counted, DiskSettings, Settings, Sharing};
use plimsoll_host::helm::BUDGET_MIN;
use plimsoll_host::keeper::protocol::VERSION;
use plimsoll_host::keeper::serve::End;
use plimsoll_host::keeper::store::{HANDED_ON, is_handed_on};
use plimsoll_linux::disk::device::FileDisk;
use plimsoll_linux::disk::tier::{Limits, SEGMENTS_MIN};
use plimsoll_linux::disk::{SEGMENT_SIZE, SEGMENTS_MAX};
use plimsoll_linux::explain;
use plimsoll_sys::launch::{HANDED, Program};
use plimsoll_types::ByteCount;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What a disk tier has at least and at most.
const DISK_SIZES: [ByteCount; 2] = [
    ByteCount(SEGMENTS_MIN as u64 * SEGMENT_SIZE as u64),
    ByteCount(SEGMENTS_MAX as u64 * SEGMENT_SIZE as u64),
];

/// How memory is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Count {
    /// The sum over the daemon and its machines' processes, from /proc.
    Processes,
    /// The memory control group in which the daemon and its machines' processes are.
    Group,
}

/// What becomes of system calls that the daemon is not known to need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Seccomp {
    /// They fail, and the kernel's log says which they were.
    Refuse,
    /// They are made, and the kernel's log says which they were.
    Log,
    /// They are made.
    Off,
}

#[derive(Args)]
pub(crate) struct DaemonArgs {
    /// Where its sockets are; made if there is none.
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, env = "PLIMSOLL_DIRECTORY")]
    directory: PathBuf,
    /// What the machines, their processes and the daemon may use.
    /// Default: what the settings say.
    #[arg(long, value_name = "SIZE", env = "PLIMSOLL_BUDGET")]
    budget: Option<ByteCount>,
    /// What the store of one sharing domain may hold. Default: the budget.
    #[arg(long, value_name = "SIZE", env = "PLIMSOLL_STORE")]
    store: Option<ByteCount>,
    /// Where parked machines go: a file that may be made, or a block device, of the daemon's own. What is there is encrypted, and
    /// lost with the daemon.
    #[arg(long, value_name = "FILE", requires = "disk_limit", env = "PLIMSOLL_DISK")]
    disk: Option<PathBuf>,
    /// What of it may be used.
    #[arg(long, value_name = "SIZE", requires = "disk", env = "PLIMSOLL_DISK_LIMIT")]
    disk_limit: Option<ByteCount>,
    /// What of it one sharing domain may use. Default: all.
    #[arg(long, value_name = "SIZE", requires = "disk", env = "PLIMSOLL_DISK_SHARE")]
    disk_share: Option<ByteCount>,
    /// Equal pages of all machines are kept once: they are one tenant's.
    #[arg(long)]
    share: bool,
    /// How memory is counted.
    #[arg(long, value_enum, default_value_t = Count::Processes, env = "PLIMSOLL_COUNT")]
    count: Count,
    /// The settings of its machines and groups; machines it names are managed from outside when they come. See docs/policy.md.
    #[arg(long, value_name = "FILE", env = "PLIMSOLL_CONFIG")]
    config: Option<PathBuf>,
    /// What the settings said of the budget when the daemon was started: for a manager that cannot read them any more.
    #[arg(long, hide = true)]
    found: Option<ByteCount>,
    /// What becomes of system calls that the daemon is not known to need. Where it fails for want of one, `log` finds out which. See
    /// docs/rights.md.
    #[arg(long, value_enum, default_value_t = Seccomp::Refuse, env = "PLIMSOLL_SECCOMP")]
    seccomp: Seccomp,
    /// Everything is in its place: an earlier program of this process has left it.
    #[arg(long, hide = true)]
    resumed: bool,
    /// Only say whether this program could go on in the place of another, whose register it was handed.
    #[arg(long, hide = true)]
    adopts: bool,
}

#[derive(Args)]
pub(crate) struct ManagerArgs {
    #[command(flatten)]
    daemon: DaemonArgs,
    /// The version of the keeper's protocol.
    #[arg(long)]
    keeper: u32,
}

impl DaemonArgs {
    fn settings(&self) -> Result<Settings, String> {
        let (budget, budget_by) = self.budget()?;
        if budget < BUDGET_MIN {
            return Err(format!("--budget {budget}: a machine cannot run in less than {BUDGET_MIN}"));
        }
        if self.store.is_some_and(|store| store < BUDGET_MIN) {
            return Err(format!("--store is below {BUDGET_MIN}: it could hold next to nothing"));
        }
        let disk = self.disk()?;
        if !self.directory.is_absolute() {
            let shown = self.directory.display();
            return Err(format!(
                "--directory {shown}: a daemon outlives its working directory; use a path from /"
            ));
        }
        Ok(Settings {
            directory: self.directory.clone(),
            budget,
            budget_by,
            store_limit: self.store.unwrap_or(budget),
            sharing: if self.share { Sharing::Together } else { Sharing::Apart },
            config: self.config.clone(),
            counted: if self.count == Count::Group { Counted::Group } else { Counted::Processes },
            disk,
            filter: match self.seccomp {
                Seccomp::Refuse => Filter::Refuse,
                Seccomp::Log => Filter::Log,
                Seccomp::Off => Filter::Off,
            },
        })
    }

    /// What may be used, and who says so.
    fn budget(&self) -> Result<(ByteCount, BudgetBy), String> {
        if let Some(budget) = self.budget {
            return Ok((budget, BudgetBy::Flag));
        }
        // Who follows another goes by what was accepted last, not by what the file says meanwhile.
        let follows = self.found.is_some() || is_handed_on();
        let read = |file: &Path| match follows {
            false => Config::read(file),
            true => Ok(daemon::settings_in_force(&self.directory, file)),
        };
        let config = self.config.as_deref().map(read).transpose().map_err(|mistakes| all(&mistakes))?;
        let of_file = config.and_then(|config| config.budget);
        let missing =
            "what may machines use? Say --budget SIZE, or budget in [host] of the settings (--config FILE)";
        of_file.or(self.found).map(|budget| (budget, BudgetBy::File)).ok_or_else(|| missing.to_owned())
    }

    fn disk(&self) -> Result<Option<DiskSettings>, String> {
        let (Some(file), Some(limit)) = (&self.disk, self.disk_limit) else { return Ok(None) };
        let [least, most] = DISK_SIZES;
        if !(least..=most).contains(&limit) {
            return Err(format!("--disk-limit {limit}: a disk tier has between {least} and {most}"));
        }
        if !file.is_absolute() {
            let shown = file.display();
            return Err(format!(
                "--disk {shown}: a daemon outlives its working directory; use a path from /"
            ));
        }
        let limits = Limits { disk: limit, domain: self.disk_share };
        Ok(Some(DiskSettings { file: file.clone(), limits }))
    }
}

pub(crate) fn main(args: &DaemonArgs) -> ExitCode {
    let code = |end| match end {
        End::Stopped | End::Upgrade => ExitCode::SUCCESS,
        End::Failed(ending) => {
            eprintln!("plimsoll daemon: no manager can be had: the last ended with {ending}");
            ExitCode::FAILURE
        }
    };
    ended("daemon", run(args).map(code))
}

/// The first manager reads the settings again; they are to make sense at least now.
fn check(path: &Path) -> Result<(), String> {
    let shown = path.display();
    if !path.is_absolute() {
        return Err(format!("--config {shown}: a daemon outlives its working directory; use a path from /"));
    }
    let config = Config::read(path).map_err(|mistakes| all(&mistakes))?;
    config.suits_a_daemon().map_err(|why| format!("{shown}: {why}"))?;
    // Listened for a moment: that a port is another's is said now as well.
    let access = Access::prepare(&config.api, &Access::default());
    access.map(drop).map_err(|error| format!("{shown}: {}", explain(&error)))
}

/// What the manager's C library is told, unless whoever starts the daemon tells it something: its threads keep nothing of what they
/// free. With a thousand pagers that is 10 MiB, and a fault allocates little.
const TUNED: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0");

fn run(args: &DaemonArgs) -> Result<End, String> {
    let settings = args.settings()?;
    let failed = |error: &dyn std::error::Error| explain(error);
    if args.adopts {
        return daemon::recognise(HANDED).map(|()| End::Upgrade).map_err(|error| failed(&error));
    }
    // Machines that wait are not refused what they had.
    if !args.resumed && !is_handed_on() {
        if let Some(path) = &args.config {
            check(path)?;
        }
        let available = limits()?.available;
        if settings.budget > available {
            return Err(format!(
                "--budget {}: this host has {available} available; use less, or free some",
                settings.budget
            ));
        }
        // Said now, and by the manager once more if it is not so any more.
        if let Some(disk) = &settings.disk {
            FileDisk::create(&disk.file).map_err(|error| format!("--disk: {}", explain(&error)))?;
        }
    }
    let path = std::env::current_exe().map_err(|error| failed(&error))?;
    let mut own: Vec<OsString> = std::env::args_os().skip(2).filter(|word| word != "--resumed").collect();
    if settings.budget_by == BudgetBy::File && args.found.is_none() {
        own.extend(["--found".into(), settings.budget.0.to_string().into()]);
    }
    let program = |path: &OsStr, verb: &[&str], more: Option<(OsString, OsString)>| {
        let words =
            ["plimsoll"].iter().chain(verb).map(OsStr::new).chain(own.iter().map(OsString::as_os_str));
        let variables: Vec<OsString> = std::env::vars_os()
            .filter(|(name, _)| !HANDED_ON.iter().any(|own| name == own))
            .chain(more)
            .map(|(mut name, value)| {
                name.push("=");
                name.push(value);
                name
            })
            .collect();
        Program::new(path, words, variables.iter().map(OsString::as_os_str)).map_err(|error| failed(&error))
    };
    let version = VERSION.to_string();
    let (tunables, tuned) = TUNED;
    let tuned = std::env::var_os(tunables).is_none().then(|| (tunables.into(), tuned.into()));
    let manager = program(OsStr::new("/proc/self/exe"), &["manager", "--keeper", &version], tuned)?;
    let successor = program(path.as_os_str(), &["daemon", "--resumed"], None)?;
    let probe = program(path.as_os_str(), &["daemon", "--resumed", "--adopts"], None)?;
    let beginning = if args.resumed { Beginning::Resumed } else { Beginning::Fresh };
    daemon::keep(&settings, beginning, manager, &successor, probe).map_err(|error| failed(&error))
}

pub(crate) fn manager(args: &ManagerArgs) -> ExitCode {
    let lead = Lead::take();
    let managed = args.daemon.settings().and_then(|settings| {
        if args.keeper != VERSION {
            return Err(format!("the keeper speaks version {}, and this manager {VERSION}", args.keeper));
        }
        daemon::manage::manage(&settings, HANDED, lead).map_err(|error| explain(&error))
    });
    ended("manager", managed.map(|()| ExitCode::SUCCESS))
}
