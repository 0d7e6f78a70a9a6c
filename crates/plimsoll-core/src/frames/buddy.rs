//! Frames in pieces of 2^order pages, aligned to their size, each piece of one kind.
//!
//! Enters: runs of free RAM, requests, pieces that are given back. Leaves: pieces. Free buddies are joined at once, except
//! for single pages that lie in a processor's cache ([`Cpu`]), where there is one: those are joined when they leave it for
//! the buddies, at the latest before a request would fail for them. So a request fails only when no free, aligned run of
//! its size exists anywhere. Where no cache is filled or emptied, a request and a return take at most one step per order. A
//! piece is given back as what it was taken for: another order, another kind, the middle of a piece or a piece that is free
//! already is refused, and nothing has changed.
//!
//! The table has one entry of 12 bytes per frame, 0.3 % of memory. The first entry of a piece says what the piece is:
//!
//! ```text
//! Gap                      no memory, or not ours
//! Body                     inside the piece that begins before it
//! Free   order, next, prev a link of its order's list
//! Cached cpu, next         a free page, a link of a processor's cache
//! Pooled order, level, next a link of its level's pool of tables
//! Used   order, kind
//! ```
//!
//! Bytes are never looked at: a piece comes with what its last user left in it. Frames in a pool of tables are zero, for
//! that is how they are put there.
mod cache;

pub use cache::Cpu;

use super::firmware::HostMap;
use cache::Caches;
use core::{fmt, ops::Range};
use plimsoll_types::{PageCount, Pfn};

/// The size of a piece: 2^order pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order(u8);

impl Order {
    /// One page.
    pub const PAGE: Self = Self(0);
    /// A block of 2 MiB.
    pub const BLOCK: Self = Self(9);
    /// 1 GiB, the largest that tables can map at once.
    pub const MAX: Self = Self(18);

    /// `None` above [`Order::MAX`].
    pub const fn new(order: u8) -> Option<Self> {
        if order <= Self::MAX.0 { Some(Self(order)) } else { None }
    }

    /// All, the smallest first.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator {
        (0..=Self::MAX.0).map(Self)
    }

    /// Its pages.
    pub const fn pages(self) -> PageCount {
        PageCount(1 << self.0)
    }

    const fn entries(self) -> u32 {
        1 << self.0
    }

    const fn above(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }

    const fn get(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.pages().bytes())
    }
}

const ORDERS: usize = Order::MAX.get() + 1;

/// A level of page tables, 1 where pages are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableLevel(u8);

/// Levels there are: five-level tables are the deepest.
const LEVELS: usize = 5;

impl TableLevel {
    /// `None` unless it is 1 to 5.
    pub const fn new(level: u8) -> Option<Self> {
        if level >= 1 && level as usize <= LEVELS { Some(Self(level)) } else { None }
    }

    const fn subscript(self) -> usize {
        self.0 as usize - 1
    }
}

impl fmt::Display for TableLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {}", self.0)
    }
}

/// What a piece is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The host's own data.
    Host,
    /// Read and written by a device at any time.
    Device,
    /// A page table. No guest's, so no guest can write one.
    Table(TableLevel),
    /// Guests' memory; who may reach it, [`super::extents`] knows by this number.
    Guest {
        /// The extent's slot.
        extent: u32,
    },
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host's"),
            Self::Device => f.write_str("a device's"),
            Self::Table(level) => write!(f, "a table of {level}"),
            Self::Guest { extent } => write!(f, "extent {extent}"),
        }
    }
}

/// A run of frames, as long as its order says and aligned to that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Its first frame.
    pub first: Pfn,
    /// Its size.
    pub order: Order,
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.order, self.first)
    }
}

/// What a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found {
    /// No memory, or not ours.
    Gap,
    /// A free piece.
    Free(Piece),
    /// A zeroed frame that waits to be a table.
    Pooled(Piece, TableLevel),
    /// A piece in use.
    Used(Piece, Kind),
}

/// The end of a list.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Entry {
    #[default]
    Gap,
    Body,
    Free {
        order: Order,
        next: u32,
        prev: u32,
    },
    Cached {
        cpu: Cpu,
        next: u32,
    },
    Pooled {
        order: Order,
        level: TableLevel,
        next: u32,
    },
    Used {
        order: Order,
        kind: Kind,
    },
}

