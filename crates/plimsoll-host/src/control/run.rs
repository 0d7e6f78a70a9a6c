//! The loop over a real clock.
//!
//! Enters: a control loop and descriptors that wake it. Leaves: turns, each shown to the caller, who says when to end. It
//! waits in one poll(2) for whichever comes first: the next turn, work that was begun, a look for something hard, a signal,
//! somebody who asks, or the kernel's word that tasks wait for memory.
use super::{Control, PERIOD, Turn};
use plimsoll_linux::uffd::host::Host;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::psi::{self, PressureTrigger};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How often is looked for something hard: the memory a guest can fill meanwhile, at 10 us a page and two processors, is
/// 80 MiB, less than the distance from soft to hard of a host of 4 GiB. Not so often while pagers would call if anything happened.
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
    /// Calls when something happens to a machine after nothing did. Without it the loop looks ten times a second.
    pub stirred: Option<&'a Stirred>,
}

/// The call of the pagers of a host, which begin to do something.
pub struct Stirred {
    host: Arc<Host>,
    bell: Arc<EventFd>,
}

impl Stirred {
    /// Of such a host.
    ///
    /// # Errors
    /// When there is no descriptor for it.
    pub fn of(host: Arc<Host>) -> io::Result<Self> {
        let bell = Arc::new(EventFd::new()?);
        let rung = Arc::clone(&bell);
        host.bustle().on_begin(move || drop(rung.signal()));
        Ok(Self { host, bell })
    }

    /// Whether all machines are as they were seen, and the first to which something happens calls.
    fn keeps_watch(&self, control: &Control) -> bool {
        if !control.is_calm() {
            return false;
        }
        self.host.bustle().expect();
        // Asked after that: what happened before it called nobody.
        !control.may_have_changed()
    }
}

impl fmt::Debug for Stirred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stirred").field("bustle", self.host.bustle()).finish_non_exhaustive()
    }
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
        let is_watched = wakers.stirred.is_some_and(|stirred| stirred.keeps_watch(control));
        let look_every = if is_watched { PERIOD } else { LOOK_EVERY };
        let until = go_on.map_or(control.due(), |at| at.min(control.due())).min(now + look_every);
        let [end, pressure, asked, stirred] = wait(until, wakers)?;
        if end {
            return Ok(());
        }
        if pressure {
            control.pressed();
        }
        if stirred && let Some(stirred) = wakers.stirred {
            let _ = stirred.bell.drain();
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

/// Which of end, pressure, somebody who asks and pagers has woken it.
fn wait(until: Instant, wakers: Wakers<'_>) -> Result<[bool; 4], Errno> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
    let Wakers { end, pressure, asked, stirred } = wakers;
    let sources = [
        end.map(|end| (end, PollFlags::IN)),
        pressure.map(|trigger| (trigger.as_fd(), PollFlags::PRI)),
        asked.map(|asked| (asked.as_fd(), PollFlags::IN)),
        stirred.map(|stirred| (stirred.bell.as_fd(), PollFlags::IN)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Done, Trouble};
    use crate::config::MachineConfig;
    use crate::control::Pool;
    use plimsoll_core::ledger::Budget;
    use plimsoll_policy::Step;
    use plimsoll_policy::settings::Settings;
    use plimsoll_policy::view::MachineView;
    use plimsoll_types::{ByteCount, MachineId};

    /// A machine of which its pagers' host knows all.
    struct Known(Arc<Host>, u64);

    impl Backend for Known {
        fn observe(&mut self, id: MachineId, _now: Instant) -> Result<MachineView, Trouble> {
            self.1 = self.0.bustle().served();
            Ok(MachineView::new(id, ByteCount::mib(1)))
        }

        fn apply(&mut self, steps: &[Step], _now: Instant) -> Vec<Done> {
            steps.iter().map(|_| Done::Begun).collect()
        }

        fn may_have_changed(&self) -> bool {
            self.0.bustle().served() != self.1
        }
    }

    #[test]
    fn a_loop_over_machines_to_which_nothing_happens_is_called_by_the_first_to_which_something_does() {
        let (size, now) = (ByteCount::mib(64), Instant::now());
        let host = Arc::new(Host::new(Budget::within(size)));
        let stirred = Stirred::of(Arc::clone(&host)).unwrap();
        let mut control = Control::new(Settings::new(size), Pool::of(size), ByteCount(0), now).unwrap();
        let settings = MachineConfig::default().settings(MachineId(0), ByteCount::mib(32));
        control.admit("m", settings, Box::new(Known(Arc::clone(&host), 0))).unwrap();
        assert!(!stirred.keeps_watch(&control), "it was not even seen");
        let calm = (0..100).find(|second| {
            control.turn(now + PERIOD * *second);
            stirred.keeps_watch(&control)
        });
        let second = calm.expect("nothing happens");
        assert_eq!(stirred.bell.drain().unwrap(), 0);
        host.bustle().stir();
        assert_eq!(stirred.bell.drain().unwrap(), 1);
        assert!(!stirred.keeps_watch(&control), "something has happened");
        control.turn(now + PERIOD * (second + 1));
        assert!(stirred.keeps_watch(&control), "that was seen");
    }
}
