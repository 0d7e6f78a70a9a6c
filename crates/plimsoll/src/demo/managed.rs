//! The guests under plimsoll.
//!
//! Enters: a plan. Leaves: a report of what was seen, failures included. An error means that nothing could be started.
use super::Interrupt;
use super::fleet::{self, Guest};
use super::meter::Accounting;
use super::plan::Plan;
use super::report::{GuestReport, HostReport, Report, bytes_of, quantile_us, rate};
use super::sharing::Sharing;
use super::view::{GuestLine, GuestMemory, HostLine, View};
use plimsoll_core::ledger::{Budget, Kind};
use plimsoll_core::word::StateKind;
use plimsoll_linux::explain;
use plimsoll_linux::uffd::host::Incident;
use plimsoll_linux::uffd::manager::{MachineView, Manager, Membership, Vault};
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use plimsoll_vmm::control::{Command, StopMode};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a sampling period and the guests' own window last.
const SAMPLE_PERIOD: Duration = Duration::from_secs(2);
/// How often the view is drawn.
const VIEW_PERIOD: Duration = Duration::from_millis(250);
/// How long guests may take to read every page once more. A sequential refault of all of 2 GiB takes a fraction of it.
const CHECK_PATIENCE: Duration = Duration::from_secs(300);
/// How long an ended guest's process may take to go.
const REAP_PATIENCE: Duration = Duration::from_secs(15);
const GROUP: GroupId = GroupId(1);
const DOMAIN: DomainId = DomainId(1);

/// Runs the guests and checks them.
pub(super) fn run(
    plan: &Plan,
    run_by: String,
    sabotage: bool,
    interrupt: &Interrupt,
) -> Result<Report, String> {
    let accounting = Accounting::start()?;
    // The store can never hold more than all guests own.
    let mut manager =
        Manager::start(Vault::new(Budget::within(plan.budget), plan.asked()), Arc::new(NoProbe))
            .map_err(|error| explain(&error))?;
    let (guests, ids, sharing) = match begin(plan, &mut manager, &accounting, interrupt) {
        Ok(begun) => begun,
        Err(why) => {
            // The guests have ended. The manager's threads hold the accounting, and its control group goes with the last of them.
            drop(manager.stop());
            // Whatever else goes wrong now, that is why.
            let _ = accounting.finish();
            return Err(why);
        }
    };
    let mut session =
        Session { plan, manager, guests, ids, accounting, sharing, failures: Vec::new(), poisoned: 0 };
    let seen = session.work(sabotage, interrupt);
    session.check(interrupt);
    Ok(session.finish(run_by, seen))
}

/// What runs.
type Begun = (Vec<Guest>, Vec<MachineId>, Option<Sharing>);

/// Starts the guests.
fn begin(
    plan: &Plan,
    manager: &mut Manager,
    accounting: &Accounting,
    interrupt: &Interrupt,
) -> Result<Begun, String> {
    let mut guests = Vec::new();
    let mut ids = Vec::new();
    manager.govern(accounting.meter(), SAMPLE_PERIOD).map_err(|error| explain(&error))?;
    for config in &plan.guests {
        let (mut guest, handover) = Guest::spawn(config)?;
        accounting.add(guest.pid());
        let membership = Membership { group: GROUP, domain: DOMAIN, reservation: ByteCount(0) };
        let socket = handover.ok_or("a managed guest has no hand-over socket")?;
        match manager.admit(socket, guest.pidfd()?, membership) {
            Ok(id) => ids.push(id),
            Err(error) => {
                let words = guest.last_words();
                let why = if words.is_empty() { explain(&error) } else { words };
                return Err(format!("{} could not be started: {why}", config.name));
            }
        }
        guests.push(guest);
    }
    let sharing = if plan.share { Some(Sharing::start(&mut guests, &ids, DOMAIN, interrupt)?) } else { None };
    Ok((guests, ids, sharing))
}

/// What the guests and the host looked like at the end of the work, before the last check brings every page back.
struct Seen {
    machines: Vec<MachineView>,
    host: HostReport,
    operations: Vec<(u64, u64)>,
    /// Since the first guest was started.
    elapsed: Duration,
}

struct Session<'a> {
    plan: &'a Plan,
    manager: Manager,
    guests: Vec<Guest>,
    ids: Vec<MachineId>,
    accounting: Accounting,
    sharing: Option<Sharing>,
    failures: Vec<String>,
    poisoned: u64,
}

