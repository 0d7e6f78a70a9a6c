//! Contradictions in settings, each with the values that contradict each other and what to do.
use super::{BUFFER_MAX, Shares, WEIGHT_MAX};
use crate::auction::{PAGES_MAX, SHARES_MAX};
use crate::part::Ppm;
use crate::tree::{DEPTH_MAX, NODES_MAX};
use core::fmt;
use plimsoll_types::{ByteCount, GroupId, MachineId};

/// Whose setting it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Owner {
    /// A machine's.
    Machine(MachineId),
    /// A group's.
    Group(GroupId),
    /// The host's, which is the outermost group.
    Host,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(id) => id.fmt(f),
            Self::Group(id) => id.fmt(f),
            Self::Host => f.write_str("the host"),
        }
    }
}

/// A setting that is a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the setting of that name")]
pub enum Setting {
    Size,
    Reservation,
    Limit,
    Startup,
    Minimum,
    Maximum,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size => "size",
            Self::Reservation => "reservation",
            Self::Limit => "limit",
            Self::Startup => "startup",
            Self::Minimum => "minimum",
            Self::Maximum => "maximum",
        })
    }
}

/// Why settings were refused. Nothing of them was taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(missing_docs, reason = "fields are the settings of those names")]
pub enum SettingsError {
    /// A machine without memory.
    NoMemory { machine: MachineId },
    /// A size that is no whole number of pages.
    NotWholePages { owner: Owner, setting: Setting, bytes: ByteCount },
    /// A size beyond what can be computed with.
    TooLarge { owner: Owner, setting: Setting, bytes: ByteCount },
    /// More is guaranteed than allowed.
    ReservationAboveLimit { owner: Owner, reservation: ByteCount, limit: ByteCount },
    /// More is allowed than the guest has.
    LimitAboveSize { machine: MachineId, limit: ByteCount, size: ByteCount },
    /// Hyper-V's face: the ends are crossed.
    MinimumAboveMaximum { machine: MachineId, minimum: ByteCount, maximum: ByteCount },
    /// Hyper-V's face: it would boot with what it may not have.
    StartupOutside { machine: MachineId, startup: ByteCount, minimum: ByteCount, maximum: ByteCount },
    /// Hyper-V's face: a buffer beyond [`BUFFER_MAX`].
    BufferTooLarge { machine: MachineId, buffer: Ppm },
    /// Hyper-V's face: a weight beyond [`WEIGHT_MAX`].
    WeightTooHigh { machine: MachineId, weight: u32 },
    /// A weight of nothing would wait for ever.
    ZeroShares { owner: Owner },
    /// Shares beyond [`SHARES_MAX`].
    TooManyShares { owner: Owner, shares: Shares },
    /// More waiting than there is time.
    ObjectiveTooHigh { machine: MachineId, objective: Ppm },
    /// Two machines or groups of one name.
    Duplicate { owner: Owner },
    /// A parent that is not there.
    UnknownParent { owner: Owner, parent: GroupId },
    /// A group that is, at some distance, its own parent.
    Cycle { group: GroupId, parent: GroupId },
    /// Groups nested deeper than [`DEPTH_MAX`].
    TooDeep { group: GroupId },
    /// More machines and groups than [`NODES_MAX`].
    TooMany { found: usize },
    /// What is nested in a group is guaranteed more than the group.
    Overreserved { group: GroupId, inside: ByteCount, reservation: ByteCount },
    /// What is nested in a group is guaranteed more than the group may have.
    ReservedAboveLimit { group: GroupId, inside: ByteCount, limit: ByteCount },
    /// All guarantees together are more than the host has.
    HostOverreserved { inside: ByteCount, capacity: ByteCount },
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoMemory { machine } => write!(f, "{machine} has a size of 0: give it at least one page"),
            Self::NotWholePages { owner, setting, bytes } => {
                write!(f, "{owner} has a {setting} of {} bytes: use a multiple of 4096", bytes.0)
            }
            Self::TooLarge { owner, setting, bytes } => {
                write!(f, "{owner} has a {setting} of {bytes}: use at most {}", PAGES_MAX.bytes())
            }
            Self::ReservationAboveLimit { owner, reservation, limit } => write!(
                f,
                "{owner} reserves {reservation}, more than its limit of {limit}: lower one or raise the other"
            ),
            Self::LimitAboveSize { machine, limit, size } => {
                write!(
                    f,
                    "{machine} has a limit of {limit}, more than its size of {size}: use at most its size"
                )
            }
            Self::MinimumAboveMaximum { machine, minimum, maximum } => {
                write!(
                    f,
                    "{machine} has a minimum of {minimum}, more than its maximum of {maximum}: exchange them"
                )
            }
            Self::StartupOutside { machine, startup, minimum, maximum } => write!(
                f,
                "{machine} starts with {startup}, which is not between its minimum of {minimum} and its maximum of \
                 {maximum}: use a value between them"
            ),
            Self::BufferTooLarge { machine, buffer } => {
                write!(f, "{machine} has a buffer of {buffer}: use at most {BUFFER_MAX}")
            }
            Self::WeightTooHigh { machine, weight } => {
                write!(f, "{machine} has a weight of {weight}: use at most {WEIGHT_MAX}")
            }
            Self::ZeroShares { owner } => write!(f, "{owner} has 0 shares: give it at least 1"),
            Self::TooManyShares { owner, shares } => {
                write!(f, "{owner} has {} shares: use at most {SHARES_MAX}", shares.0)
            }
            Self::ObjectiveTooHigh { machine, objective } => {
                write!(f, "{machine} has a stall objective of {objective}: use at most {}", Ppm::WHOLE)
            }
            Self::Duplicate { owner } => write!(f, "{owner} is there twice: give each a number of its own"),
            Self::UnknownParent { owner, parent } => {
                write!(f, "{owner} belongs to {parent}, which is not there: add it, or leave the parent out")
            }
            Self::Cycle { group, parent } => {
                write!(
                    f,
                    "{group} is nested in {parent}, which is nested in {group}: leave out one of the two"
                )
            }
            Self::TooDeep { group } => {
                write!(f, "{group} is nested too deep: use at most {DEPTH_MAX} levels")
            }
            Self::TooMany { found } => {
                write!(f, "{found} machines and groups are too many: use at most {NODES_MAX}")
            }
            Self::Overreserved { group, inside, reservation } => write!(
                f,
                "{group} reserves {reservation}, but what is nested in it reserves {inside}: raise the one or lower \
                 the other"
            ),
            Self::ReservedAboveLimit { group, inside, limit } => write!(
                f,
                "{group} has a limit of {limit}, but what is nested in it reserves {inside}: raise the one or lower \
                 the other"
            ),
            Self::HostOverreserved { inside, capacity } => {
                write!(
                    f,
                    "the host has {capacity} for machines, but {inside} is reserved: lower a reservation"
                )
            }
        }
    }
}

impl core::error::Error for SettingsError {}
