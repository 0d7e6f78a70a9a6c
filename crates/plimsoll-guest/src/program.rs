//! Which page comes next: one rule for each kind of program.
//!
//! What enters is where the vCPU stands, what leaves is a local page. No rule touches memory.
use crate::layout::GROUP_PAGES;
use crate::random::{Permutation, Rng};
use crate::spec::{WorkloadKind, WorkloadSpec};

/// The most pages the idle program ever touches: what a system at rest keeps warm.
const IDLE_PAGES: u64 = 64;
/// Of so many operations of the phases program, one leaves the hot set.
const COLD_ONE_IN: u64 = 16;

/// The rule of one vCPU.
#[derive(Debug)]
pub(crate) struct Program {
    kind: WorkloadKind,
    owned_pages: u64,
    groups: u64,
    /// At least 1, at most `groups`.
    hot_groups: u64,
    /// Where in memory the group of each rank lies, so that hot groups are not neighbours.
    places: Permutation,
    sweep_next: u64,
    /// The hot set moves after so many operations, 0: not by count.
    phase_ops: u64,
    /// The hot set moves after so many ticks, 0: not by time.
    phase_ticks: u64,
}

impl Program {
    /// The rule for a vCPU that owns so many pages, at least one. `phase_ticks` is `phase_ms` of the
    /// specification by the guest's clock.
    pub(crate) fn new(
        kind: WorkloadKind,
        spec: &WorkloadSpec,
        owned_pages: u64,
        phase_ticks: u64,
        seed: u64,
    ) -> Self {
        let groups = owned_pages.div_ceil(GROUP_PAGES);
        let hot = groups * u64::from(spec.hot_permille) / 1000;
        let hot_groups = match kind {
            WorkloadKind::Idle => hot.min(IDLE_PAGES / GROUP_PAGES),
            _ => hot,
        };
        Self {
            kind,
            owned_pages,
            groups,
            hot_groups: hot_groups.clamp(1, groups.max(1)),
            places: Permutation::new(groups, seed),
            sweep_next: 0,
            phase_ops: if kind == WorkloadKind::Bursts { spec.burst_ops } else { spec.phase_ops },
            phase_ticks: if kind == WorkloadKind::Bursts { 0 } else { phase_ticks },
        }
    }

    /// The page of the operation that comes after so many others and so long after the first.
    #[inline]
    pub(crate) fn next_page(&mut self, rng: &mut Rng, operations: u64, elapsed_ticks: u64) -> u64 {
        let rank = match self.kind {
            WorkloadKind::Sweep => return self.next_in_sweep(),
            WorkloadKind::Zipf => zipf_rank(rng, self.hot_groups),
            WorkloadKind::Phases if rng.below(COLD_ONE_IN) == 0 => rng.below(self.groups),
            WorkloadKind::Phases | WorkloadKind::Bursts => {
                let by_count = operations.checked_div(self.phase_ops).unwrap_or(0);
                let by_time = elapsed_ticks.checked_div(self.phase_ticks).unwrap_or(0);
                let moves = by_count.wrapping_add(by_time) % self.groups;
                let start = moves * self.hot_groups % self.groups;
                (start + rng.below(self.hot_groups)) % self.groups
            }
            // A guest that does as it is told has no rule of its own; nobody asks for it.
            WorkloadKind::Idle | WorkloadKind::Probe | WorkloadKind::Frames => rng.below(self.hot_groups),
        };
        let local = self.places.apply(rank) * GROUP_PAGES + rng.below(GROUP_PAGES);
        // The last group may be shorter than the others.
        local.min(self.owned_pages - 1)
    }

    fn next_in_sweep(&mut self) -> u64 {
        let local = self.sweep_next;
        let end = (self.hot_groups * GROUP_PAGES).min(self.owned_pages);
        self.sweep_next = if local + 1 < end { local + 1 } else { 0 };
        local
    }
}

/// A rank in `0..count` whose probability falls like 1 / (rank + 1), without floating point.
///
/// Under that law every octave of ranks (1, 2-3, 4-7, ...) is about equally likely, so: an octave, then a
/// rank in it. Inside an octave the curve is flat, and an incomplete last octave weighs as much as a whole
/// one.
#[inline]
fn zipf_rank(rng: &mut Rng, count: u64) -> u64 {
    let octaves = u64::from(count.ilog2()) + 1;
    let first = 1 << rng.below(octaves);
    let width = first.min(count + 1 - first);
    first - 1 + rng.below(width)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::collections::BTreeSet;
    use std::vec;
    use std::vec::Vec;

    /// Pages drawn after the hot set has moved `phase` times: phases by time, bursts by count.
    fn pages(kind: WorkloadKind, owned: u64, count: usize, phase: u64) -> Vec<u64> {
        let spec = WorkloadSpec { burst_ops: 1, ..WorkloadSpec::new(kind) };
        let mut program = Program::new(kind, &spec, owned, 1, 9);
        let mut rng = Rng::new(4);
        (0..count).map(|_| program.next_page(&mut rng, phase, phase)).collect()
    }

    #[test]
    fn every_kind_stays_inside_the_pages_it_owns() {
        for kind in WorkloadKind::ALL {
            for owned in [1, 15, 16, 17, 1000] {
                for phase in [0, 3, u64::MAX] {
                    assert!(
                        pages(kind, owned, 3000, phase).iter().all(|&page| page < owned),
                        "{kind} {owned}"
                    );
                }
            }
        }
    }

    #[test]
    fn octaves_of_zipf_ranks_are_equally_likely() {
        let mut rng = Rng::new(2);
        let mut octaves = vec![0u32; 10];
        for _ in 0..100_000 {
            octaves[zipf_rank(&mut rng, 1023).saturating_add(1).ilog2() as usize] += 1;
        }
        assert!(octaves.iter().all(|count| (9_500..10_500).contains(count)), "{octaves:?}");
    }

    #[test]
    fn zipf_reaches_every_page_and_prefers_few() {
        let drawn = pages(WorkloadKind::Zipf, 512, 200_000, 0);
        let mut counts = vec![0u32; 512];
        for page in drawn {
            counts[usize::try_from(page).unwrap()] += 1;
        }
        assert!(counts.iter().all(|&count| count > 0));
        counts.sort_unstable();
        let hottest: u32 = counts[512 - 16..].iter().sum();
        // One of 32 groups is a whole octave of 6: a sixth of all draws in a 32nd of the pages.
        assert!((30_000..37_000).contains(&hottest), "{hottest}");
    }

    #[test]
    fn a_sweep_visits_every_page_in_order() {
        assert_eq!(pages(WorkloadKind::Sweep, 40, 80, 0), (0..40).chain(0..40).collect::<Vec<_>>());
    }

    #[test]
    fn the_hot_set_is_small_and_moves_with_the_phase() {
        let hot = |phase| {
            let mut counts = vec![0u32; 16_000];
            for page in pages(WorkloadKind::Phases, 16_000, 100_000, phase) {
                counts[usize::try_from(page).unwrap()] += 1;
            }
            (0..16_000).filter(|&page| counts[page] > 20).collect::<BTreeSet<_>>()
        };
        let (before, after) = (hot(0), hot(1));
        assert!((1500..=1600).contains(&before.len()), "{}", before.len());
        assert!(before.is_disjoint(&after));
    }

    #[test]
    fn the_idle_program_touches_few_pages() {
        let touched: BTreeSet<_> = pages(WorkloadKind::Idle, 100_000, 10_000, 0).into_iter().collect();
        assert_eq!(touched.len(), 64);
    }
}
