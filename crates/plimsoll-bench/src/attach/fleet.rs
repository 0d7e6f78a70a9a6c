//! Many machines that do nothing, looked at by one thread, each when it wants to be.
use super::machine::Machine;
use super::{Attached, Stage};
use crate::report::{Run, Sample};
use crate::session::{BenchError, timed};
use crate::swap::device;
use anyhow::Context;
use plimsoll_types::ByteCount;
use std::thread;
use std::time::{Duration, Instant};

const MACHINES: u64 = 200;
/// Memory of each: the smallest guests have so much, and smaller mappings are not followed.
pub(super) const SIZE: ByteCount = ByteCount::mib(16);
/// How long the machines are looked at before it counts. A machine that does nothing has then come to its longest period.
const SETTLING: Duration = Duration::from_secs(30);
/// How long it counts: nearly that period, in which each machine is looked at once.
const COUNTED: Duration = Duration::from_secs(30);
/// How often a wait looks for signals.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Milliseconds of processor time a second, against one processor.
pub(super) fn round(stage: &Stage<'_>) -> Result<Vec<Run>, BenchError> {
    stage.interrupt.check()?;
    let _device = device(ByteCount(SIZE.0 * MACHINES * 2)).context("cannot make a zram device")?;
    let machines = Machine::start_many(&stage.disguise, MACHINES, SIZE)?;
    let start = Instant::now();
    let attach = |machine: &Machine| Attached::new(machine.held()?, Vec::new());
    let mut fleet = machines.iter().map(attach).collect::<anyhow::Result<Vec<_>>>()?;
    let (done, settling) = timed(|| look_until(start + SETTLING, &mut fleet, stage));
    done?;
    println!(
        "  {:.1} ms/s in the {} s before",
        settling.cpu_seconds / settling.seconds * 1000.0,
        SETTLING.as_secs()
    );
    let periods = |fleet: &[Attached]| fleet.iter().map(|one| one.machine.totals().periods).sum::<u64>();
    let before = periods(&fleet);
    let (done, elapsed) = timed(|| look_until(start + SETTLING + COUNTED, &mut fleet, stage));
    done?;
    if periods(&fleet) - before < MACHINES {
        return Err(anyhow::anyhow!("only {} looks were counted", periods(&fleet) - before).into());
    }
    let share = elapsed.cpu_seconds / elapsed.seconds;
    let peer = Sample::untimed(1000.0);
    let ours = Sample { value: share * 1000.0, cpu_seconds: Some(elapsed.cpu_seconds) };
    Ok(vec![Run { ours, peer, peer_again: peer }])
}

/// Looks at each machine when it is due.
fn look_until(end: Instant, fleet: &mut [Attached], stage: &Stage<'_>) -> Result<(), BenchError> {
    loop {
        stage.interrupt.check()?;
        let now = Instant::now();
        for attached in fleet.iter_mut().filter(|attached| attached.machine.due() <= now) {
            attached.tick()?;
        }
        if now >= end {
            return Ok(());
        }
        let due = fleet.iter().map(|attached| attached.machine.due()).min().unwrap_or(end);
        let next = due.min(end).min(now + LOOK_EVERY);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
