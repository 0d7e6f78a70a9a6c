//! One host, from midnight to the end.
//!
//! Enters: machines that were placed on it, the scenario. Leaves: a record. The loop is the daemon's: look, decide, do,
//! wait; only that what is waited for is simulated.
//!
//! # How long a step is
//!
//! The daemon decides every second, and so does this, while anything moves: while something that was asked for, 64 pages of a
//! machine or more, is not done, or a balloon leaves too little room. When nothing does, the policy is at a fixed point, which it
//! keeps on constant input, so deciding again brings nothing. Then the next decision is at the next event (a demand that
//! jumps, a restart), at most five minutes away, in which no smooth curve moves by more than 2 %, and never so far away
//! that on the way
//!
//! * so much is newly touched that the host's state would change, or
//! * a machine would wait for more than half of its objective.
//!
//! Half of the time is tried until that holds. For ten minutes after a machine has waited too long the steps are at most
//! ten seconds: what the policy remembers of it fades by the second, and ten is the most it takes for one step.
use crate::chance::below;
use crate::machine::{Begin, Class, Machine, NS, Wants};
use crate::placement::sentence;
use crate::record::{HostRecord, Stretch, Trouble, Watch};
use crate::scenario::Scenario;
use crate::time::Millis;
use plimsoll_policy::admission::{Capacity, admit};
use plimsoll_policy::host_state::HostState;
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::HostView;
use plimsoll_policy::{Plan, PolicyState, Ppm, Reason, Step, decide};
use plimsoll_types::{ByteCount, MachineId, PageCount};

/// How often is decided while anything moves: the daemon's period.
pub const SECOND: Millis = Millis(1000);
/// The longest step.
pub const LONGEST: Millis = Millis(300_000);
/// The longest step after a machine waited too long, and how long after.
const UNEASY: Millis = Millis(10_000);
const UNEASY_FOR: Millis = Millis(600_000);
/// How long a machine that was not let in waits until it asks again.
const ASK_AGAIN: Millis = Millis(10_000);

/// A machine that was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) id: MachineId,
    /// Its class's place in the scenario.
    pub(crate) class: usize,
}

/// Called after each decision with what was seen and what was decided; before the first, and where settings have changed since the
/// last, also with what it rests on.
pub type Witness<'a> = &'a mut dyn FnMut(Option<&PolicyState>, &HostView, &Plan);

struct Guest<'a> {
    machine: Machine<'a>,
    watch: Watch,
    shares_pages: bool,
}

/// A machine that does not run.
struct Absent<'a> {
    id: MachineId,
    class: &'a Class,
    from: Millis,
    /// It has a place in the tree.
    is_admitted: bool,
}

/// A host.
pub(crate) struct Host<'a> {
    scenario: &'a Scenario,
    capacity: Capacity,
    state: PolicyState,
    /// The witness does not know what decisions rest on now.
    is_changed: bool,
    guests: Vec<Guest<'a>>,
    absent: Vec<Absent<'a>>,
    /// When which machine stops, the last first.
    stops: Vec<(Millis, MachineId, Millis)>,
    view: HostView,
    wants: Vec<Wants>,
    now: Millis,
    overhead: ByteCount,
    /// Until when steps are short, because a machine waited too long.
    uneasy_until: Millis,
    record: HostRecord,
}

impl<'a> Host<'a> {
    pub(crate) fn new(scenario: &'a Scenario, index: usize, tree: Tree, placed: &[Placed]) -> Self {
        let mut record = HostRecord::new(index, scenario.classes.len(), scenario.duration);
        record.machines = placed.len() as u64;
        let mut stops = Vec::new();
        let absent = placed.iter().map(|placed| {
            let class = &scenario.classes[placed.class];
            record.classes[class.index].machines += 1;
            stops.extend(stops_of(scenario, placed));
            let within = scenario.placement.within.0 / 1000 + 1;
            let from = match class.begin {
                Begin::Booting => Millis(below(scenario.seed, placed.id.0.into(), within) * 1000),
                Begin::Running { at, .. } => at,
            };
            Absent { id: placed.id, class, from, is_admitted: true }
        });
        let absent: Vec<Absent<'_>> = absent.collect();
        record.sizes = tree.machines().map(|(_, terms)| terms.size.bytes()).sum();
        stops.sort_unstable_by(|one, other| other.cmp(one));
        Self {
            scenario,
            capacity: scenario.hosts.capacity,
            state: PolicyState::new(tree),
            is_changed: true,
            guests: Vec::with_capacity(placed.len()),
            absent,
            stops,
            view: HostView::of(
                0,
                scenario.hosts.capacity.total,
                ByteCount(0),
                Vec::with_capacity(placed.len()),
            ),
            wants: Vec::with_capacity(placed.len()),
            now: Millis(0),
            overhead: ByteCount(0),
            uneasy_until: Millis(0),
            record,
        }
    }

