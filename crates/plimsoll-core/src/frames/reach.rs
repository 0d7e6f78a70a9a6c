//! Who can reach a piece of memory, and what it may do there.
use plimsoll_types::MachineId;

/// Most machines that reach one extent at a time: its owner and three it is shared with.
pub const REACH_MAX: usize = 4;

bitflags::bitflags! {
    /// What a machine may do with memory.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Rights: u8 {
        /// Read it.
        const READ = 1;
        /// Write it.
        const WRITE = 1 << 1;
        /// Fetch instructions from it.
        const EXECUTE = 1 << 2;
    }
}

impl Rights {
    /// Whether second-stage tables can say it: something, and writing only together with reading.
    pub const fn is_mappable(self) -> bool {
        !self.is_empty() && (self.contains(Self::READ) || !self.contains(Self::WRITE))
    }
}

/// The machines that reach an extent, with their rights. No machine is in it twice or without rights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reach([Option<(MachineId, Rights)>; REACH_MAX]);

impl Reach {
    /// No machine.
    pub const NOBODY: Self = Self([None; REACH_MAX]);

    /// One machine alone.
    pub(super) fn only(machine: MachineId, rights: Rights) -> Self {
        let mut reach = Self::NOBODY;
        reach.0[0] = Some((machine, rights));
        reach
    }

    /// The machines.
    pub fn iter(&self) -> impl Iterator<Item = (MachineId, Rights)> + '_ {
        self.0.iter().flatten().copied()
    }

    /// What one of them may do: nothing if it is not among them.
    pub fn of(&self, machine: MachineId) -> Rights {
        self.iter().find(|(other, _)| *other == machine).map_or(Rights::empty(), |(_, rights)| rights)
    }

    /// Whether it is nobody.
    pub fn is_nobody(&self) -> bool {
        self.iter().next().is_none()
    }

    /// The same with one more, or with other rights for one of them; `None` when there is no room.
    pub(super) fn with(mut self, machine: MachineId, rights: Rights) -> Option<Self> {
        let is_its =
            |place: &&mut Option<(MachineId, Rights)>| place.is_some_and(|(other, _)| other == machine);
        let place = match self.0.iter_mut().find(is_its) {
            Some(place) => place,
            None => self.0.iter_mut().find(|place| place.is_none())?,
        };
        *place = Some((machine, rights));
        Some(self)
    }

    /// The same without those of `others`.
    pub(super) fn without(self, others: &Self) -> Self {
        self.keep(|machine, _| others.of(machine).is_empty())
    }

    /// Those that may do less, or nothing, according to `next`.
    pub(super) fn losing(self, next: &Self) -> Self {
        self.keep(|machine, rights| !next.of(machine).contains(rights))
    }

    fn keep(mut self, wanted: impl Fn(MachineId, Rights) -> bool) -> Self {
        for place in &mut self.0 {
            *place = place.filter(|(machine, rights)| wanted(*machine, *rights));
        }
        self
    }
}
