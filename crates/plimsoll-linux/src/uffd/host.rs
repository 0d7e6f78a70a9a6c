//! What the pagers of one host share: the ledger, the stores of the sharing domains, and what an operator is told.
//!
//! Each lock is held for a few hundred instructions and never across a system call that can wait for a guest.
use super::allowance::{Allowance, Storing};
use super::bustle::Bustle;
use super::housekeeper::{Collapses, Tidied};
use super::probe::{NoProbe, Probe};
use super::waiting::{Waiting, Watchfulness};
use crate::disk::tier::Tier;
use parking_lot::Mutex;
use plimsoll_core::ledger::{Budget, Ledger, LedgerError};
use plimsoll_core::replacement::Run;
use plimsoll_store::{SlabMemory, Store};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId, PageIndex};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Something the operator must be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incident {
    /// A page's stored bytes failed their check. A touch of it now fails; no wrong byte was shown.
    Poisoned {
        /// Whose.
        machine: MachineId,
        /// Which page.
        page: PageIndex,
        /// What was found.
        cause: String,
    },
    /// A machine, or a shard of it, is no longer managed.
    Lost {
        /// Which.
        machine: MachineId,
        /// Why, with its causes.
        cause: String,
    },
    /// The dense codec did not give back what it was given. It is not used any more; nothing was lost.
    BadCodec {
        /// In whose store.
        domain: DomainId,
    },
    /// The disk tier takes no more for now. What was to go there stays in memory.
    Disk {
        /// Why, with its causes.
        cause: String,
    },
    /// There is a disk tier, and it cannot be had. Machines wait for what they have there.
    NoTier {
        /// Why, with its causes.
        cause: String,
    },
    /// The store could take no more.
    StoreFull {
        /// Whose page it was.
        machine: MachineId,
    },
}

/// Shared by all pagers of a host.
pub struct Host {
    ledger: Mutex<Ledger>,
    incidents: Mutex<Vec<Incident>>,
    /// Of shards that are not their machine's first: whose they are, and the machine's page that is their first.
    shards: Mutex<BTreeMap<MachineId, (MachineId, PageIndex)>>,
    collapses: Mutex<Collapses>,
    tidied: Mutex<Tidied>,
    backoffs: AtomicU64,
    allowance: Allowance,
    watchfulness: Watchfulness,
    bustle: Bustle,
    probe: Arc<dyn Probe>,
    tier: OnceLock<Arc<Tier>>,
}

impl Host {
    /// A host with a budget.
    pub fn new(budget: Budget) -> Self {
        Self::with_probe(budget, Arc::new(NoProbe))
    }

    /// The same, whose pagers a test watches.
    pub fn with_probe(budget: Budget, probe: Arc<dyn Probe>) -> Self {
        Self {
            ledger: Mutex::new(Ledger::new(budget)),
            incidents: Mutex::default(),
            shards: Mutex::default(),
            collapses: Mutex::default(),
            tidied: Mutex::default(),
            backoffs: AtomicU64::new(0),
            allowance: Allowance::default(),
            watchfulness: Watchfulness::new(),
            bustle: Bustle::default(),
            probe,
            tier: OnceLock::new(),
        }
    }

    /// Gives the host a disk tier. Stores whose objects are there are to be claimed first. A host has one for good.
    pub(crate) fn set_tier(&self, tier: Arc<Tier>) {
        let _ = self.tier.set(tier);
    }

    /// The disk tier, where there is one.
    pub fn tier(&self) -> Option<&Tier> {
        self.tier.get().map(Arc::as_ref)
    }

    /// Looks at or changes the ledger.
    pub fn ledger<T>(&self, with: impl FnOnce(&mut Ledger) -> T) -> T {
        with(&mut self.ledger.lock())
    }

    /// Tells the operator. What a pager says of its shard is told of the machine.
    pub fn report(&self, mut incident: Incident) {
        let shards = self.shards.lock();
        match &mut incident {
            Incident::Poisoned { machine, page, .. } => {
                if let Some((owner, first)) = shards.get(machine) {
                    (*machine, page.0) = (*owner, page.0 + first.0);
                }
            }
            Incident::Lost { machine, .. } | Incident::StoreFull { machine } => {
                *machine = shards.get(machine).map_or(*machine, |(owner, _)| *owner);
            }
            Incident::BadCodec { .. } | Incident::Disk { .. } | Incident::NoTier { .. } => {}
        }
        drop(shards);
        self.incidents.lock().push(incident);
    }

