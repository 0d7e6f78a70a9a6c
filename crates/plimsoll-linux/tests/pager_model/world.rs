//! One run: machines, guests, agents, managers one after the other, and the checks at the end.
use super::agent;
use super::content::Content;
use super::kernel::{Kernel, Pin, Ram, one_in, point};
use super::life::{Fate, Flaw, Life, Watch};
use super::sim_space::SimSpace;
use plimsoll_core::airlock::Shape;
use plimsoll_core::layout::GuestLayout;
use plimsoll_core::ledger::{Budget, Terms};
use plimsoll_core::machine::Machine;
use plimsoll_core::map::{HeapWords, Words};
use plimsoll_core::word::StateKind;
use plimsoll_linux::uffd::host::{Domain, Host, Orders};
use plimsoll_linux::uffd::pager::{Pager, Turn};
use plimsoll_linux::uffd::probe::Step;
use plimsoll_linux::uffd::recovery::take_over;
use plimsoll_linux::uffd::stats::MachineStats;
use plimsoll_store::{Handle, HeapSlabs, NoDense, Store};
use plimsoll_types::{BlockIndex, ByteCount, DomainId, GroupId, MachineId, PageCount};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::{self, JoinHandle};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const GROUP: GroupId = GroupId(0);
const DOMAIN: DomainId = DomainId(0);
/// Far more than a run takes; a run that needs them does not end.
const TURNS_MAX: usize = 2000;

type SimPager = Pager<SimSpace, HeapSlabs, Arc<HeapWords>>;

/// What all runs of this process have come through, so that a test can show that it tested something.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Faults answered from limbo.
    pub(crate) limbo: AtomicU64,
    /// Faults answered from the store.
    pub(crate) stored: AtomicU64,
    /// Faults that found their page.
    pub(crate) present: AtomicU64,
    /// Moves refused.
    pub(crate) refused: AtomicU64,
    /// Pages found in the store already.
    pub(crate) duplicate: AtomicU64,
    /// Pages found zero when they aged out.
    pub(crate) zero: AtomicU64,
    /// Pages discarded.
    pub(crate) discarded: AtomicU64,
    /// Take-overs.
    pub(crate) takeovers: AtomicU64,
    /// Blocks left to the kernel.
    pub(crate) left: AtomicU64,
    /// Blocks taken back from it.
    pub(crate) watched: AtomicU64,
    /// Blocks taken whole.
    pub(crate) taken: AtomicU64,
    /// Blocks moved back whole.
    pub(crate) returned: AtomicU64,
    /// Touches that the kernel served.
    pub(crate) filled: AtomicU64,
    /// Discards nobody heard of.
    pub(crate) silent: AtomicU64,
    /// Discards read again after a take-over.
    pub(crate) replayed: AtomicU64,
    /// Machines given back, and taken over again.
    pub(crate) given_back: AtomicU64,
}

/// Of all runs.
pub(crate) static SEEN: Seen = Seen {
    limbo: AtomicU64::new(0),
    stored: AtomicU64::new(0),
    present: AtomicU64::new(0),
    refused: AtomicU64::new(0),
    duplicate: AtomicU64::new(0),
    zero: AtomicU64::new(0),
    discarded: AtomicU64::new(0),
    takeovers: AtomicU64::new(0),
    left: AtomicU64::new(0),
    watched: AtomicU64::new(0),
    taken: AtomicU64::new(0),
    returned: AtomicU64::new(0),
    filled: AtomicU64::new(0),
    silent: AtomicU64::new(0),
    replayed: AtomicU64::new(0),
    given_back: AtomicU64::new(0),
};

/// What guests do first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Anything. A page that is read first keeps its block from being left to the kernel.
    Anyhow,
    /// Write.
    Writing,
}

/// Whether a manager gives its machines back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parting {
    /// No.
    Never,
    /// Once nothing of them is elsewhere.
    WhenHome,
    /// Without waiting for that: a mistake.
    TooEarly,
}

