//! What guest memory holds when the first vCPU starts: page tables, the parameter page, the image.
//!
//! Enters: the checked configuration and the layout that follows from it. Leaves: a list of pieces, each an address
//! and bytes, that the caller copies before the memory is registered with anybody, so that all of them are present.
//! Nothing here touches memory, and nothing is ever read back from the guest.
//!
//! # Page tables
//! Identity mapping in pages of 2 MiB, writable and executable from user mode, for the regions and nothing else: an
//! access to a hole is a page fault, which without an interrupt table ends the machine with a reason. The window
//! `0x10_0000..0x20_0000` has room for 256 table pages: one PML4, one PDPT (512 GiB), and a page directory for each
//! GiB that a region touches, so a machine may touch 254 of them and nothing at 512 GiB or above.
//!
//! ```text
//! 0x10_0000 PML4 [0] -> PDPT | 0x10_1000 PDPT [gib] -> directory | 0x10_2000 .. directories, ascending GiB
//! entry: bits 12.. address | 7 page size (directories) | 5 accessed, 6 dirty | 2 user | 1 writable | 0 present
//! ```
use crate::elf::{self, ElfError};
use plimsoll_core::layout::GuestLayout;
use plimsoll_guest::abi;
use plimsoll_types::{BLOCK_SIZE, Gpa, PAGE_SIZE};
use std::borrow::Cow;
use thiserror::Error;
use zerocopy::IntoBytes;

/// The guest image, built by this crate's build script.
const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-image"));

const GIB: u64 = 1 << 30;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// A table's bits, dirty, and "this is a 2 MiB page".
const BLOCK: u64 = TABLE | 0xc0;
const TABLES: u64 = abi::PAGE_TABLES_GPA;
/// Directories that fit behind the PML4 and the PDPT.
const DIRECTORIES_MAX: usize = ((abi::PAGE_TABLES_END - TABLES) / abi::PAGE_SIZE) as usize - 2;

/// One piece of initial memory.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Where it starts, 8-byte aligned.
    pub(crate) start: Gpa,
    /// What it holds.
    pub(crate) bytes: Cow<'static, [u8]>,
}

/// A machine that cannot be started from this image.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BootError {
    /// The image is not loadable.
    #[error("the built-in guest image cannot be loaded")]
    Image(#[from] ElfError),
    /// Memory lies where the page tables cannot map it.
    #[error("guest memory at {at} is out of reach of {DIRECTORIES_MAX} page directories below 512 GiB")]
    OutOfReach {
        /// The first block that cannot be mapped.
        at: Gpa,
    },
}

/// Where the first instruction lies, and the pieces of the image.
///
/// # Errors
/// [`BootError::Image`].
pub(crate) fn image() -> Result<(Gpa, Vec<Piece>), BootError> {
    let program = elf::parse(IMAGE, abi::IMAGE_GPA..abi::IMAGE_END)?;
    let pieces = program.segments.iter().map(|part| Piece { start: part.start, bytes: part.bytes.into() });
    Ok((program.entry, pieces.collect()))
}

/// The parameter page as a piece.
pub(crate) fn params_piece(params: &abi::Params) -> Piece {
    Piece { start: Gpa(abi::PARAMS_GPA), bytes: params.as_bytes().to_vec().into() }
}

