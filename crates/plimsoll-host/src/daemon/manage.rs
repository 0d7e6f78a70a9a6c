//! The manager's process: takes over what the keeper has, takes machines, answers an operator.
//!
//! Enters: settings, and the keeper's socket. Leaves: managed machines, until the process is killed, which may be at any instant, or
//! is told to stop and has given its machines back. What must never happen: a VMM, or somebody on a socket, keeping this thread waiting.
//! So machines are handed over to a thread each, which the VMM keeps waiting if it likes, and are taken by this one. Decisions about
//! them are made on another (`steer`), which begins when machines are served, and whose end changes nothing for a guest.
use super::lead::Lead;
use super::milestones::{Milestones, now_ns};
use super::rights::{Role, give_up};
use super::sole::claim;
use super::status::{Answer, DiskStatus, DomainStatus, MachineStatus, ReadsBy, Request, Status};
use super::steer::Steering;
use super::{
    CONTROL, Counted, DaemonError, DiskSettings, HANDOVER, LOCK, PRESSURE, STORES, Settings, Sharing,
};
use crate::api::may_speak;
use crate::helm::kept::Kept;
use crate::homecoming::{Homecoming, Progress, stored};
use crate::keeper::client::Client;
use crate::stores::Storing;
use crate::voice::say;
use parking_lot::Mutex;
use plimsoll_attach::control::Virsh;
use plimsoll_core::ledger::{Budget, Kind};
use plimsoll_core::word::StateKind;
use plimsoll_linux::cgroup::foreign::ProcessCgroup;
use plimsoll_linux::disk::device::{FileDisk, OpenError};
use plimsoll_linux::disk::queue::DEPTH;
use plimsoll_linux::disk::reader::Reading;
use plimsoll_linux::disk::tier::Tier;
use plimsoll_linux::explain;
use plimsoll_linux::procsum::ProcessSum;
use plimsoll_linux::uffd::estate::{Estate, Keep};
use plimsoll_linux::uffd::governor::PERIOD_QUIET;
use plimsoll_linux::uffd::handover::Handover;
use plimsoll_linux::uffd::host::Incident;
use plimsoll_linux::uffd::manager::{MachineView, Manager, Membership, Meter, Vault};
use plimsoll_linux::uffd::probe::Probe;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_sys::fdpass;
use plimsoll_sys::mapping::make_files_in;
use plimsoll_sys::psi::PressureTrigger;
use plimsoll_sys::ring::{ReadRing, RingError};
use plimsoll_sys::{ProcessId, process};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a VMM may take to hand its machine over.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(30);
/// Machines that may be handed over at the same time.
const HANDOVERS_MAX: usize = 16;
/// How long somebody who asks may keep the answer waiting.
const ANSWER_PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How often it is looked whether a machine is gone.
const LOOK_PERIOD: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };
/// The same while it is about to end.
const PARTING_LOOK_PERIOD: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// How often the keeper is told that this manager lives.
const SIGN_PERIOD: Duration = Duration::from_secs(1);
/// How long the disk tier's file may be in use when a manager begins, and how often that is looked at.
const DISK_PATIENCE: Duration = Duration::from_secs(2);
const DISK_AGAIN: Duration = Duration::from_millis(20);
const SAMPLE_PERIOD: Duration = Duration::from_secs(2);
const INCIDENTS_MAX: usize = 100;
/// The longest request.
const REQUEST_MAX: usize = 4096;
const GROUP: GroupId = GroupId(1);

/// What is in use, as the settings say.
#[derive(Clone)]
pub(super) struct Used {
    source: Source,
    /// What was read last, and when. It counts when the source cannot be read: that nothing is known must not look like room.
    last: Arc<Mutex<Option<(Instant, ByteCount)>>>,
}

#[derive(Clone)]
enum Source {
    Processes(Arc<Mutex<ProcessSum>>),
    Group(ProcessCgroup),
}

