//! Moving: memory is freed first and granted second.
//!
//! Enters: machines and what they are to come to. Leaves: actions. What is taken never brings a machine below the
//! larger of its due and its target; what is granted is free already, down to a line that is not touched.
use super::limits::{self, Above, excess};
use super::look::Seen;
use super::targets::Aim;
use super::{Findings, Host, PolicyState, Remembered};
use crate::auction::{Bidder, IdleTax, auction};
use crate::balloon::Standing;
use crate::costs::{Costs, Squeeze};
use crate::host_state::{HostState, min_free};
use crate::ladder::{Offers, Rung, Rungs, Taking, climb};
use crate::part::Ppm;
use crate::plan::{Action, Step};
use crate::reason::{Reason, Room};
use crate::tree::Tree;
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, PageCount};

/// Has those give who have more than they are to have.
pub(crate) fn take(
    host: &Host,
    seen: &[Seen<'_>],
    aims: &[Aim],
    state: &mut PolicyState,
    findings: &mut Findings,
) {
    let above = limits::above(seen, aims, state);
    for ((machine, aim), above) in seen.iter().zip(aims).zip(above) {
        let Some(known) = state.machines.get_mut(&machine.id()) else { continue };
        let excess = excess(machine, aim.line());
        stall_or_resume(host, machine, aim, excess, known, findings);
        withdraw_from(machine, known, host, findings);
        ease(host, machine, aim, known, findings);
        let means = Means::of(machine, known, &state.tree);
        let Some(Climbed { highest, takings, left }) = reach(host, excess, above, &means, known, findings)
        else {
            continue;
        };
        // What is free in the guest and goes first is not the balloon's to bring.
        let mut before = ByteCount(0);
        for taking in takings {
            match taking.rung {
                Rung::Balloon => {
                    let taking = Taking { frees: before + taking.frees, ..taking };
                    grow_balloon(host, machine, aim, taking, known, findings);
                }
                _ => take_on(host, machine, aim, taking, means.returns, findings),
            }
            before += taking.frees;
        }
        if left > ByteCount(0) {
            let (target, highest) = (aim.target.bytes(), Some(highest));
            findings.note(machine.id(), Reason::Uncovered { left, target, highest });
        }
    }
}

/// The ways to take memory from a machine, and what they cost it.
pub(crate) struct Means<'a> {
    machine: &'a Seen<'a>,
    rungs: Rungs,
    costs: Costs,
    returns: Ppm,
}

/// What is taken, up to which rung, and what of it nothing frees.
pub(crate) struct Climbed {
    highest: Rung,
    takings: Vec<Taking>,
    pub(crate) left: ByteCount,
}

impl<'a> Means<'a> {
    pub(crate) fn of(machine: &'a Seen<'a>, known: &Remembered, tree: &Tree) -> Self {
        let mut rungs = machine.view.rungs;
        if tree.domain(machine.id()).is_none() {
            rungs = rungs.without(Rung::Sharing);
        }
        if machine.balloon != Some(Standing::Cooperative) {
            rungs = rungs.without(Rung::Balloon);
        }
        Self { machine, rungs, costs: tree.settings().costs, returns: known.usage.returns() }
    }

    /// Takes so much on the rungs up to that one.
    pub(crate) fn climb(&self, asked: ByteCount, highest: Rung) -> Climbed {
        let (squeeze, offers) = (squeeze(self.machine, asked), offers(self.machine));
        let (takings, left) = climb(squeeze, offers, self.rungs.up_to(highest), &self.costs, self.returns);
        Climbed { highest, takings, left }
    }
}

/// What is taken now. The excess goes as far as the host's state lets it; unless that frees less than the machine is to
/// give for a limit, which goes as far as its settings let it, however much is free.
///
/// The rungs of the one are among those of the other. So a limit is kept in every state, and no sliver above it spares a
/// machine what a host that is short wants of it: whichever of the two frees more is taken.
fn reach(
    host: &Host,
    excess: ByteCount,
    above: Above,
    means: &Means<'_>,
    known: &mut Remembered,
    findings: &mut Findings,
) -> Option<Climbed> {
    let machine = means.machine;
    let limited = above.asked(known, host.now_ms);
    let highest = machine.terms.highest;
    let deepest = host.state.deepest().map(|deepest| deepest.min(highest));
    let asked = bite(host, machine, excess, known);
    let by_state = deepest.filter(|_| asked > ByteCount(0)).map(|deepest| means.climb(asked, deepest));
    let freed = by_state.as_ref().map_or(ByteCount(0), |climbed| asked.saturating_sub(climbed.left));
    let limited = bite(host, machine, limited, known);
    if freed < limited && deepest < Some(highest) {
        findings.note(machine.id(), Reason::AboveLimit { above: above.most, group: above.group });
        return Some(means.climb(limited, highest));
    }
    by_state
}

