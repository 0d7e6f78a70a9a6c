//! What each way to take memory costs: the host and the guest for a page, and the guest's work as a whole.
//!
//! Enters: figures that somebody measured, as constants or from a file. Leaves: for a rung and what is asked of a machine the price
//! of a page and the part of its work that the guest loses. What must never happen: a figure that falls because a measured one rose;
//! the order of the ladder rests on that.
//!
//! The *price* is what a page freed costs, in processor time of the host and waiting of the guest:
//!
//! ```text
//! price = (take + back * returns) / (1 - keeps)
//!         take, back   ns to take a page, and that the guest waits when it touches it again
//!         returns      the part of the machine's pages that came back in the last minute or so
//!         keeps        the part of a page that stays in RAM: where four are compressed to free one, four are paid
//! ```
//!
//! So a machine whose pages keep coming back finds compressing dear, and twins or a balloon cheap. It looks back. The *loss* looks
//! ahead, by what two guests lost from whom 10 to 60 % of their memory was kept away: one that uses all of it, and one that has
//! use for three tenths (`cargo xtask bench cost`). Of a machine it is not known what it will lose, but how much of what it uses
//! would have to go:
//!
//! ```text
//! loss  = the larger of idle(asked / consumed) and busy(cut * (1 - keeps))
//!         cut          the part of what it uses that RAM has no place for once that much is taken
//!         * (1-keeps)  the tables say what was freed, and of a page that is out the rest is
//! ```
use crate::ladder::Rung;
use crate::part::Ppm;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use plimsoll_types::ByteCount;

/// What is taken of a guest from one entry of [`Losses`] to the next, and before the first.
const STEP: Ppm = Ppm::percent(10);
/// Entries of [`Losses`].
const STEPS: usize = 6;

/// The part of its work that a guest loses while 10, 20, 30, 40, 50 and 60 % of its memory are kept away. Nothing is lost while
/// nothing is; between two entries the loss grows evenly, and beyond the last it is as there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Vec<Ppm>"))]
pub struct Losses(pub [Ppm; STEPS]);

impl Losses {
    /// With that part of its memory kept away.
    pub fn at(&self, away: Ppm) -> Ppm {
        let before = away.0 / STEP.0;
        let loss = |entry: u32| {
            let entry = usize::try_from(entry).unwrap_or(STEPS).min(STEPS);
            entry.checked_sub(1).map_or(0, |at| u64::from(self.0[at].0))
        };
        let into = u64::from(away.0 % STEP.0);
        let sum = loss(before) * (u64::from(STEP.0) - into) + loss(before + 1) * into;
        Ppm(u32::try_from(sum / u64::from(STEP.0)).unwrap_or(u32::MAX))
    }
}

/// Numbers that are no losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoLosses {
    /// Not one for each tenth.
    Count {
        /// How many.
        found: usize,
    },
    /// More than all.
    TooMuch {
        /// The number.
        found: Ppm,
    },
}

impl fmt::Display for NoLosses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count { found } => {
                write!(f, "{found} losses: give {STEPS}, for 10, 20, 30, 40, 50 and 60 % taken")
            }
            Self::TooMuch { found } => {
                write!(f, "a loss of {} millionths: a guest loses at most all, 1000000", found.0)
            }
        }
    }
}

impl core::error::Error for NoLosses {}

impl TryFrom<Vec<Ppm>> for Losses {
    type Error = NoLosses;

    fn try_from(losses: Vec<Ppm>) -> Result<Self, NoLosses> {
        if let Some(found) = losses.iter().copied().find(|loss| *loss > Ppm::WHOLE) {
            return Err(NoLosses::TooMuch { found });
        }
        losses.try_into().map(Self).map_err(|losses: Vec<Ppm>| NoLosses::Count { found: losses.len() })
    }
}

/// What a rung costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Cost {
    /// Nanoseconds to take a page.
    pub take_ns: u64,
    /// Nanoseconds the guest waits when it touches the page again.
    pub back_ns: u64,
    /// The part of a page that stays in RAM, below the whole.
    pub keeps: Ppm,
    /// What a guest loses that uses all of its memory; `None` where that was not measured.
    #[cfg_attr(feature = "serde", serde(default))]
    pub busy: Option<Losses>,
    /// What a guest loses that uses three tenths of it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub idle: Option<Losses>,
}

