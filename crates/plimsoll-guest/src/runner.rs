//! A guest's life: write every page once, run the program, read every page once more, and report all along. Or, for a
//! probing guest: do what is asked, and answer. What a guest that keeps frames does is in `heap`.
//!
//! What enters is a parameter page and a [`Machine`]; what leaves are reports. Each operation compares the
//! *whole* page it touches with what that page must contain. What must never happen: a wrong word passing
//! unreported, or being reported again and again: a page found wrong is rewritten after it was counted.
use crate::abi::{
    PAGE_SIZE, Params, Phase, Report, STOP_NO, STOP_NOW, WRONG_KEPT, WrongWord, latency_bucket,
};
use crate::content::{Content, MixError};
use crate::frames::Plan;
use crate::layout::{Layout, LayoutError};
use crate::machine::{Machine, PAGE_WORDS, PageWords};
use crate::probe::{Order, ProbeCommand, Probed, Task, Walk};
use crate::program::Program;
use crate::random::{Rng, hash3};
use crate::spec::{SpecError, WorkloadKind, WorkloadSpec};
use crate::versions::{PageState, WrongVersion};
use crate::window::Window;
use core::fmt;

const NS_PER_SECOND: u64 = 1_000_000_000;
const MS_PER_SECOND: u64 = 1_000;
/// Reports in a second, while nothing else stops the guest.
const REPORTS_PER_SECOND: u64 = 20;
/// A shorter wait spins: leaving the guest and coming back costs a good part of it.
const SLEEP_NS_MIN: u64 = 1_000_000;
/// A vCPU that is later than this part of a second starts its pace over instead of catching up in a rush.
const LATE_PART_OF_SECOND: u64 = 10;
/// What the idle program does when no pace is given.
const IDLE_OPS_PER_SECOND: u64 = 10;

/// A guest whose parameters make sense.
#[derive(Clone, Debug)]
pub struct Guest {
    layout: Layout,
    /// Where a guest that keeps frames has them.
    plan: Option<Plan>,
    pub(crate) content: Content,
    kind: WorkloadKind,
    pub(crate) spec: WorkloadSpec,
    pub(crate) seed: u64,
    vcpus: u32,
    tsc_hz: u64,
}

impl Guest {
    /// Checks a parameter page. A VMM calls this before it starts a guest, the guest once more when it runs.
    pub fn new(params: &Params) -> Result<Self, GuestError> {
        let layout = Layout::new(params).map_err(GuestError::Layout)?;
        let kind = params.workload.check().map_err(GuestError::Workload)?;
        let content = Content::new(params.seed, params.pool_seed, params.pool_pages, params.mix)
            .map_err(GuestError::Mix)?;
        let plan = match kind {
            WorkloadKind::Frames => Some(Plan::new(params).ok_or(GuestError::NoFrames)?),
            _ => None,
        };
        let Params { workload: spec, seed, vcpus, tsc_hz, .. } = *params;
        Ok(Self { layout, plan, content, kind, spec, seed, vcpus, tsc_hz })
    }

    /// Where everything lies.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where its frames lie, if it is one that keeps frames.
    pub const fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    /// What pages must contain.
    pub const fn content(&self) -> &Content {
        &self.content
    }

    /// Runs one vCPU to its end and returns its last report, which the machine has not seen yet.
    pub fn run<M: Machine>(&self, vcpu: u32, machine: &mut M) -> Result<Report, GuestError> {
        if vcpu >= self.vcpus {
            return Err(GuestError::Vcpu { vcpu, vcpus: self.vcpus });
        }
        let owned_pages = self.layout.owned_pages(vcpu);
        let now = machine.now_ticks();
        let mut runner = Runner {
            guest: self,
            vcpu,
            owned_pages,
            window: Window::new(machine.window()),
            machine,
            report: Report { vcpu, footprint_pages: owned_pages, ..Report::EMPTY },
            next_report_ticks: now,
            found: [0; PAGE_WORDS],
            expected: [0; PAGE_WORDS],
        };
        if let Some(plan) = &self.plan {
            runner.keep_frames(plan, self.spec.final_check == 1);
        } else if self.kind == WorkloadKind::Probe {
            runner.obey();
        } else {
            runner.populate();
            runner.work();
        }
        if self.spec.final_check == 1 {
            runner.check_all();
        }
        runner.enter(Phase::Done);
        Ok(runner.sealed_report())
    }

