//! Targets that do not flutter.
//!
//! Enters: the target a machine should have by the numbers of this moment. Leaves: the one it has. Samples are random,
//! so what should be changes all the time by a little; moving memory costs, so what is does not.
//!
//! * A change of at most 5 % of the target is not made, unless it is urgent: up because the machine stalls, down because the
//!   host is short.
//! * A target that moved one way does not move back within a minute; where that is urgent, by a [`SHIVER`] in all. So it
//!   oscillates, moves back and forth by more than 5 % within a minute, only where there is no other way: a guarantee, a
//!   limit, a host at its end, or a sum that is more than there is although everybody else has given way. Then all that are
//!   held give way by the same part, and no further than is needed.
//! * What all machines share is measured, and may be more for a moment: pages are merged that are soon written again. No target that
//!   exists is raised on that before it has been there for a minute, or two (`Lately`), but for a guarantee.
//!
//! What is taken, and what is granted, goes by the target and by what is due now, whichever is more. So a machine that
//! stalls waits for nothing while its target is held, and loses nothing.
use crate::auction::PAGES_MAX;
use crate::part::Ppm;
use alloc::vec::Vec;
use core::cmp::Ordering;
use core::fmt;
use plimsoll_types::{ByteCount, PageCount};

/// Changes that are not worth making, in parts of the target. MOM moves a balloon by at most as much at a time.
pub const DEAD_BAND: Ppm = Ppm::percent(5);
/// How long a target does not move back.
pub const REVERSAL_MS: u64 = 60_000;
/// By how much it may within that, and what it may have moved the other way without being held. Half of the dead band, so
/// that a target that sinks to the half in a minute has not oscillated either.
pub const SHIVER: Ppm = Ppm(DEAD_BAND.0 / 2);
/// What machines share is not more than the least of late where it is more by less than such a part.
const NOISE: u64 = 64;
/// Movements one way within so long are remembered as one.
const AT_ONCE_MS: u64 = REVERSAL_MS / 4;

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
    /// The others' targets leave it no room of what has been there for a while; those that sink make some.
    NoRoom,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Small => write!(f, "the difference is at most {DEAD_BAND}"),
            Self::Reversal { ago_ms } => write!(f, "it moved the other way {} s ago", ago_ms / 1000),
            Self::NoRoom => f.write_str("the others' targets, or what there was of late, leave no room yet"),
        }
    }
}

/// The least that all machines shared of late: in the minute under way and in the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Lately {
    /// All memory of the host, and how many machines were seen: what comes or goes with these is no matter of a moment.
    of: (ByteCount, usize),
    begun_ms: u64,
    least: PageCount,
    /// In the minute before.
    before: PageCount,
}

impl Lately {
    /// With what they share now. What they share when machines come or go does not count: their memory may be counted where they are not.
    pub(crate) fn with(known: Option<Self>, of: (ByteCount, usize), budget: PageCount, now_ms: u64) -> Self {
        let Some(known) = known.filter(|known| known.of == of) else {
            return Self { of, begun_ms: now_ms, least: PAGES_MAX, before: PAGES_MAX };
        };
        match now_ms.saturating_sub(known.begun_ms) {
            0..REVERSAL_MS => Self { least: known.least.min(budget), ..known },
            _ => Self { of, begun_ms: now_ms, least: budget, before: known.least },
        }
    }

    /// What targets are raised up to: what differs by less is noise, and moves none far.
    pub(crate) fn most(&self) -> PageCount {
        let least = self.least.min(self.before);
        PageCount(least.0.saturating_add(least.0 / NOISE))
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

impl Way {
    const fn back(self) -> Self {
        match self {
            Self::Up => Self::Down,
            Self::Down => Self::Up,
        }
    }
}

/// A way a target moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
struct Movement {
    way: Way,
    by: PageCount,
    begun_ms: u64,
    ended_ms: u64,
}

/// A machine's target and its movements of the last minute.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Damper {
    target: PageCount,
    /// Oldest first. Older records have none of them: their targets are free to move at first.
    #[cfg_attr(feature = "serde", serde(default))]
    movements: Vec<Movement>,
}

impl Damper {
    pub(crate) const fn new(target: PageCount) -> Self {
        Self { target, movements: Vec::new() }
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
        match self.turns(way, now_ms) {
            Some(ago_ms) => Verdict::Held(Hold::Reversal { ago_ms }),
            None => Verdict::Moves(way),
        }
    }

    /// How long ago it moved the other way than this, if that holds it.
    pub(crate) fn reversal(&self, way: Way, now_ms: u64) -> Option<u64> {
        if self.moved(way.back(), now_ms) <= self.shiver() {
            return None;
        }
        let last = self.movements.iter().rev().find(|one| one.way != way)?;
        Some(now_ms.saturating_sub(last.ended_ms))
    }

