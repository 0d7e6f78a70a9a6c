//! What size each machine should have been.
//!
//! Enters: a record. Leaves: for each machine a guarantee and a limit by what it was seen to use, how sure that is, and what
//! would have become of the same demand under the advice. What must never happen: advice without the record it was checked
//! on.
//!
//! The guarantee is what the machine uses half of the time, so that the other half is met from what others have idle; the limit
//! is what it uses 99 % of the time and a fifth more, Hyper-V's buffer. A machine that has used so much for `n` independent
//! minutes uses more than its largest minute at most one time in a hundred with a certainty of `1 - 0.99^n` (order
//! statistics, whatever the distribution): an hour gives 45 %, five hours 95 %.
use crate::trace::{Record, Tick, TraceError};
use plimsoll_policy::settings::{BUFFER_USUAL, Face, Settings, SettingsError};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{HostView, MachineView, Reading};
use plimsoll_policy::{PolicyState, Ppm, Rung, Step, decide};
use plimsoll_types::{ByteCount, MachineId};
use serde::Serialize;
use std::collections::BTreeMap;

/// Sizes are advised in multiples of this.
const STEP: ByteCount = ByteCount::mib(16);
/// Samples closer than this are of one working set: ESX's sample period.
const INDEPENDENT_MS: u64 = 60_000;

/// Advice for one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// Its name.
    pub name: String,
    /// What it has: guarantee and limit.
    pub now: Span,
    /// What it should have; the same where it is not to be changed.
    pub advised: Span,
    /// What it used half of the time, and 99 % of the time.
    pub used: Span,
    /// How sure it is that it uses more than its most only one time in a hundred.
    pub certainty: Ppm,
}

/// Two sizes, the smaller first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Span {
    /// The guarantee, or the usual.
    pub low: ByteCount,
    /// The limit, or the most.
    pub high: ByteCount,
}

/// What becomes of a recorded demand under some settings, simulated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Fate {
    /// The share of all machines' time that they wait for pages.
    pub stalled: Ppm,
    /// Decisions at which a machine had less than it is guaranteed and used more.
    pub violations: u64,
    /// Memory moved.
    pub moved: ByteCount,
}

/// Advice for a host.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Decisions in the record.
    pub decisions: u64,
    /// How long it is, in seconds.
    pub seconds: u64,
    /// By machine.
    pub machines: Vec<Advice>,
    /// The demand under the settings as they are.
    pub before: Fate,
    /// The same under the advice; in words why it cannot be followed as a whole.
    pub after: Result<Fate, String>,
    /// What guests' limits add up to, now and as advised.
    pub limits: (ByteCount, ByteCount),
}

/// There is no advice.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdviseError {
    /// The record cannot be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// It is empty.
    #[error("the record holds no decision: let `plimsoll manage --record` run for some minutes at least")]
    Empty,
}