impl Used {
    fn new(counted: Counted) -> Result<Self, DaemonError> {
        let own = ProcessId::own();
        let failed = |error: &dyn std::error::Error| DaemonError::Count(explain(error));
        let source = match counted {
            Counted::Group => Source::Group(ProcessCgroup::of(own).map_err(|error| failed(&error))?),
            Counted::Processes => {
                let sum = ProcessSum::new([own].into_iter().chain(ProcessId::parent()));
                Source::Processes(Arc::new(Mutex::new(sum.map_err(|error| failed(&error))?)))
            }
        };
        Ok(Self { source, last: Arc::default() })
    }

    fn add(&self, process: ProcessId) {
        if let Source::Processes(sum) = &self.source {
            // One that has ended already uses nothing.
            let _ = sum.lock().add(process);
        }
    }

    /// The VMM of a machine that was given back is nobody's affair here any more.
    fn remove(&self, process: ProcessId) {
        if let Source::Processes(sum) = &self.source {
            sum.lock().remove(process);
        }
    }

    pub(super) fn now(&self) -> ByteCount {
        let read = match &self.source {
            Source::Processes(sum) => sum.lock().sample().ok(),
            Source::Group(group) => group.used().ok(),
        };
        let mut last = self.last.lock();
        if let Some(used) = read {
            *last = Some((Instant::now(), used));
        }
        last.map_or(ByteCount(0), |(_, used)| used)
    }

    /// What it was a moment ago: the governor looks as often as the room that is left asks for, and to read the memory of a thousand
    /// processes takes milliseconds.
    pub(super) fn lately(&self) -> ByteCount {
        let last = *self.last.lock();
        last.filter(|(when, _)| when.elapsed() <= PERIOD_QUIET).map_or_else(|| self.now(), |(_, used)| used)
    }
}

impl Meter for Used {
    fn used(&mut self) -> ByteCount {
        self.now()
    }
}

/// What a thread has received, or the incident that it could not.
type Received = Result<Handover, String>;

/// Machines on their way from their VMMs.
#[derive(Clone)]
struct Arrivals {
    received: Arc<Mutex<VecDeque<Received>>>,
    arrived: Arc<EventFd>,
    under_way: Arc<AtomicUsize>,
}

impl Arrivals {
    fn new() -> io::Result<Self> {
        Ok(Self { received: Arc::default(), arrived: Arc::new(EventFd::new()?), under_way: Arc::default() })
    }

    /// Receives a machine on a thread of its own.
    fn await_one(&self, socket: OwnedFd) -> Result<(), String> {
        let process =
            fdpass::peer_pidfd(&socket).map_err(|error| format!("a VMM cannot be held: {error}"))?;
        if self.under_way.fetch_add(1, Ordering::Relaxed) >= HANDOVERS_MAX {
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            return Err(format!(
                "more than {HANDOVERS_MAX} machines are being handed over; one was turned away"
            ));
        }
        let arrivals = self.clone();
        let receive = move || {
            let received = Handover::receive(socket, process, HANDOVER_PATIENCE);
            let received =
                received.map_err(|error| format!("a machine was not handed over: {}", explain(&error)));
            arrivals.received.lock().push_back(received);
            arrivals.under_way.fetch_sub(1, Ordering::Relaxed);
            let _ = arrivals.arrived.signal();
        };
        let started = std::thread::Builder::new().name("handover".to_owned()).spawn(receive);
        started.map(drop).map_err(|error| {
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            format!("no thread for a machine: {error}")
        })
    }
}

/// The manager and what it talks to.
struct Session<'a> {
    settings: &'a Settings,
    keeper: Arc<Client>,
    manager: Arc<Mutex<Manager>>,
    steering: Steering,
    /// What machines, their processes and the daemon may use now.
    budget: Arc<Mutex<ByteCount>>,
    milestones: Arc<Milestones>,
    used: Used,
    handover: OwnedFd,
    control: OwnedFd,
    /// Held as long as a manager has machines: there is no second daemon beside one that has lost its keeper.
    _lock: OwnedFd,
    arrivals: Arrivals,
    incidents: VecDeque<String>,
    started_ns: u64,
    serving_ns: u64,
    is_alone: bool,
    /// When the keeper was told last that this manager lives.
    told: Instant,
    /// While machines are given back.
    parting: Option<Homecoming>,
    /// A stop that was refused, and of which the supervisor takes no refusal: it is obeyed as soon as no machine is left.
    is_owed: bool,
}

