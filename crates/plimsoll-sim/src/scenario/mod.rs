//! Scenarios: what is simulated, checked whole before anything is.
//!
//! Enters: a TOML file. Leaves: a [`Scenario`] in which nothing contradicts itself, or one sentence with file and line.
//! `file` says how it is written, and what what is left out means.
mod error;
mod file;
mod words;

pub use error::ScenarioError;

use crate::machine::{Class, Estimator, Physics};
use crate::time::Millis;
use plimsoll_policy::Ppm;
use plimsoll_policy::admission::Capacity;
use plimsoll_policy::auction::IdleTax;
use plimsoll_policy::settings::{GroupSettings, Settings};
use std::path::Path;

/// What is simulated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// What it is called.
    pub title: String,
    /// What chance is made of.
    pub seed: u64,
    /// From midnight for so long.
    pub duration: Millis,
    /// The hosts, all alike.
    pub hosts: Hosts,
    /// Which machine goes to which host.
    pub placement: Placement,
    /// How memory moves.
    pub physics: Physics,
    /// How working sets are estimated.
    pub estimator: Estimator,
    /// What idle memory is taxed.
    pub tax: IdleTax,
    /// The groups, which are on every host, and their names.
    pub groups: Vec<(String, GroupSettings)>,
    /// The machines.
    pub classes: Vec<Class>,
    /// Machines that are stopped and started again.
    pub restarts: Vec<Restart>,
}

/// Hosts that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hosts {
    /// How many.
    pub count: usize,
    /// What each has and costs.
    pub capacity: Capacity,
}

/// Which machine goes to which host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// In which order hosts are asked.
    pub order: Order,
    /// The most that the sizes of a host's machines may be, in parts of its memory; `None` leaves it to admission.
    pub overcommit: Option<Ppm>,
    /// Machines start spread over this time from midnight on.
    pub within: Millis,
}

/// In which order hosts are asked whether they admit a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// As they are numbered.
    FirstFit,
    /// The one with the least left to promise first: as loaded as its line allows.
    BestFit,
    /// The one with the most left to promise first.
    Spread,
}

/// Machines of a class that are stopped and started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// The class's place in the scenario.
    pub class: usize,
    /// The first of them stops then.
    pub at: Millis,
    /// The last of them so much later.
    pub within: Millis,
    /// How long each is away; then it asks to be admitted.
    pub down: Millis,
    /// The part of the class that is met.
    pub share: Ppm,
}

impl Scenario {
    /// Reads a scenario. Files it names are looked for beside it.
    ///
    /// # Errors
    /// The first thing that is wrong, with file and line.
    pub fn read(path: &Path) -> Result<Self, ScenarioError> {
        let file = path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|source| ScenarioError::Unreadable { file, source })?;
        Self::parse(&text, path)
    }

    /// Reads a scenario from text; `path` is what it is called and where files it names are looked for.
    ///
    /// # Errors
    /// The first thing that is wrong, with file and line.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ScenarioError> {
        file::scenario(text, path)
    }

    /// Settings of a host without machines.
    pub(crate) fn empty_host(&self) -> Settings {
        let groups = self.groups.iter().map(|(_, group)| *group).collect();
        let (tax, costs) = (self.tax, self.physics.costs);
        Settings { tax, costs, groups, ..Settings::new(self.hosts.capacity.total) }
    }
}
