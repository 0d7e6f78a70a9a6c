//! What a host may ask of a probing guest, command by command, and what the guest answers.
//!
//! Enters: a [`ProbeCommand`] from the channel page, of which [`ProbeCommand::check`] says whether it means anything.
//! Leaves: the pages it names in the order it names them ([`Walk`]), and a [`Probed`] with exact times by the guest's own
//! clock. What must never happen: a touch of memory between two timed touches that the command did not ask for, other
//! than the vCPU's own channel page.
use crate::random::{Permutation, hash3};
use core::fmt;
use core::ops::Range;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Pages of the longest run in [`Order::Scattered`].
pub const SCATTERED_RUN_MAX: u64 = 16;
/// Buckets of a probe's histogram, see [`probe_bucket`].
pub const PROBE_BUCKETS: usize = 480;
/// Buckets to each power of two.
const SUBDIVISIONS: usize = 16;
/// The power of two at which the first bucket starts; what is faster is counted in it.
const FIRST_EXPONENT: u32 = 5;

/// What is done with each page. The last four are for a guest that keeps [frames](crate::frames), the first three for one that
/// does not; [`Task::Verify`] compares whatever there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Task {
    /// It is written whole, with the contents of its first version.
    Populate = 1,
    /// Its first word is read.
    Read = 2,
    /// Its first word is written, with what it holds; what that is is found out before the clock is read.
    Write = 3,
    /// All of it is compared with what it must hold.
    Verify = 4,
    /// `pages` pages are allocated and written whole, in pieces of `stride` pages, 1 or 512; fewer if there are no more.
    Allocate = 5,
    /// What was allocated last is freed until `pages` pages are, or nothing is left.
    Free = 6,
    /// Pieces are allocated, compared and freed in random order, `passes` times or until the window changes; at most `pages`
    /// pages are kept at once.
    Churn = 7,
    /// What is kept is worked on as the guest's specification says, by the program of the number `stride` in
    /// [`WorkloadKind`](crate::spec::WorkloadKind): `passes` operations, or until the window changes. Bursts are not paused between.
    Work = 8,
}

/// In which order pages come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Order {
    /// One after the other.
    Ascending = 1,
    /// Each once, by a permutation of all of them.
    Random = 2,
    /// Every `stride`-th, ascending.
    Strided = 3,
    /// A run of 1 to [`SCATTERED_RUN_MAX`] pages somewhere in each stretch of `stride` pages; the stretches by a
    /// permutation, the pages of a run ascending.
    Scattered = 4,
}

/// One command.
///
/// ```text
///  0  number       counts the commands of a vCPU from 1; 0: there is none, ask again
///  8  task         Task
/// 12  order        Order
/// 16  first_page   of the vCPU's own pages, from 0
/// 24  pages        how many from there on; what lies behind the last page of the vCPU is left out
/// 32  stride       strided: from one page to the next; scattered: pages of a stretch; not 0 there, else ignored
/// 40  seed         randomness of the order
/// 48  passes       how often all of it is done; 0: until the window changes
/// 56  pause_ns     sleep after each pass but the last
/// 64  end
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ProbeCommand {
    /// Counts from 1; 0 is no command.
    pub number: u64,
    /// [`Task`].
    pub task: u32,
    /// [`Order`].
    pub order: u32,
    /// First of the vCPU's own pages.
    pub first_page: u64,
    /// How many.
    pub pages: u64,
    /// Pages from one to the next, or of a stretch.
    pub stride: u64,
    /// Randomness of the order.
    pub seed: u64,
    /// How often; 0 is until the window changes.
    pub passes: u64,
    /// Sleep between passes.
    pub pause_ns: u64,
}

impl ProbeCommand {
    /// Once over all of the vCPU's pages.
    pub const fn new(task: Task, order: Order) -> Self {
        Self {
            number: 0,
            task: task as u32,
            order: order as u32,
            first_page: 0,
            pages: u64::MAX,
            stride: 1,
            seed: 1,
            passes: 1,
            pause_ns: 0,
        }
    }

    /// Task and order, if every number is in its range.
    ///
    /// # Errors
    /// [`ProbeError`] names the number that is not.
    pub const fn check(&self) -> Result<(Task, Order), ProbeError> {
        let task = match self.task {
            1 => Task::Populate,
            2 => Task::Read,
            3 => Task::Write,
            4 => Task::Verify,
            5 => Task::Allocate,
            6 => Task::Free,
            7 => Task::Churn,
            8 => Task::Work,
            found => return Err(ProbeError::UnknownTask { found }),
        };
        let order = match self.order {
            1 => Order::Ascending,
            2 => Order::Random,
            3 | 4 if self.stride == 0 => return Err(ProbeError::NoStride),
            3 => Order::Strided,
            4 => Order::Scattered,
            found => return Err(ProbeError::UnknownOrder { found }),
        };
        Ok((task, order))
    }
}

