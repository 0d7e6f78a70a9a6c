//! Direct paging: the processor walks the guest's own tables, in the host's addresses, and the guest can write none of them.
//!
//! Enters: what a guest asks for: to pin a table, to have an entry written, to load a root. Leaves: that it was done, or why not. No
//! sequence of requests gives a guest a writable mapping of a table, or any mapping of a frame that is not its own.
//!
//! # Kinds
//!
//! A frame has one [`Kind`] at a time: memory that is mapped writable, or a table of one level. It keeps it as long as anybody
//! needs it ([`Frame::needed`]): each writable mapping, each entry that names the table, each pin, each processor whose root it is, and
//! the host, where it writes to memory of the guest's by itself ([`Direct::keep`]). What
//! only reads needs no kind, so that a guest reads its tables through mappings of its own. Any mapping, and any entry that names a
//! table, is counted besides ([`Frame::uses`]); a frame with uses stays its owner's.
//!
//! A frame becomes a table when somebody first needs one: each of its entries is looked at, and takes what it names: the frame, its
//! kind, and so on down. From then on entries are written by [`Direct::update`] only, which takes what the new one names, writes, and lets go
//! of what the old one named. When nobody needs the table any more its entries let go in their turn.
//!
//! # Refused
//!
//! Large and global leaves, entries that the processor refuses, frames of others. Entries that have memory cached otherwise than tables
//! are: what a guest writes past the caches can differ from what is read here when the frame becomes a table (XSA-402). A table that names
//! one of its own or a higher level (the linear map of old x86 kernels) is refused by kind: walked from above it would be a table of two
//! levels at once, and where one of them maps pages the other's rights to write would count.
//!
//! # Fences
//!
//! Processors may use a mapping that was taken away until they are told to forget it. So a frame that lost one since its owner's last
//! fence changes neither its kind nor its owner: [`Refused::Fence`]. The caller executes a fence for everything of the guest's on each
//! processor that ran it, says so with [`Direct::fenced`], and makes the call again. Nothing else needs a fence of the host's; a guest
//! asks for those that it needs for itself.
//!
//! # Work in pieces
//!
//! Making a table can take as long as the guest has tables, so each call has a budget of entries to look at. What has been done when it
//! is spent, or when an entry is refused, is kept: a table that is half made holds what its first entries name, is needed by nobody,
//! and can become nothing else ([`Refused::Work`]) until [`Direct::work`] has undone it, from its last entry back. The same call
//! made again goes on where the one before stopped. So after any refusal each entry holds what it names or nothing, in one place:
//! those below [`Frame::held`] do. Of a batch, the updates before the one that was refused were made, and no others.
//!
//! # What the caller owes
//!
//! Calls are made one at a time. Memory of a frame that is given to a guest holds nothing of others. A processor loads the root that
//! [`Direct::load`] returns before the next call. The host's own entries, if it has any in the guest's address spaces, are in a
//! root above.
//!
//! Sources: Xen, xen/arch/x86/mm.c (the comment at its head: "validate", "count", "pin"), public/xen.h (mmu_update, MMU_NORMAL_PT_UPDATE,
//! MMU_PT_UPDATE_PRESERVE_AD, mmuext_op), XSA-182, XSA-273 and XSA-299 (what went wrong with types that change in pieces); Intel SDM
//! vol. 3, 4.10.
mod kinds;

use crate::address::{Level, Output};
use crate::entry::{Entry, Leaf, Malformed, Table};
use crate::format::Format;
use crate::memory::TableMemory;
use core::fmt;
use core::marker::PhantomData;
use kinds::Named;
use plimsoll_types::MachineId;

/// How often an entry may change while it is written: a processor sets accessed, then dirty. Beyond that it is not a processor.
const TRIES: usize = 4;

/// What a frame is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Nothing yet, since its owner got it.
    Fresh,
    /// Memory that its owner writes.
    Writable,
    /// A table.
    Table(Level),
}

/// Where a frame is among those that are being made tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Making {
    No,
    /// It was asked for.
    Top,
    /// An entry of this one names it.
    For(u32),
}

/// What is kept about a frame.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    owner: Option<MachineId>,
    kind: Kind,
    needed: u32,
    uses: u32,
    held: u32,
    pinned: bool,
    kept: bool,
    /// The number of its owner's fences when it lost a mapping.
    lost: Option<u64>,
    making: Making,
    /// The next frame that may have entries to let go; `None` if it is not on that list, itself if it is the last.
    next: Option<u32>,
}

