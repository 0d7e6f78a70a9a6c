//! The daemon: a keeper, and a manager that can die.
//!
//! Enters: settings, and machines whose VMMs hand them over on a socket. Leaves: managed machines, an account of them on a second
//! socket. What must never happen: a second daemon on the same directory, or a stop that leaves a guest without its pages.
//!
//! * [`place`]: the directory, its lock and its sockets. [`manage`]: the manager's process. [`sole`]: that there is one. [`status`]:
//!   what it says about itself. [`milestones`]: when it did what.
//!
//! ```text
//! DIRECTORY/lock            held by whoever has the descriptor: the keeper and its manager; and as a record lock by the manager
//! DIRECTORY/handover.sock   SOCK_SEQPACKET; the hand-over protocol of plimsoll_linux::uffd::wire, one machine a connection
//! DIRECTORY/control.sock    SOCK_SEQPACKET; a request and its answer a datagram each, JSON
//! DIRECTORY/api.sock        SOCK_STREAM; HTTP: docs/api.md
//! DIRECTORY/said.json       what was said by the API, for the next manager: crate::helm::kept
//! DIRECTORY/settings.json   what the settings files said that were accepted last, for the next manager: accepted
//! ```
mod accepted;
pub mod lead;
pub mod manage;
pub mod milestones;
pub mod place;
pub mod rights;
pub mod sole;
pub mod status;
mod steer;

use crate::config::Config;
use crate::control::host_pressure;
use crate::keeper::serve::{End, Keeper};
use crate::keeper::store::{Adopted, Store, received};
use crate::voice::say;
use plimsoll_linux::disk::device::OpenError;
use plimsoll_linux::disk::tier::{Limits, TierError};
use plimsoll_linux::uffd::estate::{REGISTER, RESERVED};
use plimsoll_sys::launch::{Program, accept_signals};
use plimsoll_sys::mapping::large_folio_folder;
use plimsoll_sys::slots::Slots;
use plimsoll_types::ByteCount;
use rights::{Filter, Role};
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;

/// Descriptors that a keeper can hold: six a shard, one a domain, so 1,168 machines of one shard each.
const SLOTS: u32 = 8192;
/// How long a manager may say nothing. Taking over takes milliseconds; a VMM that does not answer holds it up for 30 s.
const SILENCE_MAX: Duration = Duration::from_secs(90);
/// The slot of the socket on which machines are handed over.
pub const HANDOVER: u32 = 1;
/// The slot of the socket on which an operator asks.
pub const CONTROL: u32 = 2;
/// The slot of the directory's lock. The next one is the keeper's own ([`GENERATIONS`](crate::keeper::store::GENERATIONS)), and those
/// after it the disk tier's.
pub const LOCK: u32 = 3;
/// The slot of the tmpfs in which stores are made. It is empty where nobody may mount one.
pub const STORES: u32 = 8;
/// The slot of the kernel's word that the host's tasks wait for memory. It is empty where that is not measured. A manager's last act would
/// else be to close it, for which the kernel waits until no processor can be looking at it (a grace period of RCU): 10 ms, and guests
/// with it. It is set once and outlives upgrades: a build that is to be told of something else takes another slot.
pub const PRESSURE: u32 = 9;

/// Which machines share equal pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// None: each has a store of its own.
    Apart,
    /// All: one tenant's machines.
    Together,
}

/// What the budget is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// The sum over this process, its keeper and the VMMs, from /proc.
    Processes,
    /// The memory control group that the daemon is in. The VMMs are in it, too.
    Group,
}

/// Who says what may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BudgetBy {
    /// Whoever started the daemon, whatever its settings file says.
    Flag,
    /// The settings file, which may say something else when it is read again.
    File,
}

impl BudgetBy {
    /// What of a settings file counts.
    fn heed(self, mut config: Config) -> Config {
        config.budget = config.budget.filter(|_| self == Self::File);
        config
    }
}

/// The settings of a manager that begins: those that were accepted last, or what the file says where none were.
pub fn settings_in_force(directory: &Path, file: &Path) -> Config {
    accepted::Accepted::of(directory).in_force(file)
}

/// What a daemon is to do. Keeper and manager are told the same.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where its sockets are.
    pub directory: PathBuf,
    /// What all machines, their VMMs and the daemon may use.
    pub budget: ByteCount,
    /// Who says so.
    pub budget_by: BudgetBy,
    /// What the store of one domain may hold.
    pub store_limit: ByteCount,
    /// Which machines share.
    pub sharing: Sharing,
    /// What is counted.
    pub counted: Counted,
    /// What is said about machines and groups, as a file.
    pub config: Option<PathBuf>,
    /// Where parked machines go.
    pub disk: Option<DiskSettings>,
    /// What becomes of system calls that the daemon does not need.
    pub filter: Filter,
}

/// A file for the disk tier.
#[derive(Clone, Debug)]
pub struct DiskSettings {
    /// The file, which is the daemon's alone, or a block device.
    pub file: PathBuf,
    /// What it may take.
    pub limits: Limits,
}

