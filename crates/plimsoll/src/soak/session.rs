//! One run of the soak: does what the schedule says, looks whether all is well, and cleans up.
//!
//! Enters: a plan. Leaves: a report, failures included. An error means that the run could not go on at all. Whatever
//! happens, dropping what is here ends every process that was started.
use super::Plan;
use super::report::{Pages, SoakReport};
use super::saboteur::{Delays, Pressure, Reader, Saboteur};
use super::schedule::{self, Action, Aftermath, OPENING, Schedule};
use crate::demo::Interrupt;
use crate::demo::fleet::{self, Guest};
use crate::demo::meter::Accounting;
use plimsoll_core::ledger::{Budget, Kind};
use plimsoll_guest::random::hash3;
use plimsoll_linux::explain;
use plimsoll_linux::uffd::host::{Host, Incident};
use plimsoll_linux::uffd::housekeeper::Housekeeping;
use plimsoll_linux::uffd::manager::{Manager, Membership, Vault};
use plimsoll_linux::uffd::probe::Step;
use plimsoll_linux::uffd::stats::MachineStats;
use plimsoll_types::{BLOCK_PAGES, ByteCount, DomainId, GroupId, MachineId};
use plimsoll_vmm::control::StopMode;
use rustix::process::Signal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Short, since few managers live for a second: hot blocks are looked for as often.
const SAMPLE_PERIOD: Duration = Duration::from_millis(200);
/// Pages grow cold in no time, so that they are packed, moved and read back all the time.
const HOUSEKEEPING: Housekeeping = Housekeeping { cold_after: Duration::from_millis(500), cpu_permille: 200 };
/// Of a run, each part of the opening may take one in so many.
const OPENING_SHARE: u32 = 5;
const OPENING_MAX: Duration = Duration::from_secs(20);
/// How often guests are told again to give up everything: more often than the governor takes such an order back.
const SQUEEZE_PERIOD: Duration = Duration::from_millis(1);
/// How often it is looked whether all is well.
const LOOK_PERIOD: Duration = Duration::from_millis(100);
const PROGRESS_PERIOD: Duration = Duration::from_secs(5);
/// How long an ordered crash waits for its step.
const CRASH_PATIENCE: Duration = Duration::from_secs(1);
/// How long a pager may take to see that its guest is gone, and to release what it had.
const BURIAL_PATIENCE: Duration = Duration::from_secs(10);
/// How long the last check of every page may take. It takes seconds; what hangs is stopped by this.
const CHECK_PATIENCE: Duration = Duration::from_secs(180);
const REAP_PATIENCE: Duration = Duration::from_secs(15);
const GROUP: GroupId = GroupId(1);
const DOMAIN: DomainId = DomainId(1);
/// Allowed above the budget.
const TOLERANCE_PERCENT: u64 = 2;

/// A guest, and who reads its memory.
struct Seat {
    guest: Guest,
    id: MachineId,
    reader: Option<Reader>,
    /// What its managers last said: a machine that was killed may be gone before it is asked.
    counts: Pages,
    /// Pages that were missing without an event, under managers that are gone.
    missing: u64,
}

/// What somebody is asked to give up while time passes.
#[derive(Clone, Copy)]
enum Squeeze {
    Nobody,
    One(usize),
    /// All but one.
    Others(usize),
    All,
}

struct Session<'a> {
    plan: &'a Plan,
    interrupt: &'a Interrupt,
    accounting: Accounting,
    seats: Vec<Seat>,
    /// Guests started so far.
    started: u64,
    /// Machines whose process was killed: losing those is no failure.
    killed: Vec<MachineId>,
    delays: Arc<Delays>,
    phantom_bytes: Arc<AtomicU64>,
    saboteur: Arc<Saboteur>,
    /// Counts of guests and managers that are gone.
    retired: Pages,
    retired_wrong_words: u64,
    report: SoakReport,
    since: Instant,
    looked: Instant,
    printed: Instant,
}

