//! What came of it.
//!
//! Enters: the records of all hosts. Leaves: a report: plain values, of which text, JSON and HTML are views. Parts are
//! in millionths (`_ppm`), sizes in bytes, times in seconds; means are over time and machines.
use crate::machine::Class;
use crate::placement::Unplaced;
use crate::record::{ClassSums, First, HostRecord, Moment, STATES, Timeline, Trouble, mean, ppm};
use crate::scenario::{Order, Scenario};
use crate::time::{Clock, Millis};
use plimsoll_policy::Ppm;
use plimsoll_types::{ByteCount, PageCount};
use serde::Serialize;

/// The form of the JSON; a field that changes its meaning raises it.
const VERSION: u32 = 1;
/// Hosts that are listed.
const WORST: usize = 10;

/// What came of a scenario.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The form of this.
    pub version: u32,
    /// The scenario's title.
    pub title: String,
    /// The seed that repeats it.
    pub seed: u64,
    /// Simulated time.
    pub seconds: u64,
    /// One sentence.
    pub verdict: String,
    /// No guarantee was broken, every machine was placed and let in again.
    pub holds: bool,
    /// How time was cut.
    pub steps: Steps,
    /// How much is on the hosts.
    pub density: Density,
    /// How long machines waited for memory.
    pub stall: Stall,
    /// Guarantees that were broken.
    pub violations: Violations,
    /// Targets that moved back and forth by more than 5 % within a minute.
    pub oscillations: u64,
    /// Machines that were started again, and how often one was not let in.
    pub restarts: Restarts,
    /// How long hosts were in which state.
    pub states: Vec<StateShare>,
    /// What went wrong first, and the first of each other kind, by time.
    pub troubles: Vec<TroubleReport>,
    /// Machines that found no host.
    pub unplaced: Vec<UnplacedReport>,
    /// By class.
    pub classes: Vec<ClassReport>,
    /// The hosts whose machines waited most.
    pub worst_hosts: Vec<HostReport>,
    /// Over time.
    pub timeline: Vec<MomentReport>,
}

/// How time was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "fields say what they are")]
pub struct Steps {
    pub decisions: u64,
    pub mean_milliseconds: u64,
    pub longest_milliseconds: u64,
}

/// How much is on the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Density {
    /// Hosts there are, and those with a machine.
    pub hosts: u64,
    /// Hosts with a machine.
    pub hosts_used: u64,
    /// Memory of a host.
    pub host_bytes: u64,
    /// Machines that were placed.
    pub machines: u64,
    /// On the fullest host.
    pub most_machines: u64,
    /// The sizes of machines in parts of the memory of the hosts in use.
    pub overcommit_ppm: u32,
    /// What guests kept contents in, mean.
    pub contents_bytes: u64,
    /// What machines consumed, mean.
    pub consumed_bytes: u64,
    /// What they used, mean.
    pub active_bytes: u64,
}

/// How long machines waited for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stall {
    /// Of the time of all processors of machines.
    pub mean_ppm: u32,
    /// The machine that waited most.
    pub worst_machine_ppm: u32,
    /// Machine-minutes in which a machine waited longer than its objective.
    pub minutes_over_objective_ppm: u32,
}

/// Guarantees that were broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Violations {
    /// Machines that were denied what they were guaranteed.
    pub machines: u64,
    /// For how long, all together.
    pub milliseconds: u64,
}

/// Machines that were started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Restarts {
    /// How many.
    pub machines: u64,
    /// How often one asked to be admitted and was refused.
    pub refusals: u64,
}

/// How long hosts were in a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "fields say what they are")]
pub struct StateShare {
    pub state: String,
    pub time_ppm: u32,
}

/// The first trouble of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TroubleReport {
    /// What kind.
    pub kind: &'static str,
    /// When, in seconds from the start.
    pub at_seconds: u64,
    /// The host, from 1.
    pub host: usize,
    /// The machine and its class; none where it is the host's.
    pub machine: Option<String>,
    /// In the policy's words.
    pub what: String,
}

/// Machines that found no host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "fields say what they are")]
pub struct UnplacedReport {
    pub class: String,
    pub machines: u32,
    pub because: String,
}

