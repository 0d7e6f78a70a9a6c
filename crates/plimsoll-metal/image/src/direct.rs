//! A para-virtual guest: its processor walks its own tables, which name the machine's frames. It writes to none of them itself.
//!
//! Enters: batches of entries, tables to be pinned, roots to be loaded. Leaves: tables that a processor can use, or why not. Which frame
//! may be what is decided by `plimsoll_mmu::direct`; here is where its calls come from, its fences are executed and its work is done. What
//! must never happen: a page taken from such a guest, whose tables, registers and lists hold the frame's number; so its memory is
//! brought as a whole when it is made, reserved in the ledger, and kept ([`Paged::keep_all`]).
//!
//! `vmmcall` as in [`crate::calls`], from ring 0 only. These are all the calls such a guest has, beside 0: it has no extents, and gives no
//! memory back.
//!
//! | rax | call | arguments | value |
//! |---|---|---|---|
//! | 32 | update | address of a batch, how many in it | how many were done |
//! | 33 | pin | frame, level | |
//! | 34 | unpin | frame | |
//! | 35 | load | frame of a root | |
//!
//! A frame is an address of the machine's; a batch is in one page, at an address of the guest's:
//!
//! ```text
//!  0  where   the machine's address of the entry; bit 1: marks that the processor has set in it stay
//!  8  word    what it is to be
//! 16  the next
//! ```
//!
//! A batch is done up to the first update that is refused, and only a batch of which none was done says why. A call that says
//! [`Status::Again`] has done a part of its work: it is to be made again before any other.
use crate::calls::{CallError, Status};
use crate::cpu::Features;
use crate::guest::{Guest, StartError};
use crate::host::Host;
use crate::memory::{GUESTS, Memory, Outside, Physical};
use crate::nested::{self, Nested};
use crate::paged::{PagedError, Pool, pages};
use crate::paging::PagingError;
use crate::shadow::Stock;
use crate::svm::Translations;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use plimsoll_guest::abi;
use plimsoll_mmu::direct::{Direct, Frame, Marks, Refused, Update};
use plimsoll_mmu::format::x86::{Caps, Long4};
use plimsoll_mmu::mapper::Mapper;
use plimsoll_mmu::{Leaf, Level, Memory as Type, NothingCached, Output, Permissions, TableMemory};
use plimsoll_types::{ByteCount, Gpa, Hpa, MachineId, PAGE_SHIFT, PAGE_SIZE, Pfn};

/// Entries that one call looks at: 32 tables, well below a millisecond.
const BUDGET: u64 = 1 << 14;
const PAGE: u64 = PAGE_SIZE as u64;
const UPDATE_BYTES: u64 = 16;
/// Of where an entry is: what becomes of its marks.
const KEEP_MARKS: u64 = 1 << 1;
const LOW_BITS: u64 = 7;

/// What all frames are used as, by all guests that are of this kind.
pub type Kinds = Direct<'static, Long4, Physical>;

/// What that takes of the hypervisor's heap, with memory up to `end`.
pub const fn heap_bytes(end: Pfn) -> ByteCount {
    ByteCount(end.0.saturating_mul(size_of::<Frame>() as u64))
}

/// Nobody uses any frame as anything yet. Kept as long as the machine runs.
pub fn kinds(physical: &'static Physical, caps: Caps, end: Pfn) -> Rc<RefCell<Kinds>> {
    let frames = alloc::vec![Frame::FREE; crate::memory::address(end.0)].leak();
    // Guests are numbered from 1 on, and each has one processor.
    let (fences, roots) = (alloc::vec![0; GUESTS + 1].leak(), alloc::vec![None; GUESTS + 1].leak());
    Rc::new(RefCell::new(Direct::new(physical, caps, (Output(0), frames), fences, roots)))
}

/// A guest whose tables name frames.
pub struct Owner {
    id: MachineId,
    kinds: Rc<RefCell<Kinds>>,
    /// Tables that nobody needs still hold what they name: that is undone before anything else is done.
    owes: bool,
}

type Answer<T> = Result<T, Refused<Outside>>;

impl Owner {
    /// Makes a request, within `budget`.
    fn ask<T>(
        &mut self,
        translations: &mut Translations,
        budget: &mut u64,
        mut request: impl FnMut(&mut Kinds, MachineId, &mut u64) -> Answer<T>,
    ) -> Answer<T> {
        let mut kinds = self.kinds.borrow_mut();
        if self.owes && !kinds.work(budget)? {
            return Err(Refused::Budget);
        }
        self.owes = false;
        loop {
            let answer = request(&mut kinds, self.id, budget);
            match answer {
                // The guest does not run before its translations are forgotten, and nothing else translates.
                Err(Refused::Fence(_)) => {
                    *translations = Translations::Stale;
                    kinds.fenced(self.id);
                }
                // What is half made waits for the same call.
                Err(Refused::Budget) => return answer,
                _ => {
                    self.owes = !kinds.work(budget)?;
                    return answer;
                }
            }
        }
    }

