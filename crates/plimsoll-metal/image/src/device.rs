//! Devices that guests own: what one reaches is what its guest has said, of its own memory, and nothing else.
//!
//! Enters: settings, calls of guests, the end of guests. Leaves: pages that a device reaches, at the addresses by which the guest knows
//! them, held in memory for as long; refused accesses, said and counted. The guest drives the device's registers itself: that it
//! reaches nothing else rests on the remapping hardware alone ([`crate::vtd`]). What must never happen: a page let go, given back or
//! sealed while its device may write it; a guest's memory given to others while its device has any of it.
//!
//! Calls, as [`crate::calls`] has them; that table's statuses.
//!
//! | rax | call | arguments | value |
//! |---|---|---|---|
//! | 11 | show registers | address behind its memory | bytes |
//! | 12 | reach | address, bytes, rights (1 read, 2 write) | |
//! | 13 | part | address, bytes | |
//! | 14 | refused accesses | | how many there were |
//! | 15 | seal | address, bytes | |
use crate::calls::{CallError, Status, meet, rights};
use crate::console::say;
use crate::guest::{Death, StartError};
use crate::host::Host;
use crate::memory::Memory;
use crate::paged::{PagedError, pages};
use crate::pci::Function;
use crate::vtd::{Domain, Refused, Unit};
use crate::wire::Device;
use alloc::vec::Vec;
use core::ops::Range;
use plimsoll_core::frames::Rights;
use plimsoll_mmu::{Access, Input, Span};
use plimsoll_types::{Gpa, Hpa, MachineId, PAGE_SIZE};

/// Pages of one guest that its device may reach at a time: they are never taken from it.
const REACHED_MAX: u64 = 1024;
/// Refused accesses of one guest's device that are said; all are counted.
const SAID_MAX: u64 = 64;

/// A device that a guest owns.
struct Given {
    owner: MachineId,
    function: Function,
    domain: Domain,
    /// Where the guest has its registers.
    shown: Option<Range<u64>>,
}

/// The remapping hardware, and who owns which device.
pub struct Devices {
    unit: Unit,
    given: Vec<Given>,
}

impl Devices {
    /// Nobody owns any.
    pub const fn new(unit: Unit) -> Self {
        Self { unit, given: Vec::new() }
    }
}

fn span(gpa: Gpa, bytes: u64) -> Result<Span, PagedError> {
    Span::new(Input(gpa.0), bytes).ok_or(PagedError::Outside { gpa })
}

impl Host {
    /// Gives a device to a guest, which does not run yet; it reaches nothing.
    ///
    /// # Errors
    /// There is no such device, or another guest has it; there is no memory.
    pub fn give_device(&mut self, device: Device, owner: MachineId) -> Result<(), StartError> {
        let Some(Devices { unit, given }) = self.devices.as_mut().filter(|_| device != Device::NONE) else {
            return Ok(());
        };
        let is_taken = given.iter().any(|given| given.function.at == device);
        let function = Function::find(device).filter(|_| !is_taken);
        let function = function.ok_or(StartError::NoDevice { at: device })?;
        // There are fewer guests than any unit has domains for, and their numbers begin at 1.
        let number = u16::try_from(owner.0).unwrap_or(u16::MAX);
        let domain = unit.domain(&mut self.pool.memory.borrow_mut(), number)?;
        unit.attach(device, &domain).map_err(PagedError::from)?;
        function.start();
        given.push(Given { owner, function, domain, shown: None });
        Ok(())
    }