impl Frame {
    /// A frame that nobody has.
    pub const FREE: Self = Self {
        owner: None,
        kind: Kind::Fresh,
        needed: 0,
        uses: 0,
        held: 0,
        pinned: false,
        kept: false,
        lost: None,
        making: Making::No,
        next: None,
    };

    /// Whose it is.
    pub const fn owner(&self) -> Option<MachineId> {
        self.owner
    }

    /// What it is used as, or was last.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// How many mappings, entries, pins and processors need its kind.
    pub const fn needed(&self) -> u32 {
        self.needed
    }

    /// How many of them there are with those that only read.
    pub const fn uses(&self) -> u32 {
        self.uses
    }

    /// How many of its entries, from the first on, hold what they name.
    pub const fn held(&self) -> u32 {
        self.held
    }

    /// Whether its owner pinned it.
    pub const fn pinned(&self) -> bool {
        self.pinned
    }

    /// Whether the host writes to it.
    pub const fn kept(&self) -> bool {
        self.kept
    }
}

/// What of an entry stays as it is when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Marks {
    /// Nothing (MMU_NORMAL_PT_UPDATE).
    Replace,
    /// Accessed and dirty bits that a processor has set (MMU_PT_UPDATE_PRESERVE_AD).
    Keep,
}

/// A word for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Update {
    /// Where the entry is.
    pub at: Output,
    /// The word.
    pub word: u64,
    /// What becomes of the old one's marks.
    pub marks: Marks,
}

/// Why a request was not carried out. `E` is what the tables' memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused<E> {
    /// The guest does not own this, or there is no such frame.
    NotOwned(Output),
    /// It is needed as something else.
    Needed {
        /// The frame.
        frame: Output,
        /// As what.
        kind: Kind,
    },
    /// The hardware refuses an entry.
    Malformed {
        /// The table's level.
        level: Level,
        /// Why.
        reason: Malformed,
    },
    /// The entry is a large leaf or a global one, or has memory cached otherwise than tables are.
    Unsupported {
        /// The table's level.
        level: Level,
        /// The entry's word.
        word: u64,
    },
    /// The address is of no entry of a table that somebody needs.
    NoEntry(Output),
    /// It is pinned already, or still.
    Pinned(Output),
    /// It is not pinned.
    NotPinned(Output),
    /// More references to it than can be counted.
    Overflow(Output),
    /// The frame lost a mapping that may be cached: execute the guest's fence, call [`Direct::fenced`], and make the call again.
    Fence(Output),
    /// The frame is half a table of another kind: call [`Direct::work`], and make the call again.
    Work(Output),
    /// The budget is spent: make the call again.
    Budget,
    /// A table cannot be reached.
    Memory {
        /// The entry.
        at: Output,
        /// Why.
        error: E,
    },
    /// Somebody else writes this entry.
    Contended(Output),
}

impl<E: fmt::Debug> fmt::Display for Refused<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOwned(frame) => write!(f, "the frame at {frame} is not the guest's"),
            Self::Needed { frame, kind } => write!(f, "the frame at {frame} is needed as {kind:?}"),
            Self::Malformed { level, reason } => write!(f, "an entry of {level} is malformed: {reason}"),
            Self::Unsupported { level, word } => {
                write!(
                    f,
                    "the entry {word:#x} of {level} is large, global or not cached as tables are; map cached pages, and not globally"
                )
            }
            Self::NoEntry(at) => write!(f, "{at} is no entry of a table that is in use"),
            Self::Pinned(frame) => write!(f, "the frame at {frame} is pinned; unpin it first"),
            Self::NotPinned(frame) => write!(f, "the frame at {frame} is not pinned"),
            Self::Overflow(frame) => write!(f, "the frame at {frame} has too many references"),
            Self::Fence(frame) => {
                write!(f, "a mapping of the frame at {frame} may be cached; fence, and try again")
            }
            Self::Work(frame) => {
                write!(f, "the frame at {frame} is half a table; let the work go on, and try again")
            }
            Self::Budget => f.write_str("the budget is spent; try again to go on"),
            Self::Memory { at, error } => write!(f, "the entry at {at} cannot be reached: {error:?}"),
            Self::Contended(at) => write!(f, "the entry at {at} is written by somebody else"),
        }
    }
}

impl<E: fmt::Debug> core::error::Error for Refused<E> {}

/// The frames of all guests, and who needs them as what.
#[derive(Debug)]
pub struct Direct<'a, F: Format, M> {
    memory: &'a M,
    caps: F::Caps,
    /// Where the first frame is.
    first: Output,
    frames: &'a mut [Frame],
    /// For each guest, by its number, how many fences it had.
    fences: &'a mut [u64],
    /// For each processor the root that it has.
    roots: &'a mut [Option<u32>],
    /// The first frame that may have entries to let go.
    waiting: Option<u32>,
    format: PhantomData<F>,
}

