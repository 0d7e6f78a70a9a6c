//! The same guests at the same budget under the kernel alone.
//!
//! Enters: the plan of the run before. Leaves: how the guests fared in a memory cgroup that may use the budget and no
//! more, swapping to the host's own swap or, when it has none, to a zram device made for this run. What the zram
//! device holds is part of the budget, as our store is: the cgroup's limit follows it down. Everything is announced
//! before and gone after.
use super::Interrupt;
use super::fleet::{self, Guest};
use super::meter::PREFIX;
use super::plan::Plan;
use super::report::{Without, WithoutGuest, quantile_us, rate};
use super::swap::Swap;
use super::view::{GuestLine, HostLine, View};
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_linux::explain;
use plimsoll_sys::ProcessId;
use plimsoll_types::ByteCount;
use plimsoll_vmm::control::StopMode;
use std::time::{Duration, Instant};

/// How often the limit follows what zram holds. Often, so that each step is small and takes nothing from the kernel
/// that a constant limit would have left it. (Guests killed for want of memory were seen with a constant limit, too:
/// at full speed this kernel's cgroup gives up before its reclaim has caught up.)
const PERIOD: Duration = Duration::from_millis(20);
/// How long the guests may take to end. They are not asked to check every page: that was done, and is not compared.
const END_PATIENCE: Duration = Duration::from_secs(60);
/// The limit never falls below this share of the budget, or the guests could not run at all.
const LIMIT_MIN_SHARE: u64 = 8;

/// Runs the guests under the kernel alone, or says why that cannot be done here.
pub(super) fn run(plan: &Plan, interrupt: &Interrupt) -> Result<Without, String> {
    println!("\nnow without plimsoll:");
    let swap = Swap::prepare(plan.asked())?;
    let cgroup = MemoryCgroup::create(PREFIX, ProcessId::own()).map_err(|error| explain(&error))?;
    let outcome = compare(plan, &swap, &cgroup, interrupt);
    // The guests are gone. The cgroup goes first, so that swapoff has nothing to read back into it.
    cgroup.remove().map_err(|error| explain(&error))?;
    swap.remove()?;
    outcome
}

fn compare(
    plan: &Plan,
    swap: &Swap,
    cgroup: &MemoryCgroup,
    interrupt: &Interrupt,
) -> Result<Without, String> {
    cgroup.set_limit(plan.budget).map_err(|error| explain(&error))?;
    let mut guests = Vec::new();
    for config in plan.unmanaged() {
        cgroup.join_self().map_err(|error| explain(&error))?;
        let spawned = Guest::spawn(&config);
        cgroup.leave_self().map_err(|error| explain(&error))?;
        guests.push(spawned?.0);
    }
    let started = Instant::now();
    let mut view = View::new(guests.len());
    let (mut peak, mut zram_peak) = (ByteCount(0), ByteCount(0));
    let ended = |guest: &Guest| guest.state().closed;
    while started.elapsed() < Duration::from_secs(plan.seconds)
        && !interrupt.is_set()
        && !guests.iter().all(ended)
    {
        std::thread::sleep(PERIOD);
        let held = swap.held();
        zram_peak = zram_peak.max(held);
        let limit = plan.budget.saturating_sub(held).max(ByteCount(plan.budget.0 / LIMIT_MIN_SHARE));
        // A limit that cannot be reached at once is tried again with the next one.
        let _ = cgroup.set_limit(limit);
        let used = cgroup.used().unwrap_or_default() + held;
        peak = peak.max(used);
        let line = |guest: &Guest| GuestLine {
            name: guest.name.clone(),
            size: guest.size,
            memory: None,
            state: guest.state(),
        };
        let lines: Vec<GuestLine> = guests.iter().map(line).collect();
        view.show(&HostLine { phase: "kernel alone".to_owned(), used, budget: plan.budget }, &lines);
    }
    let states: Vec<_> = guests.iter_mut().map(|guest| (guest.state(), guest.untimely_end())).collect();
    fleet::stop(&guests, StopMode::Now);
    let stopping = Instant::now();
    while !guests.iter().all(ended) && stopping.elapsed() < END_PATIENCE {
        std::thread::sleep(PERIOD);
    }
    view.finish();
    let report = |(guest, (state, end)): (&Guest, &(fleet::GuestState, Option<String>))| WithoutGuest {
        name: guest.name.clone(),
        operations_per_second: rate(state.summary.operations, state.summary.running_ns),
        operation_p99_us: quantile_us(&state.summary.latency.buckets, 0.99),
        died: state.died.clone().or_else(|| end.clone()),
    };
    Ok(Without {
        swap: swap.description.clone(),
        peak_bytes: peak.0,
        zram_peak_bytes: zram_peak.0,
        oom_kills: cgroup.oom_kills().unwrap_or_default(),
        wrong_words: states.iter().map(|(state, _)| state.summary.wrong_words).sum(),
        guests: guests.iter().zip(&states).map(report).collect(),
    })
}