/// What of the excess is asked for now. What the guest has free goes whole; of the rest a machine that stalls gives a
/// part, unless the host itself is at its end.
fn bite(host: &Host, machine: &Seen<'_>, excess: ByteCount, known: &Remembered) -> ByteCount {
    let appetite = if host.state == HostState::Low { Ppm::WHOLE } else { known.stall.appetite() };
    let free = excess.min(machine.view.reported_free);
    free + ByteCount(appetite.apply(excess.saturating_sub(free).0))
}

fn squeeze(machine: &Seen<'_>, asked: ByteCount) -> Squeeze {
    let (view, active) = (machine.view, machine.demand.active.bytes());
    Squeeze { asked, consumed: view.consumed, stored: view.stored, active }
}

fn offers(machine: &Seen<'_>) -> Offers {
    let view = machine.view;
    let fixed = view.stored + view.pinned + view.reported_free;
    Offers {
        guest_free: view.reported_free,
        mergeable: view.mergeable,
        movable: view.consumed.saturating_sub(fixed),
        stored: view.stored,
    }
}

/// What reclaim works towards.
fn goal(host: &Host) -> Room {
    host.room(min_free(host.total))
}

fn take_on(
    host: &Host,
    machine: &Seen<'_>,
    aim: &Aim,
    taking: Taking,
    returns: Ppm,
    findings: &mut Findings,
) {
    let Taking { rung, frees, pages, price_ns, choice } = taking;
    let (need, target, room) = (machine.need(), aim.target.bytes(), goal(host));
    let reason = Reason::Taken { need, target, rung, price_ns, returns, choice, room };
    findings.actions.push(Action { machine: machine.id(), step: Step::Take { rung, pages, frees }, reason });
}

/// Asks the balloon for what brings the machine down by what is to be freed. What its guest has never touched it would bring
/// first, and that frees nothing: so it is asked to leave the guest no more than the machine is to have.
fn grow_balloon(
    host: &Host,
    machine: &Seen<'_>,
    aim: &Aim,
    taking: Taking,
    known: &mut Remembered,
    findings: &mut Findings,
) {
    let (Some(from), Some(balloon)) = (machine.view.balloon, &mut known.balloon) else { return };
    let left = machine.view.consumed.saturating_sub(taking.frees).max(machine.kept().bytes());
    let to = machine.terms.size.bytes().saturating_sub(left);
    // Pages, as every balloon counts.
    let to = to.pages_floor().bytes();
    if to <= from || to == balloon.asked() {
        return;
    }
    balloon.ask(to, from);
    let (target, appetite, room) = (aim.target.bytes(), known.stall.appetite(), goal(host));
    let reason = Reason::BalloonGrows { from, to, target, appetite, choice: taking.choice, room };
    findings.actions.push(Action { machine: machine.id(), step: Step::Balloon(to), reason });
}

/// A balloon that does not do what it is asked is asked to stay as it is.
fn withdraw_from(machine: &Seen<'_>, known: &mut Remembered, host: &Host, findings: &mut Findings) {
    let (Some(held), Some(balloon)) = (machine.view.balloon, &mut known.balloon) else { return };
    let standing = Standing::Uncooperative;
    if machine.balloon != Some(standing) || balloon.asked() == held {
        return;
    }
    let (asked, still_ms) = (balloon.asked(), balloon.still_ms(host.now_ms));
    balloon.ask(held, held);
    let reason = Reason::BalloonStuck { standing, asked, held, still_ms };
    findings.actions.push(Action { machine: machine.id(), step: Step::Balloon(held), reason });
}

/// A balloon that is still on its way to more than it is to hold now is stopped where that is. It holds nothing it has
/// to give back, so nothing has to be free for it.
fn ease(host: &Host, machine: &Seen<'_>, aim: &Aim, known: &mut Remembered, findings: &mut Findings) {
    let (Some(held), Some(balloon)) = (machine.view.balloon, &mut known.balloon) else { return };
    let kept = aim.line().max(machine.kept());
    let most = machine.terms.size.saturating_sub(kept).bytes().max(held);
    let from = balloon.asked();
    if from <= most {
        return;
    }
    balloon.ask(most, held);
    let (target, room) = (aim.target.bytes(), goal(host));
    let reason = Reason::BalloonShrinks { from, to: most, target, room };
    findings.actions.push(Action { machine: machine.id(), step: Step::Balloon(most), reason });
}

