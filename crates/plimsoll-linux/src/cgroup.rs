//! A memory cgroup made for one run: it counts, and where asked limits, the memory of the processes put into it.
//!
//! Process ids and limits enter; the kernel's own counters leave. What must never happen here: a process is killed, a
//! cgroup of somebody else is changed, a controller is switched on for the host, or a cgroup stays behind.
//!
//! **Where it is made.**
//!
//! * cgroup v1: below the cgroup this process is in, so that whatever limits it limits the new one too.
//! * cgroup v2: a cgroup there cannot both hold processes and hand controllers to children, so the new one is made below
//!   the nearest ancestor (as a rule the parent: a sibling of ours) that has `memory` in its `cgroup.subtree_control`.
//!   A limit set between that ancestor and this process's cgroup does not bind it.
//!
//! Its name is `PREFIX-PID-START`: the process that it is made for and that process's start time, by which
//! [`sweep_stale`] knows what a killed run has left.
//!
//! **What the counters mean.** A page is charged to the cgroup its first toucher is in at that time, and stays charged
//! there when the process moves: put processes in before they allocate. Anonymous memory, page cache, page tables and
//! other kernel memory count; swapped pages do not. Each CPU takes charges in batches of up to 64 pages: the count can
//! be that much too high per CPU, never too low.
//!
//! Known holes: [`sweep_stale`] looks only where [`MemoryCgroup::create`] would create now. It judges owners by this
//! process's process-id namespace.

pub mod foreign;

use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::{self, ProcfsError};
use plimsoll_types::ByteCount;
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often, and how far apart, removal is tried: the kernel empties a cgroup some time after its last process ended.
const REMOVAL_TRIES: u32 = 100;
const REMOVAL_PAUSE: Duration = Duration::from_millis(10);

/// A memory cgroup could not be made, read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// There is no memory controller.
    #[error("this kernel offers no memory controller: boot it without cgroup_disable=memory")]
    NoController,
    /// The controller exists, and its file system cannot be seen.
    #[error(
        "the memory controller's cgroup file system is not mounted here, or this process's cgroup {cgroup:?} lies \
         outside of what is: mount it below /sys/fs/cgroup, or share the host's with this container"
    )]
    NotMounted {
        /// The path in /proc/self/cgroup.
        cgroup: PathBuf,
    },
    /// No ancestor hands the controller to children.
    #[error(
        "neither {cgroup:?} nor a cgroup above it has the memory controller in cgroup.subtree_control: start plimsoll \
         with `systemd-run --scope -p Delegate=yes`, or as root `echo +memory >` that file of a cgroup above which \
         holds no processes itself"
    )]
    NotDelegated {
        /// The cgroup of this process.
        cgroup: PathBuf,
    },
    /// A prefix that cannot be part of a name.
    #[error("{0:?} cannot begin a cgroup's name: use letters, digits, - and _")]
    BadName(String),
    /// The process has one of that prefix already.
    #[error("{0:?} exists already: one process can have only one cgroup of a prefix")]
    Exists(PathBuf),
    /// A right is missing.
    #[error(
        "not permitted to {action} {path:?}: run as root, or have its parent directory delegated to your user"
    )]
    NotPermitted {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
    },
    /// The cgroup file system cannot be written.
    #[error(
        "cannot {action} {path:?}: the cgroup file system is mounted read-only here, as in most containers"
    )]
    ReadOnly {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
    },
    /// Removal was asked for while there were processes (or cgroups made by somebody else) inside.
    #[error(
        "{path:?} cannot be removed while it holds processes {processes:?} or cgroups: end or move them first"
    )]
    NotEmpty {
        /// The cgroup.
        path: PathBuf,
        /// The ids of the processes in it.
        processes: Vec<u32>,
    },
    /// The process to be moved does not exist.
    #[error("{0} does not exist (any more)")]
    NoProcess(ProcessId),
    /// The limit is below what the kernel can reclaim.
    #[error(
        "{path:?} uses {used} and the kernel cannot push it below the limit {limit}: add swap, or raise the limit"
    )]
    LimitTooLow {
        /// The cgroup.
        path: PathBuf,
        /// The limit asked for.
        limit: ByteCount,
        /// What is in use.
        used: ByteCount,
    },
    /// This kernel or this version of cgroups cannot do it.
    #[error("cgroup {version} of this kernel cannot {action}")]
    Unsupported {
        /// The version.
        version: &'static str,
        /// What was asked.
        action: &'static str,
    },
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
    /// The owner's start time could not be read.
    #[error("cannot tell when the owner of the cgroup started")]
    Owner(#[source] ProcfsError),
    /// Something else failed.
    #[error("cannot {action} {path:?}")]
    Other {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    fn new(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotPermitted { action, path },
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly { action, path },
            _ => Self::Other { action, path, source },
        }
    }

    /// Whether it is this host that lets this process have no cgroup, whichever it asks for.
    pub const fn is_of_the_host(&self) -> bool {
        matches!(
            self,
            Self::NoController
                | Self::NotMounted { .. }
                | Self::NotDelegated { .. }
                | Self::NotPermitted { .. }
                | Self::ReadOnly { .. }
        )
    }
}

