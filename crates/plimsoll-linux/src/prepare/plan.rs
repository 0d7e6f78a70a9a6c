//! What would be changed, found out without changing anything.
//!
//! A request and the host as it is enter; changes with old and new values leave, or the reason why there are none. What
//! must never happen here: a write.
//!
//! A kernel says what its zram can do only on a device. As a rule there is one (`zram0`, unused); where there is none,
//! the plan takes the request at its word, and [`super::apply()`] takes everything back if the kernel then refuses.
use super::change::{Change, Parameter, Setting};
use super::record::{Place, Stage};
use super::undo::{Verdict, survey};
use super::{PrepareError, boot_id, memory};
use crate::system::System;
use crate::zram::{
    Disk, SwapArea, SwapKind, ZramError, choose, is_offered, offered_names, swap_areas, swap_header,
};
use plimsoll_sys::swap::SwapRank;
use plimsoll_types::ByteCount;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// Fastest first: what is swapped comes back on a fault, and the guest waits. lz4 takes half of lzo's time to decompress.
const PREFERRED: [&str; 3] = ["lz4", "lzo-rle", "lzo"];
/// 16 bytes a page, allocated when the size is set: `struct zram_table_entry` of the kernel.
const TABLE_SHARE: u64 = 4096 / 16;
/// Pages seldom compress better than this.
const SIZE_PER_MEMORY_MAX: u64 = 4;
/// A limit below this is too little to hold even the allocator's own pages.
const LIMIT_MIN: ByteCount = ByteCount::mib(1);

/// What to set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Request {
    /// A zram device of its own, beside whatever swap there is.
    Zram(ZramRequest),
    /// zswap, in front of a disk swap that there is.
    Zswap(ZswapRequest),
}

/// A zram device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZramRequest {
    /// What it holds, before compression.
    #[serde(with = "bytes")]
    pub size: ByteCount,
    /// The algorithm; the best there is if none is asked for.
    pub algorithm: Option<String>,
    /// The most memory it may take.
    #[serde(with = "bytes::optional")]
    pub limit: Option<ByteCount>,
    /// A second algorithm, for recompression.
    pub recompress: Option<String>,
    /// A block device that pages may be written back to. What is on it is lost.
    pub write_back: Option<PathBuf>,
    /// Priority as swap, 0 or higher.
    pub priority: i16,
}

/// zswap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZswapRequest {
    /// The algorithm; the one that is set if none is asked for.
    pub algorithm: Option<String>,
    /// The most memory it may take; what is set if none is asked for. The kernel counts in percent.
    #[serde(with = "bytes::optional")]
    pub limit: Option<ByteCount>,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (algorithm, limit) = match self {
            Self::Zram(zram) => {
                write!(f, "zram of {}, priority {}", zram.size, zram.priority)?;
                (&zram.algorithm, zram.limit)
            }
            Self::Zswap(zswap) => {
                f.write_str("zswap")?;
                (&zswap.algorithm, zswap.limit)
            }
        };
        if let Some(algorithm) = algorithm {
            write!(f, ", {algorithm}")?;
        }
        if let Some(limit) = limit {
            write!(f, ", at most {limit}")?;
        }
        if let Self::Zram(ZramRequest { recompress: Some(second), .. }) = self {
            write!(f, ", recompressed with {second}")?;
        }
        if let Self::Zram(ZramRequest { write_back: Some(device), .. }) = self {
            write!(f, ", written back to {}", device.display())?;
        }
        Ok(())
    }
}

/// Changes to be made, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What they are for.
    pub request: Request,
    /// The changes.
    pub changes: Vec<Change>,
    /// What to know before saying yes, a sentence each.
    pub notes: Vec<String>,
}

/// What a request comes to on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// These changes.
    Changes(Plan),
    /// Nothing: it was done before, and everything still is as it was set.
    Prepared,
}

/// Finds out what `request` would change here.
///
/// # Errors
/// When the kernel cannot do it, the request makes no sense here, or the host was prepared before in another way.
pub fn plan(system: &dyn System, place: &Place, request: &Request) -> Result<Outlook, PrepareError> {
    let mut notes = Vec::new();
    if let Some(record) = place.load()? {
        if record.boot == boot_id(system)? {
            if record.stage != Stage::Prepared {
                return Err(PrepareError::CutShort { stage: record.stage });
            }
            for (change, verdict) in survey(system, &record)? {
                if let Verdict::Gone(found) | Verdict::Left(found) = verdict {
                    return Err(PrepareError::NoLongerPrepared {
                        found: format!("{} has changed: {found}", change.row().what),
                    });
                }
            }
            if record.request != *request {
                return Err(PrepareError::PreparedOtherwise { found: record.request.to_string() });
            }
            return Ok(Outlook::Prepared);
        }
        notes.push("a record of an earlier boot is replaced: what it set up went with the reboot".to_owned());
    }
    let changes = match request {
        Request::Zram(zram) => plan_zram(system, zram, &mut notes)?,
        Request::Zswap(zswap) => plan_zswap(system, zswap)?,
    };
    Ok(Outlook::Changes(Plan { request: request.clone(), changes, notes }))
}

