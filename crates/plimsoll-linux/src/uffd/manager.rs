//! The manager: a thread per machine that runs its pager, and a governor that looks at the host.
//!
//! Enters: machines as VMMs hand them over, a budget, a meter of what the kernel counts. Leaves: managed machines,
//! statistics, incidents. What must never happen: a userfaultfd closed while pages of its guest are elsewhere. So
//! everything that has to outlive a manager is in a [`Vault`], from which the next one starts.
//!
//! Threads and what they share:
//!
//! * A **pager thread** owns its machine: words, airlock, descriptors. It shares the ledger and its domain's store with
//!   the others, under locks that are held for instructions, not for system calls. It waits in poll(2) for events, for
//!   the governor's kick, or for the end of the VMM.
//! * The **governor** ([`super::governor`]) reads the kernel's counter, tells the ledger, and writes to each machine's
//!   [`Orders`] how much to give up.
use super::drive::{End, drive};
use super::governor::{self, govern};
use super::host::{Domain, Host, Incident, Orders};
use super::housekeeper::{self, Domains, Housekeeping};
use super::linux_space::{Custody, HandoverError, LinuxSpace};
use super::pager::{Pager, PagerError};
use super::probe::Probe;
use super::recovery::take_over;
use super::space::SpaceError;
use super::stats::MachineStats;
use super::wire::Welcome;
use crate::dense::Zstd;
use crate::explain;
use crate::slabs::MemfdSlabs;
use parking_lot::Mutex;
use plimsoll_core::airlock::Shape;
use plimsoll_core::ledger::{Budget, Kind, LedgerError, Terms};
use plimsoll_core::machine::Machine;
use plimsoll_core::map::{MapError, Words};
use plimsoll_core::word::{PageState, PageWord};
use plimsoll_store::{Handle, Store};
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::mapping::{Memfd, MemfdError, SharedMapping};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId, PAGE_SIZE};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a VMM may take to hand its machine over.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(30);

/// A machine may own this many times the budget and no more: its tables are made before it uses anything.
const OVERCOMMIT_MAX: u64 = 64;
/// How long a stopping manager waits for a pager before it ends the VMM that keeps it.
const STOP_PATIENCE: Duration = Duration::from_secs(40);

/// Page words in a memfd.
#[derive(Debug)]
pub struct MemfdWords {
    memory: SharedMapping,
    pages: usize,
}

impl MemfdWords {
    fn create(pages: usize) -> Result<Self, MemfdError> {
        let bytes = (pages * size_of::<u64>()).next_multiple_of(PAGE_SIZE);
        let memory = SharedMapping::new(&Memfd::create("plimsoll-words", ByteCount(bytes as u64))?)?;
        Ok(Self { memory, pages })
    }

    /// Every object a word names, once per word. A word that is damaged names none.
    fn handles(&self) -> impl Iterator<Item = Handle> + '_ {
        self.words().iter().filter_map(|word| match PageWord(word.load(Ordering::Acquire)).state() {
            Some(PageState::Stored(object)) => Handle::from_bits(object.bits()),
            _ => None,
        })
    }
}

impl Words for MemfdWords {
    fn words(&self) -> &[AtomicU64] {
        &self.memory.as_atomic_u64s()[..self.pages]
    }
}

pub use super::governor::Meter;

