//! Deterministic randomness without tables or floating point.
//!
//! What enters are seeds, what leaves is the same on every machine and in every build: contents are verified by
//! generating them anew, so nothing here may ever depend on more than its arguments.

/// The golden ratio in 64 bits: the step of a Weyl sequence that visits every residue.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes all bits of a word into all others; a bijection (the finaliser of SplitMix64, Steele, Lea, Flood
/// 2014).
#[inline]
pub const fn mix64(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A hash of three words in which their order counts.
#[inline]
pub const fn hash3(first: u64, second: u64, third: u64) -> u64 {
    let hash = mix64(first.wrapping_add(GOLDEN));
    let hash = mix64(hash ^ second).wrapping_add(GOLDEN);
    mix64(hash ^ third)
}

/// The `index`-th word of the stream that belongs to `seed`. Indices are independent of each other.
#[inline]
pub const fn stream(seed: u64, index: u64) -> u64 {
    mix64(seed.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN)))
}

/// Maps a uniform word to `0..bound` by its high bits. `bound` 0 gives 0.
#[inline]
pub const fn scale(word: u64, bound: u64) -> u64 {
    ((word as u128 * bound as u128) >> 64) as u64
}

/// A sequence of uniform words.
#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    index: u64,
}

impl Rng {
    /// The sequence that belongs to `seed`.
    pub const fn new(seed: u64) -> Self {
        Self { seed, index: 0 }
    }

    /// A uniform word.
    #[inline]
    pub const fn word(&mut self) -> u64 {
        let word = stream(self.seed, self.index);
        self.index = self.index.wrapping_add(1);
        word
    }

    /// Uniform in `0..bound`; 0 when `bound` is 0.
    #[inline]
    pub const fn below(&mut self, bound: u64) -> u64 {
        scale(self.word(), bound)
    }
}

/// A permutation of `0..len` computed in place: no table that would itself be paged.
///
/// Multiplying by an odd number and xoring with a right shift are bijections of `k`-bit words; a result outside
/// `0..len` is sent through again until it falls inside (cycle walking), fewer than two rounds on average.
#[derive(Clone, Debug)]
pub struct Permutation {
    len: u64,
    mask: u64,
    shift: u32,
    seed: u64,
}

impl Permutation {
    /// The permutation of `0..len` that belongs to `seed`.
    pub const fn new(len: u64, seed: u64) -> Self {
        let bits = if len <= 1 { 0 } else { (len - 1).ilog2() + 1 };
        let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        Self { len, mask, shift: bits / 2 + 1, seed: mix64(seed) }
    }

    /// Where `index`, which must be below the length, goes.
    #[inline]
    pub const fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.len || self.len == 0);
        if self.len <= 1 {
            return 0;
        }
        let mut place = index;
        loop {
            place = place.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(self.seed) & self.mask;
            place ^= place >> self.shift;
            place = place.wrapping_mul(GOLDEN | 1).wrapping_add(self.seed >> 32) & self.mask;
            place ^= place >> self.shift;
            if place < self.len {
                return place;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;

    #[test]
    fn a_permutation_reaches_every_place_once() {
        for len in [1, 2, 3, 16, 17, 100, 1000, 4096, 5000] {
            let permutation = Permutation::new(len, 7);
            let mut seen = vec![false; usize::try_from(len).unwrap()];
            for index in 0..len {
                let place = usize::try_from(permutation.apply(index)).unwrap();
                assert!(!core::mem::replace(&mut seen[place], true), "{place} twice of {len}");
            }
        }
    }

    #[test]
    fn neighbours_are_scattered() {
        let permutation = Permutation::new(4096, 3);
        let near =
            (1..4096).filter(|&i| permutation.apply(i).abs_diff(permutation.apply(i - 1)) < 64).count();
        assert!(near < 300, "{near} of 4095 neighbours stayed near");
    }

    #[test]
    fn draws_below_a_bound_are_uniform_enough() {
        let mut rng = Rng::new(1);
        let mut counts = [0u32; 10];
        for _ in 0..100_000 {
            counts[usize::try_from(rng.below(10)).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
        assert_eq!(rng.below(0), 0);
    }
}