/// The state of one frame, for the host to keep memory for: 12 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FrameEntry(Entry);

const _: () = assert!(size_of::<FrameEntry>() == 12);

/// A request that is refused. No piece has changed hands; but a refused [`Frames::allocate`] has emptied the caches, since
/// what lay there might have sufficed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FramesError {
    /// No free piece is large enough.
    NoMemory {
        /// The size asked for.
        order: Order,
        /// Free in smaller pieces.
        free: PageCount,
    },
    /// No frame of ours.
    NoSuchFrame {
        /// The one asked about.
        frame: Pfn,
    },
    /// The table is too small for these frames, or there are more than 2^32 - 1 of them.
    OutOfTable {
        /// The last frame.
        last: Pfn,
        /// Frames the table has room for.
        room: usize,
    },
    /// The frame was given before.
    Twice {
        /// The one.
        frame: Pfn,
    },
    /// What is given back is not what was taken.
    Mistaken {
        /// What was given back.
        given: Piece,
        /// As what.
        kind: Kind,
        /// What is there.
        found: Found,
    },
    /// The table contradicts itself: a bug here, or memory that was overwritten.
    Damaged {
        /// Where.
        frame: Pfn,
    },
}

impl fmt::Display for FramesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory { order, free } => {
                write!(f, "no piece of {order} is free; {} is, in smaller pieces", free.bytes())
            }
            Self::NoSuchFrame { frame } => write!(f, "{frame} is no memory of this host"),
            Self::OutOfTable { last, room } => {
                write!(f, "a table with room for {room} frames does not reach {last}; give it more")
            }
            Self::Twice { frame } => write!(f, "{frame} was given to the allocator before"),
            Self::Mistaken { given, kind, found } => {
                write!(f, "{given} was given back as {kind}, but ")?;
                match found {
                    Found::Gap => f.write_str("there is no memory"),
                    Found::Free(piece) => write!(f, "{piece} is free"),
                    Found::Pooled(piece, level) => write!(f, "{piece} waits to be a table of {level}"),
                    Found::Used(piece, kind) => write!(f, "{piece} is in use as {kind}"),
                }
            }
            Self::Damaged { frame } => write!(f, "the frame table is damaged at {frame}"),
        }
    }
}

impl core::error::Error for FramesError {}

/// A list through the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct List {
    head: u32,
    len: u32,
}

const EMPTY: List = List { head: NONE, len: 0 };

impl Default for List {
    fn default() -> Self {
        EMPTY
    }
}

/// All frames of a host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Frames<T> {
    table: T,
    /// The frame of the table's first entry: a multiple of the largest piece, so that buddies are buddies in the table.
    base: u64,
    free: [List; ORDERS],
    pools: [List; LEVELS],
    caches: Caches,
    /// Whose cache is used.
    cpu: Option<Cpu>,
    /// Frames that were ever given.
    pages: PageCount,
}

impl<T: AsRef<[FrameEntry]> + AsMut<[FrameEntry]>> Frames<T> {
    /// No frames yet, in a table that begins with the frame of `base` rounded down to 1 GiB.
    pub fn new(mut table: T, base: Pfn) -> Self {
        table.as_mut().fill(FrameEntry::default());
        Self {
            table,
            base: base_of(base),
            free: [EMPTY; ORDERS],
            pools: [EMPTY; LEVELS],
            caches: Caches::default(),
            cpu: None,
            pages: PageCount(0),
        }
    }

    /// All usable memory of a map. [`entries_for`] says how large the table must be.
    ///
    /// # Errors
    /// [`FramesError::OutOfTable`].
    pub fn of_map<const N: usize>(table: T, map: &HostMap<N>) -> Result<Self, FramesError> {
        let base = map.usable().next().map_or(Pfn(0), |region| region.first);
        let mut frames = Self::new(table, base);
        map.usable().try_for_each(|region| frames.add(region.first, region.pages))?;
        Ok(frames)
    }

