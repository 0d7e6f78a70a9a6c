//! The control loop: observe, decide, apply; about once a second, more rarely while nothing happens, and at once when something hard
//! does.
//!
//! Enters: machines behind [`Backend`]s, the memory they share, settings, and the time, which whoever runs the loop brings.
//! Leaves: [`Turn`]s, which say what was seen, decided and done. All of it runs on the caller's thread. What must never happen:
//!
//! * a machine that cannot be looked at, or shows nonsense, keeping the others from their decision: it is left out, and that
//!   is said once;
//! * a step applied to a machine that the decision did not see;
//! * a clock that jumps making the loop wait for it, or hurry.
//!
//! [`run()`] is the loop itself over a real clock; tests call [`Control::turn`] with whatever time they like.
mod pace;
mod pool;
mod run;

pub use pool::Pool;
pub use run::{Happened, RunError, Stirred, Wakers, host_pressure, run};

use self::pace::Pace;
use crate::backend::balloon::Farewell;
use crate::backend::{Backend, Cooperation, Departure, Done, Kind, Overhead, Refused, Trouble, Whereabouts};
use crate::trace::{Basis, Recorder, Tick, TraceError};
use plimsoll_policy::admission::{Account, AdmissionError, Capacity, Overheads, admit};
use plimsoll_policy::host_state::{HostState, min_free};
use plimsoll_policy::settings::{MachineSettings, Settings, SettingsError};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{HostView, MachineView};
use plimsoll_policy::{Plan, PolicyState, Rungs, Step, decide};
use plimsoll_sys::ProcessId;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How often is decided, unless nothing happens at all.
pub const PERIOD: Duration = Duration::from_secs(1);
/// How often a machine's overhead is measured at most, and of how many a turn, where turns are a second apart: walking the page tables of one takes milliseconds, and
/// a thousand at once kept the loop from its decisions for seconds.
const MEASURED_EVERY: Duration = Duration::from_secs(10);
const MEASURED_MAX: usize = 16;
/// How often that of a machine that takes up what it did when it was measured last.
const MEASURED_AGAIN: Duration = Duration::from_secs(600);

/// How long VMMs that do not answer may keep a loop that ends: less than whoever ends it waits before it kills.
const PARTING: Duration = Duration::from_secs(20);

/// What became of one step of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whose.
    pub machine: MachineId,
    /// What was to be done.
    pub step: Step,
    /// What became of it.
    pub done: Done,
}

/// Something an operator should hear, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A machine is no longer managed.
    Left {
        /// Its name.
        name: String,
        /// Whose its memory was.
        kind: Kind,
        /// Why.
        why: Trouble,
    },
    /// A machine is left out for now.
    LeftOut {
        /// Its name.
        name: String,
        /// Why.
        why: Trouble,
    },
    /// It is looked at again.
    Back {
        /// Its name.
        name: String,
    },
    /// What was to be done to a machine is not done.
    Refused {
        /// Its name.
        name: String,
        /// Why.
        why: Refused,
    },
    /// A machine's own interface failed for good, so that it is managed without its balloon, or works again.
    Cooperation {
        /// Its name.
        name: String,
        /// Which of the two.
        change: Cooperation,
    },
    /// Nothing is recorded any more.
    NotRecorded(String),
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Left { name, why, .. } => write!(f, "{name} is no longer managed: {why}"),
            Self::LeftOut { name, why } => write!(f, "{name} is left out for now: {why}"),
            Self::Back { name } => write!(f, "{name} is managed again"),
            Self::Refused { name, why } => write!(f, "{name} does not do what it is asked: {why}"),
            Self::Cooperation { name, change: Cooperation::Lost { why, .. } } => {
                write!(f, "{name} is managed without its balloon from now on: {why}")
            }
            Self::Cooperation { name, change: Cooperation::Restored { .. } } => {
                write!(f, "the balloon of {name} can be asked again")
            }
            Self::NotRecorded(why) => write!(f, "nothing is recorded any more: {why}"),
        }
    }
}

