//! Bytes flipped all over slab memory, and then every operation: errors are fine, wrong bytes and panics are not.
use super::{HeapStore, Nibbles, mix, nibble_page, page_of, random_page, read, repack, same_page, store};
use crate::{Encoder, Handle, HeapSlabs, SLAB_SIZE, SlabMemory, SlabTag, Store, record::RECORD_SIZE};
use alloc::{vec, vec::Vec};
use core::ops::Range;
use plimsoll_types::{PAGE_SIZE, PageBytes};

const PAGES: u64 = 60;
/// One for each page: the first of the record slab.
const RECORDS: usize = 60;
const ROUNDS: u64 = 1_500;

/// Numbers that look random, from a seed that a failure prints.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, range: Range<u64>) -> u64 {
        self.0 = self.0.wrapping_add(1);
        range.start + mix(self.0) % (range.end - range.start)
    }

    fn place(&mut self, end: usize) -> usize {
        usize::try_from(self.roll(0..end as u64)).unwrap()
    }
}

fn page(seed: u64) -> PageBytes {
    match seed % 5 {
        0 => same_page(seed + 1),
        1 => random_page(seed),
        4 => nibble_page(seed),
        2 => page_of(seed, 40),
        _ => page_of(seed, 1_500),
    }
}

fn filled() -> (HeapStore, Vec<(Handle, PageBytes)>) {
    let (mut store, mut encoder, mut held) = (store(40), Encoder::new(), Vec::new());
    for seed in (0..PAGES).chain(0..PAGES / 3) {
        let stored = store.put(&page(seed), &mut encoder).unwrap().unwrap();
        held.push((stored.handle, page(seed)));
    }
    // A fifth is dense, and more is there to be packed later.
    for _ in 0..2 {
        repack(&mut store, &mut Nibbles);
    }
    for seed in (PAGES..PAGES + 20).filter(|seed| seed % 5 == 4) {
        held.push((store.put(&page(seed), &mut encoder).unwrap().unwrap().handle, page(seed)));
    }
    (store, held)
}

/// Damages records (most of the time, where it hurts most), data, and sometimes tags.
fn damage(memory: &mut HeapSlabs, dice: &mut Dice) {
    let slabs: Vec<_> = memory.live().collect();
    for _ in 0..dice.roll(1..40) {
        let (slab, tag) = slabs[dice.place(slabs.len())];
        let bytes = memory.bytes_mut(slab);
        let Some(last) = bytes.iter().rposition(|byte| *byte != 0) else { continue };
        let place = dice.place((last + 64).min(SLAB_SIZE));
        match dice.roll(0..8) {
            0 => bytes[place] = u8::try_from(dice.roll(0..256)).unwrap(),
            1 => {
                let end = (place + RECORD_SIZE).min(SLAB_SIZE);
                bytes[place..end].fill(u8::MAX);
            }
            2 => {
                // One record over another: two objects in one slot.
                let (from, to) = (dice.place(RECORDS) * RECORD_SIZE, dice.place(RECORDS) * RECORD_SIZE);
                bytes.copy_within(from..from + RECORD_SIZE, to);
            }
            3 if dice.roll(0..10) == 0 => {
                let bit = dice.roll(0..64);
                memory.retag(slab, SlabTag::from_bits(tag.to_bits() ^ 1 << bit));
            }
            _ => bytes[place] ^= 1 << dice.roll(0..8),
        }
    }
}

/// Reads everything: what is read is what was stored. How many pages were lost.
fn check(store: &HeapStore, held: &[(Handle, PageBytes)], seed: u64) -> usize {
    let mut lost = 0;
    for (handle, expected) in held {
        match read(store, *handle) {
            Ok(found) => assert!(found == *expected, "seed {seed}: {handle} gives wrong bytes"),
            Err(_) => lost += 1,
        }
    }
    lost
}