    /// Does what a guest asks for of its device or of its pages' rights.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn contain(&mut self, place: usize, arguments: [u64; 5]) -> Result<u64, CallError> {
        let [call, first, second, third, _] = arguments;
        // What is in the shadow tables of a guest that has such would not follow.
        if matches!(call, 11..=15) && self.guests[place].paged.tables().shadows().is_some() {
            return Err(CallError::Refused(Status::NotAllowed));
        }
        match call {
            11 => self.show(place, Gpa(first)),
            12 => self.reach(place, Gpa(first), second, rights(third)?),
            13 => self.part(place, Gpa(first), second),
            14 => {
                self.device(place)?;
                self.hear();
                Ok(self.guests[place].device_refusals)
            }
            15 => {
                let Self { pool, guests, .. } = self;
                guests[place].paged.seal(&mut pool.memory.borrow_mut(), Gpa(first), second)?;
                Ok(0)
            }
            _ => Err(CallError::Refused(Status::NoSuchCall)),
        }
    }

    /// The device of a guest; and what is needed to change what it reaches.
    fn device(&mut self, place: usize) -> Result<(&mut Unit, &mut Given), CallError> {
        let owner = self.guests[place].id;
        let devices = self.devices.as_mut().ok_or(CallError::Refused(Status::NotAllowed))?;
        let given = devices.given.iter_mut().find(|given| given.owner == owner);
        Ok((&mut devices.unit, given.ok_or(CallError::Refused(Status::NotAllowed))?))
    }

    fn show(&mut self, place: usize, gpa: Gpa) -> Result<u64, CallError> {
        let (_, Given { function, shown, .. }) = self.device(place)?;
        let Function { registers, bytes, .. } = *function;
        if shown.is_some() {
            return Err(CallError::Refused(Status::InUse));
        }
        if !gpa.is_page_aligned() {
            return Err(CallError::Refused(Status::Invalid));
        }
        let range = self.behind(place, gpa, bytes.0)?;
        let addresses = range.clone().step_by(PAGE_SIZE).map(Gpa);
        let pages = addresses.zip((registers.0..).step_by(PAGE_SIZE).map(Hpa));
        let tables = self.guests[place].paged.tables();
        tables.map_registers(&mut self.pool.memory.borrow_mut(), pages).map_err(PagedError::from)?;
        self.device(place)?.1.shown = Some(range);
        Ok(bytes.0)
    }

    /// Whether a guest has registers there.
    pub fn shows(&self, place: usize, range: &Range<u64>) -> bool {
        let given = self.devices.iter().flat_map(|devices| &devices.given);
        let mut own = given.filter(|given| given.owner == self.guests[place].id);
        own.any(|given| given.shown.as_ref().is_some_and(|shown| meet(shown, range)))
    }

    fn reach(&mut self, place: usize, gpa: Gpa, bytes: u64, rights: Rights) -> Result<u64, CallError> {
        self.device(place)?;
        let pages = self.guests[place].paged.whole(gpa, bytes)?;
        if rights.is_empty() || rights.contains(Rights::EXECUTE) {
            return Err(CallError::Refused(Status::Invalid));
        }
        if self.guests[place].paged.guard.reached.0 + u64::from(pages.end - pages.start) > REACHED_MAX {
            return Err(CallError::Refused(Status::NoRoom));
        }
        for offset in (0..bytes).step_by(PAGE_SIZE) {
            if let Err(error) = self.reach_page(place, Gpa(gpa.0 + offset), rights) {
                if offset > 0 {
                    self.part(place, gpa, offset)?;
                }
                return Err(error);
            }
        }
        Ok(0)
    }

    /// Brings a page, keeps it there, and lets the device reach it.
    fn reach_page(&mut self, place: usize, gpa: Gpa, rights: Rights) -> Result<(), CallError> {
        if !self.guests[place].paged.is_there(gpa) {
            match self.fault(place, gpa) {
                Ok(None) => {}
                Ok(Some(_)) => return Err(CallError::Refused(Status::NoRoom)),
                Err(Death::Memory(error)) => return Err(error.into()),
                Err(_) => return Err(CallError::Refused(Status::Invalid)),
            }
        }
        let access = if rights.contains(Rights::WRITE) { Access::Write } else { Access::Read };
        let memory = self.pool.memory.clone();
        let at = self.guests[place].paged.hold(&mut memory.borrow_mut(), gpa, access)?;
        let (unit, given) = self.device(place)?;
        if let Err(error) =
            unit.map(&given.domain, &mut memory.borrow_mut(), (span(gpa, PAGE_SIZE as u64)?, at), rights)
        {
            self.guests[place].paged.let_go(gpa)?;
            return Err(PagedError::from(error).into());
        }
        Ok(())
    }

    /// The device reaches these pages no more: unmapped, forgotten by the unit, and only then let go.
    fn part(&mut self, place: usize, gpa: Gpa, bytes: u64) -> Result<u64, CallError> {
        self.device(place)?;
        self.guests[place].paged.whole(gpa, bytes)?;
        let pages = || (gpa.0..gpa.0 + bytes).step_by(PAGE_SIZE).map(Gpa);
        if !pages().all(|page| self.guests[place].paged.is_held(page)) {
            return Err(CallError::Refused(Status::Invalid));
        }
        let memory = self.pool.memory.clone();
        let (unit, given) = self.device(place)?;
        unit.unmap(&given.domain, &mut memory.borrow_mut(), span(gpa, bytes)?).map_err(PagedError::from)?;
        for page in pages() {
            self.guests[place].paged.let_go(page)?;
        }
        Ok(0)
    }

    /// Says and counts the accesses of devices that were refused since.
    pub fn hear(&mut self) {
        let Self { devices, guests, .. } = self;
        let Some(Devices { unit, given }) = devices else { return };
        let missed = unit.refused(|Refused { device, page, rights, reason }| {
            let given = given.iter().find(|given| given.function.at.requester() == device);
            let owner = given.and_then(|given| guests.iter_mut().find(|guest| guest.id == given.owner));
            let whose = owner.map_or("nobody", |guest| {
                guest.device_refusals += 1;
                if guest.device_refusals > SAID_MAX { "" } else { &guest.name }
            });
            if !whose.is_empty() {
                let what = if rights == Rights::READ { "read" } else { "write" };
                let device = Device::of(device);
                say!("refused: device {device} of {whose} may not {what} {page} (reason {reason:#x})");
            }
        });
        if missed {
            say!("refused: accesses of devices for which there was no fault record");
        }
    }

    /// A guest runs no more: its device is stopped, reaches nothing, and what it held is let go.
    ///
    /// # Errors
    /// A bug; the guest's memory must not be given to others then.
    pub fn take_device(&mut self, place: usize) -> Result<(), PagedError> {
        let id = self.guests[place].id;
        let Some(Devices { unit, given }) = self.devices.as_mut() else { return Ok(()) };
        let Some(number) = given.iter().position(|given| given.owner == id) else { return Ok(()) };
        let Given { function, domain, shown, .. } = given.swap_remove(number);
        function.stop();
        unit.detach(function.at, &domain)?;
        let paged = &mut self.guests[place].paged;
        let memory: &mut Memory = &mut self.pool.memory.borrow_mut();
        for gpa in shown.into_iter().flatten().step_by(PAGE_SIZE).map(Gpa) {
            paged.tables().unmap_extent(memory, gpa)?;
        }
        let regions = paged.layout().regions().to_vec();
        for region in &regions {
            unit.unmap(&domain, memory, span(region.start, region.bytes.0)?)?;
        }
        for gpa in pages(&regions) {
            if paged.is_held(gpa) {
                paged.let_go(gpa)?;
            }
        }
        Ok(Unit::end(domain, memory)?)
    }
}
