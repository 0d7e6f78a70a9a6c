//! Kinds that are taken and let go, and tables that are made and undone.
//!
//! Enters: a word of a table. Leaves: what it names, held or not. Each step moves [`Frame::held`] of one table by one entry, so
//! that it can stop after any.
use super::{Direct, Done, Frame, Kind, Making, Refused};
use crate::address::{Level, Output, entry_at};
use crate::entry::{Entry, Malformed, Permissions};
use crate::format::Format;
use crate::memory::TableMemory;
use plimsoll_types::MachineId;

/// What an entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Named {
    Nothing,
    /// A page that it lets be read.
    Readable(u32),
    /// A page that it lets be written.
    Writable(u32),
    Table(u32, Level),
}

impl<F: Format, M: TableMemory> Direct<'_, F, M> {
    /// The number of the frame at `at`.
    pub(super) fn number(&self, at: Output) -> Option<u32> {
        let offset = at.0.checked_sub(self.first.0)?;
        let number = u32::try_from(offset >> F::PAGE_SHIFT).ok()?;
        let there = (number as usize) < self.frames.len() && self.address(number) == at;
        there.then_some(number)
    }

    pub(super) fn address(&self, number: u32) -> Output {
        Output(self.first.0 + (u64::from(number) << F::PAGE_SHIFT))
    }

    pub(super) fn record(&self, number: u32) -> &Frame {
        &self.frames[number as usize]
    }

    pub(super) fn record_mut(&mut self, number: u32) -> &mut Frame {
        &mut self.frames[number as usize]
    }

    /// The number of a frame of this guest's.
    pub(super) fn owned(&self, owner: MachineId, at: Output) -> Done<u32, M> {
        let number = self.number(at).filter(|number| self.record(*number).owner == Some(owner));
        number.ok_or(Refused::NotOwned(at))
    }

    /// The word of an entry of a frame's.
    fn read(&self, number: u32, index: u32) -> Done<u64, M> {
        let at = entry_at(self.address(number), index.into());
        self.memory.read(at).map_err(|error| Refused::Memory { at, error })
    }

    /// What a word names in a table of `level`.
    pub(super) fn named(&self, word: u64, level: Level) -> Done<Named, M> {
        let find = |at| self.number(at).ok_or(Refused::NotOwned(at));
        match (F::decode(word, level, &self.caps), level.below()) {
            (Entry::Absent { .. }, _) => Ok(Named::Nothing),
            (Entry::Malformed(reason), _) => Err(Refused::Malformed { level, reason }),
            (Entry::Table(_), None) => Err(Refused::Malformed { level, reason: Malformed::TableAtLastLevel }),
            (Entry::Table(next), Some(below)) if !next.global && next.memory == F::TABLE_MEMORY => {
                Ok(Named::Table(find(next.at)?, below))
            }
            (Entry::Leaf(leaf), None)
                if !leaf.global && leaf.shift == F::PAGE_SHIFT && leaf.memory == F::TABLE_MEMORY =>
            {
                let number = find(leaf.output)?;
                let writable = leaf.permissions.contains(Permissions::WRITE);
                Ok(if writable { Named::Writable(number) } else { Named::Readable(number) })
            }
            _ => Err(Refused::Unsupported { level, word }),
        }
    }

    fn fences_of(&self, number: u32) -> Option<u64> {
        self.fences.get(self.record(number).owner?.0 as usize).copied()
    }

    /// A frame that nobody needs can become something else, or somebody else's.
    pub(super) fn settled(&self, number: u32) -> Done<(), M> {
        let (frame, at) = (self.record(number), self.address(number));
        if frame.needed > 0 || frame.making != Making::No {
            return Err(Refused::Needed { frame: at, kind: frame.kind });
        }
        if frame.held > 0 {
            return Err(Refused::Work(at));
        }
        if frame.lost.is_some() && frame.lost == self.fences_of(number) {
            return Err(Refused::Fence(at));
        }
        Ok(())
    }

    /// A frame is of this kind from now on, if it is not needed as another.
    fn become_kind(&mut self, owner: MachineId, number: u32, kind: Kind) -> Done<(), M> {
        self.owned(owner, self.address(number))?;
        if self.record(number).kind != kind {
            self.settled(number)?;
            self.record_mut(number).kind = kind;
        }
        Ok(())
    }

    fn is_whole(&self, number: u32, level: Level) -> bool {
        let frame = self.record(number);
        frame.kind == Kind::Table(level) && u64::from(frame.held) == F::entries(level)
    }

    /// Takes what an entry names; of tables, only such as are whole.
    pub(super) fn take(&mut self, owner: MachineId, named: Named) -> Done<(), M> {
        let (number, kind) = match named {
            Named::Nothing => return Ok(()),
            Named::Readable(number) => (number, None),
            Named::Writable(number) => (number, Some(Kind::Writable)),
            Named::Table(number, level) => (number, Some(Kind::Table(level))),
        };
        let at = self.address(number);
        self.owned(owner, at)?;
        // Whoever needs it also uses it: what can be counted as a use can be counted as a need.
        let uses = self.record(number).uses.checked_add(1).ok_or(Refused::Overflow(at))?;
        if let Some(kind) = kind {
            self.become_kind(owner, number, kind)?;
            self.record_mut(number).needed += 1;
        }
        self.record_mut(number).uses = uses;
        Ok(())
    }

    /// Takes what an entry names, and makes the table that it names if it is not one yet.
    pub(super) fn hold(&mut self, owner: MachineId, named: Named, budget: &mut u64) -> Done<(), M> {
        if let Named::Table(number, level) = named
            && !self.is_whole(number, level)
        {
            self.make(owner, number, level, budget)?;
        }
        self.take(owner, named)
    }

    /// Lets go of what an entry named.
    pub(super) fn let_go(&mut self, named: Named) {
        let (number, needs) = match named {
            Named::Nothing => return,
            Named::Readable(number) => (number, false),
            Named::Writable(number) | Named::Table(number, _) => (number, true),
        };
        let lost = self.fences_of(number);
        let frame = self.record_mut(number);
        frame.lost = lost;
        frame.uses = frame.uses.saturating_sub(1);
        if needs {
            frame.needed = frame.needed.saturating_sub(1);
            self.wait(number);
        }
    }

    /// A table that nobody needs has entries to let go.
    pub(super) fn wait(&mut self, number: u32) {
        let waiting = self.waiting.unwrap_or(number);
        let frame = self.record_mut(number);
        let idle = frame.needed == 0 && frame.making == Making::No;
        if idle && frame.held > 0 && frame.next.is_none() {
            frame.next = Some(waiting);
            self.waiting = Some(number);
        }
    }

    /// A frame begins to become a table, or goes on with it.
    fn begin(&mut self, owner: MachineId, number: u32, level: Level, making: Making) -> Done<(), M> {
        if self.record(number).making != Making::No {
            // Its own table is on the way to it.
            return Err(Refused::Needed { frame: self.address(number), kind: self.record(number).kind });
        }
        self.become_kind(owner, number, Kind::Table(level))?;
        self.record_mut(number).making = making;
        Ok(())
    }

    /// Makes a frame a whole table, with all below. Depth first; the way back is kept in the frames.
    fn make(&mut self, owner: MachineId, top: u32, level: Level, budget: &mut u64) -> Done<(), M> {
        self.begin(owner, top, level, Making::Top)?;
        let mut at = (top, level);
        loop {
            match self.make_one(owner, at, budget) {
                Ok(Some(next)) => at = next,
                Ok(None) => return Ok(()),
                Err(refused) => {
                    self.give_up(at.0);
                    return Err(refused);
                }
            }
        }
    }

    /// One entry of a table that is being made, and which table is next; `None` when the one that was asked for is whole.
    fn make_one(
        &mut self,
        owner: MachineId,
        (number, level): (u32, Level),
        budget: &mut u64,
    ) -> Done<Option<(u32, Level)>, M> {
        let held = self.record(number).held;
        if self.is_whole(number, level) {
            let making = core::mem::replace(&mut self.record_mut(number).making, Making::No);
            // The entry above is looked at once more, and finds a whole table.
            return Ok(match making {
                Making::For(above) => Some((above, Level(level.0 + 1))),
                Making::Top | Making::No => None,
            });
        }
        *budget = budget.checked_sub(1).ok_or(Refused::Budget)?;
        let named = self.named(self.read(number, held)?, level)?;
        if let Named::Table(below, lower) = named
            && !self.is_whole(below, lower)
        {
            self.begin(owner, below, lower, Making::For(number))?;
            return Ok(Some((below, lower)));
        }
        self.take(owner, named)?;
        self.record_mut(number).held = held + 1;
        Ok(Some((number, level)))
    }

    /// The tables from this one up to the one that was asked for stay half made.
    fn give_up(&mut self, number: u32) {
        let mut next = Making::For(number);
        while let Making::For(number) = next {
            next = core::mem::replace(&mut self.record_mut(number).making, Making::No);
            self.wait(number);
        }
    }

    /// Has tables that nobody needs let go of what they hold, and says whether all have.
    ///
    /// # Errors
    /// [`Refused::Memory`].
    pub fn work(&mut self, budget: &mut u64) -> Done<bool, M> {
        while let Some(number) = self.waiting {
            let frame = self.record(number);
            let (held, next) = (frame.held, frame.next);
            let level = match frame.kind {
                Kind::Table(level) if frame.needed == 0 && held > 0 => level,
                _ => {
                    self.waiting = next.filter(|next| *next != number);
                    self.record_mut(number).next = None;
                    continue;
                }
            };
            let Some(left) = budget.checked_sub(1) else { return Ok(false) };
            *budget = left;
            let named = self.named(self.read(number, held - 1)?, level);
            self.record_mut(number).held = held - 1;
            // What was taken for it was well-formed, and processors set marks only.
            if let Ok(named) = named {
                self.let_go(named);
            }
        }
        Ok(true)
    }
}