/// What the machines of a class were like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "fields say what they are")]
pub struct ClassReport {
    pub class: String,
    pub machines: u64,
    pub size_bytes: u64,
    pub contents_bytes: u64,
    pub active_bytes: u64,
    pub consumed_bytes: u64,
    pub stall_ppm: u32,
    pub worst_stall_ppm: u32,
    pub minutes_over_objective_ppm: u32,
    pub violations: u64,
    pub oscillations: u64,
}

/// What a host was like.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "fields say what they are")]
pub struct HostReport {
    pub host: usize,
    pub machines: u64,
    pub overcommit_ppm: u32,
    pub stall_ppm: u32,
    pub lowest_free_bytes: u64,
    /// In the order of [`Report::states`].
    pub states_ppm: Vec<u32>,
    pub violations: u64,
    pub refusals: u64,
    pub reason: String,
}

/// A stretch of time. Sizes are of a host, mean over hosts in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "fields say what they are")]
pub struct MomentReport {
    pub at_seconds: u64,
    /// Hosts in each state, in the order of [`Report::states`].
    pub states_ppm: Vec<u32>,
    pub contents_bytes: u64,
    pub active_bytes: u64,
    pub consumed_bytes: u64,
    pub free_bytes: u64,
    pub stall_ppm: u32,
}

impl Trouble {
    const ALL: [Self; crate::record::TROUBLES] =
        [Self::Guarantee, Self::Refused, Self::Objective, Self::Low, Self::Hard, Self::Oscillation];

    const fn kind(self) -> &'static str {
        match self {
            Self::Guarantee => "a guarantee was broken",
            Self::Refused => "a machine was not let in again",
            Self::Objective => "a machine waited longer than promised",
            Self::Low => "a host had next to nothing free",
            Self::Hard => "a host was short of memory",
            Self::Oscillation => "a target moved back and forth",
        }
    }
}

impl Report {
    pub(crate) fn of(scenario: &Scenario, records: &[HostRecord], unplaced: &[Unplaced]) -> Self {
        let mut classes = vec![ClassSums::default(); scenario.classes.len()];
        let mut timeline = Timeline::new(scenario.duration);
        for record in records {
            classes.iter_mut().zip(&record.classes).for_each(|(sum, more)| sum.add(more));
            timeline.add(&record.timeline);
        }
        let mut all = ClassSums::default();
        classes.iter().for_each(|class| all.add(class));
        let name = |class: usize| scenario.classes[class].name.clone();
        let unplaced = unplaced.iter().map(|Unplaced { class, count, because }| UnplacedReport {
            class: name(*class),
            machines: *count,
            because: because.clone(),
        });
        let mut report = Self {
            version: VERSION,
            title: scenario.title.clone(),
            seed: scenario.seed,
            seconds: scenario.duration.0 / 1000,
            verdict: String::new(),
            holds: false,
            steps: steps(records, scenario.duration),
            density: density(scenario, records, &all),
            stall: Stall {
                mean_ppm: ppm(all.waited_ns, all.ran_ns).0,
                worst_machine_ppm: all.worst.0,
                minutes_over_objective_ppm: Ppm::of(all.minutes_over, all.minutes).0,
            },
            violations: Violations { machines: all.broken, milliseconds: all.broken_ms },
            oscillations: all.oscillations,
            restarts: Restarts {
                machines: records.iter().map(|record| record.restarts).sum(),
                refusals: records.iter().map(|record| record.refusals).sum(),
            },
            states: states(records),
            troubles: troubles(scenario, records),
            unplaced: unplaced.collect(),
            classes: classes
                .iter()
                .zip(&scenario.classes)
                .map(|(sums, class)| class_report(sums, class))
                .collect(),
            worst_hosts: worst(scenario, records),
            timeline: moments(&timeline, records),
        };
        report.holds =
            report.violations.machines == 0 && report.unplaced.is_empty() && report.is_everyone_back();
        report.verdict = report.sentence(scenario.placement.order);
        report
    }

    /// What breaks first, if anything does.
    pub fn broke_first(&self) -> Option<&TroubleReport> {
        self.troubles.first()
    }

