//! What Arm's SMMUv3 does with a device's address where its stream has a second stage alone: the translation, or the event that it
//! records.
//!
//! Arm System Memory Management Unit Architecture Specification, version 3 (IHI 0070): 5.2 "Stream Table Entry", 7.3 "Event records".
//!
//! The tables are the processor's ([`format::arm::Second`](Second)), as is the walk; what differs is who says where they are, and what
//! becomes of a fault. Of a stream table entry's eight words these say it:
//!
//! ```text
//! word 0  3..1 Config      0 V
//! word 1  29..28 EATS
//! word 2  58 S2R  57 S2S  56 S2HA  55 S2HD  53 S2AFFD  52 S2ENDI  51 S2AA64  50..48 S2PS  47..46 S2TG  39..38 S2SL0  37..32 S2T0SZ
//!         15..0 S2VMID
//! word 3  51..4 S2TTB
//! ```
use crate::address::{Input, Output};
use crate::arm::{Fault, Kind, Mode, Tables};
use crate::format::arm::{Caps, Second};
use crate::format::{Feature, Format, field, low_byte};
use crate::memory::TableMemory;
use crate::walk::{Access, Marks, Walked};
use core::fmt;
use core::marker::PhantomData;

const VALID: u64 = 1;
const CONFIG_SHIFT: u32 = 1;
const ATS_SHIFT: u32 = 28;
const SIZE_SHIFT: u32 = 32;
const START_SHIFT: u32 = 38;
const GRANULE_SHIFT: u32 = 46;
const PHYSICAL_SHIFT: u32 = 48;
const LONG_FORMAT: u64 = 1 << 51;
const BIG_ENDIAN: u64 = 1 << 52;
const IGNORE_ACCESS_FLAG: u64 = 1 << 53;
const DIRTY: u64 = 1 << 55;
const ACCESS_FLAG: u64 = 1 << 56;
const STALL: u64 = 1 << 57;
const RECORD: u64 = 1 << 58;
/// S2TTB as far as addresses of 48 bits go.
const ROOT: u64 = field(4, 44);

/// What an SMMU has, by its identification registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// IDR5.OAS: bits of a physical address, up to 48 here.
    pub physical_bits: u32,
    /// IAS: bits of an intermediate physical address, the greater of OAS and 40 where there are 32-bit tables.
    pub input_bits: u32,
}

/// What becomes of a stream's accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// They are aborted, and nothing is recorded.
    Abort,
    /// Addresses are physical.
    Bypass,
    /// They go through a second stage.
    Second(SecondStage),
}

/// What becomes of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFault {
    /// The access is aborted and nothing is recorded.
    Abort,
    /// The access is aborted and an event recorded (S2R).
    Record,
    /// The access waits for software, and an event is recorded (S2S).
    Stall,
}

/// The second stage of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecondStage {
    /// S2TTB: the root, or the first of several.
    pub root: Output,
    /// S2VMID: what caches know its translations by.
    pub vmid: u16,
    /// log2 of a page's bytes: 12, 14 or 16.
    pub granule: u32,
    /// Bits of an address that are translated.
    pub input_bits: u32,
    /// Levels of tables.
    pub levels: u8,
    /// Sizes and features, as the unit and the entry have them together. What the entry does not say is as in [`Caps::FULL`].
    pub caps: Caps,
    /// S2HA.
    pub access_flag: Feature,
    /// S2AFFD: an access flag that is clear is no fault.
    pub ignore_access_flag: Feature,
    /// S2S and S2R.
    pub on_fault: OnFault,
    /// EATS: the device may ask for translations and keep them.
    pub remote: bool,
}

/// Why there is no stream in a stream table entry: C_BAD_STE, but for what is not spoken here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BadStream {
    /// V is clear.
    Invalid,
    /// S2TG is 3.
    Granule,
    /// S2T0SZ asks for so many bits, which the unit or the architecture does not have.
    InputBits(u32),
    /// S2SL0 begins with tables of so many levels, which do not translate so many bits.
    Start {
        /// Levels.
        levels: u8,
        /// Bits.
        input_bits: u32,
    },
    /// S2TTB is beyond physical memory.
    Root(Output),
    /// A first stage, 32-bit tables or big-endian ones: right, and not spoken by this crate.
    Unspoken,
}

