//! Descriptors that are kept at fixed numbers.
//!
//! Enters: descriptors, each for a slot. Leaves: borrowed ones. The table of slots is the process's own table of
//! descriptors: slot `n` is number [`FIRST`] + `n`. So nothing else has to be handed on when the process executes
//! another program, and keeping a descriptor allocates nothing. What must never happen: a slot that is taken is given
//! another descriptor.
#![expect(unsafe_code, reason = "after an exec descriptors are numbers until somebody owns them")]

use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The number of slot 0. What a process opens besides gets the lowest numbers.
pub const FIRST: RawFd = 64;

/// A descriptor could not be put into a slot; it is closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// There are not that many.
    #[error("there is no slot {slot}: there are {count}")]
    Range {
        /// The slot asked for.
        slot: u32,
        /// How many there are.
        count: u32,
    },
    /// It holds something.
    #[error("slot {slot} is taken")]
    Taken {
        /// The slot asked for.
        slot: u32,
    },
    /// The kernel gave no descriptor.
    #[error("slot {slot} cannot be filled")]
    Kernel {
        /// The slot asked for.
        slot: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The slots of this process.
#[derive(Debug)]
pub struct Slots(Box<[Option<OwnedFd>]>);

impl Slots {
    /// Makes `count` empty slots, raising this process's limit of descriptors as far as that needs and it may. What whoever
    /// started the process happened to leave open at their numbers is closed.
    ///
    /// # Errors
    /// When the limit cannot be raised.
    pub fn new(count: u32) -> io::Result<Self> {
        let mut slots = Self::inherit(count)?;
        slots.0.fill_with(|| None);
        Ok(slots)
    }

    /// The slots that the program executed before by this process has [left open](Self::leave_open). To be called before
    /// anything else: what is open at such a number and not close-on-exec came with the process and is nobody's, since whatever
    /// this workspace and the standard library open is close-on-exec. It is when it was taken, so nothing is taken twice.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn inherit(count: u32) -> io::Result<Self> {
        raise_limit(count)?;
        let mut slots = Self((0..count).map(|_| None).collect());
        for (slot, number) in slots.0.iter_mut().zip(FIRST..) {
            if let Some(fd) = unowned(number) {
                fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
                *slot = Some(fd);
            }
        }
        Ok(slots)
    }

    /// Lets everything live on in the program that this process is about to execute.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn leave_open(&self) -> io::Result<()> {
        self.set(FdFlags::empty())
    }

    /// Takes that back: the process goes on after all, and what it starts from now on is to find none of it open.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn close_on_exec(&self) -> io::Result<()> {
        self.set(FdFlags::CLOEXEC)
    }

    fn set(&self, flags: FdFlags) -> io::Result<()> {
        self.0.iter().flatten().try_for_each(|fd| Ok(fcntl_setfd(fd, flags)?))
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    /// Puts a descriptor into an empty slot.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn put(&mut self, slot: u32, fd: OwnedFd) -> Result<(), SlotError> {
        let count = self.count();
        let place = usize::try_from(slot).ok().and_then(|at| self.0.get_mut(at));
        let place = place.ok_or(SlotError::Range { slot, count })?;
        if place.is_some() {
            return Err(SlotError::Taken { slot });
        }
        let failed = |errno: Errno| SlotError::Kernel { slot, source: errno.into() };
        // Fits: the limit of descriptors is below it.
        let number = FIRST + slot.cast_signed();
        let moved = fcntl_dupfd_cloexec(fd, number).map_err(failed)?;
        if moved.as_raw_fd() != number {
            // Something else in this process has that number.
            return Err(failed(Errno::EXIST));
        }
        *place = Some(moved);
        Ok(())
    }

    /// Closes what a slot holds. False if it held nothing.
    pub fn clear(&mut self, slot: u32) -> bool {
        let place = usize::try_from(slot).ok().and_then(|at| self.0.get_mut(at));
        place.is_some_and(|place| place.take().is_some())
    }

    /// What a slot holds.
    pub fn get(&self, slot: u32) -> Option<BorrowedFd<'_>> {
        self.0.get(usize::try_from(slot).ok()?)?.as_ref().map(AsFd::as_fd)
    }

    /// The slots that hold something, with what they hold.
    pub fn taken(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        (0..).zip(&self.0).filter_map(|(slot, fd)| Some((slot, fd.as_ref()?.as_fd())))
    }
}

/// The `count` descriptors that a supervisor has opened for this process, from the first number after the standard ones on, as
/// systemd does; moved to where they are in the way of none of `slots` slots. `None` where there is none. To be called once, and before
/// anything else, for the reason at [`Slots::inherit`].
///
/// # Errors
/// When there is no room for them.
pub fn handed_on(count: u32, slots: u32) -> io::Result<Vec<Option<OwnedFd>>> {
    raise_limit(slots.saturating_add(count))?;
    let above = FIRST.saturating_add_unsigned(slots);
    let numbers = (3..).take(usize::try_from(count).unwrap_or(usize::MAX));
    let moved = |fd: OwnedFd| fcntl_dupfd_cloexec(fd, above);
    numbers.map(|number| Ok(unowned(number).map(moved).transpose()?)).collect()
}

/// What is open at a number and nobody's: it came with the process.
fn unowned(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: borrowed for this call, which the kernel refuses where the number is not open.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
    let is_nobodys = flags.is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC));
    // SAFETY: it is open and not close-on-exec, so nobody in this process owns it, as argued at `Slots::inherit`.
    is_nobodys.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

fn raise_limit(count: u32) -> io::Result<()> {
    let wanted = u64::from(count) + FIRST.unsigned_abs() as u64;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit });
    raised.map_err(|_| {
        io::Error::other(format!("{wanted} open files are needed: raise this user's limit (ulimit -Hn)"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventfd::EventFd;
    use std::process::Command;

    #[test]
    fn a_slot_is_a_number_is_filled_once_and_is_open_in_another_program_only_when_left_so() {
        let mut slots = Slots::new(8).unwrap();
        let made = || OwnedFd::from(EventFd::new().unwrap());
        slots.put(5, made()).unwrap();
        assert_eq!(slots.get(5).map(|fd| fd.as_raw_fd()), Some(FIRST + 5));
        assert!(matches!(slots.put(5, made()), Err(SlotError::Taken { slot: 5 })));
        assert!(matches!(slots.put(8, made()), Err(SlotError::Range { slot: 8, count: 8 })));
        assert_eq!(slots.taken().map(|(slot, _)| slot).collect::<Vec<_>>(), [5]);
        assert!(slots.clear(5) && !slots.clear(5) && !slots.clear(9));
        slots.put(5, made()).unwrap();
        let finds = || {
            let looks = Command::new("test").args(["-e", "/proc/self/fd/69"]).status();
            looks.unwrap().success()
        };
        slots.leave_open().unwrap();
        assert!(finds());
        slots.close_on_exec().unwrap();
        assert!(!finds());
    }
}
