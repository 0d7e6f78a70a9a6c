//! A guest: its memory, its processor, and what its program asks for.
//!
//! Enters: settings; exits of its processor. Leaves: what it is to do next, and at its end what it did. What must never happen: a number
//! of the guest's believed; all of them are allegations that end in a report, in a sleep, or in its own death.
//! The program, its ports and its pages are `plimsoll_guest::abi`'s, as on Linux.
use crate::calls::Mapped;
use crate::cpu::{self, Features};
use crate::decode::{Instruction, Operand, decode};
use crate::digest::Digest;
use crate::memory::{Memory, address};
use crate::paged::{Paged, PagedError, Pool};
use crate::paging::PagingError;
use crate::shadow::Wanted;
use crate::svm::{Exit, Ring, Stages, Svm, Vcpu};
use crate::wire::{Device, Execute, GuestSettings, Paging, ProgramKind};
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use plimsoll_core::frames::buddy::FramesError;
use plimsoll_core::layout::{GuestLayout, LayoutError, Region};
use plimsoll_guest::abi::{self, LATENCY_BUCKETS, Params, Phase, Report, latency_bucket};
use plimsoll_guest::{Guest as Program, GuestError};
use plimsoll_mmu::format::x86::{Caps, Long4};
use plimsoll_mmu::shadow::Invalidation;
use plimsoll_mmu::x86::Mode;
use plimsoll_mmu::{
    Access, Entry, Format, Input, Leaf, Level, Memory as Type, Output, Permissions, Table, Unencodable,
};
use plimsoll_types::{BLOCK_SIZE, ByteCount, Gpa, MachineId, PAGE_SIZE, PageCount};
use zerocopy::{FromBytes, IntoBytes};

/// The program, as its segments look from [`abi::IMAGE_GPA`] on.
static WORKLOAD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.bin"));
/// The one that calls, likewise.
static CALLER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/caller.bin"));
/// The longest a guest sleeps at once; it asks again.
const IDLE_MAX_NS: u64 = 1_000_000_000;
/// Page directories there is room for behind the PML4 and the PDPT.
const DIRECTORIES: u64 = (abi::PAGE_TABLES_END - abi::PAGE_TABLES_GPA) / abi::PAGE_SIZE - 2;
const GIB: u64 = 1 << 30;
/// Of a page fault's error code: a write, a user's, a fetch.
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const FETCH: u64 = 1 << 4;
/// The exit that stands for all control registers in the last words of a guest: a write of CR0.
const CONTROL: u64 = 0x10;

/// A guest that is not started.
#[derive(Debug)]
pub enum StartError {
    /// Its memory's layout.
    Layout(LayoutError),
    /// What its program is told.
    Program(GuestError),
    /// More than one processor.
    Processors {
        /// How many.
        found: u32,
    },
    /// No program has this number.
    NoProgram {
        /// The number.
        found: u64,
    },
    /// No paging has this number.
    NoPaging {
        /// The number.
        found: u64,
    },
    /// There is no room for its first tables.
    Tables {
        /// Where they would end.
        end: Gpa,
    },
    /// Nothing has this number that a guest may execute.
    NoExecute {
        /// The number.
        found: u64,
    },
    /// What is asked for exists with a second stage only.
    NoSecondStage,
    /// There is no such device.
    NoDevice {
        /// Where it should be.
        at: Device,
    },
    /// Memory its page tables cannot map.
    OutOfReach {
        /// Where.
        at: Gpa,
    },
    /// There is no memory.
    Memory(PagedError),
    /// A bug: an entry of its tables.
    Entry(Unencodable),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout(error) => write!(f, "{error}"),
            Self::Program(error) => write!(f, "{error}"),
            Self::Processors { found } => write!(f, "it is to have {found} processors; guests here have one"),
            Self::NoProgram { found } => write!(f, "no program has number {found}: use 0 to 2"),
            Self::NoPaging { found } => write!(f, "no paging has number {found}: use 0 to 2"),
            Self::Tables { end } => write!(
                f,
                "its first tables would end at {end} and have room up to {:#x}; use a smaller guest",
                abi::PAGE_TABLES_END
            ),
            Self::NoExecute { found } => {
                write!(f, "nothing to be executed has number {found}: use 0 or 1")
            }
            Self::NoSecondStage => f.write_str(
                "it is to execute known code only, or to own a device, and has no nested paging; give it that",
            ),
            Self::NoDevice { at } => write!(
                f,
                "it is to own the device {at}, and there is none there with registers in memory, or another guest has it"
            ),
            Self::OutOfReach { at } => {
                write!(f, "its memory at {at} is out of reach of {DIRECTORIES} page directories")
            }
            Self::Memory(error) => write!(f, "{error}"),
            Self::Entry(error) => write!(f, "{error}"),
        }
    }
}

