//! The report as one page that a person reads without a manual.
//!
//! Enters: a report. Leaves: one HTML file with its pictures in it as SVG: no script, nothing that is fetched, light or dark as
//! the reader's system is. It is well-formed XML too, so that any tool can take it apart. Text of the scenario is escaped
//! wherever it goes.
use crate::report::{HostReport, MomentReport, Report};
use crate::svg::{Layer, Plot, Unit};
use crate::time::{Clock, Millis};
use plimsoll_policy::Ppm;
use plimsoll_types::ByteCount;
use std::fmt::{self, Display, Write};

/// Colours by name. States go from blue through orange to dark, which is seen without telling red from green.
const STYLE: &str = include_str!("html/style.css");

/// Text that is shown as it is.
pub(crate) struct Escaped<T>(pub(crate) T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.to_string().chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                // What XML has no place for.
                control if control.is_control() && !matches!(control, '\t' | '\n') => {
                    f.write_char('\u{fffd}')?
                }
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

/// Writes a report as a page.
pub fn html(report: &Report) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write(report, &mut page);
    page
}

fn write(report: &Report, page: &mut String) -> fmt::Result {
    let title = Escaped(&report.title);
    write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{title}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<p class=\"{}\">{}</p>\n",
        if report.holds { "verdict holds" } else { "verdict fails" },
        Escaped(&report.verdict)
    )?;
    figures(report, page)?;
    troubles(report, page)?;
    plots(report, page)?;
    classes(report, page)?;
    hosts(report, page)?;
    how(report, page)?;
    page.write_str("</body>\n</html>\n")
}

/// The figures that matter, each with what it means.
fn figures(report: &Report, page: &mut String) -> fmt::Result {
    let density = &report.density;
    let a_host = density.machines.checked_div(density.hosts_used).unwrap_or(0);
    let figures = [
        (a_host.to_string(), "machines on a host".to_owned()),
        (Ppm(density.overcommit_ppm).to_string(), "of the hosts' memory is what machines own".to_owned()),
        (Ppm(report.stall.mean_ppm).to_string(), "of their time machines waited for memory".to_owned()),
        (Ppm(report.stall.worst_machine_ppm).to_string(), "waited the machine that waited most".to_owned()),
        (report.violations.machines.to_string(), "guarantees were broken".to_owned()),
        (report.oscillations.to_string(), "times a target moved back and forth".to_owned()),
    ];
    page.write_str("<ul class=\"figures\">\n")?;
    for (figure, what) in figures {
        writeln!(page, "<li><b>{figure}</b> {what}</li>")?;
    }
    page.write_str("</ul>\n")
}

/// What broke, in the order in which it did.
fn troubles(report: &Report, page: &mut String) -> fmt::Result {
    page.write_str("<h2>What broke first</h2>\n")?;
    for unplaced in &report.unplaced {
        let (class, because) = (Escaped(&unplaced.class), Escaped(&unplaced.because));
        writeln!(
            page,
            "<p>Before anything ran, {} of <b>{class}</b> found no host: {because}.</p>",
            unplaced.machines
        )?;
    }
    if report.troubles.is_empty() {
        return page.write_str("<p>Nothing.</p>\n");
    }
    page.write_str("<p>Of each kind of trouble the first one, by time.</p>\n<ol>\n")?;
    for trouble in &report.troubles {
        let at = Clock(Millis(trouble.at_seconds * 1000));
        let whose = trouble.machine.as_deref().map(|machine| format!(", {machine}")).unwrap_or_default();
        writeln!(
            page,
            "<li><b>{at}</b> {} on host {}{}: {}.</li>",
            trouble.kind,
            trouble.host,
            Escaped(whose),
            Escaped(&trouble.what)
        )?;
    }
    page.write_str("</ol>\n")
}

