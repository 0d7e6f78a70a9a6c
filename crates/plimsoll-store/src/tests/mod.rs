//! Tests of the store as a whole, and the pages they store.
mod away;
mod behaviour;
mod compact;
mod cost;
mod crash;
mod damage;
mod dense;
mod lanes;
mod model;
mod statistics;

use crate::{
    Cold, DenseCodec, DenseError, Fetched, GetError, Handle, HeapSlabs, PackError, Packer, SlabMemory, Store,
};
use lz4_flex::block::{compress_into, decompress_into};
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
pub(crate) fn page_of(seed: u64, random: usize) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    for (chunk, place) in page[..random].chunks_mut(8).zip(1..) {
        chunk.copy_from_slice(&mix(seed << 20 | place).to_le_bytes()[..chunk.len()]);
    }
    page[PAGE_SIZE - 16..].copy_from_slice(&(u128::from(seed) << 64 | 0xfeed).to_le_bytes());
    page
}

pub(crate) fn random_page(seed: u64) -> PageBytes {
    page_of(seed, PAGE_SIZE - 16)
}

pub(crate) fn same_page(word: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    crate::digest::fill(&mut page, word);
    page
}

/// A page that the store compresses and that [`Nibbles`] makes half as long again; no two seeds give one page.
fn nibble_page(seed: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    for (byte, place) in page[..PAGE_SIZE / 2].iter_mut().zip(0..) {
        *byte = mix(seed << 20 | place).to_le_bytes()[0] & 0xf;
    }
    page
}

/// A dense codec for pages without a byte above 15: packs two bytes into one, and then compresses.
struct Nibbles;

const PACKED: usize = PAGE_SIZE / 2;

impl DenseCodec for Nibbles {
    fn compress(&mut self, page: &PageBytes, into: &mut [u8]) -> Result<usize, DenseError> {
        let mut packed = [0; PACKED];
        for (byte, pair) in packed.iter_mut().zip(page.chunks_exact(2)) {
            if pair[0] > 0xf || pair[1] > 0xf {
                return Err(DenseError);
            }
            *byte = pair[0] | pair[1] << 4;
        }
        compress_into(&packed, into).map_err(|_| DenseError)
    }

    fn decompress(&mut self, bytes: &[u8], page: &mut PageBytes) -> Result<(), DenseError> {
        let mut packed = [0; PACKED];
        if decompress_into(bytes, &mut packed).ok() != Some(PACKED) {
            return Err(DenseError);
        }
        for (pair, byte) in page.chunks_exact_mut(2).zip(packed) {
            pair.copy_from_slice(&[byte & 0xf, byte >> 4]);
        }
        Ok(())
    }
}

fn read<M: SlabMemory>(store: &Store<M>, handle: Handle) -> Result<PageBytes, GetError> {
    let mut page = [0x55; PAGE_SIZE];
    store.get_with(handle, &mut page, &mut Nibbles).map(|()| page)
}

/// What a walk over all records came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Repacked {
    made: usize,
    outdated: usize,
    not_smaller: usize,
    unfaithful: usize,
    unreadable: usize,
    exhausted: usize,
}

/// One whole walk for cold objects, each of which is packed.
fn repack<M: SlabMemory>(store: &mut Store<M>, dense: &mut dyn DenseCodec) -> Repacked {
    let (mut fetched, mut packer, mut done) = (Fetched::new(), Packer::new(), Repacked::default());
    loop {
        match store.next_cold(100, &mut fetched) {
            Cold::Round => return done,
            Cold::NotYet => {}
            Cold::Found => match packer.pack(&fetched, dense) {
                Ok(packed) => match store.replace(&packed) {
                    Ok(crate::Replacement::Made) => done.made += 1,
                    Ok(crate::Replacement::Outdated) => done.outdated += 1,
                    Err(_) => done.exhausted += 1,
                },
                Err(PackError::NotSmaller) => done.not_smaller += 1,
                Err(PackError::Unfaithful) => done.unfaithful += 1,
                Err(PackError::Unreadable(_)) => done.unreadable += 1,
            },
        }
    }
}