/// Uses the store in every way; its pages and the new ones are right or in error.
fn exercise(store: &mut HeapStore, held: &mut Vec<(Handle, PageBytes)>, dice: &mut Dice, seed: u64) {
    let mut encoder = Encoder::new();
    check(store, held, seed);
    for number in 0..PAGES * 2 {
        let page = page(number);
        if let Ok(Some(stored)) = store.put(&page, &mut encoder) {
            held.push((stored.handle, page));
        }
        if dice.roll(0..3) == 0 {
            let (handle, _) = held.swap_remove(dice.place(held.len()));
            let _ = store.release(handle);
        }
        if dice.roll(0..40) == 0 {
            repack(store, &mut Nibbles);
        }
        store.compact(30);
    }
    check(store, held, seed);
    let _ = store.sabotage(held[dice.place(held.len())].0);
    check(store, held, seed);
    let _ = store.stats();
}

#[test]
fn damage_under_a_living_store_gives_errors_and_never_wrong_bytes() {
    let (original, pages) = filled();
    let mut lost = 0;
    for seed in 0..ROUNDS {
        let (mut store, mut held, mut dice) = (original.clone(), pages.clone(), Dice(seed << 32));
        damage(store.memory_mut(), &mut dice);
        lost += check(&store, &held, seed);
        exercise(&mut store, &mut held, &mut dice, seed);
        for (handle, _) in held.drain(..) {
            let _ = store.release(handle);
        }
        // Whatever was lost to damage, recovery gets it back.
        let (store, _) = Store::recover(store.into_memory(), []);
        assert_eq!(store.memory().held(), 0, "seed {seed}");
    }
    assert!(lost > 100, "the damage did none: {lost} pages lost");
}

#[test]
fn recovery_from_damage_rejects_or_keeps_and_never_gives_wrong_bytes() {
    let (original, pages) = filled();
    let (mut lost, mut rejected) = (0, 0);
    for seed in 0..ROUNDS {
        let (mut store, mut held, mut dice) = (original.clone(), pages.clone(), Dice(seed << 32 | 1 << 31));
        damage(store.memory_mut(), &mut dice);
        let handles: Vec<_> = held.iter().map(|(handle, _)| *handle).collect();
        let (mut store, report) = Store::recover(store.into_memory(), handles);
        assert_eq!(report.references + report.rejected.len() as u64, held.len() as u64, "seed {seed}");
        assert_eq!(store.stats().pages.0, report.references, "seed {seed}");
        rejected += report.rejected.len();
        lost += check(&store, &held, seed);
        held.retain(|(handle, _)| report.rejected.iter().all(|it| it.handle != *handle));
        exercise(&mut store, &mut held, &mut dice, seed);
    }
    assert!(rejected > 100 && lost > rejected, "{rejected} rejected, {lost} lost");
}

#[test]
fn any_bits_are_a_handle_that_does_no_harm() {
    let (mut store, held) = filled();
    let mut dice = Dice(7);
    let mut page = [0; PAGE_SIZE];
    for _ in 0..20_000 {
        // Near a real handle half of the time.
        let near = held[dice.place(held.len())].0.to_bits();
        let bits = if dice.roll(0..2) == 0 { near ^ 1 << dice.roll(0..60) } else { dice.roll(0..1 << 60) };
        let handle = Handle::from_bits(bits).unwrap();
        assert!(store.get(handle, &mut page).is_err());
        assert!(store.release(handle).is_err());
    }
    assert_eq!(check(&store, &held, 7), 0);
}

#[test]
fn memory_of_pure_noise_recovers_to_an_empty_store() {
    let (store, held) = filled();
    let handles: Vec<_> = held.iter().map(|(handle, _)| *handle).collect();
    let mut memory = store.into_memory();
    let slabs: Vec<_> = memory.live().collect();
    for (slab, _) in slabs {
        let noise: Vec<u8> = (0..SLAB_SIZE as u64 / 8).flat_map(|word| mix(word).to_le_bytes()).collect();
        memory.bytes_mut(slab).copy_from_slice(&noise);
    }
    let (store, report) = Store::recover(memory, handles);
    assert_eq!((report.references, report.rejected.len()), (0, held.len()));
    assert_eq!(store.memory().held(), 0);
    assert_eq!(vec![0u8; 0], store.memory().bytes(crate::SlabId(0)));
}
