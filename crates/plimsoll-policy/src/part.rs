//! Parts of a whole, in millionths.
//!
//! Enters: a percentage, or a part and its whole. Leaves: a number that multiplies exactly, rounded down. Nothing here
//! is a float: a decision that is replayed on another machine must come out the same to the bit.
use core::fmt;

/// A share of something in parts per million. More than the whole can be said: a buffer of 200 %.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Ppm(pub u32);

impl Ppm {
    /// Nothing of it.
    pub const ZERO: Self = Self(0);
    /// All of it.
    pub const WHOLE: Self = Self(1_000_000);

    /// That many hundredths; as many as fit where there are more.
    pub const fn percent(percent: u32) -> Self {
        Self(percent.saturating_mul(10_000))
    }

    /// How much of `whole` the `part` is, rounded down; nothing of nothing is nothing.
    pub fn of(part: u64, whole: u64) -> Self {
        let ppm = (u128::from(part) * u128::from(Self::WHOLE.0)).checked_div(u128::from(whole)).unwrap_or(0);
        Self(u32::try_from(ppm).unwrap_or(u32::MAX))
    }

    /// This part of `amount`, rounded down; `u64::MAX` if it is more than that.
    pub fn apply(self, amount: u64) -> u64 {
        let part = u128::from(amount) * u128::from(self.0) / u128::from(Self::WHOLE.0);
        u64::try_from(part).unwrap_or(u64::MAX)
    }

    /// What is missing to the whole.
    #[must_use]
    pub const fn rest(self) -> Self {
        Self(Self::WHOLE.0.saturating_sub(self.0))
    }
}

impl fmt::Display for Ppm {
    /// As people write it: `75 %`, `0.1 %`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, mut rest, mut digits) = (self.0 / 10_000, self.0 % 10_000, 4);
        if rest == 0 {
            return write!(f, "{whole} %");
        }
        while rest.is_multiple_of(10) {
            (rest, digits) = (rest / 10, digits - 1);
        }
        write!(f, "{whole}.{rest:0digits$} %")
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn parts_print_as_people_write_percentages() {
        for (ppm, text) in
            [(0, "0 %"), (750_000, "75 %"), (1_000, "0.1 %"), (57_341, "5.7341 %"), (2_000_500, "200.05 %")]
        {
            assert_eq!(Ppm(ppm).to_string(), text);
        }
    }

    #[test]
    fn a_part_is_rounded_down_and_never_overflows() {
        assert_eq!(Ppm::percent(50).apply(3), 1);
        assert_eq!(Ppm(u32::MAX).apply(u64::MAX), u64::MAX);
        assert_eq!(Ppm::of(1, 3), Ppm(333_333));
        assert_eq!(Ppm::of(7, 0), Ppm::ZERO);
        assert_eq!(Ppm::of(u64::MAX, 1), Ppm(u32::MAX));
        assert_eq!(Ppm::percent(75).rest(), Ppm::percent(25));
    }
}
