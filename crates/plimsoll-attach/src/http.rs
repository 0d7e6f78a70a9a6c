//! One question over HTTP on a Unix socket, as Firecracker and Cloud Hypervisor answer it: a path enters, a JSON body
//! leaves. Only GET: nothing here changes a machine.

use crate::unix::{connect_within, is_timeout, limit_to};
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest wait for the whole.
const LIMIT: Duration = Duration::from_secs(3);
/// The longest answer; vm.info of a large machine has some KiB.
const ANSWER_MAX: u64 = 1 << 20;
const HEADERS_MAX: usize = 32;

/// The API did not answer, or not with what was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The socket could not be used.
    #[error("cannot ask {socket:?}: check that it is the API socket of this machine")]
    Transfer {
        /// The socket.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("{socket:?} has not answered GET {path} for {limit:?}")]
    Stalled {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        path: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The answer is an error.
    #[error("{socket:?} answers GET {path} with status {status}")]
    Status {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        path: &'static str,
        /// The status.
        status: u16,
    },
    /// The answer is not what was asked for.
    #[error("the answer of {socket:?} to GET {path} makes no sense: {why}")]
    Garbage {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        path: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// Asks and reads the body as JSON.
pub(crate) fn get<T: DeserializeOwned>(socket: &Path, path: &'static str) -> Result<T, HttpError> {
    let answer = exchange(socket, path).map_err(|source| {
        let socket = socket.to_owned();
        match is_timeout(&source) {
            true => HttpError::Stalled { socket, path, limit: LIMIT },
            false => HttpError::Transfer { socket, source },
        }
    })?;
    let garbage = |why: String| HttpError::Garbage { socket: socket.to_owned(), path, why };
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let status = response.parse(&answer).map_err(|error| garbage(error.to_string()))?;
    let (httparse::Status::Complete(head), Some(code)) = (status, response.code) else {
        return Err(garbage("it ends before its head does".to_owned()));
    };
    if code != 200 {
        return Err(HttpError::Status { socket: socket.to_owned(), path, status: code });
    }
    serde_json::from_slice(&answer[head..]).map_err(|error| garbage(error.to_string()))
}

/// Sends the request and reads until the answer is complete by its Content-Length: the VMMs keep connections open.
fn exchange(socket: &Path, path: &str) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + LIMIT;
    let mut stream = connect_within(socket, LIMIT)?;
    limit_to(&stream, deadline)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut bytes = [0; 4096];
    while !is_complete(&answer) {
        limit_to(&stream, deadline)?;
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if u64::try_from(answer.len()).is_ok_and(|length| length > ANSWER_MAX) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer has no end"));
        }
    }
    Ok(answer)
}

/// True when head and body are there; what does not parse is left to the caller.
fn is_complete(answer: &[u8]) -> bool {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(answer) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return false,
        Err(_) => return true,
    };
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length =
        length.and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse::<usize>().ok());
    length.is_none_or(|length| answer.len() - head >= length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_complete_when_its_body_is_there() {
        let whole = b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}";
        assert!(is_complete(whole));
        for end in 0..whole.len() {
            assert!(!is_complete(&whole[..end]), "{end}");
        }
        assert!(is_complete(b"not HTTP at all\r\n\r\n"));
        assert!(is_complete(b"HTTP/1.1 204 No Content\r\n\r\n"));
    }
}
