//! What an operator says about a host, as a file.
//!
//! Enters: TOML. Leaves: a [`Config`] that contradicts itself nowhere, or one sentence with file, line and what to do. Nothing
//! of a file with a mistake is taken over. What must never happen: a key that is read past because it is misspelt.
//!
//! ```toml
//! [host]
//! memory = "4G"            # what machines share; left out: all the host has
//! reserve = "256M"         # of it, for the manager and whatever else is no machine
//! idle-tax = "75%"
//! costs = "costs.json"     # what `cargo xtask bench cost` has written; left out: what we measured
//!
//! [group.tenant]           # machines belong to the host unless they say otherwise
//! reservation = "1G"
//! limit = "3G"
//! shares = 5000
//! sharing = true           # its machines may share pages with each other
//!
//! [machine.web]            # ESX's face
//! group = "tenant"
//! reservation = "512M"
//! limit = "2G"
//! shares = 10000
//! highest = "compress"     # or guest-free, balloon, sharing, disk; never-page is sharing
//! stall-objective = "0.1%"
//! qmp = "/run/web.qmp"     # QEMU's monitor, if nobody else uses it; api for Cloud Hypervisor and Firecracker
//!
//! [machine.db]             # Hyper-V's face
//! startup = "1G"
//! minimum = "256M"
//! maximum = "4G"
//! buffer = "20%"
//! weight = 5000
//!
//! [machine.realtime]
//! kind = "dedicated"       # or static
//! ```
mod error;
mod file;

pub use error::{ConfigError, Wrong};
pub use file::Part;

use plimsoll_policy::auction::IdleTax;
use plimsoll_policy::settings::{
    Face, GroupSettings, MachineSettings, Owner, Settings, SettingsError, Shares, Terms,
};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::{Costs, Ppm, Rung};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What an operator says about a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What machines share; none is all the host has.
    pub memory: Option<ByteCount>,
    /// Of it, what is not for machines.
    pub reserve: ByteCount,
    /// What idle memory is taxed.
    pub tax: IdleTax,
    /// What taking memory costs here: what the file says that the settings name; what we measured where none is named.
    pub costs: Costs,
    /// The groups and their names.
    pub groups: BTreeMap<String, GroupSettings>,
    /// The machines by name.
    pub machines: BTreeMap<String, MachineConfig>,
}

/// What an operator says about a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// The group it belongs to.
    pub parent: Option<GroupId>,
    /// Its memory.
    pub face: FaceConfig,
    /// The dearest way to take memory from it that is allowed.
    pub highest: Rung,
    /// The share of time its processors may wait for memory.
    pub stall_objective: Ppm,
    /// Its QMP monitor.
    pub qmp: Option<PathBuf>,
    /// Its API socket.
    pub api: Option<PathBuf>,
}

/// A machine's memory, of which its own size may not be said: it is then what the machine shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaceConfig {
    /// ESX's.
    Guarantee {
        /// The RAM the guest owns.
        size: Option<ByteCount>,
        /// What it keeps.
        reservation: ByteCount,
        /// What it never exceeds; none is its size.
        limit: Option<ByteCount>,
        /// Its weight.
        shares: Shares,
    },
    /// Hyper-V's, or one in which everything is said.
    Whole(Face),
    /// All of its memory, always.
    Static {
        /// The RAM the guest owns.
        size: Option<ByteCount>,
    },
    /// The same, never touched.
    Dedicated {
        /// The RAM the guest owns.
        size: Option<ByteCount>,
    },
}

impl Default for Config {
    /// Nothing was said.
    fn default() -> Self {
        let (memory, reserve, tax, costs) = (None, ByteCount(0), IdleTax::USUAL, Costs::MEASURED);
        Self { memory, reserve, tax, costs, groups: BTreeMap::new(), machines: BTreeMap::new() }
    }
}

impl Default for MachineConfig {
    /// A machine about which nothing was said: no guarantee, no limit, normal shares.
    fn default() -> Self {
        let usual = MachineSettings::new(MachineId(0), Face::Static { size: ByteCount(0) });
        Self {
            parent: None,
            face: FaceConfig::Guarantee {
                size: None,
                reservation: ByteCount(0),
                limit: None,
                shares: Shares::NORMAL,
            },
            highest: usual.highest,
            stall_objective: usual.stall_objective,
            qmp: None,
            api: None,
        }
    }
}

