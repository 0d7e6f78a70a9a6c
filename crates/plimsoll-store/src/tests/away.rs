//! Objects whose data is kept outside of slab memory: here in a map, which stands for a disk.
use super::{
    HeapStore, Nibbles,
    crash::{Mortal, sparse},
    nibble_page, random_page, read, repack, same_page, store,
};
use crate::{
    Away, Cold, Damage, Encoder, Fetched, GetError, Hand, Handle, How, Progress, Remote, Replacement,
    SlabMemory, Store, StoreError, Ticket, Whereabouts,
};
use alloc::{collections::BTreeMap, vec::Vec};
use plimsoll_types::{PAGE_SIZE, PageBytes};

/// Bytes by where they are.
type Elsewhere = BTreeMap<Away, Vec<u8>>;

fn put(store: &mut HeapStore, page: &PageBytes) -> Handle {
    store.put(page, &mut Encoder::new()).unwrap().unwrap().handle
}

/// Writes an object's bytes elsewhere, and returns what is needed to say so.
fn write<M: SlabMemory>(store: &Store<M>, handle: Handle, at: u64, elsewhere: &mut Elsewhere) -> Ticket {
    let (mut fetched, at) = (Fetched::new(), Away::new(at).unwrap());
    if let Whereabouts::Away(remote) = store.fetch(handle, &mut fetched).unwrap() {
        fetched.room().copy_from_slice(&elsewhere[&remote.at]);
    }
    elsewhere.insert(at, fetched.bytes().to_vec());
    fetched.ticket().unwrap().0
}

fn send<M: SlabMemory>(store: &mut Store<M>, handle: Handle, at: u64, elsewhere: &mut Elsewhere) {
    let ticket = write(store, handle, at, elsewhere);
    assert_eq!(store.send_away(&ticket, Away::new(at).unwrap()), Replacement::Made);
}

fn read_back<M: SlabMemory>(
    store: &Store<M>,
    handle: Handle,
    elsewhere: &Elsewhere,
) -> Result<PageBytes, GetError> {
    let (mut fetched, mut page) = (Fetched::new(), [0x55; PAGE_SIZE]);
    if let Whereabouts::Away(remote) = store.fetch(handle, &mut fetched)? {
        fetched.room().copy_from_slice(&elsewhere[&remote.at]);
    }
    fetched.unpack(&mut page, &mut Nibbles).map(|()| page)
}