/// The two interfaces the kernel has, which name the same things differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    const fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }

    const fn pick<T: Copy>(self, v1: T, v2: T) -> T {
        match self {
            Self::V1 => v1,
            Self::V2 => v2,
        }
    }
}

/// The memory cgroup a process is in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Home {
    version: Version,
    mount: PathBuf,
    path: PathBuf,
}

impl Home {
    fn find() -> Result<Self, CgroupError> {
        Self::parse(&read("/proc/self/cgroup".as_ref())?, &read("/proc/self/mountinfo".as_ref())?)
    }

    /// From the texts of /proc/self/cgroup (`ID:CONTROLLERS:PATH` lines) and /proc/self/mountinfo.
    fn parse(cgroups: &str, mounts: &str) -> Result<Self, CgroupError> {
        let lines = || cgroups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
        let v1 = lines().find(|(controllers, _)| controllers.split(',').any(|name| name == "memory"));
        let v2 = || lines().find(|(controllers, _)| controllers.is_empty());
        let (version, path) = match v1 {
            Some((_, path)) => (Version::V1, path),
            None => (Version::V2, v2().ok_or(CgroupError::NoController)?.1),
        };
        let here = mounts.lines().filter_map(Mount::parse).filter(|mount| mount.carries(version));
        // A path of another mount's root, or one above the namespace's root (`/../x`), is not visible there.
        let mut visible = here.filter_map(|mount| {
            let below = Path::new(path).strip_prefix(&mount.root).ok()?;
            let is_inside = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
            // Joining an empty path would add a slash.
            let path =
                if below.as_os_str().is_empty() { mount.point.clone() } else { mount.point.join(below) };
            is_inside.then_some(Self { version, mount: mount.point, path })
        });
        visible.next_back().ok_or_else(|| CgroupError::NotMounted { cgroup: path.into() })
    }

    /// The directory below which a new memory cgroup can be made: see the top of this file.
    fn parent_of_new(&self) -> Result<&Path, CgroupError> {
        if self.version == Version::V1 {
            return Ok(&self.path);
        }
        let within = self.path.ancestors().take_while(|path| path.starts_with(&self.mount));
        let lists_memory = |path: PathBuf| Ok(read(&path)?.split_whitespace().any(|name| name == "memory"));
        for directory in within {
            if lists_memory(directory.join("cgroup.subtree_control"))? {
                return Ok(directory);
            }
        }
        if lists_memory(self.mount.join("cgroup.controllers"))? {
            return Err(CgroupError::NotDelegated { cgroup: self.path.clone() });
        }
        Err(CgroupError::NoController)
    }
}

/// A line of mountinfo: `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [FIELDS] - TYPE SOURCE SUPEROPTIONS`.
struct Mount<'a> {
    root: PathBuf,
    point: PathBuf,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (place, file_system) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3).map(unescape);
        let mut file_system = file_system.split(' ');
        let (root, point) = (place.next()?, place.next()?);
        Some(Self { root, point, kind: file_system.next()?, options: file_system.nth(1)? })
    }

    fn carries(&self, version: Version) -> bool {
        match version {
            Version::V1 => self.kind == "cgroup" && self.options.split(',').any(|option| option == "memory"),
            Version::V2 => self.kind == "cgroup2",
        }
    }
}

/// The kernel writes space, tab, newline and backslash in paths as three octal digits after a backslash.
pub(crate) fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| str::from_utf8(digits).ok());
        let escaped = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// How readily the kernel swaps instead of dropping page cache: 0 (hardly) to 200 (first).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Swappiness(u8);

