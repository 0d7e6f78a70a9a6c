//! What is believed of KVM guests that are managed from outside and of which nothing is wanted.
//!
//! Enters: guests that say themselves which pages they touch. Leaves: estimates of working sets against the guests' own windows. What must never happen: an
//! estimate held against another period than the one it was made of.
use super::{Stage, attach};
use crate::contents::MIX;
use crate::figures::float;
use crate::guest::{self, Guest, RAM};
use crate::report::{Run, Sample};
use crate::session::BenchError;
use crate::swap::device;
use anyhow::{Context, Result, anyhow};
use plimsoll_attach::Held;
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_linux::kernel::{KernelMachine, PERIOD};
use plimsoll_linux::reclaimer::Reclaimer;
use plimsoll_types::ByteCount;
use plimsoll_vmm::VmmConfig;
use std::thread;
use std::time::Instant;

/// Room for all of two guests.
pub(super) const SWAP: ByteCount = ByteCount(RAM.0 * 4);

/// A guest that looks like QEMU's from outside.
pub(super) fn start(stage: &Stage<'_>, config: VmmConfig) -> Result<Guest, BenchError> {
    let mib = (config.ram_bytes / ByteCount::mib(1).0).to_string();
    Guest::unmanaged_as(&stage.disguise.program(), &["-m", &mib], config, stage.interrupt)
}

/// A hold on it.
pub(super) fn hold(guest: &Guest) -> Result<Held> {
    Ok(Held::open(guest.process().process())?)
}

/// Periods before estimates are believed: what the fast average (6 sixteenths a period) still holds of the time before is
/// 15 %, and at that time all was in RAM and nothing known.
const SETTLING: u64 = 4;
/// Periods that count.
const COUNTED: u64 = 6;

/// A guest that does the same all the time, this many times a second, in so many thousandths of its memory.
fn steady(kind: WorkloadKind, hot_permille: u32, ops_per_second: u64) -> VmmConfig {
    let mut config = guest::config(kind, MIX);
    config.workload.spec =
        WorkloadSpec { hot_permille, ops_per_second, final_check: 1, ..config.workload.spec };
    config
}

/// A guest, and what is believed of it.
struct Observed {
    guest: Guest,
    machine: KernelMachine,
    /// Of each counted period: the estimate, and the pages the guest touched.
    seen: Vec<(f64, f64)>,
}

impl Observed {
    fn start(stage: &Stage<'_>, config: VmmConfig) -> Result<Self, BenchError> {
        let mut guest = start(stage, config)?;
        // What writing the pages for the first time touches is not its working set.
        guest.until_worked(1)?;
        let machine = attach(&hold(&guest)?, guest.ram())?;
        Ok(Self { guest, machine, seen: Vec::new() })
    }

    /// Ends a period on both sides; they are counted from 0, in which nothing was sampled.
    fn end_period(&mut self, period: u64) -> Result<(), BenchError> {
        let tick = self.machine.tick(Instant::now()).context("cannot look at a guest")?;
        self.guest.window(period + 1)?;
        if let Some(short) = tick.short {
            return Err(anyhow!(short).context("no samples were taken").into());
        }
        if period > SETTLING {
            let touched = self.guest.window_pages(period)?;
            let believed = self.machine.working_set().context("nothing is believed of a guest")?;
            self.seen.push((float(believed.0), float(touched)));
        }
        Ok(())
    }

    /// Compares what is believed with what there was, once the guest has read every page again.
    fn finish(&mut self) -> Result<[Run; 2], BenchError> {
        self.guest.finish()?;
        Ok(against_touched(&self.seen).context("too few periods were counted")?)
    }
}

/// The lowest and the highest estimate, each against what was touched in the first and in the second half; of both in each
/// period.
fn against_touched(seen: &[(f64, f64)]) -> Option<[Run; 2]> {
    let mean = |part: &[(f64, f64)]| {
        let touched: f64 = part.iter().map(|(_, touched)| touched).sum();
        (!part.is_empty()).then(|| Sample::untimed(touched / float(part.len() as u64)))
    };
    let (first, second) = seen.split_at(seen.len() / 2);
    let (peer, peer_again) = (mean(first)?, mean(second)?);
    let estimates = || seen.iter().map(|(believed, _)| *believed);
    let (low, high) = (estimates().min_by(f64::total_cmp)?, estimates().max_by(f64::total_cmp)?);
    Some([low, high].map(|value| Run { ours: Sample::untimed(value), peer, peer_again }))
}

/// Estimates of two guests that do the same all the time.
pub(super) fn working_sets(stage: &Stage<'_>) -> Result<Vec<Run>, BenchError> {
    let _device = device(SWAP).context("cannot make a zram device")?;
    let kinds = [(WorkloadKind::Zipf, 400, 10_000), (WorkloadKind::Sweep, 300, 8_000)];
    let mut observed = kinds
        .into_iter()
        .map(|(kind, hot_permille, ops)| Observed::start(stage, steady(kind, hot_permille, ops)))
        .collect::<Result<Vec<_>, _>>()?;
    let mut at = Instant::now();
    for period in 0..=SETTLING + COUNTED {
        stage.interrupt.check()?;
        thread::sleep(at.saturating_duration_since(Instant::now()));
        at += PERIOD;
        observed.iter_mut().try_for_each(|guest| guest.end_period(period))?;
    }
    let runs = observed.iter_mut().map(Observed::finish).collect::<Result<Vec<_>, _>>()?;
    Ok(runs.into_flattened())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_estimates_of_either_side_count_against_what_each_half_touched() {
        let seen = [(90.0, 100.0), (130.0, 110.0), (105.0, 80.0), (100.0, 90.0)];
        let [low, high] = against_touched(&seen).unwrap();
        for (run, ours) in [(low, 90.0), (high, 130.0)] {
            let found = [run.ours, run.peer, run.peer_again].map(|sample| sample.value);
            let expected = [ours, 105.0, 85.0];
            assert!(
                found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-9),
                "{found:?}"
            );
        }
    }

    #[test]
    fn a_single_period_is_held_against_nothing() {
        assert!(against_touched(&[(1.0, 1.0)]).is_none());
        assert!(against_touched(&[]).is_none());
    }
}
