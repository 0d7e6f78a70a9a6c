//! Tests of the store as a whole, and the pages they store.
mod behaviour;
mod cost;
mod damage;
mod model;

use crate::{HeapSlabs, Store};
use plimsoll_types::{PAGE_SIZE, PageBytes};

type HeapStore = Store<HeapSlabs>;

fn store(slabs: usize) -> HeapStore {
    Store::new(HeapSlabs::new(slabs))
}

/// A number that looks random, and is the same in every run (the finaliser of SplitMix64).
pub(crate) fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// A page whose first `random` bytes do not compress and whose other bytes do; no two seeds give one page.
fn page_of(seed: u64, random: usize) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    for (chunk, place) in page[..random].chunks_mut(8).zip(1..) {
        chunk.copy_from_slice(&mix(seed << 20 | place).to_le_bytes()[..chunk.len()]);
    }
    page[PAGE_SIZE - 16..].copy_from_slice(&(u128::from(seed) << 64 | 0xfeed).to_le_bytes());
    page
}

fn random_page(seed: u64) -> PageBytes {
    page_of(seed, PAGE_SIZE - 16)
}

fn same_page(word: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    crate::digest::fill(&mut page, word);
    page
}
