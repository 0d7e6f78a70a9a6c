//! The inspection socket: how tools look into a running machine that somebody else has started.
//!
//! Enters: connections, and JSON lines that ask for a vCPU's registers, or that all stand still meanwhile ([`Command::Registers`],
//! [`Command::Hold`], [`Command::Release`]; no other is obeyed). Leaves: a first line that says where the machine's memory is
//! ([`Event::Started`]), [`Event::Registers`], [`Event::Held`] and [`Event::Released`], [`Event::Error`]. The socket is made before
//! rights are given up, so that it is its maker's, and nobody else may connect (0600). What must never happen: the machine's main
//! thread waiting for a client: one that does not read what it asked for is left, and there is one at a time.
use crate::control::{Command, Control, Event};
use rustix::net::{SendFlags, SocketFlags};
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Who may look into the machine, and who does.
#[derive(Debug, Default)]
pub(crate) struct Inspection {
    listener: Option<UnixListener>,
    client: Option<Control>,
}

impl Inspection {
    /// Listens at `path`, for its owner alone.
    pub(crate) fn listen(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: Some(listener), client: None })
    }

    /// What is to be waited for: a client, or what the client says.
    pub(crate) fn watched(&self) -> Option<BorrowedFd<'_>> {
        match &self.client {
            Some(client) => Some(client.as_fd()),
            None => self.listener.as_ref().map(AsFd::as_fd),
        }
    }

    /// Whether there is a client.
    pub(crate) fn is_open(&self) -> bool {
        self.client.is_some()
    }

    /// Takes a client in, or what it says that it may.
    pub(crate) fn serve(&mut self, started: &Event) -> Vec<Command> {
        let Some(client) = &mut self.client else {
            let accepted = self
                .listener
                .as_ref()
                .map(|listener| rustix::net::accept_with(listener, SocketFlags::CLOEXEC));
            if let Some(Ok(socket)) = accepted {
                self.client = Some(Control::new(socket));
                self.send(started);
            }
            return Vec::new();
        };
        let Ok(received) = client.receive() else {
            self.client = None;
            return Vec::new();
        };
        for message in received.errors {
            self.send(&Event::Error { message });
        }
        let mut asked = Vec::new();
        for command in received.commands {
            match command {
                Command::Registers { .. } | Command::Hold | Command::Release => asked.push(command),
                _ => self.send(&Event::Error {
                    message: "this socket shows registers, and holds and releases the vCPUs".to_owned(),
                }),
            }
        }
        if received.closed {
            self.client = None;
        }
        asked
    }

    /// Tells the client, if there is one that listens.
    pub(crate) fn send(&mut self, event: &Event) {
        let Some(client) = &self.client else { return };
        let Ok(mut line) = serde_json::to_vec(event) else { return };
        line.push(b'\n');
        let sent = rustix::net::send(client.as_fd(), &line, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        if sent != Ok(line.len()) {
            self.client = None;
        }
    }
}