    /// The rule of a program over so many pages.
    pub(crate) fn program(&self, kind: WorkloadKind, pages: u64, seed: u64) -> Program {
        Program::new(kind, &self.spec, pages, self.ticks(self.spec.phase_ms, MS_PER_SECOND), seed)
    }

    /// Ticks in a duration of `count` parts, of which `per_second` are a second.
    fn ticks(&self, count: u64, per_second: u64) -> u64 {
        let ticks = u128::from(count) * u128::from(self.tsc_hz) / u128::from(per_second);
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    fn ns(&self, ticks: u64) -> u64 {
        let ns = u128::from(ticks) * u128::from(NS_PER_SECOND) / u128::from(self.tsc_hz);
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

/// What an operation does after it verified its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Get,
    Put,
}

/// One vCPU at work.
pub(crate) struct Runner<'a, M> {
    pub(crate) guest: &'a Guest,
    pub(crate) machine: &'a mut M,
    pub(crate) vcpu: u32,
    owned_pages: u64,
    window: Window,
    pub(crate) report: Report,
    next_report_ticks: u64,
    pub(crate) found: PageWords,
    pub(crate) expected: PageWords,
}

impl<M: Machine> Runner<'_, M> {
    /// Writes every page for the first time.
    fn populate(&mut self) {
        self.enter(Phase::Populating);
        for local in 0..self.owned_pages {
            if self.attend() != STOP_NO {
                return;
            }
            self.write(local, PageState::FIRST);
            self.report.populated_pages += 1;
        }
    }

    /// Runs the program until it is told to stop or has done its operations.
    fn work(&mut self) {
        if self.report.populated_pages < self.owned_pages {
            return;
        }
        let Guest { kind, spec, seed, .. } = *self.guest;
        let mut rng = Rng::new(hash3(seed, spec.seed, u64::from(self.vcpu)));
        let mut program = self.guest.program(kind, self.owned_pages, rng.word());
        let interval_ticks = self.interval_ticks();
        let pause_ticks = self.guest.ticks(spec.burst_idle_ms, MS_PER_SECOND);
        self.enter(Phase::Running);
        let running_ticks = self.machine.now_ticks();
        self.report.running_ticks = running_ticks;
        let mut due = running_ticks;

        while self.attend() == STOP_NO {
            let done = self.report.operations;
            if spec.operations != 0 && done >= spec.operations {
                return;
            }
            if kind == WorkloadKind::Bursts && done.is_multiple_of(spec.burst_ops) {
                // The first burst comes after a part of the pause, so that equal guests do not burst together.
                let pause_ticks = if done == 0 { rng.below(pause_ticks) } else { pause_ticks };
                let burst_due = self.machine.now_ticks().saturating_add(pause_ticks);
                if self.wait_until(burst_due) != STOP_NO {
                    return;
                }
            }
            if interval_ticks != 0 {
                if self.wait_until(due) != STOP_NO {
                    return;
                }
                due = self.next_due(due, interval_ticks);
            }
            let start_ticks = self.machine.now_ticks();
            let elapsed_ticks = start_ticks.saturating_sub(running_ticks);
            let local = program.next_page(&mut rng, done, elapsed_ticks);
            let put = rng.below(1000) < u64::from(spec.write_permille);
            self.operate(local, if put { Operation::Put } else { Operation::Get });
            let end_ticks = self.machine.now_ticks();
            self.note_latency(end_ticks.saturating_sub(start_ticks));
            if spec.discard_every_ops != 0 && self.report.operations.is_multiple_of(spec.discard_every_ops) {
                let pages = 1 + rng.below(spec.discard_pages_max);
                self.give_back(rng.below(self.owned_pages), pages);
            }
        }
    }

