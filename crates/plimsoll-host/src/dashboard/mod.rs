//! The dashboard: a page for a browser on this host, and what of the API it needs.
//!
//! Enters: requests on a port of the loop-back interface, which every user of the host can reach, and every page their browsers have
//! open. Leaves: the page, which is the same for all and says nothing; and to whoever has the token of this run, answers of the daemon.
//! What must never happen: an answer to anybody else, or a request passed on that the page does not make. So
//!
//! * the token is in the fragment of the address, which browsers send to nobody, and comes back in a header, which no other page may
//!   set: a cookie would go to every port of this host, also to those of other users;
//! * `Host` must be the address itself, else a name that an attacker has point here would make their page one of ours; where `Origin` and
//!   `Sec-Fetch-Site` are sent, they must say that the page is ours; no answer allows another origin;
//! * requests are those of `is_passed_on`: to look, and to change settings. Nothing can be attached to, released or given to disk.
//!
//! It is a process of its own, a client of the daemon as others are: the daemon has no network interface, and this one ends with whoever
//! started it.
use crate::api::client::Client;
use crate::api::{Code, Fault};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use plimsoll_linux::explain;
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use subtle::ConstantTimeEq;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

/// Bytes of a token.
const TOKEN_SIZE: usize = 32;
/// Connections at the same time; a browser opens six.
const CLIENTS_MAX: usize = 32;
/// Requests that may wait for the daemon at the same time.
const ASKING_MAX: usize = 8;
/// How long a client may take for a request's head, and be idle between two; and for a body.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest head, and the largest body.
const HEAD_MAX: usize = 16 << 10;
const BODY_MAX: usize = 64 << 10;
/// After a failed accept.
const PAUSE: Duration = Duration::from_millis(100);

/// What the page consists of. Nothing of it is anybody's data.
const FILES: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("index.html")),
    ("/style.css", "text/css; charset=utf-8", include_str!("style.css")),
    ("/app.js", "text/javascript; charset=utf-8", include_str!("app.js")),
    ("/icon.svg", "image/svg+xml", include_str!("icon.svg")),
];

