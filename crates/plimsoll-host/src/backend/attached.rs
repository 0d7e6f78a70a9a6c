//! A running machine, managed from outside.
//!
//! Enters: a machine that is followed, its lock, perhaps a balloon. Leaves: what is seen of it, and pages the kernel was asked
//! to take. Pages are asked for in bites between two decisions, because each bite costs processor time and the pace allows so
//! many a second. What must never happen: a page asked for where the dossier says the rung is off, or while the machine
//! migrates.
use super::balloon::{Balloon, Farewell, Seen};
use super::chart::{Chart, Pages, Whereabouts};
use super::memory::Memory;
use super::migration::{Phase as Migration, Watch};
use super::overhead::{Overhead, measure};
use super::{Backend, Cooperation, Done, Refused, Trouble};
use plimsoll_attach::{AttachLock, Change, Follower, Rung as Offered};
use plimsoll_linux::explain;
use plimsoll_linux::kernel::{KernelError, KernelMachine, Totals};
use plimsoll_linux::reclaimer::{COLLAPSED_MAX, Reclaimer, Short, Usage};
use plimsoll_linux::zram::{self, SwapCost};
use plimsoll_policy::Costs;
use plimsoll_policy::view::{MachineView, Phase, Reading};
use plimsoll_policy::{Ppm, Rung, Rungs, Step};
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::maps::MeasuredMapping;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pages asked for at a time: 13.5 us each (FACTS.md), so 55 ms, after which another machine has its turn.
const BITE: PageCount = PageCount(4096);
/// Between two bites.
const PAUSE: Duration = Duration::from_millis(200);
/// Looking at all pages of a machine may take this part of the time: a large one is looked at less often.
const LOOKING: u32 = 20;
/// How long a machine is taken to be starting, when no balloon driver is heard before: Hyper-V's guests report within a minute.
const STARTING: Duration = Duration::from_secs(60);

/// A machine managed from outside.
pub struct Attached {
    follower: Follower,
    memory: Memory,
    migration: Watch,
    balloon: Option<Balloon>,
    began: Instant,
    /// When the machine was last seen whole, what that showed, and when it is worth while again.
    usage: Usage,
    look_at: Instant,
    chart: Option<Chart>,
    cost: SwapCost,
    /// Pages the last plan asked for that were not asked of the kernel yet, and when to go on.
    wanted: PageCount,
    /// The same of what an operator asked for.
    ordered: PageCount,
    go_on_at: Option<Instant>,
    is_migrating: bool,
    short: Option<Short>,
    tally: Tally,
    /// When the sampler's estimate was made.
    sampled: Instant,
    /// The balloon's thread may have it for longer.
    _lock: Arc<AttachLock>,
}

impl Attached {
    /// Takes a machine over from outside. Nothing is taken from it yet.
    ///
    /// # Errors
    /// When its process may not be looked at, in words.
    pub fn new(
        follower: Follower,
        lock: Arc<AttachLock>,
        balloon: Option<Balloon>,
        now: Instant,
    ) -> Result<Self, String> {
        let memory = Memory::open(follower.held(), follower.dossier())?;
        Ok(Self {
            migration: Watch::new(follower.held().process(), follower.dossier().vmm, None),
            memory,
            balloon,
            began: now,
            usage: Usage::default(),
            look_at: now,
            chart: None,
            cost: SwapCost::default(),
            wanted: PageCount(0),
            ordered: PageCount(0),
            go_on_at: None,
            is_migrating: false,
            short: None,
            tally: Tally::new(now),
            sampled: now,
            follower,
            _lock: lock,
        })
    }

    /// Keeps up with the machine's memory and with its migration.
    fn follow(&mut self, now: Instant) -> Result<(), Trouble> {
        let changes = self.follower.poll().map_err(|refusal| Trouble::Unseen(explain(&refusal)))?;
        for change in &changes {
            match change {
                Change::Exited => return Err(Trouble::Gone("its process has ended".to_owned())),
                Change::Execed { program } => {
                    return Err(Trouble::Gone(format!("its process runs {} now", program.display())));
                }
                _ => self.look_at = now,
            }
        }
        self.memory.follow(self.follower.held(), self.follower.dossier()).map_err(Trouble::Unseen)?;
        let is_told = self.seen().is_some_and(|seen| seen.is_migrating);
        match self.migration.look(now).phase {
            Migration::Completed => return Err(Trouble::Gone("it runs on another host now".to_owned())),
            phase => self.is_migrating = is_told || phase != Migration::None,
        }
        Ok(())
    }

    fn seen(&self) -> Option<Seen> {
        self.balloon.as_ref().and_then(Balloon::seen)
    }

    /// Ends a period of the sampler when it is due.
    fn sample(&mut self, now: Instant) -> Result<(), KernelError> {
        if let Some(machine) = self.memory.managed.as_mut().filter(|machine| now >= machine.due()) {
            self.short = machine.tick(now)?.short;
            machine.collapse_hot(COLLAPSED_MAX)?;
            self.sampled = now;
        }
        Ok(())
    }

