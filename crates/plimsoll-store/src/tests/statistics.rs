//! What the counters and estimates say.
use super::{mix, page_of, random_page, store};
use crate::{Encoder, HeapSlabs, Lane, SLAB_SIZE, Store, digest};
use alloc::vec::Vec;
use plimsoll_types::{PAGE_SIZE, PageBytes};

#[test]
fn fragmentation_is_what_holds_no_encoded_byte_by_why_it_does_not() {
    let (mut store, mut encoder) = (store(8), Encoder::new());
    assert_eq!(store.stats().fragmentation().per_mille(), 0);
    let mut handles = Vec::new();
    for seed in 1..=16 {
        handles.push(store.put(&random_page(seed), &mut encoder).unwrap().unwrap().handle);
    }
    let full = store.stats().fragmentation();
    assert_eq!((full.free_slots.0, full.slot_waste.0, full.per_mille()), (0, 0, 0));
    for handle in &handles[..4] {
        assert_eq!(store.release(*handle), Ok(None));
    }
    let part = store.stats().fragmentation();
    assert_eq!((part.free_slots.0, part.slot_waste.0, part.per_mille()), (4 * PAGE_SIZE as u64, 0, 250));
    store.put(&page_of(1, 900), &mut encoder).unwrap();
    let (stats, both) = (store.stats(), store.stats().fragmentation());
    assert_eq!(both.data_slabs.0, 2 * SLAB_SIZE as u64);
    assert_eq!(stats.data.0 + both.free_slots.0 + both.slot_waste.0, both.data_slabs.0);
    assert!(both.slot_waste.0 > 0);
}

#[test]
fn what_a_store_is_foretold_to_grow_by_is_what_it_grows_by() {
    let (mut store, mut encoder) = (store(400), Encoder::new());
    let (mut handles, mut grown) = (Vec::new(), 0);
    for seed in 1..=6000_u64 {
        // Of every size, and some that are one word and take a record only.
        let page = match seed % 5 {
            0 => [u8::try_from(seed % 251).unwrap() + 1; PAGE_SIZE],
            _ => page_of(seed, usize::try_from(mix(seed) % 4000).unwrap()),
        };
        let digest = digest(&page);
        if store.share(&page, &digest).unwrap().is_none() {
            let slabs = |store: &Store<HeapSlabs>| store.stats().data_slabs.0 + store.stats().record_slabs.0;
            let encoded = encoder.encode(&page, &digest);
            let (before, foretold) = (slabs(&store), store.growth(encoded, Lane::default()));
            handles.push(store.insert(&page, &digest, encoded, Lane::default()).unwrap().handle);
            assert_eq!(slabs(&store) - before, foretold.0, "page {seed}");
            grown += foretold.0;
        }
        if mix(seed).is_multiple_of(3) && seed < 4000 {
            let place = usize::try_from(mix(seed + 1)).unwrap() % handles.len();
            store.release(handles.swap_remove(place)).unwrap();
        }
    }
    assert!(grown > 50 * SLAB_SIZE as u64, "it grew by {grown} only");
}

/// How many of 4,000 pages are estimated to be like another one, in percent.
fn near_duplicates(page: impl Fn(u64) -> PageBytes) -> u64 {
    let (mut store, mut encoder) = (store(4_000), Encoder::new());
    for seed in 1..=4_000 {
        store.put(&page(seed), &mut encoder).unwrap();
    }
    store.stats().near_duplicate.0 / 40
}

#[test]
fn pages_that_differ_a_little_are_estimated_and_others_are_not() {
    assert_eq!(near_duplicates(random_page), 0);
    // Mostly zeros, which says nothing about the rest.
    assert_eq!(near_duplicates(|seed| page_of(seed, 40)), 0);
    // Two of three pages differ from one another in a single word, so that one of the three is like an earlier one.
    let some = near_duplicates(|seed| {
        let mut page = random_page(if seed % 3 == 0 { seed } else { 1_000_000 + seed / 3 });
        let place = usize::try_from(mix(seed) % 500).unwrap() * 8;
        page[place..place + 8].copy_from_slice(&seed.to_le_bytes());
        page
    });
    assert!((22..45).contains(&some), "estimated {some} percent, where 33 are");
}

#[test]
fn a_page_is_not_like_an_earlier_version_of_itself_that_is_gone() {
    let (mut store, mut encoder) = (store(100), Encoder::new());
    for seed in 2..102 {
        store.put(&random_page(seed), &mut encoder).unwrap();
    }
    for version in 1..500_u64 {
        let mut page = random_page(1_000 + version % 40);
        page[..8].copy_from_slice(&version.to_le_bytes());
        let handle = store.put(&page, &mut encoder).unwrap().unwrap().handle;
        assert_eq!(store.stats().near_duplicate.0, 0);
        assert_eq!(store.release(handle), Ok(None));
    }
}
