//! The disk's thread: takes what parked machines have in the store to the disk, and what is cold where memory is short, and
//! cleans the disk.
//!
//! Enters: machines that are parked, as their orders say, and their page words. Leaves: stores without their objects, and
//! incidents where the disk takes no more. What must never happen: anybody who waits for this thread. It holds a store's lock
//! for one object at a time, and none while the disk works.
//!
//! A machine's objects leave in the order of its pages, so that those that are touched one after the other are read together.
//! What other machines of its domain have as well stays in memory, and what many of its own pages are: to read it again and again
//! would cost more than the little that it takes.
//!
//! Memory is short when the host is above its low mark, so that machines would have to give, or when a store is nearly full.
//! Then objects leave that have been stored for a whole walk of the housekeeper, whose pages nobody has wanted since.
use super::host::{Domain, Host, Incident};
use super::housekeeper::{Domains, RECORDS_PER_STEP, known};
use super::manager::{Controls, Governed};
use crate::disk::mover::Mover;
use crate::disk::tier::{Tier, WriteError};
use crate::explain;
use crate::slabs::MemfdSlabs;
use plimsoll_store::{Cold, Fetched, Hand, Handle, SlabMemory, Store};
use plimsoll_types::{DomainId, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often it is looked for parked machines that have given something.
const IDLE: Duration = Duration::from_millis(50);
/// How long nothing is tried after the disk has refused something.
const REFUSED: Duration = Duration::from_secs(1);
/// A store is nearly full when so many of so many parts of it are used.
const FULL: (usize, usize) = (7, 8);
/// A machine that goes on giving is seen off in parts, at most this often: what leaves together comes back together.
const PATIENCE: Duration = Duration::from_millis(500);
/// Objects that leave a store that is short of memory, between two looks whether it still is: about a segment.
const SINKS: usize = 256;
/// An object that is so many of a machine's pages stays: a machine of nothing else would keep a 64th of its compressed size.
const POPULAR: u32 = 64;
/// Cold objects that are worth a segment of their own.
const SINKS_MIN: usize = 64;
/// How long a store is left alone after all of it was looked at.
const ROUND_REST: Duration = Duration::from_secs(2);
/// How often it is looked for segments worth cleaning, where there are none.
const CLEAN_EVERY: Duration = Duration::from_secs(1);
/// Objects between two looks whether the machine is still parked.
const OBJECTS_PER_LOOK: usize = 64;

/// For what is of no machine in particular.
const NOBODY: MachineId = MachineId(0);

/// What an operator is told of once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    /// Of the disk: until it takes something again.
    Disk,
    /// Of limits: as long as the machine is parked; what is cold and of no machine in particular, for good.
    Limit(MachineId),
}

/// What is known of a parked shard.
#[derive(Clone, Copy, Debug)]
struct Parked {
    /// Pages it had given when it was looked at last, and when the last of it was seen off.
    given: u64,
    seen_off: Option<u64>,
    /// When something of it was seen off last, or it was first met.
    since: Instant,
}

/// Where the search for cold objects is in one store.
#[derive(Clone, Copy, Debug)]
struct Walk {
    hand: Hand,
    rests_until: Instant,
}

/// Everything the thread has of its own.
struct Parker<'a> {
    host: &'a Host,
    governed: &'a Governed,
    domains: &'a Domains,
    stop: &'a AtomicBool,
    mover: Mover<MemfdSlabs>,
    parked: BTreeMap<MachineId, Parked>,
    /// Where the search for cold objects is.
    walks: BTreeMap<DomainId, Walk>,
    fetched: Fetched,
    told: BTreeSet<Trouble>,
    tries_at: Instant,
    cleans_at: Instant,
}

/// Works until it is told to stop; whoever tells it unparks it.
pub(super) fn keep(host: &Host, governed: &Governed, domains: &Domains, tier: Arc<Tier>, stop: &AtomicBool) {
    let mut parker = Parker::new(host, governed, domains, tier, stop);
    while !stop.load(Ordering::Relaxed) {
        if parker.tries_at <= Instant::now() {
            parker.turn();
        }
        std::thread::park_timeout(IDLE);
    }
}

