//! Compressed swap devices in memory (zram): each one's interface ([`Disk`]), one made for a run ([`ZramSwap`]), and what
//! swap the host has.
//!
//! A size and algorithms enter; a device in use as swap leaves, and counters of it. What must never happen here: a
//! device that this module did not add is changed, or one that it did add stays behind unrecorded.
//!
//! **Life of a device.** Reading `hot_add` makes a *new* device and returns its number, so no existing one can be hit.
//! Then, in this order: record it, choose the algorithm, set the size, write the swap header, `swapon`. Back:
//! `swapoff`, `hot_remove` (which also resets the device and frees its memory), delete the record.
//!
//! **Records.** Nothing about a device tells whose it is. So `/run/plimsoll/zram-N` (directory mode 0700) says which
//! device was made, and its maker holds a lock (flock) on that file: the kernel drops the lock when the maker dies,
//! however it dies. A record whose lock can be taken is stale. It names the boot and the device's `diskseq`, a number
//! that no second device of one boot gets; [`sweep_stale`] undoes a device only if both still agree. The directory itself
//! is locked while a device is added or removed, so that nobody sees half a step.
//!
//! Known holes: a maker killed between `hot_add` and the record (two system calls) leaves an empty device of size 0.
//! A child forked from the maker without executing a program shares the lock and keeps the record from being stale.

mod cost;
mod disk;

use crate::cgroup::unescape;
use crate::system::{Linux, System};
pub use cost::{SwapCost, swap_cost};
use disk::{CONTROL, DISK_SIZE_MIN};
pub use disk::{Disk, IdleSince, Recompress, is_offered};
pub(crate) use disk::{choose, offered_names, swap_header};
use plimsoll_sys::swap::{SwapError, SwapPriority};
use plimsoll_types::{ByteCount, PageCount};
use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub(crate) const RECORDS: &str = "/run/plimsoll";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A zram device could not be made, read or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ZramError {
    /// The kernel's zram module is not there.
    #[error("no {CONTROL}: load the zram module (`modprobe zram`), or use a kernel that has it")]
    NoModule,
    /// A right is missing.
    #[error(
        "not permitted to {action} {path:?}: zram and swap need root (CAP_SYS_ADMIN) outside of a container"
    )]
    NotPermitted {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A size that cannot be one of a swap device.
    #[error("a swap device cannot have {0}: at least {DISK_SIZE_MIN}, and less than 16T")]
    BadSize(ByteCount),
    /// The kernel has none of the algorithms.
    #[error("zram of this kernel has none of {wanted:?}: it offers {offered:?}")]
    NoAlgorithm {
        /// What was asked for.
        wanted: Vec<String>,
        /// The kernel's list, the default in brackets.
        offered: String,
    },
    /// The kernel was built without a part of zram.
    #[error("zram of this kernel has no {attribute:?}: use one built with {}", option_for(attribute))]
    NotOffered {
        /// The attribute that is missing.
        attribute: &'static str,
    },
    /// The directory of records belongs to somebody else.
    #[error("{RECORDS} is not a directory of this user with mode 0700: remove it and try again")]
    UnsafeRecords,
    /// The device that was just added is not there.
    #[error(
        "zram{number} is gone a moment after it was added: something else on this host removes zram devices"
    )]
    Vanished {
        /// The number it had.
        number: u32,
    },
    /// The device cannot be removed.
    #[error(
        "zram{number} is still in use by another program: end it, then `echo {number} > {CONTROL}/hot_remove`"
    )]
    Busy {
        /// The device's number.
        number: u32,
    },
    /// Switching swap failed.
    #[error("cannot use the zram device as swap, or end its use")]
    Swap(#[from] SwapError),
    /// A file holds something else than it should.
    #[error("{path:?} holds {found:?}, which is not {expected}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
        /// What is in it.
        found: String,
    },
    /// Something else failed.
    #[error("cannot {action} {path:?}")]
    Other {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl ZramError {
    fn new(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotPermitted { action, path }
            }
            _ => Self::Other { action, path, source },
        }
    }
}

