//! Address ranges: numbers enter, and what leaves proves something about them. Nothing here touches memory.
#![expect(unsafe_code, reason = "declares the unsafe constructor that carries userfaultfd's obligation")]

use core::{fmt, marker::PhantomData};
use plimsoll_types::{ByteCount, Hva};

/// A range of host virtual addresses. Holding one proves that its end does not overflow, and nothing more: not that
/// it is mapped, aligned or in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HvaRange {
    start: Hva,
    len: ByteCount,
}

impl HvaRange {
    /// The range of `len` bytes from `start`, or `None` if it runs past the end of the address space.
    pub const fn new(start: Hva, len: ByteCount) -> Option<Self> {
        match start.checked_add(len.0) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// The range from `start` up to but not including `end`, or `None` if `end` lies before `start`.
    pub const fn between(start: Hva, end: Hva) -> Option<Self> {
        match end.0.checked_sub(start.0) {
            Some(len) => Some(Self { start, len: ByteCount(len) }),
            None => None,
        }
    }

    /// The first address.
    pub const fn start(self) -> Hva {
        self.start
    }

    /// The address after the last one.
    pub const fn end(self) -> Hva {
        Hva(self.start.0 + self.len.0)
    }

    /// The length in bytes.
    pub const fn len(self) -> ByteCount {
        self.len
    }

    /// True for a range of no bytes.
    pub const fn is_empty(self) -> bool {
        self.len.0 == 0
    }

    /// True when every byte of `inner` lies in this range.
    pub const fn contains(self, inner: Self) -> bool {
        self.start.0 <= inner.start.0 && inner.end().0 <= self.end().0
    }

    /// True when the two have a byte in common.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }

    /// What is left after the first `bytes`, or `None` if the range is shorter than that. This is how a call that
    /// stopped early is taken up again.
    pub const fn skip(self, bytes: ByteCount) -> Option<Self> {
        match self.len.0.checked_sub(bytes.0) {
            Some(left) => Some(Self { start: Hva(self.start.0 + bytes.0), len: ByteCount(left) }),
            None => None,
        }
    }
}

impl fmt::Display for HvaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{:#x}", self.start, self.end().0)
    }
}

/// A range into which no Rust reference points while `'a` lasts, and whose bytes may change, vanish or block their
/// reader at any moment without breaking a promise made to the compiler.
///
/// [`AnonymousMapping`](crate::mapping::AnonymousMapping) makes these safely. For other memory somebody has to
/// vouch, see [`assume`](Self::assume).
#[derive(Clone, Copy, Debug)]
pub struct UnborrowedRange<'a> {
    range: HvaRange,
    lender: PhantomData<&'a ()>,
}

impl UnborrowedRange<'_> {
    /// Vouches for `range`.
    ///
    /// # Safety
    ///
    /// The addresses are those of the process that the range will be used on. If that is another process, there is
    /// nothing to promise: its memory is not this program's. If it is this one, then as long as the value lives,
    /// and as long as a registration made with it lasts,
    ///
    /// 1. no `&T` or `&mut T` to any byte of the range exists or comes into being, other than to types with interior
    ///    mutability for which every bit pattern is valid (an atomic integer), and
    /// 2. no allocator, thread stack or library keeps data there.
    pub const unsafe fn assume(range: HvaRange) -> Self {
        Self { range, lender: PhantomData }
    }

    /// The addresses.
    pub const fn range(&self) -> HvaRange {
        self.range
    }

    /// What is left after the first `bytes`, or `None` if the range is shorter than that.
    pub const fn skip(self, bytes: ByteCount) -> Option<Self> {
        match self.range.skip(bytes) {
            Some(range) => Some(Self { range, lender: PhantomData }),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_past_the_end_of_the_address_space_cannot_be_made() {
        assert_eq!(HvaRange::new(Hva(u64::MAX), ByteCount(1)), None);
        assert_eq!(HvaRange::between(Hva(2), Hva(1)), None);
        let last = HvaRange::new(Hva(u64::MAX - 1), ByteCount(1)).unwrap();
        assert_eq!(last.end(), Hva(u64::MAX));
    }

    #[test]
    fn ranges_that_only_touch_do_not_overlap() {
        let range = |start, end| HvaRange::between(Hva(start), Hva(end)).unwrap();
        let middle = range(0x2000, 0x4000);
        for other in [range(0x1000, 0x2001), range(0x3fff, 0x5000), range(0x2800, 0x3000), range(0, 0x9000)] {
            assert!(middle.overlaps(other) && other.overlaps(middle), "{other}");
        }
        for other in [range(0x1000, 0x2000), range(0x4000, 0x5000), range(0x2000, 0x2000)] {
            assert!(!middle.overlaps(other) && !other.overlaps(middle), "{other}");
        }
    }

    #[test]
    fn skipping_progress_leaves_the_rest() {
        let range = HvaRange::new(Hva(0x1000), ByteCount(0x3000)).unwrap();
        let rest = range.skip(ByteCount(0x1000)).unwrap();
        assert_eq!((rest.start(), rest.len()), (Hva(0x2000), ByteCount(0x2000)));
        assert!(range.contains(rest) && !rest.contains(range));
        assert!(range.skip(ByteCount(0x3000)).unwrap().is_empty());
        assert_eq!(range.skip(ByteCount(0x3001)), None);
        assert_eq!(range.to_string(), "hva:0x1000..0x4000");
    }
}