/// Runs the soak.
pub(super) fn run(plan: &Plan, run_by: String, interrupt: &Interrupt) -> Result<SoakReport, String> {
    let mut session = Session::new(plan, run_by, interrupt)?;
    // The store can hold more than all guests own, so that it is never what runs out.
    let asked: ByteCount = (0..plan.guests).map(|_| plan.size).sum();
    let vault = Vault::new(Budget::within(plan.budget), asked + asked);
    let mut manager = session.take_over(vault)?;
    for _ in 0..plan.guests {
        let seat = session.spawn(&mut manager)?;
        session.seats.push(seat);
    }
    let deadline = Instant::now() + Duration::from_secs(plan.seconds);
    for action in OPENING {
        let until = Instant::now() + (Duration::from_secs(plan.seconds) / OPENING_SHARE).min(OPENING_MAX);
        manager = session.open(manager, action, until)?;
    }
    for action in Schedule::new(plan.seed, plan.guests) {
        if Instant::now() >= deadline || session.is_over() {
            break;
        }
        manager = session.act(manager, action)?;
        session.report.actions += 1;
    }
    session.check(&manager);
    session.conclude(manager)
}

impl<'a> Session<'a> {
    fn new(plan: &'a Plan, run_by: String, interrupt: &'a Interrupt) -> Result<Self, String> {
        let delays = Arc::<Delays>::default();
        let report = SoakReport {
            version: 1,
            seed: plan.seed,
            run_by,
            seconds: plan.seconds,
            guests: plan.guests,
            size_bytes: plan.size.0,
            budget_bytes: plan.budget.0,
            peak_bytes: 0,
            peak_source: String::new(),
            actions: 0,
            takeovers: 0,
            crashes: Step::ALL.iter().map(|step| (format!("{step:?}"), 0)).collect(),
            crashes_not_struck: 0,
            guests_killed: 0,
            pages: Pages::default(),
            packed: 0,
            moved: 0,
            collapsed: 0,
            backoffs: 0,
            wrong_words: 0,
            failures: Vec::new(),
        };
        let now = Instant::now();
        Ok(Self {
            plan,
            interrupt,
            accounting: Accounting::start()?,
            seats: Vec::new(),
            started: 0,
            killed: Vec::new(),
            saboteur: Arc::new(Saboteur::new(plan.seed, Arc::clone(&delays))),
            delays,
            phantom_bytes: Arc::default(),
            retired: Pages::default(),
            retired_wrong_words: 0,
            report,
            since: now,
            looked: now,
            printed: now,
        })
    }

    fn fail(&mut self, what: String) {
        if !self.report.failures.contains(&what) {
            self.report.failures.push(what);
        }
    }

    /// A run ends with the first failure, so that what it left can be looked at.
    fn is_over(&self) -> bool {
        self.interrupt.is_set() || !self.report.failures.is_empty()
    }

    /// Does something until what it is for has come of it. Where nothing does, the run goes on all the same: its report says so.
    fn open(&mut self, manager: Manager, action: Action, until: Instant) -> Result<Manager, String> {
        let mut manager = manager;
        while Instant::now() < until && !self.is_over() {
            manager = self.act(manager, action)?;
            self.report.actions += 1;
            let host = manager.host();
            let came_of_it = match action {
                Action::Feast { .. } => host.tidied(|tidied| tidied.collapsed),
                _ => host.backoffs(),
            };
            if came_of_it > 0 {
                break;
            }
        }
        Ok(manager)
    }

