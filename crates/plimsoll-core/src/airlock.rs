//! Which page rests in which slot page of a machine's airlock, oldest first: the limbo queue.
//!
//! Enters: reservations, arrivals and departures of pages. Leaves: slot pages to move into, pages to store next, runs
//! of slot pages to zap. A slot is filled from its first page to its last and drained whole; slots are drained in the
//! order in which they were opened, so the queue is first in, first out to the grain of a block.
//!
//! A slot page is **empty**, **reserved** (a move into it is under way), **named** (a page word names it) or
//! **residue** (no word names it any more, but its memory has not been given back). Memory is never given back while
//! a word names it, and a slot is not reused before all of it has been given back.
//!
//! Everything here is derived: page words say the same, and a new manager rebuilds it from them.
use alloc::{boxed::Box, collections::VecDeque, vec, vec::Vec};
use plimsoll_types::{BLOCK_PAGES, PageCount, PageIndex, SlotPage};

/// What a slot page holds; page indices below [`RESIDUE`] stand for themselves.
const EMPTY: u32 = u32::MAX;
const RESERVED: u32 = u32::MAX - 1;
const RESIDUE: u32 = u32::MAX - 2;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Slot {
    /// What each slot page holds; unallocated while the slot is free.
    held: Box<[u32]>,
    /// The first slot page never handed out since the slot was opened.
    next: u32,
    home: Home,
    reserved: u32,
    named: u32,
    residue: u32,
}

impl Slot {
    const fn is_vacant(&self) -> bool {
        self.reserved == 0 && self.named == 0 && self.residue == 0
    }
}

/// How the pages of a slot go back when one of them is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Home {
    /// One by one.
    Pages,
    /// All at once, as the one huge page they came as.
    Block,
}

/// How large an airlock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Slots.
    pub slots: u32,
    /// Pages of one slot: a block, except in the model checker, whose slots have a page or two.
    pub slot_pages: u32,
}

impl Shape {
    /// That many slots of one block.
    pub const fn blocks(slots: u32) -> Self {
        Self { slots, slot_pages: BLOCK_PAGES }
    }
}

/// The airlock of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Airlock {
    slots: Vec<Slot>,
    slot_pages: u32,
    /// Slots in use, in the order in which they were opened.
    queue: VecDeque<u32>,
    free: Vec<u32>,
    /// The slot that is being filled: the last of `queue`, or none.
    open: Option<u32>,
    named: u64,
    residue: u64,
}

impl Airlock {
    /// An empty airlock.
    pub fn new(shape: Shape) -> Self {
        let Shape { slots, slot_pages } = shape;
        let slot =
            Slot { held: Box::default(), next: 0, home: Home::Pages, reserved: 0, named: 0, residue: 0 };
        Self {
            slots: vec![slot; slots as usize],
            slot_pages,
            queue: VecDeque::new(),
            free: (0..slots).rev().collect(),
            open: None,
            named: 0,
            residue: 0,
        }
    }

    /// Pages that rest in limbo.
    pub fn limbo(&self) -> PageCount {
        PageCount(self.named)
    }

    /// Pages of memory that no word names and that have not been zapped yet.
    pub fn residue(&self) -> PageCount {
        PageCount(self.residue)
    }

