//! Addresses of the guest and of the host, and the dense indices derived from them.
use crate::size::{BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE, PageCount};
use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// True when the address is a multiple of the page size.
            pub const fn is_page_aligned(self) -> bool {
                self.0 & (PAGE_SIZE as u64 - 1) == 0
            }

            /// The address `bytes` further on, or `None` past the end of the address space.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{:#x}"), self.0)
            }
        }
    };
}

address!(
    /// A guest physical address, in bytes.
    Gpa,
    "gpa:"
);
address!(
    /// A host virtual address in the process that runs the machine, in bytes.
    Hva,
    "hva:"
);
address!(
    /// A host physical address, in bytes: what a host without an operating system below it works with.
    Hpa,
    "hpa:"
);

macro_rules! index {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u32);

        impl $name {
            /// The index as a subscript.
            pub const fn get(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

index!(
    /// A page of a guest, counted densely from 0, holes skipped. 32 bits reach 16 TiB.
    PageIndex,
    "page "
);
index!(
    /// A block of 512 pages of a guest, counted like [`PageIndex`].
    BlockIndex,
    "block "
);
index!(
    /// A page of a machine's airlock, counted from its base.
    SlotPage,
    "slot page "
);

impl PageIndex {
    /// The block the page lies in.
    pub const fn block(self) -> BlockIndex {
        BlockIndex(self.0 / BLOCK_PAGES)
    }

    /// The page's place in its block, 0 to 511.
    pub const fn in_block(self) -> u32 {
        self.0 % BLOCK_PAGES
    }
}

impl BlockIndex {
    /// The block's first page.
    pub const fn first_page(self) -> PageIndex {
        PageIndex(self.0 * BLOCK_PAGES)
    }
}

impl SlotPage {
    /// The slot (of one block) the page lies in.
    pub const fn slot(self) -> u32 {
        self.0 / BLOCK_PAGES
    }
}

/// A host page frame number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn:{:#x}", self.0)
    }
}

impl PageCount {
    /// The byte distance that many pages span.
    pub const fn byte_offset(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}
