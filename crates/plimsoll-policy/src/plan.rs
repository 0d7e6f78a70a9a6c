//! What is to be done: the outcome of a decision.
use crate::host_state::HostState;
use crate::ladder::Rung;
use crate::reason::Reason;
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, MachineId, PageCount};

/// Something to do to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Step {
    /// What it is to come to: whoever keeps its budget takes this as its line.
    Target(ByteCount),
    /// Take memory on a rung other than the balloon. It replaces what an earlier plan asked for and was not done yet:
    /// a plan is made from what the host shows, not from what it was told.
    Take {
        /// Which one.
        rung: Rung,
        /// Pages to take.
        pages: PageCount,
        /// What that frees.
        frees: ByteCount,
    },
    /// What its balloon is to hold.
    Balloon(ByteCount),
    /// Let it wait whenever it asks for memory.
    Stall,
    /// Let it run again.
    Resume,
}

/// Something to do, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Action {
    /// To which machine.
    pub machine: MachineId,
    /// What.
    pub step: Step,
    /// Why, with the numbers.
    pub reason: Reason,
}

/// Something worth knowing that asks for nothing to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Note {
    /// About which machine; `None` is the host.
    pub machine: Option<MachineId>,
    /// What, with the numbers.
    pub reason: Reason,
}

/// Where a machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Position {
    /// Which one.
    pub machine: MachineId,
    /// What it takes up.
    pub consumed: ByteCount,
    /// What it uses.
    pub active: ByteCount,
    /// What it would have a right to if all wanted all they may have.
    pub entitlement: ByteCount,
    /// What it is to come to now, given what the others want.
    pub target: ByteCount,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Plan {
    /// How short of memory the host is.
    pub state: HostState,
    /// What all machines share: what they have and what is free, less what they have beyond what there is, and what is kept free.
    pub budget: ByteCount,
    /// What to do, in this order: memory is freed before any is granted.
    pub actions: Vec<Action>,
    /// What else was found.
    pub reasons: Vec<Note>,
    /// Where each running machine stands, by id.
    pub machines: Vec<Position>,
}
