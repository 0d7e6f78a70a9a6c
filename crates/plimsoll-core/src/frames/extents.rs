//! Extents: pieces of memory with one owner, and how machines come to reach them.
//!
//! Enters: what machines ask for, with handles that may be forged, old or somebody else's; that machines died; that the
//! host has done a task. Leaves: the next task of the host, or a refusal.
//!
//! | asked by | what | who reaches it then | needs |
//! |---|---|---|---|
//! | host | [`grant`](Extents::grant) | its first owner | |
//! | owner | [`donate`](Extents::donate) | the new owner | the owner alone reaches it |
//! | owner | [`lend`](Extents::lend) | the borrower alone | the owner alone reaches it |
//! | owner | [`share`](Extents::share) | the owner and up to three others | it is not lent |
//! | owner | [`reclaim`](Extents::reclaim) | the owner | it is lent or shared |
//! | owner | [`release`](Extents::release) | nobody: it is free | the owner alone reaches it |
//! | others | [`give_back`](Extents::give_back) | who is left, else the owner | |
//!
//! # A change takes its time
//! An extent is settled, or it changes. A change has up to three tasks, one after the other; each is done by the host and
//! reported by [`done`](Extents::done):
//!
//! ```text
//! unmap  whoever reaches less afterwards loses its mappings; from now on it may not map the extent again
//! fence  no processor and no device uses a translation of it that was read before
//! zero   only if nobody reaches it any more and somebody will: no byte passes from hand to hand, except by sharing
//! ```
//!
//! Then, and not before, others may reach it, or its frames are free. The order is the point: before the unmapping, a fence
//! proves nothing; before the fence, memory that was zeroed may be written again.
//!
//! # Death
//! A machine's death changes where a change leads, never how: what is under way is reported first, then the rest is
//! done. What the dead had borrowed goes back to its owner, zeroed; what was shared with it stays with the others; what was
//! being given to it stays with the giver. **What the dead owned is freed, and no loan outlives its lender:** otherwise
//! memory would be used that is charged to nobody. A donation that has not arrived is still its giver's.
//!
//! # Handles
//! A handle names one owner's extent. Whenever owner or frames change it is of the past, and so is every copy of it. A slot
//! whose generations are used up (2^32 - 1 owners) is not used again.
use super::buddy::{Found, FrameEntry, Frames, FramesError, Kind, Order, Piece};
use super::reach::{Reach, Rights};
use core::fmt;
use plimsoll_types::{MachineId, PageCount, Pfn};

/// Names an extent. Whatever number a guest says is one, so every use is checked; 0 never names any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle {
    slot: u32,
    generation: u32,
}

impl Handle {
    /// As a number, for a guest's register: slot below, generation above.
    pub const fn to_bits(self) -> u64 {
        (self.generation as u64) << 32 | self.slot as u64
    }

    /// Of any number.
    pub const fn from_bits(bits: u64) -> Self {
        Self { slot: (bits & 0xffff_ffff) as u32, generation: (bits >> 32) as u32 }
    }
}

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "extent {}.{}", self.slot, self.generation)
    }
}

/// What the host has to do next for a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// Take the extent out of these machines' tables.
    Unmap(Reach),
    /// Have every processor and device that ran or served these machines forget translations of it.
    Fence(Reach),
    /// Zero it. Nobody reaches it.
    Zero,
    /// Nothing: the change is complete.
    Nothing,
}

/// One step of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Task {
    /// The extent. With [`Work::Nothing`], its owner's handle from now on, unless it was freed.
    pub handle: Handle,
    /// Its frames.
    pub piece: Piece,
    /// What is to be done.
    pub work: Work,
    /// Tells the step from every other of the same extent.
    serial: u32,
}

/// Where a change leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Goal {
    /// `None`: free.
    owner: Option<MachineId>,
    reach: Reach,
}

impl Goal {
    /// Its owner has it, and nobody else.
    fn alone(owner: MachineId) -> Self {
        Self { owner: Some(owner), reach: Reach::only(owner, Rights::all()) }
    }
}

const FREED: Goal = Goal { owner: None, reach: Reach::NOBODY };

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Held {
    piece: Piece,
    owner: MachineId,
    /// Who may have translations of it.
    reach: Reach,
    change: Option<(Work, Goal)>,
}

