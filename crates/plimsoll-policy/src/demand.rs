//! How much memory a machine needs.
//!
//! Enters: what the host sampled, what came back, what the guest claims. Leaves: a [`Demand`], and a [`SampleFault`]
//! for each number that could not be believed. A bad number costs its own machine at most the benefit of the doubt; it
//! stops nothing, and changes nothing for the others.
//!
//! ```text
//! active   = sampled                         the host's own estimate: a guest cannot forge it
//!          + what came back lately           what is taken and touched again is in use, and was not sampled
//!          at most what the guest keeps anything in: its total less its free memory
//! wanted   = the larger of: active and its buffer; what it consumes and has not reported free
//! ```
//!
//! A guest's claims only ever lower its own demand, so a guest that lies hurts itself, and one that is silent loses
//! nothing. Without a sample the last good one stands. A machine that never had one is believed to use all it consumes
//! for its first minute, when all of it is newly touched, and after that no more than it is guaranteed.
use crate::part::Ppm;
use crate::settings::Terms;
use crate::view::{MachineView, Phase, Reading};
use alloc::vec::Vec;
use core::fmt;
use plimsoll_types::{ByteCount, PageCount};

/// A sample older than this is of another workload: one and a half of ESX's sample periods of 60 s.
pub const SAMPLE_STALE_MS: u64 = 90_000;
/// Guests are asked every few seconds; one that has not answered for so long has stopped answering.
pub const STATISTICS_STALE_MS: u64 = 30_000;
/// How long a machine is given to be sampled for the first time: ESX's sample period.
pub const NEWBORN_MS: u64 = 60_000;
/// How long what came back counts.
const RETURNED_MS: u64 = 60_000;
/// Pages that must have been taken for the part that came back to mean anything; a sampling period draws fewer.
const TAKEN_MIN: u64 = 256;
/// The part that is supposed to come back until it is known: a guess, between the cold and the hot machine.
const RETURNS_UNKNOWN: Ppm = Ppm::percent(10);

/// Which number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Number {
    /// The host's sampled estimate.
    Active,
    /// The guest's total memory.
    GuestTotal,
    /// The guest's free memory.
    GuestFree,
    /// What the machine consumes.
    Consumed,
    /// Pages that came back.
    Returned,
    /// Time its processors waited, in millionths.
    Stalled,
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "sampled use",
            Self::GuestTotal => "total memory as the guest says",
            Self::GuestFree => "free memory as the guest says",
            Self::Consumed => "consumption",
            Self::Returned => "count of pages that came back",
            Self::Stalled => "stalled time in millionths",
        })
    }
}

/// Why a number was not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[expect(missing_docs, reason = "fields are the number, and what it was held against")]
pub enum SampleFault {
    /// There is none.
    Missing { number: Number },
    /// It was taken too long ago.
    Stale { number: Number, age_ms: u64, most_ms: u64 },
    /// It is below zero.
    Negative { number: Number, found: i64 },
    /// It is more than can be.
    Absurd { number: Number, found: u64, most: u64 },
}

impl fmt::Display for SampleFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Missing { number } => write!(f, "there is no {number} yet"),
            Self::Stale { number, age_ms, most_ms } => {
                write!(f, "the {number} is {} s old, of use for {} s", age_ms / 1000, most_ms / 1000)
            }
            Self::Negative { number, found } => write!(f, "the {number} is negative ({found})"),
            Self::Absurd { number, found, most } => {
                write!(f, "the {number} is {found}, more than the {most} there can be")
            }
        }
    }
}

/// What a demand rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Basis {
    /// A sample of now.
    Sampled,
    /// The last good sample.
    Remembered {
        /// How long ago it was seen.
        age_ms: u64,
    },
    /// None yet, in the machine's first minute: all it consumes.
    Newborn,
    /// None ever: no more than it is guaranteed.
    Guaranteed,
}

impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Sampled => f.write_str("sampled"),
            Self::Remembered { age_ms } => write!(f, "sampled {} s ago", age_ms / 1000),
            Self::Newborn => f.write_str("all it has, being new"),
            Self::Guaranteed => f.write_str("never sampled"),
        }
    }
}

/// How much memory a machine needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Demand {
    /// What it uses: held untaxed.
    pub active: PageCount,
    /// What it uses, holds, and is to have in reserve: it is not given more than this.
    pub wanted: PageCount,
    /// What `active` rests on.
    pub basis: Basis,
}

/// What is remembered of a machine's use.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Use {
    born_ms: u64,
    /// The last good sample, and when it was taken.
    sampled: Option<(PageCount, u64)>,
    /// Pages taken, and pages that came back: sums that fade within a minute.
    taken: u64,
    returned: u64,
}

impl Use {
    pub(crate) const fn new(now_ms: u64) -> Self {
        Self { born_ms: now_ms, sampled: None, taken: 0, returned: 0 }
    }

    /// The part of what was taken lately that came back.
    pub(crate) fn returns(&self) -> Ppm {
        if self.taken < TAKEN_MIN {
            return RETURNS_UNKNOWN;
        }
        Ppm::of(self.returned, self.taken).min(Ppm::WHOLE)
    }

