//! Who may ask, and how much.
//!
//! Enters: a path. Leaves: a thread that answers on a socket there, until it is told to end. Root and the user that runs the daemon
//! may ask; everybody else is told so without being heard. What must never happen: a client that takes more than its part:
//! connections, headers, bodies and time are bounded.
use super::exchange::Door;
use super::fault::{Code, Fault};
use super::patience::Patient;
use super::routes::{App, Attach, Opener, router};
use crate::config::MachineConfig;
use crate::roster::{Opened, open};
use axum::extract::DefaultBodyLimit;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use plimsoll_linux::explain;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};

/// What it is called in the daemon's directory.
pub const SOCKET: &str = "api.sock";
/// Clients at the same time.
const CLIENTS_MAX: usize = 64;
/// Clients that are told at the same time why they are not heard; others are not even told.
const STRANGERS_MAX: usize = 16;
/// How long a client may take for a request's head, and be idle between two.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);
/// How long a client may take to read some of an answer.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);
/// The largest head, and the largest body.
const HEAD_MAX: usize = 16 << 10;
const BODY_MAX: usize = 64 << 10;
/// After a failed accept (no descriptors left), and for a client that is turned away, how long is waited.
const PAUSE: Duration = Duration::from_millis(100);
/// Threads that may wait for VMMs' interfaces.
const WAITING_MAX: usize = 4;

/// The API cannot be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Its socket cannot be made.
    #[error("the API cannot listen on {path:?}")]
    Listen {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its thread cannot be started.
    #[error("no thread for the API")]
    Thread(#[source] io::Error),
}

/// A served API. It ends when this is dropped.
#[derive(Debug)]
pub struct Api {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Api {
    /// Serves on a socket at `path`; whoever calls knows that nobody else does, and what is there is removed.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn start(path: &Path, door: Door) -> Result<Self, ServeError> {
        Self::start_with(path, door, Box::new(attach))
    }

    /// The same, where something else attaches to machines.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn start_with(path: &Path, mut door: Door, opener: Box<Opener>) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Listen { path: path.to_owned(), source };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(WAITING_MAX)
            .thread_name("api-attach")
            .build()
            .map_err(ServeError::Thread)?;
        let feed = door.feed.take();
        let app = Arc::new(App::new(door, opener));
        let (end, ended) = oneshot::channel();
        let run = move || {
            runtime.block_on(async {
                let Ok(listener) = UnixListener::from_std(listener) else { return };
                if let Some(mut feed) = feed {
                    let app = Arc::clone(&app);
                    tokio::spawn(async move {
                        while let Some(moment) = feed.recv().await {
                            for happening in app.archive.lock().add(&moment) {
                                // Nobody has to listen.
                                let _ = app.events.send(Arc::new(happening));
                            }
                        }
                    });
                }
                tokio::select! {
                    () = accept(listener, app) => {}
                    _ = ended => {}
                }
            });
            // A thread that waits for a VMM's interface is not waited for.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("api".to_owned()).spawn(run);
        Ok(Self { end: Some(end), thread: Some(thread.map_err(ServeError::Thread)?) })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether a user may speak to this daemon, on any of its sockets: root, and whoever runs it.
pub(crate) fn may_speak(user: u32) -> bool {
    user == 0 || user == rustix::process::geteuid().as_raw()
}

async fn accept(listener: UnixListener, app: Arc<App>) {
    let service = router(&app).layer(DefaultBodyLimit::max(BODY_MAX));
    let clients = Arc::new(Semaphore::new(CLIENTS_MAX));
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let user = stream.peer_cred().map(|peer| peer.uid());
        let fault = match (user, Arc::clone(&clients).try_acquire_owned()) {
            (Ok(user), Ok(permit)) if may_speak(user) => {
                let service = TowerToHyperService::new(service.clone());
                tokio::spawn(async move {
                    let _permit = permit;
                    let mut server = http1::Builder::new();
                    server.timer(TokioTimer::new()).header_read_timeout(HEAD_PATIENCE).max_buf_size(HEAD_MAX);
                    // A client that breaks off is its own affair.
                    let stream = TokioIo::new(Patient::new(stream, WRITE_PATIENCE));
                    let _ = server.serve_connection(stream, service).await;
                });
                continue;
            }
            (Ok(user), Ok(_)) => {
                Fault::new(Code::Forbidden, format!("user {user} may not speak to this daemon"))
            }
            (Err(_), _) => Fault::new(Code::Forbidden, "the kernel does not say who asks"),
            (_, Err(_)) => Fault::new(Code::TooMany, format!("{CLIENTS_MAX} clients are connected already")),
        };
        app.turned_away.fetch_add(1, Ordering::Relaxed);
        if let Ok(permit) = Arc::clone(&strangers).try_acquire_owned() {
            tokio::spawn(async move {
                let _permit = permit;
                turn_away(stream, &fault).await;
            });
        }
    }
}

/// Says why. What is asked is not looked at, but a client that is answered before it has asked takes that for a mistake.
async fn turn_away(mut stream: UnixStream, fault: &Fault) {
    let _ = tokio::time::timeout(PAUSE, stream.read(&mut [0; 1024])).await;
    let _ = tokio::time::timeout(PAUSE, stream.write_all(&fault.unread())).await;
}

/// Finds a machine and attaches to it.
fn attach(request: &Attach) -> Result<Opened, Fault> {
    let found = plimsoll_attach::find(&request.machine).map_err(|refusal| {
        Fault::new(Code::NotFound, explain(&refusal))
            .help("`plimsoll attach` lists the machines of this host")
    })?;
    let (qmp, api) = (request.qmp.clone(), request.api.clone());
    let config = MachineConfig { qmp, api, ..MachineConfig::default() };
    open(found.identity, |_| Some(config.clone())).map_err(|why| Fault::new(Code::Conflict, why))
}