    fn act(&mut self, manager: Manager, action: Action) -> Result<Manager, String> {
        let mut manager = manager;
        match action {
            Action::Rest { ms } => self.pass(&manager, ms, Squeeze::Nobody),
            Action::SqueezeOne { guest, ms } => self.pass(&manager, ms, Squeeze::One(guest)),
            Action::Feast { guest, ms } => {
                self.pass(&manager, ms / 3, Squeeze::All);
                self.pass(&manager, ms - ms / 3, Squeeze::Others(guest));
            }
            Action::Contend { guest, ms } => self.contend(&manager, guest, ms),
            Action::SqueezeAll { ms } => self.pass(&manager, ms, Squeeze::All),
            Action::Park { guest, ms } => {
                let id = self.seats[guest].id;
                manager.park(id);
                self.pass(&manager, ms, Squeeze::Nobody);
                manager.wake(id);
            }
            Action::Famine { percent, ms } => {
                self.phantom_bytes.store(self.plan.budget.0 / 100 * percent, Ordering::Relaxed);
                self.pass(&manager, ms, Squeeze::Nobody);
                self.phantom_bytes.store(0, Ordering::Relaxed);
            }
            Action::CrashManager { step, after } => return self.crash(manager, step, after),
            Action::RestartManager => return self.restart(manager),
            Action::KillGuest { guest, then } => {
                self.kill(guest)?;
                if then == Aftermath::Restart {
                    manager = self.restart(manager)?;
                }
                self.bury(&mut manager, guest)?;
                self.seats[guest] = self.spawn(&mut manager)?;
            }
            Action::Delay { permille, longest_us } => self.delays.set(permille, longest_us),
            Action::Read { guest } => {
                let seat = &mut self.seats[guest];
                if seat.reader.is_none()
                    && let Some(custody) = manager.custody(seat.id)
                {
                    seat.reader =
                        Some(Reader::start(custody, hash3(self.plan.seed, 3, self.report.actions))?);
                }
            }
            Action::Calm => self.calm(&manager),
        }
        Ok(manager)
    }

    /// Ends delays and readers. A reader may wait for a page: while the run goes on, it comes. Once the run is over it may
    /// not, and the reader is let go when its guest is buried.
    fn calm(&mut self, manager: &Manager) {
        self.delays.set(0, 0);
        self.seats.iter().filter_map(|seat| seat.reader.as_ref()).for_each(Reader::stop);
        loop {
            for seat in &mut self.seats {
                if let Some(reader) = seat.reader.take_if(|reader| reader.has_ended()) {
                    self.retired.read_from_outside += reader.join();
                }
            }
            if self.is_over() || self.seats.iter().all(|seat| seat.reader.is_none()) {
                return;
            }
            std::thread::sleep(SQUEEZE_PERIOD);
            self.look(manager);
        }
    }

    /// Lets time pass.
    fn pass(&mut self, manager: &Manager, ms: u64, squeeze: Squeeze) {
        let end = Instant::now() + Duration::from_millis(ms);
        while Instant::now() < end && !self.is_over() {
            self.squeeze(manager, squeeze);
            std::thread::sleep(SQUEEZE_PERIOD);
            self.look(manager);
        }
    }

    /// Has a guest thrash, and others be asked in its place.
    fn contend(&mut self, manager: &Manager, guest: usize, ms: u64) {
        self.pass(manager, ms / 2, Squeeze::One(guest));
        let end = Instant::now() + Duration::from_millis(ms - ms / 2);
        while Instant::now() < end && !self.is_over() {
            let (high, charged) = manager.host().ledger(|ledger| (ledger.budget().high, ledger.charged()));
            let phantom = (high + ByteCount(high.0 / 50)).saturating_sub(charged);
            self.phantom_bytes.store(phantom.0, Ordering::Relaxed);
            self.squeeze(manager, Squeeze::One(guest));
            std::thread::sleep(SQUEEZE_PERIOD);
            self.look(manager);
        }
        self.phantom_bytes.store(0, Ordering::Relaxed);
    }

    fn squeeze(&self, manager: &Manager, squeeze: Squeeze) {
        let pages = u32::try_from(self.plan.size.pages_floor().0).unwrap_or(u32::MAX);
        for (place, seat) in self.seats.iter().enumerate() {
            let is_meant = match squeeze {
                Squeeze::Nobody => false,
                Squeeze::One(guest) => place == guest,
                Squeeze::Others(guest) => place != guest,
                Squeeze::All => true,
            };
            if is_meant {
                manager.squeeze(seat.id, pages);
            }
        }
    }

    fn crash(&mut self, manager: Manager, step: Step, after: u64) -> Result<Manager, String> {
        self.saboteur.crash_at(step, after);
        let ordered = Instant::now();
        while !self.saboteur.has_struck() && ordered.elapsed() < CRASH_PATIENCE && !self.is_over() {
            // Every step of a page's life is reached by evicting it.
            self.squeeze(&manager, Squeeze::All);
            std::thread::sleep(SQUEEZE_PERIOD);
        }
        if self.saboteur.has_struck() {
            self.report.crashed(step);
        } else {
            self.report.crashes_not_struck += 1;
        }
        self.restart(manager)
    }

