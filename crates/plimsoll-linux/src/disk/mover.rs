//! Moving objects: out of memory to the disk, and out of sparse segments into full ones.
//!
//! Enters: handles of a store, the tier. Leaves: records that name places on the disk, memory and segments that are free. What
//! must never happen: a record that names a place before the disk has taken it. So objects are gathered, a segment of them is
//! written, and only then are the records told; what came to be otherwise meanwhile stays as it is, and its copy is forgotten.
//!
//! One thread moves at a time. It holds no lock while it encrypts, writes or reads.
use super::draft::Draft;
use super::image::Image;
use super::tier::{Purpose, Tier, WriteError};
use crate::uffd::host::Domain;
use plimsoll_store::{Fetched, Handle, Remote, Replacement, SlabMemory, Ticket, Whereabouts};
use plimsoll_types::DomainId;
use std::sync::{Arc, Weak};

/// An object whose bytes are in the draft.
struct Move<M: SlabMemory> {
    id: DomainId,
    /// Weak: what is on its way keeps no store.
    domain: Weak<Domain<M>>,
    ticket: Ticket,
    granule: u16,
    length: usize,
    /// Where on the disk they were before.
    old: Option<Remote>,
}

/// Gathers objects for one segment after the other.
pub struct Mover<M: SlabMemory> {
    tier: Arc<Tier>,
    draft: Option<Draft>,
    moves: Vec<Move<M>>,
    /// Objects that have left memory since that was asked last.
    left: u64,
    /// Segments written.
    written: usize,
    fetched: Fetched,
}

impl<M: SlabMemory> Mover<M> {
    /// For a tier.
    pub fn new(tier: Arc<Tier>) -> Self {
        Self { tier, draft: None, moves: Vec::new(), left: 0, written: 0, fetched: Fetched::new() }
    }

    /// The tier.
    pub const fn tier(&self) -> &Arc<Tier> {
        &self.tier
    }

    /// Has an object leave memory with the next segment, if it is there, has bytes to leave, and has so many references: what
    /// others want as well stays. `None` is any number. True if it is on its way; [`flush`](Self::flush) sees the last ones off.
    ///
    /// # Errors
    /// [`WriteError`]: it stays where it is, and so may others that were on their way.
    pub fn demote(
        &mut self,
        domain: &Arc<Domain<M>>,
        handle: Handle,
        references: Option<u32>,
    ) -> Result<bool, WriteError> {
        // What was released meanwhile, or is damaged, is nothing to move.
        let fetched = domain.store(|store| store.fetch(handle, &mut self.fetched));
        if fetched != Ok(Whereabouts::Here) {
            return Ok(false);
        }
        let Some((ticket, found)) = self.fetched.ticket() else { return Ok(false) };
        if references.is_some_and(|references| references != found) {
            return Ok(false);
        }
        self.gather(domain, handle, ticket, None).map(|()| true)
    }

    /// Puts the object that was fetched into the draft, and that on the disk first where it is complete.
    fn gather(
        &mut self,
        domain: &Arc<Domain<M>>,
        handle: Handle,
        ticket: Ticket,
        old: Option<Remote>,
    ) -> Result<(), WriteError> {
        let purpose = if old.is_some() { Purpose::Clean } else { Purpose::Demote };
        let length = self.fetched.bytes().len();
        for _ in 0..2 {
            let tier = &self.tier;
            let draft = self.draft.get_or_insert_with(|| tier.draft());
            match tier.add(draft, domain.id, handle, self.fetched.bytes(), purpose) {
                Ok(granule) => {
                    self.moves.push(Move {
                        id: domain.id,
                        domain: Arc::downgrade(domain),
                        ticket,
                        granule,
                        length,
                        old,
                    });
                    return Ok(());
                }
                Err(WriteError::Complete) => self.write(purpose)?,
                Err(error) => return Err(error),
            }
        }
        Err(WriteError::Complete)
    }

