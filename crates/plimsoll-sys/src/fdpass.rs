//! Messages with file descriptors over Unix sockets. Bytes and descriptors enter on one side and leave on the other,
//! or an error does: a message cut short is never taken for a whole one, and no descriptor that arrived with it
//! stays open.
//!
//! On a SEQPACKET socket a call sends or receives one message. On a stream socket the kernel attaches descriptors to
//! the first byte sent with them and never joins data across them; a short send or receive is possible and the
//! caller's protocol has to frame its data.
#![expect(unsafe_code, reason = "SO_PEERCRED, SO_PEERGROUPS and SO_PEERPIDFD are read with getsockopt")]

use crate::ProcessId;
use crate::pidfd::Pidfd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    socket_with, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// The kernel's limit of descriptors in a message (SCM_MAX_FD).
pub const MAX_DESCRIPTORS: usize = 253;

/// `SO_PEERPIDFD` (since Linux 6.5), which libc lacks.
const SO_PEERPIDFD: libc::c_int = 77;

/// A message could not be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The message has no bytes; its receiver could not tell it from the end of the connection.
    #[error("an empty message cannot be told from a closed connection: send at least one byte")]
    Empty,
    /// More descriptors than fit in a message.
    #[error("{count} descriptors in one message: the kernel allows {MAX_DESCRIPTORS}")]
    TooManyDescriptors {
        /// How many there were.
        count: usize,
    },
    /// The socket's buffer is full.
    #[error("the socket's buffer is full: wait until it is writable")]
    WouldBlock,
    /// The peer has closed the connection.
    #[error("the peer has closed the connection")]
    Closed,
    /// Something else failed.
    #[error("sending on a unix socket failed")]
    Other(#[source] io::Error),
}

/// A message could not be received. Descriptors that came with it are closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// The message was longer than the buffer; its rest is lost.
    #[error("the peer's message is longer than the {room} bytes expected")]
    BytesTruncated {
        /// How many bytes there was room for.
        room: usize,
    },
    /// The peer sent more descriptors than there was room for.
    #[error("the peer's message brings more than the {room} descriptors expected")]
    DescriptorsTruncated {
        /// How many there was room for.
        room: usize,
    },
    /// There is no message yet.
    #[error("no message yet: wait until the socket is readable")]
    WouldBlock,
    /// The buffer has no room for even one byte.
    #[error("an empty buffer cannot receive a message")]
    NoRoom,
    /// The connection was torn down.
    #[error("the connection was reset by the peer")]
    Reset,
    /// Something else failed.
    #[error("receiving from a unix socket failed")]
    Other(#[source] io::Error),
}

/// What a message brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes at the start of the buffer.
    pub bytes: usize,
    /// Descriptors, close-on-exec, in the sender's order. What they are is unchecked.
    pub descriptors: Vec<OwnedFd>,
}

/// Who is on the other side, as the kernel recorded it when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// The process, unless it lives outside this process-id namespace.
    pub process: Option<ProcessId>,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

/// Sends bytes, at least one, with descriptors. Returns how many bytes were sent: all of them on SEQPACKET. The
/// descriptors always go with the first byte. Never raises SIGPIPE.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, SendError> {
    if bytes.is_empty() {
        return Err(SendError::Empty);
    }
    let count = descriptors.len();
    if count > MAX_DESCRIPTORS {
        return Err(SendError::TooManyDescriptors { count });
    }
    let mut space = vec![MaybeUninit::uninit(); control_len(count)];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if count > 0 && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(SendError::TooManyDescriptors { count });
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => return Ok(sent),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(SendError::WouldBlock),
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(SendError::Closed),
            Err(errno) => return Err(SendError::Other(errno.into())),
        }
    }
}

