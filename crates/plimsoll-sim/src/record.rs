//! What is written down of a host while it is simulated.
//!
//! Enters: plans, and what intervals were like for machines. Leaves: sums, and the first time that each kind of thing went
//! wrong, with the words of the policy. All sums are of whole numbers, so that they are the same in whatever order hosts
//! are added.
use crate::machine::{Class, Spent};
use crate::time::Millis;
use plimsoll_policy::Ppm;
use plimsoll_policy::damper::{DEAD_BAND, REVERSAL_MS};
use plimsoll_policy::host_state::HostState;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use std::collections::VecDeque;

/// Points in time of a report.
pub(crate) const MOMENTS: usize = 144;
/// States of a host.
pub(crate) const STATES: [HostState; 5] =
    [HostState::High, HostState::Clear, HostState::Soft, HostState::Hard, HostState::Low];
/// A machine's waiting is held against its objective minute by minute.
const MINUTE_NS: u64 = 60_000_000_000;

/// What can go wrong, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trouble {
    /// A machine had less than it was guaranteed and was denied more.
    Guarantee,
    /// A machine was not let in again.
    Refused,
    /// A machine waited longer than its objective, for a minute.
    Objective,
    /// A host in state low.
    Low,
    /// One in state hard.
    Hard,
    /// A target moved back and forth.
    Oscillation,
}

/// Kinds of trouble.
pub(crate) const TROUBLES: usize = 6;

/// The first trouble of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct First {
    pub(crate) at: Millis,
    pub(crate) host: usize,
    pub(crate) machine: Option<(MachineId, usize)>,
    pub(crate) what: String,
}

/// What was written down of the machines of a class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClassSums {
    pub(crate) machines: u64,
    pub(crate) waited_ns: u128,
    pub(crate) ran_ns: u128,
    pub(crate) minutes: u64,
    pub(crate) minutes_over: u64,
    /// Page-milliseconds.
    pub(crate) consumed: u128,
    pub(crate) contents: u128,
    pub(crate) active: u128,
    pub(crate) time_ms: u128,
    /// What the machine waited that waited most.
    pub(crate) worst: Ppm,
    /// Machines that were denied what they were guaranteed, and for how long.
    pub(crate) broken: u64,
    pub(crate) broken_ms: u64,
    pub(crate) oscillations: u64,
}

impl ClassSums {
    pub(crate) fn add(&mut self, other: &Self) {
        self.machines += other.machines;
        self.waited_ns += other.waited_ns;
        self.ran_ns += other.ran_ns;
        self.minutes += other.minutes;
        self.minutes_over += other.minutes_over;
        self.consumed += other.consumed;
        self.contents += other.contents;
        self.active += other.active;
        self.time_ms += other.time_ms;
        self.worst = self.worst.max(other.worst);
        self.broken += other.broken;
        self.broken_ms += other.broken_ms;
        self.oscillations += other.oscillations;
    }
}

/// A stretch of time, over all hosts added so far. Page-milliseconds where nothing else is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) state_ms: [u64; STATES.len()],
    pub(crate) consumed: u128,
    pub(crate) contents: u128,
    pub(crate) active: u128,
    pub(crate) free: u128,
    pub(crate) waited_ns: u128,
    pub(crate) ran_ns: u128,
}

/// What is so for a time on a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) consumed: PageCount,
    pub(crate) contents: PageCount,
    pub(crate) active: PageCount,
    pub(crate) free: PageCount,
    pub(crate) waited_ns: u64,
    pub(crate) ran_ns: u64,
}

/// Time cut into equal moments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Timeline {
    pub(crate) each: Millis,
    pub(crate) moments: Vec<Moment>,
}

impl Timeline {
    pub(crate) fn new(duration: Millis) -> Self {
        let each = Millis(duration.0.div_ceil(MOMENTS as u64).max(1000));
        let count = usize::try_from(duration.0.div_ceil(each.0)).unwrap_or(MOMENTS);
        Self { each, moments: vec![Moment::default(); count] }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (moment, more) in self.moments.iter_mut().zip(&other.moments) {
            moment.state_ms.iter_mut().zip(more.state_ms).for_each(|(sum, ms)| *sum += ms);
            moment.consumed += more.consumed;
            moment.contents += more.contents;
            moment.active += more.active;
            moment.free += more.free;
            moment.waited_ns += more.waited_ns;
            moment.ran_ns += more.ran_ns;
        }
    }