/// The kernel's build option behind an attribute.
pub(crate) fn option_for(attribute: &str) -> &'static str {
    match attribute {
        "recompress" | "recomp_algorithm" => "CONFIG_ZRAM_MULTI_COMP",
        "backing_dev" | "writeback" => "CONFIG_ZRAM_WRITEBACK",
        _ => "more of zram",
    }
}

/// What a swap area is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapKind {
    /// Compressed memory.
    Zram,
    /// Another block device.
    Partition,
    /// A file.
    File,
}

/// A swap area in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapArea {
    /// Where it lies.
    pub path: PathBuf,
    /// What it is made of.
    pub kind: SwapKind,
    /// What fits into it.
    pub size: ByteCount,
    /// What is in it.
    pub used: ByteCount,
    /// The kernel fills areas of high priority first; below zero for automatic ones.
    pub priority: i32,
}

/// The swap areas the host uses now; empty when it has no swap.
///
/// # Errors
/// When /proc/swaps cannot be read.
pub fn host_swap() -> Result<Vec<SwapArea>, ZramError> {
    swap_areas(&Linux)
}

/// The same of the kernel behind `system`.
///
/// # Errors
/// When /proc/swaps cannot be read.
pub fn swap_areas(system: &dyn System) -> Result<Vec<SwapArea>, ZramError> {
    let path = "/proc/swaps";
    match system.read(path.as_ref()) {
        Ok(text) => parse_swaps(&text),
        // A kernel without swap has no such file.
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(ZramError::new("read", path, source)),
    }
}

/// From `Filename Type Size Used Priority` lines, sizes in KiB, after a line of headings.
fn parse_swaps(text: &str) -> Result<Vec<SwapArea>, ZramError> {
    let area = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let path = unescape(words.next()?);
        let is_zram = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"zram"));
        let kind = match (words.next()?, is_zram) {
            ("partition", true) => SwapKind::Zram,
            ("partition", false) => SwapKind::Partition,
            _ => SwapKind::File,
        };
        let mut kib = || words.next()?.parse::<u64>().ok()?.checked_mul(1024).map(ByteCount);
        let (size, used) = (kib()?, kib()?);
        Some(SwapArea { path, kind, size, used, priority: words.next()?.parse().ok()? })
    };
    let lines = text.lines().skip(1);
    lines.map(|line| area(line).ok_or_else(|| malformed("/proc/swaps", "a swap area", line))).collect()
}

/// What a device holds and costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZramStat {
    /// The pages in it before compression, same-filled ones not counted.
    pub original: ByteCount,
    /// Those pages after compression.
    pub compressed: ByteCount,
    /// The memory it takes: compressed pages, fragmentation and bookkeeping of the allocator.
    pub memory_used: ByteCount,
    /// The most memory it ever took.
    pub memory_peak: ByteCount,
    /// Pages of one repeated word, which take no memory.
    pub same_pages: PageCount,
}

/// A zram device in use as swap. Dropping it undoes that as far as possible.
#[derive(Debug)]
pub struct ZramSwap {
    device: Device,
    algorithm: String,
    mm_stat: File,
    is_removed: bool,
}

impl ZramSwap {
    /// Adds a device that holds `disk_size` (uncompressed, rounded up to pages), with the first algorithm of `preferred`
    /// that the kernel has, and puts it to use as swap.
    ///
    /// The kernel may put pages of *any* process of the host into it, except where a priority below another area's
    /// keeps it empty.
    ///
    /// # Errors
    /// Nothing is left behind. The message says what was found and what to do.
    pub fn create(
        disk_size: ByteCount,
        preferred: &[&str],
        priority: SwapPriority,
    ) -> Result<Self, ZramError> {
        let header = swap_header(disk_size)?;
        let device = Device::add()?;
        let mm_stat = device.disk.attribute("mm_stat");
        let mm_stat = File::open(&mm_stat).map_err(|source| ZramError::new("read", mm_stat, source));
        let put_to_use = || {
            let algorithm = device.disk.choose_algorithm(preferred)?;
            device.disk.set("disksize", &header.disk_size.0.to_string())?;
            device.disk.format(&header)?;
            device.disk.swapon(priority)?;
            Ok((algorithm, mm_stat?))
        };
        match put_to_use() {
            Ok((algorithm, mm_stat)) => Ok(Self { device, algorithm, mm_stat, is_removed: false }),
            Err(error) => {
                // The first error is the one to report; what stays is on record.
                let _ = RecordsLock::take().and_then(|lock| device.undo(&lock));
                Err(error)
            }
        }
    }