/// Page tables that map every block of every region to itself.
///
/// # Errors
/// [`BootError::OutOfReach`].
pub(crate) fn page_tables(layout: &GuestLayout) -> Result<Piece, BootError> {
    let mut directories: Vec<(u64, [u64; 512])> = Vec::new();
    for region in layout.regions() {
        for offset in (0..region.bytes.0).step_by(BLOCK_SIZE) {
            let at = region.start.0 + offset;
            let out_of_reach = BootError::OutOfReach { at: Gpa(at) };
            let gib = at / GIB;
            if directories.last().is_none_or(|(last, _)| *last != gib) {
                if directories.len() == DIRECTORIES_MAX || gib >= 512 {
                    return Err(out_of_reach);
                }
                directories.push((gib, [0; 512]));
            }
            let slot = usize::try_from(at % GIB / BLOCK_SIZE as u64).map_err(|_| out_of_reach)?;
            if let Some((_, directory)) = directories.last_mut() {
                directory[slot] = at | BLOCK;
            }
        }
    }
    let mut upper = [[0u64; 512]; 2];
    upper[0][0] = (TABLES + abi::PAGE_SIZE) | TABLE;
    let mut bytes = Vec::with_capacity((2 + directories.len()) * PAGE_SIZE);
    let mut table = TABLES + 2 * abi::PAGE_SIZE;
    for (gib, _) in &directories {
        // Below 512, checked above.
        if let Some(entry) = usize::try_from(*gib).ok().and_then(|gib| upper[1].get_mut(gib)) {
            *entry = table | TABLE;
        }
        table += abi::PAGE_SIZE;
    }
    bytes.extend_from_slice(upper.as_bytes());
    for (_, directory) in &directories {
        bytes.extend_from_slice(directory.as_bytes());
    }
    Ok(Piece { start: Gpa(TABLES), bytes: bytes.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_core::layout::Region;
    use plimsoll_types::ByteCount;

    fn layout(regions: &[(u64, u64)]) -> GuestLayout {
        let region = |(start, bytes): &(u64, u64)| Region { start: Gpa(*start), bytes: ByteCount(*bytes) };
        GuestLayout::new(regions.iter().map(region).collect()).unwrap()
    }

    /// What the tables translate `address` to, walked as the processor would.
    fn walk(piece: &Piece, address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - TABLES + index * 8).unwrap();
            u64::from_le_bytes(*piece.bytes[at..].first_chunk().unwrap())
        };
        let mut table = TABLES;
        for shift in [39, 30] {
            let found = entry(table, address >> shift & 511);
            if found & 7 != 7 {
                return None;
            }
            table = found & !0xfff;
        }
        let found = entry(table, address >> 21 & 511);
        (found & 0x87 == 0x87).then(|| (found & !(BLOCK_SIZE as u64 - 1)) + address % BLOCK_SIZE as u64)
    }

    #[test]
    fn every_region_maps_to_itself_and_nothing_else_is_mapped() {
        let piece = page_tables(&layout(&[(0, 3 * GIB), (4 * GIB, 2 * GIB + (2 << 20))])).unwrap();
        for address in [0, 0x20_0123, 3 * GIB - 1, 4 * GIB, 6 * GIB + (2 << 20) - 1] {
            assert_eq!(walk(&piece, address), Some(address), "{address:#x}");
        }
        for address in [3 * GIB, 4 * GIB - 1, 6 * GIB + (2 << 20), 1 << 38] {
            assert_eq!(walk(&piece, address), None, "{address:#x}");
        }
    }

    #[test]
    fn memory_out_of_reach_of_the_tables_is_refused_at_its_first_block() {
        let full = layout(&[(0, DIRECTORIES_MAX as u64 * GIB)]);
        assert!(page_tables(&full).unwrap().bytes.len() as u64 <= abi::PAGE_TABLES_END - TABLES);
        let more = layout(&[(0, (DIRECTORIES_MAX as u64 + 1) * GIB)]);
        let at = Gpa(DIRECTORIES_MAX as u64 * GIB);
        assert_eq!(page_tables(&more).unwrap_err(), BootError::OutOfReach { at });
        let high = layout(&[(0, GIB), (512 * GIB, GIB)]);
        assert_eq!(page_tables(&high).unwrap_err(), BootError::OutOfReach { at: Gpa(512 * GIB) });
    }

    #[test]
    fn the_built_in_image_is_loadable() {
        let (entry, pieces) = image().unwrap();
        assert!((abi::IMAGE_GPA..abi::IMAGE_END).contains(&entry.0));
        assert!(pieces.iter().any(|piece| !piece.bytes.is_empty()));
    }
}
