//! The ways to take memory from a machine, and which of them to go.
//!
//! Enters: how much is to be freed, what could be had on each rung, what of the machine came back lately. Leaves: how
//! much to take on which rungs, and what could not be covered.
//!
//! Rungs are taken by price, cheapest first, up to the last that the machine, the host's state and the machine's
//! settings allow. The price is what a page *freed* costs, in processor time of the host and waiting of the guest:
//!
//! ```text
//! price = (take + back * returns) / (1 - keeps)
//!         take, back   ns to take a page, and that the guest waits when it touches it again
//!         returns      the part of the machine's pages that came back in the last minute or so
//!         keeps        the part of a page that stays in RAM: where four are compressed to free one, four are paid
//! ```
//!
//! So a machine whose pages keep coming back finds compressing dear, and twins or a balloon cheap.
//! What the guest reported free is never paged: it is no part of what the paging rungs can have.
use crate::part::Ppm;
use alloc::vec::Vec;
use core::fmt;
use plimsoll_types::{ByteCount, PageCount};

/// A way to take memory, the gentlest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Rung {
    /// Discard what the guest reported free.
    GuestFree,
    /// Have the guest choose, through its balloon.
    Balloon,
    /// Merge pages with their twins.
    Sharing,
    /// Compress pages in RAM.
    Compress,
    /// Move pages to a disk or a slower memory.
    Disk,
}

impl Rung {
    /// All rungs.
    pub const ALL: [Self; 5] = [Self::GuestFree, Self::Balloon, Self::Sharing, Self::Compress, Self::Disk];
    /// The last rung of a machine whose bytes must stay where they are.
    pub const NEVER_PAGE: Self = Self::Sharing;

    /// True where the guest waits when it touches what was taken.
    pub const fn pages_out(self) -> bool {
        matches!(self, Self::Compress | Self::Disk)
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GuestFree => "discarding what the guest does not use",
            Self::Balloon => "its balloon",
            Self::Sharing => "merging twins",
            Self::Compress => "compressing pages",
            Self::Disk => "moving pages to disk",
        })
    }
}

/// A set of rungs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Rungs(u8);

impl Rungs {
    /// No way to take memory.
    pub const NONE: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self((1 << Rung::ALL.len()) - 1);

    /// The set with that rung.
    #[must_use]
    pub const fn with(self, rung: Rung) -> Self {
        Self(self.0 | 1 << rung as u8)
    }

    /// The set without that rung.
    #[must_use]
    pub const fn without(self, rung: Rung) -> Self {
        Self(self.0 & !(1 << rung as u8))
    }

    /// The rungs up to and with that one.
    #[must_use]
    pub const fn up_to(self, last: Rung) -> Self {
        Self(self.0 & ((2 << last as u8) - 1))
    }

    /// True when the rung is in it.
    pub const fn has(self, rung: Rung) -> bool {
        self.0 & 1 << rung as u8 != 0
    }
}

/// What a rung costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Cost {
    /// Nanoseconds to take a page.
    pub take_ns: u64,
    /// Nanoseconds the guest waits when it touches the page again.
    pub back_ns: u64,
    /// The part of a page that stays in RAM, below the whole.
    pub keeps: Ppm,
}

/// What each rung costs on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Costs(pub [Cost; Rung::ALL.len()]);

impl Costs {
    /// What was measured on a 2-core x86-64 machine with KVM over software paging (FACTS); a host that has measured
    /// its own replaces them. In the order of the rungs:
    ///
    /// * discarding costs the zap, 0.2 us, and a demand-zero fault of the guest, 5.5 us;
    /// * virtio-balloon, 4 KiB pages: 0.951 GiB/s in, 2.34 GiB/s out (HyperAlloc, EuroSys '25, on a Xeon Gold 6252);
    /// * KSM at full speed 32 us a merged page; a write to one is a fault like a first touch, 17 us;
    /// * MADV_PAGEOUT to zram (lz4) 13.5 us, 8-11 us back in random order; lz4 leaves 0.57 of code and text;
    /// * a disk was not measured: pageout as to zram, and each way the 200 us VMware's memory tiering allows a device.
    pub const MEASURED: Self = Self([
        Cost { take_ns: 200, back_ns: 5_500, keeps: Ppm::ZERO },
        Cost { take_ns: 4_100, back_ns: 1_700, keeps: Ppm::ZERO },
        Cost { take_ns: 32_000, back_ns: 17_000, keeps: Ppm::ZERO },
        Cost { take_ns: 13_500, back_ns: 11_000, keeps: Ppm::percent(57) },
        Cost { take_ns: 213_500, back_ns: 200_000, keeps: Ppm::ZERO },
    ]);

    /// What one rung costs.
    pub const fn of(&self, rung: Rung) -> Cost {
        self.0[rung as usize]
    }
}

impl Cost {
    /// Nanoseconds a freed page costs where that part of the pages comes back; `u64::MAX` where none is freed.
    pub fn price_ns(self, returns: Ppm) -> u64 {
        let cost = self.take_ns.saturating_add(returns.apply(self.back_ns));
        let price = (u128::from(cost) * u128::from(Ppm::WHOLE.0)).checked_div(self.keeps.rest().0.into());
        price.and_then(|price| u64::try_from(price).ok()).unwrap_or(u64::MAX)
    }
}

/// What could be had on each rung, in bytes freed. What two rungs could both have is counted in `movable`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offers {
    /// What the guest reported free.
    pub(crate) guest_free: ByteCount,
    /// Pages with twins. Zero where the machine shares with nobody.
    pub(crate) mergeable: ByteCount,
    /// Pages in guest RAM that may move: neither pinned nor reported free. The balloon, too, gets its pages out of
    /// these.
    pub(crate) movable: ByteCount,
    /// What its compressed pages take up.
    pub(crate) stored: ByteCount,
}

