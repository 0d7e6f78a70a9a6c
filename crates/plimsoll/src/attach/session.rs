//! One machine over time: looked at once a period, kept at its budget, followed when it grows, shrinks, moves or ends.
//!
//! Enters: a machine that is followed, its lock, what is wanted. Leaves: how it ended. One thread does everything, and
//! waits for whichever comes first: the next period, a signal, the end of the process. What must never happen: anything
//! asked of memory that the machine no longer has, or while it is migrated.
use super::budget::{Budget, Taken};
use super::migration::{Phase, Watch};
use super::view::{Line, View};
use plimsoll_attach::{AttachLock, Change, Dossier, Follower, Held, Rung};
use plimsoll_linux::kernel::{KernelError, KernelMachine};
use plimsoll_linux::reclaimer::{Reclaimed, Reclaimer, Short};
use plimsoll_linux::{explain, zram};
use plimsoll_sys::HvaRange;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::{ByteCount, PageCount};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Between two requests for memory while the machine is above its budget: the pace allows so much a second.
const STEP: Duration = Duration::from_millis(200);
/// Between two looks for a migration that nothing announces.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// Hot blocks made huge again in a period: 7 ms each (FACTS.md).
const COLLAPSED_MAX: u32 = 4;
/// How long a single request may take altogether, when it is slowed down.
const ONCE_MAX: Duration = Duration::from_secs(60);

/// What is wanted.
pub(super) struct Settings {
    pub(super) budget: Option<Budget>,
    pub(super) once: Option<ByteCount>,
    pub(super) lasting: Option<Duration>,
    pub(super) qmp: Option<PathBuf>,
}

/// How it ended. The machine goes on, unless it says otherwise.
pub(super) enum End {
    /// A signal came.
    Interrupted,
    /// The time is up.
    Over,
    /// What was asked for once was done.
    Once { wanted: PageCount, got: Reclaimed },
    /// The process ended, or runs something else.
    Gone(String),
    /// The machine runs elsewhere now.
    Migrated,
}

