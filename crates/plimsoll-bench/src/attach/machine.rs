//! A synthetic machine: this program again, under the name of a VMM, with memory of known contents and nothing to do.
//!
//! Enters: which of them it is, and how large. Leaves: memory that looks like a guest's from outside, and whether it still
//! holds what it must. What must never happen: one that outlives the benchmark; so whoever drops a [`Machine`] ends it,
//! and it dies with the thread that started it.
//!
//! A VMM is told by its program's name and its arguments (`plimsoll_attach`), so the program is linked under that name.
use crate::contents::{MIX, POOL_PAGES, SEED};
use anyhow::{Context, Result, bail, ensure};
use plimsoll_attach::Held;
use plimsoll_guest::PAGE_WORDS;
use plimsoll_guest::content::Content;
use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process::{Signal, end_with_parent};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::Duration;

/// The first argument of a process that is to be a machine. What follows is for it as it is for QEMU: `-m MIB`.
const ROLE: &str = "be-a-machine";
/// What it is asked once it has said where its memory is; it answers with the number of wrong pages.
const VERIFY: &str = "verify";
/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// A page that only its first write has made.
const VERSION: u32 = 1;

/// Becomes a machine, if that is what this process was started for.
pub(crate) fn role() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [ROLE, number, "-m", mib] = words[..] else { return None };
    Some(match be_a_machine(number, mib) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("machine: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn be_a_machine(number: &str, mib: &str) -> Result<()> {
    let memory = AnonymousMapping::new(ByteCount::mib(mib.parse()?), HugePages::Never)?;
    let content = Content::new(SEED ^ number.parse::<u64>()?, SEED, POOL_PAGES, MIX)?;
    let pages = memory.len().pages_floor().0;
    let (mut words, mut found) = ([0; PAGE_WORDS], [0; PAGE_SIZE]);
    let expected = |page, words: &mut _| {
        content.fill(page, VERSION, words);
        let mut bytes = [0; PAGE_SIZE];
        for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(&*words) {
            *bytes = u64::to_ne_bytes(*word);
        }
        bytes
    };
    for page in 0..pages {
        memory.copy_into(ByteCount(page * PAGE_SIZE as u64), &expected(page, &mut words))?;
    }
    let mut socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    writeln!(socket, "{}", memory.base().0)?;
    let mut lines = BufReader::new(socket.try_clone()?).lines();
    while let Some(line) = lines.next().transpose()? {
        ensure!(line == VERIFY, "no such request: {line}");
        let mut wrong = 0_u64;
        for page in 0..pages {
            memory.copy_from(ByteCount(page * PAGE_SIZE as u64), &mut found)?;
            wrong += u64::from(found != expected(page, &mut words));
        }
        writeln!(socket, "{wrong}")?;
    }
    Ok(())
}

/// This program under the name of a VMM, in a folder beside it. What a killed run has left is taken over.
pub(super) struct Disguise(PathBuf);

impl Disguise {
    /// Links it there.
    pub(super) fn new() -> Result<Self> {
        let own = std::env::current_exe().context("cannot find this program")?;
        let disguise = Self(own.with_file_name("plimsoll-bench-machines"));
        let remove = || match fs::remove_dir_all(&disguise.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        let make = || fs::hard_link(&own, disguise.program());
        remove().and_then(|()| fs::create_dir(&disguise.0)).and_then(|()| make()).with_context(|| {
            format!("cannot give this program the name of a VMM in {}", disguise.0.display())
        })?;
        Ok(disguise)
    }

    /// The program.
    pub(super) fn program(&self) -> PathBuf {
        self.0.join("qemu-system-x86_64")
    }
}

impl Drop for Disguise {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Such a process.
pub(super) struct Machine {
    child: Child,
    pidfd: Pidfd,
    socket: BufReader<UnixStream>,
    memory: HvaRange,
}

impl Machine {
    /// Starts so many of that size at once, and waits until their memory is filled.
    pub(super) fn start_many(disguise: &Disguise, count: u64, size: ByteCount) -> Result<Vec<Self>> {
        let program = disguise.program();
        let mut started = (0..count)
            .map(|number| Self::launch(&program, number, size))
            .collect::<Result<Vec<_>>>()
            .context("cannot start a machine")?;
        for machine in &mut started {
            let base = machine.line()?.parse().context("a machine said something unexpected")?;
            machine.memory = HvaRange::new(Hva(base), size).context("a machine's memory cannot be")?;
        }
        Ok(started)
    }

    /// Starts one.
    pub(super) fn start(disguise: &Disguise, size: ByteCount) -> Result<Self> {
        Self::start_many(disguise, 1, size)?.pop().context("no machine was started")
    }

    fn launch(program: &Path, number: u64, size: ByteCount) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        let mut command = Command::new(program);
        command.args([ROLE, &number.to_string(), "-m", &(size.0 / ByteCount::mib(1).0).to_string()]);
        end_with_parent(&mut command, Signal::KILL);
        // Signals of the terminal are for this process, which ends the others itself.
        let mut child = command.process_group(0).stdin(OwnedFd::from(theirs)).spawn()?;
        let pidfd = Pidfd::from_child(&mut child).inspect_err(|_| {
            let _ = child.kill();
        })?;
        let memory = HvaRange::new(Hva(0), ByteCount(0)).context("no range")?;
        Ok(Self { child, pidfd, socket: BufReader::new(ours), memory })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.socket.read_line(&mut line).context("a machine does not answer")?;
        ensure!(line.ends_with('\n'), "a machine ended");
        Ok(line.trim_end().to_owned())
    }

    /// Its process.
    pub(super) const fn pidfd(&self) -> &Pidfd {
        &self.pidfd
    }

    pub(super) const fn process(&self) -> ProcessId {
        self.pidfd.process()
    }

    /// A hold on it.
    pub(super) fn held(&self) -> Result<Held> {
        Ok(Held::open(self.process())?)
    }

    pub(super) const fn memory(&self) -> HvaRange {
        self.memory
    }

    /// How many of its pages are in memory.
    pub(super) fn present(&self) -> Result<u64> {
        let mut entries = Vec::new();
        Pagemap::open(self.process())?.read(self.memory, &mut entries)?;
        Ok(entries.iter().filter(|entry| entry.contains(Entry::PRESENT)).count() as u64)
    }

    /// Has all of them compare every page with what it must be, at once.
    pub(super) fn verify(machines: &mut [Self]) -> Result<()> {
        for machine in &mut *machines {
            writeln!(machine.socket.get_mut(), "{VERIFY}").context("cannot ask a machine")?;
        }
        for machine in machines {
            match machine.line()?.as_str() {
                "0" => {}
                wrong => bail!("{wrong} pages of a machine hold wrong bytes: the numbers mean nothing"),
            }
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
