//! What clients get: machines, the host, groups. A field is never renamed, only added.
//!
//! Enters: a [`Moment`]. Leaves: values that say what it says in words that stay, sizes in bytes. They are made when somebody asks,
//! so the loop pays for none of them.
use super::exchange::Moment;
use super::settings::Settings;
use crate::backend::{self, Departure, Kind};
use crate::config::group_name;
use crate::control::Berth;
use crate::stores::Stores;
use plimsoll_core::word::StateKind;
use plimsoll_linux::nodes::Place;
use plimsoll_policy::Position;
use plimsoll_policy::host_state::min_free;
use plimsoll_policy::view::{MachineView, Phase};
use plimsoll_types::{ByteCount, GroupId, MachineId, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Whose a machine's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineKind {
    /// Its VMM's, managed from outside.
    Attached,
    /// The daemon's own pager's: its VMM has handed it over.
    HandedOver,
}

/// What becomes of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// It boots, as far as can be told.
    Starting,
    /// It runs.
    Running,
    /// Nothing is taken from it, because an operator said so.
    Paused,
    /// It is given back to its VMM: its memory comes back, and nothing more is taken.
    Leaving,
    /// It cannot be looked at now, and is left out of decisions.
    LeftOut,
}

impl MachineState {
    /// In words.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Leaving => "leaving",
            Self::LeftOut => "left out",
        }
    }
}

/// Where a machine stands by the last decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Memory {
    /// Host memory that its guest's pages take up, compressed ones included.
    pub consumed_bytes: u64,
    /// Of that, what its compressed pages take up.
    pub stored_bytes: u64,
    /// What it uses, as sampled.
    pub active_bytes: u64,
    /// What it has a right to if all want all they may have.
    pub entitlement_bytes: u64,
    /// What it is to come to now.
    pub target_bytes: u64,
    /// What its guest lacks of the RAM it could have, if it has a balloon that can be asked: what that holds, and what of its
    /// virtio-mem devices is not plugged.
    pub balloon_bytes: Option<u64>,
    /// The part of the last second that its processors waited for memory, in millionths.
    pub stalled_ppm: u32,
}

/// What a guest owns, by where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pages {
    /// In its RAM.
    pub resident_bytes: u64,
    /// In RAM still, unmapped, until it is touched or compressed.
    pub limbo_bytes: u64,
    /// Compressed, in the store or in swap: what the guest has there, not what that takes up.
    pub stored_bytes: u64,
    /// On the disk tier.
    pub disk_bytes: u64,
    /// Nowhere: never touched, or given back.
    pub free_bytes: u64,
    /// Of what is free, and not used since: what the guest told by itself that it does not use (free page reporting).
    #[serde(default)]
    pub reported_bytes: u64,
    /// Of what is free: what the host asked for, or found where the guest shows it (hinting, an allocator that is shared).
    #[serde(default)]
    pub hinted_bytes: u64,
    /// Of what is free: what is in the guest's balloon.
    #[serde(default)]
    pub ballooned_bytes: u64,
    /// Of what is free: what was given back in a way that nobody knows.
    #[serde(default)]
    pub given_bytes: u64,
    /// Faults that were served so far; of a machine managed from outside, pages that came back.
    pub faults: u64,
}

impl Pages {
    /// What the guest gave back, of what is free: how, in a word, and how much.
    pub const fn given(&self) -> [(&'static str, u64); 4] {
        [
            ("reported", self.reported_bytes),
            ("hinted", self.hinted_bytes),
            ("ballooned", self.ballooned_bytes),
            ("otherwise", self.given_bytes),
        ]
    }
}

/// Memory that is plugged in and out while the machine runs, by virtio-mem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Plugged {
    /// The most that there can be.
    pub maximum_bytes: u64,
    /// What was asked for.
    pub requested_bytes: u64,
    /// What the guest has plugged: a part of it, where it does not do all that it is asked.
    pub plugged_bytes: u64,
    /// It comes and goes in multiples of this.
    pub block_bytes: u64,
    /// What the guest was asked to keep at most and keeps more than, where that was given up for now.
    #[serde(default)]
    pub in_vain_bytes: Option<u64>,
}

/// A pager that is at a NUMA node: that of the memory it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pager {
    /// The name of its thread.
    pub thread: String,
    /// The node.
    pub node: u16,
    /// The CPUs that it was put on; none where it may run wherever the daemon may.
    pub cpus: Vec<u32>,
    /// What it stores goes to memory of that node, as long as there is any.
    pub stores_there: bool,
}

