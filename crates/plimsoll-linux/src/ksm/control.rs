//! /sys/kernel/mm/ksm: what KSM is told, and what it says.
//!
//! Enters: orders to scan or to stop. Leaves: counters. What must never happen: KSM left running, or set otherwise than it
//! was found, when its [`Ksm`] is gone; or two programs that set it.
//!
//! **Settings** are saved before the first change, in memory and in `/run/plimsoll/ksm`, whose maker holds a lock on it, as
//! with zram's records: one whose lock can be taken belongs to a program that was killed, and the next to come restores
//! what it says. In order: the advisor off, or the kernel refuses a scan rate; the rate; the advisor; whether it runs. While
//! the advisor is on, the rate is the advisor's and is not restored. What was merged stays merged: it costs
//! nothing any more.
use crate::zram::{RECORDS, RecordsLock, ZramError};
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::{self, ProcfsError};
use plimsoll_types::PageCount;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

const FOLDER: &str = "/sys/kernel/mm/ksm";
/// The file of that name in [`RECORDS`].
const RECORD: &str = "ksm";
/// Every setting that is changed here.
const SETTINGS: [&str; 4] = ["advisor_mode", "pages_to_scan", "sleep_millisecs", "run"];
/// The advisor that leaves everything to others.
const NO_ADVISOR: &str = "none";

/// KSM could not be set or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The kernel has none, or is too old.
    #[error("no {0:?}: this needs Linux 6.8 with CONFIG_KSM")]
    NoKsm(PathBuf),
    /// KSM runs, and nothing of ours had it run.
    #[error(
        "KSM is running already, driven by {0}: stop that first (and `echo 0 > {FOLDER}/run`), or say that it may be \
         taken over"
    )]
    Driven(Driver),
    /// Another program of ours has it.
    #[error("another plimsoll guides KSM on this host: end that one first")]
    Guided,
    /// A right is missing.
    #[error("not permitted to change {0:?}: run as root")]
    NotPermitted(PathBuf),
    /// The settings could not be put on record.
    #[error("KSM's settings cannot be put on record")]
    Record(#[from] ZramError),
    /// ksmd's processor time cannot be read.
    #[error("ksmd's processor time cannot be read")]
    Time(#[from] ProcfsError),
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

impl ControlError {
    fn new(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NoKsm(path),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::NotPermitted(path),
            _ => Self::Other { action, path, source },
        }
    }
}

/// Who has KSM run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The kernel's own advisor, of this mode.
    Advisor(String),
    /// The ksmtuned daemon; it may have stopped KSM for the moment.
    Ksmtuned(ProcessId),
    /// Somebody who wrote 1 into `run`.
    Unknown,
}

impl std::fmt::Display for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Advisor(mode) => write!(f, "the kernel's {mode} advisor"),
            Self::Ksmtuned(process) => write!(f, "ksmtuned ({process})"),
            Self::Unknown => f.write_str("somebody unknown"),
        }
    }
}

/// Whether KSM may be taken from whoever drives it. It is given back as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takeover {
    /// Only if nobody does.
    IfIdle,
    /// Whoever does. A daemon that goes on setting it is not stopped.
    FromWhoever,
}

/// How fast ksmd scans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Pages looked at between two sleeps.
    pub pages: u32,
    /// How long it sleeps, in milliseconds.
    pub sleep_ms: u32,
}

/// What KSM has done, on the whole host and since it was booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages looked at.
    pub scanned: PageCount,
    /// Times that all that is mergeable has been looked at.
    pub full_scans: u64,
    /// Pages that others are merged into.
    pub shared: PageCount,
    /// Pages merged into those, and so saved.
    pub sharing: PageCount,
    /// Pages merged into the zero page (where `use_zero_pages` is on), and so saved.
    pub zero: PageCount,
    /// Pages that have not found their like.
    pub unshared: PageCount,
    /// Pages that change too often.
    pub volatile: PageCount,
    /// Bytes saved, less KSM's own tables.
    pub profit_bytes: i64,
    /// Processor time of ksmd.
    pub cpu: Duration,
}

impl Counters {
    /// Pages that would be in use without KSM.
    pub fn saved(&self) -> PageCount {
        self.sharing + self.zero
    }
}

/// The settings as they were found, in the order of [`SETTINGS`].
#[derive(Clone, Debug, PartialEq, Eq)]
struct Saved([String; SETTINGS.len()]);

impl Saved {
    fn of_now() -> Result<Self, ControlError> {
        let mut values = SETTINGS.map(|_| String::new());
        for (value, name) in values.iter_mut().zip(SETTINGS) {
            *value = get(name)?;
        }
        Ok(Self(values))
    }

