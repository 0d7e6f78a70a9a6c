//! What an operator has a machine's pagers do.
//!
//! Enters: a machine and an order. Leaves: numbers in its shards' [`Orders`](crate::uffd::host::Orders), which a late reader reads a
//! little later. What must never happen: an order that waits for a pager.
use super::Manager;
use crate::uffd::shards::Running;
use plimsoll_types::MachineId;
use std::sync::atomic::Ordering;

impl Manager {
    /// Takes so many pages from the machine, as if the host were that short.
    pub fn squeeze(&self, id: MachineId, pages: u32) {
        if let Some(running) = self.machines.get(&id) {
            running.squeeze(pages);
        }
    }

    /// Ends a sampling period of the machine now. The governor ends everybody's, too, as often as it was told.
    pub fn sample(&self, id: MachineId) {
        if let Some(running) = self.machines.get(&id) {
            running.order(|orders| orders.sample.store(true, Ordering::Relaxed));
        }
    }

    /// Takes everything it can from a machine that is going to sleep, and remembers what it used. Where there is a disk tier,
    /// what is stored goes there.
    pub fn park(&self, id: MachineId) {
        if let Some(running) = self.machines.get(&id) {
            running.order(|orders| {
                orders.park.store(true, Ordering::Relaxed);
                orders.is_parked.store(true, Ordering::Relaxed);
            });
            running.squeeze(u32::MAX);
        }
    }

    /// True from the order to park on, until the one to wake.
    pub fn is_parked(&self, id: MachineId) -> bool {
        self.machines.get(&id).is_some_and(Running::is_parked)
    }

    /// Brings back what the machine used before it was parked last, in one go, and takes nothing more from it.
    pub fn wake(&self, id: MachineId) {
        if let Some(running) = self.machines.get(&id) {
            running.squeeze(0);
            running.order(|orders| {
                orders.is_parked.store(false, Ordering::Relaxed);
                orders.wake.store(true, Ordering::Relaxed);
            });
        }
    }

    /// Has a bit flipped in a stored page of the machine, as soon as it has one: the damage must be noticed.
    pub fn sabotage(&self, id: MachineId) {
        let Some(running) = self.machines.get(&id) else { return };
        if let Some(shard) = running.shards.first() {
            shard.controls.sabotage.store(true, Ordering::Relaxed);
        }
        // Whose pager does it first is open.
        running.shards.iter().rev().for_each(|shard| drop(shard.controls.kick.signal()));
    }

    /// Has nothing taken from the machine until it is told otherwise, whatever the governor or an operator asks for; what is
    /// elsewhere comes back when it is touched. Others give in its place, and where they cannot, whoever wants a page waits.
    pub fn hold(&self, id: MachineId, is_to: bool) {
        if let Some(running) = self.machines.get(&id) {
            running.order(|orders| orders.hold.store(is_to, Ordering::Relaxed));
        }
    }

    /// True while nothing is taken from the machine.
    pub fn is_held(&self, id: MachineId) -> bool {
        self.machines.get(&id).is_some_and(Running::is_held)
    }

    /// Has everything of the machine brought back into its RAM, and nothing more taken from it; or, with `false`, goes on
    /// with it as before, unless it was [let go](Self::let_go).
    pub fn go_home(&self, id: MachineId, is_to: bool) {
        if let Some(running) = self.machines.get(&id).filter(|running| !running.is_let_go()) {
            running.order(|orders| orders.go_home.store(is_to, Ordering::Relaxed));
        }
    }

    /// True once nothing of a machine that was told to [`go_home`](Self::go_home) is elsewhere.
    pub fn is_home(&self, id: MachineId) -> bool {
        self.machines.get(&id).is_some_and(Running::is_home)
    }

    /// True while there is no memory to bring a machine home that was told to, or for its guest meanwhile.
    pub fn is_short(&self, id: MachineId) -> bool {
        self.machines.get(&id).is_some_and(Running::is_short)
    }

    /// True once the machine's pager could not go on: its guest waits at absent pages until its VMM is ended.
    pub fn is_lost(&self, id: MachineId) -> bool {
        self.machines.get(&id).is_some_and(Running::is_lost)
    }

    /// Leaves a machine that [`is_home`](Self::is_home) to its VMM, for good; false if it is not. It goes on without us, and
    /// is gone here when [`forget_gone`](Self::forget_gone) names it.
    pub fn let_go(&self, id: MachineId) -> bool {
        let running = self.machines.get(&id).filter(|running| running.is_home());
        running.map(|running| running.order(|orders| orders.let_go.store(true, Ordering::Relaxed))).is_some()
    }
}
