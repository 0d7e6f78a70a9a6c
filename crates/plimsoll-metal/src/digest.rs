//! What a page of code is known by.
//!
//! Enters: a page. Leaves: its SHA-256, the same number that `sha256sum` says of a file with its 4096 bytes. A guest would gain much by
//! two pages with one digest, so it is no checksum. Read by both sides, as `wire` is.
use sha2::{Digest as _, Sha256};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in a page.
const PAGE: usize = 4096;

/// The SHA-256 of a page.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// That of a page.
    pub fn of(page: &[u8; PAGE]) -> Self {
        Self(Sha256::digest(page).into())
    }

    /// Those of a program's pages, the last filled up with zeros, as it lies in memory.
    pub fn of_program(program: &[u8]) -> impl Iterator<Item = Self> {
        program.chunks(PAGE).map(|part| {
            let mut page = [0; PAGE];
            page[..part.len()].copy_from_slice(part);
            Self::of(&page)
        })
    }
}