/// A daemon could not be started or go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// Its directory is not to be had.
    #[error(transparent)]
    Place(#[from] place::PlaceError),
    /// A descriptor of the daemon's own could not be put where it belongs.
    #[error("the daemon's descriptors cannot be kept")]
    Slots(#[source] io::Error),
    /// The supervisor that keeps descriptors cannot be spoken to.
    #[error("the supervisor at NOTIFY_SOCKET cannot be spoken to")]
    Store(#[source] io::Error),
    /// Waiting, or catching signals, failed.
    #[error("the daemon cannot wait for anything")]
    Wait(#[source] io::Error),
    /// Another manager has the machines.
    #[error(transparent)]
    Sole(#[from] sole::SoleError),
    /// The manager was not started by a keeper.
    #[error("there is no keeper: `plimsoll manager` is started by `plimsoll daemon`")]
    NoKeeper(#[source] io::Error),
    /// What an earlier manager left is not to be understood.
    #[error("what an earlier manager left cannot be taken over")]
    Estate(#[from] plimsoll_linux::uffd::estate::EstateError),
    /// The machines could not be managed.
    #[error("the machines cannot be managed")]
    Manager(#[from] plimsoll_linux::uffd::manager::AdmitError),
    /// The file of the disk tier is not to be had.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// The disk tier cannot begin.
    #[error("the disk tier cannot begin")]
    Tier(#[from] TierError),
    /// Core dumps stay possible, with what machines and the disk tier's key would be in them.
    #[error("core dumps of the daemon cannot be turned off")]
    Dumps(#[source] io::Error),
    /// Memory cannot be counted.
    #[error("memory cannot be counted: {0}")]
    Count(String),
    /// What is not needed could not be given up.
    #[error(
        "the daemon goes on with no more rights than it needs, or not at all; --seccomp off does without a filter"
    )]
    Rights(#[from] rights::GiveUpError),
    /// The program at the path could not be executed.
    #[error("the new program cannot take over; this one goes on")]
    Upgrade(#[source] io::Error),
}

/// Whether a keeper begins, or goes on in the place of an earlier version of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// It begins.
    Fresh,
    /// It finds everything in its slots.
    Resumed,
}

/// Whether a keeper of this build could go on with a register of which it inherited the descriptor under that number.
///
/// # Errors
/// [`DaemonError::Estate`], where it could not.
pub fn recognise(register: RawFd) -> Result<(), DaemonError> {
    let register = plimsoll_sys::process::adopt_inherited(register).map_err(DaemonError::NoKeeper)?;
    Ok(plimsoll_linux::uffd::estate::recognise(register)?)
}

/// Runs the keeper: `manager` starts a manager, `successor` is the program that takes this one's place in an upgrade, and `probe` the same
/// one, asked whether it [can](recognise).
///
/// # Errors
/// [`DaemonError`]; nothing is left behind.
pub fn keep(
    settings: &Settings,
    beginning: Beginning,
    manager: Program,
    successor: &Program,
    probe: Program,
) -> Result<End, DaemonError> {
    // Whoever may take its descriptors has all machines' memory.
    plimsoll_sys::process::refuse_dumps().map_err(DaemonError::Dumps)?;
    let Adopted { mut slots, stale } = match beginning {
        Beginning::Resumed => {
            Adopted { slots: Slots::inherit(SLOTS).map_err(DaemonError::Slots)?, stale: Vec::new() }
        }
        Beginning::Fresh => begin(&settings.directory)?,
    };
    match beginning {
        Beginning::Fresh => rights::give_up(Role::Keeper, settings.filter)?,
        Beginning::Resumed => rights::give_up_again(settings.filter)?,
    }
    // Asked for with the rights that a manager would have. Without it that asks itself.
    if slots.get(PRESSURE).is_none() {
        host_pressure().into_iter().for_each(|pressure| drop(slots.put(PRESSURE, pressure.into())));
    }
    let store = Store::of_supervisor(&mut slots, stale).map_err(DaemonError::Store)?;
    let mut keeper = Keeper::new(slots, RESERVED, manager, SILENCE_MAX).map_err(DaemonError::Wait)?;
    store.into_iter().for_each(|store| keeper.store_in(store));
    keeper.ask_first(probe, REGISTER);
    // Only now does something catch what an upgrade has kept waiting.
    accept_signals().map_err(DaemonError::Wait)?;
    loop {
        match keeper.run().map_err(DaemonError::Wait)? {
            // Returns only if it fails, and then the next manager is one of this build.
            End::Upgrade => {
                let error = DaemonError::Upgrade(successor.become_it());
                say(format_args!("plimsoll keeper: {}", plimsoll_linux::explain(&error)));
                keeper.stay();
            }
            end => {
                // While the lock is held.
                place::give_up(&settings.directory);
                keeper.let_go_of_all();
                return Ok(end);
            }
        }
    }
}

/// The slots of a daemon that begins: with its directory, or with all that a supervisor has kept since an earlier keeper died.
fn begin(directory: &Path) -> Result<Adopted, DaemonError> {
    let mut adopted = match received(SLOTS).map_err(DaemonError::Slots)? {
        Some(adopted) => adopted,
        None => Adopted { slots: Slots::new(SLOTS).map_err(DaemonError::Slots)?, stale: Vec::new() },
    };
    let slots = &mut adopted.slots;
    let failed = |error| DaemonError::Slots(io::Error::other(error));
    if slots.get(STORES).is_none()
        && let Ok(folder) = large_folio_folder()
    {
        slots.put(STORES, folder).map_err(failed)?;
    }
    // It is stored last of the three, so with it the sockets are there; and without it there is no machine yet.
    if slots.get(LOCK).is_some() {
        return Ok(adopted);
    }
    let place = place::claim(directory)?;
    for (slot, descriptor) in [(HANDOVER, place.handover), (CONTROL, place.control), (LOCK, place.lock)] {
        slots.clear(slot);
        slots.put(slot, descriptor).map_err(failed)?;
    }
    Ok(adopted)
}
