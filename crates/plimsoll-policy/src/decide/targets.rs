//! Aiming: what each machine is to come to.
//!
//! Enters: the machines that were seen. Leaves: entitlements and targets. Both sums are within the budget, unless more
//! is guaranteed than there is.
use super::look::Seen;
use super::{Findings, Host, PolicyState};
use crate::damper::{DEAD_BAND, Damper, Hold as Held, Urgent, Verdict, Way};
use crate::entitlement::{Bid, Shared, share_out};
use crate::host_state::{HostState, min_free};
use crate::plan::{Action, Position, Step};
use crate::reason::{self, Reason};
use crate::settings::Hold;
use crate::tree::{GroupIndex, Tree};
use alloc::vec;
use alloc::vec::Vec;
use plimsoll_types::PageCount;

/// What a machine is to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Aim {
    /// By the numbers of this moment.
    pub(crate) due: PageCount,
    /// Damped.
    pub(crate) target: PageCount,
}

impl Aim {
    /// What nothing is taken below: memory is moved only where the moment and the damped target agree.
    pub(crate) fn line(&self) -> PageCount {
        self.due.max(self.target)
    }
}

/// What all machines share: what they have and what is free, less what has to stay free. Measured, so that whatever
/// else uses the host's memory needs no estimate.
pub(crate) fn budget(host: &Host, seen: &[Seen<'_>]) -> PageCount {
    let used: PageCount = seen.iter().map(|machine| machine.view.consumed.pages_ceil()).sum();
    (used + host.free.pages_floor()).saturating_sub(min_free(host.total).pages_ceil())
}

/// What each machine would have a right to if all wanted all they may have, in the order of `seen`.
pub(crate) fn entitle(
    budget: PageCount,
    seen: &[Seen<'_>],
    tree: &Tree,
    findings: &mut Findings,
) -> Vec<PageCount> {
    let rights = |machine: &Seen<'_>| Bid {
        floor: machine.terms.floor,
        lift: machine.lift,
        cap: machine.terms.cap,
        active: machine.demand.active,
    };
    let shared = share_among(seen, tree, budget, rights);
    if shared.short > PageCount(0) {
        let (floors, budget, short) = (shared.floors.bytes(), budget.bytes(), shared.short.bytes());
        findings.note_host(Reason::Short { floors, budget, short });
    }
    seen.iter().map(|machine| shared.grants[machine.place]).collect()
}

/// Each machine's due and its damped target, in the order of `seen`.
pub(crate) fn aim(
    host: &Host,
    budget: PageCount,
    seen: &[Seen<'_>],
    state: &mut PolicyState,
    findings: &mut Findings,
) -> Vec<Aim> {
    let shared = share_among(seen, &state.tree, budget, wants);
    let dues: Vec<PageCount> = seen.iter().map(|machine| shared.grants[machine.place]).collect();
    let verdicts: Vec<Verdict> =
        seen.iter().zip(&dues).map(|(machine, due)| judge(host, machine, *due, state)).collect();
    let targets = settle(budget, seen, &dues, &verdicts, state);
    let mut aims = Vec::with_capacity(seen.len());
    for ((machine, verdict), (due, target)) in seen.iter().zip(verdicts).zip(dues.into_iter().zip(targets)) {
        let before = state.machines.get(&machine.id()).and_then(|known| known.damper.as_ref());
        let from = before.map(Damper::target);
        aims.push(Aim { due, target });
        if from != Some(target) {
            move_target(host, budget, machine, from, Aim { due, target }, state, findings);
        } else if let Some(hold) = held(verdict, due, target) {
            let (target, due) = (target.bytes(), due.bytes());
            findings.note(machine.id(), Reason::TargetHeld { target, due, hold });
        }
    }
    aims
}

/// Where each machine stands.
pub(crate) fn positions(seen: &[Seen<'_>], entitled: &[PageCount], aims: &[Aim]) -> Vec<Position> {
    let position = |((machine, entitlement), aim): ((&Seen<'_>, &PageCount), &Aim)| Position {
        machine: machine.id(),
        consumed: machine.view.consumed,
        active: machine.demand.active.bytes(),
        entitlement: entitlement.bytes(),
        target: aim.target.bytes(),
    };
    seen.iter().zip(entitled).zip(aims).map(position).collect()
}

fn share_among(seen: &[Seen<'_>], tree: &Tree, pages: PageCount, bid: impl Fn(&Seen<'_>) -> Bid) -> Shared {
    let mut bids = vec![Bid::default(); tree.machines.len()];
    seen.iter().for_each(|machine| bids[machine.place] = bid(machine));
    share_out(tree, pages, &bids)
}

/// Up to what it wants. What it is guaranteed and does not want is lent to the others; a quarter more than it wants is
/// not, so that it can grow into its guarantee without waiting for a decision.
fn wants(machine: &Seen<'_>) -> Bid {
    let (terms, demand) = (&machine.terms, &machine.demand);
    let floor = match terms.hold {
        Hold::Flexible => terms.floor.min(PageCount(demand.wanted.0 + demand.wanted.0 / 4)),
        Hold::Static | Hold::Dedicated => terms.floor,
    };
    Bid { floor, lift: machine.lift, cap: demand.wanted.max(floor), active: demand.active }
}

/// What to do with the target there is; `Stays` where there is none yet.
fn judge(host: &Host, machine: &Seen<'_>, due: PageCount, state: &PolicyState) -> Verdict {
    let known = state.machines.get(&machine.id()).and_then(|known| known.damper.as_ref());
    let Some(damper) = known else { return Verdict::Stays };
    // Not a matter of damping: it may not be below its guarantee nor above its limit.
    if damper.target() < machine.terms.floor.min(machine.demand.wanted) && due > damper.target() {
        return Verdict::Moves(Way::Up);
    }
    if damper.target() > machine.terms.cap {
        return Verdict::Moves(Way::Down);
    }
    let urgent = Urgent { up: machine.stalls, down: host.state >= HostState::Hard };
    damper.judge(due, urgent, host.now_ms)
}

/// Targets that are damped, and yet within the budget and within each group's limit.
///
/// Those that sink, and those that must rise, go where they are due. If what is held above its due then leaves
/// too little, it is held no longer: on the host, or in the group whose limit it is. What remains is for those that rise without
/// need, each in proportion.
fn settle(
    budget: PageCount,
    seen: &[Seen<'_>],
    dues: &[PageCount],
    verdicts: &[Verdict],
    state: &PolicyState,
) -> Vec<PageCount> {
    let before = |machine: &Seen<'_>| {
        state.machines.get(&machine.id()).and_then(|known| known.damper.as_ref()).map(Damper::target)
    };
    let must_rise = |machine: &Seen<'_>, target: PageCount| {
        machine.stalls || target < machine.terms.floor.min(machine.demand.wanted)
    };
    let mut targets = Vec::with_capacity(seen.len());
    let mut waiting = Vec::new();
    for (index, (machine, verdict)) in seen.iter().zip(verdicts).enumerate() {
        targets.push(match (before(machine), verdict) {
            (None, _) | (_, Verdict::Moves(Way::Down)) => dues[index],
            (Some(target), Verdict::Moves(Way::Up)) if must_rise(machine, target) => dues[index],
            (Some(target), Verdict::Moves(Way::Up)) => {
                waiting.push(index);
                target
            }
            (Some(target), Verdict::Stays | Verdict::Held(_)) => target,
        });
    }
    let around = |index: usize| state.tree.around(seen[index].place);
    let sums = |pages: &[PageCount]| {
        state.tree.sums(seen.iter().map(|machine| machine.place).zip(pages.iter().copied()))
    };
    let most = |group: GroupIndex| if group == 0 { budget } else { state.tree.groups[group].cap };
    let before = sums(&targets);
    let is_tight: Vec<bool> = before.into_iter().enumerate().map(|(group, sum)| sum > most(group)).collect();
    for (index, target) in targets.iter_mut().enumerate() {
        if around(index).any(|group| is_tight[group]) {
            *target = (*target).min(dues[index]);
        }
    }
    let room: Vec<PageCount> =
        sums(&targets).into_iter().enumerate().map(|(group, sum)| most(group).saturating_sub(sum)).collect();
    let mut missing = vec![PageCount(0); seen.len()];
    waiting.iter().for_each(|index| missing[*index] = dues[*index].saturating_sub(targets[*index]));
    let asked = sums(&missing);
    for index in waiting {
        // The least of what each group around it has room for: so no sum exceeds any of them.
        let raise = around(index).map(|group| part_of(missing[index], room[group], asked[group])).min();
        let raise = raise.unwrap_or_default();
        // A raise that is hardly one waits until it is worth making.
        if raise.0 > DEAD_BAND.apply(targets[index].0) {
            targets[index] += raise;
        }
    }
    targets
}

/// `amount`, or its part where all that is `asked` for is more than there is `room`.
fn part_of(amount: PageCount, room: PageCount, asked: PageCount) -> PageCount {
    if asked <= room {
        return amount;
    }
    let part = u128::from(amount.0) * u128::from(room.0) / u128::from(asked.0);
    PageCount(u64::try_from(part).unwrap_or(u64::MAX))
}

/// Why a target that is not due stands.
fn held(verdict: Verdict, due: PageCount, target: PageCount) -> Option<Held> {
    match verdict {
        _ if due == target => None,
        Verdict::Held(hold) => Some(hold),
        Verdict::Moves(_) => Some(Held::NoRoom),
        Verdict::Stays => None,
    }
}

fn move_target(
    host: &Host,
    budget: PageCount,
    machine: &Seen<'_>,
    from: Option<PageCount>,
    aim: Aim,
    state: &mut PolicyState,
    findings: &mut Findings,
) {
    let tax = state.tree.settings().tax.rate();
    let Some(known) = state.machines.get_mut(&machine.id()) else { return };
    match &mut known.damper {
        Some(damper) => damper.move_to(aim.target, host.now_ms),
        new => *new = Some(Damper::new(aim.target)),
    }
    let bounds = reason::Bounds {
        floor: machine.terms.floor.bytes(),
        lift: machine.lift.bytes(),
        cap: machine.terms.cap.bytes(),
        shares: machine.terms.shares,
    };
    let (to, due, budget) = (aim.target.bytes(), aim.due.bytes(), budget.bytes());
    let from = from.map_or(machine.view.consumed, PageCount::bytes);
    let reason = Reason::TargetMoved { from, to, due, need: machine.need(), bounds, budget, tax };
    findings.actions.push(Action { machine: machine.id(), step: Step::Target(to), reason });
}