impl fmt::Display for BadStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid => f.write_str("the stream table entry is not valid"),
            Self::Granule => f.write_str("the stream table entry's granule has a reserved value"),
            Self::InputBits(bits) => write!(f, "addresses of {bits} bits are not translated by this unit"),
            Self::Start { levels, input_bits } => {
                write!(f, "tables of {levels} levels do not translate {input_bits} bits with this granule")
            }
            Self::Root(root) => write!(f, "the root at {root} is beyond physical memory"),
            Self::Unspoken => f.write_str(
                "the stream table entry asks for a first stage, 32-bit or big-endian tables, which are not spoken here",
            ),
        }
    }
}

impl core::error::Error for BadStream {}

impl Stream {
    /// What an entry's words say.
    ///
    /// # Errors
    /// The unit would refuse it, or it is beyond this crate.
    pub fn decode(words: [u64; 8], unit: &Unit) -> Result<Self, BadStream> {
        let [first, second, third, fourth, ..] = words;
        if first & VALID == 0 {
            return Err(BadStream::Invalid);
        }
        match first >> CONFIG_SHIFT & 7 {
            0..=3 => return Ok(Self::Abort),
            4 => return Ok(Self::Bypass),
            6 if third & (LONG_FORMAT | BIG_ENDIAN) == LONG_FORMAT => {}
            _ => return Err(BadStream::Unspoken),
        }
        let number = |low: u32, bits: u32| low_byte(third >> low & field(0, bits));
        let granule: u32 = match number(GRANULE_SHIFT, 2) {
            0 => 12,
            1 => 16,
            2 => 14,
            _ => return Err(BadStream::Granule),
        };
        let input_bits = 64 - u32::from(number(SIZE_SHIFT, 6));
        if !(25..=unit.input_bits.min(48)).contains(&input_bits) {
            return Err(BadStream::InputBits(input_bits));
        }
        // With 4 KiB S2SL0 counts from tables of two levels; 3 stands for one, which 25 bits and more never do with.
        let levels = number(START_SHIFT, 2) + if granule == 12 { 2 } else { 1 };
        let below = granule + (granule - 3) * u32::from(levels - 1);
        if levels > 4 || !(below + 1..=below + granule - 3 + 4).contains(&input_bits) {
            return Err(BadStream::Start { levels, input_bits });
        }
        let said = PHYSICAL_BITS.get(usize::from(number(PHYSICAL_SHIFT, 3))).copied();
        let physical_bits = said.unwrap_or(48).min(unit.physical_bits);
        let root = Output(fourth & ROOT);
        if root.0 >> physical_bits.min(63) != 0 || fourth & field(48, 4) != 0 {
            return Err(BadStream::Root(Output(fourth & field(4, 48))));
        }
        let feature = |bit| if third & bit != 0 { Feature::On } else { Feature::Off };
        let access_flag = feature(ACCESS_FLAG);
        let dirty_management = if access_flag == Feature::On { feature(DIRTY) } else { Feature::Off };
        Ok(Self::Second(SecondStage {
            root,
            vmid: u16::from_le_bytes([third.to_le_bytes()[0], third.to_le_bytes()[1]]),
            granule,
            input_bits,
            levels,
            caps: Caps { physical_bits, dirty_management, ..Caps::FULL },
            access_flag,
            ignore_access_flag: feature(IGNORE_ACCESS_FLAG),
            on_fault: match (third & STALL != 0, third & RECORD != 0) {
                (true, _) => OnFault::Stall,
                (false, true) => OnFault::Record,
                (false, false) => OnFault::Abort,
            },
            remote: second >> ATS_SHIFT & 3 != 0,
        }))
    }
}

/// S2PS.
const PHYSICAL_BITS: [u32; 6] = [32, 36, 40, 42, 44, 48];

