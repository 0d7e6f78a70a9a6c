//! The manager: a thread per shard of a machine that runs its pager, and a governor that looks at the host.
//!
//! Enters: machines as VMMs hand them over, a budget, a meter of what the kernel counts. Leaves: managed machines,
//! statistics, incidents. What must never happen: a userfaultfd closed while pages of its guest are elsewhere. So
//! everything that has to outlive a manager is in a [`Vault`], from which the next one starts.
//!
//! Threads and what they share:
//!
//! * A **pager thread** owns its shard: words, airlock, descriptors. It shares the ledger and its domain's store with
//!   the others, under locks that are held for instructions, not for system calls. It waits in poll(2) for events, for
//!   the governor's kick, or for the end of the VMM.
//! * The **governor** ([`super::governor`]) reads the kernel's counter, tells the ledger, and writes to each machine's
//!   [`Orders`] how much to give up.
//! * Where there is a disk tier, **the disk's thread** (`parking`) moves what is parked or cold there, and another (`far`)
//!   reads it back for all pagers.
//!
//! `admit` takes machines in, `orders` tells their pagers what to do, `seen` is what is seen of them, `staff` starts the threads that are
//! of no machine. Everything else is here.
use super::drive::{End, drive};
use super::estate::{Estate, EstateError, Fragment, Inheritance};
use super::far::Far;
use super::host::{Domain, Host, Incident, Orders};
use super::housekeeper::{Domains, Housekeeping};
use super::linux_space::{AGENT_PATIENCE, Custody, LinuxSpace};
use super::pager::{Pager, PagerError};
use super::probe::Probe;
use super::recovery::take_over;
use super::seats::Usher;
use super::shards::{MachineVault, Running, Shard, ShardVault};
use super::space::SpaceError;
use super::stats::MachineStats;
use crate::dense::Unpackers;
use crate::disk::tier::Tier;
use crate::explain;
use crate::slabs::MemfdSlabs;
use parking_lot::Mutex;
use plimsoll_core::airlock::Shape;
use plimsoll_core::ledger::{Budget, Kind, LedgerError};
use plimsoll_core::machine::Machine;
use plimsoll_store::{Handle, Store};
use plimsoll_sys::ProcessId;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::mapping::MemfdError;
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Instant;

mod admit;
mod orders;
mod pinned;
mod seen;
mod staff;

pub use self::admit::AdmitError;
pub use super::governor::Meter;
pub(super) use super::shards::Controls;
pub use super::shards::{MemfdWords, ShardWords};

/// Where a pager starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A machine that was just handed over.
    New,
    /// An earlier manager's.
    TakenOver,
}

/// Where a machine belongs and what it was promised.
#[derive(Clone, Copy, Debug)]
pub struct Membership {
    /// Its group.
    pub group: GroupId,
    /// Its sharing domain.
    pub domain: DomainId,
    /// Never taken from it.
    pub reservation: ByteCount,
}

/// What outlives a manager: every descriptor, every page word, every stored byte. Dropping it while machines run lets
/// them read zeros where their pages were; it is to be given to the next manager.
#[must_use = "the machines' bytes are in it"]
pub struct Vault {
    epoch: u64,
    next_id: u32,
    budget: Budget,
    store_limit: ByteCount,
    machines: Vec<MachineVault>,
    domains: Vec<(DomainId, GroupId, MemfdSlabs)>,
    /// Machines that could not be put together.
    lost: Vec<(MachineId, EstateError)>,
    /// What is known of them.
    fragments: BTreeMap<MachineId, Fragment>,
    /// The disk tier, or why it cannot be had, although there is one.
    tier: Option<Result<Arc<Tier>, EstateError>>,
    estate: Option<Arc<Estate>>,
    used: ByteCount,
}

