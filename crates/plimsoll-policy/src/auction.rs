//! Who gets how many of a number of pages: an auction of one page at a time, computed at once.
//!
//! Enters: pages to hand out, and for each bidder its floor, its cap, how much of what it holds it uses, and its
//! shares. Leaves: a grant for each, and what the floors exceed the pages by, if they do. Nothing here knows machines
//! from groups.
//!
//! Everybody first has its floor. Each further page goes to whoever would pay the *lowest cost per share* for holding
//! it, until the pages are gone or all are at their caps. A page in use costs 1; an idle one costs k = 1 / (1 - tax),
//! so that a bidder pays taxes on what it does not use (Waldspurger, OSDI '02, section 5.2):
//!
//! ```text
//! cost(P) = P                      while P <= A, the pages in use
//!           A + k (P - A)          beyond
//! price   = S / cost(P) = S / (P (f + k (1 - f)))      f: the used part of P
//! ```
//!
//! Pages therefore go where the price is highest, and a page taken comes from where it is lowest: min-funding
//! revocation. The outcome is a level of water: a cost per share that all reach who are neither at their floor nor at
//! their cap.
//!
//! The level is found exactly. A bidder's pages, as a function of the level, bend at three places at most (where it
//! leaves its floor, where its use ends, where its cap is). All bends are sorted, a sweep finds the two between which
//! the sum crosses the pages, and there the level is one division. Rounding down leaves fewer pages than there are
//! bidders; those are auctioned one by one with a heap. So n bidders cost O(n log n), and the sum is exact:
//!
//! * the grants sum to the pages, or everyone is at its cap, or the floors alone exceed them and everyone is at its
//!   floor;
//! * a bidder with more shares, or an auction of more pages, never leaves that bidder with less;
//! * between equal offers the earlier bidder wins.
//!
//! Costs are multiplied by `1 - tax` in millionths, which keeps them whole. With at most 2^40 pages a bidder, 2^20
//! bidders and 2^20 shares each, no product exceeds 2^121.
use crate::part::Ppm;
use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::{Ordering, Reverse};
use core::fmt;
use plimsoll_types::PageCount;

/// The most pages a bidder may have: 4 PiB.
pub const PAGES_MAX: PageCount = PageCount(1 << 40);
/// The most bidders of one auction.
pub const BIDDERS_MAX: usize = 1 << 20;
/// The most shares a bidder may have.
pub const SHARES_MAX: u32 = 1_000_000;

const WHOLE: u128 = Ppm::WHOLE.0 as u128;

/// How much more an idle page costs than a used one: the part of it that is taken away when memory is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(try_from = "Ppm"))]
#[cfg_attr(feature = "serde", serde(into = "Ppm"))]
pub struct IdleTax(Ppm);

impl IdleTax {
    /// Idle pages cost what used ones do: memory follows shares alone.
    pub const NONE: Self = Self(Ppm::ZERO);
    /// 75 %, ESX's default: an idle page costs four times a used one.
    pub const USUAL: Self = Self(Ppm::percent(75));
    /// The highest: an idle page costs a hundred times a used one. A tax of everything would leave idle memory no
    /// price.
    pub const MOST: Self = Self(Ppm::percent(99));

    /// A tax of that rate.
    ///
    /// # Errors
    /// [`TaxTooHigh`] above [`IdleTax::MOST`].
    pub const fn new(rate: Ppm) -> Result<Self, TaxTooHigh> {
        if rate.0 > Self::MOST.0.0 { Err(TaxTooHigh { rate }) } else { Ok(Self(rate)) }
    }

    /// The rate.
    pub const fn rate(self) -> Ppm {
        self.0
    }

    /// What an idle page costs less than the whole it costs here, see the head of this file.
    const fn untaxed(self) -> u128 {
        self.0.rest().0 as u128
    }
}

impl TryFrom<Ppm> for IdleTax {
    type Error = TaxTooHigh;
    fn try_from(rate: Ppm) -> Result<Self, TaxTooHigh> {
        Self::new(rate)
    }
}

impl From<IdleTax> for Ppm {
    fn from(tax: IdleTax) -> Self {
        tax.rate()
    }
}

/// A tax that would leave idle memory without a price.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaxTooHigh {
    /// The rate as given.
    pub rate: Ppm,
}

impl fmt::Display for TaxTooHigh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an idle tax of {} is too high: use at most {}", self.rate, IdleTax::MOST.0)
    }
}

impl core::error::Error for TaxTooHigh {}