/// A part of a machine's memory. What is in none of these states is nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cell {
    /// How much of it is in RAM, in millionths.
    pub resident_ppm: u32,
    /// In limbo.
    pub limbo_ppm: u32,
    /// Compressed, or on a disk.
    pub stored_ppm: u32,
    /// How much of it came back lately; of machines managed from outside only.
    pub heat_ppm: Option<u32>,
}

/// Where a machine's memory is, from its first page to its last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Map {
    /// Its name.
    pub name: String,
    /// At most 256 cells of equal size, the last apart.
    pub cells: Vec<Cell>,
}

/// A piece of a guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Region {
    /// Its first address in the guest.
    pub gpa: u64,
    /// Its size.
    pub size_bytes: u64,
}

/// What the manager's words say of a machine's pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// The process of its VMM, if it is known.
    pub pid: Option<u32>,
    /// Where its RAM lies in the guest. Pages are numbered through all of it, from 0 on.
    pub regions: Vec<Region>,
    /// How many bytes a page has.
    pub page_bytes: u64,
    /// How many pages there are.
    pub pages: u64,
    /// The states by name: that of digit 0 first.
    pub names: Vec<String>,
    /// The page that `states` begins with.
    pub first: u64,
    /// A hexadecimal digit a page; `?` is a word that is damaged. Words change meanwhile.
    pub states: String,
    /// Where the next ones begin: ask again with `first` of this. Nothing where there are no more.
    pub next: Option<u64>,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Machine {
    /// Its number, as long as this manager lives.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Whose its memory is.
    pub kind: MachineKind,
    /// The process of its VMM, if it is known.
    pub pid: Option<u32>,
    /// What becomes of it.
    pub state: MachineState,
    /// Why it is left out, was not released, or what it does not do of what it is asked.
    pub trouble: Option<String>,
    /// The RAM its guest owns.
    pub size_bytes: u64,
    /// Where it stands; nothing before the first decision about it.
    pub memory: Option<Memory>,
    /// Where its pages are; nothing before it was looked at.
    pub pages: Option<Pages>,
    /// Its virtio-mem devices; nothing where it has none, or was not looked at.
    #[serde(default)]
    pub plugged: Option<Plugged>,
    /// Its pagers that are at a NUMA node; not there on a host of one, nor where its memory is of no single node that is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pagers: Vec<Pager>,
    /// What was decided or found about it last, as a sentence.
    pub reason: Option<String>,
    /// The settings in force.
    pub settings: Settings,
}

/// Some of the machines, by number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Machines {
    /// These.
    pub machines: Vec<Machine>,
    /// Where the next ones begin: ask again with `after` of this. Nothing where there are no more.
    pub next: Option<u32>,
    /// How many there are in all.
    pub total: usize,
}

/// A machine that is to be managed and is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Waiting {
    /// Its name, as it was given.
    pub name: String,
    /// Why not.
    pub why: Option<String>,
}

/// The host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// The daemon's version.
    pub version: String,
    /// The manager's process.
    pub pid: u32,
    /// When was decided last, in milliseconds since 1970.
    pub decided_unix_ms: u64,
    /// How short of memory the host is.
    #[schema(value_type = String, examples("high", "clear", "soft", "hard", "low"))]
    pub state: String,
    /// What machines, their VMMs and the daemon may use.
    pub budget_bytes: u64,
    /// What is free of it.
    pub free_bytes: u64,
    /// What is to be free of it.
    pub kept_free_bytes: u64,
    /// What machines share.
    pub shared_bytes: u64,
    /// What is reserved.
    pub reserved_bytes: u64,
    /// How many machines are managed.
    pub machines: usize,
    /// Machines that are to be managed and are not.
    pub waiting: Vec<Waiting>,
    /// The page stores of machines under our own pager.
    #[serde(default)]
    pub stores: Stores,
}

/// A group of machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// The group it is nested in, if it is in one.
    pub parent: Option<String>,
    /// What its machines keep together, if that was said.
    pub reservation_bytes: Option<u64>,
    /// What they never exceed together, if that was said.
    pub limit_bytes: Option<u64>,
    /// Its weight.
    pub shares: u32,
    /// Whether its machines may share pages with each other.
    pub sharing: bool,
    /// How many machines are in it, and in no group nested in it.
    pub machines: usize,
    /// What they take up.
    pub consumed_bytes: u64,
    /// What they use.
    pub active_bytes: u64,
}

/// The groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Groups {
    /// All of them.
    pub groups: Vec<Group>,
}