/// A machine was not taken.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdmitError {
    /// The VMM did not hand over properly.
    #[error("the machine could not be taken over")]
    Handover(#[from] HandoverError),
    /// The ledger has no room for it.
    #[error("the machine was not admitted")]
    Ledger(#[from] LedgerError),
    /// Its memory could not be looked at.
    #[error("the machine's memory could not be looked at")]
    Space(#[from] SpaceError),
    /// No memory for its tables or its store.
    #[error("no memory for the machine's tables")]
    Memory(#[from] MemfdError),
    /// A bug: fresh words were not fresh.
    #[error("the machine's page words could not be set up")]
    Map(#[from] MapError),
    /// zstd has no memory.
    #[error("no memory for the dense codec")]
    Codec(#[source] std::io::Error),
    /// A thread could not be started.
    #[error("no thread for the machine")]
    Thread(#[source] std::io::Error),
    /// It owns more memory than a machine of this host may.
    #[error("the machine owns {size}; a machine of this host may own at most {limit}")]
    TooLarge {
        /// What it owns.
        size: ByteCount,
        /// What it may own.
        limit: ByteCount,
    },
    /// A bug: its domain has no store.
    #[error("{domain} has no store")]
    NoSuchDomain {
        /// The domain.
        domain: DomainId,
    },
}

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

/// What of a machine outlives its manager.
struct MachineVault {
    id: MachineId,
    custody: Arc<Custody>,
    words: Arc<MemfdWords>,
    membership: Membership,
    stats: MachineStats,
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
}

impl Vault {
    /// A host on which no manager has run yet.
    pub fn new(budget: Budget, store_limit: ByteCount) -> Self {
        Self { epoch: 0, next_id: 1, budget, store_limit, machines: Vec::new(), domains: Vec::new() }
    }

    /// Machines in it.
    pub fn machines(&self) -> usize {
        self.machines.len()
    }
}

pub(super) type LinuxPager = Pager<LinuxSpace, MemfdSlabs, Arc<MemfdWords>>;

/// What the governor and the operator know of a machine.
#[derive(Clone)]
pub(super) struct Controls {
    pub(super) orders: Arc<Orders>,
    pub(super) kick: Arc<EventFd>,
    pub(super) stats: Arc<Mutex<MachineStats>>,
    pub(super) sabotage: Arc<AtomicBool>,
    /// The VMM has ended and everything of the machine has been freed.
    pub(super) is_buried: Arc<AtomicBool>,
    pub(super) custody: Arc<Custody>,
}

struct Running {
    custody: Arc<Custody>,
    words: Arc<MemfdWords>,
    membership: Membership,
    controls: Controls,
    thread: JoinHandle<End>,
}

/// A machine as an operator sees it.
#[derive(Clone, Debug)]
pub struct MachineView {
    /// Its identity.
    pub id: MachineId,
    /// What the operator calls it.
    pub name: String,
    /// Its size.
    pub size: ByteCount,
    /// Its counts.
    pub stats: MachineStats,
}

pub(super) type Governed = Arc<Mutex<BTreeMap<MachineId, Controls>>>;

/// Runs machines within a budget.
pub struct Manager {
    host: Arc<Host>,
    epoch: u64,
    next_id: u32,
    store_limit: ByteCount,
    domains: BTreeMap<u32, Arc<Domain<MemfdSlabs>>>,
    machines: BTreeMap<MachineId, Running>,
    /// Machines that could not be taken over. They stall, and keep their bytes for the next manager.
    unmanaged: Vec<MachineVault>,
    governed: Governed,
    tended: Domains,
    housekeeping: Housekeeping,
    /// Governor and housekeeper, and what tells them to stop.
    staff: Option<(Arc<AtomicBool>, [JoinHandle<()>; 2])>,
}

impl Manager {
    /// Takes over from whoever filled the vault. A machine whose VMM has ended meanwhile is buried.
    ///
    /// # Errors
    /// [`AdmitError`] when there are no resources to go on with.
    pub fn start(vault: Vault, probe: Arc<dyn Probe>) -> Result<Self, AdmitError> {
        let host = Arc::new(Host::with_probe(vault.budget, probe));
        let epoch = vault.epoch + 1;
        let mut manager = Self {
            host,
            epoch,
            next_id: vault.next_id,
            store_limit: vault.store_limit,
            domains: BTreeMap::new(),
            machines: BTreeMap::new(),
            unmanaged: Vec::new(),
            governed: Governed::default(),
            tended: Domains::default(),
            housekeeping: Housekeeping::default(),
            staff: None,
        };
        let mut recovered = Vec::new();
        for kept in vault.machines {
            manager.host.ledger(|ledger| ledger.add_group(kept.membership.group));
            let mut space = LinuxSpace::new(Arc::clone(&kept.custody), epoch);
            let hello = &kept.custody.hello;
            let shape = Shape::blocks(hello.airlock_slots);
            let seed = u64::from(kept.id.0);
            match take_over(&mut space, epoch, hello.layout.clone(), Arc::clone(&kept.words), shape, seed) {
                Ok(machine) => recovered.push((kept, machine, space)),
                Err(PagerError::Space(SpaceError::Gone)) => {}
                Err(error) => {
                    manager.lost(kept.id, &error);
                    // What it was promised stays taken. Were there no room for that, there would be none for it.
                    let size = kept.custody.hello.layout.pages().bytes();
                    let Membership { group, reservation, .. } = kept.membership;
                    let terms = Terms { size, reservation };
                    let _ = manager.host.ledger(|ledger| ledger.admit(kept.id, group, terms));
                    manager.unmanaged.push(kept);
                }
            }
        }
        for (id, group, slabs) in vault.domains {
            let managed = recovered.iter().map(|(kept, _, _)| kept);
            let members = managed.chain(&manager.unmanaged).filter(|kept| kept.membership.domain == id);
            let handles: Vec<Handle> = members.flat_map(|kept| kept.words.handles()).collect();
            // A handle that was rejected poisons its page when it is touched: `get` refuses it again.
            let (store, _) = Store::recover(slabs, handles);
            manager.host.ledger(|ledger| ledger.add_group(group));
            manager.add_domain(Domain::new(id, group, store));
        }
        // All are in the ledger before the first asks for memory. From the first take-over on nothing may be given up on: a
        // machine that cannot go on is kept for the next manager.
        let mut entered = Vec::new();
        for (kept, machine, space) in recovered {
            match manager.enter(kept.id, kept.membership, &machine) {
                Ok(()) => entered.push((kept, machine, space)),
                Err(error) => {
                    manager.lost(kept.id, &error);
                    manager.unmanaged.push(kept);
                }
            }
        }
        for domain in manager.domains.values() {
            let held = domain.held();
            // The group was added with the domain.
            let _ = manager.host.ledger(|ledger| ledger.set_store(domain.group, domain.id, held));
        }
        for (kept, machine, space) in entered {
            if let Err((kept, error)) = manager.launch(kept, machine, space, Origin::TakenOver) {
                manager.lost(kept.id, &error);
                manager.unmanaged.push(*kept);
            }
        }
        Ok(manager)
    }

    /// Puts a machine into the ledger with what it has in RAM.
    fn enter<W: Words>(
        &self,
        id: MachineId,
        membership: Membership,
        machine: &Machine<W>,
    ) -> Result<(), LedgerError> {
        let size = machine.layout().pages().bytes();
        let Membership { group, reservation, .. } = membership;
        self.host.ledger(|ledger| {
            ledger.add_group(group);
            ledger.admit(id, group, Terms { size, reservation })?;
            ledger.settle(id, Kind::Resident, machine.ram().bytes())
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

    fn add_domain(&mut self, domain: Domain<MemfdSlabs>) {
        let (id, domain) = (domain.id, Arc::new(domain));
        self.tended.lock().push(Arc::downgrade(&domain));
        self.domains.insert(id.0, domain);
    }

    /// How the housekeeper is to work. Call it before [`govern`](Self::govern).
    pub fn set_housekeeping(&mut self, how: Housekeeping) {
        self.housekeeping = how;
    }

    fn lost(&self, machine: MachineId, error: &dyn std::error::Error) {
        self.host.report(Incident::Lost { machine, cause: explain(error) });
    }

    /// Takes the machine that `process` hands over on `socket` and starts managing it.
    ///
    /// # Errors
    /// [`AdmitError`]; the VMM is told why before the socket closes.
    pub fn admit(
        &mut self,
        socket: OwnedFd,
        process: Pidfd,
        membership: Membership,
    ) -> Result<MachineId, AdmitError> {
        let custody = Arc::new(Custody::receive(socket, process, HANDOVER_PATIENCE)?);
        let id = MachineId(self.next_id);
        let admitted = self.take(id, &custody, membership);
        match &admitted {
            Ok(()) => self.next_id += 1,
            Err(error) => {
                // Best effort: a VMM that does not listen learns it from the socket's end.
                let _ = custody.answer(&Welcome::Refused { reason: explain(error) });
                let _ = self.host.ledger(|ledger| ledger.remove(id));
            }
        }
        admitted.map(|()| id)
    }

    fn take(
        &mut self,
        id: MachineId,
        custody: &Arc<Custody>,
        membership: Membership,
    ) -> Result<(), AdmitError> {
        let hello = &custody.hello;
        let size = hello.layout.pages().bytes();
        let hard = self.host.ledger(|ledger| ledger.budget().hard);
        let limit = ByteCount(hard.0.saturating_mul(OVERCOMMIT_MAX));
        if size > limit {
            return Err(AdmitError::TooLarge { size, limit });
        }
        if !self.domains.contains_key(&membership.domain.0) {
            let slabs = MemfdSlabs::create("plimsoll-store", self.store_limit)?;
            let domain = Domain::new(membership.domain, membership.group, Store::new(slabs));
            self.add_domain(domain);
        }
        let words = Arc::new(MemfdWords::create(hello.layout.page_limit().get())?);
        let presence = custody.presence()?;
        let shape = Shape::blocks(hello.airlock_slots);
        let seed = u64::from(id.0);
        let machine = Machine::new(hello.layout.clone(), Arc::clone(&words), shape, seed, |page| {
            presence.has_page(page)
        })?;
        self.enter(id, membership, &machine)?;
        custody.answer(&Welcome::Accepted { machine: id.0, epoch: self.epoch })?;
        let space = LinuxSpace::new(Arc::clone(custody), self.epoch);
        let stats = MachineStats::default();
        let kept = MachineVault { id, custody: Arc::clone(custody), words, membership, stats };
        self.launch(kept, machine, space, Origin::New).map_err(|(_, error)| error)
    }

    /// Starts the pager of a machine that is in the ledger.
    fn launch(
        &mut self,
        kept: MachineVault,
        machine: Machine<Arc<MemfdWords>>,
        space: LinuxSpace,
        origin: Origin,
    ) -> Result<(), (Box<MachineVault>, AdmitError)> {
        let id = kept.id;
        let kick = match EventFd::new() {
            Ok(kick) => Arc::new(kick),
            Err(error) => return Err((Box::new(kept), AdmitError::Thread(error))),
        };
        let Some(domain) = self.domains.get(&kept.membership.domain.0).cloned() else {
            let domain = kept.membership.domain;
            return Err((Box::new(kept), AdmitError::NoSuchDomain { domain }));
        };
        let controls = Controls {
            orders: Arc::default(),
            kick,
            stats: Arc::new(Mutex::new(kept.stats.clone())),
            sabotage: Arc::default(),
            is_buried: Arc::default(),
            custody: Arc::clone(&kept.custody),
        };
        let host = Arc::clone(&self.host);
        let dense = match Zstd::new() {
            Ok(zstd) => Box::new(zstd),
            Err(error) => return Err((Box::new(kept), AdmitError::Codec(error))),
        };
        let mut pager = Pager::new(id, host, domain, Arc::clone(&controls.orders), machine, space, dense);
        if origin == Origin::TakenOver {
            pager.continue_stats(kept.stats.clone());
        }
        let (thread_controls, host) = (controls.clone(), Arc::clone(&self.host));
        let run = move || {
            let driven = catch_unwind(AssertUnwindSafe(|| drive(pager, &thread_controls, origin)));
            driven.unwrap_or_else(|_| {
                host.report(Incident::Lost { machine: id, cause: "its pager panicked: a bug".to_owned() });
                End::Left
            })
        };
        match std::thread::Builder::new().name(format!("pager-{}", id.0)).spawn(run) {
            Ok(thread) => {
                self.governed.lock().insert(id, controls.clone());
                let MachineVault { custody, words, membership, .. } = kept;
                self.machines.insert(id, Running { custody, words, membership, controls, thread });
                Ok(())
            }
            Err(error) => Err((Box::new(kept), AdmitError::Thread(error))),
        }
    }

    /// Starts looking at what the kernel counts, every few milliseconds, has machines sampled every `sample_period`, and
    /// starts the housekeeper.
    ///
    /// # Errors
    /// [`AdmitError::Thread`].
    pub fn govern(&mut self, meter: Box<dyn Meter>, sample_period: Duration) -> Result<(), AdmitError> {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(AdmitError::Thread)
        };
        let zstd = Zstd::new().map_err(AdmitError::Codec)?;
        let (host, governed, stopped) =
            (Arc::clone(&self.host), Arc::clone(&self.governed), Arc::clone(&stop));
        let governor =
            start("governor", Box::new(move || govern(&host, &governed, meter, sample_period, &stopped)))?;
        let (host, governed, stopped) =
            (Arc::clone(&self.host), Arc::clone(&self.governed), Arc::clone(&stop));
        let (tended, how) = (Arc::clone(&self.tended), self.housekeeping);
        let keep = move || housekeeper::keep(&host, &governed, &tended, how, zstd, &stopped);
        let housekeeper = match start("housekeeper", Box::new(keep)) {
            Ok(housekeeper) => housekeeper,
            Err(error) => {
                stop.store(true, Ordering::Relaxed);
                let _ = governor.join();
                return Err(error);
            }
        };
        self.staff = Some((stop, [governor, housekeeper]));
        Ok(())
    }

    /// The machines that are managed, or were until their VMM ended and nobody has [`forgotten`](Self::forget) them.
    pub fn machines(&self) -> Vec<MachineView> {
        let view = |(id, running): (&MachineId, &Running)| MachineView {
            id: *id,
            name: running.custody.hello.name.clone(),
            size: running.custody.hello.layout.pages().bytes(),
            stats: running.controls.stats.lock().clone(),
        };
        self.machines.iter().map(view).collect()
    }

    /// True once the machine's VMM has ended and everything of it has been freed.
    pub fn is_gone(&self, id: MachineId) -> bool {
        let is_waiting = |kept: &MachineVault| kept.id == id && !kept.custody.has_ended(Duration::ZERO);
        !self.unmanaged.iter().any(is_waiting)
            && self.machines.get(&id).is_none_or(|running| running.controls.is_buried.load(Ordering::Acquire))
    }

    /// Forgets a machine that [`is_gone`](Self::is_gone).
    pub fn forget(&mut self, id: MachineId) {
        if self.is_gone(id)
            && let Some(running) = self.machines.remove(&id)
        {
            let _ = running.thread.join();
            self.governed.lock().remove(&id);
        }
    }

    /// What a machine's VMM handed over: where its memory is. To be looked at and let go, because a machine's memory
    /// can be freed only when the last reference is gone.
    pub fn custody(&self, id: MachineId) -> Option<&Custody> {
        self.machines.get(&id).map(|running| &*running.custody)
    }

    /// Takes everything it can from the machine, as if the host were that short.
    pub fn squeeze(&self, id: MachineId, pages: u32) {
        if let Some(running) = self.machines.get(&id) {
            running.controls.orders.squeeze.store(pages, Ordering::Relaxed);
            let _ = running.controls.kick.signal();
        }
    }

    /// Takes everything it can from a machine that is going to sleep, and remembers what it used.
    pub fn park(&self, id: MachineId) {
        if let Some(running) = self.machines.get(&id) {
            running.controls.orders.park.store(true, Ordering::Relaxed);
        }
        self.squeeze(id, u32::MAX);
    }

    /// Brings back what the machine used before it was parked last, in one go, and takes nothing more from it.
    pub fn wake(&self, id: MachineId) {
        self.squeeze(id, 0);
        if let Some(running) = self.machines.get(&id) {
            running.controls.orders.wake.store(true, Ordering::Relaxed);
            let _ = running.controls.kick.signal();
        }
    }

    /// Has a bit flipped in a stored page of the machine, as soon as it has one: the damage must be noticed.
    pub fn sabotage(&self, id: MachineId) {
        if let Some(running) = self.machines.get(&id) {
            running.controls.sabotage.store(true, Ordering::Relaxed);
        }
    }

    /// Stops all threads where they are and gives up everything that must live on.
    pub fn stop(mut self) -> Vault {
        if let Some((stop, threads)) = self.staff.take() {
            stop.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.thread().unpark();
                let _ = thread.join();
            }
        }
        for running in self.machines.values() {
            running.controls.orders.stop.store(true, Ordering::Relaxed);
            let _ = running.controls.kick.signal();
        }
        let asked = Instant::now();
        let mut machines = std::mem::take(&mut self.unmanaged);
        for (id, running) in std::mem::take(&mut self.machines) {
            while !running.thread.is_finished() {
                if asked.elapsed() > STOP_PATIENCE {
                    // It waits in the kernel for memory that its VMM has withdrawn.
                    running.custody.end();
                }
                std::thread::sleep(governor::PERIOD);
            }
            // A thread that panicked is a manager that crashed: its machine is in the state a crash leaves.
            if !matches!(running.thread.join(), Ok(End::Gone)) {
                let stats = running.controls.stats.lock().clone();
                let Running { custody, words, membership, .. } = running;
                machines.push(MachineVault { id, custody, words, membership, stats });
            }
        }
        let budget = self.host.ledger(|ledger| ledger.budget());
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
        }
    }
}
