//! Host, groups and machines as one tree, checked whole.
//!
//! Enters: settings in any order. Leaves: a [`Tree`], in which parents come before their children and every guarantee
//! fits into the one above it, or the first contradiction. A tree cannot be changed: a new one is made from new
//! settings, so no change can get past the checks.
//!
//! Where a group has no reservation of its own it reserves what is nested in it; where it has one, what is nested must
//! fit.
use crate::settings::{
    GroupSettings, Owner, Setting, Settings, SettingsError, Shares, Terms, checked_shares, whole_pages,
};
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId, PageCount};

/// How deep groups may be nested.
pub const DEPTH_MAX: usize = 16;
/// How many machines and groups there may be.
pub const NODES_MAX: usize = crate::auction::BIDDERS_MAX;

/// A group's place in [`Tree::groups`]; the host is 0.
pub(crate) type GroupIndex = usize;

/// A group whose settings were checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) owner: Owner,
    /// Its place in the list is before this group's; the host is its own.
    pub(crate) parent: GroupIndex,
    pub(crate) depth: usize,
    /// Its own reservation; zero where it has none.
    pub(crate) own: PageCount,
    /// What it is promised: that, or what is reserved inside, whichever is more.
    pub(crate) floor: PageCount,
    pub(crate) cap: PageCount,
    pub(crate) shares: Shares,
    pub(crate) domain: Option<DomainId>,
    pub(crate) groups: Vec<GroupIndex>,
    /// Places in [`Tree::machines`].
    pub(crate) machines: Vec<usize>,
}

/// A machine whose settings were checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    pub(crate) id: MachineId,
    pub(crate) parent: GroupIndex,
    pub(crate) terms: Terms,
}

/// Host, groups and machines. It is written as its settings, and read by checking them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Settings", into = "Settings"))]
pub struct Tree {
    settings: Settings,
    /// Parents before their children, the host first.
    pub(crate) groups: Vec<Group>,
    /// By id.
    pub(crate) machines: Vec<Machine>,
}

impl Tree {
    /// Checks settings and nests them.
    ///
    /// ```
    /// use plimsoll_policy::settings::{Face, GroupSettings, MachineSettings, Settings};
    /// use plimsoll_policy::tree::Tree;
    /// use plimsoll_types::{ByteCount, GroupId, MachineId};
    ///
    /// let mut settings = Settings::new(ByteCount::mib(8192));
    /// let reservation = Some(ByteCount::mib(1024));
    /// settings.groups.push(GroupSettings { reservation, ..GroupSettings::new(GroupId(1)) });
    /// let memory = Face::Static { size: ByteCount::mib(2048) };
    /// let parent = Some(GroupId(1));
    /// settings.machines.push(MachineSettings { parent, ..MachineSettings::new(MachineId(1), memory) });
    /// assert_eq!(
    ///     Tree::new(settings).unwrap_err().to_string(),
    ///     "group1 reserves 1G, but what is nested in it reserves 2G: raise the one or lower the other"
    /// );
    /// ```
    ///
    /// # Errors
    /// The first contradiction: in the nesting of groups, in a machine's own settings, in guarantees from the
    /// innermost group outward.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        let found = settings.groups.len() + settings.machines.len();
        if found > NODES_MAX {
            return Err(SettingsError::TooMany { found });
        }
        let (mut groups, places) = nest(&settings.groups)?;
        let mut machines = Vec::with_capacity(settings.machines.len());
        for settings in &settings.machines {
            let parent = place_of(Owner::Machine(settings.id), settings.parent, &places)?;
            machines.push(Machine { id: settings.id, parent, terms: Terms::of(settings)? });
        }
        machines.sort_by_key(|machine| machine.id);
        if let Some(pair) = machines.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(SettingsError::Duplicate { owner: Owner::Machine(pair[0].id) });
        }
        for (place, machine) in machines.iter().enumerate() {
            groups[machine.parent].machines.push(place);
        }
        let mut tree = Self { settings, groups, machines };
        tree.check_guarantees()?;
        Ok(tree)
    }

    /// What it was made of.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What is reserved by all machines and groups.
    pub fn reserved(&self) -> ByteCount {
        self.groups[0].floor.bytes()
    }

    /// The terms of a machine, or `None` if it is not in the tree.
    pub fn terms(&self, id: MachineId) -> Option<&Terms> {
        let place = self.place(id)?;
        Some(&self.machines[place].terms)
    }

    /// The domain a machine may share pages in; `None` where it shares with nobody.
    pub fn domain(&self, id: MachineId) -> Option<DomainId> {
        self.around(self.place(id)?).find_map(|group| self.groups[group].domain)
    }

    /// The machines, by id.
    pub fn machines(&self) -> impl Iterator<Item = (MachineId, &Terms)> {
        self.machines.iter().map(|machine| (machine.id, &machine.terms))
    }

    pub(crate) fn place(&self, id: MachineId) -> Option<usize> {
        self.machines.binary_search_by_key(&id, |machine| machine.id).ok()
    }

    /// The groups a machine is in, from the innermost outward; the host last.
    pub(crate) fn around(&self, place: usize) -> impl Iterator<Item = GroupIndex> {
        let outer = |group: &GroupIndex| (*group > 0).then(|| self.groups[*group].parent);
        core::iter::successors(Some(self.machines[place].parent), outer)
    }

    /// For each group the sum of what machines in it have, given by their places.
    pub(crate) fn sums(&self, pages: impl Iterator<Item = (usize, PageCount)>) -> Vec<PageCount> {
        let mut sums = vec![PageCount(0); self.groups.len()];
        pages.for_each(|(place, pages)| sums[self.machines[place].parent] += pages);
        // Parents come before their children.
        for group in (1..sums.len()).rev() {
            let inside = sums[group];
            sums[self.groups[group].parent] += inside;
        }
        sums
    }

    /// Sums guarantees from the innermost groups outward; the host last.
    fn check_guarantees(&mut self) -> Result<(), SettingsError> {
        for index in (0..self.groups.len()).rev() {
            let group = &self.groups[index];
            let machines = group.machines.iter().map(|machine| self.machines[*machine].terms.floor);
            let groups = group.groups.iter().map(|nested| self.groups[*nested].floor);
            let inside: PageCount = machines.chain(groups).sum();
            let (own, cap) = (group.own, group.cap);
            if let Owner::Group(group) = group.owner {
                let inside = inside.bytes();
                if own > PageCount(0) && inside > own.bytes() {
                    return Err(SettingsError::Overreserved { group, inside, reservation: own.bytes() });
                }
                if inside > cap.bytes() {
                    return Err(SettingsError::ReservedAboveLimit { group, inside, limit: cap.bytes() });
                }
            } else if inside.bytes() > self.settings.capacity {
                let (inside, capacity) = (inside.bytes(), self.settings.capacity);
                return Err(SettingsError::HostOverreserved { inside, capacity });
            }
            self.groups[index].floor = own.max(inside);
        }
        Ok(())
    }
}

