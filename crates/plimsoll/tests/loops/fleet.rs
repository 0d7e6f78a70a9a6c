//! Guests of our own under one manager and one control loop, in a memory cgroup of their own.
use parking_lot::Mutex;
use plimsoll_core::ledger::Budget;
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_host::backend::Managed;
use plimsoll_host::control::{Control, PERIOD, Pool, Turn};
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_linux::uffd::manager::{Manager, Membership, Meter, Vault};
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_policy::Reason;
use plimsoll_policy::settings::{Face, MachineSettings, Settings};
use plimsoll_sys::ProcessId;
use plimsoll_sys::fdpass::seqpacket_pair;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process::make_inheritable;
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use plimsoll_vmm::config::{AccelChoice, VmmConfig, Workload};
use plimsoll_vmm::control::{Command, Event, StopMode};
use plimsoll_vmm::report::Summary;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) const MIB: fn(u64) -> ByteCount = ByteCount::mib;
/// Longer than anything here takes, on a busy machine too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// A sampling period of the manager's.
const SAMPLED: Duration = Duration::from_secs(2);

/// What a guest has said last.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    pub(crate) summary: Summary,
    pub(crate) died: Option<String>,
    pub(crate) done: bool,
}

pub(crate) struct Guest {
    pub(crate) name: String,
    control: UnixStream,
    said: Arc<Mutex<Said>>,
    reader: Option<JoinHandle<()>>,
    child: Child,
}

impl Guest {
    pub(crate) fn said(&self) -> Said {
        self.said.lock().clone()
    }

    fn tell(&self, command: &Command) {
        let line = serde_json::to_string(command).unwrap();
        (&self.control).write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Has it read every page once more and end.
    pub(crate) fn finish(&mut self) {
        self.tell(&Command::Stop { mode: StopMode::Finish });
        until(&format!("{} to end", self.name), || self.said().done.then_some(()));
        assert!(self.child.wait().unwrap().success(), "{}", self.name);
        let Said { summary, died, .. } = self.said();
        assert_eq!((died, summary.wrong_words), (None, 0), "{}", self.name);
    }

    /// Ends it at once, as a crash does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.reader.take().map(JoinHandle::join);
    }
}

/// Waits until `condition` gives something; `what` is what never came otherwise.
pub(crate) fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited {} s in vain: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Counts all guests and this process.
#[derive(Clone)]
struct Count(Arc<MemoryCgroup>);

impl Meter for Count {
    fn used(&mut self) -> ByteCount {
        self.0.used().unwrap()
    }
}

/// A host of its own.
pub(crate) struct Fleet {
    pub(crate) control: Control,
    pub(crate) guests: Vec<Guest>,
    pub(crate) ids: Vec<MachineId>,
    manager: Arc<Mutex<Manager>>,
    cgroup: Arc<MemoryCgroup>,
}

