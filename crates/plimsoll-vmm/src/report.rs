//! What all vCPUs of a machine say about themselves, as one summary.
//!
//! Enters: [`abi::Report`]s as guests allege them. Leaves: a [`Summary`], which goes to whoever started the machine.
//! Everything in it but `ballooned_bytes` is still an allegation of the guest: sums saturate, lengths are clamped, and no number decides
//! anything in this process.
use plimsoll_guest::abi::{self, Phase};
use plimsoll_guest::probe::{Probed, probe_floor};
use serde::{Deserialize, Serialize};

/// Wrong words that a summary describes; all are counted.
const WRONG_KEPT: usize = 64;

/// One machine's own account of its work.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// What the vCPU that is least far is doing: `populating`, `running`, `checking` or `done`; `unknown` if the guest
    /// names no such phase, `starting` while a vCPU has not reported.
    pub phase: String,
    /// Gets and puts.
    pub operations: u64,
    /// Those of them that wrote.
    pub puts: u64,
    /// The longest time any vCPU has run its workload, population not counted.
    pub running_ns: u64,
    /// Pages with contents.
    pub footprint_pages: u64,
    /// Pages of them written for the first time so far.
    pub populated_pages: u64,
    /// Pages read in the final check so far.
    pub checked_pages: u64,
    /// Pages given back, each time counted.
    pub discarded_pages: u64,
    /// Memory that the balloon has now and that is not among the pages given back: what was listed and not wanted back, and frames
    /// held for good. Counted by this process.
    #[serde(default)]
    pub ballooned_bytes: u64,
    /// Whole pages compared with what they should contain.
    pub verified_pages: u64,
    /// Words found wrong.
    pub wrong_words: u64,
    /// Pages in which they lay, each time counted.
    pub wrong_pages: u64,
    /// The first of them.
    pub wrong: Vec<WrongWord>,
    /// The true working set, if every vCPU has completed a window.
    pub window: Option<Window>,
    /// How long operations took.
    pub latency: Latency,
}

/// A word that was not what it should have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrongWord {
    /// The vCPU that read it.
    pub vcpu: u32,
    /// Its address.
    pub gpa: u64,
    /// What it should have held.
    pub expected: u64,
    /// What it held.
    pub found: u64,
}

/// Distinct pages touched in one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// The window's number.
    pub number: u64,
    /// Data pages touched in it, by all vCPUs.
    pub pages: u64,
}

/// How long operations took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// The slowest.
    pub max_ns: u64,
    /// Buckets that are not empty, ascending: the fewest nanoseconds that fall into it, and how many operations did.
    pub buckets: Vec<(u64, u64)>,
}

/// What became of one command to a probing guest, as the guest says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// The vCPU that did it.
    pub vcpu: u32,
    /// The command's number: commands of a machine are counted from 1.
    pub number: u64,
    /// Pages done, each time counted.
    pub pages: u64,
    /// From before the first page to after the last, pauses included.
    pub ns: u64,
    /// The sum of what single pages took.
    pub touch_ns: u64,
    /// The slowest page.
    pub touch_max_ns: u64,
    /// Words found wrong.
    pub wrong_words: u64,
    /// Pages in which they lay.
    pub wrong_pages: u64,
    /// How long single pages took: buckets that are not empty, ascending.
    pub latency: Vec<ProbeBucket>,
}

/// Pages that took at least `from_ns` and less than `below_ns`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeBucket {
    /// The fewest nanoseconds of the bucket.
    pub from_ns: u64,
    /// Those of the next.
    pub below_ns: u64,
    /// How many.
    pub pages: u64,
}

impl ProbeReport {
    /// What a guest whose clock has `tsc_hz` ticks to a second alleges.
    pub(crate) fn new(vcpu: u32, answer: &Probed, tsc_hz: u64) -> Self {
        let ns = |ticks| nanoseconds(ticks, tsc_hz);
        let bucket = |(bucket, pages): (usize, &u32)| ProbeBucket {
            from_ns: if bucket == 0 { 0 } else { ns(probe_floor(bucket)) },
            below_ns: ns(probe_floor(bucket + 1)),
            pages: u64::from(*pages),
        };
        let latency = answer.latency.iter().enumerate().filter(|(_, pages)| **pages > 0).map(bucket);
        Self {
            vcpu,
            number: answer.number,
            pages: answer.pages,
            ns: ns(answer.ticks),
            touch_ns: ns(answer.touch_ticks),
            touch_max_ns: ns(answer.touch_max_ticks),
            wrong_words: answer.wrong_words,
            wrong_pages: answer.wrong_pages,
            latency: latency.collect(),
        }
    }
}

