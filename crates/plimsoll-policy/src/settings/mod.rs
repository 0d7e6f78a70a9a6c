//! What an operator says about a machine or a group, and what it means.
//!
//! Enters: settings in one of two faces. Leaves: [`Terms`], the one form everything else in this room knows, or the
//! first contradiction as a [`SettingsError`] that names both values. Settings that contradict each other never become
//! terms.
//!
//! ESX's face is reservation, limit and shares. Hyper-V's is startup, minimum, maximum, buffer and weight; it is
//! translated here and nowhere else:
//!
//! * *maximum* becomes size and limit: what the guest can grow to without being restarted.
//! * *minimum* becomes the reservation: what a running guest keeps whatever the others want.
//! * *startup*: until the machine has [started](crate::view::Phase) it wants that much, and its floor is raised to it.
//!   It is admitted only if that fits; after that, others' reservations come first.
//! * *buffer* is wanted on top of demand, and counts as idle: granted while there is memory, and being taxed the first
//!   to go.
//! * *weight* becomes as many shares, 0 becomes 1. [`Shares::NORMAL`] is Hyper-V's usual weight, so the faces mix.
mod error;

pub use error::{Names, Owner, Setting, SettingsError};

use crate::auction::{IdleTax, PAGES_MAX, SHARES_MAX};
use crate::costs::Costs;
use crate::ladder::Rung;
use crate::part::Ppm;
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId, PAGE_SIZE, PageCount};

/// The largest weight Hyper-V knows.
pub const WEIGHT_MAX: u32 = 10_000;
/// The largest buffer Hyper-V knows: twenty times the demand.
pub const BUFFER_MAX: Ppm = Ppm::percent(2000);
/// Hyper-V's usual buffer.
pub const BUFFER_USUAL: Ppm = Ppm::percent(20);
/// The share of time a machine's processors may wait for memory unless it is said otherwise.
pub const STALL_OBJECTIVE_USUAL: Ppm = Ppm(1_000);

/// A machine's or group's weight against its siblings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Shares(pub u32);

impl Shares {
    /// What a machine or group has unless it is said otherwise.
    pub const NORMAL: Self = Self(5_000);
}

/// All an operator says about a host: what a [`Tree`](crate::tree::Tree) is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Settings {
    /// Memory the host has for machines.
    pub capacity: ByteCount,
    /// What idle memory is taxed.
    pub tax: IdleTax,
    /// What each way to take memory costs here.
    pub costs: Costs,
    /// The groups, in any order.
    pub groups: Vec<GroupSettings>,
    /// The machines, in any order.
    pub machines: Vec<MachineSettings>,
}

impl Settings {
    /// A host without machines, with the usual tax and the costs we measured.
    pub const fn new(capacity: ByteCount) -> Self {
        let (tax, costs) = (IdleTax::USUAL, Costs::MEASURED);
        Self { capacity, tax, costs, groups: Vec::new(), machines: Vec::new() }
    }
}

/// How much memory a machine may have, as its operator says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Face {
    /// ESX's.
    Guarantee {
        /// The RAM the guest owns.
        size: ByteCount,
        /// Host memory it keeps whatever the others want.
        reservation: ByteCount,
        /// Host memory it never exceeds.
        limit: ByteCount,
        /// Its weight for what lies between the two.
        shares: Shares,
    },
    /// Hyper-V's dynamic memory.
    Dynamic {
        /// Memory it boots with.
        startup: ByteCount,
        /// Memory a running machine keeps.
        minimum: ByteCount,
        /// Memory it never exceeds.
        maximum: ByteCount,
        /// What it is to have beyond its demand, in parts of the demand.
        buffer: Ppm,
        /// Its weight, 0 to [`WEIGHT_MAX`].
        weight: u32,
    },
    /// All of its memory, always. It may be shared or reported free, but never falls due.
    Static {
        /// The RAM the guest owns.
        size: ByteCount,
    },
    /// All of its memory, pinned and in huge pages, never touched by any rung.
    Dedicated {
        /// The RAM the guest owns.
        size: ByteCount,
    },
}