    const fn is_everyone_back(&self) -> bool {
        self.restarts.refusals == 0
    }

    fn sentence(&self, order: Order) -> String {
        let Density { machines, hosts_used, overcommit_ppm, .. } = self.density;
        let loaded = format!(
            "{machines} {} that own {} of the memory of {hosts_used} {}, placed {}",
            plural(machines, "machine"),
            Ppm(overcommit_ppm),
            plural(hosts_used, "host"),
            match order {
                Order::FirstFit => "first-fit",
                Order::BestFit => "best-fit",
                Order::Spread => "evenly",
            }
        );
        let waited = format!(
            "machines waited for memory {} of their time, the worst of them {}",
            Ppm(self.stall.mean_ppm),
            Ppm(self.stall.worst_machine_ppm)
        );
        if self.violations.machines > 0 {
            let Violations { machines, milliseconds } = self.violations;
            let broken =
                format!("{machines} {}, for {} s in all", plural(machines, "machine"), milliseconds / 1000);
            return format!("It does not hold: guarantees of {broken}, were broken. {loaded}; {waited}.");
        }
        let unplaced: u64 = self.unplaced.iter().map(|unplaced| u64::from(unplaced.machines)).sum();
        if unplaced > 0 {
            return format!(
                "It does not fit: {unplaced} {} found no host. {loaded}; {waited}.",
                plural(unplaced, "machine")
            );
        }
        if !self.is_everyone_back() {
            let refusals = self.restarts.refusals;
            return format!(
                "It does not hold: machines that restarted were refused {refusals} times. {loaded}; {waited}."
            );
        }
        format!("It holds: no guarantee was broken. {loaded}; {waited}.")
    }
}

pub(crate) fn plural(count: u64, word: &str) -> String {
    if count == 1 { word.to_owned() } else { format!("{word}s") }
}

/// The mean of page-milliseconds over so many milliseconds, in bytes.
fn mean_bytes(area: u128, time_ms: u128) -> u64 {
    PageCount(mean(area, time_ms)).bytes().0
}

fn steps(records: &[HostRecord], duration: Millis) -> Steps {
    let decisions: u64 = records.iter().map(|record| record.decisions).sum();
    Steps {
        decisions,
        mean_milliseconds: (duration.0 * records.len() as u64).checked_div(decisions).unwrap_or(0),
        longest_milliseconds: records.iter().map(|record| record.longest.0).max().unwrap_or(0),
    }
}

fn density(scenario: &Scenario, records: &[HostRecord], all: &ClassSums) -> Density {
    let used: Vec<&HostRecord> = records.iter().filter(|record| record.machines > 0).collect();
    let host_bytes = scenario.hosts.capacity.total.0;
    let sizes: ByteCount = records.iter().map(|record| record.sizes).sum();
    let all_time = u128::from(scenario.duration.0);
    Density {
        hosts: records.len() as u64,
        hosts_used: used.len() as u64,
        host_bytes,
        machines: records.iter().map(|record| record.machines).sum(),
        most_machines: records.iter().map(|record| record.machines).max().unwrap_or(0),
        overcommit_ppm: ppm(u128::from(sizes.0), u128::from(host_bytes) * used.len() as u128).0,
        contents_bytes: mean_bytes(all.contents, all_time),
        consumed_bytes: mean_bytes(all.consumed, all_time),
        active_bytes: mean_bytes(all.active, all_time),
    }
}

fn states(records: &[HostRecord]) -> Vec<StateShare> {
    let mut sums = [0u64; STATES.len()];
    for record in records {
        sums.iter_mut().zip(record.state_ms).for_each(|(sum, ms)| *sum += ms);
    }
    let whole = sums.iter().sum();
    let share = |(state, ms): (&plimsoll_policy::host_state::HostState, u64)| StateShare {
        state: state.to_string(),
        time_ppm: Ppm::of(ms, whole).0,
    };
    STATES.iter().zip(sums).map(share).collect()
}