    /// Writes what is on its way out of memory, and has the records name it. How many objects have left since the last time.
    ///
    /// # Errors
    /// [`WriteError`]: all of them are where they were.
    pub fn flush(&mut self) -> Result<u64, WriteError> {
        self.write(Purpose::Demote)?;
        Ok(std::mem::take(&mut self.left))
    }

    fn write(&mut self, purpose: Purpose) -> Result<(), WriteError> {
        let moves = std::mem::take(&mut self.moves);
        let Some(draft) = self.draft.take().filter(|draft| !draft.is_empty()) else { return Ok(()) };
        let segment = self.tier.write(draft, purpose)?;
        self.written += 1;
        for Move { id, domain, ticket, granule, length, old } in moves {
            let Some(at) = Tier::place(segment, granule) else { continue };
            let domain = domain.upgrade();
            let sent = domain.map(|domain| domain.store(|store| store.send_away(&ticket, at)));
            let unneeded = match sent {
                Some(Replacement::Made) => {
                    self.left += u64::from(old.is_none());
                    old
                }
                // Whoever released it, or closed its domain, has forgotten where it was before.
                Some(Replacement::Outdated) | None => Some(Remote { at, length }),
            };
            unneeded.into_iter().for_each(|remote| self.tier.forget(id, remote));
        }
        Ok(())
    }

    /// Cleans what is worth it: moves what is needed of some sparse segments into fewer. How many segments that has won; 0
    /// where there is room enough, or nothing to be won.
    ///
    /// # Errors
    /// [`WriteError`]: what was not written is where it was.
    pub fn clean(
        &mut self,
        domain_of: &dyn Fn(DomainId) -> Option<Arc<Domain<M>>>,
    ) -> Result<usize, WriteError> {
        if !self.tier.is_short() {
            return Ok(0);
        }
        self.tier.prove();
        let victims = self.tier.victims();
        if victims.is_empty() {
            return Ok(0);
        }
        // What is on its way out of memory may well wait.
        self.abandon();
        let (written, mut emptied) = (self.written, Vec::new());
        for segment in victims {
            // One that cannot be read is not worth it from now on.
            let Ok(image) = self.tier.image(segment) else { continue };
            self.empty(&image, domain_of)?;
            emptied.push((segment, image.sequence));
        }
        self.write(Purpose::Clean)?;
        // What is named nowhere and not free either was lost: it would be gone over again and again.
        let (full, freed): (Vec<_>, Vec<_>) =
            emptied.into_iter().partition(|(segment, sequence)| self.tier.still_holds(*segment, *sequence));
        full.iter().for_each(|(segment, _)| self.tier.set_stuck(*segment));
        Ok(freed.len().saturating_sub(self.written - written))
    }

    fn empty(
        &mut self,
        image: &Image,
        domain_of: &dyn Fn(DomainId) -> Option<Arc<Domain<M>>>,
    ) -> Result<(), WriteError> {
        for line in image.lines() {
            let Some(domain) = domain_of(line.domain) else { continue };
            let remote = Remote { at: line.at, length: line.length };
            let found = domain.store(|store| store.fetch(line.handle, &mut self.fetched));
            if found != Ok(Whereabouts::Away(remote)) {
                continue;
            }
            // The page is as good as lost; whoever touches it finds out.
            if image.bytes(&self.tier, &line, self.fetched.room()).is_err() {
                continue;
            }
            let Some((ticket, _)) = self.fetched.ticket() else { continue };
            self.gather(&domain, line.handle, ticket, Some(remote))?;
        }
        Ok(())
    }

    /// How many objects are on their way.
    pub const fn gathered(&self) -> usize {
        self.moves.len()
    }

    /// Forgets what is on its way: it stays where it is.
    pub fn abandon(&mut self) {
        self.moves.clear();
        self.draft = None;
    }
}

impl<M: SlabMemory> std::fmt::Debug for Mover<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mover").field("moves", &self.moves.len()).finish_non_exhaustive()
    }
}
