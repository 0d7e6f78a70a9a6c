//! What a supervisor keeps for the keeper: systemd's descriptor store, and its watchdog.
//!
//! Enters: the slots, whenever they have changed; at the beginning, what an earlier keeper had stored. Leaves: datagrams to
//! `NOTIFY_SOCKET`, one descriptor each. What must never happen: the keeper waiting for the supervisor, or a descriptor forgotten because that
//! did not listen. So nothing is sent because something happened: what the supervisor has is brought to what the slots hold, and where
//! a datagram is not taken, the rest of that is done a little later.
//!
//! ```text
//! FDSTORE=1        FDNAME=slot-N     FDPOLL=0      slot N, kept also when its other end is closed: only a manager knows what that means
//! FDSTOREREMOVE=1  FDNAME=slot-N
//! FDSTORE=1        FDNAME=manager    FDPOLL=0      the manager's pidfd: an earlier keeper's is ended before the next is started
//! WATCHDOG=1                                       half of WATCHDOG_USEC after the last
//! ```
//!
//! The next keeper finds the descriptors from number 3 on, as many as `LISTEN_FDS` says, each with its name in `LISTEN_FDNAMES`. systemd drops
//! a descriptor of the same open file as one that it has (kcmp), whatever its name: no two slots may hold one, and none do.
use plimsoll_sys::pidfd::{Liveness, Pidfd, Signal};
use plimsoll_sys::slots::{Slots, handed_on};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, sendmsg_addr, socket_with,
};
use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

/// Variables by which a supervisor says what it hands on. They are this process's alone: no program that it starts may believe them.
pub const HANDED_ON: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];
/// Bytes of the longest datagram: two names of variables, a slot's name, and FDPOLL.
const MESSAGE_MAX: usize = 80;
/// How soon a supervisor that did not listen is tried again.
const AGAIN: Duration = Duration::from_millis(100);
/// How long an earlier manager may take to end once it is killed: what it has mapped is freed meanwhile.
const END_MAX: Duration = Duration::from_secs(60);

/// What is stored under a name of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    Slot(u32),
    Manager,
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slot(slot) => write!(f, "slot-{slot}"),
            Self::Manager => f.write_str("manager"),
        }
    }
}

impl Stored {
    fn named(name: &str) -> Option<Self> {
        match name.strip_prefix("slot-") {
            Some(slot) => slot.parse().ok().map(Self::Slot),
            None => (name == "manager").then_some(Self::Manager),
        }
    }
}

/// What the supervisor has under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// Nothing that is known of.
    Nothing,
    /// What is to be there.
    Same,
    /// What was to be there before.
    Other,
}

/// A supervisor that keeps descriptors.
#[derive(Debug)]
pub struct Store {
    socket: OwnedFd,
    address: SocketAddrUnix,
    slots: Box<[Held]>,
    manager: Held,
    /// Something is to be sent.
    is_behind: bool,
    watchdog: Option<Watchdog>,
}

#[derive(Debug)]
struct Watchdog {
    period: Duration,
    due: Instant,
}

impl Store {
    /// The supervisor that started this process, if it says where it listens. What an earlier program of this process, or an earlier
    /// process, has stored is sent once more: a supervisor drops what it has.
    ///
    /// # Errors
    /// When its address makes no sense, or there is no socket.
    pub fn of_supervisor(slots: u32) -> io::Result<Option<Self>> {
        let Some(place) = env::var_os("NOTIFY_SOCKET").filter(|place| !place.is_empty()) else {
            return Ok(None);
        };
        let number = |name| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let period = number("WATCHDOG_USEC").filter(|usec| is_ours && *usec > 0).map(Duration::from_micros);
        Self::new(&place, slots, period).map(Some)
    }

