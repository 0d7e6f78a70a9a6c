//! How much each guest is to have: `plimsoll_policy::decide`, as on Linux and in the simulator.
//!
//! Enters: settings; views that others saw; once a second what this host counts. Leaves: decisions, each a line of the report, and what
//! they ask for: targets in the ledger, pages to be taken. What must never happen: a decision that rests on anything but what its line
//! says, since others make it again from that.
use crate::console::say;
use crate::guest::{Guest, State};
use crate::host::Host;
use crate::wire::{Decision, Given, Line};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use core::fmt;
use plimsoll_core::word::StateKind;
use plimsoll_policy::view::{HostView, MachineView, Phase, Reading};
use plimsoll_policy::{Plan, PolicyState, Ppm, Rung, Rungs, Step, decide};
use plimsoll_types::{ByteCount, MachineId, PageCount};

/// How often is decided: as often as the daemon does.
const PERIOD_MS: u64 = 1000;
/// Heap for what is decided by, beside its text: a view, a plan and their line at a time. 64 machines have 100 KiB of them.
const HEAP: ByteCount = ByteCount::mib(2);

/// What is decided by cannot be used.
#[derive(Debug)]
pub enum PolicyError {
    /// A line is none of [`Given`].
    Line {
        /// Which, from 1.
        number: usize,
        /// What is wrong with it.
        why: String,
    },
    /// A view before any settings.
    NoSettings,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { number, why } => write!(
                f,
                "line {number} of what is to be decided by is not what it should be ({why}); was it written by the same version of plimsoll?"
            ),
            Self::NoSettings => {
                f.write_str("views are to be decided about and there are no settings; give them first")
            }
        }
    }
}

/// What deciding takes of the heap.
pub fn heap_bytes(policy: &str) -> ByteCount {
    // The text is kept until it is read. What it says of settings is as large again, and hardly larger.
    if policy.is_empty() { ByteCount(0) } else { ByteCount(HEAP.0 + 2 * policy.len() as u64) }
}

/// What has been counted of a guest.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    taken: u64,
    returned: u64,
    stalled: u64,
}

impl Counters {
    fn of(guest: &Guest) -> Self {
        let done = &guest.paged.done;
        Self { taken: done.stored, returned: done.returned, stalled: guest.times.stalled }
    }
}

/// Who decides.
pub struct Decider {
    state: PolicyState,
    ticks_per_ms: u64,
    /// When it decided last, in ticks.
    last: u64,
    due: u64,
    before: BTreeMap<MachineId, Counters>,
}

impl Decider {
    /// Takes settings in and decides about what others saw. `None` if nothing is to be decided.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn of(policy: &str, tsc_hz: u64) -> Result<Option<Self>, PolicyError> {
        let mut state: Option<PolicyState> = None;
        for (line, number) in policy.lines().zip(1..) {
            let given = serde_json::from_str(line)
                .map_err(|error| PolicyError::Line { number, why: error.to_string() })?;
            match (given, &mut state) {
                (Given::Settings(given), Some(state)) => state.set_tree(given.tree().clone()),
                (Given::Settings(given), none) => *none = Some(*given),
                (Given::View(view), Some(state)) => {
                    let plan = decide(&view, state);
                    report(*view, plan);
                }
                (Given::View(_), None) => return Err(PolicyError::NoSettings),
            }
        }
        let new = |state| Self {
            state,
            ticks_per_ms: (tsc_hz / 1000).max(1),
            last: 0,
            due: 0,
            before: BTreeMap::new(),
        };
        Ok(state.map(new))
    }

    /// What the host shows of itself.
    fn look(&mut self, host: &Host, now: u64) -> HostView {
        let elapsed = now.saturating_sub(self.last);
        let running = host.guests.iter().filter(|guest| !matches!(guest.state, State::Ended(_)));
        let machines = running.map(|guest| {
            let counters = Counters::of(guest);
            let before = self.before.insert(guest.id, counters).unwrap_or(counters);
            look_at(host, guest, (before, counters), elapsed)
        });
        let machines = machines.collect();
        let memory = host.pool.memory.borrow();
        let (total, used) = (memory.total().bytes(), memory.used().bytes());
        HostView::of(now / self.ticks_per_ms, total, used, machines)
    }
}

