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
//!   because the hard line is kept by the ledger at each install.
use super::host::{Domain, Host, Incident, Orders};
use super::linux_space::{Custody, HandoverError, LinuxSpace};
use super::pager::{Pager, PagerError, Turn};
use super::probe::Probe;
use super::recovery::take_over;
use super::space::SpaceError;
use super::stats::MachineStats;
use super::wire::Welcome;
use crate::slabs::MemfdSlabs;
use parking_lot::Mutex;
use plimsoll_core::airlock::Shape;
use plimsoll_core::ledger::{Budget, Kind, LedgerError, Terms};
use plimsoll_core::machine::Machine;
use plimsoll_core::map::{MapError, Words};
use plimsoll_store::{Handle, Store};
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::mapping::{Memfd, MemfdError, SharedMapping};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId, PAGE_SIZE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
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
            governed: Governed::default(),
            governor: None,
        };
        let mut recovered = Vec::new();
        for kept in vault.machines {
            let mut space = LinuxSpace::new(Arc::clone(&kept.custody), epoch);
            let hello = &kept.custody.hello;
            let shape = Shape::blocks(hello.airlock_slots);
            let seed = u64::from(kept.id.0);
            match take_over(&mut space, epoch, hello.layout.clone(), Arc::clone(&kept.words), shape, seed) {
                Ok(machine) => recovered.push((kept, machine, space)),
                Err(PagerError::Space(SpaceError::Gone)) => {}
                Err(error) => manager.lost(kept.id, &error),
            }
        }
        for (id, group, slabs) in vault.domains {
            let members = recovered.iter().filter(|(kept, _, _)| kept.membership.domain == id);
            let objects = members.flat_map(|(_, machine, _)| machine.objects());
            let handles: Vec<Handle> =
                objects.filter_map(|(_, object)| Handle::from_bits(object.bits())).collect();
            // A handle that was rejected poisons its page when it is touched: `get` refuses it again.
            let (store, _) = Store::recover(slabs, handles);
            manager.host.ledger(|ledger| ledger.add_group(group));
            manager.domains.insert(id.0, Arc::new(Domain::new(id, group, store)));
        }
        for (kept, machine, space) in recovered {
            manager.launch(
                kept.id,
                kept.custody,
                kept.words,
                kept.membership,
                machine,
                space,
                Some(kept.stats),
            )?;
        }
        Ok(manager)
    }

    /// The host, for its ledger and its incidents.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// A domain that has had a machine.
    pub fn domain(&self, id: DomainId) -> Option<&Arc<Domain<MemfdSlabs>>> {
        self.domains.get(&id.0)
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
        let domain = self.domains.entry(membership.domain.0);
        if let std::collections::btree_map::Entry::Vacant(vacant) = domain {
            let slabs = MemfdSlabs::create("plimsoll-store", self.store_limit)?;
            vacant.insert(Arc::new(Domain::new(membership.domain, membership.group, Store::new(slabs))));
        }
        let size = hello.layout.pages().bytes();
        self.host.ledger(|ledger| {
            ledger.add_group(membership.group);
            ledger.admit(id, membership.group, Terms { size, reservation: membership.reservation })
        })?;
        let words = Arc::new(MemfdWords::create(hello.layout.page_limit().get())?);
        let presence = custody.presence()?;
        let shape = Shape::blocks(hello.airlock_slots);
        let seed = u64::from(id.0);
        let machine = Machine::new(hello.layout.clone(), Arc::clone(&words), shape, seed, |page| {
            presence.has_page(page)
        })?;
        let in_place = machine.census().in_ram().bytes();
        self.host.ledger(|ledger| ledger.settle(id, Kind::Resident, in_place))?;
        custody.answer(&Welcome::Accepted { machine: id.0, epoch: self.epoch })?;
        let space = LinuxSpace::new(Arc::clone(custody), self.epoch);
        self.launch(id, Arc::clone(custody), words, membership, machine, space, None)
    }

    #[expect(clippy::too_many_arguments, reason = "they are the machine, from two callers")]
    fn launch(
        &mut self,
        id: MachineId,
        custody: Arc<Custody>,
        words: Arc<MemfdWords>,
        membership: Membership,
        machine: Machine<Arc<MemfdWords>>,
        space: LinuxSpace,
        earlier: Option<MachineStats>,
    ) -> Result<(), AdmitError> {
        let controls = Controls {
            orders: Arc::default(),
            kick: Arc::new(EventFd::new().map_err(AdmitError::Thread)?),
            stats: Arc::default(),
            sabotage: Arc::default(),
        };
        if earlier.is_some() {
            let size = custody.hello.layout.pages().bytes();
            let terms = Terms { size, reservation: membership.reservation };
            self.host.ledger(|ledger| ledger.admit(id, membership.group, terms))?;
        }
        let Some(domain) = self.domains.get(&membership.domain.0).cloned() else {
            return Err(LedgerError::NoSuchGroup { group: membership.group }.into());
        };
        let mut pager =
            Pager::new(id, Arc::clone(&self.host), domain, Arc::clone(&controls.orders), machine, space);
        let takes_over = earlier.is_some();
        if let Some(earlier) = earlier {
            pager.continue_stats(earlier);
        }
        let thread_controls = controls.clone();
        let thread = std::thread::Builder::new()
            .name(format!("pager-{}", id.0))
            .spawn(move || drive(pager, &thread_controls, takes_over))
            .map_err(AdmitError::Thread)?;
        self.governed.lock().insert(id, controls.clone());
        self.machines.insert(id, Running { custody, words, membership, controls, thread });
        Ok(())
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
        self.machines.get(&id).is_none_or(|running| running.thread.is_finished())
    }

    /// Forgets a machine that [`is_gone`](Self::is_gone).
    pub fn forget(&mut self, id: MachineId) {
        if self.is_gone(id)
            && let Some(running) = self.machines.remove(&id)
        {
            let _ = running.thread.join();
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
            running.controls.orders.reclaim.store(pages, Ordering::Relaxed);
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
        let mut machines = Vec::new();
        for (id, running) in std::mem::take(&mut self.machines) {
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

/// An error with its causes, on one line.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Runs a pager until its machine ends or its manager does.
fn drive(mut pager: LinuxPager, controls: &Controls, takes_over: bool) -> End {
    let result = if takes_over { pager.resume() } else { Ok(()) };
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
    while !stop.load(Ordering::Relaxed) {
        let counted = meter.used();
        let asked = host.ledger(|ledger| {
            let charged = ledger.charged();
            ledger.observe(counted, charged);
            ledger.reclaim()
        });
        let sample = sampled.elapsed() >= sample_period;
        let unpin = unpinned.elapsed() >= UNPIN_PERIOD;
        for (id, controls) in governed.lock().iter() {
            let pages = asked.iter().find(|(machine, _)| machine == id).map_or(0, |(_, pages)| pages.0);
            let want = u32::try_from(pages).unwrap_or(u32::MAX);
            let before = controls.orders.reclaim.swap(want, Ordering::Relaxed);
            if sample {
                controls.orders.sample.store(true, Ordering::Relaxed);
            }
            if unpin {
                controls.orders.unpin.store(true, Ordering::Relaxed);
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
        }
        std::thread::sleep(GOVERNOR_PERIOD);
    }
}