impl Moment {
    /// The machine that `key` names: by its name, or where none has it, by its process.
    pub(super) fn find(&self, key: &str) -> Found {
        let mut named = self.berths.iter().filter(|(_, berth)| berth.name == key).map(|(id, _)| *id);
        match (named.next(), named.next()) {
            (Some(_), Some(_)) => return Found::Several,
            (Some(id), None) => return Found::One(id),
            (None, _) => {}
        }
        let is_meant = |berth: &Berth| berth.process.is_some_and(|process| process.get().to_string() == key);
        self.berths.iter().find(|(_, berth)| is_meant(berth)).map_or(Found::None, |(id, _)| Found::One(*id))
    }

    /// A machine's name.
    pub(super) fn name(&self, id: MachineId) -> Option<String> {
        self.berths.get(&id).map(|berth| berth.name.clone())
    }

    /// The machines that follow that number, by number.
    pub(super) fn page(&self, after: Option<u32>, limit: usize, group: Option<GroupId>) -> Machines {
        let index = Index::of(self);
        let first = after.map_or(0, |after| after.saturating_add(1));
        let is_wanted = |id: &MachineId| match group {
            None => true,
            Some(_) => index.settings.get(id).is_some_and(|settings| settings.parent == group),
        };
        let mut ids = self.berths.range(MachineId(first)..).map(|(id, _)| *id).filter(is_wanted);
        let machines: Vec<Machine> =
            ids.by_ref().take(limit).filter_map(|id| self.machine_of(id, &index)).collect();
        let next = ids.next().and_then(|_| machines.last().map(|machine| machine.id));
        let total = self.berths.keys().filter(|id| is_wanted(id)).count();
        Machines { machines, next, total }
    }

    /// One machine.
    pub(super) fn machine(&self, id: MachineId) -> Option<Machine> {
        self.machine_of(id, &Index::of(self))
    }

    fn machine_of(&self, id: MachineId, index: &Index<'_>) -> Option<Machine> {
        let berth = self.berths.get(&id)?;
        let settings = index.settings.get(&id)?;
        let (seen, position) = (index.views.get(&id), index.positions.get(&id));
        let memory = seen.zip(position).map(|(seen, position)| Memory {
            consumed_bytes: position.consumed.0,
            stored_bytes: seen.stored.0,
            active_bytes: position.active.0,
            entitlement_bytes: position.entitlement.0,
            target_bytes: position.target.0,
            balloon_bytes: seen.balloon.map(|balloon| balloon.0),
            stalled_ppm: seen.stalled.0,
        });
        let state = match (&berth.trouble, seen) {
            (Some(_), _) => MachineState::LeftOut,
            _ if berth.departure == Departure::UnderWay => MachineState::Leaving,
            _ if berth.is_paused => MachineState::Paused,
            (None, Some(seen)) if seen.phase == Phase::Running => MachineState::Running,
            _ => MachineState::Starting,
        };
        let stayed = match &berth.departure {
            Departure::Vain(why) => Some(format!("it was not released: {why}")),
            Departure::None | Departure::UnderWay => None,
        };
        let trouble = berth.trouble.as_ref().map(ToString::to_string).or(stayed);
        Some(Machine {
            id: id.0,
            name: berth.name.clone(),
            kind: match berth.kind {
                Kind::Attached => MachineKind::Attached,
                Kind::HandedOver => MachineKind::HandedOver,
            },
            pid: berth.process.map(|process| process.get()),
            state,
            trouble: trouble.or_else(|| berth.refused.as_ref().map(ToString::to_string)),
            size_bytes: berth.size.unwrap_or(self.tree.terms(id)?.size.bytes()).0,
            memory,
            pages: berth.whereabouts.as_ref().map(|seen| Pages::of(&seen.pages, seen.faults)),
            plugged: berth.whereabouts.as_ref().and_then(|seen| seen.plugged).map(Plugged::of),
            pagers: berth.whereabouts.iter().flat_map(|seen| &seen.seats).map(Pager::of).collect(),
            reason: None,
            settings: Settings::in_force(settings, &self.groups),
        })
    }

    /// Where a machine's memory is.
    pub(super) fn map(&self, id: MachineId) -> Option<Map> {
        let berth = self.berths.get(&id)?;
        let cells = berth.whereabouts.as_ref()?.chart.cells().into_iter().map(|cell| Cell {
            resident_ppm: cell.resident.0,
            limbo_ppm: cell.limbo.0,
            stored_ppm: cell.stored.0,
            heat_ppm: cell.heat.map(|heat| heat.0),
        });
        Some(Map { name: berth.name.clone(), cells: cells.collect() })
    }