    fn restart(&mut self, manager: Manager) -> Result<Manager, String> {
        self.look_now(&manager);
        for view in manager.machines() {
            // A manager counts these from its own start.
            let (missing, ahead) = (view.stats.anomalies.missing, view.stats.ahead);
            self.retired.anomalies += missing;
            self.retired.brought_ahead += ahead.brought;
            self.retired.replayed += ahead.asked_replay;
            for seat in self.seats.iter_mut().filter(|seat| seat.id == view.id) {
                seat.missing += missing;
                (seat.counts.brought_ahead, seat.counts.replayed) = (0, 0);
            }
        }
        let host = Arc::clone(manager.host());
        let vault = manager.stop();
        self.take_incidents(&host);
        self.report.tidied(&host);
        let alive = self.seats.iter().filter(|seat| !self.killed.contains(&seat.id)).count();
        if vault.machines() < alive {
            self.fail(format!("{} machines were left by a manager of {alive}", vault.machines()));
        }
        self.report.takeovers += 1;
        self.take_over(vault)
    }

    fn take_over(&mut self, vault: Vault) -> Result<Manager, String> {
        let saboteur =
            Saboteur::new(hash3(self.plan.seed, 4, self.report.takeovers), Arc::clone(&self.delays));
        self.saboteur = Arc::new(saboteur);
        let probe = Arc::clone(&self.saboteur);
        let mut manager = Manager::start(vault, probe).map_err(|error| explain(&error))?;
        let meter =
            Pressure { accounting: self.accounting.clone(), phantom_bytes: Arc::clone(&self.phantom_bytes) };
        manager.set_housekeeping(HOUSEKEEPING);
        manager.govern(Box::new(meter), SAMPLE_PERIOD).map_err(|error| explain(&error))?;
        Ok(manager)
    }

    fn spawn(&mut self, manager: &mut Manager) -> Result<Seat, String> {
        let config = schedule::machine(self.plan.seed, self.started, self.plan.size, self.plan.accel);
        self.started += 1;
        let (mut guest, handover) = Guest::spawn(&config)?;
        self.accounting.add(guest.pid());
        let membership = Membership { group: GROUP, domain: DOMAIN, reservation: ByteCount(0) };
        let socket = handover.ok_or("a managed guest has no hand-over socket")?;
        match manager.admit(socket, guest.pidfd()?, membership) {
            Ok(id) => Ok(Seat { guest, id, reader: None, counts: Pages::default(), missing: 0 }),
            Err(error) => {
                let words = guest.last_words();
                let why = if words.is_empty() { explain(&error) } else { words };
                Err(format!("{} could not be started: {why}", config.name))
            }
        }
    }

    /// Kills the guest in a seat, as the kernel's out-of-memory killer would.
    fn kill(&mut self, place: usize) -> Result<(), String> {
        let seat = &mut self.seats[place];
        // Its process id stays taken until the seat is left, so the reader cannot meet another process.
        seat.reader.iter().for_each(Reader::stop);
        seat.guest.pidfd()?.send_signal(Signal::KILL).map_err(|error| explain(&error))?;
        self.killed.push(seat.id);
        self.report.guests_killed += 1;
        Ok(())
    }

    /// Waits until everything of a killed guest has been freed, and forgets it.
    fn bury(&mut self, manager: &mut Manager, place: usize) -> Result<(), String> {
        let (id, name) = (self.seats[place].id, self.seats[place].guest.name.clone());
        let killed = Instant::now();
        while !manager.is_gone(id) && killed.elapsed() < BURIAL_PATIENCE {
            std::thread::sleep(SQUEEZE_PERIOD);
        }
        if !manager.is_gone(id) {
            return Err(format!(
                "{name} was killed and is still managed {} s later",
                BURIAL_PATIENCE.as_secs()
            ));
        }
        self.retire(place);
        if manager.host().ledger(|ledger| ledger.usage(id)).is_ok() {
            self.fail(format!("{name} was killed and the ledger still charges it"));
        }
        // The last reference to its userfaultfd goes with this, which lets its reader go.
        manager.forget(id);
        if let Some(reader) = self.seats[place].reader.take() {
            self.retired.read_from_outside += reader.join();
        }
        Ok(())
    }