fn stall_or_resume(
    host: &Host,
    machine: &Seen<'_>,
    aim: &Aim,
    excess: ByteCount,
    known: &mut Remembered,
    findings: &mut Findings,
) {
    let must_stall = host.state == HostState::Low && excess > ByteCount(0);
    if must_stall == known.is_stalled {
        return;
    }
    known.is_stalled = must_stall;
    let (consumed, target) = (machine.view.consumed, aim.target.bytes());
    let room = host.room(HostState::Low.line(host.total));
    let (step, reason) = if must_stall {
        (Step::Stall, Reason::Stalled { consumed, target, room })
    } else {
        (Step::Resume, Reason::Resumed { consumed, target, room })
    };
    findings.actions.push(Action { machine: machine.id(), step, reason });
}

/// A balloon that is to give back.
struct Claim<'a> {
    machine: &'a Seen<'a>,
    aim: &'a Aim,
    held: ByteCount,
    /// What it is to give back: of that, up to the guarantee, and beyond.
    guaranteed: PageCount,
    beyond: PageCount,
}

impl<'a> Claim<'a> {
    fn of(machine: &'a Seen<'a>, aim: &'a Aim) -> Option<Self> {
        let held = machine.view.balloon?;
        let has = machine.terms.size.saturating_sub(held.pages_floor());
        let kept = machine.kept();
        let guaranteed = kept.saturating_sub(has);
        let beyond = aim.line().saturating_sub(has.max(kept));
        (guaranteed + beyond > PageCount(0)).then_some(Self { machine, aim, held, guaranteed, beyond })
    }

    const fn bidder(&self, cap: PageCount) -> Bidder {
        Bidder { floor: PageCount(0), cap, active: cap, shares: self.machine.terms.shares.0 }
    }
}

/// Grants those who have less than they are to have what is free: what they are guaranteed down to the line of the
/// state low, what is beyond down to that of soft. Who has a balloon waits for it; the others simply use more.
pub(crate) fn give(
    host: &Host,
    seen: &[Seen<'_>],
    aims: &[Aim],
    state: &mut PolicyState,
    findings: &mut Findings,
) {
    // What was granted and has not arrived yet is free no more.
    let owed = |machine: &Seen<'_>| {
        let asked = state.machines.get(&machine.id())?.balloon.as_ref()?.asked();
        Some(machine.view.balloon?.saturating_sub(asked))
    };
    let (mut claims, mut promised) = (Vec::new(), ByteCount(0));
    for (machine, aim) in seen.iter().zip(aims) {
        match Claim::of(machine, aim) {
            Some(claim) => claims.push(claim),
            None => promised += owed(machine).unwrap_or_default(),
        }
    }
    let free = host.free.saturating_sub(promised);
    let above = |line: HostState| free.saturating_sub(line.line(host.total)).pages_floor();
    let grant = |room: PageCount, cap: fn(&Claim<'_>) -> PageCount| {
        let bidders: Vec<Bidder> = claims.iter().map(|claim| claim.bidder(cap(claim))).collect();
        auction(room, &bidders, IdleTax::NONE).grants
    };
    let guaranteed = grant(above(HostState::Low), |claim| claim.guaranteed);
    let room = above(HostState::Soft).saturating_sub(guaranteed.iter().copied().sum());
    let beyond = grant(room, |claim| claim.beyond);
    for ((claim, guaranteed), beyond) in claims.iter().zip(guaranteed).zip(beyond) {
        let (granted, target) = (guaranteed + beyond, claim.aim.target.bytes());
        let waits = (claim.guaranteed + claim.beyond).saturating_sub(granted).bytes();
        let id = claim.machine.id();
        if waits > ByteCount(0) {
            let room = host.room(HostState::Soft.line(host.total));
            findings.note(id, Reason::WaitsForFree { waits, target, room });
        }
        let Some(balloon) = state.machines.get_mut(&id).and_then(|known| known.balloon.as_mut()) else {
            continue;
        };
        let to = claim.held.saturating_sub(granted.bytes());
        if to >= claim.held || to == balloon.asked() {
            continue;
        }
        balloon.ask(to, claim.held);
        let room = host.room(HostState::Soft.line(host.total));
        let reason = Reason::BalloonShrinks { from: claim.held, to, target, room };
        findings.actions.push(Action { machine: id, step: Step::Balloon(to), reason });
    }
}