fn plots(report: &Report, page: &mut String) -> fmt::Result {
    let times: Vec<u64> = report.timeline.iter().map(|moment| moment.at_seconds).collect();
    let series = |value: fn(&MomentReport) -> u64| report.timeline.iter().map(value).collect::<Vec<u64>>();
    let plot = |title, unit, most, layers, is_stacked| Plot {
        title,
        unit,
        most,
        times: &times,
        seconds: report.seconds,
        layers,
        is_stacked,
    };
    page.write_str("<h2>Memory of a host</h2>\n<p>The mean over all hosts that have machines. What machines keep contents in \
                    may be more than there is: what is not in use takes up less, or nothing.</p>\n")?;
    let memory = vec![
        Layer { name: "kept contents in", class: "contents", values: series(|moment| moment.contents_bytes) },
        Layer { name: "took up", class: "consumed", values: series(|moment| moment.consumed_bytes) },
        Layer { name: "used", class: "active", values: series(|moment| moment.active_bytes) },
    ];
    let most = memory.iter().flat_map(|layer| &layer.values).copied().max().unwrap_or(0);
    let most = most.max(report.density.host_bytes);
    let mut memory = plot("memory of machines", Unit::Bytes, most, memory, false);
    let line = vec![report.density.host_bytes; times.len()];
    memory.layers.push(Layer { name: "there is", class: "total", values: line });
    memory.draw(page)?;
    page.write_str("<h2>How short of memory hosts were</h2>\n<p>From <i>clear</i> on less is free than the host should keep; \
                    in <i>soft</i> pages are compressed, in <i>hard</i> they go to disk, in <i>low</i> machines above their \
                    share wait.</p>\n")?;
    let layer = |(index, name): (usize, &&'static str)| Layer {
        name,
        class: name,
        values: report.timeline.iter().map(|moment| moment.states_ppm[index].into()).collect(),
    };
    let states = STATE_NAMES.iter().enumerate().map(layer).collect();
    plot("hosts in each state", Unit::Part, Ppm::WHOLE.0.into(), states, true).draw(page)?;
    page.write_str("<h2>Waiting for memory</h2>\n<p>Of the time of all processors of machines.</p>\n")?;
    let waiting =
        Layer { name: "waited", class: "waiting", values: series(|moment| moment.stall_ppm.into()) };
    let most = waiting.values.iter().copied().max().unwrap_or(0).max(1000);
    plot("time machines waited", Unit::Part, most, vec![waiting], false).draw(page)
}

/// As they are called in pictures and in the style.
const STATE_NAMES: [&str; 5] = ["high", "clear", "soft", "hard", "low"];

fn table(page: &mut String, heads: &[&str], rows: impl Iterator<Item = Vec<String>>) -> fmt::Result {
    page.write_str("<div class=\"wide\"><table>\n<tr>")?;
    heads.iter().try_for_each(|head| write!(page, "<th>{head}</th>"))?;
    page.write_str("</tr>\n")?;
    for row in rows {
        page.write_str("<tr>")?;
        row.iter().try_for_each(|cell| write!(page, "<td>{}</td>", Escaped(cell)))?;
        page.write_str("</tr>\n")?;
    }
    page.write_str("</table></div>\n")
}

fn classes(report: &Report, page: &mut String) -> fmt::Result {
    page.write_str("<h2>Machines by class</h2>\n")?;
    let bytes = |bytes| ByteCount(bytes).to_string();
    let part = |ppm| Ppm(ppm).to_string();
    let heads = [
        "class",
        "machines",
        "size",
        "keeps contents in",
        "uses",
        "takes up",
        "waits",
        "the worst waits",
        "minutes over its objective",
        "guarantees broken",
    ];
    let row = |class: &crate::report::ClassReport| {
        vec![
            class.class.clone(),
            class.machines.to_string(),
            bytes(class.size_bytes),
            bytes(class.contents_bytes),
            bytes(class.active_bytes),
            bytes(class.consumed_bytes),
            part(class.stall_ppm),
            part(class.worst_stall_ppm),
            part(class.minutes_over_objective_ppm),
            class.violations.to_string(),
        ]
    };
    table(page, &heads, report.classes.iter().map(row))
}

fn hosts(report: &Report, page: &mut String) -> fmt::Result {
    page.write_str("<h2>The hosts whose machines waited most</h2>\n")?;
    let heads = [
        "host",
        "machines",
        "they own of its memory",
        "waited",
        "lowest free",
        "short (soft or worse)",
        "first trouble",
    ];
    let row = |host: &HostReport| {
        let short = host.states_ppm.iter().skip(2).sum();
        vec![
            host.host.to_string(),
            host.machines.to_string(),
            Ppm(host.overcommit_ppm).to_string(),
            Ppm(host.stall_ppm).to_string(),
            ByteCount(host.lowest_free_bytes).to_string(),
            Ppm(short).to_string(),
            host.reason.clone(),
        ]
    };
    table(page, &heads, report.worst_hosts.iter().map(row))
}

fn how(report: &Report, page: &mut String) -> fmt::Result {
    let steps = &report.steps;
    writeln!(
        page,
        "<p class=\"how\">Simulated by plimsoll with the policy that runs on hosts: {} decisions in {} of simulated time, every \
         second while memory moved, at most {} apart while nothing did. Seed {} repeats it.</p>",
        steps.decisions,
        Millis(report.seconds * 1000),
        Millis(steps.longest_milliseconds),
        report.seed
    )
}
