//! Why a tier could not be had, or something in it not written or read.
//!
//! What an error must never be: a reason to believe that something is on the disk, or that it is gone from where it was.
use super::table::TableError;
use plimsoll_types::{ByteCount, DomainId};
use std::io;
use thiserror::Error;

/// A tier could not be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TierError {
    /// It would be too small.
    #[error("a disk tier of {limit} is too small: give it {least} or more")]
    TooSmall {
        /// What was asked for.
        limit: ByteCount,
        /// What there must be.
        least: ByteCount,
    },
    /// It would be larger than records can name.
    #[error("a disk tier of {limit} is too large: it can have at most {most}")]
    TooLarge {
        /// What was asked for.
        limit: ByteCount,
        /// What can be had.
        most: ByteCount,
    },
    /// The disk has no room for the reserve.
    #[error("the disk has no room for the {reserve} that the tier needs to begin with")]
    Reserve {
        /// How much.
        reserve: ByteCount,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// What outlives the manager could not be had.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// Why something was not written. What was to be written is where it was before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The tier is as large as it may be.
    #[error("the disk tier is full: it has used {limit}")]
    Full {
        /// What it may use.
        limit: ByteCount,
    },
    /// The file system has no room.
    #[error("the disk has no room left")]
    NoSpace(#[source] io::Error),
    /// The disk refused in every place that was tried.
    #[error("the disk cannot be written")]
    Failed(#[source] io::Error),
    /// It is being left alone after one of the above.
    #[error("the disk is left alone for a while")]
    Resting,
    /// The domain has what it may have.
    #[error("{domain} has used its part of the disk tier, {quota}")]
    Quota {
        /// Whose pages.
        domain: DomainId,
        /// What it may have.
        quota: ByteCount,
    },
    /// The tier has ended, and its key is gone.
    #[error("the disk tier has ended")]
    Over,
    /// The draft has no room for it.
    #[error("the segment is complete")]
    Complete,
}

/// Why something could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Nothing is there: the record names no place of this tier, or its bytes have moved since.
    #[error("nothing is at its place on the disk")]
    Nothing,
    /// The disk failed.
    #[error("the disk cannot be read at {offset:#x}")]
    Failed {
        /// Where.
        offset: u64,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The bytes are not what was written.
    #[error("what the disk has at {offset:#x} is not what was written there")]
    Damaged {
        /// Where.
        offset: u64,
    },
}
