//! One machine over time: looked at once a period, kept at its budget, followed when it grows, shrinks, moves or ends.
//!
//! Enters: a machine that is followed, its lock, what is wanted. Leaves: how it ended. One thread does everything, and
//! waits for whichever comes first: the next period, a signal, the end of the process. What must never happen: anything
//! asked of memory that the machine no longer has, or while it is migrated.
use super::budget::{Budget, Taken};
use super::view::{Line, View};
use crate::signals::signals;
use plimsoll_attach::{AttachLock, Change, Follower};
use plimsoll_host::backend::{
    Memory, MigrationPhase as Phase, MigrationWatch as Watch, reopen, why_counted_only,
};
use plimsoll_linux::explain;
use plimsoll_linux::kernel::source::Damon;
use plimsoll_linux::kernel::{KernelError, KernelMachine, Layout, PERIOD};
use plimsoll_linux::prepare::{Place, Repacking};
use plimsoll_linux::reclaimer::{COLLAPSED_MAX, Reclaimed, Reclaimer, Short};
use plimsoll_linux::system::Linux;
use plimsoll_linux::zram::{self, SwapCost};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, PageCount};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Between two requests for memory while the machine is above its budget: the pace allows so much a second.
const STEP: Duration = Duration::from_millis(200);
/// Between two looks for a migration that nothing announces.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// How long a single request may take altogether when nothing else was said.
const ONCE_MAX: Duration = Duration::from_secs(60);

/// What is wanted.
pub(super) struct Settings {
    pub(super) budget: Option<Budget>,
    pub(super) once: Option<ByteCount>,
    pub(super) lasting: Option<Duration>,
    pub(super) qmp: Option<PathBuf>,
    pub(super) has_damon: bool,
}

/// How it ended. The machine goes on, unless it says otherwise.
pub(super) enum End {
    /// A signal came.
    Interrupted,
    /// The time is up.
    Over,
    /// What was asked for once was tried.
    Once { wanted: PageCount, got: Reclaimed },
    /// The process ended, or runs something else.
    Gone(String),
    /// The machine runs elsewhere now.
    Migrated,
    /// Something went wrong.
    Failed(String),
}

impl End {
    /// Failure also for a single request that got less than it asked for.
    pub(super) fn status(&self) -> ExitCode {
        match self {
            Self::Once { wanted, got } if got.taken < *wanted => ExitCode::FAILURE,
            Self::Failed(_) => ExitCode::FAILURE,
            Self::Interrupted | Self::Over | Self::Once { .. } | Self::Gone(_) | Self::Migrated => {
                ExitCode::SUCCESS
            }
        }
    }
}

impl From<KernelError> for End {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::ProcessGone(process) => {
                Self::Gone(format!("{process} has ended, or executed another program"))
            }
            error => Self::Failed(explain(&error)),
        }
    }
}

pub(super) struct Session {
    follower: Follower,
    memory: Memory,
    migration: Watch,
    process: Pidfd,
    signals: UnixStream,
    started: Instant,
    /// When the machine is to be looked at next.
    look_at: Instant,
    /// As last seen: a budget does not become wider because a counter could not be read.
    cost: SwapCost,
    /// Said when it changes.
    told: Option<String>,
    /// Only where something is taken all the time.
    repacking: Option<Repacking>,
    /// Only where it was asked for.
    damon: Option<Hints>,
    _lock: AttachLock,
}

impl Session {
    /// Attaches. Nothing is taken yet.
    pub(super) fn begin(
        follower: Follower,
        lock: AttachLock,
        settings: &Settings,
        view: &mut View,
    ) -> Result<Self, String> {
        let (dossier, held) = (follower.dossier(), follower.held());
        let why = why_counted_only(dossier);
        if let (Some(why), true) = (&why, settings.budget.is_some() || settings.once.is_some()) {
            return Err(format!("nothing can be taken from {}: {why}", dossier.name));
        }
        let (process, mut memory, signals) = (reopen(held)?, Memory::open(held, dossier)?, signals()?);
        let repacking = settings.budget.map(|_| Repacking::start(Place::default())).transpose();
        let repacking = repacking.map_err(|error| explain(&error))?;
        let damon = settings.has_damon.then(|| Hints::begin(&mut memory, process.process())).transpose()?;
        let started = Instant::now();
        view.begin(dossier, why);
        Ok(Self {
            migration: Watch::new(process.process(), dossier.vmm, settings.qmp.clone()),
            memory,
            process,
            signals,
            started,
            look_at: started,
            cost: SwapCost::default(),
            told: None,
            repacking,
            damon,
            follower,
            _lock: lock,
        })
    }

