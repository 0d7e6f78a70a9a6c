//! Intel's remapping hardware: which memory devices reach.
//!
//! Enters: domains, and changes of what is mapped in them. Leaves: the same, once no device goes by what was before; and the accesses that
//! were refused. Which commands a change needs is `plimsoll_mmu::iotlb`'s; the tables are its mapper's. Intel Virtualization Technology
//! for Directed I/O, Architecture Specification: 6.5.2 for the queue, 9 for root and context entries, 11.4 (10.4 before revision 4) for registers.
//!
//! **What must never happen:** a frame let go while a device may have a translation to it. So what takes a mapping away returns only when
//! the unit has confirmed, by the wait at the end of its queue, that it has forgotten it and that accesses under way are done. A
//! unit that does not confirm ends the machine: nothing could be promised any more.
//!
//! Whoever has no context entry reaches nothing: every device but those that were [attached](Unit::attach).
use crate::acpi::RemappingUnit;
use crate::memory::{Frame, Memory, Outside, Physical, address};
use crate::paging::{PagingError, Space};
use crate::wire::Device;
use alloc::vec::Vec;
use core::arch::x86_64::{_mm_clflush, _mm_mfence};
use core::fmt;
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use core::sync::atomic::{AtomicU32, Ordering};
use plimsoll_core::frames::Rights;
use plimsoll_core::frames::buddy::{FramesError, Kind};
use plimsoll_mmu::format::vtd::{Caps, Second4};
use plimsoll_mmu::iotlb::{self, Change, Command, Context, Depth, Drain, Maker, Vtd};
use plimsoll_mmu::mapper::{MapError, Mapper};
use plimsoll_mmu::tlb::{Breaks, Consequence};
use plimsoll_mmu::{
    Feature, Invalidate, Leaf, Level, Memory as Type, Output, Permissions, Span, TableFrames, TableMemory,
};
use plimsoll_types::{Gpa, Hpa, PAGE_SHIFT, PAGE_SIZE};

/// Registers.
const CAP: u64 = 0x08;
const ECAP: u64 = 0x10;
const GLOBAL_COMMAND: u64 = 0x18;
const GLOBAL_STATUS: u64 = 0x1c;
const ROOT: u64 = 0x20;
const FAULT_STATUS: u64 = 0x34;
const QUEUE_TAIL: u64 = 0x88;
const QUEUE: u64 = 0x90;
/// What may be on in the global status: all but what happens once.
const LASTING: u32 = 0x96ff_ffff;
const TRANSLATE: u32 = 1 << 31;
const SET_ROOT: u32 = 1 << 30;
const QUEUED: u32 = 1 << 26;
/// More faults than there are records for; a record is full; the queue cannot go on, for three reasons.
const MISSED: u32 = 1;
const RECORDED: u32 = 1 << 1;
const QUEUE_FAILED: u32 = 7 << 4;

/// Descriptors in the queue, a page of them, 16 bytes each.
const SLOTS: u64 = 256;
/// How often is looked before the unit is given up: seconds, on any machine.
const LOOKS: u32 = 1 << 28;
/// Four levels, in a context entry.
const FOUR_LEVELS: u64 = 2;
/// A cache line.
const LINE: usize = 64;

/// Where the unit says that a wait is over.
static WAITED: AtomicU32 = AtomicU32::new(0);

/// A unit that is not used.
#[derive(Clone, Copy, Debug)]
pub enum UnitError {
    /// It lacks something.
    Lacks {
        /// What.
        what: &'static str,
    },
    /// There is no memory for its tables.
    Paging(PagingError),
}

impl fmt::Display for UnitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lacks { what } => {
                write!(f, "this machine's remapping hardware has no {what}; use a machine whose has")
            }
            Self::Paging(error) => write!(f, "{error}"),
        }
    }
}

impl From<PagingError> for UnitError {
    fn from(error: PagingError) -> Self {
        Self::Paging(error)
    }
}

impl From<FramesError> for UnitError {
    fn from(error: FramesError) -> Self {
        Self::Paging(error.into())
    }
}

/// An access that was refused, as the unit recorded it.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// Whose.
    pub device: u16,
    /// The page.
    pub page: Gpa,
    /// To read or to write.
    pub rights: Rights,
    /// Why, by the specification's table of fault reasons.
    pub reason: u8,
}