/// One turn of the loop.
#[derive(Clone, Debug)]
pub struct Turn {
    /// What was seen.
    pub view: HostView,
    /// What was decided.
    pub plan: Plan,
    /// What became of it.
    pub outcomes: Vec<Outcome>,
    /// What an operator should hear.
    pub events: Vec<Event>,
    /// Whether this was the first turn since something hard happened, and what.
    pub hurry: Option<Hurry>,
}

/// Why a turn does not wait for the second to pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hurry {
    /// The memory that machines share is nearly used up.
    Short,
    /// Tasks of this host wait for memory, says the kernel.
    Pressure,
    /// A machine came.
    Came,
    /// A machine went.
    Went,
    /// An operator said something else.
    Told,
}

/// Settings of a whole host cannot be put in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SettleError {
    /// They contradict each other.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// They promise what the host has not.
    #[error("{missing} are missing: {account}: reserve less, or make room")]
    NoRoom {
        /// How much.
        missing: ByteCount,
        /// How loaded the host would be.
        account: Account,
    },
}

/// A machine and what was said about it.
struct Member {
    name: String,
    backend: Box<dyn Backend>,
    trouble: Option<Trouble>,
    refused: Option<Refused>,
    /// Nothing is taken from it for now.
    is_paused: bool,
    /// As last measured.
    overhead: Option<Overhead>,
    /// When that was measured, and what it took up then.
    measured: Option<(Instant, ByteCount)>,
    /// As last seen.
    consumed: ByteCount,
}

impl Member {
    fn berth(&self) -> Berth {
        Berth {
            name: self.name.clone(),
            kind: self.backend.kind(),
            process: self.backend.process(),
            size: self.backend.size(),
            is_paused: self.is_paused,
            departure: self.backend.departure(),
            trouble: self.trouble.clone(),
            refused: self.refused.clone(),
            whereabouts: self.backend.whereabouts(),
        }
    }
}

/// A machine of the loop, besides what is seen of it.
#[derive(Clone, Debug)]
pub struct Berth {
    /// Its name.
    pub name: String,
    /// Whose its memory is.
    pub kind: Kind,
    /// Its VMM.
    pub process: Option<ProcessId>,
    /// The RAM its guest owns, as far as that is seen.
    pub size: Option<ByteCount>,
    /// Nothing is taken from it for now.
    pub is_paused: bool,
    /// How far giving it back has come.
    pub departure: Departure,
    /// Why it is left out, if it is.
    pub trouble: Option<Trouble>,
    /// What it does not do of what it is asked.
    pub refused: Option<Refused>,
    /// Where its pages are.
    pub whereabouts: Option<Whereabouts>,
}

/// The control loop of one host.
pub struct Control {
    policy: PolicyState,
    pool: Pool,
    /// What the host and its manager use themselves, for admission.
    own: ByteCount,
    members: BTreeMap<MachineId, Member>,
    /// Of machines that went, as far as they have not come.
    farewells: Vec<Farewell>,
    next_id: u32,
    epoch: Instant,
    due: Instant,
    pace: Pace,
    hurry: Option<Hurry>,
    recorder: Option<Recorder>,
    /// Whether names or settings have changed since they were recorded.
    is_changed: bool,
}

impl Control {
    /// A host with its groups. Machines come later, one by one; those in `settings` are not taken over.
    ///
    /// # Errors
    /// Contradictions among the groups.
    pub fn new(settings: Settings, pool: Pool, own: ByteCount, now: Instant) -> Result<Self, SettingsError> {
        let policy = PolicyState::new(Tree::new(Settings { machines: Vec::new(), ..settings })?);
        let (members, farewells, recorder) = (BTreeMap::new(), Vec::new(), None);
        Ok(Self {
            policy,
            pool,
            own,
            members,
            farewells,
            next_id: 1,
            epoch: now,
            due: now,
            pace: Pace::new(now),
            hurry: None,
            recorder,
            is_changed: true,
        })
    }

    /// Has every turn from now on recorded.
    pub fn record(&mut self, recorder: Recorder) {
        self.recorder = Some(recorder);
        self.is_changed = true;
    }

    /// Closes the record in good order.
    ///
    /// # Errors
    /// When what was written last cannot be brought to the file.
    pub fn finish(mut self) -> Result<(), TraceError> {
        self.recorder.take().map_or(Ok(()), Recorder::finish)
    }

