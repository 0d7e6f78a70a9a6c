//! Streams: guests that go through memory in steps of one size, up or down, several of them at once.
//!
//! Enters: faults, and pages brought ahead that went to the store before their touch. Leaves: windows of pages to
//! bring, each twice as long as the one before, and how many pages brought earlier are proven used.
//!
//! A page brought ahead and used causes no event, so each window leaves the page in its middle out: the **marker**.
//! Its touch proves the pages before it used, and asks for the next window while the guest works through the second
//! half of this one. A stream whose marker is never touched goes when its place is needed.
//!
//! A stream is found at its second fault when nothing stored lies between it and one of the last faults (stride 1 or
//! -1), at its third when three of the last faults are in line. Leap (Al Maruf and Chowdhury, ATC '20) takes the
//! majority of the last differences instead; a stray fault spoils two differences, so with one in four there is no
//! majority, and interleaved readers never have one. Faults of known streams are not in that history, so neither
//! streams nor strays hide each other.
//!
//! Each window length has a score of how often its markers were touched. A length whose windows mostly fail is not
//! asked for, unless a stream has gone on long enough without it.
use super::ask;
use crate::bits::Bits;
use crate::replacement::Run;
use alloc::{collections::VecDeque, vec::Vec};
use plimsoll_types::PageIndex;

/// Streams followed at once: some vCPUs, some readers each.
const STREAMS_MAX: usize = 16;
/// Faults that belong to no stream, remembered to find streams.
const HISTORY: usize = 32;
/// The longest stride that is found, one block.
const STRIDE_MAX: i64 = 512;
/// Steps past its window at which a stream is still recognised: vCPUs that share a stream run past each other. Any
/// page of a window would be too many: with 16 long windows, each random touch would push some stream on.
const NEAR: i64 = 2;
/// Steps over pages that are there already, which cause no fault. Also the widest fault-around group.
const GAP_MAX: i64 = 16;
/// Window lengths: 4, 8, … 512 pages. FACTS: beyond batches of 64 a page gets hardly cheaper, but a marker costs a fault.
const LEVELS: u8 = 8;
/// Places looked at for a window beyond its length, where pages are there already.
const JUMP_MAX: usize = 512;
/// Advances without a longer window after which a stream tries one however badly that length has done.
const PATIENCE: u8 = 8;

/// How often the markers of windows of one length were touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Score {
    hits: u8,
    misses: u8,
}

impl Score {
    const OUTCOMES_MAX: u8 = 32;
    /// Failures before a length is judged.
    const MISSES_MIN: u8 = 4;

    fn is_good(self) -> bool {
        self.misses < Self::MISSES_MIN || self.hits >= self.misses
    }

    fn count(&mut self, hits: u8, misses: u8) {
        self.hits += hits;
        self.misses += misses;
        if self.hits + self.misses >= Self::OUTCOMES_MAX {
            *self = Self { hits: self.hits / 2, misses: self.misses / 2 };
        }
    }
}

/// Positions are page numbers that may lie outside of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stream {
    stride: i64,
    /// The newest page known to be touched.
    seen: i64,
    /// The page whose touch shows that the stream goes on.
    marker: i64,
    /// The first page that has not been asked for.
    next: i64,
    /// Its window is `2 << level` pages long; 0 has none.
    level: u8,
    /// Advances with a shorter window than it was due.
    waited: u8,
}

/// What a fault is to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At its marker, or the next stored page after its window.
    GoesOn,
    /// A page of its window: it has not been brought yet, or is a stray.
    Within,
}

impl Stream {
    /// Steps from one position to another, if both are on the stream's way.
    fn steps(&self, from: i64, to: i64) -> Option<i64> {
        ((to - from) % self.stride == 0).then(|| (to - from) / self.stride)
    }

    fn place_of(&self, page: i64, stored: &impl Fn(PageIndex) -> bool) -> Option<Place> {
        let is_at_marker = page == self.marker;
        match self.steps(self.next, page)? {
            past if is_at_marker || (0..=NEAR).contains(&past) => Some(Place::GoesOn),
            past @ NEAR..=GAP_MAX if is_bare(self.next, self.stride, past, stored) => Some(Place::GoesOn),
            past if past < 0 && self.steps(self.seen, page)? > 0 => Some(Place::Within),
            _ => None,
        }
    }
}

/// The streams of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Streams {
    /// Least recently advanced first.
    streams: Vec<Stream>,
    /// The last faults that belong to no stream, newest first.
    history: VecDeque<i64>,
    /// One a level, from level 1.
    scores: [Score; LEVELS as usize],
}

impl Streams {
    pub(super) fn new() -> Self {
        Self {
            streams: Vec::with_capacity(STREAMS_MAX),
            history: VecDeque::with_capacity(HISTORY + 1),
            scores: [Score::default(); LEVELS as usize],
        }
    }

