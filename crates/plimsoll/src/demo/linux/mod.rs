//! `plimsoll demo --linux`: stock Linux guests under an unmodified QEMU, managed from outside.
//!
//! Enters: how many guests, how large, their budget. Leaves: how they fared, with every page and every disk block they
//! read verified. Nothing is handed over: what `plimsoll attach` does to one machine is done to all of them, with one
//! budget over their RAM and what swap makes of it. QEMU's own memory is reported beside it, not in it.
//!
//! [`herd`]: the machines, by a thread that manages them while others still boot. [`report`]: what was seen.
mod herd;
mod report;

use super::meter::Accounting;
use super::swap::Swap;
use super::{DemoArgs, Interrupt, limits};
use herd::{Herd, Member};
use plimsoll_linux::explain;
use plimsoll_stock::{Command, Console, Disk, Guest, Kernel, Options};
use plimsoll_types::ByteCount;
use report::{GuestReport, Report};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Below this Debian's kernel does not come up with its initramfs.
const SIZE_MIN: ByteCount = ByteCount::mib(192);
/// What a guest's kernel and program take before it has done anything.
const GUEST_OWN: ByteCount = ByteCount::mib(96);
/// Share of the rest that is filled with verified pages, and of those that are hot.
const FILLED_PERCENT: u64 = 70;
const HOT_PERCENT: u64 = 10;
/// Under QEMU's translator a verified page costs tens of microseconds: this is a few percent of a processor each.
const PAGES_PER_SECOND: u64 = 300;
const BLOCKS_PER_SECOND: u64 = 20;
const DISK_SIZE: ByteCount = ByteCount::mib(16);
/// How long a question to a guest may take on a machine that pages and translates.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at everything.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Runs it.
pub(super) fn run(args: &DemoArgs) -> Result<ExitCode, String> {
    let kernel = Kernel::find().map_err(|error| explain(&error))?;
    let size = args.size;
    if size < SIZE_MIN || !size.is_multiple_of(1 << 20) {
        return Err(format!("--size {size}: a stock Linux guest needs whole MiB and at least {SIZE_MIN}"));
    }
    if args.guests == 0 || args.seconds == 0 {
        return Err("--guests and --seconds: use at least 1".to_owned());
    }
    let asked = ByteCount(size.0.saturating_mul(u64::from(args.guests)));
    let budget = args.budget.unwrap_or(ByteCount(asked.0 / 2));
    let available = limits()?.available;
    if budget > available {
        return Err(format!("a budget of {budget} does not fit this host, which has {available} available"));
    }
    let mix = args.mix.parse().map_err(|error| format!("--mix {}: {error}", args.mix))?;
    println!("guests: stock Linux {} under QEMU, translated (TCG), managed from outside", kernel.version());
    println!(
        "{} guests of {size} own {asked}; budget {budget} for their RAM; seed {}",
        args.guests, args.seed
    );
    let interrupt = Interrupt::install()?;
    let accounting = Accounting::start()?;
    let swap = Swap::prepare(asked)?;
    let herd = Herd::start(budget)?;
    let mut guests = Vec::new();
    let outcome = boot(args, mix, &herd, &accounting, &interrupt, &mut guests)
        .and_then(|()| work(args, budget, &herd, &accounting, &interrupt, &mut guests));
    let herd = herd.stop();
    drop(guests);
    let ended = accounting.finish().and(swap.remove());
    let mut report = outcome?;
    herd?;
    ended?;
    report.failures.extend(interrupt.is_set().then(|| "interrupted before the end".to_owned()));
    println!("\n{}", report.text());
    super::write_json(args, &report)?;
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts the guests one after the other; each is managed from its first moment on.
fn boot(
    args: &DemoArgs,
    mix: plimsoll_guest::content::Mix,
    herd: &Herd,
    accounting: &Accounting,
    interrupt: &Interrupt,
    guests: &mut Vec<Guest>,
) -> Result<(), String> {
    let filled = ByteCount((args.size.0 - GUEST_OWN.0) / 100 * FILLED_PERCENT).pages_floor().0;
    for nth in 0..args.guests {
        if interrupt.is_set() {
            break;
        }
        let name = format!("linux{}", nth + 1);
        let seed = args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(nth));
        let mut options = Options::new(args.size);
        (options.seed, options.mix) = (seed, mix);
        options.disk = Some(Arc::new(Disk::create(DISK_SIZE, seed).map_err(|error| explain(&error))?));
        options.work = vec![
            Command::Alloc { pages: filled },
            Command::Hot { pages: filled / 100 * HOT_PERCENT, per_second: PAGES_PER_SECOND },
            Command::Disk { per_second: BLOCKS_PER_SECOND },
        ];
        let started = Instant::now();
        let guest = Guest::start(options).map_err(|error| format!("{name}: {}", explain(&error)))?;
        accounting.add(guest.process().get());
        herd.admit(Member::new(name.clone(), &guest)?);
        println!("{name} booted in {:.1} s, {}", started.elapsed().as_secs_f64(), guest.process());
        guests.push(guest);
    }
    Ok(())
}

/// Lets them work, then has them verify everything.
fn work(
    args: &DemoArgs,
    budget: ByteCount,
    herd: &Herd,
    accounting: &Accounting,
    interrupt: &Interrupt,
    guests: &mut [Guest],
) -> Result<Report, String> {
    let until = Instant::now() + Duration::from_secs(args.seconds);
    let ask =
        |console: &mut Console, command| console.ask(command, PATIENCE).map_err(|error| explain(&error));
    // The first report begins the window whose working set the second tells.
    let mut before = Vec::new();
    for guest in guests.iter_mut() {
        before.push(guest.console().report(PATIENCE).map_err(|error| explain(&error))?);
    }
    while Instant::now() < until && !interrupt.is_set() {
        let left = until.saturating_duration_since(Instant::now());
        std::thread::sleep(left.min(LOOK_EVERY));
        let host = herd.host();
        println!("{}", host.line(budget));
        for (guest, before) in guests.iter_mut().zip(&mut before) {
            *before = guest.console().report(PATIENCE).map_err(|error| explain(&error))?;
        }
    }
    let (host, machines) = (herd.host(), herd.machines());
    let peak = accounting.peak();
    let mut reports = Vec::new();
    for ((guest, before), machine) in guests.iter_mut().zip(&before).zip(machines) {
        let sweep = ask(guest.console(), Command::Sweep);
        let after = guest.console().report(PATIENCE).map_err(|error| explain(&error))?;
        reports.push(GuestReport::new(machine, args.size, before, &after, sweep.err()));
    }
    Ok(Report::new(args, budget, host, peak, accounting.source(), reports))
}
