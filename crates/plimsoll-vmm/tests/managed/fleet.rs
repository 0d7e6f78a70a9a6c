//! Machines in processes of their own, and the shipped manager that has them.
//!
//! Enters: configurations, a budget, a probe. Leaves: what guests and manager say, asked for with a limit on how long it
//! may take. A fleet that is dropped, by a test that failed too, ends its processes and its threads.
use plimsoll_core::ledger::{Budget, LedgerError};
use plimsoll_core::word::StateKind;
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_linux::disk::tier::Tier;
use plimsoll_linux::uffd::host::Incident;
use plimsoll_linux::uffd::manager::{AdmitError, MachineView, Manager, Membership, Vault};
use plimsoll_linux::uffd::probe::{NoProbe, Probe};
use plimsoll_sys::ProcessId;
use plimsoll_sys::fdpass::seqpacket_pair;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process::{adopt_inherited, make_inheritable};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use plimsoll_vmm::config::{AccelChoice, VmmConfig, Workload};
use plimsoll_vmm::control::{Command, Event, Ram, StopMode};
use plimsoll_vmm::report::Summary;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ExitCode, ExitStatus};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The first argument of a process that is to be a machine.
pub(crate) const ROLE: &str = "be-a-machine";
/// Longer than anything here takes, on a busy machine too: what is not there by then never comes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// How often a condition is looked at.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(5);
pub(crate) const GROUP: GroupId = GroupId(1);
pub(crate) const DOMAIN: DomainId = DomainId(1);
pub(crate) const MEMBERSHIP: Membership =
    Membership { group: GROUP, domain: DOMAIN, reservation: ByteCount(0) };
/// So much that nobody is ever short.
pub(crate) const PLENTY: ByteCount = ByteCount::mib(4096);

/// Waits until `condition` gives something; `what` is what never came otherwise.
pub(crate) fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited {} s in vain: {what}", PATIENCE.as_secs());
        std::thread::sleep(LOOK_EVERY);
    }
}

/// An error with its causes, on one line.
pub(crate) fn explain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What the descriptors of this process refer to, without the numbers that tell two sockets apart.
pub(crate) fn descriptors() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    // The directory itself is closed again by the time it is looked at.
    let targets = entries.filter_map(|path| std::fs::read_link(path).ok());
    let kind = |target: &Path| {
        target.to_string_lossy().trim_end_matches(|end: char| end.is_ascii_digit() || end == ']').to_owned()
    };
    let mut kinds: Vec<String> = targets.map(|target| kind(&target)).collect();
    kinds.sort();
    kinds
}

/// Mappings of page words in this process: one for each machine that has not been forgotten.
pub(crate) fn word_mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("plimsoll-words")).count()
}

/// Some of everything.
pub(crate) const MIXED: Mix = Mix { zero: 10, duplicate: 20, text: 40, random: 30 };

/// A machine of `mib` MiB under KVM that does what `spec` says and checks every page when it is told to finish.
pub(crate) fn machine(name: &str, mib: u64, spec: WorkloadSpec) -> VmmConfig {
    let seed = name.bytes().fold(1, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let spec = WorkloadSpec { final_check: 1, seed, ..spec };
    let workload = Workload { spec, mix: MIXED, seed, pool_seed: 8, pool_pages: 64 };
    VmmConfig { accel: AccelChoice::Kvm, report_ms: 20, ..VmmConfig::new(name, mib << 20, workload) }
}

/// Gets and puts over everything, as fast as they go.
pub(crate) fn zipf() -> WorkloadSpec {
    WorkloadSpec::new(WorkloadKind::Zipf)
}

/// Page after page over everything, as fast as they go.
pub(crate) fn sweep() -> WorkloadSpec {
    WorkloadSpec::new(WorkloadKind::Sweep)
}

/// Becomes a machine. Its control socket is the standard input.
pub(crate) fn child(config: &str, handover: i32) -> ExitCode {
    let config: VmmConfig = serde_json::from_str(config).unwrap();
    let control = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    match plimsoll_vmm::run(&config, Some(adopt_inherited(handover).unwrap().into()), control) {
        // Threads still wait in the kernel for pages; only the end of the process frees them.
        Ok(report) if report.abandoned > 0 => std::process::exit(3),
        Ok(report) if report.died.is_none() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{}: {}", config.name, explain(&error));
            ExitCode::from(2)
        }
    }
}

