//! Numbers about a process, and the host's memory, from /proc: text enters, counts of bytes leave. Unknown lines are ignored (kernels add
//! them), a missing or unreadable one that was asked for is an error that names it, never a zero.
//!
//! [`maps`] has what a process has mapped, [`nodes`] where it wants its memory, [`program`] what it runs.

pub mod maps;
pub mod nodes;
pub mod program;

use crate::ProcessId;
use plimsoll_types::{ByteCount, PageCount};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A file of /proc could not be read or lacks something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcfsError {
    /// There is no such process.
    #[error("{0} is gone")]
    NoProcess(ProcessId),
    /// The process belongs to somebody else.
    #[error("not permitted to read {file} of {process}: run as its user, or with CAP_SYS_PTRACE")]
    NotPermitted {
        /// The process.
        process: ProcessId,
        /// The file's name.
        file: &'static str,
    },
    /// A line is missing. A process that is exiting has no memory lines.
    #[error("{file} has no field {field}: the process may be exiting, or the kernel too old")]
    Missing {
        /// The file's name.
        file: &'static str,
        /// The line or column.
        field: &'static str,
    },
    /// A line is there and is not what it should be.
    #[error("{file} has {found:?} where {field} should be")]
    Malformed {
        /// The file's name.
        file: &'static str,
        /// The line or column.
        field: &'static str,
        /// What stands there.
        found: String,
    },
    /// Something else failed.
    #[error("reading {file} of {process} failed")]
    Other {
        /// The process.
        process: ProcessId,
        /// The file's name.
        file: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The memory of a process by kind, from smaps_rollup. Exact and slow: the kernel walks all page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmapsRollup {
    /// All resident memory.
    pub rss: ByteCount,
    /// Resident memory, shared pages divided by their sharers.
    pub pss: ByteCount,
    /// The anonymous part of `pss`.
    pub pss_anon: ByteCount,
    /// The part of `pss` that belongs to files.
    pub pss_file: ByteCount,
    /// The part of `pss` that is shared memory (memfd).
    pub pss_shmem: ByteCount,
    /// Resident anonymous memory.
    pub anonymous: ByteCount,
    /// Anonymous memory in huge pages.
    pub anon_huge_pages: ByteCount,
    /// Memory in swap.
    pub swap: ByteCount,
}

/// The memory of a process, from statm: cheap. The kernel updates it in batches per CPU; it can be off by some pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statm {
    /// Address space.
    pub size: PageCount,
    /// Resident pages.
    pub resident: PageCount,
    /// Those of them that belong to files or shared memory.
    pub shared: PageCount,
}

/// What /proc/PID/status says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The most resident memory there ever was (VmHWM).
    pub peak_rss: ByteCount,
    /// Resident memory (VmRSS).
    pub rss: ByteCount,
    /// Memory in swap (VmSwap).
    pub swap: ByteCount,
    /// Memory that may not be reclaimed because the process asked so, or that is charged as such (VmLck).
    pub locked: ByteCount,
    /// Memory that the kernel holds for devices (VmPin).
    pub pinned: ByteCount,
    /// Its page tables (VmPTE).
    pub page_tables: ByteCount,
    /// User ids: real, effective, saved, file system.
    pub uids: [u32; 4],
    /// Group ids: real, effective, saved, file system.
    pub gids: [u32; 4],
    /// Threads.
    pub threads: u32,
}

/// What KSM does with a process, from ksm_stat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KsmStat {
    /// Pages that are merged with others.
    pub merging: PageCount,
    /// Pages that are merged into the shared zero page.
    pub zero: PageCount,
    /// Memory that merging saves this process, less what KSM's own tables for it take: below zero where it does not pay.
    pub profit_bytes: i64,
    /// Whether any memory of it may be merged, as the process asked by madvise or prctl; none where the kernel does not tell
    /// (before 6.16).
    pub mergeable: Option<bool>,
}

/// When a process started, in clock ticks since boot. With the process id it names a process uniquely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StartTime(pub u64);

