//! How deep a host is loaded, and how much more it may take: the mark on the ship's hull.
//!
//! Enters: the last decision and the settings it rests on. Leaves: what is promised, held and used, what machines cost besides
//! their memory, as predicted and as measured, and how far it is to each thing that would go wrong, the nearest first.
use crate::backend::Overhead;
use crate::stores::Stores;
use crate::trace::{Basis, Tick};
use plimsoll_policy::admission::Account;
use plimsoll_policy::host_state::{HostState, min_free};
use plimsoll_policy::tree::Tree;
use plimsoll_types::{ByteCount, MachineId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use utoipa::ToSchema;

/// How deep a host is loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Line {
    /// Its state.
    #[schema(value_type = String)]
    pub state: HostState,
    /// All memory that machines share.
    #[schema(value_type = u64)]
    pub total: ByteCount,
    /// What is free of it.
    #[schema(value_type = u64)]
    pub free: ByteCount,
    /// What is kept free of it.
    #[schema(value_type = u64)]
    pub kept_free: ByteCount,
    /// What is not for machines.
    #[schema(value_type = u64)]
    pub own: ByteCount,
    /// How many machines there are.
    pub machines: usize,
    /// What their guests own.
    #[schema(value_type = u64)]
    pub owned: ByteCount,
    /// What is reserved.
    #[schema(value_type = u64)]
    pub reserved: ByteCount,
    /// What machines would have a right to if all wanted all they may have.
    #[schema(value_type = u64)]
    pub entitled: ByteCount,
    /// What they are to come to now.
    #[schema(value_type = u64)]
    pub targets: ByteCount,
    /// What they take up.
    #[schema(value_type = u64)]
    pub consumed: ByteCount,
    /// What they use.
    #[schema(value_type = u64)]
    pub active: ByteCount,
    /// What their guests own and the host does not spend: never touched, given back, equal, or compressed.
    #[schema(value_type = u64)]
    pub saved: ByteCount,
    /// What machines cost besides that, as predicted.
    #[schema(value_type = u64)]
    pub predicted: ByteCount,
    /// The same, as measured; none where not all were.
    pub measured: Option<Overhead>,
    /// The page stores of machines under our own pager; not on record.
    #[serde(default)]
    pub stores: Option<Stores>,
    /// How much more may be promised.
    #[schema(value_type = u64)]
    pub left: ByteCount,
    /// What would break, the nearest first.
    pub breaks: Vec<Break>,
}

/// Something that goes wrong when so much more is used or promised.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct Break {
    /// How far it is.
    #[schema(value_type = u64)]
    pub margin: ByteCount,
    /// What.
    pub what: What,
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// Pages are compressed, and guests wait for those they touch.
    Paging,
    /// What guests use does not fit: pages in use are taken.
    Working,
    /// No reservation is accepted any more.
    Promise,
    /// A machine is at its limit while others have memory.
    Limit {
        /// Its name.
        name: String,
    },
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paging => f.write_str("taken up, and pages are compressed that guests may touch again"),
            Self::Working => {
                f.write_str("in use, and guests' working sets no longer fit: they wait for each other")
            }
            Self::Promise => f.write_str("reserved, and no other machine with a guarantee is admitted"),
            Self::Limit { name } => {
                write!(f, "in use by {name}, and it is at its limit while others have memory")
            }
        }
    }
}

impl Line {
    /// How deep the host was loaded at a decision.
    pub fn of(tick: &Tick, basis: &Basis) -> Self {
        let names = basis.names.iter().map(|(id, name)| (*id, &**name)).collect();
        Self::drawn(tick, basis.state.tree(), &names, basis.own)
    }

    /// The same, by what a running loop knows.
    pub fn drawn(tick: &Tick, tree: &Tree, names: &BTreeMap<MachineId, &str>, own: ByteCount) -> Self {
        let (view, plan) = (&tick.view, &tick.plan);
        let sum = |of: fn(&plimsoll_policy::Position) -> ByteCount| plan.machines.iter().map(of).sum();
        let (consumed, active): (ByteCount, ByteCount) =
            (sum(|machine| machine.consumed), sum(|machine| machine.active));
        let owned = tree.machines().map(|(_, terms)| terms.size.bytes()).sum();
        let predicted = tick.overheads.iter().map(|(_, (predicted, _))| *predicted).sum();
        let is_measured = tick.overheads.len() == tree.machines().count();
        let measured = is_measured.then(|| tick.overheads.iter().map(|(_, (_, measured))| *measured).sum());
        let account = Account {
            total: view.total,
            kept_free: min_free(view.total),
            own,
            reserved: tree.reserved(),
            overhead: predicted,
            machines: tree.machines().count(),
        };
        let left = account.left();
        let mut breaks = vec![
            Break { margin: view.free.saturating_sub(HostState::Soft.line(view.total)), what: What::Paging },
            Break { margin: plan.budget.saturating_sub(active), what: What::Working },
            Break { margin: left, what: What::Promise },
        ];
        breaks.extend(plan.machines.iter().filter_map(|machine| {
            let cap = tree.terms(machine.machine)?.cap.bytes();
            let name =
                names.get(&machine.machine).map_or_else(|| machine.machine.to_string(), ToString::to_string);
            // What is its own size and not a limit breaks nothing.
            let is_limited = cap < tree.terms(machine.machine)?.size.bytes();
            is_limited
                .then(|| Break { margin: cap.saturating_sub(machine.active), what: What::Limit { name } })
        }));
        breaks.sort();
        Self {
            state: plan.state,
            total: view.total,
            free: view.free,
            kept_free: account.kept_free,
            own,
            machines: account.machines,
            owned,
            reserved: account.reserved,
            entitled: sum(|machine| machine.entitlement),
            targets: sum(|machine| machine.target),
            consumed,
            active,
            saved: owned.saturating_sub(consumed),
            predicted,
            measured,
            stores: None,
            left,
            breaks,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.machines == 1 { "" } else { "s" };
        writeln!(
            f,
            "the host is {}: {} free of {}, {} are to be",
            self.state, self.free, self.total, self.kept_free
        )?;
        writeln!(f, "{} machine{plural} own {:>8}", self.machines, self.owned)?;
        let rows = [
            ("reserved", self.reserved, "kept whatever the others want"),
            ("entitled", self.entitled, "if all wanted all they may have"),
            ("targets", self.targets, "what they are to come to now"),
            ("taken up", self.consumed, "in RAM, compressed pages included"),
            ("in use", self.active, "as sampled"),
            ("saved", self.saved, "owned and not taken up"),
        ];
        for (name, bytes, what) in rows {
            writeln!(f, "  {name:<10} {bytes:>8}  {what}")?;
        }
        writeln!(f, "  {:<10} {:>8}  tables and VMMs, predicted", "besides", self.predicted)?;
        if let Some(measured) = self.measured {
            let Overhead { vmm, page_tables, tables } = measured;
            let total = measured.total();
            writeln!(
                f,
                "  {:<10} {total:>8}  VMMs {vmm}, page tables {page_tables}, ours {tables}",
                "measured"
            )?;
        }
        if let Some(stores) = self.stores.filter(|stores| stores.data_slab_bytes > 0) {
            writeln!(f, "  {:<10} {:>8}  {stores}", "in stores", ByteCount(stores.held_bytes))?;
        }
        writeln!(f, "{} more may safely be reserved", self.left)?;
        for (place, Break { margin, what }) in self.breaks.iter().take(3).enumerate() {
            let when = if place == 0 { "first" } else { "then" };
            writeln!(f, "{when:>5}: {margin} more {what}")?;
        }
        Ok(())
    }
}
