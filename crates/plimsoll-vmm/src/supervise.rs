//! The machine's main thread once the vCPUs run: listens to the starter, reports, stops, gives up.
//!
//! Enters: commands, vCPUs that ended, the manager's silence. Leaves: events, and an [`ExitReport`]. What must never
//! happen: this thread waiting for anything without a limit, or for a page: it is the one that can still say that the
//! others are stuck.
//!
//! Stopping has three steps. The guest is asked (a word in its channel pages). After [`STOP_GRACE`] vCPU threads are told to
//! leave and kicked until they answer. After another such time, those that still wait are abandoned: they wait in
//! the kernel for a page or for a reader of an event, nobody will come, and only the end of the process frees them.
use crate::agent;
use crate::balloon::Notice;
use crate::config::VmmConfig;
use crate::control::{BalloonPiece, Command, Control, Event, FrameOrder, MergeMode, MergeRange, StopMode};
use crate::inspection::Inspection;
use crate::machine::Machine;
use crate::probe::Accel;
use crate::report::{ProbeReport, Summary};
use crate::{VmmError, signals};
use plimsoll_guest::abi::{Finds, Piece};
use plimsoll_guest::probe::ProbeCommand;
use plimsoll_sys::mapping::Merging;
use plimsoll_types::{ByteCount, Gpa, PageCount};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::Killable;

/// How long each step of stopping may take.
pub const STOP_GRACE: Duration = Duration::from_secs(2);
/// How long a vCPU that is asked for its registers may take. One that waits for a page leaves KVM as well; more means that the host is
/// not there for it.
const ANSWER_GRACE: Duration = Duration::from_secs(1);
/// How long an inspector may have the vCPUs stand still. One that copies a large guest takes seconds.
const HOLD_MAX: Duration = Duration::from_secs(120);
/// How often vCPUs that are to leave KVM are kicked.
const KICK_EVERY: Duration = Duration::from_millis(5);

/// How a machine ended.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct ExitReport {
    /// The guest's own account.
    pub summary: Summary,
    /// Why it died, if it did.
    pub died: Option<String>,
    /// Threads of vCPUs, and that of the frames, that could not be stopped. If there are any, end the process: its memory is still in use.
    pub abandoned: usize,
    /// Whether the manager left before the end.
    pub manager: ManagerEnd,
    /// Messages of the manager's that made no sense. Anything but 0 is a fault of the manager.
    pub malformed_requests: u64,
}

/// What became of the manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManagerEnd {
    /// It was there to the end, for all shards, or there was none.
    Present,
    /// It closed its socket, or the socket failed.
    Lost,
    /// It gave the machine back, with all its pages.
    GivenBack,
}

/// A running machine.
pub(crate) struct Supervisor {
    pub(crate) machine: Arc<Machine>,
    pub(crate) control: Control,
    pub(crate) vcpus: Vec<JoinHandle<()>>,
    pub(crate) agents: Vec<JoinHandle<agent::Ended>>,
    /// The frames' thread, if the guest keeps frames.
    pub(crate) frames: Option<JoinHandle<()>>,
    pub(crate) manager: ManagerEnd,
    pub(crate) died: Option<String>,
    pub(crate) stop: Stop,
    pub(crate) malformed: u64,
    /// What was said when it started.
    pub(crate) started: Event,
    /// Whoever may look into the machine.
    pub(crate) inspection: Inspection,
    /// The vCPU whose registers somebody waits for.
    pub(crate) question: Option<Question>,
    /// Whether an inspector has the vCPUs stand still.
    pub(crate) hold: Hold,
}

/// How far an inspector's hold has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    No,
    /// vCPUs are on their way out of the guest.
    Begun(Instant),
    /// They stand still.
    Done(Instant),
}

/// A vCPU that is to say its registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    vcpu: u32,
    by: By,
    since: Instant,
}

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Starter,
    Inspector,
}