/// Receives bytes and at most `max_descriptors` descriptors, or `None` when the peer has closed the connection.
pub fn recv(
    socket: impl AsFd,
    bytes: &mut [u8],
    max_descriptors: usize,
) -> Result<Option<Received>, RecvError> {
    if bytes.is_empty() {
        return Err(RecvError::NoRoom);
    }
    let room = bytes.len();
    let max_descriptors = max_descriptors.min(MAX_DESCRIPTORS);
    let mut space = vec![MaybeUninit::uninit(); control_len(max_descriptors)];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(RecvError::WouldBlock),
            Err(Errno::CONNRESET) => return Err(RecvError::Reset),
            Err(errno) => return Err(RecvError::Other(errno.into())),
        }
    };
    // First of all own what came, so that every way out below closes it.
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    // The control buffer is rounded up and can take a descriptor more than asked for: count, too.
    if message.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > max_descriptors {
        return Err(RecvError::DescriptorsTruncated { room: max_descriptors });
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(RecvError::BytesTruncated { room });
    }
    if message.bytes == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    Ok(Some(Received { bytes: message.bytes, descriptors }))
}

/// Room for the control message of that many descriptors (rustix adds what alignment needs).
fn control_len(descriptors: usize) -> usize {
    if descriptors == 0 { 0 } else { rustix::cmsg_space!(ScmRights(descriptors)) }
}

/// Who connected, listened, or made the pair.
pub fn peer_credentials(socket: impl AsFd) -> io::Result<PeerCredentials> {
    let mut raw = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let expected = size_of::<libc::ucred>();
    let mut len = libc::socklen_t::try_from(expected).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes, the size of `raw`, whose fields are integers. (rustix has this
    // call too, with a process id that must not be 0; a peer outside our process-id namespace has 0.)
    let status = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut raw).cast(),
            &raw mut len,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    if usize::try_from(len) != Ok(expected) || raw.uid == u32::MAX {
        return Err(io::Error::new(io::ErrorKind::NotConnected, "the socket has no peer credentials"));
    }
    let process = u32::try_from(raw.pid).ok().and_then(ProcessId::new);
    Ok(PeerCredentials { process, uid: raw.uid, gid: raw.gid })
}

/// The supplementary groups of whoever connected, listened, or made the pair, as they were then. Its effective group is in
/// [`peer_credentials`].
///
/// # Errors
/// Those of `getsockopt(SO_PEERGROUPS)`.
pub fn peer_groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    // Most users are in fewer; the kernel says how much room the others need.
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut len = libc::socklen_t::try_from(size_of_val(&*groups)).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `len` bytes, the size of the elements that `groups` has, which are integers.
        let status = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let count = usize::try_from(len).map_err(io::Error::other)? / size_of::<libc::gid_t>();
        let error = io::Error::last_os_error();
        match status {
            0 => {
                groups.truncate(count);
                return Ok(groups);
            }
            _ if error.raw_os_error() == Some(libc::ERANGE) && count > groups.len() => {
                groups.resize(count, 0)
            }
            _ => return Err(error),
        }
    }
}

/// True when nobody has the other end of a socket any more.
pub fn is_hung_up(socket: impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&socket, PollFlags::RDHUP)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// The process that connected, held from the moment it did: its id cannot have become another's.
pub fn peer_pidfd(socket: impl AsFd) -> io::Result<Pidfd> {
    let process = peer_credentials(&socket)?.process;
    let process = process.ok_or_else(|| io::Error::other("the peer has no process id here"))?;
    let mut number: RawFd = -1;
    let mut len = libc::socklen_t::try_from(size_of::<RawFd>()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes, the size of `number`, which is an integer.
    let status = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut number).cast(),
            &raw mut len,
        )
    };
    if status != 0 || number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for the caller, and nobody else knows its number.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    Pidfd::adopt(fd, process).map_err(io::Error::other)
}

/// Two connected SEQPACKET sockets, close-on-exec, blocking.
pub fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// A SEQPACKET socket, close-on-exec and blocking, connected to the one that listens at `path`.
pub fn seqpacket_connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
