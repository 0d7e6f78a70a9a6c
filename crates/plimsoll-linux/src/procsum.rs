//! The memory of several processes, added up from /proc: what to fall back on where no memory cgroup can be made.
//!
//! Process ids enter; a sum and its running peak leave. Nothing is changed in any process, and none is waited for.
//!
//! **What is added up**: `RssAnon + RssShmem + VmPTE` of `/proc/PID/status`: private memory, mapped memfds and page
//! tables. **How it differs from a cgroup's count**, which is the better one:
//!
//! * A memfd page mapped by several processes counts once in each, and a private page shared after fork too: too much.
//! * Kernel memory other than page tables (stacks, socket buffers, KVM's shadow pages), memfd pages that nobody has
//!   mapped, and pages in flight between two mappings are not seen: too little.
//! * Pages of files (programs, libraries) are left out: they are shared with the whole host and can be dropped.
//! * The kernel updates the numbers in batches per CPU: some dozen pages per process and CPU, either way.
//! * The processes are read one after the other, so the sum never was true at one instant, and the peak is the
//!   largest *sample*: what rose and fell between two samples is not in it.
//!
//! A status file takes the kernel 10 us, of a thousand processes 10 ms, many times a second. The much shorter `statm` says whether the
//! process has grown or shrunk; while it has not, the status is read after a second and then ever more rarely, because page tables may have
//! grown.
//!
//! `Pss` (smaps_rollup) would divide shared pages fairly, but it walks every page table under the lock that page
//! faults need: it would slow down what is being measured.

use plimsoll_sys::ProcessId;
use plimsoll_types::ByteCount;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The lines of a status file that are added up.
const COUNTED: [&[u8]; 3] = [b"RssAnon:", b"RssShmem:", b"VmPTE:"];

/// More than a status file has (1.5 KiB, and some digits per supplementary group and per 4 CPUs). A file cut short must
/// not pass for a process without memory, so one that fills the buffer is refused.
const STATUS_SIZE: usize = 32 << 10;

/// More than a statm file has: seven numbers.
const STATM_SIZE: usize = 192;
/// How long a status stands for a process whose statm is the same: at first, and at most while the next says the same.
const STATUS_STANDS: Duration = Duration::from_secs(1);
const STATUS_STANDS_MAX: Duration = Duration::from_secs(8);

