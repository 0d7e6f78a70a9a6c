//! The arithmetic of a comparison: median and where it may lie, spread of the peer against itself, ratio.
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

/// Where the median of what the values were drawn from lies, in 95 of 100 cases: between two of them that are equally far
/// from the middle (the sign test; nothing is assumed of how they are spread). None for fewer than six.
pub(crate) fn interval(values: &[f64]) -> Option<(f64, f64)> {
    if !values.iter().copied().all(is_sound) {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    // How likely it is that exactly so many of them lie below the median, and at most so many.
    let count = sorted.len();
    let mut exactly = 0.5_f64.powi(i32::try_from(count).ok()?);
    let (mut at_most, mut left_out) = (exactly, 0);
    while at_most <= 0.025 && left_out < count {
        left_out += 1;
        exactly *= float((count - left_out + 1) as u64) / float(left_out as u64);
        at_most += exactly;
    }
    let low = left_out.checked_sub(1)?;
    Some((*sorted.get(low)?, *sorted.get(count - 1 - low)?))
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
    fn an_interval_leaves_out_as_many_on_either_side_as_chance_would() {
        let to = |count: u32| (1..=count).rev().map(f64::from).collect::<Vec<_>>();
        // Tables of the sign test: 6 to 8 values leave out none, 20 five, 25 seven on either side.
        for (count, ends) in
            [(6, (1.0, 6.0)), (8, (1.0, 8.0)), (9, (2.0, 8.0)), (20, (6.0, 15.0)), (25, (8.0, 18.0))]
        {
            assert_eq!(interval(&to(count)), Some(ends), "{count}");
        }
        assert_eq!(interval(&to(5)), None);
        assert_eq!(interval(&[1.0, 1.0, 1.0, 1.0, 1.0, f64::NAN]), None);
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
