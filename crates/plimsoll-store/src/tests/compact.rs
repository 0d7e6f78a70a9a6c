//! Emptying sparse slabs: what it wins, and that nothing is lost to it.
use super::{HeapStore, Nibbles, mix, nibble_page, page_of, random_page, read, repack, store};
use crate::{Encoder, Handle, How, Progress, SlabKind, SlabMemory, Store, StoreError};
use alloc::vec::Vec;
use plimsoll_types::PageBytes;

type Held = Vec<(Handle, PageBytes)>;

fn page(seed: u64) -> PageBytes {
    match seed % 3 {
        0 => random_page(seed),
        1 => page_of(seed, 1_200),
        _ => nibble_page(seed),
    }
}

/// A store of several classes from which three quarters of the pages are gone again, at random.
fn sparse(pages: u64) -> (HeapStore, Held) {
    let (mut store, mut encoder, mut held) = (store(1_000), Encoder::new(), Vec::new());
    for seed in 1..=pages {
        held.push((store.put(&page(seed), &mut encoder).unwrap().unwrap().handle, page(seed)));
    }
    // Half of it dense, so that every kind of data is moved.
    for _ in 0..2 {
        repack(&mut store, &mut Nibbles);
    }
    let (gone, held): (Vec<_>, Vec<_>) =
        held.into_iter().partition(|(handle, _)| !mix(handle.to_bits()).is_multiple_of(4));
    for (handle, _) in gone {
        assert_eq!(store.release(handle), Ok(None));
    }
    (store, held)
}

fn assert_whole<M: SlabMemory>(store: &Store<M>, held: &Held) {
    for (handle, page) in held {
        assert_eq!(read(store, *handle), Ok(*page));
    }
}

/// Steps until nothing is left to do; how many objects moved.
fn compact_all(store: &mut HeapStore) -> u64 {
    let mut moved = 0;
    loop {
        let before = store.memory().held();
        let step = store.compact(500);
        assert!(store.memory().held() <= before);
        moved += step.moved;
        if step.progress == Progress::Idle {
            return moved;
        }
    }
}

#[test]
fn part_empty_slabs_become_full_ones_and_nothing_else_changes() {
    let (mut store, held) = sparse(3_000);
    let before = store.stats();
    assert!(before.fragmentation().per_mille() > 500, "{before:?}");
    let moved = compact_all(&mut store);
    let after = store.stats();
    assert!(moved > 100 && moved < held.len() as u64, "{moved} moved");
    assert!(after.fragmentation().per_mille() < 150, "{after:?}");
    assert!(after.data_slabs.0 * 2 < before.data_slabs.0);
    let unchanged = (before.pages, before.dense, before.lz4, before.raw, before.data, before.dense_data);
    assert_eq!((after.pages, after.dense, after.lz4, after.raw, after.data, after.dense_data), unchanged);
    assert_whole(&store, &held);
    let handles: Vec<_> = held.iter().map(|(handle, _)| *handle).collect();
    let (mut store, report) = Store::recover(store.into_memory(), handles);
    assert_eq!((report.rejected.len(), report.freed_objects, report.released_slabs), (0, 0, 0));
    assert_whole(&store, &held);
    for (handle, _) in held {
        assert_eq!(store.release(handle), Ok(None));
    }
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn a_full_store_is_left_alone() {
    let mut store = store(100);
    for seed in 1..=160 {
        store.put(&random_page(seed), &mut Encoder::new()).unwrap();
    }
    let step = store.compact(u32::MAX);
    assert_eq!((step.moved, step.released.0, step.progress), (0, 0, Progress::Idle));
}

#[test]
fn pages_stored_in_the_middle_of_a_round_go_into_the_room_there_is() {
    let (mut store, mut held) = sparse(1_500);
    let mut encoder = Encoder::new();
    let held_slabs = store.memory().held();
    assert_eq!(store.compact(1).progress, Progress::Working);
    // Raw pages and some that do not pack, fewer than were released: they fit without a slab more.
    for seed in (10_000..10_400).filter(|seed| seed % 3 != 2) {
        let stored = store.put(&page(seed), &mut encoder).unwrap().unwrap();
        assert_ne!(stored.how, How::Duplicate);
        held.push((stored.handle, page(seed)));
        assert!(store.memory().held() <= held_slabs, "page {seed} took a slab though others have room");
    }
    compact_all(&mut store);
    assert_whole(&store, &held);
}

#[test]
fn exhaustion_in_the_middle_of_a_round_loses_nothing() {
    let (mut store, mut held) = sparse(1_500);
    let mut encoder = Encoder::new();
    let limit = store.memory().held();
    store.memory_mut().set_capacity(limit);
    assert_eq!(store.compact(200).progress, Progress::Working);
    // Fill the memory to its last slot while the round is on.
    let mut refused = 0;
    for seed in 10_000..14_000 {
        match store.put(&page(seed), &mut encoder) {
            Ok(stored) => held.push((stored.unwrap().handle, page(seed))),
            Err(_) => refused += 1,
        }
        if seed % 10 == 0 {
            store.compact(70);
        }
    }
    assert!(refused > 1_000, "the memory was never full");
    compact_all(&mut store);
    assert!(store.memory().held() <= limit);
    assert_whole(&store, &held);
}

#[test]
fn releases_in_the_middle_of_a_round_end_it_well() {
    let (mut store, mut held) = sparse(1_500);
    while let Some((handle, _)) = held.pop() {
        store.compact(70);
        assert_eq!(store.release(handle), Ok(None));
    }
    assert_eq!(store.memory().held(), 0);
    assert_eq!(compact_all(&mut store), 0);
}

#[test]
fn slots_lost_to_damaged_records_do_not_keep_compaction_busy() {
    let (mut store, held) = sparse(600);
    let slabs = store.memory().live().collect::<Vec<_>>();
    for (slab, _) in slabs.iter().filter(|(_, tag)| matches!(tag.kind(), Some(SlabKind::Records { .. }))) {
        store.memory_mut().bytes_mut(*slab).fill(0);
    }
    for (handle, _) in &held {
        assert_eq!(store.release(*handle), Err(StoreError::Corrupt { handle: *handle }));
    }
    assert_eq!(store.compact(u32::MAX).progress, Progress::Round, "a round is worth trying");
    assert_eq!(store.compact(u32::MAX).progress, Progress::Idle, "another is not");
    store.put(&random_page(1), &mut Encoder::new()).unwrap();
    assert_eq!(store.compact(1).progress, Progress::Working, "until something has changed");
}