    /// What was so from one time to another; what was waited is spread over it.
    fn stretch(&mut self, from: Millis, to: Millis, state: HostState, what: &Stretch) {
        let mut at = from.0;
        while at < to.0 {
            let index = at / self.each.0;
            let end = ((index + 1) * self.each.0).min(to.0);
            let ms = end - at;
            at = end;
            let Some(moment) = usize::try_from(index).ok().and_then(|index| self.moments.get_mut(index))
            else {
                return;
            };
            let part = |ns: u64| u128::from(ns) * u128::from(ms) / u128::from(to.0 - from.0);
            let area = |pages: PageCount| u128::from(pages.0) * u128::from(ms);
            moment.state_ms[state as usize] += ms;
            moment.consumed += area(what.consumed);
            moment.contents += area(what.contents);
            moment.active += area(what.active);
            moment.free += area(what.free);
            moment.waited_ns += part(what.waited_ns);
            moment.ran_ns += part(what.ran_ns);
        }
    }
}

/// What is watched of a machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch {
    target: Option<PageCount>,
    /// When its target moved lately, up by and down by how much.
    moves: VecDeque<(u64, u64, u64)>,
    minute: (u64, u64),
    waited_ns: u64,
    ran_ns: u64,
    broken_ms: u64,
}

/// All that is written down of one host.
#[derive(Clone, Debug)]
pub(crate) struct HostRecord {
    pub(crate) host: usize,
    pub(crate) machines: u64,
    pub(crate) sizes: ByteCount,
    pub(crate) decisions: u64,
    pub(crate) longest: Millis,
    pub(crate) state_ms: [u64; STATES.len()],
    pub(crate) lowest_free: ByteCount,
    pub(crate) classes: Vec<ClassSums>,
    pub(crate) firsts: [Option<First>; TROUBLES],
    pub(crate) restarts: u64,
    pub(crate) refusals: u64,
    pub(crate) timeline: Timeline,
}

impl HostRecord {
    pub(crate) fn new(host: usize, classes: usize, duration: Millis) -> Self {
        Self {
            host,
            machines: 0,
            sizes: ByteCount(0),
            decisions: 0,
            longest: Millis(0),
            state_ms: [0; STATES.len()],
            lowest_free: ByteCount(u64::MAX),
            classes: vec![ClassSums::default(); classes],
            firsts: std::array::from_fn(|_| None),
            restarts: 0,
            refusals: 0,
            timeline: Timeline::new(duration),
        }
    }

    /// Something went wrong; `what` is asked for only the first time.
    pub(crate) fn trouble(
        &mut self,
        trouble: Trouble,
        at: Millis,
        machine: Option<(MachineId, &Class)>,
        what: impl FnOnce() -> String,
    ) {
        let host = self.host;
        let machine = machine.map(|(id, class)| (id, class.index));
        self.firsts[trouble as usize].get_or_insert_with(|| First { at, host, machine, what: what() });
    }

    /// A step ended.
    pub(crate) fn step(&mut self, from: Millis, to: Millis, state: HostState, what: &Stretch) {
        self.decisions += 1;
        self.longest = self.longest.max(Millis(to.0 - from.0));
        self.state_ms[state as usize] += to.0 - from.0;
        self.lowest_free = self.lowest_free.min(what.free.bytes());
        self.timeline.stretch(from, to, state, what);
    }

