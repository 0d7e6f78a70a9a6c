//! The other end: requests to a daemon's API, for the command line and for tests.
//!
//! Enters: a directory of this host, or a daemon's address and the certificates to ask it by; a method, a path. Leaves: an answer of the
//! expected type, or a sentence that says why there is none, also where there is no daemon. What must never happen: a wait without end, or a
//! word to a daemon whose certificate was not checked.
use super::fault::Fault;
use super::serve::SOCKET;
use super::tls::{Credentials, TlsError};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

/// Longer than any request may take there: 10 s to attach, then 15 s for an order.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long a daemon elsewhere may take until it and its certificate are there.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a daemon whose manager was replaced may be without one.
const TAKE_OVER: Duration = Duration::from_secs(2);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(20);
/// A page of a thousand machines takes a megabyte.
const ANSWER_MAX: usize = 16 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no daemon answers at {path:?}: start one with `plimsoll daemon --budget SIZE`, or name its --directory"
    )]
    NoDaemon {
        /// The socket.
        path: PathBuf,
    },
    /// This user may not.
    #[error(
        "this user may not speak to the daemon at {path:?}: ask as root, as the user that runs it, or in the group that its settings name"
    )]
    NotPermitted {
        /// The socket.
        path: PathBuf,
    },
    /// What was said of a daemon elsewhere is no address.
    #[error("--host {said}: {why}: write it as https://NAME:PORT")]
    Address {
        /// What was said.
        said: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The files to ask by are wrong.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Nobody can be reached there.
    #[error(
        "nobody can be reached at {place}: has the daemon's host `listen` in [api] of its settings, and does no firewall refuse it?"
    )]
    Unreachable {
        /// Where.
        place: Place,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is not the one that is meant, as far as its certificate says.
    #[error("the daemon at {place} is not believed to be that: {why}")]
    NotBelieved {
        /// Where.
        place: Place,
        /// What is wrong with its certificate, and what to do.
        why: String,
    },
    /// It does not believe us.
    #[error("the daemon at {place} refuses the certificate {certificate:?}: {why}")]
    NotAdmitted {
        /// Where.
        place: Place,
        /// Ours.
        certificate: PathBuf,
        /// What it has against it, and what to do.
        why: String,
    },
    /// It listens and does not answer.
    #[error("the daemon at {place} does not answer")]
    Silent {
        /// Where.
        place: Place,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It answers something else than was agreed.
    #[error("the daemon at {place} is of another version: its answer makes no sense here")]
    Strange {
        /// Where.
        place: Place,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// It refuses.
    #[error("{0}")]
    Refused(Fault),
}

/// Where a daemon is.
#[derive(Clone, Debug)]
pub enum Place {
    /// On this host, at a socket.
    Here(PathBuf),
    /// Elsewhere.
    Elsewhere(Arc<Elsewhere>),
}

/// A daemon of another host, and what it is asked by.
#[derive(Debug)]
pub struct Elsewhere {
    host: String,
    port: u16,
    name: ServerName<'static>,
    credentials: Credentials,
    tls: Arc<ClientConfig>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(path) => write!(f, "{path:?}"),
            Self::Elsewhere(there) => write!(f, "https://{}:{}", there.host, there.port),
        }
    }
}

/// A daemon's API.
#[derive(Clone, Debug)]
pub struct Client {
    place: Place,
}

