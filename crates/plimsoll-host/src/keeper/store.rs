//! What a supervisor keeps for the keeper: systemd's descriptor store, and its watchdog.
//!
//! Enters: the slots, whenever they have changed; at the beginning, what an earlier keeper had stored. Leaves: datagrams to
//! `NOTIFY_SOCKET`, one descriptor each. What must never happen: the keeper waiting for the supervisor; a machine that is told to be kept
//! and is not stored; or a descriptor that comes back in a slot that is another's by now.
//!
//! ```text
//! FDSTORE=1        FDNAME=slot-N-G   FDPOLL=0      slot N, kept also when its other end is closed: only a manager knows what that means
//! FDSTOREREMOVE=1  FDNAME=slot-N-G
//! WATCHDOG=1                                       half of WATCHDOG_USEC after the last
//! ```
//!
//! The supervisor takes datagrams in their order and when it likes, and says nothing to any. While it is busy, the kernel holds a few and
//! refuses the rest. So nothing is sent because something happened: what the supervisor has is brought to what the slots hold, and where a
//! datagram is not taken, the rest of that is done a little later. A manager is told that something is kept when its datagram was
//! taken, and that it is not when that has not come about after a while.
//!
//! The next keeper finds the descriptors from number 3 on, as many as `LISTEN_FDS` says, each with its name in `LISTEN_FDNAMES`. G is the slot's
//! *generation*: how often something was let go from it (where that is 0, the name is `slot-N`). So no name is given twice, and of what comes
//! back under a slot's names only one is what the slot held last. Which, says a file in memory: word N (u64, little endian) is slot N's generation. It
//! is in a slot itself ([`GENERATIONS`]), from which nothing is let go before the daemon ends.
//!
//! # The interleavings that worry us
//! * **Slot 9 is let go and filled anew while the supervisor does not listen, and the keeper dies.** What was there before comes back, under a name
//!   of an older generation: it is closed, and the supervisor is told to drop it. The slot is empty. Whoever had it filled was not told
//!   so, and no record names it.
//! * **A datagram was taken, and the keeper dies before the supervisor has read it.** systemd reads what it was sent before it looks who has ended.
//! * **A removal is lost.** Two come back for one slot, and that of the slot's generation is put there.
//! * **A storing is lost,** because the supervisor is out of descriptors. Nothing is in the slot. Of a machine with such a slot the next manager says that
//!   it cannot be put together; it waits, and nothing of another is taken for it.
//! * **What was let go from one slot is kept in another before the supervisor has heard of either.** It drops a descriptor of the same open
//!   file as one that it has (kcmp), whatever their names, and would drop it twice. So all removals are sent before anything is stored. For the
//!   same reason no two slots may hold one, and none do.
//! * **The keeper dies between raising a generation and closing what the slot held.** That was to be let go, and is.
//! * **The manager dies while it waits for its answer.** The next one finds something in a slot that no record names, and lets it go.
//! * **The keeper executes another program while something is to be sent.** It does not; and what its predecessor may have stored is sent
//!   once more: a supervisor drops what it has.
//! * **The file of generations does not come back.** Then the newest of each slot is taken. Since nobody was told of anything that was not sent, that is
//!   right unless a storing was lost as well.
//! * **The manager goes on when its keeper dies.** No supervisor has to know which process that is: the next manager ends it
//!   ([`sole`](crate::daemon::sole)).
use plimsoll_sys::mapping::{Memfd, SharedMapping};
use plimsoll_sys::slots::{SlotError, Slots, handed_on};
use plimsoll_types::{ByteCount, PAGE_SIZE};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, sendmsg_addr, socket_with,
};
use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The slot of the generations' file.
pub const GENERATIONS: u32 = 4;
/// Variables by which a supervisor says what it hands on. They are this process's alone: no program that it starts may believe them.
pub const HANDED_ON: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];
/// Bytes of the longest datagram: two names of variables, the longest name of a slot, and FDPOLL.
const MESSAGE_MAX: usize = 80;
/// How soon a supervisor that did not listen is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// What is stored under a name of its own: what a slot held while it was of that generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The slot.
    pub slot: u32,
    /// How often something had been let go from it.
    pub generation: u64,
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { slot, generation: 0 } => write!(f, "slot-{slot}"),
            Self { slot, generation } => write!(f, "slot-{slot}-{generation}"),
        }
    }
}

impl Stored {
    /// What is stored under a name; `None` where it is no name of a keeper's.
    pub fn named(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("slot-")?;
        let (slot, generation) = rest.split_once('-').unwrap_or((rest, "0"));
        let stored = Self { slot: slot.parse().ok()?, generation: generation.parse().ok()? };
        // Numbers can be written in more than one way, names only in one.
        (stored.to_string() == name).then_some(stored)
    }
}