    /// The same where what it did last was to move the other way.
    pub(crate) fn turns(&self, way: Way, now_ms: u64) -> Option<u64> {
        self.reversal(way, now_ms).filter(|_| self.movements.last().is_some_and(|last| last.way != way))
    }

    /// The lowest that it may be now, unless there is no other way.
    pub(crate) fn least(&self, now_ms: u64) -> PageCount {
        match self.reversal(Way::Down, now_ms) {
            Some(_) => self.target.saturating_sub(self.left(Way::Down, now_ms)),
            None => PageCount(0),
        }
    }

    /// The highest that it may be now, unless there is no other way.
    pub(crate) fn most(&self, now_ms: u64) -> PageCount {
        match self.reversal(Way::Up, now_ms) {
            Some(_) => self.target + self.left(Way::Up, now_ms),
            None => PAGES_MAX,
        }
    }

    /// Moves the target, whatever was judged.
    pub(crate) fn move_to(&mut self, target: PageCount, now_ms: u64) {
        let way = if target > self.target { Way::Up } else { Way::Down };
        let by = PageCount(target.0.abs_diff(self.target.0));
        self.target = target;
        self.movements.retain(|one| is_of(now_ms, one));
        match self.movements.last_mut() {
            Some(last) if last.way == way && now_ms.saturating_sub(last.begun_ms) < AT_ONCE_MS => {
                (last.by, last.ended_ms) = (last.by + by, now_ms);
            }
            _ => self.movements.push(Movement { way, by, begun_ms: now_ms, ended_ms: now_ms }),
        }
    }

    fn shiver(&self) -> PageCount {
        PageCount(SHIVER.apply(self.target.0))
    }

    /// How far it moved that way lately.
    fn moved(&self, way: Way, now_ms: u64) -> PageCount {
        self.movements.iter().filter(|one| one.way == way && is_of(now_ms, one)).map(|one| one.by).sum()
    }

    /// By how much it may move back that way.
    fn left(&self, way: Way, now_ms: u64) -> PageCount {
        self.shiver().saturating_sub(self.moved(way, now_ms))
    }
}

/// Whether a movement is of the last minute.
fn is_of(now_ms: u64, movement: &Movement) -> bool {
    now_ms.saturating_sub(movement.ended_ms) < REVERSAL_MS
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
    fn a_target_moves_back_after_a_minute_or_a_little_when_it_must() {
        let mut damper = damper(1000);
        damper.move_to(PageCount(500), 1000);
        let up = |urgent, now_ms| damper.judge(PageCount(800), urgent, now_ms);
        assert_eq!(up(CALM, 60_999), Verdict::Held(Hold::Reversal { ago_ms: 59_999 }));
        assert_eq!(up(CALM, 61_000), Verdict::Moves(Way::Up));
        assert_eq!(up(Urgent { up: true, down: false }, 1001), Verdict::Moves(Way::Up));
        assert_eq!(up(Urgent { up: false, down: true }, 1001), Verdict::Held(Hold::Reversal { ago_ms: 1 }));
        assert_eq!(damper.judge(PageCount(300), CALM, 1001), Verdict::Moves(Way::Down));
        assert_eq!((damper.most(60_999), damper.least(60_999)), (PageCount(512), PageCount(0)));
        assert_eq!(damper.most(61_000), PAGES_MAX);
    }

    #[test]
    fn it_shivers_by_little_and_what_it_shivered_is_gone_for_a_minute() {
        let mut damper = damper(500);
        damper.move_to(PageCount(1000), 0);
        assert_eq!(damper.least(1000), PageCount(975));
        damper.move_to(PageCount(990), 1000);
        // What it sank holds it not, and counts against what it may sink.
        assert_eq!((damper.least(2000), damper.most(2000)), (PageCount(976), PAGES_MAX));
        damper.move_to(PageCount(1020), 20_000);
        assert_eq!(damper.least(21_000), PageCount(1005));
        // The rise of 500 is over, that of 30 is more than a shiver, the sinking of 10 is over: all that is left to it.
        assert_eq!(damper.least(61_000), PageCount(995));
        assert_eq!(damper.least(80_000), PageCount(0));
    }

    #[test]
    fn a_shiver_turns_nothing() {
        let mut damper = damper(1000);
        for second in 0..20 {
            damper.move_to(PageCount(1000 + second % 2), second * 1000);
        }
        assert_eq!((damper.least(20_000), damper.most(20_000)), (PageCount(0), PAGES_MAX));
        assert_eq!(damper.judge(PageCount(900), CALM, 20_000), Verdict::Moves(Way::Down));
    }

    #[test]
    fn what_is_remembered_is_little_however_often_it_moves() {
        let mut damper = damper(0);
        for second in 1..1000 {
            damper.move_to(PageCount(second), second * 1000);
            assert!(damper.movements.len() <= 6);
        }
    }

    #[test]
    fn a_target_of_nothing_can_grow() {
        assert_eq!(damper(0).judge(PageCount(1), CALM, 0), Verdict::Moves(Way::Up));
    }
}