impl Held {
    /// What a change has to do next.
    fn next_work(&self, goal: &Goal) -> Work {
        let losing = self.reach.losing(&goal.reach);
        if !losing.is_nobody() {
            Work::Unmap(losing)
        } else if self.reach.is_nobody() && !goal.reach.is_nobody() {
            Work::Zero
        } else {
            Work::Nothing
        }
    }

    fn is_owners_alone(&self) -> bool {
        self.reach.iter().all(|(machine, _)| machine == self.owner)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Content {
    #[default]
    WornOut,
    Vacant {
        next: Option<u32>,
    },
    Held(Held),
}

/// What is known of one extent, for the host to keep memory for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slot {
    generation: u32,
    serial: u32,
    content: Content,
}

impl Slot {
    /// What names the extent of this slot, whose number is `extent`.
    const fn handle(&self, extent: u32) -> Handle {
        Handle { slot: extent, generation: self.generation }
    }
}

/// A request that is refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExtentError {
    /// The handle is forged, old, or of an extent that the asker neither owns nor reaches; which, it is not told.
    NoSuchExtent {
        /// The handle.
        handle: Handle,
    },
    /// Only its owner may ask for that.
    NotOwner {
        /// Who asked.
        by: MachineId,
        /// For what.
        handle: Handle,
    },
    /// Only somebody else than its owner can give it back.
    Owner {
        /// The owner.
        by: MachineId,
        /// Of what.
        handle: Handle,
    },
    /// A change of it is under way; ask again.
    Changing {
        /// The extent.
        handle: Handle,
    },
    /// Others reach it; reclaim it first.
    InUse {
        /// The extent.
        handle: Handle,
    },
    /// Nobody but its owner reaches it.
    NotInUse {
        /// The extent.
        handle: Handle,
    },
    /// It reaches as many machines as it can.
    TooManySharers {
        /// The extent.
        handle: Handle,
    },
    /// The slot has had as many owners as it can.
    WornOut {
        /// The extent.
        handle: Handle,
    },
    /// No such machine lives, or it is the asker itself.
    NotTo {
        /// The machine that was named.
        machine: MachineId,
    },
    /// No table can say these rights.
    Unmappable {
        /// The rights.
        rights: Rights,
    },
    /// All slots are taken.
    NoSlot,
    /// As many machines live as there is room for, or this one lives already.
    NoRoom {
        /// The machine that was to be admitted.
        machine: MachineId,
    },
    /// The task was reported before, or is of a change that is over.
    Outdated {
        /// Of which extent.
        handle: Handle,
    },
    /// Extents and frames contradict each other: a bug here.
    Damaged {
        /// Where.
        handle: Handle,
    },
    /// The frame allocator refuses.
    Frames(FramesError),
}

impl fmt::Display for ExtentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchExtent { handle } => write!(f, "{handle} is none of the asker's"),
            Self::NotOwner { by, handle } => write!(f, "{by} does not own {handle}; its owner has to ask"),
            Self::Owner { by, handle } => {
                write!(f, "{by} owns {handle}; it can release it, not give it back")
            }
            Self::Changing { handle } => write!(f, "a change of {handle} is under way; ask again"),
            Self::InUse { handle } => write!(f, "{handle} is lent or shared; reclaim it first"),
            Self::NotInUse { handle } => write!(f, "{handle} is neither lent nor shared"),
            Self::TooManySharers { handle } => write!(f, "{handle} is shared with as many as it can be"),
            Self::WornOut { handle } => write!(f, "{handle} has had too many owners; release it"),
            Self::NotTo { machine } => write!(f, "{machine} is no other machine that lives"),
            Self::Unmappable { rights } => {
                write!(f, "no table can grant {rights:?}; ask for READ, for EXECUTE, or for WRITE with READ")
            }
            Self::NoSlot => f.write_str("all extents are in use; release one"),
            Self::NoRoom { machine } => write!(f, "there is no room for {machine}, or it lives already"),
            Self::Outdated { handle } => write!(f, "a task of {handle} was reported that is not its next"),
            Self::Damaged { handle } => write!(f, "{handle} and its frames contradict each other"),
            Self::Frames(_) => f.write_str("the frame allocator refuses"),
        }
    }
}

impl core::error::Error for ExtentError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Frames(error) => Some(error),
            _ => None,
        }
    }
}

impl From<FramesError> for ExtentError {
    fn from(error: FramesError) -> Self {
        Self::Frames(error)
    }
}

