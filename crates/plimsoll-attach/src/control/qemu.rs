//! QEMU, through its monitor. Commands and answers are those of QEMU 7.2, recorded (`tests/qmp/recorded.txt`).
//!
//! Enters: a connection ([`Qmp`]). Leaves: what every driver says. What must never happen: a memory module left half
//! plugged, or a statistic that QEMU marks as missing taken for a number.
//!
//! QEMU counts a balloon by what is *left* to the guest: the memory it was started with and its modules (pc-dimm), but neither
//! virtio-mem nor NVDIMM. It does not say what it was asked for, so the target is known once we have asked.
use super::error::{ControlError, quote};
use super::qmp::Qmp;
use super::{
    Balloon, BalloonDevice, Capabilities, Control, ControlEvent, Feature, GuestStatistics, HotMemory,
    HotMemoryId, HotplugMethod, Migration, RunState, checked_request, whole_seconds,
};
use plimsoll_types::{ByteCount, PAGE_SIZE};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

/// Where devices are: with a name, and without one.
const CONTAINERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
/// The name of the memory modules; a device's name cannot have a space.
const MODULES: &str = "memory modules";
/// The smallest memory module: Linux's memory block.
const MODULE_BLOCK: ByteCount = ByteCount::mib(128);
/// How our memory modules and their back ends are called, with a number behind.
const MODULE_NAME: &str = "plimsoll-dimm";
const PAGE: ByteCount = ByteCount(PAGE_SIZE as u64);
/// The balloon's property that says how often its guest is asked for statistics, in seconds.
const INTERVAL: &str = "guest-stats-polling-interval";

/// What QEMU's states mean to us. A state that is not here will not run on.
const RUN_STATES: [(&str, RunState); 12] = [
    ("prelaunch", RunState::NotStarted),
    ("inmigrate", RunState::NotStarted),
    ("running", RunState::Running),
    ("colo", RunState::Running),
    ("paused", RunState::Paused),
    ("suspended", RunState::Paused),
    ("debug", RunState::Paused),
    ("save-vm", RunState::Paused),
    ("restore-vm", RunState::Paused),
    ("finish-migrate", RunState::Paused),
    ("watchdog", RunState::Paused),
    ("io-error", RunState::Paused),
];

/// Which of our values an event makes old.
const EVENTS: [(&str, ControlEvent); 8] = [
    ("STOP", ControlEvent::RunState),
    ("RESUME", ControlEvent::RunState),
    ("SHUTDOWN", ControlEvent::RunState),
    ("GUEST_PANICKED", ControlEvent::RunState),
    ("MIGRATION", ControlEvent::Migration),
    ("BALLOON_CHANGE", ControlEvent::Balloon),
    ("MEMORY_DEVICE_SIZE_CHANGE", ControlEvent::HotMemory),
    ("DEVICE_DELETED", ControlEvent::HotMemory),
];

/// One QEMU machine.
#[derive(Debug)]
pub struct Qemu<Q> {
    qmp: Q,
    balloon: Option<BalloonPath>,
    target: Option<ByteCount>,
    /// Events that were taken while probing whether there are any.
    pending: Vec<ControlEvent>,
}

