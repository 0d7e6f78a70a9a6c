//! Stores, a tier over a disk, and what the stores must give back.
use crate::faulty::FaultyDisk;
use plimsoll_linux::disk::device::Disk;
use plimsoll_linux::disk::mover::Mover;
use plimsoll_linux::disk::tier::{Keepsakes, Limits, Tier, WriteError};
use plimsoll_linux::disk::window::Window;
use plimsoll_linux::disk::{FetchError, abandon, fetch, release};
use plimsoll_linux::uffd::host::Domain;
use plimsoll_store::{Encoder, Fetched, Handle, HeapSlabs, NoDense, Remote, Store, Whereabouts};
use plimsoll_types::{ByteCount, DomainId, GroupId, PAGE_SIZE, PageBytes};
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

pub(crate) const MIB: u64 = 1 << 20;
const GROUP: GroupId = GroupId(1);

/// A number that looks random, and is the same in every run.
fn mix(number: u64) -> u64 {
    let mixed = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// A page of which nine in ten bytes compress away, or none: no two seeds give one page.
pub(crate) fn page(seed: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    let random = if seed.is_multiple_of(2) { PAGE_SIZE } else { PAGE_SIZE / 10 };
    for (place, chunk) in (0..).zip(page[..random / 8 * 8].chunks_mut(8)) {
        chunk.copy_from_slice(&mix(seed << 20 | place).to_le_bytes());
    }
    page
}

/// A page in a store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    pub(crate) domain: u32,
    pub(crate) handle: Handle,
    pub(crate) seed: u64,
}

pub(crate) struct World {
    pub(crate) tier: Arc<Tier>,
    pub(crate) domains: BTreeMap<u32, Arc<Domain<HeapSlabs>>>,
    pub(crate) held: Vec<Held>,
    /// Stores that could not be put together, and their pages.
    absent: Vec<(u32, HeapSlabs, Vec<Held>)>,
    quota: Option<ByteCount>,
    window: Window,
    encoder: Encoder,
    fetched: Fetched,
}

impl World {
    /// Two domains, and a tier of so many MiB.
    pub(crate) fn new(disk: &FaultyDisk, mib: u64, quota: Option<ByteCount>) -> Self {
        Self::on(Box::new(disk.clone()), mib, quota)
    }

    pub(crate) fn on(disk: Box<dyn Disk>, mib: u64, quota: Option<ByteCount>) -> Self {
        Self::with(Tier::create(disk, Limits { disk: ByteCount(mib * MIB), domain: quota }).unwrap(), quota)
    }

    /// Empty stores, and a tier on which nothing is.
    pub(crate) fn with(mut tier: Tier, quota: Option<ByteCount>) -> Self {
        tier.set_patience([Duration::ZERO; 2]);
        let domain = |id| (id, Arc::new(Domain::new(DomainId(id), GROUP, Store::new(HeapSlabs::new(4000)))));
        Self {
            tier: Arc::new(tier),
            domains: [1, 2].map(domain).into(),
            held: Vec::new(),
            absent: Vec::new(),
            quota,
            window: Window::default(),
            encoder: Encoder::new(),
            fetched: Fetched::new(),
        }
    }

    pub(crate) fn put(&mut self, domain: u32, seed: u64) -> Handle {
        let Self { domains, encoder, .. } = self;
        let handle = domains[&domain].store(|store| store.put(&page(seed), encoder)).unwrap().unwrap().handle;
        self.held.push(Held { domain, handle, seed });
        handle
    }

    pub(crate) fn release(&mut self, at: usize) {
        let Held { domain, handle, .. } = self.held.remove(at);
        release(&self.domains[&domain], Some(&self.tier), handle);
    }

    /// A page could not be read: it is lost.
    pub(crate) fn lose(&mut self, at: usize) {
        let Held { domain, handle, .. } = self.held.remove(at);
        abandon(&self.domains[&domain], handle);
    }

    /// Releases those pages that are at such places.
    pub(crate) fn release_those(&mut self, is_to_go: impl Fn(usize) -> bool) {
        for at in (0..self.held.len()).rev().filter(|at| is_to_go(*at)) {
            self.release(at);
        }
    }

    pub(crate) fn mover(&self) -> Mover<HeapSlabs> {
        Mover::new(Arc::clone(&self.tier))
    }

    /// Demotes pages, and says how many have left.
    pub(crate) fn demote(&self, pages: impl IntoIterator<Item = Held>) -> Result<u64, WriteError> {
        let mut mover = self.mover();
        for held in pages {
            mover.demote(&self.domains[&held.domain], held.handle, None)?;
        }
        mover.flush()
    }

