//! Who may ask, and how much.
//!
//! Enters: a path, and who may ask. Leaves: a thread that answers on a socket there, and over TLS where the settings say, until it is told
//! to end. Whoever may not ask is told so without being heard. What must never happen: a client that takes more than its part:
//! connections, greetings, headers, bodies and time are bounded, and those from elsewhere have bounds of their own.
use super::access::{Access, Caller};
use super::exchange::Door;
use super::fault::{Code, Fault};
use super::patience::Patient;
use super::routes::{App, Attach, OPENINGS_MAX, Opener, router};
use crate::config::{MachineConfig, Role};
use crate::roster::{Opened, open};
use axum::Router;
use axum::extract::DefaultBodyLimit;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use plimsoll_linux::explain;
use rustix::net::sockopt::set_tcp_user_timeout;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio_rustls::TlsAcceptor;

/// What it is called in the daemon's directory.
pub const SOCKET: &str = "api.sock";
/// Clients at the same time: of this host, and from elsewhere.
const CLIENTS_MAX: usize = 64;
/// Clients that are told at the same time why they are not heard; others are not even told.
const STRANGERS_MAX: usize = 16;
/// Clients from elsewhere that are about to show a certificate, and how long that may take one.
const GREETINGS_MAX: usize = 128;
const GREETING_PATIENCE: Duration = Duration::from_secs(10);
/// After how many milliseconds without an acknowledgement a client from elsewhere is gone.
const VANISHED_MS: u32 = 30_000;
/// How long a client may take for a request's head, and be idle between two.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);
/// How long a client may take to read some of an answer.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);
/// How long what is under way may take when a client is to connect anew.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(20);
/// The largest head, and the largest body.
const HEAD_MAX: usize = 16 << 10;
const BODY_MAX: usize = 64 << 10;
/// After a failed accept (no descriptors left), and for a client that is turned away, how long is waited.
const PAUSE: Duration = Duration::from_millis(100);
/// Threads that may wait for VMMs' interfaces: one for each that is opened, in both halls.
const WAITING_MAX: usize = 2 * OPENINGS_MAX;

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
    gate: Gate,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Where it is decided who may ask, while the API is served.
#[derive(Clone, Debug)]
pub struct Gate {
    path: Arc<Path>,
    access: watch::Sender<Arc<Access>>,
}

impl Gate {
    /// Who may ask now.
    pub fn access(&self) -> Arc<Access> {
        Arc::clone(&self.access.borrow())
    }

    /// Lets others ask from now on. Clients from elsewhere connect anew then, as do users of this host who may do something else than
    /// before; a request that is under way is answered.
    ///
    /// # Errors
    /// [`ServeError::Listen`] where the socket cannot be opened to them; all is as before.
    pub fn admit(&self, access: Access) -> Result<(), ServeError> {
        let failed = |source| ServeError::Listen { path: self.path.to_path_buf(), source };
        access.open(&self.path).map_err(failed)?;
        self.access.send_replace(Arc::new(access));
        Ok(())
    }
}

impl Api {
    /// Serves on a socket at `path`; whoever calls knows that nobody else does, and what is there is removed.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn start(path: &Path, door: Door, access: Access) -> Result<Self, ServeError> {
        Self::start_with(path, door, access, Box::new(attach))
    }

    /// The same, where something else attaches to machines.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn start_with(
        path: &Path,
        mut door: Door,
        access: Access,
        opener: Box<Opener>,
    ) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Listen { path: path.to_owned(), source };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        access.open(path).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(WAITING_MAX)
            .thread_name("api-attach")
            .build()
            .map_err(ServeError::Thread)?;
        let feed = door.feed.take();
        let app = Arc::new(App::new(door, opener));
        let (access, admission) = watch::channel(Arc::new(access));
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
                let [here, elsewhere] = [(); 2].map(|()| Hall::new(&app, &admission));
                tokio::select! {
                    () = accept(listener, here) => {}
                    () = accept_remote(elsewhere) => {}
                    _ = ended => {}
                }
            });
            // A thread that waits for a VMM's interface is not waited for.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("api".to_owned()).spawn(run);
        let gate = Gate { path: path.into(), access };
        Ok(Self { gate, end: Some(end), thread: Some(thread.map_err(ServeError::Thread)?) })
    }

    /// Where it is decided who may ask.
    pub fn gate(&self) -> Gate {
        self.gate.clone()
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

type Admission = watch::Receiver<Arc<Access>>;

/// Where the clients of one kind are received: those of this host, and those from elsewhere, so that neither keep the others out.
#[derive(Clone)]
struct Hall {
    app: Arc<App>,
    router: Router,
    /// Who may ask; what it has seen is what a client is received by.
    admission: Admission,
    clients: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Hall {
    fn new(app: &Arc<App>, admission: &Admission) -> Self {
        Self {
            app: Arc::clone(app),
            router: router(app).layer(DefaultBodyLimit::max(BODY_MAX)),
            admission: admission.clone(),
            clients: Arc::new(Semaphore::new(CLIENTS_MAX)),
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
        }
    }

    /// Serves whoever asks, or says why not, for as long as that takes.
    async fn receive(self, stream: impl AsyncRead + AsyncWrite + Send + Unpin, caller: io::Result<Caller>) {
        let (role, permit) = match self.admit(&caller) {
            Ok(admitted) => admitted,
            Err(fault) => {
                self.app.turned_away.fetch_add(1, Ordering::Relaxed);
                // Beyond so many, they are not even told.
                if let Ok(_permit) = self.strangers.try_acquire() {
                    turn_away(stream, &fault).await;
                }
                return;
            }
        };
        let _permit: OwnedSemaphorePermit = permit;
        if let Ok(caller) = caller {
            self.serve(stream, &caller, role).await;
        }
    }

    /// What somebody may do, and a place to do it from.
    fn admit(&self, caller: &io::Result<Caller>) -> Result<(Role, OwnedSemaphorePermit), Fault> {
        let Ok(caller) = caller else {
            return Err(Fault::new(Code::Forbidden, "the kernel does not say who asks"));
        };
        let role = self.admission.borrow().role(caller);
        let role = role.ok_or_else(|| {
            let fault = Fault::new(Code::Forbidden, format!("{caller} may not speak to this daemon"));
            match caller {
                Caller::Local { .. } => fault,
                Caller::Remote { .. } => fault.help("name it in may-change or may-read of [api] there"),
            }
        })?;
        let many = |_| Fault::new(Code::TooMany, format!("{CLIENTS_MAX} clients are connected already"));
        Ok((role, Arc::clone(&self.clients).try_acquire_owned().map_err(many)?))
    }

    async fn serve(mut self, stream: impl AsyncRead + AsyncWrite + Unpin, caller: &Caller, role: Role) {
        let router = TowerToHyperService::new(self.router);
        let service = service_fn(move |mut request| {
            request.extensions_mut().insert(role);
            router.call(request)
        });
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(HEAD_PATIENCE).max_buf_size(HEAD_MAX);
        let mut connection = pin!(server.serve_connection(TokioIo::new(stream), service));
        loop {
            tokio::select! {
                // What somebody has asked who may not any more is not begun.
                biased;
                changed = self.admission.changed() => {
                    let is_local = matches!(caller, Caller::Local { .. });
                    let stays = changed.is_ok() && self.admission.borrow_and_update().role(caller) == Some(role);
                    // What was checked when somebody from elsewhere connected may be checked by other authorities now.
                    if !(is_local && stays) {
                        break;
                    }
                }
                // A client that breaks off is its own affair.
                _ = connection.as_mut() => return,
            }
        }
        connection.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(FAREWELL_PATIENCE, connection).await;
    }
}

/// Users of this host.
async fn accept(listener: UnixListener, mut hall: Hall) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let caller = Caller::local(&stream);
        hall.admission.mark_unchanged();
        tokio::spawn(hall.clone().receive(Patient::new(stream, WRITE_PATIENCE), caller));
    }
}

