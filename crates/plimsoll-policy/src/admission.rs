//! Admission: whether one machine more can be kept to its word.
//!
//! Enters: the settings in force, a newcomer's, and what the host has. Leaves: the settings with the newcomer, or a
//! refusal that carries the arithmetic. Only guarantees count: what lies above them is earned from decision to
//! decision, and may be earned by any number of machines.
//!
//! ```text
//! needed    = what is reserved, and what the newcomer starts with beyond its reservation
//!           + what all machines cost besides their memory
//! available = the host's memory - minFree - what the host uses itself
//! ```
//!
//! The compressed bytes of what is paged are no overhead: they are part of what a machine consumes.
use crate::host_state::min_free;
use crate::ladder::Rung;
use crate::settings::{Hold, MachineSettings, SettingsError, Terms};
use crate::tree::Tree;
use core::fmt;
use plimsoll_types::{ByteCount, MachineId};

/// What a machine costs besides its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Overheads {
    /// Bytes of our tables for each page of guest memory.
    pub tables_per_page: u64,
    /// Bytes of the kernel's and the second stage's page tables for each page of guest memory.
    pub page_tables_per_page: u64,
    /// Bytes of the store's tables for each page that may be in it.
    pub store_per_page: u64,
    /// What a VMM takes up itself.
    pub vmm: ByteCount,
}

impl Overheads {
    /// What was measured:
    ///
    /// * our tables: 4.9 MiB for 2 GiB of guests, 0.24 % (the demo, README): 8 bytes of a page word and 2 of the rest;
    /// * page tables: an entry of 8 bytes in the VMM's and one in the second stage's, and a 512th of that above them;
    /// * the store's: 23.0 bytes a stored page (the demo, README);
    /// * a VMM: QEMU 7.2 with a balloon and a disk, not yet running, has 22 MiB resident, with 512 MiB as with 4 GiB
    ///   of guest memory; half as much again for the buffers of a running one. A host that knows its own VMMs says so.
    pub const MEASURED: Self =
        Self { tables_per_page: 10, page_tables_per_page: 17, store_per_page: 23, vmm: ByteCount::mib(33) };

    /// What a machine of those terms costs.
    pub fn of(&self, terms: &Terms) -> ByteCount {
        let pages = match terms.hold {
            // In huge pages: entries for blocks only, and no page of it is ever looked at.
            Hold::Dedicated => terms.size.0.div_ceil(512) * self.page_tables_per_page,
            Hold::Flexible | Hold::Static => {
                terms.size.0 * (self.tables_per_page + self.page_tables_per_page)
            }
        };
        let stored = if terms.highest > Rung::NEVER_PAGE { terms.size.0 - terms.floor.0 } else { 0 };
        ByteCount(pages + stored * self.store_per_page) + self.vmm
    }
}

/// What a host has and costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Capacity {
    /// All its memory.
    pub total: ByteCount,
    /// What it uses itself: its kernel, its services, our own process.
    pub own: ByteCount,
    /// What each machine costs besides its memory.
    pub overheads: Overheads,
}

/// How loaded a host is with guarantees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Account {
    /// All its memory.
    pub total: ByteCount,
    /// What is kept free of it.
    pub kept_free: ByteCount,
    /// What the host uses itself.
    pub own: ByteCount,
    /// What is reserved.
    pub reserved: ByteCount,
    /// What the machines cost besides their memory.
    pub overhead: ByteCount,
    /// How many there are.
    pub machines: usize,
}

impl Account {
    /// Adds up what is promised on a host.
    pub fn of(tree: &Tree, host: &Capacity) -> Self {
        Self {
            total: host.total,
            kept_free: min_free(host.total),
            own: host.own,
            reserved: tree.reserved(),
            overhead: tree.machines().map(|(_, terms)| host.overheads.of(terms)).sum(),
            machines: tree.machines().count(),
        }
    }