impl Vault {
    /// A host on which no manager has run yet.
    pub fn new(budget: Budget, store_limit: ByteCount) -> Self {
        Self {
            epoch: 0,
            next_id: 1,
            budget,
            store_limit,
            machines: Vec::new(),
            domains: Vec::new(),
            lost: Vec::new(),
            fragments: BTreeMap::new(),
            tier: None,
            estate: None,
            used: ByteCount(0),
        }
    }

    /// What a manager in another process has left, if any, and what outlives this process from now on. Whoever starts the
    /// next one says what is [in use](Self::set_used).
    pub fn of_estate(estate: Estate, budget: Budget, store_limit: ByteCount) -> Self {
        let Inheritance { machines, domains, lost, fragments, tier } = estate.inherit();
        Self {
            epoch: estate.epoch(),
            next_id: estate.next_id(),
            budget,
            store_limit,
            machines,
            domains,
            lost,
            fragments,
            tier: tier.map(|tier| tier.map(Arc::new)),
            estate: Some(Arc::new(estate)),
            used: ByteCount(0),
        }
    }

    /// States what everybody the budget is for has in use, as a [`Meter`] counts it. What of it is no machine's is known to the
    /// next manager before it serves a fault. Otherwise it would take that for room until it looks the first time.
    pub const fn set_used(&mut self, used: ByteCount) {
        self.used = used;
    }

    /// The processes of the machines in it.
    pub fn processes(&self) -> impl Iterator<Item = ProcessId> {
        self.machines.iter().filter_map(|kept| kept.shards.first()).map(|shard| shard.custody.process())
    }

    /// Gives the machines a disk tier, for as long as any of them lives.
    ///
    /// # Errors
    /// [`EstateError`] when it could not be entered into what outlives this process; there is no tier then.
    pub fn set_tier(&mut self, tier: Tier) -> Result<(), EstateError> {
        if let Some(estate) = &self.estate {
            estate.enter_tier(&tier)?;
        }
        self.tier = Some(Ok(Arc::new(tier)));
        Ok(())
    }

    /// The disk tier, where there is one that can be had.
    pub fn tier(&self) -> Option<&Tier> {
        self.tier.as_ref()?.as_deref().ok()
    }

    /// True where no [other tier](Self::set_tier) may be: there is one, and machines may have pages on it, whether it can be had now
    /// or not.
    pub const fn has_tier(&self) -> bool {
        self.tier.is_some()
    }

    /// Machines in it.
    pub fn machines(&self) -> usize {
        self.machines.len()
    }
}

/// A shard's tables and its memory, ready for a pager.
type Part = (Machine<Arc<MemfdWords>>, LinuxSpace);

pub(super) type LinuxPager = Pager<LinuxSpace, MemfdSlabs, Arc<MemfdWords>>;

/// A machine as an operator sees it.
#[derive(Clone, Debug)]
pub struct MachineView {
    /// Its identity.
    pub id: MachineId,
    /// What the operator calls it.
    pub name: String,
    /// Its size.
    pub size: ByteCount,
    /// The counts of all its shards.
    pub stats: MachineStats,
}

/// By shard.
pub(super) type Governed = Arc<Mutex<BTreeMap<MachineId, Controls>>>;

/// Runs machines within a budget.
pub struct Manager {
    host: Arc<Host>,
    epoch: u64,
    next_id: u32,
    store_limit: ByteCount,
    domains: BTreeMap<u32, Arc<Domain<MemfdSlabs>>>,
    /// By the identity of their first shard.
    machines: BTreeMap<MachineId, Running>,
    /// Machines that could not be taken over. They stall, and keep their bytes for the next manager.
    unmanaged: Vec<MachineVault>,
    /// Machines that could not even be put together. They stall, too.
    fragments: BTreeMap<MachineId, Fragment>,
    /// Domains that were there before this manager: those that a fragment may be of.
    inherited: BTreeSet<DomainId>,
    /// References to all that was in stores that a fragment may have pages in.
    pinned: BTreeMap<DomainId, Vec<Handle>>,
    /// The disk tier, or why it cannot be had. Machines wait for what they have there then.
    tier: Option<Result<Arc<Tier>, EstateError>>,
    /// What outlives this process, if anything is to.
    estate: Option<Arc<Estate>>,
    governed: Governed,
    tended: Domains,
    housekeeping: Housekeeping,
    unpackers: Unpackers,
    /// Pagers that had ended when it was looked for machines that are gone; `None` where it is to be looked anyway.
    seen_endings: Option<u64>,
    /// Governor, housekeeper and the disk's thread, and what tells them to stop.
    staff: Option<(Arc<AtomicBool>, Vec<JoinHandle<()>>)>,
    /// On a host of several NUMA nodes.
    usher: Option<Usher>,
}

