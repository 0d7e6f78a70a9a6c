//! Sets of small numbers as words of bits: which slots or records of a slab are taken.
//!
//! Numbers past the end read as absent and cannot be set, so that no caller needs to argue about bounds.

const WORD: u32 = u64::BITS;

/// True when `number` is in the set.
pub(crate) fn contains(words: &[u64], number: u32) -> bool {
    words.get((number / WORD) as usize).is_some_and(|word| word >> (number % WORD) & 1 == 1)
}

/// Puts `number` into the set; false where it was there or does not fit.
pub(crate) fn insert(words: &mut [u64], number: u32) -> bool {
    let Some(word) = words.get_mut((number / WORD) as usize) else { return false };
    let bit = 1 << (number % WORD);
    let absent = *word & bit == 0;
    *word |= bit;
    absent
}

/// Takes `number` out of the set; false where it was not there.
pub(crate) fn remove(words: &mut [u64], number: u32) -> bool {
    let Some(word) = words.get_mut((number / WORD) as usize) else { return false };
    let bit = 1 << (number % WORD);
    let present = *word & bit != 0;
    *word &= !bit;
    present
}

/// The lowest number below `limit` that is not in the set.
pub(crate) fn first_absent(words: &[u64], limit: u32) -> Option<u32> {
    let (place, word) = (0..).zip(words).find(|(_, word)| **word != u64::MAX)?;
    Some(place * WORD + word.trailing_ones()).filter(|number| *number < limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_in_and_out_once() {
        let mut words = [0; 2];
        assert!(insert(&mut words, 70) && !insert(&mut words, 70) && contains(&words, 70));
        assert!(!insert(&mut words, 128) && !contains(&words, 128) && !remove(&mut words, 128));
        assert!(remove(&mut words, 70) && !remove(&mut words, 70));
    }

    #[test]
    fn the_first_absent_number_respects_the_limit() {
        let mut words = [u64::MAX, 0];
        assert_eq!(first_absent(&words, 128), Some(64));
        assert_eq!(first_absent(&words, 64), None);
        words[1] = u64::MAX;
        assert_eq!(first_absent(&words, 128), None);
    }
}
