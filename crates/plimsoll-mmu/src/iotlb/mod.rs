//! What remapping hardware and devices keep of translations, what makes them forget it, and whether a change is safe.
//!
//! Enters: a change of an entry of a domain's tables, or of what says which tables a device has, and the commands that follow. Leaves:
//! that nothing stale is left, or what may be, what it would do, and the commands that were needed ([`check()`], [`needed`]). It is to
//! devices what [`crate::tlb`] is to processors, and by the same rules: a command counts for what its manual promises and no more, and
//! what no manual forbids is cached, and used to cache more.
//!
//! Four things can be stale, each made of the ones before it: which tables a device has, entries that name tables, translations, and
//! what a device was told of them (ATS). A fifth is an access that was translated and has not reached memory: a frame is somebody
//! else's only when there is none such. So all commands count only once a wait behind them is over.
//!
//! One device is looked at: to be sure of a domain, check each of its devices, and each of its units with the commands it was given.
//!
//! # Presumed
//!
//! Stores to tables are seen by a unit before the commands after them: it is coherent, or was made to look. Tables that are no longer
//! named hold what they held until the last wait is over. Accesses of a device by its own translations are over when it has confirmed
//! that it has dropped them, as PCIe has it.
mod check;
mod command;

pub use check::{Change, Context, Device, Maker, Missing, Recipe, Remains, Unit, check, needed};
pub use command::{AmdVi, Command, Depth, Drain, Smmu, Vtd};

use crate::address::Span;

/// What may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Which tables a device has: of a context entry, device table entry or stream table entry.
    Context,
    /// An entry that names a table.
    Structure,
    /// A translation in the unit.
    Leaf,
    /// A translation in the device.
    Remote,
    /// An access that the unit has translated and that is not done.
    Access,
}

/// Something that is kept, and what commands know it by. What a thing is not known by is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kept {
    /// What it is.
    pub kind: Kind,
    /// The device.
    pub device: Option<u16>,
    /// The domain: domain identifier or VMID.
    pub domain: Option<u16>,
    /// The device's addresses that it translates; `None` for all, or any.
    pub pages: Option<Span>,
}
