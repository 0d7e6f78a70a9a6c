//! References to stored pages that are given back.
//!
//! Enters: handles. Leaves: records that are free, and places on the disk that nobody needs. What must never happen: a place
//! given up because a damaged record named it. Whoever counted there would free a segment that others need, one object too
//! early. So the place of an object that could not be read is left alone: what it takes stays taken until a manager counts anew.
use super::tier::Tier;
use crate::uffd::host::Domain;
use plimsoll_store::{Handle, SlabMemory};

/// Gives a reference back. A stale or damaged object has none left: reading it has told, or would have.
pub fn release<M: SlabMemory>(domain: &Domain<M>, tier: Option<&Tier>, handle: Handle) {
    let released = domain.store(|store| store.release(handle));
    if let (Ok(Some(remote)), Some(tier)) = (released, tier) {
        tier.forget(domain.id, remote);
    }
}

/// The same for a page that is lost, because what its record names is not it.
pub fn abandon<M: SlabMemory>(domain: &Domain<M>, handle: Handle) {
    let _ = domain.store(|store| store.release(handle));
}
