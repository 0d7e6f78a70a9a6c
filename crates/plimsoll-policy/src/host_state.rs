//! How short of memory the host is: ESXi's five states.
//!
//! Enters: the host's memory and what of it is free. Leaves: a state, which says how far up the ladder reclaim may go.
//!
//! The measure is *minFree*, which grows ever slower with the host: 6 % of its first 4 GiB, 4 % of what lies between 4
//! and 12, 2 % of what lies between 12 and 28, and 1 % beyond. Each state has a line, a part of it:
//!
//! ```text
//! high   400 %   nothing is taken, but for what is above a limit
//! clear  100 %   what the guest does not use, its balloon, twins: nobody waits for a page
//! soft    64 %   and pages are compressed: ESXi waits for hard, but a page is back from zram in 8-11 us
//! hard    32 %   and pages go to disk
//! low     16 %   and machines above their target are stalled
//! ```
//!
//! A state is entered when less than its own line is free, and left when as much as the line above it is free. Between
//! the two it stays as it was, so that a host at a line does not flutter.
use crate::ladder::Rung;
use crate::part::Ppm;
use core::fmt;
use plimsoll_types::ByteCount;

/// How short of memory the host is, best first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum HostState {
    /// Memory is plentiful.
    #[default]
    High,
    /// Less than minFree is free.
    Clear,
    /// Less than two thirds of it.
    Soft,
    /// Less than a third of it.
    Hard,
    /// Less than a sixth of it.
    Low,
}

/// Of each state: its line in percent of minFree, and the last rung that reclaim may take in it.
const STATES: [(HostState, u32, Option<Rung>); 5] = [
    (HostState::High, 400, None),
    (HostState::Clear, 100, Some(Rung::Sharing)),
    (HostState::Soft, 64, Some(Rung::Compress)),
    (HostState::Hard, 32, Some(Rung::Disk)),
    (HostState::Low, 16, Some(Rung::Disk)),
];

/// Up to how many GiB what percentage of the host's memory is kept free.
const SLOPES: [(u64, u32); 4] = [(4, 6), (12, 4), (28, 2), (u64::MAX >> 30, 1)];

/// What a host of so much memory keeps free.
///
/// ```
/// use plimsoll_policy::host_state::min_free;
/// use plimsoll_types::ByteCount;
/// // The figure VMware's documentation gives for a host of 28 GiB.
/// assert_eq!(min_free(ByteCount::mib(28 << 10)).0 >> 20, 901);
/// assert_eq!(min_free(ByteCount::mib(4 << 10)).0 >> 20, 245);
/// ```
pub fn min_free(total: ByteCount) -> ByteCount {
    let (mut kept, mut below) = (0, 0);
    for (gib, percent) in SLOPES {
        let end = total.0.min(gib << 30);
        kept += Ppm::percent(percent).apply(end - below);
        below = end;
    }
    ByteCount(kept)
}

impl HostState {
    /// How much is to be free in a host of that memory: less than that, and this state is entered.
    pub fn line(self, total: ByteCount) -> ByteCount {
        ByteCount(Ppm::percent(STATES[self as usize].1).apply(min_free(total).0))
    }

    /// The last rung that reclaim may take; `None` where it takes nothing.
    pub const fn deepest(self) -> Option<Rung> {
        STATES[self as usize].2
    }

    /// The state that follows this one when so much is free.
    #[must_use]
    pub fn next(self, free: ByteCount, total: ByteCount) -> Self {
        let states = STATES.map(|(state, ..)| state);
        let entered = states.into_iter().rev().find(|state| free < state.line(total) && *state > Self::High);
        let entered = entered.unwrap_or(Self::High);
        // How far up from here the line above is free, one state after the other.
        let above = states[..=self as usize].iter().rev().skip(1);
        let left = above.take_while(|above| free >= above.line(total)).last().copied().unwrap_or(self);
        entered.max(left)
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::High => "high",
            Self::Clear => "clear",
            Self::Soft => "soft",
            Self::Hard => "hard",
            Self::Low => "low",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: ByteCount = ByteCount::mib(16 << 10);

    fn after(state: HostState, percent: u32) -> HostState {
        state.next(ByteCount(Ppm::percent(percent).apply(min_free(TOTAL).0)), TOTAL)
    }

    #[test]
    fn the_table_is_in_the_order_of_the_states() {
        assert!(STATES.iter().enumerate().all(|(place, (state, ..))| *state as usize == place));
        assert!(STATES.windows(2).all(|pair| pair[0].1 > pair[1].1 && pair[0].2 <= pair[1].2));
    }

    #[test]
    fn a_state_is_entered_below_its_line_from_any_better_one() {
        use HostState::{Clear, Hard, High, Low, Soft};
        for (percent, state) in
            [(401, High), (101, High), (99, Clear), (63, Soft), (31, Hard), (15, Low), (0, Low)]
        {
            assert_eq!(after(High, percent), state, "{percent} %");
        }
        assert_eq!(after(Soft, 15), Low);
    }

    #[test]
    fn a_state_is_left_at_the_line_above_and_not_before() {
        use HostState::{Clear, Hard, High, Low, Soft};
        for (from, percent, to) in [
            (Low, 31, Low),
            (Low, 33, Hard),
            (Low, 65, Soft),
            (Hard, 63, Hard),
            (Soft, 99, Soft),
            (Soft, 101, Clear),
            (Clear, 399, Clear),
            (Clear, 401, High),
            (Low, 401, High),
        ] {
            assert_eq!(after(from, percent), to, "{from} at {percent} %");
        }
    }

    #[test]
    fn the_state_stays_when_nothing_changes() {
        for percent in 0..450 {
            let states = STATES.map(|(state, ..)| state);
            assert!(
                states.iter().all(|state| after(after(*state, percent), percent) == after(*state, percent))
            );
        }
    }
}
