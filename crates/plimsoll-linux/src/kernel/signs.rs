//! How a machine fares: what came back from swap, and who waits for memory.
use super::KernelError;
use crate::cgroup::foreign::ProcessCgroup;
use plimsoll_core::outside::Signs;
use plimsoll_sys::psi::{self, PressureFile};
use plimsoll_sys::{ProcessId, procfs};
use plimsoll_types::PageCount;
use std::path::Path;
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
        let faults = procfs::major_faults(process)?;
        let mut watch = Self { process, faults, pressure: None, scope: PressureScope::Unmeasured };
        watch.follow(cgroup);
        Ok(watch)
    }

    /// The machine is in that cgroup now.
    pub(super) fn follow(&mut self, cgroup: Option<&ProcessCgroup>) {
        // A pressure file that cannot be read, for whatever reason, is one sign less.
        let open = |path: &Path| PressureFile::open(path).ok();
        let own = cgroup.and_then(ProcessCgroup::pressure).and_then(|path| open(&path));
        let host = || open(psi::HOST_MEMORY.as_ref());
        (self.pressure, self.scope) = match own {
            Some(own) => (Some(own), PressureScope::Cgroup),
            None => match host() {
                Some(host) => (Some(host), PressureScope::Host),
                None => (None, PressureScope::Unmeasured),
            },
        };
    }

    pub(super) const fn scope(&self) -> PressureScope {
        self.scope
    }

    /// Pages that came back since the last call because the machine touched them.
    pub(super) fn came_back(&mut self) -> Result<PageCount, KernelError> {
        let faults = procfs::major_faults(self.process)?;
        Ok(PageCount(faults.saturating_sub(std::mem::replace(&mut self.faults, faults))))
    }

    /// The signs of a period in which so many pages came back, samples not counted.
    pub(super) fn signs(&self, period: Duration, refaults: PageCount) -> Signs {
        let stall = self.pressure.as_ref().and_then(|file| file.read().ok()).map(|pressure| pressure.some.0);
        Signs { period, refaults, stall }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_that_of_the_cgroup_the_machine_has_moved_to() {
        let folder = std::env::temp_dir().join(format!("plimsoll-signs-{}", std::process::id()));
        let cgroups = ["a.scope", "b.scope"].map(|name| folder.join(name));
        for (cgroup, share) in cgroups.iter().zip(["12.50", "0.75"]) {
            std::fs::create_dir_all(cgroup).unwrap();
            let line = |kind| format!("{kind} avg10={share} avg60=0.00 avg300=0.00 total=1\n");
            std::fs::write(cgroup.join("memory.pressure"), line("some") + &line("full")).unwrap();
        }
        let [one, other] = cgroups.each_ref().map(|path| ProcessCgroup::v2_at(path));
        let mut watch = Watch::new(ProcessId::own(), Some(&one)).unwrap();
        let stall = |watch: &Watch| watch.signs(Duration::ZERO, PageCount(0)).stall;
        assert_eq!((stall(&watch), watch.scope()), (Some(1250), PressureScope::Cgroup));
        watch.follow(Some(&other));
        assert_eq!(stall(&watch), Some(75));
        watch.follow(None);
        assert_ne!(watch.scope(), PressureScope::Cgroup);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