/// All an operator says about a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct MachineSettings {
    /// Which one.
    pub id: MachineId,
    /// The group it belongs to; `None` is the host.
    pub parent: Option<GroupId>,
    /// Its memory.
    pub face: Face,
    /// The dearest way to take memory from it that is allowed. [`Rung::NEVER_PAGE`] forbids all that move its bytes.
    pub highest: Rung,
    /// The share of time its processors may wait for memory.
    pub stall_objective: Ppm,
}

impl MachineSettings {
    /// A machine of the host's own, with that memory and the usual rest.
    pub const fn new(id: MachineId, face: Face) -> Self {
        Self { id, parent: None, face, highest: Rung::Disk, stall_objective: STALL_OBJECTIVE_USUAL }
    }
}

/// All an operator says about a group: a tenant, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct GroupSettings {
    /// Which one.
    pub id: GroupId,
    /// The group it is nested in; `None` is the host.
    pub parent: Option<GroupId>,
    /// What its machines keep together; `None`, as 0, is the sum of what they keep each.
    pub reservation: Option<ByteCount>,
    /// What its machines never exceed together.
    pub limit: Option<ByteCount>,
    /// Its weight against its siblings.
    pub shares: Shares,
    /// The sharing domain of its machines, unless a group nested in it has one of its own. Without any, each machine
    /// is its own domain and shares with nobody.
    pub domain: Option<DomainId>,
}

impl GroupSettings {
    /// A group of the host's own with normal shares, without reservation, limit or domain.
    pub const fn new(id: GroupId) -> Self {
        Self { id, parent: None, reservation: None, limit: None, shares: Shares::NORMAL, domain: None }
    }
}

/// What may be done to a machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Hold {
    /// It is taken and given between floor and cap.
    Flexible,
    /// Floor and cap are the size; nothing falls due.
    Static,
    /// The same, and no page is looked at.
    Dedicated,
}

/// What a machine was promised and what it may not exceed: settings of either face, checked, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Terms {
    /// The RAM the guest owns.
    pub size: PageCount,
    /// What it keeps whatever the others want. At most `cap`.
    pub floor: PageCount,
    /// What it is to have until it has started, out of what its siblings have above their floors. At most `cap`.
    pub startup: PageCount,
    /// What it never exceeds. At most `size`.
    pub cap: PageCount,
    /// Its weight against its siblings.
    pub shares: Shares,
    /// What it is to have beyond its demand, in parts of the demand.
    pub buffer: Ppm,
    /// What may be done to its memory.
    pub hold: Hold,
    /// The dearest way to take memory from it that is allowed.
    pub highest: Rung,
    /// The share of time its processors may wait for memory.
    pub stall_objective: Ppm,
}

