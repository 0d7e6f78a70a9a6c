//! Values as people write them: sizes, times, parts, rungs. What cannot be read is refused with what can.
use crate::time::Millis;
use plimsoll_policy::{Ppm, Rung};
use plimsoll_types::{ByteCount, PageCount};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// No scenario is about more than a century, and sums of such times are far from what 64 bits hold.
const AGE: Millis = Millis(36_525 * 86_400_000);
/// No page takes more than a second.
const SLOWEST: Nanos = Nanos(1_000_000_000);

/// A value written as a text.
pub(super) trait Word: Sized {
    /// What it is, with an example.
    const EXPECTED: &str;
    fn read(text: &str) -> Option<Self>;
}

/// A value in a scenario.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct As<T>(pub(super) T);

impl<'de, T: Word> Deserialize<'de> for As<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(PhantomData<T>);
        impl<T: Word> Visitor<'_> for Reader<T> {
            type Value = As<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::EXPECTED)
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<As<T>, E> {
                let unknown = || E::custom(format_args!("\"{text}\" is not {}", T::EXPECTED));
                T::read(text).map(As).ok_or_else(unknown)
            }
        }
        deserializer.deserialize_str(Reader(PhantomData))
    }
}

impl Word for ByteCount {
    const EXPECTED: &str = "a size such as \"512M\" or \"4G\"";
    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Word for PageCount {
    const EXPECTED: &str = "a size such as \"512M\" or \"4G\"";
    fn read(text: &str) -> Option<Self> {
        ByteCount::read(text).map(ByteCount::pages_ceil)
    }
}

impl Word for Millis {
    const EXPECTED: &str = "a time such as \"90s\", \"5m\", \"24h\" or \"14:30\"";
    fn read(text: &str) -> Option<Self> {
        text.parse().ok().filter(|time| *time <= AGE)
    }
}

impl Word for Ppm {
    const EXPECTED: &str = "a part such as \"20%\" or \"0.1%\"";
    fn read(text: &str) -> Option<Self> {
        decimal(text.strip_suffix('%')?.trim(), 4).and_then(|parts| u32::try_from(parts).ok()).map(Self)
    }
}

/// How many times something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Times(pub(super) Ppm);

impl Word for Times {
    const EXPECTED: &str = "a factor such as \"1.5\" or \"2\"";
    fn read(text: &str) -> Option<Self> {
        decimal(text, 6)
            .and_then(|parts| u32::try_from(parts).ok())
            .filter(|parts| *parts > 0)
            .map(|parts| Self(Ppm(parts)))
    }
}

/// A time of a single page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Nanos(pub(super) u64);

impl Word for Nanos {
    const EXPECTED: &str = "a time such as \"13.5us\" or \"0.2ms\"";
    fn read(text: &str) -> Option<Self> {
        let (number, digits) = text
            .strip_suffix("us")
            .map(|number| (number, 3))
            .or_else(|| text.strip_suffix("ms").map(|number| (number, 6)))?;
        decimal(number.trim(), digits).map(Self).filter(|nanos| *nanos <= SLOWEST)
    }
}

impl Word for Rung {
    const EXPECTED: &str =
        "a way to take memory: \"guest-free\", \"balloon\", \"sharing\", \"compress\" or \"disk\"";
    fn read(text: &str) -> Option<Self> {
        let names = ["guest-free", "balloon", "sharing", "compress", "disk"];
        names.into_iter().zip(Self::ALL).find(|(name, _)| *name == text).map(|(_, rung)| rung)
    }
}

/// A number with up to so many digits after its point, times ten to the power of as many.
fn decimal(text: &str, digits: usize) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let is_number = !whole.is_empty() && fraction.len() <= digits;
    let all_digits = whole.bytes().chain(fraction.bytes()).all(|byte| byte.is_ascii_digit());
    (is_number && all_digits).then(|| format!("{whole}{fraction:0<digits$}").parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_factors_and_times_are_read_exactly() {
        assert_eq!(Ppm::read("20%"), Some(Ppm::percent(20)));
        assert_eq!(Ppm::read("0.1 %"), Some(Ppm(1000)));
        assert_eq!(Times::read("1.5"), Some(Times(Ppm(1_500_000))));
        assert_eq!(Nanos::read("13.5us"), Some(Nanos(13_500)));
        for text in ["", "%", "nan%", "-1%", "1e3%", "20", "0.00001%", "999999%", "1.%x"] {
            assert_eq!(Ppm::read(text), None, "{text}");
        }
        assert_eq!((Times::read("0"), Times::read("-2"), Nanos::read("5s")), (None, None, None));
    }
}
