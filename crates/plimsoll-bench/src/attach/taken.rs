//! Taking the memory of machines that do nothing: ours in turn, against nothing but the advice itself.
use super::machine::Machine;
use super::{Stage, attach};
use crate::figures::float;
use crate::report::{Run, Sample};
use crate::session::{BenchError, Elapsed, timed};
use crate::swap::device;
use anyhow::{Context, Result, ensure};
use plimsoll_linux::kernel::KernelMachine;
use plimsoll_linux::reclaimer::Reclaimer;
use plimsoll_sys::process_memory::{self, Advice};
use plimsoll_types::{ByteCount, PageCount};
use std::time::Instant;

/// Memory of a machine: what its pace allows at once.
pub(super) const SIZE: ByteCount = ByteCount::mib(64);
/// The share of the pages that must have gone for a time to stand for all of them.
const PERCENT_MIN: u64 = 95;

/// One way to take the memory of machines.
type Take = fn(&[Machine]) -> Result<Elapsed>;

/// Pages a second of so many machines.
pub(super) fn round(stage: &Stage<'_>, count: u64) -> Result<Vec<Run>, BenchError> {
    let peer = taken(stage, count, advise)?;
    let ours = taken(stage, count, reclaim)?;
    Ok(vec![Run { peer, ours, peer_again: taken(stage, count, advise)? }])
}

fn taken(stage: &Stage<'_>, count: u64, take: Take) -> Result<Sample, BenchError> {
    stage.interrupt.check()?;
    let _device = device(ByteCount(SIZE.0 * count * 2)).context("cannot make a zram device")?;
    let mut machines = Machine::start_many(&stage.disguise, count, SIZE)?;
    let present = |machines: &[Machine]| machines.iter().map(Machine::present).sum::<Result<u64>>();
    let before = present(&machines)?;
    let elapsed = take(&machines)?;
    let went = before.saturating_sub(present(&machines)?);
    if went * 100 < before * PERCENT_MIN {
        return Err(anyhow::anyhow!("{went} of {before} pages went: the time does not stand for all").into());
    }
    Machine::verify(&mut machines)?;
    Ok(Sample { value: float(went) / elapsed.seconds, cpu_seconds: Some(elapsed.cpu_seconds) })
}

fn advise(machines: &[Machine]) -> Result<Elapsed> {
    let (done, elapsed) = timed(|| {
        machines.iter().try_for_each(|machine| {
            let transfer = process_memory::advise(machine.pidfd(), &[machine.memory()], Advice::PageOut);
            transfer.stop.map_or(Ok(()), Err)
        })
    });
    done.context("the kernel refused MADV_PAGEOUT")?;
    Ok(elapsed)
}

fn reclaim(machines: &[Machine]) -> Result<Elapsed> {
    let attach = |machine: &Machine| attach(&machine.held()?, vec![machine.memory()]);
    let mut managed = machines.iter().map(attach).collect::<Result<Vec<KernelMachine>>>()?;
    let (done, elapsed) = timed(|| {
        let take = |machine: &mut KernelMachine| machine.reclaim(PageCount(u64::MAX), Instant::now());
        managed.iter_mut().map(take).collect::<Result<Vec<_>, _>>()
    });
    let taken: u64 = done.context("a machine could not be taken from")?.iter().map(|got| got.taken.0).sum();
    ensure!(taken > 0, "nothing was taken");
    Ok(elapsed)
}
