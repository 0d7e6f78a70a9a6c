//! Cold objects packed densely: which, when, and that no codec loses a page.
use super::{
    HeapStore, Nibbles, Repacked, nibble_page, page_of, random_page, read, repack, same_page, store,
};
use crate::{
    Cold, Damage, DenseCodec, DenseError, Encoder, Fetched, GetError, Handle, How, Lane, NoDense, PackError,
    Packer, Replacement, SlabMemory, Sought, Store, StoreError, Whereabouts, digest,
};
use alloc::vec::Vec;
use plimsoll_types::{PAGE_SIZE, PageBytes};

fn put(store: &mut HeapStore, page: &PageBytes) -> Handle {
    store.put(page, &mut Encoder::new()).unwrap().unwrap().handle
}

/// A store with some pages of the kind that packs, all of them cold by now.
fn cold_store(pages: u64) -> (HeapStore, Vec<(Handle, PageBytes)>) {
    let mut store = store(64);
    let pages: Vec<_> =
        (1..=pages).map(|seed| (put(&mut store, &nibble_page(seed)), nibble_page(seed))).collect();
    assert_eq!(repack(&mut store, &mut Nibbles), Repacked::default(), "nothing is cold in the first walk");
    (store, pages)
}

fn assert_whole(store: &HeapStore, pages: &[(Handle, PageBytes)]) {
    for (handle, page) in pages {
        assert_eq!(read(store, *handle), Ok(*page));
    }
}

#[test]
fn an_object_that_was_here_for_a_whole_walk_is_packed_and_keeps_its_handle() {
    let (mut store, pages) = cold_store(100);
    assert_eq!(put(&mut store, &nibble_page(7)), pages[6].0, "a second reference");
    let before = store.stats();
    assert_eq!(repack(&mut store, &mut Nibbles), Repacked { made: 100, ..Repacked::default() });
    assert_whole(&store, &pages);
    let stats = store.stats();
    assert_eq!((stats.dense.0, stats.lz4.0, stats.duplicate.0, stats.pages), (100, 0, 1, before.pages));
    assert_eq!(stats.dense_data, stats.data);
    assert!(stats.data.0 < before.data.0 * 6 / 10 && stats.data_slabs.0 < before.data_slabs.0 * 7 / 10);
    assert_eq!(store.release(pages[6].0), Ok(None));
    for (handle, _) in &pages {
        assert_eq!(store.release(*handle), Ok(None));
    }
    assert_eq!(store.memory().held(), 0);
    assert_eq!((store.stats().data.0, store.stats().dense_data.0), (0, 0));
}

#[test]
fn what_was_packed_or_is_not_worth_it_is_not_offered_again() {
    let (mut store, _) = cold_store(10);
    for seed in 1..=10 {
        put(&mut store, &page_of(seed, 900));
        put(&mut store, &random_page(seed));
        put(&mut store, &same_page(seed));
    }
    let expected = Repacked { made: 10, ..Repacked::default() };
    assert_eq!(repack(&mut store, &mut Nibbles), expected, "the others have only just come");
    let expected = Repacked { not_smaller: 10, ..Repacked::default() };
    assert_eq!(repack(&mut store, &mut Nibbles), expected, "neither raw nor same-filled pages are offered");
    assert_eq!(repack(&mut store, &mut Nibbles), Repacked::default());
}

#[test]
fn an_object_in_the_record_of_another_one_is_new() {
    let (mut store, pages) = cold_store(2);
    assert_eq!(repack(&mut store, &mut Nibbles).made, 2);
    assert_eq!(store.release(pages[0].0), Ok(None));
    let handle = put(&mut store, &nibble_page(3));
    assert_eq!(handle.number(), pages[0].0.number(), "the record is used again");
    assert_eq!(repack(&mut store, &mut Nibbles), Repacked::default());
    assert_eq!(repack(&mut store, &mut Nibbles).made, 1);
}

#[test]
fn a_step_of_the_walk_is_bounded() {
    let (mut store, pages) = cold_store(100);
    let mut fetched = Fetched::new();
    for (handle, _) in &pages[..99] {
        assert_eq!(store.release(*handle), Ok(None));
    }
    let mut calls = 0;
    while store.next_cold(10, &mut fetched) == Cold::NotYet {
        calls += 1;
    }
    assert_eq!(calls, 9, "the one that is left is the hundredth record");
    assert_eq!(fetched.handle().map(crate::Handle::number), Some(crate::record::RecordNumber(99)));
}

/// Ways in which a codec can be bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Fails,
    LongerThanTheBuffer,
    NoBytes,
    OneByteShort,
    Garbage,
    AnotherPage,
    DecompressesNothing,
    CannotDecompress,
}