    /// Does what it is asked until it is told to stop.
    fn obey(&mut self) {
        self.enter(Phase::Running);
        self.report.running_ticks = self.machine.now_ticks();
        let mut answer = Probed::NONE;
        while self.attend() == STOP_NO {
            let command = self.machine.next_command(&answer);
            if command.number != 0 {
                answer = Probed { number: command.number, ..Probed::NONE };
                if let Ok((task, order)) = command.check() {
                    self.probe(task, order, &command, &mut answer);
                }
            }
        }
    }

    /// Does one command, unless it is told to stop meanwhile.
    fn probe(&mut self, task: Task, order: Order, command: &ProbeCommand, answer: &mut Probed) {
        let (wrong_words, wrong_pages) = (self.report.wrong_words, self.report.wrong_pages);
        let window = self.machine.window();
        let start_ticks = self.machine.now_ticks();
        let mut passes = 0;
        loop {
            for local in Walk::new(order, command, self.owned_pages) {
                if self.machine.stop() != STOP_NO {
                    break;
                }
                answer.note(self.probe_page(task, local));
            }
            passes += 1;
            let is_over =
                if command.passes == 0 { self.machine.window() != window } else { passes >= command.passes };
            if is_over || self.machine.stop() != STOP_NO {
                break;
            }
            if command.pause_ns > 0 {
                self.machine.idle(command.pause_ns);
            }
        }
        answer.ticks = self.machine.now_ticks().saturating_sub(start_ticks);
        answer.wrong_words = self.report.wrong_words - wrong_words;
        answer.wrong_pages = self.report.wrong_pages - wrong_pages;
    }

    /// Does a task with one page and returns the ticks it took.
    fn probe_page(&mut self, task: Task, local: u64) -> u64 {
        let Guest { layout, content, .. } = self.guest;
        let page = layout.data_page(self.vcpu, local);
        let gpa = layout.data_gpa(page);
        if task == Task::Write {
            content.fill(page, PageState::FIRST.version(), &mut self.expected);
        }
        let start_ticks = self.machine.now_ticks();
        match task {
            Task::Populate => self.write(local, PageState::FIRST),
            Task::Read => _ = self.machine.read_word(gpa),
            Task::Write => self.machine.write_word(gpa, self.expected[0]),
            Task::Verify => _ = self.verify(local),
            // For a guest that keeps frames; this one has none.
            Task::Allocate | Task::Free | Task::Churn | Task::Work => {}
        }
        self.report.operations += 1;
        self.machine.now_ticks().saturating_sub(start_ticks)
    }

    /// Reads every page that was written, once more.
    fn check_all(&mut self) {
        self.enter(Phase::Checking);
        for local in 0..self.report.populated_pages {
            if self.attend() == STOP_NOW {
                return;
            }
            self.verify(local);
            self.report.checked_pages += 1;
        }
    }

    /// Ticks between operations, 0 when there is no pace.
    pub(crate) fn interval_ticks(&self) -> u64 {
        let Guest { kind, spec, tsc_hz, .. } = self.guest;
        let pace = match (spec.ops_per_second, kind) {
            (0, WorkloadKind::Idle) => IDLE_OPS_PER_SECOND,
            (pace, _) => pace,
        };
        tsc_hz.checked_div(pace).unwrap_or(0)
    }

    pub(crate) fn next_due(&mut self, due: u64, interval_ticks: u64) -> u64 {
        let now = self.machine.now_ticks();
        let late = now.saturating_sub(due) > self.guest.tsc_hz / LATE_PART_OF_SECOND;
        (if late { now } else { due }).saturating_add(interval_ticks)
    }

