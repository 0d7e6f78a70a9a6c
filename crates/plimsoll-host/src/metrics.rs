//! Metrics for Prometheus, by its conventions: base units, one name a thing, counters that only grow.
//!
//! Enters: the last decision, what was counted since the manager began. Leaves: a page of text, in the form of Prometheus or of
//! OpenMetrics 1.0, which differ in how counters are declared and in the end. What must never happen: a name of a machine that
//! breaks out of its quotes.
use crate::api::exchange::Moment;
use crate::api::{Archive, Pages};
use crate::backend::Kind;
use crate::stores::Storing;
use plimsoll_policy::host_state::{HostState, min_free};
use plimsoll_types::MachineId;
use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::time::Duration;

/// How it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text, version 0.0.4.
    Prometheus,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// What the client takes, by its `accept` headers.
    pub(crate) fn accepted<'a>(mut headers: impl Iterator<Item = &'a str>) -> Self {
        let takes = |value: &str| {
            value.split(',').any(|one| {
                one.split(';').next().is_some_and(|kind| kind.trim() == "application/openmetrics-text")
            })
        };
        if headers.any(takes) { Self::OpenMetrics } else { Self::Prometheus }
    }

    /// How it calls itself.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// What clients of the API did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clients {
    /// Requests by status.
    pub(crate) answered: BTreeMap<u16, u64>,
    /// Clients whose request was not read.
    pub(crate) turned_away: u64,
}

/// What kind a metric is of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    Gauge,
    Counter,
}

/// A page that is being written.
struct Page {
    format: Format,
    text: String,
}