fn plan_zram(
    system: &dyn System,
    request: &ZramRequest,
    notes: &mut Vec<String>,
) -> Result<Vec<Change>, PrepareError> {
    if !is_offered(system) {
        return Err(ZramError::NoModule.into());
    }
    let all = memory(system, "MemTotal")?;
    let size = swap_header(request.size)?.disk_size;
    if size.0 / SIZE_PER_MEMORY_MAX > all.0 {
        return Err(PrepareError::TooLarge { size, memory: all });
    }
    if let Some(limit) = request.limit
        && !(LIMIT_MIN..=all).contains(&limit)
    {
        return Err(PrepareError::BadLimit { limit, min: LIMIT_MIN, memory: all });
    }
    if SwapRank::new(request.priority).is_none() {
        return Err(PrepareError::BadPriority(request.priority));
    }
    let areas = swap_areas(system)?;
    let example = Disk::all(system)?.into_iter().next();
    let algorithm = choose_algorithm(example, request.algorithm.as_deref())?;
    if let Some(second) = &request.recompress {
        require_second(example, second)?;
    }
    if let Some(device) = &request.write_back {
        require_write_back(system, example, device, &areas)?;
    }
    notes.push(format!(
        "the device's table takes {} at once, and its pages take memory as they come",
        ByteCount(size.0 / TABLE_SHARE)
    ));
    notes.extend(beside(&areas, request.priority));
    if is_zswap_on(system) {
        notes.push(
            "zswap is on and sits in front of every swap area: pages would be compressed twice; turn it off with `echo N > \
             /sys/module/zswap/parameters/enabled`"
                .to_owned(),
        );
    }
    if request.recompress.is_some() {
        notes.push(
            "the kernel never recompresses by itself: that is done to what lies cold as long as `plimsoll manage` or `plimsoll \
             attach --budget` runs, with the record in its usual place"
                .to_owned(),
        );
    }
    if request.write_back.is_some() {
        notes.push(
            "the kernel never writes back by itself: somebody has to write `idle` or `huge` to the device's writeback file".to_owned(),
        );
    }
    if let Some(device) = &request.write_back {
        notes.push(format!("what is on {} now is lost", device.display()));
    }
    let set = |setting, new: Option<String>| new.map(|new| Change::Set { setting, new });
    let second = request.recompress.as_ref().map(|name| format!("algo={name} priority=1"));
    let write_back = request.write_back.as_ref().map(|path| path.display().to_string());
    let add = Change::AddDevice { known: Vec::new(), made: None };
    let settings = [
        set(Setting::Algorithm, algorithm),
        set(Setting::Recompression, second),
        set(Setting::WriteBack, write_back),
        set(Setting::MemoryLimit, request.limit.map(|limit| limit.0.to_string())),
        // Last: it fixes the others.
        set(Setting::Size, Some(size.0.to_string())),
    ];
    let last = [Change::Format, Change::SwapOn { priority: request.priority }];
    Ok([add].into_iter().chain(settings.into_iter().flatten()).chain(last).collect())
}

/// The algorithm to set; `None` leaves the kernel's own.
fn choose_algorithm(example: Option<Disk<'_>>, wanted: Option<&str>) -> Result<Option<String>, ZramError> {
    let Some(example) = example else { return Ok(wanted.map(str::to_owned)) };
    let offered = example.get("comp_algorithm")?;
    let chosen = match wanted {
        Some(name) => choose(&[name], &offered),
        None => choose(&PREFERRED, &offered),
    };
    match (chosen, wanted) {
        (None, Some(name)) => Err(ZramError::NoAlgorithm { wanted: vec![name.to_owned()], offered }),
        (chosen, _) => Ok(chosen.map(str::to_owned)),
    }
}

fn require_second(example: Option<Disk<'_>>, wanted: &str) -> Result<(), ZramError> {
    let Some(example) = example else { return Ok(()) };
    let offered = match example.has("recomp_algorithm") {
        true => example.get("comp_algorithm")?,
        false => return Err(ZramError::NotOffered { attribute: "recomp_algorithm" }),
    };
    if offered_names(&offered).any(|name| name == wanted) {
        return Ok(());
    }
    Err(ZramError::NoAlgorithm { wanted: vec![wanted.to_owned()], offered })
}

fn require_write_back(
    system: &dyn System,
    example: Option<Disk<'_>>,
    device: &Path,
    areas: &[SwapArea],
) -> Result<(), PrepareError> {
    if example.is_some_and(|example| !example.has("backing_dev")) {
        return Err(ZramError::NotOffered { attribute: "backing_dev" }.into());
    }
    let bad = |why| Err(PrepareError::BadWriteBack { device: device.into(), why });
    let name = device.strip_prefix("/dev").ok().and_then(Path::to_str);
    // Every block device, partitions among them, under its kernel name.
    let sysfs = name.map(|name| Path::new("/sys/class/block").join(name.replace('/', "!")));
    let Some(sysfs) = sysfs.filter(|path| system.exists(path)) else {
        return bad("it is no block device (give /dev/NAME; a file needs `losetup` first)");
    };
    if areas.iter().any(|area| area.path == device) {
        return bad("it is in use as swap");
    }
    let mounts = system.read("/proc/self/mounts".as_ref()).unwrap_or_default();
    if mounts.lines().any(|line| line.split(' ').next().is_some_and(|source| Path::new(source) == device)) {
        return bad("it is mounted");
    }
    if system.list(&sysfs.join("holders")).is_ok_and(|holders| !holders.is_empty()) {
        return bad("another block device is made of it");
    }
    Ok(())
}