/// A format that a second stage can have.
pub trait SmmuFormat: Format<Caps = Caps> {}

impl<const GRANULE: u32, const BITS: u32> SmmuFormat for Second<GRANULE, BITS> {}

/// A stream's second stage, whose tables are of the format `F`.
#[derive(Clone, Copy, Debug)]
pub struct Stage<F> {
    stage: SecondStage,
    format: PhantomData<F>,
}

impl SecondStage {
    /// The stage with its format; `None` if its tables are of another.
    pub fn of<F: SmmuFormat>(self) -> Option<Stage<F>> {
        let fits = (self.granule, self.input_bits, self.levels) == (F::PAGE_SHIFT, F::INPUT_BITS, F::LEVELS);
        fits.then_some(Stage { stage: self, format: PhantomData })
    }

    /// What is recorded of a fault, where something is.
    pub fn event<E>(&self, fault: &Fault<E>, access: Access, mode: Mode) -> Option<Event> {
        let reason = match fault.kind {
            Kind::External => Reason::WalkAbort,
            _ if self.on_fault == OnFault::Abort => return None,
            Kind::Translation => Reason::Translation,
            Kind::AddressSize => Reason::AddressSize,
            Kind::AccessFlag => Reason::Access,
            Kind::Permission => Reason::Permission,
            // Hardware goes on trying.
            Kind::UnsupportedUpdate => return None,
        };
        let stalled = self.on_fault == OnFault::Stall && reason != Reason::WalkAbort;
        Some(Event { reason, input: fault.input, entry: fault.at, access, mode, stalled })
    }
}

impl<F: SmmuFormat> Stage<F> {
    /// Translates `input` for a device's access, as the SMMU would.
    ///
    /// # Errors
    /// The fault, see [`SecondStage::event`].
    pub fn translate<M: TableMemory>(
        &self,
        memory: &M,
        input: Input,
        (access, mode): (Access, Mode),
        marks: Marks,
    ) -> Result<Walked, Fault<M::Error>> {
        let SecondStage { root, caps, access_flag, ignore_access_flag, .. } = self.stage;
        // What ignores the flag neither faults for it nor sets it.
        let (access_flag, marks) = match (access_flag, ignore_access_flag) {
            (Feature::Off, Feature::On) => (Feature::On, Marks::Leave),
            (own, _) => (own, marks),
        };
        let allowed = |walked: &Walked| walked.leaf.permissions.contains(mode.needs(access));
        Tables { root, access_flag, caps }.translate::<F, M>(memory, input, (access, marks), allowed)
    }
}

/// Why an access was not translated: the event's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// F_WALK_EABT: a table cannot be read.
    WalkAbort = 0x0b,
    /// F_TRANSLATION.
    Translation = 0x10,
    /// F_ADDR_SIZE.
    AddressSize = 0x11,
    /// F_ACCESS.
    Access = 0x12,
    /// F_PERMISSION.
    Permission = 0x13,
}

/// A record of the event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Why.
    pub reason: Reason,
    /// The device's address.
    pub input: Input,
    /// The entry where the walk ended.
    pub entry: Output,
    /// What the device did.
    pub access: Access,
    /// As whom.
    pub mode: Mode,
    /// The access waits to be resumed or terminated.
    pub stalled: bool,
}

impl Event {
    /// Its four words, for a stream without substreams. A stalled access's tag (STAG) is the unit's own, and left zero.
    pub fn words(&self, stream: u32) -> [u64; 4] {
        let set = |condition, bit: u32| if condition { 1 << bit } else { 0 };
        let address = match self.reason {
            Reason::WalkAbort => self.entry.0 & field(3, 49),
            _ => self.input.0 & field(12, 40),
        };
        let about = set(self.stalled, 31)
            | set(self.mode == Mode::Privileged, 33)
            | set(self.access == Access::Fetch, 34)
            | set(self.access != Access::Write, 35)
            | 1 << 39 // S2
            | 2 << 40; // CLASS: the input address
        [self.reason as u64 | u64::from(stream) << 32, about, self.input.0, address]
    }
}