impl Cost {
    /// A price alone: what it does to a guest's work was not measured.
    pub const fn new(take_ns: u64, back_ns: u64, keeps: Ppm) -> Self {
        Self { take_ns, back_ns, keeps, busy: None, idle: None }
    }

    /// Nanoseconds a freed page costs where that part of the pages comes back; `u64::MAX` where none is freed.
    pub fn price_ns(self, returns: Ppm) -> u64 {
        let cost = self.take_ns.saturating_add(returns.apply(self.back_ns));
        let price = (u128::from(cost) * u128::from(Ppm::WHOLE.0)).checked_div(self.keeps.rest().0.into());
        price.and_then(|price| u64::try_from(price).ok()).unwrap_or(u64::MAX)
    }

    const fn is_measured(self) -> bool {
        self.busy.is_some() || self.idle.is_some()
    }
}

/// Memory that is asked of a machine, and what decides whether its guest feels that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Squeeze {
    /// What is to be freed.
    pub(crate) asked: ByteCount,
    /// What its guest's pages take up.
    pub(crate) consumed: ByteCount,
    /// Of that, what its compressed pages take up.
    pub(crate) stored: ByteCount,
    /// What it uses.
    pub(crate) active: ByteCount,
}

impl Squeeze {
    /// What is asked beyond memory that the guest has free, when that has gone.
    pub(crate) fn beyond(self, free: ByteCount) -> Self {
        let (asked, consumed) = (self.asked.saturating_sub(free), self.consumed.saturating_sub(free));
        Self { asked, consumed, ..self }
    }

    /// The part of what is used that RAM has no place for, where that part of each page that goes stays.
    fn cut(self, keeps: Ppm) -> Ppm {
        let freed = u64::from(keeps.rest().0.max(1));
        let gone = u128::from(self.asked.0) * u128::from(Ppm::WHOLE.0) / u128::from(freed);
        let gone = ByteCount(u64::try_from(gone).unwrap_or(u64::MAX));
        let resident = self.consumed.saturating_sub(self.stored).saturating_sub(gone);
        Ppm::of(self.active.saturating_sub(resident).0, self.active.0)
    }
}

/// What each rung costs on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Costs(pub [Cost; Rung::ALL.len()]);

impl Costs {
    /// What was measured on a 2-core x86-64 machine with KVM over software paging; a host that has measured its own
    /// [replaces](CostsFile) them. Losses are those of `costs.json` beside this crate's manifest. To compress is what the kernel does:
    /// where a pager of ours moves a machine's pages there is no other way, and its figures would choose nothing (docs/costs.md).
    /// Prices (FACTS), in the order of the rungs:
    ///
    /// * discarding costs the zap, 0.2 us, and a demand-zero fault of the guest, 5.5 us;
    /// * virtio-balloon, 4 KiB pages: 0.951 GiB/s in, 2.34 GiB/s out (HyperAlloc, EuroSys '25, on a Xeon Gold 6252);
    /// * KSM at full speed 32 us a merged page; a write to one is a fault like a first touch, 17 us;
    /// * MADV_PAGEOUT to zram (lz4) 13.5 us, 8-11 us back in random order; lz4 leaves 0.57 of code and text;
    /// * a disk was not measured: pageout as to zram, and each way the 200 us VMware's memory tiering allows a device.
    pub const MEASURED: Self = Self([
        Cost::new(200, 5_500, Ppm::ZERO),
        Cost {
            busy: Some(percent([0, 0, 0, 3, 0, 0])),
            idle: Some(percent([0, 0, 0, 0, 0, 0])),
            ..Cost::new(4_100, 1_700, Ppm::ZERO)
        },
        Cost::new(32_000, 17_000, Ppm::ZERO),
        Cost {
            busy: Some(percent([84, 84, 89, 95, 97, 100])),
            idle: Some(percent([0, 2, 1, 67, 92, 100])),
            ..Cost::new(13_500, 11_000, Ppm::percent(57))
        },
        Cost::new(213_500, 200_000, Ppm::ZERO),
    ]);

