//! The pages of one block as a set of 512 bits, so that what is done to pages is done to 64 at a time.
use core::ops::{BitAnd, BitOr, Range, Sub};
use plimsoll_types::{BLOCK_PAGES, PageIndex};

/// Pages in a word.
const WORD: u32 = u64::BITS;
const WORDS: usize = 8;
const _: () = assert!(WORD * 8 == BLOCK_PAGES);

/// Pages of one block, each named by its place in it, 0 to 511. Places past the block are in no set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PageSet([u64; WORDS]);

impl PageSet {
    /// No page.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// The places of the range.
    pub fn from_range(places: Range<u32>) -> Self {
        let mut set = Self::EMPTY;
        for (first, word) in (0..).step_by(WORD as usize).zip(&mut set.0) {
            let from = places.start.saturating_sub(first).min(WORD);
            let until = places.end.saturating_sub(first).min(WORD);
            if from < until {
                *word = u64::MAX >> (WORD - (until - from)) << from;
            }
        }
        set
    }

    /// The same 64 places in each eighth of the block.
    pub(super) const fn repeated(word: u64) -> Self {
        Self([word; WORDS])
    }

    /// The page alone.
    pub fn only(page: PageIndex) -> Self {
        let place = page.in_block();
        Self::from_range(place..place + 1)
    }

    /// How many pages are in it.
    pub fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// True when no page is.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// True when the page is in it.
    pub fn contains(&self, page: PageIndex) -> bool {
        !(*self & Self::only(page)).is_empty()
    }

    /// Consecutive places, ascending.
    pub fn runs(self) -> impl Iterator<Item = Range<u32>> {
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = self.seek(at, |word| word)?;
            at = self.seek(start, |word| !word).unwrap_or(BLOCK_PAGES);
            Some(start..at)
        })
    }

    /// The first place from `from` on whose bit is set in what `view` makes of its word.
    fn seek(&self, from: u32, view: impl Fn(u64) -> u64) -> Option<u32> {
        let words = (0..).step_by(WORD as usize).zip(&self.0);
        words.skip((from / WORD) as usize).find_map(|(first, word)| {
            let skipped = from.saturating_sub(first);
            let left = view(*word) >> skipped << skipped;
            (left != 0).then(|| first + left.trailing_zeros())
        })
    }

    fn zip(self, other: Self, join: impl Fn(u64, u64) -> u64) -> Self {
        let mut set = self;
        set.0.iter_mut().zip(other.0).for_each(|(word, other)| *word = join(*word, other));
        set
    }
}

impl BitAnd for PageSet {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        self.zip(other, |word, other| word & other)
    }
}

impl BitOr for PageSet {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        self.zip(other, |word, other| word | other)
    }
}

/// The pages of the first set that are not in the second.
impl Sub for PageSet {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self.zip(other, |word, other| word & !other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn a_set_gives_back_the_runs_it_was_made_of() {
        let lists: [&[(u32, u32)]; 5] =
            [&[], &[(0, 1)], &[(0, 512)], &[(63, 65), (66, 67), (511, 512)], &[(1, 64), (128, 200)]];
        for runs in lists {
            let runs: Vec<Range<u32>> = runs.iter().map(|(start, end)| *start..*end).collect();
            let set = runs.iter().cloned().fold(PageSet::EMPTY, |set, run| set | PageSet::from_range(run));
            assert_eq!(set.runs().collect::<Vec<_>>(), runs);
            assert_eq!(set.len(), runs.iter().map(|run| run.end - run.start).sum::<u32>());
            assert_eq!(set.is_empty(), runs.is_empty());
            let rest = PageSet::from_range(0..512) - set;
            assert!((rest & set).is_empty() && rest | set == PageSet::from_range(0..512));
        }
        assert_eq!(PageSet::from_range(500..700).len(), 12, "places past the block are in no set");
    }
}
