//! Which machine goes to which host.
//!
//! Enters: a scenario. Leaves: for each host its machines and their settings as one tree, and what found no host, with the
//! words in which the last one asked refused. A host takes a machine only if it can keep its word to all
//! ([`plimsoll_policy::admission`]), and only up to the overcommitment that is allowed.
use crate::host::Placed;
use crate::machine::Class;
use crate::scenario::{Order, Scenario};
use plimsoll_policy::Ppm;
use plimsoll_policy::admission::{Account, AdmissionError, Capacity, admit};
use plimsoll_policy::settings::SettingsError;
use plimsoll_policy::tree::Tree;
use plimsoll_types::{ByteCount, MachineId};
use std::collections::BTreeSet;
use std::error::Error;

/// A host with what was placed on it.
pub(crate) struct Loaded {
    pub(crate) tree: Tree,
    pub(crate) placed: Vec<Placed>,
    sizes: ByteCount,
}

/// Machines of a class that no host admits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unplaced {
    pub(crate) class: usize,
    pub(crate) count: u32,
    pub(crate) because: String,
}

/// Where everything went.
pub(crate) struct Placements {
    pub(crate) hosts: Vec<Loaded>,
    pub(crate) unplaced: Vec<Unplaced>,
}

/// Places all machines, class by class.
pub(crate) fn place(scenario: &Scenario) -> Result<Placements, SettingsError> {
    let empty = Tree::new(scenario.empty_host())?;
    let load = |_| Loaded { tree: empty.clone(), placed: Vec::new(), sizes: ByteCount(0) };
    let mut hosts: Vec<Loaded> = (0..scenario.hosts.count).map(load).collect();
    let mut unplaced = Vec::new();
    let mut next = 1;
    for class in &scenario.classes {
        let mut asked = Asked::all(scenario.placement.order, &hosts, &scenario.hosts.capacity);
        let mut because = "there is no host".to_owned();
        let mut left = class.count;
        while left > 0 {
            let Some(index) = asked.first() else { break };
            let host = &mut hosts[index];
            match offer(host, class, MachineId(next), scenario) {
                Ok(tree) => {
                    host.take(tree, MachineId(next), class);
                    asked.put_back(index, host, &scenario.hosts.capacity);
                    (next, left) = (next + 1, left - 1);
                }
                // One that refused a machine of a class refuses the next, too: it has no more than before.
                Err(refused) => because = sentence(&refused),
            }
        }
        if left > 0 {
            unplaced.push(Unplaced { class: class.index, count: left, because });
        }
    }
    Ok(Placements { hosts, unplaced })
}

/// An error and what it comes from.
pub(crate) fn sentence(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |error| (**error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Why a host did not take a machine.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    NotAdmitted(AdmissionError),
    #[error("a host of {total} would have machines of {sizes}, more than {most} of it")]
    Overcommitted { sizes: ByteCount, total: ByteCount, most: Ppm },
}

fn offer(host: &Loaded, class: &Class, id: MachineId, scenario: &Scenario) -> Result<Tree, Refused> {
    let capacity = &scenario.hosts.capacity;
    let sizes = host.sizes + class.size();
    match scenario.placement.overcommit {
        Some(most) if sizes.0 > most.apply(capacity.total.0) => {
            Err(Refused::Overcommitted { sizes, total: capacity.total, most })
        }
        _ => admit(&host.tree, class.settings(id), capacity).map_err(Refused::NotAdmitted),
    }
}

impl Loaded {
    fn take(&mut self, tree: Tree, id: MachineId, class: &Class) {
        self.tree = tree;
        self.sizes += class.size();
        self.placed.push(Placed { id, class: class.index });
    }
}

/// The hosts that may still take a machine of a class, in the order in which they are asked.
struct Asked {
    order: Order,
    hosts: BTreeSet<(u64, usize)>,
}

impl Asked {
    fn all(order: Order, hosts: &[Loaded], capacity: &Capacity) -> Self {
        let mut asked = Self { order, hosts: BTreeSet::new() };
        hosts.iter().enumerate().for_each(|(index, host)| asked.put_back(index, host, capacity));
        asked
    }

    fn put_back(&mut self, index: usize, host: &Loaded, capacity: &Capacity) {
        let left = || Account::of(&host.tree, capacity).left().0;
        let key = match self.order {
            Order::FirstFit => 0,
            Order::BestFit => left(),
            Order::Spread => u64::MAX - left(),
        };
        self.hosts.insert((key, index));
    }

    /// Takes the host that is asked first.
    fn first(&mut self) -> Option<usize> {
        self.hosts.pop_first().map(|(_, index)| index)
    }
}
