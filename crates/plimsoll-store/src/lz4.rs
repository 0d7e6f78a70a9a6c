//! An lz4 encoder for pages that are taken while somebody waits for their memory: faster than lz4 usually is, for a little
//! density.
//!
//! A page enters, an lz4 block leaves that any lz4 decoder reads, or nothing where the block would be longer than a page may
//! be to be kept compressed. No input, however chosen, does more than compress badly.
//!
//! What lz4 spends its time on in 4 KiB of code and text is not looking for matches but changing its mind: each sequence of
//! literals and a match costs some mispredicted branches. A match of four bytes saves one byte, one of five saves two. So here a
//! match begins with **six equal bytes**, found by their hash. Measured on the benchmark's 4,935 pages of code and text, in
//! the same run (AMD EPYC; ns, bytes of a page that are freed where what does not come below three quarters stays raw):
//!
//! | encoder | compress | decompress | freed | sequences |
//! |---|---|---|---|---|
//! | lz4_flex 0.14, safe | 8,068 | 1,588 | 1,703 | 363 |
//! | the same with its large table, for matches of five bytes | 7,648 | 1,388 | 1,680 | 275 |
//! | lz4 1.10 in C | 7,045 | 1,608 | 1,711 | 368 |
//! | this one | 6,262 | 1,306 | 1,611 | 219 |
//!
//! With five bytes it took 6.7 us and freed 1,679 bytes; with seven 5.2 us, but then one page in twenty stays raw. What became
//! cold is packed densely anyway.
//!
//! The table is with lz4's own patience, 2^6 places. Half of that, as it is now, takes 2 % less time and frees 1 % less, and gives
//! a random page up after 0.58 us instead of 0.75; a quarter takes 9 % less and frees 5 % less, and one text page in a hundred stays raw.
//!
//! Compressing executes three and more instructions a cycle, so that each of them counts. While its patience lasts it does not compute
//! how far to go, a place is checked by one comparison, and literals are copied before it is asked whether there are any: the same blocks
//! by 40,000 instructions a page instead of 46,000, in 4.6 us instead of 5.2 (the quickest of 80 runs that alternated, pages of
//! `no-zero-no-duplicate`).
//!
//! # The block
//! ```text
//!  sequence  token: literals (15: more follow) in the high half, match length - 4 (15: more) in the low half
//!            more literals: 255 each, and a last byte below 255 | the literals
//!            offset of the match, back from here, 16 bits little endian | more match length, in the same way
//!  last      token, more literals, literals: no match
//! ```
//! The last five bytes are literals, and the last match begins twelve bytes before the end or earlier.
use crate::class::COMPRESSED_MAX;
use alloc::boxed::Box;
use plimsoll_types::{PAGE_SIZE, PageBytes};

/// Bytes that must be equal where a match begins.
const EQUAL: usize = 6;
const EQUAL_MASK: u64 = (1 << (8 * EQUAL)) - 1;
/// A match's length as it is written counts from this.
const LENGTH_MIN: usize = 4;
/// What half a token can say; more goes into bytes of its own.
const HALF: usize = 15;
/// No match begins here or later.
const MATCH_LIMIT: usize = PAGE_SIZE - 12;
/// No match reaches beyond this.
const MATCH_END: usize = PAGE_SIZE - 5;
const WORD: usize = size_of::<u64>();
/// Literals are copied so many at a time.
const STRIDE: usize = 16;
const HASH_BITS: u32 = 12;
/// After so many places without a match every second place is looked at, and so on.
const PATIENCE: usize = 32;
/// Room for the longest block and for what is written before it is known to be too long.
const ROOM: usize = PAGE_SIZE;

const _: () = assert!(PAGE_SIZE <= 1 << u16::BITS, "the table's entries are of 16 bits");
const _: () = assert!(COMPRESSED_MAX + 2 * (PAGE_SIZE / 255 + STRIDE) <= ROOM);