    /// What more can be promised: how far the ship's line is above the water.
    pub fn left(&self) -> ByteCount {
        self.total.saturating_sub(self.kept_free + self.own + self.reserved + self.overhead)
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total, kept_free, own, reserved, overhead, machines } = self;
        let (plural, whose) = if *machines == 1 { ("", "its") } else { ("s", "their") };
        write!(
            f,
            "{} are left: {total} - {kept_free} kept free - {own} of the host's own - {reserved} reserved by {machines} \
             machine{plural} - {overhead} for {whose} tables and VMM{plural}",
            self.left()
        )
    }
}

/// What a newcomer adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Charge {
    /// What more is reserved. Less than its own reservation where its group's covers it.
    pub reserved: ByteCount,
    /// What it starts with beyond that.
    pub startup: ByteCount,
    /// What it costs besides its memory.
    pub overhead: ByteCount,
}

impl Charge {
    /// All of it.
    pub fn total(&self) -> ByteCount {
        self.reserved + self.startup + self.overhead
    }
}

impl fmt::Display for Charge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reserved, startup, overhead } = self;
        write!(f, "{} = {reserved} reserved + {startup} to start + {overhead} besides", self.total())
    }
}

/// Why a machine was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdmissionError {
    /// Its settings contradict themselves or those in force.
    Settings(SettingsError),
    /// The host cannot keep what it would have to promise.
    NoRoom {
        /// Which machine.
        machine: MachineId,
        /// What it would add.
        charge: Charge,
        /// How loaded the host is without it.
        account: Account,
    },
}

impl fmt::Display for AdmissionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settings(_) => f.write_str("the machine's settings do not fit those in force"),
            Self::NoRoom { machine, charge, account } => {
                let missing = charge.total().saturating_sub(account.left());
                write!(f, "{machine} needs {charge}; {account}: reserve {missing} less, or make room for it")
            }
        }
    }
}

impl core::error::Error for AdmissionError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Settings(error) => Some(error),
            Self::NoRoom { .. } => None,
        }
    }
}

/// Adds a machine to those in force, if the host can keep its word to all of them.
///
/// ```
/// use plimsoll_policy::admission::{Account, Capacity, Overheads, admit};
/// use plimsoll_policy::settings::{Face, MachineSettings, Settings};
/// use plimsoll_policy::tree::Tree;
/// use plimsoll_types::{ByteCount, MachineId};
///
/// let gib = |count: u64| ByteCount::mib(count << 10);
/// let host = Capacity { total: gib(16), own: gib(1), overheads: Overheads::MEASURED };
/// let tree = Tree::new(Settings::new(gib(16)))?;
/// let machine = |id, size| MachineSettings::new(MachineId(id), Face::Static { size: gib(size) });
///
/// let tree = admit(&tree, machine(1, 12), &host)?;
/// let refused = admit(&tree, machine(2, 4), &host).unwrap_err();
/// assert_eq!(
///     refused.to_string(),
///     "vm2 needs 4G = 4G reserved + 0 to start + 60M besides; 2.2G are left: 16G - 655.3M kept free - 1G of the \
///      host's own - 12G reserved by 1 machine - 114M for its tables and VMM: reserve 1.8G less, or make room for it"
/// );
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`AdmissionError::Settings`] for contradictions, [`AdmissionError::NoRoom`] with the arithmetic.
pub fn admit(tree: &Tree, newcomer: MachineSettings, host: &Capacity) -> Result<Tree, AdmissionError> {
    let mut settings = tree.settings().clone();
    settings.machines.push(newcomer);
    let terms = Terms::of(&newcomer).map_err(AdmissionError::Settings)?;
    let larger = Tree::new(settings).map_err(AdmissionError::Settings)?;
    let account = Account::of(tree, host);
    let charge = Charge {
        reserved: larger.reserved().saturating_sub(tree.reserved()),
        startup: terms.startup.saturating_sub(terms.floor).bytes(),
        overhead: host.overheads.of(&terms),
    };
    if charge.total() > account.left() {
        return Err(AdmissionError::NoRoom { machine: newcomer.id, charge, account });
    }
    Ok(larger)
}