/// The last report of one vCPU, and its last two complete windows: a vCPU may be a window ahead of the others.
#[derive(Clone, Debug)]
pub(crate) struct VcpuReports {
    last: abi::Report,
    windows: [Window; 2],
}

impl Default for VcpuReports {
    fn default() -> Self {
        Self { last: abi::Report::EMPTY, windows: [Window { number: 0, pages: 0 }; 2] }
    }
}

impl VcpuReports {
    /// Takes a report over.
    pub(crate) fn take(&mut self, report: abi::Report) {
        let window = Window { number: report.window, pages: report.window_pages };
        if window.number != self.windows[1].number {
            self.windows[0] = self.windows[1];
        }
        self.windows[1] = window;
        self.last = report;
    }
}

/// Ticks of a guest's clock as nanoseconds.
fn nanoseconds(ticks: u64, tsc_hz: u64) -> u64 {
    let ns = u128::from(ticks) * 1_000_000_000 / u128::from(tsc_hz.max(1));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// The summary of all vCPUs of a guest whose clock has `tsc_hz` ticks to a second.
pub(crate) fn summarise(vcpus: &[VcpuReports], tsc_hz: u64) -> Summary {
    let sum =
        |of: fn(&abi::Report) -> u64| vcpus.iter().map(|vcpu| of(&vcpu.last)).fold(0, u64::saturating_add);
    Summary {
        phase: phase(vcpus).to_owned(),
        operations: sum(|report| report.operations),
        puts: sum(|report| report.puts),
        running_ns: nanoseconds(
            vcpus.iter().map(|vcpu| running_ticks(&vcpu.last)).max().unwrap_or(0),
            tsc_hz,
        ),
        footprint_pages: sum(|report| report.footprint_pages),
        populated_pages: sum(|report| report.populated_pages),
        checked_pages: sum(|report| report.checked_pages),
        discarded_pages: sum(|report| report.discarded_pages),
        ballooned_bytes: 0,
        verified_pages: sum(|report| report.verified_pages),
        wrong_words: sum(|report| report.wrong_words),
        wrong_pages: sum(|report| report.wrong_pages),
        wrong: vcpus.iter().flat_map(|vcpu| wrong_words(&vcpu.last)).take(WRONG_KEPT).collect(),
        window: window(vcpus),
        latency: latency(vcpus, tsc_hz),
    }
}

fn phase(vcpus: &[VcpuReports]) -> &'static str {
    if vcpus.iter().any(|vcpu| vcpu.last.sequence == 0) {
        return "starting";
    }
    match vcpus.iter().map(|vcpu| vcpu.last.phase).min().and_then(Phase::from_wire) {
        Some(Phase::Populating) => "populating",
        Some(Phase::Running) => "running",
        Some(Phase::Checking) => "checking",
        Some(Phase::Done) => "done",
        None => "unknown",
    }
}

fn running_ticks(report: &abi::Report) -> u64 {
    if report.running_ticks == 0 { 0 } else { report.now_ticks.saturating_sub(report.running_ticks) }
}

fn wrong_words(report: &abi::Report) -> impl Iterator<Item = WrongWord> {
    let kept = usize::try_from(report.wrong_words).unwrap_or(usize::MAX);
    report.wrong.iter().take(kept).map(|word| WrongWord {
        vcpu: report.vcpu,
        gpa: word.gpa,
        expected: word.expected,
        found: word.found,
    })
}

/// The newest window that every vCPU has completed and still knows.
fn window(vcpus: &[VcpuReports]) -> Option<Window> {
    let number = vcpus.iter().map(|vcpu| vcpu.windows[1].number).min().filter(|number| *number > 0)?;
    let pages_of = |vcpu: &VcpuReports| {
        vcpu.windows.iter().rev().find(|window| window.number == number).map(|window| window.pages)
    };
    let pages = vcpus.iter().map(pages_of).try_fold(0u64, |sum, pages| sum.checked_add(pages?))?;
    Some(Window { number, pages })
}

