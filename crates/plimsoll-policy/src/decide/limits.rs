//! Limits: how much each machine gives so that it, and every group it is in, comes down to its limit.
//!
//! Enters: the machines that were seen and their aims. Leaves: for each machine what it is to give for a limit, and
//! whose limit that is. It is never more than what it has beyond its aim, so what it uses of its guarantee stays.
//!
//! What the machines of a group have beyond its limit they give *together*, as any memory is taken: they bid for what
//! may stay, each between what nothing takes it below and what it has. So whoever pays least per share gives first,
//! which is who has idle pages. A group is nested as it is in any auction: what it has to give for its own limit counts
//! for those around it, and it gives no more than the largest overshoot around it needs.
//!
//! What is due to the machines of a group is within its limit together, and so are their targets, but not the larger of
//! the two of each, which is what nothing takes it below. So a target that is held above what is due gives way where the
//! group could not come down to its limit else, and leaves nothing to bid for: [`Stay`] is what comes of that.
//!
//! What a machine cannot give (it must not be paged, its pages are pinned) the others give in its place, as far as they
//! can. What nobody can give is said.
use super::look::Seen;
use super::moves::Means;
use super::targets::Aim;
use super::{PolicyState, Remembered};
use crate::damper::REVERSAL_MS;
use crate::entitlement::{Bid, within_limits};
use crate::settings::{Hold, Owner};
use crate::tree::Tree;
use alloc::vec;
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, GroupId, PageCount};

/// Fewer pages are not worth a request each second: what it costs to move as many is for the most part what a call costs,
/// however many it moves (1.4 us a page in batches of 64, 7.4 in batches of 8: FACTS).
pub const SLIVER: PageCount = PageCount(64);

/// What a machine is to give for a limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Above {
    /// What of its own memory.
    pub(crate) gives: ByteCount,
    /// The largest of what it, or a group it is in, takes up beyond its limit.
    pub(crate) most: ByteCount,
    /// Whose limit that is; `None` is its own.
    pub(crate) group: Option<GroupId>,
}

/// What each machine is to give for limits, in the order of `seen`.
pub(crate) fn above(seen: &[Seen<'_>], aims: &[Aim], state: &PolicyState) -> Vec<Above> {
    let tree = &state.tree;
    let found = beyond(tree, seen.iter().map(|machine| (machine.place, has(machine))));
    let mut bids = vec![Bid::default(); tree.machines.len()];
    for (machine, aim) in seen.iter().zip(aims) {
        let (has, excess) = (has(machine), excess(machine, aim.line()));
        // What is stuck matters only to those who have to give in its place.
        let known = is_in_any(&found, machine, tree).then(|| state.machines.get(&machine.id()));
        let stuck = known.flatten().map_or(PageCount(0), |known| stuck(machine, excess, known, tree));
        let floor = has.saturating_sub(excess.pages_ceil().saturating_sub(stuck));
        let cap = has.min(machine.terms.cap).max(floor);
        bids[machine.place] = Bid { floor, lift: PageCount(0), cap, active: machine.demand.active };
    }
    let kept = within_limits(tree, &bids);
    let stays = beyond(tree, seen.iter().map(|machine| (machine.place, kept[machine.place])));
    let above = |(machine, aim): (&Seen<'_>, &Aim)| {
        let (most, group) = most(machine, &found, tree);
        let (has, excess) = (has(machine), excess(machine, aim.line()));
        let gives = if is_in_any(&stays, machine, tree) {
            // All give all they can, and it is not enough. Who is asked for what is stuck says so.
            excess
        } else {
            has.saturating_sub(kept[machine.place].min(machine.terms.cap)).bytes().min(excess)
        };
        Above { gives, most, group }
    };
    seen.iter().zip(aims).map(above).collect()
}

/// What stays of a machine whose group is above its limit, by the line that nothing takes it below. All zero where none of
/// its groups is: nothing is asked of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stay {
    consumed: PageCount,
    has: PageCount,
    /// What it can give at most: down to what is due, and by its rungs.
    gives: PageCount,
}

impl Stay {
    pub(crate) fn at(&self, line: PageCount) -> PageCount {
        self.has.saturating_sub(self.consumed.saturating_sub(line).min(self.gives))
    }

