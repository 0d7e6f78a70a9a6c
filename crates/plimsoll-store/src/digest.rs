//! What a page is, seen without the store: zero, one word repeated, or 128 bits of hash.
//!
//! A digest only says where to look: the store compares bytes before it shares anything.
use plimsoll_types::{PAGE_SIZE, PageBytes};
use xxhash_rust::xxh3::xxh3_128;

/// Bytes of the word that a same-filled page repeats.
const WORD_SIZE: usize = 8;

/// What [`digest`] found a page to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Digest {
    /// Every byte is zero: not for the store.
    Zero,
    /// One word (little endian), which is not zero, fills the page.
    Same(u64),
    /// Anything else, by its xxh3-128.
    Hashed(u128),
}

/// Looks at a page: about 120 ns for the fill test, which usually ends at the second word, and 160 ns to hash.
pub fn digest(page: &PageBytes) -> Digest {
    let mut first = [0; WORD_SIZE];
    first.copy_from_slice(&page[..WORD_SIZE]);
    let word = u64::from_le_bytes(first);
    if !is_filled(page, word) {
        Digest::Hashed(xxh3_128(page))
    } else if word == 0 {
        Digest::Zero
    } else {
        Digest::Same(word)
    }
}

/// True when `word` fills the page.
pub(crate) fn is_filled(page: &PageBytes, word: u64) -> bool {
    // Eight words at a time, which compilers turn into wide instructions.
    let (lines, _) = page.as_chunks::<{ 8 * WORD_SIZE }>();
    lines.iter().all(|line| {
        let (words, _) = line.as_chunks();
        words.iter().fold(0, |differences, found| differences | (u64::from_le_bytes(*found) ^ word)) == 0
    })
}

/// Fills the page with `word`.
pub(crate) fn fill(page: &mut PageBytes, word: u64) {
    let word = word.to_le_bytes();
    for chunk in page.chunks_exact_mut(WORD_SIZE) {
        chunk.copy_from_slice(&word);
    }
}

const _: () = assert!(PAGE_SIZE.is_multiple_of(WORD_SIZE));

/// The 96 bits of a hash that a record keeps, in the two parts it keeps them in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    /// Bits 0 to 63: finds the page in the index.
    pub(crate) key: u64,
    /// Bits 64 to 95: checks it.
    pub(crate) check: u32,
}

impl Fingerprint {
    pub(crate) const fn of_hash(hash: u128) -> Self {
        let bytes = hash.to_le_bytes();
        let [k0, k1, k2, k3, k4, k5, k6, k7, c0, c1, c2, c3, ..] = bytes;
        Self {
            key: u64::from_le_bytes([k0, k1, k2, k3, k4, k5, k6, k7]),
            check: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }

    /// Of a page that is not same-filled.
    pub(crate) fn of_page(page: &PageBytes) -> Self {
        Self::of_hash(xxh3_128(page))
    }

    /// Of a same-filled page: its word's, so that 8 bytes are hashed and not 4,096.
    pub(crate) fn of_word(word: u64) -> Self {
        Self::of_hash(xxh3_128(&word.to_le_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_told_apart_by_what_fills_them() {
        let mut page = [0; PAGE_SIZE];
        assert_eq!(digest(&page), Digest::Zero);
        fill(&mut page, 0x0102_0304_0506_0708);
        assert_eq!(digest(&page), Digest::Same(0x0102_0304_0506_0708));
        page[PAGE_SIZE - 1] ^= 1;
        assert!(matches!(digest(&page), Digest::Hashed(_)));
        page.fill(0);
        page[PAGE_SIZE - 1] = 1;
        assert!(matches!(digest(&page), Digest::Hashed(_)));
    }
}
