//! The other end: requests to a daemon's API, for the command line and for tests.
//!
//! Enters: a directory, a method, a path. Leaves: an answer of the expected type, or a sentence that says why there is none, also
//! where there is no daemon. What must never happen: a wait without end.
use super::fault::Fault;
use super::serve::SOCKET;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::net::UnixStream;

/// Longer than any request may take there.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a daemon whose manager was replaced may be without one.
const TAKE_OVER: Duration = Duration::from_secs(2);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(20);
/// A page of a thousand machines takes a megabyte.
const ANSWER_MAX: usize = 16 << 20;

/// Why there is no answer.
#[derive(Debug, Error)]
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
    #[error("this user may not speak to the daemon at {path:?}: ask as root, or as the user that runs it")]
    NotPermitted {
        /// The socket.
        path: PathBuf,
    },
    /// It listens and does not answer.
    #[error("the daemon at {path:?} does not answer")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It answers something else than was agreed.
    #[error("the daemon at {path:?} is of another version: its answer makes no sense here")]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// It refuses.
    #[error("{0}")]
    Refused(Fault),
}

/// A daemon's API.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
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
        Self { path: directory.join(SOCKET) }
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
        ClientError::Strange { path: self.path.clone(), source }
    }

    fn silent(&self, source: io::Error) -> ClientError {
        ClientError::Silent { path: self.path.clone(), source }
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
            let stream = self.connect().await?;
            let asked = tokio::time::timeout(PATIENCE, ask(stream, request)).await;
            asked
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                .map_err(|source| self.silent(source))
        })
    }

    /// Connects; a daemon whose manager has just ended has another one soon.
    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let deadline = Instant::now() + TAKE_OVER;
        loop {
            let path = self.path.clone();
            match UnixStream::connect(&self.path).await {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(ClientError::NotPermitted { path });
                }
                // A socket that is there belongs to a manager that has ended, or to none.
                Err(error)
                    if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < deadline =>
                {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) =>
                {
                    return Err(ClientError::NoDaemon { path });
                }
                Err(source) => return Err(self.silent(source)),
            }
        }
    }
}

async fn ask(stream: UnixStream, request: Request<Full<Bytes>>) -> io::Result<Answer> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    let connection = tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok());
    let (status, content_type) = (response.status().as_u16(), content_type.unwrap_or_default().to_owned());
    let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await.map_err(io::Error::other)?;
    connection.abort();
    Ok(Answer { status, content_type, body: body.to_bytes().to_vec() })
}