    /// What its manager's words say of a machine's pages from the `first` on; nothing where it has none.
    pub(super) fn table(&self, id: MachineId, first: u64, most: usize) -> Option<Table> {
        let berth = self.berths.get(&id)?;
        let start = usize::try_from(first).unwrap_or(usize::MAX);
        let backend::Table { regions, pages, states, .. } =
            berth.whereabouts.as_ref()?.chart.table(start, most)?;
        let digit = |state: &Option<StateKind>| {
            state.and_then(|kind| char::from_digit(u32::from(kind as u8), 16)).unwrap_or('?')
        };
        let (next, pages) = (first.saturating_add(states.len() as u64), pages as u64);
        Some(Table {
            name: berth.name.clone(),
            pid: berth.process.map(|process| process.get()),
            regions: regions.iter().map(|one| Region { gpa: one.start.0, size_bytes: one.bytes.0 }).collect(),
            page_bytes: PAGE_SIZE as u64,
            pages,
            names: StateKind::ALL.iter().map(|kind| kind.name().to_owned()).collect(),
            first,
            states: states.iter().map(digit).collect(),
            next: (next < pages).then_some(next),
        })
    }

    /// The host.
    pub(super) fn host(&self) -> Host {
        let (view, plan) = (&self.tick.view, &self.tick.plan);
        let waiting = self.waiting.iter().cloned().map(|(name, why)| Waiting { name, why });
        Host {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            decided_unix_ms: self.unix_ms,
            state: plan.state.to_string(),
            budget_bytes: view.total.0,
            free_bytes: view.free.0,
            kept_free_bytes: min_free(view.total).0,
            shared_bytes: plan.budget.0,
            reserved_bytes: self.tree.reserved().0,
            machines: self.berths.len(),
            waiting: waiting.collect(),
            stores: self.stores,
        }
    }

    /// The groups.
    pub(super) fn groups(&self) -> Groups {
        let index = Index::of(self);
        let groups = self.groups.iter().map(|(own, group)| {
            let inside = index.settings.values().filter(|machine| machine.parent == Some(group.id));
            let positions: Vec<&&Position> =
                inside.clone().filter_map(|machine| index.positions.get(&machine.id)).collect();
            let sum =
                |of: fn(&Position) -> ByteCount| positions.iter().map(|one| of(one)).sum::<ByteCount>().0;
            Group {
                name: own.clone(),
                parent: group.parent.and_then(|id| group_name(&self.groups, id)),
                reservation_bytes: group.reservation.map(|size| size.0),
                limit_bytes: group.limit.map(|size| size.0),
                shares: group.shares.0,
                sharing: group.domain.is_some(),
                machines: inside.count(),
                consumed_bytes: sum(|one| one.consumed),
                active_bytes: sum(|one| one.active),
            }
        });
        Groups { groups: groups.collect() }
    }
}

impl Pager {
    fn of((shard, place): &(MachineId, Place)) -> Self {
        Self {
            thread: format!("pager-{}", shard.0),
            node: place.node.number(),
            cpus: place.cpus.iter().flatten().copied().collect(),
            stores_there: place.memory.is_some(),
        }
    }
}

impl Plugged {
    fn of(seen: plimsoll_attach::balloon::Plugged) -> Self {
        Self {
            maximum_bytes: seen.maximum.0,
            requested_bytes: seen.requested.0,
            plugged_bytes: seen.plugged.0,
            block_bytes: seen.block.0,
            in_vain_bytes: seen.in_vain.map(|most| most.0),
        }
    }
}

impl Pages {
    pub(crate) fn of(pages: &backend::Pages, faults: u64) -> Self {
        let backend::Pages { resident, limbo, stored, disk, free, given } = *pages;
        Self {
            resident_bytes: resident.bytes().0,
            limbo_bytes: limbo.bytes().0,
            stored_bytes: stored.bytes().0,
            disk_bytes: disk.bytes().0,
            free_bytes: free.bytes().0,
            reported_bytes: given.reported.bytes().0,
            hinted_bytes: given.hinted.bytes().0,
            ballooned_bytes: given.ballooned.bytes().0,
            given_bytes: given.otherwise.bytes().0,
            faults,
        }
    }
}

/// What a name stands for.
pub(super) enum Found {
    /// Nothing.
    None,
    /// A machine.
    One(MachineId),
    /// Several machines.
    Several,
}

/// The parts of a moment by machine.
struct Index<'a> {
    views: BTreeMap<MachineId, &'a MachineView>,
    positions: BTreeMap<MachineId, &'a Position>,
    settings: BTreeMap<MachineId, &'a plimsoll_policy::settings::MachineSettings>,
}

impl<'a> Index<'a> {
    fn of(moment: &'a Moment) -> Self {
        Self {
            views: moment.tick.view.machines.iter().map(|view| (view.id, view)).collect(),
            positions: moment.tick.plan.machines.iter().map(|one| (one.machine, one)).collect(),
            settings: moment.tree.settings().machines.iter().map(|one| (one.id, one)).collect(),
        }
    }
}
