//! How much a machine may take, and how much has to go for that.
//!
//! Enters: what the operator said, what the machine takes, what it is seen to use. Leaves: pages to take now. Pages in
//! compressed swap take RAM too, so they count with what they cost, and a page taken frees only the rest of itself.
use plimsoll_linux::reclaimer::Usage;
use plimsoll_linux::zram::SwapCost;
use plimsoll_types::{ByteCount, PageCount, ParseByteCountError};
use std::str::FromStr;

/// Above the working set, for `auto`: Hyper-V's default buffer (PEERS.md 2.3).
const BUFFER_PERCENT: u64 = 20;
/// At least that much above it: an estimate of next to nothing has an error, too.
const BUFFER_MIN: ByteCount = ByteCount::mib(8);

/// What the operator allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Budget {
    /// That much.
    Size(ByteCount),
    /// What it uses and a buffer.
    Auto,
}

impl FromStr for Budget {
    type Err = ParseByteCountError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            size => size.parse().map(Self::Size),
        }
    }
}

impl Budget {
    /// The most the machine may take now, if that is known.
    pub(super) fn limit(self, working_set: Option<PageCount>) -> Option<ByteCount> {
        match self {
            Self::Size(size) => Some(size),
            Self::Auto => {
                let used = working_set?.bytes();
                Some(used + ByteCount(used.0 / 100 * BUFFER_PERCENT).max(BUFFER_MIN))
            }
        }
    }
}

/// What a machine takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// Guest RAM in place.
    pub(super) resident: ByteCount,
    /// Guest memory in swap, as the guest sees it.
    pub(super) elsewhere: ByteCount,
    /// What that costs in RAM, by the average of all that is in this host's swap.
    pub(super) compressed: ByteCount,
}

impl Taken {
    pub(super) fn new(usage: Usage, cost: SwapCost) -> Self {
        let elsewhere = usage.elsewhere.bytes();
        Self { resident: usage.resident.bytes(), elsewhere, compressed: cost.of(elsewhere) }
    }

    pub(super) fn total(self) -> ByteCount {
        self.resident + self.compressed
    }

    /// Pages that have to leave for the machine to come down to `limit`.
    pub(super) fn excess(self, limit: ByteCount, cost: SwapCost) -> PageCount {
        cost.to_free(self.total().saturating_sub(limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_a_size_or_auto() {
        assert_eq!("auto".parse(), Ok(Budget::Auto));
        assert_eq!("512M".parse(), Ok(Budget::Size(ByteCount::mib(512))));
        assert!("lots".parse::<Budget>().is_err());
    }

    #[test]
    fn auto_leaves_a_fifth_above_what_is_used_and_waits_until_that_is_known() {
        assert_eq!(Budget::Auto.limit(None), None);
        let used = ByteCount::mib(100).pages_floor();
        assert_eq!(Budget::Auto.limit(Some(used)).map(|limit| limit.0 >> 20), Some(120));
        assert_eq!(Budget::Auto.limit(Some(PageCount(0))), Some(BUFFER_MIN));
    }

    #[test]
    fn what_has_to_leave_makes_up_for_what_stays_compressed() {
        let taken =
            Taken { resident: ByteCount::mib(400), elsewhere: ByteCount(0), compressed: ByteCount(0) };
        let half = SwapCost::from_permille(500);
        assert_eq!(taken.excess(ByteCount::mib(300), half), ByteCount::mib(200).pages_floor());
        assert_eq!(taken.excess(ByteCount::mib(500), half), PageCount(0));
        // What does not compress frees nothing, and no number of pages would do.
        let none = SwapCost::from_permille(1010);
        assert_eq!(taken.excess(ByteCount::mib(300), none), ByteCount::mib(1000).pages_floor());
    }
}