    fn look(&mut self, now: Instant) -> Result<(), KernelError> {
        if now >= self.look_at {
            let began = Instant::now();
            self.usage = self.memory.usage()?;
            self.chart = Some(self.memory.chart());
            self.look_at = now + began.elapsed() * LOOKING;
            self.cost = zram::swap_cost().unwrap_or(self.cost);
        }
        Ok(())
    }

    fn rungs(&self) -> Rungs {
        let dossier = self.follower.dossier().rungs();
        let is_managed = self.memory.managed.is_some() && !self.is_migrating;
        let has_balloon = self.seen().is_some_and(|seen| seen.is_cooperating && !seen.is_migrating);
        let mut rungs = Rungs::NONE;
        // Where no swap is to be had the kernel has nothing to do with pages.
        if is_managed && !self.short.as_ref().is_some_and(is_lasting) {
            rungs = rungs.with(Rung::Compress);
        }
        if has_balloon && dossier.allows(Offered::Balloon) {
            rungs = rungs.with(Rung::Balloon);
        }
        rungs
    }

    fn step(&self, step: Step) -> Done {
        match step {
            // What is above it is asked for by the steps that follow.
            Step::Target(_) | Step::Resume => Done::Begun,
            Step::Stall => Done::Refused(Refused::CannotStall),
            Step::Balloon(holds) => match &self.balloon {
                Some(balloon) => balloon.ask(holds),
                None => Done::Refused(Refused::NoBalloon),
            },
            Step::Take { .. } if self.is_migrating => Done::Refused(Refused::Migrating),
            Step::Take { rung: Rung::Compress, .. } => match &self.short {
                Some(short) if is_lasting(short) => Done::Refused(Refused::Short(explain(short))),
                _ => Done::Begun,
            },
            Step::Take { rung, .. } => Done::Refused(Refused::NoSuchRung(rung)),
        }
    }

    fn trouble(error: KernelError) -> Trouble {
        match error {
            KernelError::ProcessGone(_) => Trouble::Gone("its process has ended".to_owned()),
            error => Trouble::Unseen(explain(&error)),
        }
    }
}

impl Backend for Attached {
    fn observe(&mut self, id: MachineId, now: Instant) -> Result<MachineView, Trouble> {
        self.follow(now)?;
        if !self.is_migrating {
            self.sample(now).map_err(Self::trouble)?;
        }
        self.look(now).map_err(Self::trouble)?;
        let moved = self.tally.since(self.memory.totals(), now);
        let stored = self.cost.of(self.usage.elsewhere.bytes());
        let seen = self.seen();
        let is_starting = seen.is_none() && now.saturating_duration_since(self.began) < STARTING;
        let age = now.saturating_duration_since(self.sampled);
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let active = self.memory.working_set().map(|pages| Reading::of(pages.bytes(), age_ms));
        Ok(MachineView {
            phase: if is_starting { Phase::Starting } else { Phase::Running },
            stored,
            active,
            guest: seen.and_then(|seen| seen.statistics(now)),
            taken: moved.taken,
            returned: moved.returned,
            stalled: moved.stalled,
            balloon: seen.map(|seen| seen.lacks),
            rungs: self.rungs(),
            ..MachineView::new(id, self.usage.resident.bytes() + stored)
        })
    }

    fn learn(&mut self, costs: &Costs) {
        self.tally.learn(costs);
    }

    fn apply(&mut self, steps: &[Step], now: Instant) -> Vec<Done> {
        let outcomes: Vec<Done> = steps.iter().map(|step| self.step(*step)).collect();
        let taken = steps.iter().zip(&outcomes).find_map(|(step, done)| match (step, done) {
            (Step::Take { rung: Rung::Compress, pages, .. }, Done::Begun) => Some(*pages),
            _ => None,
        });
        self.wanted = taken.unwrap_or_default();
        self.go_on_at = (self.wanted.max(self.ordered) > PageCount(0)).then_some(now);
        outcomes
    }

    fn work(&mut self, now: Instant) -> Result<Option<Instant>, Trouble> {
        if self.go_on_at.is_none_or(|at| now < at) {
            return Ok(self.go_on_at);
        }
        self.go_on_at = None;
        let Some(machine) = self.memory.managed.as_mut().filter(|_| !self.is_migrating) else {
            return Ok(None);
        };
        let got = machine.reclaim(self.wanted.max(self.ordered).min(BITE), now).map_err(Self::trouble)?;
        // What a plan wants as well is taken once.
        self.wanted = self.wanted.saturating_sub(got.taken);
        // Where there is no more to be had now, an order is over: it is not kept for better times.
        self.ordered = if got.goes_on() { self.ordered.saturating_sub(got.taken) } else { PageCount(0) };
        // What left is no longer where the last look saw it.
        self.usage.resident = self.usage.resident.saturating_sub(got.taken);
        self.usage.elsewhere += got.taken;
        self.go_on_at = (got.goes_on() && self.wanted.max(self.ordered).0 > 0).then(|| now + PAUSE);
        self.short = got.short;
        Ok(self.go_on_at)
    }

