//! Random sequences of operations against a map: the store does what a map with counts would.
use super::{HeapStore, Nibbles, nibble_page, page_of, random_page, read, repack, same_page, store};
use crate::{
    Digest, Encoder, Fetched, Handle, How, Lane, SLAB_SIZE, SlabMemory, Sought, Stats, Store, StoreError,
    Stored, digest,
};
use alloc::{collections::BTreeMap, vec::Vec};
use plimsoll_types::{PAGE_SIZE, PageBytes};
use proptest::prelude::{Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};
use proptest::test_runner::TestCaseError;

#[derive(Clone, Debug)]
enum Step {
    Put(u8),
    Release(u16),
    Read(u16),
    /// A manager dies, and the words of machines that died with it name nothing: every n-th handle is dropped.
    Recover(u8),
    /// The memory's limit moves to what is held and so many slabs more.
    Limit(u8),
    /// A walk for cold objects, each of which is packed.
    Repack,
    /// So much work of compaction.
    Compact(u16),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => any::<u8>().prop_map(Step::Put),
        6 => any::<u16>().prop_map(Step::Release),
        2 => any::<u16>().prop_map(Step::Read),
        1 => (2..9u8).prop_map(Step::Recover),
        1 => prop_oneof![Just(0), Just(1), Just(200)].prop_map(Step::Limit),
        1 => Just(Step::Repack),
        2 => (0..2_000u16).prop_map(Step::Compact),
    ];
    proptest::collection::vec(step, 1..250)
}

fn page(kind: u8) -> PageBytes {
    let seed = u64::from(kind) + 1;
    match kind % 6 {
        0 => [0; PAGE_SIZE],
        1 => same_page(seed),
        2 => random_page(seed),
        3 => nibble_page(seed),
        _ => page_of(seed, usize::from(kind) * 13),
    }
}

/// What the store should hold: by kind of page, its handle and the number of references.
#[derive(Default)]
struct Model(BTreeMap<u8, (Handle, u64)>);

impl Model {
    fn pick(&self, choice: u16) -> Option<(u8, Handle)> {
        let (kind, (handle, _)) = self.0.iter().nth(usize::from(choice).checked_rem(self.0.len())?)?;
        Some((*kind, *handle))
    }

    fn drop_reference(&mut self, kind: u8) {
        if let Some((_, count)) = self.0.get_mut(&kind) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&kind);
            }
        }
    }

    fn references(&self) -> impl Iterator<Item = (u8, Handle)> {
        self.0.iter().flat_map(|(kind, (handle, count))| (0..*count).map(|_| (*kind, *handle)))
    }
}

/// As a pager stores a page: what is here densely is confirmed with the codec.
fn put(store: &mut HeapStore, page: &PageBytes) -> Result<Option<Stored>, StoreError> {
    let (found, mut candidate) = (digest(page), Fetched::new());
    if found == Digest::Zero {
        return Ok(None);
    }
    let handle = match store.seek(page, &found, &mut candidate)? {
        Sought::Shared(handle) => Some(handle),
        Sought::Candidate => {
            let confirmed = candidate.confirm(page, &mut [0; PAGE_SIZE], &mut Nibbles);
            confirmed.and_then(|confirmed| store.share_confirmed(confirmed))
        }
        Sought::Absent => None,
    };
    match handle {
        Some(handle) => Ok(Some(Stored { handle, how: How::Duplicate })),
        None => store.insert(page, &found, Encoder::new().encode(page, &found), Lane(page[0] % 3)).map(Some),
    }
}

fn apply(store: HeapStore, model: &mut Model, step: &Step) -> Result<HeapStore, TestCaseError> {
    let mut store = store;
    match *step {
        Step::Put(kind) => {
            let (page, before, held) = (page(kind), store.stats(), store.memory().held());
            match put(&mut store, &page) {
                Ok(None) => prop_assert_eq!(page, [0; PAGE_SIZE]),
                Ok(Some(stored)) => {
                    let (handle, count) = model.0.entry(kind).or_insert((stored.handle, 0));
                    prop_assert_eq!(*handle, stored.handle);
                    prop_assert_eq!(*count > 0, stored.how == How::Duplicate);
                    *count += 1;
                }
                Err(error) => {
                    prop_assert_eq!(error, StoreError::Exhausted);
                    prop_assert!(!model.0.contains_key(&kind), "a duplicate needs no memory");
                    prop_assert_eq!(store.stats().pages, before.pages);
                    prop_assert_eq!(store.memory().held(), held);
                }
            }
        }
        Step::Release(choice) => {
            if let Some((kind, handle)) = model.pick(choice) {
                prop_assert_eq!(store.release(handle), Ok(None));
                model.drop_reference(kind);
                if !model.0.contains_key(&kind) {
                    prop_assert_eq!(store.release(handle), Err(StoreError::Stale { handle }));
                }
            }
        }
        Step::Read(choice) => {
            if let Some((kind, handle)) = model.pick(choice) {
                prop_assert_eq!(read(&store, handle), Ok(page(kind)));
            }
        }
        Step::Recover(drop_each) => {
            let numbered: Vec<_> = (0..).zip(model.references()).collect();
            let (gone, kept): (Vec<_>, Vec<_>) =
                numbered.into_iter().partition(|(number, _)| number % usize::from(drop_each) == 0);
            let (recovered, report) =
                Store::recover(store.into_memory(), kept.into_iter().map(|(_, (_, handle))| handle));
            store = recovered;
            let before = model.0.len();
            for (_, (kind, _)) in gone {
                model.drop_reference(kind);
            }
            prop_assert!(report.rejected.is_empty());
            prop_assert_eq!(report.rejected_slabs, 0);
            prop_assert_eq!(report.freed_objects, (before - model.0.len()) as u64);
        }
        Step::Limit(more) => {
            let held = store.memory().held();
            store.memory_mut().set_capacity(held + usize::from(more));
        }
        Step::Repack => {
            let done = repack(&mut store, &mut Nibbles);
            prop_assert_eq!((done.unreadable, done.unfaithful, done.outdated), (0, 0, 0));
        }
        Step::Compact(work) => {
            let (before, held) = (store.stats(), store.memory().held());
            store.compact(u32::from(work));
            prop_assert!(store.memory().held() <= held);
            let after = store.stats();
            let moved_only = Stats {
                data_slabs: before.data_slabs,
                free_slots: before.free_slots,
                metadata: before.metadata,
                ..after
            };
            prop_assert_eq!(moved_only, before);
        }
    }
    Ok(store)
}

proptest! {
    #[test]
    fn the_store_is_a_map_with_counts(steps in steps()) {
        let (mut store, mut model) = (store(200), Model::default());
        for step in &steps {
            store = apply(store, &mut model, step)?;
            let stats = store.stats();
            prop_assert_eq!(stats.objects(), model.0.len() as u64);
            prop_assert_eq!(stats.pages.0, model.references().count() as u64);
            prop_assert_eq!(stats.duplicate.0, stats.pages.0 - stats.objects());
            let slabs = stats.data_slabs.0 + stats.record_slabs.0;
            prop_assert_eq!(slabs, (store.memory().held() * SLAB_SIZE) as u64);
            let lost = stats.fragmentation();
            prop_assert_eq!(stats.data.0 + lost.free_slots.0 + lost.slot_waste.0, stats.data_slabs.0);
        }
        for (kind, handle) in model.references().collect::<Vec<_>>() {
            prop_assert_eq!(read(&store, handle), Ok(page(kind)));
            prop_assert_eq!(store.release(handle), Ok(None));
        }
        prop_assert_eq!(store.memory().held(), 0);
    }
}
