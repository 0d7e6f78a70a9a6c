//! What the loader left: the memory map, and the settings.
//!
//! Enters: the address of the start information. Leaves: claims about memory, and settings whose every number was looked at.
//! What must never happen: an address of the loader's followed out of the memory that the first tables map.
//!
//! ```text
//! start info   0 magic | 4 version | 12 modules | 16 module list | 32 ACPI's root pointer | 40 memory map | 48 its entries     (version 1 and up)
//! memory map   0 start | 8 bytes | 16 type | 20 reserved
//! module       0 start | 8 bytes | 16 command line | 24 reserved
//! ```
use crate::digest::Digest;
use crate::wire::{DIGESTS_MAX, GUESTS_MAX, GuestSettings, Header, MAGIC, Provoke};
use core::fmt;
use core::ptr::with_exposed_provenance;
use plimsoll_core::frames::firmware::{Claim, E820_ENTRY};
use zerocopy::FromBytes;

/// The first tables map so much.
pub const MAPPED: u64 = 4 << 30;
const START_MAGIC: u32 = 0x336e_c578;
const START_SIZE: usize = 56;
const ENTRY_SIZE: usize = 24;
const MODULE_SIZE: usize = 32;
/// Most entries of the memory map that are looked at. QEMU's PCs have about ten.
pub const ENTRIES_MAX: u32 = 128;

/// What the loader left cannot be used.
#[derive(Clone, Copy, Debug)]
pub enum BootError {
    /// Not started by PVH, or by an early version of it.
    NoStartInfo {
        /// What stood there.
        magic: u32,
        /// Its version.
        version: u32,
    },
    /// Something lies where it cannot be reached.
    OutOfReach {
        /// What.
        what: &'static str,
        /// Where.
        at: u64,
    },
    /// The memory map is too long.
    TooManyEntries {
        /// How long.
        found: u32,
    },
    /// A table of firmware's is damaged.
    BadTable {
        /// Which.
        what: &'static str,
    },
    /// There are no settings.
    NoSettings,
    /// The settings are not what they should be.
    BadSettings {
        /// What is wrong.
        what: &'static str,
    },
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoStartInfo { magic, version } => write!(
                f,
                "no PVH start information of version 1 or later was passed (magic {magic:#x}, version {version}); boot the image with qemu-system-x86_64 -kernel"
            ),
            Self::OutOfReach { what, at } => {
                write!(f, "the loader put {what} at {at:#x}, beyond the first 4 GiB")
            }
            Self::TooManyEntries { found } => {
                write!(f, "the firmware's memory map has {found} entries; {ENTRIES_MAX} are read")
            }
            Self::BadTable { what } => {
                write!(
                    f,
                    "{what} is damaged: its bytes do not add up; no device can be given to a guest here"
                )
            }
            Self::NoSettings => {
                f.write_str("no settings were passed; give them as the boot module (-initrd)")
            }
            Self::BadSettings { what } => {
                write!(f, "the settings have {what}; were they written by the same version of plimsoll?")
            }
        }
    }
}

/// What the loader left.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    map: &'static [u8],
    /// Where the settings are, to be kept until they are read.
    pub settings: &'static [u8],
    /// Where ACPI's root pointer is; 0 if there is none.
    pub acpi: u64,
}

/// Memory the loader filled.
///
/// # Safety
/// Nobody writes there while the slice is used.
pub unsafe fn memory(what: &'static str, at: u64, bytes: u64) -> Result<&'static [u8], BootError> {
    let out_of_reach = BootError::OutOfReach { what, at };
    let is_mapped = at != 0 && at.checked_add(bytes).is_some_and(|end| end <= MAPPED);
    let (true, Ok(start), Ok(len)) = (is_mapped, usize::try_from(at), usize::try_from(bytes)) else {
        return Err(out_of_reach);
    };
    // SAFETY: the first tables map it to itself, readable; nobody writes there (the caller's promise).
    Ok(unsafe { core::slice::from_raw_parts(with_exposed_provenance(start), len) })
}

fn number<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes.get(offset..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

/// A little-endian number; what is not there is 0.
pub fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(number(bytes, offset))
}

/// Likewise.
pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(number(bytes, offset))
}