impl Swappiness {
    /// The swappiness of that number, or `None` if it is above 200.
    pub const fn new(number: u8) -> Option<Self> {
        if number > 200 { None } else { Some(Self(number)) }
    }
}

/// The memory of a cgroup by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryStat {
    /// Private memory.
    pub anonymous: ByteCount,
    /// Page cache, shared memory and memfds among it.
    pub file_cache: ByteCount,
    /// Kernel memory: page tables, stacks, slab objects.
    pub kernel: ByteCount,
    /// Memory in swap, which is not part of what is used; `None` where the kernel does not count it.
    pub swapped: Option<ByteCount>,
}

/// A memory cgroup that lasts for one run. Dropping it moves this process out and removes it as far as possible, which
/// takes up to a second while others are inside.
#[derive(Debug)]
pub struct MemoryCgroup {
    version: Version,
    path: PathBuf,
    /// Where this process was before.
    origin: PathBuf,
    usage: File,
    peak: File,
    is_removed: bool,
}

impl MemoryCgroup {
    /// Makes an empty cgroup for a run that lasts no longer than the process `owner`, as a rule this one.
    ///
    /// # Errors
    /// Nothing is left behind. The message says what was found and what to do.
    pub fn create(prefix: &str, owner: ProcessId) -> Result<Self, CgroupError> {
        check_prefix(prefix)?;
        let started = procfs::start_time(owner).map_err(CgroupError::Owner)?;
        let home = Home::find()?;
        let path = home.parent_of_new()?.join(format!("{prefix}-{}-{}", owner.get(), started.0));
        Self::create_at(path, home)
    }