    /// A supervisor that listens at `place`, and ends this process where it hears nothing for `patience`.
    ///
    /// # Errors
    /// As for [`of_supervisor`](Self::of_supervisor).
    pub fn new(place: &OsStr, slots: u32, patience: Option<Duration>) -> io::Result<Self> {
        let address = match place.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(place)?,
        };
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        let watchdog = patience.map(|patience| Watchdog { period: patience / 2, due: Instant::now() });
        let slots = (0..slots).map(|_| Held::Nothing).collect();
        Ok(Self { socket, address, slots, manager: Held::Nothing, is_behind: true, watchdog })
    }

    /// Notes that a slot holds something else than before, or nothing.
    pub(super) fn slot_changed(&mut self, slot: u32) {
        if let Some(held) = usize::try_from(slot).ok().and_then(|at| self.slots.get_mut(at)) {
            held.change();
        }
        self.is_behind = true;
    }

    /// Notes that there is another manager, or none.
    pub(super) fn manager_changed(&mut self) {
        self.manager.change();
        self.is_behind = true;
    }

    /// Brings what the supervisor has to what is held, as far as it listens, and tells it that this process lives. False where
    /// something remains to be sent.
    pub(super) fn settle(&mut self, slots: &Slots, manager: Option<BorrowedFd<'_>>) -> bool {
        if self.watchdog.as_ref().is_some_and(|watchdog| watchdog.due <= Instant::now())
            && self.send(format_args!("WATCHDOG=1"), None).is_ok()
            && let Some(watchdog) = &mut self.watchdog
        {
            watchdog.due = Instant::now() + watchdog.period;
        }
        if self.is_behind {
            self.is_behind = self.bring(slots, manager).is_err();
        }
        !self.is_behind
    }

    /// How long may pass until it is [settled](Self::settle) again.
    pub(super) fn patience(&self) -> Duration {
        let due =
            self.watchdog.as_ref().map(|watchdog| watchdog.due.saturating_duration_since(Instant::now()));
        let again = if self.is_behind { AGAIN } else { Duration::MAX };
        // A watchdog that could not be told is due, which is no reason to try without pause.
        again.min(due.unwrap_or(Duration::MAX).max(AGAIN))
    }

    /// The manager comes first: one that nobody finds to end it goes on beside the next one, on the same machines.
    fn bring(&mut self, slots: &Slots, manager: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if self.manager != Held::Same {
            self.manager = self.replace(Stored::Manager, self.manager, manager)?;
        }
        for (at, slot) in (0..self.slots.len()).zip(0..) {
            if self.slots[at] != Held::Same {
                self.slots[at] = self.replace(Stored::Slot(slot), self.slots[at], slots.get(slot))?;
            }
        }
        Ok(())
    }

    /// What the supervisor has then.
    fn replace(&self, name: Stored, held: Held, by: Option<BorrowedFd<'_>>) -> io::Result<Held> {
        if held == Held::Other {
            self.send(format_args!("FDSTOREREMOVE=1\nFDNAME={name}"), None)?;
        }
        match by {
            Some(descriptor) => {
                let stored = self.send(format_args!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(descriptor));
                // What was removed is removed once more then, which changes nothing.
                stored.map(|()| Held::Same)
            }
            None => Ok(Held::Nothing),
        }
    }

    fn send(&self, text: fmt::Arguments<'_>, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut bytes = [0; MESSAGE_MAX];
        let mut room = &mut bytes[..];
        room.write_fmt(text)?;
        let length = MESSAGE_MAX - room.len();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.as_slice();
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg_addr(&self.socket, &self.address, &[IoSlice::new(&bytes[..length])], &mut control, flags)?;
        Ok(())
    }
}

impl Held {
    /// What an earlier keeper has stored under the name is removed first: two of one name would be refused when they come back.
    fn change(&mut self) {
        *self = Self::Other;
    }
}

/// True when a supervisor has handed something on: what the host has now says nothing of what a daemon may use that had begun before.
pub fn is_handed_on() -> bool {
    handed_on_count().is_some()
}

fn handed_on_count() -> Option<u32> {
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let [pid, handed, _] = HANDED_ON;
    number(handed).filter(|handed| *handed > 0 && number(pid) == Some(std::process::id()))
}

/// What an earlier keeper had stored, in its slots, after its manager, which may go on, has been ended: there cannot be two. `None`
/// if a supervisor handed nothing on. To be called before anything is opened that stays open.
///
/// # Errors
/// When descriptors cannot be moved, or the earlier manager cannot be ended.
pub fn received(count: u32) -> io::Result<Option<Slots>> {
    let Some(handed) = handed_on_count() else { return Ok(None) };
    let names = env::var(HANDED_ON[2]).unwrap_or_default();
    let descriptors = handed_on(handed, count)?;
    let mut slots = Slots::new(count)?;
    let mut is_ours = false;
    for (descriptor, name) in descriptors.into_iter().zip(names.split(':')) {
        match (descriptor, Stored::named(name)) {
            (Some(descriptor), Some(Stored::Slot(slot))) => {
                slots.put(slot, descriptor).map_err(io::Error::other)?;
                is_ours = true;
            }
            (Some(descriptor), Some(Stored::Manager)) => end(descriptor)?,
            // Not one of a keeper's: closed.
            _ => {}
        }
    }
    Ok(is_ours.then_some(slots))
}

fn end(manager: OwnedFd) -> io::Result<()> {
    // One that has been reaped has no number any more.
    let Some(manager) = Pidfd::recognise(manager).map_err(io::Error::other)? else { return Ok(()) };
    let _ = manager.send_signal(Signal::KILL);
    match manager.wait_exit(END_MAX).map_err(io::Error::other)? {
        Liveness::Exited => Ok(()),
        Liveness::Alive => {
            Err(io::Error::other(format!("an earlier manager, {}, does not end", manager.process())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_is_stored_under_it() {
        for stored in [Stored::Slot(0), Stored::Slot(u32::MAX), Stored::Manager] {
            assert_eq!(Stored::named(&stored.to_string()), Some(stored));
        }
        for name in ["", "stored", "slot-", "slot-x", "slot--1", "slot-4294967296", "managers"] {
            assert_eq!(Stored::named(name), None, "{name}");
        }
    }
}
