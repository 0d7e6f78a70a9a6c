//! A controller that brings a guest's balloon to where policy wants it, and stops where the guest cannot give more.
//!
//! Enters: an [`Observation`] whenever somebody looks, and the wanted size. Leaves: a [`Step`]: the size to ask the guest
//! for, if it is to change, and the [`State`] things are in. It has no clock and does no I/O, so a recorded run replays. What
//! must never happen: a balloon that grows while its machine pages, that swings, that grows past what the guest can spare, or
//! that keeps memory a machine needs.
//!
//! **The law.** Four rules, the first that applies decides:
//!
//! 1. *Give back at once.* A target below the ask becomes the ask, whole, whatever else is going on.
//! 2. *Yield to strain.* When the guest pages, runs out of memory, takes memory back from its balloon, or the host has to
//!    bring its pages back, what it has not given yet is not asked for any longer; after a kill, and when it has hardly anything
//!    left, it gets its reserve back. Then the balloon rests, for longer each time strain returns soon.
//! 3. *Judge by deeds.* An ask that is not met and makes no progress for [`INACTIVE`] is *inactive*: use the next rung. After
//!    [`UNCOOPERATIVE`] it is withdrawn, so that the guest does not burn processor time on it nor grant it at a bad moment, and
//!    is tried again after a rest.
//! 4. *Inflate with care.* The ask runs ahead of what the guest holds by one step. Steps grow while they are met, within a
//!    bounded rate, and shrink near the goal, which is the target or what the guest can spare, whichever is less.
//!
//! **Why it does not swing.** Nothing moves inside a dead band. Inflating has two ends that it may not pass, the target and the
//! guest's ceiling; and the way back up after giving something back begins with a rest that doubles. So between two reversals
//! lies at least [`REST_MIN`].
//!
//! **Why lies do not help.** What a guest *says* can only make the controller more careful: it lowers the ceiling or is a
//! strain. Rate and progress depend on what it holds. A sample counts once: one that is repeated, however fresh it claims to
//! be, raises nothing while the balloon grows. A guest that cries for memory is believed, up to the memory of its own that it
//! could take anyway; policy then goes on with the next rung. A guest that says it holds what it does not is out of reach of
//! a balloon: only its resident memory, seen from the host, tells.
mod evidence;
mod plugging;

pub use plugging::{Course as PluggingCourse, Plugged, Plugging, requests};

use crate::control::GuestStatistics;
use evidence::Evidence;
use plimsoll_types::ByteCount;
use std::fmt;
use std::time::Duration;

/// Without progress for this long, a balloon is inactive (squeezed's figure, of long use).
pub const INACTIVE: Duration = Duration::from_secs(5);
/// Without progress for this long, a guest is uncooperative (squeezed's figure).
pub const UNCOOPERATIVE: Duration = Duration::from_secs(20);
/// The first rest after strain or an uncooperative guest: some times the 1 to 2 s between a guest's statistics.
pub const REST_MIN: Duration = Duration::from_secs(10);
/// The longest rest: a guest whose load is gone gives memory within about ten minutes.
pub const REST_MAX: Duration = Duration::from_secs(640);
/// Trouble that comes back within so many rests doubles the rest. The first retry fails after at most 10 + 20 s.
const RELAPSE: u32 = 4;

/// Rates are in 1/1024 of the machine's memory a second. The first one, 2 %: a step at the wrong moment is a nuisance.
const RATE_MIN: u64 = 20;
/// The highest, 16 %: a machine gives half of itself in ten seconds. It is also what virtio-balloon does to a machine of
/// 6 GiB at 0.95 GiB/s (HyperAlloc's figure for 4 KiB pages).
const RATE_MAX: u64 = 164;
/// Slower than 0.1 % of the memory within [`INACTIVE`] is no progress: a tenth would take more than eight minutes.
const PROGRESS: u64 = 1024;
/// The dead band, 1 % of the memory (Proxmox uses 10 MiB, MOM 0.25 %): a change that is worth no message.
const BAND: u64 = 100;
/// What a guest keeps available, 1/16 of its memory, within these bounds. It pays for what is allocated between two looks;
/// a guest below 128 MiB cannot run on less than 16, and one of many GiB needs no more than 512 for that.
const RESERVE: u64 = 16;
const RESERVE_MIN: ByteCount = ByteCount::mib(16);
const RESERVE_MAX: ByteCount = ByteCount::mib(512);