    /// One `name value` line each, and a last one without which the record was cut short.
    fn text(&self) -> String {
        let lines = SETTINGS.iter().zip(&self.0).map(|(name, value)| format!("{name} {value}\n"));
        lines.chain([format!("pid {}\n", std::process::id())]).collect()
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name| text.lines().find_map(|line: &str| line.strip_prefix(name)?.strip_prefix(' '));
        field("pid")?;
        let mut values = SETTINGS.map(|_| String::new());
        for (value, name) in values.iter_mut().zip(SETTINGS) {
            *value = field(name)?.to_owned();
        }
        Some(Self(values))
    }

    fn restore(&self) -> Result<(), ControlError> {
        let Self([advisor, pages, sleep, run]) = self;
        set("advisor_mode", NO_ADVISOR)?;
        set("sleep_millisecs", sleep)?;
        if advisor == NO_ADVISOR {
            set("pages_to_scan", pages)?;
        } else {
            set("advisor_mode", advisor)?;
        }
        set("run", run)
    }

    fn driver(&self) -> Result<Option<Driver>, ControlError> {
        if let Some(process) = find_process("ksmtuned")? {
            return Ok(Some(Driver::Ksmtuned(process)));
        }
        let Self([advisor, _, _, run]) = self;
        Ok(match (run.as_str(), advisor.as_str()) {
            ("1", NO_ADVISOR) => Some(Driver::Unknown),
            ("1", _) => Some(Driver::Advisor(advisor.clone())),
            _ => None,
        })
    }
}

/// The right to drive KSM. Dropping it gives KSM back as it was found.
#[derive(Debug)]
pub struct Ksm {
    saved: Saved,
    ksmd: ProcessId,
    /// None while ksmd rests.
    rate: Option<Rate>,
    /// Open for as long as KSM is ours: it carries the lock.
    record: Option<File>,
}

impl Ksm {
    /// Saves the settings, stops KSM and turns the advisor off. What a killed program left is restored first.
    ///
    /// # Errors
    /// Nothing is changed. The message says who drives KSM, or what is missing.
    pub fn take(takeover: Takeover) -> Result<Self, ControlError> {
        let lock = RecordsLock::take()?;
        restore_stale(&lock)?;
        let saved = Saved::of_now()?;
        if let (Takeover::IfIdle, Some(driver)) = (takeover, saved.driver()?) {
            return Err(ControlError::Driven(driver));
        }
        let no_thread = || ControlError::NoKsm("/proc/*/comm of ksmd".into());
        let ksmd = find_process("ksmd")?.ok_or_else(no_thread)?;
        let record = write_record(&saved)?;
        // From here on dropping it restores.
        let mut ksm = Self { saved, ksmd, rate: None, record: Some(record) };
        ksm.stop()?;
        set("advisor_mode", NO_ADVISOR)?;
        Ok(ksm)
    }

    /// Has ksmd scan at this rate. Costs nothing where that is what it does: a write to `run` waits, spinning, for ksmd to go
    /// to sleep.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn run(&mut self, rate: Rate) -> Result<(), ControlError> {
        if self.rate == Some(rate) {
            return Ok(());
        }
        set("pages_to_scan", &rate.pages.to_string())?;
        set("sleep_millisecs", &rate.sleep_ms.to_string())?;
        if self.rate.is_none() {
            set("run", "1")?;
        }
        self.rate = Some(rate);
        Ok(())
    }

    /// Has ksmd rest once it is through the pages between two sleeps. What is merged stays so.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn stop(&mut self) -> Result<(), ControlError> {
        self.rate = None;
        set("run", "0")
    }

    /// Gives every merged page of the host its own memory again, and waits for it.
    ///
    /// # Errors
    /// [`ControlError`], also when memory does not suffice.
    pub fn unmerge_all(&mut self) -> Result<(), ControlError> {
        set("run", "2")?;
        self.stop()
    }

    /// What KSM says now.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn counters(&self) -> Result<Counters, ControlError> {
        let pages = |name| number(name).map(PageCount);
        Ok(Counters {
            scanned: pages("pages_scanned")?,
            full_scans: number("full_scans")?,
            shared: pages("pages_shared")?,
            sharing: pages("pages_sharing")?,
            zero: pages("ksm_zero_pages")?,
            unshared: pages("pages_unshared")?,
            volatile: pages("pages_volatile")?,
            profit_bytes: number("general_profit")?,
            cpu: procfs::main_thread_time(self.ksmd)?,
        })
    }

    /// Gives KSM back as it was found.
    ///
    /// # Errors
    /// Settings that could not be restored stay on record, for the next [`take`](Self::take).
    pub fn restore(mut self) -> Result<(), ControlError> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), ControlError> {
        let Some(_record) = self.record.take() else { return Ok(()) };
        let _lock = RecordsLock::take()?;
        self.saved.restore()?;
        remove_record()
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        // Whoever wants to know calls `restore`; what could not be restored stays on record.
        let _ = self.give_back();
    }
}

