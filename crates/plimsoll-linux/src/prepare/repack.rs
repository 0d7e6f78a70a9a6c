//! Packing more densely what lies cold in the zram device that `host prepare` made. The kernel can do that, and never does by itself.
//!
//! The record and the time enter; idle marks and passes of recompression leave. What must never happen here:
//!
//! * a word to a device that is not on record as prepared in this boot, or is not in use as it was set up;
//! * two processes at it: the marks of one would cut short the rest that the other gives them. So one holds a lock on the record's
//!   file, until it ends, however it ends;
//! * more than a twentieth of a processor;
//! * a guest that waits for it. A call walks over the whole device, and a process that is killed ends no sooner than the call it is
//!   in; so this is no job of the daemon's manager, whose end guests wait for.
//!
//! **A round** marks all pages idle, and the kernel takes the mark from each that is used. What is idle still after a [`REST`] is
//! compressed with the second algorithm, [`PASS`] pages at a time, until [`VAIN_MAX`] passes one after the other made nothing
//! smaller, or a minute is over.
//!
//! Known holes:
//!
//! * Whose a device is, is looked at just before each command, not with it. Undoing and somebody else's adding a device of the
//!   same number in between, two system calls apart, would give that device one command.
//! * Whoever may read the record can hold a lock on it, too, and so keep this from happening.
use super::change::{Change, Setting};
use super::record::{Claim, Place, Record, Stage as RecordStage};
use super::undo::{Verdict, judge};
use super::{PrepareError, boot_id};
use crate::explain;
use crate::system::{Linux, System};
use crate::zram::{Disk, IdleSince, Recompress, ZramError, swap_areas};
use plimsoll_types::PageCount;
use rustix::io::Errno;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a page lies unused before it is cold: as long as in the store.
pub(super) const REST: Duration = Duration::from_secs(60);
/// How long passes follow one another in a round.
pub(super) const PASSES: Duration = Duration::from_secs(60);
/// Between two passes at least.
pub(super) const PAUSE: Duration = Duration::from_secs(1);
/// A rest of so many times what a call took follows it.
pub(super) const PAUSE_PER_WORK: u32 = 19;
/// Pages of one pass: some 30 us each, as in the store, and the kernel's walk over the device.
pub(super) const PASS: PageCount = PageCount(1024);
/// Passes in vain that end a round. The largest pages come first (since Linux 6.13), which may be those that nothing makes smaller.
pub(super) const VAIN_MAX: u32 = 8;
/// The first kernel whose recompression can be limited. Earlier ones read the limit over and go on to the device's end.
const LIMITED_SINCE: (u32, u32) = (6, 10);

/// Where a round is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing is marked.
    Unmarked,
    /// Pages were marked then. So many passes since the last that made anything smaller were in vain.
    Marked { at: Instant, in_vain: u32 },
}

/// What follows a turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another one, then.
    At(Instant),
    /// None: this is why.
    Ended(String),
}

/// The rounds, over whatever kernel and at whatever time.
pub(super) struct Repacker<'a> {
    system: &'a dyn System,
    place: Place,
    claim: Option<Claim>,
    stage: Stage,
}

impl<'a> Repacker<'a> {
    /// For the device on record there, which need not exist yet.
    pub(super) const fn new(system: &'a dyn System, place: Place) -> Self {
        Self { system, place, claim: None, stage: Stage::Unmarked }
    }

    /// Does what is due, in a call of the kernel or none. `clock` is asked before and after it.
    pub(super) fn turn(&mut self, clock: &dyn Fn() -> Instant) -> Next {
        let now = clock();
        let next = match self.act(now) {
            Ok(next) => next,
            Err(error) => return Next::Ended(explain(&error)),
        };
        let ended = clock();
        Next::At(next.max(ended + (ended - now) * PAUSE_PER_WORK))
    }

    /// Says when to come again.
    fn act(&mut self, now: Instant) -> Result<Instant, PrepareError> {
        let Some(number) = self.device()? else {
            (self.claim, self.stage) = (None, Stage::Unmarked);
            return Ok(now + REST);
        };
        let disk = Disk::new(self.system, number);
        let done = match self.stage {
            Stage::Unmarked => disk.mark_idle(IdleSince::Now).map(|()| (Stage::marked(now, 0), now + REST)),
            Stage::Marked { at, in_vain } => recompress(disk).map(|gained| {
                let in_vain = if gained { 0 } else { in_vain + 1 };
                let is_over = in_vain == VAIN_MAX || now >= at + REST + PASSES;
                (if is_over { Stage::Unmarked } else { Stage::marked(at, in_vain) }, now + PAUSE)
            }),
        };
        let next;
        (self.stage, next) = match done {
            Ok(done) => done,
            Err(error) if is_for_later(&error) => (Stage::Unmarked, now + REST),
            // One that has gone meanwhile has not refused anything.
            Err(_) if self.device()?.is_none() => (Stage::Unmarked, now + REST),
            Err(error) => return Err(error.into()),
        };
        Ok(next)
    }