/// How often something was let go from each slot.
#[derive(Debug)]
struct Generations(SharedMapping);

impl Generations {
    /// Those in their slot; where it is empty nothing was let go yet, and they are put there.
    fn of(slots: &mut Slots) -> io::Result<Self> {
        let file = if let Some(file) = slots.get(GENERATIONS) {
            Memfd::try_from(file.try_clone_to_owned()?).map_err(io::Error::other)?
        } else {
            let bytes = (slots.count() as usize * size_of::<u64>()).next_multiple_of(PAGE_SIZE);
            let file = Memfd::create("plimsoll-slots", ByteCount(bytes as u64)).map_err(io::Error::other)?;
            let copy = file.as_fd().try_clone_to_owned()?;
            slots.put(GENERATIONS, copy).map_err(io::Error::other)?;
            file
        };
        let memory = SharedMapping::new(&file).map_err(io::Error::other)?;
        let room = memory.as_atomic_u64s().len();
        if room < slots.count() as usize {
            return Err(io::Error::other(format!("the slots' generations are of {room} slots only")));
        }
        Ok(Self(memory))
    }

    fn word(&self, slot: u32) -> Option<&AtomicU64> {
        self.0.as_atomic_u64s().get(usize::try_from(slot).ok()?)
    }

    /// What the slot holds now is stored under that name.
    fn name(&self, slot: u32) -> Stored {
        let generation = self.word(slot).map_or(0, |word| word.load(Ordering::Acquire));
        Stored { slot, generation }
    }

    /// What the slot holds next is stored under another name.
    fn raise(&self, slot: u32) {
        if let Some(word) = self.word(slot) {
            word.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The slot was of that generation once, at least.
    fn seen(&self, stored: Stored) {
        if let Some(word) = self.word(stored.slot) {
            word.fetch_max(stored.generation, Ordering::AcqRel);
        }
    }
}

/// What the supervisor has of a slot.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// Under which name, if it has any of it.
    name: Option<Stored>,
    /// Whether that was sent by this program, or is what an earlier one should have.
    is_sent: bool,
}

/// A supervisor that keeps descriptors.
#[derive(Debug)]
pub struct Store {
    socket: OwnedFd,
    address: SocketAddrUnix,
    generations: Generations,
    held: Box<[Held]>,
    /// Names of what it has beside that.
    stale: Vec<Stored>,
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
    /// The supervisor that started this process, if it says where it listens. It has what is `stale` beside what is in the slots.
    ///
    /// # Errors
    /// When its address makes no sense, there is no socket, or the slots' generations are not to be had.
    pub fn of_supervisor(slots: &mut Slots, stale: Vec<Stored>) -> io::Result<Option<Self>> {
        let Some(place) = env::var_os("NOTIFY_SOCKET").filter(|place| !place.is_empty()) else {
            return Ok(None);
        };
        let number = |name| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let period = number("WATCHDOG_USEC").filter(|usec| is_ours && *usec > 0).map(Duration::from_micros);
        Self::new(&place, slots, stale, period).map(Some)
    }

    /// A supervisor that listens at `place`, and ends this process where it hears nothing for `patience`.
    ///
    /// # Errors
    /// As for [`of_supervisor`](Self::of_supervisor).
    pub fn new(
        place: &OsStr,
        slots: &mut Slots,
        stale: Vec<Stored>,
        patience: Option<Duration>,
    ) -> io::Result<Self> {
        let address = match place.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(place)?,
        };
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        let watchdog = patience.map(|patience| Watchdog { period: patience / 2, due: Instant::now() });
        let generations = Generations::of(slots)?;
        let held = |slot| Held { name: slots.get(slot).map(|_| generations.name(slot)), is_sent: false };
        let held = (0..slots.count()).map(held).collect();
        Ok(Self { socket, address, generations, held, stale, is_behind: true, watchdog })
    }

    /// Notes that a slot was filled.
    pub(super) const fn filled(&mut self) {
        self.is_behind = true;
    }

    /// Notes that what a slot held is let go.
    pub(super) fn let_go(&mut self, slot: u32) {
        self.generations.raise(slot);
        self.is_behind = true;
    }

    /// True when the supervisor was sent what the slot, which is filled, holds.
    pub(super) fn has(&self, slot: u32) -> bool {
        let held = usize::try_from(slot).ok().and_then(|at| self.held.get(at));
        held.is_some_and(|held| held.is_sent && held.name == Some(self.generations.name(slot)))
    }