    /// Simulates it to the end.
    pub(crate) fn run(mut self, longest: Millis, witness: Witness<'_>) -> HostRecord {
        while self.now < self.scenario.duration {
            self.stop_and_start();
            self.look();
            let basis = std::mem::take(&mut self.is_changed).then(|| self.state.clone());
            let plan = decide(&self.view, &mut self.state);
            witness(basis.as_ref(), &self.view, &plan);
            self.note(&plan);
            self.obey(&plan);
            let end = self.next_decision(longest);
            self.pass(end);
        }
        for guest in &self.guests {
            self.record.close(&guest.watch, guest.machine.class);
        }
        self.record
    }

    fn used(&self) -> ByteCount {
        let consumed: ByteCount =
            self.guests.iter().map(|guest| guest.machine.consumed(&self.scenario.physics)).sum();
        self.capacity.own + self.overhead + consumed
    }

    fn free(&self) -> ByteCount {
        self.capacity.total.saturating_sub(self.used())
    }

    fn place_of(&self, id: MachineId) -> Result<usize, usize> {
        self.guests.binary_search_by_key(&id, |guest| guest.machine.id)
    }

    fn stop_and_start(&mut self) {
        while let Some((_, id, down)) = self.stops.pop_if(|(at, ..)| *at <= self.now) {
            self.stop(id, down);
        }
        let due = |absent: &mut Absent<'_>| absent.from <= self.now;
        let mut due: Vec<Absent<'a>> = self.absent.extract_if(.., due).collect();
        due.sort_unstable_by_key(|absent| absent.id);
        for absent in due {
            self.start(absent);
        }
    }

    fn stop(&mut self, id: MachineId, down: Millis) {
        let Ok(place) = self.place_of(id) else { return };
        let guest = self.guests.remove(place);
        self.record.close(&guest.watch, guest.machine.class);
        self.record.restarts += 1;
        self.overhead -= self.capacity.overheads.of(&guest.machine.terms);
        let mut settings = self.state.tree().settings().clone();
        settings.machines.retain(|machine| machine.id != id);
        // Fewer machines contradict nothing that more did not.
        if let Ok(tree) = Tree::new(settings) {
            self.settle(tree);
        }
        let from = Millis(self.now.0 + down.0);
        self.absent.push(Absent { id, class: guest.machine.class, from, is_admitted: false });
    }

    fn settle(&mut self, tree: Tree) {
        self.state.set_tree(tree);
        self.is_changed = true;
    }

    fn start(&mut self, absent: Absent<'a>) {
        let Absent { id, class, is_admitted, .. } = absent;
        let settings = class.settings(id);
        if !is_admitted {
            match admit(self.state.tree(), settings, &self.capacity) {
                Ok(tree) => self.settle(tree),
                Err(refused) => {
                    self.record.refusals += 1;
                    self.record.trouble(Trouble::Refused, self.now, Some((id, class)), || sentence(&refused));
                    let from = Millis(self.now.0 + ASK_AGAIN.0);
                    self.absent.push(Absent { from, ..absent });
                    return;
                }
            }
        }
        let (Some(terms), Err(place)) = (self.state.tree().terms(id).copied(), self.place_of(id)) else {
            return;
        };
        let machine = Machine::new(id, class, terms, self.scenario.seed, self.now);
        let shares_pages = self.state.tree().domain(id).is_some();
        self.overhead += self.capacity.overheads.of(&terms);
        self.guests.insert(place, Guest { machine, watch: Watch::default(), shares_pages });
    }