    /// Takes a machine in, if the host can keep its word to all. The id in `settings` is replaced by the next free one.
    ///
    /// # Errors
    /// The contradiction, or the arithmetic. The back end is given up then.
    pub fn admit(
        &mut self,
        name: &str,
        settings: MachineSettings,
        backend: Box<dyn Backend>,
    ) -> Result<MachineId, AdmissionError> {
        let id = MachineId(self.next_id);
        let (total, own, overheads) = (self.pool.total(), self.own, backend.predicted());
        let host = Capacity { total, own, overheads };
        let tree = admit(self.policy.tree(), MachineSettings { id, ..settings }, &host)?;
        self.policy.set_tree(tree);
        self.next_id += 1;
        let (trouble, refused, overhead, measured) = (None, None, None, None);
        let (name, is_paused, consumed) = (name.to_owned(), false, ByteCount(0));
        let member = Member { name, backend, trouble, refused, is_paused, overhead, measured, consumed };
        self.members.insert(id, member);
        self.is_changed = true;
        self.hurry = self.hurry.or(Some(Hurry::Came));
        Ok(id)
    }

    /// Lets a machine go. Nothing of ours remains with it, from the farewell on if there is one; nobody waits for that here.
    pub fn release(&mut self, id: MachineId) -> Option<Farewell> {
        let farewell = self.members.remove(&id)?.backend.farewell();
        self.farewells.retain(|farewell| !farewell.has_come());
        self.farewells.extend(farewell.clone());
        let mut settings = self.policy.tree().settings().clone();
        settings.machines.retain(|machine| machine.id != id);
        // Less is promised than before, so nothing can contradict it.
        if let Ok(tree) = Tree::new(settings) {
            self.policy.set_tree(tree);
        }
        self.is_changed = true;
        self.hurry = self.hurry.or(Some(Hurry::Went));
        farewell
    }

    /// Begins to give a machine of our own pager back to its VMM; it goes from here when that is done.
    ///
    /// # Errors
    /// Why that cannot be, in words; nothing was begun.
    pub fn give_back(&mut self, id: MachineId) -> Result<(), String> {
        let total = self.pool.total();
        let member = self.members.get_mut(&id).ok_or_else(|| "it is not managed any more".to_owned())?;
        member.backend.give_back(total)?;
        self.told();
        Ok(())
    }

    /// Puts other settings of a machine in force, if the host can keep its word to all. Those of a machine that is not there
    /// change nothing.
    ///
    /// # Errors
    /// The contradiction, or the arithmetic. What was in force stays.
    pub fn change(&mut self, settings: MachineSettings) -> Result<(), AdmissionError> {
        let Some(member) = self.members.get(&settings.id) else { return Ok(()) };
        let host =
            Capacity { total: self.pool.total(), own: self.own, overheads: member.backend.predicted() };
        let mut others = self.policy.tree().settings().clone();
        others.machines.retain(|machine| machine.id != settings.id);
        let others = Tree::new(others).map_err(AdmissionError::Settings)?;
        self.policy.set_tree(admit(&others, settings, &host)?);
        self.told();
        Ok(())
    }

    /// Puts other settings of the host, its groups and all its machines in force, or none of them. Machines that are not named are let
    /// go.
    ///
    /// # Errors
    /// The contradiction, or the arithmetic where the host could keep its word less than now. What was in force stays.
    pub fn settle(&mut self, settings: Settings) -> Result<(), SettleError> {
        let mut wanted = settings;
        wanted.machines.retain(|machine| self.members.contains_key(&machine.id));
        let tree = Tree::new(wanted)?;
        let (before, after) = (self.account(self.policy.tree()), self.account(&tree));
        let beyond = |account: &Account| {
            let promised = account.kept_free + account.own + account.reserved + account.overhead;
            promised.saturating_sub(account.total)
        };
        if beyond(&after) > beyond(&before) {
            return Err(SettleError::NoRoom { missing: beyond(&after), account: after });
        }
        let leaving: Vec<MachineId> =
            self.members.keys().filter(|id| tree.terms(**id).is_none()).copied().collect();
        self.pool.set_total(tree.settings().capacity);
        self.policy.set_tree(tree);
        leaving.into_iter().for_each(|id| drop(self.release(id)));
        self.told();
        Ok(())
    }