/// Somebody who wants pages. `floor <= cap <= PAGES_MAX` and `1 <= shares <= SHARES_MAX`, which settings are checked
/// for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bidder {
    /// Pages it has whatever the others want.
    pub floor: PageCount,
    /// Pages it has at most.
    pub cap: PageCount,
    /// Pages it uses; those beyond are taxed.
    pub active: PageCount,
    /// Its weight against the others.
    pub shares: u32,
}

/// How an auction ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Pages for each bidder, in their order.
    pub grants: Vec<PageCount>,
    /// Pages by which the floors exceed what there was. Then everyone has its floor: a guarantee is not divided, and
    /// whoever called has to find the pages elsewhere.
    pub short: PageCount,
}

/// A cost per share: a fraction that is compared exactly.
#[derive(Clone, Copy, Debug)]
struct Level {
    cost: u128,
    shares: u128,
}

impl Ord for Level {
    fn cmp(&self, other: &Self) -> Ordering {
        #[cfg(test)]
        tests::count_comparison();
        (self.cost * other.shares).cmp(&(other.cost * self.shares))
    }
}

impl PartialOrd for Level {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Level {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Level {}

impl Bidder {
    /// What holding so many pages costs, see the head of this file.
    fn cost(&self, pages: u64, tax: IdleTax) -> u128 {
        let used = pages.min(self.active.0);
        u128::from(used) * tax.untaxed() + u128::from(pages - used) * WHOLE
    }

    /// The level at which it holds so many.
    fn level(&self, pages: u64, tax: IdleTax) -> Level {
        Level { cost: self.cost(pages, tax), shares: u128::from(self.shares) }
    }

    /// Whole pages it holds at a level.
    fn at(&self, level: Level, tax: IdleTax) -> PageCount {
        let active = u128::from(self.active.0);
        let money = u128::from(self.shares) * level.cost;
        let used = money / (level.shares * tax.untaxed());
        let pages = if used <= active {
            used
        } else {
            (money + active * u128::from(tax.0.0) * level.shares) / (level.shares * WHOLE)
        };
        PageCount(u64::try_from(pages).unwrap_or(u64::MAX)).clamp(self.floor, self.cap)
    }

    /// Where its pages, as a function of the level, bend: `(level, what begins there)`.
    fn bends(&self, tax: IdleTax) -> impl Iterator<Item = (Level, Bend)> {
        let moves = self.floor < self.cap;
        let starts_idle = self.active <= self.floor;
        let turns = !starts_idle && self.active < self.cap;
        let start = if starts_idle { Bend::LeavesFloorIdle } else { Bend::LeavesFloorUsed };
        let ends = if starts_idle || turns { Bend::FullOfIdle } else { Bend::FullOfUsed };
        let bends = [
            moves.then_some((self.floor, start)),
            (moves && turns).then_some((self.active, Bend::TurnsIdle)),
            moves.then_some((self.cap, ends)),
        ];
        bends.into_iter().flatten().map(move |(pages, bend)| (self.level(pages.0, tax), bend))
    }
}

/// What begins at a bend.
#[derive(Clone, Copy, Debug)]
enum Bend {
    /// It leaves its floor and fills with pages in use.
    LeavesFloorUsed,
    /// It leaves its floor and fills with idle pages.
    LeavesFloorIdle,
    /// It has all that it uses and goes on with idle pages.
    TurnsIdle,
    /// It has reached its cap, filling with pages in use until then.
    FullOfUsed,
    /// It has reached its cap, filling with idle pages until then.
    FullOfIdle,
}

/// The sum of all bidders' pages as a straight line in the level, between two bends:
/// `fixed + level (used / untaxed + idle / WHOLE) + taxed * tax / WHOLE`.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    /// Pages of those at their floor or cap.
    fixed: u128,
    /// Shares of those that fill with pages in use.
    used: u128,
    /// Shares of those that fill with idle pages, and the pages they use.
    idle: u128,
    taxed: u128,
}

impl Line {
    fn pass(&mut self, bidder: &Bidder, bend: Bend) {
        let shares = u128::from(bidder.shares);
        let pages = |count: PageCount| u128::from(count.0);
        match bend {
            Bend::LeavesFloorUsed => {
                self.fixed -= pages(bidder.floor);
                self.used += shares;
            }
            Bend::LeavesFloorIdle => {
                self.fixed -= pages(bidder.floor);
                self.idle += shares;
                self.taxed += pages(bidder.active);
            }
            Bend::TurnsIdle => {
                self.used -= shares;
                self.idle += shares;
                self.taxed += pages(bidder.active);
            }
            Bend::FullOfUsed => {
                self.used -= shares;
                self.fixed += pages(bidder.cap);
            }
            Bend::FullOfIdle => {
                self.idle -= shares;
                self.taxed -= pages(bidder.active);
                self.fixed += pages(bidder.cap);
            }
        }
    }