    pub(crate) fn demote_all(&self) -> Result<u64, WriteError> {
        self.demote(self.held.iter().copied())
    }

    pub(crate) fn clean(&self) -> Result<usize, WriteError> {
        self.mover().clean(&|id| self.domains.get(&id.0).cloned())
    }

    /// Reads a page; wrong bytes are the one thing that must never be.
    pub(crate) fn read(&mut self, held: Held) -> Result<(), FetchError> {
        let Self { domains, tier, fetched, window, .. } = self;
        fetch(&domains[&held.domain], Some(tier), held.handle, fetched, window)?;
        let mut bytes = [0x55; PAGE_SIZE];
        fetched.unpack(&mut bytes, &mut NoDense)?;
        assert!(bytes == page(held.seed), "{held:?} reads as something else");
        Ok(())
    }

    pub(crate) fn read_all(&mut self) {
        for held in self.held.clone() {
            self.read(held).unwrap_or_else(|error| panic!("{held:?}: {error}"));
        }
    }

    /// Where a page is, if it is on the disk.
    pub(crate) fn remote(&self, held: Held) -> Option<Remote> {
        match self.domains[&held.domain].store(|store| store.whereabouts(held.handle)) {
            Ok(Whereabouts::Away(remote)) => Some(remote),
            _ => None,
        }
    }

    /// The manager dies where it is, and another takes over what outlives it.
    pub(crate) fn restart(&mut self, disk: Box<dyn Disk>) {
        self.restart_without(disk, None);
    }

    /// The same, but one of the stores cannot be put together by it.
    pub(crate) fn restart_without(&mut self, disk: Box<dyn Disk>, missing: Option<u32>) {
        let Keepsakes { table, key, .. } = self.tier.keepsakes();
        let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
        let mut tier = Tier::inherit(disk, owned(table), key.map(owned), self.quota).unwrap();
        tier.set_patience([Duration::ZERO; 2]);
        self.tier = Arc::new(tier);
        let known = std::mem::take(&mut self.domains).into_iter();
        let mut stores: Vec<_> = known.map(|(id, domain)| (id, memory_of(domain))).collect();
        for (id, memory, held) in std::mem::take(&mut self.absent) {
            self.held.extend(held);
            stores.push((id, memory));
        }
        if let Some(place) = stores.iter().position(|(id, _)| Some(*id) == missing) {
            let (id, memory) = stores.remove(place);
            let held = self.held.extract_if(.., |held| held.domain == id).collect();
            self.absent.push((id, memory, held));
            self.take_over(stores);
            self.tier.keep();
        } else {
            self.take_over(stores);
        }
        self.tier.settle();
    }

    /// Another manager of the same process goes on with the tier and the stores that this one has.
    pub(crate) fn succeed(&mut self) {
        self.tier.recount();
        let stores = std::mem::take(&mut self.domains).into_iter();
        self.take_over(stores.map(|(id, domain)| (id, memory_of(domain))).collect());
        self.tier.settle();
    }

    /// The stores that could not be put together are nobody's any more.
    pub(crate) fn give_up_absent(&mut self) {
        self.absent.clear();
        self.tier.let_go();
    }

    fn take_over(&mut self, stores: Vec<(u32, HeapSlabs)>) {
        self.window = Window::default();
        for (id, memory) in stores {
            let handles = self.held.iter().filter(|held| held.domain == id).map(|held| held.handle);
            let (store, report) = Store::recover(memory, handles);
            assert_eq!(report.rejected, []);
            store.remotes().for_each(|remote| self.tier.claim(DomainId(id), remote));
            self.domains.insert(id, Arc::new(Domain::new(DomainId(id), GROUP, store)));
        }
    }

    /// What the tier counts is what the records name.
    pub(crate) fn audit(&self) {
        let mut live = 0;
        for domain in self.domains.values() {
            // A tag, and 16 bytes in the directory; places are multiples of 64.
            let room = |remote: Remote| (remote.length as u64 + 16).next_multiple_of(64) + 16;
            let named: u64 = domain.store(|store| store.remotes().map(room).sum());
            assert_eq!(self.tier.owned(domain.id), ByteCount(named), "{}", domain.id);
            live += named;
        }
        let stats = self.tier.stats();
        assert_eq!(stats.live, ByteCount(live));
        assert!(stats.used + stats.failed <= stats.limit, "{stats:?}");
    }
}

fn memory_of(domain: Arc<Domain<HeapSlabs>>) -> HeapSlabs {
    Arc::into_inner(domain).unwrap().into_store().into_memory()
}