impl Session<'_> {
    fn work(&mut self, sabotage: bool, interrupt: &Interrupt) -> Seen {
        let started = Instant::now();
        let mut view = View::new(self.guests.len());
        let mut window = 1;
        let mut damaged = !sabotage;
        while started.elapsed() < Duration::from_secs(self.plan.seconds)
            && !interrupt.is_set()
            && !self.is_over()
        {
            std::thread::sleep(VIEW_PERIOD);
            let due = started.elapsed().as_millis() / SAMPLE_PERIOD.as_millis() + 1;
            if due > window {
                window = due;
                let number = u64::try_from(window).unwrap_or(u64::MAX);
                self.guests.iter().for_each(|guest| guest.tell(&Command::Window { number }));
            }
            if !damaged && started.elapsed() > Duration::from_secs(self.plan.seconds / 2) {
                damaged = true;
                self.ids.iter().for_each(|id| self.manager.sabotage(*id));
            }
            if let Some(sharing) = &mut self.sharing {
                sharing.turn();
            }
            self.draw(&mut view, "working");
            self.take_incidents();
        }
        let mut seen = self.look(started.elapsed());
        match self.sharing.take().map(Sharing::end).transpose() {
            Ok(sharing) => seen.host.sharing = sharing,
            Err(why) => self.failures.push(why),
        }
        view.finish();
        seen
    }

    /// Has every guest read every page once more, and waits for them.
    fn check(&mut self, interrupt: &Interrupt) {
        let mode = if interrupt.is_set() { StopMode::Now } else { StopMode::Finish };
        fleet::stop(&self.guests, mode);
        let started = Instant::now();
        let mut view = View::new(self.guests.len());
        let ended = |guest: &Guest| {
            let state = guest.state();
            state.done || state.closed || state.died.is_some()
        };
        while !self.guests.iter().all(ended) {
            if started.elapsed() > CHECK_PATIENCE {
                self.failures
                    .push(format!("the last check did not end within {} s", CHECK_PATIENCE.as_secs()));
                break;
            }
            if interrupt.is_set() && mode == StopMode::Finish {
                fleet::stop(&self.guests, StopMode::Now);
            }
            std::thread::sleep(VIEW_PERIOD);
            self.draw(&mut view, "checking");
            self.take_incidents();
        }
        view.finish();
    }

    fn is_over(&self) -> bool {
        self.guests.iter().all(|guest| guest.state().closed)
    }

    fn draw(&self, view: &mut View, phase: &str) {
        let machines = self.manager.machines();
        let line = |(guest, machine): (&Guest, &MachineView)| GuestLine {
            name: guest.name.clone(),
            size: guest.size,
            memory: Some(GuestMemory {
                resident: machine.stats.census.in_ram().bytes(),
                limbo: machine.stats.limbo.bytes(),
                stored: machine.stats.census.of(StateKind::Stored).bytes(),
            }),
            state: guest.state(),
        };
        let guests: Vec<GuestLine> = self.guests.iter().zip(&machines).map(line).collect();
        let used = self.accounting.used();
        view.show(&HostLine { phase: phase.to_owned(), used, budget: self.plan.budget }, &guests);
    }

    fn take_incidents(&mut self) {
        for incident in self.manager.host().take_incidents() {
            let name = |id: MachineId| {
                let place = self.ids.iter().position(|known| *known == id);
                place.map_or(id.to_string(), |place| self.guests[place].name.clone())
            };
            match incident {
                Incident::Poisoned { machine, page, cause } => {
                    self.poisoned += 1;
                    self.failures.push(format!("{}: {page} is poisoned: {cause}", name(machine)));
                }
                Incident::Lost { machine, cause } => {
                    self.failures.push(format!("{}: no longer managed: {cause}", name(machine)));
                }
                Incident::Disk { cause } | Incident::NoTier { cause } => self.failures.push(cause),
                Incident::BadCodec { domain } => {
                    self.failures.push(format!("{domain}: zstd did not give back what it was given"));
                }
                Incident::StoreFull { machine } => {
                    let text = format!("{}: the store took no more pages", name(machine));
                    if !self.failures.contains(&text) {
                        self.failures.push(text);
                    }
                }
            }
        }
    }

    fn look(&self, elapsed: Duration) -> Seen {
        let machines = self.manager.machines();
        let mut host = self.manager.host().ledger(|ledger| {
            let usage = ledger.host_usage();
            HostReport {
                resident_bytes: usage.of(Kind::Resident).0,
                limbo_bytes: usage.of(Kind::Limbo).0,
                store_bytes: usage.of(Kind::Store).0,
                tables_bytes: usage.of(Kind::Tables).0,
                overhead_bytes: ledger.overhead().0,
                ..HostReport::default()
            }
        });
        if let Some(domain) = self.manager.domain(DOMAIN) {
            host.savings(&machines, &domain.store(|store| store.stats()));
        }
        let tidied = self.manager.host().tidied(|tidied| *tidied);
        host.blocks_collapsed = tidied.collapsed;
        host.housekeeping_cpu_seconds = tidied.cpu.as_secs_f64();
        let operations = self.guests.iter().map(Guest::state);
        let operations =
            operations.map(|state| (state.summary.operations, state.summary.running_ns)).collect();
        Seen { machines, host, operations, elapsed }
    }

    fn finish(mut self, run_by: String, seen: Seen) -> Report {
        let peak = self.accounting.peak();
        let stats = self.manager.machines();
        for guest in &mut self.guests {
            if let Err(error) = guest.reap(REAP_PATIENCE) {
                self.failures.push(error);
            }
        }
        self.take_incidents();
        let Self { plan, manager, guests, accounting, mut failures, poisoned, .. } = self;
        let mut reports = Vec::new();
        for (place, guest) in guests.iter().enumerate() {
            let state = guest.state();
            if let Some(why) = &state.died {
                failures.push(format!("{} died: {why}", guest.name));
            } else if !state.done {
                failures.push(format!("{} ended without its last check", guest.name));
            }
            for word in &state.summary.wrong {
                let (gpa, expected, found) = (word.gpa, word.expected, word.found);
                failures.push(format!(
                    "{}: wrong word at {gpa:#x}: expected {expected:#x}, found {found:#x}",
                    guest.name
                ));
            }
            let (operations, running_ns) = seen.operations[place];
            let vcpu_time = seen.elapsed * plan.guests[place].vcpus;
            let work = Work { operations, running_ns, vcpu_time };
            reports.push(guest_report(guest, &seen.machines[place], &stats[place], work));
        }
        drop(guests);
        // The machines have ended: nothing of them is left to give to another manager.
        drop(manager.stop());
        let wrong_words: u64 = reports.iter().map(|guest| guest.wrong_words).sum();
        let peak_source = accounting.source();
        if let Err(error) = accounting.finish() {
            failures.push(error);
        }
        let mut report = Report {
            version: 1,
            guests_are: "user-mode programs without a kernel".to_owned(),
            run_by,
            seed: plan.seed,
            mix: plan.mix.to_string(),
            seconds: plan.seconds,
            asked_bytes: plan.asked().0,
            budget_bytes: plan.budget.0,
            peak_bytes: peak.0,
            peak_source,
            wrong_words,
            poisoned_pages: poisoned,
            host: seen.host,
            guests: reports,
            modes: Vec::new(),
            without: None,
            no_comparison: None,
            failures,
        };
        if peak > report.line() {
            report
                .failures
                .push(format!("the hard line was crossed: peak {peak}, budget {} + 2 %", plan.budget));
        }
        if wrong_words > 0 {
            report.failures.push(format!("{wrong_words} wrong words"));
        }
        report
    }
}

