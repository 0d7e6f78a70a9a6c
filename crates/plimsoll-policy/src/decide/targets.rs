//! Aiming: what each machine is to come to.
//!
//! Enters: the machines that were seen. Leaves: entitlements and targets. Both sums are within the budget, unless more
//! is guaranteed than there is.
use super::limits;
use super::look::Seen;
use super::{Findings, Host, PolicyState};
use crate::auction::PAGES_MAX;
use crate::damper::{DEAD_BAND, Damper, Hold as Held, Urgent, Verdict, Way};
use crate::entitlement::{Bid, Shared, share_out};
use crate::host_state::{HostState, min_free};
use crate::plan::{Action, Position, Step};
use crate::reason::{self, Reason};
use crate::settings::Hold;
use crate::tree::{GroupIndex, Tree};
use crate::view::HostView;
use alloc::vec;
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, PageCount};

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

/// What all machines share: what they have and what is free, less what they have too much and what has to stay free.
/// Measured, so that whatever else uses the host's memory needs no estimate. What a machine is said to have that cannot be
/// decided about is not the others' to give back.
pub(crate) fn budget(host: &Host, view: &HostView, seen: &[Seen<'_>]) -> PageCount {
    let used: PageCount = seen.iter().map(|machine| machine.view.consumed.pages_ceil()).sum();
    let shown = view.machines.iter().map(|machine| machine.consumed.0).fold(0, u64::saturating_add);
    let unseen = ByteCount(shown).saturating_sub(used.bytes());
    let overdrawn = host.overdrawn.saturating_sub(unseen).pages_ceil();
    (used + host.free.pages_floor()).saturating_sub(min_free(host.total).pages_ceil() + overdrawn)
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
    let targets = settle(host, budget, seen, &dues, &verdicts, state);
    let mut aims = Vec::with_capacity(seen.len());
    for ((machine, verdict), (due, target)) in seen.iter().zip(verdicts).zip(dues.into_iter().zip(targets)) {
        let before = state.machines.get(&machine.id()).and_then(|known| known.damper.as_ref());
        let from = before.map(Damper::target);
        let verdict = turned(verdict, before, host.now_ms);
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

/// What a machine's target may do, all other machines' apart.
struct Move {
    /// Where it goes, but for raises.
    to: PageCount,
    /// What it is held at as long as anybody else can give way.
    least: PageCount,
    /// What it is raised by at once, because it stalls.
    urgent: PageCount,
    /// What it is raised by where that is worth it.
    raise: PageCount,
}

impl Move {
    fn of(
        host: &Host,
        machine: &Seen<'_>,
        due: PageCount,
        verdict: Verdict,
        damper: Option<&Damper>,
    ) -> Self {
        let stays = |to, least| Self { to, least, urgent: PageCount(0), raise: PageCount(0) };
        let Some(damper) = damper else { return stays(due, PageCount(0)) };
        let (target, most) = (damper.target(), damper.most(host.now_ms));
        // A limit is no matter of damping, and nor is a guarantee (see `judge`), nor anything at the end of the host: what is
        // held above its due is not taken, and there is nothing else left to live on.
        let held = if host.state == HostState::Low { PageCount(0) } else { damper.least(host.now_ms) };
        let least = held.min(machine.terms.cap);
        let kept = machine.terms.floor.min(machine.demand.wanted).min(due);
        match verdict {
            Verdict::Moves(Way::Down) => stays(due.max(least), least),
            Verdict::Moves(Way::Up) => {
                let to = target.max(kept);
                let rest = due.min(most).saturating_sub(to);
                let (urgent, raise) =
                    if machine.stalls { (rest, PageCount(0)) } else { (PageCount(0), rest) };
                Self { to, least, urgent, raise }
            }
            Verdict::Stays | Verdict::Held(_) => stays(target, least),
        }
    }
}

/// Targets that are damped, and yet within the budget and within each group's limit.
///
/// If what is held above its due leaves too little, for what is held elsewhere or for those who stall, it gives way: on the
/// host, or in the group whose limit it is, all of it by the same part, and no further than is needed. What has just risen is
/// held longest, since it would move back and forth: whoever is to rise waits for it, and it gives way only where nothing else
/// is left to. What remains of what has been there for a while is for those that rise, those who stall first, each in proportion.
///
/// So it does where a group takes up more than its limit and could not come down to it: a machine is taken to its due or its
/// target, whichever is more, and where one is held while another one is due more these sum to more than the limit.
fn settle(
    host: &Host,
    budget: PageCount,
    seen: &[Seen<'_>],
    dues: &[PageCount],
    verdicts: &[Verdict],
    state: &PolicyState,
) -> Vec<PageCount> {
    let move_of = |((machine, due), verdict): ((&Seen<'_>, &PageCount), &Verdict)| {
        let damper = state.machines.get(&machine.id()).and_then(|known| known.damper.as_ref());
        Move::of(host, machine, *due, *verdict, damper)
    };
    let mut moves: Vec<Move> = seen.iter().zip(dues).zip(verdicts).map(move_of).collect();
    let places = seen.iter().map(|machine| machine.place).collect();
    let held = |index: usize, one: &Move| dues[index].max(one.least);
    // Limits first: what is given for one counts for the host.
    let mut sums = Sums { tree: &state.tree, budget: PAGES_MAX, places };
    if let Some(stays) = limits::stays(seen, dues, state) {
        let stay = |index: usize, one: &Move| stays[index].at(one.to.max(dues[index]));
        let beyond =
            |index: usize, one: &Move, least| stay(index, one).saturating_sub(stays[index].at(least));
        let lower = |index: usize, to, by| stays[index].lower(to, by);
        sums.give_way(&mut moves, |index, one| beyond(index, one, held(index, one)), stay, lower);
        sums.give_way(&mut moves, |index, one| beyond(index, one, dues[index]), stay, lower);
    }
    sums.budget = budget;
    let beyond = |one: &Move, least: PageCount| one.to.saturating_sub(least);
    let less = |_, to: PageCount, by| to.saturating_sub(by);
    sums.give_way(&mut moves, |index, one| beyond(one, held(index, one)), |_, one| one.to + one.urgent, less);
    sums.give_way(&mut moves, |index, one| beyond(one, dues[index]), |_, one| one.to, less);
    sums.budget = state.lately.map_or(budget, |lately| lately.most().min(budget));
    for (one, part) in sums.parts(&moves, |one| one.urgent) {
        moves[one].to += part;
    }
    for (one, part) in sums.parts(&moves, |one| one.raise) {
        // A raise that is hardly one waits until it is worth making.
        if part.0 > DEAD_BAND.apply(moves[one].to.0) {
            moves[one].to += part;
        }
    }
    moves.into_iter().map(|one| one.to).collect()
}

/// What targets sum to at most, of all machines and of those of a group.
struct Sums<'a> {
    tree: &'a Tree,
    budget: PageCount,
    /// Of each machine in the tree.
    places: Vec<usize>,
}

impl Sums<'_> {
    fn most(&self, group: GroupIndex) -> PageCount {
        if group == 0 { self.budget } else { self.tree.groups[group].cap }
    }

    /// For each group the sum of what its machines have.
    fn sums(&self, pages: impl Iterator<Item = PageCount>) -> Vec<PageCount> {
        self.tree.sums(self.places.iter().copied().zip(pages))
    }

    /// Has targets give way where a sum is too much, from the innermost groups outward: by what each `gives` at most, of what it
    /// counts for in the sum, and `lower` makes it a target.
    fn give_way(
        &self,
        moves: &mut [Move],
        gives: impl Fn(usize, &Move) -> PageCount,
        counts: impl Fn(usize, &Move) -> PageCount,
        lower: impl Fn(usize, PageCount, PageCount) -> PageCount,
    ) {
        let deepest = self.tree.groups.iter().map(|group| group.depth).max().unwrap_or(0);
        for depth in (0..=deepest).rev() {
            let all = || moves.iter().enumerate();
            let sums = self.sums(all().map(|(index, one)| counts(index, one)));
            let given = self.sums(all().map(|(index, one)| gives(index, one)));
            let is_level = |group: &GroupIndex| self.tree.groups[*group].depth == depth;
            for (index, one) in moves.iter_mut().enumerate() {
                let Some(group) = self.tree.around(self.places[index]).find(is_level) else { continue };
                let beyond = sums[group].saturating_sub(self.most(group));
                let by = needed_of(gives(index, one), beyond, given[group]);
                if by > PageCount(0) {
                    one.to = lower(index, one.to, by);
                }
            }
        }
    }

    /// For each machine the part of what it asks for that there is room for: the least of what each group around it has room
    /// for, so that no sum exceeds any of them.
    fn parts(&self, moves: &[Move], asks: impl Fn(&Move) -> PageCount) -> Vec<(usize, PageCount)> {
        let (sums, asked) = (self.sums(moves.iter().map(|one| one.to)), self.sums(moves.iter().map(&asks)));
        let part = |(index, one): (usize, &Move)| {
            let room = |group| self.most(group).saturating_sub(sums[group]);
            let of = |group| part_of(asks(one), room(group), asked[group]);
            (index, self.tree.around(self.places[index]).map(of).min().unwrap_or_default())
        };
        moves.iter().enumerate().map(part).collect()
    }
}

/// `amount`, or its part where all that is `asked` for is more than there is `room`.
fn part_of(amount: PageCount, room: PageCount, asked: PageCount) -> PageCount {
    if asked <= room {
        return amount;
    }
    let part = u128::from(amount.0) * u128::from(room.0) / u128::from(asked.0);
    PageCount(u64::try_from(part).unwrap_or(u64::MAX))
}

/// `amount`, or its part of what is `needed` where all that can be `given` is more: enough of all parts, so rounded up.
fn needed_of(amount: PageCount, needed: PageCount, given: PageCount) -> PageCount {
    if given <= needed {
        return amount;
    }
    let part = (u128::from(amount.0) * u128::from(needed.0)).div_ceil(u128::from(given.0));
    PageCount(u64::try_from(part).unwrap_or(u64::MAX))
}

/// A move that is urgent, and yet one back.
fn turned(verdict: Verdict, damper: Option<&Damper>, now_ms: u64) -> Verdict {
    match verdict {
        Verdict::Moves(way) => match damper.and_then(|damper| damper.turns(way, now_ms)) {
            Some(ago_ms) => Verdict::Held(Held::Reversal { ago_ms }),
            None => verdict,
        },
        Verdict::Stays | Verdict::Held(_) => verdict,
    }
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
