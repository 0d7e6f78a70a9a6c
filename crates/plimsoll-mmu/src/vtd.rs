//! What Intel's remapping hardware does with a device's address: the translation, or the fault with its reason.
//!
//! Intel Virtualization Technology for Directed I/O, Architecture Specification: 3.7 "Second-Stage Translation" with its access
//! rights and accessed and dirty flags, "Handling Requests to Interrupt Address Range" (LGN.4, SGN.8), 7.1 "Fault Conditions"
//! with the table of fault reasons.
//!
//! Reserved bits are judged entry by entry, rights at the end of the way over all of it: where a right is lacking, a reserved bit
//! in the same entry or another, and a table that cannot be read, is reported before it. That is this crate's choice. QEMU's and
//! VirtualBox's models judge each entry's right first.
use crate::address::{Input, Level, Output};
use crate::entry::{Malformed, Permissions};
use crate::format::Feature;
use crate::format::vtd::{Caps, VtdFormat};
use crate::memory::TableMemory;
use crate::walk::{Access, Dead, End, Marks, Step, Walked, attempt};
use core::fmt;

/// What a device asks for, without PASID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// To read memory.
    Read,
    /// To write it.
    Write,
    /// Both at once (AtomicOp).
    Atomic,
}

impl Request {
    /// What every entry must permit for it.
    pub const fn needs(self) -> Permissions {
        match self {
            Self::Read => Permissions::READ,
            Self::Write => Permissions::WRITE,
            Self::Atomic => Permissions::READ.union(Permissions::WRITE),
        }
    }

    /// What it leaves behind.
    pub(crate) const fn access(self) -> Access {
        match self {
            Self::Read => Access::Read,
            Self::Write | Self::Atomic => Access::Write,
        }
    }
}

/// How the unit finds a device's tables, and so how it numbers the reasons of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// By a context entry.
    Legacy,
    /// By an entry of a PASID table. Accessed and dirty bits exist in this mode only.
    Scalable,
}

/// The tables of a device's domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// SSPTPTR of its context entry or PASID-table entry. The low twelve bits are not looked at.
    pub root: Output,
    /// The remapping unit.
    pub caps: Caps,
}

/// Why a device's address was not translated. `E` is what the tables' memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault<E> {
    /// It has more bits than the tables or the unit translate.
    TooLong(Input),
    /// A right is missing, or an entry is absent.
    Refused {
        /// The device's address.
        input: Input,
        /// What was asked for.
        request: Request,
        /// What the entries permit together; nothing if one is absent.
        permissions: Permissions,
        /// The level of the entry where the walk ended.
        level: Level,
        /// That entry.
        step: Step,
    },
    /// It is 0xFEEx_xxxx, or leads there, where interrupts are and no memory.
    Interrupt {
        /// The device's address.
        input: Input,
        /// Where it leads; `None` if it is there itself: an interrupt request, which is not translated.
        output: Option<Output>,
    },
    /// A reserved bit is set in an entry that is present: the host's fault.
    Reserved {
        /// The device's address.
        input: Input,
        /// The entry's level.
        level: Level,
        /// The entry.
        step: Step,
        /// What is wrong with it.
        reason: Malformed,
    },
    /// The root cannot be reached: what names it is at fault.
    Root {
        /// The entry of it.
        at: Output,
        /// Why.
        error: E,
    },
    /// An entry of a table below the root cannot be reached.
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
        /// The device's address.
        input: Input,
    },
}

impl<E> Fault<E> {
    /// The fault reason that is recorded in this mode; `None` where hardware would go on trying, and for interrupt requests, whose
    /// faults are of interrupt remapping.
    pub const fn reason(&self, mode: Mode) -> Option<u8> {
        let (legacy, scalable) = match self {
            Self::TooLong(_) => (0x4, 0x84),
            Self::Refused { request: Request::Write | Request::Atomic, permissions, .. }
                if !permissions.contains(Permissions::WRITE) =>
            {
                (0x5, 0x85)
            }
            Self::Refused { .. } => (0x6, 0x86),
            Self::Root { .. } => (0x3, 0x7b),
            Self::Memory { .. } => (0x7, 0x78),
            Self::Reserved { .. } => (0xc, 0x7a),
            Self::Interrupt { output: Some(_), .. } => (0xe, 0x87),
            Self::Interrupt { output: None, .. } | Self::Contended { .. } => return None,
        };
        Some(match mode {
            Mode::Legacy => legacy,
            Mode::Scalable => scalable,
        })
    }
}

impl<E: fmt::Debug> fmt::Display for Fault<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(input) => {
                write!(f, "{input} has more bits than these tables or the unit translate")
            }
            Self::Refused { input, request, level, step, .. } => {
                let at = step.at;
                write!(
                    f,
                    "{request:?} of {input} is refused, and the walk ended at the entry of {level} at {at}"
                )
            }
            Self::Interrupt { input, output: Some(output) } => {
                write!(f, "{input} leads to {output}, which is an interrupt's")
            }
            Self::Interrupt { input, output: None } => {
                write!(f, "{input} is an interrupt's, and not translated")
            }
            Self::Reserved { input, level, step, reason } => {
                write!(f, "{input} is not translated, by the entry of {level} at {}: {reason}", step.at)
            }
            Self::Root { at, error } => write!(f, "the root's entry at {at} cannot be reached: {error:?}"),
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

/// Translates `input` for a device's request, as the hardware would.
///
/// # Errors
/// The fault.
pub fn walk<F: VtdFormat, M: TableMemory>(
    memory: &M,
    registers: &Registers,
    input: Input,
    request: Request,
    marks: Marks,
) -> Result<Walked, Fault<M::Error>> {
    if interrupts(input.0) {
        return Err(Fault::Interrupt { input, output: None });
    }
    if !F::accepts(input) || registers.caps.beyond_input(input) {
        return Err(Fault::TooLong(input));
    }
    let root = Output(registers.root.0 & crate::format::field(12, 40));
    let refused = |permissions, level, step| Fault::Refused { input, request, permissions, level, step };
    let ended = |end: End<M::Error>| match end.dead {
        Dead::Absent => refused(Permissions::empty(), end.level, end.step),
        Dead::Malformed(reason) => Fault::Reserved { input, level: end.level, step: end.step, reason },
        Dead::Memory(error) if end.level == F::root() => Fault::Root { at: end.step.at, error },
        Dead::Memory(error) => Fault::Memory { level: end.level, at: end.step.at, error },
    };
    let keeps = registers.caps.accessed_dirty == Feature::On && marks == Marks::Set;
    let judge = |walked: &Walked| {
        if !walked.permissions.contains(request.needs()) {
            return Err(refused(walked.permissions, walked.level, walked.step(walked.level)));
        }
        if interrupts(walked.output.0) {
            return Err(Fault::Interrupt { input, output: Some(walked.output) });
        }
        Ok(keeps.then_some(request.access()))
    };
    attempt::<F, M, _>(memory, root, &registers.caps, input, ended, judge)?.ok_or(Fault::Contended { input })
}

/// Whether writing there is an interrupt: the range is the addresses', not their page's.
const fn interrupts(address: u64) -> bool {
    address >> 20 == 0xfee
}