/// Reads /proc/PID/smaps_rollup. Needs the right to ptrace the process.
pub fn smaps_rollup(process: ProcessId) -> Result<SmapsRollup, ProcfsError> {
    parse_smaps_rollup(&read(process, "smaps_rollup")?)
}

/// Reads /proc/PID/statm.
pub fn statm(process: ProcessId) -> Result<Statm, ProcfsError> {
    parse_statm(&read(process, "statm")?)
}

/// Reads /proc/PID/status.
pub fn status(process: ProcessId) -> Result<Status, ProcfsError> {
    parse_status(&read(process, "status")?)
}

/// Reads the faults of a process that had to wait for a device, swap in memory included, from /proc/PID/stat. All threads
/// count, also those that have ended; what kernel threads fault in on its behalf does not.
pub fn major_faults(process: ProcessId) -> Result<u64, ProcfsError> {
    parse_major_faults(&read(process, "stat")?)
}

/// The same of the thread the process began with, from /proc/PID/task/PID/stat.
pub fn major_faults_of_first_thread(process: ProcessId) -> Result<u64, ProcfsError> {
    let path = path(process, &format!("task/{}/stat", process.get()));
    let bytes = std::fs::read(path).map_err(|source| failed(process, "task/stat", source))?;
    parse_major_faults(&String::from_utf8_lossy(&bytes))
}

/// Reads the start time from /proc/PID/stat.
pub fn start_time(process: ProcessId) -> Result<StartTime, ProcfsError> {
    parse_start_time(&read(process, "stat")?)
}

