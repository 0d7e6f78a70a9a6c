//! The disk's thread: takes what parked machines have in the store to the disk, and cleans the disk.
//!
//! Enters: machines that are parked, as their orders say, and their page words. Leaves: stores without their objects, and
//! incidents where the disk takes no more. What must never happen: anybody who waits for this thread. It holds a store's lock
//! for one object at a time, and none while the disk works.
//!
//! A machine's objects leave in the order of its pages, so that those that are touched one after the other are read together.
//! What other machines of its domain have as well stays in memory.
use super::host::{Domain, Host, Incident};
use super::housekeeper::Domains;
use super::manager::{Controls, Governed};
use crate::disk::mover::Mover;
use crate::disk::tier::{Tier, WriteError};
use crate::explain;
use crate::slabs::MemfdSlabs;
use plimsoll_store::Handle;
use plimsoll_types::{DomainId, MachineId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How often it is looked for parked machines that have given something.
const IDLE: Duration = Duration::from_millis(50);
/// How long nothing is tried after the disk has refused something.
const REFUSED: Duration = Duration::from_secs(1);
/// Objects between two looks whether the machine is still parked.
const OBJECTS_PER_LOOK: usize = 64;

/// What an operator is told of once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    /// Of the disk: until it takes something again.
    Disk,
    /// Of limits: as long as the machine is parked.
    Limit(MachineId),
}

/// Everything the thread has of its own.
struct Parker<'a> {
    host: &'a Host,
    governed: &'a Governed,
    domains: &'a Domains,
    stop: &'a AtomicBool,
    mover: Mover<MemfdSlabs>,
    /// What each parked shard had given when the last of it was seen off.
    seen_off: BTreeMap<MachineId, u64>,
    told: BTreeSet<Trouble>,
    tries_at: Instant,
}

/// Works until it is told to stop; whoever tells it unparks it.
pub(super) fn keep(host: &Host, governed: &Governed, domains: &Domains, tier: Arc<Tier>, stop: &AtomicBool) {
    let mut parker = Parker {
        host,
        governed,
        domains,
        stop,
        mover: Mover::new(tier),
        seen_off: BTreeMap::new(),
        told: BTreeSet::new(),
        tries_at: Instant::now(),
    };
    while !stop.load(Ordering::Relaxed) {
        if parker.tries_at <= Instant::now() {
            parker.turn();
        }
        std::thread::park_timeout(IDLE);
    }
}

impl Parker<'_> {
    fn turn(&mut self) {
        self.clean();
        let parked: Vec<(MachineId, Controls)> = {
            let governed = self.governed.lock();
            let is_parked = |controls: &Controls| controls.orders.is_parked.load(Ordering::Relaxed);
            let parked = governed.iter().filter(|(_, controls)| is_parked(controls));
            parked.map(|(id, controls)| (*id, controls.clone())).collect()
        };
        let is_parked = |id: &MachineId| parked.iter().any(|(parked, _)| parked == id);
        self.seen_off.retain(|id, _| is_parked(id));
        self.told.retain(|trouble| !matches!(trouble, Trouble::Limit(id) if !is_parked(id)));
        for (id, controls) in &parked {
            let given = controls.orders.given.load(Ordering::Relaxed);
            if self.seen_off.get(id) == Some(&given) || self.stop.load(Ordering::Relaxed) {
                continue;
            }
            match self.see_off(controls) {
                Ok(()) => {
                    self.seen_off.insert(*id, given);
                }
                Err(error) => {
                    self.mover.abandon();
                    self.refused(*id, &error);
                }
            }
        }
    }

    /// Takes what a parked shard has in the store to the disk.
    fn see_off(&mut self, controls: &Controls) -> Result<(), WriteError> {
        let Some(domain) = controls.domain.upgrade() else { return Ok(()) };
        let handles: Vec<Handle> = controls.words.handles().collect();
        let mut sorted = handles.clone();
        sorted.sort_unstable();
        let count = |handle: &Handle| {
            let first = sorted.partition_point(|other| other < handle);
            let end = sorted.partition_point(|other| other <= handle);
            u32::try_from(end - first).unwrap_or(u32::MAX)
        };
        for some in handles.chunks(OBJECTS_PER_LOOK) {
            let is_parked = controls.orders.is_parked.load(Ordering::Relaxed);
            if !is_parked || self.stop.load(Ordering::Relaxed) {
                break;
            }
            for handle in some {
                self.mover.demote(&domain, *handle, Some(count(handle)))?;
            }
        }
        if self.mover.flush()? > 0 {
            self.told.remove(&Trouble::Disk);
        }
        // The group was added with the domain; a store that shrinks is never refused.
        let _ = domain.settle(self.host);
        Ok(())
    }

    fn clean(&mut self) {
        let known: Vec<Arc<Domain<MemfdSlabs>>> =
            self.domains.lock().iter().filter_map(Weak::upgrade).collect();
        let domain_of = |id: DomainId| known.iter().find(|domain| domain.id == id).cloned();
        while !self.stop.load(Ordering::Relaxed) {
            match self.mover.clean(&domain_of) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    self.mover.abandon();
                    self.refused(MachineId(0), &error);
                    return;
                }
            }
        }
    }

    /// Nothing is lost: what was to go stays where it is, and is tried again later. The operator is told once.
    fn refused(&mut self, id: MachineId, error: &WriteError) {
        self.tries_at = Instant::now() + REFUSED;
        let trouble = match error {
            WriteError::Resting => return,
            WriteError::Full { .. } | WriteError::Quota { .. } => Trouble::Limit(id),
            WriteError::NoSpace(_) | WriteError::Failed(_) | WriteError::Complete => Trouble::Disk,
        };
        if self.told.insert(trouble) {
            self.host.report(Incident::Disk { cause: explain(error) });
        }
    }
}