    /// Manages it until something ends that.
    pub(super) fn run(mut self, settings: &Settings, view: &mut View) -> End {
        let lasting = settings.lasting.or(settings.once.map(|_| ONCE_MAX));
        let over = lasting.map(|lasting| self.started + lasting);
        if let Some(wanted) = settings.once {
            let mut got = Reclaimed { taken: PageCount(0), short: None };
            let wanted = wanted.pages_ceil();
            return match self.take_once(wanted, over, view, &mut got) {
                // What was taken is not forgotten because nobody waits for the rest.
                Ok(()) | Err(End::Interrupted | End::Over) => End::Once { wanted, got },
                Err(end) => end,
            };
        }
        loop {
            if let Err(end) = self.turn(settings, view).and_then(|until| self.wait(until, over)) {
                return end;
            }
        }
    }

    /// Does what is to be done now, and says when to come again.
    fn turn(&mut self, settings: &Settings, view: &mut View) -> Result<Instant, End> {
        let now = Instant::now();
        if self.keep_up(view, now)? != Phase::None {
            return Ok(now + ASK_EVERY);
        }
        if now >= self.look_at {
            self.look_at = self.period(settings, view, now)?;
        }
        Ok(if self.migration.is_asking() { self.look_at.min(now + ASK_EVERY) } else { self.look_at })
    }

    /// Follows the machine's memory and its migration. While one is, or may be, under way nothing may be taken.
    fn keep_up(&mut self, view: &mut View, now: Instant) -> Result<Phase, End> {
        if let Some(error) = view.broken() {
            return Err(End::Failed(format!("nobody reads what is said: {error}")));
        }
        let unseen = self.follow(view)?;
        let seen = self.migration.look(now);
        if let Some(trouble) = seen.trouble {
            view.note(&format!("QMP is of no use at the moment: {}", explain(&trouble)));
        }
        match seen.phase {
            Phase::Completed => return Err(End::Migrated),
            Phase::Running => {
                let what = "it is being migrated: nothing is taken until that has ended";
                self.tell(view, Some(what.to_owned()));
            }
            Phase::Unknown => {
                let what = "nothing is taken until its monitor answers: it may be saving or loading a snapshot, or \
                            another client has the monitor";
                self.tell(view, Some(what.to_owned()));
            }
            Phase::ReadOut => {
                let what = "nothing is taken while all of its memory seems to be read and its processors rest: it may be \
                            saving a snapshot";
                self.tell(view, Some(what.to_owned()));
            }
            Phase::None => self.tell(view, unseen),
        }
        Ok(seen.phase)
    }

    /// Looks, takes, and says when to look again.
    fn period(&mut self, settings: &Settings, view: &mut View, now: Instant) -> Result<Instant, End> {
        self.repacking.as_ref().and_then(Repacking::heard).iter().for_each(|why| view.note(why));
        let Self { memory, damon, .. } = self;
        if let Some(why) = damon.as_mut().and_then(|damon| damon.give(memory).err()) {
            view.note(&format!("DAMON is of no use any more: {why}"));
            *damon = None;
            memory.managed.iter_mut().for_each(|machine| machine.heed(&[]));
        }
        self.cost = zram::swap_cost().unwrap_or(self.cost);
        let (mut next, mut short) = (now + PERIOD, None);
        let mut is_new = false;
        if let Some(machine) = &mut memory.managed {
            is_new = now >= machine.due();
            short = if is_new { machine.tick(now)?.short } else { None };
            next = machine.due();
        }
        let mut taken = Taken::new(memory.usage()?, self.cost);
        let limit = settings.budget.and_then(|budget| budget.limit(memory.working_set()));
        let excess = limit.map_or(PageCount(0), |limit| taken.excess(limit, self.cost));
        if let Some(machine) = memory.managed.as_mut().filter(|_| excess.0 > 0) {
            let got = machine.reclaim(excess, now)?;
            next = if got.goes_on() { now + STEP } else { machine.due() };
            short = got.short;
            taken = Taken::new(memory.usage()?, self.cost);
        }
        if let Some(machine) = memory.managed.as_mut().filter(|_| is_new) {
            machine.collapse_hot(COLLAPSED_MAX)?;
        }
        let dossier = self.follower.dossier();
        let short = short.filter(is_worth_saying).map(|short| explain(&short));
        let line = Line {
            seconds: self.started.elapsed().as_secs_f64(),
            taken,
            budget: settings.budget,
            limit,
            working_set: memory.working_set(),
            totals: memory.totals(),
            short: short.or_else(|| why_counted_only(dossier)),
        };
        view.show(dossier, &line);
        // Looking at a large machine takes longer than a step: it is not looked at all the time for that.
        Ok(next.max(Instant::now() + STEP))
    }