    const fn processor(&self) -> usize {
        self.id.0 as usize
    }

    /// Takes the frames of all pages, of which the hypervisor writes to one, and loads its first root.
    fn begin(
        &self,
        pages: impl Iterator<Item = Gpa>,
        (written, root): (Hpa, Hpa),
        mut frame: impl FnMut(Gpa) -> Result<Hpa, PagingError>,
    ) -> Result<(), PagingError> {
        let mut kinds = self.kinds.borrow_mut();
        for page in pages {
            kinds.give(self.id, Output(frame(page)?.0))?;
        }
        kinds.keep(self.id, Output(written.0))?;
        kinds.load(self.processor(), self.id, Output(root.0), &mut { u64::MAX })?;
        Ok(())
    }

    /// The guest runs no more: its frames are nothing any more, and nobody's.
    fn end(
        &self,
        pages: impl Iterator<Item = Gpa> + Clone,
        mut frame: impl FnMut(Gpa) -> Result<Hpa, PagingError>,
    ) -> Result<(), PagingError> {
        let mut kinds = self.kinds.borrow_mut();
        kinds.unload(self.processor());
        for page in pages.clone() {
            let at = Output(frame(page)?.0);
            kinds.unkeep(self.id, at)?;
            if kinds.frame(at).is_some_and(Frame::pinned) {
                kinds.unpin(self.id, at)?;
            }
        }
        kinds.work(&mut { u64::MAX })?;
        // Its processor runs no more: it uses no translation.
        kinds.fenced(self.id);
        for page in pages {
            kinds.release(self.id, Output(frame(page)?.0))?;
        }
        Ok(())
    }
}

impl Nested {
    /// The guest's processor is to walk its own tables, of which the first is in the page at `root`; all `pages` are there. The hypervisor
    /// writes to that at `written`.
    fn name_frames(
        &mut self,
        memory: &mut Memory,
        id: MachineId,
        pages: impl Iterator<Item = Gpa>,
        (written, root): (Gpa, Gpa),
    ) -> Result<Hpa, PagingError> {
        let (written, root) = (self.frame(memory, written)?, self.frame(memory, root)?);
        let owner = Owner { id, kinds: memory.kinds(self.caps()), owes: false };
        owner.begin(pages, (written, root), |page| self.frame(memory, page))?;
        self.walks_frames(owner);
        Ok(root)
    }

    /// The guest runs no more. Its pages can be taken again.
    ///
    /// # Errors
    /// A bug: something of it is needed still.
    pub fn forget_frames(
        &mut self,
        memory: &mut Memory,
        pages: impl Iterator<Item = Gpa> + Clone,
    ) -> Result<(), PagingError> {
        match self.take_owner() {
            Some(owner) => owner.end(pages, |page| self.frame(memory, page)),
            None => Ok(()),
        }
    }
}

impl Guest {
    /// Brings all of the guest's memory, and writes its first tables: each page is mapped to its own address, to be read only if it is one of
    /// these tables. They are made in order of addresses, from [`abi::PAGE_TABLES_GPA`] on: a root, what is below it, and where memory has no
    /// holes up to 1 GiB, from the fourth on an entry for each page in a row. There the guest looks up which frame a page is.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn build_tables(&mut self, pool: &mut Pool, features: &Features) -> Result<(), StartError> {
        self.paged.keep_all(pool)?;
        let regions = self.paged.layout().regions().to_vec();
        let pages = || pages(&regions);
        let count = |bytes: u64| {
            let spans = pages().map(|page| page.0 / bytes);
            let count = |(last, count), span| (Some(span), count + u64::from(last != Some(span)));
            spans.fold((None, 0), count).1
        };
        let tables_end = abi::PAGE_TABLES_GPA + (1 + count(1 << 39) + count(1 << 30) + count(1 << 21)) * PAGE;
        if tables_end > abi::PAGE_TABLES_END {
            return Err(StartError::Tables { end: Gpa(tables_end) });
        }
        let tables = abi::PAGE_TABLES_GPA..tables_end;
        let memory: &mut Memory = &mut pool.memory.borrow_mut();
        let nested = self.paged.tables();
        let frames: Result<Vec<_>, _> =
            tables.clone().step_by(PAGE_SIZE).map(|page| nested.frame(memory, Gpa(page))).collect();
        let mut stock = Stock(frames?.iter().rev().map(|frame| Output(frame.0)).collect());
        let root = stock.0.pop().ok_or(StartError::Tables { end: Gpa(tables_end) })?;
        let physical = memory.physical();
        let mut nothing = NothingCached;
        let mut mapper =
            Mapper::<Long4, _, _, _>::new(root, features.paging, physical, &mut stock, &mut nothing)
                .map_err(PagingError::from)?;
        for page in pages() {
            let mut rights = Permissions::READ | Permissions::EXECUTE | Permissions::USER;
            rights.set(Permissions::WRITE, !tables.contains(&page.0));
            let frame = nested.frame(memory, page)?;
            let leaf = Leaf::new(Output(frame.0), PAGE_SHIFT, rights, Type::Pat(0));
            mapper.map(nested::page(page)?, leaf).map_err(PagingError::from)?;
        }
        let ends = (Gpa(abi::channel_gpa(0)), Gpa(abi::PAGE_TABLES_GPA));
        let root = nested.name_frames(memory, self.id, pages(), ends)?;
        self.vcpu.set_cr3(root.0);
        Ok(())
    }
}

