//! What a RISC-V hart does with an address: the translation, or the exception, through one stage and two.
//!
//! The RISC-V Instruction Set Manual, volume II: "Virtual Address Translation Process" (the steps), "Supervisor Memory
//! Protection" of sstatus (SUM and MXR), "Svadu" and "Svade" (who keeps A and D), "Guest-Page Faults", "Memory-Management
//! Fences" and "Transformed Instruction or Pseudoinstruction for mtinst or htinst" of the H extension.
//!
//! Whatever is wrong, the exception is of the kind of the original access: a store whose guest page table cannot be read
//! is a store guest-page fault. So faults here say which kind ([`Kind`]), and [`Kind::cause`] names the exception.
use crate::address::{Input, Level, Output};
use crate::entry::{Malformed, Memory, Permissions};
use crate::format::riscv::Caps;
use crate::format::{Feature, Format};
use crate::memory::TableMemory;
use crate::nested::{self, GuestMemoryFault, Nested, Purpose, SecondStage};
use crate::walk::{Access, Dead, End, Marks, Step, Walked, attempt};
use core::fmt;
use core::marker::PhantomData;

/// What an instruction does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// It loads.
    Load,
    /// It stores, or is atomic.
    Store,
    /// It is fetched.
    Fetch,
    /// HLVX: a load that needs the right to execute in place of the right to read.
    LoadExecutable,
}

impl Operation {
    /// As the second stage sees it, where HLVX and a fetch need the same.
    pub const fn access(self) -> Access {
        match self {
            Self::Load => Access::Read,
            Self::Store => Access::Write,
            Self::Fetch | Self::LoadExecutable => Access::Fetch,
        }
    }
}

/// Who accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// U or VU.
    User,
    /// S or VS.
    Supervisor,
}

bitflags::bitflags! {
    /// The bits of sstatus that decide about rights.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Control: u8 {
        /// SUM: supervisors may load from and store to user pages.
        const SUM = 1;
        /// MXR: what can be executed can be loaded. For a guest's stage, vsstatus.MXR or the host's sstatus.MXR; for
        /// the second stage, the host's alone.
        const MXR = 1 << 1;
    }
}

/// What of a hart's state a stage depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// The root table: satp.PPN, vsatp.PPN or hgatp.PPN in bytes. Bits below the root's size are not looked at.
    pub root: Output,
    /// Control bits.
    pub control: Control,
    /// ADUE of menvcfg or henvcfg: the hart sets A and D itself (Svadu). Off, an access that would have to is a page
    /// fault (Svade).
    pub updates: Feature,
    /// The hart's extensions.
    pub caps: Caps,
}

/// Why an address was not translated. `E` is what the tables' memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault<E> {
    /// Its upper bits are not those of an address of this format: a page fault before anything is read.
    Untranslated(Input),
    /// A page fault.
    Page(PageFault),
    /// An entry of the tables cannot be reached: an access fault, unless a second stage says otherwise.
    Memory {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Output,
        /// Why.
        error: E,
    },
    /// An entry changed each time it was to be marked as accessed.
    Contended {
        /// The address.
        input: Input,
    },
}

/// A page fault, and the entry that is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// stval, or the guest physical address that htval holds two bits shorter.
    pub input: Input,
    /// The level of the entry where the walk ended.
    pub level: Level,
    /// That entry.
    pub step: Step,
    /// What about it.
    pub why: Why,
}

/// What about an entry is a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// V is clear.
    Absent,
    /// It is no entry of this format.
    Malformed(Malformed),
    /// It permits only this.
    Permissions(Permissions),
    /// A, or D for a store, is clear, and software is to set it.
    Unmarked,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("it is absent"),
            Self::Malformed(reason) => write!(f, "{reason}"),
            Self::Permissions(permissions) => write!(f, "it permits {permissions:?} only"),
            Self::Unmarked => f.write_str("accessed or dirty is clear, and the hart does not set it"),
        }
    }
}

