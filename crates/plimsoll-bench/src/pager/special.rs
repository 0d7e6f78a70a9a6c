//! What only the pager can be asked, or what needs another kind of guest.
//!
//! Enters: as in [`measures`](super::measures). Leaves: the time of a touch of a page in limbo, the huge pages that a
//! guest keeps, the work of a guest from which nobody needs to take anything, and what many guests get done at once.
use super::Scene;
use super::keepers::{Keeper, Ours};
use super::measures::{populated, quantile, returned, touch_at_random, verify};
use crate::figures::float;
use crate::guest::{self, Guest};
use crate::report::{Run, Sample};
use crate::session::BenchError;
use anyhow::{Context, Result, anyhow};
use plimsoll_guest::Guest as Program;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::{Categories, Entry, Filter, Pagemap};
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, PAGE_SIZE};
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::config::HugePages;
use std::ops::Range;
use std::time::{Duration, Instant};

/// How often machines are sampled, as in the demo.
pub(super) const SAMPLE_PERIOD: Duration = Duration::from_secs(2);

fn program(config: &VmmConfig) -> Result<Program> {
    config.guest().context("an impossible guest")
}

/// How many pages of limbo are touched: less than the pager lets rest there, enough for a median.
const LIMBO_PAGES: u64 = 2048;
/// Of these touches, so many at least must have found limbo.
const LIMBO_PERCENT_MIN: u64 = 95;

/// The median time of a touch of a page that is in limbo.
///
/// As little is asked for as can be. The pager fills limbo before it stores anything, so some thousand pages rest there,
/// and one batch of the oldest is stored.
pub(super) fn limbo_touch(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    let mut ours: Ours = populated(scene)?;
    let layout = program(&scene.config(WorkloadKind::Probe))?.layout().clone();
    ours.fill_limbo()?;
    let entries = ours.guest().entries()?;
    let is_away = |page: u64| {
        let entry =
            usize::try_from(layout.data_gpa(page) / PAGE_SIZE as u64).ok().and_then(|at| entries.get(at));
        entry.is_some_and(|entry| !entry.contains(Entry::PRESENT))
    };
    let away = longest_run(layout.data_pages(), is_away);
    if away.end - away.start < LIMBO_PAGES {
        return Err(anyhow!("only {} pages in a row left for limbo", away.end - away.start).into());
    }
    // The youngest, because the oldest were stored.
    let before = ours.limbo_faults()?;
    let touched = touch_at_random(&mut ours, &(away.end - LIMBO_PAGES..away.end))?;
    let found = ours.limbo_faults()? - before;
    if found * 100 < LIMBO_PAGES * LIMBO_PERCENT_MIN {
        return Err(anyhow!("only {found} of {LIMBO_PAGES} touches found their page in limbo").into());
    }
    Ok(touched)
}

/// The median time of as many touches of pages that are away.
pub(super) fn away_touch<K: Keeper>(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    let mut keeper: K = populated(scene)?;
    keeper.page_out()?;
    touch_at_random(&mut keeper, &(0..LIMBO_PAGES))
}

/// The return to a working set all of which has been brought back before the guest goes on: what is left is the guest's
/// own time, and KVM's for pages that are there and that its shadow page tables do not know. No replay can be faster.
pub(super) fn woken(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    returned(scene, Ours::bring_back)
}

/// The longest run of pages below `pages` that are chosen.
fn longest_run(pages: u64, is_chosen: impl Fn(u64) -> bool) -> Range<u64> {
    let (mut longest, mut run) = (0..0, 0..0);
    for page in 0..pages {
        run = if is_chosen(page) { run.start..page + 1 } else { page + 1..page + 1 };
        if run.end - run.start > longest.end - longest.start {
            longest = run.clone();
        }
    }
    longest
}

/// How long the hot blocks are touched before anything is taken, so that they can be known: two sampling periods.
const HEAT: Duration = Duration::from_secs(5);
/// Between two passes over the hot pages.
const PAUSE: Duration = Duration::from_millis(2);
/// One block in so many is hot.
const HOT_ONE_IN: u64 = 4;
/// A run of 1 to 16 pages in every so many of a hot block.
const HOT_STRETCH: u64 = 64;

/// The blocks that consist of a guest's pages, and the first of these pages; the hot ones are the first of them.
struct Blocks {
    first_page: u64,
    first_gpa: u64,
    all: u64,
    hot: u64,
}

impl Blocks {
    fn of(config: &VmmConfig) -> Result<Self> {
        let program = program(config)?;
        let layout = program.layout();
        let block = BLOCK_SIZE as u64;
        let first_gpa = layout.data_gpa(0).next_multiple_of(block);
        let first_page = (first_gpa - layout.data_gpa(0)) / PAGE_SIZE as u64;
        let all = (layout.data_pages() - first_page) / u64::from(BLOCK_PAGES);
        Ok(Self { first_page, first_gpa, all, hot: all / HOT_ONE_IN })
    }

    /// Touches a part of every hot block until the window changes.
    fn keep_hot(&self) -> ProbeCommand {
        ProbeCommand {
            first_page: self.first_page,
            pages: self.hot * u64::from(BLOCK_PAGES),
            stride: HOT_STRETCH,
            passes: 0,
            pause_ns: u64::try_from(PAUSE.as_nanos()).unwrap_or(u64::MAX),
            ..ProbeCommand::new(Task::Read, Order::Scattered)
        }
    }