    /// Takes in a view, `elapsed_ms` after the last one.
    pub(crate) fn look(
        &mut self,
        machine: &MachineView,
        terms: &Terms,
        now_ms: u64,
        elapsed_ms: u64,
        faults: &mut Vec<SampleFault>,
    ) -> Demand {
        self.count_returns(machine, terms, elapsed_ms, faults);
        match check_sample(machine.active, terms.size) {
            Ok((pages, age_ms)) => self.sampled = Some((pages, now_ms.saturating_sub(age_ms))),
            Err(fault) => faults.push(fault),
        }
        let consumed = machine.consumed.pages_ceil();
        let (sampled, basis) = match self.sampled {
            Some((pages, then)) if now_ms.saturating_sub(then) <= SAMPLE_STALE_MS => (pages, Basis::Sampled),
            Some((pages, then)) => (pages, Basis::Remembered { age_ms: now_ms.saturating_sub(then) }),
            None if now_ms.saturating_sub(self.born_ms) < NEWBORN_MS => (consumed, Basis::Newborn),
            None => (consumed.min(terms.floor), Basis::Guaranteed),
        };
        let mut active = PageCount(sampled.0.saturating_add(self.returned)).min(terms.size);
        match check_guest(machine, terms.size) {
            Ok(Some(kept)) => active = active.min(kept),
            Ok(None) => {}
            Err(fault) => faults.push(fault),
        }
        let buffered = PageCount(active.0.saturating_add(terms.buffer.apply(active.0)));
        let in_use = machine.consumed.saturating_sub(machine.reported_free).pages_ceil();
        let wanted = buffered.max(in_use).max(startup(machine, terms));
        Demand { active, wanted: wanted.min(terms.cap), basis }
    }

    fn count_returns(
        &mut self,
        machine: &MachineView,
        terms: &Terms,
        elapsed_ms: u64,
        faults: &mut Vec<SampleFault>,
    ) {
        let fade = |sum: u64| {
            let gone = u128::from(sum) * u128::from(elapsed_ms.min(RETURNED_MS)) / u128::from(RETURNED_MS);
            sum - u64::try_from(gone).unwrap_or(sum)
        };
        (self.taken, self.returned) = (fade(self.taken), fade(self.returned));
        let (found, most) = (machine.returned.0, terms.size.0);
        if found > most {
            faults.push(SampleFault::Absurd { number: Number::Returned, found, most });
            return;
        }
        self.taken = self.taken.saturating_add(machine.taken.0).min(most);
        self.returned = self.returned.saturating_add(found).min(most);
    }
}

/// What it is to have for being in the middle of its start.
pub(crate) fn startup(machine: &MachineView, terms: &Terms) -> PageCount {
    match machine.phase {
        Phase::Starting => terms.startup,
        Phase::Running => PageCount(0),
    }
}

/// A sample in pages and its age, if it can be believed.
fn check_sample(reading: Option<Reading>, size: PageCount) -> Result<(PageCount, u64), SampleFault> {
    let number = Number::Active;
    let Reading { bytes, age_ms } = reading.ok_or(SampleFault::Missing { number })?;
    check_age(number, age_ms, SAMPLE_STALE_MS)?;
    Ok((check_bytes(number, bytes, size)?, age_ms))
}

/// What the guest keeps anything in, if it says so and can be believed.
fn check_guest(machine: &MachineView, size: PageCount) -> Result<Option<PageCount>, SampleFault> {
    let Some(guest) = machine.guest else { return Ok(None) };
    check_age(Number::GuestTotal, guest.age_ms, STATISTICS_STALE_MS)?;
    let total = check_bytes(Number::GuestTotal, guest.total, size)?;
    let free = check_bytes(Number::GuestFree, guest.free, total)?;
    Ok(Some(total - free))
}

fn check_age(number: Number, age_ms: u64, most_ms: u64) -> Result<(), SampleFault> {
    if age_ms > most_ms { Err(SampleFault::Stale { number, age_ms, most_ms }) } else { Ok(()) }
}

fn check_bytes(number: Number, found: i64, most: PageCount) -> Result<PageCount, SampleFault> {
    let bytes = u64::try_from(found).map_err(|_| SampleFault::Negative { number, found })?;
    if bytes > most.bytes().0 {
        return Err(SampleFault::Absurd { number, found: bytes, most: most.bytes().0 });
    }
    Ok(ByteCount(bytes).pages_ceil())
}

/// Whether what is counted of a machine can be: a machine of which it cannot is left alone, since no budget can be
/// made with it.
pub(crate) fn check_consumed(machine: &MachineView, terms: &Terms) -> Result<(), SampleFault> {
    // What is being taken or brought back may be counted twice for a moment.
    let most = terms.size.bytes().0 + terms.size.bytes().0 / 16;
    let found = machine.consumed.0;
    if found > most {
        return Err(SampleFault::Absurd { number: Number::Consumed, found, most });
    }
    Ok(())
}
