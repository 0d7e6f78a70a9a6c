//! zstd as the store's dense codec: for pages that have been cold for a while.
//!
//! Enters: pages, and bytes that may be anything. Leaves: frames without the four bytes of magic and without a length,
//! which every page has alike; and pages. What must never happen: memory allocated by the size that bytes claim.
use parking_lot::Mutex;
use plimsoll_store::{DenseCodec, DenseError};
use plimsoll_types::{PAGE_SIZE, PageBytes};
use std::sync::Arc;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, DParameter, FrameFormat};

/// Measured on the pages of code and text of the benchmark: level 1 takes 20 us a page to 0.439 of its size, 3 takes 23 us
/// to 0.427, 5 takes 54 us to 0.416.
const LEVEL: i32 = 3;

/// Compresses and decompresses pages, one thread's worth of contexts.
pub struct Zstd {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
}

impl Zstd {
    /// Contexts for pages.
    ///
    /// # Errors
    /// [`std::io::Error`] when zstd has no memory for them.
    pub fn new() -> std::io::Result<Self> {
        let mut compressor = Compressor::new(LEVEL)?;
        compressor.set_parameter(CParameter::Format(FrameFormat::Magicless))?;
        compressor.include_contentsize(false)?;
        compressor.include_checksum(false)?;
        Ok(Self { compressor, decompressor: decompressor()? })
    }
}

fn decompressor() -> std::io::Result<Decompressor<'static>> {
    let mut decompressor = Decompressor::new()?;
    decompressor.set_parameter(DParameter::Format(FrameFormat::Magicless))?;
    Ok(decompressor)
}

fn decompress(
    decompressor: &mut Decompressor<'static>,
    bytes: &[u8],
    page: &mut PageBytes,
) -> Result<(), DenseError> {
    match decompressor.decompress_to_buffer(bytes, page.as_mut_slice()) {
        Ok(PAGE_SIZE) => Ok(()),
        _ => Err(DenseError),
    }
}

impl DenseCodec for Zstd {
    fn compress(&mut self, page: &PageBytes, into: &mut [u8]) -> Result<usize, DenseError> {
        self.compressor.compress_to_buffer(page, into).map_err(|_| DenseError)
    }

    fn decompress(&mut self, bytes: &[u8], page: &mut PageBytes) -> Result<(), DenseError> {
        decompress(&mut self.decompressor, bytes, page)
    }
}

/// Contexts that the pagers of a thousand machines share: as many as there are processors to use them. They are made before there
/// is any machine: that there is no memory for one must not look like a page that is damaged.
#[derive(Clone)]
pub struct Unpackers(Arc<[Mutex<Decompressor<'static>>]>);

impl Unpackers {
    /// One for each processor.
    ///
    /// # Errors
    /// [`std::io::Error`] when zstd has no memory for them.
    pub fn new() -> std::io::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        (0..processors).map(|_| decompressor().map(Mutex::new)).collect::<Result<_, _>>().map(Self)
    }
}

impl DenseCodec for Unpackers {
    /// Pagers do not.
    fn compress(&mut self, _: &PageBytes, _: &mut [u8]) -> Result<usize, DenseError> {
        Err(DenseError)
    }

    fn decompress(&mut self, bytes: &[u8], page: &mut PageBytes) -> Result<(), DenseError> {
        let free = self.0.iter().find_map(|one| one.try_lock());
        let Some(mut one) = free.or_else(|| self.0.first().map(|first| first.lock())) else {
            return Err(DenseError);
        };
        decompress(&mut one, bytes, page)
    }
}

impl std::fmt::Debug for Unpackers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpackers").field("count", &self.0.len()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Zstd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Zstd").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> PageBytes {
        let mut page = [0; PAGE_SIZE];
        for (place, byte) in page.iter_mut().enumerate() {
            *byte = b"the quick brown fox "[place % 20] ^ u8::try_from(place / 700).unwrap();
        }
        page
    }

    #[test]
    fn pages_come_back_from_few_bytes() {
        let mut zstd = Zstd::new().unwrap();
        let (mut bytes, mut page) = ([0; PAGE_SIZE], [7; PAGE_SIZE]);
        for _ in 0..3 {
            let length = zstd.compress(&text(), &mut bytes).unwrap();
            assert!(length < PAGE_SIZE / 8, "{length}");
            zstd.decompress(&bytes[..length], &mut page).unwrap();
            assert_eq!(page, text());
        }
    }

    #[test]
    fn more_threads_than_there_are_processors_unpack_at_once() {
        let (mut zstd, unpackers) = (Zstd::new().unwrap(), Unpackers::new().unwrap());
        let mut bytes = [0; PAGE_SIZE];
        let length = zstd.compress(&text(), &mut bytes).unwrap();
        std::thread::scope(|threads| {
            for _ in 0..4 * unpackers.0.len() {
                let (mut mine, bytes) = (unpackers.clone(), &bytes[..length]);
                threads.spawn(move || {
                    for _ in 0..200 {
                        let mut page = [7; PAGE_SIZE];
                        mine.decompress(bytes, &mut page).unwrap();
                        assert_eq!(page, text());
                        assert_eq!(mine.decompress(&[0xff; 64], &mut page), Err(DenseError));
                    }
                });
            }
        });
    }

    #[test]
    fn what_is_no_page_is_refused_and_the_next_page_is_not_harmed() {
        let mut zstd = Zstd::new().unwrap();
        let (mut bytes, mut page) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
        let length = zstd.compress(&text(), &mut bytes).unwrap();
        for cut in 0..length {
            assert_eq!(zstd.decompress(&bytes[..cut], &mut page), Err(DenseError), "cut at {cut}");
        }
        assert_eq!(zstd.compress(&text(), &mut [0; 20]), Err(DenseError), "no room");
        assert_eq!(zstd.decompress(&[0xff; 64], &mut page), Err(DenseError));
        let length = zstd.compress(&text(), &mut bytes).unwrap();
        zstd.decompress(&bytes[..length], &mut page).unwrap();
        assert_eq!(page, text());
    }
}