    /// Waits, asleep if it is long enough, and keeps attending to the VMM meanwhile.
    pub(crate) fn wait_until(&mut self, due_ticks: u64) -> u64 {
        loop {
            let stop = self.attend();
            let now = self.machine.now_ticks();
            if stop != STOP_NO || now >= due_ticks {
                return stop;
            }
            if self.guest.ns(due_ticks - now) >= SLEEP_NS_MIN {
                // No longer than to the next report: windows and the end are not late by more either.
                let awake_ticks = due_ticks.min(self.next_report_ticks);
                self.machine.idle(self.guest.ns(awake_ticks.saturating_sub(now)));
            } else {
                self.machine.relax();
            }
        }
    }

    fn operate(&mut self, local: u64, operation: Operation) {
        let state = self.verify(local);
        if operation == Operation::Put {
            self.write(local, state.written());
            self.report.puts += 1;
        }
        self.report.operations += 1;
    }

    pub(crate) fn note_latency(&mut self, ticks: u64) {
        self.report.latency_max_ticks = self.report.latency_max_ticks.max(ticks);
        if let Some(count) = self.report.latency.get_mut(latency_bucket(ticks)) {
            *count = count.saturating_add(1);
        }
    }

    /// Writes a page and its version word.
    fn write(&mut self, local: u64, state: PageState) {
        let Guest { layout, content, seed, .. } = self.guest;
        let page = layout.data_page(self.vcpu, local);
        self.window.touch(self.machine, layout, self.vcpu, local);
        content.fill(page, state.version(), &mut self.expected);
        self.machine.write_page(layout.data_gpa(page), &self.expected);
        self.machine.write_word(layout.version_gpa(self.vcpu, local), state.encode(*seed, page));
    }

    /// Reads a page, compares all of it, and puts right what was wrong. Returns its state.
    fn verify(&mut self, local: u64) -> PageState {
        let Guest { layout, content, .. } = self.guest;
        let page = layout.data_page(self.vcpu, local);
        let state = match self.state(local) {
            Ok(state) => state,
            Err(WrongVersion { alleged, .. }) => {
                // Which contents would be right is lost, so the page starts anew.
                let anew = alleged.written();
                self.write(local, anew);
                return anew;
            }
        };
        self.window.touch(self.machine, layout, self.vcpu, local);
        let gpa = layout.data_gpa(page);
        self.machine.read_page(gpa, &mut self.found);
        content.fill(page, state.version(), &mut self.expected);
        self.report.verified_pages += 1;
        if self.found != self.expected {
            self.note_wrong_page(gpa);
            self.machine.write_page(gpa, &self.expected);
        }
        state
    }

    /// The state of a page by its version word; a wrong word is counted here.
    fn state(&mut self, local: u64) -> Result<PageState, WrongVersion> {
        let Guest { layout, seed, .. } = self.guest;
        let gpa = layout.version_gpa(self.vcpu, local);
        let found = self.machine.read_word(gpa);
        let state = PageState::decode(found, *seed, layout.data_page(self.vcpu, local));
        if let Err(WrongVersion { expected, .. }) = state {
            self.report.wrong_pages += 1;
            note_wrong(&mut self.report, WrongWord { gpa, expected, found });
        }
        state
    }

    #[cold]
    pub(crate) fn note_wrong_page(&mut self, gpa: u64) {
        self.report.wrong_pages += 1;
        for (index, (&found, &expected)) in (0..).zip(self.found.iter().zip(&self.expected)) {
            if found != expected {
                note_wrong(&mut self.report, WrongWord { gpa: gpa + index * 8, expected, found });
            }
        }
    }

