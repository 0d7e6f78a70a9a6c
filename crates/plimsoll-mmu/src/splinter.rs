//! Splintering: what two stages leave of large pages.
//!
//! Enters: a guest's tables and its host's. Leaves: how many translations of the guest stay as large as the guest made
//! them, and how many entries of a TLB the rest takes. A translation through both stages is as large as the smaller of the two
//! leaves on its way (SDM vol. 3, 29.3.2; Arm ARM D8.17; APM vol. 2, 15.25.9): a guest's page of 2 MiB over 512 of the host's
//! takes 512 entries, and a host's page of 2 MiB under 512 of a guest's gains nothing.
use crate::address::Span;
use crate::format::Format;
use crate::mapper::{MapError, Mapper};
use crate::memory::{Invalidate, TableFrames, TableMemory};
use core::fmt;
use core::ops::AddAssign;

/// What is left of a region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Splinter {
    /// Leaves of the guest, of all sizes: the entries that a TLB would need if the host's were as large.
    pub leaves: u64,
    /// Of these, how many are larger than the guest's smallest page.
    pub large: u64,
    /// Of the large, how many are one translation still.
    pub whole: u64,
    /// The entries that a TLB needs for all that both stages map.
    pub entries: u64,
    /// Bytes that both stages map.
    pub bytes: u64,
    /// Of these, bytes whose translation is smaller than the guest's leaf: what the host loses.
    pub split_by_host: u64,
    /// Of these, bytes whose translation is smaller than the host's leaf: what the guest does not use.
    pub split_by_guest: u64,
    /// Bytes that the guest maps and the host does not.
    pub absent: u64,
}

impl Splinter {
    /// How many bytes a TLB of `slots` entries reaches, on average over the region: through both stages, and through the
    /// guest's alone.
    pub fn reach(&self, slots: u64) -> Reach {
        Reach {
            both: reach(self.bytes, self.entries, slots),
            guest: reach(self.bytes + self.absent, self.leaves, slots),
        }
    }
}

/// Bytes that a TLB reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// As things are.
    pub both: u64,
    /// If no leaf of the host were smaller than the guest's.
    pub guest: u64,
}

impl Reach {
    /// Bytes lost to the host's small pages.
    pub const fn lost(&self) -> u64 {
        self.guest.saturating_sub(self.both)
    }
}

/// The part of `bytes` that `slots` of `entries` reach.
fn reach(bytes: u64, entries: u64, slots: u64) -> u64 {
    if slots >= entries {
        return bytes;
    }
    let part = u128::from(bytes) * u128::from(slots) / u128::from(entries);
    u64::try_from(part).unwrap_or(bytes)
}

impl AddAssign for Splinter {
    fn add_assign(&mut self, other: Self) {
        let Self { leaves, large, whole, entries, bytes, split_by_host, split_by_guest, absent } = other;
        self.leaves += leaves;
        self.large += large;
        self.whole += whole;
        self.entries += entries;
        self.bytes += bytes;
        self.split_by_host += split_by_host;
        self.split_by_guest += split_by_guest;
        self.absent += absent;
    }
}

/// Whose tables could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread<G, H> {
    /// The guest's.
    Guest(MapError<G>),
    /// The host's.
    Host(MapError<H>),
}

impl<G: fmt::Debug, H: fmt::Debug> fmt::Display for Unread<G, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(error) => write!(f, "the guest's tables: {error}"),
            Self::Host(error) => write!(f, "the host's tables: {error}"),
        }
    }
}

impl<G: fmt::Debug, H: fmt::Debug> core::error::Error for Unread<G, H> {}

/// Looks at what the guest maps in `region`, addresses before its stage. A leaf that reaches beyond the region counts whole:
/// regions that are added up begin and end where the largest leaves do.
///
/// # Errors
/// An entry is malformed, or the memory fails.
pub fn measure<G, GM, GP, GI, H, HM, HP, HI>(
    guest: &Mapper<'_, G, GM, GP, GI>,
    region: Span,
    host: &Mapper<'_, H, HM, HP, HI>,
) -> Result<Splinter, Unread<GM::Error, HM::Error>>
where
    G: Format,
    GM: TableMemory,
    GP: TableFrames,
    GI: Invalidate,
    H: Format,
    HM: TableMemory,
    HP: TableFrames,
    HI: Invalidate,
{
    let mut sum = Splinter::default();
    let mut failed = None;
    guest
        .for_each(region, |mapping| {
            let shift = G::shift(mapping.level);
            // One of a group that maps a run is counted by itself: the hint need not be taken.
            let first = mapping.leaf.base().0 | (mapping.input.0 & ((1 << mapping.leaf.shift) - 1));
            let mut leaf = Splinter { leaves: 1, ..Splinter::default() };
            let behind = Span::new(crate::Input(first), 1 << shift).filter(|span| H::accepts_span(*span));
            if let Some(behind) = behind {
                let count = host.for_each(behind, |under| {
                    let smaller = shift.min(H::shift(under.level));
                    let bytes = 1 << smaller;
                    leaf.entries += 1;
                    leaf.bytes += bytes;
                    leaf.split_by_host += if smaller < shift { bytes } else { 0 };
                    leaf.split_by_guest += if smaller < H::shift(under.level) { bytes } else { 0 };
                });
                if let Err(error) = count {
                    failed.get_or_insert(error);
                }
            }
            leaf.absent = (1 << shift) - leaf.bytes;
            leaf.large = u64::from(shift > G::PAGE_SHIFT);
            leaf.whole = u64::from(leaf.large == 1 && leaf.entries == 1 && leaf.absent == 0);
            sum += leaf;
        })
        .map_err(Unread::Guest)?;
    failed.map_or(Ok(sum), |error| Err(Unread::Host(error)))
}