    /// The device's number: N of `/dev/zramN`.
    pub const fn number(&self) -> u32 {
        self.device.disk.number()
    }

    /// The device's path.
    pub fn path(&self) -> &Path {
        &self.device.node
    }

    /// The compression algorithm in use.
    pub fn algorithm(&self) -> &str {
        &self.algorithm
    }

    /// What it holds and costs now. One system call.
    ///
    /// # Errors
    /// When the kernel's file cannot be read.
    pub fn stat(&self) -> Result<ZramStat, ZramError> {
        // Nine numbers of at most 20 digits.
        let mut buffer = [0; 256];
        let path = || self.device.disk.attribute("mm_stat");
        let length =
            self.mm_stat.read_at(&mut buffer, 0).map_err(|source| ZramError::new("read", path(), source))?;
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        mm_stat(&text, path)
    }

    /// The memory the device takes now.
    ///
    /// # Errors
    /// When the kernel's file cannot be read.
    pub fn memory_used(&self) -> Result<ByteCount, ZramError> {
        Ok(self.stat()?.memory_used)
    }

    /// Ends its use as swap and removes it. All that is in it is read back into memory: end the processes first.
    ///
    /// # Errors
    /// When what it holds does not fit into memory, or somebody else holds the device open. It then stays on record, and
    /// the next run's [`sweep_stale`] removes it.
    pub fn remove(mut self) -> Result<(), ZramError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), ZramError> {
        if self.is_removed {
            return Ok(());
        }
        // One attempt is all: a drop that follows a failed removal would only fail again.
        self.is_removed = true;
        self.device.undo(&RecordsLock::take()?)
    }
}

impl Drop for ZramSwap {
    fn drop(&mut self) {
        // Whoever wants to know calls `remove`; what stays is on record.
        let _ = self.undo();
    }
}

/// `ORIGINAL COMPRESSED USED LIMIT PEAK SAME ...` (Documentation/admin-guide/blockdev/zram.rst); newer kernels append.
fn parse_mm_stat(text: &str) -> Option<ZramStat> {
    let numbers: Result<Vec<u64>, _> = text.split_ascii_whitespace().map(str::parse).collect();
    let [original, compressed, used, _limit, peak, same, ..] = *numbers.ok()? else { return None };
    Some(ZramStat {
        original: ByteCount(original),
        compressed: ByteCount(compressed),
        memory_used: ByteCount(used),
        memory_peak: ByteCount(peak),
        same_pages: PageCount(same),
    })
}

/// What a device's `mm_stat` says; `path` is where that lies.
fn mm_stat(text: &str, path: impl FnOnce() -> PathBuf) -> Result<ZramStat, ZramError> {
    parse_mm_stat(text).ok_or_else(|| malformed(path(), "the statistics of a zram device", text))
}