    /// The line at which it gives so much more than at that one.
    pub(crate) fn lower(&self, line: PageCount, by: PageCount) -> PageCount {
        line.min(self.consumed).saturating_sub(by)
    }
}

/// What stays of each machine, in the order of `seen`; nothing where no group is above its limit.
pub(crate) fn stays(seen: &[Seen<'_>], dues: &[PageCount], state: &PolicyState) -> Option<Vec<Stay>> {
    let tree = &state.tree;
    let mut found = beyond(tree, seen.iter().map(|machine| (machine.place, has(machine))));
    // For so few no target moves: a guest that presses on its limit is above it by some pages each second.
    found.iter_mut().filter(|beyond| **beyond < SLIVER).for_each(|beyond| *beyond = PageCount(0));
    let stay = |(machine, due): (&Seen<'_>, &PageCount)| {
        let known = state.machines.get(&machine.id()).filter(|_| is_in_any(&found, machine, tree));
        let Some(known) = known else { return Stay::default() };
        let excess = excess(machine, *due);
        let gives = excess.pages_ceil().saturating_sub(stuck(machine, excess, known, tree));
        Stay { consumed: machine.view.consumed.pages_ceil(), has: has(machine), gives }
    };
    let is_any = found.iter().any(|beyond| *beyond > PageCount(0));
    is_any.then(|| seen.iter().zip(dues).map(stay).collect())
}

/// What of those pages is beyond the limit of each group, machines given by their places.
fn beyond(tree: &Tree, pages: impl Iterator<Item = (usize, PageCount)>) -> Vec<PageCount> {
    tree.sums(pages).into_iter().zip(&tree.groups).map(|(sum, group)| sum.saturating_sub(group.cap)).collect()
}

/// Whether the machine is in a group that is beyond its limit.
fn is_in_any(beyond: &[PageCount], machine: &Seen<'_>, tree: &Tree) -> bool {
    tree.around(machine.place).any(|group| beyond[group] > PageCount(0))
}

impl Above {
    /// What is asked for now: all of it, however little, but a [`SLIVER`] once a minute. A guest that presses on its
    /// limit goes above it by some pages each second.
    pub(crate) fn asked(&self, known: &mut Remembered, now_ms: u64) -> ByteCount {
        if self.gives == ByteCount(0) || self.gives.pages_ceil() >= SLIVER {
            return self.gives;
        }
        if known.sliver_ms.is_some_and(|then| now_ms.saturating_sub(then) < REVERSAL_MS) {
            return ByteCount(0);
        }
        known.sliver_ms = Some(now_ms);
        self.gives
    }
}

/// What a machine has beyond the line that nothing takes it below.
pub(crate) fn excess(machine: &Seen<'_>, line: PageCount) -> ByteCount {
    match machine.terms.hold {
        Hold::Dedicated => ByteCount(0),
        Hold::Flexible | Hold::Static => machine.view.consumed.saturating_sub(line.bytes()),
    }
}

/// What of its excess no rung would free.
fn stuck(machine: &Seen<'_>, excess: ByteCount, known: &Remembered, tree: &Tree) -> PageCount {
    Means::of(machine, known, tree).climb(excess, machine.terms.highest).left.pages_ceil()
}

/// Pages it takes up. What is being taken or brought back may be counted twice for a moment: that is above no limit.
fn has(machine: &Seen<'_>) -> PageCount {
    machine.view.consumed.pages_ceil().min(machine.terms.size)
}

/// What the machine, or a group it is in, takes up beyond its limit: the most of these, and whose it is.
fn most(machine: &Seen<'_>, beyond: &[PageCount], tree: &Tree) -> (ByteCount, Option<GroupId>) {
    let own = has(machine).saturating_sub(machine.terms.cap);
    let around = tree.around(machine.place).filter_map(|group| match tree.groups[group].owner {
        Owner::Group(id) => Some((beyond[group], Some(id))),
        _ => None,
    });
    let (most, group) = around.fold((own, None), |most, next| if next.0 > most.0 { next } else { most });
    (most.bytes(), group)
}
