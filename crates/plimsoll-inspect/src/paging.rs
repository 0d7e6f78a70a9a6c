//! What of a processor's registers a walk needs. Registers enter; what leaves is a format that `plimsoll-mmu` walks, or the reason
//! why there is none.
use plimsoll_mmu::format::Feature;
use plimsoll_mmu::format::x86::{Caps, Maker};
use plimsoll_mmu::x86::{Control, Registers};

/// CR0.PG.
const CR0_PAGING: u64 = 1 << 31;
/// CR4.LA57.
const CR4_LONG5: u64 = 1 << 12;
/// CR4.PKE.
const CR4_KEYS: u64 = 1 << 22;
/// EFER.LMA.
const EFER_LONG: u64 = 1 << 10;
/// EFER.NXE.
const EFER_NO_EXECUTE: u64 = 1 << 11;
/// Where the root is: CR3 without PCID and flags.
const CR3_ROOT: u64 = ((1 << 40) - 1) << 12;

/// How many levels of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// 48-bit addresses.
    Four,
    /// 57-bit addresses.
    Five,
}

/// A processor that translates otherwise, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotLong {
    /// It has paging off.
    #[error("the processor has paging off (CR0 {cr0:#x}): guest virtual addresses are physical ones there")]
    Off {
        /// CR0.
        cr0: u64,
    },
    /// It is not in long mode.
    #[error("the processor is not in 64-bit mode (EFER {efer:#x}): 32-bit and PAE tables are not walked")]
    Narrow {
        /// EFER.
        efer: u64,
    },
}

/// How a processor translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR3.
    pub cr3: u64,
    /// How many levels.
    pub levels: Levels,
    /// What entries may say.
    pub caps: Caps,
}

impl Paging {
    /// As these registers have it.
    ///
    /// # Errors
    /// They have something else than 64-bit paging.
    pub const fn of(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Result<Self, NotLong> {
        if cr0 & CR0_PAGING == 0 {
            return Err(NotLong::Off { cr0 });
        }
        if efer & EFER_LONG == 0 {
            return Err(NotLong::Narrow { efer });
        }
        let levels = if cr4 & CR4_LONG5 == 0 { Levels::Four } else { Levels::Five };
        let caps = Caps {
            no_execute: on(efer & EFER_NO_EXECUTE != 0),
            keys: on(cr4 & CR4_KEYS != 0),
            ..Self::assumed(cr3, levels).caps
        };
        Ok(Self { cr3, levels, caps })
    }

    /// With this CR3 alone: no-execute on, keys on.
    pub const fn assumed(cr3: u64, levels: Levels) -> Self {
        Self { cr3, levels, caps: Caps { maker: Maker::Intel, ..Caps::FULL } }
    }

    /// Where the root is.
    pub const fn root(&self) -> u64 {
        self.cr3 & CR3_ROOT
    }

    /// The registers of a walk that reads as a supervisor who may read everything.
    pub(crate) const fn registers(&self) -> Registers {
        Registers { cr3: self.cr3, control: Control::empty(), pkru: 0, caps: self.caps }
    }
}

const fn on(is_set: bool) -> Feature {
    if is_set { Feature::On } else { Feature::Off }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registers_of_a_linux_are_four_levels() {
        let paging = Paging::of(0x8005_0033, 0x2e2_a003, 0x6f0, 0xd01).unwrap();
        assert_eq!((paging.levels, paging.root()), (Levels::Four, 0x2e2_a000));
        assert_eq!((paging.caps.no_execute, paging.caps.keys), (Feature::On, Feature::Off));
        let five = Paging::of(0x8005_0033, 0, 0x1000 | 1 << 22, 0x500).unwrap();
        assert_eq!(
            (five.levels, five.caps.no_execute, five.caps.keys),
            (Levels::Five, Feature::Off, Feature::On)
        );
    }

    #[test]
    fn other_modes_are_refused() {
        assert_eq!(Paging::of(0x6000_0010, 0, 0, 0), Err(NotLong::Off { cr0: 0x6000_0010 }));
        assert_eq!(Paging::of(0x8000_0011, 0, 0x20, 0), Err(NotLong::Narrow { efer: 0 }));
    }
}
