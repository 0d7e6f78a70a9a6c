//! What an Arm processor does with an address: the translation, or the fault with its status code, through one stage and two.
//!
//! Arm Architecture Reference Manual (DDI 0487), D8.4 "Memory access control", D8.5 "Hardware updates to the translation
//! tables", D8.6 "Memory region attributes", D8.14 "Memory aborts" (priority and levels of faults), and the fault status
//! codes of ESR_ELx.ISS for data and instruction aborts. The regime is EL1&0.
//!
//! Rights are judged at the leaf, over what the tables above it withhold. What tables withhold from data accesses of users
//! (APTable) says nothing about fetches: a page that users may only execute exists.
use crate::address::{Input, Level, Output};
use crate::entry::{Malformed, Memory, Permissions, Shareability};
use crate::format::arm::Caps;
use crate::format::{Feature, Format};
use crate::memory::TableMemory;
use crate::nested::{self, GuestMemoryFault, Purpose, SecondStage};
use crate::walk::{Access, Dead, End, Marks, Walked, attempt};
use core::fmt;
use core::marker::PhantomData;

/// Who accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// EL0.
    User,
    /// EL1.
    Privileged,
}

impl Mode {
    /// What the second stage must permit.
    pub(crate) const fn needs(self, access: Access) -> Permissions {
        match (access, self) {
            (Access::Fetch, Self::User) => Permissions::EXECUTE_USER,
            (Access::Fetch, Self::Privileged) => Permissions::EXECUTE_PRIVILEGED,
            (data, _) => data.needs(),
        }
    }
}

bitflags::bitflags! {
    /// The control bits that decide about rights in the first stage.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Control: u8 {
        /// SCTLR_EL1.WXN: what can be written is not executed.
        const WXN = 1;
        /// PSTATE.PAN: privileged code does not access users' data.
        const PAN = 1 << 1;
        /// SCTLR_EL1.EPAN: nor what users can only execute.
        const EPAN = 1 << 2;
    }
}

/// What of a processor's state the first stage depends on, in one half of the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// The root table: TTBRn_EL1.BADDR. Bits below the root's size are not looked at.
    pub root: Output,
    /// Control bits.
    pub control: Control,
    /// TCR_EL1.HA: hardware sets the access flag. Off, an access without it is a fault.
    pub access_flag: Feature,
    /// TCR_EL1.HPDn: what tables withhold does not count.
    pub hierarchy_off: Feature,
    /// Sizes and features.
    pub caps: Caps,
}

/// What kind of fault it is, and so its status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An address beyond what the tables or physical memory have.
    AddressSize,
    /// An entry that maps nothing, of whatever form.
    Translation,
    /// The access flag is clear, and hardware does not set it.
    AccessFlag,
    /// A right is missing.
    Permission,
    /// The entry cannot be read.
    External,
    /// FEAT_HAFDBS: the entry cannot be updated, since it changes all the time.
    UnsupportedUpdate,
}

/// Why an address was not translated. `E` is what the tables' memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault<E> {
    /// The address before the stage.
    pub input: Input,
    /// What kind of fault.
    pub kind: Kind,
    /// The level of the entry where the walk ended.
    pub level: Level,
    /// That entry; the root where no entry was read.
    pub at: Output,
    /// What is wrong with the entry, if it is malformed.
    pub malformed: Option<Malformed>,
    /// Why it cannot be read, for [`Kind::External`].
    pub memory: Option<E>,
}

impl<E> Fault<E> {
    /// DFSC or IFSC of the syndrome. A level that the tables do not have (an address that is too long) counts as level 0.
    pub const fn status(&self) -> u8 {
        let level = 4u8.saturating_sub(self.level.0);
        match self.kind {
            Kind::AddressSize => level,
            Kind::Translation => 0b00_0100 | level,
            Kind::AccessFlag => 0b00_1000 | level,
            Kind::Permission => 0b00_1100 | level,
            Kind::External => 0b01_0100 | level,
            Kind::UnsupportedUpdate => 0b11_0001,
        }
    }
}

