//! What a guest can ask the hypervisor for: memory of its own that it gives, lends and shares.
//!
//! Enters: five registers of a guest, any numbers. Leaves: a status and a value. Who may do what is `plimsoll_core::frames::extents`'
//! decision; done here is what it tells the host to do: take mappings away, have translations forgotten, zero. What must never
//! happen: a mapping made without asking for its rights first, or one left when the guest may not reach the extent any more.
//!
//! `vmmcall` with rax the call, rdi, rsi, rdx, rcx its arguments; rax is the [`Status`] afterwards, rdx the value.
//!
//! | rax | call | arguments | value |
//! |---|---|---|---|
//! | 0 | pages | 0 own, 1 resident, 2 limbo, 3 stored, 4 of extents, 5 that its device reaches, 6 of code found to be known; 7 there, address | how many |
//! | 1 | discard | address, bytes | |
//! | 2 | grant | order | handle |
//! | 3 | map | handle, address | rights |
//! | 4 | unmap | handle | |
//! | 5 | donate | handle, machine | handle |
//! | 6 | lend | handle, machine, rights | handle |
//! | 7 | share | handle, machine, rights | handle |
//! | 8 | reclaim | handle | handle |
//! | 9 | give back | handle | |
//! | 10 | release | handle | |
//!
//! Calls 11 to 15 are about devices and about pages' rights: [`crate::device`] has their table.
//!
//! An extent may be mapped once in each guest, at an address behind the guest's own memory that is aligned to its size. Extents
//! are charged to the guest that was granted them and never taken from it, so there are [`EXTENT_PAGES_MAX`] of their pages at most.
//! A guest whose tables name frames has other calls: [`crate::direct`].
use crate::host::Host;
use crate::memory::Owned;
use crate::paged::{Forbidden, PagedError};
use core::ops::Range;
use plimsoll_core::frames::buddy::{FramesError, Order, Piece};
use plimsoll_core::frames::extents::{ExtentError, Handle, Task, Work};
use plimsoll_core::frames::{Reach, Rights};
use plimsoll_core::word::StateKind;
use plimsoll_types::{Gpa, Hpa, MachineId, PAGE_SHIFT, PAGE_SIZE};

/// Pages that all extents of one guest may have.
pub const EXTENT_PAGES_MAX: u64 = 1024;
/// Guest physical addresses end here: what four levels of nested tables translate.
const ADDRESSES_END: u64 = 1 << 48;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Status {
    /// It was done.
    Done = 0,
    /// There is no such call.
    NoSuchCall = 1,
    /// An argument is not what it can be.
    Invalid = 2,
    /// The handle is none of the caller's.
    NoSuchExtent = 3,
    /// The caller may not do that with the extent.
    NotAllowed = 4,
    /// The extent is in use, or in the wrong state for that.
    InUse = 5,
    /// There is no memory, or no room.
    NoRoom = 6,
    /// A part of it was done: the call is to be made again ([`crate::direct`]).
    Again = 7,
}

/// A call that was not done, or a hypervisor that contradicts itself.
#[derive(Clone, Copy, Debug)]
pub enum CallError {
    /// The guest is told.
    Refused(Status),
    /// A bug: the guest ends, the others go on.
    Broken(PagedError),
}

impl From<PagedError> for CallError {
    fn from(error: PagedError) -> Self {
        match error {
            PagedError::NoMemory => Self::Refused(Status::NoRoom),
            PagedError::Outside { .. } => Self::Refused(Status::Invalid),
            PagedError::Forbidden(Forbidden::Held { .. }) => Self::Refused(Status::InUse),
            PagedError::Forbidden(_) => Self::Refused(Status::NotAllowed),
            error => Self::Broken(error),
        }
    }
}

impl From<ExtentError> for CallError {
    fn from(error: ExtentError) -> Self {
        Self::Refused(match error {
            ExtentError::NoSuchExtent { .. } => Status::NoSuchExtent,
            ExtentError::NotOwner { .. } | ExtentError::Owner { .. } => Status::NotAllowed,
            ExtentError::NotTo { .. } | ExtentError::Unmappable { .. } => Status::Invalid,
            ExtentError::Frames(FramesError::NoMemory { .. })
            | ExtentError::NoSlot
            | ExtentError::NoRoom { .. }
            | ExtentError::TooManySharers { .. }
            | ExtentError::WornOut { .. } => Status::NoRoom,
            ExtentError::Frames(error) => return Self::Broken(PagedError::Frames(error)),
            _ => Status::InUse,
        })
    }
}