fn troubles(scenario: &Scenario, records: &[HostRecord]) -> Vec<TroubleReport> {
    let first_of = |trouble: Trouble| {
        let firsts = records.iter().filter_map(|record| record.firsts[trouble as usize].as_ref());
        firsts.min_by_key(|first| (first.at, first.host)).map(|first| (trouble, first))
    };
    let mut firsts: Vec<(Trouble, &First)> = Trouble::ALL.into_iter().filter_map(first_of).collect();
    firsts.sort_by_key(|(trouble, first)| (first.at, *trouble));
    let report = |(trouble, first): (Trouble, &First)| TroubleReport {
        kind: trouble.kind(),
        at_seconds: first.at.0 / 1000,
        host: first.host + 1,
        machine: first.machine.map(|(id, class)| format!("{id} ({})", scenario.classes[class].name)),
        what: first.what.clone(),
    };
    firsts.into_iter().map(report).collect()
}

fn class_report(sums: &ClassSums, class: &Class) -> ClassReport {
    let ClassSums { machines, minutes, minutes_over, broken, oscillations, time_ms, .. } = *sums;
    ClassReport {
        class: class.name.clone(),
        machines,
        size_bytes: class.size().0,
        contents_bytes: mean_bytes(sums.contents, time_ms),
        active_bytes: mean_bytes(sums.active, time_ms),
        consumed_bytes: mean_bytes(sums.consumed, time_ms),
        stall_ppm: ppm(sums.waited_ns, sums.ran_ns).0,
        worst_stall_ppm: sums.worst.0,
        minutes_over_objective_ppm: Ppm::of(minutes_over, minutes).0,
        violations: broken,
        oscillations,
    }
}

fn worst(scenario: &Scenario, records: &[HostRecord]) -> Vec<HostReport> {
    let broken = |record: &HostRecord| record.classes.iter().map(|class| class.broken).sum::<u64>();
    let mut order: Vec<&HostRecord> = records.iter().filter(|record| record.machines > 0).collect();
    order.sort_by_key(|record| {
        std::cmp::Reverse((broken(record), record.refusals, record.waited(), std::cmp::Reverse(record.host)))
    });
    let report = |record: &&HostRecord| {
        let whole = record.state_ms.iter().sum();
        let first = record.firsts.iter().flatten().min_by_key(|first| first.at);
        let reason = first.map_or_else(
            || "nothing went wrong".to_owned(),
            |First { at, machine, what, .. }| {
                let whose = machine.map_or_else(
                    || "the host".to_owned(),
                    |(id, class)| format!("{id} ({})", scenario.classes[class].name),
                );
                format!("{}, {whose}: {what}", Clock(*at))
            },
        );
        HostReport {
            host: record.host + 1,
            machines: record.machines,
            overcommit_ppm: Ppm::of(record.sizes.0, scenario.hosts.capacity.total.0).0,
            stall_ppm: record.waited().0,
            lowest_free_bytes: record.lowest_free.0,
            states_ppm: record.state_ms.iter().map(|ms| Ppm::of(*ms, whole).0).collect(),
            violations: broken(record),
            refusals: record.refusals,
            reason,
        }
    };
    order.iter().take(WORST).map(report).collect()
}

fn moments(timeline: &Timeline, records: &[HostRecord]) -> Vec<MomentReport> {
    let used = records.iter().filter(|record| record.machines > 0).count() as u128;
    let report = |(index, moment): (usize, &Moment)| {
        let hosts_ms: u64 = moment.state_ms.iter().sum();
        let a_host = u128::from(hosts_ms) * used / (records.len() as u128).max(1);
        let free = u128::from(hosts_ms);
        MomentReport {
            at_seconds: index as u64 * timeline.each.0 / 1000,
            states_ppm: moment.state_ms.iter().map(|ms| Ppm::of(*ms, hosts_ms).0).collect(),
            contents_bytes: mean_bytes(moment.contents, a_host),
            active_bytes: mean_bytes(moment.active, a_host),
            consumed_bytes: mean_bytes(moment.consumed, a_host),
            free_bytes: mean_bytes(moment.free, free),
            stall_ppm: ppm(moment.waited_ns, moment.ran_ns).0,
        }
    };
    timeline.moments.iter().enumerate().map(report).collect()
}