impl<'a> Parker<'a> {
    fn new(
        host: &'a Host,
        governed: &'a Governed,
        domains: &'a Domains,
        tier: Arc<Tier>,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            host,
            governed,
            domains,
            stop,
            mover: Mover::new(tier),
            parked: BTreeMap::new(),
            walks: BTreeMap::new(),
            fetched: Fetched::new(),
            told: BTreeSet::new(),
            tries_at: Instant::now(),
            cleans_at: Instant::now(),
        }
    }

    fn turn(&mut self) {
        self.clean();
        let parked: BTreeMap<MachineId, Controls> = {
            let governed = self.governed.lock();
            let is_parked = |controls: &Controls| controls.orders.is_parked.load(Ordering::Relaxed);
            let parked = governed.iter().filter(|(_, controls)| is_parked(controls));
            parked.map(|(id, controls)| (*id, controls.clone())).collect()
        };
        self.parked.retain(|id, _| parked.contains_key(id));
        let is_over = |id: &MachineId| *id != NOBODY && !parked.contains_key(id);
        self.told.retain(|trouble| !matches!(trouble, Trouble::Limit(id) if is_over(id)));
        for (id, controls) in &parked {
            let given = controls.orders.given.load(Ordering::Relaxed);
            let fresh = Parked { given: u64::MAX, seen_off: None, since: Instant::now() };
            let known = self.parked.entry(*id).or_insert(fresh);
            let goes_on = std::mem::replace(&mut known.given, given) != given;
            let waits = goes_on && known.since.elapsed() < PATIENCE;
            if waits || known.seen_off == Some(given) || self.stop.load(Ordering::Relaxed) {
                continue;
            }
            match self.see_off(controls) {
                Ok(()) => {
                    let known = Parked { given, seen_off: Some(given), since: Instant::now() };
                    self.parked.insert(*id, known);
                }
                Err(error) => self.refused(*id, &error),
            }
        }
        if let Err(error) = self.sink() {
            self.refused(NOBODY, &error);
        }
    }

    /// Has cold objects leave stores that are short of memory.
    fn sink(&mut self) -> Result<(), WriteError> {
        let known = known(self.domains);
        self.walks.retain(|id, _| known.iter().any(|domain| domain.id == *id));
        for domain in &known {
            let is_awake = self.walks.get(&domain.id).is_none_or(|walk| walk.rests_until <= Instant::now());
            // What is on its way shows when its segment is complete: up to a megabyte too much leaves.
            while is_awake && self.is_short(domain) && !self.stop.load(Ordering::Relaxed) {
                match self.sink_some(domain) {
                    Ok(false) => {}
                    Ok(true) => break,
                    // It has what it may have; others have not.
                    Err(WriteError::Quota { .. }) => {
                        if let Some(walk) = self.walks.get_mut(&domain.id) {
                            walk.rests_until = Instant::now() + ROUND_REST;
                        }
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
            // Fewer are not worth a segment, and leave with others later.
            if self.mover.gathered() >= SINKS_MIN {
                self.flush()?;
            }
            self.mover.abandon();
            self.settle(domain);
        }
        Ok(())
    }

    /// True once the search has come round.
    fn sink_some(&mut self, domain: &Arc<Domain<MemfdSlabs>>) -> Result<bool, WriteError> {
        let fresh = Walk { hand: Hand::default(), rests_until: Instant::now() };
        let walk = self.walks.entry(domain.id).or_insert(fresh);
        for _ in 0..SINKS {
            let found = loop {
                let step = |store: &mut Store<MemfdSlabs>| {
                    store.next_settled(RECORDS_PER_STEP, &mut walk.hand, &mut self.fetched)
                };
                match domain.store(step) {
                    Cold::NotYet => {}
                    found => break found,
                }
            };
            if found == Cold::Round {
                walk.rests_until = Instant::now() + ROUND_REST;
                return Ok(true);
            }
            if let Some(handle) = self.fetched.handle() {
                self.mover.demote(domain, handle, None)?;
            }
        }
        self.settle(domain);
        Ok(false)
    }

    fn is_short(&self, domain: &Domain<MemfdSlabs>) -> bool {
        let is_full = domain.store(|store| {
            let slabs = store.memory();
            slabs.held() > slabs.capacity() / FULL.1 * FULL.0
        });
        is_full || self.host.ledger(|ledger| ledger.used() > ledger.budget().low)
    }

    /// Takes what a parked shard has in the store to the disk.
    fn see_off(&mut self, controls: &Controls) -> Result<(), WriteError> {
        let Some(domain) = controls.domain.upgrade() else { return Ok(()) };
        let handles: Vec<Handle> = controls.words.handles().collect();
        let mut sorted = handles.clone();
        sorted.sort_unstable();
        let count = |handle: &Handle| {
            let first = sorted.partition_point(|other| other < handle);
            let end = sorted.partition_point(|other| other <= handle);
            u32::try_from(end - first).unwrap_or(u32::MAX)
        };
        for some in handles.chunks(OBJECTS_PER_LOOK) {
            let is_parked = controls.orders.is_parked.load(Ordering::Relaxed);
            if !is_parked || self.stop.load(Ordering::Relaxed) {
                break;
            }
            for (handle, count) in some.iter().map(|handle| (*handle, count(handle))) {
                if count < POPULAR {
                    self.mover.demote(&domain, handle, Some(count))?;
                }
            }
        }
        self.flush()?;
        self.settle(&domain);
        Ok(())
    }

    /// Sees off what is on its way.
    fn flush(&mut self) -> Result<(), WriteError> {
        if self.mover.flush()? > 0 {
            self.told.remove(&Trouble::Disk);
        }
        Ok(())
    }

    /// Tells the ledger what a store holds now.
    fn settle(&self, domain: &Domain<MemfdSlabs>) {
        // The group was added with the domain; a store that shrinks is never refused.
        let _ = domain.settle(self.host);
    }

    fn clean(&mut self) {
        if self.cleans_at > Instant::now() {
            return;
        }
        let known = known(self.domains);
        let domain_of = |id: DomainId| known.iter().find(|domain| domain.id == id).cloned();
        while !self.stop.load(Ordering::Relaxed) {
            match self.mover.clean(&domain_of) {
                Ok(0) => {
                    self.cleans_at = Instant::now() + CLEAN_EVERY;
                    return;
                }
                Ok(_) => {}
                Err(error) => {
                    self.refused(NOBODY, &error);
                    return;
                }
            }
        }
    }

    /// Nothing is lost: what was to go stays where it is, and is tried again later. The operator is told once.
    fn refused(&mut self, id: MachineId, error: &WriteError) {
        self.mover.abandon();
        self.tries_at = Instant::now() + REFUSED;
        let trouble = match error {
            WriteError::Resting => return,
            WriteError::Full { .. } | WriteError::Quota { .. } => Trouble::Limit(id),
            WriteError::NoSpace(_) | WriteError::Failed(_) | WriteError::Complete | WriteError::Over => {
                Trouble::Disk
            }
        };
        if self.told.insert(trouble) {
            self.host.report(Incident::Disk { cause: explain(error) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::device::FileDisk;
    use crate::disk::tier::Limits;
    use plimsoll_core::ledger::Budget;
    use plimsoll_store::Encoder;
    use plimsoll_types::{ByteCount, GroupId, PAGE_SIZE, PageBytes};
    use tempfile::TempDir;

    const GROUP: GroupId = GroupId(1);

    /// A page that does not compress.
    fn page(seed: u64) -> PageBytes {
        let mut page = [0; PAGE_SIZE];
        let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for chunk in page.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        page
    }

    /// A host of 64 MiB with a tier of 16, whose file is in the directory.
    fn host_with_tier() -> (TempDir, Arc<Tier>, Host) {
        let directory = tempfile::tempdir().unwrap();
        let disk = FileDisk::create(&directory.path().join("tier")).unwrap();
        let limits = Limits { disk: ByteCount::mib(16), domain: None };
        let tier = Arc::new(Tier::create(Box::new(disk), limits).unwrap());
        let host = Host::new(Budget::of(ByteCount::mib(64)));
        host.ledger(|ledger| ledger.add_group(GROUP));
        host.set_tier(Arc::clone(&tier));
        (directory, tier, host)
    }

    /// Goes over all records, as the housekeeper does.
    fn walk(domain: &Domain<MemfdSlabs>) {
        let mut fetched = Fetched::new();
        while domain.store(|store| store.next_cold(1024, &mut fetched)) != Cold::Round {}
    }

    #[test]
    fn what_is_cold_leaves_when_memory_is_short_and_nothing_does_when_it_is_not() {
        let (_directory, tier, host) = host_with_tier();
        let slabs = MemfdSlabs::create("test-parking", ByteCount::mib(64)).unwrap();
        let domain = Arc::new(Domain::new(DomainId(1), GROUP, Store::new(slabs)));
        let mut encoder = Encoder::new();
        for seed in 0..1000 {
            domain.store(|store| store.put(&page(seed), &mut encoder)).unwrap();
        }
        domain.settle(&host).unwrap();
        let domains: Domains = Arc::new(parking_lot::Mutex::new(vec![Arc::downgrade(&domain)]));
        let (governed, stop) = (Governed::default(), AtomicBool::new(false));
        let mut parker = Parker::new(&host, &governed, &domains, tier, &stop);
        let away = || domain.store(|store| store.stats().away.0);
        walk(&domain);
        walk(&domain);
        parker.turn();
        assert_eq!(away(), 0, "there is memory enough");
        for seed in 1000..1010 {
            domain.store(|store| store.put(&page(seed), &mut encoder)).unwrap();
        }
        host.ledger(|ledger| ledger.set_overhead(ByteCount::mib(63)));
        parker.turn();
        assert_eq!(away(), 1000, "those that have not been here for a whole walk stay");
        assert!(domain.held() < ByteCount::mib(1), "{}", domain.held());
        assert_eq!(host.ledger(|ledger| ledger.charged()), domain.held(), "the ledger has been told");
        parker.turn();
        walk(&domain);
        parker.walks.clear();
        parker.turn();
        assert_eq!(away(), 1000, "ten pages are not worth a segment");
        assert_eq!(host.take_incidents(), []);
    }

    #[test]
    fn a_domain_that_is_closed_while_its_objects_move_leaves_nothing_on_the_disk_and_no_segment_is_freed_early()
     {
        let (_directory, tier, host) = host_with_tier();
        let mut encoder = Encoder::new();
        let mut domain = |id| {
            let slabs = MemfdSlabs::create("test-parking", ByteCount::mib(16)).unwrap();
            let domain = Arc::new(Domain::new(DomainId(id), GROUP, Store::new(slabs)));
            let put =
                |seed| domain.store(|store| store.put(&page(seed), &mut encoder)).unwrap().unwrap().handle;
            let handles: Vec<Handle> = (1..=40).map(put).collect();
            (domain, handles)
        };
        let mut mover = Mover::new(Arc::clone(&tier));
        let stays = domain(1);
        for keeps_store in [true, false] {
            let (goes, handles) = domain(2);
            // A part is there, a part on the way, when the domain is closed.
            for (domain, handles) in [(&stays.0, &stays.1), (&goes, &handles)] {
                handles.iter().take(20).for_each(|handle| {
                    mover.demote(domain, *handle, None).unwrap();
                });
            }
            mover.flush().unwrap();
            for handle in handles.iter().skip(20) {
                assert!(mover.demote(&goes, *handle, None).unwrap());
            }
            let somebody = keeps_store.then(|| Arc::clone(&goes));
            goes.close(&host);
            drop(goes);
            assert_eq!(mover.flush().unwrap(), 0, "nothing is sent away out of a closed domain");
            assert_eq!(tier.owned(DomainId(2)), ByteCount(0));
            drop(somebody);
        }
        let away = |handle: &&Handle| stays.0.store(|store| store.whereabouts(**handle)).is_ok();
        assert_eq!(stays.1.iter().filter(away).count(), 40);
        assert_eq!(tier.stats().used, ByteCount::mib(1), "the segment of the one that stays is all there is");
    }
}