/// An answer, whatever its status.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// What kind of body it has.
    pub content_type: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Client {
    /// That of the daemon of a directory. Nothing is connected yet.
    pub fn of(directory: &Path) -> Self {
        Self { place: Place::Here(directory.join(SOCKET)) }
    }

    /// That of the daemon at `https://NAME:PORT`. Nothing is connected yet.
    ///
    /// # Errors
    /// [`ClientError::Address`], [`ClientError::Tls`].
    pub fn elsewhere(url: &str, credentials: Credentials) -> Result<Self, ClientError> {
        let wrong = |why| ClientError::Address { said: url.to_owned(), why };
        let uri: Uri = url.parse().map_err(|_| wrong("this is no address"))?;
        match uri.scheme_str() {
            Some("https") => {}
            Some("http") => return Err(wrong("nothing is said in clear")),
            _ => return Err(wrong("it does not begin with https://")),
        }
        if uri.path_and_query().is_some_and(|rest| rest != "/") {
            return Err(wrong("there is something behind the port"));
        }
        let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16());
        let port = port.ok_or_else(|| wrong("the port is missing"))?;
        // An address of IPv6 has brackets around it, and none in a certificate.
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
        let name = name.map_err(|_| wrong("no host can be called that"))?;
        let tls = credentials.client()?;
        let host = host.to_owned();
        Ok(Self { place: Place::Elsewhere(Arc::new(Elsewhere { host, port, name, credentials, tls })) })
    }

    /// Reads something.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.parsed(&self.exchange("GET", path, &[], Vec::new())?)
    }

    /// Changes something, with a JSON body if there is one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn send<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let text = body.map(serde_json::to_vec).transpose().map_err(|source| self.strange(source))?;
        let headers: &[_] = if text.is_some() { &[("content-type", "application/json")] } else { &[] };
        self.parsed(&self.exchange(method, path, headers, text.unwrap_or_default())?)
    }

    fn parsed<T: DeserializeOwned>(&self, answer: &Answer) -> Result<T, ClientError> {
        let is_good = StatusCode::from_u16(answer.status).is_ok_and(|status| status.is_success());
        if !is_good {
            let fault = serde_json::from_slice(&answer.body).map_err(|source| self.strange(source))?;
            return Err(ClientError::Refused(fault));
        }
        // What has no body is nothing.
        let body = if answer.body.is_empty() { b"null" } else { &*answer.body };
        serde_json::from_slice(body).map_err(|source| self.strange(source))
    }

    fn strange(&self, source: serde_json::Error) -> ClientError {
        ClientError::Strange { place: self.place.clone(), source }
    }

    fn silent(&self, source: io::Error) -> ClientError {
        ClientError::Silent { place: self.place.clone(), source }
    }

    /// Sends anything, and gives back whatever is answered.
    ///
    /// # Errors
    /// [`ClientError`], a refusal apart.
    pub fn exchange(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Result<Answer, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| self.silent(source))?;
        let method =
            Method::from_bytes(method.as_bytes()).map_err(|error| self.silent(io::Error::other(error)))?;
        let mut request = Request::builder().method(method).uri(path).header("host", "plimsoll");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body)));
        let request = request.map_err(|error| self.silent(io::Error::other(error)))?;
        runtime.block_on(async {
            let asked = async {
                match &self.place {
                    Place::Here(path) => ask(self.connect(path).await?, request).await,
                    Place::Elsewhere(there) => ask(self.reach(there).await?, request).await,
                }
                .map_err(|source| self.failed(source))
            };
            let silent = |_| Err(self.silent(io::ErrorKind::TimedOut.into()));
            tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(silent)
        })
    }

    /// Connects; a daemon whose manager has just ended has another one soon.
    async fn connect(&self, path: &Path) -> Result<UnixStream, ClientError> {
        let connected = again(async || UnixStream::connect(path).await).await;
        connected.map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::NotPermitted { path: path.to_owned() },
            // A socket that is there belongs to a manager that has ended, or to none.
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
                ClientError::NoDaemon { path: path.to_owned() }
            }
            _ => self.silent(source),
        })
    }

    /// The same elsewhere, until both have shown their certificates. Whether it has ours against us is not known before it answers.
    async fn reach(
        &self,
        there: &Elsewhere,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>, ClientError> {
        let unreachable = |source| ClientError::Unreachable { place: self.place.clone(), source };
        let host = there.host.trim_matches(['[', ']']);
        let connect = async {
            let stream = again(async || TcpStream::connect((host, there.port)).await).await;
            let stream = stream.map_err(unreachable)?;
            let connector = TlsConnector::from(Arc::clone(&there.tls));
            connector.connect(there.name.clone(), stream).await.map_err(|source| self.failed(source))
        };
        let late = |_| Err(unreachable(io::ErrorKind::TimedOut.into()));
        tokio::time::timeout(CONNECT_PATIENCE, connect).await.unwrap_or_else(late)
    }

    /// Why there was no answer, by what a connection ended with.
    fn failed(&self, source: io::Error) -> ClientError {
        let (Place::Elsewhere(there), Some(error)) = (&self.place, cause(&source)) else {
            return self.silent(source);
        };
        let (place, Credentials { certificate, authority, .. }) = (self.place.clone(), &there.credentials);
        let own = |why: String| ClientError::NotAdmitted {
            place: place.clone(),
            certificate: certificate.clone(),
            why,
        };
        match error {
            rustls::Error::AlertReceived(alert) => own(match alert {
                AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                    "it is signed by none of those that the daemon's client-ca names".to_owned()
                }
                AlertDescription::CertificateExpired => "it has expired, by the daemon's clock".to_owned(),
                other => format!("{other:?}"),
            }),
            rustls::Error::InvalidCertificate(wrong) => {
                let why = believed(wrong, authority);
                ClientError::NotBelieved { place, why }
            }
            other => ClientError::NotBelieved { place, why: other.to_string() },
        }
    }
}

/// What is wrong with a daemon's certificate, and what to do.
fn believed(wrong: &CertificateError, authority: &Path) -> String {
    use CertificateError as E;
    match wrong {
        E::UnknownIssuer | E::BadSignature => {
            format!(
                "its certificate is signed by none of those in {authority:?}: name the one that it is with --cacert"
            )
        }
        E::Expired | E::ExpiredContext { .. } => {
            "its certificate has expired, by this host's clock: have it renewed there".to_owned()
        }
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "its certificate is not valid yet, by this host's clock".to_owned()
        }
        E::NotValidForNameContext { presented, .. } if !presented.is_empty() => {
            format!("its certificate is for {}: ask by such a name", presented.join(", "))
        }
        E::NotValidForName | E::NotValidForNameContext { .. } => {
            "its certificate is for another name: ask by that".to_owned()
        }
        other => other.to_string(),
    }
}

/// What TLS has against it, if it is that. The two libraries above wrap it, each in its way.
fn cause(error: &io::Error) -> Option<&rustls::Error> {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = match error.downcast_ref::<io::Error>() {
            Some(wrapped) => wrapped.get_ref().map(|inner| inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

/// Connects, again where nobody listens for a moment.
async fn again<S>(connect: impl AsyncFn() -> io::Result<S>) -> io::Result<S> {
    let deadline = Instant::now() + TAKE_OVER;
    loop {
        match connect().await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                tokio::time::sleep(PAUSE).await;
            }
            other => return other,
        }
    }
}

async fn ask(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> io::Result<Answer> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let connection = tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok());
    let (status, content_type) = (response.status().as_u16(), content_type.unwrap_or_default().to_owned());
    let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await.map_err(io::Error::other)?;
    connection.abort();
    Ok(Answer { status, content_type, body: body.to_bytes().to_vec() })
}