/// Manages machines until the process is killed, or told to stop and without any. `keeper` is the number of the
/// descriptor under which the keeper's socket was inherited; `lead` is what the process has taken as its first act.
///
/// # Errors
/// [`DaemonError`].
pub fn manage(settings: &Settings, keeper: RawFd, mut lead: Option<Lead>) -> Result<(), DaemonError> {
    let started_ns = now_ns();
    // What makes one is given up, and nobody knows yet whether there is a disk.
    let ring = ReadRing::new(DEPTH);
    // Before anything is read, and before there are threads.
    let role = if Virsh::is_installed() { Role::Manager } else { Role::Alone };
    give_up(role, settings.filter).map_err(DaemonError::Rights)?;
    let wanted =
        [(SIGTERM, Arc::new(AtomicBool::new(false))), (SIGINT, Arc::default()), (SIGHUP, Arc::default())];
    let (signalled, write) = UnixStream::pair().map_err(DaemonError::Wait)?;
    for (signal, flag) in &wanted {
        let write = write.try_clone().map_err(DaemonError::Wait)?;
        signal_hook::flag::register(*signal, Arc::clone(flag)).map_err(DaemonError::Wait)?;
        signal_hook::low_level::pipe::register(*signal, write).map_err(DaemonError::Wait)?;
    }
    signalled.set_nonblocking(true).map_err(DaemonError::Wait)?;
    let [term, int, reload] = wanted.each_ref().map(|(_, flag)| flag);

    let mut session = Session::open(settings, keeper, started_ns, ring)?;
    lead.iter_mut().for_each(Lead::end_soon);
    let mut is_told = false;
    loop {
        session.turn(&signalled, if is_told { &PARTING_LOOK_PERIOD } else { &LOOK_PERIOD })?;
        Lead::end_if_over(&mut lead);
        if reload.swap(false, Ordering::Relaxed) {
            session.steering.reload();
        }
        is_told |= [term, int].into_iter().any(|flag| flag.swap(false, Ordering::Relaxed));
        // Without a keeper and without machines there is nothing to live for.
        if is_told || session.is_owed || session.is_alone {
            match session.left() {
                Left::Nothing => break,
                Left::Ending => {}
                Left::Machines if is_told => {
                    if let Err(refusal) = session.part() {
                        is_told = false;
                        // It waits for that, whatever it is told: at the latest, there will be no machine any more.
                        session.is_owed = is_supervised();
                        announce(&[NotifyState::Status(&refusal)]);
                        session.tell(refusal);
                        // One that is gone is noticed in the next turn.
                        let _ = session.keeper.staying();
                    }
                }
                Left::Machines => {}
            }
        }
    }
    announce(&[NotifyState::Stopping]);
    session.steering.stop();
    // Where only the keeper is gone, another may come who was given the tier, as it was, by the supervisor.
    let is_to_end = is_told || (session.is_owed && !session.is_alone);
    // Nobody else has it any more, unless a thread of theirs hangs; then its end is that of the process.
    if let Some(manager) = Arc::into_inner(session.manager) {
        let vault = manager.into_inner().stop();
        if let Some(Err(error)) = vault.tier().filter(|_| is_to_end).map(Tier::end) {
            say(format_args!(
                "plimsoll manager: the disk tier's file could not be emptied: {error}; nobody can read what is in it"
            ));
        }
    }
    Ok(())
}

/// What a manager that stops would leave behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    /// Machines whose VMMs have ended a moment ago.
    Ending,
    Machines,
}