/// The extents of a host with up to `M` machines, and its frames.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Extents<F, S, const M: usize> {
    frames: Frames<F>,
    slots: S,
    vacant: Option<u32>,
    machines: [Option<MachineId>; M],
}

impl<F, S, const M: usize> Extents<F, S, M>
where
    F: AsRef<[FrameEntry]> + AsMut<[FrameEntry]>,
    S: AsRef<[Slot]> + AsMut<[Slot]>,
{
    /// No extents yet. There can be as many as there are slots.
    pub fn new(frames: Frames<F>, mut slots: S) -> Self {
        let mut vacant = None;
        for (index, slot) in (0..u32::MAX).zip(slots.as_mut()).rev() {
            *slot = Slot { generation: 1, serial: 0, content: Content::Vacant { next: vacant } };
            vacant = Some(index);
        }
        Self { frames, slots, vacant, machines: [None; M] }
    }

    /// The frames, for what is not extents'.
    pub fn frames(&self) -> &Frames<F> {
        &self.frames
    }

    /// The same, to take from and give back to. What is [`Kind::Guest`] is not to be given back here.
    pub fn frames_mut(&mut self) -> &mut Frames<F> {
        &mut self.frames
    }

    /// A machine lives from now on. An identity is never used again.
    ///
    /// # Errors
    /// [`ExtentError::NoRoom`].
    pub fn admit(&mut self, machine: MachineId) -> Result<(), ExtentError> {
        let lives = self.lives(machine);
        match self.machines.iter_mut().find(|place| place.is_none()) {
            Some(place) if !lives => {
                *place = Some(machine);
                Ok(())
            }
            _ => Err(ExtentError::NoRoom { machine }),
        }
    }

    fn lives(&self, machine: MachineId) -> bool {
        self.machines.contains(&Some(machine))
    }

    fn other(&self, by: MachineId, machine: MachineId) -> Result<(), ExtentError> {
        if machine != by && self.lives(machine) { Ok(()) } else { Err(ExtentError::NotTo { machine }) }
    }

    /// Memory for a machine, zeroed before it reaches it.
    ///
    /// # Errors
    /// [`ExtentError::NotTo`], [`ExtentError::NoSlot`], [`ExtentError::Frames`] when there is no such piece.
    pub fn grant(&mut self, to: MachineId, order: Order) -> Result<Task, ExtentError> {
        if !self.lives(to) {
            return Err(ExtentError::NotTo { machine: to });
        }
        let extent = self.vacant.ok_or(ExtentError::NoSlot)?;
        let piece = self.frames.allocate(order, Kind::Guest { extent })?;
        let slot = &mut self.slots.as_mut()[extent as usize];
        if let Content::Vacant { next } = slot.content {
            self.vacant = next;
        }
        slot.content = Content::Held(Held { piece, owner: to, reach: Reach::NOBODY, change: None });
        self.change(extent, Goal::alone(to))
    }

    /// The owner gives an extent to `to` for good.
    ///
    /// # Errors
    /// [`ExtentError`] says what is in the way.
    pub fn donate(&mut self, by: MachineId, handle: Handle, to: MachineId) -> Result<Task, ExtentError> {
        self.alone(by, handle)?;
        self.other(by, to)?;
        if handle.generation == u32::MAX {
            return Err(ExtentError::WornOut { handle });
        }
        self.change(handle.slot, Goal::alone(to))
    }

    /// The owner lets `to` have an extent until it is given back or reclaimed, and does not reach it meanwhile.
    ///
    /// # Errors
    /// [`ExtentError`] says what is in the way.
    pub fn lend(
        &mut self,
        by: MachineId,
        handle: Handle,
        to: MachineId,
        rights: Rights,
    ) -> Result<Task, ExtentError> {
        self.alone(by, handle)?;
        self.other(by, to)?;
        let rights = mappable(rights)?;
        self.change(handle.slot, Goal { owner: Some(by), reach: Reach::only(to, rights) })
    }

    /// The owner lets `to` reach an extent beside itself, with the bytes that are in it; or gives it other rights.
    ///
    /// # Errors
    /// [`ExtentError`] says what is in the way.
    pub fn share(
        &mut self,
        by: MachineId,
        handle: Handle,
        to: MachineId,
        rights: Rights,
    ) -> Result<Task, ExtentError> {
        let held = self.owned(by, handle)?;
        if held.reach.of(by).is_empty() {
            return Err(ExtentError::InUse { handle });
        }
        self.other(by, to)?;
        let reach = held.reach.with(to, mappable(rights)?).ok_or(ExtentError::TooManySharers { handle })?;
        self.change(handle.slot, Goal { owner: Some(by), reach })
    }

    /// The owner takes back what it lent or shared. A loan comes back zeroed.
    ///
    /// # Errors
    /// [`ExtentError`] says what is in the way.
    pub fn reclaim(&mut self, by: MachineId, handle: Handle) -> Result<Task, ExtentError> {
        if self.owned(by, handle)?.is_owners_alone() {
            return Err(ExtentError::NotInUse { handle });
        }
        self.change(handle.slot, Goal::alone(by))
    }

    /// A borrower or sharer gives up what it was let have.
    ///
    /// # Errors
    /// [`ExtentError`] says what is in the way.
    pub fn give_back(&mut self, by: MachineId, handle: Handle) -> Result<Task, ExtentError> {
        let held = self.settled(by, handle)?;
        if held.owner == by {
            return Err(ExtentError::Owner { by, handle });
        }
        self.change(handle.slot, left_by(by, &held))
    }

    /// The owner gives an extent up.
    ///
    /// # Errors
    /// [`ExtentError`] says what is in the way.
    pub fn release(&mut self, by: MachineId, handle: Handle) -> Result<Task, ExtentError> {
        self.alone(by, handle)?;
        self.change(handle.slot, FREED)
    }

    /// A machine is dead, and none of its processors will run again. What follows is in [`Self::tasks`].
    ///
    /// # Errors
    /// [`ExtentError::NotTo`] if it did not live; [`ExtentError::Damaged`].
    pub fn died(&mut self, machine: MachineId) -> Result<(), ExtentError> {
        let place = self.machines.iter_mut().find(|place| **place == Some(machine));
        *place.ok_or(ExtentError::NotTo { machine })? = None;
        for extent in (0..u32::MAX).take(self.slots.as_ref().len()) {
            let Content::Held(held) = self.slots.as_ref()[extent as usize].content else { continue };
            let goal =
                held.change.map_or(Goal { owner: Some(held.owner), reach: held.reach }, |(_, goal)| goal);
            let goal = match goal.owner {
                Some(_) if held.owner == machine => FREED,
                Some(_) if !goal.reach.of(machine).is_empty() => {
                    left_by(machine, &Held { reach: goal.reach, ..held })
                }
                _ => continue,
            };
            match held.change {
                None => {
                    self.change(extent, goal)?;
                }
                // What is under way is reported first.
                Some((work, _)) => self.set(extent, Held { change: Some((work, goal)), ..held }),
            }
        }
        Ok(())
    }

    /// The host has done a task. Returns the next of the same change, with [`Work::Nothing`] when it is complete.
    ///
    /// # Errors
    /// [`ExtentError::Outdated`] for anything but the current task of a change.
    pub fn done(&mut self, task: Task) -> Result<Task, ExtentError> {
        let outdated = ExtentError::Outdated { handle: task.handle };
        if self.task(task.handle.slot) != Some(task) {
            return Err(outdated);
        }
        let held = self.held(task.handle).ok_or(outdated)?;
        let (work, goal) = held.change.ok_or(outdated)?;
        let (reach, next) = match work {
            Work::Unmap(from) => (held.reach, Some(Work::Fence(from))),
            Work::Fence(from) => (held.reach.without(&from), None),
            Work::Zero | Work::Nothing => return self.settle(task.handle.slot),
        };
        let held = Held { reach, ..held };
        let next = next.unwrap_or_else(|| held.next_work(&goal));
        self.step(task.handle.slot, held, next, goal)
    }

    /// The tasks that the host can do now, one for each extent that changes.
    pub fn tasks(&self) -> impl Iterator<Item = Task> + '_ {
        (0..u32::MAX).take(self.slots.as_ref().len()).filter_map(|extent| self.task(extent))
    }

    /// What a machine may map of an extent now. The host asks before it makes a mapping, every time.
    pub fn rights(&self, machine: MachineId, handle: Handle) -> Rights {
        let Some(held) = self.held(handle) else { return Rights::empty() };
        match held.change {
            None => held.reach.of(machine),
            Some((Work::Unmap(from) | Work::Fence(from), _)) if !from.of(machine).is_empty() => {
                Rights::empty()
            }
            Some((_, goal)) => held.reach.of(machine) & goal.reach.of(machine),
        }
    }

    /// Who may still have translations of an extent, including those that lose them.
    pub fn reach(&self, handle: Handle) -> Reach {
        self.held(handle).map_or(Reach::NOBODY, |held| held.reach)
    }

    /// Who owns an extent. While it is being donated, that is the giver.
    pub fn owner(&self, handle: Handle) -> Option<MachineId> {
        self.held(handle).map(|held| held.owner)
    }

    /// The frames of an extent.
    pub fn piece(&self, handle: Handle) -> Option<Piece> {
        self.held(handle).map(|held| held.piece)
    }

    /// The extent that a frame belongs to.
    pub fn at(&self, frame: Pfn) -> Option<Handle> {
        let Ok(Found::Used(_, Kind::Guest { extent })) = self.frames.look(frame) else { return None };
        let slot = self.slots.as_ref().get(extent as usize)?;
        Some(slot.handle(extent))
    }

    /// All pages a machine owns.
    pub fn owned_pages(&self, machine: MachineId) -> PageCount {
        let held = self.each_held().filter(|(_, held)| held.owner == machine);
        held.map(|(_, held)| held.piece.order.pages()).sum()
    }

    /// Compares extents with frames: each has its piece, and no other extent has it.
    ///
    /// # Errors
    /// [`ExtentError::Damaged`], [`ExtentError::Frames`].
    pub fn audit(&self) -> Result<(), ExtentError> {
        self.frames.audit()?;
        for (handle, held) in self.each_held() {
            let found = self.frames.look(held.piece.first)?;
            let is_freed = held.change.is_some_and(|(_, goal)| goal.owner.is_none());
            let lives = |machine| self.lives(machine) || held.change.is_some();
            let is_right = found == Found::Used(held.piece, Kind::Guest { extent: handle.slot })
                && (is_freed || self.lives(held.owner))
                && held.reach.iter().all(|(machine, _)| lives(machine));
            if !is_right {
                return Err(ExtentError::Damaged { handle });
            }
        }
        Ok(())
    }

    fn each_held(&self) -> impl Iterator<Item = (Handle, Held)> + '_ {
        (0..u32::MAX).zip(self.slots.as_ref()).filter_map(|(index, slot)| match slot.content {
            Content::Held(held) => Some((slot.handle(index), held)),
            Content::Vacant { .. } | Content::WornOut => None,
        })
    }

    fn held(&self, handle: Handle) -> Option<Held> {
        let slot = self.slots.as_ref().get(handle.slot as usize)?;
        match slot.content {
            Content::Held(held) if slot.generation == handle.generation => Some(held),
            _ => None,
        }
    }

    /// The extent, if the asker has anything to do with it and it is settled.
    fn settled(&self, by: MachineId, handle: Handle) -> Result<Held, ExtentError> {
        let known = self.held(handle).filter(|held| held.owner == by || !held.reach.of(by).is_empty());
        let held = known.ok_or(ExtentError::NoSuchExtent { handle })?;
        if held.change.is_some() { Err(ExtentError::Changing { handle }) } else { Ok(held) }
    }

    fn owned(&self, by: MachineId, handle: Handle) -> Result<Held, ExtentError> {
        let held = self.settled(by, handle)?;
        if held.owner == by { Ok(held) } else { Err(ExtentError::NotOwner { by, handle }) }
    }

    fn alone(&self, by: MachineId, handle: Handle) -> Result<(), ExtentError> {
        if self.owned(by, handle)?.is_owners_alone() { Ok(()) } else { Err(ExtentError::InUse { handle }) }
    }

    fn set(&mut self, extent: u32, held: Held) {
        self.slots.as_mut()[extent as usize].content = Content::Held(held);
    }

    fn task(&self, extent: u32) -> Option<Task> {
        let slot = self.slots.as_ref().get(extent as usize)?;
        let Content::Held(Held { piece, change: Some((work, _)), .. }) = slot.content else { return None };
        let handle = slot.handle(extent);
        Some(Task { handle, piece, work, serial: slot.serial })
    }

    fn change(&mut self, extent: u32, goal: Goal) -> Result<Task, ExtentError> {
        let handle = self.slots.as_ref()[extent as usize].handle(extent);
        let held = self.held(handle).ok_or(ExtentError::NoSuchExtent { handle })?;
        self.step(extent, held, held.next_work(&goal), goal)
    }

    fn step(&mut self, extent: u32, held: Held, work: Work, goal: Goal) -> Result<Task, ExtentError> {
        let slot = &mut self.slots.as_mut()[extent as usize];
        slot.serial = slot.serial.wrapping_add(1);
        slot.content = Content::Held(Held { change: Some((work, goal)), ..held });
        if work == Work::Nothing {
            return self.settle(extent);
        }
        let handle = slot.handle(extent);
        Ok(Task { handle, piece: held.piece, work, serial: slot.serial })
    }

    /// Nobody reaches what it should not any more, and no byte is left that should not be.
    fn settle(&mut self, extent: u32) -> Result<Task, ExtentError> {
        let slot = &mut self.slots.as_mut()[extent as usize];
        let handle = slot.handle(extent);
        let Content::Held(Held { piece, owner, change: Some((_, goal)), .. }) = slot.content else {
            return Err(ExtentError::Damaged { handle });
        };
        if goal.owner != Some(owner) {
            slot.generation = slot.generation.saturating_add(1);
        }
        match goal.owner {
            Some(owner) => {
                slot.content = Content::Held(Held { piece, owner, reach: goal.reach, change: None });
            }
            None if handle.generation == u32::MAX => slot.content = Content::WornOut,
            None => slot.content = Content::Vacant { next: self.vacant.replace(extent) },
        }
        let handle = slot.handle(extent);
        if goal.owner.is_none() {
            self.frames.free(piece, Kind::Guest { extent })?;
        }
        Ok(Task { handle, piece, work: Work::Nothing, serial: slot.serial })
    }
}