    /// What settings promise, each machine with what one of its kind costs.
    fn account(&self, tree: &Tree) -> Account {
        let overhead = tree.machines().filter_map(|(id, terms)| {
            self.members.get(&id).map(|member| member.backend.predicted().of(terms))
        });
        let total = tree.settings().capacity;
        Account {
            total,
            kept_free: min_free(total),
            own: self.own,
            reserved: tree.reserved(),
            overhead: overhead.sum(),
            machines: tree.machines().count(),
        }
    }

    /// Machines share so much from now on.
    ///
    /// # Errors
    /// When more is reserved. What was in force stays.
    pub fn set_total(&mut self, total: ByteCount) -> Result<(), SettingsError> {
        let settings = self.policy.tree().settings().clone();
        let tree = Tree::new(Settings { capacity: total, ..settings })?;
        self.policy.set_tree(tree);
        self.pool.set_total(total);
        self.told();
        Ok(())
    }

    /// Takes nothing from a machine until it is told otherwise; what its balloon holds may still be given back.
    pub fn pause(&mut self, id: MachineId, is_paused: bool, now: Instant) {
        if let Some(member) = self.members.get_mut(&id) {
            member.is_paused = is_paused;
            member.backend.hold(is_paused);
            if is_paused {
                let _ = member.backend.reclaim(PageCount(0), now);
            }
            self.told();
        }
    }

    /// Has so much taken from a machine, once, whatever its target, but nothing of what is guaranteed to it.
    pub fn reclaim(&mut self, id: MachineId, pages: PageCount, now: Instant) -> Done {
        let refused = |why: String| Done::Refused(Refused::Short(why));
        let floor = self.tree().terms(id).map(|terms| terms.floor).unwrap_or_default();
        let Some(member) = self.members.get_mut(&id) else {
            return refused("it is not managed any more".to_owned());
        };
        let above = member.consumed.pages_floor().saturating_sub(floor);
        if above == PageCount(0) {
            return refused(format!(
                "it takes up {}, and {} are guaranteed to it",
                member.consumed,
                floor.bytes()
            ));
        }
        let done = member.backend.reclaim(pages.min(above), now);
        self.hurry = self.hurry.or(Some(Hurry::Told));
        done
    }

    fn told(&mut self) {
        self.is_changed = true;
        self.hurry = self.hurry.or(Some(Hurry::Told));
    }

    /// The settings in force.
    pub const fn tree(&self) -> &Tree {
        self.policy.tree()
    }

    /// The machines by id, with their names.
    pub fn names(&self) -> impl Iterator<Item = (MachineId, &str)> {
        self.members.iter().map(|(id, member)| (*id, &*member.name))
    }

    /// What is known of a machine besides what is seen.
    pub fn berth(&self, id: MachineId) -> Option<Berth> {
        self.members.get(&id).map(Member::berth)
    }

    /// The machines by id, with what is known of each besides what is seen.
    pub fn berths(&self) -> BTreeMap<MachineId, Berth> {
        self.members.iter().map(|(id, member)| (*id, member.berth())).collect()
    }

    /// What of the memory is not for machines.
    pub const fn own(&self) -> ByteCount {
        self.own
    }

    /// What machines of the kind of each cost, as predicted, and what it was last measured to cost.
    pub fn overheads(&self) -> impl Iterator<Item = (MachineId, Overheads, Option<Overhead>)> {
        self.members.iter().map(|(id, member)| (*id, member.backend.predicted(), member.overhead))
    }

    /// When the next regular turn is due, or something that was begun wants to go on.
    pub const fn due(&self) -> Instant {
        self.due
    }