impl MachineConfig {
    /// Its settings, when its guest owns `shown`.
    pub fn settings(&self, id: MachineId, shown: ByteCount) -> MachineSettings {
        let face = match self.face {
            FaceConfig::Whole(face) => face,
            FaceConfig::Guarantee { size, reservation, limit, shares } => {
                let size = size.unwrap_or(shown);
                Face::Guarantee { size, reservation, limit: limit.unwrap_or(size), shares }
            }
            FaceConfig::Static { size } => Face::Static { size: size.unwrap_or(shown) },
            FaceConfig::Dedicated { size } => Face::Dedicated { size: size.unwrap_or(shown) },
        };
        let Self { parent, highest, stall_objective, .. } = *self;
        MachineSettings { parent, highest, stall_objective, ..MachineSettings::new(id, face) }
    }

    /// The least its guest can own by what is said.
    fn least(&self) -> ByteCount {
        match self.face {
            FaceConfig::Guarantee { size: None, reservation, limit, .. } => {
                let page = ByteCount(plimsoll_types::PAGE_SIZE as u64);
                limit.unwrap_or(reservation).max(reservation).max(page).pages_ceil().bytes()
            }
            FaceConfig::Static { size: None } | FaceConfig::Dedicated { size: None } => {
                ByteCount(plimsoll_types::PAGE_SIZE as u64)
            }
            _ => ByteCount(0),
        }
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`], with file and line where there is one.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
        Self::parse(&text, &shown)
    }

    /// Checks a text; `path` is what it is called. A file of costs that it names is read.
    ///
    /// # Errors
    /// [`ConfigError::Wrong`].
    pub fn parse(text: &str, path: &str) -> Result<Self, ConfigError> {
        let (mut config, costs) =
            file::parse(text).map_err(|(line, wrong)| ConfigError::new(path, line, wrong))?;
        if let Some(named) = costs {
            config.costs = file::costs_in(&named, text, path)?;
        }
        let ids: BTreeMap<MachineId, &str> =
            (1..).map(MachineId).zip(config.machines.keys().map(String::as_str)).collect();
        let names = |owner: Owner| match owner {
            Owner::Machine(id) => ids.get(&id).map(|name| ("machine", (*name).to_owned())),
            Owner::Group(id) => group_name(&config.groups, id).map(|name| ("group", name)),
            Owner::Host => None,
        };
        let wrong = |error: SettingsError| {
            let key = error::key(&error);
            let line = match names(error.owner()) {
                Some((kind, name)) => file::line_of(text, &[kind, &name, key]),
                None => file::line_of(text, &["host", key]),
            };
            let text = error.named(&|owner| names(owner).map(|(_, name)| name)).to_string();
            ConfigError::new(path, line, Wrong::Settings { text, error })
        };
        let machines: Vec<MachineSettings> = ids
            .iter()
            .filter_map(|(id, name)| config.machines.get(*name).map(|machine| (id, machine)))
            .map(|(id, machine)| machine.settings(*id, machine.least()))
            .collect();
        // One after the other first, so that a contradiction inside one is not told as one among many.
        machines.iter().try_for_each(|machine| Terms::of(machine).map(drop)).map_err(wrong)?;
        let capacity =
            config.memory.map_or(ByteCount(u64::MAX), |memory| memory.saturating_sub(config.reserve));
        Tree::new(Settings { machines, ..config.settings(capacity) }).map_err(wrong)?;
        Ok(config)
    }

    /// The same with the numbers that groups had before. One that is new gets a number that none had, so that no machine is taken for one
    /// of another group's.
    #[must_use]
    pub fn numbered_as(mut self, before: &Self) -> Self {
        let most = before.groups.values().map(|group| group.id.0).max().unwrap_or(0);
        let mut free = (most + 1..).map(GroupId);
        let numbers: BTreeMap<GroupId, GroupId> = self
            .groups
            .iter()
            .filter_map(|(name, group)| {
                let known = before.groups.get(name).map(|group| group.id);
                Some((group.id, known.or_else(|| free.next())?))
            })
            .collect();
        let new = |id: GroupId| numbers.get(&id).copied().unwrap_or(id);
        for group in self.groups.values_mut() {
            group.id = new(group.id);
            group.parent = group.parent.map(new);
            group.domain = group.domain.map(|_| DomainId(group.id.0));
        }
        self.machines.values_mut().for_each(|machine| machine.parent = machine.parent.map(new));
        self
    }

    /// The host's settings, without machines.
    pub fn settings(&self, capacity: ByteCount) -> Settings {
        let groups = self.groups.values().copied().collect();
        Settings { tax: self.tax, costs: self.costs, groups, ..Settings::new(capacity) }
    }

    /// What is said about a machine; the usual where nothing is.
    pub fn machine(&self, name: &str) -> MachineConfig {
        self.machines.get(name).cloned().unwrap_or_default()
    }
}

/// The name that a group of these has.
pub(crate) fn group_name(groups: &BTreeMap<String, GroupSettings>, id: GroupId) -> Option<String> {
    groups.iter().find(|(_, group)| group.id == id).map(|(name, _)| name.clone())
}

#[cfg(test)]
mod tests;
