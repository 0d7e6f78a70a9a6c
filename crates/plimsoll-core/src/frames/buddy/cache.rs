//! Pages that a processor has at hand.
//!
//! Enters: which processor asks. Leaves: single pages, mostly without a look at the buddies. What must never happen: a request that
//! is refused while a cache holds what it needs.
//!
//! ```text
//! a processor's cache <-- BATCH pages at once --> the buddies
//!   at most 2 BATCH, the last given back is the first taken
//! ```
//!
//! A cache is a list through the table, as pools are, so that it costs no memory and a frame in it is known to be free: who gives
//! it back again is refused as ever. Its pages count as free. They are not joined with their buddies, which is the point, and why
//! all caches are emptied before a request fails. Nothing is zeroed here, as nowhere in this file: a page comes with what its last
//! user left, from a cache or not.
use super::{Entry, FrameEntry, Frames, FramesError, Kind, List, NONE, Order, Piece};
use plimsoll_types::PageCount;

/// Caches there are.
const CACHES: u8 = 8;
/// Pages that go between a cache and the buddies at once: as many as a block of 64 KiB has, so that what is taken is mostly
/// one block and what is given back may be one again.
const BATCH: u32 = 16;

pub(super) type Caches = [List; CACHES as usize];

/// A processor, as its cache knows it. Processors whose numbers are alike in their last three bits share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cpu(u8);

impl Cpu {
    /// The one that boots.
    pub const FIRST: Self = Self(0);

    /// The processor of that number.
    pub const fn new(number: u32) -> Self {
        let [low, ..] = number.to_le_bytes();
        Self(low % CACHES)
    }

    const fn subscript(self) -> usize {
        self.0 as usize
    }

    fn all() -> impl Iterator<Item = Self> {
        (0..CACHES).map(Self)
    }
}

impl<T: AsRef<[FrameEntry]> + AsMut<[FrameEntry]>> Frames<T> {
    /// From now on single pages come from that processor's cache and go there, whoever asks for them: to be called by whoever has
    /// taken the lock that frames are behind. With `None`, as at first, they come from the buddies.
    pub fn serve(&mut self, cpu: Option<Cpu>) {
        self.cpu = cpu;
    }

    /// Pages in a processor's cache. They are free.
    pub fn cached(&self, cpu: Cpu) -> PageCount {
        PageCount(self.caches[cpu.subscript()].len.into())
    }

    /// Gives all that is in caches to the buddies, to be joined with them. A request that would fail does that by itself.
    pub fn drain(&mut self) {
        for cpu in Cpu::all() {
            while let Some(index) = self.pop(cpu) {
                self.set(index, Entry::Body);
                self.join(index, Order::PAGE);
            }
        }
    }

    /// Takes a page from a cache, which is filled first if there is nothing in it.
    pub(super) fn take_cached(&mut self, cpu: Cpu, kind: Kind) -> Result<Piece, FramesError> {
        if self.caches[cpu.subscript()].len == 0 {
            self.refill(cpu)?;
        }
        let no_memory = FramesError::NoMemory { order: Order::PAGE, free: self.free_pages() };
        let index = self.pop(cpu).ok_or(no_memory)?;
        self.set(index, Entry::Used { order: Order::PAGE, kind });
        Ok(Piece { first: self.frame(index), order: Order::PAGE })
    }

    /// Puts a page that is in no list into a cache. A cache that is full gives a batch to the buddies: the pages that lie there
    /// longest, because those given back last may still be in the processor's own caches.
    pub(super) fn put_cached(&mut self, cpu: Cpu, index: u32) {
        self.push(cpu, index);
        if self.caches[cpu.subscript()].len <= 2 * BATCH {
            return;
        }
        let mut last = self.caches[cpu.subscript()].head;
        for _ in 1..=BATCH {
            last = self.next_cached(last);
        }
        let mut rest = self.next_cached(last);
        self.set(last, Entry::Cached { cpu, next: NONE });
        while rest != NONE {
            let next = self.next_cached(rest);
            self.caches[cpu.subscript()].len -= 1;
            self.set(rest, Entry::Body);
            self.join(rest, Order::PAGE);
            rest = next;
        }
    }

    /// Brings a batch, or what there is, from the smallest pieces: those are of use to nobody else.
    fn refill(&mut self, cpu: Cpu) -> Result<(), FramesError> {
        let mut missing = BATCH;
        while missing > 0 {
            let Some(smallest) = Order::all().find(|order| self.free[order.get()].len > 0) else { break };
            let fits = Order::all().take_while(|order| order.entries() <= missing).last();
            let order = fits.unwrap_or(Order::PAGE).min(smallest);
            let Some(index) = self.carve(order)? else { break };
            for page in index..index + order.entries() {
                self.push(cpu, page);
            }
            missing -= order.entries();
        }
        Ok(())
    }

    fn push(&mut self, cpu: Cpu, index: u32) {
        let list = &mut self.caches[cpu.subscript()];
        let next = core::mem::replace(&mut list.head, index);
        list.len += 1;
        self.set(index, Entry::Cached { cpu, next });
    }

    fn pop(&mut self, cpu: Cpu) -> Option<u32> {
        let List { head, len } = self.caches[cpu.subscript()];
        let Some(Entry::Cached { next, .. }) = self.entry(head) else { return None };
        self.caches[cpu.subscript()] = List { head: next, len: len - 1 };
        Some(head)
    }

    fn next_cached(&self, index: u32) -> u32 {
        match self.entry(index) {
            Some(Entry::Cached { next, .. }) => next,
            _ => NONE,
        }
    }

    /// Whether each cache is a list of as many pages as it counts, all of them its own.
    pub(super) fn caches_are_whole(&self) -> bool {
        Cpu::all().all(|cpu| {
            let List { head, len } = self.caches[cpu.subscript()];
            let end = (0..len).try_fold(head, |at, _| match self.entry(at) {
                Some(Entry::Cached { cpu: whose, next }) if whose == cpu => Some(next),
                _ => None,
            });
            end == Some(NONE)
        })
    }

    pub(super) fn in_caches(&self) -> u32 {
        self.caches.iter().map(|list| list.len).sum()
    }
}
