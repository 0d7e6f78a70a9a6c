//! What is seen of machines, as their pagers last said and as their stores are.
//!
//! Enters: a machine. Leaves: numbers. Nothing here waits for a pager.
use super::{MachineView, Manager, ShardWords};
use crate::nodes::Place;
use crate::uffd::shards::Running;
use plimsoll_types::{ByteCount, MachineId, PageCount};

impl Manager {
    /// The machines that are managed, or were until their VMM ended and nobody has [`forgotten`](Self::forget) them.
    pub fn machines(&self) -> Vec<MachineView> {
        self.machines.keys().filter_map(|id| self.machine(*id)).collect()
    }

    /// Who they are.
    pub fn ids(&self) -> impl Iterator<Item = MachineId> + '_ {
        self.machines.keys().copied()
    }

    /// One of them.
    pub fn machine(&self, id: MachineId) -> Option<MachineView> {
        let running = self.machines.get(&id)?;
        Some(MachineView { id, name: running.name(), size: running.size(), stats: running.totals() })
    }

    /// What the machine's pages take up in the store of its domain: its part of it, by the number of pages.
    pub fn stored(&self, id: MachineId) -> ByteCount {
        let Some(running) = self.machines.get(&id) else { return ByteCount(0) };
        let Some(domain) = self.domain(running.membership.domain) else { return ByteCount(0) };
        let stats = domain.store(|store| store.stats());
        let pages = running.stored();
        let part =
            u128::from(stats.held().0) * u128::from(pages.0) / u128::from(stats.pages.0.max(pages.0).max(1));
        ByteCount(u64::try_from(part).unwrap_or(u64::MAX))
    }

    /// Those of the machine's stored pages that are on the disk: its part of its domain's, by the number of pages.
    pub fn on_disk(&self, id: MachineId) -> PageCount {
        let Some(running) = self.machines.get(&id) else { return PageCount(0) };
        let Some(domain) = self.domain(running.membership.domain) else { return PageCount(0) };
        let (stats, pages) = (domain.store(|store| store.stats()), running.stored());
        // What is there once for several machines is there for each.
        let part = u128::from(stats.away.0) * u128::from(pages.0) / u128::from(stats.objects().max(1));
        PageCount(u64::try_from(part).unwrap_or(u64::MAX)).min(pages)
    }

    /// The machine's page words, one part a shard, in their order. They are to be read only: their pager alone writes them.
    pub fn words(&self, id: MachineId) -> Vec<ShardWords> {
        self.machines.get(&id).map(Running::words).unwrap_or_default()
    }

    /// The identities of the machine's shards, in their order, and at which NUMA node the pager of each is: of one whose memory is of no
    /// single node that is known, and on a host of one node, there is none.
    pub fn seats(&self, id: MachineId) -> Vec<(MachineId, Option<Place>)> {
        let shards = self.machines.get(&id).map_or(&[][..], |running| &running.shards);
        shards.iter().map(|shard| (shard.id, shard.controls.seat.place())).collect()
    }
}