impl<E: fmt::Debug> fmt::Display for Fault<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untranslated(input) => write!(f, "{input} is not an address of this format"),
            Self::Page(PageFault { input, level, step, why }) => {
                write!(f, "page fault at {input}, by the entry of {level} at {}: {why}", step.at)
            }
            Self::Memory { level, at, error } => {
                write!(f, "the entry of {level} at {at} cannot be reached: {error:?}")
            }
            Self::Contended { input } => {
                write!(f, "the entries for {input} change faster than they can be walked")
            }
        }
    }
}

impl<E: fmt::Debug> core::error::Error for Fault<E> {}

/// What kind of exception a fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Memory that is not there, or not for this.
    Access,
    /// The first stage's.
    Page,
    /// The second stage's.
    GuestPage,
}

impl Kind {
    /// The exception code of scause for an original access.
    pub const fn cause(self, operation: Operation) -> u64 {
        let (fetch, load, store) = match self {
            Self::Access => (1, 5, 7),
            Self::Page => (12, 13, 15),
            Self::GuestPage => (20, 21, 23),
        };
        match operation {
            Operation::Fetch => fetch,
            Operation::Load | Operation::LoadExecutable => load,
            Operation::Store => store,
        }
    }
}

impl<E> Fault<E> {
    /// What kind of exception it is where there is one stage; `None` where the hart would go on trying.
    pub const fn kind(&self) -> Option<Kind> {
        match self {
            Self::Untranslated(_) | Self::Page(_) => Some(Kind::Page),
            Self::Memory { .. } => Some(Kind::Access),
            Self::Contended { .. } => None,
        }
    }
}

/// Translates `input` through one stage, as the hart would.
///
/// # Errors
/// The fault.
pub fn walk<F: Format<Caps = Caps>, M: TableMemory>(
    memory: &M,
    registers: &Registers,
    input: Input,
    (operation, mode): (Operation, Mode),
    marks: Marks,
) -> Result<Walked, Fault<M::Error>> {
    let allowed = |permissions| registers.control.allow(permissions, operation, mode);
    translate::<F, M>(memory, registers, input, (operation.access(), marks), allowed)
}

impl Control {
    /// Step 7 of the translation process.
    fn allow(self, permissions: Permissions, operation: Operation, mode: Mode) -> bool {
        let reachable = match (mode, permissions.contains(Permissions::USER)) {
            (Mode::User, user_page) => user_page,
            (Mode::Supervisor, false) => true,
            // SUM says nothing about fetches: no supervisor executes a user's page.
            (Mode::Supervisor, true) => operation != Operation::Fetch && self.contains(Self::SUM),
        };
        reachable && self.permit(permissions, operation.access())
    }

    fn permit(self, permissions: Permissions, access: Access) -> bool {
        permissions.contains(access.needs())
            || (access == Access::Read
                && self.contains(Self::MXR)
                && permissions.contains(Permissions::EXECUTE))
    }
}

fn translate<F: Format<Caps = Caps>, M: TableMemory>(
    memory: &M,
    registers: &Registers,
    input: Input,
    (access, marks): (Access, Marks),
    allowed: impl Fn(Permissions) -> bool,
) -> Result<Walked, Fault<M::Error>> {
    if !F::accepts(input) {
        return Err(Fault::Untranslated(input));
    }
    let root = Output(registers.root.0 & !(F::entries(F::root()) * 8 - 1));
    let ended = |end: End<M::Error>| match end.dead {
        Dead::Memory(error) => Fault::Memory { level: end.level, at: end.step.at, error },
        Dead::Absent => page_fault(input, end.level, end.step, Why::Absent),
        Dead::Malformed(reason) => page_fault(input, end.level, end.step, Why::Malformed(reason)),
    };
    let judge = |walked: &Walked| {
        let refused = |why| page_fault(input, walked.level, walked.step(walked.level), why);
        if !allowed(walked.permissions) {
            return Err(refused(Why::Permissions(walked.permissions)));
        }
        let leaf = walked.leaf;
        if leaf.accessed && (leaf.dirty || access != Access::Write) {
            return Ok(None);
        }
        if registers.updates == Feature::Off {
            return Err(refused(Why::Unmarked));
        }
        Ok((marks == Marks::Set).then_some(access))
    };
    attempt::<F, M, _>(memory, root, &registers.caps, input, ended, judge)?.ok_or(Fault::Contended { input })
}