/// No machine has more memory than an address has bits for (52 on x86-64), whatever is claimed; so sums fit.
const MEMORY_MAX: ByteCount = ByteCount(1 << 52);

/// What is seen of one machine at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// The time since any fixed moment.
    pub now: Duration,
    /// The memory the balloon is taken out of.
    pub memory: ByteCount,
    /// What the guest says the balloon holds.
    pub actual: ByteCount,
    /// What the guest says of its memory, if anything.
    pub statistics: Option<GuestStatistics>,
    /// What the host had to bring back of this machine's memory, since any fixed moment.
    pub refaulted: ByteCount,
}

/// What to do, and how things are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Step {
    /// The size to ask the guest for, if it is not what it was asked for last.
    pub ask: Option<ByteCount>,
    /// How things are.
    pub state: State,
}

/// How a balloon is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is where it should be, within the dead band.
    Settled,
    /// It is growing.
    Inflating,
    /// It is shrinking.
    Deflating,
    /// It holds all the guest can spare.
    AtFloor,
    /// It rests, because the machine is or was short of memory.
    Strained(Strain),
    /// The guest has not done what it was asked for a while. It may yet.
    Inactive,
    /// The guest does not do what it is asked; it will be asked again later.
    Uncooperative,
}

/// A sign that a machine is short of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strain {
    /// The guest reads memory back from its disks.
    GuestPages,
    /// The host brings memory of this machine back.
    HostRefaults,
    /// The guest has less than half of its reserve available.
    Low,
    /// The guest took memory back from its balloon unasked.
    TookBack,
    /// The guest killed a process for want of memory.
    OutOfMemory,
}

impl State {
    /// True when the balloon gives less than was wanted and will not for now: whoever needs the memory uses the next rung.
    pub const fn falls_short(self) -> bool {
        matches!(self, Self::AtFloor | Self::Strained(_) | Self::Inactive | Self::Uncooperative)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Settled => "the balloon is where it should be",
            Self::Inflating => "the balloon is growing",
            Self::Deflating => "the balloon is shrinking",
            Self::AtFloor => "the balloon holds all the guest can spare",
            Self::Strained(Strain::GuestPages) => "the balloon rests: the guest is paging",
            Self::Strained(Strain::HostRefaults) => "the balloon rests: the host has to bring its pages back",
            Self::Strained(Strain::Low) => "the balloon rests: the guest has hardly any memory available",
            Self::Strained(Strain::TookBack) => "the balloon rests: the guest took memory back from it",
            Self::Strained(Strain::OutOfMemory) => "the balloon rests: the guest ran out of memory",
            Self::Inactive => "the guest has not moved its balloon for 5 s: other means may be used",
            Self::Uncooperative => "the guest does not move its balloon; it will be asked again",
        })
    }
}

/// The controller of one machine's balloon.
#[derive(Clone, Debug)]
pub struct Controller {
    granularity: ByteCount,
    /// What it was asked for before us.
    inherited: ByteCount,
    evidence: Evidence,
    course: Option<Course>,
    /// In 1/1024 of the memory a second.
    rate: u64,
    rest: Rest,
}

/// What was asked, and what became of it.
#[derive(Clone, Copy, Debug)]
struct Course {
    ask: ByteCount,
    asked_at: Duration,
    /// The most the guest held of what it was asked for.
    held: ByteCount,
    progress: ByteCount,
    progress_at: Duration,
    looked_at: Duration,
}

/// When and why the balloon may not grow.
#[derive(Clone, Copy, Debug)]
struct Rest {
    length: Duration,
    /// The last trouble, and what it was.
    trouble: Option<(Duration, State)>,
}

/// Sizes that follow from the machine's memory.
#[derive(Clone, Copy, Debug)]
struct Scale {
    band: ByteCount,
    reserve: ByteCount,
    memory: ByteCount,
}