/// Restores the settings that a killed program changed; true if there were any.
///
/// # Errors
/// [`ControlError`]; the record stays.
pub fn sweep_stale() -> Result<bool, ControlError> {
    if !record_path().exists() {
        return Ok(false);
    }
    restore_stale(&RecordsLock::take()?)
}

fn restore_stale(_lock: &RecordsLock) -> Result<bool, ControlError> {
    let path = record_path();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(ControlError::new("read", path, error)),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(ControlError::Guided),
        Err(TryLockError::Error(source)) => return Err(ControlError::new("lock", path, source)),
    }
    let text = fs::read_to_string(&path).map_err(|source| ControlError::new("read", &path, source))?;
    // One that was cut short was so before anything was changed.
    if let Some(saved) = Saved::parse(&text) {
        saved.restore()?;
    }
    remove_record()?;
    Ok(true)
}

fn record_path() -> PathBuf {
    Path::new(RECORDS).join(RECORD)
}

/// Writes the record and locks it, before anything it tells of is changed.
fn write_record(saved: &Saved) -> Result<File, ControlError> {
    let path = record_path();
    let record = OpenOptions::new().write(true).create_new(true).open(&path);
    let mut record = record.map_err(|source| ControlError::new("create", &path, source))?;
    let written = match record.try_lock() {
        Ok(()) => record.write_all(saved.text().as_bytes()),
        Err(error) => Err(error.into()),
    };
    written.map_err(|source| ControlError::new("write", &path, source))?;
    Ok(record)
}

fn remove_record() -> Result<(), ControlError> {
    let path = record_path();
    fs::remove_file(&path).map_err(|source| ControlError::new("delete", path, source))
}

/// The oldest process of that name. ksmd is a child of kthreadd, which no other program of its name is.
fn find_process(name: &'static str) -> Result<Option<ProcessId>, ControlError> {
    let entries = fs::read_dir("/proc").map_err(|source| ControlError::new("list", "/proc", source))?;
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_named = |number: &u32| {
        let comm = fs::read_to_string(format!("/proc/{number}/comm"));
        let is_kernels = fs::read_link(format!("/proc/{number}/exe")).is_err();
        comm.is_ok_and(|comm| comm.trim_end() == name) && (name != "ksmd" || is_kernels)
    };
    Ok(numbers.filter(is_named).min().and_then(ProcessId::new))
}

fn path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// A setting's or a counter's text; of a choice, what is chosen.
fn get(name: &str) -> Result<String, ControlError> {
    let path = path(name);
    let text = fs::read_to_string(&path).map_err(|source| ControlError::new("read", path, source))?;
    Ok(chosen(&text).to_owned())
}

/// `[this] that`, or the text itself.
fn chosen(text: &str) -> &str {
    let marked = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    marked.map_or(text.trim(), |(chosen, _)| chosen)
}

fn number<T: std::str::FromStr>(name: &str) -> Result<T, ControlError> {
    let text = get(name)?;
    let malformed =
        |_| ControlError::Malformed { path: path(name), expected: "a number", found: text.clone() };
    text.parse().map_err(malformed)
}

fn set(name: &str, value: &str) -> Result<(), ControlError> {
    let path = path(name);
    // Not `create`: sysfs has the file or the kernel has no such setting.
    let file = OpenOptions::new().write(true).open(&path);
    file.and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| ControlError::new("set", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_gives_back_what_it_was_made_of_and_none_of_a_part_of_it() {
        let saved = Saved(["scan-time", "100", "20", "0"].map(str::to_owned));
        let text = saved.text();
        assert_eq!(Saved::parse(&text), Some(saved));
        for cut in 0..text.trim_end().len() - std::process::id().to_string().len() {
            assert_eq!(Saved::parse(&text[..cut]), None, "{:?}", &text[..cut]);
        }
    }

    #[test]
    fn of_a_choice_what_is_chosen_is_read() {
        assert_eq!(chosen("none [scan-time]\n"), "scan-time");
        assert_eq!(chosen("[none] scan-time\n"), "none");
        assert_eq!(chosen("-640\n"), "-640");
    }
}
