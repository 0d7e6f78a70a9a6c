//! What can be wrong with settings, and where.
use super::Place;
use plimsoll_policy::settings::SettingsError;
use plimsoll_types::ByteCount;
use std::fmt;
use std::io;
use thiserror::Error;

/// Something is wrong with settings. Nothing of them was taken over.
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
    #[error("{place}: {wrong}")]
    Wrong {
        /// Where.
        place: Place,
        /// What.
        wrong: Wrong,
    },
}

/// Everything that is wrong with settings, in the order of the files. As a sentence it is the first.
#[derive(Debug)]
pub struct Mistakes(Vec<ConfigError>);

impl Mistakes {
    /// Nothing, where there is none.
    pub(super) fn of(mut found: Vec<ConfigError>) -> Result<(), Self> {
        let place = |error: &ConfigError| match error {
            ConfigError::Read { .. } => None,
            ConfigError::Wrong { place, .. } => Some(place.clone()),
        };
        found.sort_by_key(place);
        if found.is_empty() { Ok(()) } else { Err(Self(found)) }
    }

    /// Each of them.
    pub fn each(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((first, others)) = self.0.split_first() else { return Ok(()) };
        first.fmt(f)?;
        match others.len() {
            0 => Ok(()),
            count => write!(f, " ({count} more: `plimsoll config check` tells all)"),
        }
    }
}

impl std::error::Error for Mistakes {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.first().and_then(std::error::Error::source)
    }
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
    /// Something that means nothing by itself.
    #[error("there is {one} and no {missing}: add it, or leave {one} out")]
    Lacking {
        /// What there is.
        one: &'static str,
        /// What is missing.
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
    /// One that is there twice.
    #[error("{name} is said here and in {before}: leave one of the two out")]
    Twice {
        /// Its name.
        name: String,
        /// Where it was said before.
        before: Place,
    },
    /// A rule for everything.
    #[error("{rule} has no condition: say which machines it is for, or name = \"*\" if it is for all")]
    NoCondition {
        /// Which one.
        rule: String,
    },
    /// A rule that gives settings to machines that it leaves alone.
    #[error("{rule} leaves machines alone and says {key} of them: leave one of the two out")]
    Idle {
        /// Which one.
        rule: String,
        /// What it says.
        key: &'static str,
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