    /// Adds free memory.
    ///
    /// # Errors
    /// [`FramesError::OutOfTable`], [`FramesError::Twice`].
    pub fn add(&mut self, first: Pfn, pages: PageCount) -> Result<(), FramesError> {
        let range = self.range(first, pages)?;
        let mut taken = range.clone().filter(|index| self.entry(*index) != Some(Entry::Gap));
        if let Some(index) = taken.next() {
            return Err(FramesError::Twice { frame: self.frame(index) });
        }
        range.clone().for_each(|index| self.set(index, Entry::Body));
        let mut at = range.start;
        while at < range.end {
            let fits =
                |order: &Order| at.is_multiple_of(order.entries()) && order.entries() <= range.end - at;
            let order = Order::all().rev().find(fits).unwrap_or(Order::PAGE);
            self.join(at, order);
            at += order.entries();
        }
        self.pages += pages;
        Ok(())
    }

    fn range(&self, first: Pfn, pages: PageCount) -> Result<Range<u32>, FramesError> {
        let room = self.table.as_ref().len();
        let end = first.0.saturating_add(pages.0);
        match (self.offset(first.0), self.offset(end)) {
            (Some(start), Some(end)) if end as usize <= room && end < NONE => Ok(start..end),
            _ => Err(FramesError::OutOfTable { last: Pfn(end.saturating_sub(1)), room }),
        }
    }

    /// Takes a piece. Its bytes are what its last user left.
    ///
    /// # Errors
    /// [`FramesError::NoMemory`].
    pub fn allocate(&mut self, order: Order, kind: Kind) -> Result<Piece, FramesError> {
        let asked = self.allocate_once(order, kind);
        if self.in_caches() == 0 || !matches!(asked, Err(FramesError::NoMemory { .. })) {
            return asked;
        }
        self.drain();
        self.allocate_once(order, kind)
    }

    fn allocate_once(&mut self, order: Order, kind: Kind) -> Result<Piece, FramesError> {
        if let (Order::PAGE, Some(cpu)) = (order, self.cpu) {
            return self.take_cached(cpu, kind);
        }
        let no_memory = FramesError::NoMemory { order, free: self.free_pages() };
        let index = self.carve(order)?.ok_or(no_memory)?;
        self.set(index, Entry::Used { order, kind });
        Ok(Piece { first: self.frame(index), order })
    }

    /// Cuts a piece out of the smallest free one that is large enough; it is in no list then.
    fn carve(&mut self, order: Order) -> Result<Option<u32>, FramesError> {
        let enough = Order::all().skip(order.get()).find(|larger| self.free[larger.get()].len > 0);
        let Some(larger) = enough else { return Ok(None) };
        let index = self.free[larger.get()].head;
        self.unlink(index, larger)?;
        // The lower half is divided on, the upper halves stay free.
        for half in Order::all().take(larger.get()).skip(order.get()).rev() {
            self.link(index + half.entries(), half);
        }
        Ok(Some(index))
    }

    /// Gives a piece back as what it was taken for.
    ///
    /// # Errors
    /// [`FramesError::Mistaken`] for anything but a piece in use, of that size and kind; [`FramesError::NoSuchFrame`].
    pub fn free(&mut self, piece: Piece, kind: Kind) -> Result<(), FramesError> {
        let index = self.used(piece, kind)?;
        match self.cpu {
            Some(cpu) if piece.order == Order::PAGE => self.put_cached(cpu, index),
            _ => {
                self.set(index, Entry::Body);
                self.join(index, piece.order);
            }
        }
        Ok(())
    }

    fn used(&self, piece: Piece, kind: Kind) -> Result<u32, FramesError> {
        let found = self.look(piece.first)?;
        if found == Found::Used(piece, kind) {
            self.index(piece.first)
        } else {
            Err(FramesError::Mistaken { given: piece, kind, found })
        }
    }

