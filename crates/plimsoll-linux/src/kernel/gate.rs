//! Whether pages may go to swap now: asked before anything is advised, because the kernel takes advice to page out without
//! swap by splitting huge pages and then keeping them.
use super::KernelError;
use crate::cgroup::foreign::{ProcessCgroup, SwapRight};
use crate::reclaimer::Short;
use crate::zram;
use plimsoll_types::ByteCount;

/// Less room than this in all of swap is none: what the kernel's CPUs set aside for themselves takes as much.
const ROOM_MIN: ByteCount = ByteCount::mib(1);

/// Why the host's swap takes nothing, if it does not.
pub(super) fn host() -> Result<Option<Short>, KernelError> {
    let areas = zram::host_swap().map_err(KernelError::Swap)?;
    if areas.is_empty() {
        return Ok(Some(Short::NoSwap));
    }
    let size = areas.iter().map(|area| area.size).sum();
    let used = areas.iter().map(|area| area.used).sum();
    let left = ByteCount::saturating_sub(size, used);
    Ok((left < ROOM_MIN).then_some(Short::SwapFull { left, size }))
}

/// Why a cgroup may not swap, if it may not. One whose files cannot be read forbids nothing: the kernel heeds v2's limit
/// whether it can be read or not.
pub(super) fn cgroup(cgroup: &ProcessCgroup) -> Option<Short> {
    let path = || cgroup.path().to_owned();
    match cgroup.swap_right().ok()? {
        SwapRight::Free => None,
        SwapRight::Forbidden => Some(Short::CgroupForbidsSwap { cgroup: path() }),
        SwapRight::Limited(limit) => {
            let swapped = cgroup.numbers().ok()?.swapped?;
            let is_full = limit.saturating_sub(swapped) < ROOM_MIN;
            is_full.then(|| Short::CgroupSwapFull { cgroup: path(), limit })
        }
    }
}
