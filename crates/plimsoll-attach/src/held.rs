//! A process that is looked at: a number enters, and what leaves was all said by one process running one program.
//!
//! A number can pass to another process, and a process can execute another program, between any two reads of /proc. So
//! a pidfd is opened first; what is read afterwards is believed only if that pidfd is still alive at the end (then the
//! number meant this process all along) and the program is still the same (then the mappings are that program's).

use crate::Refusal;
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_sys::pidfd::{Pidfd, PidfdError};
use plimsoll_sys::procfs::maps::{self, MeasuredMapping};
use plimsoll_sys::procfs::program::{self, ElfClass};
use plimsoll_sys::procfs::{self, ProcfsError, StartTime};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::ByteCount;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a look is repeated when the process executes another program meanwhile: a daemon's start-up does it once.
const LOOKS: u32 = 4;

/// How long the kernel may take from the new program to its arguments: it reads a page or two of the file.
const EXEC_TAKES: Duration = Duration::from_millis(2);

/// One process, held by a pidfd.
#[derive(Debug)]
pub struct Held {
    pidfd: Pidfd,
    start: StartTime,
}

/// What a process runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) argv: Vec<String>,
}

/// What /proc said about it at one time.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) program: Program,
    pub(crate) mappings: Vec<MeasuredMapping>,
    pub(crate) files: Vec<String>,
    pub(crate) locked: ByteCount,
    pub(crate) pinned: ByteCount,
}

impl Held {
    /// Takes hold of the process that has the number now.
    pub fn open(process: ProcessId) -> Result<Self, Refusal> {
        let pidfd = match Pidfd::open(process) {
            Ok(pidfd) => pidfd,
            Err(PidfdError::NoProcess(process)) => return Err(Refusal::NoProcess(process.get())),
            // The kernel gives no pidfd of this kind for a thread.
            Err(error) => {
                return Err(match program::thread_group(process) {
                    Ok(group) if group != process => Refusal::Thread { thread: process, process: group },
                    _ => Refusal::Pidfd(error),
                });
            }
        };
        let start = procfs::start_time(process)?;
        let held = Self { pidfd, start };
        held.confirm()?;
        Ok(held)
    }

    /// Takes hold of the process again that had the number and started then.
    pub fn reopen(process: ProcessId, start: StartTime) -> Result<Self, Refusal> {
        let held = Self::open(process)?;
        match held.start == start {
            true => Ok(held),
            false => Err(Refusal::Reused { process, expected: start.0, found: held.start.0 }),
        }
    }

    /// The pidfd.
    pub fn pidfd(&self) -> &Pidfd {
        &self.pidfd
    }

    /// The number.
    pub fn process(&self) -> ProcessId {
        self.pidfd.process()
    }

    /// When it started.
    pub fn start(&self) -> StartTime {
        self.start
    }

    /// Fails unless the process still runs, that is, unless what was read under its number was its own.
    pub fn confirm(&self) -> Result<(), Refusal> {
        match self.pidfd.is_alive().map_err(Refusal::Pidfd)? {
            true => Ok(()),
            false => Err(Refusal::Ended(self.process())),
        }
    }

    /// What it runs now.
    pub(crate) fn program(&self) -> Result<Program, Refusal> {
        let process = self.process();
        if program::stat(process)?.is_kernel_thread() {
            return Err(Refusal::KernelThread(process));
        }
        // In the middle of an exec the program is the new one already and its arguments are not there yet.
        let mut looks = 0;
        loop {
            let read = Program { path: program::executable(process)?, argv: program::arguments(process)? };
            self.confirm()?;
            looks += 1;
            if !read.argv.is_empty() || looks == LOOKS {
                return Ok(read);
            }
            std::thread::sleep(EXEC_TAKES);
        }
    }

    /// Fails for a program whose addresses have not 64 bits.
    pub(crate) fn check_class(&self, program: &Program) -> Result<(), Refusal> {
        match program::elf_class(self.process())? {
            ElfClass::Bits64 => Ok(()),
            ElfClass::Bits32 | ElfClass::Unknown => {
                Err(Refusal::NotSixtyFourBits { process: self.process(), program: program.path.clone() })
            }
        }
    }

    /// All that is needed to judge it.
    pub(crate) fn snapshot(&self) -> Result<Snapshot, Refusal> {
        let process = self.process();
        for _ in 0..LOOKS {
            // It ends with the address space it is of: the same program may run again after another one. Who may not open it may
            // not read the mappings either.
            let space = Pagemap::open(process).ok();
            let program = self.program()?;
            let look = || -> Result<Snapshot, ProcfsError> {
                let status = procfs::status(process)?;
                let (locked, pinned) = (status.locked, status.pinned);
                let (mappings, files) = (maps::smaps(process)?, program::open_files(process)?);
                Ok(Snapshot { program: program.clone(), mappings, files, locked, pinned })
            };
            let seen = look();
            self.confirm()?;
            let is_same = space.is_none_or(|space| space.is_alive().unwrap_or(false));
            if is_same && self.program()? == program {
                return Ok(seen?);
            }
        }
        Err(Refusal::Restless(process))
    }

    /// A path that the process says, as this one can open it: below the other's root (it may be jailed), or below its
    /// working directory.
    pub(crate) fn reach(&self, path: &Path) -> PathBuf {
        let process = self.process().get();
        match path.strip_prefix("/") {
            Ok(relative) => PathBuf::from(format!("/proc/{process}/root")).join(relative),
            Err(_) => PathBuf::from(format!("/proc/{process}/cwd")).join(path),
        }
    }

    /// A number that changes when a mapping of at least `min` comes, goes or changes, or another program runs.
    pub(crate) fn fingerprint(&self, min: ByteCount) -> Result<u64, Refusal> {
        let process = self.process();
        let mut hasher = DefaultHasher::new();
        program::executable(process)?.hash(&mut hasher);
        for mapping in maps::maps(process)?.iter().filter(|mapping| mapping.range.len() >= min) {
            (mapping.range, mapping.access, mapping.inode).hash(&mut hasher);
        }
        self.confirm()?;
        Ok(hasher.finish())
    }

    /// True when every byte of the range is still mapped.
    pub(crate) fn has_mapped(&self, range: HvaRange) -> Result<bool, Refusal> {
        let mut next = range.start();
        for mapping in maps::maps(self.process())? {
            if mapping.range.start() <= next && next < mapping.range.end() {
                next = mapping.range.end();
            }
        }
        Ok(next >= range.end())
    }
}