/// What the controller leaves available to a guest of that size, whatever is wanted.
pub fn reserve(memory: ByteCount) -> ByteCount {
    ByteCount(memory.0 / RESERVE).clamp(RESERVE_MIN, RESERVE_MAX)
}

impl Scale {
    fn of(memory: ByteCount, granularity: ByteCount) -> Self {
        let memory = memory.min(MEMORY_MAX);
        Self { band: ByteCount(memory.0 / BAND).max(granularity), reserve: reserve(memory), memory }
    }
}

impl Rest {
    /// Why the balloon rests, if it does.
    fn reason(&self, now: Duration) -> Option<State> {
        self.trouble.filter(|(at, _)| now.saturating_sub(*at) < self.length).map(|(_, state)| state)
    }

    /// Begins a rest, or prolongs the one that is.
    fn begin(&mut self, now: Duration, state: State) {
        if let Some((at, _)) = self.trouble
            && self.reason(now).is_none()
        {
            let is_relapse = now.saturating_sub(at) < self.length * RELAPSE;
            self.length = if is_relapse { (self.length * 2).min(REST_MAX) } else { REST_MIN };
        }
        self.trouble = Some((now, state));
    }
}

impl Controller {
    /// A controller for a balloon that is asked for in multiples of `granularity` and was asked last, by whomever, for
    /// `inherited`: its target, or what it holds where the interface does not tell the target.
    pub fn new(granularity: ByteCount, inherited: ByteCount) -> Self {
        let granularity = granularity.clamp(ByteCount(1), MEMORY_MAX);
        let rest = Rest { length: REST_MIN, trouble: None };
        Self { granularity, inherited, evidence: Evidence::new(), course: None, rate: RATE_MIN, rest }
    }

    /// Looks once, on the way to a balloon of `target`. Call it as often as you like; about once a second is meant.
    pub fn step(&mut self, seen: &Observation, target: ByteCount) -> Step {
        let scale = Scale::of(seen.memory, self.granularity);
        let target = self.whole(target.min(scale.memory.saturating_sub(scale.reserve)));
        let course =
            self.course.get_or_insert_with(|| Course::begin(self.inherited.min(scale.memory), seen.now));
        // More than there is cannot be held: what it held before is believed instead.
        let actual = if seen.actual <= scale.memory { seen.actual } else { course.held };
        let seen = Observation { actual, ..*seen };
        let has_taken_back = course.took_back(actual, &scale);
        course.note(&seen, &scale);
        let course = *course;
        let findings = self.evidence.look(&seen, &scale);
        let strain = if has_taken_back { Some(Strain::TookBack) } else { findings.strain };

        let (ask, state) = match strain {
            Some(strain) => self.yield_to(strain, &course, &seen, target, findings.ceiling, &scale),
            None => self.pursue(&course, &seen, target, findings.ceiling, &scale),
        };
        // The first rule: it stands last because it has the last word.
        let gives_back = course.ask > target && (target == ByteCount(0) || course.ask > target + scale.band);
        let (ask, state) = if gives_back { (ask.min(target), State::Deflating) } else { (ask, state) };
        self.conclude(ask, state, seen.now)
    }

    /// Rule 2.
    fn yield_to(
        &mut self,
        strain: Strain,
        course: &Course,
        seen: &Observation,
        target: ByteCount,
        ceiling: Option<ByteCount>,
        scale: &Scale,
    ) -> (ByteCount, State) {
        self.rate = RATE_MIN;
        self.rest.begin(seen.now, State::Strained(strain));
        let bearable = match strain {
            Strain::OutOfMemory => seen.actual.saturating_sub(scale.reserve),
            Strain::Low => ceiling.unwrap_or_default().min(seen.actual),
            Strain::GuestPages | Strain::HostRefaults | Strain::TookBack => seen.actual,
        };
        let bearable = self.whole(bearable).min(course.ask);
        let is_relief = bearable + scale.band < course.ask || bearable + self.granularity <= seen.actual;
        let ask = if is_relief { bearable } else { course.ask };
        (ask, if target <= ask + scale.band { State::Settled } else { State::Strained(strain) })
    }