/// The unit's registers, mapped to themselves.
#[derive(Clone, Copy)]
struct Registers(Hpa);

impl Registers {
    fn at<T>(self, offset: u64) -> *mut T {
        with_exposed_provenance_mut(address(self.0.0 + offset))
    }

    fn read(self, offset: u64) -> u64 {
        // SAFETY: `Unit::start` has mapped the registers, which are no memory of anybody's; reading one changes nothing.
        unsafe { self.at::<u64>(offset).read_volatile() }
    }

    fn write(self, offset: u64, word: u64) {
        // SAFETY: mapped, as in `read`. What the words written make the unit access are frames that it has been given.
        unsafe { self.at::<u64>(offset).write_volatile(word) };
    }

    fn read_half(self, offset: u64) -> u32 {
        // SAFETY: as in `read`.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    fn write_half(self, offset: u64, word: u32) {
        // SAFETY: as in `write`.
        unsafe { self.at::<u32>(offset).write_volatile(word) };
    }

    fn until(self, offset: u64, bits: u32) {
        for _ in 0..LOOKS {
            if self.read_half(offset) & bits != 0 {
                return;
            }
            core::hint::spin_loop();
        }
        panic!("the remapping hardware does not do what it is told: register {offset:#x} lacks {bits:#x}");
    }
}

/// Words of tables as the unit sees them, which need not look into the processor's caches.
#[derive(Clone, Copy)]
struct Words {
    physical: &'static Physical,
    coherent: Feature,
}

impl Words {
    fn show(self, at: Output, bytes: usize) {
        if self.coherent == Feature::On {
            return;
        }
        for line in (at.0..at.0 + bytes as u64).step_by(LINE) {
            // SAFETY: a line of memory that is mapped, of a table; writing it back changes no byte.
            unsafe { _mm_clflush(with_exposed_provenance(address(line))) };
        }
        // SAFETY: any processor with SVM has it.
        unsafe { _mm_mfence() };
    }

    /// Writes a word of a root or context table, which nobody else does.
    fn put(self, at: Hpa, word: u64) -> Result<(), PagingError> {
        let (at, level) = (Output(at.0), Level::PAGES);
        let failed = |error| MapError::Memory { level, at, error };
        let old = self.read(at).map_err(failed)?;
        self.compare_exchange(at, old, word).map_err(failed)?;
        Ok(())
    }
}

impl TableMemory for Words {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        self.physical.read(at)
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let found = self.physical.compare_exchange(at, current, new)?;
        self.show(at, size_of::<u64>());
        Ok(found)
    }
}

/// Frames for tables whose zeros the unit sees.
struct Tables<'a> {
    memory: &'a mut Memory,
    words: Words,
}

impl TableFrames for Tables<'_> {
    fn left(&self, level: Level) -> usize {
        TableFrames::left(self.memory, level)
    }

    fn take(&mut self, level: Level) -> Option<Output> {
        let table = TableFrames::take(self.memory, level)?;
        self.words.show(table, PAGE_SIZE);
        Some(table)
    }

    fn give(&mut self, level: Level, frame: Output) {
        TableFrames::give(self.memory, level, frame);
    }
}

/// The queue of commands.
struct Queue {
    registers: Registers,
    frame: Frame,
    tail: u64,
    /// log2 of the most pages that one command names.
    most: u32,
}