const fn refused(status: Status) -> CallError {
    CallError::Refused(status)
}

/// An extent as a guest has it mapped.
#[derive(Clone, Copy, Debug)]
pub struct Mapped {
    handle: Handle,
    gpa: Gpa,
    piece: Piece,
}

impl Mapped {
    fn range(self) -> Range<u64> {
        self.gpa.0..self.gpa.0 + self.piece.order.pages().bytes().0
    }

    /// Whether it has some of these addresses.
    fn meets(self, range: &Range<u64>) -> bool {
        meet(&self.range(), range)
    }

    fn pages(self) -> impl Iterator<Item = Gpa> + Clone {
        (self.gpa.0..).step_by(PAGE_SIZE).take(pages(self.piece)).map(Gpa)
    }
}

/// Whether two ranges of addresses have any in common.
pub fn meet(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

fn pages(piece: Piece) -> usize {
    usize::try_from(piece.order.pages().0).unwrap_or(0)
}

/// The rights that a guest names.
///
/// # Errors
/// They are none.
pub fn rights(bits: u64) -> Result<Rights, CallError> {
    u8::try_from(bits).ok().and_then(Rights::from_bits).ok_or(refused(Status::Invalid))
}

fn machine(number: u64) -> Result<MachineId, CallError> {
    u32::try_from(number).map(MachineId).map_err(|_| refused(Status::Invalid))
}

impl Host {
    /// Does what a guest asks for.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call(&mut self, place: usize, arguments: [u64; 5]) -> Result<u64, CallError> {
        let by = self.guests[place].id;
        let [call, first, second, third, _] = arguments;
        if call != 0 && self.guests[place].paged.tables().owner().is_some() {
            return self.call_direct(place, arguments);
        }
        let handle = Handle::from_bits(first);
        match call {
            0 => self.pages(place, first, Gpa(second)).ok_or(refused(Status::Invalid)),
            1 => {
                self.guests[place].paged.discard(&mut self.pool, Gpa(first), second)?;
                Ok(0)
            }
            2 => {
                let order = u8::try_from(first).ok().and_then(Order::new).ok_or(refused(Status::Invalid))?;
                let asked = self.extents(|extents| extents.owned_pages(by)).0 + order.pages().0;
                if asked > EXTENT_PAGES_MAX || !self.has_room(order.pages().bytes()) {
                    return Err(refused(Status::NoRoom));
                }
                self.change(|extents| extents.grant(by, order))
            }
            3 => self.map(place, handle, Gpa(second)),
            4 => {
                let mapped = self.guests[place].mapped.iter().position(|mapped| mapped.handle == handle);
                let mapped = mapped.ok_or(refused(Status::NoSuchExtent))?;
                let mapped = self.guests[place].mapped.swap_remove(mapped);
                self.unmap(place, mapped)?;
                Ok(0)
            }
            5 => {
                let to = machine(second)?;
                self.change(|extents| extents.donate(by, handle, to))
            }
            6 => {
                let (to, rights) = (machine(second)?, rights(third)?);
                self.change(|extents| extents.lend(by, handle, to, rights))
            }
            7 => {
                let (to, rights) = (machine(second)?, rights(third)?);
                self.change(|extents| extents.share(by, handle, to, rights))
            }
            8 => self.change(|extents| extents.reclaim(by, handle)),
            9 => self.change(|extents| extents.give_back(by, handle)),
            10 => self.change(|extents| extents.release(by, handle)),
            _ => self.contain(place, arguments),
        }
    }

    fn extents<T>(&mut self, with: impl FnOnce(&mut Owned) -> T) -> T {
        self.pool.memory.borrow_mut().with_extents(with)
    }

    fn pages(&mut self, place: usize, which: u64, gpa: Gpa) -> Option<u64> {
        let paged = &self.guests[place].paged;
        Some(match which {
            0 => paged.size().0,
            1 => paged.resident().0,
            2 => paged.limbo().0,
            3 => paged.pages(StateKind::Stored).0,
            4 => {
                let by = self.guests[place].id;
                self.extents(|extents| extents.owned_pages(by)).0
            }
            5 => paged.guard.reached.0,
            6 => paged.guard.verified,
            7 => paged.is_there(gpa).into(),
            _ => return None,
        })
    }

    /// Begins a change and does all of its tasks. Returns the extent's handle afterwards.
    fn change(
        &mut self,
        begin: impl FnOnce(&mut Owned) -> Result<Task, ExtentError>,
    ) -> Result<u64, CallError> {
        let task = self.extents(begin)?;
        Ok(self.carry_out(task)?.to_bits())
    }

    /// Does the tasks of a change, one after the other, until there are none.
    ///
    /// # Errors
    /// [`CallError`]: a bug.
    pub fn carry_out(&mut self, mut task: Task) -> Result<Handle, CallError> {
        loop {
            match task.work {
                Work::Unmap(reach) => self.unmap_everywhere(task.piece, reach)?,
                // Whose tables were changed runs again only with its translations forgotten (`Nested::take_translations`), and
                // nothing else translates: there is one processor, it is here, and no device reaches an extent.
                Work::Fence(_) => {}
                Work::Zero => self.pool.memory.borrow_mut().zero(task),
                Work::Nothing => return Ok(task.handle),
            }
            task = self.extents(|extents| extents.done(task))?;
        }
    }

    fn unmap_everywhere(&mut self, piece: Piece, reach: Reach) -> Result<(), CallError> {
        for (machine, _) in reach.iter() {
            let Some(place) = self.guests.iter().position(|guest| guest.id == machine) else { continue };
            let found = self.guests[place].mapped.iter().position(|mapped| mapped.piece == piece);
            if let Some(found) = found {
                let mapped = self.guests[place].mapped.swap_remove(found);
                self.unmap(place, mapped)?;
            }
        }
        Ok(())
    }

    fn unmap(&mut self, place: usize, mapped: Mapped) -> Result<(), CallError> {
        for gpa in mapped.pages() {
            let mut memory = self.pool.memory.borrow_mut();
            self.guests[place].paged.tables().unmap_extent(&mut memory, gpa).map_err(PagedError::from)?;
        }
        Ok(())
    }

    fn map(&mut self, place: usize, handle: Handle, gpa: Gpa) -> Result<u64, CallError> {
        let id = self.guests[place].id;
        let (rights, piece) = self.extents(|extents| (extents.rights(id, handle), extents.piece(handle)));
        let piece = piece.filter(|_| !rights.is_empty()).ok_or(refused(Status::NoSuchExtent))?;
        // Others may write it: who executes what is known only does not execute it.
        let rights =
            if self.guests[place].paged.guard.is_strict() { rights - Rights::EXECUTE } else { rights };
        // What can be executed or written can be read, in these tables.
        if !rights.contains(Rights::READ) {
            return Err(refused(Status::Invalid));
        }
        let bytes = piece.order.pages().bytes().0;
        if !gpa.0.is_multiple_of(bytes) {
            return Err(refused(Status::Invalid));
        }
        self.behind(place, gpa, bytes)?;
        if self.guests[place].mapped.iter().any(|other| other.piece == piece) {
            return Err(refused(Status::InUse));
        }
        let mapped = Mapped { handle, gpa, piece };
        let frames = (piece.first.0 << PAGE_SHIFT..).step_by(PAGE_SIZE).map(Hpa);
        let mut memory = self.pool.memory.borrow_mut();
        let tables = self.guests[place].paged.tables();
        tables.map_extent(&mut memory, mapped.pages().zip(frames), rights).map_err(PagedError::from)?;
        drop(memory);
        self.guests[place].mapped.push(mapped);
        Ok(u64::from(rights.bits()))
    }

    /// So many addresses from `gpa` on, if they are behind a guest's memory and nothing is there.
    ///
    /// # Errors
    /// [`Status::Invalid`], [`Status::InUse`].
    pub fn behind(&self, place: usize, gpa: Gpa, bytes: u64) -> Result<Range<u64>, CallError> {
        let guest = &self.guests[place];
        let end = gpa.0.checked_add(bytes).filter(|end| *end <= ADDRESSES_END);
        let is_behind = gpa.0 >= guest.paged.end_of_memory().0;
        let range = gpa.0..end.filter(|_| is_behind).ok_or(refused(Status::Invalid))?;
        if guest.mapped.iter().any(|mapped| mapped.meets(&range)) || self.shows(place, &range) {
            return Err(refused(Status::InUse));
        }
        Ok(range)
    }

    /// A guest is dead: what it lent and borrowed goes where it belongs.
    ///
    /// # Errors
    /// [`CallError`]: a bug.
    pub fn forget(&mut self, place: usize) -> Result<(), CallError> {
        let id = self.guests[place].id;
        self.extents(|extents| extents.died(id))?;
        loop {
            let task = self.extents(|extents| extents.tasks().next());
            let Some(task) = task else { return Ok(()) };
            self.carry_out(task)?;
        }
    }
}