    /// Incidents of `shard` are those of `machine`, whose page `first` is the shard's page 0.
    pub(super) fn enlist(&self, shard: MachineId, machine: MachineId, first: PageIndex) {
        self.shards.lock().insert(shard, (machine, first));
    }

    /// The shard is gone.
    pub(super) fn strike(&self, shard: MachineId) {
        self.shards.lock().remove(&shard);
    }

    /// What the operator has not been told yet.
    pub fn take_incidents(&self) -> Vec<Incident> {
        std::mem::take(&mut self.incidents.lock())
    }

    /// What pagers do, counted, and who is told when they begin to.
    pub const fn bustle(&self) -> &Bustle {
        &self.bustle
    }

    /// How pagers wait from now on.
    pub fn set_waiting(&self, waiting: Waiting) {
        self.watchfulness.set(waiting);
    }

    pub(super) const fn watchfulness(&self) -> &Watchfulness {
        &self.watchfulness
    }

    /// Asks the housekeeper to have a hot block made huge.
    pub(super) fn want_huge(&self, id: MachineId, run: Run) {
        self.collapses.lock().add(id, run);
    }

    pub(super) fn next_collapse(&self) -> Option<(MachineId, Run)> {
        self.collapses.lock().next()
    }

    /// Looks at or adds to what the housekeeper has done.
    pub fn tidied<T>(&self, with: impl FnOnce(&mut Tidied) -> T) -> T {
        with(&mut self.tidied.lock())
    }

    /// Ahead of demand, pagers store pages within that share of one processor from now on, in millionths, all of them together.
    pub fn limit_storing(&self, ppm: u32) {
        self.allowance.set(ppm);
    }

    /// What storing pages has taken of processors, and may take.
    pub fn storing(&self) -> Storing {
        self.allowance.storing()
    }

    pub(super) const fn allowance(&self) -> &Allowance {
        &self.allowance
    }

    /// How often the governor has passed over machines that thrash, and had others give in their place.
    pub fn backoffs(&self) -> u64 {
        self.backoffs.load(Ordering::Relaxed)
    }

    pub(super) fn backed_off(&self) {
        self.backoffs.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn probe(&self) -> &Arc<dyn Probe> {
        &self.probe
    }
}

/// A sharing domain and its store.
pub struct Domain<M: SlabMemory> {
    /// Its identity.
    pub id: DomainId,
    /// The group whose budget pays for the store.
    pub group: GroupId,
    store: Mutex<Store<M>>,
    /// Looked at and changed under the ledger's lock.
    is_closed: AtomicBool,
}

impl<M: SlabMemory> Domain<M> {
    /// A domain around a store, new or recovered.
    pub fn new(id: DomainId, group: GroupId, store: Store<M>) -> Self {
        Self { id, group, store: Mutex::new(store), is_closed: AtomicBool::new(false) }
    }

    /// Looks at or changes the store.
    pub fn store<T>(&self, with: impl FnOnce(&mut Store<M>) -> T) -> T {
        with(&mut self.store.lock())
    }

    /// Memory the store holds: slabs and what is beside them.
    pub fn held(&self) -> ByteCount {
        self.store(|store| store.stats().held())
    }

    /// Brings the ledger to what the store holds.
    ///
    /// # Errors
    /// [`LedgerError`] when the ledger does not know the group.
    pub(super) fn settle(&self, host: &Host) -> Result<(), LedgerError> {
        let held = self.held();
        host.ledger(|ledger| {
            let held = if self.is_closed.load(Ordering::Relaxed) { ByteCount(0) } else { held };
            ledger.set_store(self.group, self.id, held)
        })
    }

    /// Nobody's pages are in the store any more: it is emptied, and so is the disk of it, also of what machines did not
    /// release themselves. Nothing of it is charged from now on, although the housekeeper may be at work in it and say later
    /// what it holds. Objects that are on their way to the disk are found stale there: either they were sent away before this,
    /// or whoever moves them forgets where they have come to be.
    pub(super) fn close(&self, host: &Host) {
        host.ledger(|ledger| {
            self.is_closed.store(true, Ordering::Relaxed);
            // A group that is not known is charged nothing.
            let _ = ledger.set_store(self.group, self.id, ByteCount(0));
        });
        let remotes = self.store(Store::clear);
        if let Some(tier) = host.tier() {
            remotes.into_iter().for_each(|remote| tier.forget(self.id, remote));
        }
    }

