//! The file's own form: keys, kinds of values, and lines.
use super::{Config, ConfigError, FaceConfig, MachineConfig, Wrong};
use plimsoll_policy::auction::IdleTax;
use plimsoll_policy::costs::CostsFile;
use plimsoll_policy::settings::{BUFFER_USUAL, Face, GroupSettings, STALL_OBJECTIVE_USUAL, Shares};
use plimsoll_policy::{Costs, Ppm, Rung};
use plimsoll_types::{ByteCount, DomainId, GroupId};
use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use toml::de::DeTable;

/// What is wrong, and on which line.
type At<T> = Result<T, (usize, Wrong)>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    host: Host,
    #[serde(default)]
    group: BTreeMap<String, Group>,
    #[serde(default)]
    machine: BTreeMap<String, Machine>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Host {
    costs: Option<PathBuf>,
    memory: Option<Text<ByteCount>>,
    reserve: Option<Text<ByteCount>>,
    idle_tax: Option<Text<Part>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Group {
    group: Option<String>,
    reservation: Option<Text<ByteCount>>,
    limit: Option<Text<ByteCount>>,
    shares: Option<u32>,
    sharing: bool,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Machine {
    group: Option<String>,
    kind: Option<Kind>,
    size: Option<Text<ByteCount>>,
    reservation: Option<Text<ByteCount>>,
    limit: Option<Text<ByteCount>>,
    shares: Option<u32>,
    startup: Option<Text<ByteCount>>,
    minimum: Option<Text<ByteCount>>,
    maximum: Option<Text<ByteCount>>,
    buffer: Option<Text<Part>>,
    weight: Option<u32>,
    highest: Option<Highest>,
    stall_objective: Option<Text<Part>>,
    qmp: Option<PathBuf>,
    api: Option<PathBuf>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Static,
    Dedicated,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Highest {
    GuestFree,
    Balloon,
    Sharing,
    NeverPage,
    Compress,
    Disk,
}

impl From<Highest> for Rung {
    fn from(highest: Highest) -> Self {
        match highest {
            Highest::GuestFree => Self::GuestFree,
            Highest::Balloon => Self::Balloon,
            Highest::Sharing => Self::Sharing,
            Highest::NeverPage => Self::NEVER_PAGE,
            Highest::Compress => Self::Compress,
            Highest::Disk => Self::Disk,
        }
    }
}

/// A value that is written as text.
#[derive(Clone, Copy)]
struct Text<T>(T);

/// A part of something, as people write it: a percentage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part(Ppm);

impl Part {
    /// In millionths.
    pub const fn ppm(self) -> Ppm {
        self.0
    }
}

impl FromStr for Part {
    type Err = &'static str;

    /// `75 %`, `0.1%`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WHAT: &str = "not a percentage: write it as \"20%\" or \"0.1%\"";
        let number = text.trim().strip_suffix('%').ok_or(WHAT)?.trim_end();
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || fraction.len() > 4 || !is_number(whole) || !is_number(fraction) {
            return Err(WHAT);
        }
        let whole: u32 = whole.parse().map_err(|_| WHAT)?;
        let fraction: u32 = format!("{fraction:0<4}").parse().map_err(|_| WHAT)?;
        let ppm = whole.checked_mul(10_000).and_then(|whole| whole.checked_add(fraction)).ok_or(WHAT)?;
        Ok(Self(Ppm(ppm)))
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words<T>(std::marker::PhantomData<T>);
        impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for Words<T> {
            type Value = Text<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text with a unit, such as \"512M\" or \"20%\"")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Text<T>, E> {
                text.parse().map(Text).map_err(|error| E::custom(format!("{text:?}: {error}")))
            }
        }
        deserializer.deserialize_any(Words(std::marker::PhantomData))
    }
}

/// The line a byte is on, from 1.
fn line_at(text: &str, byte: usize) -> usize {
    1 + text.bytes().take(byte).filter(|byte| *byte == b'\n').count()
}

/// The line of the deepest key of a path that is there.
pub(super) fn line_of(text: &str, path: &[&str]) -> usize {
    let Ok(table) = DeTable::parse(text) else { return 1 };
    let mut table = table.into_inner();
    let mut byte = 0;
    for key in path {
        let Some((found, value)) = table.remove_entry(*key) else { break };
        byte = found.span().start;
        match value.into_inner() {
            toml::de::DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    line_at(text, byte)
}

/// Reads what taking memory costs here from the file that the settings name, seen from the folder they are in.
pub(super) fn costs_in(named: &Path, text: &str, path: &str) -> Result<Costs, ConfigError> {
    let file = Path::new(path).parent().unwrap_or(Path::new("")).join(named);
    let shown = file.display().to_string();
    let json = std::fs::read_to_string(&file).map_err(|error| {
        let wrong = Wrong::NoCosts { file: shown.clone(), why: error.to_string() };
        ConfigError::new(path, line_of(text, &["host", "costs"]), wrong)
    })?;
    let costs: CostsFile = serde_json::from_str(&json).map_err(|error| {
        let said = error.to_string();
        let what = said.rsplit_once(" at line ").map_or(&*said, |(what, _)| what);
        ConfigError::new(&shown, error.line(), Wrong::Syntax(sentence(what)))
    })?;
    Ok(Costs::from(&costs))
}

/// Reads everything a file says that can be read without looking at the rest of it, and which file it names for costs.
pub(super) fn parse(text: &str) -> At<(Config, Option<PathBuf>)> {
    let file: File = toml::from_str(text).map_err(|error| {
        let line = line_at(text, error.span().map_or(0, |span| span.start));
        (line, Wrong::Syntax(sentence(error.message())))
    })?;
    let at = |path: &[&str], wrong| (line_of(text, path), wrong);
    let ids: BTreeMap<String, GroupId> = file.group.keys().cloned().zip((1..).map(GroupId)).collect();
    let parent = |kind: &str, owner: &str, group: Option<String>| {
        let Some(group) = group else { return Ok(None) };
        ids.get(&group).copied().map(Some).ok_or_else(|| {
            let known = ids.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".to_owned() } else { known };
            at(&[kind, owner, "group"], Wrong::NoSuchGroup { owner: owner.to_owned(), group, known })
        })
    };
    let mut groups = BTreeMap::new();
    for (name, group) in file.group {
        let id = ids.get(&name).copied().unwrap_or(GroupId(0));
        let settings = GroupSettings {
            parent: parent("group", &name, group.group)?,
            reservation: group.reservation.map(|size| size.0),
            limit: group.limit.map(|size| size.0),
            shares: group.shares.map_or(Shares::NORMAL, Shares),
            domain: group.sharing.then_some(DomainId(id.0)),
            ..GroupSettings::new(id)
        };
        groups.insert(name, settings);
    }
    let mut machines = BTreeMap::new();
    for (name, machine) in file.machine {
        let face = face(&name, &machine).map_err(|(key, wrong)| at(&["machine", &name, key], wrong))?;
        let config = MachineConfig {
            parent: parent("machine", &name, machine.group)?,
            face,
            highest: machine.highest.map_or(Rung::Disk, Rung::from),
            stall_objective: machine.stall_objective.map_or(STALL_OBJECTIVE_USUAL, |part| part.0.0),
            qmp: machine.qmp,
            api: machine.api,
        };
        machines.insert(name, config);
    }
    let memory = file.host.memory.map(|size| size.0);
    let reserve = file.host.reserve.map(|size| size.0).unwrap_or_default();
    if let Some(memory) = memory.filter(|memory| *memory <= reserve) {
        return Err(at(&["host", "memory"], Wrong::NothingLeft { memory, reserve }));
    }
    let tax = match file.host.idle_tax {
        None => IdleTax::USUAL,
        Some(Text(Part(part))) => {
            IdleTax::new(part).map_err(|error| at(&["host", "idle-tax"], Wrong::Tax(error)))?
        }
    };
    let config = Config { memory, reserve, tax, costs: Costs::MEASURED, groups, machines };
    Ok((config, file.host.costs))
}

/// What a parser says, as the sentence of this house.
fn sentence(message: &str) -> String {
    let message = message.lines().next().unwrap_or_default();
    match message.strip_prefix("unknown field ") {
        Some(rest) => format!("unknown key {}", rest.replacen(", expected", ": use", 1)),
        None => message.to_owned(),
    }
}

/// Which face a machine shows. With a mistake, the key it is about.
fn face(name: &str, machine: &Machine) -> Result<FaceConfig, (&'static str, Wrong)> {
    let size = machine.size.map(|size| size.0);
    let is_there = |pairs: &[(&'static str, bool)]| pairs.iter().find(|(_, is)| *is).map(|(key, _)| *key);
    let guarantee = is_there(&[
        ("reservation", machine.reservation.is_some()),
        ("limit", machine.limit.is_some()),
        ("shares", machine.shares.is_some()),
    ]);
    let dynamic = is_there(&[
        ("minimum", machine.minimum.is_some()),
        ("maximum", machine.maximum.is_some()),
        ("startup", machine.startup.is_some()),
        ("buffer", machine.buffer.is_some()),
        ("weight", machine.weight.is_some()),
    ]);
    let kind = machine.kind.map(|_| "kind");
    let own = size.map(|_| "size").filter(|_| dynamic.is_some());
    let faces: Vec<&'static str> = [dynamic, guarantee, kind, own].into_iter().flatten().collect();
    if let [one, other, ..] = *faces {
        return Err((other, Wrong::TwoFaces { machine: name.to_owned(), one, other }));
    }
    if let Some(kind) = machine.kind {
        return Ok(match kind {
            Kind::Static => FaceConfig::Static { size },
            Kind::Dedicated => FaceConfig::Dedicated { size },
        });
    }
    let Some(one) = dynamic else {
        return Ok(FaceConfig::Guarantee {
            size,
            reservation: machine.reservation.map(|size| size.0).unwrap_or_default(),
            limit: machine.limit.map(|size| size.0),
            shares: machine.shares.map_or(Shares::NORMAL, Shares),
        });
    };
    let needed = |value: Option<Text<ByteCount>>, missing| {
        let missing = || (one, Wrong::Missing { machine: name.to_owned(), one, missing });
        value.map(|size| size.0).ok_or_else(missing)
    };
    let (minimum, maximum) = (needed(machine.minimum, "minimum")?, needed(machine.maximum, "maximum")?);
    Ok(FaceConfig::Whole(Face::Dynamic {
        startup: machine.startup.map_or(minimum, |size| size.0),
        minimum,
        maximum,
        buffer: machine.buffer.map_or(BUFFER_USUAL, |part| part.0.0),
        weight: machine.weight.unwrap_or(Shares::NORMAL.0),
    }))
}