/// The outcome of a request to a [`Direct`] whose tables are in `M`.
pub type Done<T, M> = Result<T, Refused<<M as TableMemory>::Error>>;

impl<'a, F: Format, M: TableMemory> Direct<'a, F, M> {
    /// The frames from `first` on, all of them free, for guests numbered from 0 on and so many processors. Frames past 2^32 are nobody's.
    pub fn new(
        memory: &'a M,
        caps: F::Caps,
        (first, frames): (Output, &'a mut [Frame]),
        fences: &'a mut [u64],
        roots: &'a mut [Option<u32>],
    ) -> Self {
        frames.fill(Frame::FREE);
        fences.fill(0);
        roots.fill(None);
        Self::resume(memory, caps, (first, frames), fences, roots)
    }

    /// Goes on with what another left behind between two calls: the list of what waits is made again, and fences are counted from 0 on.
    pub fn resume(
        memory: &'a M,
        caps: F::Caps,
        (first, frames): (Output, &'a mut [Frame]),
        fences: &'a mut [u64],
        roots: &'a mut [Option<u32>],
    ) -> Self {
        const {
            assert!(
                F::ROOT_BITS == F::INDEX_BITS && F::INDEX_BITS + 3 <= F::PAGE_SHIFT,
                "a table is in one frame"
            );
        }
        for frame in frames.iter_mut() {
            let count = frame.owner.and_then(|owner| fences.get(owner.0 as usize));
            frame.lost = frame.lost.filter(|lost| Some(lost) == count).map(|_| 0);
            frame.next = None;
        }
        fences.fill(0);
        let mut direct =
            Self { memory, caps, first, frames, fences, roots, waiting: None, format: PhantomData };
        for number in (0..direct.frames.len()).rev().filter_map(|number| u32::try_from(number).ok()) {
            direct.wait(number);
        }
        direct
    }

    /// What is known of a frame.
    pub fn frame(&self, at: Output) -> Option<&Frame> {
        self.frames.get(usize::try_from(self.number(at)?).ok()?)
    }

    /// A guest gets a frame that nobody has.
    ///
    /// # Errors
    /// There is no such frame or guest, or somebody has it.
    pub fn give(&mut self, owner: MachineId, at: Output) -> Done<(), M> {
        let number = self.number(at).filter(|number| self.record(*number).owner.is_none());
        let number = number.filter(|_| self.fences.len() > owner.0 as usize).ok_or(Refused::NotOwned(at))?;
        let next = self.record(number).next;
        *self.record_mut(number) = Frame { owner: Some(owner), next, ..Frame::FREE };
        Ok(())
    }

    /// A guest gives a frame back that nobody uses.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn release(&mut self, owner: MachineId, at: Output) -> Done<(), M> {
        let number = self.owned(owner, at)?;
        let frame = self.record(number);
        if frame.uses > 0 {
            return Err(Refused::Needed { frame: at, kind: frame.kind });
        }
        self.settled(number)?;
        let next = frame.next;
        *self.record_mut(number) = Frame { next, ..Frame::FREE };
        Ok(())
    }

    /// Every processor that ran the guest has executed a fence for everything of it since the last call.
    pub fn fenced(&mut self, guest: MachineId) {
        if let Some(fences) = self.fences.get_mut(guest.0 as usize) {
            *fences += 1;
        }
    }

    /// A frame becomes a table, and stays one until it is unpinned.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn pin(&mut self, owner: MachineId, at: Output, level: Level, budget: &mut u64) -> Done<(), M> {
        let number = self.owned(owner, at)?;
        if self.record(number).pinned {
            return Err(Refused::Pinned(at));
        }
        if level < Level::PAGES || level > F::root() {
            return Err(Refused::NoEntry(at));
        }
        self.hold(owner, Named::Table(number, level), budget)?;
        self.record_mut(number).pinned = true;
        Ok(())
    }

