//! What processors keep of translations, what makes them forget it, and whether a change of a table is safe.
//!
//! Enters: changes of entries and the fences that follow. Leaves: that no stale translation is left, or which may be, what
//! it would do, and the fences that were needed ([`check()`], [`needed`]). [`Tlb`] is a processor's caches as a model that
//! runs: it keeps what it read as long as it may.
//!
//! A fence counts for what every processor of its architecture must do, and for no more: nothing may depend on what most of
//! them do besides. The other way round a processor may have cached whatever its manual does not forbid, at any time,
//! unasked, and may make a new translation out of a stale one. So the order of fences matters: a combined translation
//! that is dropped first comes back from the second stage's stale entry.
//!
//! One processor is looked at: to be sure of a machine, check each with the fences that it executed and those that were
//! broadcast to it.
//!
//! # Presumed
//!
//! A table that is no longer named, and memory that is no longer mapped, hold what they held until the fences are done: a walk
//! through a stale entry finds in them what it would have found before. [`crate::TableFrames`] asks for that.
mod bank;
mod check;
mod fence;
mod recipe;

pub use bank::{Bank, Found, Tables, Tlb, UnevenBank};
pub use check::{Architecture, Breaks, Change, Consequence, Missing, Regime, Remains, Stage, Stages, check};
pub(crate) use check::{Caches, consequence, must_break};
pub use fence::{Arm, Fence, RiscV, Svm, Vmx, X86};
pub use recipe::{Recipe, needed};

use crate::address::{Output, Span};

/// Whose translation it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The host's own, or a machine's without any host: VPID 0, ASID 0 of SVM.
    Host,
    /// A guest's: its VPID, VMID or, with SVM, ASID.
    Guest(u16),
    /// A guest's that no fence names: tables that several guests' tags are used with.
    AnyGuest,
}

/// An address space: PCID or ASID; `None` is one that no fence names, for tables that several share.
pub type Space = Option<u16>;

/// Who runs, or runs into a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Whose addresses are translated.
    pub owner: Owner,
    /// In which address space.
    pub space: Space,
}

/// The stages that went into what is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Through {
    /// The first: virtual to (guest) physical. SDM: "linear mappings".
    First,
    /// The second: guest physical to physical. SDM: "guest-physical mappings".
    Second,
    /// Both at once. SDM: "combined mappings".
    Both,
}

/// What an entry that is cached does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// It ends a walk: a TLB's entry.
    Leaf,
    /// It shortens a walk: where the next table is, in a paging-structure cache or walk cache.
    Structure,
}

/// What a cached translation is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cached {
    /// The stages in it.
    pub through: Through,
    /// What it does.
    pub kind: Kind,
    /// Who runs, and in which address space, while it may be used.
    pub tag: Tag,
    /// Intel: the root of the second stage (EP4TA) that it was made with; `None` where there is none, or where no fence
    /// names it.
    pub root: Option<Output>,
    /// It may be used in every address space.
    pub global: bool,
    /// The addresses before the first stage that it translates; `None` if it has none or nobody can know.
    pub first: Option<Span>,
    /// The addresses before the second stage that it depends on.
    pub second: Option<Span>,
}

/// Whether two ranges have an address in common.
pub(crate) const fn meet(one: Span, other: Span) -> bool {
    one.first().0 <= other.last().0 && other.first().0 <= one.last().0
}
