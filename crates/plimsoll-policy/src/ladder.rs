//! The ways to take memory from a machine, and which of them to go.
//!
//! Enters: how much is to be freed, what could be had on each rung, what of the machine came back lately. Leaves: how
//! much to take on which rungs, and what could not be covered.
//!
//! What the guest has free goes first, whatever was measured. The other rungs are taken by what they [cost](crate::costs), cheapest
//! first, up to the last that the machine, the host's state and the machine's settings allow: by what the guest loses of its work,
//! and where that is the same, by the price of a page. Two losses are the same that no measurement tells apart: they are counted in
//! twentieths.
//!
//! What the guest reported free is never paged: it is no part of what the paging rungs can have.
use crate::costs::{Costs, Squeeze};
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

impl Offers {
    /// Bytes that could be freed on a rung while so many may move.
    fn on(&self, rung: Rung, movable: u64, keeps: Ppm) -> u64 {
        match rung {
            Rung::GuestFree => self.guest_free.0,
            Rung::Balloon => movable,
            Rung::Sharing => self.mergeable.0.min(movable),
            Rung::Compress => keeps.rest().apply(movable),
            Rung::Disk => movable.saturating_add(self.stored.0),
        }
    }
}

/// Losses that lie in the same of these are the same: what guests lose is measured with a spread of some 5 %
/// (docs/bench.md, `cost`).
const SAME: Ppm = Ppm::percent(5);

/// What a rung costs a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Figures {
    /// Nanoseconds a freed page.
    pub price_ns: u64,
    /// The part of its work that the guest is to lose.
    pub loss: Ppm,
}

impl Figures {
    fn of(rung: Rung, costs: &Costs, returns: Ppm, squeeze: Squeeze) -> Self {
        Self { price_ns: costs.of(rung).price_ns(returns), loss: costs.loss(rung, squeeze) }
    }
}

/// Why this rung and not the next one that would have had something to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Choice {
    /// What this one costs.
    pub costs: Figures,
    /// The other rung.
    pub other: Rung,
    /// What that one would have cost.
    pub other_costs: Figures,
}

impl fmt::Display for Choice {
    /// What follows the price of the rung taken; with `#` that price before it. Losses to a hundredth, which is more than was
    /// measured.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { costs, other, other_costs } = self;
        let percent = |loss: Ppm| loss.0.saturating_add(5_000) / 10_000;
        let (loss, other_loss) = (percent(costs.loss), percent(other_costs.loss));
        let price = other_costs.price_ns / 1000;
        if f.alternate() {
            write!(f, "; this costs {} us a freed page", costs.price_ns / 1000)?;
        }
        write!(f, " and {loss} % of its work, where {other} would cost {price} us and {other_loss} %")
    }
}

/// Memory to take on one rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taking {
    pub(crate) rung: Rung,
    pub(crate) frees: ByteCount,
    /// Pages to take for that, more than are freed where a part of each stays.
    pub(crate) pages: PageCount,
    pub(crate) price_ns: u64,
    /// None where there was none: no other rung, or nobody has measured what either does to a guest's work.
    pub(crate) choice: Option<Choice>,
}

/// The `allowed` rungs in the order in which they are taken, with what each costs.
fn order(allowed: Rungs, costs: &Costs, returns: Ppm, squeeze: Squeeze) -> Vec<(Rung, Figures)> {
    let figures = |rung| (rung, Figures::of(rung, costs, returns, squeeze));
    let mut rungs: Vec<_> = Rung::ALL.into_iter().filter(|rung| allowed.has(*rung)).map(figures).collect();
    rungs.sort_unstable_by_key(|(rung, figures)| {
        (*rung != Rung::GuestFree, figures.loss.0 / SAME.0, figures.price_ns, *rung)
    });
    rungs
}

/// What a rung was held against: the first of those behind it that would have had something to give.
fn choice(
    (rung, figures): (Rung, Figures),
    behind: &[(Rung, Figures)],
    costs: &Costs,
    gives: impl Fn(Rung) -> u64,
) -> Option<Choice> {
    let (other, other_costs) = behind.iter().copied().find(|(other, _)| gives(*other) > 0)?;
    let is_known = costs.is_measured(rung) || costs.is_measured(other);
    (rung != Rung::GuestFree && is_known).then_some(Choice { costs: figures, other, other_costs })
}

