//! A process whose memory is partly what another's is: this program in another role.
//!
//! Enters: which of them it is. Leaves: memory with known contents, marked and changed when asked. What must never happen:
//! one that outlives the benchmark; so whoever drops a [`Sharer`] ends it, and it dies with the thread that started it.
//!
//! Of six blocks two hold what two of the partner's hold, in another order and elsewhere; three are unique; one is
//! rewritten in every round. A quarter of the shared ones become so only in round [`WAVE`].
use anyhow::{Context, Result, bail};
use plimsoll_sys::mapping::{AnonymousMapping, HugePages, Merging};
use plimsoll_sys::process::{Signal, set_parent_death_signal};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, Hva, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ExitCode};
use std::time::Duration;

/// The first argument of a process that is to be a sharer.
const ROLE: &str = "be-a-sharer";
/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Blocks of a process: 128 MiB.
pub(super) const BLOCKS: u64 = 64;
/// The round in which the last quarter of the shared blocks comes to be shared.
pub(super) const WAVE: u64 = 4;
const PAGES: u64 = BLOCK_PAGES as u64;
/// Pages that stay together: 64 KiB, as a file's pages lie in a guest's cache.
const RUN: u64 = 16;

/// What a sharer is asked. It answers with an error's text, or none.
#[derive(Serialize, Deserialize)]
enum Ask {
    /// To mark bytes of its memory from an offset on.
    Mark { offset: u64, bytes: u64, is_offered: bool },
    /// To make its memory what it is in a round.
    Change { round: u64 },
    /// To compare its memory with what it must be in a round.
    Verify { round: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Shared,
    Unique,
    Volatile,
}

const fn kind(block: u64) -> Kind {
    match block % 6 {
        0 | 1 => Kind::Shared,
        2..=4 => Kind::Unique,
        _ => Kind::Volatile,
    }
}

/// Shared blocks by number, so that a block of a process can be found in its partner.
const fn shared_number(block: u64) -> u64 {
    block / 6 * 2 + block % 6
}

/// How many blocks of a process are shared in a round.
pub(super) fn shared_blocks(round: u64) -> u64 {
    let shared = (0..BLOCKS).filter(|block| kind(*block) == Kind::Shared).map(shared_number);
    shared.filter(|number| round >= WAVE || !is_late(*number)).count() as u64
}

const fn is_late(number: u64) -> bool {
    number % 4 == 3
}

/// What a page holds: pages of equal seeds are equal.
fn seed(process: u64, page: u64, round: u64) -> u64 {
    let (block, in_block) = (page / PAGES, page % PAGES);
    let own = (process + 1) << 40 | page;
    match kind(block) {
        Kind::Unique => own,
        Kind::Volatile => own | round << 24,
        Kind::Shared => {
            let count = (0..BLOCKS).filter(|block| kind(*block) == Kind::Shared).count() as u64;
            // The second of a pair has them in another order.
            let turn = process % 2;
            let number = (shared_number(block) + 4 * turn) % count;
            if is_late(number) && round < WAVE {
                return own;
            }
            let run = in_block / RUN;
            let run = if turn == 0 { run } else { (run * 7 + 3) % (PAGES / RUN) };
            (1 << 60) + ((process / 2) << 40) + number * PAGES + run * RUN + in_block % RUN
        }
    }
}

fn fill(seed: u64, page: &mut [u8; PAGE_SIZE]) {
    let start = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for (word, at) in page.as_chunks_mut().0.iter_mut().zip(1..) {
        let mixed: u64 = (start ^ start >> 29).wrapping_mul(at * 2 + 1);
        *word = (mixed ^ mixed >> 32).to_le_bytes();
    }
}

/// Becomes a sharer, if that is what this process was started for. Its questions come over the standard input.
pub(crate) fn role() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(ROLE) {
        return None;
    }
    Some(match be_a_sharer(arguments.next(), arguments.next()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sharer: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn be_a_sharer(process: Option<String>, parent: Option<String>) -> Result<()> {
    let process: u64 = process.context("which of them am I?")?.parse()?;
    let parent = ProcessId::new(parent.context("whose am I?")?.parse()?).context("no parent")?;
    set_parent_death_signal(parent, Signal::KILL)?;
    let memory = AnonymousMapping::new(ByteCount(BLOCKS * BLOCK_SIZE as u64), HugePages::Never)?;
    let mut buffer = [0; PAGE_SIZE];
    let mut seeds = vec![0; usize::try_from(BLOCKS * PAGES)?];
    let change = |seeds: &mut [u64], buffer: &mut [u8; PAGE_SIZE], round| -> Result<()> {
        for (page, old) in (0..).zip(seeds) {
            let new = seed(process, page, round);
            if std::mem::replace(old, new) != new {
                fill(new, buffer);
                memory.copy_into(ByteCount(page * PAGE_SIZE as u64), buffer)?;
            }
        }
        Ok(())
    };
    change(&mut seeds, &mut buffer, 0)?;
    let mut socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    writeln!(socket, "{}", memory.base().0)?;
    let mut lines = BufReader::new(socket.try_clone()?).lines();
    while let Some(line) = lines.next().transpose()? {
        let done = match serde_json::from_str(&line)? {
            Ask::Mark { offset, bytes, is_offered } => mark(&memory, offset, bytes, is_offered),
            Ask::Change { round } => change(&mut seeds, &mut buffer, round),
            Ask::Verify { round } => verify(&memory, process, round),
        };
        let answer = serde_json::to_string(&done.err().map(|error| format!("{error:#}")))?;
        writeln!(socket, "{answer}")?;
    }
    Ok(())
}

fn mark(memory: &AnonymousMapping, offset: u64, bytes: u64, is_offered: bool) -> Result<()> {
    let start = memory.base().checked_add(offset).context("no such offset")?;
    let range = HvaRange::new(start, ByteCount(bytes)).context("no such range")?;
    let merging = if is_offered { Merging::Offered } else { Merging::Withdrawn };
    Ok(memory.advise_merging(range, merging)?)
}

fn verify(memory: &AnonymousMapping, process: u64, round: u64) -> Result<()> {
    let (mut found, mut expected) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    for page in 0..BLOCKS * PAGES {
        memory.copy_from(ByteCount(page * PAGE_SIZE as u64), &mut found)?;
        fill(seed(process, page, round), &mut expected);
        if found != expected {
            bail!("page {page} of sharer {process} holds wrong bytes: the numbers mean nothing");
        }
    }
    Ok(())
}

/// Such a process.
pub(super) struct Sharer {
    child: Child,
    process: ProcessId,
    socket: BufReader<UnixStream>,
    memory: HvaRange,
}

impl Sharer {
    /// Starts one and waits until its memory is filled.
    pub(super) fn start(number: u64) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.args([ROLE, &number.to_string(), &std::process::id().to_string()]);
        // Signals of the terminal are for this process, which ends the others itself.
        let child = command.process_group(0).stdin(OwnedFd::from(theirs)).spawn()?;
        let process = ProcessId::new(child.id()).context("a child without a number")?;
        let nowhere = HvaRange::new(Hva(0), ByteCount(0)).context("no range")?;
        let mut sharer = Self { child, process, socket: BufReader::new(ours), memory: nowhere };
        let base = sharer.line()?.trim().parse().context("a sharer said something unexpected")?;
        let memory = HvaRange::new(Hva(base), ByteCount(BLOCKS * BLOCK_SIZE as u64));
        sharer.memory = memory.context("a sharer's memory cannot be")?;
        Ok(sharer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.socket.read_line(&mut line).context("a sharer does not answer")?;
        if line.is_empty() {
            bail!("a sharer ended");
        }
        Ok(line)
    }

    fn ask(&mut self, ask: &Ask) -> Result<()> {
        writeln!(self.socket.get_mut(), "{}", serde_json::to_string(ask)?).context("cannot ask a sharer")?;
        match serde_json::from_str(&self.line()?)? {
            None => Ok(()),
            Some(why) => bail!("a sharer could not do as it was asked: {why}", why = String::as_str(&why)),
        }
    }

    /// Marks a part of its memory.
    pub(super) fn mark(&mut self, range: HvaRange, merging: Merging) -> Result<()> {
        let offset = range.start().0.checked_sub(self.memory.start().0).context("not its memory")?;
        self.ask(&Ask::Mark { offset, bytes: range.len().0, is_offered: merging == Merging::Offered })
    }

    /// Makes its memory what it is in a round.
    pub(super) fn change(&mut self, round: u64) -> Result<()> {
        self.ask(&Ask::Change { round })
    }

    /// Compares its memory with what it must be in a round.
    pub(super) fn verify(&mut self, round: u64) -> Result<()> {
        self.ask(&Ask::Verify { round })
    }

    pub(super) const fn process(&self) -> ProcessId {
        self.process
    }

    pub(super) const fn memory(&self) -> HvaRange {
        self.memory
    }
}

impl Drop for Sharer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
