//! One behaviour a test.
use super::{page_of, random_page, same_page, store};
use crate::{
    Damage, Digest, Encoder, GetError, HeapSlabs, How, Lane, Rejection, SLAB_SIZE, SlabId, SlabKind,
    SlabMemory, SlabTag, Store, StoreError, digest,
    record::{Body, Record},
};
use alloc::{vec, vec::Vec};
use plimsoll_types::{PAGE_SIZE, PageBytes};

fn put(store: &mut Store<HeapSlabs>, page: &PageBytes) -> crate::Stored {
    store.put(page, &mut Encoder::new()).unwrap().unwrap()
}

fn read(store: &Store<HeapSlabs>, handle: crate::Handle) -> Result<PageBytes, GetError> {
    let mut page = [0x55; PAGE_SIZE];
    store.get(handle, &mut page).map(|()| page)
}

#[test]
fn zero_pages_are_not_stored() {
    let mut store = store(4);
    let page = [0; PAGE_SIZE];
    assert_eq!(store.put(&page, &mut Encoder::new()), Ok(None));
    assert_eq!(store.share(&page, &digest(&page)), Err(StoreError::ZeroPage));
    assert_eq!(store.stats().objects(), 0);
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn pages_of_one_word_cost_a_record_and_no_data() {
    let mut store = store(4);
    let page = same_page(0xdead_beef);
    let first = put(&mut store, &page);
    let second = put(&mut store, &page);
    assert_eq!((first.how, second.how), (How::Same, How::Duplicate));
    assert_eq!(first.handle, second.handle);
    assert_eq!(read(&store, first.handle), Ok(page));
    let stats = store.stats();
    assert_eq!((stats.same.0, stats.duplicate.0, stats.data.0, stats.data_slabs.0), (1, 1, 0, 0));
}

#[test]
fn pages_of_every_compressibility_come_back() {
    let mut store = store(1_000);
    let mut handles = Vec::new();
    for random in (0..PAGE_SIZE - 16).step_by(7) {
        let page = page_of(random as u64 + 1, random);
        let stored = put(&mut store, &page);
        handles.push((stored, page));
    }
    for (stored, page) in &handles {
        assert_eq!(read(&store, stored.handle), Ok(*page));
    }
    let stats = store.stats();
    assert!(stats.lz4.0 > 300 && stats.raw.0 > 100, "{stats:?}");
    assert_eq!(stats.pages.0, handles.len() as u64);
    for (stored, _) in &handles {
        assert_eq!(store.release(stored.handle), Ok(None));
    }
    assert_eq!(store.memory().held(), 0, "a slab whose last object goes is released");
}

#[test]
fn compressed_pages_are_at_most_three_quarters_and_others_are_raw() {
    let mut encoder = Encoder::new();
    let (mut longest, mut raw) = (0, 0);
    for random in 2_900..3_200 {
        let page = page_of(1, random);
        let encoded = encoder.encode(&page, &digest(&page));
        if encoded.is_raw() {
            assert_eq!(encoded.bytes(), page);
            raw += 1;
        } else {
            longest = longest.max(encoded.bytes().len());
        }
    }
    assert_eq!(longest, 3_072);
    assert!(raw > 50);
    let mut store = store(4);
    assert_eq!(put(&mut store, &random_page(3)).how, How::Raw);
    assert_eq!(store.stats().data.0, PAGE_SIZE as u64);
}

#[test]
fn a_page_that_came_between_the_two_phases_is_shared() {
    let mut store = store(4);
    let (page, mut encoder) = (page_of(1, 500), Encoder::new());
    let digest = digest(&page);
    assert_eq!(store.share(&page, &digest), Ok(None));
    let other = put(&mut store, &page);
    let stored = store.insert(&page, &digest, encoder.encode(&page, &digest), Lane::default()).unwrap();
    assert_eq!((stored.how, stored.handle), (How::Duplicate, other.handle));
}

#[test]
fn pages_with_one_hash_and_different_bytes_are_both_stored() {
    let mut store = store(4);
    let (one, other) = (page_of(1, 900), page_of(2, 900));
    let digest = digest(&one);
    let first = put(&mut store, &one).handle;
    assert_eq!(store.share(&other, &digest), Ok(None), "the hash agrees, the bytes do not");
    let mut encoder = Encoder::new();
    let second = store.insert(&other, &digest, encoder.encode(&other, &digest), Lane::default()).unwrap();
    assert_eq!(second.how, How::Lz4);
    assert_ne!(second.handle, first);
    // Each is found among the two by its bytes.
    assert_eq!(store.share(&one, &digest), Ok(Some(first)));
    assert_eq!(store.share(&other, &digest), Ok(Some(second.handle)));
    assert_eq!(read(&store, first), Ok(one));
    // A page stored under a hash that is not its own is not believed.
    let corrupt = GetError::Corrupt { handle: second.handle, damage: Damage::Checksum };
    assert_eq!(read(&store, second.handle), Err(corrupt));
    for handle in [first, first, second.handle, second.handle] {
        assert_eq!(store.release(handle), Ok(None));
    }
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn a_digest_that_is_not_the_pages_changes_nothing() {
    let mut store = store(4);
    let (page, mut encoder) = (page_of(1, 100), Encoder::new());
    let (true_digest, wrong) = (digest(&page), Digest::Same(7));
    assert_eq!(store.share(&page, &wrong), Err(StoreError::WrongDigest));
    let encoded = encoder.encode(&page, &wrong);
    assert_eq!(store.insert(&page, &true_digest, encoded, Lane::default()), Err(StoreError::WrongDigest));
    // Nor after a page that the digest is of was sought in vain.
    assert_eq!(store.share(&same_page(7), &wrong), Ok(None));
    let encoded = encoder.encode(&page, &wrong);
    assert_eq!(store.insert(&page, &wrong, encoded, Lane::default()), Err(StoreError::WrongDigest));
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn stale_handles_are_noticed() {
    let mut store = store(4);
    let stale = put(&mut store, &page_of(1, 100)).handle;
    assert_eq!(store.release(stale), Ok(None));
    for seed in 2..10 {
        let fresh = put(&mut store, &page_of(seed, 100)).handle;
        assert_ne!(fresh, stale);
        assert_eq!(read(&store, stale), Err(GetError::Stale { handle: stale }));
        assert_eq!(store.release(stale), Err(StoreError::Stale { handle: stale }));
        assert!(!store.sabotage(stale));
        assert_eq!(store.release(fresh), Ok(None), "the record and its slab are reused each time");
    }
}

#[test]
fn an_object_with_all_the_references_there_can_be_is_stored_again() {
    let mut store = store(4);
    let page = page_of(1, 100);
    let full = put(&mut store, &page).handle;
    let (number, record) = (full.number(), store.records.peek(&store.memory, full.number()).unwrap());
    store.records.write(&mut store.memory, number, &Record { count: u32::MAX, ..record });
    let second = put(&mut store, &page);
    assert_eq!(second.how, How::Lz4);
    assert_ne!(second.handle, full);
    assert_eq!(put(&mut store, &page).handle, second.handle);
}

#[test]
fn exhaustion_leaves_nothing_half_done() {
    let mut store = store(2);
    let mut pages = Vec::new();
    let failed = loop {
        let page = random_page(pages.len() as u64 + 1);
        match store.put(&page, &mut Encoder::new()) {
            Ok(stored) => pages.push((stored.unwrap().handle, page)),
            Err(error) => break error,
        }
    };
    assert_eq!((failed, pages.len()), (StoreError::Exhausted, 16), "one slab of records, one of data");
    let before = store.stats();
    // Another class needs a data slab; the record that was free stays free.
    assert_eq!(store.put(&page_of(99, 10), &mut Encoder::new()), Err(StoreError::Exhausted));
    assert_eq!(store.stats(), before);
    let (handle, page) = pages.pop().unwrap();
    assert_eq!(store.release(handle), Ok(None));
    assert_eq!(put(&mut store, &page).how, How::Raw);
}

#[test]
fn a_data_slab_taken_in_vain_is_given_back() {
    // Room for the data slab and not for the record slab.
    let mut store = store(1);
    assert_eq!(store.put(&random_page(1), &mut Encoder::new()), Err(StoreError::Exhausted));
    assert_eq!(store.memory().held(), 0);
    assert_eq!(put(&mut store, &same_page(1)).how, How::Same);
}

#[test]
fn sabotage_is_always_noticed() {
    let mut store = store(64);
    let pages = (1..200).map(|seed| page_of(seed, usize::try_from(seed).unwrap() * 20));
    let pages: Vec<_> = pages.chain([same_page(3), same_page(u64::MAX)]).collect();
    for page in pages {
        let handle = put(&mut store, &page).handle;
        assert!(store.sabotage(handle));
        assert!(matches!(read(&store, handle), Err(GetError::Corrupt { .. })));
        assert_eq!(store.share(&page, &digest(&page)), Ok(None), "a damaged page is nobody's duplicate");
        assert_eq!(store.release(handle), Ok(None));
    }
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn recovery_counts_references_anew_and_frees_what_no_word_names() {
    let mut store = store(64);
    let (kept, leaked) = (page_of(1, 100), random_page(2));
    let handle = put(&mut store, &kept).handle;
    put(&mut store, &leaked);
    for _ in 0..5 {
        put(&mut store, &kept);
    }
    let (mut store, report) = Store::recover(store.into_memory(), [handle, handle]);
    assert_eq!((report.objects, report.references, report.freed_objects), (1, 2, 1));
    assert_eq!((report.released_slabs, report.rejected.len()), (1, 0));
    assert_eq!(read(&store, handle), Ok(kept));
    assert_eq!(store.stats().pages.0, 2);
    assert_eq!(put(&mut store, &kept).how, How::Duplicate);
    for _ in 0..3 {
        assert_eq!(store.release(handle), Ok(None));
    }
    assert_eq!(store.release(handle), Err(StoreError::Stale { handle }));
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn recovery_without_all_words_keeps_what_they_may_name_until_all_are_there() {
    let mut store = store(64);
    let (shared, other) = (page_of(1, 100), random_page(2));
    let (handle, lost) = (put(&mut store, &shared).handle, put(&mut store, &other).handle);
    assert_eq!(put(&mut store, &shared).handle, handle);
    // One of three words is known, and goes.
    let (mut store, report) = Store::recover_partly(store.into_memory(), [handle]);
    assert_eq!((report.objects, report.references, report.freed_objects), (2, 3, 0));
    assert_eq!(store.release(handle), Ok(None));
    let (mut store, report) = Store::recover(store.into_memory(), [handle, lost]);
    assert_eq!((report.objects, report.references, report.rejected.len()), (2, 2, 0));
    assert_eq!((read(&store, handle), read(&store, lost)), (Ok(shared), Ok(other)));
    for handle in [handle, lost] {
        assert_eq!(store.release(handle), Ok(None));
    }
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn what_was_kept_for_words_that_could_not_be_read_goes_when_their_owner_has_gone_and_nothing_else_does() {
    let mut store = store(64);
    let (shared, own) = (page_of(1, 100), random_page(2));
    let (handle, known) = (put(&mut store, &shared).handle, put(&mut store, &own).handle);
    let lost = put(&mut store, &random_page(3)).handle;
    assert_eq!(put(&mut store, &shared).handle, handle);
    let (mut store, report) = Store::recover_partly(store.into_memory(), [handle, known]);
    let mut pinned = report.pinned.clone();
    pinned.sort_unstable();
    let mut all = vec![handle, known, lost];
    all.sort_unstable();
    assert_eq!(pinned, all);
    let later = put(&mut store, &random_page(4)).handle;
    assert_eq!(store.release(known), Ok(None));
    report.pinned.into_iter().for_each(|handle| assert_eq!(store.release(handle), Ok(None)));
    assert_eq!(store.stats().objects(), 2, "the one that is known, and the one that came later");
    assert_eq!(read(&store, handle), Ok(shared));
    [handle, later].into_iter().for_each(|handle| assert_eq!(store.release(handle), Ok(None)));
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn a_record_that_no_word_names_takes_no_slot_from_one_that_is_named() {
    let mut store = store(64);
    let (liar, named) = (put(&mut store, &page_of(1, 100)).handle, put(&mut store, &page_of(2, 100)).handle);
    let victim = store.records.peek(&store.memory, named.number()).unwrap();
    let lie = store.records.peek(&store.memory, liar.number()).unwrap();
    store.records.write(&mut store.memory, liar.number(), &Record { body: victim.body, ..lie });
    let (store, report) = Store::recover_partly(store.into_memory(), [named]);
    assert_eq!((report.objects, report.references, report.rejected.len()), (1, 2, 0));
    assert_eq!(read(&store, named), Ok(page_of(2, 100)));
}

#[test]
fn recovery_reports_handles_that_name_nothing() {
    let mut store = store(64);
    let gone = put(&mut store, &page_of(1, 100)).handle;
    let good = put(&mut store, &page_of(2, 100)).handle;
    assert_eq!(store.release(gone), Ok(None));
    let absurd = crate::Handle::from_bits((1 << crate::HANDLE_BITS) - 1).unwrap();
    let (_, report) = Store::recover(store.into_memory(), [gone, good, absurd, gone]);
    let rejected: Vec<_> = report.rejected.iter().map(|rejected| (rejected.handle, rejected.why)).collect();
    assert_eq!(rejected, [gone, absurd, gone].map(|handle| (handle, Rejection::Stale)));
    assert_eq!(report.objects, 1);
}

#[test]
fn two_records_that_claim_one_slot_are_not_both_believed() {
    let mut store = store(64);
    let (first, second) =
        (put(&mut store, &page_of(1, 100)).handle, put(&mut store, &page_of(2, 100)).handle);
    let victim = store.records.peek(&store.memory, first.number()).unwrap();
    let liar = store.records.peek(&store.memory, second.number()).unwrap();
    let (Body::Data { extent, .. }, Body::Data { codec, key, .. }) = (victim.body, liar.body) else {
        panic!("both pages have data");
    };
    let body = Body::Data { codec, extent, key };
    store.records.write(&mut store.memory, second.number(), &Record { body, ..liar });
    let (store, report) = Store::recover(store.into_memory(), [first, second, second]);
    assert_eq!(report.rejected.len(), 2);
    assert!(report.rejected.iter().all(|it| it.handle == second && it.why == Rejection::Overlap));
    assert_eq!(read(&store, first), Ok(page_of(1, 100)));
    assert_eq!(read(&store, second), Err(GetError::Stale { handle: second }));
}

#[test]
fn slabs_with_tags_that_are_not_ours_are_released() {
    let mut memory = HeapSlabs::new(16);
    let bits = SlabTag::new(SlabKind::Records { sequence: 0 }).to_bits();
    let tags = [0, u64::MAX, bits ^ 1 << 63, bits | 0xff << 32, bits | u64::from(u32::MAX), bits, bits];
    for tag in tags {
        memory.acquire(SlabTag::from_bits(tag)).unwrap();
    }
    let (store, report) = Store::recover(memory, []);
    assert_eq!((report.rejected_slabs, report.released_slabs), (6, 7), "one tag of seven is good");
    assert_eq!(store.memory().held(), 0);
}

#[test]
fn a_slab_reused_by_another_domain_is_zero() {
    let mut store = store(2);
    put(&mut store, &random_page(1));
    let mut memory = store.dismantle();
    assert_eq!(memory.held(), 0);
    for _ in 0..2 {
        let slab = memory.acquire(SlabTag::new(SlabKind::Records { sequence: 0 })).unwrap();
        assert_eq!(memory.bytes(slab), vec![0; SLAB_SIZE]);
    }
    assert!(memory.bytes(SlabId(2)).is_empty());
}