    fn look(&mut self) {
        let mut machines = std::mem::take(&mut self.view.machines);
        machines.clear();
        self.view = HostView::of(self.now.0, self.capacity.total, self.used(), machines);
        let Scenario { estimator, physics, .. } = self.scenario;
        for guest in &mut self.guests {
            let view = guest.machine.view(self.now, guest.shares_pages, estimator, physics);
            if view.stalled > guest.machine.terms.stall_objective {
                self.uneasy_until = Millis(self.now.0 + UNEASY_FOR.0);
            }
            self.view.machines.push(view);
        }
    }

    /// Writes down what the policy found.
    fn note(&mut self, plan: &Plan) {
        for (position, guest) in plan.machines.iter().zip(&mut self.guests) {
            let (id, class) = (guest.machine.id, guest.machine.class);
            self.record.target(&mut guest.watch, id, class, self.now, position.target.pages_floor());
        }
        for note in &plan.reasons {
            let Reason::StateChanged { room, .. } = note.reason else { continue };
            let trouble = match room.state {
                HostState::Hard => Trouble::Hard,
                HostState::Low => Trouble::Low,
                HostState::High | HostState::Clear | HostState::Soft => continue,
            };
            self.record.trouble(trouble, self.now, None, || note.reason.to_string());
        }
    }

    /// Has the machines do what the plan says. What an earlier plan asked for is asked for no longer.
    fn obey(&mut self, plan: &Plan) {
        self.guests.iter_mut().for_each(|guest| guest.machine.drop_orders());
        for action in &plan.actions {
            let Ok(place) = self.place_of(action.machine) else { continue };
            let machine = &mut self.guests[place].machine;
            match action.step {
                Step::Target(_) => {}
                Step::Take { rung, pages, .. } => machine.order(rung, pages),
                Step::Balloon(bytes) => machine.ask_balloon(bytes),
                Step::Stall => machine.stall(true),
                Step::Resume => machine.stall(false),
            }
        }
    }

    /// When to decide next: see the head of this file.
    fn next_decision(&self, longest: Millis) -> Millis {
        let second = Millis(self.now.0 + SECOND.0);
        if self.guests.iter().any(|guest| guest.machine.is_busy()) {
            return second;
        }
        let events = self.guests.iter().filter_map(|guest| guest.machine.next_event(self.now));
        let starts = self.absent.iter().map(|absent| absent.from);
        let stops = self.stops.last().map(|(at, ..)| *at);
        let event = events.chain(starts).chain(stops).min().unwrap_or(self.scenario.duration);
        let longest = if self.now < self.uneasy_until { longest.min(UNEASY) } else { longest };
        let mut step = longest.0.min(event.0.min(self.scenario.duration.0).saturating_sub(self.now.0));
        while step > SECOND.0 && !self.is_quiet(Millis(step)) {
            step /= 2;
        }
        // Whole seconds, and at least one.
        Millis(self.now.0 + (step / SECOND.0).max(1) * SECOND.0)
    }

    /// Whether nothing happens in the next step of that length that a decision would answer.
    fn is_quiet(&self, step: Millis) -> bool {
        let end = Millis(self.now.0 + step.0);
        let mut net = PageCount(0);
        for Guest { machine, .. } in &self.guests {
            let wants = machine.wants(end, step, &self.scenario.physics);
            let half = Ppm(machine.terms.stall_objective.0 / 2).apply(machine.time_ns(step));
            if wants.waits_ns > half || machine.is_squeezed(&wants) {
                return false;
            }
            net += wants.net;
        }
        let state = self.state.host_state();
        let left = self.view.free.saturating_sub(net.bytes());
        state.next(left, self.capacity.total) == state
    }

