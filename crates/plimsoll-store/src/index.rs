//! From a key (64 bits of a page's hash) to the records that may hold the page.
//!
//! Keys enter with record numbers; numbers of records that have a key leave. Of a key eight bits are kept, its *tag*: a
//! record has its own key, and `key_of` reads it. What must never happen: an answer being trusted. The index only says
//! where to look, and after damage it may say nothing, or something wrong.
//!
//! # Shape
//! Linear hashing: with `n` buckets and `b` the greatest power of two up to `n`, a key belongs to bucket
//! `key mod 2b`, or `key mod b` where the former does not exist yet. One insertion splits at most one bucket and
//! there is no table to copy, so no insertion is slow and the cost of an entry is the same at every size.
//!
//! The low bits of a key choose the bucket, the high eight are the tag. Entries of a bucket are in no order, in groups of
//! eight whose tags are compared in one word. A record is read only where the tag is the key's: for six searches of
//! ten one, and each such read is one of memory that is in no cache.
//!
//! # Cost of an entry
//! 4 bytes for the number and 1 for the tag. A bucket, of 108 to 144 entries on average, adds 16 bytes of slice (18
//! with the idle eighth), 16 of the allocator's and half a group: 0.4 to 0.5 bytes an entry.
//!
//! # Limits that hold against a guest that chooses its hashes
//! xxh3 is no cryptographic hash. In a bucket a tag is given to at most 8 entries, each of which may cost a search a read
//! and a comparison of pages; what goes beyond is *declined*: its page is stored, and never found as a duplicate. Of pages
//! that nobody chose, that is less than one in a hundred thousand.
use crate::{
    record::RecordNumber,
    stats::{reserve_eighth, shrink_idle},
};
use alloc::{boxed::Box, vec, vec::Vec};

/// Entries per bucket, on average, above which a bucket is split.
const BUCKET_MEAN: usize = 144;
/// Entries per bucket, on average, below which two are merged.
const BUCKET_MEAN_MIN: usize = 108;
/// Entries of a bucket that may have the same tag.
const TAG_MAX: usize = 8;
/// What an allocator commonly adds to a piece of memory.
const ALLOCATION_SIZE: usize = 16;
/// Entries of a group: tags in one word.
const GROUP: usize = size_of::<u64>();
/// In the place of an entry that is not there. No record has this number.
const VACANT: RecordNumber = RecordNumber(u32::MAX);

/// See the file's head.
#[derive(Clone, Debug)]
pub(crate) struct Index {
    /// Never empty.
    buckets: Vec<Bucket>,
    entries: usize,
    declined: usize,
    /// Groups of all buckets.
    groups: usize,
}

/// Entries in no order. Only the last group has vacant places, at its end, and at least one entry.
#[derive(Clone, Debug, Default)]
struct Bucket(Box<[Group]>);

#[derive(Clone, Copy, Debug)]
struct Group {
    tags: [u8; GROUP],
    numbers: [RecordNumber; GROUP],
}

impl Index {
    pub(crate) fn new() -> Self {
        Self { buckets: vec![Bucket::default()], entries: 0, declined: 0, groups: 0 }
    }

    /// The records that have `key`.
    pub(crate) fn find(
        &self,
        key: u64,
        key_of: impl Fn(RecordNumber) -> u64,
    ) -> impl Iterator<Item = RecordNumber> {
        let bucket = self.buckets.get(address(key, self.buckets.len()));
        let likely = bucket.into_iter().flat_map(move |bucket| bucket.tagged(tag(key)));
        likely.filter(move |number| key_of(*number) == key)
    }

    /// Enters a record under its key, unless it is to be declined.
    pub(crate) fn insert(&mut self, key: u64, number: RecordNumber, key_of: impl Fn(RecordNumber) -> u64) {
        self.enter(address(key, self.buckets.len()), tag(key), number);
        if self.entries > self.buckets.len() * BUCKET_MEAN {
            self.split(key_of);
        }
    }

    /// Takes a record out. One whose key was damaged since it went in, and one that is not where its key says although none was
    /// declined, is sought everywhere.
    pub(crate) fn remove(&mut self, key: Option<u64>, number: RecordNumber) {
        let place = key.map(|key| address(key, self.buckets.len()));
        let mut is_found = place.is_some_and(|place| self.remove_from(place, number));
        if !is_found && (place.is_none() || self.declined == 0) {
            is_found = (0..self.buckets.len()).any(|place| self.remove_from(place, number));
        }
        if !is_found {
            self.declined = self.declined.saturating_sub(1);
        }
        if self.buckets.len() > 1 && self.entries < self.buckets.len() * BUCKET_MEAN_MIN {
            self.merge();
        }
    }

    /// Bytes of the index.
    pub(crate) const fn metadata_size(&self) -> usize {
        self.buckets.capacity() * size_of::<Bucket>()
            + self.buckets.len() * ALLOCATION_SIZE
            + self.groups * size_of::<Group>()
    }

