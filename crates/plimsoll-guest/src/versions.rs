//! The version word of a page: which contents it must have, with proof that the word itself is right.
//!
//! The words lie in guest memory and are paged like everything else. Were a bare number enough, memory that
//! comes back as zeros would be consistent with itself: version 0, page all zero. So each word carries a tag
//! made from the page's number and the machine's seed, and no valid word is zero. What must never happen: a
//! version used twice for one page, because then an old copy of the page would pass; giving a page back keeps
//! its count.
//!
//! ```text
//! bits  0..31  version, counts the writes of this page
//! bit  31      given back since the last write: the page must be all zero
//! bits 32..64  tag, never 0
//! ```
use crate::random::hash3;

const DISCARDED: u32 = 1 << 31;
const TAG_SALT: u64 = 0x7665_7273_696f_6e73;

/// Which contents a page must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState {
    writes: u32,
    discarded: bool,
}

impl PageState {
    /// Written for the first time.
    pub const FIRST: Self = Self { writes: 1, discarded: false };

    /// The version that [`Content::fill`](crate::content::Content::fill) wants.
    #[inline]
    pub const fn version(self) -> u32 {
        if self.discarded { 0 } else { self.writes }
    }

    /// The state after the next write. After 2^31 - 1 writes the count starts over at 1.
    #[inline]
    #[must_use]
    pub const fn written(self) -> Self {
        let next = (self.writes + 1) % DISCARDED;
        Self { writes: if next == 0 { 1 } else { next }, discarded: false }
    }

    /// The state after the page was given back.
    #[inline]
    #[must_use]
    pub const fn given_back(self) -> Self {
        Self { writes: self.writes, discarded: true }
    }

    /// The word to keep in memory for this state of this page.
    #[inline]
    pub const fn encode(self, seed: u64, page: u64) -> u64 {
        let low = self.writes | if self.discarded { DISCARDED } else { 0 };
        let tag = hash3(seed ^ TAG_SALT, page, low as u64) | 1 << 32;
        tag & 0xffff_ffff_0000_0000 | low as u64
    }

    /// The state that a word found in memory means.
    ///
    /// # Errors
    ///
    /// A word that this page never had. The error holds the state its low half alleges and the word that
    /// would belong to that: the best that can be said about what it should have been.
    #[inline]
    pub const fn decode(word: u64, seed: u64, page: u64) -> Result<Self, WrongVersion> {
        let low = (word & 0xffff_ffff) as u32;
        let alleged = Self { writes: low & !DISCARDED, discarded: low & DISCARDED != 0 };
        let expected = alleged.encode(seed, page);
        if word == expected { Ok(alleged) } else { Err(WrongVersion { alleged, expected }) }
    }
}

/// A version word that its page never had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongVersion {
    /// The state that the word's low half alleges.
    pub alleged: PageState,
    /// The word that would belong to it.
    pub expected: u64,
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn a_word_means_its_state_for_its_own_page_only() {
        let state = PageState::FIRST.written().given_back();
        let word = state.encode(5, 70);
        assert_eq!(PageState::decode(word, 5, 70), Ok(state));
        assert!(PageState::decode(word, 5, 71).is_err());
        assert!(PageState::decode(word, 6, 70).is_err());
    }

    #[test]
    fn every_flipped_bit_and_a_zero_word_are_noticed() {
        let word = PageState::FIRST.encode(1, 2);
        for bit in 0..64 {
            assert!(PageState::decode(word ^ 1 << bit, 1, 2).is_err(), "bit {bit}");
        }
        for page in 0..10_000 {
            assert!(PageState::decode(0, 1, page).is_err(), "page {page}");
        }
    }

    #[test]
    fn giving_a_page_back_does_not_start_its_versions_over() {
        let twice = PageState::FIRST.written();
        assert_eq!(twice.given_back().version(), 0);
        assert_eq!(twice.given_back().written().version(), 3);
    }
}
