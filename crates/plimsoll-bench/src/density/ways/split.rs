//! How machines share room of which each has a part, and not each uses its.
//!
//! Enters: what each uses, and its part. Leaves: a limit for each. What must never happen: a machine that may not have its
//! part; room that nobody may use while a machine is at its limit.
//!
//! A machine that uses less than its part may have it at once. Until it does, the others have what it leaves, but for a little;
//! when it takes its part, their limits go down as it grows, and for that moment limits add up to more than the room.
use plimsoll_types::ByteCount;

/// What is kept free for a machine that is below its part: a sixteenth of what it uses, and a MiB at least.
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

/// Limits in the order of the machines.
pub(super) fn split(room: ByteCount, sharers: &[Sharer]) -> Vec<ByteCount> {
    // Of those below their part: that part.
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
            limits[nth] = Some(share(nth));
            left -= sharers[nth].may_grow_to();
            continue;
        }
        let limit = |(nth, limit): (usize, &Option<u64>)| ByteCount(limit.unwrap_or_else(|| share(nth)));
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
        assert_eq!(limits(100, &[(16, 50), (90, 50)]), [50, 83]);
        assert_eq!(limits(100, &[(32, 50), (90, 50)]), [50, 66]);
    }

    #[test]
    fn room_that_nobody_uses_is_for_whoever_comes() {
        assert_eq!(limits(100, &[(9, 50), (9, 50)]), [50, 90]);
    }

    #[test]
    fn those_who_want_more_are_never_promised_what_others_use() {
        for room in [0, 1, 50, 1000] {
            for uses in [0, 7, 300] {
                let sharers = [(uses, 10), (20, 20), (500, 30)];
                let limits = limits(room, &sharers);
                let has: u64 = sharers.iter().zip(&limits).map(|((uses, _), limit)| uses.min(limit)).sum();
                assert!(has <= room, "{limits:?} of {room}");
            }
        }
        assert!(limits(100, &[]).is_empty());
    }
}
