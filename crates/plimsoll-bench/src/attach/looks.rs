//! What looking costs: from a process id to a machine that is managed, and once over all its pages.
//!
//! Enters: a machine with all its pages in memory, and later every second one. Leaves: times against the least that shows
//! as much: one read of the process's mappings, one of its page map.
use super::machine::Machine;
use super::{Stage, attach};
use crate::figures::float;
use crate::report::{Run, Sample};
use crate::session::{BenchError, timed};
use crate::swap::device;
use anyhow::{Context, Result, ensure};
use plimsoll_attach::{Held, Request, inspect};
use plimsoll_linux::kernel::KernelMachine;
use plimsoll_linux::reclaimer::{Reclaimer, Usage};
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::Entry;
use plimsoll_sys::process_memory::{self, Advice};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// The machine's memory.
pub(super) const SIZE: ByteCount = ByteCount::mib(1024);
/// Enough for an average.
const REPEATS: u32 = 8;
/// Entries of the page map in one read.
const ENTRIES: usize = 4096;

/// Attaching; a scan with all pages in memory; one with every second page away.
pub(super) fn round(stage: &Stage<'_>) -> Result<Vec<Run>, BenchError> {
    stage.interrupt.check()?;
    let _device = device(ByteCount(SIZE.0 * 2)).context("cannot make a zram device")?;
    let machine = Machine::start(&stage.disguise, SIZE)?;
    let attaching = against(|| read_smaps(&machine), || attach_from_nothing(&machine).map(drop))?;
    let mut managed = attach_from_nothing(&machine)?;
    let whole = scans(&machine, &mut managed)?;
    page_out_every_second(&machine)?;
    stage.interrupt.check()?;
    let scattered = scans(&machine, &mut managed)?;
    Ok(vec![
        milliseconds(attaching, Clock::Wall),
        milliseconds(whole, Clock::Cpu),
        milliseconds(scattered, Clock::Cpu),
    ])
}

/// Seconds by the wall clock and of the processor, each time: the peer, ours, the peer again.
type Times = [(f64, f64); 3];

/// Which time is the value.
#[derive(Clone, Copy)]
enum Clock {
    Wall,
    Cpu,
}

fn milliseconds(times: Times, clock: Clock) -> Run {
    let [peer, ours, peer_again] = times.map(|(wall, cpu)| {
        let seconds = match clock {
            Clock::Wall => wall,
            Clock::Cpu => cpu,
        };
        Sample { value: seconds * 1000.0, cpu_seconds: Some(cpu) }
    });
    Run { peer, ours, peer_again }
}

fn against(peer: impl Fn() -> Result<()>, mut ours: impl FnMut() -> Result<()>) -> Result<Times> {
    Ok([average(&peer)?, average(&mut ours)?, average(&peer)?])
}

/// What one time takes, of several.
fn average(mut work: impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
    let (done, elapsed) = timed(|| (0..REPEATS).try_for_each(|_| work()));
    done?;
    Ok((elapsed.seconds / f64::from(REPEATS), elapsed.cpu_seconds / f64::from(REPEATS)))
}

fn read_smaps(machine: &Machine) -> Result<()> {
    let path = format!("/proc/{}/smaps", machine.process().get());
    let text = fs::read(&path).with_context(|| format!("cannot read {path}"))?;
    ensure!(!text.is_empty(), "{path} is empty");
    Ok(())
}

/// All that lies between a process id and a machine that is managed.
fn attach_from_nothing(machine: &Machine) -> Result<KernelMachine> {
    let held = Held::open(machine.process())?;
    let dossier = inspect(&held, &Request::default())?;
    let ranges: Vec<HvaRange> = dossier.ram.iter().map(|range| range.hva).collect();
    ensure!(ranges == [machine.memory()], "{ranges:?} was taken for the machine's memory");
    attach(&held, ranges)
}

/// Scans of a machine of one GiB.
fn scans(machine: &Machine, managed: &mut KernelMachine) -> Result<Times> {
    const { assert!(SIZE.0 == 1 << 30, "times are per GiB") };
    let path = format!("/proc/{}/pagemap", machine.process().get());
    let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
    let present = machine.present()?;
    let ours = || {
        let Usage { resident, .. } = managed.usage()?;
        ensure!(resident.0 == present, "{resident} of {present} pages were seen in memory");
        Ok(())
    };
    against(|| read_entries(&file, machine.memory(), present), ours)
}

/// Reads what the page map has for each page, and counts those that are in memory.
fn read_entries(file: &File, range: HvaRange, expected: u64) -> Result<()> {
    let mut bytes = [0; ENTRIES * size_of::<u64>()];
    let (mut at, mut present) = (range.start().0 / PAGE_SIZE as u64, 0);
    let end = range.end().0 / PAGE_SIZE as u64;
    while at < end {
        file.read_exact_at(&mut bytes, at * size_of::<u64>() as u64).context("cannot read a page map")?;
        let entries =
            bytes.as_chunks().0.iter().map(|entry| Entry::from_bits_truncate(u64::from_ne_bytes(*entry)));
        present += entries.filter(|entry| entry.contains(Entry::PRESENT)).count() as u64;
        at += ENTRIES as u64;
    }
    ensure!(present == expected, "{present} of {expected} pages were seen in memory");
    Ok(())
}

fn page_out_every_second(machine: &Machine) -> Result<()> {
    let before = machine.present()?;
    let offsets = (0..SIZE.0).step_by(2 * PAGE_SIZE);
    let page = |offset| HvaRange::new(Hva(machine.memory().start().0 + offset), ByteCount(PAGE_SIZE as u64));
    let pages: Vec<HvaRange> = offsets.filter_map(page).collect();
    let transfer = process_memory::advise(machine.pidfd(), &pages, Advice::PageOut);
    if let Some(refusal) = transfer.stop {
        return Err(anyhow::Error::new(refusal).context("the kernel refused MADV_PAGEOUT"));
    }
    let share = float(machine.present()?) / float(before);
    ensure!((0.49..0.55).contains(&share), "{share:.2} of the pages stayed, where half were to");
    Ok(())
}
