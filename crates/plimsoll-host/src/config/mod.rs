//! What an operator says about a host, as files.
//!
//! Enters: TOML: one file for the host, and beside it one for each machine and group in `machines.d` and `groups.d`, if people like that
//! better than tables. Leaves: a [`Config`] that contradicts itself nowhere, or every [mistake](Mistakes), each a sentence with file, line and
//! what to do. Nothing of files with a mistake is taken over. What must never happen: a key that is read past because it is misspelt.
//!
//! ```toml
//! [host]
//! memory = "4G"
//!
//! [group.tenant]
//! limit = "3G"
//!
//! [machine.web]
//! group = "tenant"
//! reservation = "512M"
//!
//! [[rule]]
//! name = "test-*"
//! group = "tenant"
//! ```
//!
//! * [`keys`] lists every key; `read` understands a file by that list; `whole` puts the files together and finds contradictions.
mod error;
pub mod keys;
mod read;
mod rules;
pub(crate) mod texts;
mod whole;

pub use error::{ConfigError, Mistakes, Wrong};
pub use read::{Kind, Part, Place};
pub use rules::{Conditions, Pattern, Rule, Traits};
pub use texts::Texts;

use plimsoll_policy::auction::IdleTax;
use plimsoll_policy::settings::{Face, GroupSettings, MachineSettings, Settings, Shares};
use plimsoll_policy::{Costs, Ppm, Rung};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// What an operator says about a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What machines share; none is all the host has.
    pub memory: Option<ByteCount>,
    /// Of it, what is not for machines.
    pub reserve: ByteCount,
    /// What a daemon may use with its machines, if nobody has told it otherwise.
    pub budget: Option<ByteCount>,
    /// What idle memory is taxed.
    pub tax: IdleTax,
    /// The share of one processor within which a daemon's pagers store pages ahead of demand.
    pub storing_share: Ppm,
    /// What taking memory costs here: what the file says that the settings name; what we measured where none is named.
    pub costs: Costs,
    /// The groups and their names.
    pub groups: BTreeMap<String, GroupSettings>,
    /// The machines by name.
    pub machines: BTreeMap<String, MachineConfig>,
    /// What is said about others, the first that matches before the rest.
    pub rules: Vec<Rule>,
    /// Who may ask a daemon.
    pub api: ApiConfig,
}

/// Who may use a daemon's API beside root and the user that runs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiConfig {
    /// A group of the host's users, by name or number, on the socket.
    pub group: Option<(String, Role)>,
    /// Clients elsewhere.
    pub remote: Option<RemoteConfig>,
}

/// What somebody who may ask may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// See everything that the API shows.
    Read,
    /// Change things as well.
    Change,
}

/// The API over TLS, for clients that show a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// Where.
    pub listen: SocketAddr,
    /// The daemon's own certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Who signs clients' certificates.
    pub client_ca: PathBuf,
    /// Names of clients that may change things.
    pub may_change: Vec<Pattern>,
    /// Names of clients that may read.
    pub may_read: Vec<Pattern>,
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
        Self {
            memory: None,
            reserve: ByteCount(0),
            budget: None,
            tax: IdleTax::USUAL,
            storing_share: Ppm::WHOLE,
            costs: Costs::MEASURED,
            groups: BTreeMap::new(),
            machines: BTreeMap::new(),
            rules: Vec::new(),
            api: ApiConfig::default(),
        }
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
    /// Reads and checks a file, and what is in `machines.d` and `groups.d` beside it.
    ///
    /// # Errors
    /// [`Mistakes`]: all of them.
    pub fn read(path: &Path) -> Result<Self, Mistakes> {
        Self::read_texts(path).map(|(config, _)| config)
    }

    /// The same, with the texts that it read.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn read_texts(path: &Path) -> Result<(Self, Texts), Mistakes> {
        let mut texts = Texts::default();
        let config = whole::read(path, texts::Texted::Now(&mut texts))?;
        Ok((config, texts))
    }

    /// What a file, and those beside it, said when these texts were read.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn of_texts(path: &Path, texts: &Texts) -> Result<Self, Mistakes> {
        whole::read(path, texts::Texted::Then(texts))
    }

    /// Checks a text; `path` is what it is called. A file of costs that it names is read.
    ///
    /// # Errors
    /// [`Mistakes`].
    pub fn parse(text: &str, path: &str) -> Result<Self, Mistakes> {
        whole::parse(text, path)
    }

    /// Whether a daemon can have these settings.
    ///
    /// # Errors
    /// A sentence, where they say what a daemon is told otherwise.
    pub fn suits_a_daemon(&self) -> Result<(), &'static str> {
        if self.memory.is_some() || self.reserve > ByteCount(0) {
            return Err(
                "the settings say what memory there is; leave memory and reserve out: a daemon has a budget",
            );
        }
        Ok(())
    }

    /// The first rule for a machine that is seen so; none where a table is its own.
    pub fn rule(&self, traits: &Traits) -> Option<&Rule> {
        let is_named = self.machines.contains_key(&traits.name);
        self.rules.iter().filter(|_| !is_named).find(|rule| rule.conditions.hold(traits))
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
        let rules = self.rules.iter_mut().filter_map(|rule| rule.config.as_mut());
        self.machines.values_mut().chain(rules).for_each(|machine| machine.parent = machine.parent.map(new));
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
