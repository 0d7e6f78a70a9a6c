//! The memory that machines share.
//!
//! Enters: a size, and whoever counts what of it is used. Leaves: what is free. What must never happen: more free than
//! what the machines themselves leave, whatever a counter says.
use plimsoll_linux::uffd::manager::Meter;
use plimsoll_sys::procfs::parse_meminfo;
use plimsoll_types::ByteCount;
use std::fs;

/// The memory that machines share.
pub struct Pool {
    total: ByteCount,
    meter: Option<Box<dyn Meter>>,
}

impl Pool {
    /// So much, of which the machines use what their pages take up and nothing else does.
    pub const fn of(total: ByteCount) -> Self {
        Self { total, meter: None }
    }

    /// So much, of which `meter` counts what is used: machines, their VMMs, and the manager itself.
    pub fn metered(total: ByteCount, meter: Box<dyn Meter>) -> Self {
        Self { total, meter: Some(meter) }
    }

    /// All the host has.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn host() -> std::io::Result<Self> {
        let total = meminfo("MemTotal")?;
        Ok(Self::metered(total, Box::new(HostMeter { total })))
    }

    /// What there is.
    pub const fn total(&self) -> ByteCount {
        self.total
    }

    /// There is so much from now on.
    pub(super) const fn set_total(&mut self, total: ByteCount) {
        self.total = total;
    }

    /// What is free while machines take up so much, and what is used beyond a pool that is a part of a host. Of a whole host
    /// nothing is: machines that were merged from outside are each said to take up what they have between them.
    pub(super) fn room(&mut self, consumed: ByteCount) -> (ByteCount, ByteCount) {
        let used = self.meter.as_mut().map_or(consumed, |meter| meter.used());
        (self.total.saturating_sub(used.max(consumed)), used.saturating_sub(self.total))
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("total", &self.total).finish_non_exhaustive()
    }
}

/// What of the host's memory could not be had at once.
struct HostMeter {
    total: ByteCount,
}

impl Meter for HostMeter {
    fn used(&mut self) -> ByteCount {
        // Whatever cannot be read counts as all used up: nothing is granted for it.
        self.total.saturating_sub(meminfo("MemAvailable").unwrap_or_default())
    }
}

/// A line of /proc/meminfo.
fn meminfo(field: &'static str) -> std::io::Result<ByteCount> {
    let missing = || std::io::Error::other(format!("/proc/meminfo has no line {field}:"));
    parse_meminfo(&fs::read_to_string("/proc/meminfo")?, field).ok_or_else(missing)
}