/// True when the process of that number is still the one that started then.
pub fn lives(process: ProcessId, started: StartTime) -> Result<bool, ProcfsError> {
    match start_time(process) {
        Ok(now) => Ok(now == started),
        Err(ProcfsError::NoProcess(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads /proc/PID/ksm_stat. Needs the right to ptrace the process. A kernel thread has none of it.
pub fn ksm_stat(process: ProcessId) -> Result<KsmStat, ProcfsError> {
    parse_ksm_stat(&read(process, "ksm_stat")?)
}

/// True when any memory of the process may be merged. Where ksm_stat does not tell, all its mappings are looked at, which is
/// slow.
pub fn is_mergeable(process: ProcessId) -> Result<bool, ProcfsError> {
    let known = match ksm_stat(process) {
        Ok(stat) => stat.mergeable,
        // Kernel threads and processes that are exiting have an empty file.
        Err(ProcfsError::Missing { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    match known {
        Some(known) => Ok(known),
        None => Ok(has_mergeable_mapping(&read(process, "smaps")?)),
    }
}

/// Reads the processor time of the process's main thread from schedstat; a kernel thread has no other.
pub fn main_thread_time(process: ProcessId) -> Result<Duration, ProcfsError> {
    let text = read(process, "schedstat")?;
    let (file, field) = ("schedstat", "time on the processor");
    let word = text.split_ascii_whitespace().next().ok_or(ProcfsError::Missing { file, field })?;
    number(file, field, word).map(Duration::from_nanos)
}

fn read(process: ProcessId, file: &'static str) -> Result<String, ProcfsError> {
    // A process may put any bytes into its name, which stands in stat and status.
    let bytes = std::fs::read(path(process, file)).map_err(|source| failed(process, file, source))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn path(process: ProcessId, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{file}", process.get()))
}

fn failed(process: ProcessId, file: &'static str, source: io::Error) -> ProcfsError {
    match (source.kind(), source.raw_os_error()) {
        (io::ErrorKind::NotFound, _) | (_, Some(libc::ESRCH)) => ProcfsError::NoProcess(process),
        (io::ErrorKind::PermissionDenied, _) => ProcfsError::NotPermitted { process, file },
        _ => ProcfsError::Other { process, file, source },
    }
}

/// Parses `PID-START`, which names a process for all time.
pub fn parse_identity(text: &str) -> Option<(ProcessId, StartTime)> {
    let (process, started) = text.split_once('-')?;
    Some((ProcessId::new(process.parse().ok()?)?, StartTime(started.parse().ok()?)))
}

/// Parses a size in the text of /proc/meminfo, where it says one.
pub fn parse_meminfo(text: &str, field: &'static str) -> Option<ByteCount> {
    Lines { file: "meminfo", text }.kib(field).ok()
}

/// Parses the text of a smaps_rollup file.
pub fn parse_smaps_rollup(text: &str) -> Result<SmapsRollup, ProcfsError> {
    let lines = Lines { file: "smaps_rollup", text };
    Ok(SmapsRollup {
        rss: lines.kib("Rss")?,
        pss: lines.kib("Pss")?,
        pss_anon: lines.kib("Pss_Anon")?,
        pss_file: lines.kib("Pss_File")?,
        pss_shmem: lines.kib("Pss_Shmem")?,
        anonymous: lines.kib("Anonymous")?,
        anon_huge_pages: lines.kib("AnonHugePages")?,
        swap: lines.kib("Swap")?,
    })
}

/// Parses the text of a statm file.
pub fn parse_statm(text: &str) -> Result<Statm, ProcfsError> {
    let file = "statm";
    let mut words = text.split_ascii_whitespace();
    let mut next = |field| {
        let word = words.next().ok_or(ProcfsError::Missing { file, field })?;
        number(file, field, word).map(PageCount)
    };
    Ok(Statm { size: next("size")?, resident: next("resident")?, shared: next("shared")? })
}

/// Parses the text of a status file.
pub fn parse_status(text: &str) -> Result<Status, ProcfsError> {
    let lines = Lines { file: "status", text };
    Ok(Status {
        peak_rss: lines.kib("VmHWM")?,
        rss: lines.kib("VmRSS")?,
        swap: lines.kib("VmSwap")?,
        locked: lines.kib("VmLck")?,
        pinned: lines.kib("VmPin")?,
        page_tables: lines.kib("VmPTE")?,
        uids: lines.ids("Uid")?,
        gids: lines.ids("Gid")?,
        threads: lines.parsed("Threads")?,
    })
}

/// Parses the start time in the text of a stat file.
pub fn parse_start_time(text: &str) -> Result<StartTime, ProcfsError> {
    stat_column(text, 22, "starttime").map(StartTime)
}

/// Parses the major faults in the text of a stat file.
pub fn parse_major_faults(text: &str) -> Result<u64, ProcfsError> {
    stat_column(text, 12, "majflt")
}

/// A column of a stat file, counted from 1 as proc(5) does. The name in the second may hold spaces and parentheses, so
/// columns are counted from the last closing one, after which comes the third.
fn stat_column(text: &str, column: usize, field: &'static str) -> Result<u64, ProcfsError> {
    let file = "stat";
    let word = text.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(column - 3));
    number(file, field, word.ok_or(ProcfsError::Missing { file, field })?)
}

/// Parses the text of a ksm_stat file: numbers after a blank, answers after a colon.
pub fn parse_ksm_stat(text: &str) -> Result<KsmStat, ProcfsError> {
    let file = "ksm_stat";
    let word = |field: &'static str| {
        let mut found = text.lines().filter_map(|line| line.split_once([' ', ':']));
        let found = found.find(|(name, _)| *name == field).map(|(_, value)| value.trim());
        found.ok_or(ProcfsError::Missing { file, field })
    };
    let pages = |field| number(file, field, word(field)?).map(PageCount);
    let is_yes = |field| word(field).map(|answer| answer == "yes");
    let profit = word("ksm_process_profit")?;
    Ok(KsmStat {
        merging: pages("ksm_merging_pages")?,
        zero: pages("ksm_zero_pages")?,
        profit_bytes: profit.parse().map_err(|_| ProcfsError::Malformed {
            file,
            field: "ksm_process_profit",
            found: profit.to_owned(),
        })?,
        mergeable: is_yes("ksm_mergeable").ok().map(|is| is || is_yes("ksm_merge_any").unwrap_or(false)),
    })
}

/// True when the text of a smaps file has a mapping with the flag `mg`.
fn has_mergeable_mapping(text: &str) -> bool {
    let flags = text.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.flat_map(str::split_ascii_whitespace).any(|flag| flag == "mg")
}

/// The user and group ids alone, which threads that are exiting have too.
pub(crate) fn parse_ids(text: &str) -> Result<([u32; 4], [u32; 4]), ProcfsError> {
    let lines = Lines { file: "status", text };
    Ok((lines.ids("Uid")?, lines.ids("Gid")?))
}

/// Lines of the form `Name:   value`.
struct Lines<'a> {
    file: &'static str,
    text: &'a str,
}

impl<'a> Lines<'a> {
    fn value(&self, field: &'static str) -> Result<&'a str, ProcfsError> {
        let named = |line: &'a str| line.split_once(':').filter(|(name, _)| *name == field);
        let found = self.text.lines().find_map(named);
        found.map(|(_, value)| value.trim()).ok_or(ProcfsError::Missing { file: self.file, field })
    }

    fn kib(&self, field: &'static str) -> Result<ByteCount, ProcfsError> {
        let value = self.value(field)?;
        let kib = value.strip_suffix("kB").and_then(|digits| digits.trim_end().parse::<u64>().ok());
        kib.and_then(|kib| kib.checked_mul(1024)).map(ByteCount).ok_or_else(|| self.malformed(field, value))
    }

    fn parsed<T: std::str::FromStr>(&self, field: &'static str) -> Result<T, ProcfsError> {
        let value = self.value(field)?;
        value.parse().map_err(|_| self.malformed(field, value))
    }

    fn ids(&self, field: &'static str) -> Result<[u32; 4], ProcfsError> {
        let value = self.value(field)?;
        let ids: Result<Vec<u32>, _> = value.split_ascii_whitespace().map(str::parse).collect();
        ids.ok().and_then(|ids| ids.try_into().ok()).ok_or_else(|| self.malformed(field, value))
    }

    fn malformed(&self, field: &'static str, found: &str) -> ProcfsError {
        ProcfsError::Malformed { file: self.file, field, found: found.to_owned() }
    }
}

fn number(file: &'static str, field: &'static str, word: &str) -> Result<u64, ProcfsError> {
    word.parse().map_err(|_| ProcfsError::Malformed { file, field, found: word.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLLUP: &str = "5600-7ff [rollup]\nRss: 5468 kB\nPss: 1000 kB\nPss_Dirty: 7 kB\nPss_Anon: 600 kB\n\
        Pss_File: 300 kB\nPss_Shmem: 100 kB\nAnonymous: 640 kB\nNewThing: strange\nAnonHugePages: 2048 kB\nSwap: 4 kB\n";

    #[test]
    fn rollups_with_unknown_lines_are_read() {
        let rollup = parse_smaps_rollup(ROLLUP).unwrap();
        assert_eq!(rollup.rss, ByteCount(5468 << 10));
        assert_eq!(rollup.pss_shmem, ByteCount(100 << 10));
        assert_eq!(rollup.anon_huge_pages, ByteCount(2 << 20));
        assert_eq!(rollup.swap, ByteCount(4 << 10));
    }

    #[test]
    fn a_missing_or_strange_line_is_named() {
        let missing = parse_smaps_rollup(&ROLLUP.replace("Swap", "Gone")).unwrap_err();
        assert!(matches!(missing, ProcfsError::Missing { field: "Swap", .. }), "{missing}");
        for bad in ["-4 kB", "4", "4 MB", "99999999999999999999 kB", "18446744073709551615 kB"] {
            let error = parse_smaps_rollup(&ROLLUP.replace("4 kB", bad)).unwrap_err();
            assert!(matches!(error, ProcfsError::Malformed { .. }), "{bad}: {error}");
        }
        assert!(matches!(parse_statm("1 2"), Err(ProcfsError::Missing { field: "shared", .. })));
        assert!(matches!(parse_statm("1 x 3"), Err(ProcfsError::Malformed { field: "resident", .. })));
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_start_time() {
        let columns: Vec<String> = (4..=30).map(|column| column.to_string()).collect();
        let text = format!("17 (evil) 5 (name)) S {}", columns.join(" "));
        assert_eq!(parse_start_time(&text).unwrap(), StartTime(22));
        assert_eq!(parse_major_faults(&text).unwrap(), 12);
        assert!(parse_start_time("17 (short) S 1").is_err());
        assert!(parse_start_time("").is_err());
    }

    #[test]
    fn a_process_is_named_by_its_number_and_its_start_as_long_as_it_lives() {
        let own = ProcessId::own();
        let start = start_time(own).unwrap();
        assert_eq!(parse_identity(&format!("{}-{}", own.get(), start.0)), Some((own, start)));
        assert!(lives(own, start).unwrap());
        assert!(!lives(own, StartTime(start.0 + 1)).unwrap());
        for bad in ["", "17", "17-", "-5", "0-5", "17-5-3", "17-x", "99999999999-5"] {
            assert_eq!(parse_identity(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_size_of_meminfo_is_read_by_its_whole_name() {
        let text = "MemTotal:        8388608 kB\nZswapped:           7000 kB\nHugePages_Total:       0\n";
        assert_eq!(parse_meminfo(text, "MemTotal"), Some(ByteCount::mib(8192)));
        for missing in ["Zswap", "Mem", "HugePages_Total"] {
            assert_eq!(parse_meminfo(text, missing), None, "{missing}");
        }
        assert_eq!(parse_meminfo("MemTotal: 99999999999999999 kB\n", "MemTotal"), None);
    }

    #[test]
    fn what_ksm_does_with_a_process_is_read_from_kernels_that_tell_more_or_less() {
        let old = "ksm_rmap_items 9\nksm_zero_pages 2\nksm_merging_pages 7\nksm_process_profit -640\n";
        let stat = KsmStat { merging: PageCount(7), zero: PageCount(2), profit_bytes: -640, mergeable: None };
        assert_eq!(parse_ksm_stat(old).unwrap(), stat);
        for (any, some, mergeable) in [("no", "no", false), ("no", "yes", true), ("yes", "no", true)] {
            let text = format!("{old}ksm_merge_any: {any}\nksm_mergeable: {some}\n");
            assert_eq!(parse_ksm_stat(&text).unwrap(), KsmStat { mergeable: Some(mergeable), ..stat });
        }
        assert!(matches!(parse_ksm_stat(""), Err(ProcfsError::Missing { .. })));
        assert!(matches!(
            parse_ksm_stat(&old.replace("-640", "a lot")),
            Err(ProcfsError::Malformed { field: "ksm_process_profit", .. })
        ));
        assert!(has_mergeable_mapping("Rss: 4 kB\nVmFlags: rd wr mr mg ac\n"));
        assert!(!has_mergeable_mapping("Name: mg\nVmFlags: rd wr mr ac\n"));
    }

    #[test]
    fn status_gives_ids_and_memory() {
        let text = "Name:\tx: y\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nVmHWM:\t 10 kB\nVmLck:\t 2 kB\nVmPin:\t 1 kB\nVmPTE:\t 4 kB\nVmRSS:\t 9 kB\nVmSwap:\t0 kB\nThreads:\t3\n";
        let status = parse_status(text).unwrap();
        assert_eq!((status.uids, status.gids, status.threads), ([1, 2, 3, 4], [5, 6, 7, 8], 3));
        assert_eq!(status.peak_rss, ByteCount(10 << 10));
        assert_eq!((status.locked, status.pinned), (ByteCount(2 << 10), ByteCount(1 << 10)));
        assert!(matches!(
            parse_status(&text.replace("\t4\n", "\n")),
            Err(ProcfsError::Malformed { field: "Uid", .. })
        ));
    }
}