impl Terms {
    /// Checks and translates the settings of one machine.
    ///
    /// ```
    /// use plimsoll_policy::settings::{BUFFER_USUAL, Face, MachineSettings, Shares, Terms};
    /// use plimsoll_types::{ByteCount, MachineId};
    ///
    /// let face = Face::Dynamic {
    ///     startup: ByteCount::mib(1024),
    ///     minimum: ByteCount::mib(512),
    ///     maximum: ByteCount::mib(4096),
    ///     buffer: BUFFER_USUAL,
    ///     weight: 5000,
    /// };
    /// let terms = Terms::of(&MachineSettings::new(MachineId(1), face))?;
    /// assert_eq!(terms.size.bytes(), ByteCount::mib(4096));
    /// assert_eq!(terms.floor.bytes(), ByteCount::mib(512));
    /// assert_eq!(terms.shares, Shares::NORMAL);
    ///
    /// let face = Face::Guarantee {
    ///     size: ByteCount::mib(4096),
    ///     reservation: ByteCount::mib(3072),
    ///     limit: ByteCount::mib(2048),
    ///     shares: Shares::NORMAL,
    /// };
    /// let error = Terms::of(&MachineSettings::new(MachineId(1), face)).unwrap_err();
    /// assert_eq!(error.to_string(), "vm1 reserves 3G, more than its limit of 2G: lower one or raise the other");
    /// # Ok::<(), plimsoll_policy::settings::SettingsError>(())
    /// ```
    ///
    /// # Errors
    /// The first contradiction in the order of the fields.
    pub fn of(settings: &MachineSettings) -> Result<Self, SettingsError> {
        let machine = settings.id;
        let owner = Owner::Machine(machine);
        let pages = |setting, bytes| whole_pages(owner, setting, bytes);
        let objective = settings.stall_objective;
        if objective > Ppm::WHOLE {
            return Err(SettingsError::ObjectiveTooHigh { machine, objective });
        }
        let memory = match settings.face {
            Face::Guarantee { size, reservation, limit, shares } => Memory {
                size: pages(Setting::Size, size)?,
                floor: pages(Setting::Reservation, reservation)?,
                startup: PageCount(0),
                cap: pages(Setting::Limit, limit)?,
                shares: checked_shares(owner, shares)?,
                buffer: Ppm::ZERO,
            },
            Face::Dynamic { startup, minimum, maximum, buffer, weight } => {
                check_dynamic(machine, [startup, minimum, maximum], buffer, weight)?;
                Memory {
                    size: pages(Setting::Maximum, maximum)?,
                    floor: pages(Setting::Minimum, minimum)?,
                    startup: pages(Setting::Startup, startup)?,
                    cap: pages(Setting::Maximum, maximum)?,
                    shares: Shares(weight.max(1)),
                    buffer,
                }
            }
            Face::Static { size } | Face::Dedicated { size } => {
                let size = pages(Setting::Size, size)?;
                let (startup, shares, buffer) = (PageCount(0), Shares::NORMAL, Ppm::ZERO);
                Memory { size, floor: size, startup, cap: size, shares, buffer }
            }
        };
        let Memory { size, floor, startup, cap, shares, buffer } = memory;
        if size == PageCount(0) {
            return Err(SettingsError::NoMemory { machine });
        }
        if cap > size {
            return Err(SettingsError::LimitAboveSize { machine, limit: cap.bytes(), size: size.bytes() });
        }
        if floor > cap {
            let (reservation, limit) = (floor.bytes(), cap.bytes());
            return Err(SettingsError::ReservationAboveLimit { owner, reservation, limit });
        }
        let hold = match settings.face {
            Face::Guarantee { .. } | Face::Dynamic { .. } => Hold::Flexible,
            Face::Static { .. } => Hold::Static,
            Face::Dedicated { .. } => Hold::Dedicated,
        };
        let highest = settings.highest;
        Ok(Self { size, floor, startup, cap, shares, buffer, hold, highest, stall_objective: objective })
    }
}

/// What the faces say in different words.
struct Memory {
    size: PageCount,
    floor: PageCount,
    startup: PageCount,
    cap: PageCount,
    shares: Shares,
    buffer: Ppm,
}

/// What can contradict itself in Hyper-V's face only.
fn check_dynamic(
    machine: MachineId,
    [startup, minimum, maximum]: [ByteCount; 3],
    buffer: Ppm,
    weight: u32,
) -> Result<(), SettingsError> {
    if minimum > maximum {
        return Err(SettingsError::MinimumAboveMaximum { machine, minimum, maximum });
    }
    if !(minimum..=maximum).contains(&startup) {
        return Err(SettingsError::StartupOutside { machine, startup, minimum, maximum });
    }
    if buffer > BUFFER_MAX {
        return Err(SettingsError::BufferTooLarge { machine, buffer });
    }
    if weight > WEIGHT_MAX {
        return Err(SettingsError::WeightTooHigh { machine, weight });
    }
    Ok(())
}

/// Shares that an auction can be held with.
pub(crate) fn checked_shares(owner: Owner, shares: Shares) -> Result<Shares, SettingsError> {
    match shares.0 {
        0 => Err(SettingsError::ZeroShares { owner }),
        1..=SHARES_MAX => Ok(shares),
        _ => Err(SettingsError::TooManyShares { owner, shares }),
    }
}

/// A size in pages. Sizes that are no whole number of pages are refused rather than rounded: rounding one up and
/// another down could make a contradiction of two settings that agree.
pub(crate) fn whole_pages(
    owner: Owner,
    setting: Setting,
    bytes: ByteCount,
) -> Result<PageCount, SettingsError> {
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(SettingsError::NotWholePages { owner, setting, bytes });
    }
    let pages = bytes.pages_floor();
    if pages > PAGES_MAX { Err(SettingsError::TooLarge { owner, setting, bytes }) } else { Ok(pages) }
}