impl Manager {
    /// Takes over from whoever filled the vault. A machine whose VMM has ended meanwhile is buried.
    ///
    /// # Errors
    /// [`AdmitError`] when there are no resources to go on with.
    pub fn start(vault: Vault, probe: Arc<dyn Probe>) -> Result<Self, AdmitError> {
        let (host, epoch) = (Arc::new(Host::with_probe(vault.budget, probe)), vault.epoch + 1);
        if let Some(estate) = &vault.estate {
            estate.set_epoch(epoch);
        }
        let mut manager = Self {
            host,
            epoch,
            next_id: vault.next_id,
            store_limit: vault.store_limit,
            domains: BTreeMap::new(),
            machines: BTreeMap::new(),
            unmanaged: Vec::new(),
            fragments: vault.fragments,
            inherited: vault.domains.iter().map(|(id, ..)| *id).collect(),
            pinned: BTreeMap::new(),
            tier: vault.tier,
            estate: vault.estate,
            governed: Governed::default(),
            tended: Domains::default(),
            housekeeping: Housekeeping::default(),
            unpackers: Unpackers::new().map_err(AdmitError::Codec)?,
            seen_endings: None,
            staff: None,
            usher: Usher::of_host().map_err(AdmitError::Thread)?,
        };
        manager.tell_what_is_lost(&vault.lost);
        let mut recovered = Vec::new();
        for (kept, parts) in manager.recover_all(vault.machines) {
            manager.host.ledger(|ledger| ledger.add_group(kept.membership.group));
            match parts {
                Ok(parts) => {
                    kept.enlist(&manager.host);
                    recovered.push((kept, parts));
                }
                Err(PagerError::Space(SpaceError::Gone)) => manager.strike(kept.id),
                Err(error) => {
                    manager.lost(kept.id, &error);
                    // What it was promised stays taken. Were there no room for that, there would be none for it.
                    for (id, terms) in kept.terms() {
                        let _ = manager.host.ledger(|ledger| ledger.admit(id, kept.membership.group, terms));
                    }
                    manager.unmanaged.push(kept);
                }
            }
        }
        let tier = manager.tier().cloned();
        tier.iter().for_each(|tier| tier.recount());
        for (id, group, slabs) in vault.domains {
            let managed = recovered.iter().map(|(kept, _)| kept);
            let members = managed.chain(&manager.unmanaged).filter(|kept| kept.membership.domain == id);
            let shards = members.flat_map(|kept| &kept.shards);
            let handles: Vec<Handle> = shards.flat_map(|shard| shard.words.handles()).collect();
            let recover = if manager.may_have(id) { Store::recover_partly } else { Store::recover };
            // A handle that was rejected poisons its page when it is touched: `get` refuses it again.
            let (store, report) = recover(slabs, handles);
            manager.pinned.insert(id, report.pinned);
            if let Some(tier) = &tier {
                store.remotes().for_each(|remote| tier.claim(id, remote));
            }
            manager.host.ledger(|ledger| ledger.add_group(group));
            manager.add_domain(Domain::new(id, group, store));
        }
        if let Some(tier) = tier {
            // A store that could not be put together may be by a later manager: its places stay taken.
            if !vault.lost.is_empty() {
                tier.keep();
            }
            tier.settle();
            manager.host.set_tier(tier);
        }
        // All are in the ledger before the first asks for memory. From the first take-over on nothing may be given up on: a
        // machine that cannot go on is kept for the next manager.
        let mut entered = Vec::new();
        for (kept, parts) in recovered {
            match manager.enter(&kept, &parts) {
                Ok(()) => entered.push((kept, parts)),
                Err(error) => {
                    manager.lost(kept.id, &error);
                    manager.unmanaged.push(kept);
                }
            }
        }
        for domain in manager.domains.values() {
            // The group was added with the domain.
            let _ = domain.settle(&manager.host);
        }
        manager.host.ledger(|ledger| ledger.set_overhead(vault.used.saturating_sub(ledger.charged())));
        for (kept, parts) in entered {
            if let Err((kept, error)) = manager.launch(kept, parts, Origin::TakenOver) {
                manager.lost(kept.id, &error);
                manager.unmanaged.push(*kept);
            }
        }
        Ok(manager)
    }