/// Others, over TLS, wherever the settings say at the time.
async fn accept_remote(mut hall: Hall) {
    let mut greetings = Greetings::default();
    loop {
        let meeting = hall.admission.borrow_and_update().remote().map(|remote| {
            let listener = remote.listener.try_clone().and_then(TcpListener::from_std);
            (listener, TlsAcceptor::from(Arc::clone(&remote.tls)))
        });
        let (listener, acceptor) = match meeting {
            Some((Ok(listener), acceptor)) => (listener, acceptor),
            Some((Err(_), _)) => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            None if hall.admission.changed().await.is_ok() => continue,
            None => return,
        };
        loop {
            let accepted = tokio::select! {
                // Whoever connects when something has changed is received by that.
                biased;
                _ = hall.admission.changed() => break,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            tokio::spawn(greet(stream, acceptor.clone(), greetings.begin(), hall.clone()));
        }
    }
}

/// Clients that have not shown a certificate yet. Anybody may be one, so none of them waits for another: where there are too many, the
/// one that has taken longest makes way.
#[derive(Default)]
struct Greetings(VecDeque<oneshot::Sender<Infallible>>);

impl Greetings {
    /// One more. What is given is to be dropped when it is done with; it ends when it has to make way.
    fn begin(&mut self) -> oneshot::Receiver<Infallible> {
        self.0.retain(|other| !other.is_closed());
        if self.0.len() >= GREETINGS_MAX {
            self.0.pop_front();
        }
        let (begun, other) = oneshot::channel();
        self.0.push_back(begun);
        other
    }
}

/// Has a client show its certificate.
async fn greet(stream: TcpStream, acceptor: TlsAcceptor, way: oneshot::Receiver<Infallible>, hall: Hall) {
    // Best effort: a client that vanished keeps its place a little longer without.
    let _ = set_tcp_user_timeout(&stream, VANISHED_MS);
    let _ = stream.set_nodelay(true);
    let shaken = tokio::select! {
        shaken = acceptor.accept(Patient::new(stream, WRITE_PATIENCE)).into_fallible() => shaken,
        () = tokio::time::sleep(GREETING_PATIENCE) => return,
        _ = way => return,
    };
    match shaken {
        Ok(stream) => {
            let caller = Caller::remote(stream.get_ref().1.peer_certificates());
            hall.receive(stream, Ok(caller)).await;
        }
        Err((_, mut stream)) => {
            hall.app.turned_away.fetch_add(1, Ordering::Relaxed);
            // It was told why. A socket closed before the client's words are read would take that back.
            let _ = tokio::time::timeout(PAUSE, stream.read(&mut [0; 1024])).await;
        }
    }
}

/// Says why. What is asked is not looked at, but a client that is answered before it has asked takes that for a mistake.
async fn turn_away(mut stream: impl AsyncRead + AsyncWrite + Unpin, fault: &Fault) {
    let _ = tokio::time::timeout(PAUSE, stream.read(&mut [0; 1024])).await;
    let say = async {
        stream.write_all(&fault.unread()).await?;
        stream.shutdown().await
    };
    let _ = tokio::time::timeout(PAUSE, say).await;
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