/// What becomes of an extent that one machine, not its owner, leaves: the others keep it, or its owner has it back.
fn left_by(machine: MachineId, held: &Held) -> Goal {
    let reach = held.reach.without(&Reach::only(machine, Rights::all()));
    let reach = if reach.is_nobody() { Reach::only(held.owner, Rights::all()) } else { reach };
    Goal { owner: Some(held.owner), reach }
}

fn mappable(rights: Rights) -> Result<Rights, ExtentError> {
    if rights.is_mappable() { Ok(rights) } else { Err(ExtentError::Unmappable { rights }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    const ALICE: MachineId = MachineId(1);
    const BOB: MachineId = MachineId(2);

    fn one_frame() -> Extents<alloc::vec::Vec<FrameEntry>, alloc::vec::Vec<Slot>, 2> {
        let mut frames = Frames::new(vec![FrameEntry::default(); 1], Pfn(0));
        frames.add(Pfn(0), PageCount(1)).unwrap();
        let mut extents = Extents::new(frames, vec![Slot::default(); 1]);
        extents.admit(ALICE).unwrap();
        extents.admit(BOB).unwrap();
        extents
    }

    fn finish(
        extents: &mut Extents<alloc::vec::Vec<FrameEntry>, alloc::vec::Vec<Slot>, 2>,
        task: Task,
    ) -> Handle {
        let mut task = task;
        while task.work != Work::Nothing {
            task = extents.done(task).unwrap();
        }
        task.handle
    }

    #[test]
    fn a_slot_with_its_generations_used_up_is_donated_no_more_and_never_used_again() {
        let mut extents = one_frame();
        extents.slots[0].generation = u32::MAX - 1;
        let task = extents.grant(ALICE, Order::PAGE).unwrap();
        let handle = finish(&mut extents, task);
        let task = extents.donate(ALICE, handle, BOB).unwrap();
        let handle = finish(&mut extents, task);
        assert_eq!(handle.generation, u32::MAX);
        assert_eq!(extents.donate(BOB, handle, ALICE), Err(ExtentError::WornOut { handle }));
        let task = extents.release(BOB, handle).unwrap();
        finish(&mut extents, task);
        assert_eq!(extents.frames().free_pages(), PageCount(1));
        assert_eq!(extents.grant(ALICE, Order::PAGE), Err(ExtentError::NoSlot));
        assert_eq!(extents.owner(handle), None);
    }

    #[test]
    fn a_handle_is_what_its_number_says() {
        for bits in [0, 1, 0xffff_ffff, 0x1_0000_0000, u64::MAX] {
            assert_eq!(Handle::from_bits(bits).to_bits(), bits);
        }
    }
}
