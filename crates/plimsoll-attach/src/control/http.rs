//! HTTP/1.1 over a Unix socket, as much of it as the VMMs' interfaces speak, with an end to everything.
//!
//! Enters: a method, a path, perhaps a JSON body. Leaves: a status and the answer's body. What must never happen: a wait
//! beyond the deadline, an answer that outgrows its bound, or bytes of one answer taken for the next. So a connection is used
//! again only if its last answer was read to the last byte, it said that it stays, and nothing has arrived since.
use super::error::{ControlError, quote};
use crate::unix::connect_within;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The largest head. These servers send four or five short header lines.
const HEAD_MAX: usize = 16 << 10;
/// The most header lines.
const HEADERS_MAX: usize = 64;
/// The largest body. A description of a machine with all its devices takes some tens of KiB.
const BODY_MAX: usize = 1 << 20;

/// What is to be done with a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Put,
    Patch,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        })
    }
}

/// An answer that was read whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

/// One server and at most one connection to it.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    interface: String,
    patience: Duration,
    kept: Option<UnixStream>,
}

/// One exchange under way.
struct Exchange<'a> {
    interface: &'a str,
    request: String,
    patience: Duration,
    deadline: Instant,
}

/// What the head of an answer says of its body.
struct Head {
    status: u16,
    length: Length,
    is_kept: bool,
    is_json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Length {
    Bytes(usize),
    Chunked,
    UntilClosed,
}

impl Client {
    /// A client of what listens at `socket`; `interface` names it in messages. Nothing is connected yet.
    pub(crate) fn new(socket: PathBuf, interface: String, patience: Duration) -> Self {
        Self { socket, interface, patience, kept: None }
    }

    pub(crate) fn interface(&self) -> &str {
        &self.interface
    }

    /// One request and its answer, whatever its status.
    pub(crate) fn exchange(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, ControlError> {
        let text = body.map(Value::to_string);
        let message = compose(method, path, text.as_deref());
        let exchange = Exchange {
            interface: &self.interface,
            request: format!("{method} {path}"),
            patience: self.patience,
            deadline: Instant::now() + self.patience,
        };
        let mut stream = match self.kept.take().filter(is_quiet) {
            Some(stream) => stream,
            None => exchange.connect(&self.socket)?,
        };
        exchange.send(&mut stream, message.as_bytes())?;
        let (answer, is_kept) = exchange.receive(&mut stream)?;
        self.kept = is_kept.then_some(stream);
        Ok(answer)
    }
}

/// The bytes of a request. A body of no bytes is announced, because PUT without a length is refused by some servers.
fn compose(method: Method, path: &str, body: Option<&str>) -> String {
    let mut message = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
    if let Some(body) = body {
        let length = body.len();
        message += &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}");
    } else if method == Method::Get {
        message += "\r\n";
    } else {
        message += "Content-Length: 0\r\n\r\n";
    }
    message
}

/// True if the other side neither closed the connection nor sent anything that was not asked for.
fn is_quiet(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

impl Exchange<'_> {
    fn connect(&self, socket: &Path) -> Result<UnixStream, ControlError> {
        connect_within(socket, self.left()?).map_err(|source| match source.kind() {
            io::ErrorKind::TimedOut => self.stalled(),
            _ => ControlError::Unreachable { interface: self.interface.to_owned(), source },
        })
    }

    fn send(&self, stream: &mut UnixStream, mut message: &[u8]) -> Result<(), ControlError> {
        while !message.is_empty() {
            stream.set_write_timeout(Some(self.left()?)).map_err(|source| self.lost(Some(source)))?;
            match stream.write(message) {
                Ok(0) => return Err(self.lost(None)),
                Ok(written) => message = &message[written..],
                Err(error) if is_interim(&error) => {}
                Err(error) => return Err(self.lost(Some(error))),
            }
        }
        Ok(())
    }

    /// Reads one answer, and says whether the connection can be used again.
    fn receive(&self, stream: &mut UnixStream) -> Result<(Answer, bool), ControlError> {
        let mut bytes = Vec::new();
        let (head, taken) = loop {
            match self.parse_head(&bytes)? {
                // An interim answer (100 Continue): the real one follows.
                Some((head, taken)) if head.status < 200 => drop(bytes.drain(..taken)),
                Some(found) => break found,
                None if bytes.len() >= HEAD_MAX => {
                    return Err(self.garbage("a head of at most 16 KiB", &bytes));
                }
                None => {
                    if self.read(stream, &mut bytes)? == 0 {
                        return Err(self.lost(None));
                    }
                }
            }
        };
        bytes.drain(..taken);
        let body = match head.length {
            Length::Bytes(length) => self.sized(stream, &mut bytes, length)?,
            Length::Chunked => self.chunked(stream, &mut bytes)?,
            Length::UntilClosed => self.until_closed(stream, &mut bytes)?,
        };
        if !head.is_json && !body.is_empty() {
            return Err(self.garbage("JSON", &body));
        }
        let is_kept = head.is_kept && head.length != Length::UntilClosed && bytes.is_empty();
        Ok((Answer { status: head.status, body }, is_kept))
    }

    /// The head and its size, or `None` while it is incomplete.
    fn parse_head(&self, bytes: &[u8]) -> Result<Option<(Head, usize)>, ControlError> {
        const EXPECTED: &str = "an HTTP/1.1 answer";
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let taken = match response.parse(bytes) {
            Ok(httparse::Status::Complete(taken)) => taken,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(self.garbage(EXPECTED, bytes)),
        };
        let status = response.code.ok_or_else(|| self.garbage(EXPECTED, bytes))?;
        let values = |name: &'static str| {
            let named = response.headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
            named.map(|header| std::str::from_utf8(header.value).unwrap_or_default().trim())
        };
        let says = |name, word: &str| values(name).any(|value| value.eq_ignore_ascii_case(word));
        let length = if status < 200 || status == 204 || status == 304 {
            Length::Bytes(0)
        } else if let Some(coding) = values("transfer-encoding").next() {
            if !coding.eq_ignore_ascii_case("chunked") {
                return Err(self.garbage("a transfer coding we know", coding.as_bytes()));
            }
            Length::Chunked
        } else {
            let mut lengths = values("content-length");
            match lengths.next() {
                // micro_http, the server of both VMMs, gives an answer without a body no length and keeps the connection.
                None if says("connection", "keep-alive") => Length::Bytes(0),
                None => Length::UntilClosed,
                // Two lengths that differ are two readings of where the next answer begins.
                Some(first) if lengths.any(|other| other != first) => {
                    return Err(self.garbage("one content length", bytes));
                }
                Some(first) => match first.parse() {
                    Ok(length) if length <= BODY_MAX => Length::Bytes(length),
                    _ => return Err(self.garbage("a body of at most 1 MiB", first.as_bytes())),
                },
            }
        };
        let is_kept = response.version == Some(1) && !says("connection", "close");
        let is_json = values("content-type").all(|value| {
            value.split(';').next().is_some_and(|media| media.trim().eq_ignore_ascii_case("application/json"))
        });
        Ok(Some((Head { status, length, is_kept, is_json }, taken)))
    }

