//! What an object costs beside its data: at most 32 bytes, at every size, and one record slab only begun.
use super::{HeapStore, page_of, random_page, same_page, store};
use crate::{Encoder, SLAB_SIZE};
use alloc::vec::Vec;
use plimsoll_types::PageBytes;

extern crate std;

const BYTES_PER_OBJECT: u64 = 32;

/// Bytes an object, in thousandths, what a slab of records that is only begun may hold being set aside.
fn assert_cheap(store: &HeapStore) -> u64 {
    let stats = store.stats();
    let (objects, metadata) = (stats.objects(), stats.metadata.0);
    // From 128 Ki objects on, the slab that is only begun is within the bound.
    let begun = if objects >= 128 << 10 { 0 } else { SLAB_SIZE as u64 };
    assert!(metadata <= BYTES_PER_OBJECT * objects + begun, "{objects} objects: {metadata} bytes");
    metadata.saturating_sub(SLAB_SIZE as u64) * 1_000 / objects
}

/// Stores `count` objects, checking at every size from 10,000 on that a step of 61 meets, then releases
/// them, checking likewise.
fn grow_and_shrink(count: u64, page: impl Fn(u64) -> PageBytes) {
    let (mut store, mut encoder) = (store(usize::MAX), Encoder::new());
    let (mut handles, mut worst) = (Vec::new(), 0);
    for seed in 1..=count {
        handles.push(store.put(&page(seed), &mut encoder).unwrap().unwrap().handle);
        if seed >= 10_000 && seed % 61 == 0 {
            worst = worst.max(assert_cheap(&store));
        }
    }
    assert_eq!(store.stats().objects(), count);
    // Last in, first out: what is left is dense.
    while let Some(handle) = handles.pop() {
        store.release(handle).unwrap();
        if handles.len() >= 10_000 && handles.len() % 61 == 0 {
            worst = worst.max(assert_cheap(&store));
        }
    }
    assert_eq!(store.stats().objects(), 0);
    std::println!("at worst {worst} / 1000 bytes an object, and one record slab");
}

#[test]
fn pages_of_one_word_cost_at_most_32_bytes_each() {
    grow_and_shrink(200_000, same_page);
}

#[test]
fn raw_pages_cost_at_most_32_bytes_each_beside_their_data() {
    grow_and_shrink(30_000, random_page);
}

#[test]
fn compressed_pages_cost_at_most_32_bytes_each_beside_their_data() {
    grow_and_shrink(70_000, |seed| page_of(seed, 40));
}