impl TryFrom<Settings> for Tree {
    type Error = SettingsError;
    fn try_from(settings: Settings) -> Result<Self, SettingsError> {
        Self::new(settings)
    }
}

impl From<Tree> for Settings {
    fn from(tree: Tree) -> Self {
        tree.settings
    }
}

/// Orders groups so that parents come first, and checks all that concerns a group alone.
fn nest(settings: &[GroupSettings]) -> Result<(Vec<Group>, BTreeMap<GroupId, GroupIndex>), SettingsError> {
    let mut by_id = BTreeMap::new();
    for group in settings {
        if by_id.insert(group.id, group).is_some() {
            return Err(SettingsError::Duplicate { owner: Owner::Group(group.id) });
        }
    }
    let mut children: BTreeMap<Option<GroupId>, Vec<&GroupSettings>> = BTreeMap::new();
    for group in by_id.values() {
        match group.parent {
            Some(parent) if !by_id.contains_key(&parent) => {
                return Err(SettingsError::UnknownParent { owner: Owner::Group(group.id), parent });
            }
            parent => children.entry(parent).or_default().push(group),
        }
    }
    let mut groups = vec![Group::host()];
    let mut places = BTreeMap::new();
    let mut next = 0;
    // Level by level: the list is its own queue.
    while next < groups.len() {
        let parent = match groups[next].owner {
            Owner::Group(id) => Some(id),
            _ => None,
        };
        for child in children.remove(&parent).unwrap_or_default() {
            let depth = groups[next].depth + 1;
            if depth > DEPTH_MAX {
                return Err(SettingsError::TooDeep { group: child.id });
            }
            let place = groups.len();
            groups[next].groups.push(place);
            places.insert(child.id, place);
            groups.push(Group::of(child, next, depth)?);
        }
        next += 1;
    }
    // Whoever was not reached from the host hangs from a cycle.
    match children.into_keys().flatten().next() {
        None => Ok((groups, places)),
        Some(start) => Err(cycle_from(start, &by_id)),
    }
}

/// A group of the cycle that following the parents from `start` ends in, and its parent.
fn cycle_from(start: GroupId, by_id: &BTreeMap<GroupId, &GroupSettings>) -> SettingsError {
    let parent_of = |id: GroupId| by_id.get(&id).and_then(|group| group.parent).unwrap_or(id);
    // After as many steps as there are groups one is inside the cycle.
    let group = by_id.keys().fold(start, |id, _| parent_of(id));
    SettingsError::Cycle { group, parent: parent_of(group) }
}

fn place_of(
    owner: Owner,
    parent: Option<GroupId>,
    places: &BTreeMap<GroupId, GroupIndex>,
) -> Result<GroupIndex, SettingsError> {
    let Some(parent) = parent else { return Ok(0) };
    places.get(&parent).copied().ok_or(SettingsError::UnknownParent { owner, parent })
}

impl Group {
    const fn host() -> Self {
        Self {
            owner: Owner::Host,
            parent: 0,
            depth: 0,
            own: PageCount(0),
            floor: PageCount(0),
            cap: crate::auction::PAGES_MAX,
            shares: Shares::NORMAL,
            domain: None,
            groups: Vec::new(),
            machines: Vec::new(),
        }
    }

    /// What is reserved inside is added later.
    fn of(settings: &GroupSettings, parent: GroupIndex, depth: usize) -> Result<Self, SettingsError> {
        let owner = Owner::Group(settings.id);
        let pages = |setting, bytes: Option<ByteCount>| {
            bytes.map(|bytes| whole_pages(owner, setting, bytes)).transpose()
        };
        let own = pages(Setting::Reservation, settings.reservation)?.unwrap_or_default();
        let cap = pages(Setting::Limit, settings.limit)?.unwrap_or(crate::auction::PAGES_MAX);
        if own > cap {
            let (reservation, limit) = (own.bytes(), cap.bytes());
            return Err(SettingsError::ReservationAboveLimit { owner, reservation, limit });
        }
        let shares = checked_shares(owner, settings.shares)?;
        let (groups, machines, domain) = (Vec::new(), Vec::new(), settings.domain);
        Ok(Self { owner, parent, depth, own, floor: own, cap, shares, domain, groups, machines })
    }
}
