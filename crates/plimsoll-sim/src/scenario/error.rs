//! What can be wrong with a scenario.
use crate::trace::TraceError;
use plimsoll_policy::settings::SettingsError;

/// Why a scenario was refused. Nothing was simulated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScenarioError {
    /// The file cannot be read.
    #[error("{file} cannot be read")]
    Unreadable {
        /// Which one.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no TOML, or says what nobody knows.
    #[error("{file}:{line}: {what}")]
    Written {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what would be right.
        what: String,
    },
    /// A record it names cannot be used.
    #[error("{file}:{line}: there is no such demand")]
    Trace {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// Why.
        #[source]
        source: TraceError,
    },
    /// The costs it names cannot be read.
    #[error(
        "{file}:{line}: there are no such costs: write them with `cargo xtask bench cost`, or leave the line out"
    )]
    Costs {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Settings contradict themselves.
    #[error("{file}:{line}: {whose} cannot be")]
    Settings {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// The class's or group's name.
        whose: String,
        /// The contradiction.
        #[source]
        source: SettingsError,
    },
}