/// How a run goes.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Machines, all of one sharing domain.
    pub(crate) machines: u32,
    /// Guest threads of each.
    pub(crate) vcpus: u32,
    /// What each guest thread does, in steps.
    pub(crate) steps: u32,
    /// What each guest thread does first.
    pub(crate) start: Start,
    /// Guests give pages back, too.
    pub(crate) discards: bool,
    /// Whether every manager but the last gives its machines back to their VMMs, if it lives to.
    pub(crate) parting: Parting,
    /// Each machine's memory.
    pub(crate) layout: GuestLayout,
    /// Pages that guests use, from the first.
    pub(crate) pages: u32,
    /// Each machine's airlock.
    pub(crate) airlock: Shape,
    /// How the managers end, one after the other; the last one lives.
    pub(crate) fates: Vec<Fate>,
    /// Where managers are held up.
    pub(crate) held_up: Option<Step>,
    /// What is wrong on purpose.
    pub(crate) flaw: Flaw,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            machines: 2,
            vcpus: 2,
            steps: 12,
            start: Start::Anyhow,
            discards: false,
            parting: Parting::Never,
            layout: GuestLayout::dense(6),
            pages: 6,
            airlock: Shape { slots: 3, slot_pages: 6 },
            fates: Vec::new(),
            held_up: None,
            flaw: Flaw::None,
        }
    }
}

/// What of a machine outlives its managers.
struct Vm {
    id: MachineId,
    kernel: Arc<Kernel>,
    words: Arc<HeapWords>,
    orders: Arc<Orders>,
    stats: Option<MachineStats>,
    /// Of managers that are gone.
    missing: u64,
}

/// What the pagers of one manager share.
struct Office {
    life: Arc<Life>,
    host: Arc<Host>,
    domain: Arc<Domain<HeapSlabs>>,
}

impl Plan {
    /// Runs it. Panics if anything is wrong.
    pub(crate) fn run(&self) {
        let mut vms: Vec<Vm> = (0..self.machines).map(|id| self.create(id)).collect();
        let kernels: Vec<Arc<Kernel>> = vms.iter().map(|vm| Arc::clone(&vm.kernel)).collect();
        let flaw = self.flaw;
        let agents = kernels.iter().map(|kernel| {
            let kernel = Arc::clone(kernel);
            thread::spawn(move || agent::serve(&kernel, flaw))
        });
        let agents: Vec<JoinHandle<()>> = agents.collect();
        let quitting = self.start_guests(&vms);

        let mut slabs = HeapSlabs::new(64);
        let mut fates = self.fates.iter().copied().chain([Fate::Lives]);
        let mut epoch = 0;
        let (office, mut pagers) = loop {
            let fate = fates.next().unwrap_or(Fate::Lives);
            let life = Arc::new(Life::new(fate, self.held_up, kernels.clone()));
            slabs = match self.start_manager(&mut vms, life, slabs, epoch) {
                Ok((office, pagers)) => {
                    // Whoever has given a machine back is followed as if it had died before anybody was told.
                    let is_last = epoch > self.fates.len() as u64;
                    let parting = if is_last { Parting::Never } else { self.parting };
                    let pagers = drive_all(&vms, &office, pagers, parting);
                    if office.life.is_alive() && parting == Parting::Never {
                        break (office, pagers);
                    }
                    bequeath(&mut vms, office, pagers)
                }
                Err(slabs) => slabs,
            };
            epoch += 1;
            SEEN.takeovers.fetch_add(1, Ordering::Relaxed);
        };
        quitting.join().expect("guests do not fail quietly");
        office.life.spare();
        self.check(&mut vms, &office, &mut pagers);
        finish(&vms, office, pagers);
        for kernel in &kernels {
            kernel.state().is_over = true;
            kernel.ring();
        }
        agents.into_iter().for_each(|agent| agent.join().expect("agents do not fail quietly"));
    }

    fn create(&self, id: u32) -> Vm {
        let pages = self.layout.page_limit().0;
        let words = Arc::new(HeapWords::new(pages as usize));
        let slot_pages = self.airlock.slots * self.airlock.slot_pages;
        let kernel = Arc::new(Kernel::new(id, pages, slot_pages, Arc::clone(&words)));
        Vm { id: MachineId(id), kernel, words, orders: Arc::default(), stats: None, missing: 0 }
    }

