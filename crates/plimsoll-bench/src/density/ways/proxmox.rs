//! A loop that turns balloons by the rules of Proxmox VE's pvestatd, as they are published.
//!
//! Enters: what the host uses, what guests have free. Leaves: balloon targets. The rules:
//!
//! * 80 % of the host's memory is to be in use; within 10 MiB of that nothing is done.
//! * Each guest is to have its minimum and its part, by shares, of what is left beyond all minimums.
//! * Nobody's target moves by more than 100 MiB in a cycle.
//! * Who has more than a quarter of its minimum free shrinks first; only if that does not suffice do the others.
//!
//! A cycle lasts 10 s there. Here it lasts one, so that the 12 s in which a run's guests work have as many as two minutes have. All
//! guests have equal shares, and their reservation is their minimum. It knows nothing of working sets.
use crate::density::fleet::Member;
use plimsoll_types::ByteCount;
use plimsoll_vmm::control::{BalloonPiece, Command};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const CYCLE: Duration = Duration::from_secs(1);
const GOAL_PERCENT: u64 = 80;
const DEAD_BAND: u64 = 10 << 20;
const STEP_MAX: u64 = 100 << 20;
/// The part of its minimum that a guest must have free to be one of the first to shrink.
const FREE_PART: u64 = 4;

/// All balloons.
pub(super) struct Balloons {
    goal: ByteCount,
    turned: Instant,
    /// What each guest is to have.
    targets: BTreeMap<usize, ByteCount>,
}

/// A guest that has a balloon, in bytes.
struct Guest {
    nth: usize,
    size: u64,
    minimum: u64,
    has: u64,
    free: u64,
}

impl Balloons {
    /// Those of the guests of a host that has so much.
    pub(super) fn new(budget: ByteCount) -> Self {
        Self {
            goal: ByteCount(budget.0 / 100 * GOAL_PERCENT),
            turned: Instant::now(),
            targets: BTreeMap::new(),
        }
    }

    /// What a guest is to have.
    pub(super) fn target(&self, nth: usize) -> Option<ByteCount> {
        self.targets.get(&nth).copied()
    }

    /// A turn, if a cycle is over.
    pub(super) fn turn(&mut self, members: &[Member], used: ByteCount) {
        if self.turned.elapsed() < CYCLE {
            return;
        }
        self.turned = Instant::now();
        let guests: Vec<Guest> =
            members.iter().enumerate().filter_map(|(nth, member)| Guest::of(nth, member)).collect();
        for (nth, target) in decide(&guests, self.goal, used) {
            let member = &members[nth];
            let target_bytes = member.role.size.0.saturating_sub(target);
            // One that is gone is found to be so when it is heard.
            let _ = member.guest.tell(&Command::Balloon { target_bytes, piece: BalloonPiece::ScatteredPage });
            self.targets.insert(nth, ByteCount(target));
        }
    }
}

impl Guest {
    fn of(nth: usize, member: &Member) -> Option<Self> {
        if !member.is_alive() || !member.has_started() {
            return None;
        }
        let (size, minimum) = (member.role.size.0, member.role.reservation.0);
        let has = size.saturating_sub(member.last.ballooned_bytes);
        Some(Self { nth, size, minimum, has, free: has.saturating_sub(member.role.kept.0) })
    }
}

/// The guests whose targets move, and where to.
fn decide(guests: &[Guest], goal: ByteCount, used: ByteCount) -> Vec<(usize, u64)> {
    let mut left = goal.0.abs_diff(used.0);
    if left <= DEAD_BAND {
        return Vec::new();
    }
    left = left.min(STEP_MAX * guests.len() as u64);
    let has: u64 = guests.iter().map(|guest| guest.has).sum();
    let minimums: u64 = guests.iter().map(|guest| guest.minimum).sum();
    let part = |wanted: u64| wanted.saturating_sub(minimums) / (guests.len() as u64).max(1);
    let mut moves = Vec::new();
    if goal > used {
        let part = part(has.saturating_add(left));
        for guest in guests {
            let step =
                (guest.minimum + part).min(guest.size).saturating_sub(guest.has).min(STEP_MAX).min(left);
            left -= step;
            moves.push((guest.nth, guest.has + step, step));
        }
    } else {
        let part = part(has.saturating_sub(left));
        let (first, then): (Vec<&Guest>, Vec<&Guest>) =
            guests.iter().partition(|guest| guest.free > guest.minimum / FREE_PART);
        for guest in first.into_iter().chain(then) {
            let step = guest.has.saturating_sub(guest.minimum + part).min(STEP_MAX).min(left);
            left -= step;
            moves.push((guest.nth, guest.has - step, step));
        }
    }
    moves.into_iter().filter(|(.., step)| *step > 0).map(|(nth, target, _)| (nth, target)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn guest(nth: usize, has: u64, free: u64) -> Guest {
        Guest { nth, size: 1024 * MIB, minimum: 256 * MIB, has: has * MIB, free: free * MIB }
    }

    fn decided(guests: &[Guest], goal: u64, used: u64) -> Vec<(usize, u64)> {
        let moves = decide(guests, ByteCount(goal * MIB), ByteCount(used * MIB));
        moves.into_iter().map(|(nth, target)| (nth, target / MIB)).collect()
    }

    #[test]
    fn near_the_goal_nothing_moves() {
        let guests = [guest(0, 1024, 500), guest(1, 1024, 500)];
        assert!(decided(&guests, 1600, 1610).is_empty());
        assert!(decided(&guests, 1600, 1590).is_empty());
        assert!(!decided(&guests, 1600, 1611).is_empty());
        assert!(decided(&[], 1600, 3000).is_empty());
    }

    #[test]
    fn who_has_much_free_shrinks_first_and_nobody_by_more_than_a_step() {
        assert_eq!(decided(&[guest(0, 1024, 10), guest(1, 1024, 500)], 1600, 1640), [(1, 1004), (0, 1004)]);
        assert_eq!(decided(&[guest(0, 700, 10), guest(1, 1024, 500)], 1600, 1640), [(1, 984)]);
        assert_eq!(decided(&[guest(0, 1024, 10), guest(1, 1024, 500)], 1600, 4000), [(1, 924), (0, 924)]);
    }

    #[test]
    fn what_is_left_is_given_back_to_who_has_less_than_its_part() {
        assert_eq!(decided(&[guest(0, 400, 10), guest(1, 1024, 500)], 1600, 1500), [(0, 500)]);
    }
}