    /// What one rung costs.
    pub const fn of(&self, rung: Rung) -> Cost {
        self.0[rung as usize]
    }

    /// The part of its work that a guest is to lose to this rung. Nothing where that was not measured; but a page on a disk comes
    /// back no sooner than one in RAM.
    pub(crate) fn loss(&self, rung: Rung, squeeze: Squeeze) -> Ppm {
        let cost = self.of(rung);
        if rung == Rung::Disk && !cost.is_measured() {
            return self.loss(Rung::Compress, squeeze);
        }
        let at = |losses: Option<Losses>, away| losses.map_or(Ppm::ZERO, |losses| losses.at(away));
        let cut = Ppm::of(cost.keeps.rest().apply(squeeze.cut(cost.keeps).0.into()), Ppm::WHOLE.0.into());
        at(cost.idle, Ppm::of(squeeze.asked.0, squeeze.consumed.0)).max(at(cost.busy, cut))
    }

    /// Whether it is known what this rung does to a guest's work.
    pub(crate) const fn is_measured(&self, rung: Rung) -> bool {
        match rung {
            Rung::Disk => self.of(rung).is_measured() || self.of(Rung::Compress).is_measured(),
            _ => self.of(rung).is_measured(),
        }
    }
}

/// Losses in percent.
const fn percent(losses: [u32; STEPS]) -> Losses {
    let [one, two, three, four, five, six] = losses;
    Losses([
        Ppm::percent(one),
        Ppm::percent(two),
        Ppm::percent(three),
        Ppm::percent(four),
        Ppm::percent(five),
        Ppm::percent(six),
    ])
}

/// Costs as a file says them: a JSON object, which `cargo xtask bench cost` writes. What is left out is as [measured by
/// us](Costs::MEASURED); a key nobody knows is refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields, rename_all = "kebab-case"))]
pub struct CostsFile {
    /// Where the figures come from, for people.
    pub source: String,
    /// [`Rung::GuestFree`].
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "RungFile::is_silent"))]
    pub guest_free: RungFile,
    /// [`Rung::Balloon`].
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "RungFile::is_silent"))]
    pub balloon: RungFile,
    /// [`Rung::Sharing`].
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "RungFile::is_silent"))]
    pub sharing: RungFile,
    /// [`Rung::Compress`].
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "RungFile::is_silent"))]
    pub compress: RungFile,
    /// [`Rung::Disk`].
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "RungFile::is_silent"))]
    pub disk: RungFile,
}

/// What a file says of a rung; see [`Cost`] for what each is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields, default))]
#[expect(missing_docs, reason = "the fields of Cost")]
pub struct RungFile {
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub take_ns: Option<u64>,
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub back_ns: Option<u64>,
    /// In millionths, below the whole.
    #[cfg_attr(
        feature = "serde",
        serde(skip_serializing_if = "Option::is_none", deserialize_with = "below_whole")
    )]
    pub keeps_ppm: Option<Ppm>,
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub busy_ppm: Option<Losses>,
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    pub idle_ppm: Option<Losses>,
}

