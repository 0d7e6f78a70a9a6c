//! Pages that grew cold, in fewer bytes: a slower codec of the caller's, and why no page is lost to it.
//!
//! An object that was fetched enters; fewer bytes that have been proven to be its page leave, for
//! [`Store::replace`](crate::Store::replace). All of it happens without the store. What must never happen: bytes reach
//! the store that the codec itself does not turn back into the page.
use crate::{
    class::SizeClass,
    error::GetError,
    fetch::{Fetched, Found},
};
use alloc::boxed::Box;
use core::fmt;
use plimsoll_types::{PAGE_SIZE, PageBytes};

/// A codec denser and slower than lz4, on Linux zstd. What it writes outlives the manager, so a later version must read
/// what an earlier one wrote.
///
/// Nothing is believed of it: what it compresses is decompressed and compared before anything is replaced, and what it
/// decompresses is checked against the hash.
pub trait DenseCodec {
    /// Compresses a page to the front of `into`, which is an eighth longer than a page; how many bytes that took.
    ///
    /// # Errors
    /// [`DenseError`] where it cannot; the page then stays as it is stored.
    fn compress(&mut self, page: &PageBytes, into: &mut [u8]) -> Result<usize, DenseError>;

    /// The page again. The bytes may be anything.
    ///
    /// # Errors
    /// [`DenseError`] where they are not one page; `page` may then hold anything.
    fn decompress(&mut self, bytes: &[u8], page: &mut PageBytes) -> Result<(), DenseError>;
}

/// A dense codec could not do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseError;

impl fmt::Display for DenseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the dense codec failed")
    }
}

impl core::error::Error for DenseError {}

/// No dense codec: compresses nothing, and takes what one left for damage.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDense;

impl DenseCodec for NoDense {
    fn compress(&mut self, _: &PageBytes, _: &mut [u8]) -> Result<usize, DenseError> {
        Err(DenseError)
    }

    fn decompress(&mut self, _: &[u8], _: &mut PageBytes) -> Result<(), DenseError> {
        Err(DenseError)
    }
}

/// Why an object stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PackError {
    /// It cannot be read.
    Unreadable(GetError),
    /// The codec failed, or does not save a size class: the slot would be as large.
    NotSmaller,
    /// What the codec wrote is not what it was given: do not use it any more.
    Unfaithful,
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreadable(_) => "the object cannot be read",
            Self::NotSmaller => "the dense codec saves no size class",
            Self::Unfaithful => "the dense codec does not give back what it was given: use it no more",
        })
    }
}

impl core::error::Error for PackError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Unreadable(source) => Some(source),
            Self::NotSmaller | Self::Unfaithful => None,
        }
    }
}

/// Room for what becomes longer by compressing: codecs refuse, or are slower, where they might run out of it.
const ROOM: usize = PAGE_SIZE + PAGE_SIZE / 8;

/// Compresses fetched objects densely, one thread's worth of buffers.
pub struct Packer {
    page: Box<PageBytes>,
    again: Box<PageBytes>,
    bytes: Box<[u8; ROOM]>,
}

/// Bytes that are an object's page and save at least a size class. Only [`Packer::pack`] makes them, after it has
/// decompressed and compared them.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    pub(crate) found: Found,
    pub(crate) bytes: &'a [u8],
}

impl Packer {
    /// A packer with its buffers.
    pub fn new() -> Self {
        Self { page: Box::new([0; PAGE_SIZE]), again: Box::new([0; PAGE_SIZE]), bytes: Box::new([0; ROOM]) }
    }

    /// Compresses an object's page and proves that it comes back. This is what takes the time (about 25 us with zstd 3):
    /// not for under the store's lock.
    ///
    /// # Errors
    /// [`PackError`]: the object is to stay as it is.
    pub fn pack(&mut self, fetched: &Fetched, dense: &mut dyn DenseCodec) -> Result<Packed<'_>, PackError> {
        fetched.unpack(&mut self.page, dense).map_err(PackError::Unreadable)?;
        let found = fetched.found().ok_or(PackError::NotSmaller)?;
        let compressed = dense.compress(&self.page, self.bytes.as_mut_slice());
        let length = compressed.map_err(|DenseError| PackError::NotSmaller)?;
        let bytes = self.bytes.get(..length).ok_or(PackError::Unfaithful)?;
        let Some(class) = SizeClass::holding(length) else {
            return Err(if length == 0 { PackError::Unfaithful } else { PackError::NotSmaller });
        };
        if SizeClass::holding(fetched.bytes().len()).is_none_or(|present| class >= present) {
            return Err(PackError::NotSmaller);
        }
        // No byte of the page may be right only because it was there before.
        for (byte, original) in self.again.iter_mut().zip(self.page.iter()) {
            *byte = !original;
        }
        let decompressed = dense.decompress(bytes, &mut self.again);
        if decompressed.is_err() || self.again != self.page {
            return Err(PackError::Unfaithful);
        }
        Ok(Packed { found, bytes })
    }
}

impl Default for Packer {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl fmt::Debug for Packed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({} bytes)", self.bytes.len())
    }
}
