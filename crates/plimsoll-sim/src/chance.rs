//! Chance that can be looked up.
//!
//! Enters: a seed and what is asked about. Leaves: a number that is always the same for both, so that what happens to
//! a machine depends neither on the order in which machines are looked at nor on the length of steps.

/// A random number for a pair (splitmix64's finisher: Steele, Lea, Flood, OOPSLA '14).
pub(crate) const fn draw(seed: u64, of: u64) -> u64 {
    let mut mixed = seed ^ of.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// A random number below `end`; 0 where there is none.
pub(crate) fn below(seed: u64, of: u64, end: u64) -> u64 {
    let product = u128::from(draw(seed, of)) * u128::from(end);
    u64::try_from(product >> 64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_below_their_end_and_spread_over_it() {
        let draws: Vec<u64> = (0..10_000).map(|of| below(7, of, 10)).collect();
        assert!(
            (0..10).all(|value| (800..1200).contains(&draws.iter().filter(|draw| **draw == value).count()))
        );
        assert_eq!(below(7, 1, 0), 0);
    }
}
