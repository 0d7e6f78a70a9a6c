//! How a pager with nothing to do waits for its machine: asleep, or for a moment awake.
//!
//! Waking a sleeping thread costs a guest about as much as everything else of a fault (FACTS: 62 us, against 48 us when
//! the handler spins). So a pager whose faults follow one another closely looks for the next one for a while before it
//! sleeps. It does so only while few pagers of the host have such machines: a processor that spins runs no guest.
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How pagers wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Always asleep.
    Asleep,
    /// Awake for a moment where that has paid.
    Adaptive,
}

/// Gaps between faults up to this long are waited for awake: somewhat more than a guest takes that touches one page
/// after the other.
const GAP_MAX: Duration = Duration::from_micros(100);
/// What a gap counts at most, so that one pause is forgotten after some faults.
const GAP_COUNTED_MAX: Duration = Duration::from_micros(800);

/// How many pagers of a host may wait awake.
#[derive(Debug)]
pub(super) struct Watchfulness {
    most: AtomicU32,
    /// Pagers whose faults follow one another closely.
    quick: AtomicU32,
}

impl Watchfulness {
    pub(super) fn new() -> Self {
        let watchfulness = Self { most: AtomicU32::new(0), quick: AtomicU32::new(0) };
        watchfulness.set(Waiting::Adaptive);
        watchfulness
    }

    pub(super) fn set(&self, waiting: Waiting) {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let most = match waiting {
            Waiting::Asleep => 0,
            // The others are for guests.
            Waiting::Adaptive => u32::try_from(processors / 2).unwrap_or(0),
        };
        self.most.store(most, Ordering::Relaxed);
    }
}

/// What one pager has learned of the gaps between its machine's faults.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gaps {
    average: Duration,
    is_quick: bool,
}

impl Gaps {
    pub(super) const fn new() -> Self {
        Self { average: GAP_COUNTED_MAX, is_quick: false }
    }

    /// How long to look for the next fault before sleeping; zero for not at all.
    pub(super) fn patience(&self, host: &Watchfulness) -> Duration {
        let (most, quick) = (host.most.load(Ordering::Relaxed), host.quick.load(Ordering::Relaxed));
        if self.is_quick && quick <= most { GAP_MAX } else { Duration::ZERO }
    }

    /// The machine's next fault took that long to come.
    pub(super) fn saw(&mut self, gap: Duration, host: &Watchfulness) {
        self.average = (self.average * 7 + gap.min(GAP_COUNTED_MAX)) / 8;
        let is_quick = self.average <= GAP_MAX;
        match (self.is_quick, is_quick) {
            (false, true) => drop(host.quick.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(host.quick.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
        self.is_quick = is_quick;
    }

    /// The pager ends.
    pub(super) fn end(&mut self, host: &Watchfulness) {
        while self.is_quick {
            self.saw(GAP_COUNTED_MAX, host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(most: u32) -> Watchfulness {
        Watchfulness { most: AtomicU32::new(most), quick: AtomicU32::new(0) }
    }

    fn after(gaps: &mut Gaps, host: &Watchfulness, micros: u64, times: u32) -> Duration {
        (0..times).for_each(|_| gaps.saw(Duration::from_micros(micros), host));
        gaps.patience(host)
    }

    #[test]
    fn a_pager_stays_awake_only_while_faults_follow_closely() {
        let (host, mut gaps) = (host(1), Gaps::new());
        assert_eq!(gaps.patience(&host), Duration::ZERO);
        assert_eq!(after(&mut gaps, &host, 20, 30), GAP_MAX);
        assert_eq!(after(&mut gaps, &host, 5000, 3), Duration::ZERO);
        assert_eq!(host.quick.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn with_more_quick_machines_than_processors_to_spare_all_sleep_and_each_end_is_counted() {
        let (host, mut one, mut other) = (host(1), Gaps::new(), Gaps::new());
        after(&mut one, &host, 20, 30);
        assert_eq!(after(&mut other, &host, 20, 30), Duration::ZERO);
        assert_eq!(one.patience(&host), Duration::ZERO);
        other.end(&host);
        assert_eq!(one.patience(&host), GAP_MAX);
    }
}