    /// Takes machines over side by side: one whose VMM is slow to answer keeps the others waiting as little as can be.
    fn recover_all(&self, machines: Vec<MachineVault>) -> Vec<(MachineVault, Result<Vec<Part>, PagerError>)> {
        std::thread::scope(|scope| {
            let recover = |kept: MachineVault| {
                scope.spawn(move || {
                    let parts = self.recover(&kept);
                    (kept, parts)
                })
            };
            let threads: Vec<_> = machines.into_iter().map(recover).collect();
            // A panic there is one here: a manager that cannot go on is replaced.
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        })
    }

    /// Takes all shards of a machine over, or none.
    fn recover(&self, kept: &MachineVault) -> Result<Vec<Part>, PagerError> {
        // One time for all requests to all its agents: all other machines wait for this one, and for a manager that needs too
        // long the keeper starts another.
        let due = Instant::now() + AGENT_PATIENCE;
        let recover = |shard: &ShardVault| {
            let journal = shard.words.journal().map_err(journal_lost)?;
            let mut space = LinuxSpace::new(Arc::clone(&shard.custody), journal, self.epoch);
            space.expect_answers_by(Some(due));
            let hello = &shard.custody.hello;
            let (layout, shape) = (hello.layout.clone(), Shape::blocks(hello.airlock_slots));
            let (words, seed) = (Arc::clone(&shard.words), u64::from(shard.id.0));
            let machine = take_over(&mut space, self.epoch, layout, words, shape, seed)?;
            space.expect_answers_by(None);
            Ok((machine, space))
        };
        kept.shards.iter().map(recover).collect()
    }

    /// Puts a machine's shards into the ledger with what they have in RAM.
    fn enter(&self, kept: &MachineVault, parts: &[Part]) -> Result<(), LedgerError> {
        let group = kept.membership.group;
        self.host.ledger(|ledger| {
            ledger.add_group(group);
            kept.terms().zip(parts).try_for_each(|((id, terms), (machine, _))| {
                ledger.admit(id, group, terms)?;
                ledger.settle(id, Kind::Resident, machine.ram().bytes())
            })
        })
    }

    /// The host, for its ledger and its incidents.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// A domain that has had a machine.
    pub fn domain(&self, id: DomainId) -> Option<&Domain<MemfdSlabs>> {
        self.domains.get(&id.0).map(Arc::as_ref)
    }

    /// All domains.
    pub fn domains(&self) -> impl Iterator<Item = &Domain<MemfdSlabs>> {
        self.domains.values().map(Arc::as_ref)
    }

    /// How many machines could not be taken over: they stall, and keep their bytes for the next manager. One that could not
    /// be put together counts until its VMM is known to have ended.
    pub fn unmanaged(&self) -> usize {
        self.unmanaged.len() + self.stalled_fragments().count()
    }

