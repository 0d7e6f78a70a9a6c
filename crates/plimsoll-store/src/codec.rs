//! A page as it is stored: lz4, or raw where lz4 does not take it below three quarters.
//!
//! A page enters and bytes leave, and back. Nothing is allocated per page, and no bytes, however bad, do more
//! than fail to decode. What a dense codec makes of pages that grew cold is `dense`'s business; here its bytes are
//! one more kind.
use crate::{dense::DenseCodec, digest::Digest, lz4::Lz4, similar::Sketch};
use core::fmt;
use lz4_flex::block::decompress_into;
use plimsoll_types::{PAGE_SIZE, PageBytes};

/// How an object's page is kept. Two bits of its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Codec {
    /// What the caller's [`DenseCodec`] made of it.
    Dense,
    /// A word in the record, no data.
    Same,
    /// One lz4 block.
    Lz4,
    /// As it is.
    Raw,
}

impl Codec {
    pub(crate) const fn to_bits(self) -> u64 {
        match self {
            Self::Dense => 0,
            Self::Same => 1,
            Self::Lz4 => 2,
            Self::Raw => 3,
        }
    }

    /// The codec that the two lowest bits mean.
    pub(crate) const fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Dense,
            1 => Self::Same,
            2 => Self::Lz4,
            _ => Self::Raw,
        }
    }
}

/// Compresses pages, one thread's worth: the hash table and the output buffer are made once.
pub struct Encoder(Lz4);

/// A page ready for [`Store::insert`](crate::Store::insert).
#[derive(Clone, Copy)]
pub struct Encoded<'a> {
    codec: Codec,
    bytes: &'a [u8],
    sketch: Sketch,
}

impl Encoder {
    /// An encoder with its buffers.
    pub fn new() -> Self {
        Self(Lz4::new())
    }

    /// Compresses `page`, or gives it back raw where that is not worth it. Of pages that are one word repeated
    /// the digest says all there is to say, and nothing is done.
    pub fn encode<'a>(&'a mut self, page: &'a PageBytes, digest: &Digest) -> Encoded<'a> {
        if !matches!(digest, Digest::Hashed(_)) {
            return Encoded { codec: Codec::Same, bytes: &[], sketch: Sketch::default() };
        }
        let sketch = Sketch::of(page);
        match self.0.encode(page) {
            Some(bytes) => Encoded { codec: Codec::Lz4, bytes, sketch },
            None => Encoded { codec: Codec::Raw, bytes: page, sketch },
        }
    }
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl<'a> Encoded<'a> {
    pub(crate) const fn codec(&self) -> Codec {
        self.codec
    }

    pub(crate) const fn sketch(&self) -> Sketch {
        self.sketch
    }

    /// The bytes to be stored; none of a page that is one word repeated.
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// True when lz4 was not worth it.
    pub fn is_raw(&self) -> bool {
        self.codec == Codec::Raw
    }
}

impl fmt::Debug for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Encoded({:?}, {} bytes)", self.codec, self.bytes.len())
    }
}

/// Stored bytes that are not a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotAPage;

/// Decodes stored bytes into `page`, whose contents are arbitrary where this fails.
pub(crate) fn decode(
    codec: Codec,
    bytes: &[u8],
    page: &mut PageBytes,
    dense: &mut dyn DenseCodec,
) -> Result<(), NotAPage> {
    match codec {
        Codec::Same => Err(NotAPage),
        Codec::Raw => {
            *page = bytes.try_into().map_err(|_| NotAPage)?;
            Ok(())
        }
        Codec::Lz4 => match decompress_into(bytes, page) {
            Ok(PAGE_SIZE) => Ok(()),
            _ => Err(NotAPage),
        },
        Codec::Dense => dense.decompress(bytes, page).map_err(|_| NotAPage),
    }
}