/// How far stopping has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Not at all, or the guest may take its time.
    No,
    /// The guest was asked to stop at once.
    Asked(Instant),
    /// vCPU threads were told to leave.
    Leaving(Instant),
}

/// Whether the machine goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Continue,
    End,
}

impl Supervisor {
    /// Runs until all vCPUs have ended or are given up.
    pub(crate) fn run(&mut self, config: &VmmConfig) -> Result<ExitReport, VmmError> {
        let interval = Duration::from_millis(u64::from(config.report_ms));
        let mut next_report = Instant::now() + interval;
        while self.machine.running() > 0 {
            let now = Instant::now();
            if now >= next_report {
                self.send(&Event::Report(self.machine.summary()))?;
                next_report = now + interval;
            }
            let mut wait = next_report.saturating_duration_since(now);
            if let Hold::Done(since) = self.hold {
                wait = wait.min(HOLD_MAX.saturating_sub(since.elapsed()));
            }
            if self.question.is_some()
                || matches!(self.hold, Hold::Begun(_))
                || matches!(self.stop, Stop::Leaving(_))
            {
                wait = wait.min(KICK_EVERY);
            }
            self.wait(wait)?;
            self.look()?;
            for command in self.inspection.serve(&self.started) {
                match command {
                    Command::Registers { vcpu } => self.ask(vcpu, By::Inspector)?,
                    Command::Hold => self.hold(),
                    _ => self.let_go(),
                }
            }
            self.push_hold();
            self.push_question()?;
            self.forget_gone();
            if self.push_stop() == Next::End {
                break;
            }
        }
        let stuck = self.close_frames();
        self.look()?;
        let abandoned = self.machine.running() + stuck;
        let summary = self.machine.summary();
        self.send(&Event::Done(summary.clone()))?;
        if self.machine.running() == 0 {
            // A vCPU's thread has nothing to do after it has said that it ended.
            self.vcpus.drain(..).for_each(|vcpu| drop(vcpu.join()));
        }
        Ok(ExitReport {
            summary,
            died: self.died.take(),
            abandoned,
            manager: self.manager,
            malformed_requests: 0,
        })
    }

    fn send(&self, event: &Event) -> Result<(), VmmError> {
        self.control.send(event).map_err(VmmError::Control)
    }

