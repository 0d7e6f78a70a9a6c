//! Times: milliseconds inside, `90s`, `5m`, `24h` and `14:30` outside.
use std::fmt;
use std::str::FromStr;

/// A span of time, or a moment counted from the start of the simulation, which is at midnight. In milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

/// Milliseconds of a day.
pub(crate) const DAY: Millis = Millis(24 * 60 * 60 * 1000);

/// Suffixes, each with the milliseconds it stands for; `ms` before `s` and `m`.
const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", DAY.0)];

/// A text that is no time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a time: write 90s, 5m, 24h, 7d, or 14:30 for a time of day")]
pub struct ParseMillisError;

impl FromStr for Millis {
    type Err = ParseMillisError;
    fn from_str(text: &str) -> Result<Self, ParseMillisError> {
        if let Some((hours, minutes)) = text.split_once(':') {
            let part = |digits: &str, end: u64| digits.parse().ok().filter(|part: &u64| *part < end);
            let (hours, minutes) =
                part(hours, 24).zip(part(minutes, 60)).filter(|_| text.len() == 5).ok_or(ParseMillisError)?;
            return Ok(Self((hours * 60 + minutes) * 60_000));
        }
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let (_, factor) = UNITS.into_iter().find(|(name, _)| *name == unit.trim()).ok_or(ParseMillisError)?;
        let number: u64 = number.parse().map_err(|_| ParseMillisError)?;
        number.checked_mul(factor).map(Self).ok_or(ParseMillisError)
    }
}

impl fmt::Display for Millis {
    /// In the largest unit that leaves no rest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |(_, factor): &(&str, u64)| self.0 > 0 && self.0.is_multiple_of(*factor);
        let (unit, factor) = UNITS.into_iter().rev().find(whole).unwrap_or(("s", 1000));
        write!(f, "{} {unit}", self.0 / factor)
    }
}

/// A moment, as days, hours, minutes and seconds since the start.
pub(crate) struct Clock(pub(crate) Millis);

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.0 / 1000;
        let (day, seconds) = (seconds / 86_400, seconds % 86_400);
        if day > 0 {
            write!(f, "day {} ", day + 1)?;
        }
        write!(f, "{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_write_them() {
        for (text, ms) in
            [("250ms", 250), ("90s", 90_000), ("5 m", 300_000), ("24h", DAY.0), ("14:30", 52_200_000)]
        {
            assert_eq!(text.parse(), Ok(Millis(ms)), "{text}");
        }
        for text in ["", "5", "-1s", "24:00", "1:5", "12:60", "1.5h", "99999999999999999999h", "nan", "h"] {
            assert_eq!(text.parse::<Millis>(), Err(ParseMillisError), "{text:?}");
        }
    }

    #[test]
    fn times_print_short() {
        assert_eq!([1000, 60_000, 90_000, 0].map(|ms| Millis(ms).to_string()), ["1 s", "1 m", "90 s", "0 s"]);
        assert_eq!(Clock(Millis(DAY.0 + 3_661_000)).to_string(), "day 2 01:01:01");
    }
}
