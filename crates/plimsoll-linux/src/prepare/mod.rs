//! What a host's kernel offers for taking memory, and setting it up with consent.
//!
//! * [`check()`] looks: every probe reads, or works on memory of this process.
//! * [`plan()`] says what would be changed, each change with its old and new value, and refuses what the kernel cannot do.
//! * [`apply()`] does it. [`undo()`] reverts it, and [`outlook`] says beforehand what that would do.
//! * [`Repacking`] has what lies cold in a device made so packed more densely, by whoever manages machines.
//!
//! A request enters; a swap device or zswap, in use, leaves. What must never happen here: a change without a record, a
//! change of swap that somebody else has configured, or a revert of what is no longer as it was set.
//!
//! **The record** ([`Place`]) is one file, replaced whole. Each change is written to it *before* it is made, so after a
//! crash the last change on record may or may not have happened. Undoing never believes the record: it looks at each
//! thing, from the last change to the first, and a change that did not happen is one that is gone already. A change
//! leaves the record only after it is undone, and the record goes last. A device is known by its `diskseq`, which no
//! second device of one boot gets; nothing set here survives a reboot, so a record of another boot has nothing to undo.
//!
//! **The one gap** lies between the read that adds a device and the record of its number. After a crash there, undo looks
//! for an empty device that was not there before and that no run of plimsoll has claimed. If there is exactly one, it
//! is removed: an empty device holds nothing, so that the worst that can happen is that somebody who added one in that very
//! moment has to add it again. If there are several, all are left and named.
mod apply;
mod change;
mod check;
mod plan;
mod probe;
mod record;
mod repack;
mod undo;

pub use apply::apply;
pub use change::{Change, DeviceId, Parameter, Row, Setting};
pub use check::{Check, Finding, Obstacle, State, check};
pub use plan::{Outlook, Plan, Request, ZramRequest, ZswapRequest, plan};
pub use probe::{Own, PageMap};
pub use record::{Place, Record, Stage};
pub use repack::Repacking;
pub use undo::{Fit, Progress, Undo, Undone, Verdict, outlook, undo};

use crate::system::System;
use crate::zram::ZramError;
use plimsoll_sys::process::{CapabilitySet, effective_capabilities};
use plimsoll_sys::procfs::parse_meminfo;
use plimsoll_types::ByteCount;
use std::io;
use std::path::{Path, PathBuf};