    fn create_at(path: PathBuf, home: Home) -> Result<Self, CgroupError> {
        let version = home.version;
        fs::create_dir(&path).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => CgroupError::Exists(path.clone()),
            _ => CgroupError::new("create", &path, source),
        })?;
        let files = || {
            let usage = open_to_read(&path.join(version.pick("memory.usage_in_bytes", "memory.current")))?;
            let peak = path.join(version.pick("memory.max_usage_in_bytes", "memory.peak"));
            // Before Linux 6.12 a v2 peak cannot be reset, and such a file cannot be opened for writing.
            let writable = OpenOptions::new().read(true).write(true).open(&peak);
            Ok((usage, writable.or_else(|_| open_to_read(&peak))?))
        };
        match files() {
            Ok((usage, peak)) => {
                Ok(Self { version, path, origin: home.path, usage, peak, is_removed: false })
            }
            Err(error) => {
                // It was made above and nobody knows its name; the error says what matters.
                let _ = fs::remove_dir(&path);
                Err(error)
            }
        }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process with all its threads in. What it has allocated so far stays charged where it was.
    ///
    /// # Errors
    /// When the process is gone or may not be moved.
    pub fn enter(&self, process: ProcessId) -> Result<(), CgroupError> {
        self.write_procs(&self.path, process.get()).map_err(|error| match error {
            CgroupError::Other { source, .. } if is(&source, Errno::SRCH) => CgroupError::NoProcess(process),
            other => other,
        })
    }

    /// Moves this process in; processes it starts from now on are in as well.
    ///
    /// # Errors
    /// When the right is missing.
    pub fn join_self(&self) -> Result<(), CgroupError> {
        self.write_procs(&self.path, 0)
    }

    /// Moves this process back to the cgroup it was in when this one was made. Does nothing when it is not inside.
    ///
    /// # Errors
    /// When the right is missing, or the former cgroup was removed meanwhile.
    pub fn leave_self(&self) -> Result<(), CgroupError> {
        if Home::find()?.path == self.path { self.write_procs(&self.origin, 0) } else { Ok(()) }
    }

    /// 0 stands for the writer.
    fn write_procs(&self, cgroup: &Path, process: u32) -> Result<(), CgroupError> {
        write("move a process to", &cgroup.join("cgroup.procs"), &process.to_string())
    }

    /// The memory charged now. One system call: cheap enough for every few milliseconds.
    ///
    /// # Errors
    /// When the kernel's file cannot be read.
    pub fn used(&self) -> Result<ByteCount, CgroupError> {
        self.read_counter(&self.usage, "its usage")
    }

    /// The most that was ever charged at once: the kernel's own high-water mark, which misses nothing.
    ///
    /// # Errors
    /// When the kernel's file cannot be read.
    pub fn peak(&self) -> Result<ByteCount, CgroupError> {
        self.read_counter(&self.peak, "its peak")
    }

    /// Lets [`MemoryCgroup::peak`] start again from what is charged now.
    ///
    /// # Errors
    /// [`CgroupError::Unsupported`] with cgroup v2 before Linux 6.12.
    pub fn reset_peak(&self) -> Result<(), CgroupError> {
        match self.peak.write_at(b"0\n", 0) {
            Ok(_) => Ok(()),
            // The file could be opened for reading only.
            Err(error) if is(&error, Errno::BADF) || is(&error, Errno::INVAL) => {
                Err(self.unsupported("reset the peak"))
            }
            Err(error) => Err(CgroupError::new("reset the peak of", &self.path, error)),
        }
    }

    /// Sets the most memory it may use. Beyond that the kernel reclaims from it, and kills in it when that is not enough.
    ///
    /// With cgroup v2 lowering the limit below what is in use can kill at once; v1 fails instead.
    ///
    /// # Errors
    /// [`CgroupError::LimitTooLow`] on v1, see above.
    pub fn set_limit(&self, limit: ByteCount) -> Result<(), CgroupError> {
        let file = self.path.join(self.version.pick("memory.limit_in_bytes", "memory.max"));
        write("set the limit in", &file, &limit.0.to_string()).map_err(|error| match (error, self.used()) {
            (CgroupError::Other { source, .. }, Ok(used)) if is(&source, Errno::BUSY) => {
                CgroupError::LimitTooLow { path: self.path.clone(), limit, used }
            }
            (other, _) => other,
        })
    }

    /// Sets how readily the kernel swaps memory of this cgroup.
    ///
    /// # Errors
    /// [`CgroupError::Unsupported`] with cgroup v2, which knows only the host's `vm.swappiness`.
    pub fn set_swappiness(&self, swappiness: Swappiness) -> Result<(), CgroupError> {
        if self.version == Version::V2 {
            return Err(self.unsupported("set a swappiness"));
        }
        write("set", &self.path.join("memory.swappiness"), &swappiness.0.to_string())
    }

    /// The memory by kind.
    ///
    /// # Errors
    /// When the kernel's files cannot be read.
    pub fn stat(&self) -> Result<MemoryStat, CgroupError> {
        let file = self.path.join("memory.stat");
        let text = read(&file)?;
        let required = |name| Self::field(&file, &text, name)?.ok_or_else(|| Self::missing(&file, name));
        Ok(match self.version {
            Version::V1 => MemoryStat {
                anonymous: required("total_rss")?,
                file_cache: required("total_cache")?,
                kernel: self.read_file("memory.kmem.usage_in_bytes")?,
                swapped: Self::field(&file, &text, "total_swap")?,
            },
            Version::V2 => MemoryStat {
                anonymous: required("anon")?,
                file_cache: required("file")?,
                kernel: required("kernel")?,
                swapped: match self.read_file("memory.swap.current") {
                    Ok(swapped) => Some(swapped),
                    Err(CgroupError::Other { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                        None
                    }
                    Err(error) => return Err(error),
                },
            },
        })
    }

    /// How many processes the kernel has killed here because the limit was reached.
    ///
    /// # Errors
    /// When the kernel's file cannot be read.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        let file = self.path.join(self.version.pick("memory.oom_control", "memory.events"));
        let kills = Self::field(&file, &read(&file)?, "oom_kill")?;
        kills.map(|count| count.0).ok_or_else(|| Self::missing(&file, "oom_kill"))
    }

    /// Moves this process out and removes the cgroup. Kills nothing: processes inside must have ended before.
    ///
    /// # Errors
    /// [`CgroupError::NotEmpty`] when something is still inside after a second.
    pub fn remove(mut self) -> Result<(), CgroupError> {
        self.leave_and_remove()
    }

    fn leave_and_remove(&mut self) -> Result<(), CgroupError> {
        if self.is_removed {
            return Ok(());
        }
        self.leave_self()?;
        // One attempt is all: a drop that follows a failed removal would only wait for the same thing again.
        self.is_removed = true;
        for _ in 0..REMOVAL_TRIES {
            match fs::remove_dir(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                // Processes that were just killed or reaped leave a little later than their parent hears of it.
                Err(error) if is(&error, Errno::BUSY) => std::thread::sleep(REMOVAL_PAUSE),
                Err(error) => return Err(CgroupError::new("remove", &self.path, error)),
            }
        }
        let processes = read(&self.path.join("cgroup.procs"))?;
        let processes = processes.lines().filter_map(|line| line.parse().ok()).collect();
        Err(CgroupError::NotEmpty { path: self.path.clone(), processes })
    }

    fn unsupported(&self, action: &'static str) -> CgroupError {
        CgroupError::Unsupported { version: self.version.name(), action }
    }

    fn read_counter(&self, file: &File, expected: &'static str) -> Result<ByteCount, CgroupError> {
        // 20 digits and a newline.
        let mut buffer = [0; 32];
        let length =
            file.read_at(&mut buffer, 0).map_err(|source| CgroupError::new("read", &self.path, source))?;
        parse_count(&self.path, expected, &String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()))
    }

    fn read_file(&self, name: &str) -> Result<ByteCount, CgroupError> {
        let file = self.path.join(name);
        parse_count(&file, "a number", &read(&file)?)
    }

    /// The value of a `name value` line, if there is one.
    fn field(file: &Path, text: &str, name: &str) -> Result<Option<ByteCount>, CgroupError> {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(|value| parse_count(file, "a number", value)).transpose()
    }

    fn missing(file: &Path, field: &str) -> CgroupError {
        let (path, found) = (file.to_owned(), format!("no line {field}"));
        CgroupError::Malformed { path, expected: "what this kernel should write there", found }
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // Whoever wants to know calls `remove`; what stays is found by the next run's `sweep_stale`.
        let _ = self.leave_and_remove();
    }
}

