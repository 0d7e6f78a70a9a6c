//! From a key (64 bits of a page's hash) to the records that may hold the page.
//!
//! Keys enter with record numbers; runs of record numbers with equal keys leave. Keys are not kept: a record has
//! its own, and `key_of` reads it. What must never happen: an answer being trusted. The index only says where to
//! look, and after damage it may say nothing, or something wrong.
//!
//! # Shape
//! Linear hashing: with `n` buckets and `b` the greatest power of two up to `n`, a key belongs to bucket
//! `key mod 2b`, or `key mod b` where the former does not exist yet. One insertion splits at most one bucket and
//! there is no table to copy, so no insertion is slow and the cost of an entry is the same at every size.
//!
//! In a bucket, record numbers are sorted by key. The low bits of a key choose the bucket and the high bits are
//! evenly spread, so a search that interpolates reads few records: 4.3 on average among 100,000 entries, where
//! open addressing at a comparable density reads a dozen.
//!
//! # Cost of an entry
//! 4 bytes for the number. A bucket, of 72 to 96 entries on average, adds 24 bytes of vector (27 with the idle
//! eighth), 16 of the allocator's and 4 to 12 spare entries: 0.6 to 1.3 bytes an entry.
//!
//! # Limits that hold against a guest that chooses its hashes
//! xxh3 is no cryptographic hash. A key is given to at most 8 records, and a bucket grows to at most 1,024; what
//! goes beyond is *declined*: its page is stored, and never found as a duplicate.
use crate::{
    record::RecordNumber,
    stats::{reserve_eighth, shrink_idle},
};
use alloc::{vec, vec::Vec};

/// Entries per bucket, on average, above which a bucket is split.
const BUCKET_MEAN: usize = 96;
/// Entries per bucket, on average, below which two are merged.
const BUCKET_MEAN_MIN: usize = 72;
/// Entries that a bucket has room for beyond those it holds, when it grows.
const BUCKET_SPARE: usize = 8;
/// Entries beyond which a bucket declines.
const BUCKET_MAX: usize = 1024;
/// Entries with one key beyond which they are declined: each costs a comparison of pages.
const RUN_MAX: usize = 8;
/// Steps of a search that interpolate, before it halves.
const INTERPOLATIONS: u32 = 6;
/// What an allocator commonly adds to a piece of memory.
const ALLOCATION_SIZE: usize = 16;

/// See the file's head.
#[derive(Clone, Debug)]
pub(crate) struct Index {
    /// Never empty.
    buckets: Vec<Vec<RecordNumber>>,
    entries: usize,
    declined: usize,
    /// The sum of the buckets' capacities, in entries.
    room: usize,
}

impl Index {
    pub(crate) fn new() -> Self {
        Self { buckets: vec![Vec::new()], entries: 0, declined: 0, room: 0 }
    }

    /// The records that may have `key`, at most 8.
    pub(crate) fn run(&self, key: u64, key_of: impl Fn(RecordNumber) -> u64) -> &[RecordNumber] {
        let Some(bucket) = self.buckets.get(address(key, self.buckets.len())) else { return &[] };
        let start = lower_bound(bucket, key, &key_of);
        bucket.get(start..start + run_length(bucket, start, key, &key_of)).unwrap_or(&[])
    }

    /// Enters a record under its key, unless it is to be declined.
    pub(crate) fn insert(&mut self, key: u64, number: RecordNumber, key_of: impl Fn(RecordNumber) -> u64) {
        let place = address(key, self.buckets.len());
        let Some(bucket) = self.buckets.get_mut(place) else { return };
        let position = lower_bound(bucket, key, &key_of);
        if bucket.len() >= BUCKET_MAX || run_length(bucket, position, key, &key_of) >= RUN_MAX {
            self.declined += 1;
            return;
        }
        let before = bucket.capacity();
        if bucket.len() == before {
            bucket.reserve_exact(BUCKET_SPARE);
        }
        bucket.insert(position, number);
        self.room += bucket.capacity() - before;
        self.entries += 1;
        if self.entries > self.buckets.len() * BUCKET_MEAN {
            self.split(key_of);
        }
    }

