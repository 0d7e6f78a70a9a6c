//! Reverting what is on record, from the last change to the first.
//!
//! A record and the host as it is enter; a host without those changes leaves, or the reason why one of them stays. What
//! must never happen here: a revert of something that is no longer as it was set, or a `swapoff` that memory has no room
//! for, unless that was insisted on.
use super::change::{Change, DeviceId, Parameter};
use super::plan::Request;
use super::record::{Place, Record, Stage};
use super::{PrepareError, boot_id, memory};
use crate::system::System;
use crate::zram::{Disk, SwapArea, ZramError, swap_areas, swap_header};
use plimsoll_sys::swap::SwapError;
use plimsoll_types::{ByteCount, PAGE_SIZE};
use rustix::io::Errno;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// How often progress is reported while swap is read back.
const PERIOD: Duration = Duration::from_millis(100);

/// What is to be done with a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is as it was set: it is reverted.
    Revert,
    /// It goes with its device.
    WithDevice,
    /// It is gone, or never happened; what was found.
    Gone(String),
    /// Somebody has changed it since: it is left as it is; what was found.
    Left(String),
}

/// What undoing would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undo {
    /// Nothing is on record.
    Nothing,
    /// The record is of another boot: all went with the reboot, but for the record.
    Rebooted,
    /// These steps, in this order.
    Steps(Vec<(Change, Verdict)>),
}

/// Whether what is in swap must have room in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It must, by the kernel's own estimate of available memory.
    Required,
    /// The kernel may find out.
    Forced,
}

/// What undoing reports while it goes on.
#[derive(Debug)]
pub enum Progress<'a> {
    /// What became of a change.
    Step(&'a Change, &'a Verdict),
    /// Swap is being read back into memory.
    ReadBack {
        /// What is still in it.
        left: ByteCount,
        /// What was in it at first.
        of: ByteCount,
    },
}

/// What undoing came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undone {
    /// There was nothing to undo.
    Nothing,
    /// All went with a reboot.
    Rebooted,
    /// Everything is as it was.
    All,
    /// What others have changed since was left, and is theirs now.
    SomeLeft,
}

/// Says what [`undo()`] would do now.
///
/// # Errors
/// When the record cannot be read or understood, or the kernel's files cannot be read.
pub fn outlook(system: &dyn System, place: &Place) -> Result<Undo, PrepareError> {
    let Some(record) = place.load()? else { return Ok(Undo::Nothing) };
    if record.boot != boot_id(system)? {
        return Ok(Undo::Rebooted);
    }
    Ok(Undo::Steps(survey(system, &record)?))
}

