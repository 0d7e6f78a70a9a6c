//! What a busy guest loses while it is managed from outside and nothing is wanted of it: slices of the same guest's life,
//! managed and left alone by turns.
//!
//! Enters: a KVM guest that says itself how much it gets done. Leaves: runs of three neighbouring slices, the middle one
//! managed. What must never happen: a cost that is not in the slice it belongs to; so pages that were taken in one and come
//! back in the next are counted, and too many of them are an error.
//!
//! Guests are not compared with each other: from one to the next, and from one quarter of a minute to the next, this machine's own
//! pace changes by more than what is to be measured.
use super::{Attached, Stage, guests};
use crate::contents::MIX;
use crate::guest::{self, Guest};
use crate::report::{Run, Sample};
use crate::session::{BenchError, OneProcessor};
use crate::swap::device;
use anyhow::{Context, Result, ensure};
use plimsoll_linux::kernel::PERIOD;
use plimsoll_linux::reclaimer::{COLLAPSED_MAX, Reclaimer};
use plimsoll_sys::HvaRange;
use plimsoll_sys::process_memory::{self, Advice};
use plimsoll_sys::procfs::major_faults;
use plimsoll_types::{BLOCK_SIZE, ByteCount, Hva, PAGE_SIZE};
use plimsoll_vmm::VmmConfig;
use std::time::{Duration, Instant};

/// Runs of each row of a managed guest, and of the one that is split. The interval of a median leaves out nine and two of them on
/// either side.
const RUNS: usize = 32;
const RUNS_SPLIT: usize = 14;
/// A slice of a managed guest. What a period costs its guest falls into the beginning of it, which is counted; to look at the rest,
/// too, would only add its noise.
const SLICE: Duration = Duration::from_millis(500);
/// What a slice is of a period.
pub(super) const SHARE: f64 = 0.25;
const _: () = assert!(SLICE.as_millis() * 4 == PERIOD.as_millis());
/// How often a guest says how far it is: a slice ends at one of its words.
const REPORT_MS: u32 = 20;
/// How long a guest works before anything counts.
const WARM: Duration = Duration::from_secs(2);
/// After huge pages were made or split, a guest meets each page once at what it costs to map it.
const SETTLE: Duration = Duration::from_millis(500);
/// A slice of a guest of huge or split pages.
const STEADY: Duration = Duration::from_secs(1);
/// In slices without a manager at most one page in so many comes back of those that do in slices with one.
const LATE_MAX: u64 = 10;

/// A guest on one processor, its manager on any other.
struct Watched {
    guest: Guest,
    attached: Attached,
}

impl Watched {
    fn start(stage: &Stage<'_>) -> Result<Self, BenchError> {
        let here = OneProcessor::here()?;
        let config = VmmConfig { report_ms: REPORT_MS, ..guest::busy(MIX) };
        let mut guest = guests::start(stage, config)?;
        drop(here);
        guest.until_worked(nanoseconds(WARM))?;
        let attached = Attached::new(guests::hold(&guest)?, guest.ram())?;
        Ok(Self { guest, attached })
    }

    /// Operations a second from now on for so long, with what is done at the beginning.
    fn slice(
        &mut self,
        length: Duration,
        begin: impl FnOnce(&mut Attached) -> Result<()>,
    ) -> Result<Sample, BenchError> {
        let Self { guest, attached } = self;
        guest.operations_for(0, nanoseconds(length), || begin(attached))
    }

