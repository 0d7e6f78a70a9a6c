//! What is kept for machines that could not be put together.
//!
//! Enters: stores of which not every page word could be read, each object of them with a reference more. Leaves: these references, once
//! all machines that may have had such words have ended. What must never happen: an object that goes while one of them may still be taken
//! over, by this manager's successor or another build. A machine of which no sound record is left may be of any domain, and nobody knows
//! when it has ended: what is kept for it stays until a later process finds its record sound, or the daemon ends.
use super::Manager;
use crate::disk;
use plimsoll_types::DomainId;
use std::collections::BTreeSet;

/// References given up in one go: a few milliseconds, in which other orders wait.
const UNPINNED: usize = 16_384;

impl Manager {
    /// Gives up what was kept for machines that could not be put together, some at a time, where all of them have ended.
    pub(super) fn unpin(&mut self) {
        let stalled: BTreeSet<DomainId> =
            self.pinned.keys().copied().filter(|id| self.may_have(*id)).collect();
        let tier = self.tier().cloned();
        for (id, pinned) in self.pinned.iter_mut().filter(|(id, _)| !stalled.contains(id)) {
            // Of a domain that is closed, everything has gone with it.
            let Some(domain) = self.domains.get(&id.0) else {
                pinned.clear();
                continue;
            };
            for handle in pinned.drain(pinned.len().saturating_sub(UNPINNED)..) {
                disk::release(domain, tier.as_deref(), handle);
            }
            // The group was added with the domain; a store that shrinks is never refused.
            let _ = domain.settle(&self.host);
        }
        self.pinned.retain(|_, pinned| !pinned.is_empty());
        if self.unmanaged() == 0 {
            tier.iter().for_each(|tier| tier.let_go());
        }
    }

    /// True while a machine that could not be put together may have pages in that domain's store.
    pub(super) fn may_have(&self, id: DomainId) -> bool {
        self.stalled_fragments().any(|fragment| fragment.may_be_of(id))
    }
}
