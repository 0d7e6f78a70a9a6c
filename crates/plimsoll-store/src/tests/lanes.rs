//! What is kept apart by lane: slots of one slab are one lane's, whatever becomes of the data in them.
use super::{HeapStore, Nibbles, mix, nibble_page, random_page, read, repack, store};
use crate::{
    Encoder, Handle, Lane, Progress, SlabId, SlabKind, SlabMemory, Store, StoreError, digest, record::Body,
};
use alloc::{collections::BTreeMap, vec::Vec};
use plimsoll_types::{ByteCount, PageBytes};

const LANES: [Lane; 3] = [Lane(0), Lane(2), Lane(255)];

fn put(store: &mut HeapStore, page: &PageBytes, lane: Lane) -> Result<Handle, StoreError> {
    let (mut encoder, digest) = (Encoder::new(), digest(page));
    Ok(store.insert(page, &digest, encoder.encode(page, &digest), lane)?.handle)
}

/// The slab that an object's data is in.
fn slab(store: &HeapStore, handle: Handle) -> SlabId {
    match store.resolve(handle).unwrap().1.body {
        Body::Data { extent, .. } => extent.slab,
        other => panic!("{other:?}"),
    }
}

fn lanes(store: &HeapStore) -> BTreeMap<SlabId, Lane> {
    let of_data = |(slab, tag): (SlabId, crate::SlabTag)| match tag.kind()? {
        SlabKind::Data { lane, .. } => Some((slab, lane)),
        SlabKind::Records { .. } => None,
    };
    store.memory().live().filter_map(of_data).collect()
}

/// Pages of three lanes, one after the other, so that they would share slabs.
fn mixed(pages: u64) -> (HeapStore, Vec<(Handle, PageBytes, Lane)>) {
    let mut store = store(1_000);
    let page = |seed| if seed % 2 == 0 { random_page(seed) } else { nibble_page(seed) };
    let held = (1..=pages).map(|seed| (page(seed), LANES[usize::try_from(mix(seed) % 3).unwrap()]));
    let held = held.collect::<Vec<_>>();
    let held = held.into_iter().map(|(page, lane)| (put(&mut store, &page, lane).unwrap(), page, lane));
    let held = held.collect();
    (store, held)
}

fn assert_apart(store: &HeapStore, held: &[(Handle, PageBytes, Lane)]) {
    let lanes = lanes(store);
    for (handle, page, lane) in held {
        assert_eq!(read(store, *handle), Ok(*page));
        assert_eq!(lanes.get(&slab(store, *handle)), Some(lane));
    }
}

#[test]
fn data_stays_in_its_lane_when_it_is_packed_recovered_and_moved() {
    let (mut store, held) = mixed(900);
    assert_apart(&store, &held);
    for _ in 0..2 {
        repack(&mut store, &mut Nibbles);
    }
    assert!(store.stats().dense.0 > 100);
    assert_apart(&store, &held);
    let handles: Vec<Handle> = held.iter().map(|(handle, ..)| *handle).collect();
    let (mut store, report) = Store::recover(store.into_memory(), handles);
    assert_eq!((report.rejected.len(), report.rejected_slabs), (0, 0));
    assert_apart(&store, &held);
    let (gone, held): (Vec<_>, Vec<_>) =
        held.into_iter().partition(|(handle, ..)| !mix(handle.to_bits()).is_multiple_of(4));
    gone.into_iter().for_each(|(handle, ..)| assert_eq!(store.release(handle), Ok(None)));
    let (before, mut moved) = (store.memory().held(), 0);
    loop {
        let step = store.compact(500);
        moved += step.moved;
        if step.progress == Progress::Idle {
            break;
        }
    }
    assert!(moved > 0 && store.memory().held() < before);
    assert_apart(&store, &held);
}

#[test]
fn growth_is_told_by_lane_and_a_slot_of_another_lane_is_better_than_none() {
    // One slab of records, one of data.
    let mut store = store(2);
    let (page, other) = (random_page(1), random_page(2));
    let first = put(&mut store, &page, Lane(1)).unwrap();
    let (mut encoder, digest) = (Encoder::new(), digest(&other));
    let growth =
        |store: &HeapStore, encoder: &mut Encoder, lane| store.growth(encoder.encode(&other, &digest), lane);
    assert_eq!(growth(&store, &mut encoder, Lane(1)), ByteCount(0));
    assert_eq!(growth(&store, &mut encoder, Lane(0)), ByteCount(64 << 10));
    let second = put(&mut store, &other, Lane(0)).unwrap();
    assert_eq!(slab(&store, first), slab(&store, second));
    for seed in 3..=16 {
        put(&mut store, &random_page(seed), Lane(2)).unwrap();
    }
    assert_eq!(put(&mut store, &random_page(17), Lane(1)), Err(StoreError::Exhausted));
    assert_eq!(read(&store, second), Ok(other));
}

#[test]
fn an_equal_page_is_one_object_whichever_lanes_it_comes_by() {
    let mut store = store(100);
    let page = random_page(1);
    let first = put(&mut store, &page, Lane(1)).unwrap();
    assert_eq!(put(&mut store, &page, Lane(2)), Ok(first));
    assert_eq!(lanes(&store).into_values().collect::<Vec<_>>(), [Lane(1)]);
}
