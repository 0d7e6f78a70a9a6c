//! One machine as the control loop sees it, whoever keeps its memory.
//!
//! Enters: what a plan says about the machine. Leaves: what is seen of it, and what became of what was asked. What must
//! never happen: a call that waits for a guest or for a VMM, since one thread asks all machines; whoever has to wait for
//! somebody does so on a thread of its own and shows here what it saw last ([`balloon`]).
//!
//! | back end | whose memory | takes pages by |
//! |---|---|---|
//! | [`Managed`] | machines born under our own pager | a target in the ledger, which the governor keeps every 2 ms |
//! | [`Attached`] | running VMMs, from outside | asking the kernel (`process_madvise`), paced |
//!
//! An attached one may have a [`Balloon`](balloon::Balloon) beside it.
mod attached;
pub mod balloon;
mod chart;
mod managed;
mod memory;
mod migration;
mod overhead;

pub use attached::Attached;
pub use chart::{CELLS, Cell, Chart, Given, OtherWay, Pages, Table, Whereabouts};
pub use managed::Managed;
pub use memory::{Memory, reopen, why_counted_only};
pub use migration::{Phase as MigrationPhase, Watch as MigrationWatch};
pub use overhead::{Overhead, OverheadError, measure};
pub use plimsoll_attach::control::Change as Cooperation;

use balloon::Farewell;
use plimsoll_policy::admission::Overheads;
use plimsoll_policy::view::MachineView;
use plimsoll_policy::{Costs, Rung, Step};
use plimsoll_sys::ProcessId;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Instant;

/// One machine's memory.
pub trait Backend: Send {
    /// What the policy wants to know of the machine, counted from the last call where it counts. Quick: what takes long is
    /// looked at less often.
    ///
    /// # Errors
    /// [`Trouble`], which is this machine's alone.
    fn observe(&mut self, id: MachineId, now: Instant) -> Result<MachineView, Trouble>;

    /// What taking memory costs here, by the settings in force, before each look. A back end that sees its guest wait has no need of it.
    fn learn(&mut self, _costs: &Costs) {}

    /// Takes over what a plan says about the machine, in its order; nothing said is also an order: what an earlier plan
    /// asked for and was not done yet is not to be done any more, except for targets and balloons, which stand.
    /// Says of each step what became of it.
    fn apply(&mut self, steps: &[Step], now: Instant) -> Vec<Done>;

    /// Goes on with what was asked for and takes longer. Says when it wants to go on, if so.
    ///
    /// # Errors
    /// As [`observe`](Self::observe).
    fn work(&mut self, _now: Instant) -> Result<Option<Instant>, Trouble> {
        Ok(None)
    }

    /// Whether it has ended, as far as that is told without looking further. One system call at most.
    fn is_gone(&self) -> bool {
        false
    }

    /// Whether anything may have happened to it since it was observed: of one to which nothing has, nothing new is decided. No system
    /// call.
    fn may_have_changed(&self) -> bool {
        true
    }

    /// Takes so much, once, beside what plans ask for, in place of what was asked for so before: nothing takes that back.
    fn reclaim(&mut self, _pages: PageCount, _now: Instant) -> Done {
        Done::Refused(Refused::NoSuchRung(Rung::Compress))
    }

    /// Takes nothing more from the machine, whoever wants it, or takes again.
    fn hold(&mut self, _is_to: bool) {}

    /// Begins to give the machine back to its VMM, where it is ours; `budget` is what everybody may use. What came of it shows in
    /// its [`departure`](Self::departure), and when it is gone it is [given back](Trouble::GivenBack).
    ///
    /// # Errors
    /// Why that cannot be, in words; nothing was begun.
    fn give_back(&mut self, _budget: ByteCount) -> Result<(), String> {
        Err("its memory is its VMM's already".to_owned())
    }

    /// How far giving it back has come.
    fn departure(&self) -> Departure {
        Departure::None
    }

    /// When what was asked of its VMM has been given back, after this is dropped; nothing where that is at once.
    fn farewell(&self) -> Option<Farewell> {
        None
    }

    /// That its VMM's own interface failed for good, or works again, since the last call.
    fn news(&mut self) -> Option<Cooperation> {
        None
    }

    /// Whose the machine's memory is.
    fn kind(&self) -> Kind {
        Kind::Attached
    }

    /// Its VMM.
    fn process(&self) -> Option<ProcessId> {
        None
    }

    /// The RAM its guest owns, as far as that is seen.
    fn size(&self) -> Option<ByteCount> {
        None
    }

    /// Where its pages are, as of the last time it was observed.
    fn whereabouts(&self) -> Option<Whereabouts> {
        None
    }

    /// What a machine of its kind costs besides its guest's pages, as it is predicted.
    fn predicted(&self) -> Overheads {
        Overheads::MEASURED
    }

    /// What the machine costs besides its guest's pages, measured. May take some milliseconds.
    fn overhead(&mut self) -> Option<Overhead> {
        None
    }
}

/// How far giving a machine back has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Departure {
    /// It is not to be given back.
    #[default]
    None,
    /// It is under way: nothing more is taken from it.
    UnderWay,
    /// It was in vain, for this reason. It is managed as before.
    Vain(String),
}

/// Whose a machine's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its VMM's, which is managed from outside.
    Attached,
    /// Our own pager's: its VMM has handed it over.
    HandedOver,
}

/// A machine cannot be looked at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// It has ended, or has moved away: it will not be asked again.
    #[error("it is gone: {0}")]
    Gone(String),
    /// All of it is its VMM's again, because that was ordered: it will not be asked again.
    #[error("it was given back to its VMM")]
    GivenBack,
    /// Not now. It is left out of this decision, and asked again for the next.
    #[error("it cannot be looked at: {0}")]
    Unseen(String),
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Done {
    /// It is in force, or was begun: what came of it shows in what is observed.
    Begun,
    /// Nothing was done, and will not be.
    Refused(Refused),
}

/// Why a step is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refused {
    /// This back end has no such way to take memory. The policy was not offered it, so this is a bug.
    NoSuchRung(Rung),
    /// The machine has no balloon that could be asked.
    NoBalloon,
    /// A machine that is not ours cannot be made to wait.
    CannotStall,
    /// It is being migrated, or a snapshot of it saved: nothing may be taken.
    Migrating,
    /// What whoever takes the pages says.
    Short(String),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchRung(rung) => write!(f, "{rung} is not to be had of it"),
            Self::NoBalloon => f.write_str("it has no balloon that could be asked"),
            Self::CannotStall => f.write_str("a machine managed from outside cannot be made to wait"),
            Self::Migrating => f.write_str("it is being migrated, or a snapshot of it saved"),
            Self::Short(why) => f.write_str(why),
        }
    }
}