/// Where the balloon is, and what it can be asked.
#[derive(Clone, Debug)]
struct BalloonPath {
    path: String,
    properties: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct BalloonInfo {
    actual: u64,
}

#[derive(Deserialize)]
struct StatusInfo {
    status: String,
}

#[derive(Deserialize)]
struct MigrationInfo {
    status: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SizeSummary {
    base_memory: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MachineMemory {
    size: u64,
    #[serde(default)]
    slots: u64,
    #[serde(default)]
    max_size: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct GuestStats {
    stats: BTreeMap<String, Value>,
    last_update: u64,
}

/// Other kinds (NVDIMM, SGX) take up room and are none of ours.
#[derive(Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
enum MemoryDevice {
    Dimm(Module),
    Nvdimm(Module),
    VirtioMem(VirtioMem),
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Module {
    id: Option<String>,
    size: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct VirtioMem {
    id: Option<String>,
    size: u64,
    requested_size: u64,
    max_size: u64,
    block_size: u64,
}

impl<Q: Qmp> Qemu<Q> {
    /// The machine at the other end of `qmp`. Nothing is asked yet.
    pub const fn new(qmp: Q) -> Self {
        Self { qmp, balloon: None, target: None, pending: Vec::new() }
    }

    fn ask<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T, ControlError> {
        let answer = self.qmp.execute(command, arguments)?;
        let shown = quote(&answer.to_string());
        serde_json::from_value(answer).map_err(|_| self.garbage(command, "the documented description", shown))
    }

    fn get<T: DeserializeOwned>(&mut self, path: &str, property: &str) -> Result<T, ControlError> {
        self.ask("qom-get", json!({ "path": path, "property": property }))
    }

    fn set(&mut self, path: &str, property: &str, value: impl Into<Value>) -> Result<(), ControlError> {
        let value: Value = value.into();
        self.qmp.execute("qom-set", json!({ "path": path, "property": property, "value": value })).map(drop)
    }

    fn list(&mut self, path: &str) -> Result<Vec<Property>, ControlError> {
        self.ask("qom-list", json!({ "path": path }))
    }

    fn garbage(&self, request: &str, expected: &'static str, found: String) -> ControlError {
        let interface = self.qmp.interface().to_owned();
        ControlError::Garbage { interface, request: request.to_owned(), expected, found }
    }

    /// Looks for a balloon among the devices, unless one was found before: it cannot be moved.
    fn find_balloon(&mut self) -> Result<Option<BalloonPath>, ControlError> {
        if self.balloon.is_some() {
            return Ok(self.balloon.clone());
        }
        for container in CONTAINERS {
            let devices = self.list(container)?;
            let Some(device) = devices.iter().find(|device| device.kind.starts_with("child<virtio-balloon"))
            else {
                continue;
            };
            let path = format!("{container}/{}", device.name);
            let properties = self.list(&path)?.into_iter().map(|property| property.name).collect();
            self.balloon = Some(BalloonPath { path, properties });
            break;
        }
        Ok(self.balloon.clone())
    }

    /// The path of a balloon that has the property.
    fn balloon_with(&mut self, property: &str, what: &'static str) -> Result<String, ControlError> {
        let balloon = self.find_balloon()?.filter(|balloon| balloon.properties.contains(property));
        balloon.map(|balloon| balloon.path).ok_or_else(|| self.unsupported(what))
    }

    fn memory_devices(&mut self) -> Result<Vec<MemoryDevice>, ControlError> {
        self.ask("query-memory-devices", Value::Null)
    }

    /// The memory a balloon is taken out of.
    fn ballooned_memory(&mut self) -> Result<ByteCount, ControlError> {
        let SizeSummary { base_memory } = self.ask("query-memory-size-summary", Value::Null)?;
        let modules =
            modules(&self.memory_devices()?).map(|module| module.size).try_fold(0, u64::checked_add);
        let memory = modules.and_then(|modules| base_memory.checked_add(modules)).map(ByteCount);
        memory.ok_or_else(|| {
            self.garbage("query-memory-devices", "possible sizes", "more than 64 bits of memory".to_owned())
        })
    }

    /// Room for memory modules; `None` on machines that take none, and on QEMU before 7.1, which does not say.
    fn module_room(&mut self, devices: &[MemoryDevice]) -> Result<Option<HotMemory>, ControlError> {
        let found = self.list("/machine")?.iter().any(|property| property.name == "memory");
        if !found {
            return Ok(None);
        }
        let memory: MachineMemory = self.get("/machine", "memory")?;
        let plugged: u64 = modules(devices).map(|module| module.size).fold(0, u64::saturating_add);
        let others = devices.iter().map(|device| match device {
            MemoryDevice::Nvdimm(module) => module.size,
            MemoryDevice::VirtioMem(device) => device.max_size,
            MemoryDevice::Dimm(_) | MemoryDevice::Other => 0,
        });
        let taken = others.fold(memory.size, u64::saturating_add);
        let slots =
            devices.iter().filter(|device| matches!(device, MemoryDevice::Dimm(_) | MemoryDevice::Nvdimm(_)));
        let is_full = u64::try_from(slots.count()).is_ok_and(|used| used >= memory.slots);
        let room = memory.max_size.saturating_sub(taken) / MODULE_BLOCK.0 * MODULE_BLOCK.0;
        let maximum = if is_full { plugged } else { room.max(plugged) };
        Ok((maximum > 0).then(|| HotMemory {
            id: HotMemoryId(MODULES.to_owned()),
            method: HotplugMethod::Acpi,
            block: MODULE_BLOCK,
            maximum: Some(ByteCount(maximum)),
            requested: ByteCount(plugged),
            plugged: Some(ByteCount(plugged)),
        }))
    }

    /// Plugs a module of `size`: its back end first, which is taken away again if the module is refused.
    fn add_module(&mut self, size: ByteCount) -> Result<(), ControlError> {
        let devices = self.memory_devices()?;
        let taken: BTreeSet<&str> = modules(&devices).filter_map(|module| module.id.as_deref()).collect();
        let name = (0..).map(|number| format!("{MODULE_NAME}{number}")).find(|name| !taken.contains(&**name));
        let name = name.ok_or_else(|| self.unsupported("free name for a memory module"))?;
        let backend = format!("{name}-backend");
        let object = json!({ "qom-type": "memory-backend-ram", "id": backend, "size": size.0 });
        self.qmp.execute("object-add", object)?;
        let device = json!({ "driver": "pc-dimm", "id": name, "memdev": backend });
        let outcome = self.qmp.execute("device_add", device).map(drop);
        if outcome.is_err() {
            // If this fails too, the first error is the one to be told.
            let _ = self.qmp.execute("object-del", json!({ "id": backend }));
        }
        outcome
    }

    fn status(&mut self) -> Result<String, ControlError> {
        Ok(self.ask::<StatusInfo>("query-status", Value::Null)?.status)
    }

    fn take_events(&mut self) -> Result<Vec<ControlEvent>, ControlError> {
        let events = self.qmp.events()?;
        let known = events.iter().filter_map(|event| EVENTS.iter().find(|(name, _)| *name == event.name));
        Ok(known.map(|(_, event)| *event).collect())
    }
}

fn modules(devices: &[MemoryDevice]) -> impl Iterator<Item = &Module> {
    devices.iter().filter_map(|device| match device {
        MemoryDevice::Dimm(module) => Some(module),
        _ => None,
    })
}

impl<Q: Qmp> Control for Qemu<Q> {
    fn interface(&self) -> &str {
        self.qmp.interface()
    }

    fn probe(&mut self) -> Result<Capabilities, ControlError> {
        let mut found = Capabilities::default();
        found.features.extend([Feature::Pause, Feature::Migration]);
        if let Some(balloon) = self.find_balloon()? {
            let has = |property: &str| balloon.properties.contains(property);
            found.features.extend(has("guest-stats").then_some(Feature::Statistics));
            let mut is_on = |property: &str| {
                if has(property) { self.get(&balloon.path, property).map(Some) } else { Ok(None) }
            };
            let reporting: Option<bool> = is_on("free-page-reporting")?;
            found.features.extend((reporting == Some(true)).then_some(Feature::FreePageReporting));
            // QEMU does not start with this but without the thread that it needs, so that need not be asked for.
            let hinting: Option<bool> = is_on("free-page-hint")?;
            found.features.extend((hinting == Some(true)).then_some(Feature::HintingInMigration));
            let deflate_on_oom = is_on("deflate-on-oom")?;
            found.balloon = Some(BalloonDevice { granularity: PAGE, deflate_on_oom });
        }
        found.hot_memory = self.hot_memory()?;
        match self.take_events() {
            Ok(events) => {
                self.pending.extend(events);
                found.features.insert(Feature::Events);
            }
            Err(ControlError::Unsupported { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(found)
    }

    fn run_state(&mut self) -> Result<RunState, ControlError> {
        let status = self.status()?;
        let known = RUN_STATES.iter().find(|(name, _)| *name == status);
        Ok(known.map_or(RunState::Ended, |(_, state)| *state))
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        self.qmp.execute("stop", Value::Null).map(drop)
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        self.qmp.execute("cont", Value::Null).map(drop)
    }

    fn balloon(&mut self) -> Result<Balloon, ControlError> {
        let memory = self.ballooned_memory()?;
        let BalloonInfo { actual: left } = self.ask("query-balloon", Value::Null)?;
        let actual = memory.0.checked_sub(left).map(ByteCount);
        let absurd = || format!("{} left of {memory}", ByteCount(left));
        let actual = actual.ok_or_else(|| self.garbage("query-balloon", "possible sizes", absurd()))?;
        Ok(Balloon { memory, target: self.target, actual: Some(actual) })
    }

    fn set_balloon(&mut self, size: ByteCount) -> Result<(), ControlError> {
        let memory = self.ballooned_memory()?;
        let size = size.pages_floor().bytes();
        let left = memory.saturating_sub(size);
        if left == ByteCount(0) {
            let maximum = memory.saturating_sub(PAGE);
            return Err(ControlError::OutOfRange { what: "a balloon", asked: size, maximum, step: PAGE });
        }
        self.qmp.execute("balloon", json!({ "value": left.0 }))?;
        self.target = Some(size);
        Ok(())
    }

    fn statistics(&mut self) -> Result<GuestStatistics, ControlError> {
        let balloon = self.balloon_with("guest-stats", "guest statistics")?;
        let said: GuestStats = self.get(&balloon, "guest-stats")?;
        // Missing ones are -1, which QEMU prints as the largest number of 64 bits.
        let count =
            |name: &str| said.stats.get(name).and_then(Value::as_u64).filter(|count| *count != u64::MAX);
        let bytes = |name: &str| count(name).map(ByteCount);
        // Seconds of the wall clock, 0 for never.
        let told = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(said.last_update));
        let age = told.filter(|_| said.last_update != 0).and_then(|told| told.elapsed().ok());
        Ok(GuestStatistics {
            age,
            available: bytes("stat-available-memory"),
            free: bytes("stat-free-memory"),
            total: bytes("stat-total-memory"),
            caches: bytes("stat-disk-caches"),
            swapped_in: bytes("stat-swap-in"),
            swapped_out: bytes("stat-swap-out"),
            major_faults: count("stat-major-faults"),
            minor_faults: count("stat-minor-faults"),
            oom_kills: count("stat-oom-kill"),
        })
    }

    fn statistics_interval(&mut self) -> Result<Duration, ControlError> {
        let balloon = self.balloon_with(INTERVAL, "guest statistics")?;
        Ok(Duration::from_secs(self.get(&balloon, INTERVAL)?))
    }

    fn poll_statistics(&mut self, every: Duration) -> Result<(), ControlError> {
        let balloon = self.balloon_with(INTERVAL, "guest statistics")?;
        self.set(&balloon, INTERVAL, whole_seconds(every))
    }

    fn hot_memory(&mut self) -> Result<Vec<HotMemory>, ControlError> {
        let devices = self.memory_devices()?;
        let mut found: Vec<HotMemory> = devices.iter().filter_map(virtio_mem).collect();
        found.extend(self.module_room(&devices)?);
        Ok(found)
    }

    fn request_hot_memory(&mut self, id: &HotMemoryId, size: ByteCount) -> Result<(), ControlError> {
        let all = self.hot_memory()?;
        let memory = checked_request(self, &all, id, size)?;
        match memory.method {
            HotplugMethod::VirtioMem => {
                self.set(&format!("{}/{id}", CONTAINERS[0]), "requested-size", size.0)
            }
            HotplugMethod::Acpi if size == memory.requested => Ok(()),
            HotplugMethod::Acpi => self.add_module(size.saturating_sub(memory.requested)),
        }
    }

    fn migration(&mut self) -> Result<Migration, ControlError> {
        let MigrationInfo { status } = self.ask("query-migrate", Value::Null)?;
        Ok(match status.as_deref() {
            None | Some("none") => Migration::None,
            Some("failed" | "cancelled") => Migration::Failed,
            // A machine that arrived here was migrated too; one that has left will not run again.
            Some("completed") if self.status()? == "postmigrate" => Migration::Completed,
            Some("completed") => Migration::None,
            // Whatever else QEMU calls it: it is under way.
            Some(_) => Migration::Active,
        })
    }

    fn events(&mut self) -> Result<Vec<ControlEvent>, ControlError> {
        let news = self.take_events()?;
        let mut events = std::mem::take(&mut self.pending);
        events.extend(news);
        Ok(events)
    }
}

/// A virtio-mem device without a name cannot be spoken to.
fn virtio_mem(device: &MemoryDevice) -> Option<HotMemory> {
    let MemoryDevice::VirtioMem(device) = device else { return None };
    Some(HotMemory {
        id: HotMemoryId(device.id.clone()?),
        method: HotplugMethod::VirtioMem,
        block: ByteCount(device.block_size),
        maximum: Some(ByteCount(device.max_size)),
        requested: ByteCount(device.requested_size),
        plugged: Some(ByteCount(device.size)),
    })
}