impl From<PagedError> for StartError {
    fn from(error: PagedError) -> Self {
        Self::Memory(error)
    }
}

impl From<PagingError> for StartError {
    fn from(error: PagingError) -> Self {
        Self::Memory(error.into())
    }
}

impl From<FramesError> for StartError {
    fn from(error: FramesError) -> Self {
        Self::Memory(error.into())
    }
}

/// Why a guest cannot go on.
#[derive(Clone, Debug)]
pub enum Death {
    /// Its program gave up.
    Panicked {
        /// Its words.
        message: String,
    },
    /// Its memory.
    Memory(PagedError),
    /// It wrote to a port that means nothing.
    Port {
        /// Which.
        port: u16,
        /// How many bytes.
        bytes: u8,
    },
    /// An exception.
    Exception {
        /// Which.
        vector: u64,
        /// Its error code.
        error: u64,
        /// Where, of a page fault.
        address: u64,
    },
    /// Something else that it may not do.
    Other {
        /// The exit's number.
        code: u64,
    },
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panicked { message } => write!(f, "the guest program stopped: {message}"),
            Self::Memory(error) => write!(f, "{error}"),
            Self::Port { port, bytes } => {
                write!(f, "it wrote {bytes} bytes to port {port:#x}, which means nothing")
            }
            Self::Exception { vector, error, address } => {
                write!(f, "it took exception {vector} (error {error:#x}, address {address:#x})")
            }
            Self::Other { code } => write!(f, "it left with {code:#x}, which it has no reason to"),
        }
    }
}

/// What a guest does.
#[derive(Clone, Debug)]
pub enum State {
    /// It runs when it is its turn.
    Ready,
    /// It sleeps until then.
    Asleep {
        /// Ticks of the time-stamp counter.
        until: u64,
    },
    /// It waits for memory: its last fault is to be tried again.
    Stalled,
    /// It has ended.
    Ended(Result<(), Death>),
}

/// What a guest's time went into.
pub struct Times {
    /// Faults by their time, as [`latency_bucket`] has it.
    pub faults: [u64; LATENCY_BUCKETS],
    /// Ticks spent on them.
    pub stalled: u64,
    /// When it started.
    pub started: u64,
}

/// A guest.
pub struct Guest {
    /// Its identity in the ledger.
    pub id: MachineId,
    /// What it is called.
    pub name: String,
    /// What it runs.
    pub program: ProgramKind,
    /// Its memory.
    pub paged: Paged,
    /// What it does.
    pub state: State,
    /// What its time went into.
    pub times: Times,
    /// What it said last.
    pub report: Report,
    /// What it said it touched in each window, the newest last.
    pub windows: Vec<(u64, u64)>,
    /// Turns that ended for want of memory since a fault was last served.
    pub stalls: u32,
    /// World switches.
    pub exits: u64,
    /// Ticks of the time-stamp counter between them, in the guest.
    pub ticks: u64,
    /// Accesses of its device's that were refused.
    pub device_refusals: u64,
    /// Pages that a decision wants taken and that were not yet.
    pub ordered: PageCount,
    /// Extents it has mapped.
    pub mapped: Vec<Mapped>,
    /// Its processor.
    pub vcpu: Vcpu,
    tsc_hz: u64,
}