    /// A pinned table need not stay one.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn unpin(&mut self, owner: MachineId, at: Output) -> Done<(), M> {
        let number = self.owned(owner, at)?;
        let frame = self.record_mut(number);
        match (frame.pinned, frame.kind) {
            (true, Kind::Table(level)) => {
                frame.pinned = false;
                self.let_go(Named::Table(number, level));
                Ok(())
            }
            _ => Err(Refused::NotPinned(at)),
        }
    }

    /// The host writes to a frame by itself until it lets it go: till then it is memory that may be written.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn keep(&mut self, owner: MachineId, at: Output) -> Done<(), M> {
        let number = self.owned(owner, at)?;
        if !self.record(number).kept {
            self.take(owner, Named::Writable(number))?;
            self.record_mut(number).kept = true;
        }
        Ok(())
    }

    /// The host writes to a frame no more.
    ///
    /// # Errors
    /// [`Refused::NotOwned`].
    pub fn unkeep(&mut self, owner: MachineId, at: Output) -> Done<(), M> {
        let number = self.owned(owner, at)?;
        if core::mem::take(&mut self.record_mut(number).kept) {
            self.let_go(Named::Writable(number));
        }
        Ok(())
    }

    /// A processor gets a table as its root, which it loads at once.
    ///
    /// # Errors
    /// [`Refused`]: the processor keeps the root that it has.
    pub fn load(
        &mut self,
        processor: usize,
        owner: MachineId,
        at: Output,
        budget: &mut u64,
    ) -> Done<Output, M> {
        let number = self.owned(owner, at)?;
        if processor >= self.roots.len() {
            return Err(Refused::NotOwned(at));
        }
        self.hold(owner, Named::Table(number, F::root()), budget)?;
        self.replace_root(processor, Some(number));
        Ok(self.address(number))
    }

    /// A processor has none of the guests' roots any more.
    pub fn unload(&mut self, processor: usize) {
        self.replace_root(processor, None);
    }

    fn replace_root(&mut self, processor: usize, root: Option<u32>) {
        let old = self.roots.get_mut(processor).and_then(|place| core::mem::replace(place, root));
        if let Some(old) = old {
            self.let_go(Named::Table(old, F::root()));
        }
    }

    /// Writes entries in order, up to the first that is refused. How many were written, and why no more.
    pub fn update_all(
        &mut self,
        owner: MachineId,
        updates: &[Update],
        budget: &mut u64,
    ) -> (usize, Done<(), M>) {
        for (done, update) in updates.iter().enumerate() {
            if let Err(refused) = self.update(owner, *update, budget) {
                return (done, Err(refused));
            }
        }
        (updates.len(), Ok(()))
    }

    /// Writes an entry of a table that somebody needs.
    ///
    /// # Errors
    /// [`Refused`]: the entry is what it was.
    pub fn update(&mut self, owner: MachineId, update: Update, budget: &mut u64) -> Done<(), M> {
        let Update { at, word, marks } = update;
        let number = self.owned(owner, Output(at.0 >> F::PAGE_SHIFT << F::PAGE_SHIFT))?;
        let inside = at.0 & ((1 << F::PAGE_SHIFT) - 1);
        let frame = self.record(number);
        let level = match frame.kind {
            Kind::Table(level) if frame.needed > 0 && inside.is_multiple_of(8) => level,
            _ => return Err(Refused::NoEntry(at)),
        };
        if inside >> 3 >= F::entries(level) {
            return Err(Refused::NoEntry(at));
        }
        let new = self.named(word, level)?;
        self.hold(owner, new, budget)?;
        match self.write(at, level, word, marks) {
            Ok(old) => {
                // What was taken for it was well-formed, and processors set marks only.
                if let Ok(old) = self.named(old, level) {
                    self.let_go(old);
                }
                Ok(())
            }
            Err(refused) => {
                self.let_go(new);
                Err(refused)
            }
        }
    }

    /// Writes a word; what was there.
    fn write(&self, at: Output, level: Level, word: u64, marks: Marks) -> Done<u64, M> {
        let memory = |error| Refused::Memory { at, error };
        let mut old = self.memory.read(at).map_err(memory)?;
        for _ in 0..TRIES {
            let new = match marks {
                Marks::Replace => word,
                Marks::Keep => self.marked(word, old, level),
            };
            let found = self.memory.compare_exchange(at, old, new).map_err(memory)?;
            if found == old {
                return Ok(old);
            }
            old = found;
        }
        Err(Refused::Contended(at))
    }

    /// `word` with the marks of `old`, as far as it has a place for them.
    fn marked(&self, word: u64, old: u64, level: Level) -> u64 {
        let entries = [word, old].map(|word| F::decode(word, level, &self.caps));
        let entry = match entries {
            [Entry::Leaf(new), Entry::Leaf(old)] => Entry::Leaf(Leaf {
                accessed: new.accessed || old.accessed,
                dirty: new.dirty || old.dirty,
                ..new
            }),
            [Entry::Table(new), Entry::Table(old)] => {
                Entry::Table(Table { accessed: new.accessed || old.accessed, ..new })
            }
            [new, _] => new,
        };
        F::encode(&entry, level, &self.caps).unwrap_or(word)
    }
}