/// Removes the devices that killed runs have left, and returns their numbers. A record whose device is gone, or now is
/// another one, is deleted and nothing else.
///
/// # Errors
/// When a stale device cannot be removed; its record stays.
pub fn sweep_stale() -> Result<Vec<u32>, ZramError> {
    if !Path::new(RECORDS).exists() {
        return Ok(Vec::new());
    }
    let lock = RecordsLock::take()?;
    let mut swept = Vec::new();
    for entry in fs::read_dir(RECORDS).map_err(|source| ZramError::new("list", RECORDS, source))? {
        let entry = entry.map_err(|source| ZramError::new("list", RECORDS, source))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("zram-")?.parse().ok());
        let Some(number) = number else { continue };
        let path = entry.path();
        let lock_file = File::open(&path).map_err(|source| ZramError::new("read", &path, source))?;
        match lock_file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(source)) => return Err(ZramError::new("lock", path, source)),
        }
        let device =
            Identity::parse(&read(&path)?).map(|identity| Device::recorded(number, identity, lock_file));
        match device {
            Some(device) if device.is_there()? => {
                device.undo(&lock)?;
                swept.push(number);
            }
            // Another boot's, another device of the number, or cut short by its writer's death.
            _ => remove_file(&path)?,
        }
    }
    Ok(swept)
}

/// The lock on the directory of records: devices are added and removed by one process at a time.
pub(crate) struct RecordsLock(#[expect(dead_code, reason = "holding it open is what locks")] File);

impl RecordsLock {
    pub(crate) fn take() -> Result<Self, ZramError> {
        match DirBuilder::new().mode(0o700).create(RECORDS) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(ZramError::new("create", RECORDS, error));
            }
            _ => {}
        }
        // O_NOFOLLOW: a link that somebody else put there is not followed; the checks are of what was opened.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::DIRECTORY;
        let options = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(RECORDS);
        let directory = options.map_err(|source| {
            let is_other = is(&source, Errno::LOOP) || is(&source, Errno::NOTDIR);
            if is_other { ZramError::UnsafeRecords } else { ZramError::new("open", RECORDS, source) }
        })?;
        let found = directory.metadata().map_err(|source| ZramError::new("read", RECORDS, source))?;
        if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o077 != 0 {
            return Err(ZramError::UnsafeRecords);
        }
        directory.lock().map_err(|source| ZramError::new("lock", RECORDS, source))?;
        Ok(Self(directory))
    }
}

/// Where the device's node in /dev came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NodeOrigin {
    /// The kernel made it (devtmpfs) and removes it with the device.
    Kernel,
    /// This module made it and must remove it.
    Made,
}

/// What tells a device from every other one. Its text is the record, one `name value` line each:
/// `boot` (the kernel's boot id), `diskseq`, `node` (`kernel` or `made`), `pid` (of the maker; for people).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    boot: String,
    disk_sequence: u64,
    origin: NodeOrigin,
}

impl Identity {
    /// Of the device that has the number now, or `None` if there is none.
    fn current(disk: Disk<'_>) -> Result<Option<Self>, ZramError> {
        let Some(disk_sequence) = disk.sequence()? else { return Ok(None) };
        let boot = read(BOOT_ID.as_ref())?.trim().to_owned();
        let origin = if disk.node().exists() { NodeOrigin::Kernel } else { NodeOrigin::Made };
        Ok(Some(Self { boot, disk_sequence, origin }))
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name| text.lines().find_map(|line: &str| line.strip_prefix(name)?.strip_prefix(' '));
        // The last line: a record without it was cut short.
        field("pid")?;
        let origin = match field("node")? {
            "kernel" => NodeOrigin::Kernel,
            "made" => NodeOrigin::Made,
            _ => return None,
        };
        Some(Self { boot: field("boot")?.to_owned(), disk_sequence: field("diskseq")?.parse().ok()?, origin })
    }

    fn text(&self) -> String {
        let origin = match self.origin {
            NodeOrigin::Kernel => "kernel",
            NodeOrigin::Made => "made",
        };
        let (boot, sequence, pid) = (&self.boot, self.disk_sequence, std::process::id());
        format!("boot {boot}\ndiskseq {sequence}\nnode {origin}\npid {pid}\n")
    }

    fn is_same_device(&self, other: &Self) -> bool {
        (&self.boot, self.disk_sequence) == (&other.boot, other.disk_sequence)
    }
}