    /// Gives up to `pages` pages back, from `first` on, as few ranges as they make in guest memory.
    fn give_back(&mut self, first: u64, pages: u64) {
        let guest = self.guest;
        let end = (first + pages).min(self.owned_pages);
        let (mut start_gpa, mut len) = (0, 0);
        for local in first..end {
            let page = guest.layout.data_page(self.vcpu, local);
            let state = self.state(local).unwrap_or_else(|wrong| wrong.alleged);
            let version_gpa = guest.layout.version_gpa(self.vcpu, local);
            self.machine.write_word(version_gpa, state.given_back().encode(guest.seed, page));
            let gpa = guest.layout.data_gpa(page);
            if len != 0 && start_gpa + len == gpa {
                len += PAGE_SIZE;
                continue;
            }
            if len != 0 {
                self.machine.discard(start_gpa, len);
            }
            (start_gpa, len) = (gpa, PAGE_SIZE);
        }
        if len != 0 {
            self.machine.discard(start_gpa, len);
        }
        self.report.discarded_pages += end - first;
    }

    /// Does what the VMM waits for: ends a window, reports in time. Returns whether to stop.
    #[inline]
    pub(crate) fn attend(&mut self) -> u64 {
        let number = self.machine.window();
        // Where frames are kept, their tables lie in the place of the window's bitmap, and no working set is counted.
        if number != self.window.number && self.guest.plan.is_none() {
            self.close_window(number);
        }
        let now = self.machine.now_ticks();
        if now >= self.next_report_ticks {
            self.send_report(now);
        }
        self.machine.stop()
    }

    #[cold]
    fn close_window(&mut self, next: u64) {
        let layout = &self.guest.layout;
        let closed = self.window.close(self.machine, layout, self.vcpu, next);
        self.report.window = closed.number;
        self.report.window_pages = closed.touched;
        if closed.bits != closed.touched {
            // Which word of the bitmap was wrong is unknown; its address stands for all, and counts for words.
            let gpa = layout.bitmap_gpa(self.vcpu, 0);
            self.report.wrong_pages += 1;
            note_wrong(&mut self.report, WrongWord { gpa, expected: closed.touched, found: closed.bits });
        }
        // The VMM asked for this number: it goes out with the next thing the vCPU does.
        self.next_report_ticks = 0;
    }

    /// Starts a phase, which is reported at once.
    pub(crate) fn enter(&mut self, phase: Phase) {
        self.report.phase = phase as u32;
        self.next_report_ticks = 0;
    }

    #[cold]
    fn send_report(&mut self, now: u64) {
        let report = self.sealed_report();
        self.machine.report(&report);
        self.next_report_ticks = now.saturating_add(self.guest.tsc_hz / REPORTS_PER_SECOND);
    }

    fn sealed_report(&mut self) -> Report {
        self.report.sequence += 1;
        self.report.now_ticks = self.machine.now_ticks();
        self.report
    }
}

/// Counts a wrong word and keeps it if there is room.
pub(crate) fn note_wrong(report: &mut Report, wrong: WrongWord) {
    let count = usize::try_from(report.wrong_words).unwrap_or(WRONG_KEPT);
    if let Some(place) = report.wrong.get_mut(count) {
        *place = wrong;
    }
    report.wrong_words += 1;
}

/// Why a guest cannot run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestError {
    /// Memory, vCPUs or clock make no guest.
    Layout(LayoutError),
    /// The workload's numbers are out of range.
    Workload(SpecError),
    /// The mix is none.
    Mix(MixError),
    /// The memory is too small to keep frames in.
    NoFrames,
    /// The vCPU is none of this guest's.
    Vcpu {
        /// Its index.
        vcpu: u32,
        /// How many there are.
        vcpus: u32,
    },
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout(error) => error.fmt(f),
            Self::Workload(error) => error.fmt(f),
            Self::Mix(error) => error.fmt(f),
            Self::NoFrames => {
                f.write_str("the first region has no room for frames behind their tables: give more memory")
            }
            Self::Vcpu { vcpu, vcpus } => {
                write!(f, "vCPU {vcpu} was started in a guest of {vcpus}: number them from 0")
            }
        }
    }
}

impl core::error::Error for GuestError {}