    /// Half of the pages that are not hot.
    fn half_of_idle(&self) -> u64 {
        (self.all - self.hot) * u64::from(BLOCK_PAGES) / 2
    }

    /// The share of hot blocks that are huge pages.
    fn share_huge(&self, guest: &Guest) -> Result<f64> {
        let huge = Categories::PRESENT | Categories::HUGE;
        let filter = Filter { all_of: huge, any_of: Categories::empty(), report: Categories::empty() };
        let base = guest.hva(self.first_gpa).context("a block outside of memory")?;
        let range = HvaRange::new(base, ByteCount(self.hot * BLOCK_SIZE as u64)).context("no blocks")?;
        let mut bytes = ByteCount(0);
        Pagemap::open(guest.process().process())?.scan(range, filter, |run| bytes += run.range.len())?;
        // None at all is a measurement, and figures are made of positive numbers.
        Ok((float(bytes.0) / float(range.len().0)).max(f64::MIN_POSITIVE))
    }
}

fn huge_config(scene: &Scene<'_>) -> VmmConfig {
    VmmConfig { huge_pages: HugePages::Advise, ..scene.config(WorkloadKind::Probe) }
}

/// The share of a managed guest's hot blocks that are still huge after half of its idle memory was taken.
pub(super) fn huge_kept(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    let config = huge_config(scene);
    let blocks = Blocks::of(&config)?;
    let mut ours = Ours::start(&config, scene)?;
    ours.govern(SAMPLE_PERIOD)?;
    ours.guest().probe(ProbeCommand::new(Task::Populate, Order::Ascending))?;
    ours.guest().ask(blocks.keep_hot())?;
    std::thread::sleep(HEAT);
    ours.take(blocks.half_of_idle())?;
    let share = blocks.share_huge(ours.guest())?;
    ours.guest().window(1)?;
    ours.guest().answer()?;
    verify(&mut ours)?;
    Ok(Sample::untimed(share))
}

/// The same of an unmanaged guest from which nothing was taken.
pub(super) fn huge_untouched(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    let config = huge_config(scene);
    let blocks = Blocks::of(&config)?;
    let mut guest = Guest::unmanaged(config, scene.interrupt)?;
    guest.probe(ProbeCommand::new(Task::Populate, Order::Ascending))?;
    Ok(Sample::untimed(blocks.share_huge(&guest)?))
}

/// What a managed guest does while nobody is short of memory.
pub(super) fn fitting_managed(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    let mut ours = Ours::start(&guest::busy(scene.mix), scene)?;
    ours.govern(SAMPLE_PERIOD)?;
    ours.guest().operations()
}

/// What the same guest does unmanaged.
pub(super) fn fitting_unmanaged(scene: &Scene<'_>) -> Result<Sample, BenchError> {
    Guest::unmanaged(guest::busy(scene.mix), scene.interrupt)?.operations()
}

/// Guests that fault at once.
const MANY: usize = 16;
/// The memory of each.
const SMALL: ByteCount = ByteCount::mib(22);

/// What `count` guests that touch all their pages at random do in a second, together, and how long a touch takes: the
/// median and what one in a hundred exceeds.
fn at_once(scene: &Scene<'_>, count: usize) -> Result<[Sample; 3], BenchError> {
    let config = VmmConfig { ram_bytes: SMALL.0, ..scene.config(WorkloadKind::Probe) };
    let mut ours = Ours::start_many(&config, count, scene)?;
    for guest in ours.guests() {
        guest.probe(ProbeCommand::new(Task::Populate, Order::Ascending))?;
    }
    ours.page_out()?;
    let start = Instant::now();
    for guest in ours.guests() {
        guest.ask(ProbeCommand::new(Task::Read, Order::Random))?;
    }
    let answers: Vec<_> = ours.guests().map(Guest::answer).collect::<Result<_, _>>()?;
    let seconds = start.elapsed().as_secs_f64();
    for guest in ours.guests() {
        guest.probe(ProbeCommand::new(Task::Verify, Order::Ascending))?;
    }
    let mut buckets: Vec<_> = answers.iter().flat_map(|answer| answer.latency.iter().copied()).collect();
    buckets.sort_by_key(|bucket| bucket.from_ns);
    let pages: u64 = answers.iter().map(|answer| answer.pages).sum();
    let at = |permille| quantile(&buckets, permille).context("guests touched nothing");
    Ok([float(pages) / seconds, at(500)?, at(990)?].map(Sample::untimed))
}

/// Pages a second of sixteen guests against one; and of the sixteen, the tail against the median.
pub(super) fn sixteen_guests(scene: &Scene<'_>) -> Result<Vec<Run>, BenchError> {
    let [peer, ..] = at_once(scene, 1)?;
    let [ours, median, tail] = at_once(scene, MANY)?;
    let [peer_again, ..] = at_once(scene, 1)?;
    Ok(vec![Run { ours, peer, peer_again }, Run { ours: tail, peer: median, peer_again: median }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_run_of_several_is_found() {
        let chosen = [1, 2, 5, 6, 7, 9];
        assert_eq!(longest_run(10, |page| chosen.contains(&page)), 5..8);
        assert_eq!(longest_run(10, |page| page >= 4), 4..10);
        assert!(longest_run(10, |_| false).is_empty());
    }
}