impl Fault {
    const ALL: [Self; 8] = [
        Self::Fails,
        Self::LongerThanTheBuffer,
        Self::NoBytes,
        Self::OneByteShort,
        Self::Garbage,
        Self::AnotherPage,
        Self::DecompressesNothing,
        Self::CannotDecompress,
    ];
}

struct Bad(Fault);

impl DenseCodec for Bad {
    fn compress(&mut self, page: &PageBytes, into: &mut [u8]) -> Result<usize, DenseError> {
        let mut page = *page;
        if self.0 == Fault::AnotherPage {
            page[100] ^= 1;
        }
        let length = Nibbles.compress(&page, into)?;
        match self.0 {
            Fault::Fails => return Err(DenseError),
            Fault::LongerThanTheBuffer => return Ok(into.len() + 1),
            Fault::NoBytes => return Ok(0),
            Fault::OneByteShort => return Ok(length - 1),
            Fault::Garbage => into[..length].fill(0x77),
            Fault::AnotherPage | Fault::DecompressesNothing | Fault::CannotDecompress => {}
        }
        Ok(length)
    }

    fn decompress(&mut self, bytes: &[u8], page: &mut PageBytes) -> Result<(), DenseError> {
        match self.0 {
            Fault::DecompressesNothing => Ok(()),
            Fault::CannotDecompress => Err(DenseError),
            _ => Nibbles.decompress(bytes, page),
        }
    }
}

#[test]
fn no_page_is_lost_to_a_bad_compressor() {
    for fault in Fault::ALL {
        let (mut store, pages) = cold_store(20);
        let before = store.stats();
        let done = repack(&mut store, &mut Bad(fault));
        let refused = if fault == Fault::Fails { done.not_smaller } else { done.unfaithful };
        assert_eq!((refused, done.made), (20, 0), "{fault:?}");
        assert_eq!(store.stats(), before, "{fault:?}");
        assert_whole(&store, &pages);
    }
}

#[test]
fn a_codec_that_decompresses_nothing_does_not_pass_by_what_was_there_before() {
    let (mut store, pages) = cold_store(1);
    let (mut fetched, mut packer) = (Fetched::new(), Packer::new());
    store.fetch(pages[0].0, &mut fetched).unwrap();
    assert!(packer.pack(&fetched, &mut Nibbles).is_ok(), "the page is in the packer's buffer now");
    let again = packer.pack(&fetched, &mut Bad(Fault::DecompressesNothing)).map(|_| ());
    assert_eq!(again, Err(PackError::Unfaithful));
    assert_eq!(store.release(pages[0].0), Ok(None));
}

#[test]
fn without_the_codec_a_dense_object_is_damage_and_nothing_else_is() {
    let (mut store, pages) = cold_store(3);
    let plain = put(&mut store, &page_of(1, 50));
    repack(&mut store, &mut Nibbles);
    let mut page = [0; PAGE_SIZE];
    for (handle, _) in &pages {
        let corrupt = GetError::Corrupt { handle: *handle, damage: Damage::Encoding };
        assert_eq!(store.get(*handle, &mut page), Err(corrupt));
    }
    assert_eq!(store.get(plain, &mut page), Ok(()));
    assert_eq!(repack(&mut store, &mut NoDense).not_smaller, 1);
}

#[test]
fn what_changed_since_it_was_fetched_is_not_replaced() {
    let (mut store, pages) = cold_store(3);
    let (mut fetched, mut packer) = (Fetched::new(), Packer::new());
    // Released, and its record taken by another page.
    store.fetch(pages[0].0, &mut fetched).unwrap();
    let packed = packer.pack(&fetched, &mut Nibbles).unwrap();
    assert_eq!(store.release(pages[0].0), Ok(None));
    assert_eq!(store.replace(&packed), Ok(Replacement::Outdated));
    let other = put(&mut store, &nibble_page(99));
    assert_eq!(store.replace(&packed), Ok(Replacement::Outdated));
    assert_eq!(read(&store, other), Ok(nibble_page(99)));
    // Replaced by somebody else in between.
    store.fetch(pages[1].0, &mut fetched).unwrap();
    let packed = packer.pack(&fetched, &mut Nibbles).unwrap();
    assert_eq!(store.replace(&packed), Ok(Replacement::Made));
    let before = store.stats();
    assert_eq!(store.replace(&packed), Ok(Replacement::Outdated));
    assert_eq!(store.stats(), before);
    // One more reference is no change.
    store.fetch(pages[2].0, &mut fetched).unwrap();
    let packed = packer.pack(&fetched, &mut Nibbles).unwrap();
    put(&mut store, &pages[2].1);
    assert_eq!(store.replace(&packed), Ok(Replacement::Made));
    assert_whole(&store, &pages[1..]);
}

