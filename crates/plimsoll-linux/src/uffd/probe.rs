//! The steps of the pager, named, so that tests can delay or kill it at each.
use std::fmt;

/// A point between two actions of the pager. Killing it there leaves what a crash there leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Events were read; none has been applied. The discards among them are kept with what outlives the manager.
    EventsRead,
    /// A discard was applied to the words; its objects are not released.
    DiscardApplied,
    /// The bytes of a fault, or of pages to bring, were found; nothing is installed.
    SourceRead,
    /// The bytes were installed; the word does not say so.
    Copied,
    /// The word says so; the object is not released.
    InstalledMarked,
    /// The intent to capture is written; nothing was moved.
    CaptureBegun,
    /// The move was done; no word says so.
    Moved,
    /// Words say limbo.
    CaptureMarked,
    /// The slot page was read; nothing is stored.
    SlotRead,
    /// The object is in the store; no word names it.
    ObjectInserted,
    /// The word names the object; the slot page still holds the bytes.
    StoredMarked,
    /// The slot pages were given back; the airlock does not know.
    Zapped,
    /// A block was moved back whole; no word says so.
    MovedBack,
    /// A block was left to the kernel; its words do not say so.
    Unwatched,
    /// A block is registered again; its words do not say so.
    Watched,
    /// Pages to bring before they are touched are charged; none was read. [`SourceRead`](Self::SourceRead) and what
    /// follows it are then of these pages.
    BringBegun,
}

impl Step {
    /// Every step that a machine of any size comes to, in the order in which a page's life passes them: all but
    /// [`BringBegun`](Self::BringBegun), for which it needs some tens of pages.
    pub const ALL: [Self; 15] = [
        Self::EventsRead,
        Self::DiscardApplied,
        Self::SourceRead,
        Self::Copied,
        Self::InstalledMarked,
        Self::CaptureBegun,
        Self::Moved,
        Self::CaptureMarked,
        Self::SlotRead,
        Self::ObjectInserted,
        Self::StoredMarked,
        Self::Zapped,
        Self::MovedBack,
        Self::Unwatched,
        Self::Watched,
    ];
}

/// The pager was killed by a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Killed {
    /// Where.
    pub step: Step,
}

impl fmt::Display for Killed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "killed at {:?}", self.step)
    }
}

impl std::error::Error for Killed {}

/// Watches the pager's steps, and may delay or kill it at one.
pub trait Probe: Send + Sync {
    /// The pager is at `step`.
    ///
    /// # Errors
    /// [`Killed`] makes the pager stop on the spot, doing nothing more.
    fn reached(&self, step: Step) -> Result<(), Killed>;
}

/// Does nothing: what every user runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProbe;

impl Probe for NoProbe {
    #[inline]
    fn reached(&self, _step: Step) -> Result<(), Killed> {
        Ok(())
    }
}
