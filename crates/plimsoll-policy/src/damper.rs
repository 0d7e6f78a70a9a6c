//! Targets that do not flutter.
//!
//! Enters: the target a machine should have by the numbers of this moment. Leaves: the one it has. Samples are random,
//! so what should be changes all the time by a little; moving memory costs, so what is does not.
//!
//! * A change of at most 5 % of the target is not made.
//! * A target that moved one way does not move back within a minute.
//!
//! Neither holds where it must move: up because the machine stalls, down because the host is short.
use crate::part::Ppm;
use core::cmp::Ordering;
use core::fmt;
use plimsoll_types::PageCount;

/// Changes that are not worth making, in parts of the target. MOM moves a balloon by at most as much at a time.
pub const DEAD_BAND: Ppm = Ppm::percent(5);
/// How long a target does not move back.
pub const REVERSAL_MS: u64 = 60_000;

/// Why a target was left as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Hold {
    /// The change is within the [`DEAD_BAND`].
    Small,
    /// It moved the other way less than [`REVERSAL_MS`] ago.
    Reversal {
        /// How long ago.
        ago_ms: u64,
    },
    /// The others' targets leave it no room; those that sink make some.
    NoRoom,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Small => write!(f, "the difference is at most {DEAD_BAND}"),
            Self::Reversal { ago_ms } => write!(f, "it moved the other way {} s ago", ago_ms / 1000),
            Self::NoRoom => f.write_str("the others' targets leave no room yet"),
        }
    }
}

/// Which way a target moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Way {
    Up,
    Down,
}

/// What the numbers of this moment say about a target that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Stays,
    Held(Hold),
    Moves(Way),
}

/// Ways a target must move, if it is to move that way: it is not damped then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Urgent {
    pub(crate) up: bool,
    pub(crate) down: bool,
}

/// A machine's target and its last movement.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Damper {
    target: PageCount,
    moved: Option<(Way, u64)>,
}

impl Damper {
    pub(crate) const fn new(target: PageCount) -> Self {
        Self { target, moved: None }
    }

    pub(crate) const fn target(&self) -> PageCount {
        self.target
    }

    pub(crate) fn judge(&self, desired: PageCount, urgent: Urgent, now_ms: u64) -> Verdict {
        let (way, must) = match desired.cmp(&self.target) {
            Ordering::Equal => return Verdict::Stays,
            Ordering::Greater => (Way::Up, urgent.up),
            Ordering::Less => (Way::Down, urgent.down),
        };
        if must {
            return Verdict::Moves(way);
        }
        if desired.0.abs_diff(self.target.0) <= DEAD_BAND.apply(self.target.0) {
            return Verdict::Held(Hold::Small);
        }
        match self.moved {
            Some((before, then)) if before != way && now_ms.saturating_sub(then) < REVERSAL_MS => {
                Verdict::Held(Hold::Reversal { ago_ms: now_ms.saturating_sub(then) })
            }
            _ => Verdict::Moves(way),
        }
    }

    /// Moves the target, whatever was judged.
    pub(crate) fn move_to(&mut self, target: PageCount, now_ms: u64) {
        let way = if target > self.target { Way::Up } else { Way::Down };
        (self.target, self.moved) = (target, Some((way, now_ms)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALM: Urgent = Urgent { up: false, down: false };

    fn damper(target: u64) -> Damper {
        Damper::new(PageCount(target))
    }

    #[test]
    fn small_changes_are_not_made() {
        for (desired, verdict) in [
            (1000, Verdict::Stays),
            (1050, Verdict::Held(Hold::Small)),
            (950, Verdict::Held(Hold::Small)),
            (1051, Verdict::Moves(Way::Up)),
            (949, Verdict::Moves(Way::Down)),
        ] {
            assert_eq!(damper(1000).judge(PageCount(desired), CALM, 0), verdict, "{desired}");
        }
    }

    #[test]
    fn a_target_moves_back_after_a_minute_or_when_it_must() {
        let mut damper = damper(1000);
        damper.move_to(PageCount(500), 1000);
        let up = |urgent, now_ms| damper.judge(PageCount(800), urgent, now_ms);
        assert_eq!(up(CALM, 60_999), Verdict::Held(Hold::Reversal { ago_ms: 59_999 }));
        assert_eq!(up(CALM, 61_000), Verdict::Moves(Way::Up));
        assert_eq!(up(Urgent { up: true, down: false }, 1001), Verdict::Moves(Way::Up));
        assert_eq!(up(Urgent { up: false, down: true }, 1001), Verdict::Held(Hold::Reversal { ago_ms: 1 }));
        assert_eq!(damper.judge(PageCount(300), CALM, 1001), Verdict::Moves(Way::Down));
    }

    #[test]
    fn a_target_of_nothing_can_grow() {
        assert_eq!(damper(0).judge(PageCount(1), CALM, 0), Verdict::Moves(Way::Up));
    }
}