impl<'a> Session<'a> {
    fn open(
        settings: &'a Settings,
        keeper: RawFd,
        started_ns: u64,
        ring: Result<ReadRing, RingError>,
    ) -> Result<Self, DaemonError> {
        process::refuse_dumps().map_err(DaemonError::Dumps)?;
        let socket = process::adopt_inherited(keeper).map_err(DaemonError::NoKeeper)?;
        // Beside what is kept, each shard has some of its own.
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
            .map_err(|errno| DaemonError::Slots(errno.into()))?;
        let (keeper, mut kept) = Client::connect(socket).map_err(DaemonError::NoKeeper)?;
        let mut own = |slot| {
            let missing = || DaemonError::NoKeeper(io::Error::other(format!("slot {slot} is empty")));
            kept.remove(&slot).ok_or_else(missing)
        };
        let (handover, control, lock) = (own(HANDOVER)?, own(CONTROL)?, own(LOCK)?);
        own(STORES).ok().into_iter().for_each(make_files_in);
        let pressure = own(PRESSURE).ok().and_then(PressureTrigger::adopt);
        let keeper = Arc::new(keeper);
        let estate = Estate::open(Arc::clone(&keeper) as Arc<dyn Keep>, kept)?;
        // Not before this build has read the register: a manager that has outlived its keeper goes on if it cannot.
        claim(lock.as_fd(), || keeper.is_alone())?;
        let used = Used::new(settings.counted)?;
        // What was said since the daemon was started counts from the first fault on. That it cannot be read is told by the loop.
        let words = Kept::open(&settings.directory);
        let said = words.as_ref().ok().and_then(|kept| kept.words().budget_bytes);
        let budget = said.map_or(settings.budget, ByteCount);
        let mut vault = Vault::of_estate(estate, Budget::within(budget), settings.store_limit);
        vault.processes().for_each(|process| used.add(process));
        vault.set_used(used.now());
        if let Some(disk) = settings.disk.as_ref().filter(|_| !vault.has_tier()) {
            vault.set_tier(new_tier(disk)?)?;
        }
        if let Some(tier) = vault.tier() {
            begin_reading(tier, ring);
        }
        let milestones = Arc::new(Milestones::default());
        let mut manager = Manager::start(vault, Arc::clone(&milestones) as Arc<dyn Probe>)?;
        // Before anybody takes anything: the loop, which says so again, begins later.
        let is_paused = |name: &str| words.as_ref().is_ok_and(|kept| kept.is_paused(name));
        manager.machines().iter().filter(|view| is_paused(&view.name)).for_each(|view| {
            manager.hold(view.id, true);
        });
        manager.govern(Box::new(used.clone()), SAMPLE_PERIOD)?;
        let serving_ns = now_ns();
        // Best effort: a keeper that is gone is noticed below.
        let _ = keeper.serving();
        let status = format!("{} machines", manager.machines().len());
        announce(&[NotifyState::Ready, NotifyState::Status(&status)]);
        let arrivals = Arrivals::new().map_err(DaemonError::Wait)?;
        let (manager, budget) = (Arc::new(Mutex::new(manager)), Arc::new(Mutex::new(budget)));
        let steering = Steering::start(settings, words, pressure, &manager, &used, &budget);
        Ok(Self {
            settings,
            keeper,
            manager,
            steering,
            budget,
            milestones,
            used,
            handover,
            control,
            _lock: lock,
            arrivals,
            incidents: VecDeque::new(),
            started_ns,
            serving_ns,
            is_alone: false,
            told: Instant::now(),
            parting: None,
            is_owed: false,
        })
    }

    /// Waits for something to do, `patience` at most, and does it.
    fn turn(&mut self, signalled: &UnixStream, patience: &Timespec) -> Result<(), DaemonError> {
        let arrived = self.arrivals.arrived.as_fd();
        let watched = [self.handover.as_fd(), self.control.as_fd(), arrived, signalled.as_fd()];
        let mut polled = watched.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
        match poll(&mut polled, Some(patience)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(DaemonError::Wait(errno.into())),
        }
        let [machine, operator, received, signal] = polled.map(|polled| !polled.revents().is_empty());
        if signal {
            let _ = rustix::io::read(signalled, &mut [0; 64]);
        }
        if machine {
            self.meet();
        }
        if received {
            let _ = self.arrivals.arrived.drain();
            self.take_arrivals();
        }
        if operator {
            self.answer();
        }
        self.look();
        Ok(())
    }

    /// Who has connected, if it may.
    fn connected(&mut self, listener: &OwnedFd) -> Option<OwnedFd> {
        let socket = accept_with(listener, SocketFlags::CLOEXEC).ok()?;
        let peer = fdpass::peer_credentials(&socket).ok()?;
        if may_speak(peer.uid) {
            return Some(socket);
        }
        self.tell(format!("user {} may not speak to this daemon and was turned away", peer.uid));
        None
    }