/// How the kernel will use the new area beside those that there are.
fn beside(areas: &[SwapArea], priority: i16) -> Option<String> {
    let name = |area: &&SwapArea| format!("{} (priority {})", area.path.display(), area.priority);
    let that = |keep: fn(&i32, &i32) -> bool| -> Vec<String> {
        areas
            .iter()
            .filter(|area| keep(&area.priority, &i32::from(priority)))
            .map(|area| name(&area))
            .collect()
    };
    let parts = [
        ("before it", that(|theirs, ours| theirs > ours)),
        ("in turn with it", that(|theirs, ours| theirs == ours)),
        ("after it", that(|theirs, ours| theirs < ours)),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(when, names)| format!("{when} {}", names.join(", ")))
        .collect();
    let explained = format!(
        "swap that is there stays as it is, and the kernel fills areas of high priority first: the new one has {priority}; {}",
        parts.join("; ")
    );
    (!areas.is_empty()).then_some(explained)
}

/// Whether pages on their way to swap are kept by zswap.
pub(super) fn is_zswap_on(system: &dyn System) -> bool {
    system.read(&Parameter::Enabled.path()).is_ok_and(|text| text.trim() == "Y")
}

fn plan_zswap(system: &dyn System, request: &ZswapRequest) -> Result<Vec<Change>, PrepareError> {
    let get = |parameter: Parameter| {
        let path = parameter.path();
        system.read(&path).map(|text| text.trim().to_owned()).map_err(PrepareError::io("read", path))
    };
    if !system.exists(&Parameter::Enabled.path()) {
        return Err(PrepareError::NoZswap);
    }
    let is_disk = |area: &SwapArea| area.kind != SwapKind::Zram;
    if !swap_areas(system)?.iter().any(is_disk) {
        return Err(PrepareError::NoDiskSwap);
    }
    let (compressor, percent) = (get(Parameter::Compressor)?, get(Parameter::MaxPoolPercent)?);
    if is_zswap_on(system) {
        return Err(PrepareError::ZswapOn { compressor, max_pool_percent: percent });
    }
    let set = |parameter, old: String, new: String| {
        (old != new).then_some(Change::SetParameter { parameter, old, new })
    };
    let mut changes = Vec::new();
    if let Some(wanted) = &request.algorithm {
        require_compressor(system, wanted)?;
        changes.extend(set(Parameter::Compressor, compressor, wanted.clone()));
    }
    if let Some(limit) = request.limit {
        let all = memory(system, "MemTotal")?;
        let one_percent = ByteCount(all.0.div_ceil(100));
        if !(one_percent..=all).contains(&limit) {
            return Err(PrepareError::BadLimit { limit, min: one_percent, memory: all });
        }
        changes.extend(set(Parameter::MaxPoolPercent, percent, (limit.0 / one_percent.0).to_string()));
    }
    // Last, and first to be undone.
    changes.extend(set(Parameter::Enabled, get(Parameter::Enabled)?, "Y".to_owned()));
    Ok(changes)
}

/// /proc/crypto lists what is loaded, as blocks of `name : value` lines.
fn require_compressor(system: &dyn System, wanted: &str) -> Result<(), PrepareError> {
    let path = Path::new("/proc/crypto");
    let text = system.read(path).map_err(PrepareError::io("read", path))?;
    let field = |block: &str, name: &str| {
        let mut lines = block.lines().filter_map(|line| line.split_once(':'));
        lines.find_map(|(key, value)| (key.trim() == name).then(|| value.trim().to_owned()))
    };
    let compresses =
        |block: &&str| matches!(field(block, "type").as_deref(), Some("compression" | "scomp" | "acomp"));
    let mut offered: Vec<String> =
        text.split("\n\n").filter(compresses).filter_map(|block| field(block, "name")).collect();
    offered.sort_unstable();
    offered.dedup();
    if offered.iter().any(|name| name == wanted) {
        return Ok(());
    }
    Err(PrepareError::NoCompressor { wanted: wanted.to_owned(), offered })
}

/// Sizes in the record: numbers of bytes.
mod bytes {
    use plimsoll_types::ByteCount;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(size: &ByteCount, to: S) -> Result<S::Ok, S::Error> {
        size.0.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<ByteCount, D::Error> {
        u64::deserialize(from).map(ByteCount)
    }

    pub(super) mod optional {
        use super::{ByteCount, Deserialize, Deserializer, Serialize, Serializer};

        pub(in super::super) fn serialize<S: Serializer>(
            size: &Option<ByteCount>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            size.map(|size| size.0).serialize(to)
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<ByteCount>, D::Error> {
            Ok(Option::<u64>::deserialize(from)?.map(ByteCount))
        }
    }
}
