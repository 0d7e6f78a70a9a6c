//! What can be wrong with a settings file, and where.
use plimsoll_policy::settings::{Owner, SettingsError};
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
    /// A tax that leaves nothing.
    #[error("{0}")]
    Tax(plimsoll_policy::auction::TaxTooHigh),
}

impl ConfigError {
    pub(super) fn new(path: &str, line: usize, wrong: Wrong) -> Self {
        Self::Wrong { path: path.to_owned(), line, wrong }
    }
}

/// Whose setting is the first to look at, and which.
pub(super) fn culprit(error: &SettingsError) -> (Owner, &'static str) {
    use SettingsError as E;
    let setting = |setting: plimsoll_policy::settings::Setting| {
        use plimsoll_policy::settings::Setting as S;
        match setting {
            S::Size => "size",
            S::Reservation => "reservation",
            S::Limit => "limit",
            S::Startup => "startup",
            S::Minimum => "minimum",
            S::Maximum => "maximum",
        }
    };
    match *error {
        E::NoMemory { machine } => (Owner::Machine(machine), "size"),
        E::NotWholePages { owner, setting: of, .. } | E::TooLarge { owner, setting: of, .. } => {
            (owner, setting(of))
        }
        E::ReservationAboveLimit { owner, .. } => (owner, "reservation"),
        E::LimitAboveSize { machine, .. } => (Owner::Machine(machine), "limit"),
        E::MinimumAboveMaximum { machine, .. } => (Owner::Machine(machine), "minimum"),
        E::StartupOutside { machine, .. } => (Owner::Machine(machine), "startup"),
        E::BufferTooLarge { machine, .. } => (Owner::Machine(machine), "buffer"),
        E::WeightTooHigh { machine, .. } => (Owner::Machine(machine), "weight"),
        E::ZeroShares { owner } | E::TooManyShares { owner, .. } => (owner, "shares"),
        E::ObjectiveTooHigh { machine, .. } => (Owner::Machine(machine), "stall-objective"),
        E::Duplicate { owner } => (owner, ""),
        E::UnknownParent { owner, .. } => (owner, "group"),
        E::Cycle { group, .. } | E::TooDeep { group } => (Owner::Group(group), "group"),
        E::Overreserved { group, .. } => (Owner::Group(group), "reservation"),
        E::ReservedAboveLimit { group, .. } => (Owner::Group(group), "limit"),
        E::HostOverreserved { .. } => (Owner::Host, "memory"),
        _ => (Owner::Host, ""),
    }
}

/// The error's sentence, in which machines and groups have the names the file gives them.
pub(super) fn named(error: &SettingsError, name: impl Fn(Owner) -> Option<(&'static str, String)>) -> String {
    use plimsoll_types::{GroupId, MachineId};
    let number = |word: &str, prefix: &str| word.strip_prefix(prefix)?.parse().ok();
    let owner = |word: &str| {
        number(word, "vm")
            .map(|id| Owner::Machine(MachineId(id)))
            .or_else(|| number(word, "group").map(|id| Owner::Group(GroupId(id))))
    };
    let replaced = |word: &str| {
        let bare = word.trim_end_matches([',', ':']);
        let (_, known) = name(owner(bare)?)?;
        Some(known + word.strip_prefix(bare)?)
    };
    let text = error.to_string();
    text.split(' ')
        .map(|word| replaced(word).unwrap_or_else(|| word.to_owned()))
        .collect::<Vec<_>>()
        .join(" ")
}