    fn reclaim(&mut self, pages: PageCount, now: Instant) -> Done {
        if pages == PageCount(0) {
            // Also where nothing could be taken just now.
            self.ordered = pages;
        }
        let done = self.step(Step::Take { rung: Rung::Compress, pages, frees: pages.bytes() });
        if self.memory.managed.is_none() {
            return Done::Refused(Refused::NoSuchRung(Rung::Compress));
        }
        if done == Done::Begun {
            self.ordered = pages;
            self.go_on_at = Some(self.go_on_at.map_or(now, |at| at.min(now)));
        }
        done
    }

    fn news(&mut self) -> Option<Cooperation> {
        self.balloon.as_ref().and_then(Balloon::news)
    }

    fn farewell(&self) -> Option<Farewell> {
        self.balloon.as_ref().map(Balloon::farewell)
    }

    fn process(&self) -> Option<ProcessId> {
        Some(self.follower.held().process())
    }

    fn size(&self) -> Option<ByteCount> {
        Some(self.follower.dossier().size())
    }

    fn whereabouts(&self) -> Option<Whereabouts> {
        let Usage { resident, elsewhere } = self.usage;
        let (balloon, else_by) = self.seen().map(|seen| (seen.held, seen.else_by)).unwrap_or_default();
        let pages = Pages::outside(self.follower.dossier().size(), resident, elsewhere);
        Some(Whereabouts {
            plugged: self.seen().and_then(|seen| seen.plugged),
            seats: Vec::new(),
            pages: pages.given(balloon, self.memory.gone(), else_by),
            faults: self.memory.totals().refaults.0,
            chart: self.chart.clone()?,
        })
    }

    fn is_gone(&self) -> bool {
        self.follower.held().pidfd().is_alive().is_ok_and(|is_alive| !is_alive)
    }

    fn overhead(&mut self) -> Option<Overhead> {
        let dossier = self.follower.dossier();
        let is_guest =
            |one: &MeasuredMapping| dossier.ram.iter().any(|ram| ram.hva.overlaps(one.mapping.range));
        let tables = ByteCount(self.memory.managed.as_ref().map_or(0, KernelMachine::table_bytes) as u64);
        Some(Overhead { tables, ..measure(self.follower.held().process(), is_guest).ok()? })
    }
}

/// What has moved since the machine was observed last.
struct Tally {
    last: (Instant, Totals),
    /// What a guest waits for a page that comes back.
    back_ns: u64,
}

/// Pages that moved, and what its guest waited for them.
struct Moved {
    taken: PageCount,
    returned: PageCount,
    stalled: Ppm,
}

impl Tally {
    fn new(now: Instant) -> Self {
        let mut tally = Self { last: (now, Totals::default()), back_ns: 0 };
        tally.learn(&Costs::MEASURED);
        tally
    }

    const fn learn(&mut self, costs: &Costs) {
        self.back_ns = costs.of(Rung::Compress).back_ns;
    }

    /// The time processors of its own waited is not told outside: it is what came back, at what that costs. Nor is it known how many
    /// processors there are, or which waits overlap: one, and none.
    fn since(&mut self, totals: Totals, now: Instant) -> Moved {
        let (then, before) = std::mem::replace(&mut self.last, (now, totals));
        let returned = totals.refaults.saturating_sub(before.refaults);
        let elapsed = now.saturating_duration_since(then).as_nanos();
        let elapsed_ns = u64::try_from(elapsed).unwrap_or(u64::MAX);
        let stalled = Ppm::of(returned.0.saturating_mul(self.back_ns), elapsed_ns).min(Ppm::WHOLE);
        Moved { taken: totals.taken.saturating_sub(before.taken), returned, stalled }
    }
}

/// Whether asking again soon would be in vain.
const fn is_lasting(short: &Short) -> bool {
    matches!(
        short,
        Short::NoSwap
            | Short::SwapFull { .. }
            | Short::CgroupForbidsSwap { .. }
            | Short::CgroupSwapFull { .. }
            | Short::Refused(_)
    )
}

impl std::fmt::Debug for Attached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attached").field("machine", &self.follower.dossier().name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_policy::costs::Cost;

    #[test]
    fn a_guest_waits_for_what_came_back_since_at_what_that_is_said_to_cost() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut tally = Tally::new(start);
        let totals =
            |taken, back| Totals { taken: PageCount(taken), refaults: PageCount(back), ..Totals::default() };
        let moved = tally.since(totals(900, 500), start + second);
        assert_eq!((moved.taken, moved.returned), (PageCount(900), PageCount(500)));
        assert_eq!(moved.stalled, Ppm::of(500 * Costs::MEASURED.of(Rung::Compress).back_ns, 1_000_000_000));
        let mut costs = Costs::MEASURED;
        costs.0[Rung::Compress as usize] = Cost::new(13_500, 3_000, Ppm::percent(57));
        tally.learn(&costs);
        let moved = tally.since(totals(1000, 1500), start + second * 2);
        assert_eq!((moved.taken, moved.returned), (PageCount(100), PageCount(1000)));
        assert_eq!(moved.stalled, Ppm(3_000));
    }
}
