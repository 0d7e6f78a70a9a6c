//! The manager's side of the keeper's socket.
//!
//! Enters: the socket. Leaves: what is kept, once; then requests, each answered before the next. A keeper that is gone
//! is an error of the request, and of [`Client::is_alone`] from then on.
use super::protocol::{LISTING_MAX, LISTING_SIZE, REQUEST_SIZE, Request, Status, decode_listing};
use parking_lot::Mutex;
use plimsoll_linux::uffd::estate::Keep;
use plimsoll_sys::fdpass;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// A manager's keeper.
#[derive(Debug)]
pub struct Client {
    /// Locked from a request to its answer.
    socket: Mutex<OwnedFd>,
    /// The same socket, to be waited for.
    watched: OwnedFd,
    slots: u32,
}

impl Client {
    /// Asks for everything that is kept.
    ///
    /// # Errors
    /// When the keeper is gone, or what it says makes no sense.
    pub fn connect(socket: OwnedFd) -> io::Result<(Self, BTreeMap<u32, OwnedFd>)> {
        fdpass::send(&socket, &Request::List.encode(), &[]).map_err(io::Error::other)?;
        let mut kept = BTreeMap::new();
        let mut bytes = [0; LISTING_SIZE];
        loop {
            let received = fdpass::recv(&socket, &mut bytes, LISTING_MAX).map_err(io::Error::other)?;
            let received = received.ok_or_else(gone)?;
            let count = received.descriptors.len();
            let (slots, listed) = bytes
                .get(..received.bytes)
                .and_then(|bytes| decode_listing(bytes, count))
                .ok_or_else(|| io::Error::other("the keeper's listing makes no sense"))?;
            kept.extend(listed.into_iter().zip(received.descriptors));
            if count < LISTING_MAX {
                let watched = socket.try_clone()?;
                return Ok((Self { socket: Mutex::new(socket), watched, slots }, kept));
            }
        }
    }

    /// Tells the keeper that what it kept is served.
    ///
    /// # Errors
    /// When it is gone.
    pub fn serving(&self) -> io::Result<()> {
        self.tell(Request::Serving)
    }

    /// Tells the keeper that this manager was told to stop and goes on.
    ///
    /// # Errors
    /// When it is gone.
    pub fn staying(&self) -> io::Result<()> {
        self.tell(Request::Staying)
    }

    /// Says something that is not answered.
    fn tell(&self, request: Request) -> io::Result<()> {
        fdpass::send(&*self.socket.lock(), &request.encode(), &[]).map_err(io::Error::other).map(drop)
    }

    /// True once the keeper is gone: what this process holds is all there is.
    pub fn is_alone(&self) -> bool {
        fdpass::is_hung_up(&self.watched)
    }

    fn ask(&self, request: Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = self.socket.lock();
        fdpass::send(&*socket, &request.encode(), descriptors).map_err(io::Error::other)?;
        let mut bytes = [0; REQUEST_SIZE];
        let received = fdpass::recv(&*socket, &mut bytes, 0).map_err(io::Error::other)?.ok_or_else(gone)?;
        match bytes.get(..received.bytes).and_then(Status::decode) {
            Some((Status::Done, _)) => Ok(()),
            Some((Status::Refused, _)) => Err(io::Error::other(format!("the keeper refused to {request:?}"))),
            Some((Status::Unheard, _)) => Err(io::Error::other(
                "the supervisor at NOTIFY_SOCKET does not listen, and what is not stored is not kept: try again when it does",
            )),
            None => Err(io::Error::other("the keeper's answer makes no sense")),
        }
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the keeper is gone")
}

impl Keep for Client {
    fn keep(&self, slot: u32, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.ask(Request::Keep(slot), &[descriptor])
    }

    fn let_go(&self, slot: u32) -> io::Result<()> {
        self.ask(Request::LetGo(slot), &[])
    }

    fn slots(&self) -> u32 {
        self.slots
    }
}