    /// Adds a guest that is ending to the counts of those that are gone.
    fn retire(&mut self, place: usize) {
        let seat = &self.seats[place];
        let summary = seat.guest.state().summary;
        self.retired_wrong_words += summary.wrong_words;
        self.retired.verified += summary.verified_pages;
        self.retired += seat.counts;
        for word in summary.wrong {
            let name = &self.seats[place].guest.name;
            let (gpa, expected, found) = (word.gpa, word.expected, word.found);
            self.fail(format!("{name}: wrong word at {gpa:#x}: expected {expected:#x}, found {found:#x}"));
        }
    }

    /// Looks, if it is time to.
    fn look(&mut self, manager: &Manager) {
        if self.looked.elapsed() >= LOOK_PERIOD {
            self.look_now(manager);
        }
    }

    fn look_now(&mut self, manager: &Manager) {
        self.looked = Instant::now();
        self.take_incidents(manager.host());
        for view in manager.machines() {
            let (census, size) = (view.stats.census.total(), view.size.pages_floor());
            // Nothing is known of a machine until its pager has published for the first time.
            if census.0 == 0 {
                continue;
            }
            if census != size {
                self.fail(format!("{}: the states of its pages add up to {census} of {size}", view.name));
            }
            let seat = self.seats.iter_mut().find(|seat| seat.id == view.id);
            seat.into_iter().for_each(|seat| seat.counts = counts(&view.stats));
            if view.stats.anomalies.lost > 0 {
                self.fail(format!("{}: {} pages are lost", view.name, view.stats.anomalies.lost));
            }
        }
        if let Err(error) = manager.host().ledger(|ledger| ledger.audit()) {
            self.fail(explain(&error));
        }
        for place in 0..self.seats.len() {
            let seat = &self.seats[place];
            if self.killed.contains(&seat.id) {
                continue;
            }
            let (state, name) = (seat.guest.state(), seat.guest.name.clone());
            if let Some(why) = state.died {
                self.fail(format!("{name} died: {why}"));
            } else if state.closed && !state.done {
                let words = self.seats[place].guest.last_words();
                self.fail(format!("{name} ended of its own accord: {words}"));
            }
            if state.summary.wrong_words > 0 {
                self.fail(format!("{name} read wrong words"));
            }
        }
        if self.printed.elapsed() >= PROGRESS_PERIOD {
            self.printed = Instant::now();
            let (pages, wrong_words) = self.so_far();
            println!("{}", self.report.progress(self.since.elapsed().as_secs(), pages, wrong_words));
        }
    }

    /// Counts of those that are gone and those that are here.
    fn so_far(&self) -> (Pages, u64) {
        let (mut pages, mut wrong_words) = (self.retired, self.retired_wrong_words);
        for seat in &self.seats {
            let summary = seat.guest.state().summary;
            pages.verified += summary.verified_pages;
            wrong_words += summary.wrong_words;
            pages += seat.counts;
        }
        (pages, wrong_words)
    }

    fn take_incidents(&mut self, host: &Host) {
        for incident in host.take_incidents() {
            let (machine, what) = match incident {
                Incident::Poisoned { machine, page, cause } => {
                    (machine, format!("{page} is poisoned: {cause}"))
                }
                Incident::Lost { machine, cause } => (machine, format!("no longer managed: {cause}")),
                Incident::StoreFull { machine } => (machine, "the store took no more pages".to_owned()),
                Incident::Disk { cause } | Incident::NoTier { cause } => {
                    self.fail(cause);
                    continue;
                }
                Incident::BadCodec { domain } => {
                    self.fail(format!("{domain}: zstd did not give back what it was given"));
                    continue;
                }
            };
            if self.killed.contains(&machine) {
                continue;
            }
            let name = self.seats.iter().find(|seat| seat.id == machine);
            let name = name.map_or(machine.to_string(), |seat| seat.guest.name.clone());
            self.fail(format!("{name}: {what}"));
        }
    }