/// A process's memory could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessSumError {
    /// There is no such process.
    #[error("{0} does not exist (any more)")]
    NoProcess(ProcessId),
    /// The process is hidden.
    #[error("not permitted to read the status of {0}: run as its user, or without hidepid on /proc")]
    NotPermitted(ProcessId),
    /// A line is not a number of KiB.
    #[error("the status of {process} has {found:?} where a number of kB should be")]
    Malformed {
        /// The process.
        process: ProcessId,
        /// The line.
        found: String,
    },
    /// Something else failed.
    #[error("cannot read the status of {process}")]
    Other {
        /// The process.
        process: ProcessId,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl ProcessSumError {
    fn new(process: ProcessId, source: io::Error) -> Self {
        match source.kind() {
            _ if is_gone(&source) => Self::NoProcess(process),
            io::ErrorKind::PermissionDenied => Self::NotPermitted(process),
            _ => Self::Other { process, source },
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    let no_process = rustix::io::Errno::SRCH.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(no_process)
}

/// An open status file refers to the process it was opened for, never to a later one of the same number.
#[derive(Debug)]
struct Member {
    process: ProcessId,
    status: File,
    statm: File,
    last: Option<Last>,
}

/// What was read of a process, and when.
#[derive(Clone, Copy, Debug)]
struct Last {
    statm: [u8; STATM_SIZE],
    memory: ByteCount,
    when: Instant,
    stands: Duration,
}

impl Member {
    fn open(process: ProcessId) -> Result<Self, ProcessSumError> {
        let open = |name| File::open(format!("/proc/{}/{name}", process.get()));
        let open = |name| open(name).map_err(|source| ProcessSumError::new(process, source));
        Ok(Self { process, status: open("status")?, statm: open("statm")?, last: None })
    }

    /// The memory of the process now, or `None` once it is gone. A zombie has none.
    fn memory(&mut self, now: Instant) -> Result<Option<ByteCount>, ProcessSumError> {
        let mut statm = [0; STATM_SIZE];
        // What is wrong with it, if anything is, shows when its status is read.
        let is_read = self.statm.read_at(&mut statm, 0).is_ok();
        let is_young = |last: &Last| now.duration_since(last.when) < last.stands;
        let stands = |last: &Last| is_read && last.statm == statm && is_young(last);
        if let Some(last) = self.last.filter(stands) {
            return Ok(Some(last.memory));
        }
        let memory = self.status()?;
        let same = self.last.filter(|last| last.statm == statm && Some(last.memory) == memory);
        let stands = same.map_or(STATUS_STANDS, |last| (last.stands * 2).min(STATUS_STANDS_MAX));
        self.last = memory.map(|memory| Last { statm, memory, when: now, stands });
        Ok(memory)
    }

    fn status(&self) -> Result<Option<ByteCount>, ProcessSumError> {
        let mut buffer = [0; STATUS_SIZE];
        match self.status.read_at(&mut buffer, 0) {
            Ok(STATUS_SIZE) => Err(self.malformed(b"more text than a status file should have")),
            Ok(length) => self.parse(buffer.get(..length).unwrap_or_default()).map(Some),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(ProcessSumError::new(self.process, error)),
        }
    }

    fn parse(&self, text: &[u8]) -> Result<ByteCount, ProcessSumError> {
        let mut sum = 0_u64;
        for line in text.split(|byte| *byte == b'\n') {
            let Some(value) = COUNTED.iter().find_map(|name| line.strip_prefix(*name)) else { continue };
            let kib = str::from_utf8(value).ok().and_then(|value| value.trim().strip_suffix("kB"));
            let bytes = kib.and_then(|kib| kib.trim().parse::<u64>().ok()?.checked_mul(1024));
            sum = bytes.and_then(|bytes| sum.checked_add(bytes)).ok_or_else(|| self.malformed(line))?;
        }
        Ok(ByteCount(sum))
    }

    fn malformed(&self, found: &[u8]) -> ProcessSumError {
        let found = String::from_utf8_lossy(found).into_owned();
        ProcessSumError::Malformed { process: self.process, found }
    }
}

/// A set of processes, the memory of which is added up. See the top of this file for what counts.
#[derive(Debug, Default)]
pub struct ProcessSum {
    members: Vec<Member>,
    peak: ByteCount,
}

impl ProcessSum {
    /// The set of these processes.
    ///
    /// # Errors
    /// When one of them is gone or hidden.
    pub fn new(processes: impl IntoIterator<Item = ProcessId>) -> Result<Self, ProcessSumError> {
        let mut set = Self::default();
        for process in processes {
            set.add(process)?;
        }
        Ok(set)
    }

    /// Adds a process; one that is in the set already stays in it once.
    ///
    /// # Errors
    /// When it is gone or hidden.
    pub fn add(&mut self, process: ProcessId) -> Result<(), ProcessSumError> {
        let member = Member::open(process)?;
        // An older member of the same number may have ended: the newly opened file is the one that counts.
        self.remove(process);
        self.members.push(member);
        Ok(())
    }

    /// Takes a process out; the peak keeps what it contributed.
    pub fn remove(&mut self, process: ProcessId) {
        self.members.retain(|member| member.process != process);
    }

    /// The processes in the set. One that ended leaves it at the next sample.
    pub fn processes(&self) -> impl Iterator<Item = ProcessId> {
        self.members.iter().map(|member| member.process)
    }

    /// The sum now. Processes that ended are dropped from the set: they have no memory any more.
    ///
    /// # Errors
    /// When a process that runs cannot be read; the peak is then left as it was.
    pub fn sample(&mut self) -> Result<ByteCount, ProcessSumError> {
        let mut sum = ByteCount(0);
        let mut ended = Vec::new();
        let now = Instant::now();
        for member in &mut self.members {
            match member.memory(now)? {
                Some(memory) => sum = ByteCount(sum.0.saturating_add(memory.0)),
                None => ended.push(member.process),
            }
        }
        self.members.retain(|member| !ended.contains(&member.process));
        self.peak = self.peak.max(sum);
        Ok(sum)
    }

    /// The largest sample so far.
    pub const fn peak(&self) -> ByteCount {
        self.peak
    }
}

/// A child process that plays a part in a test, told what to do line by line: this test program started again.
#[cfg(test)]
pub(crate) mod test_child {
    use crate::uffd::estate::tests::spawn;
    use plimsoll_sys::ProcessId;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, ChildStdout, Command, Stdio};

    const ROLE: &str = "PLIMSOLL_TEST_CHILD_ROLE";

    /// What a child told to hold memory holds.
    pub(crate) const HELD: usize = 64 << 20;

    /// A running child, killed when dropped.
    pub(crate) struct TestChild {
        process: Child,
        output: BufReader<ChildStdout>,
    }

    impl TestChild {
        pub(crate) fn start(role: &str) -> Self {
            // The path without the crate's name is how libtest knows the test.
            let module = module_path!().split_once("::").unwrap().1;
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", &format!("{module}::plays_its_part"), "--nocapture"]).env(ROLE, role);
            let mut process = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
            let output = BufReader::new(process.stdout.take().unwrap());
            Self { process, output }
        }

        pub(crate) fn id(&self) -> ProcessId {
            ProcessId::new(self.process.id()).unwrap()
        }

        /// Sends a line and waits for the answer.
        pub(crate) fn ask(&mut self, order: &str, answer: &str) {
            self.send(order);
            self.expect(answer);
        }

        pub(crate) fn send(&mut self, order: &str) {
            writeln!(self.process.stdin.as_mut().unwrap(), "{order}").unwrap();
        }

        pub(crate) fn expect(&mut self, answer: &str) {
            let mut line = String::new();
            while line.trim() != answer {
                line.clear();
                assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the child ended before {answer:?}");
            }
        }

        /// The next line it says.
        pub(crate) fn line(&mut self) -> String {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            line
        }

        /// Kills it and waits until it is gone.
        pub(crate) fn kill(mut self) {
            self.end();
        }

        /// True when the child ended by itself without a failure.
        pub(crate) fn succeeds(mut self) -> bool {
            drop(self.process.stdin.take());
            self.process.wait().unwrap().success()
        }

        fn end(&mut self) {
            // It may have ended already; what matters is that it has been waited for.
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }

    impl Drop for TestChild {
        fn drop(&mut self) {
            self.end();
        }
    }

    /// In the child: waits for the parent to say `order`.
    pub(crate) fn await_order(order: &str) {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).unwrap();
        assert_eq!(line.trim(), order);
    }

    /// In the child: a line of its own, whatever libtest has printed before it.
    pub(crate) fn answer(text: &str) {
        println!("\n{text}");
        std::io::stdout().flush().unwrap();
    }

    /// 4 KiB pages, each half zeros and half numbers that do not compress and differ from page to page.
    fn fill(memory: &mut [u8]) {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for half in memory.chunks_exact_mut(4096).map(|page| &mut page[..2048]) {
            for word in half.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
        }
    }

    fn hold() {
        await_order("take");
        let mut memory = vec![0; HELD];
        fill(&mut memory);
        answer("taken");
        await_order("check");
        let mut expected = vec![0; HELD];
        fill(&mut expected);
        assert!(memory == expected, "the memory has changed");
        answer("unchanged");
        await_order("end");
    }

    /// Does nothing in an ordinary run: only a [`TestChild`] has a role.
    #[test]
    fn plays_its_part() {
        match std::env::var(ROLE).as_deref() {
            Err(_) => {}
            Ok("hold") => hold(),
            Ok("join") => crate::cgroup::tests::join_and_leave(),
            Ok("abandon-cgroup") => crate::cgroup::tests::abandon(),
            Ok("abandon-swap") => crate::zram::tests::abandon(),
            Ok(role) => panic!("no such role: {role}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::test_child::{HELD, TestChild};
    use super::*;

    #[test]
    fn memory_of_a_process_counts_while_it_lives_and_stays_in_the_peak() {
        let mut child = TestChild::start("hold");
        let mut sum = ProcessSum::new([child.id()]).unwrap();
        let before = sum.sample().unwrap();
        child.ask("take", "taken");
        let held = sum.sample().unwrap();
        let grown = (held - before).0;
        // 2 MiB: page tables and what else the child allocated.
        assert!((HELD as u64..HELD as u64 + (2 << 20)).contains(&grown), "{grown} bytes more");
        child.kill();
        assert_eq!(sum.sample().unwrap(), ByteCount(0));
        assert_eq!(sum.processes().count(), 0, "a process that ended leaves the set");
        assert!(sum.peak() >= held);
    }

    #[test]
    fn the_status_of_a_process_that_has_not_changed_is_read_ever_more_rarely() {
        let mut child = TestChild::start("hold");
        child.ask("take", "taken");
        let (mut member, start) = (Member::open(child.id()).unwrap(), Instant::now());
        // It may not be asleep yet.
        let mut stands_at = |millis: u64| {
            let (start, half) = (start + Duration::from_millis(millis), STATUS_STANDS / 2);
            member.last = None;
            let before = member.memory(start).unwrap();
            (member.memory(start + half).unwrap() == before && member.last.unwrap().when == start)
                .then_some(before)
        };
        let before = (0..1000).find_map(&mut stands_at).expect("a process that does nothing stays as it is");
        let later = start + STATUS_STANDS * 10;
        member.memory(later).unwrap();
        assert_eq!(member.last.unwrap().when, later, "its page tables may have grown");
        assert!(member.last.unwrap().stands > STATUS_STANDS);
        child.ask("check", "unchanged");
        let soon = later + STATUS_STANDS / 2;
        assert!(member.memory(soon).unwrap() > before, "it has grown");
        let last = member.last.unwrap();
        assert_eq!((last.when, last.stands), (soon, STATUS_STANDS));
    }

    #[test]
    fn processes_are_added_once_and_removed() {
        let own = ProcessId::own();
        let mut sum = ProcessSum::new([own, own]).unwrap();
        assert_eq!(sum.processes().collect::<Vec<_>>(), [own]);
        assert!(sum.sample().unwrap() > ByteCount(0));
        sum.remove(own);
        assert_eq!(sum.sample().unwrap(), ByteCount(0));
    }

    #[test]
    fn a_process_that_does_not_exist_is_named() {
        let nobody = ProcessId::new(i32::MAX.cast_unsigned()).unwrap();
        assert!(matches!(ProcessSum::new([nobody]), Err(ProcessSumError::NoProcess(id)) if id == nobody));
    }

    #[test]
    fn a_strange_line_is_an_error_and_unknown_lines_are_not() {
        let member = Member::open(ProcessId::own()).unwrap();
        let text =
            b"Name:\tRssAnon: \xff\nRssAnon:\t 8 kB\nRssFile:\t100 kB\nRssShmem:\t4 kB\nVmPTE:\t4 kB\n";
        assert_eq!(member.parse(text).unwrap(), ByteCount(16 << 10));
        for bad in [&b"VmPTE:\t4 MB\n"[..], b"RssAnon: -1 kB\n", b"RssShmem: 18446744073709551615 kB\n"] {
            assert!(matches!(member.parse(bad), Err(ProcessSumError::Malformed { .. })));
        }
        assert_eq!(member.parse(b"Name:\tzombie\nState:\tZ\n").unwrap(), ByteCount(0));
    }
}
