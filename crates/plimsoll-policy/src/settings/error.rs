//! Contradictions in settings, each with the values that contradict each other and what to do.
use super::{BUFFER_MAX, Shares, WEIGHT_MAX};
use crate::auction::{PAGES_MAX, SHARES_MAX};
use crate::part::Ppm;
use crate::tree::{DEPTH_MAX, NODES_MAX};
use alloc::string::String;
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

impl Setting {
    /// What it is called, also in settings files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Reservation => "reservation",
            Self::Limit => "limit",
            Self::Startup => "startup",
            Self::Minimum => "minimum",
            Self::Maximum => "maximum",
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
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

impl SettingsError {
    /// Whose setting is the first to look at.
    pub const fn owner(&self) -> Owner {
        match *self {
            Self::NoMemory { machine }
            | Self::LimitAboveSize { machine, .. }
            | Self::MinimumAboveMaximum { machine, .. }
            | Self::StartupOutside { machine, .. }
            | Self::BufferTooLarge { machine, .. }
            | Self::WeightTooHigh { machine, .. }
            | Self::ObjectiveTooHigh { machine, .. } => Owner::Machine(machine),
            Self::NotWholePages { owner, .. }
            | Self::TooLarge { owner, .. }
            | Self::ReservationAboveLimit { owner, .. }
            | Self::ZeroShares { owner }
            | Self::TooManyShares { owner, .. }
            | Self::Duplicate { owner }
            | Self::UnknownParent { owner, .. } => owner,
            Self::Cycle { group, .. }
            | Self::TooDeep { group }
            | Self::Overreserved { group, .. }
            | Self::ReservedAboveLimit { group, .. } => Owner::Group(group),
            Self::TooMany { .. } | Self::HostOverreserved { .. } => Owner::Host,
        }
    }

    /// The sentence in which machines and groups have the names that `name` knows.
    pub fn named<'a>(&'a self, name: &'a Names<'a>) -> impl fmt::Display + 'a {
        Named { error: self, name }
    }
}

/// The names that somebody gives to machines and groups.
pub type Names<'a> = dyn Fn(Owner) -> Option<String> + 'a;

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.named(&|_| None).fmt(f)
    }
}

/// An owner by its name, or else by its number.
struct Called<'a>(Owner, &'a Names<'a>);

impl fmt::Display for Called<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.1)(self.0) {
            Some(name) => f.write_str(&name),
            None => self.0.fmt(f),
        }
    }
}

struct Named<'a> {
    error: &'a SettingsError,
    name: &'a Names<'a>,
}

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use SettingsError as E;
        let whose = Called(self.error.owner(), self.name);
        let group = |id| Called(Owner::Group(id), self.name);
        match *self.error {
            E::NoMemory { .. } => write!(f, "{whose} has a size of 0: give it at least one page"),
            E::NotWholePages { setting, bytes, .. } => {
                write!(f, "{whose} has a {setting} of {} bytes: use a multiple of 4096", bytes.0)
            }
            E::TooLarge { setting, bytes, .. } => {
                write!(f, "{whose} has a {setting} of {bytes}: use at most {}", PAGES_MAX.bytes())
            }
            E::ReservationAboveLimit { reservation, limit, .. } => write!(
                f,
                "{whose} reserves {reservation}, more than its limit of {limit}: lower one or raise the other"
            ),
            E::LimitAboveSize { limit, size, .. } => {
                write!(
                    f,
                    "{whose} has a limit of {limit}, more than its size of {size}: use at most its size"
                )
            }
            E::MinimumAboveMaximum { minimum, maximum, .. } => {
                write!(
                    f,
                    "{whose} has a minimum of {minimum}, more than its maximum of {maximum}: exchange them"
                )
            }
            E::StartupOutside { startup, minimum, maximum, .. } => write!(
                f,
                "{whose} starts with {startup}, which is not between its minimum of {minimum} and its maximum of \
                 {maximum}: use a value between them"
            ),
            E::BufferTooLarge { buffer, .. } => {
                write!(f, "{whose} has a buffer of {buffer}: use at most {BUFFER_MAX}")
            }
            E::WeightTooHigh { weight, .. } => {
                write!(f, "{whose} has a weight of {weight}: use at most {WEIGHT_MAX}")
            }
            E::ZeroShares { .. } => write!(f, "{whose} has 0 shares: give it at least 1"),
            E::TooManyShares { shares, .. } => {
                write!(f, "{whose} has {} shares: use at most {SHARES_MAX}", shares.0)
            }
            E::ObjectiveTooHigh { objective, .. } => {
                write!(f, "{whose} has a stall objective of {objective}: use at most {}", Ppm::WHOLE)
            }
            E::Duplicate { .. } => write!(f, "{whose} is there twice: give each a number of its own"),
            E::UnknownParent { parent, .. } => {
                let parent = group(parent);
                write!(f, "{whose} belongs to {parent}, which is not there: add it, or leave the parent out")
            }
            E::Cycle { parent, .. } => {
                let parent = group(parent);
                write!(
                    f,
                    "{whose} is nested in {parent}, which is nested in {whose}: leave out one of the two"
                )
            }
            E::TooDeep { .. } => {
                write!(f, "{whose} is nested too deep: use at most {DEPTH_MAX} levels")
            }
            E::TooMany { found } => {
                write!(f, "{found} machines and groups are too many: use at most {NODES_MAX}")
            }
            E::Overreserved { inside, reservation, .. } => write!(
                f,
                "{whose} reserves {reservation}, but what is nested in it reserves {inside}: raise the one or lower \
                 the other"
            ),
            E::ReservedAboveLimit { inside, limit, .. } => write!(
                f,
                "{whose} has a limit of {limit}, but what is nested in it reserves {inside}: raise the one or lower \
                 the other"
            ),
            E::HostOverreserved { inside, capacity } => {
                write!(
                    f,
                    "the host has {capacity} for machines, but {inside} is reserved: lower a reservation"
                )
            }
        }
    }
}

impl core::error::Error for SettingsError {}
