//! libvirt without the monitor: where `qemu-monitor-command` is refused, or would taint a domain somebody wants supported.
//!
//! Enters: a domain, through [`Virsh`]. Leaves: its balloon, statistics and run state, which is what `virsh` offers for
//! every hypervisor. Tables that people read are parsed here, so every number is looked up by its documented name.
use super::error::ControlError;
use super::{
    Balloon, BalloonDevice, Capabilities, Control, Feature, GuestStatistics, RunState, Virsh, whole_seconds,
};
use plimsoll_types::ByteCount;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// The unit of libvirt's sizes.
const KIB: ByteCount = ByteCount(1024);

/// One domain of libvirt's.
#[derive(Debug)]
pub struct Libvirt {
    virsh: Virsh,
    target: Option<ByteCount>,
}

/// `dommemstat`'s numbers by name; sizes are in KiB. Its `available` is all the guest has, `usable` what is available.
struct Table(BTreeMap<String, u64>);

impl Table {
    fn count(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    fn size(&self, name: &str) -> Option<ByteCount> {
        self.count(name).and_then(kib)
    }
}

fn kib(count: u64) -> Option<ByteCount> {
    count.checked_mul(KIB.0).map(ByteCount)
}

impl Libvirt {
    /// The domain that `virsh` speaks to. Nothing is asked yet.
    pub const fn new(virsh: Virsh) -> Self {
        Self { virsh, target: None }
    }

    fn table(&self) -> Result<Table, ControlError> {
        let printed = self.virsh.run("dommemstat", &[])?;
        let rows = printed.lines().filter_map(|row| row.split_once(' '));
        Ok(Table(
            rows.filter_map(|(name, count)| Some((name.to_owned(), count.trim().parse().ok()?))).collect(),
        ))
    }

    /// `Max memory` of `dominfo`, in KiB.
    fn memory(&self) -> Result<ByteCount, ControlError> {
        let printed = self.virsh.run("dominfo", &[])?;
        let row = printed.lines().find_map(|row| row.strip_prefix("Max memory:"));
        let count = row.and_then(|row| row.trim().strip_suffix(" KiB")?.trim().parse().ok());
        count.and_then(kib).ok_or_else(|| self.virsh.garbage("dominfo", "`Max memory: N KiB`", &printed))
    }
}

impl Control for Libvirt {
    fn interface(&self) -> &str {
        self.virsh.interface()
    }

    fn probe(&mut self) -> Result<Capabilities, ControlError> {
        let table = self.table()?;
        let mut found = Capabilities { features: [Feature::Pause].into(), ..Capabilities::default() };
        if table.count("actual").is_some() {
            found.balloon = Some(BalloonDevice { granularity: KIB, deflate_on_oom: None });
        }
        // A guest's driver, not the device, makes these appear.
        if ["usable", "unused"].iter().any(|name| table.count(name).is_some()) {
            found.features.insert(Feature::Statistics);
        }
        Ok(found)
    }

    fn run_state(&mut self) -> Result<RunState, ControlError> {
        let printed = self.virsh.run("domstate", &[])?;
        match &*printed {
            "running" | "idle" => Ok(RunState::Running),
            "paused" | "pmsuspended" => Ok(RunState::Paused),
            "in shutdown" | "shut off" | "crashed" | "dying" => Ok(RunState::Ended),
            _ => Err(self.virsh.garbage("domstate", "a known state", &printed)),
        }
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        self.virsh.run("suspend", &[]).map(drop)
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        self.virsh.run("resume", &[]).map(drop)
    }

    fn balloon(&mut self) -> Result<Balloon, ControlError> {
        let memory = self.memory()?;
        let left = self.table()?.size("actual").ok_or_else(|| self.unsupported("balloon"))?;
        let absurd =
            || self.virsh.garbage("dommemstat", "possible sizes", &format!("{left} left of {memory}"));
        let actual = memory.0.checked_sub(left.0).map(ByteCount).ok_or_else(absurd)?;
        Ok(Balloon { memory, target: self.target, actual: Some(actual) })
    }

    fn set_balloon(&mut self, size: ByteCount) -> Result<(), ControlError> {
        let memory = self.memory()?;
        let size = ByteCount(size.0 / KIB.0 * KIB.0);
        let left = memory.saturating_sub(size);
        if left == ByteCount(0) {
            let maximum = memory.saturating_sub(KIB);
            return Err(ControlError::OutOfRange { what: "a balloon", asked: size, maximum, step: KIB });
        }
        let argument = format!("{}", left.0 / KIB.0);
        self.virsh.run("setmem", &["--size", &argument, "--live"])?;
        self.target = Some(size);
        Ok(())
    }

    fn statistics(&mut self) -> Result<GuestStatistics, ControlError> {
        let table = self.table()?;
        let told = table.count("last_update").filter(|seconds| *seconds != 0);
        let told = told.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
        Ok(GuestStatistics {
            age: told.and_then(|told| told.elapsed().ok()),
            available: table.size("usable"),
            free: table.size("unused"),
            total: table.size("available"),
            caches: table.size("disk_caches"),
            swapped_in: table.size("swap_in"),
            swapped_out: table.size("swap_out"),
            major_faults: table.count("major_fault"),
            minor_faults: table.count("minor_fault"),
            oom_kills: None,
        })
    }

    /// `<stats period='N'/>` of the domain's balloon; without it there are none.
    fn statistics_interval(&mut self) -> Result<Duration, ControlError> {
        let described = self.virsh.run("dumpxml", &[])?;
        let Some((_, row)) = described.split_once("<stats period='") else { return Ok(Duration::ZERO) };
        let seconds = row.split_once('\'').and_then(|(seconds, _)| seconds.parse().ok());
        let garbage = || self.virsh.garbage("dumpxml", "`<stats period='SECONDS'/>`", row);
        seconds.map(Duration::from_secs).ok_or_else(garbage)
    }

    fn poll_statistics(&mut self, every: Duration) -> Result<(), ControlError> {
        let seconds = whole_seconds(every).to_string();
        self.virsh.run("dommemstat", &["--period", &seconds, "--live"]).map(drop)
    }
}
