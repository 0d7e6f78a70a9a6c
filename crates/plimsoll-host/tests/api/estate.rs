//! A host made of numbers behind a real loop and a real socket.
use super::slow::Gate;
use parking_lot::Mutex;
use plimsoll_host::api::client::{Answer, Client};
use plimsoll_host::api::exchange::{Bell, exchange};
use plimsoll_host::api::{Access, Api, Attach, Code, Fault, Gate as Admission, Opener};
use plimsoll_host::backend::balloon::{Balloon, Farewell};
use plimsoll_host::backend::{Backend, Done, Trouble};
use plimsoll_host::config::{Config, MachineConfig};
use plimsoll_host::control::{Control, Pool};
use plimsoll_host::helm::Helm;
use plimsoll_host::helm::kept::Kept;
use plimsoll_host::roster::Opened;
use plimsoll_policy::settings::{Face, MachineSettings, Shares};
use plimsoll_policy::view::{MachineView, Reading};
use plimsoll_policy::{Rung, Rungs, Step};
use plimsoll_sys::ProcessId;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) const MIB: u64 = 1 << 20;
/// How long anything may take that another thread does: much where nothing else runs, enough where much does.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
/// What each machine owns, and what it takes up when it comes.
pub(crate) const SIZE: u64 = 64 * MIB;
const TAKES: u64 = 48 * MIB;
const USES: i64 = 16 << 20;

/// What a machine has, seen from both sides.
#[derive(Default)]
pub(crate) struct Body {
    pub(crate) consumed: u64,
    /// Pages that plans and orders took.
    pub(crate) planned: u64,
    pub(crate) ordered: u64,
}

pub(crate) type Bodies = Arc<Mutex<BTreeMap<String, Arc<Mutex<Body>>>>>;

struct Fake {
    body: Arc<Mutex<Body>>,
    process: Option<ProcessId>,
    balloon: Option<Balloon>,
}

impl Fake {
    fn new(bodies: &Bodies, name: &str, process: u32) -> Self {
        let body = Arc::new(Mutex::new(Body { consumed: TAKES, ..Body::default() }));
        bodies.lock().insert(name.to_owned(), Arc::clone(&body));
        Self { body, process: ProcessId::new(process), balloon: None }
    }
}

impl Backend for Fake {
    fn observe(&mut self, id: MachineId, _now: Instant) -> Result<MachineView, Trouble> {
        Ok(MachineView {
            active: Some(Reading { bytes: USES, age_ms: 0 }),
            rungs: Rungs::NONE.with(Rung::Compress),
            ..MachineView::new(id, ByteCount(self.body.lock().consumed))
        })
    }

    fn apply(&mut self, steps: &[Step], _now: Instant) -> Vec<Done> {
        let mut body = self.body.lock();
        for step in steps {
            if let Step::Take { frees, pages, .. } = step {
                body.consumed = body.consumed.saturating_sub(frees.0);
                body.planned += pages.0;
            }
        }
        steps.iter().map(|_| Done::Begun).collect()
    }

    fn reclaim(&mut self, pages: PageCount, _now: Instant) -> Done {
        let mut body = self.body.lock();
        body.consumed = body.consumed.saturating_sub(pages.bytes().0);
        body.ordered += pages.0;
        Done::Begun
    }

    fn process(&self) -> Option<ProcessId> {
        self.process
    }

    fn farewell(&self) -> Option<Farewell> {
        self.balloon.as_ref().map(Balloon::farewell)
    }
}

/// A daemon without its pager: loop, API, and a directory.
pub(crate) struct Estate {
    api: Option<Api>,
    pub(crate) bell: Bell,
    end: EventFd,
    thread: Option<JoinHandle<()>>,
    pub(crate) bodies: Bodies,
    pub(crate) notes: Arc<Mutex<Vec<String>>>,
    pub(crate) directory: PathBuf,
    /// Of the machines called `slow`, and of those called `stuck` before they are attached to.
    pub(crate) gate: Arc<Gate>,
}