#[test]
fn a_replacement_without_memory_changes_nothing_and_comes_again() {
    let (mut store, pages) = cold_store(30);
    let held = store.memory().held();
    store.memory_mut().set_capacity(held);
    let before = store.stats();
    let done = repack(&mut store, &mut Nibbles);
    assert_eq!(done, Repacked { exhausted: 30, ..Repacked::default() });
    assert_eq!(store.stats(), before);
    store.memory_mut().set_capacity(held + 1);
    assert_eq!(repack(&mut store, &mut Nibbles).made, 30);
    assert_whole(&store, &pages);
}

#[test]
fn a_page_that_is_here_densely_is_shared_after_it_was_confirmed() {
    let (mut store, pages) = cold_store(2);
    repack(&mut store, &mut Nibbles);
    let ((handle, page), mut fetched, mut scratch) = (pages[0], Fetched::new(), [0; PAGE_SIZE]);
    let found = digest(&page);
    assert_eq!(store.share(&page, &found), Ok(None), "not without the codec");
    assert_eq!(store.seek(&page, &found, &mut fetched), Ok(Sought::Candidate));
    assert!(fetched.confirm(&page, &mut scratch, &mut NoDense).is_none());
    assert!(
        fetched.confirm(&pages[1].1, &mut scratch, &mut Nibbles).is_none(),
        "the hash agrees, the bytes do not"
    );
    let confirmed = fetched.confirm(&page, &mut scratch, &mut Nibbles).unwrap();
    assert_eq!(store.share_confirmed(confirmed), Some(handle));
    assert_eq!(store.stats().duplicate.0, 1);
    for _ in 0..2 {
        assert_eq!(store.release(handle), Ok(None));
    }
    assert_eq!(store.share_confirmed(confirmed), None, "it is gone");
    // Others are found as before.
    assert_eq!(store.seek(&page, &found, &mut fetched), Ok(Sought::Absent));
    let again = put(&mut store, &page);
    assert_eq!(store.seek(&page, &found, &mut fetched), Ok(Sought::Shared(again)));
    assert_eq!(store.seek(&[0; PAGE_SIZE], &crate::Digest::Zero, &mut fetched), Err(StoreError::ZeroPage));
}

#[test]
fn what_was_fetched_is_good_whatever_becomes_of_the_object() {
    let mut store = store(8);
    let pages = [nibble_page(1), random_page(1), same_page(9)];
    let mut fetched = Fetched::new();
    let mut page = [0; PAGE_SIZE];
    assert_eq!(fetched.unpack(&mut page, &mut NoDense), Err(GetError::Nothing));
    for expected in pages {
        let handle = put(&mut store, &expected);
        assert_eq!(store.fetch(handle, &mut fetched), Ok(Whereabouts::Here));
        assert_eq!(store.release(handle), Ok(None));
        assert_eq!(fetched.unpack(&mut page, &mut NoDense), Ok(()));
        assert_eq!(page, expected);
        assert_eq!(store.fetch(handle, &mut fetched), Err(GetError::Stale { handle }));
        assert_eq!(
            (fetched.handle(), fetched.unpack(&mut page, &mut NoDense)),
            (None, Err(GetError::Nothing))
        );
    }
}

#[test]
fn dense_objects_outlive_the_manager() {
    let (mut store, pages) = cold_store(40);
    repack(&mut store, &mut Nibbles);
    let before = store.stats();
    let handles = pages.iter().map(|(handle, _)| *handle);
    let (mut store, report) = Store::recover(store.into_memory(), handles);
    assert_eq!((report.objects, report.rejected.len(), report.freed_objects), (40, 0, 0));
    assert_eq!((store.stats().dense, store.stats().data), (before.dense, before.data));
    assert_whole(&store, &pages);
    assert!(store.sabotage(pages[0].0));
    assert!(matches!(read(&store, pages[0].0), Err(GetError::Corrupt { damage: Damage::Checksum, .. })));
}

#[test]
fn an_insertion_looks_again_when_something_was_inserted_meanwhile() {
    let (mut store, mut encoder) = (store(8), Encoder::new());
    let (page, other) = (page_of(1, 500), page_of(2, 500));
    let found = digest(&page);
    assert_eq!(store.share(&page, &found), Ok(None));
    let first = put(&mut store, &page);
    // Somebody else's search in between is no reason not to look.
    assert_eq!(store.share(&other, &digest(&other)), Ok(None));
    let stored = store.insert(&page, &found, encoder.encode(&page, &found), Lane::default()).unwrap();
    assert_eq!((stored.how, stored.handle), (How::Duplicate, first));
}