    /// What a frame belongs to.
    ///
    /// # Errors
    /// [`FramesError::NoSuchFrame`] outside of the table, [`FramesError::Damaged`].
    pub fn look(&self, frame: Pfn) -> Result<Found, FramesError> {
        let index = self.index(frame)?;
        for order in Order::all() {
            // Where a piece of this order that holds the frame would begin.
            let head = index - index % order.entries();
            let piece = |order| Piece { first: self.frame(head), order };
            match self.entry(head) {
                Some(Entry::Gap) if head == index => return Ok(Found::Gap),
                Some(Entry::Free { order: size, .. }) if size >= order => {
                    return Ok(Found::Free(piece(size)));
                }
                Some(Entry::Cached { .. }) if head == index => return Ok(Found::Free(piece(Order::PAGE))),
                Some(Entry::Pooled { order: size, level, .. }) if size >= order => {
                    return Ok(Found::Pooled(piece(size), level));
                }
                Some(Entry::Used { order: size, kind }) if size >= order => {
                    return Ok(Found::Used(piece(size), kind));
                }
                _ => {}
            }
        }
        Err(FramesError::Damaged { frame })
    }

    /// Puts a table's frame into its level's pool. It was taken as [`Kind::Table`] of that level, and it is all zero.
    ///
    /// # Errors
    /// [`FramesError::Mistaken`], [`FramesError::NoSuchFrame`].
    pub fn pool(&mut self, piece: Piece, level: TableLevel) -> Result<(), FramesError> {
        let index = self.used(piece, Kind::Table(level))?;
        let pool = &mut self.pools[level.subscript()];
        let next = core::mem::replace(&mut pool.head, index);
        pool.len += 1;
        self.set(index, Entry::Pooled { order: piece.order, level, next });
        Ok(())
    }

    /// Takes a zeroed frame for a table out of its level's pool, as a [`Kind::Table`]; `None` when the pool is empty.
    pub fn take_pooled(&mut self, level: TableLevel) -> Option<Piece> {
        let index = self.pools[level.subscript()].head;
        let Some(Entry::Pooled { order, next, .. }) = self.entry(index) else { return None };
        let pool = &mut self.pools[level.subscript()];
        *pool = List { head: next, len: pool.len - 1 };
        self.set(index, Entry::Used { order, kind: Kind::Table(level) });
        Some(Piece { first: self.frame(index), order })
    }

    /// Frames in a level's pool: so many tables can be made without asking for memory.
    pub fn pooled(&self, level: TableLevel) -> u32 {
        self.pools[level.subscript()].len
    }

    /// Frames that were given to the allocator.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// Free pieces of exactly that size.
    pub fn pieces(&self, order: Order) -> u32 {
        let cached = if order == Order::PAGE { self.in_caches() } else { 0 };
        self.free[order.get()].len + cached
    }

    /// Free pages.
    pub fn free_pages(&self) -> PageCount {
        self.free_from(Order::PAGE)
    }

    /// Free pages that lie in pieces of that size or larger ones. What [`Self::free_pages`] is above it is fragmented, or lies
    /// in caches, as single pages: how much a request could have, which empties those first, is known after
    /// [`Self::drain`].
    pub fn free_from(&self, order: Order) -> PageCount {
        let larger = Order::all().skip(order.get());
        larger.map(|order| PageCount(u64::from(self.pieces(order)) << order.0)).sum()
    }

    /// Recounts the table and compares.
    ///
    /// # Errors
    /// [`FramesError::Damaged`] with the first frame that is not accounted for.
    pub fn audit(&self) -> Result<(), FramesError> {
        let len = u32::try_from(self.table.as_ref().len()).unwrap_or(NONE);
        let (mut free, mut pools, mut pages) = ([0; ORDERS], [0; LEVELS], PageCount(0));
        let mut cached = 0;
        let mut at = 0;
        while at < len {
            let damaged = FramesError::Damaged { frame: self.frame(at) };
            let order = match self.entry(at) {
                Some(Entry::Gap) => {
                    at += 1;
                    continue;
                }
                None | Some(Entry::Body) => return Err(damaged),
                Some(Entry::Free { order, next, prev }) => {
                    let is_mine = |other, mine: fn(&Entry) -> Option<u32>| {
                        other == NONE || self.entry(other).as_ref().and_then(mine) == Some(at)
                    };
                    let linked = is_mine(next, |entry| match entry {
                        Entry::Free { prev, .. } => Some(*prev),
                        _ => None,
                    }) && is_mine(prev, |entry| match entry {
                        Entry::Free { next, .. } => Some(*next),
                        _ => None,
                    });
                    if !linked {
                        return Err(damaged);
                    }
                    free[order.get()] += 1;
                    order
                }
                Some(Entry::Pooled { order, level, .. }) => {
                    pools[level.subscript()] += 1;
                    order
                }
                Some(Entry::Cached { .. }) => {
                    cached += 1;
                    Order::PAGE
                }
                Some(Entry::Used { order, .. }) => order,
            };
            let body = at + 1..at + order.entries();
            if !at.is_multiple_of(order.entries())
                || body.clone().any(|index| self.entry(index) != Some(Entry::Body))
            {
                return Err(damaged);
            }
            pages += order.pages();
            at = body.end;
        }
        let counted = self.free.map(|list| list.len) == free && self.pools.map(|list| list.len) == pools;
        let is_whole =
            counted && cached == self.in_caches() && self.caches_are_whole() && pages == self.pages;
        if is_whole { Ok(()) } else { Err(FramesError::Damaged { frame: Pfn(self.base) }) }
    }

