//! DAMON, the kernel's monitor of data accesses, through its directories in sysfs (`Documentation/admin-guide/mm/damon/usage.rst`).
//!
//! Enters: a process and its ranges. Leaves: how much of them lies in regions of which some page was seen used. What must never
//! happen: a monitor of somebody else's is changed, or one of ours is left. There is one directory for all users of a kernel, and
//! writing its number of monitors removes those there are: so none but 0 is ever changed, and it is 0 again afterwards.
//!
//! ```text
//! kdamonds/nr_kdamonds                          0 -> 1: the directory 0 appears
//!   0/state                                     on, off, update_schemes_tried_regions
//!   0/contexts/0/avail_operations, operations   fvaddr: these ranges of an address space; vaddr: all of it
//!               /monitoring_attrs               how often pages are sampled, and into how many regions
//!               /targets/0                      the process, and its ranges
//!               /schemes/0                      "stat" for regions used at least once: they are listed, nothing is done
//!               /schemes/0/tried_regions/N      their addresses
//! ```
use super::{Source, SourceError};
use crate::kernel::Layout;
use crate::system::System;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva, PageCount};
use std::io;
use std::path::{Path, PathBuf};

/// Where the kernel's monitors are set up.
const KDAMONDS: &str = "/sys/kernel/mm/damon/admin/kdamonds";

const NUMBER: &str = "nr_kdamonds";
/// What may be monitored, the better first.
const OPERATIONS: [&str; 2] = ["fvaddr", "vaddr"];
const CONTEXT: &str = "contexts/0";
const SCHEME: &str = "contexts/0/schemes/0";
/// What does not depend on the machine. Every region is sampled 200 times a second, and judged by a second of that; there are as
/// many regions as is DAMON's default. All sizes and ages count, and any use at all.
const SETTINGS: [(&str, &str); 14] = [
    ("contexts/0/monitoring_attrs/intervals/sample_us", "5000"),
    ("contexts/0/monitoring_attrs/intervals/aggr_us", "1000000"),
    ("contexts/0/monitoring_attrs/nr_regions/min", "10"),
    ("contexts/0/monitoring_attrs/nr_regions/max", "1000"),
    ("contexts/0/targets/nr_targets", "1"),
    ("contexts/0/schemes/nr_schemes", "1"),
    ("contexts/0/schemes/0/action", "stat"),
    ("contexts/0/schemes/0/access_pattern/sz/min", "0"),
    ("contexts/0/schemes/0/access_pattern/sz/max", "18446744073709551615"),
    ("contexts/0/schemes/0/access_pattern/nr_accesses/min", "1"),
    ("contexts/0/schemes/0/access_pattern/nr_accesses/max", "4294967295"),
    ("contexts/0/schemes/0/access_pattern/age/min", "0"),
    ("contexts/0/schemes/0/access_pattern/age/max", "4294967295"),
    ("contexts/0/schemes/0/apply_interval_us", "1000000"),
];
/// That of them which older kernels lack: they apply schemes once in an aggregation, which is the same.
const OPTIONAL: &str = "contexts/0/schemes/0/apply_interval_us";

/// A monitor of one machine's memory. Dropping it removes it.
///
/// It may be [started](Self::start) once and [asked](Self::used) again and again, which is what gives
/// [`KernelMachine::heed`](crate::kernel::KernelMachine::heed) its hints, or be used for a period as a [`Source`].
pub struct Damon<'a> {
    system: &'a dyn System,
    root: PathBuf,
    ranges: Vec<HvaRange>,
}

impl<'a> Damon<'a> {
    /// Of the memory of a process. Nothing is monitored yet.
    ///
    /// # Errors
    /// [`SourceError::NoDamon`], [`SourceError::DamonTaken`] or [`SourceError::NoVirtualAddresses`]; nothing is left then.
    pub fn open(system: &'a dyn System, process: ProcessId, layout: &Layout) -> Result<Self, SourceError> {
        Self::open_at(system, KDAMONDS.as_ref(), process, layout)
    }

