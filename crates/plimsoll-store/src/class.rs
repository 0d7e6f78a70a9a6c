//! Size classes: an object's data takes one slot of the smallest class it fits.
//!
//! Sizes follow from whole numbers of slots to a slab (64 KiB / 21 is 3,072 with 1,024 bytes over, 64 KiB / 25 is
//! 2,608, ...), so that next to nothing is lost at the slab's end. Steps are a quarter or less above 512 bytes, and an
//! eighth or less above 1,024, where most pages are, so that a slot loses at most that much. More classes would waste
//! less inside slots and more in slabs that are only begun, of which a small domain has one per class.
//!
//! Measured on 16,384 pages of code and text, slabs lose 3.8 % beyond what lz4 made of the pages and 4.7 % beyond what
//! zstd 3 did; 28 classes lose 3.0 and 4.7 %, and in a domain of 1,024 pages 2 to 3 % more than these do.
use crate::memory::{SLAB_BYTES, SLAB_SIZE};
use plimsoll_types::PAGE_SIZE;

/// Slot sizes in bytes, ascending. The last is for pages that do not compress.
const SIZES: [u16; 25] = [
    64, 128, 256, 384, 512, 640, 768, 896, 1024, 1136, 1280, 1424, 1552, 1632, 1760, 1872, 2048, 2176, 2256,
    2416, 2608, 2720, 2848, 3072, 4096,
];

/// Compressed pages longer than this are kept raw: three quarters of a page.
pub(crate) const COMPRESSED_MAX: usize = PAGE_SIZE / 4 * 3;

/// The most slots any class has in a slab; a record keeps the slot's number in 10 bits.
pub(crate) const SLOTS_MAX: u32 = 1024;

const _: () = {
    let mut class = 1;
    while class < SIZES.len() {
        assert!(SIZES[class - 1] < SIZES[class]);
        class += 1;
    }
    assert!(SLAB_SIZE / SIZES[0] as usize == SLOTS_MAX as usize);
    assert!(SIZES[SIZES.len() - 2] as usize == COMPRESSED_MAX);
    assert!(SIZES[SIZES.len() - 1] as usize == PAGE_SIZE);
};

/// One of the slot sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SizeClass(u8);

impl SizeClass {
    /// How many classes there are.
    pub const COUNT: usize = SIZES.len();

    /// The class with that number, the smallest size being 0.
    pub const fn from_number(number: u8) -> Option<Self> {
        if (number as usize) < Self::COUNT { Some(Self(number)) } else { None }
    }

    /// Every class, ascending.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..).map_while(Self::from_number)
    }

    /// The class's number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The smallest class that holds `length` bytes; `None` for nothing and for more than a page.
    pub(crate) fn holding(length: usize) -> Option<Self> {
        let class = SIZES.partition_point(|size| usize::from(*size) < length);
        u8::try_from(class).ok().and_then(Self::from_number).filter(|_| length > 0)
    }

    /// Bytes in a slot.
    pub const fn size(self) -> usize {
        SIZES[self.0 as usize] as usize
    }

    /// Slots in a slab.
    pub(crate) const fn slots(self) -> u32 {
        SLAB_BYTES / SIZES[self.0 as usize] as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_gets_the_smallest_class_that_holds_it() {
        for length in 1..=PAGE_SIZE {
            let class = SizeClass::holding(length).unwrap();
            assert!(class.size() >= length);
            if class.0 > 0 {
                assert!(SizeClass(class.0 - 1).size() < length);
            }
        }
        assert_eq!(SizeClass::holding(0), None);
        assert_eq!(SizeClass::holding(PAGE_SIZE + 1), None);
    }

    #[test]
    fn little_is_lost_at_the_end_of_a_slab() {
        for number in 0..SizeClass::COUNT {
            let class = SizeClass::from_number(u8::try_from(number).unwrap()).unwrap();
            let used = class.slots() as usize * class.size();
            assert!(used <= SLAB_SIZE && SLAB_SIZE - used <= SLAB_SIZE / 64, "{class:?}: {used}");
        }
    }
}