/// Starts this program again in a role. Returns it, the other end of its standard input and of its hand-over socket.
pub(crate) fn start(role: &str, argument: &str) -> (Child, UnixStream, OwnedFd) {
    let (control, theirs) = UnixStream::pair().unwrap();
    let (socket, handover) = seqpacket_pair().unwrap();
    make_inheritable(&handover).unwrap();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args([role, argument, &handover.as_raw_fd().to_string()]);
    let child = command.stdin(OwnedFd::from(theirs)).spawn().unwrap();
    (child, control, socket)
}

/// What a guest has said.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    pub(crate) summary: Summary,
    pub(crate) died: Option<String>,
    pub(crate) done: bool,
    /// Where its memory is in its process.
    pub(crate) ram: Vec<Ram>,
    /// Ranges that were offered to KSM or withdrawn from it.
    pub(crate) merging: usize,
    /// Commands to a probing guest that were answered, settled targets of its balloon, and orders about its frames.
    pub(crate) probed: usize,
    pub(crate) ballooned: Vec<u64>,
    pub(crate) ordered: Vec<u64>,
    /// Whether the machine was told that it has no manager any more.
    pub(crate) manager_lost: bool,
    /// Whether it was told that it is its own again.
    pub(crate) is_given_back: bool,
}

/// A machine and its process.
pub(crate) struct Guest {
    pub(crate) id: MachineId,
    pub(crate) name: String,
    control: UnixStream,
    state: Arc<Mutex<State>>,
    reader: Option<JoinHandle<()>>,
    child: Child,
}

impl Guest {
    pub(crate) fn state(&self) -> State {
        self.state.lock().unwrap().clone()
    }

    pub(crate) fn operations(&self) -> u64 {
        self.state().summary.operations
    }

    /// Waits until its workload, population over, has begun.
    pub(crate) fn until_running(&self) {
        until(&format!("{} to run", self.name), || {
            let state = self.state();
            assert_eq!(state.died, None, "{}", self.name);
            (state.summary.phase == "running" && state.summary.operations > 0).then_some(())
        });
    }

    /// Waits until it has done some more.
    pub(crate) fn goes_on(&self) {
        let before = self.operations();
        until(&format!("{} to go on", self.name), || (self.operations() > before + 20).then_some(()));
    }

    pub(crate) fn tell(&self, mode: StopMode) {
        self.command(&Command::Stop { mode });
    }

    /// Its process.
    pub(crate) fn process(&self) -> ProcessId {
        ProcessId::new(self.child.id()).unwrap()
    }