    fn frame(&self, index: u32) -> Pfn {
        Pfn(self.base + u64::from(index))
    }

    /// Where the entry of a frame is, or would be if the table went on.
    fn offset(&self, frame: u64) -> Option<u32> {
        frame.checked_sub(self.base).and_then(|offset| u32::try_from(offset).ok())
    }

    fn index(&self, frame: Pfn) -> Result<u32, FramesError> {
        let no_such_frame = FramesError::NoSuchFrame { frame };
        self.offset(frame.0).filter(|index| self.entry(*index).is_some()).ok_or(no_such_frame)
    }

    fn entry(&self, index: u32) -> Option<Entry> {
        self.table.as_ref().get(index as usize).map(|entry| entry.0)
    }

    fn set(&mut self, index: u32, entry: Entry) {
        if let Some(place) = self.table.as_mut().get_mut(index as usize) {
            *place = FrameEntry(entry);
        }
    }

    /// Frees a piece whose entries are all [`Entry::Body`], together with its free buddies.
    fn join(&mut self, index: u32, order: Order) {
        let (mut index, mut order) = (index, order);
        while let Some(above) = order.above() {
            let buddy = index ^ order.entries();
            let is_free = matches!(self.entry(buddy), Some(Entry::Free { order: size, .. }) if size == order);
            if !is_free || self.unlink(buddy, order).is_err() {
                break;
            }
            self.set(buddy, Entry::Body);
            index = index.min(buddy);
            order = above;
        }
        self.link(index, order);
    }

    fn link(&mut self, index: u32, order: Order) {
        let list = &mut self.free[order.get()];
        let next = core::mem::replace(&mut list.head, index);
        list.len += 1;
        if let Some(Entry::Free { order, next: after, .. }) = self.entry(next) {
            self.set(next, Entry::Free { order, next: after, prev: index });
        }
        self.set(index, Entry::Free { order, next, prev: NONE });
    }

    fn unlink(&mut self, index: u32, order: Order) -> Result<(), FramesError> {
        let Some(Entry::Free { next, prev, .. }) = self.entry(index) else {
            return Err(FramesError::Damaged { frame: self.frame(index) });
        };
        match self.entry(prev) {
            Some(Entry::Free { order, prev: before, .. }) => {
                self.set(prev, Entry::Free { order, next, prev: before });
            }
            _ => self.free[order.get()].head = next,
        }
        if let Some(Entry::Free { order, next: after, .. }) = self.entry(next) {
            self.set(next, Entry::Free { order, next: after, prev });
        }
        self.free[order.get()].len -= 1;
        Ok(())
    }
}

/// Where the largest piece that holds `frame` would begin.
const fn base_of(frame: Pfn) -> u64 {
    frame.0 - frame.0 % Order::MAX.pages().0
}

/// Entries that a table needs for all usable memory of a map: its gaps have entries, too.
pub fn entries_for<const N: usize>(map: &HostMap<N>) -> u64 {
    let (first, last) = (map.usable().next(), map.usable().next_back());
    let base = first.map_or(0, |region| base_of(region.first));
    last.map_or(0, |region| region.end().0 - base)
}