    /// Whether something hard has happened since the last turn, which the next should not wait for. A few system calls.
    pub fn hurry(&mut self) -> Option<Hurry> {
        let is_gone = |member: &Member| member.trouble.is_none() && member.backend.is_gone();
        if self.hurry.is_none() && self.members.values().any(is_gone) {
            self.hurry = Some(Hurry::Went);
        }
        let before = self.policy.host_state();
        if self.hurry.is_none() && before < HostState::Hard {
            // What machines have grown by since the last turn only a meter tells.
            let (total, (free, _)) = (self.pool.total(), self.pool.room(ByteCount(0)));
            self.hurry = (before.next(free, total) >= HostState::Hard).then_some(Hurry::Short);
        }
        self.hurry
    }

    /// The kernel says that tasks wait for memory.
    pub fn pressed(&mut self) {
        self.hurry = self.hurry.or(Some(Hurry::Pressure));
    }

    /// Whether nothing has happened for a while, on a host with room.
    pub(crate) const fn is_calm(&self) -> bool {
        self.pace.is_calm()
    }

    /// Whether anything may have happened to any machine since it was observed.
    pub(crate) fn may_have_changed(&self) -> bool {
        self.members.values().any(|member| member.backend.may_have_changed())
    }

    /// Goes on with what was begun. Says when to come again for that.
    pub fn work(&mut self, now: Instant) -> Option<Instant> {
        let mut next = None;
        if self.pace.is_to_ask(now) && self.may_have_changed() {
            self.pace.stir();
            self.due = now;
        }
        for member in self.members.values_mut().filter(|member| member.trouble.is_none()) {
            // What is wrong with it shows when it is looked at.
            let at = member.backend.work(now).ok().flatten();
            next = [next, at].into_iter().flatten().min();
        }
        next
    }

