//! What the pages of every benchmark contain, so that their figures can be held against each other.
use plimsoll_guest::content::Mix;

/// Of contents and of orders.
pub(crate) const SEED: u64 = 0x5eed;
/// Few against the thousands of pages that the mix draws from it: what is called duplicate mostly is (18 of the 20 %).
pub(crate) const POOL_PAGES: u64 = 256;

/// What goals are stated for.
pub(crate) const MIX: Mix = Mix { zero: 25, duplicate: 20, text: 45, random: 10 };
/// The mix with text in the place of duplicates.
pub(crate) const NO_DUPLICATE: Mix = Mix { zero: 25, duplicate: 0, text: 65, random: 10 };
/// The mix without zero pages and duplicates.
pub(crate) const NO_ZERO_NO_DUPLICATE: Mix = Mix { zero: 0, duplicate: 0, text: 82, random: 18 };
/// Nothing that compresses.
pub(crate) const RANDOM: Mix = Mix { zero: 0, duplicate: 0, text: 0, random: 100 };