/// What a guest had done when its last check began.
struct Work {
    operations: u64,
    /// How long its workload ran, population not counted.
    running_ns: u64,
    /// The time its vCPUs had since they were started.
    vcpu_time: Duration,
}

fn guest_report(guest: &Guest, seen: &MachineView, last: &MachineView, work: Work) -> GuestReport {
    let state = guest.state();
    let stats = &seen.stats;
    let faults = stats.faults;
    let us = |permille| stats.fault_times.permille(permille).as_nanos() as f64 / 1000.0;
    // The newest complete window before the last check, in which every page is touched.
    let window = state.windows.iter().rev().nth(1).or(state.windows.last());
    let buckets = &state.summary.latency.buckets;
    GuestReport {
        name: guest.name.clone(),
        size_bytes: guest.size.0,
        resident_bytes: bytes_of(stats.census.in_ram()),
        limbo_bytes: bytes_of(stats.limbo),
        stored_bytes: bytes_of(stats.census.of(StateKind::Stored)),
        true_working_set_bytes: window.map(|pages| pages * plimsoll_types::PAGE_SIZE as u64),
        estimated_working_set_bytes: stats.working_set.map(bytes_of),
        operations: work.operations,
        operations_per_second: rate(work.operations, work.running_ns),
        operation_p50_us: quantile_us(buckets, 0.5),
        operation_p99_us: quantile_us(buckets, 0.99),
        faults: faults.zero + faults.limbo + faults.stored + faults.present,
        fault_p50_us: us(500),
        fault_p99_us: us(990),
        stall_share: stats.waited.as_secs_f64() / work.vcpu_time.as_secs_f64().max(f64::MIN_POSITIVE),
        captured_pages: last.stats.captured,
        refused_pages: last.stats.refused,
        exits_per_million: None,
        anomalies: last.stats.anomalies.missing + last.stats.anomalies.lost,
        wrong_words: state.summary.wrong_words,
        died: state.died,
    }
}