/// Why a command cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProbeError {
    /// No task has this number.
    UnknownTask {
        /// The number.
        found: u32,
    },
    /// No order has this number.
    UnknownOrder {
        /// The number.
        found: u32,
    },
    /// The order needs a stride.
    NoStride,
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownTask { found } => write!(f, "no probe task has number {found}: use 1 to 8"),
            Self::UnknownOrder { found } => write!(f, "no probe order has number {found}: use 1 to 4"),
            Self::NoStride => f.write_str("a strided or scattered order needs a stride: use at least 1"),
        }
    }
}

impl core::error::Error for ProbeError {}

/// What became of one command.
///
/// ```text
///    0  number           of the command, 0 before the first
///    8  pages            done, each time counted
///   16  ticks            from before the first page to after the last, pauses included
///   24  touch_ticks      the sum of what single pages took
///   32  touch_max_ticks  the slowest page
///   40  wrong_words      words found wrong
///   48  wrong_pages      pages in which they lay
///   56  reserved         0
///   64  latency          480 x u32, pages by probe_bucket, each stops at its largest value
/// 1984  end
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Probed {
    /// Of the command, 0 before the first.
    pub number: u64,
    /// Pages done, each time counted.
    pub pages: u64,
    /// From before the first page to after the last.
    pub ticks: u64,
    /// The sum of what single pages took.
    pub touch_ticks: u64,
    /// The slowest page.
    pub touch_max_ticks: u64,
    /// Words found wrong.
    pub wrong_words: u64,
    /// Pages in which they lay.
    pub wrong_pages: u64,
    /// Zero.
    pub reserved: u64,
    /// Pages by [`probe_bucket`] of the ticks they took.
    pub latency: [u32; PROBE_BUCKETS],
}

impl Probed {
    /// The answer to no command.
    pub const NONE: Self = Self {
        number: 0,
        pages: 0,
        ticks: 0,
        touch_ticks: 0,
        touch_max_ticks: 0,
        wrong_words: 0,
        wrong_pages: 0,
        reserved: 0,
        latency: [0; PROBE_BUCKETS],
    };

    /// Counts a page that took `ticks`.
    pub(crate) fn note(&mut self, ticks: u64) {
        self.pages += 1;
        self.touch_ticks = self.touch_ticks.saturating_add(ticks);
        self.touch_max_ticks = self.touch_max_ticks.max(ticks);
        if let Some(count) = self.latency.get_mut(probe_bucket(ticks)) {
            *count = count.saturating_add(1);
        }
    }
}

/// The bucket of a probe's histogram for a page that took `ticks`.
///
/// Sixteen buckets to each power of two, four times as fine as [`latency_bucket`](crate::abi::latency_bucket): from 32 ticks, and what is faster, to
/// 2^35, and what is slower. So a bucket is 3 to 6 % wide.
pub const fn probe_bucket(ticks: u64) -> usize {
    if ticks < 1 << FIRST_EXPONENT {
        return 0;
    }
    let exponent = ticks.ilog2();
    // The 4 bits after the highest.
    let sub = (ticks >> (exponent - 4) & 0xf) as usize;
    let bucket = (exponent - FIRST_EXPONENT) as usize * SUBDIVISIONS + sub;
    if bucket < PROBE_BUCKETS { bucket } else { PROBE_BUCKETS - 1 }
}

/// The fewest ticks that fall into a bucket, the first apart, which has all below the second's.
pub const fn probe_floor(bucket: usize) -> u64 {
    let mantissa = (SUBDIVISIONS + bucket % SUBDIVISIONS) as u64;
    mantissa << (bucket / SUBDIVISIONS + FIRST_EXPONENT as usize - 4)
}

/// The pages of one pass of a command, in order.
#[derive(Clone, Debug)]
pub struct Walk {
    order: Order,
    first: u64,
    /// Pages to walk in.
    len: u64,
    stride: u64,
    seed: u64,
    permutation: Permutation,
    /// How many pages, or stretches of them, have been begun, and how many there are.
    begun: u64,
    end: u64,
    /// What is left of a run.
    run: Range<u64>,
}

impl Walk {
    /// The walk of a command in this order by a vCPU that owns so many pages.
    pub fn new(order: Order, command: &ProbeCommand, owned_pages: u64) -> Self {
        let ProbeCommand { first_page: first, pages, stride, seed, .. } = *command;
        let len = owned_pages.saturating_sub(first).min(pages);
        let stride = stride.max(1);
        let end = match order {
            Order::Ascending | Order::Random => len,
            Order::Strided | Order::Scattered => len.div_ceil(stride),
        };
        let permutation = Permutation::new(end, seed);
        Self { order, first, len, stride, seed, permutation, begun: 0, end, run: 0..0 }
    }