    /// A machine's target, as it was just decided.
    pub(crate) fn target(
        &mut self,
        watch: &mut Watch,
        id: MachineId,
        class: &Class,
        now: Millis,
        target: PageCount,
    ) {
        let Some(before) = watch.target.replace(target).filter(|before| *before != target) else { return };
        watch.moves.push_back((now.0, target.saturating_sub(before).0, before.saturating_sub(target).0));
        while watch.moves.front().is_some_and(|(at, ..)| now.0 - at >= REVERSAL_MS) {
            watch.moves.pop_front();
        }
        let (up, down) =
            watch.moves.iter().fold((0, 0), |(up, down), (_, rise, fall)| (up + rise, down + fall));
        if up.min(down) > DEAD_BAND.apply(target.0.max(before.0)) {
            self.classes[class.index].oscillations += 1;
            watch.moves.clear();
            let (up, down) = (PageCount(up).bytes(), PageCount(down).bytes());
            self.trouble(Trouble::Oscillation, now, Some((id, class)), || {
                format!("its target rose by {up} and sank by {down} within a minute")
            });
        }
    }

    /// What an interval that ends `now` was like for a machine.
    pub(crate) fn spent(
        &mut self,
        watch: &mut Watch,
        id: MachineId,
        class: &Class,
        now: Millis,
        time: Millis,
        spent: &Spent,
    ) {
        let sums = &mut self.classes[class.index];
        sums.waited_ns += u128::from(spent.waited_ns);
        sums.ran_ns += u128::from(spent.ran_ns);
        watch.waited_ns += spent.waited_ns;
        watch.ran_ns += spent.ran_ns;
        watch.minute = (watch.minute.0 + spent.waited_ns, watch.minute.1 + spent.ran_ns);
        let (waited, ran) = watch.minute;
        if ran >= MINUTE_NS * class.processors {
            watch.minute = (0, 0);
            let minutes = ran / (MINUTE_NS * class.processors);
            sums.minutes += minutes;
            let share = Ppm::of(waited, ran);
            if share > class.objective {
                sums.minutes_over += minutes;
                self.trouble(Trouble::Objective, now, Some((id, class)), || {
                    format!("it waited for memory {share} of a minute; {} were promised", class.objective)
                });
            }
        }
        if spent.below_guarantee > PageCount(0) {
            let sums = &mut self.classes[class.index];
            sums.broken += u64::from(watch.broken_ms == 0);
            sums.broken_ms += time.0;
            watch.broken_ms += time.0;
            let lacks = spent.below_guarantee.bytes();
            self.trouble(Trouble::Guarantee, now, Some((id, class)), || {
                format!("it was denied {lacks} of what it is guaranteed")
            });
        }
    }

    /// What was so of a machine for a time.
    pub(crate) fn held(
        &mut self,
        class: &Class,
        time: Millis,
        consumed: PageCount,
        contents: PageCount,
        active: PageCount,
    ) {
        let sums = &mut self.classes[class.index];
        let area = |pages: PageCount| u128::from(pages.0) * u128::from(time.0);
        sums.consumed += area(consumed);
        sums.contents += area(contents);
        sums.active += area(active);
        sums.time_ms += u128::from(time.0);
    }

    /// A machine is gone, or everything has ended.
    pub(crate) fn close(&mut self, watch: &Watch, class: &Class) {
        let sums = &mut self.classes[class.index];
        sums.worst = sums.worst.max(Ppm::of(watch.waited_ns, watch.ran_ns));
    }

    /// What all machines of the host waited, of the time they ran.
    pub(crate) fn waited(&self) -> Ppm {
        let (waited, ran) = self
            .classes
            .iter()
            .fold((0, 0), |(waited, ran), sums| (waited + sums.waited_ns, ran + sums.ran_ns));
        ppm(waited, ran)
    }
}

/// The mean of a sum that may be more than 64 bits; 0 of nothing.
pub(crate) fn mean(sum: u128, count: u128) -> u64 {
    sum.checked_div(count).and_then(|mean| u64::try_from(mean).ok()).unwrap_or(0)
}

/// A part of a whole that may be more than 64 bits.
pub(crate) fn ppm(part: u128, whole: u128) -> Ppm {
    let ppm = (part * u128::from(Ppm::WHOLE.0)).checked_div(whole).unwrap_or(0);
    Ppm(u32::try_from(ppm).unwrap_or(u32::MAX))
}