/// Undoes what is on record. The record goes last; after an error it holds what is still to be undone.
///
/// # Errors
/// When something cannot be reverted although it is as it was set.
pub fn undo(
    system: &dyn System,
    place: &Place,
    fit: Fit,
    watch: &mut dyn FnMut(Progress<'_>),
) -> Result<Undone, PrepareError> {
    // Without a record there is nothing to make a directory for.
    if place.load()?.is_none() {
        return Ok(Undone::Nothing);
    }
    let lock = place.lock()?;
    let Some(mut record) = place.load()? else { return Ok(Undone::Nothing) };
    if record.boot != boot_id(system)? {
        lock.remove()?;
        return Ok(Undone::Rebooted);
    }
    if let Some((disk, used)) = to_read_back(system, &record)?
        && fit == Fit::Required
    {
        let available = memory(system, "MemAvailable")?;
        if used > available {
            return Err(PrepareError::DoesNotFit { device: disk.node(), used, available });
        }
    }
    revert(system, &lock, &mut record, watch)
}

/// The same without a look at memory: for [`super::apply()`], whose device nothing is in yet.
pub(super) fn revert(
    system: &dyn System,
    lock: &super::record::Lock<'_>,
    record: &mut Record,
    watch: &mut dyn FnMut(Progress<'_>),
) -> Result<Undone, PrepareError> {
    record.stage = Stage::Undoing;
    // That saves fail (a full disk) does not stop the way back: undoing looks at each thing, and what it finds gone is gone.
    let _ = lock.save(record);
    let mut undone = Undone::All;
    while let Some(change) = record.steps.last() {
        let verdict = judge(system, record, change, &swap_areas(system)?)?;
        match verdict {
            Verdict::Revert => revert_one(system, record, change, watch)?,
            Verdict::Left(_) => undone = Undone::SomeLeft,
            Verdict::Gone(_) | Verdict::WithDevice => {}
        }
        watch(Progress::Step(change, &verdict));
        record.steps.pop();
        let _ = lock.save(record);
    }
    lock.remove()?;
    Ok(undone)
}

/// What would become of each change, last first.
pub(super) fn survey(system: &dyn System, record: &Record) -> Result<Vec<(Change, Verdict)>, PrepareError> {
    let mut areas = swap_areas(system)?;
    let mut steps = Vec::new();
    for change in record.steps.iter().rev() {
        let verdict = judge(system, record, change, &areas)?;
        if let (Change::SwapOn { .. }, Verdict::Revert, Some(id)) = (change, &verdict, record.device()) {
            // As it will be when its device is judged.
            areas.retain(|area| area.path != Disk::new(system, id.number).node());
        }
        steps.push((change.clone(), verdict));
    }
    Ok(steps)
}

/// Looks at one thing that was changed.
pub(super) fn judge(
    system: &dyn System,
    record: &Record,
    change: &Change,
    areas: &[SwapArea],
) -> Result<Verdict, PrepareError> {
    let ours = record.device();
    let is_there = |id: DeviceId| -> Result<bool, ZramError> {
        Ok(Disk::new(system, id.number).sequence()? == Some(id.disk_sequence))
    };
    Ok(match change {
        Change::Set { .. } | Change::Format => Verdict::WithDevice,
        Change::AddDevice { made: None, known } => judge_unrecorded(system, known)?,
        Change::AddDevice { made: Some(id), .. } => {
            if is_there(*id)? {
                judge_device(Disk::new(system, id.number), record, areas)?
            } else {
                Verdict::Gone("the device is gone".to_owned())
            }
        }
        Change::SwapOn { priority } => {
            let area = match ours {
                Some(id) if is_there(id)? => area_of(Disk::new(system, id.number), areas),
                _ => None,
            };
            match area {
                None => Verdict::Gone("it is not in use as swap".to_owned()),
                Some(area) if area.priority == i32::from(*priority) => Verdict::Revert,
                Some(area) => Verdict::Left(format!(
                    "{} is in use with priority {}, not {priority}",
                    area.path.display(),
                    area.priority
                )),
            }
        }
        Change::SetParameter { parameter, old, new } => {
            let path = parameter.path();
            let now = system.read(&path).map_err(PrepareError::io("read", path))?;
            match now.trim() {
                now if now == new => Verdict::Revert,
                now if now == old => Verdict::Gone(format!("it is {old}")),
                now => Verdict::Left(format!("it is {now}, not {new}")),
            }
        }
    })
}

fn area_of<'a>(disk: Disk<'_>, areas: &'a [SwapArea]) -> Option<&'a SwapArea> {
    let node = disk.node();
    areas.iter().find(|area| area.path == node)
}

/// A device that is the one on record: is it still used as it was set up?
fn judge_device(disk: Disk<'_>, record: &Record, areas: &[SwapArea]) -> Result<Verdict, PrepareError> {
    let node = disk.node();
    if area_of(disk, areas).is_some() {
        return Ok(Verdict::Left(format!("{} is in use as swap, not as it was set up", node.display())));
    }
    let size = disk.size()?;
    if size == ByteCount(0) {
        return Ok(Verdict::Revert);
    }
    let header = match &record.request {
        Request::Zram(zram) => swap_header(zram.size)?,
        Request::Zswap(_) => return Ok(Verdict::Left(format!("{} was not asked for", node.display()))),
    };
    if size != header.disk_size {
        return Ok(Verdict::Left(format!("{} has been set to {size} by somebody else", node.display())));
    }
    // Cut short before the header was written, it is all zeros.
    let page = disk.first_page()?;
    if page == header.bytes || page == [0; PAGE_SIZE] {
        Ok(Verdict::Revert)
    } else {
        Ok(Verdict::Left(format!("{} holds something else than plimsoll's swap", node.display())))
    }
}

/// A device that was about to be added when the run was cut short.
fn judge_unrecorded(system: &dyn System, known: &[DeviceId]) -> Result<Verdict, PrepareError> {
    let found = unclaimed(system, known)?;
    Ok(match found.as_slice() {
        [] => Verdict::Gone("no device was added".to_owned()),
        [_] => Verdict::Revert,
        several => Verdict::Left(format!(
            "one of the empty devices {} may be plimsoll's, and it cannot be told which: remove those that nobody needs \
             with `echo N > /sys/class/zram-control/hot_remove`",
            several.iter().map(|disk| format!("zram{}", disk.number())).collect::<Vec<_>>().join(", ")
        )),
    })
}

/// Empty devices that were not there before and that no run of plimsoll has claimed.
fn unclaimed<'a>(system: &'a dyn System, known: &[DeviceId]) -> Result<Vec<Disk<'a>>, PrepareError> {
    let mut found = Vec::new();
    for id in DeviceId::all(system)? {
        let disk = Disk::new(system, id.number);
        let claim = format!("/run/plimsoll/zram-{}", id.number);
        if !known.contains(&id) && disk.size()? == ByteCount(0) && !system.exists(Path::new(&claim)) {
            found.push(disk);
        }
    }
    Ok(found)
}