    /// Has every guest read every page once more, and waits for them.
    fn check(&mut self, manager: &Manager) {
        self.calm(manager);
        let mode = if self.is_over() { StopMode::Now } else { StopMode::Finish };
        fleet::stop(self.seats.iter().map(|seat| &seat.guest), mode);
        let told = Instant::now();
        let has_ended = |guest: &Guest| {
            let state = guest.state();
            state.done || state.closed || state.died.is_some()
        };
        while !self.seats.iter().all(|seat| has_ended(&seat.guest)) {
            if told.elapsed() > CHECK_PATIENCE {
                self.fail(format!("the last check did not end within {} s", CHECK_PATIENCE.as_secs()));
                break;
            }
            if self.is_over() && mode == StopMode::Finish {
                fleet::stop(self.seats.iter().map(|seat| &seat.guest), StopMode::Now);
            }
            std::thread::sleep(LOOK_PERIOD);
            self.look_now(manager);
        }
    }

    /// A page may be missing only because its guest gave it back.
    fn explain_missing(&mut self, manager: &Manager, place: usize) {
        let seat = &self.seats[place];
        let given_back = seat.guest.state().summary.discarded_pages;
        let views = manager.machines();
        let view = views.iter().find(|view| view.id == seat.id);
        let newest = view.map_or(0, |view| view.stats.anomalies.missing);
        self.retired.anomalies += newest;
        let missing = seat.missing + newest;
        if missing > given_back {
            let name = seat.guest.name.clone();
            self.fail(format!("{name}: {missing} pages were missing and only {given_back} were given back"));
        }
    }

    /// Ends everything and looks whether anything is left.
    fn conclude(mut self, mut manager: Manager) -> Result<SoakReport, String> {
        let mut endings = Vec::new();
        for seat in &mut self.seats {
            endings.extend(seat.guest.reap(REAP_PATIENCE).err());
            if !seat.guest.state().done {
                endings.push(format!("{} ended without its last check", seat.guest.name));
            }
        }
        endings.into_iter().for_each(|ending| self.fail(ending));
        self.look_now(&manager);
        for place in 0..self.seats.len() {
            self.explain_missing(&manager, place);
            if let Err(why) = self.bury(&mut manager, place) {
                self.fail(why);
            }
        }
        if let Some(domain) = manager.domain(DOMAIN) {
            let stats = domain.store(|store| store.stats());
            if stats.pages.0 > 0 || stats.objects() > 0 {
                self.fail(format!(
                    "nobody is left and the store holds {} objects for {} pages",
                    stats.objects(),
                    stats.pages
                ));
            }
        }
        let usage = manager.host().ledger(|ledger| ledger.host_usage());
        for kind in [Kind::Resident, Kind::Limbo, Kind::Tables] {
            if usage.of(kind) != ByteCount(0) {
                self.fail(format!("nobody is left and {} are charged as {kind:?}", usage.of(kind)));
            }
        }
        let host = Arc::clone(manager.host());
        // Nobody is left, so nothing is left to hand on.
        drop(manager.stop());
        self.take_incidents(&host);
        self.report.tidied(&host);
        let Self { plan, accounting, seats, retired, retired_wrong_words, mut report, .. } = self;
        drop(seats);
        report.pages = retired;
        report.wrong_words = retired_wrong_words;
        let peak = accounting.peak();
        report.peak_bytes = peak.0;
        report.peak_source = accounting.source();
        if peak.0 > plan.budget.0 + plan.budget.0 / 100 * TOLERANCE_PERCENT {
            report
                .failures
                .push(format!("the hard line was crossed: peak {peak}, budget {} + 2 %", plan.budget));
        }
        report.failures.extend(accounting.finish().err());
        Ok(report)
    }
}

/// What is counted from a machine's first manager on.
fn counts(stats: &MachineStats) -> Pages {
    Pages {
        captured: stats.captured,
        brought_ahead: stats.ahead.brought,
        replayed: stats.ahead.asked_replay,
        taken_whole: stats.blocks.taken * u64::from(BLOCK_PAGES),
        refused: stats.refused,
        discarded: stats.discarded,
        ..Pages::default()
    }
}