    fn sized(
        &self,
        stream: &mut UnixStream,
        bytes: &mut Vec<u8>,
        length: usize,
    ) -> Result<Vec<u8>, ControlError> {
        while bytes.len() < length {
            if self.read(stream, bytes)? == 0 {
                return Err(self.lost(None));
            }
        }
        Ok(bytes.drain(..length).collect())
    }

    fn until_closed(&self, stream: &mut UnixStream, bytes: &mut Vec<u8>) -> Result<Vec<u8>, ControlError> {
        while self.read(stream, bytes)? != 0 {
            if bytes.len() > BODY_MAX {
                return Err(self.garbage("a body of at most 1 MiB", bytes));
            }
        }
        Ok(std::mem::take(bytes))
    }

    fn chunked(&self, stream: &mut UnixStream, bytes: &mut Vec<u8>) -> Result<Vec<u8>, ControlError> {
        const EXPECTED: &str = "chunks that together have at most 1 MiB";
        let mut body = Vec::new();
        loop {
            let (taken, length) = match httparse::parse_chunk_size(bytes) {
                Ok(httparse::Status::Complete(found)) => found,
                Ok(httparse::Status::Partial) if bytes.len() < HEAD_MAX => {
                    if self.read(stream, bytes)? == 0 {
                        return Err(self.lost(None));
                    }
                    continue;
                }
                _ => return Err(self.garbage(EXPECTED, bytes)),
            };
            let length = usize::try_from(length).ok().filter(|length| *length <= BODY_MAX - body.len());
            let length = length.ok_or_else(|| self.garbage(EXPECTED, bytes))?;
            bytes.drain(..taken);
            let chunk = self.sized(stream, bytes, length + 2)?;
            // The last chunk is empty; none of these servers sends trailers after it, and one that does is not understood.
            let Some(data) = chunk.strip_suffix(b"\r\n") else { return Err(self.garbage(EXPECTED, &chunk)) };
            if length == 0 {
                return Ok(body);
            }
            body.extend_from_slice(data);
        }
    }

    /// Appends what has arrived; 0 at the end.
    fn read(&self, stream: &mut UnixStream, bytes: &mut Vec<u8>) -> Result<usize, ControlError> {
        let mut piece = [0; 8192];
        loop {
            stream.set_read_timeout(Some(self.left()?)).map_err(|source| self.lost(Some(source)))?;
            match stream.read(&mut piece) {
                Ok(count) => {
                    bytes.extend_from_slice(&piece[..count]);
                    return Ok(count);
                }
                Err(error) if is_interim(&error) => {}
                Err(error) => return Err(self.lost(Some(error))),
            }
        }
    }

    /// The time that is left, never zero.
    fn left(&self) -> Result<Duration, ControlError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.stalled()) } else { Ok(left) }
    }

    fn stalled(&self) -> ControlError {
        ControlError::Stalled {
            interface: self.interface.to_owned(),
            request: self.request.clone(),
            patience: self.patience,
        }
    }

    fn lost(&self, source: Option<io::Error>) -> ControlError {
        let (interface, request) = (self.interface.to_owned(), self.request.clone());
        ControlError::Lost { interface, request, source }
    }

    fn garbage(&self, expected: &'static str, found: &[u8]) -> ControlError {
        ControlError::Garbage {
            interface: self.interface.to_owned(),
            request: self.request.clone(),
            expected,
            found: quote(&String::from_utf8_lossy(&found[..found.len().min(HEAD_MAX)])),
        }
    }
}

/// A time-out or a signal: the deadline decides what they mean.
fn is_interim(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}