pub(super) struct Session {
    follower: Follower,
    /// `None` where nothing may be taken from the machine: it is counted only.
    machine: Option<KernelMachine>,
    migration: Watch,
    process: Pidfd,
    signals: UnixStream,
    started: Instant,
    /// Said when it changes.
    told: Option<String>,
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
        let dossier = follower.dossier();
        let process = reopen(follower.held())?;
        let ranges = manageable(dossier);
        let machine = if ranges.is_empty() {
            None
        } else {
            let process = reopen(follower.held())?;
            Some(KernelMachine::attach(process, ranges, seed(dossier), Instant::now()).map_err(said)?)
        };
        if let (None, Some(_)) = (&machine, settings.budget.map(drop).or(settings.once.map(drop))) {
            return Err(format!("nothing can be taken from {}: {}", dossier.name, why_off(dossier)));
        }
        view.begin(dossier, machine.is_none().then(|| why_off(dossier)));
        Ok(Self {
            migration: Watch::new(process.process(), settings.qmp.clone()),
            machine,
            process,
            signals: signals()?,
            started: Instant::now(),
            told: None,
            follower,
            _lock: lock,
        })
    }

    /// Manages it until something ends that.
    pub(super) fn run(mut self, settings: &Settings, view: &mut View) -> Result<End, String> {
        if let Some(wanted) = settings.once {
            return self.take_once(wanted.pages_ceil());
        }
        let over = settings.lasting.map(|lasting| self.started + lasting);
        let mut look_at = Instant::now();
        loop {
            let now = Instant::now();
            if over.is_some_and(|over| now >= over) {
                return Ok(End::Over);
            }
            if now >= look_at {
                match self.period(settings, view, now) {
                    Ok(next) => look_at = next,
                    Err(Step::Ended(end)) => return Ok(end),
                    Err(Step::Failed(KernelError::ProcessGone(_))) => return Ok(End::Gone(self.gone())),
                    Err(Step::Failed(error)) => return Err(said(error)),
                }
            }
            let until = over.map_or(look_at, |over| over.min(look_at));
            match self.wait(until)? {
                Woken::Time => {}
                Woken::Signal => return Ok(End::Interrupted),
                Woken::Exit => return Ok(End::Gone(self.gone())),
            }
        }
    }

    /// Looks, takes, and says when to look again.
    fn period(&mut self, settings: &Settings, view: &mut View, now: Instant) -> Result<Instant, Step> {
        let unseen = self.follow(view)?;
        let seen = self.migration.look(now);
        if let Some(trouble) = seen.trouble {
            view.note(&format!("QMP is of no use at the moment: {}", explain(&trouble)));
        }
        match seen.phase {
            Phase::Completed => return Err(Step::Ended(End::Migrated)),
            Phase::Running => {
                self.tell(
                    view,
                    Some("it is being migrated: nothing is taken until that has ended".to_owned()),
                );
                return Ok(now + ASK_EVERY);
            }
            Phase::None => self.tell(view, unseen),
        }
        let Some(machine) = &mut self.machine else { return Ok(now + plimsoll_linux::kernel::PERIOD_MAX) };
        let tick = if now >= machine.due() { Some(machine.tick(now)?) } else { None };
        let cost = zram::swap_cost().unwrap_or_default();
        let limit = settings.budget.and_then(|budget| budget.limit(machine.working_set()));
        let mut taken = Taken::new(machine.usage()?, cost);
        let (mut short, mut next) = (tick.as_ref().and_then(|tick| tick.short.clone()), machine.due());
        if let Some(limit) = limit {
            let excess = taken.excess(limit, cost);
            if excess.0 > 0 {
                let got = machine.reclaim(excess, now)?;
                taken = Taken::new(machine.usage()?, cost);
                if got.taken.0 > 0 || matches!(got.short, Some(Short::Paced { .. } | Short::Unseen)) {
                    next = now + STEP;
                }
                short = got.short;
            }
        }
        if tick.is_some() {
            machine.collapse_hot(COLLAPSED_MAX)?;
        }
        let line = Line {
            seconds: self.started.elapsed().as_secs_f64(),
            taken,
            limit,
            working_set: machine.working_set(),
            totals: machine.totals(),
            short: short.as_ref().filter(|short| is_worth_saying(short)).map(|short| explain(short)),
        };
        view.show(self.follower.dossier(), &line);
        let next = next.min(machine.due()).max(now + STEP);
        Ok(if self.migration.is_asking() { next.min(now + ASK_EVERY) } else { next })
    }

    /// Keeps up with the machine's memory. Gives the reason why that cannot be done just now, if so.
    fn follow(&mut self, view: &mut View) -> Result<Option<String>, Step> {
        let changes = match self.follower.poll() {
            Ok(changes) => changes,
            Err(refusal) => {
                return Ok(Some(format!("it cannot be looked at just now: {}", explain(&refusal))));
            }
        };
        let mut is_changed = false;
        for change in changes {
            match change {
                Change::Exited => return Err(Step::Ended(End::Gone(self.gone()))),
                Change::Execed { program } => {
                    let what = format!("its process runs {} now", program.display());
                    return Err(Step::Ended(End::Gone(what)));
                }
                Change::Came(range) => {
                    view.note(&format!("guest RAM came: {} of {}", range.hva.len(), range.block));
                    is_changed = true;
                }
                Change::Went(range) => {
                    view.note(&format!("guest RAM went: {} of {}", range.hva.len(), range.block));
                    is_changed = true;
                }
                _ => {}
            }
        }
        if let (true, Some(machine)) = (is_changed, &mut self.machine) {
            machine.set_ranges(manageable(self.follower.dossier()))?;
        }
        Ok(None)
    }

    /// Takes that much, in as many requests as its pace asks for.
    fn take_once(&mut self, wanted: PageCount) -> Result<End, String> {
        let Some(machine) = &mut self.machine else { return Err("nothing can be taken from it".to_owned()) };
        let mut all = Reclaimed { taken: PageCount(0), short: None };
        while all.taken < wanted && self.started.elapsed() < ONCE_MAX {
            let got = machine.reclaim(wanted.saturating_sub(all.taken), Instant::now()).map_err(said)?;
            all = Reclaimed { taken: all.taken + got.taken, short: got.short };
            if !matches!(all.short, Some(Short::Paced { .. } | Short::Unseen)) {
                break;
            }
            match wait(&self.process, &self.signals, Instant::now() + STEP)? {
                Woken::Time => {}
                Woken::Signal => return Ok(End::Interrupted),
                Woken::Exit => return Ok(End::Gone(self.gone())),
            }
        }
        Ok(End::Once { wanted, got: all })
    }

    /// Says something that holds for a while, when it begins.
    fn tell(&mut self, view: &mut View, what: Option<String>) {
        if what != self.told {
            what.iter().for_each(|what| view.note(what));
            self.told = what;
        }
    }

    fn gone(&self) -> String {
        format!("{} has ended", self.process.process())
    }

    fn wait(&self, until: Instant) -> Result<Woken, String> {
        wait(&self.process, &self.signals, until)
    }
}