    /// Brings what the supervisor has to what is held, as far as it listens, and tells it that this process lives. False where
    /// something remains to be sent.
    pub(super) fn settle(&mut self, slots: &Slots) -> bool {
        if self.watchdog.as_ref().is_some_and(|watchdog| watchdog.due <= Instant::now())
            && self.send(format_args!("WATCHDOG=1"), None).is_ok()
            && let Some(watchdog) = &mut self.watchdog
        {
            watchdog.due = Instant::now() + watchdog.period;
        }
        if self.is_behind {
            self.is_behind = self.bring(slots).is_err();
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

    /// What goes comes first, all of it: what is stored next may be the same open file.
    fn bring(&mut self, slots: &Slots) -> io::Result<()> {
        while let Some(name) = self.stale.last() {
            self.send(format_args!("FDSTOREREMOVE=1\nFDNAME={name}"), None)?;
            self.stale.pop();
        }
        let wanted = |generations: &Generations, slot| slots.get(slot).map(|fd| (generations.name(slot), fd));
        for (at, slot) in (0..self.held.len()).zip(0..) {
            let wanted = wanted(&self.generations, slot).map(|(name, _)| name);
            if let Some(name) = self.held[at].name.filter(|name| Some(*name) != wanted) {
                self.send(format_args!("FDSTOREREMOVE=1\nFDNAME={name}"), None)?;
                self.held[at].name = None;
            }
        }
        for (at, slot) in (0..self.held.len()).zip(0..) {
            if let Some((name, descriptor)) = wanted(&self.generations, slot)
                && !self.has(slot)
            {
                self.send(format_args!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(descriptor))?;
                self.held[at] = Held { name: Some(name), is_sent: true };
            }
        }
        Ok(())
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

/// True when a supervisor has handed something on: what the host has now says nothing of what a daemon may use that had begun before.
pub fn is_handed_on() -> bool {
    handed_on_count().is_some()
}

fn handed_on_count() -> Option<u32> {
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let [pid, handed, _] = HANDED_ON;
    number(handed).filter(|handed| *handed > 0 && number(pid) == Some(std::process::id()))
}

/// What an earlier keeper had stored.
#[derive(Debug)]
pub struct Adopted {
    /// Each descriptor in its slot.
    pub slots: Slots,
    /// What the supervisor has beside that and should not have any more.
    pub stale: Vec<Stored>,
}

/// What an earlier keeper had stored, `None` if a supervisor handed nothing of one on. To be called before anything is opened that stays
/// open.
///
/// # Errors
/// When descriptors cannot be moved.
pub fn received(count: u32) -> io::Result<Option<Adopted>> {
    let Some(handed) = handed_on_count() else { return Ok(None) };
    let names = env::var(HANDED_ON[2]).unwrap_or_default();
    let descriptors = handed_on(handed, count)?;
    // What is not a keeper's is closed.
    let named = descriptors.into_iter().zip(names.split(':'));
    let named = named.filter_map(|(descriptor, name)| Some((Stored::named(name)?, descriptor?)));
    adopt(named.collect(), count)
}

/// Puts what was stored under those names into the slots that held it last.
///
/// # Errors
/// As for [`received`].
pub fn adopt(mut handed: Vec<(Stored, OwnedFd)>, count: u32) -> io::Result<Option<Adopted>> {
    if handed.is_empty() {
        return Ok(None);
    }
    let mut slots = Slots::new(count)?;
    let table = handed.iter().position(|(stored, _)| *stored == Stored { slot: GENERATIONS, generation: 0 });
    if let Some(at) = table {
        slots.put(GENERATIONS, handed.swap_remove(at).1).map_err(io::Error::other)?;
    }
    let generations = Generations::of(&mut slots)?;
    if table.is_none() {
        handed.iter().for_each(|(stored, _)| generations.seen(*stored));
    }
    let mut stale = Vec::new();
    for (stored, descriptor) in handed {
        if generations.name(stored.slot) != stored {
            stale.push(stored);
            continue;
        }
        match slots.put(stored.slot, descriptor) {
            // Another of its very name, the same descriptor then; or of a build with more slots.
            Ok(()) | Err(SlotError::Taken { .. } | SlotError::Range { .. }) => {}
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Ok(Some(Adopted { slots, stale }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_which_slot_and_generation_is_stored_under_it_and_is_written_in_one_way() {
        for (slot, generation) in [(0, 0), (9, 1), (u32::MAX, u64::MAX)] {
            let stored = Stored { slot, generation };
            assert_eq!(Stored::named(&stored.to_string()), Some(stored));
            let longest = format!("FDSTOREREMOVE=1\nFDNAME={stored}\nFDPOLL=0");
            assert!(longest.len() <= MESSAGE_MAX, "{longest}");
        }
        assert_eq!(Stored { slot: 9, generation: 0 }.to_string(), "slot-9");
        let others = [
            "",
            "stored",
            "slot-",
            "slot-x",
            "slot--1",
            "slot-4294967296",
            "slot-9-0",
            "slot-9-01",
            "slot-+9",
        ];
        for name in others {
            assert_eq!(Stored::named(name), None, "{name}");
        }
    }
}