/// Has a machine attached to whose VMM does not answer.
pub(crate) const ATTACH_STUCK: &str = "POST /v1/machines HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
    content-length: 20\r\n\r\n{\"machine\": \"stuck\"}";

pub(crate) const CONFIG: &str =
    "[group.tenant]\nlimit = \"1G\"\n[group.inner]\ngroup = \"tenant\"\nsharing = true\n";

impl Estate {
    /// `count` machines m1, m2, ... of processes 100,001, 100,002, ... on a host with that budget, in MiB.
    pub(crate) fn start(directory: &Path, count: u32, budget: u64) -> Self {
        Self::for_others(directory, count, budget, Access::default())
    }

    /// The same, where others than its own user may ask.
    pub(crate) fn for_others(directory: &Path, count: u32, budget: u64, access: Access) -> Self {
        let config = Config::parse(CONFIG, "host.toml").unwrap();
        let budget = ByteCount::mib(budget);
        let (bodies, gate) = (Bodies::default(), Arc::<Gate>::default());
        let mut control =
            Control::new(config.settings(budget), Pool::of(budget), ByteCount(0), Instant::now()).unwrap();
        for number in 1..=count {
            let name = format!("m{number}");
            let (size, reservation) = (ByteCount(SIZE), ByteCount(MIB));
            let face = Face::Guarantee { size, reservation, limit: size, shares: Shares::NORMAL };
            let fake = Fake::new(&bodies, &name, 100_000 + number);
            control.admit(&name, MachineSettings::new(MachineId(0), face), Box::new(fake)).unwrap();
        }
        let (desk, door) = exchange().unwrap();
        let notes: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = Arc::clone(&notes);
        let note = Box::new(move |text: &str| heard.lock().push(text.to_owned()));
        let helm = Helm::new(config, Kept::open(directory).unwrap(), None, desk, note);
        let end = EventFd::new().unwrap();
        let told = end.as_fd().try_clone_to_owned().unwrap();
        let thread = std::thread::spawn(move || helm.run(control, Some(told.as_fd()), None).unwrap());
        let bell = door.bell();
        let api = Api::start_with(&directory.join("api.sock"), door, access, opener(&bodies, &gate)).unwrap();
        let directory = directory.to_owned();
        let thread = Some(thread);
        let estate = Self { api: Some(api), bell, end, thread, bodies, notes, directory, gate };
        wait_until("a decision is made", || estate.get("/v1/host").status == 200);
        estate
    }

    /// Where it is decided who may ask.
    pub(crate) fn admission(&self) -> Admission {
        self.api.as_ref().unwrap().gate()
    }

    pub(crate) fn client(&self) -> Client {
        Client::of(&self.directory)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.client().exchange("GET", path, &[], Vec::new()).unwrap()
    }

    /// Sends a text that calls itself JSON.
    pub(crate) fn send(&self, method: &str, path: &str, body: &str) -> Answer {
        let headers = [("content-type", "application/json")];
        self.client().exchange(method, path, &headers, body.as_bytes().to_vec()).unwrap()
    }

    pub(crate) fn json(&self, path: &str) -> Value {
        let answer = self.get(path);
        assert_eq!(answer.status, 200, "{path}: {}", String::from_utf8_lossy(&answer.body));
        serde_json::from_slice(&answer.body).unwrap()
    }

    pub(crate) fn body<T>(&self, name: &str, look: impl FnOnce(&Body) -> T) -> T {
        let body = Arc::clone(&self.bodies.lock()[name]);
        let body = body.lock();
        look(&body)
    }
}

impl Drop for Estate {
    fn drop(&mut self) {
        self.api = None;
        self.end.signal().unwrap();
        let _ = self.thread.take().unwrap().join();
    }
}

/// Attaches to any machine but that called `nobody`.
fn opener(bodies: &Bodies, gate: &Arc<Gate>) -> Box<Opener> {
    let (bodies, gate) = (Arc::clone(bodies), Arc::clone(gate));
    Box::new(move |attach: &Attach| {
        if attach.machine == "nobody" {
            return Err(Fault::new(Code::NotFound, "no machine of this host is called \"nobody\""));
        }
        if attach.machine == "stuck" {
            gate.attach();
        }
        let mut fake = Fake::new(&bodies, &attach.machine, 7);
        fake.balloon = (attach.machine == "slow").then(|| gate.balloon());
        Ok(Opened {
            name: attach.machine.clone(),
            size: ByteCount(SIZE),
            backend: Box::new(fake),
            config: MachineConfig::default(),
            notes: vec![format!("{} has no balloon", attach.machine)],
        })
    })
}

pub(crate) fn fault(answer: &Answer) -> Fault {
    serde_json::from_slice(&answer.body)
        .unwrap_or_else(|_| panic!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body)))
}

/// Waits for something that another thread does, and fails when it does not.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
