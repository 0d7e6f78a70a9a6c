//! A server on a Unix socket that answers as it is told to: rightly, wrongly or not at all.
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A request as it arrived.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) body: Option<Value>,
    /// The how-manieth connection it came over, from 1.
    pub(crate) connection: usize,
}

/// What the server does then.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// Answers as these VMMs' server does.
    Json(u16, Value),
    /// Sends these bytes and goes on.
    Raw(Vec<u8>),
    /// Sends these bytes and closes the connection.
    RawThenClose(Vec<u8>),
    /// Sends these bytes and then nothing, until the client goes.
    RawThenStall(Vec<u8>),
    /// Sends these bytes again and again, slowly or as fast as they are taken, until the client goes.
    Forever(Vec<u8>, Pace),
    /// Is gone, with its socket.
    Vanish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    Slow,
    Fast,
}

/// A folder that goes with its owner.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("plimsoll-attach-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("a folder can be made");
        Self(path)
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running server.
pub(crate) struct Server {
    folder: Folder,
    requests: Arc<Mutex<Vec<Request>>>,
    is_stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves one connection after the other; `handler` decides on each request.
    pub(crate) fn start(mut handler: impl FnMut(&Request) -> Reply + Send + 'static) -> Self {
        let folder = Folder::new();
        let socket = folder.join("api.sock");
        let listener = UnixListener::bind(&socket).expect("a socket can be bound");
        let (requests, is_stopped) = (Arc::<Mutex<Vec<Request>>>::default(), Arc::<AtomicBool>::default());
        let (log, stopped) = (Arc::clone(&requests), Arc::clone(&is_stopped));
        let thread = std::thread::spawn(move || {
            for (number, stream) in (1..).zip(listener.incoming()) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let mut stream = stream.expect("connections can be accepted");
                while let Some(request) = receive(&mut stream, number) {
                    let reply = handler(&request);
                    log.lock().expect("no test thread panicked").push(request);
                    match act(&mut stream, &reply) {
                        Next::Keep => {}
                        Next::Close => break,
                        Next::Vanish => return std::fs::remove_file(&socket).expect("the socket is there"),
                    }
                }
            }
        });
        Self { folder, requests, is_stopped, thread: Some(thread) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("api.sock")
    }

    /// What has arrived so far.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no test thread panicked").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        // Wakes it from accepting. Clients are dropped before their server, so it is not reading any more.
        let _ = UnixStream::connect(self.socket());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Next {
    Keep,
    Close,
    Vanish,
}

fn act(stream: &mut UnixStream, reply: &Reply) -> Next {
    let sent = match reply {
        Reply::Json(status, body) => stream.write_all(&json_answer(*status, body)),
        Reply::Raw(bytes) | Reply::RawThenClose(bytes) | Reply::RawThenStall(bytes) => {
            stream.write_all(bytes)
        }
        Reply::Forever(bytes, pace) => {
            while stream.write_all(bytes).is_ok() {
                if *pace == Pace::Slow {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
            return Next::Close;
        }
        Reply::Vanish => return Next::Vanish,
    };
    match reply {
        _ if sent.is_err() => Next::Close,
        Reply::RawThenClose(_) => Next::Close,
        Reply::RawThenStall(_) => {
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            Next::Close
        }
        _ => Next::Keep,
    }
}

/// An answer in the form of micro_http, which both VMMs use: no reason, no length without a body.
pub(crate) fn json_answer(status: u16, body: &Value) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status} \r\nServer: a test\r\nConnection: keep-alive\r\n");
    match body {
        Value::Null => format!("{head}\r\n").into_bytes(),
        body => {
            let body = body.to_string();
            let length = body.len();
            format!("{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
                .into_bytes()
        }
    }
}

/// The next request, or `None` when the client has gone.
fn receive(stream: &mut UnixStream, connection: usize) -> Option<Request> {
    let mut bytes = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).ok().filter(|count| *count > 0)?;
        bytes.extend_from_slice(&piece[..count]);
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut request = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(head) = request.parse(&bytes).expect("clients speak HTTP") else {
            continue;
        };
        let length = request.headers.iter().find(|header| header.name == "Content-Length");
        let length = length.map_or(0, |header| {
            std::str::from_utf8(header.value)
                .ok()
                .and_then(|text| text.parse().ok())
                .expect("lengths are numbers")
        });
        if bytes.len() < head + length {
            continue;
        }
        assert_eq!(bytes.len(), head + length, "a client sends one request at a time");
        let (method, path) = (request.method.expect("a method"), request.path.expect("a path"));
        return Some(Request {
            method: method.to_owned(),
            path: path.to_owned(),
            body: (length > 0).then(|| serde_json::from_slice(&bytes[head..]).expect("bodies are JSON")),
            connection,
        });
    }
}

/// Binds a socket and lets go of it: the file stays, nobody listens.
pub(crate) fn deserted(path: &Path) {
    drop(UnixListener::bind(path).expect("a socket can be bound"));
}