    fn stalled_fragments(&self) -> impl Iterator<Item = &Fragment> {
        self.fragments.values().filter(|fragment| !fragment.has_ended())
    }

    /// Counts managers of these machines.
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The identity that the next machine gets.
    pub const fn next_id(&self) -> MachineId {
        MachineId(self.next_id)
    }

    fn tier(&self) -> Option<&Arc<Tier>> {
        self.tier.as_ref()?.as_ref().ok()
    }

    fn add_domain(&mut self, domain: Domain<MemfdSlabs>) {
        let (id, domain) = (domain.id, Arc::new(domain));
        let mut tended = self.tended.lock();
        tended.retain(|domain| domain.strong_count() > 0);
        tended.push(Arc::downgrade(&domain));
        drop(tended);
        self.domains.insert(id.0, domain);
    }

    /// How the housekeeper is to work. Call it before [`govern`](Self::govern).
    pub fn set_housekeeping(&mut self, how: Housekeeping) {
        self.housekeeping = how;
    }

    fn lost(&self, machine: MachineId, error: &dyn std::error::Error) {
        self.host.report(Incident::Lost { machine, cause: explain(error) });
    }

    /// Tells of everything that an earlier manager left and this one cannot have.
    fn tell_what_is_lost(&self, machines: &[(MachineId, EstateError)]) {
        machines.iter().for_each(|(machine, error)| self.lost(*machine, error));
        if let Some(Err(error)) = &self.tier {
            self.host.report(Incident::NoTier { cause: explain(error) });
        }
    }

    /// The domains of machines that could not be taken over, which wait for their stores.
    fn awaited(&self) -> impl Iterator<Item = DomainId> {
        let kept = self.unmanaged.iter().map(|kept| kept.membership.domain);
        kept.chain(self.stalled_fragments().filter_map(|fragment| fragment.domain))
    }

    /// Nothing of the machine outlives this process any more.
    fn strike(&self, id: MachineId) {
        if let Some(estate) = &self.estate {
            estate.strike(id);
        }
    }

    /// Nothing is kept for the machine, and nothing counts for its shards, which have no pagers.
    fn dismiss(&self, id: MachineId, shards: impl IntoIterator<Item = MachineId>) {
        self.strike(id);
        for shard in shards {
            self.host.strike(shard);
            let _ = self.host.ledger(|ledger| ledger.remove(shard));
        }
    }

    /// Starts the pagers of a machine whose shards are in the ledger: all of them, or none.
    fn launch(
        &mut self,
        kept: MachineVault,
        parts: Vec<Part>,
        origin: Origin,
    ) -> Result<(), (Box<MachineVault>, AdmitError)> {
        let Some(domain) = self.domains.get(&kept.membership.domain.0).cloned() else {
            let domain = kept.membership.domain;
            return Err((Box::new(kept), AdmitError::NoSuchDomain { domain }));
        };
        let sabotage = Arc::default();
        let mut running =
            Running { membership: kept.membership, shards: Vec::with_capacity(kept.shards.len()) };
        for (shard, part) in kept.shards.iter().zip(parts) {
            match self.start_pager(shard, part, &domain, &sabotage, origin) {
                Ok(shard) => running.shards.push(shard),
                Err(error) => {
                    running.shards.iter().for_each(Shard::ask_to_stop);
                    let _ = running.stopped(kept.id, Instant::now());
                    return Err((Box::new(kept), error));
                }
            }
        }
        let controls = running.shards.iter().map(|shard| (shard.id, shard.controls.clone()));
        self.governed.lock().extend(controls);
        self.usher.iter().for_each(|usher| usher.seat(&running));
        // One that was not there before is news.
        self.host.bustle().count_served();
        self.machines.insert(kept.id, running);
        Ok(())
    }

