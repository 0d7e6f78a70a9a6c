//! What can be wrong with a settings file, and where.
use plimsoll_policy::settings::SettingsError;
use plimsoll_types::ByteCount;
use std::io;
use thiserror::Error;

/// A settings file was refused. Nothing of it was taken over.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It cannot be read.
    #[error("the settings {path:?} cannot be read")]
    Read {
        /// Its path.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It says something that cannot be.
    #[error("{path}:{line}: {wrong}")]
    Wrong {
        /// Its path.
        path: String,
        /// The line, from 1.
        line: usize,
        /// What.
        wrong: Wrong,
    },
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Wrong {
    /// It is not TOML, has a key nobody knows, or a value of the wrong kind.
    #[error("{0}")]
    Syntax(String),
    /// Settings contradict each other.
    #[error("{text}")]
    Settings {
        /// The contradiction, with the names the file gives.
        text: String,
        /// The same as a value, with numbers for names.
        error: SettingsError,
    },
    /// A machine has settings of two faces.
    #[error(
        "{machine} has {one}, and {other} of another face: use reservation, limit and shares, or startup, minimum, maximum, buffer and weight"
    )]
    TwoFaces {
        /// Its name.
        machine: String,
        /// A setting of one face.
        one: &'static str,
        /// A setting of another.
        other: &'static str,
    },
    /// Hyper-V's face without an end.
    #[error("{machine} has {one} and no {missing}: add it")]
    Missing {
        /// Its name.
        machine: String,
        /// What it has.
        one: &'static str,
        /// What it has not.
        missing: &'static str,
    },
    /// A group that is not there.
    #[error(
        "{owner} belongs to the group {group:?}, which is not there: add [group.{group}], or use one of {known}"
    )]
    NoSuchGroup {
        /// Who says so.
        owner: String,
        /// The group.
        group: String,
        /// Those that are there.
        known: String,
    },
    /// Nothing is left for machines.
    #[error("the host has {memory}, of which {reserve} are reserved: leave something for machines")]
    NothingLeft {
        /// What it has.
        memory: ByteCount,
        /// What is reserved.
        reserve: ByteCount,
    },
    /// A file of costs that cannot be read.
    #[error(
        "the costs {file:?} cannot be read ({why}): write them with `cargo xtask bench cost`, or leave the line out"
    )]
    NoCosts {
        /// Its path.
        file: String,
        /// What the system said.
        why: String,
    },
    /// A tax that leaves nothing.
    #[error("{0}")]
    Tax(plimsoll_policy::auction::TaxTooHigh),
}

impl ConfigError {
    pub(super) fn new(path: &str, line: usize, wrong: Wrong) -> Self {
        Self::Wrong { path: path.to_owned(), line, wrong }
    }
}

/// The key of the first setting to look at.
pub(super) const fn key(error: &SettingsError) -> &'static str {
    use SettingsError as E;
    match *error {
        E::NoMemory { .. } => "size",
        E::NotWholePages { setting, .. } | E::TooLarge { setting, .. } => setting.name(),
        E::ReservationAboveLimit { .. } | E::Overreserved { .. } => "reservation",
        E::LimitAboveSize { .. } | E::ReservedAboveLimit { .. } => "limit",
        E::MinimumAboveMaximum { .. } => "minimum",
        E::StartupOutside { .. } => "startup",
        E::BufferTooLarge { .. } => "buffer",
        E::WeightTooHigh { .. } => "weight",
        E::ZeroShares { .. } | E::TooManyShares { .. } => "shares",
        E::ObjectiveTooHigh { .. } => "stall-objective",
        E::UnknownParent { .. } | E::Cycle { .. } | E::TooDeep { .. } => "group",
        E::HostOverreserved { .. } => "memory",
        _ => "",
    }
}
