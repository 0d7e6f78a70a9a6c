//! A machine's settings as clients say them: the words of the settings file, sizes in bytes, parts in millionths.
//!
//! Enters: what is said, on top of what was said before. Leaves: the same as a file would have said, or what is wrong with it;
//! and what is in force, in these words. The same words are kept for the next manager ([`crate::helm`]).
use super::fault::{Code, Fault};
use crate::config::{FaceConfig, MachineConfig, group_name};
use plimsoll_policy::settings::{BUFFER_USUAL, Face, GroupSettings, MachineSettings, Shares};
use plimsoll_policy::{Ppm, Rung};
use plimsoll_types::{ByteCount, GroupId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// The words in which a machine's memory is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SettingsKind {
    /// Reservation, limit and shares.
    Guarantee,
    /// Startup, minimum, maximum, buffer and weight.
    Dynamic,
    /// All of its memory, always.
    Static,
    /// The same, never touched.
    Dedicated,
}

/// The dearest way to take memory from a machine that is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Highest {
    /// Discard what the guest does not use.
    GuestFree,
    /// Its balloon.
    Balloon,
    /// Merge equal pages. What lies beyond moves its bytes.
    Sharing,
    /// Compress pages.
    Compress,
    /// Move pages to disk.
    Disk,
}

/// Of each, the policy's word.
const RUNGS: [(Highest, Rung); 5] = [
    (Highest::GuestFree, Rung::GuestFree),
    (Highest::Balloon, Rung::Balloon),
    (Highest::Sharing, Rung::Sharing),
    (Highest::Compress, Rung::Compress),
    (Highest::Disk, Rung::Disk),
];

/// What is said about a machine. What is left out, or null, stays as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The group it belongs to; empty for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 256)]
    pub group: Option<String>,
    /// In which words its memory is said; told by the others if it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<SettingsKind>,
    /// What it keeps whatever the others want. A multiple of 4096, as all sizes here.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(multiple_of = 4096)]
    pub reservation_bytes: Option<u64>,
    /// What it never exceeds; at most its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(multiple_of = 4096)]
    pub limit_bytes: Option<u64>,
    /// Its weight; 5000 is normal.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000)]
    pub shares: Option<u32>,
    /// What it is to have until it has started.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(multiple_of = 4096)]
    pub startup_bytes: Option<u64>,
    /// What it keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(multiple_of = 4096)]
    pub minimum_bytes: Option<u64>,
    /// What it never exceeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(multiple_of = 4096)]
    pub maximum_bytes: Option<u64>,
    /// What it is to have beyond what it uses, in millionths of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 20_000_000)]
    pub buffer_ppm: Option<u32>,
    /// Its weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 10_000)]
    pub weight: Option<u32>,
    /// The dearest way to take memory from it that is allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub highest: Option<Highest>,
    /// How much of the time its processors may wait for memory, in millionths.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1_000_000)]
    pub stall_objective_ppm: Option<u32>,
}

impl Settings {
    /// What is said about a machine from now on, when `current` was said so far.
    ///
    /// # Errors
    /// Words of two kinds, a word that is missing, or a group that is not there.
    pub fn over(
        &self,
        current: &MachineConfig,
        groups: &BTreeMap<String, GroupSettings>,
    ) -> Result<MachineConfig, Fault> {
        let parent = match self.group.as_deref() {
            None => current.parent,
            Some("") => None,
            Some(name) => Some(group_called(name, groups)?),
        };
        let rung = |highest| RUNGS.iter().find(|(own, _)| *own == highest).map(|(_, rung)| *rung);
        Ok(MachineConfig {
            parent,
            face: self.face(current.face)?,
            highest: self.highest.and_then(rung).unwrap_or(current.highest),
            stall_objective: self.stall_objective_ppm.map_or(current.stall_objective, Ppm),
            ..current.clone()
        })
    }

