//! A set of a machine's pages: one bit a page, and how many there are.
use alloc::{vec, vec::Vec};
use core::ops::Range;
use plimsoll_types::PageIndex;

/// Pages in a word.
const WORD: u32 = u64::BITS;

/// A set of pages. Pages past the machine's last are in no set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bits {
    words: Vec<u64>,
    len: u32,
}

impl Bits {
    /// The empty set over a machine of `pages` pages.
    pub fn new(pages: u32) -> Self {
        Self { words: vec![0; pages.div_ceil(WORD) as usize], len: 0 }
    }

    /// How many pages are in it.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u64>()
    }

    /// Whether the page is in it.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.words.get((page.0 / WORD) as usize).is_some_and(|word| word >> (page.0 % WORD) & 1 == 1)
    }

    /// Puts the page in. True if it was not there.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        self.change(page, |word, bit| word | bit)
    }

    /// Takes the page out. True if it was there.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        self.change(page, |word, bit| word & !bit)
    }

    fn change(&mut self, page: PageIndex, after: impl Fn(u64, u64) -> u64) -> bool {
        let Some(word) = self.words.get_mut((page.0 / WORD) as usize) else { return false };
        let before = *word;
        *word = after(before, 1 << (page.0 % WORD));
        self.len = self.len - before.count_ones() + word.count_ones();
        *word != before
    }

    /// Takes a range out.
    pub(crate) fn remove_range(&mut self, pages: Range<u32>) {
        let words = (0..).step_by(WORD as usize).zip(&mut self.words);
        let skipped = (pages.start / WORD) as usize;
        for (first, word) in words.skip(skipped).take_while(|(first, _)| *first < pages.end) {
            let from = pages.start.saturating_sub(first);
            let until = (pages.end - first).min(WORD);
            if from < until {
                let before = word.count_ones();
                *word &= !(u64::MAX >> (WORD - (until - from)) << from);
                self.len -= before - word.count_ones();
            }
        }
    }

    /// The pages, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.words.iter().zip((0..).step_by(WORD as usize)).flat_map(|(word, first)| {
            let mut left = *word;
            core::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(PageIndex(first + bit))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_taken_out_and_nothing_beside_it() {
        for range in [0..1, 0..64, 63..65, 1..199, 64..128, 70..71, 150..4000, 5..5, 199..200, 300..400] {
            let mut bits = Bits::new(200);
            (0..200).for_each(|page| assert!(bits.insert(PageIndex(page))));
            bits.remove_range(range.clone());
            let kept: Vec<u32> = bits.iter().map(|page| page.0).collect();
            let expected: Vec<u32> = (0..200).filter(|page| !range.contains(page)).collect();
            assert_eq!(kept, expected, "{range:?}");
            assert_eq!(bits.len() as usize, kept.len());
        }
    }

    #[test]
    fn a_page_past_the_machine_is_in_no_set() {
        let mut bits = Bits::new(64);
        assert!(!bits.insert(PageIndex(64)) && !bits.contains(PageIndex(64)) && !bits.remove(PageIndex(64)));
        assert_eq!(bits.len(), 0);
    }
}