    /// Starts the vCPUs, and a thread that tells the managers when all are done.
    fn start_guests(&self, vms: &[Vm]) -> JoinHandle<()> {
        let mut vcpus = Vec::new();
        for vm in vms {
            for vcpu in 0..self.vcpus {
                let (plan, kernel, orders) = (self.clone(), Arc::clone(&vm.kernel), Arc::clone(&vm.orders));
                let tag = vm.id.0;
                vcpus.push(thread::spawn(move || plan.guest(tag, vcpu, &kernel, &orders)));
            }
        }
        let orders: Vec<_> = vms.iter().map(|vm| (Arc::clone(&vm.orders), Arc::clone(&vm.kernel))).collect();
        thread::spawn(move || {
            vcpus.into_iter().for_each(|vcpu| vcpu.join().expect("guests do not fail quietly"));
            for (orders, kernel) in orders {
                orders.stop.store(true, Ordering::Relaxed);
                kernel.ring();
            }
        })
    }

    /// A vCPU: reads, writes, gives back, has devices hold pages; now and then the governor speaks.
    fn guest(&self, machine: u32, vcpu: u32, kernel: &Kernel, orders: &Orders) {
        let mut random = thread_rng();
        let mut pinned = None;
        for step in 0..self.steps {
            let page = random.gen_range(0..self.pages);
            let choice = match (self.start, step) {
                (Start::Writing, 0) => 8,
                _ => random.gen_range(0..20),
            };
            match choice {
                0..8 => kernel.touch(page, None),
                8..14 => {
                    let version = vcpu << 16 | step;
                    let own = Content::Own { machine, page, version };
                    let content = match random.gen_range(0..6) {
                        0 => Content::Zero,
                        1 => Content::Common(random.gen_range(0..3)),
                        _ => own,
                    };
                    kernel.touch(page, Some(content));
                }
                14..17 if self.discards => {
                    let pages = random.gen_range(1..=3).min(self.pages - page);
                    kernel.discard(page, pages);
                }
                17 if pinned.is_none() => {
                    let pin = [Pin::Kernel, Pin::Shared, Pin::Device][random.gen_range(0..3)];
                    kernel.pin(page, pin);
                    pinned = Some(page);
                }
                18 => {
                    orders.sample.store(true, Ordering::Relaxed);
                    kernel.ring();
                }
                19 => orders.unpin.store(true, Ordering::Relaxed),
                _ => {
                    if let Some(page) = pinned.take() {
                        kernel.pin(page, Pin::Free);
                    }
                }
            }
        }
    }

    /// A manager: a fresh one for untouched machines, or one that takes over. If it dies of that, the slabs are left.
    fn start_manager(
        &self,
        vms: &mut [Vm],
        life: Arc<Life>,
        slabs: HeapSlabs,
        epoch: u64,
    ) -> Result<(Office, Vec<SimPager>), HeapSlabs> {
        let host = Host::with_probe(Budget::of(ByteCount::mib(256)), Arc::new(Watch(Arc::clone(&life))));
        let mut machines = Vec::new();
        for vm in vms.iter_mut() {
            let mut space = SimSpace::new(Arc::clone(&vm.kernel), Arc::clone(&life), epoch, self.flaw);
            let machine = if epoch == 0 {
                let (layout, words) = (self.layout.clone(), Arc::clone(&vm.words));
                Machine::new(layout, words, self.airlock, u64::from(vm.id.0), |_| false)
                    .expect("words are fresh")
            } else {
                let Some(machine) = self.take_over(vm, &mut space, &life, epoch) else {
                    machines.push((None, space));
                    break;
                };
                machine
            };
            machine.audit().expect("the census is right from the start");
            host.ledger(|ledger| {
                ledger.add_group(GROUP);
                let terms = Terms { size: ByteCount::mib(2), reservation: ByteCount(0) };
                ledger.admit(vm.id, GROUP, terms).expect("there is room");
            });
            machines.push((Some(machine), space));
        }
        if !life.is_alive() {
            vms.iter().for_each(|vm| vm.kernel.state().manager_died());
            return Err(slabs);
        }
        let machines = machines.into_iter().filter_map(|(machine, space)| Some((machine?, space)));
        let machines: Vec<_> = machines.collect();
        let objects = machines.iter().flat_map(|(machine, _)| machine.objects());
        let handles: Vec<Handle> =
            objects.filter_map(|(_, object)| Handle::from_bits(object.bits())).collect();
        let (store, report) = Store::recover(slabs, handles);
        assert!(report.rejected.is_empty(), "model: words name objects that are gone: {report:?}");
        let domain = Arc::new(Domain::new(DOMAIN, GROUP, store));
        let host = Arc::new(host);
        let office = Office { life, host, domain };
        let mut pagers = Vec::new();
        for (vm, (machine, mut space)) in vms.iter_mut().zip(machines) {
            space.took_over();
            let (host, domain, orders) =
                (Arc::clone(&office.host), Arc::clone(&office.domain), Arc::clone(&vm.orders));
            let mut pager = Pager::new(vm.id, host, domain, orders, machine, space, Box::new(NoDense));
            if let Some(stats) = vm.stats.take() {
                pager.continue_stats(stats);
            }
            pagers.push(pager);
        }
        Ok((office, pagers))
    }