impl Guest {
    /// A guest with its program in place.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn new(
        pool: &mut Pool,
        number: u32,
        (settings, code): (&GuestSettings, &[Digest]),
        features: &Features,
        tsc_hz: u64,
    ) -> Result<Self, StartError> {
        let params = Params { tsc_hz, ..settings.params };
        Program::new(&params).map_err(StartError::Program)?;
        if params.vcpus != 1 {
            return Err(StartError::Processors { found: params.vcpus });
        }
        let is_contained = settings.execute != Execute::ANYTHING || settings.device != Device::NONE;
        if is_contained && settings.paging != Paging::NESTED {
            return Err(StartError::NoSecondStage);
        }
        let regions = params.regions.iter().take(params.region_count as usize);
        let regions = regions.map(|region| Region { start: Gpa(region.gpa), bytes: ByteCount(region.len) });
        let layout = GuestLayout::new(regions.collect()).map_err(StartError::Layout)?;
        let (paged, vcpu) = {
            let memory: &mut Memory = &mut pool.memory.borrow_mut();
            let mut paged = Paged::new(memory, layout, params.seed, features)?;
            let stages = match settings.paging {
                Paging::NESTED => Stages::Nested { root: paged.root() },
                Paging::SHADOW => Stages::One { root: paged.shadow(memory, abi::PAGE_TABLES_GPA)? },
                Paging::DIRECT => Stages::Own,
                found => return Err(StartError::NoPaging { found: found.0 }),
            };
            let ring = if settings.program == ProgramKind::KERNEL { Ring::Kernel } else { Ring::User };
            // Address space 0 is the hypervisor's.
            let vcpu = Vcpu::new(memory, number, stages, ring)?;
            (paged, vcpu)
        };
        let name = String::from_utf8_lossy(&settings.name).trim_end_matches('\0').to_string();
        let mut guest = Self {
            id: MachineId(number),
            name,
            program: settings.program,
            paged,
            state: State::Ready,
            times: Times { faults: [0; LATENCY_BUCKETS], stalled: 0, started: cpu::now() },
            report: Report::EMPTY,
            windows: Vec::new(),
            stalls: 0,
            exits: 0,
            ticks: 0,
            device_refusals: 0,
            ordered: PageCount(0),
            mapped: Vec::new(),
            vcpu,
            tsc_hz,
        };
        let program = match settings.program {
            ProgramKind::WORKLOAD => WORKLOAD,
            ProgramKind::CALLER | ProgramKind::KERNEL => CALLER,
            found => return Err(StartError::NoProgram { found: found.0 }),
        };
        match settings.execute {
            Execute::ANYTHING => {}
            Execute::KNOWN => guest.paged.guard.only(Digest::of_program(program).chain(code.iter().copied())),
            found => return Err(StartError::NoExecute { found: found.0 }),
        }
        guest.write(pool, Gpa(abi::IMAGE_GPA), program)?;
        guest.write(pool, Gpa(abi::PARAMS_GPA), params.as_bytes())?;
        match settings.paging {
            // All of its memory is kept.
            Paging::DIRECT => guest.build_tables(pool, features)?,
            _ => {
                guest.write_tables(pool, features)?;
                // The hypervisor writes there whenever it likes, also when there is no memory to bring it into.
                guest.paged.keep(pool, Gpa(abi::channel_gpa(0)))?;
            }
        }
        Ok(guest)
    }

    /// Page tables that map every block of every region to itself, as `plimsoll_guest::abi` wants them.
    fn write_tables(&mut self, pool: &mut Pool, features: &Features) -> Result<(), StartError> {
        let caps: Caps = features.paging;
        let regions: Vec<Region> = self.paged.layout().regions().to_vec();
        let rights = Permissions::READ | Permissions::WRITE | Permissions::EXECUTE | Permissions::USER;
        let table = |level, at| {
            let memory = Long4::TABLE_MEMORY;
            let table = Table {
                at,
                permissions: rights,
                memory,
                accessed: true,
                global: false,
                software: 0,
                skips: 0,
            };
            Long4::encode(&Entry::Table(table), level, &caps).map_err(StartError::Entry)
        };
        let at = |number: u64| Output(abi::PAGE_TABLES_GPA + number * abi::PAGE_SIZE);
        let mut put = |table: Output, index: u64, word: u64| {
            self.write(pool, Gpa(table.0 + index * 8), &word.to_le_bytes()).map_err(StartError::Memory)
        };
        put(at(0), 0, table(Level(4), at(1))?)?;
        let (mut directories, mut last) = (0, None);
        for region in regions {
            for block in (region.start.0..region.start.0 + region.bytes.0).step_by(BLOCK_SIZE) {
                let gib = block / GIB;
                if last != Some(gib) {
                    if gib >= 512 || directories == DIRECTORIES {
                        return Err(StartError::OutOfReach { at: Gpa(block) });
                    }
                    directories += 1;
                    last = Some(gib);
                    put(at(1), gib, table(Level(3), at(1 + directories))?)?;
                }
                let leaf = Leaf {
                    accessed: true,
                    dirty: true,
                    ..Leaf::new(Output(block), 21, rights, Type::Pat(0))
                };
                let word = Long4::encode(&Entry::Leaf(leaf), Level(2), &caps).map_err(StartError::Entry)?;
                put(at(1 + directories), block % GIB / BLOCK_SIZE as u64, word)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, pool: &mut Pool, gpa: Gpa, bytes: &[u8]) -> Result<(), PagedError> {
        let mut at = gpa.0;
        let mut rest = bytes;
        while !rest.is_empty() {
            let offset = address(at % PAGE_SIZE as u64);
            let len = rest.len().min(PAGE_SIZE - offset);
            let (now, later) = rest.split_at(len);
            self.paged.bytes(pool, Gpa(at - offset as u64))?[offset..offset + len].copy_from_slice(now);
            (at, rest) = (at + len as u64, later);
        }
        self.paged.wrote(gpa, bytes.len() as u64)
    }

    /// Tells the program to end: [`abi::STOP_FINISH`] or [`abi::STOP_NOW`].
    ///
    /// # Errors
    /// [`PagedError`].
    pub fn stop(&mut self, pool: &mut Pool, how: u64) -> Result<(), PagedError> {
        if matches!(self.state, State::Asleep { .. }) {
            self.state = State::Ready;
        }
        self.write(pool, Gpa(abi::channel_gpa(0)), &how.to_le_bytes())
    }

    /// Tells the program that another window runs.
    ///
    /// # Errors
    /// [`PagedError`].
    pub fn window(&mut self, pool: &mut Pool, number: u64) -> Result<(), PagedError> {
        self.write(pool, Gpa(abi::channel_gpa(0) + 8), &number.to_le_bytes())
    }

    /// What the program has written into its channel.
    fn channel(&mut self, pool: &mut Pool) -> Result<abi::Channel, Death> {
        let gpa = Gpa(abi::channel_gpa(0));
        let page = self.paged.bytes(pool, gpa).map_err(Death::Memory)?;
        abi::Channel::read_from_bytes(page).map_err(|_| Death::Memory(PagedError::Outside { gpa }))
    }

    /// Takes over what the program has counted so far.
    pub fn look(&mut self, pool: &mut Pool) -> Result<(), Death> {
        let report = self.channel(pool)?.report;
        self.take(report);
        Ok(())
    }

    fn take(&mut self, report: Report) {
        if report.window > 0 && self.windows.last().is_none_or(|(number, _)| *number != report.window) {
            self.windows.push((report.window, report.window_pages));
        }
        self.report = report;
    }

    /// Runs it until it leaves.
    pub fn run(&mut self, svm: &Svm) -> Exit {
        self.exits += 1;
        let translations = self.paged.take_translations();
        let exit = self.vcpu.run(svm, translations);
        self.ticks += self.vcpu.ticks();
        exit
    }

    /// It has run one instruction that writes to a table. Whether it had to.
    ///
    /// # Errors
    /// [`Death`].
    pub fn end_step(&mut self) -> Result<bool, Death> {
        let Some((shadow, translations)) = self.paged.tables().shadows() else { return Ok(false) };
        if !shadow.is_open() {
            return Ok(false);
        }
        shadow.close(translations).map_err(|error| Death::Memory(error.into()))?;
        self.vcpu.single_step(false);
        Ok(true)
    }

    /// What a page fault wants, if its processor walks shadow tables.
    ///
    /// # Errors
    /// [`Death`]: the fault is its own.
    pub fn first_stage(&mut self, error: u64, address: u64) -> Result<Option<Gpa>, Death> {
        let own = Death::Exception { vector: 14, error, address };
        let Some((shadow, translations)) = self.paged.tables().shadows() else { return Err(own) };
        let access = match error {
            _ if error & FETCH != 0 => Access::Fetch,
            _ if error & WRITE != 0 => Access::Write,
            _ => Access::Read,
        };
        let mode = if error & USER != 0 { Mode::User } else { Mode::Supervisor };
        let wanted = shadow.fault(Input(address), (access, mode), translations);
        match wanted.map_err(|error| Death::Memory(error.into()))? {
            Wanted::Nothing => Ok(None),
            Wanted::Page(gpa) => Ok(Some(gpa)),
            Wanted::Step => {
                self.vcpu.single_step(true);
                Ok(None)
            }
            Wanted::Refused(fault) => {
                Err(Death::Exception { vector: 14, error: fault.code.bits().into(), address })
            }
            Wanted::NoAddress => Err(Death::Exception { vector: 13, error: 0, address }),
        }
    }

    /// Reads or writes CR3 or CR4 for it, or has a translation forgotten.
    ///
    /// # Errors
    /// [`Death`].
    pub fn privileged(&mut self, pool: &Pool) -> Result<(), Death> {
        let refused = Death::Other { code: CONTROL };
        let rip = self.vcpu.rip();
        let own = self.vcpu.cr3();
        let cr3 = self.paged.tables().shadows().map_or(own, |(shadow, _)| shadow.cr3());
        let bytes = self.paged.tables().instruction(&pool.memory.borrow(), cr3, rip);
        let (instruction, length) = bytes.as_ref().and_then(decode).ok_or(refused.clone())?;
        let next = rip.wrapping_add(length.into());
        self.vcpu.goes_on_at(next);
        let broken = |error: PagingError| Death::Memory(error.into());
        match instruction {
            Instruction::ReadControl { control: 3, register } => self.vcpu.set_register(register, cr3),
            Instruction::ReadControl { control: 4, register } => {
                let cr4 = self.vcpu.cr4();
                self.vcpu.set_register(register, cr4);
            }
            Instruction::WriteControl { control: 3, register } => {
                let cr3 = self.vcpu.register(register);
                let Some((shadow, translations)) = self.paged.tables().shadows() else { return Err(refused) };
                shadow.load(cr3, translations).map_err(broken)?;
                self.vcpu.set_cr3(shadow.root().0);
            }
            Instruction::WriteControl { control: 4, register } => {
                let cr4 = self.vcpu.register(register);
                if !self.vcpu.set_cr4(cr4) {
                    return Err(refused);
                }
                self.paged.tables().forget_everything().map_err(broken)?;
            }
            Instruction::Invalidate(operand) => {
                let input = Input(self.address_of(operand, next));
                let Some((shadow, translations)) = self.paged.tables().shadows() else { return Err(refused) };
                shadow.invalidate(Invalidation::Address(input), translations).map_err(broken)?;
            }
            _ => return Err(refused),
        }
        self.vcpu.skip();
        Ok(())
    }

    fn address_of(&mut self, operand: Operand, next: u64) -> u64 {
        let Operand { base, index, displacement, relative } = operand;
        let base = base.map_or(if relative { next } else { 0 }, |base| self.vcpu.register(base));
        let index = index.map_or(0, |(index, scale)| self.vcpu.register(index) << scale);
        base.wrapping_add(index).wrapping_add_signed(displacement.into())
    }

    /// Whether it has written all its pages once, as far as it has said; or has ended.
    pub fn is_filled(&self) -> bool {
        self.report.phase >= Phase::Running as u32 || matches!(self.state, State::Ended(_))
    }

    /// A fault has been served, or has to wait; it began at `since`.
    pub fn faulted(&mut self, since: u64) {
        let ticks = cpu::now().saturating_sub(since);
        self.times.stalled += ticks;
        self.times.faults[latency_bucket(ticks)] += 1;
    }

    /// Does what the program asked for by writing to a port.
    pub fn port(&mut self, pool: &mut Pool, port: u16, bytes: u8) -> Result<State, Death> {
        if bytes != 4 {
            return Err(Death::Port { port, bytes });
        }
        let channel = self.channel(pool)?;
        self.vcpu.skip();
        match port {
            abi::PORT_REPORT => self.take(channel.report),
            abi::PORT_IDLE => {
                let ticks =
                    u128::from(channel.request_ns.min(IDLE_MAX_NS)) * u128::from(self.tsc_hz) / 1_000_000_000;
                let until = cpu::now().saturating_add(u64::try_from(ticks).unwrap_or(0));
                return Ok(if channel.stop == abi::STOP_NO { State::Asleep { until } } else { State::Ready });
            }
            abi::PORT_DISCARD => self
                .paged
                .discard(pool, Gpa(channel.request_gpa), channel.request_len)
                .map_err(Death::Memory)?,
            abi::PORT_DONE => {
                self.take(channel.report);
                return Ok(State::Ended(Ok(())));
            }
            abi::PORT_PANIC => {
                let len = usize::try_from(channel.message_len).unwrap_or(usize::MAX).min(abi::MESSAGE_SIZE);
                let message = String::from_utf8_lossy(&channel.message[..len]);
                let message = message.chars().filter(|letter| !letter.is_control()).collect();
                return Err(Death::Panicked { message });
            }
            _ => return Err(Death::Port { port, bytes }),
        }
        Ok(State::Ready)
    }

    /// Gives everything back.
    ///
    /// # Errors
    /// A bug.
    pub fn end(self, pool: &mut Pool) -> Result<(), PagedError> {
        self.vcpu.end(&mut pool.memory.borrow_mut())?;
        self.paged.end(pool)
    }
}
