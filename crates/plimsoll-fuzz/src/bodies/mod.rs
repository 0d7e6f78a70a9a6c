//! The bodies, by what they read. Each file: a function that reads bytes, and one that makes what is right.
pub(crate) mod disk;
pub(crate) mod frames;
pub(crate) mod http;
pub(crate) mod keeper;
pub(crate) mod monitor;
pub(crate) mod notes;
pub(crate) mod records;
pub(crate) mod settings;
mod stages;
pub(crate) mod tables;
pub(crate) mod walks;
pub(crate) mod wire;
pub(crate) mod words;

use plimsoll_mmu::{Output, TableMemory};
use std::cell::Cell;
use std::convert::Infallible;

/// Bytes as text, as they come from another process.
fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// The bytes as words, the last one filled up with zeros.
fn words_of(bytes: &[u8]) -> Vec<u64> {
    let word = |chunk: &[u8]| {
        let mut bytes = [0; 8];
        bytes[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(bytes)
    };
    bytes.chunks(8).map(word).collect()
}

/// Memory in which every address is: the words given come again and again. So tables made of few bytes lead anywhere, also in circles.
struct Everywhere {
    words: Vec<u64>,
    reads: Cell<u64>,
}

impl Everywhere {
    /// `None` where there are none.
    fn new(words: Vec<u64>) -> Option<Self> {
        (!words.is_empty()).then(|| Self { words, reads: Cell::new(0) })
    }

    fn at(&self, address: u64) -> u64 {
        let place = (address / 8) % self.words.len() as u64;
        usize::try_from(place).map_or(0, |place| self.words[place])
    }
}

impl TableMemory for Everywhere {
    type Error = Infallible;

    fn read(&self, at: Output) -> Result<u64, Infallible> {
        assert!(at.0.is_multiple_of(8), "an entry at {at} is not aligned");
        self.reads.set(self.reads.get() + 1);
        Ok(self.at(at.0))
    }

    fn compare_exchange(&self, at: Output, _: u64, _: u64) -> Result<u64, Infallible> {
        panic!("a walk that leaves no marks has written at {at}");
    }
}