/// The table and the block, made once.
pub(crate) struct Lz4 {
    /// By hash, the last place that had it. Place 0 stands for none as well: what is there is compared in any case.
    places: Box<[u16; 1 << HASH_BITS]>,
    bytes: Box<[u8; ROOM]>,
}

/// What is written.
struct Block<'a> {
    bytes: &'a mut [u8; ROOM],
    length: usize,
}

/// A match: what begins at `at` began `distance` before it.
struct Match {
    at: usize,
    distance: usize,
    length: usize,
}

impl Lz4 {
    pub(crate) fn new() -> Self {
        Self { places: Box::new([0; 1 << HASH_BITS]), bytes: Box::new([0; ROOM]) }
    }

    /// The page as a block, unless that is longer than three quarters of the page.
    pub(crate) fn encode(&mut self, page: &PageBytes) -> Option<&[u8]> {
        self.places.fill(0);
        let mut block = Block { bytes: &mut self.bytes, length: 0 };
        // The end of the last match.
        let mut done = 0;
        // A match has something before it.
        let mut next = 1;
        while let Some((at, from)) = find(page, &mut self.places, next) {
            let found = Match::around(page, at, from, done);
            block.push_match(page, done, &found)?;
            done = found.at + found.length;
            next = done;
            if done < MATCH_LIMIT {
                note(&mut self.places, word(page, done - 2), done - 2);
            }
        }
        block.push_literals(page, done)?;
        let length = block.length;
        self.bytes.get(..length).filter(|_| length <= COMPRESSED_MAX)
    }
}

/// The next place, from `next` on, whose first bytes were at an earlier one, and that one.
#[inline(always)]
fn find(page: &PageBytes, places: &mut [u16; 1 << HASH_BITS], next: usize) -> Option<(usize, usize)> {
    let mut at = next;
    for _ in 0..PATIENCE {
        if at >= MATCH_LIMIT {
            return None;
        }
        if let Some(from) = look(page, places, at) {
            return Some((at, from));
        }
        at += 1;
    }
    let mut tries = 2 * PATIENCE;
    while at < MATCH_LIMIT {
        if let Some(from) = look(page, places, at) {
            return Some((at, from));
        }
        at += tries / PATIENCE;
        tries += 1;
    }
    None
}

/// An earlier place that begins as this one does.
#[inline(always)]
fn look(page: &PageBytes, places: &mut [u16; 1 << HASH_BITS], at: usize) -> Option<usize> {
    let here = word(page, at);
    let from = usize::from(note(places, here, at));
    ((word(page, from) ^ here) & EQUAL_MASK == 0).then_some(from)
}

/// Enters a place, and returns the one that had its hash before.
#[inline(always)]
fn note(places: &mut [u16; 1 << HASH_BITS], word: u64, at: usize) -> u16 {
    /// 2^64 over the golden ratio, odd.
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let hash = (word << (u64::BITS as usize - 8 * EQUAL)).wrapping_mul(FACTOR) >> (u64::BITS - HASH_BITS);
    // Twelve bits fit anywhere; saying so saves the checks.
    let entry = &mut places[usize::try_from(hash).unwrap_or(0) % (1 << HASH_BITS)];
    let [low, high, ..] = at.to_le_bytes();
    core::mem::replace(entry, u16::from_le_bytes([low, high]))
}

/// Eight bytes of the page, little endian. Nobody asks for what goes beyond it.
#[inline(always)]
fn word(page: &PageBytes, at: usize) -> u64 {
    page.get(at..at + WORD).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
}

/// How many of eight bytes are equal, given their differences.
const fn equal_bytes(zeros: u32) -> usize {
    (zeros / u8::BITS) as usize
}

