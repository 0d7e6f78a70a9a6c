//! Carrying a plan out.
//!
//! A plan that somebody has agreed to enters; a prepared host and its record leave, or the host as it was and the reason.
//! What must never happen here: a change that is not on record before it is made.
use super::change::{Change, DeviceId, Setting};
use super::plan::{Outlook, Plan, plan};
use super::record::{Place, Record, Stage};
use super::undo::{revert, set_parameter};
use super::{PrepareError, boot_id};
use crate::system::System;
use crate::zram::{Disk, ZramError, swap_header};
use plimsoll_sys::swap::{SwapPriority, SwapRank};

/// Makes the changes of `agreed`, calls `watch` before each, and returns what is on record then.
///
/// # Errors
/// When the host is no longer as it was when the plan was made, or a change fails. Those made before it are undone then;
/// if that fails too, the error says so and the record stays.
pub fn apply(
    system: &dyn System,
    place: &Place,
    agreed: &Plan,
    watch: &mut dyn FnMut(&Change),
) -> Result<Record, PrepareError> {
    let lock = place.lock()?;
    match plan(system, place, &agreed.request)? {
        Outlook::Changes(now) if now.changes == agreed.changes => {}
        _ => return Err(PrepareError::PlanOutdated),
    }
    let mut record = Record::new(boot_id(system)?, agreed.request.clone());
    // Found out before anything is changed: whether a record can be written at all.
    lock.save(&record)?;
    let made = agreed.changes.iter().try_for_each(|change| {
        record.steps.push(match change {
            // Those that were there when the plan was shown are of no interest.
            Change::AddDevice { .. } => Change::AddDevice { known: DeviceId::all(system)?, made: None },
            other => other.clone(),
        });
        lock.save(&record)?;
        watch(change);
        let added = make(system, record.device(), change)?;
        // Saved with the next change: see "the one gap".
        if let (Some(Change::AddDevice { made, .. }), Some(_)) = (record.steps.last_mut(), added) {
            *made = added;
        }
        Ok(())
    });
    let made = made.and_then(|()| {
        record.stage = Stage::Prepared;
        lock.save(&record)
    });
    let Err(failed) = made else { return Ok(record) };
    Err(match revert(system, &lock, &mut record, &mut |_| {}) {
        Ok(_) => failed,
        Err(source) => PrepareError::Stuck { failed: crate::explain(&failed), source: Box::new(source) },
    })
}

/// Makes one change, on the device that was added before, if any. Returns the device that it has added.
fn make(
    system: &dyn System,
    device: Option<DeviceId>,
    change: &Change,
) -> Result<Option<DeviceId>, PrepareError> {
    let disk = || {
        let number = device.ok_or(PrepareError::PlanOutdated)?.number;
        Ok::<_, PrepareError>(Disk::new(system, number))
    };
    match change {
        Change::AddDevice { .. } => {
            let disk = Disk::add(system)?;
            let gone = || ZramError::Vanished { number: disk.number() };
            let disk_sequence = disk.sequence()?.ok_or_else(gone)?;
            return Ok(Some(DeviceId { number: disk.number(), disk_sequence }));
        }
        // Where the plan could not see what the kernel has, this says it.
        Change::Set { setting: Setting::Algorithm, new } => drop(disk()?.choose_algorithm(&[new])?),
        Change::Set { setting, new } => disk()?.set_offered(setting.attribute(), new)?,
        Change::Format => {
            let disk = disk()?;
            disk.format(&swap_header(disk.size()?)?)?;
        }
        Change::SwapOn { priority } => {
            let rank = SwapRank::new(*priority).ok_or(PrepareError::BadPriority(*priority))?;
            disk()?.swapon(SwapPriority::Fixed(rank))?;
        }
        Change::SetParameter { parameter, new, .. } => set_parameter(system, *parameter, new)?,
    }
    Ok(None)
}