    fn take_over(
        &self,
        vm: &Vm,
        space: &mut SimSpace,
        life: &Life,
        epoch: u64,
    ) -> Option<Machine<Arc<HeapWords>>> {
        let (words, seed) = (Arc::clone(&vm.words), u64::from(vm.id.0));
        if self.flaw == Flaw::WordsForgotten {
            vm.words.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
        let layout = self.layout.clone();
        let taken = if self.flaw == Flaw::DrainedDiscardsDropped {
            take_over(&mut Deaf(space), epoch, layout, words, self.airlock, seed)
        } else {
            take_over(space, epoch, layout, words, self.airlock, seed)
        };
        match taken {
            Ok(machine) => Some(machine),
            Err(error) => {
                assert!(!life.is_alive(), "model: taking over failed: {error:?}");
                None
            }
        }
    }

    /// Everything is taken from the guests, every page is looked at, and everything is taken again.
    fn check(&self, vms: &mut [Vm], office: &Office, pagers: &mut [SimPager]) {
        for (vm, pager) in vms.iter().zip(pagers.iter_mut()) {
            {
                let mut state = vm.kernel.state();
                assert!(state.discards.is_empty(), "model: a discard outlived its guest");
                state.is_calm = true;
                state.pins.fill(Pin::Free);
            }
            evict(vm, pager);
            for page in 0..self.pages {
                fetch(vm, pager, page);
            }
            evict(vm, pager);
            for page in (0..self.pages).rev().step_by(2) {
                fetch(vm, pager, page);
            }
            let machine = pager.machine();
            machine.audit().expect("model: the census is off");
            let pages: u64 = StateKind::ALL.iter().map(|kind| machine.census().of(*kind).0).sum();
            assert_eq!(pages, u64::from(self.layout.page_limit().0), "model: pages were lost");
            assert_eq!(machine.census().of(StateKind::Poisoned), PageCount(0), "model: a page was poisoned");
        }
        let incidents = office.host.take_incidents();
        assert!(incidents.is_empty(), "model: {incidents:?}");
    }
}

/// A machine whose discards nobody hears.
struct Deaf<'a>(&'a mut SimSpace);

mod deaf {
    use super::Deaf;
    use plimsoll_core::replacement::Run;
    use plimsoll_linux::uffd::space::{Installed, Presence, Space, SpaceError, SpaceEvent};
    use plimsoll_linux::uffd::wire::{Item, Outcome};
    use plimsoll_types::{PageBytes, PageIndex, SlotPage};