/// A command as the unit reads it. 6.5.2.
fn descriptor(command: Vtd, most: u32) -> Option<[u64; 2]> {
    let drained = |drain| if drain == Drain::On { 3 << 6 } else { 0 };
    let domain_of = |domain| u64::from(domain) << 16;
    Some(match command {
        Vtd::ContextAll => [1 | 1 << 4, 0],
        Vtd::ContextDomain { domain } => [1 | 2 << 4 | domain_of(domain), 0],
        Vtd::ContextDevice { domain, device } => {
            [1 | 3 << 4 | domain_of(domain) | u64::from(device) << 32, 0]
        }
        Vtd::IotlbAll { drain } => [2 | 1 << 4 | drained(drain), 0],
        Vtd::IotlbDomain { domain, drain } => [2 | 2 << 4 | drained(drain) | domain_of(domain), 0],
        Vtd::IotlbPages { domain, pages, depth, drain } => {
            // The least naturally aligned block that has them all; the domain's everything, if that is too large to be said.
            let (first, last) = (pages.first().0 >> PAGE_SHIFT, pages.last().0 >> PAGE_SHIFT);
            let mask = u64::BITS - (first ^ last).leading_zeros();
            if mask > most {
                return descriptor(Vtd::IotlbDomain { domain, drain }, most);
            }
            let hint = if depth == Depth::Leaves { 1 << 6 } else { 0 };
            let at = first >> mask << mask << PAGE_SHIFT;
            [2 | 3 << 4 | drained(drain) | domain_of(domain), at | hint | u64::from(mask)]
        }
        // No device here has translations of its own: its capability is never switched on.
        Vtd::DeviceTlb { .. } | Vtd::Wait => return None,
    })
}

impl Queue {
    fn push(&mut self, [low, high]: [u64; 2]) {
        let at = address(self.tail % SLOTS * 16);
        let slot = &mut self.frame.bytes_mut()[at..at + 16];
        slot[..8].copy_from_slice(&low.to_le_bytes());
        slot[8..].copy_from_slice(&high.to_le_bytes());
        self.tail += 1;
    }

    /// Has the unit do these, and waits until all is done.
    fn carry_out(&mut self, commands: impl Iterator<Item = Vtd>) {
        let most = self.most;
        commands.filter_map(|command| descriptor(command, most)).for_each(|words| self.push(words));
        // A wait that writes 1, behind everything before it.
        WAITED.store(0, Ordering::SeqCst);
        self.push([5 | 1 << 5 | 1 << 6 | 1 << 32, (&raw const WAITED).addr() as u64]);
        // SAFETY: any processor with SVM has it. The unit reads what was written before.
        unsafe { _mm_mfence() };
        self.registers.write(QUEUE_TAIL, (self.tail % SLOTS) << 4);
        for _ in 0..LOOKS {
            if WAITED.load(Ordering::SeqCst) == 1 {
                return;
            }
            if self.registers.read_half(FAULT_STATUS) & QUEUE_FAILED != 0 {
                break;
            }
            core::hint::spin_loop();
        }
        panic!("the remapping hardware does not say that it has forgotten what it was told to forget");
    }
}

/// Pages of a domain are forgotten, and accesses to them over, when this returns.
struct Forget<'a> {
    queue: &'a mut Queue,
    domain: u16,
}

impl Invalidate for Forget<'_> {
    fn invalidate(&mut self, pages: Span) {
        let (domain, depth, drain) = (self.domain, Depth::All, Drain::On);
        self.queue.carry_out([Vtd::IotlbPages { domain, pages, depth, drain }].into_iter());
    }
}

/// What one device reaches: nothing, at first.
pub struct Domain {
    id: u16,
    root: Frame,
}

/// The unit, on.
pub struct Unit {
    queue: Queue,
    words: Words,
    caps: Caps,
    facts: iotlb::Unit,
    /// What the unit reads as long as the machine runs.
    _root: Frame,
    /// The tables of buses.
    contexts: Vec<(u8, Frame)>,
    /// Where its fault records are, and how many.
    records: (u64, u64),
}

/// Bits of a word, shifted down.
const fn bits(word: u64, first: u32, count: u32) -> u64 {
    word >> first & ((1 << count) - 1)
}

