//! Sizes: bytes inside, `512M` and `4G` (powers of 1024) outside.
use core::{fmt, iter::Sum, ops, str::FromStr};

/// Bytes in a page, the unit of accounting on every architecture we run on.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Pages in a block: one x86-64 huge page.
pub const BLOCK_PAGES: u32 = 512;
/// Bytes in a block.
pub const BLOCK_SIZE: usize = PAGE_SIZE * BLOCK_PAGES as usize;

/// A count of bytes. Displayed as people write sizes: `64K`, `1.5G`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ByteCount(pub u64);

/// A count of 4 KiB pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PageCount(pub u64);

impl ByteCount {
    /// That many MiB.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// Whole pages that fit.
    pub const fn pages_floor(self) -> PageCount {
        PageCount(self.0 >> PAGE_SHIFT)
    }

    /// Whole pages needed to hold the bytes.
    pub const fn pages_ceil(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_SIZE as u64))
    }

    /// True when the count is a multiple of `unit` bytes. `unit` must not be zero.
    pub const fn is_multiple_of(self, unit: usize) -> bool {
        self.0.is_multiple_of(unit as u64)
    }

    /// Difference, or zero where `other` is larger.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl PageCount {
    /// The bytes in that many pages.
    pub const fn bytes(self) -> ByteCount {
        ByteCount(self.0 << PAGE_SHIFT)
    }

    /// Difference, or zero where `other` is larger.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

macro_rules! arithmetic {
    ($name:ident) => {
        impl ops::Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }
        impl ops::Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }
        impl ops::AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }
        impl ops::SubAssign for $name {
            fn sub_assign(&mut self, other: Self) {
                self.0 -= other.0;
            }
        }
        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
                counts.fold(Self(0), ops::Add::add)
            }
        }
    };
}
arithmetic!(ByteCount);
arithmetic!(PageCount);

/// Suffixes of [`ByteCount`], each with the power of two it stands for, largest first.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, shift) in UNITS {
            if self.0 >> shift == 0 {
                continue;
            }
            let whole = self.0 >> shift;
            let tenths = ((self.0 - (whole << shift)) >> (shift - 10)) * 10 / 1024;
            return if tenths == 0 {
                f.pad(&heapless(format_args!("{whole}{suffix}")))
            } else {
                f.pad(&heapless(format_args!("{whole}.{tenths}{suffix}")))
            };
        }
        f.pad(&heapless(format_args!("{}", self.0)))
    }
}

/// A short string on the stack, so that `{:>8}` pads a size without an allocator.
struct Short {
    bytes: [u8; 24],
    len: usize,
}

fn heapless(args: fmt::Arguments<'_>) -> Short {
    let mut short = Short { bytes: [0; 24], len: 0 };
    // A size is at most 20 digits, a point, a digit and a suffix: the write cannot run out of room.
    let _ = fmt::write(&mut short, args);
    short
}

impl fmt::Write for Short {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.len + text.len();
        self.bytes.get_mut(self.len..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

impl ops::Deref for Short {
    type Target = str;
    fn deref(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.0)
    }
}

/// A text that is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParseByteCountError {
    /// No digits were found where the number should be.
    NoNumber,
    /// The text ends in something that is not one of the known suffixes.
    UnknownSuffix,
    /// The size does not fit in 64 bits.
    TooLarge,
}

impl fmt::Display for ParseByteCountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoNumber => "not a size: expected a number, optionally followed by K, M, G or T",
            Self::UnknownSuffix => "unknown size suffix: use K, M, G or T (powers of 1024)",
            Self::TooLarge => "the size does not fit in 64 bits",
        })
    }
}

impl core::error::Error for ParseByteCountError {}

impl FromStr for ByteCount {
    type Err = ParseByteCountError;

    /// Reads `4096`, `64K`, `512M`, `1.5G`, and the same with `iB` or `B` after the suffix.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() {
            return Err(ParseByteCountError::NoNumber);
        }
        let shift = match suffix.trim_end_matches("iB").trim_end_matches('B') {
            "" => 0,
            unit => {
                let mut letters = unit.chars();
                let letter = letters.next().map(|c| c.to_ascii_uppercase());
                let known =
                    UNITS.iter().find(|(name, _)| Some(*name) == letter && letters.as_str().is_empty());
                known.ok_or(ParseByteCountError::UnknownSuffix)?.1
            }
        };
        let whole: u64 = whole.parse().map_err(|_| ParseByteCountError::TooLarge)?;
        let mut bytes = whole.checked_mul(1 << shift).ok_or(ParseByteCountError::TooLarge)?;
        if !fraction.is_empty() {
            // Six digits are finer than a byte for every suffix up to M and finer than anyone writes above it.
            let digits = &fraction[..fraction.len().min(6)];
            let parts: u64 = digits.parse().map_err(|_| ParseByteCountError::NoNumber)?;
            let scale = 10u64.pow(u32::try_from(digits.len()).unwrap_or(0));
            let part = u128::from(parts) * (1u128 << shift) / u128::from(scale);
            bytes = bytes
                .checked_add(u64::try_from(part).unwrap_or(u64::MAX))
                .ok_or(ParseByteCountError::TooLarge)?;
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 65536),
            ("512M", 512 << 20),
            ("1.5G", 3 << 29),
            ("2GiB", 2 << 30),
            ("1t", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
        }
    }

    #[test]
    fn texts_that_are_not_sizes_say_why() {
        use ParseByteCountError::{NoNumber, TooLarge, UnknownSuffix};
        for (text, error) in [
            ("", NoNumber),
            ("M", NoNumber),
            ("12Q", UnknownSuffix),
            ("-1", NoNumber),
            ("5 apples", UnknownSuffix),
            ("99999999999T", TooLarge),
            ("1MM", UnknownSuffix),
            ("99999999999999999999", TooLarge),
            ("1.x", UnknownSuffix),
        ] {
            assert_eq!(text.parse::<ByteCount>(), Err(error), "{text:?}");
        }
    }

    #[test]
    fn sizes_print_short_and_padded() {
        assert_eq!(ByteCount(819 << 20).to_string(), "819M");
        assert_eq!(ByteCount(3 << 29).to_string(), "1.5G");
        assert_eq!(ByteCount(17).to_string(), "17");
        assert_eq!(std::format!("{:>6}", ByteCount(64 << 10)), "   64K");
    }
}