/// A guest's part of the store, by the number of its pages there, as on Linux.
fn stored(host: &Host, guest: &Guest) -> ByteCount {
    let stats = host.pool.store.stats();
    let pages = guest.paged.pages(StateKind::Stored);
    let part =
        u128::from(stats.held().0) * u128::from(pages.0) / u128::from(stats.pages.0.max(pages.0).max(1));
    ByteCount(u64::try_from(part).unwrap_or(u64::MAX))
}

fn look_at(host: &Host, guest: &Guest, (before, now): (Counters, Counters), elapsed: u64) -> MachineView {
    let paged = &guest.paged;
    let stored = stored(host, guest);
    let is_kept = paged.pages(StateKind::NeverPage) == paged.size();
    MachineView {
        phase: if guest.is_filled() { Phase::Running } else { Phase::Starting },
        stored,
        // What a device reaches, and what is never taken because the hypervisor writes it, or tables name it.
        pinned: (paged.pages(StateKind::Pinned) + paged.pages(StateKind::NeverPage)).bytes(),
        active: paged.working_set().map(|pages| Reading::of(pages.bytes(), 0)),
        taken: PageCount(now.taken - before.taken),
        returned: PageCount(now.returned - before.returned),
        stalled: Ppm::of((now.stalled - before.stalled).min(elapsed), elapsed),
        rungs: if is_kept { Rungs::NONE } else { Rungs::NONE.with(Rung::Compress) },
        ..MachineView::new(guest.id, (paged.resident() + paged.limbo()).bytes() + stored)
    }
}

fn report(view: HostView, plan: Plan) {
    match serde_json::to_string(&Line::Decision(Box::new(Decision { view, plan }))) {
        Ok(text) => say!("{text}"),
        Err(error) => say!("a decision cannot be written: {error}"),
    }
}

impl Host {
    /// Decides, if it is time, and begins what is decided.
    pub fn decide(&mut self, now: u64) {
        let Some(mut decider) = self.decider.take_if(|decider| decider.due <= now) else { return };
        let view = decider.look(self, now);
        let plan = decide(&view, &mut decider.state);
        self.obey(&plan);
        report(view, plan);
        (decider.last, decider.due) = (now, now + PERIOD_MS * decider.ticks_per_ms);
        self.decider = Some(decider);
    }

    /// Has guests come to their targets, and takes what is to be taken at once. What an earlier decision asked for and was not done yet
    /// is not to be done any more, except for targets, which stand.
    fn obey(&mut self, plan: &Plan) {
        self.guests.iter_mut().for_each(|guest| guest.ordered = PageCount(0));
        for position in &plan.machines {
            let Some(guest) = self.guests.iter().find(|guest| guest.id == position.machine) else { continue };
            // What is left of a target for pages in RAM: the rest of it is taken up by those in the store, of which there may be more
            // than when the target was set.
            let in_ram = position.target.saturating_sub(stored(self, guest));
            // The ledger is ours and knows these machines.
            let _ = self.ledger.set_target(position.machine, Some(in_ram));
        }
        for action in &plan.actions {
            let Some(guest) = self.guests.iter_mut().find(|guest| guest.id == action.machine) else {
                continue;
            };
            match action.step {
                Step::Take { rung: Rung::Compress, pages, .. } => guest.ordered = pages,
                // Targets are above. The ledger has whoever is above its own wait for the others; nobody here has a balloon, or another
                // rung.
                Step::Target(_) | Step::Stall | Step::Resume | Step::Balloon(_) | Step::Take { .. } => {}
            }
        }
    }
}
