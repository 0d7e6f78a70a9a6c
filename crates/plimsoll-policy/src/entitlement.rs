//! An auction at every group of the tree, from the host inward.
//!
//! Enters: what each machine may bid, and what the host has. Leaves: pages for each machine. A group bids for what is
//! nested in it: with its own shares, its own reservation and limit, and the sum of what is used inside. What it wins
//! it auctions among its own. So a machine competes with its siblings only, and what happens inside a group is no
//! matter of another group's: not its machines' shares, not their number, not their stalls.
//!
//! Every node is sorted once, among its siblings: the whole is O(n log n) as one auction is.
use crate::auction::{Bidder, IdleTax, auction};
use crate::tree::{Group, GroupIndex, Tree};
use alloc::vec;
use alloc::vec::Vec;
use plimsoll_types::PageCount;

/// What a machine may bid. All zero for one that is not running.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bid {
    /// What it keeps whatever the others want.
    pub(crate) floor: PageCount,
    /// What it is to have above that, if its siblings have it above theirs.
    pub(crate) lift: PageCount,
    /// What it has at most.
    pub(crate) cap: PageCount,
    /// What it uses.
    pub(crate) active: PageCount,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shared {
    /// For each machine, in the tree's order.
    pub(crate) grants: Vec<PageCount>,
    /// By how much the floors exceed what the host has.
    pub(crate) short: PageCount,
    /// The sum of the floors.
    pub(crate) floors: PageCount,
}

/// Shares `pages` out among the machines of the tree, one bid each.
pub(crate) fn share_out(tree: &Tree, pages: PageCount, bids: &[Bid]) -> Shared {
    // A group's own reservation holds as far as anybody in it wants it.
    let groups = sum_inward(tree, bids, |group| group.own);
    let floors = groups[0].floor;
    let grants = share_inward(tree, pages.max(floors), &groups, bids);
    Shared { grants, short: floors.saturating_sub(pages), floors }
}

/// What each machine keeps of its cap where nothing but limits bounds what there is. A group's own reservation is in the
/// floors of those who want it, and nobody else's.
pub(crate) fn within_limits(tree: &Tree, bids: &[Bid]) -> Vec<PageCount> {
    let groups = sum_inward(tree, bids, |_| PageCount(0));
    share_inward(tree, groups[0].cap, &groups, bids)
}

/// Holds the auction of each group, the host's about `pages` first.
fn share_inward(tree: &Tree, pages: PageCount, groups: &[Bidder], bids: &[Bid]) -> Vec<PageCount> {
    let tax = tree.settings().tax;
    let mut grants = vec![PageCount(0); bids.len()];
    let mut won = vec![PageCount(0); groups.len()];
    won[0] = pages;
    // Parents come before their children.
    for (index, group) in tree.groups.iter().enumerate() {
        let outcome = auction(won[index], &siblings(tree, group, groups, bids, won[index], tax), tax);
        let (nested, machines) = outcome.grants.split_at(group.groups.len());
        group.groups.iter().zip(nested).for_each(|(place, grant)| won[*place] = *grant);
        group.machines.iter().zip(machines).for_each(|(place, grant)| grants[*place] = *grant);
    }
    grants
}

/// What each group bids, from the innermost outward: at least what is `reserved` of it, as far as it may have so much.
fn sum_inward(tree: &Tree, bids: &[Bid], reserved: impl Fn(&Group) -> PageCount) -> Vec<Bidder> {
    let nobody = Bidder { floor: PageCount(0), cap: PageCount(0), active: PageCount(0), shares: 1 };
    let mut bidders = vec![nobody; tree.groups.len()];
    for index in (0..tree.groups.len()).rev() {
        let group = &tree.groups[index];
        let (mut floor, mut cap, mut active) = (PageCount(0), PageCount(0), PageCount(0));
        for place in &group.machines {
            let bid = &bids[*place];
            floor += bid.floor;
            cap += bid.cap;
            active += bid.active.min(bid.cap);
        }
        for bidder in group.groups.iter().map(|nested: &GroupIndex| bidders[*nested]) {
            floor += bidder.floor;
            cap += bidder.cap;
            active += bidder.active.min(bidder.cap);
        }
        // The host has no limit of its own: what it has is what is auctioned.
        // Floors that exceed a limit are kept all the same, and whoever is around has to know.
        let cap = if index == 0 { cap } else { cap.min(group.cap).max(floor) };
        let floor = floor.max(reserved(group)).min(cap);
        bidders[index] = Bidder { floor, cap, active, shares: group.shares.0 };
    }
    bidders
}

/// The bidders of one group's auction: nested groups, then machines, whose floors are lifted as far as there is room.
fn siblings(
    tree: &Tree,
    group: &Group,
    groups: &[Bidder],
    bids: &[Bid],
    pages: PageCount,
    tax: IdleTax,
) -> Vec<Bidder> {
    let mut bidders: Vec<Bidder> = group.groups.iter().map(|nested| groups[*nested]).collect();
    let mut lifts = Vec::with_capacity(group.machines.len());
    for place in &group.machines {
        let (bid, shares) = (&bids[*place], tree.machines[*place].terms.shares.0);
        bidders.push(Bidder { floor: bid.floor, cap: bid.cap, active: bid.active, shares });
        let cap = bid.lift.min(bid.cap.saturating_sub(bid.floor));
        lifts.push(Bidder { floor: PageCount(0), cap, active: cap, shares });
    }
    if lifts.iter().any(|lift| lift.cap > PageCount(0)) {
        let floors: PageCount = bidders.iter().map(|bidder| bidder.floor).sum();
        let raised = auction(pages.saturating_sub(floors), &lifts, tax).grants;
        let machines = &mut bidders[group.groups.len()..];
        machines.iter_mut().zip(raised).for_each(|(bidder, lift)| bidder.floor += lift);
    }
    bidders
}