    /// Streams followed now.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.streams.len()).unwrap_or(u32::MAX)
    }

    /// Bytes beside the value itself.
    pub(super) fn table_bytes(&self) -> usize {
        self.streams.capacity() * size_of::<Stream>() + self.history.capacity() * size_of::<i64>()
    }

    /// The guest touched a page. `None` when it belongs to no stream; else how many pages on trial that proves used.
    pub(super) fn faulted(
        &mut self,
        page: PageIndex,
        trial: &mut Bits,
        stored: &impl Fn(PageIndex) -> bool,
        out: &mut Vec<Run>,
    ) -> Option<u32> {
        let at = i64::from(page.0);
        let known = self
            .streams
            .iter()
            .enumerate()
            .rev()
            .find_map(|(i, stream)| Some((i, stream.place_of(at, stored)?)));
        match known {
            Some((_, Place::Within)) => Some(0),
            Some((index, Place::GoesOn)) => {
                let stream = self.streams.remove(index);
                Some(self.advance(stream, at, trial, stored, out))
            }
            None => {
                let found = self.find(at, stored);
                if found.is_none() {
                    self.history.push_front(at);
                    self.history.truncate(HISTORY);
                }
                let stream = found?;
                self.make_room();
                Some(self.advance(stream, at, trial, stored, out))
            }
        }
    }

    /// A page brought ahead went to the store before its touch: the window was too long for the memory there is.
    pub(super) fn left_unused(&mut self, page: PageIndex) {
        let at = i64::from(page.0);
        for stream in self.streams.iter_mut().filter(|stream| stream.level > 0) {
            let asked = [(stream.seen, at), (at, stream.next)].map(|(from, to)| stream.steps(from, to));
            if asked.into_iter().all(|steps| steps.is_some_and(|steps| steps > 0)) {
                self.scores[usize::from(stream.level - 1)].count(0, 1);
                if stream.steps(at, stream.marker).is_some_and(|steps| steps > 0) {
                    stream.marker = at;
                }
                (stream.next, stream.level) = (at, 0);
            }
        }
    }

    /// A new stream that the fault shows together with earlier ones.
    fn find(&self, at: i64, stored: &impl Fn(PageIndex) -> bool) -> Option<Stream> {
        self.history.iter().find_map(|earlier| {
            let way = at - earlier;
            let is_next = || is_bare(earlier + way.signum(), way.signum(), way.abs() - 1, stored);
            let stride = match way.abs() {
                0 => return None,
                1..=GAP_MAX if is_next() => way.signum(),
                2..=STRIDE_MAX if self.history.contains(&(earlier - way)) => way,
                _ => return None,
            };
            Some(Stream { stride, seen: *earlier, marker: at, next: at, level: 0, waited: 0 })
        })
    }

    fn make_room(&mut self) {
        if self.streams.len() == STREAMS_MAX {
            let oldest = self.streams.remove(0);
            if oldest.level > 0 {
                self.scores[usize::from(oldest.level - 1)].count(0, 1);
            }
        }
    }

    /// Asks for the stream's next window and makes it the most recent. A stream with nothing stored ahead ends.
    fn advance(
        &mut self,
        mut stream: Stream,
        at: i64,
        trial: &mut Bits,
        stored: &impl Fn(PageIndex) -> bool,
        out: &mut Vec<Run>,
    ) -> u32 {
        if stream.level > 0 {
            self.scores[usize::from(stream.level - 1)].count(1, 0);
        }
        let stride = stream.stride;
        let way = |from: i64| (1..).map(move |step| from + step * stride);
        let passed = way(stream.seen).take_while(|page| *page != at).filter_map(position);
        let proven = passed.map(|page| u32::from(trial.remove(page))).sum();

        stream.seen = at;
        self.grow(&mut stream);
        if stream.level == 0 {
            stream.marker = at + stride;
            stream.next = stream.marker;
            self.streams.push(stream);
            return proven;
        }
        let length = 2usize << stream.level;
        let start = if stream.steps(at, stream.next).is_some_and(|steps| steps > 0) {
            stream.next - stride
        } else {
            at
        };
        let window = || way(start).take(length + JUMP_MAX).map_while(position).filter(|page| stored(*page));
        let middle = window().take(length).count() / 2;
        let mut last = None;
        for (place, page) in window().take(length).enumerate() {
            last = Some(i64::from(page.0));
            if place == middle {
                stream.marker = i64::from(page.0);
            } else {
                ask(out, page);
            }
        }
        if let Some(last) = last {
            stream.next = last + stride;
            self.streams.push(stream);
        }
        proven
    }

    /// The next level, or the longest below it that has done well.
    fn grow(&self, stream: &mut Stream) {
        let due = (stream.level + 1).min(LEVELS);
        let good = (1..=due).rev().find(|level| self.scores[usize::from(level - 1)].is_good()).unwrap_or(0);
        stream.level = good;
        stream.waited = if good == due { 0 } else { stream.waited + 1 };
        if stream.waited == PATIENCE {
            stream.level += 1;
            stream.waited = 0;
        }
    }
}