    fn meet(&mut self) {
        let Ok(listener) = self.handover.try_clone() else { return };
        if let Some(socket) = self.connected(&listener)
            && let Err(incident) = self.arrivals.await_one(socket)
        {
            self.tell(incident);
        }
    }

    fn take_arrivals(&mut self) {
        loop {
            let Some(received) = self.arrivals.received.lock().pop_front() else { return };
            match received.and_then(|handover| self.take(handover)) {
                Ok(()) => {}
                Err(incident) => self.tell(incident),
            }
        }
    }

    fn take(&mut self, handover: Handover) -> Result<(), String> {
        if self.parting.is_some() || self.is_owed {
            handover.refuse("the daemon is stopping".to_owned());
            return Err("a machine was turned away: the daemon is stopping".to_owned());
        }
        let domain = match self.settings.sharing {
            Sharing::Together => DomainId(0),
            Sharing::Apart => DomainId(self.manager.lock().next_id().0),
        };
        let process = handover.shards.first().map(|custody| custody.process());
        let membership = Membership { group: GROUP, domain, reservation: ByteCount(0) };
        self.manager.lock().welcome(handover, membership).map_err(|error| explain(&error))?;
        process.into_iter().for_each(|process| self.used.add(process));
        Ok(())
    }

    fn answer(&mut self) {
        let Ok(listener) = self.control.try_clone() else { return };
        let Some(socket) = self.connected(&listener) else { return };
        let mut ready = [PollFd::new(&socket, PollFlags::IN)];
        if !poll(&mut ready, Some(&ANSWER_PATIENCE)).is_ok_and(|ready| ready > 0) {
            return;
        }
        let mut bytes = [0; REQUEST_MAX];
        let answer = match fdpass::recv(&socket, &mut bytes, 0) {
            Ok(Some(received)) => self.respond(bytes.get(..received.bytes).unwrap_or_default()),
            Ok(None) => return,
            Err(error) => Answer::Refused(explain(&error)),
        };
        // Best effort: whoever does not wait for the answer does without.
        if let Ok(text) = serde_json::to_vec(&answer) {
            let _ = fdpass::send(&socket, &text, &[]);
        }
    }

    fn respond(&mut self, request: &[u8]) -> Answer {
        match serde_json::from_slice(request) {
            Ok(Request::Status) => Answer::Status(Box::new(self.status())),
            Ok(Request::Squeeze { machine, pages }) => {
                self.manager.lock().squeeze(MachineId(machine), pages);
                Answer::Done
            }
            Ok(Request::Park { machine }) => self.ordered(machine, Manager::park),
            Ok(Request::Wake { machine }) => self.ordered(machine, Manager::wake),
            Err(error) => Answer::Refused(format!("the request makes no sense: {error}")),
        }
    }

    fn ordered(&self, machine: u32, order: impl FnOnce(&Manager, MachineId)) -> Answer {
        let id = MachineId(machine);
        let manager = self.manager.lock();
        if manager.machine(id).is_none() {
            return Answer::Refused(format!("there is no {id}"));
        }
        if manager.is_held(id) {
            return Answer::Refused(format!("{id} is paused: resume it first"));
        }
        order(&manager, id);
        Answer::Done
    }

    /// Sees to what has happened by itself.
    fn look(&mut self) {
        let incidents = {
            let mut manager = self.manager.lock();
            self.forget_gone(&mut manager);
            manager.host().take_incidents()
        };
        let heard = self.steering.heard();
        incidents.iter().map(text_of).chain(heard).for_each(|text| self.tell(text));
        if self.told.elapsed() >= SIGN_PERIOD {
            self.told = Instant::now();
            // One that is gone is noticed below.
            let _ = self.keeper.serving();
        }
        if !self.is_alone && self.keeper.is_alone() {
            self.is_alone = true;
            let until = if is_supervised() {
                "until the supervisor has started the next one; where its unit is being stopped none comes, and machines are to be ended first"
            } else {
                "and when it ends, too, its machines stall; end them, then start the daemon again"
            };
            self.tell(format!("the keeper is gone: this manager goes on, {until}"));
        }
    }

