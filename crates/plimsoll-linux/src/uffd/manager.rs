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
//! * The **governor** reads the kernel's counter, tells the ledger, and writes to each machine's [`Orders`] how much to
//!   give up. Orders are numbers that a late reader reads a little later; nothing depends on their being seen at once,
//!   because pages are charged before they are installed.
use super::host::{Domain, Host, Incident, Orders};
use super::linux_space::{Custody, HandoverError, LinuxSpace};
use super::pager::{Pager, PagerError, Turn};
use super::probe::Probe;
use super::recovery::take_over;
use super::space::SpaceError;
use super::stats::MachineStats;
use super::wire::Welcome;
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
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a VMM may take to hand its machine over.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(30);
/// How often the governor looks. At 10 us a page, two cores fill 400 pages (1.6 MiB) between two looks: well within
/// the distance from the high mark to the hard line.
const GOVERNOR_PERIOD: Duration = Duration::from_millis(2);
/// How often pinned pages may be tried again.
const UNPIN_PERIOD: Duration = Duration::from_secs(1);
/// How long a pager with nothing to do sleeps at most, so that its statistics stay fresh.
const IDLE_PATIENCE: Duration = Duration::from_millis(50);
/// How long a pager sleeps whose faults wait for memory.
const STALL_PATIENCE: Duration = Duration::from_millis(1);
/// How often a pager publishes its statistics.
const PUBLISH_PERIOD: Duration = Duration::from_millis(100);

/// A machine may own this many times the budget and no more: its tables are made before it uses anything.
const OVERCOMMIT_MAX: u64 = 64;
/// How long a machine that is asked for pages may give none before others are asked in its place, for
/// [`UNPIN_PERIOD`].
const GIVE_PATIENCE: Duration = Duration::from_millis(200);
/// How long a stopping manager waits for a pager before it ends the VMM that keeps it.
const STOP_PATIENCE: Duration = Duration::from_secs(40);
/// Looks over which the largest overhead counts.
const OVERHEAD_LOOKS: usize = 16;

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

/// What the kernel counts for everybody the budget is for.
pub trait Meter: Send {
    /// Bytes in use now.
    fn used(&mut self) -> ByteCount;
}

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
enum Origin {
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

/// How a pager thread ended.
enum End {
    /// The VMM ended; everything of the machine has been freed.
    Gone,
    /// The manager is stopping, or a test killed the pager: the machine waits for the next manager.
    Left,
}

type LinuxPager = Pager<LinuxSpace, MemfdSlabs, Arc<MemfdWords>>;

/// What the governor and the operator know of a machine.
#[derive(Clone)]
struct Controls {
    orders: Arc<Orders>,
    kick: Arc<EventFd>,
    stats: Arc<Mutex<MachineStats>>,
    sabotage: Arc<AtomicBool>,
    /// The VMM has ended and everything of the machine has been freed.
    is_buried: Arc<AtomicBool>,
    custody: Arc<Custody>,
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

type Governed = Arc<Mutex<BTreeMap<MachineId, Controls>>>;

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
    governor: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
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
            governor: None,
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
            manager.domains.insert(id.0, Arc::new(Domain::new(id, group, store)));
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
            self.domains.insert(membership.domain.0, Arc::new(domain));
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
        let mut pager = Pager::new(id, host, domain, Arc::clone(&controls.orders), machine, space);
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