    /// Rules 3 and 4.
    fn pursue(
        &mut self,
        course: &Course,
        seen: &Observation,
        target: ByteCount,
        ceiling: Option<ByteCount>,
        scale: &Scale,
    ) -> (ByteCount, State) {
        let now = seen.now;
        if seen.actual + scale.band < course.ask {
            return match now.saturating_sub(course.progress_at) {
                stuck if stuck >= UNCOOPERATIVE => {
                    self.rate = RATE_MIN;
                    self.rest.begin(now, State::Uncooperative);
                    (self.whole(seen.actual), State::Uncooperative)
                }
                stuck if stuck >= INACTIVE => (course.ask, State::Inactive),
                _ => (course.ask, State::Inflating),
            };
        }
        if target <= course.ask + scale.band {
            self.rate = RATE_MIN;
            let is_above = seen.actual > course.ask + scale.band;
            return (course.ask, if is_above { State::Deflating } else { State::Settled });
        }
        if let Some(reason) = self.rest.reason(now) {
            return (course.ask, reason);
        }
        let goal = ceiling.map_or(target, |ceiling| self.whole(ceiling).min(target));
        let left = goal.saturating_sub(course.ask);
        if left <= scale.band {
            return (course.ask, State::AtFloor);
        }
        let step = self.stride(left, now.saturating_sub(course.asked_at), scale);
        if step > ByteCount(0) {
            self.rate = (self.rate * 3 / 2).min(RATE_MAX);
        }
        (course.ask + step, State::Inflating)
    }

    /// How far to go at once with `left` to go, this long after the last ask; zero while it is worth no message.
    fn stride(&self, left: ByteCount, elapsed: Duration, scale: &Scale) -> ByteCount {
        let share = u128::from(scale.memory.0) * u128::from(self.rate);
        let earned = share * elapsed.as_millis() / (1024 * 1000);
        // What was not used while nothing was wanted is not saved up beyond a second's worth.
        let most = (share / 1024).max(u128::from(scale.band.0));
        let allowed = ByteCount(u64::try_from(earned.min(most)).unwrap_or(u64::MAX));
        if allowed < scale.band {
            return ByteCount(0);
        }
        let near = ByteCount(left.0 / 2).max(scale.band);
        let wanted = if left <= scale.band + scale.band { left } else { near };
        self.whole(wanted.min(allowed))
    }

    fn conclude(&mut self, ask: ByteCount, state: State, now: Duration) -> Step {
        let changed = self.course.as_mut().filter(|course| course.ask != ask);
        let ask = changed.map(|course| {
            course.retarget(ask, now);
            ask
        });
        Step { ask, state }
    }

    /// Rounded down to what can be asked for.
    const fn whole(&self, size: ByteCount) -> ByteCount {
        ByteCount(size.0 - size.0 % self.granularity.0)
    }
}

impl Course {
    /// The first ask of our own may come at once.
    fn begin(ask: ByteCount, now: Duration) -> Self {
        let asked_at = now.saturating_sub(Duration::from_secs(1));
        Self { ask, asked_at, held: ByteCount(0), progress: ByteCount(0), progress_at: now, looked_at: now }
    }

    /// True if the guest holds less than it held, and that was not asked for.
    fn took_back(&self, actual: ByteCount, scale: &Scale) -> bool {
        actual + scale.band < self.held.min(self.ask)
    }

    fn note(&mut self, seen: &Observation, scale: &Scale) {
        let Observation { now, actual, .. } = *seen;
        // After memory was taken back, the lower size is the one to compare with.
        self.held = if self.took_back(actual, scale) { actual } else { self.held.max(actual).min(self.ask) };
        // While nobody looked, the machine may have been paused: no more than a moment of that is held against it.
        let unseen = now.saturating_sub(self.looked_at).saturating_sub(INACTIVE);
        self.progress_at = self.progress_at.saturating_add(unseen);
        self.looked_at = now;
        let is_met = actual + scale.band >= self.ask;
        if is_met || actual.0 >= self.progress.0.saturating_add(scale.memory.0 / PROGRESS) {
            (self.progress, self.progress_at) = (actual, now);
        }
    }

    fn retarget(&mut self, ask: ByteCount, now: Duration) {
        let held = self.held.min(ask);
        *self = Self { ask, asked_at: now, held, progress: held, progress_at: now, looked_at: now };
    }
}