fn refused(refused: Refused<Outside>) -> CallError {
    CallError::Refused(match refused {
        Refused::NotOwned(_) => Status::NotAllowed,
        Refused::Needed { .. } | Refused::Pinned(_) | Refused::Contended(_) => Status::InUse,
        Refused::Overflow(_) => Status::NoRoom,
        Refused::Budget | Refused::Work(_) | Refused::Fence(_) => Status::Again,
        Refused::Memory { .. } => return CallError::Broken(PagedError::Tables(refused.into())),
        _ => Status::Invalid,
    })
}

impl Host {
    /// Does what a guest whose tables name frames asks for.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_direct(&mut self, place: usize, arguments: [u64; 5]) -> Result<u64, CallError> {
        let [call, first, second, ..] = arguments;
        let invalid = CallError::Refused(Status::Invalid);
        let guest = &mut self.guests[place];
        // The guest's own users have no say in this.
        if guest.vcpu.privilege() > 0 {
            return Err(CallError::Refused(Status::NotAllowed));
        }
        let at = Output(first);
        let memory: &mut Memory = &mut self.pool.memory.borrow_mut();
        let nested = guest.paged.tables();
        if call == 32 {
            let batch = batch(nested, memory, Gpa(first), second).ok_or(invalid)?;
            let (owner, translations) = nested.owner().ok_or(invalid)?;
            return update(owner, translations, memory.physical(), batch);
        }
        let (owner, translations) = nested.owner().ok_or(invalid)?;
        let (processor, budget) = (owner.processor(), &mut { BUDGET });
        let answer = match call {
            33 => {
                let level = u8::try_from(second).map(Level).map_err(|_| invalid)?;
                owner.ask(translations, budget, |kinds, id, budget| kinds.pin(id, at, level, budget))
            }
            34 => owner.ask(translations, budget, |kinds, id, _| kinds.unpin(id, at)),
            35 => {
                let load = |kinds: &mut Kinds, id, budget: &mut u64| kinds.load(processor, id, at, budget);
                owner.ask(translations, budget, load).map(|root| {
                    // Nothing of the address space before, whose tag is the same.
                    *translations = Translations::Stale;
                    guest.vcpu.set_cr3(root.0);
                })
            }
            _ => return Err(CallError::Refused(Status::NoSuchCall)),
        };
        answer.map(|()| 0).map_err(refused)
    }
}

/// Where a batch is in the machine's memory, and how many updates it has; `None` if it is not in one page of the guest's.
fn batch(nested: &mut Nested, memory: &mut Memory, at: Gpa, count: u64) -> Option<(Output, u64)> {
    let offset = at.0 % PAGE;
    if count == 0 || count > (PAGE - offset) / UPDATE_BYTES || !offset.is_multiple_of(UPDATE_BYTES) {
        return None;
    }
    let page = nested.frame(memory, Gpa(at.0 - offset)).ok()?;
    Some((Output(page.0 + offset), count))
}

/// Does a batch; how many of it were done.
fn update(
    owner: &mut Owner,
    translations: &mut Translations,
    physical: &Physical,
    (batch, count): (Output, u64),
) -> Result<u64, CallError> {
    let mut budget = BUDGET;
    for number in 0..count {
        let word = |offset| {
            let at = Output(batch.0 + number * UPDATE_BYTES + offset);
            physical.read(at).map_err(|error| Refused::Memory { at, error })
        };
        let one = |kinds: &mut Kinds, id, budget: &mut u64| {
            let (at, word) = (word(0)?, word(8)?);
            let marks = match at & LOW_BITS {
                0 => Marks::Replace,
                KEEP_MARKS => Marks::Keep,
                _ => return Err(Refused::NoEntry(Output(at))),
            };
            kinds.update(id, Update { at: Output(at & !LOW_BITS), word, marks }, budget)
        };
        match owner.ask(translations, &mut budget, one) {
            Ok(()) => {}
            Err(error) if number == 0 => return Err(refused(error)),
            Err(_) => return Ok(number),
        }
    }
    Ok(count)
}
