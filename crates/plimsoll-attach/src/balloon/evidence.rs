//! What a guest's statistics and the host's counters say about how short a machine is of memory.
//!
//! Enters: one observation after the other. Leaves: the largest balloon the guest could bear, if it is known, and a strain. What
//! must never happen: a number that cannot be true, or one that was told before, making the ceiling higher.
use super::{Observation, Scale, Strain};
use crate::control::GuestStatistics;
use plimsoll_types::{ByteCount, PAGE_SIZE};
use std::time::Duration;

/// Reading back more than 1/1024 of the memory a second is paging, less is a program being started now and then.
const PAGING: u64 = 1024;
/// The first sample must not be older than this; later ones must only be newer than the one before.
const AGE_MAX: Duration = Duration::from_secs(10);
/// Counters that close together say nothing about a rate.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// What was last seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Evidence {
    sample: Option<Sample>,
    /// What the balloon held at the last look.
    held: Option<ByteCount>,
    refaulted: Option<(Duration, ByteCount)>,
    ceiling: Option<ByteCount>,
}

/// What a guest said, and what we saw when we first heard of it.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    actual: ByteCount,
    told_at: Option<Duration>,
    said: GuestStatistics,
}

/// What follows from a look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Findings {
    /// The largest balloon that leaves the guest its reserve, by its latest believable word.
    pub(super) ceiling: Option<ByteCount>,
    pub(super) strain: Option<Strain>,
}

/// What statistics are worth.
enum Word {
    /// Told before, or at no one knows which balloon.
    Old,
    /// Told since the last look.
    New,
    /// The same as before, told again of the balloon it was first heard with.
    Confirmed(Sample),
}

impl Evidence {
    pub(super) const fn new() -> Self {
        Self { sample: None, held: None, refaulted: None, ceiling: None }
    }

    /// Takes an observation in.
    pub(super) fn look(&mut self, seen: &Observation, scale: &Scale) -> Findings {
        // What was not there at the last look was told since, of a balloon between that one's size and this one's.
        let held = self.held.replace(seen.actual).unwrap_or(seen.actual).min(seen.actual);
        let said = seen.statistics.map(believable);
        let guest = said.and_then(|said| match self.word(&said, seen) {
            Word::Old => None,
            Word::Confirmed(sample) => self.bear(&sample.said, sample.actual, seen, scale),
            Word::New => {
                let strain = self.guest_strain(&said, held, seen, scale);
                let told_at = told_at(&said, seen.now);
                self.sample = Some(Sample { at: seen.now, actual: seen.actual, told_at, said });
                strain
            }
        });
        let strain = guest.or_else(|| self.host_strain(seen, scale));
        Findings { ceiling: self.ceiling, strain }
    }

    /// A guest whose balloon changes cannot have the very same numbers again: then they are old, whatever age they claim.
    fn word(&self, said: &GuestStatistics, seen: &Observation) -> Word {
        let told_at = told_at(said, seen.now);
        let Some(last) = self.sample else {
            let is_recent = said.age.is_none_or(|age| age <= AGE_MAX);
            return if is_recent { Word::New } else { Word::Old };
        };
        let ageless = |said: &GuestStatistics| GuestStatistics { age: None, ..*said };
        if ageless(said) != ageless(&last.said) {
            let is_later = told_at.zip(last.told_at).is_none_or(|(now, before)| now > before);
            return if is_later { Word::New } else { Word::Old };
        }
        // Without an age, what stays the same for long is likely to have been told again.
        let is_again =
            told_at.map_or(seen.now.saturating_sub(last.at) >= AGE_MAX, |told_at| told_at > last.at);
        if is_again && seen.actual == last.actual { Word::Confirmed(last) } else { Word::Old }
    }

    /// Takes in how large a balloon the guest could bear, by what it has available beside one of `held`.
    fn bear(
        &mut self,
        said: &GuestStatistics,
        held: ByteCount,
        seen: &Observation,
        scale: &Scale,
    ) -> Option<Strain> {
        // What is in the balloon cannot be available. A little more is a look at two moments.
        let possible = scale.memory.saturating_sub(seen.actual) + scale.band;
        let available = available(said).filter(|available| *available <= possible + (seen.actual - held))?;
        self.ceiling = Some((held + available).saturating_sub(scale.reserve));
        (available.0 < scale.reserve.0 / 2).then_some(Strain::Low)
    }

    fn guest_strain(
        &mut self,
        said: &GuestStatistics,
        held: ByteCount,
        seen: &Observation,
        scale: &Scale,
    ) -> Option<Strain> {
        let low = self.bear(said, held, seen, scale);
        let Some(Sample { at, said: before, .. }) = self.sample else { return low };
        if risen(before.oom_kills, said.oom_kills) > 0 {
            return Some(Strain::OutOfMemory);
        }
        let swapped = risen(bytes(before.swapped_in), bytes(said.swapped_in));
        let faults = risen(before.major_faults, said.major_faults).saturating_mul(PAGE_SIZE as u64);
        let pages = is_paging(swapped.max(faults), seen.now.saturating_sub(at), scale);
        low.or(pages.then_some(Strain::GuestPages))
    }

    fn host_strain(&mut self, seen: &Observation, scale: &Scale) -> Option<Strain> {
        let (at, before) = *self.refaulted.get_or_insert((seen.now, seen.refaulted));
        let elapsed = seen.now.saturating_sub(at);
        if elapsed < INTERVAL_MIN {
            return None;
        }
        self.refaulted = Some((seen.now, seen.refaulted));
        let refaulted = seen.refaulted.saturating_sub(before).0;
        is_paging(refaulted, elapsed, scale).then_some(Strain::HostRefaults)
    }
}

/// Without the sizes that no machine can have: what remains is at least possible.
fn believable(said: GuestStatistics) -> GuestStatistics {
    let Some(total) = said.total else { return said };
    let possible = |size: Option<ByteCount>| size.filter(|size| *size <= total);
    GuestStatistics {
        available: possible(said.available),
        free: possible(said.free),
        caches: possible(said.caches),
        ..said
    }
}

/// What the guest could give without paging. Older guests do not say; of what they cache, half may be in use.
fn available(said: &GuestStatistics) -> Option<ByteCount> {
    said.available.or_else(|| {
        let caches = said.caches.unwrap_or_default();
        said.free.map(|free| ByteCount(free.0.saturating_add(caches.0 / 2)))
    })
}

/// When it was said, if it has an age.
fn told_at(said: &GuestStatistics, now: Duration) -> Option<Duration> {
    said.age.map(|age| now.saturating_sub(age))
}

fn bytes(size: Option<ByteCount>) -> Option<u64> {
    size.map(|size| size.0)
}

/// How much a counter rose. One that fell was reset or is a lie, and says nothing.
fn risen(before: Option<u64>, now: Option<u64>) -> u64 {
    before.zip(now).map_or(0, |(before, now)| now.saturating_sub(before))
}

fn is_paging(read: u64, elapsed: Duration, scale: &Scale) -> bool {
    elapsed >= INTERVAL_MIN
        && u128::from(read) * 1000 > elapsed.as_millis() * u128::from(scale.memory.0 / PAGING)
}
