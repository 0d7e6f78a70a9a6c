//! What firmware says of remapping hardware: ACPI's root pointer, its table of tables, and DMAR.
//!
//! Enters: where the loader found the root pointer, and devices. Leaves: where the registers of the unit are that these go through. What must never happen: an address or a length of firmware's followed out of the memory that the first tables map; a
//! table believed whose bytes do not add up to 0.
//!
//! ```text
//! root pointer   0 "RSD PTR " | 8 sum | 15 revision | 16 RSDT | 24 XSDT, from revision 2
//! any table      0 signature | 4 length | 8 revision | 9 sum | 36 what is in it
//! DMAR           36 address bits - 1 | 37 flags | 48 structures
//! structure      0 type, 0 a unit | 2 length | 4 flags, bit 0 all other devices | 6 segment | 8 registers | 16 scopes
//! scope          0 type, 1 a device | 1 length, 8 if it is on that bus | 5 bus | 6 slot | 7 function
//! ```
use crate::boot::{self, BootError};
use crate::wire::Device;
use plimsoll_types::Hpa;

const HEADER: usize = 36;
const ROOT_BYTES: u64 = 36;
const STRUCTURES: usize = 48;
const SCOPES: usize = 16;
const UNIT: u16 = 0;
const ALL_OTHERS: u8 = 1;
const DEVICE: u8 = 1;

/// A remapping unit.
#[derive(Clone, Copy, Debug)]
pub struct RemappingUnit {
    /// Its registers.
    pub registers: Hpa,
    /// Bits of the machine's addresses.
    pub physical_bits: u32,
}

/// The table at an address, if its bytes add up.
///
/// # Safety
/// As of [`boot::memory`].
unsafe fn table(what: &'static str, at: u64) -> Result<&'static [u8], BootError> {
    // SAFETY: as the caller promises, both.
    let header = unsafe { boot::memory(what, at, HEADER as u64) }?;
    // SAFETY: likewise.
    let table = unsafe { boot::memory(what, at, u64::from(boot::u32_at(header, 4))) }?;
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if sum == 0 && table.len() >= HEADER { Ok(table) } else { Err(BootError::BadTable { what }) }
}

/// The unit that all of these devices go through; `None` if firmware names none.
///
/// # Safety
/// `root` is what the loader passed, the first tables are in use, and firmware's tables are as it left them.
///
/// # Errors
/// [`BootError`].
pub unsafe fn remapping_unit(root: u64, devices: &[Device]) -> Result<Option<RemappingUnit>, BootError> {
    if root == 0 {
        return Ok(None);
    }
    // SAFETY: as the caller promises.
    let pointer = unsafe { boot::memory("ACPI's root pointer", root, ROOT_BYTES) }?;
    if !pointer.starts_with(b"RSD PTR ") {
        return Err(BootError::BadTable { what: "ACPI's root pointer" });
    }
    let has_wide = pointer[15] >= 2 && boot::u64_at(pointer, 24) != 0;
    let (tables, width) = match has_wide {
        true => (boot::u64_at(pointer, 24), 8),
        false => (u64::from(boot::u32_at(pointer, 16)), 4),
    };
    // SAFETY: as the caller promises.
    let tables = unsafe { table("ACPI's table of tables", tables) }?;
    for entry in tables[HEADER..].chunks_exact(width) {
        let at = if has_wide { boot::u64_at(entry, 0) } else { u64::from(boot::u32_at(entry, 0)) };
        // SAFETY: as the caller promises.
        if unsafe { boot::memory("a table of ACPI's", at, HEADER as u64) }?.starts_with(b"DMAR") {
            // SAFETY: likewise.
            return Ok(unit_of(unsafe { table("ACPI's DMAR", at) }?, devices));
        }
    }
    Ok(None)
}

/// The structures that `bytes` begin with, each with its length at `at`, until one is none.
fn structures(bytes: &[u8], length: impl Fn(&[u8]) -> usize) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    core::iter::from_fn(move || {
        let (first, others) = rest.split_at_checked(length(rest)).filter(|(first, _)| first.len() >= 4)?;
        rest = others;
        Some(first)
    })
}

fn unit_of(dmar: &[u8], devices: &[Device]) -> Option<RemappingUnit> {
    let physical_bits = u32::from(*dmar.get(HEADER)?) + 1;
    let has = |unit: &[u8], device: &Device| {
        let mut scopes = structures(unit.get(SCOPES..).unwrap_or_default(), |scope| {
            scope.get(1).copied().unwrap_or(0).into()
        });
        scopes.any(|scope| {
            matches!(scope, [DEVICE, 8, _, _, _, bus, slot, function] if Device::at(*bus, *slot, *function) == *device)
        })
    };
    let units = structures(dmar.get(STRUCTURES..)?, |unit| boot::u16_at(unit, 2).into())
        .filter(|unit| boot::u16_at(unit, 0) == UNIT && boot::u16_at(unit, 6) == 0 && unit.len() >= SCOPES);
    // One that has all others comes last.
    let mut named = false;
    for unit in units {
        let own = devices.iter().filter(|device| has(unit, device)).count();
        named |= own > 0;
        let has_others = unit.get(4).is_some_and(|flags| flags & ALL_OTHERS != 0) && !named;
        if own == devices.len() || has_others {
            return Some(RemappingUnit { registers: Hpa(boot::u64_at(unit, 8)), physical_bits });
        }
    }
    None
}