/// What every answer says: the page loads what is ours and nothing else, is in nobody's frame, and stays in no cache.
const HEADERS: [(HeaderName, &str); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

/// The dashboard cannot be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DashboardError {
    /// Others than this host's users could reach it.
    #[error(
        "{address} is not of the loop-back interface: use 127.0.0.1 or [::1], and `ssh -L` from elsewhere"
    )]
    NotHere {
        /// Where it was to listen.
        address: SocketAddr,
    },
    /// It cannot listen there.
    #[error("the dashboard cannot listen on {address}")]
    Listen {
        /// Where it was to listen.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no thread, or no randomness.
    #[error("the dashboard cannot be started")]
    Start(#[source] io::Error),
}

/// A served dashboard. It ends when this is dropped.
#[derive(Debug)]
pub struct Dashboard {
    url: String,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Site {
    client: Client,
    token: String,
    /// How this address is written in `Host`.
    hosts: [String; 2],
    asking: Semaphore,
}

impl Dashboard {
    /// Serves one at `address`, port 0 being any that is free, for the daemon of `client`.
    ///
    /// # Errors
    /// [`DashboardError`].
    pub fn start(address: SocketAddr, client: Client) -> Result<Self, DashboardError> {
        if !address.ip().is_loopback() {
            return Err(DashboardError::NotHere { address });
        }
        let failed = |source| DashboardError::Listen { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let token = token().map_err(DashboardError::Start)?;
        let url = format!("http://{address}/#{token}");
        let hosts = [address.to_string(), format!("localhost:{}", address.port())];
        let site = Arc::new(Site { client, token, hosts, asking: Semaphore::new(ASKING_MAX) });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(ASKING_MAX)
            .build()
            .map_err(DashboardError::Start)?;
        let (end, ended) = oneshot::channel::<()>();
        let run = move || {
            runtime.block_on(async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                tokio::select! {
                    () = accept(listener, site) => {}
                    _ = ended => {}
                }
            });
            // A thread that waits for the daemon is not waited for.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("dashboard".to_owned()).spawn(run);
        Ok(Self { url, end: Some(end), thread: Some(thread.map_err(DashboardError::Start)?) })
    }

    /// The address to open, with the token. Whoever has it may do what the page can.
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A new token, in hexadecimal digits.
fn token() -> io::Result<String> {
    let mut bytes = [0; TOKEN_SIZE];
    let read = getrandom(&mut bytes, GetRandomFlags::empty())?;
    if read < TOKEN_SIZE {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

async fn accept(listener: TcpListener, site: Arc<Site>) {
    let service = Router::new().fallback(answer).with_state(site);
    let clients = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        // Those beyond the limit wait in the kernel's queue.
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let service = TowerToHyperService::new(service.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(HEAD_MAX);
            // A client that breaks off is its own affair.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(State(site): State<Arc<Site>>, request: Request) -> Response {
    let mut response = match site.answer(request).await {
        Ok(response) => response,
        Err(fault) => fault.into_response(),
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

impl Site {
    async fn answer(&self, request: Request) -> Result<Response, Fault> {
        self.is_our_page(request.headers())?;
        let (path, method) = (request.uri().path(), request.method());
        if let Some((_, kind, text)) = FILES.iter().find(|(file, ..)| *file == path)
            && method == Method::GET
        {
            return Ok(([(header::CONTENT_TYPE, *kind)], *text).into_response());
        }
        if !is_passed_on(method, path) {
            return Err(Fault::new(Code::NotFound, "the dashboard does not do that")
                .help("use the command line, or the daemon's own socket"));
        }
        self.is_known(request.headers())?;
        self.pass_on(request).await
    }

    /// Whether a browser asks for a page of ours, and by our address.
    fn is_our_page(&self, headers: &HeaderMap) -> Result<(), Fault> {
        let all = |name: HeaderName| headers.get_all(name).iter();
        let is_host = |value: &HeaderValue| self.hosts.iter().any(|host| value == host);
        let is_origin = |value: &HeaderValue| {
            value
                .to_str()
                .ok()
                .and_then(|value| value.strip_prefix("http://"))
                .is_some_and(|host| self.hosts.iter().any(|own| own == host))
        };
        let site = HeaderName::from_static("sec-fetch-site");
        let is_asked_here = all(header::HOST).count() == 1 && all(header::HOST).all(is_host);
        let is_same_site = all(site).all(|value| value == "same-origin" || value == "none");
        if is_asked_here && is_same_site && all(header::ORIGIN).all(is_origin) {
            return Ok(());
        }
        Err(Fault::new(Code::Forbidden, "this is asked by another name, or by another page")
            .help("open the address that `plimsoll dashboard` has printed"))
    }

    /// Whether the asker has the token.
    fn is_known(&self, headers: &HeaderMap) -> Result<(), Fault> {
        let said =
            headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let is_known = said.is_some_and(|said| bool::from(said.ct_eq(self.token.as_bytes())));
        is_known.then_some(()).ok_or_else(|| {
            Fault::new(Code::Forbidden, "the token is missing, or is not that of this dashboard")
                .help("open the address that `plimsoll dashboard` has printed last")
        })
    }

    async fn pass_on(&self, request: Request) -> Result<Response, Fault> {
        let _asking =
            self.asking.acquire().await.map_err(|_| Fault::new(Code::Busy, "the dashboard ends"))?;
        let (parts, body) = request.into_parts();
        let body = tokio::time::timeout(PATIENCE, to_bytes(body, BODY_MAX)).await;
        let body = body
            .map_err(|_| Fault::new(Code::BadRequest, "the body does not arrive"))?
            .map_err(|error| Fault::new(Code::TooLarge, format!("the body cannot be read: {error}")))?;
        let kind =
            parts.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).map(str::to_owned);
        let client = self.client.clone();
        let asked = tokio::task::spawn_blocking(move || {
            let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
            let headers: Vec<(&str, &str)> = kind.iter().map(|kind| ("content-type", &**kind)).collect();
            client.exchange(parts.method.as_str(), target, &headers, body.to_vec())
        });
        let answer = asked.await.map_err(|error| Fault::new(Code::Failed, error.to_string()))?;
        let answer = answer.map_err(|error| Fault::new(Code::Busy, explain(&error)))?;
        let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
        let kind = HeaderValue::from_str(&answer.content_type)
            .unwrap_or(HeaderValue::from_static("application/octet-stream"));
        Ok((status, [(header::CONTENT_TYPE, kind)], Body::from(answer.body)).into_response())
    }
}

/// What of the API the page uses.
fn is_passed_on(method: &Method, path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    match parts[..] {
        ["v1", "host" | "machines"] | ["v1", "host", "line"] => method == Method::GET,
        ["v1", "machines", _] => method == Method::GET || method == Method::PATCH,
        ["v1", "machines", _, "why" | "history" | "map"] => method == Method::GET,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_page_does_not_do_is_not_passed_on() {
        for (method, path, expected) in [
            (Method::GET, "/v1/host", true),
            (Method::GET, "/v1/machines/web/map", true),
            (Method::PATCH, "/v1/machines/web", true),
            (Method::DELETE, "/v1/machines/web", false),
            (Method::POST, "/v1/machines", false),
            (Method::PUT, "/v1/host/budget", false),
            (Method::POST, "/v1/machines/web/reclaim", false),
            (Method::GET, "/v1/events", false),
            (Method::GET, "/metrics", false),
            (Method::GET, "v1/host", false),
        ] {
            assert_eq!(is_passed_on(&method, path), expected, "{method} {path}");
        }
    }

    #[test]
    fn a_token_is_new_each_time() {
        let [one, other] = [(); 2].map(|()| token().unwrap());
        assert_eq!((one.len(), other.len()), (2 * TOKEN_SIZE, 2 * TOKEN_SIZE));
        assert_ne!(one, other);
    }
}
