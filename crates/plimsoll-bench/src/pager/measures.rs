//! What is measured of a guest whose pages are kept by one of the [`keepers`](super::keepers).
use super::Scene;
use super::keepers::Keeper;
use crate::figures::float;
use crate::guest::Guest;
use crate::report::Sample;
use crate::session::{BenchError, OneProcessor};
use anyhow::{Context, anyhow};
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_vmm::report::{ProbeBucket, ProbeReport};
use std::ops::Range;
use std::time::Duration;

/// One run of 1 to 16 pages in every so many makes a set of about an eighth of all pages.
const STRETCH: u64 = 64;
/// The guest does nothing for so long before its pages are taken.
const REST: Duration = Duration::from_millis(300);

/// A guest that has written all its pages, and whose pages are kept by `K`.
pub(super) fn populated<K: Keeper>(scene: &Scene<'_>) -> Result<K, BenchError> {
    let mut keeper = K::start(&scene.config(WorkloadKind::Probe), scene)?;
    keeper.guest().probe(ProbeCommand::new(Task::Populate, Order::Ascending))?;
    Ok(keeper)
}

/// Compares every word with what it must be.
pub(super) fn verify<K: Keeper>(keeper: &mut K) -> Result<(), BenchError> {
    verify_part(keeper, &(0..u64::MAX))
}

/// Compares every word of these pages with what it must be.
pub(super) fn verify_part<K: Keeper>(keeper: &mut K, pages: &Range<u64>) -> Result<(), BenchError> {
    let verified = keeper.guest().probe(part(ProbeCommand::new(Task::Verify, Order::Ascending), pages))?;
    if verified.pages == 0 { Err(anyhow!("a guest has no pages").into()) } else { Ok(()) }
}

const fn part(command: ProbeCommand, pages: &Range<u64>) -> ProbeCommand {
    ProbeCommand { first_page: pages.start, pages: pages.end.saturating_sub(pages.start), ..command }
}

/// Has the guest do something, and adds what both processes worked for it.
pub(super) fn probe<K: Keeper>(
    keeper: &mut K,
    command: ProbeCommand,
) -> Result<(ProbeReport, f64), BenchError> {
    let guest: &mut Guest = keeper.guest();
    let before = guest.cpu_seconds()?;
    let report = guest.probe(command)?;
    Ok((report, guest.cpu_seconds()? - before))
}

/// Pages a second by the guest's clock.
pub(crate) fn pages_per_second(report: &ProbeReport) -> f64 {
    float(report.pages) * 1e9 / float(report.ns)
}

/// The nanoseconds that `permille` of the pages took at most; inside a bucket pages are taken to be evenly spread.
pub(super) fn quantile(buckets: &[ProbeBucket], permille: u64) -> Option<f64> {
    let all: u64 = buckets.iter().map(|bucket| bucket.pages).sum();
    let mut wanted = float(all) * float(permille) / 1000.0;
    for bucket in buckets {
        let pages = float(bucket.pages);
        if wanted <= pages {
            let width = float(bucket.below_ns.saturating_sub(bucket.from_ns));
            return Some(float(bucket.from_ns) + width * wanted / pages);
        }
        wanted -= pages;
    }
    None
}

/// Pages a second out of an idle guest, everything on one processor.
pub(super) fn capture<K: Keeper>(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    let _processor = OneProcessor::here()?;
    let mut keeper: K = populated(scene)?;
    let taken = keeper.page_out()?;
    verify(&mut keeper)?;
    Ok(Sample { value: float(taken.pages) / taken.seconds, cpu_seconds: Some(taken.cpu_seconds) })
}

/// Pages a second back into the guest that touches them in order.
pub(super) fn refault_sequential<K: Keeper>(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    let mut keeper: K = populated(scene)?;
    keeper.page_out()?;
    let (report, cpu) = probe(&mut keeper, ProbeCommand::new(Task::Read, Order::Ascending))?;
    verify(&mut keeper)?;
    Ok(Sample { value: pages_per_second(&report), cpu_seconds: Some(cpu) })
}

/// The median time of a touch in random order.
pub(super) fn refault_random<K: Keeper>(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    let mut keeper: K = populated(scene)?;
    keeper.page_out()?;
    touch_at_random(&mut keeper, &(0..u64::MAX))
}

/// The median time of a touch of these pages, each once, in random order. Then they are verified.
pub(super) fn touch_at_random<K: Keeper>(keeper: &mut K, pages: &Range<u64>) -> Result<Sample, BenchError> {
    let (report, cpu) = probe(keeper, part(ProbeCommand::new(Task::Read, Order::Random), pages))?;
    let median = quantile(&report.latency, 500).context("a guest touched nothing")?;
    verify_part(keeper, pages)?;
    Ok(Sample { value: median, cpu_seconds: Some(cpu) })
}

/// Pages a second of a scattered set of pages that the guest touches for the third time, after all its pages have been
/// taken for the second time. What it did the second time is what can be known of the third.
pub(super) fn working_set_return<K: Keeper>(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    returned(scene, |_: &mut K| Ok(()))
}

/// The same, with something done before the third time.
pub(super) fn returned<K: Keeper>(
    scene: &Scene<'_>,
    before: impl FnOnce(&mut K) -> Result<(), BenchError>,
) -> Result<Sample, BenchError> {
    let walk = |task| ProbeCommand { stride: STRETCH, ..ProbeCommand::new(task, Order::Scattered) };
    let mut keeper: K = populated(scene)?;
    keeper.guest().probe(walk(Task::Read))?;
    std::thread::sleep(REST);
    keeper.page_out()?;
    keeper.guest().probe(walk(Task::Read))?;
    std::thread::sleep(REST);
    keeper.page_out()?;
    before(&mut keeper)?;
    let (report, cpu) = probe(&mut keeper, walk(Task::Read))?;
    keeper.guest().probe(walk(Task::Verify))?;
    Ok(Sample { value: pages_per_second(&report), cpu_seconds: Some(cpu) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_lies_inside_its_bucket_as_far_as_its_share_reaches() {
        let bucket = |from_ns, below_ns, pages| ProbeBucket { from_ns, below_ns, pages };
        let buckets = [bucket(100, 200, 40), bucket(200, 300, 40), bucket(900, 1000, 20)];
        let near = |permille, expected: f64| {
            let found = quantile(&buckets, permille).unwrap();
            assert!((found - expected).abs() < 1e-9, "{permille}: {found}");
        };
        near(500, 225.0);
        near(400, 200.0);
        near(990, 995.0);
        near(1000, 1000.0);
        assert_eq!(quantile(&[], 500), None);
    }

    #[test]
    fn a_part_may_reach_past_the_last_page() {
        let command = part(ProbeCommand::new(Task::Read, Order::Random), &(7..u64::MAX));
        assert_eq!((command.first_page, command.pages), (7, u64::MAX - 7));
    }
}