    impl Space for Deaf<'_> {
        fn read_events(&mut self, events: &mut Vec<SpaceEvent>) -> Result<(), SpaceError> {
            self.0.read_events(events)?;
            events.retain(|event| matches!(event, SpaceEvent::Fault { .. }));
            Ok(())
        }
        fn copy(&mut self, first: PageIndex, pages: &[PageBytes]) -> Result<Installed, SpaceError> {
            self.0.copy(first, pages)
        }
        fn zero(&mut self, first: PageIndex, pages: u32) -> Result<Installed, SpaceError> {
            self.0.zero(first, pages)
        }
        fn wake(&mut self, first: PageIndex, pages: u32) -> Result<(), SpaceError> {
            self.0.wake(first, pages)
        }
        fn poison(&mut self, page: PageIndex) -> Result<Installed, SpaceError> {
            self.0.poison(page)
        }
        fn move_out(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
            self.0.move_out(items)
        }
        fn move_in(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
            self.0.move_in(items)
        }
        fn unwatch(&mut self, run: Run) -> Result<Outcome, SpaceError> {
            self.0.unwatch(run)
        }
        fn watch(&mut self, run: Run) -> Result<Outcome, SpaceError> {
            self.0.watch(run)
        }
        fn gifts(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
            self.0.gifts(items)
        }
        fn run_presence(&mut self, run: Run) -> Result<Presence, SpaceError> {
            self.0.run_presence(run)
        }
        fn is_huge(&mut self, run: Run) -> Result<bool, SpaceError> {
            self.0.is_huge(run)
        }
        fn has_events(&mut self) -> Result<bool, SpaceError> {
            self.0.has_events()
        }
        fn populate(&mut self, items: &[Item]) -> Result<(), SpaceError> {
            self.0.populate(items)
        }
        fn zap(&mut self, items: &[Item]) -> Result<(), SpaceError> {
            self.0.zap(items)
        }
        fn read_slots(&mut self, first: SlotPage, pages: &mut [PageBytes]) -> Result<(), SpaceError> {
            self.0.read_slots(first, pages)
        }
        fn begin_epoch(&mut self, epoch: u64) -> Result<(), SpaceError> {
            self.0.begin_epoch(epoch)
        }
        fn presence(&mut self) -> Result<Presence, SpaceError> {
            self.0.presence()
        }
    }
}

/// Runs a manager's pagers, each on its thread, until all guests are done or the manager is killed.
fn drive_all(vms: &[Vm], office: &Office, pagers: Vec<SimPager>, parting: Parting) -> Vec<SimPager> {
    let threads = vms.iter().zip(pagers).map(|(vm, pager)| {
        let (life, kernel, orders) =
            (Arc::clone(&office.life), Arc::clone(&vm.kernel), Arc::clone(&vm.orders));
        thread::spawn(move || drive(pager, &life, &kernel, &orders, parting))
    });
    let threads: Vec<_> = threads.collect();
    threads.into_iter().map(|thread| thread.join().expect("pagers do not fail quietly")).collect()
}

fn drive(mut pager: SimPager, life: &Life, kernel: &Kernel, orders: &Orders, parting: Parting) -> SimPager {
    let mut next = pager.resume().map(|()| Turn::Busy);
    loop {
        let leaves = match parting {
            Parting::Never => false,
            Parting::WhenHome => orders.is_home.load(Ordering::Relaxed),
            Parting::TooEarly => orders.go_home.load(Ordering::Relaxed),
        };
        if leaves && one_in(2) {
            let gone = pager.let_go();
            let is_gone = matches!(gone, Ok(true));
            next = gone.map(|_| Turn::Busy);
            if is_gone {
                SEEN.given_back.fetch_add(1, Ordering::Relaxed);
                kernel.is_alone_until(|| orders.stop.load(Ordering::Relaxed) || !life.is_alive());
                return pager;
            }
        }
        match next {
            Err(error) => {
                assert!(!life.is_alive(), "model: the pager failed: {error:?}");
                return pager;
            }
            // Others run first: a turn that found a discard under way cannot go on before they do.
            Ok(Turn::Busy | Turn::Stalled) => thread::yield_now(),
            Ok(Turn::Idle) if orders.stop.load(Ordering::Relaxed) => return pager,
            // Of what the kernel serves no event tells: the governor has to speak.
            Ok(Turn::Idle) if pager.machine().is_unwatched(BlockIndex(0)) => thread::yield_now(),
            Ok(Turn::Idle) => kernel.manager_waits(|state| {
                let is_over = orders.stop.load(Ordering::Relaxed) || !life.is_alive();
                let is_asked = orders.sample.load(Ordering::Relaxed);
                (is_over || is_asked || state.has_event()).then_some(())
            }),
        }
        // Guests that are done leave everything to be taken; before, the governor wants it nearly all the time, but spares
        // a block for a while that was left to the kernel.
        let is_spared = pager.machine().is_unwatched(BlockIndex(0)) && !one_in(6);
        let want = if is_spared || one_in(4) { 0 } else { 1000 };
        let is_stopping = orders.stop.load(Ordering::Relaxed);
        if parting != Parting::Never && one_in(8) {
            kernel.state().is_leaving = true;
            orders.go_home.store(true, Ordering::Relaxed);
        }
        orders.reclaim.store(if is_stopping { 0 } else { want }, Ordering::Relaxed);
        next = pager.turn();
    }
}

