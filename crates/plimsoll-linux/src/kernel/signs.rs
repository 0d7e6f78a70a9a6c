//! How a machine fares: what came back from swap, and who waits for memory.
use super::KernelError;
use crate::cgroup::foreign::ProcessCgroup;
use plimsoll_core::outside::Signs;
use plimsoll_sys::psi::{self, PressureFile};
use plimsoll_sys::{ProcessId, procfs};
use plimsoll_types::PageCount;
use std::time::Duration;

/// Whose waiting is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PressureScope {
    /// That of the machine's own cgroup (v2).
    Cgroup,
    /// That of the whole host.
    Host,
    /// The kernel does not measure it (v1 of cgroups, and `psi=0`): returning pages are the only sign.
    Unmeasured,
}

/// The kernel's counters of one machine, as of the last period.
#[derive(Debug)]
pub(super) struct Watch {
    process: ProcessId,
    faults: u64,
    pressure: Option<PressureFile>,
    scope: PressureScope,
}

impl Watch {
    pub(super) fn new(process: ProcessId, cgroup: Option<&ProcessCgroup>) -> Result<Self, KernelError> {
        // A pressure file that cannot be read, for whatever reason, is one sign less.
        let own = cgroup.and_then(ProcessCgroup::pressure).and_then(|path| PressureFile::open(&path).ok());
        let host = || PressureFile::open(psi::HOST_MEMORY.as_ref()).ok();
        let (pressure, scope) = match own {
            Some(own) => (Some(own), PressureScope::Cgroup),
            None => match host() {
                Some(host) => (Some(host), PressureScope::Host),
                None => (None, PressureScope::Unmeasured),
            },
        };
        Ok(Self { process, faults: procfs::major_faults(process)?, pressure, scope })
    }

    pub(super) const fn scope(&self) -> PressureScope {
        self.scope
    }

    /// The signs since the last call. `samples` of the pages that came back had been taken as samples.
    pub(super) fn read(&mut self, period: Duration, samples: u32) -> Result<Signs, KernelError> {
        let faults = procfs::major_faults(self.process)?;
        let came_back = faults.saturating_sub(std::mem::replace(&mut self.faults, faults));
        let stall = self.pressure.as_ref().and_then(|file| file.read().ok()).map(|pressure| pressure.some.0);
        let refaults = PageCount(came_back.saturating_sub(u64::from(samples)));
        Ok(Signs { period, refaults, stall })
    }
}
