//! What can go wrong with an object, and whose fault it is.
use crate::{memory::SlabsExhausted, record::Handle};
use core::fmt;

/// How an object was found to be damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Damage {
    /// The record names a place, a length or an encoding that cannot be.
    Record,
    /// The stored bytes do not decode to one page.
    Encoding,
    /// The page decodes, but is not the page that was stored.
    Checksum,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Record => "its record names an impossible place or encoding",
            Self::Encoding => "its bytes do not decode to a page",
            Self::Checksum => "its checksum does not match",
        })
    }
}

/// Why a page could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GetError {
    /// The handle names no object that is alive: the caller's fault, or damage to the record's generation.
    Stale {
        /// The handle as given.
        handle: Handle,
    },
    /// The object's memory was damaged: poison the page.
    Corrupt {
        /// The handle as given.
        handle: Handle,
        /// What gave it away.
        damage: Damage,
    },
    /// The object's bytes lie outside of the store: fetch them, see [`Store::fetch`](crate::Store::fetch).
    Away {
        /// The handle as given.
        handle: Handle,
    },
    /// The buffer holds no object: the caller's fault.
    Nothing,
}

impl fmt::Display for GetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stale { handle } => write!(f, "{handle} names no stored page"),
            Self::Corrupt { handle, damage } => write!(f, "{handle} is corrupt: {damage}; poison the page"),
            Self::Away { handle } => write!(f, "{handle} lies outside of the store: fetch its bytes first"),
            Self::Nothing => f.write_str("nothing was fetched: fetch an object first"),
        }
    }
}

impl core::error::Error for GetError {}

/// Why the store could not be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreError {
    /// No memory is left; nothing was changed.
    Exhausted,
    /// An all-zero page was offered. Zero pages are not stored: the caller has a state for them.
    ZeroPage,
    /// The digest says the page is one word repeated and it is not, or the encoding was made for another digest;
    /// nothing was changed.
    WrongDigest,
    /// The handle names no object that is alive; nothing was changed.
    Stale {
        /// The handle as given.
        handle: Handle,
    },
    /// The object's record was damaged. It is freed, and other handles of it are stale now; the slot that held
    /// its data stays taken until the next recovery.
    Corrupt {
        /// The handle as given.
        handle: Handle,
    },
}

impl From<SlabsExhausted> for StoreError {
    fn from(SlabsExhausted: SlabsExhausted) -> Self {
        Self::Exhausted
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exhausted => fmt::Display::fmt(&SlabsExhausted, f),
            Self::ZeroPage => f.write_str("a zero page was offered: keep it as a state, not as an object"),
            Self::WrongDigest => f.write_str("the digest is not of this page: digest the page again"),
            Self::Stale { handle } => write!(f, "{handle} names no stored page"),
            Self::Corrupt { handle } => {
                write!(f, "{handle} was released, but its slot is lost to a damaged record until recovery")
            }
        }
    }
}

impl core::error::Error for StoreError {}
