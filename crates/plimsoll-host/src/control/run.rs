//! The loop over a real clock.
//!
//! Enters: a control loop and descriptors that wake it. Leaves: turns, each shown to the caller, who says when to end. It
//! waits in one poll(2) for whichever comes first: the next turn, work that was begun, a look for something hard, a signal,
//! somebody who asks, or the kernel's word that tasks wait for memory.
use super::{Control, Turn};
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::psi::{self, PressureTrigger};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How often is looked for something hard: the memory a guest can fill meanwhile, at 10 us a page and two processors, is
/// 80 MiB, less than the distance from soft to hard of a host of 4 GiB.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Tasks that wait this long in a second are worth a decision of their own.
const PRESSURE: Duration = Duration::from_millis(100);
/// Within so long. Without CAP_SYS_RESOURCE, which a daemon gives up, it must be a multiple of this.
const WINDOW: Duration = Duration::from_secs(2);

/// What wakes the loop.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wakers<'a> {
    /// Readable when the loop is to end.
    pub end: Option<BorrowedFd<'a>>,
    /// The kernel's word that tasks wait for memory.
    pub pressure: Option<&'a PressureTrigger>,
    /// Readable when somebody asks for something.
    pub asked: Option<&'a EventFd>,
}

/// The kernel's word that tasks of this host wait for memory. Where it is not to be had, the loop still looks ten times a second.
pub fn host_pressure() -> Option<PressureTrigger> {
    PressureTrigger::open(psi::HOST_MEMORY.as_ref(), PRESSURE, WINDOW).ok()
}

/// What the caller is told of.
#[derive(Clone, Copy, Debug)]
pub enum Happened<'a> {
    /// A turn is over.
    Turn(&'a Turn),
    /// Somebody asks for something. What changes is decided about at once.
    Asked,
}

/// The loop cannot wait.
#[derive(Debug, Error)]
#[error("cannot wait for the next decision")]
pub struct RunError(#[from] Errno);

/// Runs until it is to end, or `shown` breaks.
///
/// # Errors
/// When poll(2) fails, which is a bug here.
pub fn run(
    control: &mut Control,
    wakers: Wakers<'_>,
    mut shown: impl FnMut(&mut Control, Happened<'_>) -> ControlFlow<()>,
) -> Result<(), RunError> {
    loop {
        let now = Instant::now();
        if now >= control.due() || control.hurry().is_some() {
            let turn = control.turn(now);
            if shown(control, Happened::Turn(&turn)).is_break() {
                return Ok(());
            }
        }
        let go_on = control.work(Instant::now());
        let until = go_on.map_or(control.due(), |at| at.min(control.due())).min(now + LOOK_EVERY);
        let [end, pressure, asked] = wait(until, wakers)?;
        if end {
            return Ok(());
        }
        if pressure {
            control.pressed();
        }
        if asked && let Some(waker) = wakers.asked {
            // What is drained now and asked meanwhile wakes again.
            let _ = waker.drain();
            if shown(control, Happened::Asked).is_break() {
                return Ok(());
            }
        }
    }
}

/// Which of end, pressure and somebody who asks has woken it.
fn wait(until: Instant, wakers: Wakers<'_>) -> Result<[bool; 3], Errno> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
    let Wakers { end, pressure, asked } = wakers;
    let sources = [
        end.map(|end| (end, PollFlags::IN)),
        pressure.map(|trigger| (trigger.as_fd(), PollFlags::PRI)),
        asked.map(|asked| (asked.as_fd(), PollFlags::IN)),
    ];
    let watched = sources.iter().flatten().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags));
    let mut watched: Vec<PollFd<'_>> = watched.collect();
    match poll(&mut watched, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno),
    }
    let mut found = watched.iter().map(|one| !one.revents().is_empty());
    Ok(sources.map(|source| source.is_some() && found.next().unwrap_or(false)))
}