    /// The number of the device, if it is on record, as it was set up, and nobody else's to look after.
    fn device(&mut self) -> Result<Option<u32>, PrepareError> {
        if !self.claim.as_ref().is_some_and(Claim::is_current) {
            // The marks of before were of a device that is on record no more, or nobody's.
            self.stage = Stage::Unmarked;
            self.claim = None;
            self.claim = self.place.claim()?;
        }
        if self.claim.is_none() {
            return Ok(None);
        }
        let Some(record) = self.place.load()? else { return Ok(None) };
        let number = recompressed(self.system, &record)?;
        if number.is_some() {
            require_limit(self.system)?;
        }
        Ok(number)
    }
}

impl Stage {
    const fn marked(at: Instant, in_vain: u32) -> Self {
        Self::Marked { at, in_vain }
    }
}

/// The number of the device on record, if that has a second algorithm and is in use as it was set up.
fn recompressed(system: &dyn System, record: &Record) -> Result<Option<u32>, PrepareError> {
    let Some(id) = record.device() else { return Ok(None) };
    let sets =
        |step: &Change| matches!(step, Change::Set { setting, .. } if *setting == Setting::Recompression);
    if record.stage != RecordStage::Prepared
        || record.boot != boot_id(system)?
        || !record.steps.iter().any(sets)
    {
        return Ok(None);
    }
    let areas = swap_areas(system)?;
    for step in record.steps.iter().filter(|step| matches!(step, Change::SwapOn { .. })) {
        if judge(system, record, step, &areas)? == Verdict::Revert {
            return Ok(Some(id.number));
        }
    }
    Ok(None)
}

/// One pass. Whether it made anything smaller, as far as other traffic lets that be told.
fn recompress(disk: Disk<'_>) -> Result<bool, ZramError> {
    let before = disk.stat()?;
    disk.recompress(Recompress::Idle, Some(PASS))?;
    Ok(disk.stat()?.compressed < before.compressed)
}

/// Somebody else is at it, memory is full, the call was broken off: no refusal.
fn is_for_later(error: &ZramError) -> bool {
    const LATER: [Errno; 4] = [Errno::AGAIN, Errno::BUSY, Errno::INTR, Errno::NOMEM];
    let ZramError::Other { source, .. } = error else { return false };
    LATER.iter().any(|errno| source.raw_os_error() == Some(errno.raw_os_error()))
}

fn require_limit(system: &dyn System) -> Result<(), PrepareError> {
    let path = Path::new("/proc/sys/kernel/osrelease");
    let release = system.read(path).map_err(PrepareError::io("read", path))?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|digits| digits.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= LIMITED_SINCE => Ok(()),
        _ => Err(PrepareError::Unlimited { release: release.trim().to_owned() }),
    }
}

/// The rounds on a thread of their own, from its start until it is dropped.
#[derive(Debug)]
pub struct Repacking {
    stop: Arc<AtomicBool>,
    heard: Receiver<String>,
    thread: Option<JoinHandle<()>>,
}

impl Repacking {
    /// For this host's device, if one is on record there or comes to be.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(place: Place) -> io::Result<Self> {
        let (say, heard) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let run = move || {
            let mut repacker = Repacker::new(&Linux, place);
            while !told.load(Ordering::Relaxed) {
                match repacker.turn(&Instant::now) {
                    Next::At(next) => rest(next, &told),
                    Next::Ended(why) => {
                        // Whoever listens may be about to stop.
                        let _ = say.send(format!("what is cold in zram is packed no denser: {why}"));
                        return;
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("repack".to_owned()).spawn(run)?;
        Ok(Self { stop, heard, thread: Some(thread) })
    }

    /// What an operator should hear since the last time: that it has ended, and why.
    pub fn heard(&self) -> Option<String> {
        self.heard.try_recv().ok()
    }
}

/// Until then, or until it is to stop: whoever tells it unparks it.
fn rest(until: Instant, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::park_timeout(left);
    }
}

impl Drop for Repacking {
    /// Waits for the pass it is in, if it is in one.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
