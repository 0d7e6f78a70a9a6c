//! Lines over a socket that QEMU connects to, with a deadline on every wait.
//!
//! Enters: a path to listen at. Leaves: lines. What must never happen: a wait without end, or one for a machine that has
//! already ended; nor a line lost because its second half came after a deadline.
use plimsoll_sys::pidfd::Pidfd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// The shortest wait a socket can be asked for.
const INSTANT: Duration = Duration::from_millis(1);

/// How long a line may wait to be taken. Sockets hold thousands of them, so this is one nobody reads from any more.
const WRITE_PATIENCE: Duration = Duration::from_secs(60);

/// What became of a wait.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Nothing came.
    #[error("nothing was said in time")]
    Silent,
    /// The other side is gone.
    #[error("the machine has ended")]
    Closed,
    /// Something else.
    #[error("the socket failed")]
    Socket(#[from] io::Error),
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: BufReader<UnixStream>,
    partial: Vec<u8>,
}

impl Wire {
    /// Takes the connection that a process makes, unless that ends before.
    pub(crate) fn accept(
        listener: &UnixListener,
        process: &Pidfd,
        deadline: Instant,
    ) -> Result<Self, WireError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let descriptor = process.as_fd();
            let mut polled =
                [PollFd::new(listener, PollFlags::IN), PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => return Err(WireError::Silent),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(WireError::Socket(errno.into())),
                Ok(_) if polled[0].revents().contains(PollFlags::IN) => break,
                Ok(_) => return Err(WireError::Closed),
            }
        }
        let (stream, _) = listener.accept()?;
        stream.set_write_timeout(Some(WRITE_PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream), partial: Vec::new() })
    }

    /// Says a line.
    pub(crate) fn say(&mut self, line: &str) -> Result<(), WireError> {
        match self.stream.get_mut().write_all(format!("{line}\n").as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(WireError::Closed),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(WireError::Silent),
            done => Ok(done?),
        }
    }

    /// The next line, without its end.
    pub(crate) fn next(&mut self, deadline: Instant) -> Result<String, WireError> {
        let left = deadline.saturating_duration_since(Instant::now()).max(INSTANT);
        self.stream.get_ref().set_read_timeout(Some(left))?;
        match self.stream.read_until(b'\n', &mut self.partial) {
            Ok(_) if self.partial.pop_if(|byte| *byte == b'\n').is_some() => {
                let line = String::from_utf8_lossy(&self.partial).trim_end().to_owned();
                self.partial.clear();
                Ok(line)
            }
            Ok(_) => Err(WireError::Closed),
            // What has come of the line is kept.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(WireError::Silent),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(WireError::Closed),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::ProcessId;

    #[test]
    fn a_line_in_two_halves_is_one_line_and_silence_has_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut other = UnixStream::connect(&path).unwrap();
        let own = Pidfd::open(ProcessId::own()).unwrap();
        let soon = || Instant::now() + Duration::from_millis(50);
        let mut wire = Wire::accept(&listener, &own, soon()).unwrap();
        other.write_all(b"hel").unwrap();
        assert!(matches!(wire.next(soon()), Err(WireError::Silent)));
        other.write_all(b"lo\r\nagain\nrest").unwrap();
        assert_eq!(wire.next(soon()).unwrap(), "hello");
        assert_eq!(wire.next(soon()).unwrap(), "again");
        drop(other);
        assert!(matches!(wire.next(soon()), Err(WireError::Closed)));
        assert!(matches!(Wire::accept(&listener, &own, soon()), Err(WireError::Silent)));
    }

    #[test]
    fn nobody_waits_for_a_process_that_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pidfd = Pidfd::open(ProcessId::new(child.id()).unwrap()).unwrap();
        let outcome = Wire::accept(&listener, &pidfd, Instant::now() + Duration::from_secs(60));
        assert!(matches!(outcome, Err(WireError::Closed)), "{outcome:?}");
        child.wait().unwrap();
    }
}