/// Likewise.
pub fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(number(bytes, offset))
}

impl Left {
    /// Reads the start information.
    ///
    /// # Safety
    /// `at` is what the loader passed, the first tables are in use, and nothing has been written to memory outside of the
    /// image. Nothing is, where these slices lie, for as long as they are used.
    ///
    /// # Errors
    /// [`BootError`].
    pub unsafe fn read(at: u64) -> Result<Self, BootError> {
        // SAFETY: all three as the caller promises.
        let memory = |what, at, bytes| unsafe { memory(what, at, bytes) };
        let start = memory("its start information", at, START_SIZE as u64)?;
        let (magic, version) = (u32_at(start, 0), u32_at(start, 4));
        if magic != START_MAGIC || version < 1 {
            return Err(BootError::NoStartInfo { magic, version });
        }
        let entries = u32_at(start, 48);
        if entries > ENTRIES_MAX {
            return Err(BootError::TooManyEntries { found: entries });
        }
        let map = memory("the memory map", u64_at(start, 40), u64::from(entries) * ENTRY_SIZE as u64)?;
        if u32_at(start, 12) == 0 {
            return Err(BootError::NoSettings);
        }
        let module = memory("the module list", u64_at(start, 16), MODULE_SIZE as u64)?;
        let settings = memory("the settings", u64_at(module, 0), u64_at(module, 8))?;
        Ok(Self { map, settings, acpi: u64_at(start, 32) })
    }

    /// What firmware says of memory.
    pub fn claims(&self) -> impl Iterator<Item = Claim> {
        self.map
            .chunks_exact(ENTRY_SIZE)
            .filter_map(|entry| entry.first_chunk::<E820_ENTRY>())
            .map(Claim::from_e820)
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// The guests.
    pub guests: &'a [GuestSettings],
    /// What they may execute, those of each behind those of the one before.
    digests: &'a [Digest],
    /// What is decided by, as lines of JSON.
    pub policy: &'a str,
    /// How long they work.
    pub seconds: u32,
    /// What the hypervisor does to itself.
    pub provoke: Provoke,
}

impl<'a> Settings<'a> {
    /// Reads settings.
    ///
    /// # Errors
    /// [`BootError::BadSettings`].
    pub fn read(bytes: &'a [u8]) -> Result<Self, BootError> {
        let bad = |what| BootError::BadSettings { what };
        let (header, rest) = Header::ref_from_prefix(bytes).map_err(|_| bad("no whole header"))?;
        if header.magic != MAGIC {
            return Err(bad("another magic number"));
        }
        let provoke = Provoke::from_wire(header.provoke).ok_or(bad("an unknown provocation"))?;
        if header.guests > GUESTS_MAX {
            return Err(bad("too many guests"));
        }
        let count = usize::try_from(header.guests).map_err(|_| bad("too many guests"))?;
        let (guests, rest) = <[GuestSettings]>::ref_from_prefix_with_elems(rest, count)
            .map_err(|_| bad("fewer guests than they say"))?;
        let claimed = guests.iter().fold(0, |sum: u64, guest| sum.saturating_add(guest.digests));
        let claimed = usize::try_from(claimed).ok().filter(|claimed| *claimed <= DIGESTS_MAX);
        let claimed = claimed.ok_or(bad("too many digests"))?;
        let (digests, rest) =
            <[Digest]>::ref_from_prefix_with_elems(rest, claimed).map_err(|_| bad("too few digests"))?;
        if usize::try_from(header.policy) != Ok(rest.len()) {
            return Err(bad("something else behind the digests than what is decided by"));
        }
        let policy = core::str::from_utf8(rest).map_err(|_| bad("what is decided by in no UTF-8"))?;
        Ok(Self { guests, digests, policy, seconds: header.seconds, provoke })
    }

    /// Each guest, and what it may execute beside its program.
    pub fn each(&self) -> impl Iterator<Item = (&'a GuestSettings, &'a [Digest])> {
        let mut rest = self.digests;
        self.guests.iter().map(move |guest| {
            let count = usize::try_from(guest.digests).unwrap_or(usize::MAX);
            let (own, others) = rest.split_at_checked(count).unwrap_or_default();
            rest = others;
            (guest, own)
        })
    }
}