    fn start_pager(
        &self,
        shard: &ShardVault,
        (machine, space): Part,
        domain: &Arc<Domain<MemfdSlabs>>,
        sabotage: &Arc<AtomicBool>,
        origin: Origin,
    ) -> Result<Shard, AdmitError> {
        let id = shard.id;
        let orders = Arc::<Orders>::default();
        let dense = Box::new(self.unpackers.clone());
        let own = Arc::downgrade(domain);
        let (host, its) = (Arc::clone(&self.host), Arc::clone(domain));
        let mut pager = Pager::new(id, host, its, Arc::clone(&orders), machine, space, dense);
        if origin == Origin::TakenOver {
            pager.continue_stats(shard.stats.clone());
        }
        let kick = Arc::new(EventFd::new().map_err(AdmitError::Thread)?);
        if let Some(tier) = self.tier() {
            let far = Far::new(Arc::clone(tier), Arc::clone(domain), Arc::clone(&kick));
            pager.set_far(far.map_err(AdmitError::Thread)?);
        }
        let controls = Controls {
            orders,
            kick,
            // Whoever looks before the thread runs sees all of the machine.
            stats: Arc::new(Mutex::new(pager.stats().clone())),
            sabotage: Arc::clone(sabotage),
            is_buried: Arc::default(),
            is_lost: Arc::default(),
            is_given_back: Arc::default(),
            custody: Arc::clone(&shard.custody),
            words: Arc::clone(&shard.words),
            seat: Arc::default(),
            domain: own,
        };
        let (thread_controls, host) = (controls.clone(), Arc::clone(&self.host));
        // Moved as it is, it would be on the thread's stack several times: pages that a thousand sleeping threads keep.
        let pager = Box::new(pager);
        let run = move || {
            let driven = catch_unwind(AssertUnwindSafe(|| drive(pager, &thread_controls, origin)));
            driven.unwrap_or_else(|_| {
                host.report(Incident::Lost { machine: id, cause: "its pager panicked: a bug".to_owned() });
                End::Left
            })
        };
        let thread = std::thread::Builder::new().name(format!("pager-{}", id.0)).spawn(run);
        let thread = thread.map_err(AdmitError::Thread)?;
        Ok(Shard { id, controls, thread })
    }

    /// States what the machine is to come to in RAM. When the host is short, machines give down to a common part of their
    /// targets, and who has more than its own waits for the others. `None` is an equal share.
    pub fn set_target(&self, id: MachineId, target: Option<ByteCount>) {
        let Some(running) = self.machines.get(&id) else { return };
        for (shard, target) in running.divided(target) {
            // A shard whose VMM has ended is in the ledger no more.
            let _ = self.host.ledger(|ledger| ledger.set_target(shard, target));
        }
    }

    /// True once the machine's VMM has ended, or is alone with it, and everything of it has been freed.
    pub fn is_gone(&self, id: MachineId) -> bool {
        let is_waiting = |kept: &MachineVault| kept.id == id && !kept.has_ended();
        !self.unmanaged.iter().any(is_waiting) && self.machines.get(&id).is_none_or(Running::is_buried)
    }

    /// Forgets a machine that [`is_gone`](Self::is_gone).
    pub fn forget(&mut self, id: MachineId) {
        if self.is_gone(id)
            && let Some(running) = self.machines.remove(&id)
        {
            if running.is_given_back() {
                // Before the VMM hears of it: from its first word on no other manager can have the machine.
                if let Some(estate) = &self.estate {
                    estate.leave(id);
                }
                running.part();
            }
            self.strike(id);
            for shard in running.shards {
                let _ = shard.thread.join();
                self.governed.lock().remove(&shard.id);
                self.host.strike(shard.id);
            }
        }
    }