    fn tell(&mut self, incident: String) {
        say(format_args!("plimsoll manager: {incident}"));
        self.incidents.truncate(INCIDENTS_MAX - 1);
        self.incidents.push_front(incident);
    }

    /// What the VMM of a machine that was given back takes is nobody's business any more.
    fn forget_gone(&self, manager: &mut Manager) {
        let parted = manager.forget_gone().into_iter().filter_map(|(_, process)| process);
        parted.for_each(|process| self.used.remove(process));
    }

    fn left(&mut self) -> Left {
        let mut manager = self.manager.lock();
        self.forget_gone(&mut manager);
        let machines = manager.machines();
        let custody = |view: &MachineView| manager.custody(view.id);
        let has_ended = |view| custody(view).is_none_or(|custody| custody.has_ended(Duration::ZERO));
        if manager.unmanaged() > 0 || !machines.iter().all(has_ended) {
            return Left::Machines;
        }
        if machines.is_empty() { Left::Nothing } else { Left::Ending }
    }

    /// Gives the machines back, a step at a time: a guest whose manager goes for good would stall at what is elsewhere. Says why
    /// where that cannot be; then they are managed as before, all of them: none is let go before all are home.
    fn part(&mut self) -> Result<(), String> {
        let shared = Arc::clone(&self.manager);
        let manager = shared.lock();
        let machines = manager.machines();
        let mut parting = match self.parting.take() {
            Some(parting) => parting,
            None => self.begin_parting(&manager, &machines)?,
        };
        let running = machines.len();
        match parting.look(&manager, &machines) {
            Progress::UnderWay => {
                self.parting = Some(parting);
                Ok(())
            }
            Progress::Stuck => Err(format!(
                "not stopped: {running} machines could not be left; all others have been given back"
            )),
            Progress::Vain(why) => Err(format!(
                "not stopped: {why}; {} of {running} machines are still stored, and they are managed as before",
                stored(&machines)
            )),
        }
    }

    fn begin_parting(&mut self, manager: &Manager, machines: &[MachineView]) -> Result<Homecoming, String> {
        let lost = machines.iter().filter(|view| manager.is_lost(view.id)).count();
        let unmanaged = manager.unmanaged() + lost;
        if unmanaged > 0 {
            return Err(format!(
                "not stopped: {unmanaged} machines could not be taken over, or are no longer managed, and wait for the next \
                 manager; end them first"
            ));
        }
        let (running, away) = (machines.len(), stored(machines));
        let parting = Homecoming::begin(manager, machines, *self.budget.lock()).map_err(|lack| {
            format!(
                "not stopped: {running} machines run, and {away} of their memory are stored; {lack} for giving them back; end \
                 machines first"
            )
        })?;
        self.tell(format!("stopping: {running} machines are given back, {away} of them from the store"));
        Ok(parting)
    }

    fn status(&self) -> Status {
        let manager = self.manager.lock();
        let usage = manager.host().ledger(|ledger| ledger.host_usage());
        let machine = |view: MachineView| MachineStatus {
            id: view.id.0,
            name: view.name,
            pid: manager.custody(view.id).map_or(0, |custody| custody.process().get()),
            size_bytes: view.size.0,
            resident_bytes: view.stats.census.in_ram().bytes().0,
            limbo_bytes: view.stats.limbo.bytes().0,
            stored_bytes: view.stats.census.of(StateKind::Stored).bytes().0,
            captured: view.stats.captured,
            lost: view.stats.anomalies.lost,
        };
        let domains = manager.domains().map(|domain| {
            let stats = domain.store(|store| store.stats());
            let fragmentation = stats.fragmentation();
            DomainStatus {
                id: domain.id.0,
                objects: stats.objects(),
                pages: stats.pages.0,
                held_bytes: stats.held().0,
                away: stats.away.0,
                data_slab_bytes: fragmentation.data_slabs.0,
                free_slot_bytes: fragmentation.free_slots.0,
                slot_waste_bytes: fragmentation.slot_waste.0,
            }
        });
        Status {
            version: 1,
            pid: std::process::id(),
            epoch: manager.epoch(),
            is_alone: self.is_alone,
            started_ns: self.started_ns,
            serving_ns: self.serving_ns,
            first_page_ns: self.milestones.first_page_ns(),
            used_bytes: self.used.now().0,
            charged_bytes: [Kind::Resident, Kind::Limbo, Kind::Store, Kind::Tables]
                .map(|kind| usage.of(kind).0),
            domains: domains.collect(),
            machines: manager.machines().into_iter().map(machine).collect(),
            storing: Storing::of(manager.host()),
            disk: manager.host().tier().map(disk_status),
            incidents: self.incidents.iter().cloned().collect(),
        }
    }
}

