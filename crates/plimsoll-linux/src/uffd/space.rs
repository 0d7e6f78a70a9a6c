//! What the pager needs of the kernel and of the VMM for one machine.
//!
//! Enters: pages and bytes. Leaves: events and how far each call came. [`LinuxSpace`](super::linux_space::LinuxSpace)
//! is the real one; tests put a simulated kernel here and run the very same pager over it.
use super::wire::{Item, Outcome, WireError};
use plimsoll_core::replacement::Run;
use plimsoll_types::{PageBytes, PageIndex, SlotPage};
use std::ops::Range;
use thiserror::Error;

/// How the guest touched a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Writing.
    Write,
}

/// Something that happened in guest RAM. Of what waits, the kernel hands out a fault before a discard, whatever happened
/// first; a fault may still follow a discard in one reading, and is then newer than it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpaceEvent {
    /// A vCPU touched a page that is not there, and waits.
    Fault {
        /// The page.
        page: PageIndex,
        /// How it was touched.
        access: Access,
    },
    /// Pages are being given back. Whoever does it goes on as soon as this has been read; the pages go away some time
    /// after that.
    Discard {
        /// First page.
        first: PageIndex,
        /// How many.
        pages: u32,
    },
}

/// Why an install stopped before all of it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstallStop {
    /// An event waits to be read; nothing can be installed until it has been.
    Again,
    /// The next page is there already.
    Present,
    /// The memory cgroup of the machine, or the host, has no page left.
    NoMemory,
}

/// How far an install came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Installed {
    /// Pages done, from the first.
    pub pages: u32,
    /// Why no more; `None` means all.
    pub stop: Option<InstallStop>,
}

/// What is in guest RAM and in the airlock, looked up once.
#[derive(Clone, Debug, Default)]
pub struct Presence {
    ram: Vec<Range<u32>>,
    slots: Vec<Range<u32>>,
}

impl Presence {
    /// From ascending, disjoint ranges of page indices and of slot pages.
    pub fn new(ram: Vec<Range<u32>>, slots: Vec<Range<u32>>) -> Self {
        Self { ram, slots }
    }

    /// True when the page is in guest RAM, on swap or in migration: its bytes are the guest's.
    pub fn has_page(&self, page: PageIndex) -> bool {
        holds(&self.ram, page.0)
    }

    /// True when the slot page holds bytes.
    pub fn has_slot(&self, at: SlotPage) -> bool {
        holds(&self.slots, at.0)
    }
}

fn holds(ranges: &[Range<u32>], index: u32) -> bool {
    let after = ranges.partition_point(|range| range.start <= index);
    after.checked_sub(1).is_some_and(|range| ranges[range].contains(&index))
}

/// A machine that cannot be managed any more.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// The VMM's process has ended.
    #[error("the VMM has ended")]
    Gone,
    /// The VMM closed the socket and lives on.
    #[error("the VMM closed the hand-over socket and goes on running")]
    Closed,
    /// The VMM gave back, or never filled, a slot page that it had reported as filled.
    #[error("airlock page {first} is empty although the VMM reported it filled")]
    EmptySlot {
        /// The first slot page of the run that was read.
        first: u32,
    },
    /// The VMM broke the hand-over protocol.
    #[error("the VMM broke the hand-over protocol")]
    Protocol(#[from] WireError),
    /// The VMM did not answer in time.
    #[error("the VMM's agent did not answer within {seconds} s")]
    Silent {
        /// How long it was waited for.
        seconds: u64,
    },
    /// The VMM handed over something that does not work as it must.
    #[error("{call} of {pages} pages at index {first} failed: {cause}")]
    Call {
        /// The call.
        call: &'static str,
        /// First page or slot page.
        first: u32,
        /// How many.
        pages: u32,
        /// What the kernel or the agent said.
        cause: String,
    },
    /// Something happened to guest RAM that no manager can follow: it was unmapped, moved or forked.
    #[error("the VMM changed its memory map under the manager: {what}")]
    MapChanged {
        /// The event.
        what: String,
    },
    /// Reading from the kernel failed.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The error.
        #[source]
        source: std::io::Error,
    },
}

/// The memory of one machine as the kernel and its VMM present it.
///
/// Installing calls wake whoever waits for the pages. No call waits for the guest.
pub trait Space {
    /// Appends events that have happened, without waiting; when there are very many, not all of them at once.
    ///
    /// # Errors
    /// [`SpaceError`] when the machine is gone or cannot be followed.
    fn read_events(&mut self, events: &mut Vec<SpaceEvent>) -> Result<(), SpaceError>;

    /// All discards read so far have been applied to the page words. Until this is said, a space that outlives its
    /// manager keeps them for the next one: whoever made them has gone on.
    fn applied(&mut self) {}

    /// Puts pages into guest RAM, where nothing must be yet.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn copy(&mut self, first: PageIndex, pages: &[PageBytes]) -> Result<Installed, SpaceError>;

    /// Makes pages read as zeros without allocating memory until they are written.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn zero(&mut self, first: PageIndex, pages: u32) -> Result<Installed, SpaceError>;

    /// Lets whoever waits for the pages try again.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn wake(&mut self, first: PageIndex, pages: u32) -> Result<(), SpaceError>;

    /// Makes a touch of the page fail instead of reading anything.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn poison(&mut self, page: PageIndex) -> Result<Installed, SpaceError>;

    /// Moves guest pages to slot pages, each atomically. One outcome per item.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn move_out(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError>;

    /// Moves slot pages back to guest pages, each atomically, and wakes whoever waits for them. One outcome per item.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn move_in(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError>;

    /// Leaves pages, of which nothing is anywhere, to the kernel: it serves faults there as it would without us, with
    /// huge pages where it can. Whoever waits goes on.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn unwatch(&mut self, run: Run) -> Result<Outcome, SpaceError>;

    /// Takes pages back from the kernel. What the guest discarded before has gone when this returns.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn watch(&mut self, run: Run) -> Result<Outcome, SpaceError>;

    /// How the guest gave pages back, as far as somebody knows. One outcome per item.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn gifts(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError>;

    /// Looks at what of the run is in guest RAM.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn run_presence(&mut self, run: Run) -> Result<Presence, SpaceError>;

    /// True when all of the run is in guest RAM and part of huge pages.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn is_huge(&mut self, run: Run) -> Result<bool, SpaceError>;

    /// True when events wait to be read.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn has_events(&mut self) -> Result<bool, SpaceError>;

    /// Makes the pages of the items the VMM's own, so that they can be moved.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn populate(&mut self, items: &[Item]) -> Result<(), SpaceError>;

    /// Gives back the memory of slot pages.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn zap(&mut self, items: &[Item]) -> Result<(), SpaceError>;

    /// Reads consecutive slot pages.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn read_slots(&mut self, first: SlotPage, pages: &mut [PageBytes]) -> Result<(), SpaceError>;

    /// Makes sure that nothing an earlier manager queued happens any more, and speaks with `epoch` from now on.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn begin_epoch(&mut self, epoch: u64) -> Result<(), SpaceError>;

    /// Looks at what is where.
    ///
    /// # Errors
    /// [`SpaceError`].
    fn presence(&mut self) -> Result<Presence, SpaceError>;

    /// Nothing has happened for a while: buffers may go until something does.
    fn rest(&mut self) {}

    /// Whether there are any.
    fn has_buffers(&self) -> bool {
        false
    }
}