    /// Forgets every machine that is gone, those that could not be taken over too, and every domain that has none left.
    /// Who they were, each with its VMM's process.
    pub fn forget_gone(&mut self) -> Vec<(MachineId, Option<ProcessId>)> {
        let have_all_pagers =
            self.unmanaged.is_empty() && self.fragments.is_empty() && self.pinned.is_empty();
        // Of those without one nobody tells: it is looked until there are none, and once after that.
        let seen = have_all_pagers.then(|| self.host.bustle().endings());
        if std::mem::replace(&mut self.seen_endings, seen) == seen && seen.is_some() {
            return Vec::new();
        }
        let ended: Vec<MachineVault> = self.unmanaged.extract_if(.., |kept| kept.has_ended()).collect();
        for kept in &ended {
            self.dismiss(kept.id, kept.shards.iter().map(|shard| shard.id));
        }
        let process = |id| (id, self.custody(id).map(Custody::process));
        let gone: Vec<_> =
            self.machines.keys().copied().filter(|id| self.is_gone(*id)).map(process).collect();
        gone.iter().for_each(|(id, _)| self.forget(*id));
        // Also of machines that had ended before this manager could take them over, or were refused.
        self.close_domains();
        self.unpin();
        let process = |kept: &MachineVault| kept.shards.first().map(|shard| shard.custody.process());
        ended.into_iter().map(|kept| (kept.id, process(&kept))).chain(gone).collect()
    }

    /// Frees the stores of domains without machines.
    fn close_domains(&mut self) {
        let running = self.machines.values().map(|running| running.membership.domain);
        let used: BTreeSet<u32> = running.chain(self.awaited()).map(|domain| domain.0).collect();
        let may_be_used = |id| self.inherited.contains(&id) && self.may_have(id);
        let unused = self.domains.keys().copied();
        let unused = unused.filter(|id| !used.contains(id) && !may_be_used(DomainId(*id)));
        let unused: Vec<u32> = unused.collect();
        for domain in unused.into_iter().filter_map(|id| self.domains.remove(&id)) {
            domain.close(&self.host);
            if let Some(estate) = &self.estate {
                estate.strike_domain(domain.id);
            }
        }
    }

    /// What a machine's VMM handed over, of its first shard: where its memory is. To be looked at and let go, because a
    /// machine's memory can be freed only when the last reference is gone.
    pub fn custody(&self, id: MachineId) -> Option<&Custody> {
        self.machines.get(&id)?.shards.first().map(|shard| &*shard.controls.custody)
    }

    /// Stops all threads where they are and gives up everything that must live on.
    pub fn stop(mut self) -> Vault {
        self.dismiss_staff();
        self.usher.take().into_iter().for_each(Usher::dismiss);
        let shards = self.machines.values().flat_map(|running| &running.shards);
        shards.for_each(Shard::ask_to_stop);
        let asked = Instant::now();
        let running = std::mem::take(&mut self.machines).into_iter();
        let mut machines = std::mem::take(&mut self.unmanaged);
        machines.extend(running.filter_map(|(id, running)| running.stopped(id, asked)));
        let (budget, used) = self.host.ledger(|ledger| (ledger.budget(), ledger.used()));
        let mut domains = Vec::new();
        for domain in std::mem::take(&mut self.domains).into_values() {
            let (id, group) = (domain.id, domain.group);
            // All pagers have ended, so this is the last reference; were it not, the slabs would stay with it.
            if let Some(domain) = Arc::into_inner(domain) {
                domains.push((id, group, domain.into_store().into_memory()));
            }
        }
        Vault {
            epoch: self.epoch,
            next_id: self.next_id,
            budget,
            store_limit: self.store_limit,
            machines,
            domains,
            lost: Vec::new(),
            fragments: self.fragments,
            tier: self.tier,
            estate: self.estate,
            used,
        }
    }
}

/// A machine without its journal is one whose words are damaged.
fn journal_lost(error: MemfdError) -> PagerError {
    SpaceError::Io { what: "opening the journal of events", source: std::io::Error::other(error) }.into()
}
