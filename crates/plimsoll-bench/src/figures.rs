//! The arithmetic of a comparison: median, spread of the peer against itself, ratio.
//!
//! Enters: measured numbers. Leaves: one number, or none where there is nothing to compute it from. What must never
//! happen: a figure made up from no measurement, or from one that is not a positive finite number.

/// A count as a number to divide.
#[expect(clippy::cast_precision_loss, reason = "counts and times of one benchmark are below 2^53")]
pub(crate) const fn float(count: u64) -> f64 {
    count as f64
}

/// A measurement that can be divided by.
fn is_sound(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

/// The middle of the values, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    if !values.iter().copied().all(is_sound) {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().checked_sub(1)? / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// How far two equal measurements of one round lay apart at worst: 0.1 means that one was 10 % above the other. A ratio
/// closer to 1 than this says nothing.
pub(crate) fn spread(pairs: &[(f64, f64)]) -> Option<f64> {
    // Not by `f64::max` and `min`, which pass over what is not a number.
    let apart = pairs.iter().map(|(one, other)| {
        let (up, down) = (ratio(*one, *other)?, ratio(*other, *one)?);
        Some(up.max(down) - 1.0)
    });
    apart.collect::<Option<Vec<f64>>>()?.into_iter().max_by(f64::total_cmp)
}

/// Ours for each one of the peer's.
pub(crate) fn ratio(ours: f64, peer: f64) -> Option<f64> {
    (is_sound(ours) && is_sound(peer)).then(|| ours / peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_near(found: Option<f64>, expected: f64) -> bool {
        found.is_some_and(|found| (found - expected).abs() < 1e-12)
    }

    #[test]
    fn the_median_is_the_middle_whatever_the_order_and_one_outlier_does_not_move_it() {
        assert!(is_near(median(&[3.0, 1.0, 2.0]), 2.0));
        assert!(is_near(median(&[3.0, 1.0, 1e9]), 3.0));
        assert!(is_near(median(&[4.0, 1.0, 2.0, 3.0]), 2.5));
        assert!(is_near(median(&[7.0]), 7.0));
    }

    #[test]
    fn the_spread_is_that_of_the_worst_round_and_not_between_rounds() {
        assert!(is_near(spread(&[(100.0, 110.0), (250.0, 200.0), (90.0, 90.0)]), 0.25));
        assert!(is_near(spread(&[(100.0, 100.0), (500.0, 500.0)]), 0.0));
    }

    #[test]
    fn a_ratio_is_ours_over_the_peers() {
        assert!(is_near(ratio(30.0, 20.0), 1.5));
        assert!(is_near(ratio(20.0, 40.0), 0.5));
    }

    #[test]
    fn nothing_measured_gives_no_figure() {
        assert_eq!(median(&[]), None);
        assert_eq!(spread(&[]), None);
        for nothing in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(median(&[1.0, nothing, 2.0]), None);
            assert_eq!(spread(&[(1.0, 1.0), (1.0, nothing)]), None);
            assert_eq!(ratio(nothing, 1.0), None);
            assert_eq!(ratio(1.0, nothing), None);
        }
    }
}