/// Memory to take on one rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taking {
    pub(crate) rung: Rung,
    pub(crate) frees: ByteCount,
    /// Pages to take for that, more than are freed where a part of each stays.
    pub(crate) pages: PageCount,
    pub(crate) price_ns: u64,
}

/// Covers `excess` from the cheapest of the `allowed` rungs on. Returns what to take, and what is left uncovered.
pub(crate) fn climb(
    excess: ByteCount,
    offers: Offers,
    allowed: Rungs,
    costs: &Costs,
    returns: Ppm,
) -> (Vec<Taking>, ByteCount) {
    let mut rungs: Vec<(u64, Rung)> = Rung::ALL
        .into_iter()
        .filter(|rung| allowed.has(*rung))
        .map(|rung| (costs.of(rung).price_ns(returns), rung))
        .collect();
    // What the guest has free goes before anything it uses, whatever was measured.
    rungs.sort_unstable_by_key(|(price, rung)| (*rung != Rung::GuestFree, *price, *rung));
    let (mut left, mut movable, mut takings) = (excess.0, offers.movable.0, Vec::new());
    for (price_ns, rung) in rungs {
        let keeps = costs.of(rung).keeps;
        let frees = match rung {
            Rung::GuestFree => offers.guest_free.0,
            Rung::Balloon => movable,
            Rung::Sharing => offers.mergeable.0.min(movable),
            Rung::Compress => keeps.rest().apply(movable),
            Rung::Disk => movable.saturating_add(offers.stored.0),
        };
        let frees = frees.min(left);
        if frees == 0 {
            continue;
        }
        let bytes = u128::from(frees) * u128::from(Ppm::WHOLE.0) / u128::from(keeps.rest().0.max(1));
        let bytes = ByteCount(u64::try_from(bytes).unwrap_or(u64::MAX));
        takings.push(Taking { rung, frees: ByteCount(frees), pages: bytes.pages_ceil(), price_ns });
        left -= frees;
        if rung != Rung::GuestFree {
            movable = movable.saturating_sub(bytes.0);
        }
    }
    (takings, ByteCount(left))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;

    const MIB: fn(u64) -> ByteCount = ByteCount::mib;
    /// One page in ten comes back.
    const SOME: Ppm = Ppm::percent(10);

    fn rungs(excess: u64, offers: Offers, allowed: Rungs, returns: Ppm) -> (Vec<(Rung, u64)>, u64) {
        let (takings, left) = climb(MIB(excess), offers, allowed, &Costs::MEASURED, returns);
        (takings.iter().map(|taking| (taking.rung, taking.frees.0 >> 20)).collect(), left.0 >> 20)
    }

    fn offers(guest_free: u64, mergeable: u64, movable: u64) -> Offers {
        Offers {
            guest_free: MIB(guest_free),
            mergeable: MIB(mergeable),
            movable: MIB(movable),
            stored: ByteCount(0),
        }
    }

    #[test]
    fn what_the_guest_has_free_goes_first_and_is_never_paged() {
        let paging = Rungs::ALL.without(Rung::Balloon);
        let (takings, left) = rungs(300, offers(200, 0, 50), paging, SOME);
        assert_eq!(takings[0], (Rung::GuestFree, 200));
        // Of 250 MiB beyond, only the 50 in use can go: 43 % of them by compressing, the rest to disk.
        assert_eq!(takings.iter().map(|(_, frees)| frees).sum::<u64>() + left, 299);
        assert!(left >= 50, "the guest's free memory was paged");
        let (takings, left) = rungs(300, offers(200, 0, 0), paging.without(Rung::GuestFree), SOME);
        assert_eq!((takings, left), (vec![], 300));
    }

    #[test]
    fn the_cheapest_rung_comes_first_and_the_highest_allowed_one_is_the_last() {
        assert_eq!(rungs(10, offers(0, 5, 100), Rungs::ALL, SOME).0, [(Rung::Balloon, 10)]);
        let without = Rungs::ALL.without(Rung::Balloon);
        assert_eq!(rungs(10, offers(0, 5, 100), without, SOME).0[0].0, Rung::Sharing);
        let never = without.up_to(Rung::NEVER_PAGE);
        assert_eq!(rungs(10, offers(0, 5, 100), never, SOME), (vec![(Rung::Sharing, 5)], 5));
    }

    #[test]
    fn pages_that_keep_coming_back_make_paging_dearer_than_merging() {
        let both = Rungs::NONE.with(Rung::Sharing).with(Rung::Compress);
        assert_eq!(rungs(10, offers(0, 50, 100), both, Ppm::ZERO).0[0].0, Rung::Compress);
        assert_eq!(rungs(10, offers(0, 50, 100), both, Ppm::percent(50)).0[0].0, Rung::Sharing);
    }

    #[test]
    fn compressing_takes_more_pages_than_it_frees() {
        let only = Rungs::NONE.with(Rung::Compress);
        let (takings, left) = climb(MIB(43), offers(0, 0, 400), only, &Costs::MEASURED, SOME);
        assert_eq!(left, ByteCount(0));
        assert_eq!(takings[0].pages, MIB(100).pages_ceil());
    }

    #[test]
    fn sets_of_rungs_are_sets() {
        let set = Rungs::ALL.without(Rung::Balloon).up_to(Rung::Sharing);
        let has = Rung::ALL.map(|rung| set.has(rung));
        assert_eq!(has, [true, false, true, false, false]);
        assert_eq!(Rungs::NONE.with(Rung::Disk).up_to(Rung::Disk), Rungs::NONE.with(Rung::Disk));
    }
}
