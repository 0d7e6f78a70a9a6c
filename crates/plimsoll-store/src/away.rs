//! Objects whose data lies outside of slab memory: on a disk, say.
//!
//! Enters: where an object's encoded bytes are kept from now on. Leaves: a free slot, and a record that names the other place.
//! Record, handle and count stay, so no page word changes, and the record is the index of what lies away: it outlives the
//! manager as all records do. What the bits of a place mean, and whether the bytes are still what they were, is for others to
//! know; [`Fetched::unpack`](crate::Fetched::unpack) checks what they bring.
//!
//! What must never happen: an instant at which the record names bytes that are nowhere. So the caller sends an object away
//! after its bytes have been written, and the order of writes is that of `repack`.
use crate::{
    fetch::{Fetched, Ticket, Whereabouts},
    memory::SlabMemory,
    record::{Away, Body, Remote},
    records::{Visit, Walk},
    repack::{Cold, Replacement},
    store::Store,
};

/// Where a walk for objects to be sent away is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hand(Walk);

impl<M: SlabMemory> Store<M> {
    /// Has an object's bytes, as they were when it was fetched, lie at `to` from now on, wherever they were before.
    /// [`Replacement::Outdated`] where the object is gone, or its bytes are others by now: `to` is then nobody's.
    pub fn send_away(&mut self, ticket: &Ticket, to: Away) -> Replacement {
        let Some((number, record)) = self.still(&ticket.0) else { return Replacement::Outdated };
        if let Body::Same(_) = record.body {
            return Replacement::Outdated;
        }
        let remote = Remote { at: to, length: record.length() };
        self.name_place(number, &record, Body::Away { codec: record.codec(), remote, key: record.key() });
        Replacement::Made
    }

    /// Looks at up to `records` records for an object whose bytes are here and that has been here for a whole walk of
    /// [`next_cold`](Self::next_cold) at least, as it is or packed, and fetches it. `hand` is where that has come to.
    pub fn next_settled(&self, records: u32, hand: &mut Hand, into: &mut Fetched) -> Cold {
        for _ in 0..records {
            match self.records.visit(&mut hand.0) {
                Visit::Free => {}
                Visit::Round => return Cold::Round,
                Visit::Taken(number) => {
                    if self.records.is_settled(number)
                        && let Some(Ok(record)) = self.records.read(&self.memory, number)
                        && matches!(record.body, Body::Data { .. })
                        && self.fetch(record.handle(number), into) == Ok(Whereabouts::Here)
                    {
                        return Cold::Found;
                    }
                }
            }
        }
        Cold::NotYet
    }

    /// Everything that lies away: what whoever keeps it must not forget.
    pub fn remotes(&self) -> impl Iterator<Item = Remote> + '_ {
        self.records.numbers().filter_map(|number| {
            match self.records.read(&self.memory, number)?.ok()?.body {
                Body::Away { remote, .. } => Some(remote),
                Body::Same(_) | Body::Data { .. } => None,
            }
        })
    }
}