    /// The store, when no pager uses the domain any more.
    pub fn into_store(self) -> Store<M> {
        self.store.into_inner()
    }
}

/// What the governor asks of one machine's pager.
#[derive(Debug, Default)]
pub struct Orders {
    /// Pages to give up, counted down as they are freed; the governor states it anew each time it looks.
    pub reclaim: AtomicU32,
    /// Pages to give up because an operator said so, counted down in the same way.
    pub squeeze: AtomicU32,
    /// Pages that have left RAM for good, ever: the pager's answer to whether it gives anything when asked.
    pub given: AtomicU64,
    /// Pages taken out of guest RAM, ever.
    pub taken: AtomicU64,
    /// Of these, pages that the guest touched soon afterwards: in limbo, or while still remembered as a ghost.
    pub returned: AtomicU64,
    /// The pager's answer where it is asked and gives nothing: it has pages in limbo and no time to store them.
    pub is_out_of_time: AtomicBool,
    /// A sampling period has ended.
    pub sample: AtomicBool,
    /// Pinned pages may be tried again.
    pub unpin: AtomicBool,
    /// The pager's word: it waits for events, and for the end of its VMM.
    pub is_waiting: AtomicBool,
    /// The machine is going to sleep: what it used so far is the working set to remember.
    pub park: AtomicBool,
    /// What it has in the store is to go to the disk, until it is woken.
    pub is_parked: AtomicBool,
    /// The machine is about to go on: its working set is to be brought back.
    pub wake: AtomicBool,
    /// Nothing is to be taken from it.
    pub hold: AtomicBool,
    /// Everything of the machine is to come back into its RAM, and nothing more to be taken.
    pub go_home: AtomicBool,
    /// The pager's answer: nothing of the machine is elsewhere.
    pub is_home: AtomicBool,
    /// There was no memory for that, or for the guest meanwhile.
    pub is_short: AtomicBool,
    /// The machine is to be left to its VMM.
    pub let_go: AtomicBool,
    /// The pager should end.
    pub stop: AtomicBool,
}

impl Orders {
    /// True while its pager takes nothing from the machine.
    pub(super) fn is_spared(&self) -> bool {
        self.hold.load(Ordering::Relaxed) || self.go_home.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slabs::MemfdSlabs;
    use plimsoll_store::Encoder;
    use plimsoll_types::PAGE_SIZE;

    #[test]
    fn a_closed_domain_is_charged_nothing_whoever_tells_the_ledger_late() {
        let host = Host::new(Budget::of(ByteCount::mib(64)));
        let slabs = MemfdSlabs::create("test-domain", ByteCount::mib(4)).unwrap();
        let domain = Domain::new(DomainId(1), GroupId(1), Store::new(slabs));
        host.ledger(|ledger| ledger.add_group(GroupId(1)));
        let mut encoder = Encoder::new();
        domain.store(|store| store.put(&[7; PAGE_SIZE], &mut encoder)).unwrap().unwrap();
        domain.settle(&host).unwrap();
        assert_eq!(host.ledger(|ledger| ledger.charged()), domain.held());
        domain.close(&host);
        domain.settle(&host).unwrap();
        assert!(domain.held() > ByteCount(0));
        assert_eq!(host.ledger(|ledger| ledger.charged()), ByteCount(0));
    }

    #[test]
    fn incidents_of_a_shard_are_told_of_its_machine() {
        let host = Host::new(Budget::of(ByteCount::mib(64)));
        let (machine, shard, other) = (MachineId(3), MachineId(4), MachineId(5));
        host.enlist(shard, machine, PageIndex(1024));
        for id in [shard, other] {
            host.report(Incident::Poisoned { machine: id, page: PageIndex(7), cause: String::new() });
            host.report(Incident::StoreFull { machine: id });
        }
        host.strike(shard);
        host.report(Incident::StoreFull { machine: shard });
        let poisoned = |machine, page| Incident::Poisoned { machine, page, cause: String::new() };
        assert_eq!(
            host.take_incidents(),
            [
                poisoned(machine, PageIndex(1031)),
                Incident::StoreFull { machine },
                poisoned(other, PageIndex(7)),
                Incident::StoreFull { machine: other },
                Incident::StoreFull { machine: shard },
            ]
        );
    }
}