impl Page {
    /// A metric and its samples, each with its labels. A counter's name is given without its `_total`.
    fn metric(
        &mut self,
        kind: Type,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (String, impl Display)>,
    ) {
        let (word, end) = match kind {
            Type::Gauge => ("gauge", ""),
            Type::Counter => ("counter", "_total"),
        };
        // OpenMetrics declares the family, Prometheus the sample.
        let declared = if self.format == Format::OpenMetrics { "" } else { end };
        let _ = write!(self.text, "# HELP {name}{declared} {help}\n# TYPE {name}{declared} {word}\n");
        for unit in ["bytes", "ratio", "pages", "seconds"] {
            if self.format == Format::OpenMetrics
                && name.strip_suffix(unit).is_some_and(|rest| rest.ends_with('_'))
            {
                let _ = writeln!(self.text, "# UNIT {name} {unit}");
            }
        }
        for (labels, value) in samples {
            let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
            let _ = writeln!(self.text, "{name}{end}{labels} {value}");
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.metric(Type::Gauge, name, help, [(String::new(), value)]);
    }
}

/// A label, its value escaped.
fn label(name: &str, value: impl Display) -> String {
    let value = value.to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("{name}=\"{value}\"")
}

/// Everything.
pub(crate) fn page(format: Format, moment: &Moment, archive: &Archive, clients: &Clients) -> String {
    let mut page = Page { format, text: String::new() };
    let version = label("version", env!("CARGO_PKG_VERSION"));
    page.metric(Type::Gauge, "plimsoll_build_info", "The version that runs.", [(version, 1)]);
    host(&mut page, moment);
    machines(&mut page, moment, archive);
    let decisions = [(String::new(), archive.decisions)];
    page.metric(Type::Counter, "plimsoll_decisions", "Decisions since this manager began.", decisions);
    let actions = [(String::new(), archive.actions)];
    page.metric(Type::Counter, "plimsoll_actions", "Steps that decisions asked for.", actions);
    let answered = clients.answered.iter().map(|(status, count)| (label("code", status), count));
    page.metric(Type::Counter, "plimsoll_api_requests", "Requests that were answered, by status.", answered);
    let turned_away = [(String::new(), clients.turned_away)];
    page.metric(Type::Counter, "plimsoll_api_turned_away", "Clients that were not heard.", turned_away);
    if format == Format::OpenMetrics {
        page.text.push_str("# EOF\n");
    }
    page.text
}

fn host(page: &mut Page, moment: &Moment) {
    let (view, plan) = (&moment.tick.view, &moment.tick.plan);
    page.gauge(
        "plimsoll_host_budget_bytes",
        "What machines, their VMMs and the daemon may use.",
        view.total.0,
    );
    page.gauge("plimsoll_host_free_bytes", "What is free of the budget.", view.free.0);
    page.gauge("plimsoll_host_kept_free_bytes", "What is to be free of the budget.", min_free(view.total).0);
    page.gauge("plimsoll_host_reserved_bytes", "What is reserved.", moment.tree.reserved().0);
    let stores = &moment.stores;
    page.gauge("plimsoll_store_held_bytes", "What the page stores take.", stores.held_bytes);
    page.gauge(
        "plimsoll_store_free_slot_bytes",
        "What compaction can win back of it.",
        stores.free_slot_bytes,
    );
    page.gauge(
        "plimsoll_store_slot_waste_bytes",
        "What lies behind pages' bytes in slots.",
        stores.slot_waste_bytes,
    );
    page.gauge(
        "plimsoll_store_fragmentation_ratio",
        "The part of the page stores' data slabs that holds no byte of a page.",
        f64::from(stores.fragmentation_ppm) / 1e6,
    );
    let Storing { ahead_cpu_us, demand_cpu_us, ahead_share_ppm } = stores.storing;
    let took = [("ahead", ahead_cpu_us), ("demand", demand_cpu_us)];
    let took = took.map(|(cause, us)| (label("cause", cause), Duration::from_micros(us).as_secs_f64()));
    page.metric(
        Type::Counter,
        "plimsoll_storing_cpu_seconds",
        "CPU time that storing pages took, ahead of demand and on demand.",
        took,
    );
    let share = ahead_share_ppm.map(|ppm| (String::new(), f64::from(ppm) / 1e6));
    page.metric(
        Type::Gauge,
        "plimsoll_storing_share_ratio",
        "The part of one processor that storing pages ahead of demand may take.",
        share,
    );
    let states = [HostState::High, HostState::Clear, HostState::Soft, HostState::Hard, HostState::Low];
    let states = states.map(|state| (label("state", state), u8::from(plan.state == state)));
    page.metric(
        Type::Gauge,
        "plimsoll_host_state",
        "How short of memory the host is: 1 for its state.",
        states,
    );
    page.gauge(
        "plimsoll_waiting_machines",
        "Machines that are to be managed and are not there.",
        moment.waiting.len(),
    );
    let kinds = [("attached", Kind::Attached), ("handed_over", Kind::HandedOver)];
    let kinds = kinds.map(|(name, kind)| {
        (label("kind", name), moment.berths.values().filter(|berth| berth.kind == kind).count())
    });
    page.metric(Type::Gauge, "plimsoll_machines", "Machines that are managed.", kinds);
}

fn machines(page: &mut Page, moment: &Moment, archive: &Archive) {
    // Two machines of one name are told apart by their number.
    let labels: BTreeMap<MachineId, String> = moment
        .berths
        .iter()
        .map(|(id, berth)| (*id, format!("{},{}", label("machine", &berth.name), label("id", id.0))))
        .collect();
    let of = |id: MachineId| labels.get(&id).cloned().unwrap_or_default();
    let positions = || moment.tick.plan.machines.iter();
    let views = || moment.tick.view.machines.iter();
    let mut gauge =
        |name: &str, help: &str, samples: Vec<(String, u64)>| page.metric(Type::Gauge, name, help, samples);
    gauge(
        "plimsoll_machine_size_bytes",
        "The RAM the guest owns.",
        moment.tree.machines().map(|(id, terms)| (of(id), terms.size.bytes().0)).collect(),
    );
    gauge(
        "plimsoll_machine_reserved_bytes",
        "What it keeps whatever the others want.",
        moment.tree.machines().map(|(id, terms)| (of(id), terms.floor.bytes().0)).collect(),
    );
    gauge(
        "plimsoll_machine_consumed_bytes",
        "Host memory that its guest's pages take up, compressed ones included.",
        positions().map(|one| (of(one.machine), one.consumed.0)).collect(),
    );
    gauge(
        "plimsoll_machine_active_bytes",
        "What it uses, as sampled.",
        positions().map(|one| (of(one.machine), one.active.0)).collect(),
    );
    gauge(
        "plimsoll_machine_entitlement_bytes",
        "What it has a right to if all want all they may have.",
        positions().map(|one| (of(one.machine), one.entitlement.0)).collect(),
    );
    gauge(
        "plimsoll_machine_target_bytes",
        "What it is to come to now.",
        positions().map(|one| (of(one.machine), one.target.0)).collect(),
    );
    gauge(
        "plimsoll_machine_stored_bytes",
        "What its compressed pages take up.",
        views().map(|view| (of(view.id), view.stored.0)).collect(),
    );
    let seen = moment.berths.iter().filter_map(|(id, berth)| Some((*id, berth.whereabouts.as_ref()?)));
    let given = seen.flat_map(|(id, seen)| {
        let ways = Pages::of(&seen.pages, seen.faults).given();
        ways.map(|(way, bytes)| (format!("{},{}", of(id), label("way", way)), bytes))
    });
    gauge(
        "plimsoll_machine_given_bytes",
        "What the guest gave back and has not used since, by how.",
        given.collect(),
    );
    gauge(
        "plimsoll_machine_paused",
        "1 where nothing is taken because an operator said so.",
        moment.berths.iter().map(|(id, berth)| (of(*id), u64::from(berth.is_paused))).collect(),
    );
    gauge(
        "plimsoll_machine_left_out",
        "1 where it cannot be looked at.",
        moment.berths.iter().map(|(id, berth)| (of(*id), u64::from(berth.trouble.is_some()))).collect(),
    );
    let stalled = views().map(|view| (of(view.id), format!("{}", f64::from(view.stalled.0) / 1e6)));
    let stalled: Vec<_> = stalled.collect();
    page.metric(
        Type::Gauge,
        "plimsoll_machine_stalled_ratio",
        "The part of the last second that its processors waited for memory.",
        stalled,
    );
    let counts = |of_one: fn(&crate::api::Counts) -> u64| {
        moment.berths.keys().map(|id| (of(*id), of_one(&archive.counts(*id)))).collect::<Vec<_>>()
    };
    let (taken, returned) = (counts(|counts| counts.taken_pages), counts(|counts| counts.returned_pages));
    page.metric(Type::Counter, "plimsoll_machine_taken_pages", "Pages compressed or moved to disk.", taken);
    page.metric(
        Type::Counter,
        "plimsoll_machine_returned_pages",
        "Pages that came back because they were touched.",
        returned,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_does_not_break_out_of_its_quotes() {
        assert_eq!(label("machine", "a\"} 1\nb\\"), r#"machine="a\"} 1\nb\\""#);
    }

    #[test]
    fn the_form_is_what_the_client_takes() {
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5";
        assert_eq!(Format::accepted([prometheus].into_iter()), Format::OpenMetrics);
        assert_eq!(Format::accepted(["*/*"].into_iter()), Format::Prometheus);
        assert_eq!(Format::accepted([].into_iter()), Format::Prometheus);
    }
}
