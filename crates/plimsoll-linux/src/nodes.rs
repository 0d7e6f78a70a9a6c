//! NUMA nodes: what this host has of them, and at which one each shard's pager belongs.
//!
//! Enters: the kernel's files below /sys/devices/system/node, what this process may use, and the policies of a machine's memory. Leaves: a
//! [`Place`] for each shard whose memory is known to be of one node. What must never happen: a thread on a CPU that whoever started
//! this process has kept from it, or a host of one node on which anything is done at all: it has no [`Topology`].
//!
//! # Whose word counts
//! Where a guest's memory is to be is its VMM's business (`mbind`, `numactl`, a cpuset), and the kernel tells us of each mapping
//! (`numa_maps`, and the process's allowed nodes). That is asked, rather than
//!
//! * the VMM, in its hand-over: it would be a field of the protocol that every VMM had to fill in, and that could be wrong;
//! * where pages are (`move_pages`): a guest that has just been handed over has hardly any;
//! * `get_mempolicy`: it tells of the caller's own memory only.
//!
//! # What is done, and what is left to the kernel
//! * A pager runs on the CPUs of its shard's node, as far as this process may use them (`CPUAffinity=`, a cpuset, `taskset`: that is how
//!   manager threads are kept on housekeeping CPUs, and it wins). With none of them, on those of the nearest node that has some.
//! * It takes memory there first: slabs for what it stores, and the pages it brings back into memory that has no policy of its own. Where
//!   the mapping has one, UFFDIO_COPY takes pages by that (`vma_alloc_folio` in `mfill_atomic_pte_copy`), whoever calls it.
//! * Everything else is where the kernel puts it: records and tables of stores, governor, housekeeper, the threads that read the disk, a
//!   shard over several nodes, and machines that are managed from outside. MADV_COLLAPSE takes the node that most of the block is on.
//!
//! # Known holes
//! * A machine's policies are looked at once by each manager. Memory that is bound or moved elsewhere later has its pager where it was.
//! * A CPU that comes or goes later is not noticed; with the last of a pager's CPUs gone the kernel lets it run anywhere.
//! * More than 1,024 CPUs: nothing is done.
use crate::system::{Linux, System};
use plimsoll_store::{Lane, SlabKind, SlabTag};
use plimsoll_sys::numa::{self, NodeId};
use plimsoll_sys::procfs::nodes::{self, Policies, parse_list};
use plimsoll_sys::{HvaRange, ProcessId};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

#[cfg(test)]
mod tests;

const FOLDER: &str = "/sys/devices/system/node";

/// A set of CPUs.
pub type Cpus = BTreeSet<u32>;

/// What a process may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// The CPUs its threads may run on.
    pub cpus: Cpus,
    /// The nodes it may have memory of; `None` where nobody has said.
    pub nodes: Option<BTreeSet<NodeId>>,
}

impl Allowed {
    /// This process, as it was started; `None` on a kernel with too many CPUs to ask about.
    pub fn own() -> Option<Self> {
        let set = sched_getaffinity(None).ok()?;
        let cpus =
            (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).filter_map(|cpu| u32::try_from(cpu).ok());
        Some(Self { cpus: cpus.collect(), nodes: nodes::allowed(ProcessId::own()).ok() })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    /// Those that this process may use.
    cpus: Cpus,
    /// It has some, and this process may use it.
    has_memory: bool,
    /// To every node of the topology, in their order. Empty where the kernel does not say.
    distances: Vec<u32>,
}

/// The nodes of a host that has more than one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    nodes: BTreeMap<NodeId, Node>,
    allowed: Cpus,
}

/// Where a pager belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node that its shard's memory is of.
    pub node: NodeId,
    /// The CPUs it is to run on: the node's, or those nearest to it; `None` where that is all that it may run on anyway.
    pub cpus: Option<Cpus>,
    /// The node that it is to take memory of first; `None` where the shard's has none for it.
    pub memory: Option<NodeId>,
}

impl Topology {
    /// This host's, for this process; `None` where there is one node, or the kernel says nothing of several.
    pub fn own() -> Option<Self> {
        // Most hosts: nothing else is looked at.
        if parse_list(&Linux.read(&Path::new(FOLDER).join("online")).ok()?)?.len() < 2 {
            return None;
        }
        Self::read(&Linux, &Allowed::own()?)
    }

