//! What a guest from which nothing is wanted loses by being sampled: slices of the same guest's life, of which every other one
//! begins with samples.
//!
//! Enters: a KVM guest that works on all its memory, in huge pages, and says itself how much it gets done. Leaves: runs of three
//! neighbouring slices, the middle one sampled. What must never happen: a cost that is not in the slice it belongs to; so
//! what comes back is counted, and too much of it in the slices between is an error.
//!
//! Guests are not compared with each other: what one does differs from what the next does by more than what is looked for.
use super::Scene;
use super::keepers::{Keeper, Ours};
use super::special::SAMPLE_PERIOD;
use crate::guest;
use crate::report::Run;
use crate::session::BenchError;
use anyhow::anyhow;
use plimsoll_linux::uffd::manager::Manager;
use plimsoll_vmm::VmmConfig;
use std::time::Duration;

/// The interval of their median leaves out nine of them on either side.
const RUNS: usize = 32;
/// What samples cost their guest falls into the beginning of a period, which is counted; to look at the rest, too, would only add
/// its noise.
const SLICE: Duration = Duration::from_millis(500);
/// What a slice is of a period.
pub(super) const SHARE: f64 = 0.25;
const _: () = assert!(SLICE.as_millis() * 4 == SAMPLE_PERIOD.as_millis());
/// How often a guest says how far it is: a slice ends at one of its words.
const REPORT_MS: u32 = 20;
/// How long a guest works before anything counts.
const WARM: Duration = Duration::from_secs(2);
/// In slices without samples at most one page in so many comes back of those that do in slices with them. Pagers tell what
/// they have counted a little late, so that some of the latter count as the former.
const LATE_MAX: u64 = 10;

/// Slices with samples and, around each, slices without.
pub(super) fn slices(scene: &Scene<'_>) -> Result<Vec<Vec<Run>>, BenchError> {
    let config = VmmConfig { report_ms: REPORT_MS, ..guest::busy(scene.mix) };
    let mut ours = Ours::start(&config, scene)?;
    // No period ends but those that are asked for.
    ours.govern(Duration::MAX)?;
    ours.operations_for(WARM, |_, _| {})?;
    let (mut late, mut all) = (0, 0);
    let mut runs = Vec::with_capacity(RUNS);
    let mut peer = ours.operations_for(SLICE, |_, _| {})?;
    for _ in 0..RUNS {
        let before = ours.came_back()?;
        let sampled = ours.operations_for(SLICE, Manager::sample)?;
        let between = ours.came_back()?;
        let peer_again = ours.operations_for(SLICE, |_, _| {})?;
        late += ours.came_back()? - between;
        all += between - before;
        runs.push(Run { ours: sampled, peer, peer_again });
        peer = peer_again;
    }
    println!("  {all} pages came back in slices with samples, {late} in those without");
    if all == 0 || late * LATE_MAX > all {
        return Err(anyhow!("{late} pages came back in slices without samples, {all} in those with").into());
    }
    ours.guest().finish()?;
    Ok(vec![runs])
}