    /// Slots, used and free.
    pub fn slot_count(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// The largest run that can be reserved right now.
    pub fn room(&self) -> u32 {
        let in_open = self.open.map_or(0, |slot| self.slot_pages - self.slots[slot as usize].next);
        if self.free.is_empty() { in_open } else { self.slot_pages }
    }

    /// Reserves `pages` consecutive slot pages; a whole block gets a slot of its own, so that it can be moved as one
    /// huge page. `None` when there is no room.
    pub fn reserve(&mut self, pages: u32) -> Option<SlotPage> {
        let fits = |slot: &u32| self.slot_pages - self.slots[*slot as usize].next >= pages;
        let slot = match self.open.filter(fits) {
            Some(slot) => slot,
            None if pages <= self.slot_pages => self.open_slot()?,
            None => return None,
        };
        let entry = &mut self.slots[slot as usize];
        let start = entry.next;
        entry.held[start as usize..(start + pages) as usize].fill(RESERVED);
        entry.next += pages;
        entry.reserved += pages;
        if entry.next == self.slot_pages {
            self.open = None;
        }
        Some(SlotPage(slot * self.slot_pages + start))
    }

    fn open_slot(&mut self) -> Option<u32> {
        let slot = self.free.pop()?;
        self.queue.push_back(slot);
        // What was open stays in the queue with its tail unused, unless nothing is left in it.
        if let Some(left) = self.open.replace(slot) {
            self.retire(SlotPage(left * self.slot_pages));
        }
        let entry = &mut self.slots[slot as usize];
        entry.held = vec![EMPTY; self.slot_pages as usize].into_boxed_slice();
        entry.next = 0;
        entry.home = Home::Pages;
        Some(slot)
    }

    fn entry(&mut self, at: SlotPage) -> Option<(&mut Slot, usize)> {
        let (slot, place) = (at.0 / self.slot_pages, at.0 % self.slot_pages);
        let entry = self.slots.get_mut(slot as usize)?;
        (!entry.held.is_empty()).then_some((entry, place as usize))
    }

    /// The page arrived in its reserved slot page.
    pub fn arrive(&mut self, at: SlotPage, page: PageIndex) {
        if let Some((entry, place)) = self.entry(at).filter(|(entry, place)| entry.held[*place] == RESERVED) {
            entry.held[place] = page.0;
            entry.reserved -= 1;
            entry.named += 1;
            self.named += 1;
        }
    }

    /// The move into a reserved slot page did not happen; nothing is in it.
    pub fn cancel(&mut self, at: SlotPage) {
        if let Some((entry, place)) = self.entry(at).filter(|(entry, place)| entry.held[*place] == RESERVED) {
            entry.held[place] = EMPTY;
            entry.reserved -= 1;
            self.retire(at);
        }
    }

    /// No word names the slot page any more, but its memory is still there.
    pub fn abandon(&mut self, at: SlotPage) {
        let Some((entry, place)) = self.entry(at) else { return };
        match entry.held[place] {
            RESERVED => entry.reserved -= 1,
            EMPTY | RESIDUE => return,
            _ => {
                entry.named -= 1;
                self.named -= 1;
            }
        }
        let Some((entry, place)) = self.entry(at) else { return };
        entry.held[place] = RESIDUE;
        entry.residue += 1;
        self.residue += 1;
    }

    /// The slot that starts at `at` is for a block, which is to go back whole. Blocks have as many pages as slots.
    pub fn keep_whole(&mut self, at: SlotPage) {
        if let Some((entry, 0)) = self.entry(at) {
            entry.home = Home::Block;
        }
    }

    /// What is left in the slot that starts at `at` goes back page by page.
    pub fn keep_apart(&mut self, at: SlotPage) {
        if let Some((entry, 0)) = self.entry(at) {
            entry.home = Home::Pages;
        }
    }

    /// The block to which the slot page belongs, if all of it is still in its slot and is to go back whole: its first
    /// slot page and its first page.
    pub fn whole(&self, at: SlotPage) -> Option<(SlotPage, PageIndex)> {
        let slot = at.0 / self.slot_pages;
        let entry = self.slots.get(slot as usize)?;
        let is_whole = entry.home == Home::Block && entry.named == self.slot_pages;
        let first = entry.held.first().filter(|_| is_whole)?;
        Some((SlotPage(slot * self.slot_pages), PageIndex(*first)))
    }

    /// The page was moved out of its slot page, where nothing is left.
    pub fn emptied(&mut self, at: SlotPage) {
        if let Some((entry, place)) = self.entry(at).filter(|(entry, place)| entry.held[*place] < RESIDUE) {
            entry.held[place] = EMPTY;
            entry.named -= 1;
            self.named -= 1;
            self.retire(at);
        }
    }

    /// The oldest pages in limbo, at most `most` of them, all of one slot.
    pub fn oldest(&self, most: usize) -> impl Iterator<Item = (SlotPage, PageIndex)> + '_ {
        let oldest = self.queue.iter().copied().find(|slot| self.slots[*slot as usize].named > 0);
        let held = oldest.map_or(&[][..], |slot| &self.slots[slot as usize].held);
        let base = oldest.unwrap_or(0) * self.slot_pages;
        let named = (base..).zip(held).filter(|(_, page)| **page < RESIDUE);
        named.map(|(at, page)| (SlotPage(at), PageIndex(*page))).take(most)
    }

    /// Runs of residue to zap, oldest slots first, at most `most` of them.
    pub fn zap_runs(&self, most: usize) -> Vec<(SlotPage, u32)> {
        let with_residue = self.queue.iter().copied().filter(|slot| self.slots[*slot as usize].residue > 0);
        let runs = with_residue
            .flat_map(|slot| residue_runs(slot * self.slot_pages, &self.slots[slot as usize].held));
        runs.take(most).collect()
    }

    /// The run's memory was given back.
    pub fn zapped(&mut self, start: SlotPage, pages: u32) {
        for at in (start.0..start.0.saturating_add(pages)).map(SlotPage) {
            if let Some((entry, place)) =
                self.entry(at).filter(|(entry, place)| entry.held[*place] == RESIDUE)
            {
                entry.held[place] = EMPTY;
                entry.residue -= 1;
                self.residue -= 1;
                self.retire(at);
            }
        }
    }

    /// Frees the slot of `at` if nothing is left in it, except the one that is being filled.
    fn retire(&mut self, at: SlotPage) {
        let slot = at.0 / self.slot_pages;
        let entry = &mut self.slots[slot as usize];
        if !entry.is_vacant() {
            return;
        }
        if self.open == Some(slot) {
            // Nothing is left in it: it is filled from its start again, and is the youngest once more.
            entry.next = 0;
            self.queue.retain(|queued| *queued != slot);
            self.queue.push_back(slot);
            return;
        }
        entry.held = Box::default();
        self.queue.retain(|queued| *queued != slot);
        self.free.push(slot);
    }