    /// Keeps up with the machine's memory. Gives the reason why that cannot be done just now, if so.
    fn follow(&mut self, view: &mut View) -> Result<Option<String>, End> {
        let changes = match self.follower.poll() {
            Ok(changes) => changes,
            Err(refusal) => {
                return Ok(Some(format!("it cannot be looked at just now: {}", explain(&refusal))));
            }
        };
        for change in changes {
            match change {
                Change::Exited => return Err(self.gone()),
                Change::Execed { program } => {
                    return Err(End::Gone(format!("its process runs {} now", program.display())));
                }
                Change::Came(range) => {
                    view.note(&format!("guest RAM came: {} of {}", range.hva.len(), range.block));
                }
                Change::Went(range) => {
                    view.note(&format!("guest RAM went: {} of {}", range.hva.len(), range.block));
                }
                _ => {}
            }
        }
        self.memory.follow(self.follower.held(), self.follower.dossier()).map_err(End::Failed)?;
        Ok(None)
    }

    /// Takes that much, in as many requests as its pace asks for, until one of them gets nothing.
    fn take_once(
        &mut self,
        wanted: PageCount,
        over: Option<Instant>,
        view: &mut View,
        got: &mut Reclaimed,
    ) -> Result<(), End> {
        loop {
            let now = Instant::now();
            if self.keep_up(view, now)? == Phase::None {
                let Some(machine) = &mut self.memory.managed else { return Ok(()) };
                let more = machine.reclaim(wanted.saturating_sub(got.taken), now)?;
                let may_go_on = more.goes_on();
                *got = Reclaimed { taken: got.taken + more.taken, short: more.short };
                if got.taken >= wanted || !may_go_on {
                    return Ok(());
                }
            }
            self.wait(Instant::now() + STEP, over)?;
        }
    }

    /// Says something that holds for a while, when it begins.
    fn tell(&mut self, view: &mut View, what: Option<String>) {
        if what != self.told {
            what.iter().for_each(|what| view.note(what));
            self.told = what;
        }
    }

    fn gone(&self) -> End {
        KernelError::ProcessGone(self.process.process()).into()
    }

    /// Waits until then, unless something ends the session before.
    fn wait(&self, until: Instant, over: Option<Instant>) -> Result<(), End> {
        let until = over.map_or(until, |over| over.min(until));
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|error| End::Failed(explain(&error)))?;
        let mut watched =
            [PollFd::new(&self.process, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
        match poll(&mut watched, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(End::Failed(format!("cannot wait for {}: {errno}", self.process.process())));
            }
        }
        let [has_ended, is_told] = watched.map(|one| !one.revents().is_empty());
        match (is_told, has_ended) {
            (true, _) => Err(End::Interrupted),
            (false, true) => Err(self.gone()),
            (false, false) if over.is_some_and(|over| Instant::now() >= over) => Err(End::Over),
            (false, false) => Ok(()),
        }
    }
}

/// The kernel's DAMON, which watches the machine.
struct Hints {
    process: ProcessId,
    ranges: Vec<HvaRange>,
    /// `None` while another is made.
    monitor: Option<Damon<'static>>,
}

impl Hints {
    fn begin(memory: &mut Memory, process: ProcessId) -> Result<Self, String> {
        let mut hints = Self { process, ranges: Vec::new(), monitor: None };
        hints.follow(memory)?;
        Ok(hints)
    }

    /// Watches what the machine has now: regions of a monitor that runs are not changed.
    fn follow(&mut self, memory: &mut Memory) -> Result<(), String> {
        // It sets the flag of each page it looks at.
        memory.managed.iter_mut().for_each(KernelMachine::ignore_idle_flags);
        let ranges: Vec<HvaRange> = memory.managed.iter().flat_map(KernelMachine::ranges).collect();
        if ranges == self.ranges {
            return Ok(());
        }
        // There can be one: the old goes first.
        self.monitor = None;
        if !ranges.is_empty() {
            let layout = Layout::new(ranges.clone()).map_err(|error| explain(&error))?;
            let monitor = Damon::open(&Linux, self.process, &layout).map_err(|error| explain(&error))?;
            monitor.start().map_err(|error| explain(&error))?;
            self.monitor = Some(monitor);
        }
        self.ranges = ranges;
        Ok(())
    }

    /// Tells the machine what was seen.
    fn give(&mut self, memory: &mut Memory) -> Result<(), String> {
        self.follow(memory)?;
        if let (Some(monitor), Some(machine)) = (&self.monitor, &mut memory.managed) {
            machine.heed(&monitor.used().map_err(|error| explain(&error))?);
        }
        Ok(())
    }
}

/// What an operator can do something about. That a machine uses what it has is no news.
const fn is_worth_saying(short: &Short) -> bool {
    !matches!(short, Short::Paced { .. } | Short::Unseen | Short::InUse | Short::NothingLeft)
}