impl Unit {
    /// Switches translation on. No device reaches anything then; these will be attached.
    ///
    /// # Errors
    /// [`UnitError`]; nothing is switched on.
    pub fn start(
        memory: &mut Memory,
        space: &Space,
        found: RemappingUnit,
        devices: impl Iterator<Item = Device>,
    ) -> Result<Self, UnitError> {
        space.map_registers(memory, found.registers)?;
        let registers = Registers(found.registers);
        let (cap, ecap) = (registers.read(CAP), registers.read(ECAP));
        let feature = |word: u64, bit: u32| if word >> bit & 1 == 1 { Feature::On } else { Feature::Off };
        let records = (bits(cap, 24, 10) << 4, bits(cap, 40, 8) + 1);
        for (has, what) in [
            (cap >> 10 & 1 == 1, "tables of four levels"),
            (ecap >> 1 & 1 == 1, "queue of commands"),
            (cap >> 4 & 1 == 0, "way to take writes without being told to look"),
            (records.0 + records.1 * 16 <= PAGE_SIZE as u64, "fault records among its first registers"),
        ] {
            if !has {
                return Err(UnitError::Lacks { what });
            }
        }
        let words = Words { physical: memory.physical(), coherent: feature(ecap, 0) };
        let most = if cap >> 39 & 1 == 1 { u32::try_from(bits(cap, 48, 6)).unwrap_or(0) } else { 0 };
        let mut queue = Queue { registers, frame: memory.take_zeroed(Kind::Host)?, tail: 0, most };
        let root = memory.take_zeroed(Kind::Host)?;
        words.show(Output(root.at().0), PAGE_SIZE);
        let mut contexts: Vec<(u8, Frame)> = Vec::new();
        for [_, bus] in devices.map(|device| device.requester().to_le_bytes()) {
            if contexts.iter().all(|(known, _)| *known != bus) {
                let frame = memory.take_zeroed(Kind::Host)?;
                words.show(Output(frame.at().0), PAGE_SIZE);
                words.put(Hpa(root.at().0 + u64::from(bus) * 16), frame.at().0 | 1)?;
                contexts.push((bus, frame));
            }
        }
        let command = |bit: u32| {
            registers.write_half(GLOBAL_COMMAND, registers.read_half(GLOBAL_STATUS) & LASTING | bit);
            registers.until(GLOBAL_STATUS, bit);
        };
        registers.write(ROOT, root.at().0);
        command(SET_ROOT);
        registers.write(QUEUE_TAIL, 0);
        registers.write(QUEUE, queue.frame.at().0);
        command(QUEUED);
        queue.carry_out([Vtd::ContextAll, Vtd::IotlbAll { drain: Drain::On }].into_iter());
        command(TRANSLATE);
        let caps = Caps {
            physical_bits: found.physical_bits,
            input_bits: u32::try_from(bits(cap, 16, 6)).unwrap_or(0) + 1,
            largest_leaf: Level::PAGES,
            snoop_control: Feature::Off,
            transient: Feature::Off,
            accessed_dirty: Feature::Off,
        };
        let facts = iotlb::Unit { maker: Maker::Intel, absent: feature(cap, 7), breaks: Breaks::Spared };
        Ok(Self { queue, words, caps, facts, _root: root, contexts, records })
    }

    /// A domain in which nothing is mapped. Numbers are from 1 on: 0 is what a unit may keep for who has none.
    ///
    /// # Errors
    /// There is no memory.
    pub fn domain(&self, memory: &mut Memory, id: u16) -> Result<Domain, FramesError> {
        let root = memory.take_root()?;
        self.words.show(Output(root.at().0), PAGE_SIZE);
        Ok(Domain { id, root })
    }

    fn context(&self, device: Device) -> Option<Hpa> {
        let [function, bus] = device.requester().to_le_bytes();
        let (_, table) = self.contexts.iter().find(|(known, _)| *known == bus)?;
        Some(Hpa(table.at().0 + u64::from(function) * 16))
    }

    /// A device's context entry has changed: what is needed is forgotten.
    fn moved(&mut self, device: Device, old: Option<Context>, new: Option<Context>) {
        let whose = iotlb::Device { id: device.requester(), remote: Feature::Off };
        let change = Change::Device { old, new };
        let needed = iotlb::needed(&change, &self.facts, &whose, Consequence::NeedlessFault);
        let commands =
            needed.iter().flat_map(|recipe| recipe.as_slice()).filter_map(|command| match command {
                Command::Vtd(command) => Some(*command),
                _ => None,
            });
        self.queue.carry_out(commands);
    }

    const fn context_of(domain: &Domain) -> Context {
        Context { domain: domain.id, root: Output(domain.root.at().0) }
    }