fn page_fault<E>(input: Input, level: Level, step: Step, why: Why) -> Fault<E> {
    Fault::Page(PageFault { input, level, step, why })
}

/// The second stage: hgatp's tables in the format `F`, and where they are.
#[derive(Clone, Copy, Debug)]
pub struct Stage<'a, F, M> {
    memory: &'a M,
    registers: Registers,
    format: PhantomData<F>,
}

impl<'a, F: Format<Caps = Caps>, M> Stage<'a, F, M> {
    /// A stage whose tables are in `memory`; of the control bits MXR alone counts, since all its accesses are a user's.
    pub const fn new(memory: &'a M, registers: Registers) -> Self {
        Self { memory, registers, format: PhantomData }
    }
}

impl<F: Format<Caps = Caps>, M: TableMemory> SecondStage for Stage<'_, F, M> {
    type Fault = GuestPageFault<M::Error>;

    /// All accesses are a user's. One for a guest's tables needs what it does itself, a read or a write, and not what the
    /// instruction does.
    fn translate(&self, input: Input, access: Access, purpose: Purpose) -> Result<Walked, Self::Fault> {
        let control = self.registers.control;
        let allowed = |permissions: Permissions| {
            permissions.contains(Permissions::USER) && control.permit(permissions, access)
        };
        translate::<F, M>(self.memory, &self.registers, input, (access, Marks::Set), allowed)
            .map_err(|fault| GuestPageFault { input, access, purpose, fault })
    }
}

/// A fault of the second stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPageFault<E> {
    /// The guest physical address.
    pub input: Input,
    /// What was to be done there.
    pub access: Access,
    /// What for.
    pub purpose: Purpose,
    /// Why it could not be.
    pub fault: Fault<E>,
}

impl<E> GuestPageFault<E> {
    /// Its kind: a page fault of this stage is a guest-page fault.
    pub const fn kind(&self) -> Option<Kind> {
        match self.fault.kind() {
            Some(Kind::Page) => Some(Kind::GuestPage),
            other => other,
        }
    }

    /// htval: the guest physical address, two bits shorter.
    pub const fn htval(&self) -> u64 {
        self.input.0 >> 2
    }

    /// htinst for an access to a guest's table, on a hart with 64-bit entries; `None` for the final access, where it is
    /// the instruction's, or zero.
    pub const fn htinst(&self) -> Option<u64> {
        match (self.purpose, self.access) {
            (Purpose::Final, _) => None,
            (Purpose::GuestTable, Access::Write) => Some(0x3020),
            (Purpose::GuestTable, _) => Some(0x3000),
        }
    }
}

/// Why an address was not translated through two stages over the memory whose error is `E`.
pub type TwoStageFault<E> = nested::Fault<Fault<GuestMemoryFault<GuestPageFault<E>, E>>, GuestPageFault<E>>;

/// The kind of exception that a walk through two stages ends in.
pub const fn kind<E>(fault: &TwoStageFault<E>) -> Option<Kind> {
    match fault {
        nested::Fault::Second(fault)
        | nested::Fault::First(Fault::Memory { error: GuestMemoryFault::Second(fault), .. }) => fault.kind(),
        nested::Fault::First(fault) => fault.kind(),
    }
}

/// The memory type of a two-stage translation: the second stage's replaces that of physical memory, and the first
/// stage's replaces both ("Svpbmt").
pub const fn memory_type(nested: &Nested) -> Memory {
    match nested.first.leaf.memory {
        Memory::Physical => nested.second.leaf.memory,
        own => own,
    }
}
