//! The stall objective: a machine's processors wait for memory no longer than it was promised.
//!
//! Enters: the share of time they waited since the last decision. Leaves: a floor above the guarantee, and how much of
//! what could be taken is.
//!
//! Above the objective the floor grows by steps, from what the machine has, and what is taken from it is halved. Below
//! half of the objective the floor sinks by a small part and the whole is taken again bit by bit. In between both
//! stay: that is where the machine is to be. Adding slowly and backing off fast is what makes many such loops share
//! one resource without a leader (Chiu and Jain, 1989).
//!
//! A raised floor is no guarantee. It is met out of what the siblings have above their guarantees, and where all raise
//! theirs it is divided by shares; it never reaches past the group.
use crate::part::Ppm;
use crate::settings::Terms;
use plimsoll_types::PageCount;

/// How much of its size a machine's floor grows in a second of stalling.
const STEP: Ppm = Ppm::percent(1);
/// How much of what it was raised by the floor loses in a second of calm: less than the dead band in a minute, or a machine at its
/// objective would have its target moved back and forth, each time it waits a little more and a little less than that.
const SINK: Ppm = Ppm(800);
/// How much of what could be taken is taken at least: a machine that always stalls still gives a little.
const APPETITE_MIN: Ppm = Ppm(15_625);
/// How much more of it is taken again after a second of calm.
const APPETITE_STEP: Ppm = Ppm(62_500);
/// A decision that comes later than this counts as one that came after so long.
const LATE_MS: u64 = 10_000;

/// What is remembered of a machine's stalls.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Stall {
    /// The floor, while it is above the guarantee.
    raised: Option<PageCount>,
    /// The part of what could be taken that is.
    appetite: Ppm,
}

impl Stall {
    pub(crate) const fn new() -> Self {
        Self { raised: None, appetite: Ppm::WHOLE }
    }

    pub(crate) const fn appetite(&self) -> Ppm {
        self.appetite
    }

    /// What the floor is above `floor`.
    pub(crate) fn lift(&self, floor: PageCount) -> PageCount {
        self.raised.unwrap_or_default().saturating_sub(floor)
    }

    /// Takes in what the machine waited while it had `consumed`. Its floor rises to at most what it wants.
    /// Returns true when it waited more than it was promised.
    pub(crate) fn look(
        &mut self,
        stalled: Ppm,
        consumed: PageCount,
        wanted: PageCount,
        terms: &Terms,
        elapsed_ms: u64,
    ) -> bool {
        let elapsed_ms = elapsed_ms.min(LATE_MS);
        let per_second = |amount: u64| amount.saturating_mul(elapsed_ms) / 1000;
        if stalled > terms.stall_objective {
            let from = self.raised.unwrap_or(consumed).max(terms.floor);
            let step = PageCount(per_second(STEP.apply(terms.size.0)));
            self.raised = Some((from + step).min(wanted.max(terms.floor)).min(terms.cap));
            self.appetite = Ppm(self.appetite.0 / 2).max(APPETITE_MIN);
            return true;
        }
        if stalled.0 <= terms.stall_objective.0 / 2 {
            let lift = self.lift(terms.floor);
            // At least a page, or rounding would keep the last ones for ever.
            let sunk = lift.saturating_sub(PageCount(per_second(SINK.apply(lift.0)).max(1)));
            self.raised = (sunk > PageCount(0)).then(|| terms.floor + sunk);
            let more = u32::try_from(per_second(APPETITE_STEP.0.into())).unwrap_or(u32::MAX);
            self.appetite = Ppm(self.appetite.0.saturating_add(more)).min(Ppm::WHOLE);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::damper::DEAD_BAND;
    use crate::settings::{Face, MachineSettings, Shares};
    use plimsoll_types::{ByteCount, MachineId};

    const CALM: Ppm = Ppm::ZERO;
    const WAITS: Ppm = Ppm::percent(1);

    /// Of 1000 MiB, 100 guaranteed; it may wait 0.1 % of the time.
    fn terms() -> Terms {
        let (size, reservation) = (ByteCount::mib(1000), ByteCount::mib(100));
        let face = Face::Guarantee { size, reservation, limit: size, shares: Shares::NORMAL };
        Terms::of(&MachineSettings::new(MachineId(1), face)).unwrap()
    }

    fn mib(count: u64) -> PageCount {
        ByteCount::mib(count).pages_floor()
    }

    fn look(stall: &mut Stall, stalled: Ppm) -> PageCount {
        stall.look(stalled, mib(500), mib(900), &terms(), 1000);
        terms().floor + stall.lift(terms().floor)
    }

    #[test]
    fn the_floor_rises_by_steps_from_what_it_has_up_to_what_it_wants() {
        let mut stall = Stall::new();
        assert_eq!([1, 2, 3].map(|_| look(&mut stall, WAITS)), [mib(510), mib(520), mib(530)]);
        assert_eq!((0..100).map(|_| look(&mut stall, WAITS)).last(), Some(mib(900)));
    }

    #[test]
    fn what_is_taken_is_halved_while_it_stalls_and_grows_bit_by_bit_when_it_does_not() {
        let mut stall = Stall::new();
        let mut appetite = |stalled| {
            look(&mut stall, stalled);
            stall.appetite()
        };
        assert_eq!([WAITS, WAITS].map(&mut appetite), [Ppm::percent(50), Ppm::percent(25)]);
        assert_eq!([CALM, CALM].map(&mut appetite), [Ppm(312_500), Ppm(375_000)]);
        assert_eq!((0..100).map(|_| appetite(WAITS)).last(), Some(APPETITE_MIN));
        assert_eq!((0..100).map(|_| appetite(CALM)).last(), Some(Ppm::WHOLE));
    }

    #[test]
    fn between_half_the_objective_and_all_of_it_everything_stays() {
        let mut stall = Stall::new();
        look(&mut stall, WAITS);
        let before = stall.clone();
        for near in [Ppm(501), Ppm(1000)] {
            look(&mut stall, near);
            assert_eq!(stall, before);
        }
        look(&mut stall, Ppm(500));
        assert_ne!(stall, before);
    }

    #[test]
    fn a_raised_floor_sinks_to_the_guarantee() {
        let mut stall = Stall::new();
        let top = look(&mut stall, WAITS);
        let floors: [PageCount; 20_000] = core::array::from_fn(|_| look(&mut stall, CALM));
        assert!(floors.is_sorted_by(|one, next| one >= next));
        assert_eq!(stall.raised, None);
        let moved = top.saturating_sub(floors[59]);
        assert!(moved.0 <= DEAD_BAND.apply(top.0), "in a minute {moved} of {top}");
    }
}
