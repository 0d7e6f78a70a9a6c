//! What an idle stock Debian guest under QEMU ends at, and how soon it answers then.
//!
//! Enters: a guest that has booted and has nothing to do. Leaves: what it takes of this host, in place and compressed, once as much
//! as goes was taken for a while. What must never happen: memory counted as given that a wrong word shows to be lost; so the
//! guest verifies itself in the end.
use super::{Stage, attach};
use crate::figures::float;
use crate::report::{Run, Sample};
use crate::session::BenchError;
use crate::swap::device;
use anyhow::{Context, Result};
use plimsoll_attach::Held;
use plimsoll_linux::kernel::PERIOD;
use plimsoll_linux::reclaimer::Reclaimer;
use plimsoll_stock::{Command, Guest, Kernel, Options};
use plimsoll_types::{ByteCount, PageCount};
use std::thread;
use std::time::{Duration, Instant};

/// The guest's memory.
const SIZE: ByteCount = ByteCount::mib(512);
/// What it may end at, and how long it may take to answer.
const MIB_MAX: f64 = 64.0;
const MILLISECONDS_MAX: f64 = 2000.0;
/// Periods in which as much is taken as goes.
const PERIODS: u32 = 20;
/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// MiB in place and compressed, and milliseconds of an answer, against what they may be.
pub(super) fn round(stage: &Stage<'_>) -> Result<Vec<Run>, BenchError> {
    stage.interrupt.check()?;
    if let Err(why) = Kernel::find() {
        return Err(BenchError::NotHere(format!("it needs a stock guest: {why}; run cargo xtask setup")));
    }
    let device = device(ByteCount(SIZE.0 * 2)).context("cannot make a zram device")?;
    let mut guest = Guest::start(Options::new(SIZE)).context("cannot start a Debian guest")?;
    let held = Held::open(guest.process()).context("cannot hold a Debian guest")?;
    let ram = guest.ram().context("cannot find a Debian guest's memory")?;
    let mut machine = attach(&held, ram)?;
    let before = machine.usage().context("cannot look at a Debian guest")?.resident;
    for _ in 0..PERIODS {
        stage.interrupt.check()?;
        machine.tick(Instant::now()).context("cannot look at a Debian guest")?;
        machine.reclaim(PageCount(u64::MAX), Instant::now()).context("cannot take from a Debian guest")?;
        thread::sleep(PERIOD);
    }
    let usage = machine.usage().context("cannot look at a Debian guest")?;
    let compressed = device.memory_used().context("cannot see what a zram device takes")?;
    let asked = Instant::now();
    ask(&mut guest, Command::Ping)?;
    let answered = asked.elapsed();
    let wrong = ask(&mut guest, Command::Sweep)?;
    if wrong > 0 {
        let why = format!("a Debian guest found {wrong} wrong words: the numbers mean nothing");
        return Err(anyhow::Error::msg(why).into());
    }
    println!(
        "  {} in RAM at first; then {} and {} of swap as {compressed}",
        before.bytes(),
        usage.resident.bytes(),
        usage.elsewhere.bytes()
    );
    let mib = float(usage.resident.bytes().0 + compressed.0) / float(ByteCount::mib(1).0);
    Ok(vec![at_most(mib, MIB_MAX), at_most(answered.as_secs_f64() * 1000.0, MILLISECONDS_MAX)])
}

/// Asks, and returns how many wrong words the answer tells of.
fn ask(guest: &mut Guest, command: Command) -> Result<u64> {
    let counts = guest.console().ask(command, PATIENCE).context("a Debian guest does not answer")?;
    Ok(counts.get("wrong").unwrap_or(0))
}

/// Against a bound, which does not vary.
fn at_most(value: f64, bound: f64) -> Run {
    let bound = Sample::untimed(bound);
    Run { ours: Sample::untimed(value), peer: bound, peer_again: bound }
}
