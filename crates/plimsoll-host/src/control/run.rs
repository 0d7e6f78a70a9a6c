//! The loop over a real clock.
//!
//! Enters: a control loop and descriptors that wake it. Leaves: turns, each shown to the caller, who says when to end. It
//! waits in one poll(2) for whichever comes first: the next turn, work that was begun, a look for something hard, a signal,
//! or the kernel's word that tasks wait for memory.
use super::{Control, Turn};
use plimsoll_sys::psi::PressureTrigger;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How often is looked for something hard: the memory a guest can fill meanwhile, at 10 us a page and two processors, is
/// 80 MiB, less than the distance from soft to hard of a host of 4 GiB.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What wakes the loop.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wakers<'a> {
    /// Readable when the loop is to end.
    pub end: Option<BorrowedFd<'a>>,
    /// The kernel's word that tasks wait for memory.
    pub pressure: Option<&'a PressureTrigger>,
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
    mut shown: impl FnMut(&mut Control, &Turn) -> ControlFlow<()>,
) -> Result<(), RunError> {
    loop {
        let now = Instant::now();
        if now >= control.due() || control.hurry().is_some() {
            let turn = control.turn(now);
            if shown(control, &turn).is_break() {
                return Ok(());
            }
        }
        let go_on = control.work(Instant::now());
        let until = go_on.map_or(control.due(), |at| at.min(control.due())).min(now + LOOK_EVERY);
        match wait(until, wakers)? {
            Woken::End => return Ok(()),
            Woken::Pressure => control.pressed(),
            Woken::Time => {}
        }
    }
}

enum Woken {
    Time,
    Pressure,
    End,
}

fn wait(until: Instant, wakers: Wakers<'_>) -> Result<Woken, Errno> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
    let (end, pressure) = (wakers.end, wakers.pressure);
    let mut watched: Vec<PollFd<'_>> = Vec::with_capacity(2);
    watched.extend(end.iter().map(|end| PollFd::from_borrowed_fd(*end, PollFlags::IN)));
    watched.extend(pressure.iter().map(|trigger| PollFd::new(*trigger, PollFlags::PRI)));
    match poll(&mut watched, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno),
    }
    let woken = |watched: Option<&PollFd<'_>>| watched.is_some_and(|one| !one.revents().is_empty());
    let (of_end, of_pressure) = watched.split_at(usize::from(end.is_some()));
    Ok(match (woken(of_end.first()), woken(of_pressure.first())) {
        (true, _) => Woken::End,
        (false, true) => Woken::Pressure,
        (false, false) => Woken::Time,
    })
}