    /// Takes a record out. Where its key was damaged since it went in, it is sought everywhere.
    pub(crate) fn remove(&mut self, key: u64, number: RecordNumber, key_of: impl Fn(RecordNumber) -> u64) {
        let place = address(key, self.buckets.len());
        if !self.remove_from(place, number) {
            if self.declined > 0 {
                self.declined -= 1;
            } else {
                // Not where its key says and never declined: the key is not what it was.
                let _ = (0..self.buckets.len()).any(|place| self.remove_from(place, number));
            }
        }
        if self.buckets.len() > 1 && self.entries < self.buckets.len() * BUCKET_MEAN_MIN {
            self.merge(key_of);
        }
    }

    /// Bytes of the index.
    pub(crate) const fn metadata_size(&self) -> usize {
        self.buckets.capacity() * size_of::<Vec<RecordNumber>>()
            + self.buckets.len() * ALLOCATION_SIZE
            + self.room * size_of::<RecordNumber>()
    }

    /// A scan of one bucket by number reads no record and needs no order: about 30 ns.
    fn remove_from(&mut self, place: usize, number: RecordNumber) -> bool {
        let Some(bucket) = self.buckets.get_mut(place) else { return false };
        let Some(position) = bucket.iter().position(|entry| *entry == number) else { return false };
        bucket.remove(position);
        let before = bucket.capacity();
        if before - bucket.len() > 2 * BUCKET_SPARE {
            bucket.shrink_to(bucket.len() + BUCKET_SPARE);
        }
        self.room -= before - bucket.capacity();
        self.entries -= 1;
        true
    }

    /// Adds a bucket and moves into it what now belongs there, all of it from one other bucket.
    fn split(&mut self, key_of: impl Fn(RecordNumber) -> u64) {
        let added = self.buckets.len();
        let Some(bucket) = self.buckets.get_mut(added - greatest_power(added)) else { return };
        let before = bucket.capacity();
        let moves = |number: &RecordNumber| address(key_of(*number), added + 1) == added;
        let mut moved = Vec::new();
        moved.reserve_exact(bucket.len() / 2 + BUCKET_SPARE);
        moved.extend(bucket.iter().copied().filter(&moves));
        bucket.retain(|number| !moves(number));
        bucket.shrink_to(bucket.len() + BUCKET_SPARE);
        moved.shrink_to(moved.len() + BUCKET_SPARE);
        self.room = self.room + bucket.capacity() + moved.capacity() - before;
        reserve_eighth(&mut self.buckets, added + 1);
        self.buckets.push(moved);
    }

