//! What can be wrong with a scenario.
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