    /// Lets time pass: what was asked for is taken, balloons move, guests go on with what is free.
    fn pass(&mut self, end: Millis) {
        let physics = &self.scenario.physics;
        let time = Millis(end.0 - self.now.0);
        let mut budget_ns = time.0 * NS * physics.takers;
        // Another one is first each second.
        let first = usize::try_from(self.now.0 / 1000).unwrap_or(0) % self.guests.len().max(1);
        let (before, after) = self.guests.split_at_mut(first);
        for guest in after.iter_mut().chain(before) {
            budget_ns = guest.machine.take(budget_ns, physics);
        }
        self.wants.clear();
        for guest in &mut self.guests {
            guest.machine.move_balloon(time, physics);
            self.wants.push(guest.machine.wants(end, time, physics));
        }
        let grants = Grants::of(&self.guests, &self.wants, self.free(), self.scenario);
        let mut stretch = Stretch::default();
        for (guest, wants) in self.guests.iter_mut().zip(&self.wants) {
            let machine = &mut guest.machine;
            let spent = machine.pass(wants, grants.to(machine, wants, physics), time, physics);
            self.record.spent(&mut guest.watch, machine.id, machine.class, end, time, &spent);
            let consumed = machine.consumed(physics).pages_ceil();
            let (contents, active) = (machine.contents().pages_floor(), machine.demand(end).active);
            self.record.held(machine.class, time, consumed, contents, active);
            stretch.consumed += consumed;
            stretch.contents += contents;
            stretch.active += active;
            stretch.waited_ns += spent.waited_ns;
            stretch.ran_ns += spent.ran_ns;
        }
        stretch.free = self.free().pages_floor();
        self.record.step(self.now, end, self.state.host_state(), &stretch);
        self.now = end;
    }
}

/// What of the free memory goes to whom: first to those that want what they are guaranteed, then to the others, down to
/// half the line of low. Near its hard line the ledger, too, lets only those have memory that have less than their share.
struct Grants {
    guaranteed: (PageCount, PageCount),
    beyond: (PageCount, PageCount),
}

impl Grants {
    fn of(guests: &[Guest<'_>], wants: &[Wants], free: ByteCount, scenario: &Scenario) -> Self {
        let (mut guaranteed, mut beyond) = (PageCount(0), PageCount(0));
        let mut free = free.pages_floor();
        for (guest, wants) in guests.iter().zip(wants) {
            if guest.machine.is_refused_nothing() {
                free = free.saturating_sub(wants.net);
                continue;
            }
            let within = guest.machine.guaranteed(wants, &scenario.physics);
            guaranteed += within;
            if !guest.machine.must_wait() {
                beyond += wants.net.saturating_sub(within);
            }
        }
        let kept = PageCount(HostState::Low.line(scenario.hosts.capacity.total).pages_floor().0 / 2);
        let left = free.saturating_sub(guaranteed + kept);
        Self { guaranteed: (free.min(guaranteed), guaranteed), beyond: (left.min(beyond), beyond) }
    }

    fn to(&self, machine: &Machine<'_>, wants: &Wants, physics: &crate::machine::Physics) -> PageCount {
        let part = |amount: PageCount, (part, whole): (PageCount, PageCount)| {
            let product = (u128::from(amount.0) * u128::from(part.0)).checked_div(u128::from(whole.0));
            PageCount(product.and_then(|pages| u64::try_from(pages).ok()).unwrap_or(0))
        };
        if machine.is_refused_nothing() {
            return wants.net;
        }
        let within = machine.guaranteed(wants, physics);
        let granted = part(within, self.guaranteed);
        if machine.must_wait() {
            return granted;
        }
        granted + part(wants.net.saturating_sub(within), self.beyond)
    }
}

/// When a machine is stopped, and for how long.
fn stops_of<'a>(
    scenario: &'a Scenario,
    placed: &'a Placed,
) -> impl Iterator<Item = (Millis, MachineId, Millis)> {
    let of_class = scenario.restarts.iter().filter(|restart| restart.class == placed.class);
    of_class.enumerate().filter_map(|(which, restart)| {
        let chance = |of: u64, end| below(scenario.seed ^ 0x5bd1, (u64::from(placed.id.0) << 8) + of, end);
        let which = which as u64 * 2;
        let is_met = chance(which, Ppm::WHOLE.0.into()) < restart.share.0.into();
        let at = restart.at.0 + chance(which + 1, restart.within.0 / 1000 + 1) * 1000;
        is_met.then_some((Millis(at), placed.id, restart.down))
    })
}
