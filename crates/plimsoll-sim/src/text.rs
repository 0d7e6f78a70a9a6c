//! The report as text for a terminal.
use crate::report::{ClassReport, HostReport, Report, plural};
use crate::time::{Clock, Millis};
use plimsoll_policy::Ppm;
use plimsoll_types::ByteCount;
use std::fmt::Write;

/// Writes a report as lines of text.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(report, &mut out);
    out
}

fn write(report: &Report, out: &mut String) -> std::fmt::Result {
    writeln!(out, "{}\n\n{}\n", report.title, report.verdict)?;
    let density = &report.density;
    let bytes = |bytes: u64| ByteCount(bytes);
    let memory = ByteCount(density.host_bytes * density.hosts_used);
    writeln!(
        out,
        "density   {} {} on {} of {} {} of {}, at most {} on one; sizes {} of their memory",
        density.machines,
        plural(density.machines, "machine"),
        density.hosts_used,
        density.hosts,
        plural(density.hosts, "host"),
        bytes(density.host_bytes),
        density.most_machines,
        Ppm(density.overcommit_ppm)
    )?;
    writeln!(
        out,
        "memory    of {memory} machines used {} and kept contents in {}, which took up {} (means)",
        bytes(density.active_bytes),
        bytes(density.contents_bytes),
        bytes(density.consumed_bytes)
    )?;
    writeln!(
        out,
        "waiting   {} of the time of all, {} of the worst machine; {} of machine-minutes over the objective",
        Ppm(report.stall.mean_ppm),
        Ppm(report.stall.worst_machine_ppm),
        Ppm(report.stall.minutes_over_objective_ppm)
    )?;
    writeln!(
        out,
        "promises  {} guarantees broken, {} oscillations; {} restarts, {} times refused",
        report.violations.machines, report.oscillations, report.restarts.machines, report.restarts.refusals
    )?;
    let states: Vec<String> =
        report.states.iter().map(|state| format!("{} {}", state.state, Ppm(state.time_ppm))).collect();
    writeln!(out, "hosts     {}", states.join(", "))?;
    writeln!(
        out,
        "steps     {} decisions, one in {:.1} s of a host's time, the longest step {}; seed {}\n",
        report.steps.decisions,
        report.steps.mean_milliseconds as f64 / 1000.0,
        Millis(report.steps.longest_milliseconds),
        report.seed
    )?;
    classes(&report.classes, out)?;
    if report.troubles.is_empty() {
        writeln!(out, "\nnothing broke")?;
    }
    for (trouble, ordinal) in
        report.troubles.iter().zip(std::iter::once("first").chain(std::iter::repeat("then")))
    {
        let at = Clock(Millis(trouble.at_seconds * 1000));
        let whose = trouble.machine.as_deref().map(|machine| format!(", {machine}")).unwrap_or_default();
        write!(
            out,
            "\n{ordinal:5}  {at}  {}: host {}{whose}\n       {}\n",
            trouble.kind, trouble.host, trouble.what
        )?;
    }
    for unplaced in &report.unplaced {
        let count = u64::from(unplaced.machines);
        let class = &unplaced.class;
        writeln!(
            out,
            "\n{count} {} of {class} found no host: {}",
            plural(count, "machine"),
            unplaced.because
        )?;
    }
    hosts(&report.worst_hosts, out)
}

fn classes(classes: &[ClassReport], out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "{:16} {:>8} {:>7} {:>9} {:>7} {:>9} {:>10} {:>10} {:>10} {:>7}",
        "class", "machines", "size", "contents", "uses", "takes up", "waits", "worst", "min. over", "broken"
    )?;
    for class in classes {
        writeln!(
            out,
            "{:16} {:>8} {:>7} {:>9} {:>7} {:>9} {:>10} {:>10} {:>10} {:>7}",
            class.class,
            class.machines,
            ByteCount(class.size_bytes),
            ByteCount(class.contents_bytes),
            ByteCount(class.active_bytes),
            ByteCount(class.consumed_bytes),
            Ppm(class.stall_ppm).to_string(),
            Ppm(class.worst_stall_ppm).to_string(),
            Ppm(class.minutes_over_objective_ppm).to_string(),
            class.violations
        )?;
    }
    Ok(())
}

fn hosts(hosts: &[HostReport], out: &mut String) -> std::fmt::Result {
    if hosts.len() < 2 {
        return Ok(());
    }
    writeln!(out, "\nthe hosts whose machines waited most")?;
    for host in hosts.iter().take(5) {
        writeln!(
            out,
            "host {:<6} {:>4} machines, sizes {:>6}, waited {:>9}, lowest free {:>7}: {}",
            host.host,
            host.machines,
            Ppm(host.overcommit_ppm).to_string(),
            Ppm(host.stall_ppm).to_string(),
            ByteCount(host.lowest_free_bytes),
            host.reason
        )?;
    }
    Ok(())
}
