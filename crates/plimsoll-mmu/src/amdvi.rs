//! What AMD's remapping hardware does with a device's address: the translation, or the event that it logs.
//!
//! AMD I/O Virtualization Technology (IOMMU) Specification (48882): 2.2.2 "Device Table", 2.2.3 "I/O Page Tables for Host
//! Translations", 2.5 "Event Logging".
//!
//! Reserved bits, sizes and levels are judged entry by entry, rights at the end of the way over all of it, the device table entry's
//! among them: where a right is lacking, an absent or malformed entry is reported before it. That is this crate's choice, as in
//! [`crate::vtd`]. VirtualBox's model judges each entry's right first.
use crate::address::{Input, Level, Output};
use crate::entry::{Malformed, Permissions};
use crate::format::amdvi::{AmdViFormat, Caps, Host, Keeps};
use crate::memory::TableMemory;
use crate::vtd::Request;
use crate::walk::{Access, Dead, End, Marks, Step, Walked, attempt};
use core::fmt;

const VALID: u64 = 1;
const TRANSLATION_VALID: u64 = 1 << 1;
const MODE_SHIFT: u32 = 9;
const ADDRESS: u64 = crate::format::field(12, 40);
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;
/// HAD, then GV and what goes with it: translations of guests, which are not spoken.
const KEEPS_SHIFT: u32 = 7;
const GUEST: u64 = 1 << 55;
/// I of the second word: the device may ask for translations and keep them (ATS).
const REMOTE: u64 = 1 << 32;
/// Must be zero in the first word, and in the second.
const RESERVED: [u64; 2] = [crate::format::field(2, 5) | 1 << 63, crate::format::field(42, 1)];

/// How a device's addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// V is clear: not at all, and everything is allowed.
    None,
    /// TV is clear: there is none, and nothing is allowed.
    Withheld,
    /// Mode 0: addresses are physical.
    Physical,
    /// By tables of so many levels.
    Tables {
        /// One to five.
        levels: u8,
        /// The first table.
        root: Output,
    },
}

/// An entry of the device table, as far as memory is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// How.
    pub translation: Translation,
    /// What may be done at most.
    pub permissions: Permissions,
    /// Marks that accesses leave.
    pub keeps: Keeps,
    /// What caches know its translations by.
    pub domain: u16,
    /// It may keep translations of its own (ATS).
    pub remote: bool,
}

/// What of a device table entry cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BadDevice {
    /// Bits of one of its four words are set and must not be.
    Reserved {
        /// The word, from 0 on.
        word: usize,
        /// The bits.
        bits: u64,
    },
    /// Mode 7, or HAD 2.
    ReservedField,
    /// Six levels, or tables of a guest: right, and not spoken by this crate.
    Unspoken,
}

impl fmt::Display for BadDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved { word, bits } => {
                write!(f, "bits {bits:#x} of word {word} of the device table entry are set and reserved")
            }
            Self::ReservedField => {
                f.write_str("the device table entry's mode or marks have a reserved value")
            }
            Self::Unspoken => f.write_str(
                "the device table entry asks for six levels or a guest's tables, which are not spoken here",
            ),
        }
    }
}

impl core::error::Error for BadDevice {}