fn latency(vcpus: &[VcpuReports], tsc_hz: u64) -> Latency {
    let count = |bucket: usize| vcpus.iter().map(|vcpu| u64::from(vcpu.last.latency[bucket])).sum::<u64>();
    let buckets = (0..abi::LATENCY_BUCKETS)
        .map(|bucket| (nanoseconds(abi::latency_floor(bucket), tsc_hz), count(bucket)))
        .filter(|(_, operations)| *operations > 0)
        .collect();
    let max = vcpus.iter().map(|vcpu| vcpu.last.latency_max_ticks).max().unwrap_or(0);
    Latency { max_ns: nanoseconds(max, tsc_hz), buckets }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_guest::probe::{PROBE_BUCKETS, probe_bucket};

    fn vcpu(reports: &[abi::Report]) -> VcpuReports {
        let mut vcpu = VcpuReports::default();
        reports.iter().for_each(|report| vcpu.take(*report));
        vcpu
    }

    fn report(window: u64, window_pages: u64) -> abi::Report {
        abi::Report { sequence: 1, phase: 2, window, window_pages, ..abi::Report::EMPTY }
    }

    #[test]
    fn the_working_set_is_that_of_the_last_window_all_vcpus_completed() {
        let behind = vcpu(&[report(3, 10)]);
        let ahead = vcpu(&[report(3, 5), report(3, 5), report(4, 7)]);
        let both = [behind, ahead];
        assert_eq!(summarise(&both, 1).window, Some(Window { number: 3, pages: 15 }));
        let lost = [vcpu(&[report(3, 10)]), vcpu(&[report(4, 1), report(5, 1)])];
        assert_eq!(summarise(&lost, 1).window, None);
        assert_eq!(summarise(&[vcpu(&[report(0, 9)])], 1).window, None);
    }

    #[test]
    fn the_phase_is_that_of_the_slowest_vcpu() {
        let done = abi::Report { phase: 4, ..report(0, 0) };
        assert_eq!(summarise(&[vcpu(&[done]), vcpu(&[report(0, 0)])], 1).phase, "running");
        assert_eq!(summarise(&[vcpu(&[done]), vcpu(&[])], 1).phase, "starting");
        assert_eq!(summarise(&[vcpu(&[abi::Report { phase: 77, ..done }])], 1).phase, "unknown");
    }

    #[test]
    fn a_guest_that_lies_about_everything_does_no_harm() {
        let mut lie = report(u64::MAX, u64::MAX);
        lie.operations = u64::MAX;
        lie.wrong_words = u64::MAX;
        lie.now_ticks = 0;
        lie.running_ticks = u64::MAX;
        lie.latency_max_ticks = u64::MAX;
        lie.latency = [u32::MAX; abi::LATENCY_BUCKETS];
        let summary = summarise(&vec![vcpu(&[lie]); 2], 1);
        assert_eq!(summary.operations, u64::MAX);
        assert_eq!(summary.wrong.len(), 2 * abi::WRONG_KEPT);
        assert_eq!((summary.running_ns, summary.window), (0, None));
        let line = serde_json::to_string(&summary).unwrap();
        assert_eq!(serde_json::from_str::<Summary>(&line).unwrap(), summary);
    }

    #[test]
    fn the_answer_of_a_probe_comes_in_nanoseconds_by_bucket() {
        let mut answer = Probed { number: 4, pages: 3, ticks: 9000, touch_ticks: 8320, ..Probed::NONE };
        answer.latency[probe_bucket(4096)] = 2;
        answer.latency[0] = 1;
        let report = ProbeReport::new(1, &answer, 2_000_000_000);
        assert_eq!((report.vcpu, report.number, report.ns, report.touch_ns), (1, 4, 4500, 4160));
        let bucket = |from_ns, below_ns, pages| ProbeBucket { from_ns, below_ns, pages };
        assert_eq!(report.latency, [bucket(0, 17, 1), bucket(2048, 2176, 2)]);
        let all = Probed { latency: [1; PROBE_BUCKETS], ..answer };
        assert_eq!(ProbeReport::new(1, &all, 1).latency.len(), PROBE_BUCKETS);
    }

    #[test]
    fn latencies_come_in_nanoseconds() {
        let mut slow = report(0, 0);
        slow.latency[abi::latency_bucket(4096)] = 3;
        slow.latency_max_ticks = 5000;
        let latency = summarise(&[vcpu(&[slow]), vcpu(&[slow])], 2_000_000_000).latency;
        assert_eq!(latency, Latency { max_ns: 2500, buckets: vec![(2048, 6)] });
    }
}
