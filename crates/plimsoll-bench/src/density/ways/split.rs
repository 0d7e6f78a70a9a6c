//! How machines share room of which each has a part, and not each uses its.
//!
//! Enters: what each uses, and its part. Leaves: a limit for each, that add up to the room. What must never happen: room that
//! nobody may use while a machine is at its limit.
use plimsoll_types::ByteCount;

/// What a machine that is below its part may grow by until the next look: a sixteenth, and a MiB at least.
const GROWS_MIN: u64 = 1 << 20;
const GROWS_PART: u64 = 16;

/// A machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sharer {
    pub(super) uses: ByteCount,
    /// What it is to have, against the others.
    pub(super) part: ByteCount,
}

impl Sharer {
    fn may_grow_to(self) -> u64 {
        self.uses.0 + (self.uses.0 / GROWS_PART).max(GROWS_MIN)
    }
}

/// Limits in the order of the machines. Who uses less than its part may grow a little; what that leaves is for the others, by
/// their parts; and what they leave, for all.
pub(super) fn split(room: ByteCount, sharers: &[Sharer]) -> Vec<ByteCount> {
    let mut limits: Vec<Option<u64>> = vec![None; sharers.len()];
    let mut left = room.0;
    loop {
        let open = |nth: &usize| limits[*nth].is_none();
        let parts: u128 = (0..sharers.len()).filter(open).map(|nth| u128::from(sharers[nth].part.0)).sum();
        let share = |nth: usize| {
            let share = u128::from(left) * u128::from(sharers[nth].part.0) / parts.max(1);
            u64::try_from(share).unwrap_or(left)
        };
        let modest = (0..sharers.len()).filter(open).find(|nth| sharers[*nth].may_grow_to() <= share(*nth));
        if let Some(nth) = modest {
            limits[nth] = Some(sharers[nth].may_grow_to());
            left -= sharers[nth].may_grow_to();
            continue;
        }
        let spare = if limits.iter().all(Option::is_some) { left / (sharers.len() as u64).max(1) } else { 0 };
        let limit =
            |(nth, limit): (usize, &Option<u64>)| ByteCount(limit.unwrap_or_else(|| share(nth)) + spare);
        return limits.iter().enumerate().map(limit).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(room: u64, sharers: &[(u64, u64)]) -> Vec<u64> {
        let sharer =
            |(uses, part): &(u64, u64)| Sharer { uses: ByteCount::mib(*uses), part: ByteCount::mib(*part) };
        let sharers: Vec<Sharer> = sharers.iter().map(sharer).collect();
        split(ByteCount::mib(room), &sharers).iter().map(|limit| limit.0 >> 20).collect()
    }

    #[test]
    fn where_all_want_more_each_has_its_part() {
        assert_eq!(limits(90, &[(60, 50), (60, 100)]), [30, 60]);
    }

    #[test]
    fn what_one_leaves_is_for_those_who_want_it() {
        assert_eq!(limits(100, &[(16, 50), (90, 50)]), [17, 83]);
        assert_eq!(limits(100, &[(32, 50), (90, 50)]), [34, 66]);
    }

    #[test]
    fn room_that_nobody_uses_is_for_all() {
        assert_eq!(limits(100, &[(9, 50), (9, 50)]), [50, 50]);
        assert_eq!(limits(100, &[(9, 20), (29, 80)]), [39, 59]);
    }

    #[test]
    fn the_limits_never_exceed_the_room() {
        for room in [0, 1, 50, 1000] {
            for uses in [0, 7, 300] {
                let sum: u64 = limits(room, &[(uses, 10), (20, 20), (500, 30)]).iter().sum();
                assert!(sum <= room, "{sum} of {room}");
            }
        }
        assert_eq!(limits(100, &[]), []);
    }
}