impl<E: fmt::Debug> fmt::Display for Fault<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { input, kind, level, at, .. } = self;
        write!(f, "{kind:?} fault at {input}, and the walk ended at the entry of {level} at {at}")?;
        match (&self.malformed, &self.memory) {
            (Some(reason), _) => write!(f, ": {reason}"),
            (None, Some(error)) => write!(f, ": {error:?}"),
            (None, None) => Ok(()),
        }
    }
}

impl<E: fmt::Debug> core::error::Error for Fault<E> {}

/// Translates `input` through the first stage, as the processor would.
///
/// # Errors
/// The fault.
pub fn walk<F: Format<Caps = Caps>, M: TableMemory>(
    memory: &M,
    registers: &Registers,
    input: Input,
    (access, mode): (Access, Mode),
    marks: Marks,
) -> Result<Walked, Fault<M::Error>> {
    let stage = Tables { root: registers.root, access_flag: registers.access_flag, caps: registers.caps };
    stage.translate::<F, M>(memory, input, (access, marks), |walked| {
        let permissions = match registers.hierarchy_off {
            Feature::On => walked.leaf.permissions,
            Feature::Off => walked.permissions,
        };
        registers.control.allow(permissions, access, mode)
    })
}

impl Control {
    /// D8.4.1: direct permissions of the first stage.
    fn allow(self, permissions: Permissions, access: Access, mode: Mode) -> bool {
        let can = |permission| permissions.contains(permission);
        let users = can(Permissions::USER);
        let writable = can(Permissions::WRITE);
        match (mode, access) {
            (Mode::User, Access::Read) => users,
            (Mode::User, Access::Write) => users && writable,
            (Mode::User, Access::Fetch) => {
                can(Permissions::EXECUTE_USER) && !(self.contains(Self::WXN) && users && writable)
            }
            (Mode::Privileged, Access::Fetch) => {
                // What users can write is never executed by privileged code.
                can(Permissions::EXECUTE_PRIVILEGED)
                    && !(users && writable)
                    && !(self.contains(Self::WXN) && writable)
            }
            (Mode::Privileged, data) => {
                let executed = self.contains(Self::EPAN) && can(Permissions::EXECUTE_USER);
                let kept_out = self.contains(Self::PAN) && (users || executed);
                !kept_out && (data == Access::Read || writable)
            }
        }
    }
}

/// What both stages have.
#[derive(Clone, Copy)]
pub(crate) struct Tables {
    pub(crate) root: Output,
    pub(crate) access_flag: Feature,
    pub(crate) caps: Caps,
}

impl Tables {
    pub(crate) fn translate<F: Format<Caps = Caps>, M: TableMemory>(
        &self,
        memory: &M,
        input: Input,
        (access, marks): (Access, Marks),
        allowed: impl Fn(&Walked) -> bool,
    ) -> Result<Walked, Fault<M::Error>> {
        let root = Output(self.root.0 & !(F::entries(F::root()) * 8 - 1));
        let fault = |kind, level, at| Fault { input, kind, level, at, malformed: None, memory: None };
        if !F::accepts(input) {
            // D8.14.6: reported at level 0, whatever the level of the root.
            return Err(fault(Kind::Translation, Level(4), root));
        }
        let ended = |end: End<M::Error>| {
            let plain = fault(Kind::Translation, end.level, end.step.at);
            match end.dead {
                Dead::Absent => plain,
                Dead::Malformed(reason @ Malformed::Beyond(_)) => {
                    Fault { kind: Kind::AddressSize, malformed: Some(reason), ..plain }
                }
                Dead::Malformed(reason) => Fault { malformed: Some(reason), ..plain },
                Dead::Memory(error) => Fault { kind: Kind::External, memory: Some(error), ..plain },
            }
        };
        let judge = |walked: &Walked| {
            let refused = |kind| fault(kind, walked.level, walked.step(walked.level).at);
            if !walked.leaf.accessed && self.access_flag == Feature::Off {
                return Err(refused(Kind::AccessFlag));
            }
            if !allowed(walked) {
                return Err(refused(Kind::Permission));
            }
            // Without dirty management nothing is writable and clean, and no bit is to be set for a write.
            let dirties = self.caps.dirty_management == Feature::On;
            Ok(match (marks, self.access_flag) {
                (Marks::Set, Feature::On) => Some(if dirties { access } else { Access::Read }),
                _ => None,
            })
        };
        attempt::<F, M, _>(memory, root, &self.caps, input, ended, judge)?
            .ok_or_else(|| fault(Kind::UnsupportedUpdate, F::root(), root))
    }
}