impl Device {
    /// What an entry's words say. The words about interrupts are not looked at.
    ///
    /// # Errors
    /// The hardware would refuse it (ILLEGAL_DEV_TABLE_ENTRY), or it is beyond this crate.
    pub fn decode(words: [u64; 4]) -> Result<Self, BadDevice> {
        let [first, second, ..] = words;
        let mut permissions = Permissions::all();
        let device = |translation, permissions, keeps| Self {
            translation,
            permissions,
            keeps,
            domain: u16::from_le_bytes([second.to_le_bytes()[0], second.to_le_bytes()[1]]),
            remote: second & REMOTE != 0,
        };
        if first & VALID == 0 {
            return Ok(Self {
                domain: 0,
                remote: false,
                ..device(Translation::None, permissions, Keeps::Nothing)
            });
        }
        for (word, (found, reserved)) in words.iter().zip(RESERVED).enumerate() {
            if found & reserved != 0 {
                return Err(BadDevice::Reserved { word, bits: found & reserved });
            }
        }
        if first & TRANSLATION_VALID == 0 {
            return Ok(device(Translation::Withheld, Permissions::empty(), Keeps::Nothing));
        }
        permissions.set(Permissions::READ, first & READ != 0);
        permissions.set(Permissions::WRITE, first & WRITE != 0);
        let keeps = match first >> KEEPS_SHIFT & 3 {
            0 => Keeps::Nothing,
            1 => Keeps::Accessed,
            3 => Keeps::AccessedAndDirty,
            _ => return Err(BadDevice::ReservedField),
        };
        let levels = crate::format::low_byte(first >> MODE_SHIFT & 7);
        let translation = match levels {
            7 => return Err(BadDevice::ReservedField),
            _ if first & GUEST != 0 => return Err(BadDevice::Unspoken),
            6 => return Err(BadDevice::Unspoken),
            0 => Translation::Physical,
            levels => Translation::Tables { levels, root: Output(first & ADDRESS) },
        };
        Ok(device(translation, permissions, keeps))
    }
}

/// Why a device's address was not translated. `E` is what the tables' memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault<E> {
    /// There is no translation for the device, or the address has more bits than its tables translate.
    Untranslated(Input),
    /// An entry is absent.
    Absent {
        /// The device's address.
        input: Input,
        /// The entry's level.
        level: Level,
        /// The entry.
        step: Step,
    },
    /// A right is missing, in the device table entry or in one on the way.
    Refused {
        /// The device's address.
        input: Input,
        /// What was asked for.
        request: Request,
        /// What all entries permit together.
        permissions: Permissions,
    },
    /// The hardware refuses an entry: the host's fault.
    Malformed {
        /// The device's address.
        input: Input,
        /// The entry's level.
        level: Level,
        /// The entry.
        step: Step,
        /// What is wrong with it.
        reason: Malformed,
    },
    /// An entry cannot be reached.
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

bitflags::bitflags! {
    /// What an event says of an access: bits 59:48 of its first word.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Flags: u16 {
        /// PR: every entry was present.
        const PRESENT = 1 << 4;
        /// RW: a write. Says something with PR only.
        const WRITE = 1 << 5;
        /// PE: a right was missing. Says something with PR only.
        const PERMISSION = 1 << 6;
        /// RZ: a reserved bit was set; with PR, and neither this nor PE, a level or size was wrong.
        const RESERVED = 1 << 7;
    }
}

/// An entry of the event log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// IO_PAGE_FAULT.
    PageFault {
        /// Of the access.
        flags: Flags,
        /// The device's address.
        input: Input,
    },
    /// PAGE_TAB_HARDWARE_ERROR. What kind of error the memory alone knows: TYPE is left zero.
    TableError {
        /// Of the access.
        flags: Flags,
        /// The entry that could not be reached.
        at: Output,
    },
}

impl Event {
    /// Its two words in the log, for a device of a domain.
    pub fn words(&self, device: u16, domain: u16) -> [u64; 2] {
        let (code, flags, address) = match self {
            Self::PageFault { flags, input } => (2, flags, input.0),
            Self::TableError { flags, at } => (4, flags, at.0),
        };
        let first = u64::from(device) | u64::from(domain) << 32 | u64::from(flags.bits()) << 48 | code << 60;
        [first, address]
    }
}

impl<E> Fault<E> {
    /// What is logged for this request, if the device does not ask for a translation only; `None` where hardware would go on trying.
    pub fn event(&self, request: Request) -> Option<Event> {
        let mut flags = Flags::empty();
        flags.set(Flags::WRITE, request != Request::Read);
        let (more, input) = match self {
            Self::Untranslated(input) | Self::Absent { input, .. } => {
                return Some(Event::PageFault { flags: Flags::empty(), input: *input });
            }
            Self::Refused { input, .. } => (Flags::PERMISSION, input),
            Self::Malformed { input, reason: Malformed::Reserved(_), .. } => (Flags::RESERVED, input),
            Self::Malformed { input, .. } => (Flags::empty(), input),
            Self::Memory { at, .. } => return Some(Event::TableError { flags, at: *at }),
            Self::Contended { .. } => return None,
        };
        Some(Event::PageFault { flags: flags | Flags::PRESENT | more, input: *input })
    }
}