    /// Observes, decides and applies.
    pub fn turn(&mut self, now: Instant) -> Turn {
        let mut events = Vec::new();
        let machines = self.observe(now, &mut events);
        let consumed = machines.iter().map(|machine| machine.consumed.0).fold(0, u64::saturating_add);
        let now_ms = u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX);
        let (free, overdrawn) = self.pool.room(ByteCount(consumed));
        let view = HostView { now_ms, total: self.pool.total(), free, overdrawn, machines };
        self.begin_record(&mut events);
        let plan = decide(&view, &mut self.policy);
        let outcomes = self.apply(&view, &plan, now, &mut events);
        let hurry = self.hurry.take();
        let is_in_motion = hurry.is_some() || self.may_have_changed();
        self.due = self.pace.turned(now, &view, &plan, is_in_motion);
        let mut turn = Turn { view, plan, outcomes, events, hurry };
        self.measure(now);
        self.record_turn(&mut turn);
        turn
    }

    /// Looks at all machines. Those that are gone are let go.
    fn observe(&mut self, now: Instant, events: &mut Vec<Event>) -> Vec<MachineView> {
        let (mut views, mut gone) = (Vec::with_capacity(self.members.len()), Vec::new());
        let costs = &self.policy.tree().settings().costs;
        for (id, member) in &mut self.members {
            member.backend.learn(costs);
            match member.backend.observe(*id, now) {
                Ok(mut view) => {
                    member.consumed = view.consumed;
                    if member.is_paused {
                        view.rungs = Rungs::NONE;
                    }
                    if member.trouble.take().is_some() {
                        events.push(Event::Back { name: member.name.clone() });
                    }
                    if let Some(change) = member.backend.news() {
                        events.push(Event::Cooperation { name: member.name.clone(), change });
                    }
                    views.push(view);
                }
                Err(why @ (Trouble::Gone(_) | Trouble::GivenBack)) => {
                    events.push(Event::Left { name: member.name.clone(), kind: member.backend.kind(), why });
                    gone.push(*id);
                }
                Err(why) => {
                    if member.trouble.as_ref() != Some(&why) {
                        events.push(Event::LeftOut { name: member.name.clone(), why: why.clone() });
                    }
                    member.trouble = Some(why);
                }
            }
        }
        gone.into_iter().for_each(|id| drop(self.release(id)));
        views
    }

    /// Has each machine that was seen do what the plan says, in the plan's order: whoever gives comes before whoever gets.
    fn apply(&mut self, view: &HostView, plan: &Plan, now: Instant, events: &mut Vec<Event>) -> Vec<Outcome> {
        let mut steps: BTreeMap<MachineId, Vec<Step>> =
            view.machines.iter().map(|machine| (machine.id, Vec::new())).collect();
        let mut order = Vec::with_capacity(steps.len());
        for action in &plan.actions {
            if let Some(steps) = steps.get_mut(&action.machine) {
                if steps.is_empty() {
                    order.push(action.machine);
                }
                steps.push(action.step);
            }
        }
        let busy: BTreeSet<MachineId> = order.iter().copied().collect();
        order.extend(steps.keys().filter(|id| !busy.contains(id)));
        let mut outcomes = Vec::new();
        for id in order {
            let (Some(member), Some(steps)) = (self.members.get_mut(&id), steps.get(&id)) else { continue };
            let done = member.backend.apply(steps, now);
            let refused = done.iter().find_map(|done| match done {
                Done::Refused(why) => Some(why.clone()),
                Done::Begun => None,
            });
            if let (Some(why), true) = (&refused, refused != member.refused) {
                events.push(Event::Refused { name: member.name.clone(), why: why.clone() });
            }
            // Asked for nothing, it has refused nothing, but may be about to again.
            if refused.is_some() || !steps.is_empty() {
                member.refused = refused;
            }
            let done = steps.iter().copied().zip(done);
            outcomes.extend(done.map(|(step, done)| Outcome { machine: id, step, done }));
        }
        outcomes
    }

    fn measure(&mut self, now: Instant) {
        let is_due = |member: &&mut Member| {
            member.measured.is_none_or(|(at, consumed)| {
                let every = if consumed == member.consumed { MEASURED_AGAIN } else { MEASURED_EVERY };
                now.saturating_duration_since(at) >= every
            })
        };
        let mut due: Vec<&mut Member> = self.members.values_mut().filter(is_due).collect();
        // Whoever was measured longest ago goes first, and before those whoever never was.
        due.sort_by_key(|member| member.measured);
        // No more a second than at any other time.
        for member in due.into_iter().take(MEASURED_MAX / self.pace.periods() as usize) {
            (member.measured, member.overhead) = (Some((now, member.consumed)), member.backend.overhead());
        }
    }

    /// Before a decision: what it rests on, where that has changed.
    fn begin_record(&mut self, events: &mut Vec<Event>) {
        let Some(recorder) = self.recorder.as_mut().filter(|_| self.is_changed) else { return };
        let name = |(id, member): (&MachineId, &Member)| (*id, member.name.clone());
        let (state, names) = (self.policy.clone(), self.members.iter().map(name).collect());
        self.is_changed = false;
        if let Err(error) = recorder.settings(&Basis { state, names, own: self.own }) {
            self.recorder = None;
            events.push(Event::NotRecorded(plimsoll_linux::explain(&error)));
        }
    }

    /// A turn as it is recorded.
    pub fn tick(&self, turn: &Turn) -> Tick {
        let overheads = self.members.iter().filter_map(|(id, member)| {
            let predicted = member.backend.predicted().of(self.policy.tree().terms(*id)?);
            Some((*id, (predicted, member.overhead?)))
        });
        Tick {
            view: turn.view.clone(),
            plan: turn.plan.clone(),
            outcomes: turn.outcomes.clone(),
            overheads: overheads.collect(),
        }
    }

    fn record_turn(&mut self, turn: &mut Turn) {
        if self.recorder.is_none() {
            return;
        }
        let tick = self.tick(turn);
        let Some(recorder) = &mut self.recorder else { return };
        if let Err(error) = recorder.tick(&tick) {
            self.recorder = None;
            turn.events.push(Event::NotRecorded(plimsoll_linux::explain(&error)));
        }
    }
}

impl Drop for Control {
    /// Lets all machines go, and waits until nothing of ours remains with any, all of them together no longer than `PARTING`.
    fn drop(&mut self) {
        let due = Instant::now() + PARTING;
        let ids: Vec<MachineId> = self.members.keys().copied().collect();
        ids.into_iter().for_each(|id| drop(self.release(id)));
        self.farewells.iter().for_each(|farewell| farewell.wait(due));
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("policy", &self.policy).finish_non_exhaustive()
    }
}