/// Removes the empty cgroups of that prefix whose owners are gone, with empty ones inside, and returns their paths. One that
/// still holds processes is left alone.
///
/// # Errors
/// When there is no place for cgroups, or an empty one cannot be removed.
pub fn sweep_stale(prefix: &str) -> Result<Vec<PathBuf>, CgroupError> {
    check_prefix(prefix)?;
    let home = Home::find()?;
    let parent = home.parent_of_new()?;
    let mut swept = Vec::new();
    for entry in fs::read_dir(parent).map_err(|source| CgroupError::new("list", parent, source))? {
        let entry = entry.map_err(|source| CgroupError::new("list", parent, source))?;
        let Some((owner, started)) = entry.file_name().to_str().and_then(|name| parse_name(prefix, name))
        else {
            continue;
        };
        if procfs::lives(owner, started).map_err(CgroupError::Owner)? {
            continue;
        }
        match remove_with_inner(&entry.path()) {
            Ok(()) => swept.push(entry.path()),
            // Processes are inside, or another sweep was faster.
            Err(error) if is(&error, Errno::BUSY) || error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(CgroupError::new("remove", &entry.path(), error)),
        }
    }
    Ok(swept)
}

/// Removes a cgroup, and first the empty ones inside: the run's guests may have had theirs.
fn remove_with_inner(path: &Path) -> io::Result<()> {
    let is_cgroup = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    for inner in fs::read_dir(path)?.flatten().filter(is_cgroup) {
        // One that stays keeps the outer one.
        let _ = fs::remove_dir(inner.path());
    }
    fs::remove_dir(path)
}

fn check_prefix(prefix: &str) -> Result<(), CgroupError> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let is_good = !prefix.is_empty() && prefix.len() < 100 && prefix.bytes().all(is_plain);
    if is_good { Ok(()) } else { Err(CgroupError::BadName(prefix.to_owned())) }
}

/// The owner and its start time from `PREFIX-PID-START`.
fn parse_name(prefix: &str, name: &str) -> Option<(ProcessId, procfs::StartTime)> {
    procfs::parse_identity(name.strip_prefix(prefix)?.strip_prefix('-')?)
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::new("read", path, source))
}

fn open_to_read(path: &Path) -> Result<File, CgroupError> {
    File::open(path).map_err(|source| CgroupError::new("read", path, source))
}

/// One write to an existing file: a file of this kind takes each write as a command.
fn write(action: &'static str, path: &Path, text: &str) -> Result<(), CgroupError> {
    let file = OpenOptions::new().write(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|e| CgroupError::new(action, path, e))
}

fn parse_count(path: &Path, expected: &'static str, text: &str) -> Result<ByteCount, CgroupError> {
    text.trim().parse().map(ByteCount).map_err(|_| CgroupError::Malformed {
        path: path.to_owned(),
        expected,
        found: text.trim().to_owned(),
    })
}

#[cfg(test)]
pub(crate) mod tests;