    /// Undoes the last split.
    fn merge(&mut self, key_of: impl Fn(RecordNumber) -> u64) {
        let Some(moved) = self.buckets.pop() else { return };
        let removed = self.buckets.len();
        if let Some(bucket) = self.buckets.get_mut(removed - greatest_power(removed)) {
            let before = bucket.capacity() + moved.capacity();
            bucket.reserve_exact(moved.len() + BUCKET_SPARE);
            bucket.extend(moved);
            // A stable sort finds the two sorted runs and merges them.
            bucket.sort_by_key(|number| key_of(*number));
            self.room = self.room + bucket.capacity() - before;
        }
        shrink_idle(&mut self.buckets);
    }
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

/// The position of the first entry whose key is not below `key`; where damage broke the order, any position.
fn lower_bound(bucket: &[RecordNumber], key: u64, key_of: impl Fn(RecordNumber) -> u64) -> usize {
    let (mut low, mut high) = (0, bucket.len());
    let (mut below, mut above) = (0, u64::MAX);
    let mut steps = 0;
    while low < high {
        let span = high - low;
        let offset = if steps < INTERPOLATIONS { part(span, key - below, above - below) } else { span / 2 };
        let Some(number) = bucket.get(low + offset) else { return high };
        let found = key_of(*number);
        // `below < key <= above` holds throughout, whatever keys are found, so the differences are in range.
        if found < key {
            (low, below) = (low + offset + 1, found);
        } else {
            (high, above) = (low + offset, found);
        }
        steps += 1;
    }
    low
}

/// How many entries from `start` on have the key, counted up to the limit of a run.
fn run_length(
    bucket: &[RecordNumber],
    start: usize,
    key: u64,
    key_of: impl Fn(RecordNumber) -> u64,
) -> usize {
    let tail = bucket.get(start..).unwrap_or(&[]);
    tail.iter().take(RUN_MAX).take_while(|number| key_of(**number) == key).count()
}

/// `span * part / whole`, rounded down and below `span`, for `part <= whole`.
fn part(span: usize, part: u64, whole: u64) -> usize {
    let offset = span as u128 * u128::from(part) / (u128::from(whole) + 1);
    usize::try_from(offset).unwrap_or(span / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::mix;
    use core::cell::Cell;

    fn key_of(number: RecordNumber) -> u64 {
        mix(u64::from(number.0))
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
            assert_eq!(index.run(key_of(number), key_of), [number]);
        }
        for number in all.clone().filter(|number| number.0 % 10 != 0) {
            index.remove(key_of(number), number, key_of);
        }
        for number in all.clone() {
            let expected: &[_] = if number.0 % 10 == 0 { &[number] } else { &[] };
            assert_eq!(index.run(key_of(number), key_of), expected);
        }
        for number in all.filter(|number| number.0 % 10 == 0) {
            index.remove(key_of(number), number, key_of);
        }
        assert_eq!((index.entries, index.buckets.len()), (0, 1));
        assert_eq!(index.room, index.buckets.iter().map(Vec::capacity).sum::<usize>());
    }

    #[test]
    fn a_search_reads_few_records() {
        let mut index = Index::new();
        for number in (0..100_000).map(RecordNumber) {
            index.insert(key_of(number), number, key_of);
        }
        let reads = Cell::new(0);
        for absent in 100_000..110_000 {
            index.run(mix(absent), |number| {
                reads.set(reads.get() + 1);
                key_of(number)
            });
        }
        assert!(reads.get() < 50_000, "{} reads for 10,000 searches", reads.get());
    }

    #[test]
    fn a_key_has_at_most_eight_records_and_a_bucket_declines_beyond_its_limit() {
        let mut index = Index::new();
        let same = |_| 5;
        for number in (0..20).map(RecordNumber) {
            index.insert(5, number, same);
        }
        assert_eq!((index.run(5, same).len(), index.entries, index.declined), (8, 8, 12));
        let mut index = Index::new();
        // Equal in their low bits, as a guest might choose them: all in one bucket.
        let aligned = |number: RecordNumber| u64::from(number.0) << 40;
        for number in (0..5_000).map(RecordNumber) {
            index.insert(aligned(number), number, aligned);
        }
        assert!(index.declined > 0 && index.buckets.iter().all(|bucket| bucket.len() <= BUCKET_MAX));
        for number in (0..5_000).map(RecordNumber) {
            index.remove(aligned(number), number, aligned);
        }
        assert_eq!((index.entries, index.declined), (0, 0));
    }

    #[test]
    fn a_record_whose_key_was_damaged_is_still_taken_out() {
        let mut index = Index::new();
        for number in (0..10_000).map(RecordNumber) {
            index.insert(key_of(number), number, key_of);
        }
        index.remove(!key_of(RecordNumber(77)), RecordNumber(77), key_of);
        assert_eq!(index.entries, 9_999);
        assert!(index.run(key_of(RecordNumber(77)), key_of).is_empty());
    }
}