    /// Starts looking at what the kernel counts, every few milliseconds, and has machines sampled every
    /// `sample_period`.
    ///
    /// # Errors
    /// [`AdmitError::Thread`].
    pub fn govern(&mut self, meter: Box<dyn Meter>, sample_period: Duration) -> Result<(), AdmitError> {
        let stop = Arc::new(AtomicBool::new(false));
        let (host, governed, stopped) =
            (Arc::clone(&self.host), Arc::clone(&self.governed), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("governor".to_owned())
            .spawn(move || govern(&host, &governed, meter, sample_period, &stopped))
            .map_err(AdmitError::Thread)?;
        self.governor = Some((stop, thread));
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

    /// Has a bit flipped in a stored page of the machine, as soon as it has one: the damage must be noticed.
    pub fn sabotage(&self, id: MachineId) {
        if let Some(running) = self.machines.get(&id) {
            running.controls.sabotage.store(true, Ordering::Relaxed);
        }
    }

    /// Stops all threads where they are and gives up everything that must live on.
    pub fn stop(mut self) -> Vault {
        if let Some((stop, thread)) = self.governor.take() {
            stop.store(true, Ordering::Relaxed);
            let _ = thread.join();
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
                std::thread::sleep(GOVERNOR_PERIOD);
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

/// Runs a pager until its machine ends or its manager does.
fn drive(mut pager: LinuxPager, controls: &Controls, origin: Origin) -> End {
    let result = if origin == Origin::TakenOver { pager.resume() } else { Ok(()) };
    *controls.stats.lock() = pager.stats().clone();
    let result = result.and_then(|()| turns(&mut pager, controls));
    *controls.stats.lock() = pager.stats().clone();
    match result {
        Ok(()) | Err(PagerError::Killed(_)) => return End::Left,
        Err(PagerError::Space(SpaceError::Gone)) => {}
        Err(error) => {
            pager.report_lost(explain(&error));
            // Fail closed: the guest waits, and what was handed over stays open, until its VMM is ended.
            if !wait_for_end(&pager, controls) {
                return End::Left;
            }
        }
    }
    *controls.stats.lock() = pager.bury();
    controls.is_buried.store(true, Ordering::Release);
    End::Gone
}

fn turns(pager: &mut LinuxPager, controls: &Controls) -> Result<(), PagerError> {
    let mut published = Instant::now();
    while !controls.orders.stop.load(Ordering::Relaxed) {
        let turn = pager.turn()?;
        if published.elapsed() >= PUBLISH_PERIOD {
            *controls.stats.lock() = pager.stats().clone();
            published = Instant::now();
        }
        if controls.sabotage.load(Ordering::Relaxed) && pager.sabotage().is_some() {
            controls.sabotage.store(false, Ordering::Relaxed);
        }
        let patience = match turn {
            Turn::Busy => continue,
            Turn::Stalled => STALL_PATIENCE,
            Turn::Idle => IDLE_PATIENCE,
        };
        if wait(pager, controls, patience)? {
            return Err(SpaceError::Gone.into());
        }
    }
    Ok(())
}

/// Sleeps until there is something to do. True when the VMM has ended.
fn wait(pager: &LinuxPager, controls: &Controls, patience: Duration) -> Result<bool, PagerError> {
    let custody = pager.space().custody();
    let (events, ended, kick) = (custody.events(), custody.ended(), controls.kick.as_fd());
    let mut polled = [&events, &ended, &kick].map(|descriptor| PollFd::new(descriptor, PollFlags::IN));
    let io = |source| PagerError::from(SpaceError::Io { what: "waiting for events", source });
    let limit = Timespec::try_from(patience).map_err(|error| io(std::io::Error::other(error)))?;
    match poll(&mut polled, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(io(errno.into())),
    }
    let _ = controls.kick.drain();
    Ok(!polled[1].revents().is_empty())
}

/// Waits until the VMM has ended (true) or the manager stops (false).
fn wait_for_end(pager: &LinuxPager, controls: &Controls) -> bool {
    let custody = pager.space().custody();
    while !controls.orders.stop.load(Ordering::Relaxed) {
        let (ended, kick) = (custody.ended(), controls.kick.as_fd());
        let mut polled = [&ended, &kick].map(|descriptor| PollFd::new(descriptor, PollFlags::IN));
        let _ = poll(&mut polled, None);
        let _ = controls.kick.drain();
        if !polled[0].revents().is_empty() {
            return true;
        }
    }
    false
}

fn govern(
    host: &Host,
    governed: &Governed,
    mut meter: Box<dyn Meter>,
    sample_period: Duration,
    stop: &AtomicBool,
) {
    let (mut sampled, mut unpinned) = (Instant::now(), Instant::now());
    let mut overheads = VecDeque::new();
    let mut givers: BTreeMap<MachineId, Giver> = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        // Charges precede use and follow release, so the smaller sum is the one that hides no overhead. What is charged
        // in between, and the batches in which the kernel counts, make single looks err: the largest of some counts.
        let before = host.ledger(|ledger| ledger.charged());
        let counted = meter.used();
        let asked = host.ledger(|ledger| {
            overheads.push_back(counted.saturating_sub(before.min(ledger.charged())));
            overheads.drain(..overheads.len().saturating_sub(OVERHEAD_LOOKS));
            ledger.set_overhead(overheads.iter().copied().max().unwrap_or_default());
            ledger.reclaim()
        });
        let sample = sampled.elapsed() >= sample_period;
        let unpin = unpinned.elapsed() >= UNPIN_PERIOD;
        let machines: Vec<(MachineId, Controls)> =
            governed.lock().iter().map(|(id, controls)| (*id, controls.clone())).collect();
        for (id, controls) in &machines {
            let pages = asked.iter().find(|(machine, _)| machine == id).map_or(0, |(_, pages)| pages.0);
            let want = u32::try_from(pages).unwrap_or(u32::MAX);
            let before = controls.orders.reclaim.swap(want, Ordering::Relaxed);
            let given = controls.orders.given.load(Ordering::Relaxed);
            if let Ok(ram) = host.ledger(|ledger| ledger.ram(*id)) {
                let floor = givers.entry(*id).or_default().watch(want, ram, given, Instant::now());
                let _ = host.ledger(|ledger| ledger.set_floor(*id, floor));
            }
            if sample {
                controls.orders.sample.store(true, Ordering::Relaxed);
            }
            if unpin {
                controls.orders.unpin.store(true, Ordering::Relaxed);
                if !controls.is_buried.load(Ordering::Acquire) && controls.custody.has_ended(Duration::ZERO) {
                    // Its pager may wait in the kernel for memory that nobody will bring.
                    controls.custody.release_readers();
                }
            }
            if sample || (want > 0 && before == 0) {
                let _ = controls.kick.signal();
            }
        }
        if sample {
            sampled = Instant::now();
        }
        if unpin {
            unpinned = Instant::now();
            givers.retain(|id, _| machines.iter().any(|(known, _)| known == id));
        }
        // What a machine holds is freed when it is forgotten, not when the governor looks again.
        drop(machines);
        std::thread::sleep(GOVERNOR_PERIOD);
    }
}

/// Notices a machine that gives nothing when asked (pinned pages, an agent that does not answer, a full store) and has
/// others asked in its place for a while, so that it cannot keep the whole host at its hard line. A machine that gives
/// and takes as much again is none of these.
#[derive(Clone, Copy, Debug, Default)]
struct Giver {
    /// When it last gave, or was not asked; what it had then, and had given.
    gave: Option<(Instant, ByteCount, u64)>,
    /// What it is taken not to go below, and until when.
    excused: Option<(Instant, ByteCount)>,
}

impl Giver {
    /// The machine is asked for `want` pages, has `ram` and has given `given` pages in its life. Returns the floor to
    /// reckon with.
    fn watch(&mut self, want: u32, ram: ByteCount, given: u64, now: Instant) -> ByteCount {
        match self.excused {
            Some((until, floor)) if now < until => return floor,
            Some(_) => *self = Self::default(),
            None => {}
        }
        match self.gave {
            Some((since, had, before)) if want > 0 && ram >= had && given == before => {
                if now.duration_since(since) >= GIVE_PATIENCE {
                    self.excused = Some((now + UNPIN_PERIOD, ram));
                    return ram;
                }
            }
            _ => self.gave = Some((now, ram, given)),
        }
        ByteCount(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: ByteCount = ByteCount::mib(64);

    #[test]
    fn a_machine_that_gives_and_takes_as_much_again_goes_on_being_asked() {
        let (mut giver, start) = (Giver::default(), Instant::now());
        for look in 0..5000u32 {
            let now = start + GOVERNOR_PERIOD * look;
            assert_eq!(giver.watch(100, RAM, u64::from(look / 50), now), ByteCount(0), "look {look}");
        }
    }

    #[test]
    fn a_machine_that_gives_nothing_is_excused_for_a_while_and_then_asked_again() {
        let (mut giver, start) = (Giver::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(giver.watch(100, RAM, 7, at(0)), ByteCount(0));
        assert_eq!(giver.watch(100, RAM, 7, at(199)), ByteCount(0));
        assert_eq!(giver.watch(100, RAM, 7, at(200)), RAM);
        assert_eq!(giver.watch(100, ByteCount::mib(70), 7, at(900)), RAM);
        assert_eq!(giver.watch(100, RAM, 7, at(1200)), ByteCount(0));
    }

    #[test]
    fn a_machine_that_is_not_asked_is_not_excused() {
        let (mut giver, start) = (Giver::default(), Instant::now());
        for look in 0..5000u32 {
            assert_eq!(giver.watch(0, RAM, 7, start + GOVERNOR_PERIOD * look), ByteCount(0));
        }
    }
}
