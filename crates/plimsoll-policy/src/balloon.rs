//! Whether a machine's balloon does what it is asked.
//!
//! Enters: what the balloon holds, and what it was asked to. Leaves: whether to count on it. The guest is not trusted
//! to say: only the balloon's size is looked at. One that is asked and has not come nearer by a sixteenth for 5 s is
//! *inactive*: it may go on, but what it owes is taken on the next rung. After 20 s it is *uncooperative* and no
//! longer asked, until a minute later it is tried again. The times are those of Xen's squeezed.
use core::fmt;
use plimsoll_types::ByteCount;

/// How long a balloon may stand still before the next rung takes what it owes.
pub const INACTIVE_MS: u64 = 5_000;
/// How long before it is not asked any more.
pub const UNCOOPERATIVE_MS: u64 = 20_000;
/// How long until it is tried again.
pub const RETRY_MS: u64 = 60_000;
/// The part of what it owes that it has to come nearer by for that to count. A page at a time would do for ever; an
/// honest balloon brings 4 GiB in 5 s (0.951 GiB/s: HyperAlloc, EuroSys '25).
const PROGRESS_PART: u64 = 16;

/// What a balloon is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Standing {
    /// It does what it is asked, or is asked nothing.
    Cooperative,
    /// It stands still.
    Inactive,
    /// It has stood still so long that it is not asked.
    Uncooperative,
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cooperative => "cooperative",
            Self::Inactive => "inactive",
            Self::Uncooperative => "uncooperative",
        })
    }
}

/// What is remembered of a machine's balloon.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Balloon {
    /// What it is to hold.
    asked: ByteCount,
    /// How far it was from that when it last came nearer, and when that was.
    owed: ByteCount,
    moved_ms: u64,
    /// When it was given up, if it is.
    given_up_ms: Option<u64>,
}

impl Balloon {
    pub(crate) const fn new(held: ByteCount, now_ms: u64) -> Self {
        Self { asked: held, owed: ByteCount(0), moved_ms: now_ms, given_up_ms: None }
    }

    pub(crate) const fn asked(&self) -> ByteCount {
        self.asked
    }

    /// Asks it to hold so much, while it holds `held`. Asking for something else is no reason for more patience.
    pub(crate) const fn ask(&mut self, bytes: ByteCount, held: ByteCount) {
        self.asked = bytes;
        self.owed = ByteCount(held.0.abs_diff(bytes.0));
    }

    /// How long it has stood still.
    pub(crate) const fn still_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.moved_ms)
    }

    /// Takes in what it holds now.
    pub(crate) fn look(&mut self, held: ByteCount, now_ms: u64) -> Standing {
        let owed = ByteCount(held.0.abs_diff(self.asked.0));
        let came_nearer = owed < self.owed.saturating_sub(ByteCount(self.owed.0 / PROGRESS_PART));
        let is_done = owed == ByteCount(0) && self.given_up_ms.is_none();
        let is_retried = self.given_up_ms.is_some_and(|then| now_ms.saturating_sub(then) >= RETRY_MS);
        if came_nearer || is_done || is_retried {
            (self.owed, self.moved_ms, self.given_up_ms) = (owed, now_ms, None);
        }
        match self.still_ms(now_ms) {
            0..INACTIVE_MS => Standing::Cooperative,
            INACTIVE_MS..UNCOOPERATIVE_MS => Standing::Inactive,
            _ => {
                self.given_up_ms.get_or_insert(now_ms);
                Standing::Uncooperative
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(balloon: &mut Balloon, held: u64, second: u64) -> Standing {
        balloon.look(ByteCount::mib(held), second * 1000)
    }

    #[test]
    fn a_balloon_that_stands_still_is_given_up_and_tried_again() {
        let mut balloon = Balloon::new(ByteCount(0), 0);
        balloon.ask(ByteCount::mib(100), ByteCount(0));
        assert_eq!(standing(&mut balloon, 10, 4), Standing::Cooperative);
        assert_eq!(standing(&mut balloon, 10, 8), Standing::Cooperative);
        assert_eq!(standing(&mut balloon, 10, 9), Standing::Inactive);
        assert_eq!(standing(&mut balloon, 10, 24), Standing::Uncooperative);
        assert_eq!(standing(&mut balloon, 10, 83), Standing::Uncooperative);
        assert_eq!(standing(&mut balloon, 10, 84), Standing::Cooperative);
        assert_eq!(standing(&mut balloon, 10, 89), Standing::Inactive);
        assert_eq!(standing(&mut balloon, 40, 90), Standing::Cooperative);
    }

    #[test]
    fn a_balloon_that_crawls_is_not_waited_for() {
        let mut balloon = Balloon::new(ByteCount(0), 0);
        balloon.ask(ByteCount::mib(1000), ByteCount(0));
        assert_eq!(
            (1..=20).map(|second| standing(&mut balloon, second, second)).max(),
            Some(Standing::Uncooperative)
        );
    }

    #[test]
    fn a_balloon_that_was_given_up_stays_so_although_it_is_asked_nothing() {
        let mut balloon = Balloon::new(ByteCount(0), 0);
        balloon.ask(ByteCount::mib(100), ByteCount(0));
        assert_eq!(standing(&mut balloon, 0, 20), Standing::Uncooperative);
        balloon.ask(ByteCount(0), ByteCount(0));
        assert_eq!(standing(&mut balloon, 0, 79), Standing::Uncooperative);
        assert_eq!(standing(&mut balloon, 0, 80), Standing::Cooperative);
    }

    #[test]
    fn moving_away_from_what_was_asked_is_no_progress() {
        let mut balloon = Balloon::new(ByteCount::mib(50), 0);
        balloon.ask(ByteCount::mib(100), ByteCount::mib(50));
        for second in 1..5 {
            assert_eq!(standing(&mut balloon, 50 - second, second), Standing::Cooperative);
        }
        assert_eq!(standing(&mut balloon, 45, 5), Standing::Inactive);
    }

    #[test]
    fn a_balloon_that_is_asked_nothing_keeps_its_standing() {
        let mut balloon = Balloon::new(ByteCount::mib(50), 0);
        assert!((0..1000).all(|second| standing(&mut balloon, 50, second) == Standing::Cooperative));
    }
}