    fn faults(&self) -> Result<u64> {
        major_faults(self.guest.process().process()).context("cannot count a guest's faults")
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Only samples are taken.
fn sample(attached: &mut Attached) -> Result<()> {
    let tick = attached.machine.tick(Instant::now()).context("cannot look at a guest")?;
    ensure!(tick.short.is_none(), "no samples were taken: {:?}", tick.short);
    Ok(())
}

/// All that the `attach` command does in a period without a budget.
fn manage(attached: &mut Attached) -> Result<()> {
    attached.tick()?;
    attached.machine.usage()?;
    attached.machine.collapse_hot(COLLAPSED_MAX)?;
    Ok(())
}

/// Runs of a guest that is sampled, and of one that is managed, by turns with being left alone.
pub(super) fn managed(stage: &Stage<'_>) -> Result<Vec<Vec<Run>>, BenchError> {
    let _device = device(guests::SWAP).context("cannot make a zram device")?;
    let mut watched = Watched::start(stage)?;
    // What taking the first page of each huge one costs is another row's.
    manage(&mut watched.attached)?;
    watched.slice(SLICE, |_| Ok(()))?;
    let mut runs = vec![Vec::new(); 2];
    let mut peer = watched.slice(SLICE, |_| Ok(()))?;
    let (mut late, mut all) = (0, 0);
    for turn in 0..2 * RUNS {
        let before = watched.faults()?;
        let ours = watched.slice(SLICE, if turn % 2 == 0 { sample } else { manage })?;
        let between = watched.faults()?;
        let peer_again = watched.slice(SLICE, |_| Ok(()))?;
        late += watched.faults()? - between;
        all += between - before;
        runs[turn % 2].push(Run { ours, peer, peer_again });
        peer = peer_again;
    }
    println!("  {all} pages came back in slices with a manager, {late} in those without");
    if late * LATE_MAX > all {
        return Err(anyhow::anyhow!("{late} of {all} pages came back in slices without a manager").into());
    }
    watched.guest.finish()?;
    Ok(runs)
}

/// Runs of a guest whose huge pages were split as samples split them, by turns with having them made again.
pub(super) fn split(stage: &Stage<'_>) -> Result<Vec<Vec<Run>>, BenchError> {
    let _device = device(guests::SWAP).context("cannot make a zram device")?;
    let mut watched = Watched::start(stage)?;
    let blocks = whole_blocks(&watched.guest.ram());
    let first_pages: Vec<HvaRange> =
        blocks.iter().filter_map(|block| HvaRange::new(block.start(), ByteCount(PAGE_SIZE as u64))).collect();
    let mut slice = |ranges: &[HvaRange], advice| -> Result<Sample, BenchError> {
        let transfer = process_memory::advise(watched.guest.process(), ranges, advice);
        if let Some(refusal) = transfer.stop {
            return Err(anyhow::Error::new(refusal).context(format!("the kernel refused {advice:?}")).into());
        }
        watched.slice(SETTLE, |_| Ok(()))?;
        watched.slice(STEADY, |_| Ok(()))
    };
    let mut runs = Vec::with_capacity(RUNS_SPLIT);
    let mut peer = slice(&blocks, Advice::Collapse)?;
    for _ in 0..RUNS_SPLIT {
        let ours = slice(&first_pages, Advice::PageOut)?;
        let peer_again = slice(&blocks, Advice::Collapse)?;
        runs.push(Run { ours, peer, peer_again });
        peer = peer_again;
    }
    watched.guest.finish()?;
    Ok(vec![runs])
}

/// The blocks that can be huge pages.
fn whole_blocks(ranges: &[HvaRange]) -> Vec<HvaRange> {
    let of = |range: &HvaRange| {
        let first = range.start().0.next_multiple_of(BLOCK_SIZE as u64);
        let starts = (first..range.end().0).step_by(BLOCK_SIZE);
        let end = range.end().0;
        starts
            .take_while(move |start| start + BLOCK_SIZE as u64 <= end)
            .filter_map(|start| HvaRange::new(Hva(start), ByteCount(BLOCK_SIZE as u64)))
    };
    ranges.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_can_be_huge() {
        let range = |start, len| HvaRange::new(Hva(start), ByteCount(len)).unwrap();
        const BLOCK: u64 = BLOCK_SIZE as u64;
        let found = whole_blocks(&[
            range(BLOCK / 2, 3 * BLOCK),
            range(8 * BLOCK, BLOCK),
            range(9 * BLOCK + 4096, BLOCK),
        ]);
        assert_eq!(found, [range(BLOCK, BLOCK), range(2 * BLOCK, BLOCK), range(8 * BLOCK, BLOCK)]);
    }
}
