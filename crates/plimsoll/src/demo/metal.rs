//! `plimsoll demo --host metal`: the same guests under the bare-metal host, which QEMU emulates a machine for.
//!
//! Enters: the same plan. Leaves: the same report, of what the hypervisor said on its serial port. The budget is the machine's
//! memory, so that the hard line needs no measuring: there is no more. Times are an emulated processor's.
use super::plan::{self, Plan};
use super::report::{GuestReport, HostReport, ModeReport, Report, rate};
use super::{Accel, DemoArgs, Interrupt, limits};
use plimsoll_linux::explain;
use plimsoll_metal::wire::{Device, GuestLine, HostLine, Line, Paging, ProgramKind};
use plimsoll_metal::{Event, Guest, MetalError, Options, Run, Ticks};
use plimsoll_types::ByteCount;
use plimsoll_vmm::config::AccelChoice;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long the hypervisor may be silent: it says something every other second, unless it stores as fast as it can.
const PATIENCE: Duration = Duration::from_secs(180);
/// How often an interrupt is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Runs it.
pub(super) fn run(args: &DemoArgs) -> Result<ExitCode, String> {
    refuse_what_it_lacks(args)?;
    let plan = plan::plan(args, AccelChoice::InProcess, limits()?)?;
    let run_by = "plimsoll-metal, nested paging (AMD SVM) emulated by QEMU (TCG)".to_owned();
    println!("guests: user-mode programs without a kernel of their own; run by {run_by}");
    super::announce(&plan);
    let mut options = Options::new(plan.budget);
    options.seconds = u32::try_from(plan.seconds).map_err(|_| "--seconds: too many".to_owned())?;
    for config in &plan.guests {
        let params = config.parameters().map_err(|error| explain(&error))?;
        options.guests.push(Guest {
            name: config.name.clone(),
            program: ProgramKind::WORKLOAD,
            paging: Paging::NESTED,
            code: None,
            device: Device::NONE,
            params,
        });
    }
    if args.exits {
        options.ticks = Ticks::Instructions;
    }
    let interrupt = Interrupt::install()?;
    let heard = Heard::of(start(&options)?, &interrupt)?;
    let mut report = heard.report(&plan, run_by, options.ticks);
    if args.exits && !interrupt.is_set() {
        let heard = Heard::of(start(&Options::of_modes())?, &interrupt)?;
        report.failures.extend(heard.in_each_mode_alike());
        report.modes = heard.guests.iter().map(mode_report).collect();
    }
    report.failures.extend(interrupt.is_set().then(|| "interrupted before the end".to_owned()));
    println!("\n{}", report.text());
    super::write_json(args, &report)?;
    Ok(if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn start(options: &Options) -> Result<Run, String> {
    Run::start(options).map_err(|error| explain(&error))
}

fn refuse_what_it_lacks(args: &DemoArgs) -> Result<(), String> {
    let asked = [
        (args.linux, "--linux"),
        (args.accel != Accel::Auto, "--accel"),
        (args.vcpus != 1, "--vcpus"),
        (args.prefault, "--prefault"),
        (args.sabotage, "--sabotage"),
        (args.share, "--share"),
    ];
    match asked.iter().find(|(is_asked, _)| *is_asked) {
        Some((_, option)) => {
            Err(format!("{option} is not for the bare-metal host; leave it or --host metal out"))
        }
        None => Ok(()),
    }
}

/// What the hypervisor said.
#[derive(Default)]
struct Heard {
    guests: Vec<GuestLine>,
    host: HostLine,
    failures: Vec<String>,
}

impl Heard {
    fn of(mut run: Run, interrupt: &Interrupt) -> Result<Self, String> {
        let mut heard = Self::default();
        let (mut last, mut spoke) = (String::new(), Instant::now());
        while !interrupt.is_set() {
            match run.next(LOOK_EVERY) {
                Err(MetalError::Silent { .. }) if spoke.elapsed() < PATIENCE => continue,
                Err(error) => return Err(format!("{}; {}", explain(&error), run.complaints())),
                Ok(Event::Said(line)) => {
                    eprintln!("{line}");
                    last = line;
                }
                Ok(Event::Report(line)) => match *line {
                    Line::Guest(guest) => heard.guests.push(guest),
                    Line::Host(host) => heard.host = host,
                    Line::Failure { why } => heard.failures.push(why),
                    // It was given nothing to decide by.
                    Line::Decision(_) => {}
                },
                Ok(Event::Done) => break,
                Ok(Event::Refused) => return Err(last),
                Ok(Event::Crashed(status)) => {
                    let complaints = run.complaints();
                    return Err(format!("the hypervisor crashed ({status}): {last}. {complaints}"));
                }
            }
            spoke = Instant::now();
        }
        Ok(heard)
    }

    /// What is wrong with a kernel that was to see the same whatever its paging is.
    fn in_each_mode_alike(&self) -> Option<String> {
        let results =
            self.guests.iter().map(|kernel| (&kernel.died, kernel.verified_pages, kernel.operations));
        let results: Vec<_> = results.collect();
        let is_alike = results.len() == Options::of_modes().guests.len()
            && results.iter().all(|result| *result == (&None, results[0].1, results[0].2));
        (!is_alike).then(|| format!("a kernel did not see the same with each kind of paging: {results:?}"))
    }

    fn report(self, plan: &Plan, run_by: String, ticks: Ticks) -> Report {
        let Self { guests, host, mut failures } = self;
        for guest in &guests {
            failures.extend(guest.died.as_ref().map(|why| format!("{} died: {why}", guest.name)));
        }
        let wrong_words = guests.iter().map(|guest| guest.wrong_words).sum();
        if wrong_words > 0 {
            failures.push(format!("{wrong_words} wrong words"));
        }
        if guests.len() < plan.guests.len() {
            failures.push(format!("{} of {} guests were reported", guests.len(), plan.guests.len()));
        }
        let mut report = Report {
            version: 1,
            guests_are: "user-mode programs without a kernel".to_owned(),
            run_by,
            seed: plan.seed,
            mix: plan.mix.to_string(),
            seconds: plan.seconds,
            asked_bytes: plan.asked().0,
            budget_bytes: plan.budget.0,
            peak_bytes: host.peak_bytes,
            peak_source: "the frame allocator's own count: image, tables and heap included".to_owned(),
            wrong_words,
            poisoned_pages: 0,
            host: host_report(&host),
            guests: guests.into_iter().map(|guest| guest_report(guest, ticks)).collect(),
            modes: Vec::new(),
            without: None,
            no_comparison: Some("there is no kernel on this host".to_owned()),
            failures,
        };
        if ByteCount(report.peak_bytes) > plan.budget {
            report.failures.push(format!("the hard line was crossed: peak {}", ByteCount(report.peak_bytes)));
        }
        report
    }
}

fn host_report(host: &HostLine) -> HostReport {
    HostReport {
        resident_bytes: host.resident_bytes,
        limbo_bytes: host.limbo_bytes,
        store_bytes: host.store_bytes,
        tables_bytes: host.tables_bytes,
        overhead_bytes: host.overhead_bytes,
        saved_zero_bytes: host.saved_zero_bytes,
        saved_duplicate_bytes: host.saved_duplicate_bytes,
        saved_compression_bytes: host.saved_compression_bytes,
        stored_pages: host.stored_pages,
        store_metadata_bytes: host.store_metadata_bytes,
        bookkeeping_bytes: host.tables_bytes,
        store_fragmentation_permille: host.store_fragmentation_permille,
        near_duplicate_pages: host.near_duplicate_pages,
        ..HostReport::default()
    }
}

fn mode_report(kernel: &GuestLine) -> ModeReport {
    ModeReport {
        paging: kernel.name.clone(),
        exits: kernel.exits,
        instructions: kernel.instructions(),
        exits_per_million: kernel.exits_per_million(),
    }
}

fn guest_report(guest: GuestLine, ticks: Ticks) -> GuestReport {
    let us = |ns: u64| ns as f64 / 1000.0;
    GuestReport {
        size_bytes: guest.size_bytes,
        resident_bytes: guest.resident_bytes,
        limbo_bytes: guest.limbo_bytes,
        stored_bytes: guest.stored_bytes,
        true_working_set_bytes: guest.true_working_set_bytes,
        estimated_working_set_bytes: guest.estimated_working_set_bytes,
        operations: guest.operations,
        operations_per_second: rate(guest.operations, guest.running_ns),
        operation_p50_us: us(guest.operation_p50_ns),
        operation_p99_us: us(guest.operation_p99_ns),
        faults: guest.faults,
        fault_p50_us: us(guest.fault_p50_ns),
        fault_p99_us: us(guest.fault_p99_ns),
        stall_share: guest.stalled_ns as f64 / guest.elapsed_ns.max(1) as f64,
        captured_pages: guest.captured_pages,
        refused_pages: 0,
        exits_per_million: (ticks == Ticks::Instructions).then(|| guest.exits_per_million()),
        anomalies: guest.anomalies,
        wrong_words: guest.wrong_words,
        died: guest.died,
        name: guest.name,
    }
}