/// The area that undoing would switch off, and what is in it.
fn to_read_back<'a>(
    system: &'a dyn System,
    record: &Record,
) -> Result<Option<(Disk<'a>, ByteCount)>, PrepareError> {
    let is_off = |step: &(Change, Verdict)| matches!(step, (Change::SwapOn { .. }, Verdict::Revert));
    let Some(id) = record.device() else { return Ok(None) };
    if !survey(system, record)?.iter().any(is_off) {
        return Ok(None);
    }
    let disk = Disk::new(system, id.number);
    let used = area_of(disk, &swap_areas(system)?).map(|area| area.used);
    Ok(used.map(|used| (disk, used)))
}

fn revert_one(
    system: &dyn System,
    record: &Record,
    change: &Change,
    watch: &mut dyn FnMut(Progress<'_>),
) -> Result<(), PrepareError> {
    match (change, record.device()) {
        (Change::SwapOn { .. }, Some(id)) => switch_off(system, Disk::new(system, id.number), watch),
        (Change::AddDevice { made: Some(id), .. }, _) => Ok(Disk::new(system, id.number).remove()?),
        (Change::AddDevice { made: None, known }, _) => match unclaimed(system, known)?.as_slice() {
            [disk] => Ok(disk.remove()?),
            // Others have come or gone since the look a moment ago: nothing is certain any more.
            _ => Ok(()),
        },
        (Change::SetParameter { parameter, old, .. }, _) => set_parameter(system, *parameter, old),
        (Change::Set { .. } | Change::Format | Change::SwapOn { .. }, _) => Ok(()),
    }
}

pub(super) fn set_parameter(
    system: &dyn System,
    parameter: Parameter,
    value: &str,
) -> Result<(), PrepareError> {
    let path = parameter.path();
    system.write(&path, value).map_err(PrepareError::io("write to", path))
}

/// Ends the use of a device as swap, telling how what is in it shrinks. Killed meanwhile, the kernel stops and keeps it.
fn switch_off(
    system: &dyn System,
    disk: Disk<'_>,
    watch: &mut dyn FnMut(Progress<'_>),
) -> Result<(), PrepareError> {
    let used = || Some(area_of(disk, &swap_areas(system).ok()?)?.used);
    let of = used().unwrap_or_default();
    let (ended, end) = mpsc::channel::<()>();
    let done = std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let done = disk.swapoff();
            drop(ended);
            done
        });
        while end.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
            if let Some(left) = used() {
                watch(Progress::ReadBack { left, of });
            }
        }
        reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    match done {
        Err(ZramError::Swap(SwapError::Other { source, .. }))
            if source.raw_os_error() == Some(Errno::NOMEM.raw_os_error()) =>
        {
            let used = used().unwrap_or_default();
            Err(PrepareError::OutOfMemory { device: disk.node(), used })
        }
        done => Ok(done?),
    }
}
