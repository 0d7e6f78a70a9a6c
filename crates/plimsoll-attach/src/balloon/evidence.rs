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
    refaulted: Option<(Duration, ByteCount)>,
    ceiling: Option<ByteCount>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    said: GuestStatistics,
}

/// What follows from a look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Findings {
    /// The largest balloon that leaves the guest its reserve, by its latest believable word.
    pub(super) ceiling: Option<ByteCount>,
    pub(super) strain: Option<Strain>,
}

impl Evidence {
    pub(super) const fn new() -> Self {
        Self { sample: None, refaulted: None, ceiling: None }
    }

    /// Takes an observation in.
    pub(super) fn look(&mut self, seen: &Observation, scale: &Scale) -> Findings {
        let new = seen.statistics.filter(|said| self.is_new(said, seen.now)).map(believable);
        let guest = new.and_then(|said| {
            let strain = self.guest_strain(&said, seen, scale);
            self.sample = Some(Sample { at: seen.now, said });
            strain
        });
        let strain = guest.or_else(|| self.host_strain(seen, scale));
        Findings { ceiling: self.ceiling, strain }
    }

    /// True if this was not told before. A guest whose balloon changes cannot have the very same numbers again.
    fn is_new(&self, said: &GuestStatistics, now: Duration) -> bool {
        let Some(last) = &self.sample else { return said.age.is_none_or(|age| age <= AGE_MAX) };
        let age_before = last.said.age.unwrap_or_default().saturating_add(now.saturating_sub(last.at));
        let is_later = said.age.is_none_or(|age| age < age_before);
        let ageless = |said: &GuestStatistics| GuestStatistics { age: None, ..*said };
        is_later && ageless(&believable(*said)) != ageless(&last.said)
    }

    fn guest_strain(&mut self, said: &GuestStatistics, seen: &Observation, scale: &Scale) -> Option<Strain> {
        // What is neither in the balloon nor there at all cannot be available. A little more is a look at two moments.
        let possible = scale.memory.saturating_sub(seen.actual) + scale.band;
        let available = available(said).filter(|available| *available <= possible);
        if let Some(available) = available {
            self.ceiling = Some((seen.actual + available).saturating_sub(scale.reserve));
        }
        let is_low = available.is_some_and(|available| available.0 < scale.reserve.0 / 2);
        let Some(Sample { at, said: before }) = self.sample else { return is_low.then_some(Strain::Low) };
        let kills = risen(before.oom_kills, said.oom_kills);
        let swapped = risen(bytes(before.swapped_in), bytes(said.swapped_in));
        let faults = risen(before.major_faults, said.major_faults).saturating_mul(PAGE_SIZE as u64);
        if kills > 0 {
            Some(Strain::OutOfMemory)
        } else if is_low {
            Some(Strain::Low)
        } else {
            is_paging(swapped.max(faults), seen.now.saturating_sub(at), scale).then_some(Strain::GuestPages)
        }
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