    /// Waits for the starter or a vCPU, and obeys the starter.
    fn wait(&mut self, limit: Duration) -> Result<(), VmmError> {
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let mut ready = vec![PollFd::new(&self.machine.attention, PollFlags::IN)];
        ready.extend(self.inspection.watched().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        // A starter that has closed its end makes the socket ready for ever; it has been heard.
        if self.stop == Stop::No {
            ready.push(PollFd::new(&self.control, PollFlags::IN));
        }
        match poll(&mut ready, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(VmmError::Control(errno.into())),
        }
        self.machine.attention.drain().map_err(VmmError::Control)?;
        if self.stop != Stop::No {
            return Ok(());
        }
        let received = self.control.receive().map_err(VmmError::Control)?;
        for message in received.errors {
            self.send(&Event::Error { message })?;
        }
        for command in received.commands {
            match command {
                Command::Window { number } => self.machine.window(number)?,
                Command::Stop { mode } => self.ask_to_stop(mode)?,
                Command::Probe { vcpu, probe } => self.probe(vcpu, probe)?,
                Command::Merge(range) => self.merge(range)?,
                Command::Balloon { target_bytes, piece } => self.aim(ByteCount(target_bytes), piece)?,
                Command::Frames(order) => self.order(order)?,
                Command::Registers { vcpu } => self.ask(vcpu, By::Starter)?,
                Command::Hold | Command::Release => {
                    let message = "the inspection socket holds and releases".to_owned();
                    self.send(&Event::Error { message })?;
                }
            }
        }
        if received.closed { self.ask_to_stop(StopMode::Now) } else { Ok(()) }
    }

    fn probe(&self, vcpu: u32, command: ProbeCommand) -> Result<(), VmmError> {
        let message = match command.check() {
            Err(error) => error.to_string(),
            Ok(_) if usize::try_from(vcpu).is_ok_and(|vcpu| vcpu < self.machine.vcpus()) => {
                self.machine.command(vcpu, command);
                return Ok(());
            }
            Ok(_) => format!("there is no vCPU {vcpu} to probe with"),
        };
        self.send(&Event::Error { message })
    }

    /// The kernel breaks a merge without a fault that anybody would have to serve, so this waits for no page.
    fn merge(&self, range: MergeRange) -> Result<(), VmmError> {
        let merging = match range.merging {
            MergeMode::Offered => Merging::Offered,
            MergeMode::Withdrawn => Merging::Withdrawn,
        };
        let done = self.machine.memory.advise_merging(Gpa(range.gpa), ByteCount(range.bytes), merging);
        let refused = done.err().map(|error| plimsoll_linux::explain(&error));
        self.send(&Event::Merging { range, refused })
    }

    /// Asks a vCPU for its registers, and gets it out of KVM.
    fn ask(&mut self, vcpu: u32, by: By) -> Result<(), VmmError> {
        let has_registers = matches!(self.started, Event::Started { accel: Accel::Kvm { .. }, .. });
        let refused = if !has_registers {
            Some("the guest runs in this process: it has no registers of its own".to_owned())
        } else if self.question.is_some() {
            Some("another vCPU is being asked: ask one at a time".to_owned())
        } else if self.machine.has_ended(vcpu) {
            Some(format!("vCPU {vcpu} has ended, or never was"))
        } else {
            None
        };
        if refused.is_some() {
            return self.answer(by, &Event::Registers { vcpu, registers: None, stalled_ns: 0, refused });
        }
        self.question = Some(Question { vcpu, by, since: Instant::now() });
        self.machine.ask(vcpu);
        self.kick(vcpu);
        Ok(())
    }

    /// Has all vCPUs stand still for the inspector. Asking again gains no time.
    fn hold(&mut self) {
        match self.hold {
            Hold::No => {}
            Hold::Begun(_) => return,
            Hold::Done(_) => return self.inspection.send(&Event::Held),
        }
        let has_kvm = matches!(self.started, Event::Started { accel: Accel::Kvm { .. }, .. });
        let refused = match self.stop {
            _ if !has_kvm => "the guest runs in this process: it cannot be held",
            Stop::No if self.manager == ManagerEnd::Lost => {
                "the machine's manager is gone: it cannot be held"
            }
            Stop::No => {
                self.machine.hold();
                self.hold = Hold::Begun(Instant::now());
                return;
            }
            _ => "the machine is to stop: it cannot be held",
        };
        self.inspection.send(&Event::Error { message: refused.to_owned() });
    }

    /// The inspector has what it wanted.
    fn let_go(&mut self) {
        let event = match self.hold {
            Hold::No => Event::Error { message: "no vCPU stands still: nobody holds the machine".to_owned() },
            _ => Event::Released,
        };
        self.release();
        self.inspection.send(&event);
    }

    fn release(&mut self) {
        self.machine.release();
        self.hold = Hold::No;
    }

    /// The machine goes on, and the inspector hears why.
    fn end_hold(&mut self, message: String) {
        if self.hold != Hold::No {
            self.release();
            self.inspection.send(&Event::Error { message });
        }
    }

    /// Gets vCPUs out of the guest and says when none is left; and lets them go on once the inspector had its time, or the manager is lost:
    /// then the inspector may wait for a page that nobody brings.
    fn push_hold(&mut self) {
        match self.hold {
            Hold::No => {}
            _ if self.manager == ManagerEnd::Lost => {
                self.end_hold("the machine's manager is gone: it goes on".to_owned());
            }
            Hold::Begun(_) if self.machine.stands_still() => {
                self.hold = Hold::Done(Instant::now());
                self.inspection.send(&Event::Held);
            }
            Hold::Begun(since) if since.elapsed() >= ANSWER_GRACE => {
                self.end_hold(format!("the vCPUs did not leave KVM within {} s", ANSWER_GRACE.as_secs()));
            }
            Hold::Begun(_) => self.vcpus.iter().for_each(kick),
            Hold::Done(since) if since.elapsed() >= HOLD_MAX => {
                self.end_hold(format!("the machine stood still for {} s: it goes on", HOLD_MAX.as_secs()));
            }
            Hold::Done(_) => {}
        }
    }

    /// Whoever hung up, or did not read, holds nothing and asks nothing: the next one begins afresh.
    fn forget_gone(&mut self) {
        if self.inspection.is_open() {
            return;
        }
        if self.hold != Hold::No {
            self.release();
        }
        if self.question.is_some_and(|question| question.by == By::Inspector) {
            self.machine.no_longer_ask();
            self.question = None;
        }
    }

    fn answer(&mut self, by: By, event: &Event) -> Result<(), VmmError> {
        match by {
            By::Starter => self.send(event),
            By::Inspector => {
                self.inspection.send(event);
                Ok(())
            }
        }
    }

    fn kick(&self, vcpu: u32) {
        usize::try_from(vcpu).ok().and_then(|index| self.vcpus.get(index)).into_iter().for_each(kick);
    }

    /// Passes on what a vCPU said of its registers, kicks it once more if it said nothing, and gives up when it had its time.
    fn push_question(&mut self) -> Result<(), VmmError> {
        let Some(Question { vcpu, by, since }) = self.question else { return Ok(()) };
        let (told, stalled) = match self.machine.told() {
            Some(told) => (told.registers, told.stalled),
            None if self.machine.has_ended(vcpu) => (Err(format!("vCPU {vcpu} has ended")), Duration::ZERO),
            None if since.elapsed() >= ANSWER_GRACE => {
                let seconds = ANSWER_GRACE.as_secs();
                (Err(format!("vCPU {vcpu} did not leave KVM within {seconds} s")), Duration::ZERO)
            }
            None => {
                self.kick(vcpu);
                return Ok(());
            }
        };
        self.machine.no_longer_ask();
        self.question = None;
        let (registers, refused) = match told {
            Ok(registers) => (Some(registers), None),
            Err(refused) => (None, Some(refused)),
        };
        self.answer(by, &Event::Registers { vcpu, registers, stalled_ns: ns(stalled), refused })
    }

    fn aim(&self, bytes: ByteCount, piece: BalloonPiece) -> Result<(), VmmError> {
        let (piece, finds) = match piece {
            BalloonPiece::Page => (Piece::Page, Finds::InOrder),
            BalloonPiece::ScatteredPage => (Piece::Page, Finds::Scattered),
            BalloonPiece::Frame => (Piece::Frame, Finds::InOrder),
        };
        if self.machine.aim(bytes, piece, finds)? { Ok(()) } else { self.no_frames() }
    }

    fn order(&self, order: FrameOrder) -> Result<(), VmmError> {
        if !self.machine.balloon.has_frames() {
            return self.no_frames();
        }
        self.machine.balloon.order(order);
        Ok(())
    }

    fn no_frames(&self) -> Result<(), VmmError> {
        self.send(&Event::Error { message: "this guest keeps no frames and has no balloon".to_owned() })
    }

    /// Ends the frames' thread. 1 if it waits for a reader of an event and cannot.
    fn close_frames(&mut self) -> usize {
        let Some(frames) = self.frames.take() else { return 0 };
        self.machine.balloon.close();
        let start = Instant::now();
        while !frames.is_finished() {
            if start.elapsed() >= STOP_GRACE {
                return 1;
            }
            std::thread::sleep(KICK_EVERY);
        }
        drop(frames.join());
        0
    }

    fn ask_to_stop(&mut self, mode: StopMode) -> Result<(), VmmError> {
        self.machine.stop(mode.word())?;
        self.end_hold("the machine is to stop: it goes on".to_owned());
        if mode == StopMode::Now && self.stop == Stop::No {
            self.stop = Stop::Asked(Instant::now());
        }
        Ok(())
    }

    /// Notices what threads have run into.
    fn look(&mut self) -> Result<(), VmmError> {
        let ended: Vec<_> = self.agents.extract_if(.., |agent| agent.is_finished()).collect();
        for agent in ended {
            let end = self.join(agent)?;
            if self.manager == ManagerEnd::Present {
                self.manager = end;
                let is_given_back = end == ManagerEnd::GivenBack;
                self.send(if is_given_back { &Event::GivenBack } else { &Event::ManagerLost })?;
            }
        }
        for (vcpu, answer) in self.machine.answers() {
            self.send(&Event::Probed(ProbeReport::new(vcpu, &answer, self.machine.tsc_hz)))?;
        }
        for notice in self.machine.balloon.notices() {
            self.send(&told(notice))?;
        }
        if self.died.is_some() {
            return Ok(());
        }
        let death = self.machine.death().or_else(|| {
            let poisoned = self.machine.poisoned()?;
            // The thread that touched the page sleeps in its handler and cannot say who it is.
            Some((0, poisoned.to_string()))
        });
        if let Some((vcpu, reason)) = death {
            self.send(&Event::Died { vcpu, reason: reason.clone() })?;
            self.died = Some(reason);
            self.ask_to_stop(StopMode::Now)?;
        }
        Ok(())
    }

    /// Takes stopping a step further when its time has come.
    fn push_stop(&mut self) -> Next {
        match self.stop {
            Stop::No => {}
            Stop::Asked(since) if since.elapsed() < STOP_GRACE => {}
            Stop::Asked(_) => {
                self.machine.leave();
                self.stop = Stop::Leaving(Instant::now());
            }
            Stop::Leaving(since) if since.elapsed() >= STOP_GRACE => return Next::End,
            Stop::Leaving(_) => self.vcpus.iter().for_each(kick),
        }
        Next::Continue
    }

    /// Ends the agents, whose sockets have been shut down, and returns the messages that made no sense to them.
    pub(crate) fn join_agents(&mut self) -> Result<u64, VmmError> {
        for agent in std::mem::take(&mut self.agents) {
            self.join(agent)?;
        }
        Ok(self.malformed)
    }

    /// What an agent that has ended knows of its manager.
    fn join(&mut self, agent: JoinHandle<agent::Ended>) -> Result<ManagerEnd, VmmError> {
        let (end, malformed) = match agent.join() {
            Ok(agent::Ended::Closed { malformed }) => (ManagerEnd::Lost, malformed),
            Ok(agent::Ended::GivenBack { malformed }) => (ManagerEnd::GivenBack, malformed),
            Ok(agent::Ended::Failed(error)) => return Err(VmmError::Handover(error)),
            Err(_) => return Err(VmmError::Handover(io::Error::other("the agent's thread panicked"))),
        };
        self.malformed += malformed;
        Ok(end)
    }
}

fn ns(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
}

fn told(notice: Notice) -> Event {
    match notice {
        Notice::Settled { target, ballooned, took } => Event::Ballooned {
            target_bytes: PageCount(target.pages()).bytes().0,
            ballooned_bytes: ballooned.0,
            ns: ns(took),
        },
        Notice::Done { order, done, dropped, took, refused } => {
            Event::Frames { order, done_bytes: done.0, dropped_bytes: dropped.0, ns: ns(took), refused }
        }
    }
}

/// Has a vCPU leave KVM.
fn kick(vcpu: &JoinHandle<()>) {
    // A thread that has ended since cannot be signalled, and need not be.
    let _ = vcpu.kill(signals::kick_number());
}