impl<E: fmt::Debug> fmt::Display for Fault<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untranslated(input) => {
                write!(f, "{input} has more bits than the device's tables translate, or it has none")
            }
            Self::Absent { input, level, step } => {
                write!(f, "{input} is not mapped, by the entry of {level} at {}", step.at)
            }
            Self::Refused { input, request, .. } => write!(f, "{request:?} of {input} is refused"),
            Self::Malformed { input, level, step, reason } => {
                write!(f, "{input} is not translated, by the entry of {level} at {}: {reason}", step.at)
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

/// Where a device's address goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Nowhere else: there are no tables.
    Physical(Output),
    /// Through tables.
    Walked(Walked),
}

impl Reached {
    /// The address in memory.
    pub const fn output(&self) -> Output {
        match self {
            Self::Physical(output) => *output,
            Self::Walked(walked) => walked.output,
        }
    }
}

/// Translates `input` for a device's request, as the hardware would. `physical_bits` is the unit's, see [`Caps::physical_bits`].
///
/// # Errors
/// The fault.
pub fn translate<M: TableMemory>(
    memory: &M,
    device: &Device,
    physical_bits: u32,
    input: Input,
    request: Request,
    marks: Marks,
) -> Result<Reached, Fault<M::Error>> {
    let (levels, root) = match device.translation {
        Translation::None => return Ok(Reached::Physical(Output(input.0))),
        Translation::Withheld => return Err(Fault::Untranslated(input)),
        Translation::Physical if device.permissions.contains(request.needs()) => {
            return Ok(Reached::Physical(Output(input.0)));
        }
        Translation::Physical => {
            return Err(Fault::Refused { input, request, permissions: device.permissions });
        }
        Translation::Tables { levels, root } => (levels, root),
    };
    let caps = Caps { physical_bits, keeps: device.keeps };
    let registers = Registers { root, permissions: device.permissions, caps };
    let walk = match levels {
        1 => walk::<Host<1>, M>,
        2 => walk::<Host<2>, M>,
        3 => walk::<Host<3>, M>,
        4 => walk::<Host<4>, M>,
        _ => walk::<Host<5>, M>,
    };
    walk(memory, &registers, input, request, marks).map(Reached::Walked)
}

/// The tables of a device's domain, and what its device table entry permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Page Table Root Pointer. The low twelve bits are not looked at.
    pub root: Output,
    /// IR and IW of the device table entry.
    pub permissions: Permissions,
    /// The remapping unit, and HAD.
    pub caps: Caps,
}

/// Translates `input` through tables of the format `F`, as the hardware would.
///
/// # Errors
/// The fault.
pub fn walk<F: AmdViFormat, M: TableMemory>(
    memory: &M,
    registers: &Registers,
    input: Input,
    request: Request,
    marks: Marks,
) -> Result<Walked, Fault<M::Error>> {
    if !F::accepts(input) {
        return Err(Fault::Untranslated(input));
    }
    let ended = |end: End<M::Error>| match end.dead {
        Dead::Absent => Fault::Absent { input, level: end.level, step: end.step },
        Dead::Malformed(reason) => Fault::Malformed { input, level: end.level, step: end.step, reason },
        Dead::Memory(error) => Fault::Memory { level: end.level, at: end.step.at, error },
    };
    let keeps = registers.caps.keeps != Keeps::Nothing && marks == Marks::Set;
    let dirties = registers.caps.keeps == Keeps::AccessedAndDirty;
    let judge = |walked: &Walked| {
        let permissions = walked.permissions & registers.permissions;
        if permissions.contains(request.needs()) {
            Ok(keeps.then_some(if dirties { request.access() } else { Access::Read }))
        } else {
            Err(Fault::Refused { input, request, permissions })
        }
    };
    let root = Output(registers.root.0 & ADDRESS);
    attempt::<F, M, _>(memory, root, &registers.caps, input, ended, judge)?.ok_or(Fault::Contended { input })
}