/// Why a period gave no time for the next.
enum Step {
    Ended(End),
    Failed(KernelError),
}

impl From<KernelError> for Step {
    fn from(error: KernelError) -> Self {
        Self::Failed(error)
    }
}

enum Woken {
    Time,
    Signal,
    Exit,
}

fn wait(process: &Pidfd, signals: &UnixStream, until: Instant) -> Result<Woken, String> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).map_err(|error| explain(&error))?;
    let mut watched = [PollFd::new(process, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
    match poll(&mut watched, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(format!("cannot wait for {}: {errno}", process.process())),
    }
    let [process, signals] = watched.map(|one| !one.revents().is_empty());
    Ok(match (signals, process) {
        (true, _) => Woken::Signal,
        (false, true) => Woken::Exit,
        (false, false) => Woken::Time,
    })
}

/// Readable once a signal has asked for the end.
fn signals() -> Result<UnixStream, String> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| explain(&error))?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        let end = theirs.try_clone().map_err(|error| explain(&error))?;
        signal_hook::low_level::pipe::register(signal, end).map_err(|error| explain(&error))?;
    }
    Ok(ours)
}

/// A pidfd of the same process: as long as the first is alive, the number is its own.
fn reopen(held: &Held) -> Result<Pidfd, String> {
    let process = Pidfd::open(held.process()).map_err(|error| explain(&error))?;
    held.confirm().map_err(|refusal| explain(&refusal))?;
    Ok(process)
}

/// The parts of guest RAM from which pages may be taken.
fn manageable(dossier: &Dossier) -> Vec<HvaRange> {
    let allowed = dossier.ram.iter().filter(|range| dossier.rungs_of(range).allows(Rung::KernelPaging));
    allowed.map(|range| range.hva).collect()
}

fn why_off(dossier: &Dossier) -> String {
    let rungs = dossier.rungs();
    rungs.off(Rung::KernelPaging).map_or_else(|| "it has no RAM".to_owned(), ToString::to_string)
}

/// Another one for each machine, the same each time it is attached to.
const fn seed(dossier: &Dossier) -> u64 {
    dossier.identity.start.0 ^ (dossier.identity.process.get() as u64) << 40
}

/// What an operator can do something about. That a machine uses what it has is no news.
const fn is_worth_saying(short: &Short) -> bool {
    !matches!(short, Short::Paced { .. } | Short::Unseen | Short::InUse | Short::NothingLeft)
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn said(error: KernelError) -> String {
    explain(&error)
}
