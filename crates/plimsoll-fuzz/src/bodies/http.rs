//! What a client of the API sends, byte by byte: it is answered in whole answers, of which none is this side's fault, or hung up on.
//!
//! The API is the real one, on a socket, over a real loop whose two machines are made of numbers.
use plimsoll_host::api::exchange::exchange;
use plimsoll_host::api::{Access, Api, Attach, Code, Fault};
use plimsoll_host::backend::{Backend, Done, Trouble};
use plimsoll_host::config::Config;
use plimsoll_host::control::{Control, Pool};
use plimsoll_host::helm::Helm;
use plimsoll_host::helm::kept::Kept;
use plimsoll_policy::Step;
use plimsoll_policy::settings::{Face, MachineSettings, Shares};
use plimsoll_policy::view::MachineView;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A client that has said all it says is not kept waiting for longer than any order takes.
const PATIENCE: Duration = Duration::from_secs(120);
const SIZE: ByteCount = ByteCount::mib(64);

/// A machine of which nothing can be had.
struct Nothing;

impl Backend for Nothing {
    fn observe(&mut self, id: MachineId, _now: Instant) -> Result<MachineView, Trouble> {
        Ok(MachineView::new(id, ByteCount::mib(16)))
    }

    fn apply(&mut self, steps: &[Step], _now: Instant) -> Vec<Done> {
        steps.iter().map(|_| Done::Begun).collect()
    }

    fn reclaim(&mut self, _pages: PageCount, _now: Instant) -> Done {
        Done::Begun
    }
}

/// The API of this thread.
struct Served {
    api: Option<Api>,
    end: EventFd,
    thread: Option<JoinHandle<()>>,
    directory: PathBuf,
}

impl Served {
    fn start() -> Self {
        let name = format!("plimsoll-api-{}-{:?}", std::process::id(), std::thread::current().id());
        let directory = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let (config, budget) = (Config::parse("", "host.toml").unwrap(), ByteCount::mib(1024));
        let (settings, pool) = (config.settings(budget), Pool::of(budget));
        let mut control = Control::new(settings, pool, ByteCount(0), Instant::now()).unwrap();
        for name in ["m1", "m2"] {
            let face = Face::Guarantee {
                size: SIZE,
                reservation: ByteCount(0),
                limit: SIZE,
                shares: Shares::NORMAL,
            };
            control.admit(name, MachineSettings::new(MachineId(0), face), Box::new(Nothing)).unwrap();
        }
        let (desk, door) = exchange().unwrap();
        let helm = Helm::new(config, Kept::open(&directory).unwrap(), None, desk, Box::new(|_: &str| {}));
        let end = EventFd::new().unwrap();
        let told = end.as_fd().try_clone_to_owned().unwrap();
        let thread = std::thread::spawn(move || helm.run(control, Some(told.as_fd()), None).unwrap());
        let nobody =
            |attach: &Attach| Err(Fault::new(Code::NotFound, format!("there is no {:?}", attach.machine)));
        let path = directory.join("api.sock");
        let api = Api::start_with(&path, door, Access::default(), Box::new(nobody)).unwrap();
        let served = Self { api: Some(api), end, thread: Some(thread), directory };
        // Until there was a decision there is nothing to tell.
        let begun = Instant::now();
        while !served.says(b"GET /v1/host HTTP/1.1\r\nhost: x\r\n\r\n", true).starts_with(b"HTTP/1.1 200 ") {
            assert!(begun.elapsed() < PATIENCE, "nothing is decided");
            std::thread::sleep(Duration::from_millis(5));
        }
        served
    }

    fn says(&self, bytes: &[u8], is_whole: bool) -> Vec<u8> {
        said(&self.directory.join("api.sock"), bytes, is_whole)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.api = None;
        let _ = self.end.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// All that is answered to a client that says `bytes` and nothing more. For the server, one that says so has left, whatever it has asked for
/// before: of what `is_whole` it waits for an answer first.
fn said(path: &Path, bytes: &[u8], is_whole: bool) -> Vec<u8> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    // Who is hung up on need not have said all.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    if is_whole {
        let mut first = [0; 1];
        stream.read_exact(&mut first).unwrap();
        answer.extend(first);
    }
    let _ = stream.shutdown(Shutdown::Write);
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("it is not hung up: {error}"),
        _ => {}
    }
    answer
}

/// Has a client say bytes to the API.
pub(crate) fn read(bytes: &[u8]) -> bool {
    thread_local! {
        static SERVED: RefCell<Option<Served>> = const { RefCell::new(None) };
    }
    let is_whole = examples().iter().any(|example| example == bytes);
    let answer =
        SERVED.with_borrow_mut(|served| served.get_or_insert_with(Served::start).says(bytes, is_whole));
    let statuses = statuses(&answer).unwrap_or_else(|| panic!("no answer: {}", answer.escape_ascii()));
    // 503: a loop that is busy, and a queue that is full, are said as what they are.
    let is_ours = |status: &u16| (100..500).contains(status) || *status == 503;
    assert!(statuses.iter().all(is_ours), "{}", answer.escape_ascii());
    statuses.first().is_some_and(|status| (200..300).contains(status))
}

/// The statuses of the answers that bytes are, whole but for the last; `None` if they are anything else.
fn statuses(mut rest: &[u8]) -> Option<Vec<u16>> {
    let mut statuses = Vec::new();
    while !rest.is_empty() {
        let end = rest.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
        let head = str::from_utf8(&rest[..end]).ok()?;
        rest = &rest[end + 4..];
        let mut lines = head.split("\r\n");
        let first = lines.next()?;
        let status = first.strip_prefix("HTTP/1.1 ").or_else(|| first.strip_prefix("HTTP/1.0 "))?;
        statuses.push(status.get(..3)?.parse().ok()?);
        let fields: Vec<(&str, &str)> = lines.map(|line| line.split_once(": ")).collect::<Option<_>>()?;
        let field = |name: &str| fields.iter().find(|(field, _)| *field == name).map(|(_, value)| *value);
        // What is asked for the head alone is answered without a body, whose length it says all the same.
        if rest.is_empty() || rest.starts_with(b"HTTP/1.") {
            continue;
        }
        let length: usize = match field("content-length") {
            Some(length) => length.parse().ok()?,
            // Events, and whatever is said until the end.
            None => return Some(statuses),
        };
        rest = rest.get(length.min(rest.len())..)?;
    }
    Some(statuses)
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    let with = |method: &str, path: &str, body: &str| {
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n");
        format!("{head}content-length: {}\r\n\r\n{body}", body.len())
    };
    let chunks = "PATCH /v1/machines/m1 HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                  transfer-encoding: chunked\r\n\r\n7\r\n{\"share\r\n9\r\ns\": 2000}\r\n0\r\n\r\n";
    let texts = [
        get("/v1/machines?limit=1&after=1"),
        get("/v1/machines/m1"),
        get("/v1/host") + &get("/metrics"),
        get("/openapi.json"),
        "HEAD /v1/host HTTP/1.1\r\nhost: x\r\n\r\n".to_owned(),
        with("PATCH", "/v1/machines/m1", r#"{"shares": 1000}"#),
        with("PUT", "/v1/host/budget", r#"{"bytes": 1073741824}"#),
        chunks.to_owned(),
    ];
    texts.map(String::into_bytes).into()
}
