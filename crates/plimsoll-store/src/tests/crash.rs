//! A manager that dies between any two writes to slab memory, while data moves: its successor finds every page.
use super::{HeapStore, Nibbles, mix, nibble_page, random_page, read, repack, store};
use crate::{Encoder, Handle, HeapSlabs, Progress, SlabId, SlabMemory, SlabTag, SlabsExhausted, Store};
use alloc::vec::Vec;
use plimsoll_types::PageBytes;

/// Memory that keeps what it was when the manager died: at its `countdown`-th write.
#[derive(Clone)]
pub(super) struct Mortal {
    memory: HeapSlabs,
    at_death: Option<HeapSlabs>,
    countdown: usize,
}

impl Mortal {
    /// Memory that lives.
    pub(super) const fn new(memory: HeapSlabs) -> Self {
        Self { memory, at_death: None, countdown: usize::MAX }
    }

    /// Has it die after so many writes more.
    pub(super) const fn dies_after(&mut self, writes: usize) {
        self.countdown = writes;
    }

    /// What it was when it died, if it did.
    pub(super) fn into_dead(self) -> Option<HeapSlabs> {
        self.at_death
    }

    /// Before every write: the one that is about to be made is lost if the manager dies here.
    fn beat(&mut self) {
        if self.countdown == 0 && self.at_death.is_none() {
            self.at_death = Some(self.memory.clone());
        }
        self.countdown = self.countdown.saturating_sub(1);
    }
}

impl SlabMemory for Mortal {
    fn acquire(&mut self, tag: SlabTag) -> Result<SlabId, SlabsExhausted> {
        self.beat();
        self.memory.acquire(tag)
    }

    fn release(&mut self, slab: SlabId) {
        self.beat();
        self.memory.release(slab);
    }

    fn bytes(&self, slab: SlabId) -> &[u8] {
        self.memory.bytes(slab)
    }

    fn bytes_mut(&mut self, slab: SlabId) -> &mut [u8] {
        self.beat();
        self.memory.bytes_mut(slab)
    }

    fn live(&self) -> impl Iterator<Item = (SlabId, SlabTag)> {
        self.memory.live()
    }

    fn capacity(&self) -> usize {
        self.memory.capacity()
    }

    fn held(&self) -> usize {
        self.memory.held()
    }
}

pub(super) type Held = Vec<(Handle, PageBytes)>;

/// Some pages of two classes, most of them gone again.
pub(super) fn sparse() -> (HeapStore, Held) {
    let (mut store, mut encoder, mut held) = (store(40), Encoder::new(), Vec::new());
    for seed in 1..=180 {
        let page = if seed % 2 == 0 { random_page(seed) } else { nibble_page(seed) };
        held.push((store.put(&page, &mut encoder).unwrap().unwrap().handle, page));
    }
    let (gone, held): (Vec<_>, Vec<_>) =
        held.into_iter().partition(|(handle, _)| !mix(handle.to_bits()).is_multiple_of(3));
    for (handle, _) in gone {
        assert_eq!(store.release(handle), Ok(None));
    }
    (store, held)
}

/// Does `act` again and again, dying one write later each time; how many writes it makes in all.
fn die_at_every_write(start: &HeapStore, held: &Held, act: impl Fn(&mut Store<Mortal>)) -> usize {
    for countdown in 0.. {
        let memory = Mortal::new(start.memory().clone());
        let handles = || held.iter().map(|(handle, _)| *handle);
        let (mut store, _) = Store::recover(memory, handles());
        store.memory_mut().dies_after(countdown);
        act(&mut store);
        let Some(memory) = store.into_memory().into_dead() else { return countdown };
        let (store, report) = Store::recover(memory, handles());
        assert_eq!(report.rejected, [], "died before write {countdown}");
        assert_eq!(store.stats().pages.0, held.len() as u64);
        for (handle, page) in held {
            assert_eq!(read(&store, *handle), Ok(*page), "died before write {countdown}");
        }
    }
    unreachable!("there are as many countdowns as writes")
}

#[test]
fn every_page_survives_a_death_at_any_write_of_packing() {
    let (store, held) = sparse();
    let writes = die_at_every_write(&store, &held, |store| {
        for _ in 0..2 {
            repack(store, &mut Nibbles);
        }
        assert!(store.stats().dense.0 > 8);
    });
    assert!(writes > 16, "a slot and a place for each: {writes} writes");
}

#[test]
fn every_page_survives_a_death_at_any_write_of_compaction() {
    let (store, held) = sparse();
    let writes = die_at_every_write(&store, &held, |store| {
        let before = store.memory().held();
        while store.compact(50).progress != Progress::Idle {}
        assert!(store.memory().held() < before);
    });
    assert!(writes > 20, "a slot and a place for each: {writes} writes");
}