    fn face(&self, current: FaceConfig) -> Result<FaceConfig, Fault> {
        use SettingsKind as K;
        let first = |words: &[(&'static str, bool)]| words.iter().find(|(_, is)| *is).map(|(word, _)| *word);
        let guarantee = first(&[
            ("reservation_bytes", self.reservation_bytes.is_some()),
            ("limit_bytes", self.limit_bytes.is_some()),
            ("shares", self.shares.is_some()),
        ]);
        let dynamic = first(&[
            ("startup_bytes", self.startup_bytes.is_some()),
            ("minimum_bytes", self.minimum_bytes.is_some()),
            ("maximum_bytes", self.maximum_bytes.is_some()),
            ("buffer_ppm", self.buffer_ppm.is_some()),
            ("weight", self.weight.is_some()),
        ]);
        let kind = match (self.kind, guarantee, dynamic) {
            (_, Some(one), Some(other)) => return Err(two_kinds(one, other)),
            (Some(K::Static | K::Dedicated | K::Dynamic), Some(word), _)
            | (Some(K::Static | K::Dedicated | K::Guarantee), _, Some(word)) => {
                return Err(two_kinds("kind", word));
            }
            (Some(kind), ..) => kind,
            (None, Some(_), _) => K::Guarantee,
            (None, _, Some(_)) => K::Dynamic,
            (None, None, None) => return Ok(current),
        };
        Ok(match kind {
            K::Static => FaceConfig::Static { size: None },
            K::Dedicated => FaceConfig::Dedicated { size: None },
            K::Guarantee => self.guarantee(current),
            K::Dynamic => self.dynamic(current)?,
        })
    }

    fn guarantee(&self, current: FaceConfig) -> FaceConfig {
        let (size, reservation, limit, shares) = match current {
            FaceConfig::Guarantee { size, reservation, limit, shares } => (size, reservation, limit, shares),
            _ => (None, ByteCount(0), None, Shares::NORMAL),
        };
        FaceConfig::Guarantee {
            size,
            reservation: self.reservation_bytes.map_or(reservation, ByteCount),
            limit: self.limit_bytes.map(ByteCount).or(limit),
            shares: self.shares.map_or(shares, Shares),
        }
    }

    fn dynamic(&self, current: FaceConfig) -> Result<FaceConfig, Fault> {
        let before = match current {
            FaceConfig::Whole(Face::Dynamic { startup, minimum, maximum, buffer, weight }) => {
                Some((startup, minimum, maximum, buffer, weight))
            }
            _ => None,
        };
        let needed = |said: Option<u64>, before: Option<ByteCount>, word| {
            said.map(ByteCount).or(before).ok_or_else(|| {
                let text =
                    format!("{word} is missing: memory that changes needs minimum_bytes and maximum_bytes");
                Fault::new(Code::Unprocessable, text)
            })
        };
        let minimum = needed(self.minimum_bytes, before.map(|before| before.1), "minimum_bytes")?;
        let maximum = needed(self.maximum_bytes, before.map(|before| before.2), "maximum_bytes")?;
        // Where only the ends are moved, what lies between them moves along.
        let between = |startup: ByteCount| startup.max(minimum).min(maximum.max(minimum));
        Ok(FaceConfig::Whole(Face::Dynamic {
            startup: match self.startup_bytes {
                Some(startup) => ByteCount(startup),
                None => between(before.map_or(minimum, |before| before.0)),
            },
            minimum,
            maximum,
            buffer: self.buffer_ppm.map(Ppm).or(before.map(|before| before.3)).unwrap_or(BUFFER_USUAL),
            weight: self.weight.or(before.map(|before| before.4)).unwrap_or(Shares::NORMAL.0),
        }))
    }

    /// What is said about a machine, all of it.
    pub fn said(config: &MachineConfig, groups: &BTreeMap<String, GroupSettings>) -> Self {
        let own = |highest: Rung| RUNGS.iter().find(|(_, rung)| *rung == highest).map(|(own, _)| *own);
        let rest = Self {
            group: config.parent.and_then(|id| group_name(groups, id)),
            highest: own(config.highest),
            stall_objective_ppm: Some(config.stall_objective.0),
            ..Self::default()
        };
        let plain = |kind| Self { kind: Some(kind), ..rest.clone() };
        match config.face {
            FaceConfig::Static { .. } | FaceConfig::Whole(Face::Static { .. }) => plain(SettingsKind::Static),
            FaceConfig::Dedicated { .. } | FaceConfig::Whole(Face::Dedicated { .. }) => {
                plain(SettingsKind::Dedicated)
            }
            FaceConfig::Guarantee { reservation, limit, shares, .. } => Self {
                reservation_bytes: Some(reservation.0),
                limit_bytes: limit.map(|limit| limit.0),
                shares: Some(shares.0),
                ..plain(SettingsKind::Guarantee)
            },
            FaceConfig::Whole(Face::Guarantee { reservation, limit, shares, .. }) => Self {
                reservation_bytes: Some(reservation.0),
                limit_bytes: Some(limit.0),
                shares: Some(shares.0),
                ..plain(SettingsKind::Guarantee)
            },
            FaceConfig::Whole(Face::Dynamic { startup, minimum, maximum, buffer, weight }) => Self {
                startup_bytes: Some(startup.0),
                minimum_bytes: Some(minimum.0),
                maximum_bytes: Some(maximum.0),
                buffer_ppm: Some(buffer.0),
                weight: Some(weight),
                ..plain(SettingsKind::Dynamic)
            },
        }
    }

    /// What is in force for a machine.
    pub fn in_force(settings: &MachineSettings, groups: &BTreeMap<String, GroupSettings>) -> Self {
        let MachineSettings { parent, face, highest, stall_objective, .. } = *settings;
        let face = FaceConfig::Whole(face);
        let config = MachineConfig { parent, face, highest, stall_objective, ..MachineConfig::default() };
        Self::said(&config, groups)
    }
}

fn two_kinds(one: &str, other: &str) -> Fault {
    Fault::new(Code::Unprocessable, format!("{one} and {other} are words of two kinds")).help(
        "use reservation_bytes, limit_bytes and shares, or startup_bytes, minimum_bytes, maximum_bytes, buffer_ppm and weight",
    )
}

/// The group of that name.
pub(super) fn group_called(name: &str, groups: &BTreeMap<String, GroupSettings>) -> Result<GroupId, Fault> {
    if let Some(group) = groups.get(name) {
        return Ok(group.id);
    }
    let known = groups.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let known = if known.is_empty() { "there are none".to_owned() } else { format!("there are {known}") };
    Err(Fault::new(Code::Unprocessable, format!("there is no group {name:?}: {known}"))
        .help("groups are those of the daemon's settings file (--config)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn said(settings: Settings, current: &MachineConfig) -> Result<MachineConfig, Fault> {
        settings.over(current, &BTreeMap::new())
    }

    #[test]
    fn what_is_not_said_stays_and_what_is_said_comes_out_again() {
        let first = Settings { reservation_bytes: Some(64 * MIB), shares: Some(7), ..Settings::default() };
        let config = said(first, &MachineConfig::default()).unwrap();
        let second = said(Settings { limit_bytes: Some(128 * MIB), ..Settings::default() }, &config).unwrap();
        let all = Settings::said(&second, &BTreeMap::new());
        assert_eq!(
            (all.reservation_bytes, all.limit_bytes, all.shares),
            (Some(64 * MIB), Some(128 * MIB), Some(7))
        );
        assert_eq!(said(all, &MachineConfig::default()).unwrap(), second);
    }

    #[test]
    fn words_of_two_kinds_are_refused_and_one_word_changes_the_kind_only_where_it_is_enough() {
        let both = Settings { shares: Some(1), weight: Some(1), ..Settings::default() };
        assert!(said(both, &MachineConfig::default()).unwrap_err().message.contains("shares and weight"));
        let kind =
            Settings { kind: Some(SettingsKind::Static), minimum_bytes: Some(0), ..Settings::default() };
        assert!(said(kind, &MachineConfig::default()).is_err());
        let short = Settings { minimum_bytes: Some(MIB), ..Settings::default() };
        let missing = said(short.clone(), &MachineConfig::default()).unwrap_err();
        assert!(missing.message.starts_with("maximum_bytes is missing"), "{missing}");
        let whole = Settings { maximum_bytes: Some(8 * MIB), ..short };
        let config = said(whole, &MachineConfig::default()).unwrap();
        let raised = said(Settings { minimum_bytes: Some(4 * MIB), ..Settings::default() }, &config).unwrap();
        let FaceConfig::Whole(Face::Dynamic { startup, minimum, .. }) = raised.face else {
            panic!("{raised:?}")
        };
        assert_eq!((startup, minimum), (ByteCount(4 * MIB), ByteCount(4 * MIB)));
        let none = Settings { group: Some("tenant".to_owned()), ..Settings::default() };
        assert!(said(none, &MachineConfig::default()).unwrap_err().message.contains("there are none"));
    }
}