impl RungFile {
    /// Whether it says nothing.
    #[cfg(feature = "serde")]
    fn is_silent(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(feature = "serde")]
fn below_whole<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Ppm>, D::Error> {
    use serde::{Deserialize, de::Error};
    let keeps = Ppm::deserialize(deserializer)?;
    if keeps >= Ppm::WHOLE {
        let found = keeps.0;
        return Err(D::Error::custom(format_args!(
            "{found} millionths of a page stay: a way that frees nothing is none, use less than 1000000"
        )));
    }
    Ok(Some(keeps))
}

impl From<&CostsFile> for Costs {
    fn from(file: &CostsFile) -> Self {
        let mut costs = Self::MEASURED;
        let rungs = [file.guest_free, file.balloon, file.sharing, file.compress, file.disk];
        for (cost, given) in costs.0.iter_mut().zip(rungs) {
            *cost = Cost {
                take_ns: given.take_ns.unwrap_or(cost.take_ns),
                back_ns: given.back_ns.unwrap_or(cost.back_ns),
                keeps: given.keeps_ppm.unwrap_or(cost.keeps),
                busy: given.busy_ppm.or(cost.busy),
                idle: given.idle_ppm.or(cost.idle),
            };
        }
        costs
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    const MIB: fn(u64) -> ByteCount = ByteCount::mib;

    #[test]
    fn a_loss_grows_evenly_from_nothing_to_the_first_tenth_and_on_and_ends_with_the_last() {
        let losses = percent([10, 30, 20, 40, 50, 60]);
        let at = |percent: u32| losses.at(Ppm::percent(percent)).0 / 10_000;
        assert_eq!([0, 5, 10, 15, 20, 25, 60, 61, 100].map(at), [0, 5, 10, 20, 30, 25, 60, 60, 60]);
        assert_eq!(losses.at(Ppm(u32::MAX)), Ppm::percent(60));
    }

    #[test]
    fn what_nobody_uses_is_taken_at_the_idle_guests_loss_and_what_is_used_at_the_busy_ones() {
        let mut costs = Costs::MEASURED;
        costs.0[Rung::Compress as usize] = Cost {
            busy: Some(percent([60, 90, 90, 90, 90, 90])),
            idle: Some(percent([1, 2, 3, 4, 5, 6])),
            ..Cost::new(1, 1, Ppm::percent(50))
        };
        let loss = |asked, active| {
            let squeeze =
                Squeeze { asked: MIB(asked), consumed: MIB(100), stored: MIB(0), active: MIB(active) };
            costs.loss(Rung::Compress, squeeze)
        };
        assert_eq!(loss(20, 30), Ppm::percent(2));
        // 80 MiB go to free 40, so 10 of 30 used ones do: a sixth of what they take up is freed.
        assert_eq!(loss(40, 30), Losses([60, 90, 90, 90, 90, 90].map(Ppm::percent)).at(Ppm(166_666)));
        assert_eq!(loss(10, 100), Ppm::percent(60));
        assert_eq!(loss(10, 0), Ppm::percent(1));
    }

    #[test]
    fn a_disk_costs_a_guest_what_compressing_does_unless_it_was_measured() {
        let squeeze = Squeeze { asked: MIB(10), consumed: MIB(100), stored: MIB(0), active: MIB(100) };
        let mut costs = Costs::MEASURED;
        assert_eq!(costs.loss(Rung::Disk, squeeze), costs.loss(Rung::Compress, squeeze));
        costs.0[Rung::Disk as usize].busy = Some(percent([7, 7, 7, 7, 7, 7]));
        assert_eq!(costs.loss(Rung::Disk, squeeze), Ppm::percent(7));
        assert_eq!(costs.loss(Rung::Sharing, squeeze), Ppm::ZERO);
    }

    #[cfg(feature = "serde")]
    #[test]
    fn what_is_built_in_is_what_the_file_beside_the_manifest_says() {
        let file: CostsFile = serde_json::from_str(include_str!("../costs.json")).unwrap();
        assert!(file.source.contains("A/A"), "{}", file.source);
        assert!(file.balloon.busy_ppm.is_some() && file.compress.idle_ppm.is_some());
        assert_eq!(Costs::from(&file), Costs::MEASURED);
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_file_with_a_mistake_is_refused_with_its_line() {
        let refused = |text: &str| serde_json::from_str::<CostsFile>(text).unwrap_err();
        for (text, line, words) in [
            ("{\"source\": \"me\",\n\"balloon\": {\"busy_ppm\": [1, 2, 3]}}", 2, "3 losses: give 6"),
            ("{\"source\": \"me\", \"disk\": {\n\"idle_ppm\": [0, 0, 0, 0, 0, 1000001]}}", 2, "at most all"),
            ("{\"source\": \"me\",\n\n\"compress\": {\"keeps_ppm\": 1000000}}", 3, "frees nothing"),
            ("{\"source\": \"me\",\n\"zswap\": {}}", 2, "unknown field `zswap`"),
            ("{\"source\": \"me\",\n\"disk\": {\"take_ns\": -4}}", 2, "invalid value"),
            ("{}", 1, "missing field `source`"),
        ] {
            let error = refused(text);
            assert_eq!(error.line(), line, "{error}");
            let said = std::string::ToString::to_string(&error);
            assert!(said.contains(words), "{said}");
        }
    }
}