/// An empty disk tier, as soon as its file can be had.
///
/// A manager that was killed before its tier was entered has left a copy of the file's descriptor, and so its lock, with the keeper, which
/// has let go of it by now. A supervisor closes its own copy when it reads of that.
///
/// No guest waits for this that would be served otherwise. Machines are taken once the tier is entered, so there are none, but for those of a
/// keeper before this one that was told of no disk; and those no manager serves without the file, so that the one that tries again has it
/// sooner than its successor would.
fn new_tier(disk: &DiskSettings) -> Result<Tier, DaemonError> {
    let until = Instant::now() + DISK_PATIENCE;
    let file = loop {
        match FileDisk::create(&disk.file) {
            Err(OpenError::InUse { .. }) if Instant::now() < until => std::thread::sleep(DISK_AGAIN),
            done => break done?,
        }
    };
    let tier = Tier::create(Box::new(file), disk.limits)?;
    if tier.keepsakes().key.is_none() {
        say(format_args!(
            "plimsoll manager: this kernel gives no secret memory (memfd_secret); the disk tier's key is in locked memory"
        ));
    }
    Ok(tier)
}

/// Says so where the tier is not read by a ring. Where there is no thread to read it, each machine asks for one anew.
fn begin_reading(tier: &Tier, ring: Result<ReadRing, RingError>) {
    let (ring, refusal) = match ring {
        Ok(ring) => (Some(ring), None),
        Err(error) => (None, Some(explain(&error))),
    };
    match tier.start_reading(ring) {
        Ok(Reading::Ring) => {}
        Ok(Reading::Threads { cause }) => {
            let cause = refusal.unwrap_or(cause);
            say(format_args!("plimsoll manager: the disk tier is read by threads: {cause}"));
        }
        Err(error) => {
            say(format_args!("plimsoll manager: there is no thread yet that reads the disk tier: {error}"))
        }
    }
}

fn disk_status(tier: &Tier) -> DiskStatus {
    let stats = tier.stats();
    let reads_by = if tier.reading() == Some(Reading::Ring) { ReadsBy::Ring } else { ReadsBy::Threads };
    DiskStatus {
        reads_by,
        limit_bytes: stats.limit.0,
        used_bytes: stats.used.0,
        live_bytes: stats.live.0,
        failed_bytes: stats.failed.0,
        written_bytes: stats.written.0,
        pages_read: stats.pages_read,
        reads: stats.reads,
        no_room: stats.no_room,
        refused: stats.refused,
    }
}

/// Tells systemd, if it started the daemon. Best effort: a supervisor that does not listen changes nothing for a guest.
fn announce(states: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(states);
}

/// True when something like systemd started the daemon: it starts the next keeper, and takes an order to stop for one that stands.
fn is_supervised() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some_and(|place| !place.is_empty())
}

fn text_of(incident: &Incident) -> String {
    match incident {
        Incident::Poisoned { machine, page, cause } => format!("{machine}: {page} is poisoned: {cause}"),
        Incident::Lost { machine, cause } => format!("{machine} is no longer managed: {cause}"),
        Incident::StoreFull { machine } => format!("{machine}: the store took no more pages"),
        Incident::Disk { cause } => format!("the disk tier takes no more for now: {cause}"),
        Incident::NoTier { cause } => format!(
            "the disk tier cannot be had, and machines wait for what they have there until a manager can have it: {cause}"
        ),
        Incident::BadCodec { domain } => format!("{domain}: zstd did not give back what it was given"),
    }
}