    fn open_at(
        system: &'a dyn System,
        root: &Path,
        process: ProcessId,
        layout: &Layout,
    ) -> Result<Self, SourceError> {
        let number = root.join(NUMBER);
        let monitors = system.read(&number).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SourceError::NoDamon,
            _ => SourceError::Damon { path: number.clone(), source },
        })?;
        if monitors.trim() != "0" {
            return Err(SourceError::DamonTaken { monitors: monitors.trim().to_owned() });
        }
        system.write(&number, "1").map_err(|source| SourceError::Damon { path: number, source })?;
        // From here on it is removed when this is dropped.
        let monitor = Self { system, root: root.to_owned(), ranges: layout.ranges().collect() };
        monitor.set_up(process)?;
        Ok(monitor)
    }

    fn set_up(&self, process: ProcessId) -> Result<(), SourceError> {
        self.put("contexts/nr_contexts", "1")?;
        let offered = self.get(&format!("{CONTEXT}/avail_operations"))?;
        let operations =
            OPERATIONS.into_iter().find(|wanted| offered.split_whitespace().any(|one| one == *wanted));
        self.put(&format!("{CONTEXT}/operations"), operations.ok_or(SourceError::NoVirtualAddresses)?)?;
        for (file, value) in SETTINGS {
            if file != OPTIONAL || self.system.exists(&self.path(file)) {
                self.put(file, value)?;
            }
        }
        let target = format!("{CONTEXT}/targets/0");
        self.put(&format!("{target}/pid_target"), &process.get().to_string())?;
        self.put(&format!("{target}/regions/nr_regions"), &self.ranges.len().to_string())?;
        for (place, range) in self.ranges.iter().enumerate() {
            self.put(&format!("{target}/regions/{place}/start"), &range.start().0.to_string())?;
            self.put(&format!("{target}/regions/{place}/end"), &range.end().0.to_string())?;
        }
        Ok(())
    }

    fn path(&self, file: &str) -> PathBuf {
        self.root.join("0").join(file)
    }

    fn put(&self, file: &str, value: &str) -> Result<(), SourceError> {
        let path = self.path(file);
        self.system.write(&path, value).map_err(|source| SourceError::Damon { path, source })
    }

    fn get(&self, file: &str) -> Result<String, SourceError> {
        let path = self.path(file);
        self.system.read(&path).map_err(|source| SourceError::Damon { path, source })
    }

    fn address(&self, file: &str) -> Result<Hva, SourceError> {
        let text = self.get(file)?;
        let number = text.trim().parse().map_err(|_| SourceError::Damon {
            path: self.path(file),
            source: io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no address")),
        });
        number.map(Hva)
    }

    /// Watches from now on.
    ///
    /// # Errors
    /// [`SourceError::Damon`].
    pub fn start(&self) -> Result<(), SourceError> {
        self.put("state", "on")
    }

    /// The parts of the machine's memory in which something was used in the second that just ended. The kernel is waited for, up
    /// to a second.
    ///
    /// # Errors
    /// [`SourceError::Damon`], also when the process has ended.
    pub fn used(&self) -> Result<Vec<HvaRange>, SourceError> {
        self.put("state", "update_schemes_tried_regions")?;
        let folder = format!("{SCHEME}/tried_regions");
        let path = self.path(&folder);
        let names = self.system.list(&path).map_err(|source| SourceError::Damon { path, source })?;
        let mut used = Vec::new();
        // Beside the numbered ones there is their sum, in newer kernels.
        for region in names.iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            let (start, end) = (
                self.address(&format!("{folder}/{region}/start"))?,
                self.address(&format!("{folder}/{region}/end"))?,
            );
            let shared = |range: &HvaRange| HvaRange::between(start.max(range.start()), end.min(range.end()));
            used.extend(self.ranges.iter().filter_map(shared).filter(|range| !range.is_empty()));
        }
        Ok(used)
    }
}

impl Source for Damon<'_> {
    fn name(&self) -> &'static str {
        "DAMON"
    }

    fn begin(&mut self) -> Result<(), SourceError> {
        self.start()
    }

    fn end(&mut self) -> Result<Option<PageCount>, SourceError> {
        let used = self.used();
        self.put("state", "off")?;
        let bytes = used?.iter().map(|range| range.len().0).sum();
        Ok(Some(ByteCount(bytes).pages_ceil()))
    }
}

impl Drop for Damon<'_> {
    fn drop(&mut self) {
        // One that does not run says so; what cannot be removed stays until somebody writes there again.
        let _ = self.put("state", "off");
        let _ = self.system.write(&self.root.join(NUMBER), "0");
    }
}

#[cfg(test)]
mod tests;
