//! Seating pagers: each at the NUMA node that its shard's memory is of ([`crate::nodes`]).
//!
//! Enters: shards whose pagers run already, and what the kernel says of their memory. Leaves: an offer to each, which it takes between
//! two turns. What must never happen: a guest that waits for this. The kernel's answer takes a walk through all page tables
//! of the VMM, so a thread of its own asks, one machine after the other, and only on a host of several nodes is there one. And
//! nobody moves another's thread: the number of one that has ended may be a stranger's.
use super::linux_space::Custody;
use super::shards::{Controls, Running};
use crate::nodes::{Bindings, Place, Topology, plan};
use parking_lot::Mutex;
use plimsoll_core::layout::Region;
use plimsoll_sys::HvaRange;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_types::Hva;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

/// A shard's, for its pager.
#[derive(Debug, Default)]
pub(super) struct Seat {
    is_offered: AtomicBool,
    place: Mutex<Option<Place>>,
}

impl Seat {
    fn offer(&self, place: Place) {
        *self.place.lock() = Some(place);
        self.is_offered.store(true, Ordering::Release);
    }

    /// For the pager, on its own thread: where it belongs, if it has been told since it was asked last. It is there then.
    pub(super) fn take(&self) -> Option<Place> {
        if !self.is_offered.load(Ordering::Relaxed) || !self.is_offered.swap(false, Ordering::Acquire) {
            return None;
        }
        let place = self.place.lock().take()?.take();
        *self.place.lock() = Some(place.clone());
        Some(place)
    }

    /// Where the pager is, once it is where it belongs.
    pub(super) fn place(&self) -> Option<Place> {
        let place = self.place.lock().clone();
        place.filter(|_| !self.is_offered.load(Ordering::Acquire))
    }
}

/// A shard that waits for its seat: if it ends before, its memory waits for nobody.
struct Waiting {
    custody: Weak<Custody>,
    seat: Arc<Seat>,
    kick: Arc<EventFd>,
}

/// Whoever seats pagers, on a host of several nodes.
pub(super) struct Usher {
    machines: Sender<Vec<Waiting>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Usher {
    /// One for this host; none where it has one node.
    pub(super) fn of_host() -> io::Result<Option<Self>> {
        Topology::own().map(Self::start).transpose()
    }

    fn start(topology: Topology) -> io::Result<Self> {
        let (machines, waiting) = channel();
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let work = move || seat_all(&topology, &waiting, &stopped);
        let thread = std::thread::Builder::new().name("usher".to_owned()).spawn(work)?;
        Ok(Self { machines, stop, thread })
    }

    /// Has the pagers of a machine seated.
    pub(super) fn seat(&self, machine: &Running) {
        let waiting = |Controls { custody, seat, kick, .. }: &Controls| Waiting {
            custody: Arc::downgrade(custody),
            seat: Arc::clone(seat),
            kick: Arc::clone(kick),
        };
        // It ends when this does.
        let _ = self.machines.send(machine.shards.iter().map(|shard| waiting(&shard.controls)).collect());
    }

    /// Ends it, after the machine that it is at.
    pub(super) fn dismiss(self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.machines);
        let _ = self.thread.join();
    }
}

fn seat_all(topology: &Topology, machines: &Receiver<Vec<Waiting>>, stop: &AtomicBool) {
    for machine in machines.iter().take_while(|_| !stop.load(Ordering::Relaxed)) {
        // Of one process: what it says of its memory is asked for once.
        let Some(process) = machine.iter().find_map(|shard| Some(shard.custody.upgrade()?.process())) else {
            continue;
        };
        let ranges =
            |shard: &Waiting| shard.custody.upgrade().map_or_else(Vec::new, |custody| memory_of(&custody));
        let places = plan(topology, &Bindings::of(process), &machine.iter().map(ranges).collect::<Vec<_>>());
        for (shard, place) in machine.iter().zip(places) {
            if let Some(place) = place {
                shard.seat.offer(place);
                let _ = shard.kick.signal();
            }
        }
    }
}

/// Where a shard's memory is in its VMM.
fn memory_of(custody: &Custody) -> Vec<HvaRange> {
    let range = |(region, start): (&Region, &Hva)| HvaRange::new(*start, region.bytes);
    custody.hello.layout.regions().iter().zip(&custody.hello.hvas).filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::numa::{self, NodeId};

    #[test]
    fn an_offer_is_taken_once_by_the_thread_that_takes_it() {
        let node = NodeId::new(0).unwrap();
        let (seat, place) = (Seat::default(), Place { node, cpus: None, memory: Some(node) });
        assert_eq!((seat.take(), seat.place()), (None, None));
        seat.offer(place);
        assert_eq!(seat.place(), None, "it has not been taken");
        let taken = std::thread::scope(|scope| {
            let take = || (seat.take(), numa::preferred());
            scope.spawn(take).join().unwrap()
        });
        let (Some(taken), preferred) = taken else { panic!("it was offered") };
        assert_eq!(
            (taken.memory, numa::preferred()),
            (preferred, None),
            "of the taker's memory alone, if at all"
        );
        assert_eq!((seat.take(), seat.place()), (None, Some(taken)));
    }
}