/// Covers what is asked from the cheapest of the `allowed` rungs on. Returns what to take, and what is left uncovered.
pub(crate) fn climb(
    squeeze: Squeeze,
    offers: Offers,
    allowed: Rungs,
    costs: &Costs,
    returns: Ppm,
) -> (Vec<Taking>, ByteCount) {
    let free = if allowed.has(Rung::GuestFree) { offers.guest_free } else { ByteCount(0) };
    let rungs = order(allowed, costs, returns, squeeze.beyond(free));
    let (mut left, mut movable, mut takings) = (squeeze.asked.0, offers.movable.0, Vec::new());
    for (at, &(rung, figures)) in rungs.iter().enumerate() {
        let keeps = costs.of(rung).keeps;
        let gives = |rung| offers.on(rung, movable, costs.of(rung).keeps);
        let frees = gives(rung).min(left);
        if frees == 0 {
            continue;
        }
        let choice = choice((rung, figures), &rungs[at + 1..], costs, gives);
        let bytes = u128::from(frees) * u128::from(Ppm::WHOLE.0) / u128::from(keeps.rest().0.max(1));
        let bytes = ByteCount(u64::try_from(bytes).unwrap_or(u64::MAX));
        let (frees, pages, price_ns) = (ByteCount(frees), bytes.pages_ceil(), figures.price_ns);
        takings.push(Taking { rung, frees, pages, price_ns, choice });
        left -= frees.0;
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
    use crate::costs::{Cost, Losses};
    use proptest::prelude::{Strategy, prop, prop_assert, prop_assert_eq, proptest};
    use std::vec;

    const MIB: fn(u64) -> ByteCount = ByteCount::mib;
    /// One page in ten comes back.
    const SOME: Ppm = Ppm::percent(10);

    /// So much, of a machine that uses nothing of what it has.
    fn asked(excess: u64) -> Squeeze {
        Squeeze { asked: MIB(excess), consumed: MIB(1000), stored: MIB(0), active: MIB(0) }
    }

    fn rungs(excess: u64, offers: Offers, allowed: Rungs, returns: Ppm) -> (Vec<(Rung, u64)>, u64) {
        let (takings, left) = climb(asked(excess), offers, allowed, &Costs::MEASURED, returns);
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
        let (takings, left) = climb(asked(43), offers(0, 0, 400), only, &Costs::MEASURED, SOME);
        assert_eq!(left, ByteCount(0));
        assert_eq!(takings[0].pages, MIB(100).pages_ceil());
    }

    fn losses() -> impl Strategy<Value = Option<Losses>> {
        prop::option::of(prop::array::uniform6(0..=1_000_000u32).prop_map(|losses| Losses(losses.map(Ppm))))
    }

    fn costs() -> impl Strategy<Value = Costs> {
        let cost = (0..300_000u64, 0..300_000u64, 0..1_000_000u32, losses(), losses());
        let cost = cost.prop_map(|(take, back, keeps, busy, idle)| Cost {
            busy,
            idle,
            ..Cost::new(take, back, Ppm(keeps))
        });
        prop::array::uniform5(cost).prop_map(Costs)
    }

    fn squeezed() -> impl Strategy<Value = Squeeze> {
        (1..400u64, 1..1000u64, 0..400u64, 0..1200u64).prop_map(|(asked, consumed, stored, active)| Squeeze {
            asked: MIB(asked.min(consumed)),
            consumed: MIB(consumed),
            stored: MIB(stored.min(consumed)),
            active: MIB(active),
        })
    }

    fn some_rungs() -> impl Strategy<Value = Rungs> {
        (0..1u8 << Rung::ALL.len()).prop_map(Rungs)
    }

    fn some_offers() -> impl Strategy<Value = Offers> {
        (0..100u64, 0..100u64, 0..400u64).prop_map(|(free, twins, movable)| offers(free, twins, movable))
    }

    /// Losses with something added somewhere.
    fn raised(losses: Option<Losses>, more: [u32; 6]) -> Option<Losses> {
        let Losses(mut losses) = losses?;
        losses
            .iter_mut()
            .zip(more)
            .for_each(|(loss, more)| loss.0 = loss.0.saturating_add(more).min(1_000_000));
        Some(Losses(losses))
    }

    proptest! {
        /// Asked one by one which of those that have something is the least dear, by figures found anew.
        #[test]
        fn the_cheapest_rung_that_has_something_goes_first(
            costs in costs(), squeeze in squeezed(), allowed in some_rungs(), offers in some_offers(), returns in 0..=1_000_000u32,
        ) {
            let returns = Ppm(returns);
            let (takings, _) = climb(squeeze, offers, allowed, &costs, returns);
            let gives = |rung: Rung| allowed.has(rung) && offers.on(rung, offers.movable.0, costs.of(rung).keeps) > 0;
            let first = takings.first().map(|taking| taking.rung);
            prop_assert_eq!(first.is_some(), Rung::ALL.into_iter().any(gives));
            let Some(first) = first else { return Ok(()) };
            prop_assert!(gives(first));
            prop_assert!(first == Rung::GuestFree || !gives(Rung::GuestFree), "free memory stays, used memory goes");
            let free = if allowed.has(Rung::GuestFree) { offers.guest_free } else { ByteCount(0) };
            let squeeze = squeeze.beyond(free);
            for other in Rung::ALL.into_iter().filter(|rung| gives(*rung) && first != Rung::GuestFree) {
                let dear = |rung| (costs.loss(rung, squeeze).0 / SAME.0, costs.of(rung).price_ns(returns));
                prop_assert!(dear(first) <= dear(other), "{first:?} before {other:?}: {costs:?}");
            }
        }

        #[test]
        fn a_rung_that_costs_more_comes_no_earlier(
            costs in costs(), squeeze in squeezed(), returns in 0..=1_000_000u32, rung in prop::sample::select(Rung::ALL.to_vec()),
            more in (0..100_000u64, 0..100_000u64, prop::array::uniform6(0..300_000u32), prop::array::uniform6(0..300_000u32)),
        ) {
            let (take, back, busy, idle) = more;
            let mut dearer = costs;
            let cost = &mut dearer.0[rung as usize];
            cost.take_ns += take;
            cost.back_ns += back;
            (cost.busy, cost.idle) = (raised(cost.busy, busy), raised(cost.idle, idle));
            let place = |costs: &Costs| {
                order(Rungs::ALL, costs, Ppm(returns), squeeze).iter().position(|(at, _)| *at == rung)
            };
            prop_assert!(place(&dearer) >= place(&costs), "{costs:?}");
        }

        /// A machine whose pages one keeper moves, and nobody else: what that keeper costs chooses nothing, so it needs no row of its
        /// own. Only what stays of a page counts, and that is the contents' doing.
        #[test]
        fn where_there_is_one_way_its_price_and_its_losses_change_nothing_of_what_is_taken(
            costs in costs(), others in costs(), squeeze in squeezed(), offers in some_offers(),
            returns in 0..=1_000_000u32, rung in prop::sample::select(Rung::ALL.to_vec()),
        ) {
            let mut others = others;
            others.0.iter_mut().zip(costs.0).for_each(|(other, cost)| other.keeps = cost.keeps);
            let only = Rungs::NONE.with(Rung::GuestFree).with(rung);
            let taken = |costs: &Costs| {
                let (takings, left) = climb(squeeze, offers, only, costs, Ppm(returns));
                let took = |taking: Taking| (taking.rung, taking.frees, taking.pages, taking.choice);
                (takings.into_iter().map(took).collect::<Vec<_>>(), left)
            };
            prop_assert_eq!(taken(&costs), taken(&others));
        }

        /// The two ways that a machine has whose pages the kernel moves, by what is built in.
        #[test]
        fn by_what_is_built_in_a_balloon_is_asked_before_anything_is_compressed(
            squeeze in squeezed(), returns in 0..=1_000_000u32,
        ) {
            let both = Rungs::NONE.with(Rung::Balloon).with(Rung::Compress);
            let rungs = order(both, &Costs::MEASURED, Ppm(returns), squeeze);
            prop_assert_eq!(rungs[0].0, Rung::Balloon);
        }

        #[test]
        fn no_figure_opens_a_way_that_is_not_allowed(
            costs in costs(), squeeze in squeezed(), offers in some_offers(), returns in 0..=1_000_000u32,
        ) {
            let never = Rungs::ALL.up_to(Rung::NEVER_PAGE);
            let (takings, left) = climb(squeeze, offers, never, &costs, Ppm(returns));
            prop_assert!(takings.iter().all(|taking| !taking.rung.pages_out()));
            let others = takings.iter().filter_map(|taking| taking.choice);
            prop_assert!(others.into_iter().all(|choice| !choice.other.pages_out()), "held against what is forbidden");
            let taken: ByteCount = takings.iter().map(|taking| taking.frees).sum();
            prop_assert_eq!(taken + left, squeeze.asked);
        }

        /// What records of before losses were measured hold: their decisions must come out as they were.
        #[test]
        fn without_losses_price_alone_decides_and_nothing_is_said_of_them(
            costs in costs(), squeeze in squeezed(), offers in some_offers(), returns in 0..=1_000_000u32,
        ) {
            let prices = Costs(costs.0.map(|cost| Cost::new(cost.take_ns, cost.back_ns, cost.keeps)));
            let (takings, _) = climb(squeeze, offers, Rungs::ALL, &prices, Ppm(returns));
            let used = takings.iter().filter(|taking| taking.rung != Rung::GuestFree);
            prop_assert!(used.clone().map(|taking| taking.price_ns).is_sorted());
            prop_assert!(used.clone().all(|taking| taking.choice.is_none()));
        }
    }

    #[test]
    fn a_busy_guests_twins_are_merged_before_its_pages_are_compressed_and_the_choice_says_by_what() {
        let both = Rungs::NONE.with(Rung::Sharing).with(Rung::Compress);
        let busy = Squeeze { active: MIB(1000), ..asked(100) };
        let (takings, _) = climb(busy, offers(0, 50, 900), both, &Costs::MEASURED, Ppm::ZERO);
        assert_eq!(takings[0].rung, Rung::Sharing);
        let choice = takings[0].choice.unwrap();
        assert_eq!((choice.costs.price_ns, choice.costs.loss), (32_000, Ppm::ZERO));
        assert_eq!((choice.other, choice.other_costs.price_ns), (Rung::Compress, 31_395));
        assert!(choice.other_costs.loss > Ppm::percent(50), "{choice:?}");
        // The same pages of a guest that uses none of them: the price decides.
        let (takings, _) = climb(asked(100), offers(0, 50, 900), both, &Costs::MEASURED, Ppm::ZERO);
        assert_eq!(takings[0].rung, Rung::Compress);
    }

    #[test]
    fn an_idle_guests_twins_are_merged_before_two_fifths_of_it_are_compressed() {
        let both = Rungs::NONE.with(Rung::Sharing).with(Rung::Compress);
        let first = |excess| {
            let (takings, _) = climb(asked(excess), offers(0, 50, 950), both, &Costs::MEASURED, Ppm::ZERO);
            takings[0].rung
        };
        // Up to three tenths the kernel's paging costs it nothing, and the price decides, 31 us against 32; then its work does.
        assert_eq!(
            [100, 200, 300, 400].map(first),
            [Rung::Compress, Rung::Compress, Rung::Compress, Rung::Sharing]
        );
    }

    #[test]
    fn sets_of_rungs_are_sets() {
        let set = Rungs::ALL.without(Rung::Balloon).up_to(Rung::Sharing);
        let has = Rung::ALL.map(|rung| set.has(rung));
        assert_eq!(has, [true, false, true, false, false]);
        assert_eq!(Rungs::NONE.with(Rung::Disk).up_to(Rung::Disk), Rungs::NONE.with(Rung::Disk));
    }
}
