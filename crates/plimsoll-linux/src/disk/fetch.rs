//! An object's encoded bytes, wherever they are.
//!
//! Enters: a handle. Leaves: the object, ready to be unpacked. What must never happen: a page given up because its bytes moved
//! while they were read, or another object's bytes taken for its. So it is looked first in which writing the segment is, then whether
//! the record still names the place: while it does, the segment is not written again, and only bytes of that writing are accepted. After
//! a read that failed all is asked once more.
use super::tier::{ReadError, Tier};
use super::window::Window;
use crate::uffd::host::Domain;
use plimsoll_store::{Fetched, GetError, Handle, Remote, SlabMemory, Whereabouts};
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

/// Fetches an object out of a domain's store, and its bytes from the disk where they are there.
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
    let mut failed: Option<(Remote, Option<u64>, ReadError)> = None;
    loop {
        let Whereabouts::Away(remote) = domain.store(|store| store.fetch(handle, into))? else {
            return Ok(());
        };
        let tier = tier.ok_or(FetchError::NoTier)?;
        // Moved away and back it would be in the same place, but not in the same writing of its segment.
        let writing = tier.writing(remote);
        if domain.store(|store| store.fetch(handle, into))? != Whereabouts::Away(remote) {
            continue;
        }
        if let Some((tried, then, error)) = failed.take()
            && (tried, then) == (remote, writing)
        {
            return Err(error.into());
        }
        match tier.read(domain.id, remote, writing, into.room(), window) {
            Ok(()) => return Ok(()),
            Err(error) => failed = Some((remote, writing, error)),
        }
    }
}