/// A host could not be prepared, or that not undone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// A zram device or its swap.
    #[error(transparent)]
    Zram(#[from] ZramError),
    /// The right to switch swap is missing.
    #[error("changing a host's swap needs CAP_SYS_ADMIN, which this process lacks: run as root")]
    NotPermitted,
    /// More than a device can be good for.
    #[error(
        "a zram device of {size} is more than four times this host's memory ({memory}), and pages seldom shrink that much: \
         ask for less"
    )]
    TooLarge {
        /// What was asked for.
        size: ByteCount,
        /// The host's memory.
        memory: ByteCount,
    },
    /// A limit that cannot be one.
    #[error("a limit of {limit} cannot be kept: it must lie between {min} and the host's memory, {memory}")]
    BadLimit {
        /// What was asked for.
        limit: ByteCount,
        /// The least that makes sense.
        min: ByteCount,
        /// The host's memory.
        memory: ByteCount,
    },
    /// A priority that swap cannot have.
    #[error("swap cannot have priority {0}: use 0 to 32767")]
    BadPriority(i16),
    /// The kernel has no zswap.
    #[error("this kernel has no zswap: use --zram, or a kernel built with CONFIG_ZSWAP")]
    NoZswap,
    /// There is nothing for zswap to sit in front of.
    #[error(
        "zswap holds pages on their way to a disk, and this host swaps to none: use --zram, or add a swap file first"
    )]
    NoDiskSwap,
    /// Somebody has turned zswap on.
    #[error(
        "zswap is on already (compressor {compressor}, at most {max_pool_percent} % of memory), and not by plimsoll: \
         it is left as it is, and pages can be taken with it"
    )]
    ZswapOn {
        /// Its compressor.
        compressor: String,
        /// The most memory it takes.
        max_pool_percent: String,
    },
    /// The kernel's crypto interface has no such compressor.
    #[error(
        "this kernel has no compressor {wanted:?} loaded: it has {}; load the module of another one first",
        offered.join(", ")
    )]
    NoCompressor {
        /// What was asked for.
        wanted: String,
        /// What there is.
        offered: Vec<String>,
    },
    /// A device that pages cannot be written back to.
    #[error("pages cannot be written back to {device:?}: {why}")]
    BadWriteBack {
        /// The device.
        device: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The host was prepared in another way.
    #[error("this host is prepared already, in another way ({found}): run `plimsoll host undo` first")]
    PreparedOtherwise {
        /// How.
        found: String,
    },
    /// Something on record is no longer as it was set.
    #[error(
        "this host was prepared, and since then {found}: run `plimsoll host undo`, then prepare it again"
    )]
    NoLongerPrepared {
        /// The first difference.
        found: String,
    },
    /// A run of prepare or undo did not come to its end.
    #[error("an earlier run was cut short while {stage}: run `plimsoll host undo` first")]
    CutShort {
        /// What it was doing.
        stage: Stage,
    },
    /// Between showing the plan and carrying it out something has changed.
    #[error("the host has changed since the plan was shown: look at a new one")]
    PlanOutdated,
    /// Another run holds the record.
    #[error("another `plimsoll host prepare` or `undo` is running on {0:?}: wait for its end")]
    Locked(PathBuf),
    /// The record could lead to changes that its writer did not make.
    #[error(
        "{0:?} belongs to another user or can be written by others, so its record cannot be trusted: `chmod go-w` it, or \
         keep the record elsewhere (--record)"
    )]
    UnsafeDirectory(PathBuf),
    /// The record is of a later version.
    #[error(
        "{path:?} was written by a newer plimsoll (format {version}, this one knows {known}): undo with that one"
    )]
    NewerRecord {
        /// The record.
        path: PathBuf,
        /// Its version.
        version: u64,
        /// The latest version known.
        known: u64,
    },
    /// The record makes no sense.
    #[error(
        "{path:?} is damaged, so what it recorded cannot be undone from it: look at /proc/swaps and `zramctl` for \
         what plimsoll set up, undo that by hand, then delete the file"
    )]
    DamagedRecord {
        /// The record.
        path: PathBuf,
        /// Where it stops making sense.
        #[source]
        source: serde_json::Error,
    },
    /// What recompression would take cannot be limited.
    #[error(
        "zram of Linux {release} recompresses a whole device in one call: limits came with 6.10; `type=idle` can be written to the \
         device's recompress file by hand"
    )]
    Unlimited {
        /// The kernel's release.
        release: String,
    },
    /// The record cannot be written.
    #[error("cannot write {path:?}, and nothing is changed without a record: keep it elsewhere (--record)")]
    Unrecordable {
        /// The record, or its directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What is in the swap device has no room in memory.
    #[error(
        "{device:?} holds {used} before compression, and {available} of memory are available to read it back into: {} are \
         missing; end or shrink machines first, or try all the same with --force",
        used.saturating_sub(*available)
    )]
    DoesNotFit {
        /// The device.
        device: PathBuf,
        /// What is in it.
        used: ByteCount,
        /// MemAvailable.
        available: ByteCount,
    },
    /// Memory has run out while swap was read back.
    #[error(
        "memory ran out while {device:?} was read back: {used} are still in it; end or shrink machines, then undo again"
    )]
    OutOfMemory {
        /// The device, which is still in use.
        device: PathBuf,
        /// What is in it.
        used: ByteCount,
    },
    /// A file.
    #[error("cannot {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{path:?} does not say {expected}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        expected: &'static str,
    },
    /// A change failed, and so did undoing those before it.
    #[error("{failed}; undoing the changes before it failed as well; `plimsoll host undo` tries again")]
    Stuck {
        /// What failed first.
        failed: String,
        /// What failed then.
        #[source]
        source: Box<PrepareError>,
    },
}

impl PrepareError {
    fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

/// Says early that the rights for [`apply()`] and [`undo()`] are missing.
///
/// # Errors
/// When this process may not switch swap.
pub fn require_rights() -> Result<(), PrepareError> {
    let has = effective_capabilities().is_ok_and(|rights| rights.contains(CapabilitySet::SYS_ADMIN));
    if has { Ok(()) } else { Err(PrepareError::NotPermitted) }
}

/// A size given to a zram device when none is asked for: half of the host's memory.
///
/// # Errors
/// When /proc/meminfo cannot be read.
pub fn default_size(system: &dyn System) -> Result<ByteCount, PrepareError> {
    Ok(ByteCount(memory(system, "MemTotal")?.0 / 2).pages_floor().bytes())
}

/// A line of /proc/meminfo.
fn memory(system: &dyn System, field: &'static str) -> Result<ByteCount, PrepareError> {
    let path = Path::new("/proc/meminfo");
    let text = system.read(path).map_err(PrepareError::io("read", path))?;
    let malformed = || PrepareError::Malformed { path: path.into(), expected: field };
    parse_meminfo(&text, field).ok_or_else(malformed)
}

/// This boot, as no other one is called.
fn boot_id(system: &dyn System) -> Result<String, PrepareError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    Ok(system.read(path).map_err(PrepareError::io("read", path))?.trim().to_owned())
}

#[cfg(test)]
mod tests;
