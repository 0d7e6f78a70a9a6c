//! The pager of one machine: serves its faults and takes its pages, one bounded turn at a time.
//!
//! Enters: events of the machine's memory, the governor's orders. Leaves: installed pages, stored objects, counts.
//! The protocol, and what can go wrong with it, is written at the top of [`super`]. This file is its serving half;
//! `reclaim.rs` is the taking half.
//!
//! A turn never waits for the guest, nor for a disk: it reads what has happened, serves the faults it can, takes at most a block of
//! pages or stores a few, and returns. Faults therefore wait at most one such step.
use super::ahead::Queue;
use super::blocks::Kernel;
use super::far::{Far, Sight};
use super::gifts::Curious;
use super::host::{Domain, Host, Incident, Orders};
use super::kit::{Kit, Tools};
use super::probe::{Killed, Step};
use super::space::{Access, InstallStop, Installed, Space, SpaceError, SpaceEvent};
use super::stats::MachineStats;
use crate::disk;
use crate::explain;
use crate::nodes;
use plimsoll_core::ledger::{LedgerError, Purpose};
use plimsoll_core::machine::{FaultEffect, Machine, Released, Source};
use plimsoll_core::map::{MapError, Words};
use plimsoll_core::prefetch::Prefetch;
use plimsoll_core::replacement::Run;
use plimsoll_core::word::ObjectRef;
use plimsoll_store::{DenseCodec, Handle, Lane, SlabMemory, Whereabouts};
use plimsoll_sys::numa::NodeId;
use plimsoll_types::{BLOCK_PAGES, MachineId, PAGE_SIZE, PageBytes, PageCount, PageIndex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Most pages installed ahead of a guest that touches fresh memory in order. FACTS: a batch of 64 costs 1.4 us a page
/// where one page a fault costs 62; more would only add latency and memory that may stay unused.
const AHEAD_MAX: u32 = 64;
/// Faults served in one turn, so that taking pages goes on under a storm of them.
const SERVE_MAX: usize = 64;
/// How long nothing has come back from the store when a guest is taken to have what it wanted.
const QUIET: Duration = Duration::from_millis(200);
/// Zero pages to copy from. Static zeros cost no memory: reading them maps the shared zero page.
static ZEROS: [PageBytes; AHEAD_MAX as usize] = [[0; PAGE_SIZE]; AHEAD_MAX as usize];

/// Why a pager ended.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagerError {
    /// The machine is gone or cannot be followed.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// A page word contradicts what happened to its page.
    #[error("the page words and the memory disagree")]
    Map(#[from] MapError),
    /// The ledger does not know the machine.
    #[error("the ledger refused the machine")]
    Ledger(#[from] LedgerError),
    /// Another manager has taken the machine over.
    #[error("another manager has taken the machine over")]
    Superseded,
    /// The store gave a handle that does not fit in a page word: a bug.
    #[error("the store gave a handle that does not fit in a page word")]
    Handle,
    /// A test killed it.
    #[error(transparent)]
    Killed(#[from] Killed),
}

/// What a turn left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There is more to do at once.
    Busy,
    /// Faults wait for memory that others have to free.
    Stalled,
    /// Nothing to do until something happens.
    Idle,
}

/// A fault that waits to be served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) page: PageIndex,
    access: Access,
    since: Instant,
    /// When it was first refused memory.
    refused: Option<Instant>,
    /// Its page was being read from the disk when it was tried last.
    is_far: bool,
}

/// What became of an attempt to serve a fault.
pub(super) enum Served {
    Done,
    /// An event has to be read first.
    Later,
    /// There is no memory below the hard line.
    NoMemory,
    /// Its page is being read from the disk, or waits for a manager that can. Others can be served.
    Far,
}

/// What became of an attempt to read a stored page.
pub(super) enum Loaded {
    /// It is in the buffer.
    Here,
    /// It is being read from the disk, or waits for a manager that can.
    Far,
}

/// Detects a guest that touches fresh memory in order.
#[derive(Clone, Copy, Debug, Default)]
struct Streak {
    /// The page after the last one installed.
    next: u32,
    /// How many pages to install next time it goes on.
    ahead: u32,
}

impl Streak {
    /// How many pages to install for a touch of `page`. Two vCPUs that share a streak touch a few pages out of order.
    fn pages_for(&mut self, page: PageIndex) -> u32 {
        let goes_on = page.0 >= self.next && page.0 - self.next < 4;
        self.ahead = if goes_on { (self.ahead * 2).clamp(1, AHEAD_MAX) } else { 1 };
        self.ahead
    }
}

/// The pager of one machine.
pub struct Pager<S, M: SlabMemory, W> {
    pub(super) id: MachineId,
    pub(super) host: Arc<Host>,
    pub(super) domain: Arc<Domain<M>>,
    pub(super) orders: Arc<Orders>,
    pub(super) machine: Machine<W>,
    pub(super) space: S,
    pub(super) dense: Box<dyn DenseCodec + Send>,
    /// Reads the disk, where the host has one.
    far: Option<Far<M>>,
    /// Where the search for hot blocks is.
    pub(super) hot_hand: u32,
    pub(super) kit: Kit,
    pub(super) stats: MachineStats,
    events: Vec<SpaceEvent>,
    pub(super) pending: VecDeque<Pending>,
    streak: Streak,
    pub(super) kernel: Kernel,
    pub(super) prefetch: Prefetch,
    pub(super) ahead: Queue,
    /// When a page came back from the store last, if that is not long ago.
    refaulted: Option<Instant>,
    /// The operator has been told that the store took no more.
    pub(super) store_was_full: bool,
    /// Rounds of the replacement's hand, one after the other, that found nothing to take.
    pub(super) barren_rounds: u32,
    /// What could not be read of the disk last.
    failed: Option<Handle>,
    /// The page at which bringing the machine home goes on.
    pub(super) homeward: u32,
    /// The host was above its high mark at the end of the last turn.
    pub(super) is_tight: bool,
    /// There was nothing that the store could take without a slab for which there is no room below the hard line.
    pub(super) is_stuck: bool,
    /// Whose slabs what it stores goes to.
    pub(super) lane: Lane,
    /// What the guest gave back of which its VMM has not been asked how.
    pub(super) curious: Curious,
    /// What it had done, and what its machine took, when it was asked last.
    told: (u64, PageCount),
}

impl<S: Space, M: SlabMemory, W: Words> Pager<S, M, W> {
    /// A pager for a machine that the ledger has admitted as `id`. `dense` reads what a housekeeper packed.
    pub fn new(
        id: MachineId,
        host: Arc<Host>,
        domain: Arc<Domain<M>>,
        orders: Arc<Orders>,
        machine: Machine<W>,
        space: S,
        dense: Box<dyn DenseCodec + Send>,
    ) -> Self {
        let pages = machine.layout().page_limit().0;
        Self {
            id,
            host,
            domain,
            orders,
            machine,
            space,
            dense,
            far: None,
            hot_hand: 0,
            kit: Kit::default(),
            stats: MachineStats::default(),
            events: Vec::new(),
            pending: VecDeque::new(),
            streak: Streak::default(),
            kernel: Kernel::default(),
            prefetch: Prefetch::new(pages),
            ahead: Queue::default(),
            refaulted: None,
            store_was_full: false,
            barren_rounds: 0,
            failed: None,
            homeward: 0,
            is_tight: false,
            is_stuck: false,
            lane: Lane::default(),
            curious: Curious::default(),
            told: (0, PageCount(0)),
        }
    }

    /// Has what lies on the disk read by that: a pager of a host that has a disk needs one.
    pub(super) fn set_far(&mut self, far: Far<M>) {
        self.far = Some(far);
    }

    /// Has what it stores from now on go to slabs of a node, or of none.
    pub(super) fn store_at(&mut self, node: Option<NodeId>) {
        self.lane = nodes::lane_of(node);
    }

    /// One bounded step: everything that has happened, the faults that can be served, a little reclaim.
    ///
    /// # Errors
    /// [`PagerError`] ends the machine's management.
    pub fn turn(&mut self) -> Result<Turn, PagerError> {
        self.read_events()?;
        if self.orders.park.swap(false, Ordering::Relaxed) {
            self.prefetch.quiet();
        }
        if self.orders.wake.swap(false, Ordering::Relaxed) {
            self.replay();
        }
        let served = self.serve()?;
        let is_going_home = self.orders.go_home.load(Ordering::Relaxed);
        let worked = if is_going_home {
            self.come_home()?
        } else {
            self.stay();
            self.bring()? | self.reclaim(served)?
        };
        self.watch_quiet();
        let worked = self.explain(worked)? | worked;
        self.settle()?;
        self.tell();
        let stalled = self.has_refused_faults();
        let waiting = self.pending.iter().any(|fault| fault.refused.is_none() && !fault.is_far);
        let is_awaited = !self.pending.is_empty() || !self.ahead.is_empty() || is_going_home;
        if let Some(far) = self.far.as_mut().filter(|_| !is_awaited) {
            far.forget();
        }
        Ok(match () {
            () if worked || waiting => Turn::Busy,
            () if stalled => Turn::Stalled,
            () => Turn::Idle,
        })
    }

    /// True where something was done for the machine, or to it, since this was asked last.
    pub(super) fn is_news(&mut self) -> bool {
        let done =
            self.stats.faults.total() + self.stats.discarded + self.orders.given.load(Ordering::Relaxed);
        let done = (done, self.machine.ram());
        done != std::mem::replace(&mut self.told, done)
    }

    /// True while nothing follows from time alone: nothing is wanted of the machine that it did not give, nobody has stopped coming
    /// back for stored pages, and it is not on its way home.
    pub(super) fn is_at_rest(&self) -> bool {
        let Orders { reclaim, squeeze, go_home, is_parked, .. } = &*self.orders;
        let wanted = [reclaim, squeeze].iter().any(|pages| pages.load(Ordering::Relaxed) > 0);
        let is_on_its_way = [go_home, is_parked].iter().any(|order| order.load(Ordering::Relaxed));
        !wanted && !is_on_its_way && self.refaulted.is_none() && self.pending.is_empty()
    }

    /// True while it has what it only works with.
    pub(super) fn has_tools(&self) -> bool {
        self.kit.is_out() || self.space.has_buffers()
    }

    /// Lets go of that.
    pub(super) fn put_tools_away(&mut self) {
        self.kit.put_away();
        self.space.rest();
    }

    pub(super) fn has_refused_faults(&self) -> bool {
        self.pending.iter().any(|fault| fault.refused.is_some())
    }

    /// A pause in what comes back from the store ends whatever the guest was doing with it.
    fn watch_quiet(&mut self) {
        if self.refaulted.is_some_and(|last| last.elapsed() >= QUIET) {
            self.refaulted = None;
            self.prefetch.quiet();
        }
    }

    /// Tells the governor what was taken and what came back.
    fn tell(&self) {
        let faults = &self.stats.faults;
        let blocks = u64::from(BLOCK_PAGES - 1) * self.stats.blocks.returned;
        let returned = faults.limbo + blocks + self.machine.ghost_hits();
        self.orders.taken.store(self.stats.captured, Ordering::Relaxed);
        self.orders.returned.store(returned, Ordering::Relaxed);
    }

    /// Has everybody who waits for a page of the machine ask again: the first thing to do after a take-over.
    ///
    /// # Errors
    /// [`PagerError`].
    pub fn resume(&mut self) -> Result<(), PagerError> {
        self.wonder(Run { first: PageIndex(0), pages: self.machine.layout().page_limit().0 });
        self.settle()?;
        Ok(self.space.wake(PageIndex(0), self.machine.layout().page_limit().0)?)
    }

    /// The machine, to look at.
    pub fn machine(&self) -> &Machine<W> {
        &self.machine
    }

    /// The machine's memory.
    pub fn space(&self) -> &S {
        &self.space
    }

    /// The host it belongs to.
    pub const fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// True when events of the machine wait to be read.
    ///
    /// # Errors
    /// [`PagerError`].
    pub fn has_events(&mut self) -> Result<bool, PagerError> {
        Ok(self.space.has_events()?)
    }

    /// The machine's memory, for the next manager.
    pub fn into_space(self) -> S {
        self.space
    }

    /// Tells the operator that the machine is not managed any more.
    pub fn report_lost(&self, cause: String) {
        self.host.report(Incident::Lost { machine: self.id, cause });
    }

    /// What has been counted, with the state of now.
    pub fn stats(&mut self) -> &MachineStats {
        self.stats.census = *self.machine.census();
        self.stats.limbo = self.machine.airlock().limbo();
        self.stats.ram = self.machine.ram();
        self.stats.working_set = self.machine.working_set();
        self.stats.anomalies = self.machine.anomalies();
        self.stats.ahead = self.prefetch.stats();
        self.stats.table_bytes = self.machine.table_bytes() + self.prefetch.table_bytes();
        &self.stats
    }

    /// Starts from the counts of an earlier pager of the machine.
    pub fn continue_stats(&mut self, earlier: MachineStats) {
        self.stats = MachineStats { takeovers: earlier.takeovers + 1, ..earlier };
    }

    pub(super) fn reached(&self, step: Step) -> Result<(), Killed> {
        self.host.probe().reached(step)
    }

    /// Discards are applied in order as they are read: whoever discards goes on as soon as the event has been read,
    /// so nothing may be installed from older knowledge. Faults are looked up only afterwards.
    fn read_events(&mut self) -> Result<(), PagerError> {
        self.events.clear();
        self.space.read_events(&mut self.events)?;
        if !self.events.is_empty() {
            self.reached(Step::EventsRead)?;
            self.apply_events()?;
        }
        // Also where what was read says nothing of the machine's pages: it must not fill the journal.
        self.space.applied();
        Ok(())
    }

    fn apply_events(&mut self) -> Result<(), PagerError> {
        let since = Instant::now();
        for event in std::mem::take(&mut self.events) {
            match event {
                // One install wakes everybody who waits for the page.
                SpaceEvent::Fault { page, .. } if self.pending.iter().any(|fault| fault.page == page) => {}
                SpaceEvent::Fault { page, access } => {
                    self.pending.push_back(Pending { page, access, since, refused: None, is_far: false });
                }
                SpaceEvent::Discard { first, pages } => self.discarded(first, pages)?,
            }
        }
        Ok(())
    }

    fn discarded(&mut self, first: PageIndex, pages: u32) -> Result<(), PagerError> {
        let mut objects = Vec::new();
        self.machine.discarded(first.0..first.0.saturating_add(pages), |object| objects.push(object))?;
        self.prefetch.discarded(first.0..first.0.saturating_add(pages));
        self.stats.discarded += u64::from(pages);
        self.wonder(Run { first, pages });
        self.reached(Step::DiscardApplied)?;
        objects.into_iter().for_each(|object| self.release(object));
        // A fault that was read before is stale now. Served, it could find the page still there, because the discarder
        // has yet to take it away, and take that for the guest's new bytes. Whoever still waits asks again.
        let before = self.pending.len();
        self.pending.retain(|fault| !(first.0..first.0.saturating_add(pages)).contains(&fault.page.0));
        if self.pending.len() < before {
            self.space.wake(first, pages)?;
        }
        Ok(())
    }

    fn serve(&mut self) -> Result<usize, PagerError> {
        let mut served = 0;
        for _ in 0..self.pending.len().min(SERVE_MAX) {
            let Some(mut fault) = self.pending.pop_front() else { break };
            match self.serve_one(fault.page, fault.access)? {
                Served::Done => {
                    self.stats.served(fault.since.elapsed());
                    if let Some(refused) = fault.refused {
                        self.stats.stalls += 1;
                        self.stats.stalled += refused.elapsed();
                    }
                    served += 1;
                }
                Served::Later => {
                    self.pending.push_front(fault);
                    break;
                }
                Served::NoMemory => {
                    fault.refused.get_or_insert_with(Instant::now);
                    self.pending.push_back(Pending { is_far: false, ..fault });
                }
                Served::Far => self.pending.push_back(Pending { is_far: true, ..fault }),
            }
        }
        Ok(served)
    }

    fn serve_one(&mut self, page: PageIndex, access: Access) -> Result<Served, PagerError> {
        match self.machine.fault(page)? {
            FaultEffect::Install(Source::Zero) => self.serve_zero(page, access),
            FaultEffect::Install(source) => self.serve_bytes(page, source),
            FaultEffect::InstallIfMissing => {
                let installed = self.space.zero(page, 1)?;
                match installed.stop {
                    None => self.machine.confirmed(page),
                    Some(InstallStop::Present) => self.space.wake(page, 1)?,
                    Some(InstallStop::Again) => return Ok(Served::Later),
                    Some(InstallStop::NoMemory) => return Ok(Served::NoMemory),
                }
                self.stats.faults.present += 1;
                Ok(Served::Done)
            }
            FaultEffect::Return { first, at } => self.return_block(first, at),
            FaultEffect::Nothing => Ok(Served::Done),
            FaultEffect::Wait => Ok(Served::Later),
            FaultEffect::Poison => self.poison(page),
        }
    }

    /// Fresh memory: zeros to a writer are copied at once, ahead of one that goes on in order; a reader gets the
    /// shared zero page, which the ledger counts as if it were a page, because its first write will make it one.
    fn serve_zero(&mut self, page: PageIndex, access: Access) -> Result<Served, PagerError> {
        if access == Access::Write && self.leave_to_kernel(page.block())? {
            return Ok(Served::Done);
        }
        let installed = match access {
            Access::Read => {
                if !self.charge(1, Purpose::Demand) {
                    return Ok(Served::NoMemory);
                }
                self.space.zero(page, 1)?
            }
            Access::Write => {
                let ahead = self.streak.pages_for(page);
                let mut pages = 1 + self.machine.untouched_after(page, ahead - 1);
                if !self.charge(pages, Purpose::Ahead) {
                    pages = 1;
                    if !self.charge(pages, Purpose::Demand) {
                        return Ok(Served::NoMemory);
                    }
                }
                self.streak.next = page.0 + pages;
                self.space.copy(page, &ZEROS[..pages as usize])?
            }
        };
        self.stats.faults.zero += u64::from(installed.pages > 0);
        let served = self.finish(page, installed)?;
        if self.refaulted.is_some() {
            self.look_ahead(page);
        }
        Ok(served)
    }

    /// What was taken comes back.
    fn serve_bytes(&mut self, page: PageIndex, source: Source) -> Result<Served, PagerError> {
        let installed = match self.install(page, source)? {
            Ok(installed) => installed,
            Err(served) => return Ok(served),
        };
        let is_done = installed.stop.is_none();
        let served = self.finish(page, installed)?;
        match source {
            _ if !is_done => {}
            Source::Limbo(_) => {
                self.stats.faults.limbo += 1;
                self.prefetch.used(page);
            }
            _ => {
                self.stats.faults.stored += 1;
                self.refaulted = Some(Instant::now());
                self.look_ahead(page);
            }
        }
        Ok(served)
    }

    /// Copies a page's bytes to where they belong; or says what came of the attempt where there is nothing to copy. Bytes from
    /// limbo are in RAM already and must not wait for memory: the slot page that they leave is given back later, in a batch, or
    /// at once where it would be above the hard line.
    pub(super) fn install(
        &mut self,
        page: PageIndex,
        source: Source,
    ) -> Result<Result<Installed, Served>, PagerError> {
        if matches!(source, Source::Limbo(_)) {
            // Refused, it is the one page of this machine's that is above the line.
            self.charge_passing(PageCount(1).bytes())?;
        } else if !self.charge(1, Purpose::Demand) {
            return Ok(Err(Served::NoMemory));
        }
        match self.read(source)? {
            Ok(Loaded::Here) => Ok(Ok(self.space.copy(page, self.kit.tools().room(1))?)),
            Ok(Loaded::Far) => Ok(Err(Served::Far)),
            Err(cause) => Ok(Err(self.lose(page, cause)?)),
        }
    }

    /// Reads a page's bytes into the buffer's first place, unless they are far, or says why they are lost.
    fn read(&mut self, source: Source) -> Result<Result<Loaded, String>, PagerError> {
        let read = match source {
            Source::Limbo(at) => {
                self.space.read_slots(at, self.kit.tools().room(1)).map(|()| Ok(Loaded::Here))?
            }
            Source::Stored(object) => self.load(object, 0),
            Source::Zero => {
                self.kit.tools().room(1)[0].fill(0);
                Ok(Loaded::Here)
            }
            Source::File(offset) => Err(format!("no snapshot file holds page {offset}")),
        };
        if matches!(read, Ok(Loaded::Here)) {
            self.reached(Step::SourceRead)?;
        }
        Ok(read)
    }

    /// Reads a stored page into the buffer.
    pub(super) fn load(&mut self, object: ObjectRef, place: usize) -> Result<Loaded, String> {
        let handle = Handle::from_bits(object.bits()).ok_or("the page word names no possible object")?;
        let Self { domain, kit, far, failed, dense, .. } = self;
        kit.tools().room(place + 1);
        let Tools { fetched, buffer, .. } = kit.tools();
        let found = domain.store(|store| store.fetch(handle, fetched));
        let found = found.map_err(|error| explain(&error))?;
        if let Whereabouts::Away(_) = found {
            // A manager that cannot have the disk tier is no reason to give a page up: a later one can.
            let Some(far) = far else { return Ok(Loaded::Far) };
            match far.look(handle) {
                Sight::UnderWay => return Ok(Loaded::Far),
                Sight::Read(Err(cause)) => {
                    // Once may be the disk's mood, or an old answer to what was only to be brought ahead.
                    if failed.replace(handle) == Some(handle) {
                        return Err(cause);
                    }
                    far.forget();
                    return Ok(Loaded::Far);
                }
                Sight::Read(Ok(read)) => {
                    *failed = None;
                    if !fetched.adopt(read) {
                        // Of another object, which had that handle before: it is read anew.
                        far.forget();
                        return Ok(Loaded::Far);
                    }
                }
            }
        }
        fetched.unpack(&mut buffer[place], &mut **dense).map_err(|error| explain(&error))?;
        Ok(Loaded::Here)
    }

    /// True when a stored page can be read without waiting for the disk. If not, it is asked for.
    pub(super) fn is_near(&mut self, object: ObjectRef) -> bool {
        let Self { domain, far, .. } = self;
        let (Some(handle), Some(far)) = (Handle::from_bits(object.bits()), far) else { return true };
        let found = domain.store(|store| store.whereabouts(handle));
        !matches!(found, Ok(Whereabouts::Away(_))) || far.has(handle)
    }

    /// Marks what was installed, and decides what a stop means.
    pub(super) fn finish(&mut self, first: PageIndex, installed: Installed) -> Result<Served, PagerError> {
        self.reached(Step::Copied)?;
        for page in (first.0..first.0 + installed.pages).map(PageIndex) {
            self.mark_installed(page)?;
        }
        // Something after the page that was waited for does not delay it.
        match installed.stop {
            None => Ok(Served::Done),
            Some(_) if installed.pages > 0 => Ok(Served::Done),
            Some(InstallStop::Again) => Ok(Served::Later),
            Some(InstallStop::NoMemory) => Ok(Served::NoMemory),
            // Looking beats remembering: the guest has been reading what is there.
            Some(InstallStop::Present) => {
                self.mark_installed(first)?;
                self.space.wake(first, 1)?;
                Ok(Served::Done)
            }
        }
    }

    pub(super) fn mark_installed(&mut self, page: PageIndex) -> Result<(), PagerError> {
        let released = self.machine.installed(page)?;
        self.reached(Step::InstalledMarked)?;
        if let Released::Object(object) = released {
            self.release(object);
        }
        Ok(())
    }

    /// The page's bytes are lost: from now on a touch fails, and the operator is told.
    fn lose(&mut self, page: PageIndex, cause: String) -> Result<Served, PagerError> {
        if let Released::Object(object) = self.machine.poisoned(page)?
            && let Some(handle) = Handle::from_bits(object.bits())
        {
            disk::abandon(&self.domain, handle);
        }
        self.stats.poisoned += 1;
        self.host.report(Incident::Poisoned { machine: self.id, page, cause });
        self.poison(page)
    }

    pub(super) fn poison(&mut self, page: PageIndex) -> Result<Served, PagerError> {
        match self.space.poison(page)?.stop {
            None => {}
            Some(InstallStop::Present) => self.space.wake(page, 1)?,
            Some(InstallStop::Again) => return Ok(Served::Later),
            Some(InstallStop::NoMemory) => return Ok(Served::NoMemory),
        }
        Ok(Served::Done)
    }

    pub(super) fn release(&self, object: ObjectRef) {
        let Some(handle) = Handle::from_bits(object.bits()) else { return };
        disk::release(&self.domain, self.host.tier(), handle);
    }

    /// The machine's process is gone, or alone with it: releases every object its pages name. Nobody reads the disk for it
    /// any more.
    pub fn bury(&mut self) -> MachineStats {
        let objects: Vec<ObjectRef> = self.machine.objects().map(|(_, object)| object).collect();
        objects.into_iter().for_each(|object| self.release(object));
        // Nothing can be refused here: the store shrinks, and the machine is leaving.
        let _ = self.settle_store();
        let _ = self.host.ledger(|ledger| ledger.remove(self.id));
        self.far = None;
        self.stats.clone()
    }

    /// Flips a bit of the bytes of a stored page, the last there is: to show that the damage is noticed.
    pub fn sabotage(&self) -> Option<PageIndex> {
        let (page, object) = self.machine.objects().last()?;
        let handle = Handle::from_bits(object.bits())?;
        self.domain.store(|store| store.sabotage(handle)).then_some(page)
    }
}
