//! An object's encoded bytes, wherever they are.
//!
//! Enters: a handle. Leaves: the object, ready to be unpacked. What must never happen: a page given up because its bytes moved
//! while they were read, or another object's bytes taken for its. So it is looked first in which writing the segment is, then whether
//! the record still names the place: while it does, the segment is not written again, and only bytes of that writing are accepted. After
//! a read that failed all is asked once more.
//!
//! A [`Fetch`] goes on when what it waits for has come, and begins from the record each time: meanwhile the object may have been moved,
//! brought back or released.
use super::reader::Wanted;
use super::tier::{ReadError, Tier};
use super::window::Window;
use crate::uffd::host::Domain;
use plimsoll_store::{Fetched, GetError, Handle, Remote, SlabMemory, Whereabouts};
use std::io;
use thiserror::Error;

/// An object could not be fetched. Its page is lost, unless this was the disk's passing mood.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The store has no such object.
    #[error(transparent)]
    Store(#[from] GetError),
    /// Its bytes could not be read.
    #[error(transparent)]
    Disk(#[from] ReadError),
    /// Its bytes are on a disk that is not there.
    #[error("its bytes are on a disk tier, and this manager has none")]
    NoTier,
}

/// How far a fetch has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The object is there.
    Here,
    /// That read has to end first, which another has asked for.
    Waits(u64),
    /// This read has to be made first.
    Wants(Wanted),
}

/// One object on its way. See the file's head.
#[derive(Debug)]
pub struct Fetch {
    handle: Handle,
    /// Where it was looked for last, in which writing, and which number the window's reads had come to by then: what was read before
    /// may be older than the writing.
    tried: Option<(Remote, Option<u64>, u64)>,
    failed: Option<ReadError>,
    /// The read that it waits for, and where of the disk it is.
    waits: Option<Wanted>,
}

impl Fetch {
    /// A fetch of an object.
    pub const fn new(handle: Handle) -> Self {
        Self { handle, tried: None, failed: None, waits: None }
    }

    /// Which object it fetches.
    pub const fn handle(&self) -> Handle {
        self.handle
    }

    /// Goes on as far as that is possible without waiting.
    ///
    /// # Errors
    /// [`FetchError`].
    pub fn go_on<M: SlabMemory>(
        &mut self,
        domain: &Domain<M>,
        tier: Option<&Tier>,
        into: &mut Fetched,
        window: &mut Window,
    ) -> Result<Progress, FetchError> {
        loop {
            let handle = self.handle;
            let Whereabouts::Away(remote) = domain.store(|store| store.fetch(handle, into))? else {
                return Ok(Progress::Here);
            };
            let tier = tier.ok_or(FetchError::NoTier)?;
            // Moved away and back it would be in the same place, but not in the same writing of its segment.
            let writing = tier.writing(remote);
            if domain.store(|store| store.fetch(handle, into))? != Whereabouts::Away(remote) {
                continue;
            }
            let same = self.tried.filter(|(tried, then, _)| (*tried, *then) == (remote, writing));
            if let Some(error) = self.failed.take()
                && same.is_some()
            {
                return Err(error.into());
            }
            let (.., since) = *self.tried.insert(same.unwrap_or((remote, writing, window.next)));
            match tier.look(domain.id, remote, writing, since, into.room(), window) {
                Ok(progress) => {
                    self.waits = if let Progress::Wants(wanted) = progress { Some(wanted) } else { None };
                    return Ok(progress);
                }
                Err(error) => self.failed = Some(error),
            }
        }
    }

    /// The read that it asked for has failed. That of another is no concern of its: it asks for one of its own.
    pub fn fail(&mut self, source: io::Error) {
        if let Some(Wanted { offset, .. }) = self.waits.take() {
            self.failed = Some(ReadError::Failed { offset, source });
        }
    }
}

/// Fetches an object out of a domain's store, and its bytes from the disk where they are there, which is waited for.
///
/// # Errors
/// [`FetchError`].
pub fn fetch<M: SlabMemory>(
    domain: &Domain<M>,
    tier: Option<&Tier>,
    handle: Handle,
    into: &mut Fetched,
    window: &mut Window,
) -> Result<(), FetchError> {
    let mut fetch = Fetch::new(handle);
    loop {
        match fetch.go_on(domain, tier, into, window)? {
            Progress::Here => return Ok(()),
            Progress::Wants(wanted) => {
                let came = tier.ok_or(FetchError::NoTier)?.read_now(wanted);
                if let Err(error) = window.came(wanted.ticket, came) {
                    fetch.fail(error);
                }
            }
            // Of a window that somebody else's reads fill, who is not waited for here.
            Progress::Waits(_) => return Err(ReadError::Nothing.into()),
        }
    }
}