    /// Stops filling the open slot, so that it can drain and be freed.
    pub fn close(&mut self) {
        if let Some(slot) = self.open.take() {
            self.retire(SlotPage(slot * self.slot_pages));
        }
    }

    /// Rebuilds the airlock of an earlier manager: `named` is every slot page a word names, `present` every one whose
    /// memory is there. What is present but not named becomes residue.
    pub fn recover(
        shape: Shape,
        named: impl Iterator<Item = (SlotPage, PageIndex)>,
        present: impl Fn(SlotPage) -> bool,
    ) -> Self {
        let Shape { slots, slot_pages } = shape;
        let mut airlock = Self::new(shape);
        airlock.free.clear();
        for entry in &mut airlock.slots {
            entry.held = vec![EMPTY; slot_pages as usize].into_boxed_slice();
            entry.next = slot_pages;
        }
        for (at, page) in named {
            if let Some((entry, place)) =
                airlock.entry(at).filter(|(entry, place)| entry.held[*place] == EMPTY)
            {
                entry.held[place] = page.0;
                entry.named += 1;
                airlock.named += 1;
            }
        }
        for slot in 0..slots {
            let base = slot * slot_pages;
            let entry = &mut airlock.slots[slot as usize];
            for (at, held) in (base..).map(SlotPage).zip(entry.held.iter_mut()) {
                if *held == EMPTY && present(at) {
                    *held = RESIDUE;
                    entry.residue += 1;
                    airlock.residue += 1;
                }
            }
            airlock.queue.push_back(slot);
            airlock.retire(SlotPage(base));
        }
        airlock
    }

    /// Bytes this bookkeeping takes.
    pub fn table_bytes(&self) -> usize {
        self.slots.iter().map(|slot| size_of::<Slot>() + size_of_val(&*slot.held)).sum()
    }
}

/// The runs of residue in a slot that starts at slot page `base`.
fn residue_runs(base: u32, held: &[u32]) -> impl Iterator<Item = (SlotPage, u32)> + '_ {
    let chunks = held.chunk_by(|left, right| (*left == RESIDUE) == (*right == RESIDUE));
    let placed = chunks.scan(base, |at, chunk| {
        let pages = u32::try_from(chunk.len()).unwrap_or(0);
        let start = *at;
        *at += pages;
        Some((start, pages, chunk[0] == RESIDUE))
    });
    placed.filter(|(_, _, is_residue)| *is_residue).map(|(start, pages, _)| (SlotPage(start), pages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_leave_in_the_order_in_which_their_slots_were_opened() {
        let mut airlock = Airlock::new(Shape { slots: 2, slot_pages: 2 });
        for page in [10, 11, 12].map(PageIndex) {
            let at = airlock.reserve(1).unwrap();
            airlock.arrive(at, page);
        }
        assert_eq!(airlock.oldest(9).map(|(_, page)| page.0).collect::<Vec<_>>(), [10, 11]);
        assert_eq!(airlock.limbo(), PageCount(3));
        airlock.abandon(SlotPage(0));
        airlock.abandon(SlotPage(1));
        assert_eq!(airlock.oldest(9).map(|(_, page)| page.0).collect::<Vec<_>>(), [12]);
        assert_eq!(airlock.zap_runs(9), [(SlotPage(0), 2)]);
        airlock.zapped(SlotPage(0), 2);
        assert_eq!((airlock.residue(), airlock.limbo()), (PageCount(0), PageCount(1)));
        assert_eq!(airlock.reserve(2), Some(SlotPage(0)), "a zapped slot is used again");
    }

    #[test]
    fn a_slot_is_not_reused_while_memory_is_left_in_it() {
        let mut airlock = Airlock::new(Shape { slots: 1, slot_pages: 2 });
        let at = airlock.reserve(2).unwrap();
        airlock.arrive(at, PageIndex(5));
        airlock.cancel(SlotPage(1));
        airlock.abandon(at);
        assert_eq!(airlock.reserve(1), None);
        airlock.zapped(at, 1);
        assert_eq!(airlock.reserve(1), Some(SlotPage(0)));
    }

    #[test]
    fn a_whole_block_gets_a_slot_of_its_own() {
        let mut airlock = Airlock::new(Shape::blocks(2));
        assert_eq!(airlock.reserve(1), Some(SlotPage(0)));
        assert_eq!(airlock.room(), 512);
        assert_eq!(airlock.reserve(512), Some(SlotPage(512)));
        assert_eq!(airlock.reserve(512), None);
    }

    #[test]
    fn recovery_keeps_what_words_name_and_zaps_the_rest() {
        let named = [(SlotPage(1), PageIndex(7))];
        let airlock = Airlock::recover(Shape { slots: 2, slot_pages: 2 }, named.into_iter(), |at| {
            at.0 != 3 && at.0 != 2
        });
        assert_eq!((airlock.limbo(), airlock.residue()), (PageCount(1), PageCount(1)));
        assert_eq!(airlock.zap_runs(9), [(SlotPage(0), 1)]);
        assert_eq!(airlock.oldest(9).collect::<Vec<_>>(), named);
        assert_eq!(airlock.room(), 2, "the slot with nothing in it is free");
    }
}