    /// The run in a stretch; it lies in the stretch and among the pages.
    fn run_in(&self, stretch: u64) -> Range<u64> {
        let start = stretch * self.stride;
        let room = self.stride.min(self.len - start);
        let hash = hash3(self.seed, stretch, 0);
        let length = (1 + (hash >> 32) % SCATTERED_RUN_MAX).min(room);
        let from = start + (hash & 0xffff_ffff) % (room - length + 1);
        from..from + length
    }
}

impl Iterator for Walk {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if let Some(page) = self.run.next() {
            return Some(self.first + page);
        }
        if self.begun == self.end {
            return None;
        }
        let begun = self.begun;
        self.begun += 1;
        let page = match self.order {
            Order::Ascending => begun,
            Order::Random => self.permutation.apply(begun),
            Order::Strided => begun * self.stride,
            Order::Scattered => {
                self.run = self.run_in(self.permutation.apply(begun));
                // A run has a page.
                self.run.next()?
            }
        };
        Some(self.first + page)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::collections::BTreeSet;
    use std::string::ToString;
    use std::vec;
    use std::vec::Vec;

    fn walk(order: Order, first_page: u64, pages: u64, stride: u64) -> Vec<u64> {
        let command = ProbeCommand { first_page, pages, stride, ..ProbeCommand::new(Task::Read, order) };
        Walk::new(order, &command, 1000).collect()
    }

    #[test]
    fn an_ascending_walk_ends_with_the_pages_of_the_vcpu() {
        assert_eq!(walk(Order::Ascending, 3, 4, 1), vec![3, 4, 5, 6]);
        assert_eq!(walk(Order::Ascending, 998, u64::MAX, 1), vec![998, 999]);
        for order in [Order::Ascending, Order::Random, Order::Strided, Order::Scattered] {
            assert_eq!(walk(order, 1000, 5, 8), Vec::<u64>::new());
            assert_eq!(walk(order, u64::MAX, u64::MAX, u64::MAX), Vec::<u64>::new());
        }
    }

    #[test]
    fn a_random_walk_visits_every_page_once_and_hardly_two_neighbours_in_a_row() {
        let pages = walk(Order::Random, 100, 900, 1);
        assert_eq!(pages.iter().copied().collect::<BTreeSet<_>>(), (100..1000).collect());
        assert_eq!(pages.len(), 900);
        let neighbours = pages.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
        assert!(neighbours < 20, "{neighbours}");
    }

    #[test]
    fn a_strided_walk_takes_every_so_many_and_a_scattered_one_a_run_of_each_stretch() {
        assert_eq!(walk(Order::Strided, 10, 25, 10), vec![10, 20, 30]);
        let pages = walk(Order::Scattered, 0, 1000, 64);
        let stretches: BTreeSet<u64> = pages.iter().map(|page| page / 64).collect();
        assert_eq!(stretches, (0..16).collect());
        let distinct: BTreeSet<u64> = pages.iter().copied().collect();
        assert_eq!(distinct.len(), pages.len());
        assert!((16..=16 * 16).contains(&pages.len()), "{}", pages.len());
        assert!(!pages.is_sorted(), "stretches come in no order");
        for stride in 1..20 {
            assert!(walk(Order::Scattered, 0, 1000, stride).iter().all(|page| *page < 1000));
        }
    }

    #[test]
    fn buckets_follow_each_other_and_each_starts_at_its_floor() {
        for bucket in 1..PROBE_BUCKETS {
            assert_eq!(probe_bucket(probe_floor(bucket)), bucket);
            assert_eq!(probe_bucket(probe_floor(bucket) - 1), bucket - 1);
        }
        assert_eq!((probe_bucket(0), probe_bucket(u64::MAX)), (0, PROBE_BUCKETS - 1));
    }

    #[test]
    fn a_page_is_counted_in_its_bucket_and_in_the_sums() {
        let mut answer = Probed::NONE;
        [100, 40, 100].into_iter().for_each(|ticks| answer.note(ticks));
        assert_eq!((answer.pages, answer.touch_ticks, answer.touch_max_ticks), (3, 240, 100));
        assert_eq!(answer.latency[probe_bucket(100)], 2);
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_name() {
        let good = ProbeCommand::new(Task::Write, Order::Scattered);
        assert_eq!(good.check(), Ok((Task::Write, Order::Scattered)));
        for (command, words) in [
            (ProbeCommand { task: 0, ..good }, "task has number 0"),
            (ProbeCommand { order: 5, ..good }, "order has number 5"),
            (ProbeCommand { stride: 0, ..good }, "needs a stride"),
        ] {
            let message = command.check().unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