    fn enter(&mut self, place: usize, tag: u8, number: RecordNumber) {
        let Some(bucket) = self.buckets.get_mut(place) else { return };
        if bucket.tagged(tag).count() >= TAG_MAX {
            self.declined += 1;
            return;
        }
        let before = bucket.0.len();
        bucket.push(tag, number);
        self.groups += bucket.0.len() - before;
        self.entries += 1;
    }

    /// A scan of one bucket by number reads no record.
    fn remove_from(&mut self, place: usize, number: RecordNumber) -> bool {
        let Some(bucket) = self.buckets.get_mut(place) else { return false };
        let Some(position) = bucket.numbers().position(|entry| entry == number) else { return false };
        let before = bucket.0.len();
        bucket.swap_remove(position);
        self.groups -= before - bucket.0.len();
        self.entries -= 1;
        true
    }

    /// Adds a bucket and moves into it what now belongs there, all of it from one other bucket.
    fn split(&mut self, key_of: impl Fn(RecordNumber) -> u64) {
        let added = self.buckets.len();
        let Some(bucket) = self.buckets.get_mut(added - greatest_power(added)) else { return };
        let before = bucket.0.len();
        let mut moved = Bucket::default();
        // From behind: what takes the place of an entry that goes was looked at before.
        for position in (0..bucket.numbers().count()).rev() {
            let Some((_, number)) = bucket.entry(position) else { continue };
            if address(key_of(number), added + 1) == added
                && let Some((tag, number)) = bucket.swap_remove(position)
            {
                moved.push(tag, number);
            }
        }
        self.groups = self.groups + bucket.0.len() + moved.0.len() - before;
        reserve_eighth(&mut self.buckets, added + 1);
        self.buckets.push(moved);
    }

    /// Undoes the last split.
    fn merge(&mut self) {
        let Some(mut moved) = self.buckets.pop() else { return };
        self.groups -= moved.0.len();
        let place = self.buckets.len() - greatest_power(self.buckets.len());
        while let Some((tag, number)) = moved.swap_remove(0) {
            self.entries -= 1;
            self.enter(place, tag, number);
        }
        shrink_idle(&mut self.buckets);
    }
}

impl Bucket {
    /// The entries that have the tag.
    fn tagged(&self, tag: u8) -> impl Iterator<Item = RecordNumber> {
        self.0.iter().flat_map(move |group| group.tagged(tag))
    }

    fn numbers(&self) -> impl Iterator<Item = RecordNumber> {
        self.0.iter().flat_map(|group| group.numbers).filter(|number| *number != VACANT)
    }

    fn entry(&self, position: usize) -> Option<(u8, RecordNumber)> {
        let group = self.0.get(position / GROUP)?;
        let entry = (group.tags[position % GROUP], group.numbers[position % GROUP]);
        (entry.1 != VACANT).then_some(entry)
    }

    fn push(&mut self, tag: u8, number: RecordNumber) {
        let vacant = self.0.last().and_then(|group| group.numbers.iter().position(|entry| *entry == VACANT));
        let place = vacant.unwrap_or(0);
        if vacant.is_none() {
            self.resize(self.0.len() + 1);
        }
        if let Some(group) = self.0.last_mut() {
            group.tags[place] = tag;
            group.numbers[place] = number;
        }
    }

    /// Takes an entry out; the last one takes its place.
    fn swap_remove(&mut self, position: usize) -> Option<(u8, RecordNumber)> {
        let removed = self.entry(position)?;
        let group = self.0.last_mut()?;
        let last = group.numbers.iter().rposition(|number| *number != VACANT)?;
        let moved = (group.tags[last], core::mem::replace(&mut group.numbers[last], VACANT));
        if let Some(group) = self.0.get_mut(position / GROUP).filter(|_| removed != moved) {
            (group.tags[position % GROUP], group.numbers[position % GROUP]) = moved;
        }
        if last == 0 {
            self.resize(self.0.len() - 1);
        }
        Some(removed)
    }

    fn resize(&mut self, groups: usize) {
        let mut resized = core::mem::take(&mut self.0).into_vec();
        resized.reserve_exact(groups.saturating_sub(resized.len()));
        resized.resize(groups, Group { tags: [0; GROUP], numbers: [VACANT; GROUP] });
        self.0 = resized.into_boxed_slice();
    }
}

impl Group {
    /// The entries that have the tag: eight tags are compared at once, and each that is the same leaves the high bit of
    /// its byte (Warren, *Hacker's Delight*, 6-1).
    fn tagged(&self, tag: u8) -> impl Iterator<Item = RecordNumber> {
        const LOW: u64 = u64::from_le_bytes([0x7f; GROUP]);
        let differences = u64::from_le_bytes(self.tags) ^ u64::from_le_bytes([tag; GROUP]);
        let mut equal = !(((differences & LOW) + LOW) | differences | LOW);
        core::iter::from_fn(move || {
            let place = equal.trailing_zeros() / u8::BITS;
            equal &= equal.wrapping_sub(1);
            self.numbers.get(place as usize).copied()
        })
        .filter(|number| *number != VACANT)
    }
}

/// The high bits of a key, which no choice of a bucket looks at.
const fn tag(key: u64) -> u8 {
    let [.., high] = key.to_le_bytes();
    high
}