/// A manager is gone: what its pagers had in hand is lost, what they shared is left.
fn bequeath(vms: &mut [Vm], office: Office, pagers: Vec<SimPager>) -> HeapSlabs {
    for (vm, mut pager) in vms.iter_mut().zip(pagers) {
        point();
        vm.orders.go_home.store(false, Ordering::Relaxed);
        vm.orders.is_home.store(false, Ordering::Relaxed);
        let stats = pager.stats().clone();
        check_anomalies(vm, &stats);
        vm.missing += stats.anomalies.missing;
        vm.stats = Some(stats);
        vm.kernel.state().manager_died();
    }
    let Office { domain, .. } = office;
    let Ok(domain) = Arc::try_unwrap(domain) else {
        panic!("model: somebody still has the dead manager's store")
    };
    domain.into_store().into_memory()
}

/// Nothing is ever lost, and nothing missing but what discards explain.
fn check_anomalies(vm: &Vm, stats: &MachineStats) {
    let discarded = vm.kernel.state().discarded_pages;
    assert_eq!(stats.anomalies.lost, 0, "model: machine {} lost a page", vm.id.0);
    let missing = vm.missing + stats.anomalies.missing;
    assert!(
        missing <= discarded,
        "model: {missing} pages missing, {discarded} discarded on machine {}",
        vm.id.0
    );
}

/// Takes everything from a guest that does nothing.
fn evict(vm: &Vm, pager: &mut SimPager) {
    for turn in 0.. {
        vm.orders.reclaim.store(1000, Ordering::Relaxed);
        vm.orders.unpin.store(true, Ordering::Relaxed);
        pager.turn().unwrap_or_else(|error| panic!("model: the pager failed: {error:?}"));
        if pager.machine().ram() == PageCount(0) {
            break;
        }
        assert!(turn < TURNS_MAX, "model: machine {} cannot be emptied: {:?}", vm.id.0, pager.machine());
    }
    let state = vm.kernel.state();
    let present = (0..).zip(&state.ram).find(|(_, page)| matches!(page, Ram::Present(_)));
    if let Some((page, _)) = present {
        let story = state.story(page);
        panic!("model: page {page} of machine {} is there and nobody knows; what happened: {story}", vm.id.0);
    }
    let slots = state.slots.iter().filter(|held| held.is_some()).count();
    assert_eq!(slots, 0, "model: slot pages of machine {} that nobody knows of", vm.id.0);
}

fn fetch(vm: &Vm, pager: &mut SimPager, page: u32) {
    vm.orders.reclaim.store(0, Ordering::Relaxed);
    for turn in 0.. {
        if vm.kernel.try_touch(page, None).is_none() {
            return;
        }
        pager.turn().unwrap_or_else(|error| panic!("model: the pager failed: {error:?}"));
        assert!(turn < TURNS_MAX, "model: page {page} of machine {} does not come", vm.id.0);
    }
}

/// The machines' processes end: nothing of theirs is left.
fn finish(vms: &[Vm], office: Office, pagers: Vec<SimPager>) {
    for (vm, mut pager) in vms.iter().zip(pagers) {
        let stats = pager.stats().clone();
        check_anomalies(vm, &stats);
        for (sum, count) in [
            (&SEEN.limbo, stats.faults.limbo),
            (&SEEN.stored, stats.faults.stored),
            (&SEEN.present, stats.faults.present),
            (&SEEN.refused, stats.refused),
            (&SEEN.duplicate, stats.stored.duplicate),
            (&SEEN.zero, stats.stored.zero),
            (&SEEN.discarded, stats.discarded),
            (&SEEN.left, stats.blocks.left),
            (&SEEN.watched, stats.blocks.watched),
            (&SEEN.taken, stats.blocks.taken),
            (&SEEN.returned, stats.blocks.returned),
        ] {
            sum.fetch_add(count, Ordering::Relaxed);
        }
        let _ = pager.bury();
        office.host.ledger(|ledger| ledger.audit()).expect("model: the ledger is off");
    }
    let stats = office.domain.store(|store| store.stats());
    assert_eq!((stats.pages, stats.objects()), (PageCount(0), 0), "model: the store outlives its guests");
}