/// True if nothing stored is among so many places from the first on.
fn is_bare(first: i64, stride: i64, places: i64, stored: &impl Fn(PageIndex) -> bool) -> bool {
    !(0..places).filter_map(|place| position(first + place * stride)).any(stored)
}

/// The page at a position. One past the machine's last page is not stored.
fn position(at: i64) -> Option<PageIndex> {
    u32::try_from(at).ok().map(PageIndex)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u32 = 4096;

    /// Faults one page of a machine where `is_stored` pages are stored; what is asked for, in the order asked.
    fn asked(streams: &mut Streams, page: u32, is_stored: impl Fn(u32) -> bool) -> Vec<u32> {
        let mut out = Vec::new();
        let stored = |other: PageIndex| other.0 < PAGES && other.0 != page && is_stored(other.0);
        streams.faulted(PageIndex(page), &mut Bits::new(PAGES), &stored, &mut out);
        out.iter().flat_map(|run| run.first.0..run.first.0 + run.pages).collect()
    }

    #[test]
    fn windows_double_at_each_marker_and_leave_the_next_one_out() {
        let mut streams = Streams::new();
        assert!(asked(&mut streams, 100, |_| true).is_empty());
        assert_eq!(asked(&mut streams, 101, |_| true), [102, 103, 105]);
        assert!(asked(&mut streams, 103, |_| true).is_empty(), "asked for already");
        let second: Vec<u32> = (106..114).filter(|page| *page != 110).collect();
        assert_eq!(asked(&mut streams, 104, |_| true), second);
        assert_eq!(asked(&mut streams, 110, |_| true).len(), 15);
    }

    #[test]
    fn a_stream_that_goes_down_gets_its_nearest_pages_first() {
        let mut streams = Streams::new();
        let mut at = 4000;
        asked(&mut streams, at + 1, |_| true);
        for _ in 0..5 {
            let window = asked(&mut streams, at, |_| true);
            let pieces = window.chunk_by(|earlier, later| earlier + 1 == *later);
            let ends: Vec<u32> = pieces.filter_map(|piece| piece.last().copied()).collect();
            assert!(window.chunk_by(|earlier, later| earlier + 1 == *later).all(|piece| piece.len() <= 16));
            assert!(ends.is_sorted_by(|earlier, later| earlier > later), "{ends:?}");
            at = (0..at).rev().find(|page| !window.contains(page) && *page < window[0]).unwrap();
        }
    }

    #[test]
    fn the_marker_proves_the_pages_before_it_used_and_no_others() {
        let mut streams = Streams::new();
        let mut trial = Bits::new(PAGES);
        let mut fault = |page, trial: &mut Bits| {
            streams.faulted(PageIndex(page), trial, &|other| other.0 > page, &mut Vec::new())
        };
        assert_eq!(fault(100, &mut trial), None);
        assert_eq!(fault(101, &mut trial), Some(0));
        [102, 103, 105].into_iter().for_each(|page| assert!(trial.insert(PageIndex(page))));
        assert_eq!(fault(104, &mut trial), Some(2));
        assert_eq!(trial.iter().collect::<Vec<_>>(), [PageIndex(105)]);
    }

    #[test]
    fn a_stream_ends_where_nothing_is_stored_for_long_and_jumps_over_less() {
        let mut streams = Streams::new();
        asked(&mut streams, 100, |_| true);
        assert_eq!(asked(&mut streams, 101, |page| page >= 600), [600, 601, 603], "jumped over 498 pages");
        assert_eq!(streams.len(), 1);
        assert!(asked(&mut streams, 602, |_| false).is_empty());
        assert_eq!(streams.len(), 0);
    }

    #[test]
    fn lengths_whose_windows_fail_are_not_asked_for_until_a_stream_lasts() {
        let mut streams = Streams::new();
        streams.scores[0] = Score { hits: 0, misses: Score::MISSES_MIN };
        let lengths: Vec<usize> = (100..110).map(|page| asked(&mut streams, page, |_| true).len()).collect();
        let quiet = usize::from(PATIENCE);
        assert_eq!(lengths[..quiet], [0; PATIENCE as usize]);
        assert_eq!(lengths[quiet], 3);
    }

    #[test]
    fn a_window_that_leaves_unused_is_cut_there_and_starts_small_again() {
        let mut streams = Streams::new();
        asked(&mut streams, 100, |_| true);
        for marker in [101, 104, 110] {
            asked(&mut streams, marker, |_| true);
        }
        streams.left_unused(PageIndex(112));
        assert_eq!(asked(&mut streams, 112, |_| true), [113, 114, 116]);
    }
}