#[test]
fn what_was_sent_away_takes_no_slab_and_reads_the_same_under_its_old_handle() {
    let (mut store, mut elsewhere) = (store(64), Elsewhere::new());
    let pages: Vec<_> = (1..=40).map(|seed| [nibble_page(seed), random_page(seed)]).collect();
    let pages: Vec<_> = pages.concat().into_iter().map(|page| (put(&mut store, &page), page)).collect();
    repack(&mut store, &mut Nibbles);
    repack(&mut store, &mut Nibbles);
    let data = store.stats().data;
    assert!(store.stats().dense.0 > 0 && store.stats().raw.0 > 0);
    for ((handle, _), at) in pages.iter().zip(7..) {
        send(&mut store, *handle, at, &mut elsewhere);
        assert_eq!(read(&store, *handle), Err(GetError::Away { handle: *handle }));
    }
    let stats = store.stats();
    assert_eq!((stats.data_slabs.0, stats.data.0, stats.away_data), (0, 0, data));
    assert_eq!((stats.objects(), stats.away.0, stats.pages.0), (80, 80, 80));
    for (handle, page) in &pages {
        assert_eq!(read_back(&store, *handle, &elsewhere), Ok(*page));
    }
    // Once more, as when a disk is cleaned.
    for ((handle, page), at) in pages.iter().zip(1000..) {
        send(&mut store, *handle, at, &mut elsewhere);
        assert_eq!(read_back(&store, *handle, &elsewhere), Ok(*page));
    }
    let remotes: Vec<Remote> = store.remotes().collect();
    for ((handle, _), (at, remote)) in pages.iter().zip((1000..).zip(remotes)) {
        assert_eq!(remote.at.bits(), at);
        assert_eq!(store.release(*handle), Ok(Some(remote)), "whoever keeps the bytes is told");
    }
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn an_object_that_lies_away_is_shared_counted_and_neither_packed_nor_moved() {
    let (mut store, mut elsewhere) = (store(64), Elsewhere::new());
    let page = nibble_page(1);
    let handle = put(&mut store, &page);
    assert_eq!(put(&mut store, &page), handle);
    send(&mut store, handle, 3, &mut elsewhere);
    let again = store.put(&page, &mut Encoder::new()).unwrap().unwrap();
    assert_eq!(again.how, How::Lz4, "its bytes are not here to be compared");
    store.release(again.handle).unwrap();
    assert_eq!(repack(&mut store, &mut Nibbles), super::Repacked::default());
    repack(&mut store, &mut Nibbles);
    assert_eq!(store.compact(1000).progress, Progress::Idle);
    assert_eq!(store.release(handle), Ok(None), "one reference is left");
    assert_eq!(read_back(&store, handle, &elsewhere), Ok(page));
    let remote = Remote { at: Away::new(3).unwrap(), length: elsewhere.first_key_value().unwrap().1.len() };
    assert_eq!(store.release(handle), Ok(Some(remote)));
    assert_eq!(store.release(handle), Err(StoreError::Stale { handle }));
}

#[test]
fn what_has_been_here_for_a_whole_walk_is_offered_once_a_round_until_it_is_away() {
    let (mut store, mut elsewhere) = (store(64), Elsewhere::new());
    let mut pages: Vec<_> = (1..=20).map(|seed| put(&mut store, &random_page(seed))).collect();
    pages.extend((1..=20).map(|seed| put(&mut store, &nibble_page(seed))));
    put(&mut store, &same_page(9));
    let offered = |store: &HeapStore| {
        let (mut hand, mut fetched, mut offered) = (Hand::default(), Fetched::new(), Vec::new());
        loop {
            match store.next_settled(7, &mut hand, &mut fetched) {
                Cold::Found => offered.extend(fetched.handle()),
                Cold::NotYet => {}
                Cold::Round => return offered,
            }
        }
    };
    repack(&mut store, &mut Nibbles);
    assert_eq!(offered(&store), [], "none has been here for a whole walk");
    repack(&mut store, &mut Nibbles);
    let young = put(&mut store, &random_page(99));
    let found = offered(&store);
    assert!(found.len() == 40 && pages.iter().all(|page| found.contains(page)));
    for (handle, at) in found.iter().zip(0..).skip(1) {
        send(&mut store, *handle, at, &mut elsewhere);
    }
    assert_eq!(offered(&store), [found[0]]);
    assert!(!found.contains(&young));
}

#[test]
fn a_ticket_is_good_for_the_bytes_it_was_given_for_and_no_others() {
    let (mut store, mut elsewhere) = (store(64), Elsewhere::new());
    let to = Away::new(9).unwrap();
    let gone = put(&mut store, &random_page(1));
    let ticket = write(&store, gone, 9, &mut elsewhere);
    store.release(gone).unwrap();
    assert_eq!(store.send_away(&ticket, to), Replacement::Outdated);
    let packed = put(&mut store, &nibble_page(2));
    let ticket = write(&store, packed, 9, &mut elsewhere);
    repack(&mut store, &mut Nibbles);
    assert_eq!(repack(&mut store, &mut Nibbles).made, 1);
    assert_eq!(store.send_away(&ticket, to), Replacement::Outdated, "its bytes are others now");
    let shared = put(&mut store, &random_page(3));
    let ticket = write(&store, shared, 9, &mut elsewhere);
    assert_eq!(put(&mut store, &random_page(3)), shared);
    assert_eq!(store.send_away(&ticket, to), Replacement::Made, "another reference changes no byte");
    let same = put(&mut store, &same_page(5));
    let mut fetched = Fetched::new();
    store.fetch(same, &mut fetched).unwrap();
    assert!(fetched.ticket().is_none(), "a page that is one word has no bytes to be elsewhere");
}

#[test]
fn bytes_that_come_back_damaged_are_noticed() {
    let (mut store, mut elsewhere) = (store(64), Elsewhere::new());
    let handle = put(&mut store, &random_page(1));
    send(&mut store, handle, 1, &mut elsewhere);
    for bytes in elsewhere.values_mut() {
        bytes[100] ^= 1;
    }
    let corrupt = GetError::Corrupt { handle, damage: Damage::Checksum };
    assert_eq!(read_back(&store, handle, &elsewhere), Err(corrupt));
    for bytes in elsewhere.values_mut() {
        bytes[100] ^= 1;
    }
    assert!(store.sabotage(handle));
    assert_eq!(read_back(&store, handle, &elsewhere), Err(corrupt));
}

#[test]
fn every_page_survives_a_death_at_any_write_of_sending_away() {
    let (start, held) = sparse();
    for countdown in 0.. {
        let memory = Mortal::new(start.memory().clone());
        let handles = || held.iter().map(|(handle, _)| *handle);
        let (mut store, _) = Store::recover(memory, handles());
        store.memory_mut().dies_after(countdown);
        let mut elsewhere = Elsewhere::new();
        for (round, first) in [(0, 0), (1, 1000)] {
            for ((handle, _), at) in held.iter().zip(first..).skip(round) {
                send(&mut store, *handle, at, &mut elsewhere);
            }
        }
        let Some(memory) = store.into_memory().into_dead() else {
            assert!(countdown > held.len(), "a place for each: {countdown} writes");
            return;
        };
        let (store, report) = Store::recover(memory, handles());
        assert_eq!(report.rejected, [], "died before write {countdown}");
        assert_eq!(store.remotes().count() as u64, store.stats().away.0);
        for (handle, page) in &held {
            assert_eq!(read_back(&store, *handle, &elsewhere), Ok(*page), "died before write {countdown}");
        }
    }
}

#[test]
fn a_store_that_was_cleared_has_nothing_and_whoever_was_at_work_in_it_finds_nothing() {
    let (mut store, mut elsewhere) = (store(64), Elsewhere::new());
    let handles: Vec<_> = (1..=40).map(|seed| put(&mut store, &random_page(seed))).collect();
    send(&mut store, handles[0], 7, &mut elsewhere);
    let under_way = write(&store, handles[1], 8, &mut elsewhere);
    let (mut hand, mut fetched) = (Hand::default(), Fetched::new());
    assert_eq!(store.next_settled(30, &mut hand, &mut fetched), Cold::NotYet);
    let named: Vec<_> = store.remotes().collect();
    assert_eq!(named.len(), 1);
    assert_eq!(store.clear(), named);
    assert_eq!(store.send_away(&under_way, Away::new(8).unwrap()), Replacement::Outdated);
    assert_eq!(store.next_settled(1, &mut hand, &mut fetched), Cold::Round);
    assert_eq!(store.remotes().count(), 0);
    assert!(
        handles.iter().all(|handle| store.release(*handle) == Err(StoreError::Stale { handle: *handle }))
    );
    assert_eq!((store.memory().live().count(), store.stats().objects()), (0, 0));
    let again = put(&mut store, &random_page(1));
    assert_eq!(read(&store, again).unwrap(), random_page(1));
    assert!(!handles.contains(&again));
}