    /// What `system` says of its nodes, for a process that may use so much. `None` as above: a file that makes no sense is one that is
    /// not there.
    pub fn read(system: &dyn System, allowed: &Allowed) -> Option<Self> {
        let list = |path: &Path| parse_list(&system.read(path).ok()?);
        let folder = Path::new(FOLDER);
        let online: Vec<u32> = list(&folder.join("online"))?.into_iter().collect();
        let memory = list(&folder.join("has_memory"));
        let node = |number: &u32| {
            let id = NodeId::new(u16::try_from(*number).ok()?)?;
            let of_node = folder.join(format!("node{number}"));
            let cpus = list(&of_node.join("cpulist"))?.intersection(&allowed.cpus).copied().collect();
            let is_allowed = allowed.nodes.as_ref().is_none_or(|nodes| nodes.contains(&id));
            // A kernel that does not say which have memory has none without.
            let has_memory = is_allowed && memory.as_ref().is_none_or(|memory| memory.contains(number));
            let distances = system.read(&of_node.join("distance")).unwrap_or_default();
            let distances: Option<Vec<u32>> =
                distances.split_ascii_whitespace().map(|word| word.parse().ok()).collect();
            let distances = distances.filter(|row| row.len() == online.len()).unwrap_or_default();
            Some((id, Node { cpus, has_memory, distances }))
        };
        let nodes: BTreeMap<NodeId, Node> = online.iter().map(node).collect::<Option<_>>()?;
        let topology = Self { nodes, allowed: allowed.cpus.clone() };
        let count = |with: fn(&Node) -> bool| topology.nodes.values().filter(|node| with(node)).count();
        let matters = count(|node| node.has_memory) > 1 || count(|node| !node.cpus.is_empty()) > 1;
        matters.then_some(topology)
    }

    /// The nodes.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.nodes.keys().copied()
    }

    /// Where whoever serves memory of a node belongs.
    pub fn place(&self, node: NodeId) -> Place {
        let memory = self.nodes.get(&node).filter(|found| found.has_memory).map(|_| node);
        let cpus = self.nearest(node).filter(|cpus| **cpus != self.allowed).cloned();
        Place { node, cpus, memory }
    }

    /// The CPUs nearest to a node: its own, if there are any for this process.
    fn nearest(&self, node: NodeId) -> Option<&Cpus> {
        let distances = self.nodes.get(&node).map_or(&[][..], |found| &found.distances);
        let candidates = self.nodes.iter().enumerate().filter(|(_, (_, other))| !other.cpus.is_empty());
        let far = |place: usize, id: NodeId| {
            // By number where the kernel says no distance; a node is nearest to itself even if it says otherwise.
            (id != node, distances.get(place).copied().unwrap_or(u32::MAX), id)
        };
        candidates.min_by_key(|(place, (id, _))| far(*place, **id)).map(|(_, (_, found))| &found.cpus)
    }
}

/// What the kernel says of where a machine's memory is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bindings {
    /// What its mappings say.
    pub policies: Policies,
    /// What it may have at all.
    pub allowed: BTreeSet<NodeId>,
}

impl Bindings {
    /// A process's. Nothing where it cannot be read: then its memory is of no node that is known.
    pub fn of(process: ProcessId) -> Self {
        Self {
            policies: nodes::policies(process).unwrap_or_default(),
            allowed: nodes::allowed(process).unwrap_or_default(),
        }
    }

    /// The one node that all of these ranges are to be on.
    fn home(&self, ranges: &[HvaRange]) -> Option<NodeId> {
        if let (1, Some(only)) = (self.allowed.len(), self.allowed.first()) {
            return Some(*only);
        }
        let mut homes = ranges.iter().flat_map(|range| {
            // The mapping that the range begins in, and those that begin in it.
            let first = self.policies.partition_point(|(start, _)| *start <= range.start());
            let end = self.policies.partition_point(|(start, _)| *start < range.end());
            first.checked_sub(1).map_or(&[][..], |first| self.policies.get(first..end).unwrap_or_default())
        });
        let (_, home) = homes.next()?;
        home.filter(|_| homes.all(|(_, other)| other == home))
    }
}

/// Where the pager of each shard belongs, by the ranges that its memory is in; `None` for one whose memory is of several nodes, or of
/// none that is known.
pub fn plan(topology: &Topology, bindings: &Bindings, shards: &[Vec<HvaRange>]) -> Vec<Option<Place>> {
    shards.iter().map(|ranges| bindings.home(ranges).map(|node| topology.place(node))).collect()
}

impl Place {
    /// Brings the calling thread there. What of it the kernel has refused is not in what is returned.
    pub fn take(self) -> Self {
        let cpus = self.cpus.filter(|cpus| {
            let mut set = CpuSet::new();
            let known = cpus.iter().filter_map(|cpu| usize::try_from(*cpu).ok());
            known.filter(|cpu| *cpu < CpuSet::MAX_CPU).for_each(|cpu| set.set(cpu));
            sched_setaffinity(None, &set).is_ok()
        });
        // Somebody who has said from where this process takes its memory is believed.
        let is_free = numa::preferred().is_some() || numa::is_free_to_prefer();
        let memory = self.memory.filter(|node| is_free && numa::prefer(Some(*node)).is_ok());
        Self { node: self.node, cpus, memory }
    }
}

/// The lane of slabs of a node, one more than its number; for memory of no node that is known, and for nodes beyond the lanes, the first.
pub fn lane_of(node: Option<NodeId>) -> Lane {
    let lane = node.and_then(|node| u8::try_from(node.number()).ok()?.checked_add(1));
    lane.map_or(Lane::default(), Lane)
}

/// The node that a slab of that tag is to be on, if it is to be on one.
pub fn of_tag(tag: SlabTag) -> Option<NodeId> {
    match tag.kind()? {
        SlabKind::Data { lane: Lane(lane), .. } => NodeId::new(u16::from(lane.checked_sub(1)?)),
        SlabKind::Records { .. } => None,
    }
}
