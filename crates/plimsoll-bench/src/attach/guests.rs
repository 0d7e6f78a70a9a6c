//! KVM guests that are managed from outside and of which nothing is wanted: what they notice, and what is believed of them.
//!
//! Enters: guests that say themselves how much they get done and which pages they touch. Leaves: operations a second with
//! and without a manager, and estimates of working sets against the guests' own windows. What must never happen: an
//! estimate held against another period than the one it was made of.
use super::{Attached, Stage, attach};
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
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Instant;

/// Room for all of two guests.
const SWAP: ByteCount = ByteCount(RAM.0 * 4);

/// A guest that looks like QEMU's from outside.
fn start(stage: &Stage<'_>, config: VmmConfig) -> Result<Guest, BenchError> {
    let mib = (config.ram_bytes / ByteCount::mib(1).0).to_string();
    Guest::unmanaged_as(&stage.disguise.program(), &["-m", &mib], config, stage.interrupt)
}

fn hold(guest: &Guest) -> Result<Held> {
    Ok(Held::open(guest.process().process())?)
}

/// Operations a second: alone; sampled; sampled, followed and counted as the `attach` command does; alone again.
pub(super) fn unpressed(stage: &Stage<'_>) -> Result<Vec<Run>, BenchError> {
    let alone = || start(stage, guest::busy(MIX))?.operations();
    let peer = alone()?;
    let sampled = managed(stage, |guest| {
        let mut machine = attach(&hold(guest)?, guest.ram())?;
        Ok(Box::new(move || {
            machine.tick(Instant::now())?;
            Ok(machine.due())
        }))
    })?;
    let followed = managed(stage, |guest| {
        let mut attached = Attached::new(hold(guest)?, guest.ram())?;
        Ok(Box::new(move || {
            attached.tick()?;
            attached.machine.usage()?;
            Ok(attached.machine.due())
        }))
    })?;
    let peer_again = alone()?;
    Ok([sampled, followed].map(|ours| Run { peer, ours, peer_again }).to_vec())
}

/// One look at a machine, which says when the next is due.
type Look = Box<dyn FnMut() -> Result<Instant> + Send>;

/// Operations a second of a guest that is looked at from another thread.
fn managed(stage: &Stage<'_>, look_at: fn(&Guest) -> Result<Look>) -> Result<Sample, BenchError> {
    let _device = device(SWAP).context("cannot make a zram device")?;
    let mut guest = start(stage, guest::busy(MIX))?;
    let look = look_at(&guest)?;
    let (end, ended) = channel();
    thread::scope(|scope| {
        let looking = scope.spawn(move || look_until(&ended, look));
        let sample = guest.operations();
        drop(end);
        looking.join().map_err(|_| anyhow!("the manager's thread panicked"))??;
        sample
    })
}

/// Looks whenever it is due, until the other end of the channel is gone.
fn look_until(ended: &Receiver<()>, mut look: Look) -> Result<()> {
    loop {
        let due = look()?;
        match ended.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
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
    let sample = |value| Sample { value, cpu_seconds: None };
    let mean = |part: &[(f64, f64)]| {
        let touched: f64 = part.iter().map(|(_, touched)| touched).sum();
        (!part.is_empty()).then(|| sample(touched / float(part.len() as u64)))
    };
    let (first, second) = seen.split_at(seen.len() / 2);
    let (peer, peer_again) = (mean(first)?, mean(second)?);
    let estimates = || seen.iter().map(|(believed, _)| *believed);
    let (low, high) = (estimates().min_by(f64::total_cmp)?, estimates().max_by(f64::total_cmp)?);
    Some([low, high].map(|value| Run { ours: sample(value), peer, peer_again }))
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

    #[test]
    fn looking_ends_with_the_work_that_it_goes_on_beside() {
        let (end, ended) = channel();
        let mut looks = 0;
        let mut end = Some(end);
        let look = Box::new(move || {
            looks += 1;
            if looks == 3 {
                end.take();
            }
            assert!(looks <= 3, "looked after the end");
            Ok(Instant::now())
        });
        look_until(&ended, look).unwrap();
    }
}
