//! How many stored pages differ from another one only a little: an estimate.
//!
//! Sketches of pages that are stored enter, a share leaves. Nothing is decided by it: it says what storing differences
//! would be worth. After Difference Engine (Gupta et al., OSDI 2008): two groups of two pieces of 64 bytes at fixed
//! places of a page are hashed, and a page with a group that another has is taken to be like it. Of all groups only
//! those are looked at whose hash ends in so many zero bits that 128 entries last, however large the store is.
//!
//! The estimate is low for pages with many differences, since one inside of a group hides it.
use crate::record::Handle;
use alloc::boxed::Box;
use core::num::NonZeroU64;
use plimsoll_types::PageBytes;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of a piece.
const PIECE: usize = 64;
/// Where the pieces of each group begin: in different halves of a page, and at no multiple of 512, where structures
/// with headers begin.
const GROUPS: [[usize; 2]; 2] = [[320, 2_752], [1_472, 3_648]];
const ENTRIES: usize = 128;
/// Entries that are to be in use.
const ENTRIES_AIM: u64 = 64;
/// Groups looked at after which earlier ones count half.
const LOOKED_MAX: u64 = 4_096;

/// The groups of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sketch([Option<NonZeroU64>; 2]);

#[derive(Clone, Copy, Debug)]
struct Entry {
    group: NonZeroU64,
    handle: Handle,
}

const _: () = assert!(size_of::<Option<Entry>>() == 16);

/// See the file's head.
#[derive(Clone, Debug)]
pub(crate) struct Similar {
    /// Made with the first page that has data.
    entries: Option<Box<[Option<Entry>; ENTRIES]>>,
    looked: u64,
    alike: u64,
}

impl Sketch {
    /// Of a page: about 30 ns.
    pub(crate) fn of(page: &PageBytes) -> Self {
        Self(GROUPS.map(|places| {
            let mut group = [0; 2 * PIECE];
            for (part, start) in group.chunks_exact_mut(PIECE).zip(places) {
                part.copy_from_slice(&page[start..start + PIECE]);
            }
            // One byte repeated, mostly zero, says nothing about the rest of the page.
            let is_plain = group.iter().all(|byte| *byte == group[0]);
            if is_plain { None } else { NonZeroU64::new(xxh3_64(&group)) }
        }))
    }
}

impl Similar {
    pub(crate) const fn new() -> Self {
        Self { entries: None, looked: 0, alike: 0 }
    }

    /// Takes note of a page that is now stored beside `objects` others.
    pub(crate) fn note(
        &mut self,
        sketch: Sketch,
        handle: Handle,
        objects: u64,
        is_live: impl Fn(Handle) -> bool,
    ) {
        let rate = (objects * GROUPS.len() as u64 / ENTRIES_AIM).checked_ilog2().map_or(0, |log| log + 1);
        for group in sketch.0.into_iter().flatten().filter(|group| group.trailing_zeros() >= rate) {
            let place = usize::try_from(group.get() >> (u64::BITS - ENTRIES.ilog2())).unwrap_or(0);
            let entries = self.entries.get_or_insert_with(|| Box::new([None; ENTRIES]));
            let Some(entry) = entries.get_mut(place) else { continue };
            if self.looked == LOOKED_MAX {
                (self.looked, self.alike) = (self.looked / 2, self.alike / 2);
            }
            self.looked += 1;
            match entry {
                Some(here) if here.group == group && is_live(here.handle) => self.alike += 1,
                _ => *entry = Some(Entry { group, handle }),
            }
        }
    }

    /// How many of `objects` are like another.
    pub(crate) fn estimate(&self, objects: u64) -> u64 {
        (self.alike * objects).checked_div(self.looked).unwrap_or(0)
    }

    /// Bytes of the table.
    pub(crate) const fn metadata_size() -> usize {
        size_of::<[Option<Entry>; ENTRIES]>()
    }
}