    /// The level at which the line reaches so many pages, however far away: the sum multiplied by
    /// `WHOLE * untaxed`, solved for the level. `None` where the line is flat.
    fn reaches(&self, pages: u128, tax: IdleTax) -> Option<Level> {
        let slope = self.used * WHOLE + self.idle * tax.untaxed();
        let want = pages.saturating_sub(self.fixed) * WHOLE * tax.untaxed();
        let cost = want.saturating_sub(self.taxed * u128::from(tax.0.0) * tax.untaxed());
        (slope > 0).then_some(Level { cost, shares: slope })
    }
}

/// Hands out `pages`.
///
/// ```
/// use plimsoll_policy::auction::{Bidder, IdleTax, auction};
/// use plimsoll_types::PageCount;
///
/// // Two machines with equal shares and 1000 pages between them: one uses 100 pages, the other would use 900.
/// let bidder = |active| {
///     Bidder { floor: PageCount(0), cap: PageCount(900), active: PageCount(active), shares: 1000 }
/// };
/// let outcome = auction(PageCount(1000), &[bidder(100), bidder(900)], IdleTax::USUAL);
/// // At the level of 740 used pages: the idle one keeps its 100 and (740 - 100) / 4 idle ones.
/// assert_eq!(outcome.grants, [PageCount(260), PageCount(740)]);
/// // Without the tax each gets what its shares say.
/// let outcome = auction(PageCount(1000), &[bidder(100), bidder(900)], IdleTax::NONE);
/// assert_eq!(outcome.grants, [PageCount(500), PageCount(500)]);
/// ```
pub fn auction(pages: PageCount, bidders: &[Bidder], tax: IdleTax) -> Outcome {
    let floors: PageCount = bidders.iter().map(|bidder| bidder.floor).sum();
    let caps: PageCount = bidders.iter().map(|bidder| bidder.cap).sum();
    if pages <= floors {
        let grants = bidders.iter().map(|bidder| bidder.floor).collect();
        return Outcome { grants, short: floors.saturating_sub(pages) };
    }
    if pages >= caps {
        let grants = bidders.iter().map(|bidder| bidder.cap).collect();
        return Outcome { grants, short: PageCount(0) };
    }
    let level = sweep(pages, floors, bidders, tax);
    let mut grants: Vec<PageCount> = bidders.iter().map(|bidder| bidder.at(level, tax)).collect();
    let left = pages.saturating_sub(grants.iter().copied().sum());
    auction_one_by_one(left, bidders, &mut grants, tax);
    Outcome { grants, short: PageCount(0) }
}

/// The level at which the bidders, were pages divisible, would hold exactly `pages`, which lie between the sums of
/// floors and of caps.
fn sweep(pages: PageCount, floors: PageCount, bidders: &[Bidder], tax: IdleTax) -> Level {
    let mut bends: Vec<(Level, &Bidder, Bend)> = Vec::with_capacity(bidders.len() * 3);
    for bidder in bidders {
        bends.extend(bidder.bends(tax).map(|(level, bend)| (level, bidder, bend)));
    }
    // Stable, so that of one bidder's bends at one level the first comes first.
    bends.sort_by_key(|(level, ..)| *level);
    let mut line = Line { fixed: u128::from(floors.0), ..Line::default() };
    let pages = u128::from(pages.0);
    for (level, bidder, bend) in bends {
        match line.reaches(pages, tax) {
            Some(reached) if reached <= level => return reached,
            _ => line.pass(bidder, bend),
        }
    }
    // Not reached: past the last bend the sum is that of the caps, which is more.
    Level { cost: u128::from(PAGES_MAX.0) * WHOLE, shares: 1 }
}

/// Hands out the few pages that rounding left.
fn auction_one_by_one(left: PageCount, bidders: &[Bidder], grants: &mut [PageCount], tax: IdleTax) {
    let offer = |index: usize, held: PageCount| {
        (held < bidders[index].cap).then(|| Reverse((bidders[index].level(held.0 + 1, tax), index)))
    };
    let mut offers: BinaryHeap<_> =
        grants.iter().enumerate().filter_map(|(index, held)| offer(index, *held)).collect();
    for _ in 0..left.0 {
        let Some(Reverse((_, index))) = offers.pop() else { return };
        grants[index] += PageCount(1);
        offers.extend(offer(index, grants[index]));
    }
}

#[cfg(test)]
mod tests;