/// The greatest power of two that is at most `count`, which must not be 0.
const fn greatest_power(count: usize) -> usize {
    1 << (usize::BITS - 1 - count.leading_zeros())
}

/// The bucket that `key` belongs to when there are `buckets`, which must not be 0.
fn address(key: u64, buckets: usize) -> usize {
    let power = greatest_power(buckets) as u64;
    let wide = key & (2 * power - 1);
    let narrow = key & (power - 1);
    // Both are below twice a count of things in memory.
    usize::try_from(if wide < buckets as u64 { wide } else { narrow }).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::mix;
    use core::cell::Cell;

    fn key_of(number: RecordNumber) -> u64 {
        mix(u64::from(number.0))
    }

    fn found(index: &Index, number: RecordNumber) -> Vec<RecordNumber> {
        index.find(key_of(number), key_of).collect()
    }

    #[test]
    fn entries_are_found_while_buckets_split_and_gone_after_they_merge() {
        let mut index = Index::new();
        let all = (0..20_000).map(RecordNumber);
        for number in all.clone() {
            index.insert(key_of(number), number, key_of);
        }
        assert!(index.buckets.len() > 100 && index.declined == 0);
        for number in all.clone() {
            assert_eq!(found(&index, number), [number]);
        }
        for number in all.clone().filter(|number| number.0 % 10 != 0) {
            index.remove(Some(key_of(number)), number);
        }
        for number in all.clone() {
            let expected: &[_] = if number.0 % 10 == 0 { &[number] } else { &[] };
            assert_eq!(found(&index, number), expected);
        }
        for number in all.filter(|number| number.0 % 10 == 0) {
            index.remove(Some(key_of(number)), number);
        }
        assert_eq!((index.entries, index.buckets.len()), (0, 1));
        assert_eq!(index.groups, 0);
    }

    #[test]
    fn a_search_reads_less_than_one_record() {
        let mut index = Index::new();
        for number in (0..100_000).map(RecordNumber) {
            index.insert(key_of(number), number, key_of);
        }
        let reads = Cell::new(0);
        for absent in 100_000..110_000 {
            let counted = |number| {
                reads.set(reads.get() + 1);
                key_of(number)
            };
            assert_eq!(index.find(mix(absent), counted).count(), 0);
        }
        assert!((3_000..8_000).contains(&reads.get()), "{} reads for 10,000 searches", reads.get());
        assert!(index.declined < 3, "{} of 100,000 were declined", index.declined);
    }

    #[test]
    fn every_place_of_a_group_is_compared_and_no_other() {
        let tags = [0, 1, 0x80, 0x7f, 0xff, 0x81, 0, 0x80];
        let group = Group { tags, numbers: [0, 1, 2, 3, 4, 5, 6, u32::MAX].map(RecordNumber) };
        for tag in 0..=u8::MAX {
            let places = (0..7).filter(|place| tags[*place as usize] == tag);
            assert!(group.tagged(tag).eq(places.map(RecordNumber)), "{tag}");
        }
    }

    #[test]
    fn a_tag_has_at_most_eight_entries_in_a_bucket_also_after_buckets_merge() {
        let mut index = Index::new();
        let same = |_| 5;
        for number in (0..20).map(RecordNumber) {
            index.insert(5, number, same);
        }
        assert_eq!((index.find(5, same).count(), index.entries, index.declined), (8, 8, 12));
        // One tag everywhere, as a guest might choose it, in ever more buckets and then in ever fewer.
        let mut index = Index::new();
        let chosen = |number: RecordNumber| key_of(number) >> (u64::BITS / 8 * (number.0 % 2));
        for number in (0..40_000).map(RecordNumber) {
            index.insert(chosen(number), number, chosen);
        }
        assert!(index.declined > 10_000, "{}", index.declined);
        for number in (0..40_000).step_by(2).map(RecordNumber) {
            index.remove(Some(chosen(number)), number);
            assert!(index.buckets.iter().all(|bucket| bucket.tagged(0).count() <= TAG_MAX));
        }
        for number in (1..40_000).step_by(2).map(RecordNumber) {
            index.remove(Some(chosen(number)), number);
        }
        assert_eq!((index.entries, index.declined, index.buckets.len()), (0, 0, 1));
    }

    #[test]
    fn a_record_whose_key_was_damaged_is_still_taken_out() {
        let mut index = Index::new();
        for number in (0..10_000).map(RecordNumber) {
            index.insert(key_of(number), number, key_of);
        }
        index.remove(Some(!key_of(RecordNumber(77))), RecordNumber(77));
        assert_eq!(index.entries, 9_999);
        assert!(found(&index, RecordNumber(77)).is_empty());
        // Also where others were declined, if it is known that the key was damaged.
        (0..9).for_each(|more| index.insert(5, RecordNumber(20_000 + more), |_| 5));
        assert_eq!(index.declined, 1);
        index.remove(None, RecordNumber(78));
        assert!(found(&index, RecordNumber(78)).is_empty() && index.declined == 1);
    }
}