impl Match {
    /// The match whose first bytes were found equal, as long as can be, but not before `done`.
    #[inline(always)]
    fn around(page: &PageBytes, at: usize, from: usize, done: usize) -> Self {
        let (mut end, distance) = (at + EQUAL, at - from);
        while end <= MATCH_END - WORD {
            let differences = word(page, end) ^ word(page, end - distance);
            end += equal_bytes(differences.trailing_zeros());
            if differences != 0 {
                break;
            }
        }
        while end > MATCH_END - WORD && end < MATCH_END && page[end] == page[end - distance] {
            end += 1;
        }
        // Eight bytes back are looked at in one step: a loop would be one more branch to mispredict.
        let back = if from < WORD {
            0
        } else {
            let differences = word(page, at - WORD) ^ word(page, from - WORD);
            equal_bytes(differences.leading_zeros()).min(at - done)
        };
        Self { at: at - back, distance, length: end - at + back }
    }
}

impl Block<'_> {
    /// A sequence: what lies between `done` and the match, and the match. Nothing where the block has become too long.
    #[inline(always)]
    fn push_match(&mut self, page: &PageBytes, done: usize, found: &Match) -> Option<()> {
        let literals = found.at - done;
        let more = found.length - LENGTH_MIN;
        if self.length + literals > COMPRESSED_MAX {
            return None;
        }
        self.push_token(literals, more.min(HALF));
        self.copy(page, done, literals);
        let [low, high, ..] = found.distance.to_le_bytes();
        self.push([low, high]);
        self.push_rest(more);
        Some(())
    }

    /// The last sequence: what lies after `done`.
    fn push_literals(&mut self, page: &PageBytes, done: usize) -> Option<()> {
        let literals = PAGE_SIZE - done;
        if self.length + literals > COMPRESSED_MAX {
            return None;
        }
        self.push_token(literals, 0);
        self.copy(page, done, literals);
        Some(())
    }

    /// The token, and the literals' number as far as it does not fit there.
    #[inline(always)]
    fn push_token(&mut self, literals: usize, low: usize) {
        self.push([u8::try_from(literals.min(HALF) << 4 | low).unwrap_or(0)]);
        self.push_rest(literals);
    }

    /// What a token cannot say of a number.
    #[inline(always)]
    fn push_rest(&mut self, number: usize) {
        if let Some(mut rest) = number.checked_sub(HALF) {
            while rest >= 255 {
                self.push([255]);
                rest -= 255;
            }
            self.push([u8::try_from(rest).unwrap_or(0)]);
        }
    }

    #[inline(always)]
    fn push<const N: usize>(&mut self, bytes: [u8; N]) {
        // There is always room; saying so saves the check.
        let at = self.length.min(ROOM - N);
        self.bytes[at..at + N].copy_from_slice(&bytes);
        self.length += N;
    }

    /// Literals, sixteen at a time where the page goes on for that long: what is written beyond their end is written again,
    /// or is not part of the block. Most are few, and a call to copy them would take longer than all of this, and so would asking
    /// whether there are any.
    #[inline(always)]
    fn copy(&mut self, page: &PageBytes, start: usize, literals: usize) {
        let end = self.length + literals;
        if start + literals > PAGE_SIZE - STRIDE {
            let target = self.bytes.get_mut(self.length..end);
            if let (Some(target), Some(source)) = (target, page.get(start..start + literals)) {
                target.copy_from_slice(source);
            }
        } else {
            let mut from = start;
            loop {
                // It is below anyway; saying so saves the check.
                let at = from.min(PAGE_SIZE - STRIDE);
                let mut stride = [0; STRIDE];
                stride.copy_from_slice(&page[at..at + STRIDE]);
                self.push(stride);
                from += STRIDE;
                if self.length >= end {
                    break;
                }
            }
        }
        self.length = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::mix;
    use alloc::vec::Vec;
    use core::ops::Range;
    use lz4_flex::block::decompress_into;

    /// A page of random bytes and of copies of what was there before, near and far, short and long.
    fn patchwork(seed: u64) -> PageBytes {
        let mut page = [0; PAGE_SIZE];
        let mut draws = (seed * 10_000..).map(mix);
        let mut draw = |below: usize| usize::try_from(draws.next().unwrap() % below as u64).unwrap();
        let fresh_max = 1 + draw(60);
        let mut at = 0;
        while at < PAGE_SIZE {
            let most = if draw(8) == 0 { 700 } else { fresh_max };
            let end = PAGE_SIZE.min(at + 1 + draw(most));
            if at > 0 && draw(2) == 0 {
                let farthest = if draw(2) == 0 { 12 } else { PAGE_SIZE };
                let distance = 1 + draw(at.min(farthest));
                (at..end).for_each(|place| page[place] = page[place - distance]);
            } else {
                page[at..end].fill_with(|| u8::try_from(draw(256)).unwrap());
            }
            at = end;
        }
        page
    }

    /// Where the block's matches go.
    fn matches(block: &[u8]) -> Vec<Range<usize>> {
        let (mut place, mut at, mut all) = (0, 0, Vec::new());
        let number = |half: usize, place: &mut usize| {
            let mut number = half;
            let mut goes_on = half == HALF;
            while goes_on {
                number += usize::from(block[*place]);
                goes_on = block[*place] == 255;
                *place += 1;
            }
            number
        };
        loop {
            let token = usize::from(block[place]);
            place += 1;
            let literals = number(token >> 4, &mut place);
            (place, at) = (place + literals, at + literals);
            if place == block.len() {
                return all;
            }
            place += 2;
            let length = number(token & HALF, &mut place) + LENGTH_MIN;
            all.push(at..at + length);
            at += length;
        }
    }

    #[test]
    fn every_block_is_read_back_by_another_decoder_and_ends_as_the_format_demands() {
        let mut lz4 = Lz4::new();
        let (mut encoded, mut page) = (0, [0; PAGE_SIZE]);
        for seed in 0..3000 {
            let original = patchwork(seed);
            let Some(block) = lz4.encode(&original) else { continue };
            encoded += 1;
            assert!(block.len() <= COMPRESSED_MAX);
            assert_eq!(decompress_into(block, &mut page).ok(), Some(PAGE_SIZE), "seed {seed}");
            assert!(page == original, "seed {seed}");
            let last = matches(block).pop().unwrap_or_default();
            assert!(last.end <= MATCH_END && last.start < MATCH_LIMIT, "seed {seed}: {last:?}");
        }
        assert!(encoded > 1500, "{encoded}");
    }

    #[test]
    fn what_repeats_at_any_distance_takes_a_few_bytes_beside_its_first_time() {
        let mut lz4 = Lz4::new();
        let mut page = [0; PAGE_SIZE];
        for period in 1..=1024 {
            for (place, byte) in page.iter_mut().enumerate() {
                *byte = mix((place % period) as u64).to_le_bytes()[0];
            }
            let block = lz4.encode(&page).unwrap();
            assert!(block.len() < period + 40, "{} at period {period}", block.len());
            let mut again = [0; PAGE_SIZE];
            assert_eq!(decompress_into(block, &mut again).ok(), Some(PAGE_SIZE));
            assert!(again == page, "period {period}");
        }
    }

    #[test]
    fn what_does_not_come_below_three_quarters_is_refused() {
        let mut lz4 = Lz4::new();
        let mut page = [0; PAGE_SIZE];
        // Random up to a place, one byte from there on: the block is as long as the first part and a little.
        let mut lengths = (3000..3100).map(|random| {
            page.fill(7);
            for (place, byte) in page[..random].iter_mut().enumerate() {
                *byte = mix(place as u64 * 31).to_le_bytes()[0];
            }
            lz4.encode(&page).map(<[u8]>::len)
        });
        let longest = lengths.by_ref().map_while(|length| length).last();
        assert_eq!(longest, Some(COMPRESSED_MAX));
        assert!(lengths.all(|length| length.is_none()));
        drop(lengths);
        assert!(lz4.encode(&[9; PAGE_SIZE]).is_some(), "a refusal leaves nothing behind");
    }
}