    pub(crate) fn command(&self, command: &Command) {
        let line = serde_json::to_string(command).unwrap();
        (&self.control).write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Ends the process at once.
    pub(crate) fn kill(&mut self) -> ExitStatus {
        self.child.kill().unwrap();
        self.child.wait().unwrap()
    }

    /// Has it read every page once more and end, and insists that nothing was wrong in all its life.
    pub(crate) fn finish(&mut self) {
        self.tell(StopMode::Finish);
        self.finished();
    }

    /// The second half of [`finish`](Self::finish), for guests that were all told first.
    pub(crate) fn finished(&mut self) {
        let state = until(&format!("{} to check every page", self.name), || {
            Some(self.state()).filter(|state| state.done || state.died.is_some())
        });
        let (name, summary) = (&self.name, &state.summary);
        assert_eq!(state.died, None, "{name}");
        assert_eq!(summary.wrong_words, 0, "{name}: {:x?}", summary.wrong);
        assert_eq!(
            (summary.phase.as_str(), summary.checked_pages),
            ("done", summary.footprint_pages),
            "{name}"
        );
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{name}: {status}");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn collect(events: UnixStream, state: &Mutex<State>) {
    for line in BufReader::new(events).lines() {
        let Ok(line) = line else { break };
        let event = serde_json::from_str(&line).unwrap();
        let mut state = state.lock().unwrap();
        match event {
            Event::Report(summary) => state.summary = summary,
            Event::Done(summary) => {
                state.summary = summary;
                state.done = true;
            }
            Event::Died { reason, .. } => state.died = Some(reason),
            Event::ManagerLost => state.manager_lost = true,
            Event::GivenBack => state.is_given_back = true,
            Event::Error { message } => state.died = Some(message),
            Event::Started { ram, .. } => state.ram = ram,
            Event::Merging { refused, .. } => {
                state.merging += 1;
                state.died = state.died.take().or(refused);
            }
            Event::Probed(_) => state.probed += 1,
            Event::Ballooned { ballooned_bytes, .. } => state.ballooned.push(ballooned_bytes),
            Event::Frames { done_bytes, refused, .. } => {
                state.ordered.push(done_bytes);
                state.died = state.died.take().or(refused);
            }
            Event::Prefault { .. } | Event::Registers { .. } | Event::Held | Event::Released => {}
        }
    }
}

/// A manager and what it is asked most.
pub(crate) struct Fleet {
    manager: Option<Manager>,
}

impl Fleet {
    pub(crate) fn new(budget: ByteCount, probe: Arc<dyn Probe>) -> Self {
        let vault = Vault::new(Budget::of(budget), PLENTY);
        Self { manager: Some(Manager::start(vault, probe).unwrap()) }
    }

    /// One with plenty of memory, and a disk tier.
    pub(crate) fn on_disk(tier: Tier) -> Self {
        let mut vault = Vault::new(Budget::of(PLENTY), PLENTY);
        vault.set_tier(tier).unwrap();
        Self { manager: Some(Manager::start(vault, Arc::new(NoProbe)).unwrap()) }
    }

    pub(crate) fn manager(&mut self) -> &mut Manager {
        self.manager.as_mut().unwrap()
    }

    pub(crate) fn see(&self) -> &Manager {
        self.manager.as_ref().unwrap()
    }

    /// Has the next manager take over.
    pub(crate) fn replace(&mut self, probe: Arc<dyn Probe>) {
        let vault = self.manager.take().unwrap().stop();
        self.manager = Some(Manager::start(vault, probe).unwrap());
    }

    /// Has the next manager take over after something has happened that no manager saw.
    pub(crate) fn replace_after(&mut self, happens: impl FnOnce()) {
        let vault = self.manager.take().unwrap().stop();
        happens();
        self.manager = Some(Manager::start(vault, Arc::new(NoProbe)).unwrap());
    }

    /// Admits whatever a process hands over.
    pub(crate) fn admit(&mut self, socket: OwnedFd, child: &mut Child) -> Result<MachineId, AdmitError> {
        let pidfd = Pidfd::from_child(child).unwrap();
        self.manager().admit(socket, pidfd, MEMBERSHIP)
    }

    /// Starts a machine and manages it.
    pub(crate) fn add(&mut self, config: &VmmConfig) -> Guest {
        let (mut child, control, socket) = start(ROLE, &serde_json::to_string(config).unwrap());
        let admitted = self.admit(socket, &mut child);
        let id = match admitted {
            Ok(id) => id,
            Err(error) => {
                let _ = child.kill();
                panic!("{}: {}; {:?}", config.name, explain(&error), child.wait())
            }
        };
        let state: Arc<Mutex<State>> = Arc::default();
        let (events, kept) = (control.try_clone().unwrap(), Arc::clone(&state));
        let reader = std::thread::spawn(move || collect(events, &kept));
        Guest { id, name: config.name.clone(), control, state, reader: Some(reader), child }
    }

    pub(crate) fn view(&self, id: MachineId) -> MachineView {
        self.see().machines().into_iter().find(|view| view.id == id).unwrap()
    }

    /// Pages the machine has in the store, as last published.
    pub(crate) fn stored(&self, id: MachineId) -> u64 {
        self.view(id).stats.census.of(StateKind::Stored).0
    }

    /// Has every page of the machine taken once, or as many as are there.
    pub(crate) fn squeeze(&self, id: MachineId) {
        let pages = self.view(id).size.pages_floor().0;
        self.see().squeeze(id, u32::try_from(pages).unwrap());
    }

    /// Takes pages from the machine, all of them twice a second, until `condition` holds.
    pub(crate) fn squeeze_until(&self, id: MachineId, what: &str, mut condition: impl FnMut() -> bool) {
        let mut squeezed: Option<Instant> = None;
        until(what, || {
            if squeezed.is_none_or(|last| last.elapsed() > Duration::from_millis(500)) {
                self.squeeze(id);
                squeezed = Some(Instant::now());
            }
            condition().then_some(())
        });
        self.see().squeeze(id, 0);
    }

    /// Waits until the ended machine is gone, and insists that nothing is charged to it and that all sums are right.
    pub(crate) fn until_gone(&self, id: MachineId) {
        until(&format!("{id} to be gone"), || self.see().is_gone(id).then_some(()));
        self.see().host().ledger(|ledger| {
            assert_eq!(ledger.usage(id), Err(LedgerError::NoSuchMachine { machine: id }));
            ledger.audit().unwrap();
        });
    }

    /// Pages that handles of the store's name.
    pub(crate) fn store_pages(&self) -> u64 {
        self.see().domain(DOMAIN).map_or(0, |domain| domain.store(|store| store.stats().pages.0))
    }

    pub(crate) fn incidents(&self) -> Vec<Incident> {
        self.see().host().take_incidents()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if let Some(manager) = self.manager.take() {
            // The machines of a test that failed end with it: nobody needs what is in the vault.
            drop(manager.stop());
        }
    }
}