/// A device that this module added, and its record.
#[derive(Debug)]
struct Device {
    disk: Disk<'static>,
    node: PathBuf,
    identity: Identity,
    /// Open for as long as the device is somebody's: it carries the lock.
    _record: File,
}

impl Device {
    fn recorded(number: u32, identity: Identity, record: File) -> Self {
        let disk = Disk::new(&Linux, number);
        Self { disk, node: disk.node(), identity, _record: record }
    }

    /// Adds a device, records it and sees to its node.
    fn add() -> Result<Self, ZramError> {
        if !is_offered(&Linux) {
            return Err(ZramError::NoModule);
        }
        let lock = RecordsLock::take()?;
        let disk = Disk::add(&Linux)?;
        let recorded = Identity::current(disk).and_then(|identity| {
            let gone = || ZramError::new("read", disk.attribute("diskseq"), Errno::NOENT.into());
            let identity = identity.ok_or_else(gone)?;
            let record = write_record(disk.number(), &identity)?;
            Ok(Self::recorded(disk.number(), identity, record))
        });
        let device = match recorded {
            Ok(device) => device,
            Err(error) => {
                // The first error is the one to report. The number was handed out under the lock a moment ago.
                let _ = disk.remove();
                return Err(error);
            }
        };
        let has_node = match device.identity.origin {
            NodeOrigin::Kernel => Ok(()),
            NodeOrigin::Made => disk.device_id().and_then(|id| make_node(&device.node, id)),
        };
        match has_node {
            Ok(()) => Ok(device),
            Err(error) => {
                let _ = device.undo(&lock);
                Err(error)
            }
        }
    }

    /// True while the device of this number is the one that was added.
    fn is_there(&self) -> Result<bool, ZramError> {
        Ok(Identity::current(self.disk)?.is_some_and(|now| now.is_same_device(&self.identity)))
    }

    /// Undoes everything, from any point on the way up, and deletes the record last.
    fn undo(&self, _lock: &RecordsLock) -> Result<(), ZramError> {
        if self.is_there()? {
            if host_swap()?.iter().any(|area| area.path == self.node) {
                self.disk.swapoff()?;
            }
            self.disk.remove()?;
            if self.identity.origin == NodeOrigin::Made {
                remove_file(&self.node)?;
            }
        }
        // Had the device been removed by others, the number and thus the record's name may be somebody else's by now.
        let path = record_path(self.disk.number());
        let recorded = fs::read_to_string(&path).ok().and_then(|text| Identity::parse(&text));
        if recorded.as_ref() == Some(&self.identity) { remove_file(&path) } else { Ok(()) }
    }
}

fn record_path(number: u32) -> PathBuf {
    format!("{RECORDS}/zram-{number}").into()
}

/// Writes the record of a device and returns it, locked. The caller holds the directory's lock.
fn write_record(number: u32, identity: &Identity) -> Result<File, ZramError> {
    let path = record_path(number);
    // An old record of the number is of a device that is gone, or the number would not have been free.
    remove_file(&path)?;
    let failed = |source| ZramError::new("write", &path, source);
    let options = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let mut record = options.map_err(failed)?;
    record.lock().map_err(failed)?;
    record.write_all(identity.text().as_bytes()).map_err(failed)?;
    Ok(record)
}

/// Makes a block device's node, where /dev is a plain directory.
fn make_node(path: &Path, device_id: u64) -> Result<(), ZramError> {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, path, FileType::BlockDevice, mode, device_id)
        .map_err(|errno| ZramError::new("create the device node", path, errno.into()))
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn malformed(path: impl Into<PathBuf>, expected: &'static str, found: &str) -> ZramError {
    ZramError::Malformed { path: path.into(), expected, found: found.trim().to_owned() }
}

fn read(path: &Path) -> Result<String, ZramError> {
    fs::read_to_string(path).map_err(|source| ZramError::new("read", path, source))
}

/// Removes a file that may be gone already.
fn remove_file(path: &Path) -> Result<(), ZramError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ZramError::new("remove", path, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