/// What of a hypervisor's state the second stage depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecondRegisters {
    /// The root, or the first of several: VTTBR_EL2.BADDR.
    pub root: Output,
    /// VTCR_EL2.HA.
    pub access_flag: Feature,
    /// HCR_EL2.PTW: a guest's tables must not be in memory that this stage makes a device's.
    pub protected_walks: Feature,
    /// HCR_EL2.FWB: MemAttr replaces the guest's attributes rather than limits them.
    pub forced_write_back: Feature,
    /// Sizes and features.
    pub caps: Caps,
}

/// The second stage in the format `F`, for an access of the mode given.
#[derive(Clone, Copy, Debug)]
pub struct Stage<'a, F, M> {
    memory: &'a M,
    registers: SecondRegisters,
    mode: Mode,
    format: PhantomData<F>,
}

impl<'a, F: Format<Caps = Caps>, M> Stage<'a, F, M> {
    /// A stage whose tables are in `memory`. The mode counts for fetches alone.
    pub const fn new(memory: &'a M, registers: SecondRegisters, mode: Mode) -> Self {
        Self { memory, registers, mode, format: PhantomData }
    }
}

impl<F: Format<Caps = Caps>, M: TableMemory> SecondStage for Stage<'_, F, M> {
    type Fault = SecondFault<M::Error>;

    fn translate(&self, input: Input, access: Access, purpose: Purpose) -> Result<Walked, Self::Fault> {
        let registers = &self.registers;
        let stage = Tables { root: registers.root, access_flag: registers.access_flag, caps: registers.caps };
        let needs = self.mode.needs(access);
        let allowed = |walked: &Walked| {
            let device = || {
                matches!(walked.leaf.memory, Memory::MemAttr(number, _)
                    if matches!(Attributes::second(number, registers.forced_write_back), Some(Attributes::Device(_))))
            };
            let kept_out =
                purpose == Purpose::GuestTable && registers.protected_walks == Feature::On && device();
            walked.leaf.permissions.contains(needs) && !kept_out
        };
        stage
            .translate::<F, M>(self.memory, input, (access, Marks::Set), allowed)
            .map_err(|fault| SecondFault { purpose, fault })
    }
}

/// A fault of the second stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecondFault<E> {
    /// What was accessed: a guest's table is S1PTW.
    pub purpose: Purpose,
    /// Why it could not be.
    pub fault: Fault<E>,
}

impl<E> SecondFault<E> {
    /// ISS.S1PTW.
    pub const fn on_a_walk(&self) -> bool {
        matches!(self.purpose, Purpose::GuestTable)
    }

    /// HPFAR_EL2.FIPA: bits 47:12 of the intermediate physical address, from bit 4 on.
    pub const fn hpfar(&self) -> u64 {
        self.fault.input.0 >> 12 << 4
    }
}

/// Why an address was not translated through two stages over the memory whose error is `E`.
pub type TwoStageFault<E> = nested::Fault<Fault<GuestMemoryFault<SecondFault<E>, E>>, SecondFault<E>>;

/// The second stage's fault, if it is one: an abort that the hypervisor takes. All others are the guest's own.
pub const fn second_fault<E: Copy>(fault: &TwoStageFault<E>) -> Option<SecondFault<E>> {
    match fault {
        nested::Fault::Second(fault)
        | nested::Fault::First(Fault { memory: Some(GuestMemoryFault::Second(fault)), .. }) => Some(*fault),
        nested::Fault::First(_) => None,
    }
}

/// A device's memory, by what may be done to accesses, the strictest first: gathering, reordering, early acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// None.
    NGnRnE,
    /// Early acknowledgement.
    NGnRE,
    /// Reordering too.
    NGRE,
    /// All.
    Gre,
}