    /// From now on the device reaches what is mapped in the domain.
    ///
    /// # Errors
    /// A bug: the entry cannot be written.
    pub fn attach(&mut self, device: Device, domain: &Domain) -> Result<(), PagingError> {
        let Some(entry) = self.context(device) else { return Ok(()) };
        // The half that says that the entry is there comes last.
        self.words.put(Hpa(entry.0 + 8), FOUR_LEVELS | u64::from(domain.id) << 8)?;
        self.words.put(entry, domain.root.at().0 | 1)?;
        self.moved(device, None, Some(Self::context_of(domain)));
        Ok(())
    }

    /// The device reaches nothing any more, and none of its accesses is under way.
    ///
    /// # Errors
    /// A bug: the entry cannot be written.
    pub fn detach(&mut self, device: Device, domain: &Domain) -> Result<(), PagingError> {
        let Some(entry) = self.context(device) else { return Ok(()) };
        self.words.put(entry, 0)?;
        self.words.put(Hpa(entry.0 + 8), 0)?;
        self.moved(device, Some(Self::context_of(domain)), None);
        Ok(())
    }

    fn with<T>(
        &mut self,
        domain: &Domain,
        memory: &mut Memory,
        work: impl FnOnce(&mut Mapper<'_, Second4, Words, Tables<'_>, Forget<'_>>) -> Result<T, MapError<Outside>>,
    ) -> Result<T, PagingError> {
        let words = self.words;
        let mut tables = Tables { memory, words };
        let mut forget = Forget { queue: &mut self.queue, domain: domain.id };
        let root = Output(domain.root.at().0);
        Ok(work(&mut Mapper::new(root, self.caps, &words, &mut tables, &mut forget)?)?)
    }

    /// Maps a page in a domain.
    ///
    /// # Errors
    /// [`PagingError`]: there is no memory for tables, or something is mapped there.
    pub fn map(
        &mut self,
        domain: &Domain,
        memory: &mut Memory,
        (page, at): (Span, Hpa),
        rights: Rights,
    ) -> Result<(), PagingError> {
        memory.stock_tables()?;
        let mut permissions = Permissions::EXECUTE | Permissions::USER;
        permissions.set(Permissions::READ, rights.contains(Rights::READ));
        permissions.set(Permissions::WRITE, rights.contains(Rights::WRITE));
        let leaf = Leaf::new(Output(at.0), PAGE_SHIFT, permissions, Type::Physical);
        self.with(domain, memory, |mapper| mapper.map(page, leaf))?;
        if self.facts.absent == Feature::On {
            // It may have kept that nothing was there.
            Forget { queue: &mut self.queue, domain: domain.id }.invalidate(page);
        }
        Ok(())
    }

    /// Takes pages out of a domain. When this returns, no device reaches them by it.
    ///
    /// # Errors
    /// [`PagingError`]: a bug.
    pub fn unmap(&mut self, domain: &Domain, memory: &mut Memory, pages: Span) -> Result<(), PagingError> {
        self.with(domain, memory, |mapper| mapper.unmap(pages))?;
        Ok(())
    }

    /// Takes a domain back that no device has and in which nothing is mapped.
    ///
    /// # Errors
    /// [`FramesError`]: a bug.
    pub fn end(domain: Domain, memory: &mut Memory) -> Result<(), FramesError> {
        memory.give_root(domain.root)
    }

    /// Shows the accesses that were refused since, and makes room for others. Whether some were not recorded for want of room.
    pub fn refused(&mut self, mut show: impl FnMut(Refused)) -> bool {
        let registers = self.queue.registers;
        let status = registers.read_half(FAULT_STATUS);
        if status & (RECORDED | MISSED) == 0 {
            return false;
        }
        let (first, count) = self.records;
        for record in (first..).step_by(16).take(address(count)) {
            let (page, what) = (registers.read(record), registers.read(record + 8));
            if what >> 63 & 1 == 0 {
                continue;
            }
            let [low, high, ..] = what.to_le_bytes();
            show(Refused {
                device: u16::from_le_bytes([low, high]),
                page: Gpa(page >> PAGE_SHIFT << PAGE_SHIFT),
                rights: if what >> 62 & 1 == 1 { Rights::READ } else { Rights::WRITE },
                reason: what.to_le_bytes()[4],
            });
            // Written back, the bit that says that it is full is cleared.
            registers.write(record + 8, 1 << 63);
        }
        registers.write_half(FAULT_STATUS, status & MISSED);
        status & MISSED != 0
    }
}