/// A guest of `mib` that does what `spec` says and checks every page when it is told to finish.
pub(crate) fn guest(name: &str, mib: u64, spec: WorkloadSpec) -> VmmConfig {
    let seed = name.bytes().fold(1, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
    let spec = WorkloadSpec { final_check: 1, seed, ..spec };
    let mix = Mix { zero: 25, duplicate: 20, text: 45, random: 10 };
    let workload = Workload { spec, mix, seed, pool_seed: 8, pool_pages: 64 };
    VmmConfig { accel: AccelChoice::Kvm, report_ms: 50, ..VmmConfig::new(name, mib << 20, workload) }
}

impl Fleet {
    /// A host with `budget` for guests, their VMMs, and this process.
    pub(crate) fn new(budget: ByteCount) -> Self {
        let cgroup = MemoryCgroup::create("plimsoll-test-loop", ProcessId::own()).unwrap();
        cgroup.join_self().unwrap();
        let cgroup = Arc::new(cgroup);
        let vault = Vault::new(Budget::within(budget), MIB(4096));
        let mut manager = Manager::start(vault, Arc::new(NoProbe)).unwrap();
        let count = Count(Arc::clone(&cgroup));
        manager.govern(Box::new(count.clone()), SAMPLED).unwrap();
        let pool = Pool::metered(budget, Box::new(count));
        let control = Control::new(Settings::new(budget), pool, MIB(8), Instant::now()).unwrap();
        let manager = Arc::new(Mutex::new(manager));
        Self { control, guests: Vec::new(), ids: Vec::new(), manager, cgroup }
    }

    /// Starts a guest, and has it managed on these terms.
    pub(crate) fn start(&mut self, config: &VmmConfig, face: Face) -> MachineId {
        let (control, theirs) = UnixStream::pair().unwrap();
        let (socket, handover) = seqpacket_pair().unwrap();
        make_inheritable(&theirs).unwrap();
        make_inheritable(&handover).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command.args(["vmm", "--control-fd", &theirs.as_raw_fd().to_string()]);
        command.args(["--handover-fd", &handover.as_raw_fd().to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let text = serde_json::to_vec(config).unwrap();
        child.stdin.take().unwrap().write_all(&text).unwrap();
        let said = Arc::new(Mutex::new(Said::default()));
        let (events, kept) = (control.try_clone().unwrap(), Arc::clone(&said));
        let reader = std::thread::spawn(move || collect(events, &kept));
        let process = ProcessId::new(child.id()).unwrap();
        let pidfd = Pidfd::from_child(&mut child).unwrap();
        let reservation = match face {
            Face::Guarantee { reservation, .. } => reservation,
            Face::Dynamic { minimum, .. } => minimum,
            Face::Static { size } | Face::Dedicated { size } => size,
        };
        let membership = Membership { group: GroupId(1), domain: DomainId(1), reservation };
        let id = self.manager.lock().admit(socket, pidfd, membership).unwrap();
        let now = Instant::now();
        let backend = Managed::new(Arc::clone(&self.manager), id, config.vcpus, now).in_process(process);
        let settings = MachineSettings::new(MachineId(0), face);
        let id = self.control.admit(&config.name, settings, Box::new(backend)).unwrap();
        let (name, reader) = (config.name.clone(), Some(reader));
        self.guests.push(Guest { name, control, said, reader, child });
        self.ids.push(id);
        id
    }

    /// Lets the loop turn for so long, as `run` does.
    pub(crate) fn turns(&mut self, lasting: Duration) -> Vec<Turn> {
        let (began, mut turns) = (Instant::now(), Vec::new());
        while began.elapsed() < lasting {
            let now = Instant::now();
            if now >= self.control.due() || self.control.hurry().is_some() {
                turns.push(self.control.turn(now));
            }
            std::thread::sleep(PERIOD / 20);
        }
        turns
    }

    /// Waits, while the loop turns, until all guests work.
    pub(crate) fn populate(&mut self) {
        let began = Instant::now();
        while !self.guests.iter().all(|guest| guest.said().summary.phase == "running") {
            let said: Vec<Said> = self.guests.iter().map(Guest::said).collect();
            assert!(began.elapsed() < PATIENCE, "guests that do not come to work: {said:?}");
            self.turns(PERIOD / 5);
        }
    }

    pub(crate) fn used(&self) -> ByteCount {
        self.cgroup.used().unwrap()
    }

    pub(crate) fn peak(&self) -> ByteCount {
        self.cgroup.peak().unwrap()
    }

    /// Ends all guests, each after its last check.
    pub(crate) fn finish(mut self) {
        for guest in &mut self.guests {
            guest.finish();
        }
        self.end();
    }

    /// Ends without a word.
    pub(crate) fn end(self) {
        let Self { control, guests, manager, cgroup, .. } = self;
        drop(guests);
        control.finish().unwrap();
        drop(Arc::into_inner(manager).unwrap().into_inner().stop());
        Arc::into_inner(cgroup).unwrap().remove().unwrap();
    }
}

fn collect(events: UnixStream, said: &Mutex<Said>) {
    for line in BufReader::new(events).lines() {
        let Ok(line) = line else { break };
        let mut said = said.lock();
        match serde_json::from_str(&line).unwrap() {
            Event::Report(summary) => said.summary = summary,
            Event::Done(summary) => (said.summary, said.done) = (summary, true),
            Event::Died { reason, .. } => said.died = Some(reason),
            Event::Error { message } => said.died = Some(message),
            _ => {}
        }
    }
}

/// Turns in which a machine has less than it is guaranteed, although it uses more.
pub(crate) fn violations(turns: &[Turn], id: MachineId, guaranteed: ByteCount) -> usize {
    let of = |turn: &Turn| {
        let seen = turn.plan.machines.iter().find(|machine| machine.machine == id)?;
        Some(seen.consumed < guaranteed.min(seen.active))
    };
    turns.iter().filter(|turn| of(turn) == Some(true)).count()
}

/// Times a target moved back by more than 5 % within a minute of having moved the other way.
pub(crate) fn swings(turns: &[Turn], id: MachineId) -> usize {
    let moves: Vec<(u64, i128)> = turns
        .iter()
        .flat_map(|turn| turn.plan.actions.iter().map(|action| (turn.view.now_ms, action)))
        .filter(|(_, action)| action.machine == id)
        .filter_map(|(at, action)| match action.reason {
            Reason::TargetMoved { from, to, .. } => Some((at, i128::from(to.0) - i128::from(from.0), from)),
            _ => None,
        })
        .filter(|(_, change, from)| change.abs() * 20 > i128::from(from.0))
        .map(|(at, change, _)| (at, change))
        .collect();
    moves
        .windows(2)
        .filter(|pair| pair[0].1.signum() != pair[1].1.signum() && pair[1].0 - pair[0].0 < 60_000)
        .count()
}