/// How normal memory is cached, the weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Caching {
    /// Not at all.
    NonCacheable,
    /// Writes go through.
    WriteThrough,
    /// Fully.
    WriteBack,
}

/// What kind of memory an access is to (D8.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attributes {
    /// A device's.
    Device(Device),
    /// Normal memory. Allocation hints are left out.
    Normal {
        /// In inner caches.
        inner: Caching,
        /// In outer caches.
        outer: Caching,
    },
    /// What the first stage says (MemAttr 7 under FWB).
    AsFirst,
}

impl Attributes {
    const DEVICES: [Device; 4] = [Device::NGnRnE, Device::NGnRE, Device::NGRE, Device::Gre];

    const fn normal(caching: Caching) -> Self {
        Self::Normal { inner: caching, outer: caching }
    }

    /// An attribute byte of MAIR_ELx; `None` for values that are reserved or of extensions (XS, MTE).
    pub fn first(mair: u8) -> Option<Self> {
        let (outer, inner) = (mair >> 4, mair & 15);
        if outer == 0 {
            let device = Self::DEVICES.get(usize::from(inner >> 2)).copied();
            return device.filter(|_| inner & 3 == 0).map(Self::Device);
        }
        let caching = |nibble| match nibble {
            0b0100 => Some(Caching::NonCacheable),
            0b0001..=0b0011 | 0b1000..=0b1011 => Some(Caching::WriteThrough),
            0b0101..=0b0111 | 0b1100..=0b1111 => Some(Caching::WriteBack),
            _ => None,
        };
        Some(Self::Normal { inner: caching(inner)?, outer: caching(outer)? })
    }

    /// A MemAttr field of the second stage; `None` for reserved values.
    pub fn second(number: u8, forced_write_back: Feature) -> Option<Self> {
        let device = |number: u8| Self::DEVICES.get(usize::from(number)).copied().map(Self::Device);
        if forced_write_back == Feature::On {
            return match number {
                0..=3 => device(number),
                5 => Some(Self::normal(Caching::NonCacheable)),
                6 => Some(Self::normal(Caching::WriteBack)),
                7 => Some(Self::AsFirst),
                _ => None,
            };
        }
        let caching = |field| match field {
            1 => Some(Caching::NonCacheable),
            2 => Some(Caching::WriteThrough),
            3 => Some(Caching::WriteBack),
            _ => None,
        };
        match number >> 2 {
            0 => device(number),
            outer => Some(Self::Normal { inner: caching(number & 3)?, outer: caching(outer)? }),
        }
    }

    /// What both stages make of an access: the stricter of the two, but under FWB normal memory of the second stage is as
    /// that says even if the first says otherwise, and a device of the first stays one unless the second says write-back.
    #[must_use]
    pub fn combine(self, second: Self, forced_write_back: Feature) -> Self {
        match (self, second) {
            (own, Self::AsFirst) => own,
            (_, forced @ Self::Normal { inner: Caching::WriteBack, outer: Caching::WriteBack })
                if forced_write_back == Feature::On =>
            {
                forced
            }
            (Self::Device(own), Self::Device(second)) => Self::Device(own.min(second)),
            (device @ Self::Device(_), _) | (_, device @ Self::Device(_)) => device,
            (Self::Normal { inner, outer }, Self::Normal { inner: inner2, outer: outer2 }) => {
                Self::Normal { inner: inner.min(inner2), outer: outer.min(outer2) }
            }
            (Self::AsFirst, second) => second,
        }
    }

    /// Who sees what is cached, of what the stages say: the widest; what is not cached is everybody's (D8.6.4).
    pub fn shareability(self, first: Shareability, second: Shareability) -> Shareability {
        match self {
            Self::Device(_) | Self::Normal { inner: Caching::NonCacheable, outer: Caching::NonCacheable } => {
                Shareability::Outer
            }
            _ => match (first, second) {
                (Shareability::Outer, _) | (_, Shareability::Outer) => Shareability::Outer,
                (Shareability::Inner, _) | (_, Shareability::Inner) => Shareability::Inner,
                (own, _) => own,
            },
        }
    }
}