/// Advises by a record. One that is cut off serves as far as it goes.
///
/// # Errors
/// [`AdviseError`].
pub fn advise(records: impl Iterator<Item = Result<Record, TraceError>>) -> Result<Report, AdviseError> {
    let (mut ticks, mut basis) = (Vec::new(), None);
    for record in records {
        match record {
            Ok(Record::Settings(last)) => basis = Some(last),
            Ok(Record::Tick(tick)) => ticks.push(*tick),
            Err(TraceError::Truncated { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (Some(basis), Some(first), Some(last)) = (basis, ticks.first(), ticks.last()) else {
        return Err(AdviseError::Empty);
    };
    let settings = basis.state.tree().settings();
    let names: BTreeMap<MachineId, String> = basis.names.into_iter().collect();
    let mut advised = settings.clone();
    let mut machines = Vec::new();
    for machine in &mut advised.machines {
        let Some(used) = used(machine.id, &ticks) else { continue };
        let name = names.get(&machine.id).cloned().unwrap_or_else(|| machine.id.to_string());
        let now = span_of(machine.face);
        machine.face = fitted(machine.face, used.span);
        let advised = span_of(machine.face);
        let certainty = certainty(used.minutes);
        machines.push(Advice { name, now, advised, used: used.span, certainty });
    }
    let limits = |settings: &Settings| settings.machines.iter().map(|one| span_of(one.face).high).sum();
    let limits = (limits(settings), limits(&advised));
    let tree = |settings: Settings| Tree::new(settings);
    let before = tree(settings.clone()).map(|tree| simulate(&ticks, tree)).unwrap_or_default();
    let after =
        tree(advised).map(|tree| simulate(&ticks, tree)).map_err(|error: SettingsError| error.to_string());
    let seconds = last.view.now_ms.saturating_sub(first.view.now_ms) / 1000;
    let decisions = ticks.len() as u64;
    Ok(Report { decisions, seconds, machines, before, after, limits })
}

/// What a machine was seen to use.
struct Used {
    span: Span,
    minutes: u32,
}

fn used(id: MachineId, ticks: &[Tick]) -> Option<Used> {
    let mut seen = Vec::new();
    let (mut minutes, mut counted_ms) = (0, None);
    for tick in ticks {
        let Some(position) = tick.plan.machines.iter().find(|machine| machine.machine == id) else {
            continue;
        };
        // Until it was sampled a machine is taken to use all it has, which tells nothing of what it uses.
        if tick.view.machines.iter().any(|machine| machine.id == id && machine.active.is_none()) {
            continue;
        }
        let now_ms = tick.view.now_ms;
        if counted_ms.is_none_or(|at| now_ms >= at + INDEPENDENT_MS) {
            (minutes, counted_ms) = (minutes + 1, Some(now_ms));
        }
        seen.push(position.active);
    }
    seen.sort_unstable();
    let at =
        |percent: usize| seen.get((seen.len() * percent / 100).min(seen.len().saturating_sub(1))).copied();
    Some(Used { span: Span { low: at(50)?, high: at(99)? }, minutes })
}

/// `1 - 0.99^n`, in millionths.
fn certainty(minutes: u32) -> Ppm {
    let mut rest = u64::from(Ppm::WHOLE.0);
    for _ in 0..minutes {
        rest = rest * 99 / 100;
    }
    Ppm(Ppm::WHOLE.0 - u32::try_from(rest).unwrap_or(Ppm::WHOLE.0))
}

const fn span_of(face: Face) -> Span {
    match face {
        Face::Guarantee { reservation, limit, .. } => Span { low: reservation, high: limit },
        Face::Dynamic { minimum, maximum, .. } => Span { low: minimum, high: maximum },
        Face::Static { size } | Face::Dedicated { size } => Span { low: size, high: size },
    }
}

/// The face with what a use asks for. What is to have all its memory always keeps it.
fn fitted(face: Face, used: Span) -> Face {
    let stepped = |bytes: u64| ByteCount(bytes.div_ceil(STEP.0) * STEP.0);
    let low = stepped(used.low.0);
    let high = stepped(used.high.0 + BUFFER_USUAL.apply(used.high.0)).max(low);
    match face {
        Face::Guarantee { size, shares, .. } => {
            let limit = high.min(size);
            Face::Guarantee { size, reservation: low.min(limit), limit, shares }
        }
        Face::Dynamic { startup, buffer, weight, .. } => {
            let maximum = high.max(startup);
            Face::Dynamic { startup, minimum: low.min(startup), maximum, buffer, weight }
        }
        Face::Static { .. } | Face::Dedicated { .. } => face,
    }
}

/// The recorded demand under settings: each machine touches what it was seen to use, has what it is left, and waits for what
/// is missing. What is taken frees memory at once; so what is compared are the settings, not the back ends.
fn simulate(ticks: &[Tick], tree: Tree) -> Fate {
    // What a guest waits for a page that was missing, by the settings on record.
    let back_ns = tree.settings().costs.of(Rung::Compress).back_ns;
    let mut state = PolicyState::new(tree);
    let mut held: BTreeMap<MachineId, u64> = BTreeMap::new();
    let (mut waited_ns, mut time_ns, mut fate) = (0_u128, 0_u128, Fate::default());
    let mut before_ms = None;
    for tick in ticks {
        let elapsed_ns =
            u128::from(tick.view.now_ms - before_ms.unwrap_or(tick.view.now_ms).min(tick.view.now_ms))
                * 1_000_000;
        before_ms = Some(tick.view.now_ms);
        let recorded: u64 = tick.view.machines.iter().map(|machine| machine.consumed.0).sum();
        let pool = (recorded + tick.view.free.0).saturating_sub(tick.view.overdrawn.0);
        let mut machines = Vec::with_capacity(tick.view.machines.len());
        let is_here: Vec<MachineId> = tick.plan.machines.iter().map(|machine| machine.machine).collect();
        held.retain(|id, _| is_here.contains(id));
        for seen in &tick.plan.machines {
            let Some(terms) = state.tree().terms(seen.machine) else { continue };
            let (floor, cap) = (terms.floor.bytes().0, terms.cap.bytes().0);
            let used: u64 = held.values().sum();
            let free = pool.saturating_sub(used);
            let has = held.entry(seen.machine).or_insert_with(|| seen.consumed.0.min(cap).min(free));
            let missing = seen.active.0.saturating_sub(*has);
            let got = missing.min(free).min(cap.saturating_sub(*has));
            let returned = ByteCount(missing).pages_ceil();
            let stalled_ns = u128::from(returned.0) * u128::from(back_ns);
            let stalled_ns = stalled_ns.min(elapsed_ns);
            fate.violations += u64::from(*has < floor && missing > got);
            fate.moved += ByteCount(got);
            *has += got;
            waited_ns += stalled_ns;
            time_ns += elapsed_ns;
            let recorded = tick.view.machines.iter().find(|machine| machine.id == seen.machine);
            let narrow = |ns: u128| u64::try_from(ns).unwrap_or(u64::MAX);
            machines.push(MachineView {
                active: Some(Reading::of(seen.active, 0)),
                stalled: Ppm::of(narrow(stalled_ns), narrow(elapsed_ns)),
                rungs: recorded.map(|machine| machine.rungs.without(Rung::Balloon)).unwrap_or_default(),
                ..MachineView::new(seen.machine, ByteCount(*has))
            });
        }
        let (pool, used) = (ByteCount(pool), ByteCount(held.values().sum()));
        let view =
            HostView { total: tick.view.total, ..HostView::of(tick.view.now_ms, pool, used, machines) };
        for action in decide(&view, &mut state).actions {
            if let (Step::Take { frees, .. }, Some(has)) = (action.step, held.get_mut(&action.machine)) {
                *has = has.saturating_sub(frees.0);
                fate.moved += frees;
            }
        }
    }
    let part = u32::try_from((waited_ns * u128::from(Ppm::WHOLE.0)).checked_div(time_ns).unwrap_or(0));
    Fate { stalled: Ppm(part.unwrap_or(u32::MAX)), ..fate }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "by {} decisions in {} s", self.decisions, self.seconds)?;
        writeln!(
            f,
            "{:<20} {:>17} {:>17} {:>17} {:>9}",
            "machine", "used 50 % / 99 %", "has", "should have", "certainty"
        )?;
        for Advice { name, now, advised, used, certainty } in &self.machines {
            let span = |span: &Span| format!("{} / {}", span.low, span.high);
            let (used, now, advised) = (span(used), span(now), span(advised));
            let percent = format!("{} %", certainty.0 / 10_000);
            writeln!(f, "{name:<20.20} {used:>17} {now:>17} {advised:>17} {percent:>9}")?;
        }
        let (now, advised) = self.limits;
        writeln!(f, "limits add up to {now}, as advised to {advised}")?;
        let fate = |fate: &Fate| {
            format!(
                "{} of the time waited, {} guarantees violated, {} moved",
                fate.stalled, fate.violations, fate.moved
            )
        };
        writeln!(f, "the same demand as it is:   {}", fate(&self.before))?;
        match &self.after {
            Ok(after) => writeln!(f, "                as advised: {}", fate(after)),
            Err(why) => writeln!(f, "the advice cannot be followed as a whole: {why}"),
        }
    }
}
