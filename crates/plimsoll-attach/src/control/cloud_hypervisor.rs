//! Cloud Hypervisor's REST interface. Requests and answers are those of its published description
//! (`tests/api/cloud-hypervisor.yaml`); what follows is not in it and was read in its sources:
//!
//! * a resize writes what was *asked* into the configuration that `vm.info` returns, whether or not the guest has followed;
//!   so balloon targets can be read back, and what was really plugged cannot be;
//! * `memory_actual_size` is all configured memory less what the balloon really holds;
//! * ACPI hot plug is folded into `memory.size`, so what was added before we came cannot be told from what was there at boot:
//!   the size that is seen first counts as the one it was started with.
use super::error::ControlError;
use super::http::{Client, Method};
use super::rest::{self, Request};
use super::{
    Balloon, BalloonDevice, Capabilities, Control, Feature, HotMemory, HotMemoryId, HotplugMethod, RunState,
    checked_request,
};
use crate::vmm::cloud_hypervisor::is_acpi;
use plimsoll_types::{ByteCount, PAGE_SIZE};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

const INFO: &str = "/api/v1/vm.info";
const RESIZE: &str = "/api/v1/vm.resize";
const RESIZE_ZONE: &str = "/api/v1/vm.resize-zone";
/// The name of the hot memory that belongs to no zone; the others' names are prefixed.
const WHOLE: &str = "memory";
const ZONE_PREFIX: &str = "zone:";
/// A memory module's smallest unit: Linux's memory block.
const ACPI_BLOCK: ByteCount = ByteCount::mib(128);
/// A virtio-mem device's block, one huge page.
const VIRTIO_MEM_BLOCK: ByteCount = ByteCount::mib(2);

/// One Cloud Hypervisor machine.
#[derive(Debug)]
pub struct CloudHypervisor {
    client: Client,
    /// `memory.size` as it was first seen.
    first_size: Option<u64>,
}

/// What the VMM says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Ping {
    /// Its version.
    pub version: String,
    /// Its process, where it says; to be held against the process the socket was found by.
    pub pid: Option<u32>,
}

#[derive(Deserialize)]
struct Info {
    state: String,
    config: Configuration,
    memory_actual_size: Option<u64>,
}

#[derive(Deserialize)]
struct Configuration {
    #[serde(default)]
    memory: Memory,
    balloon: Option<BalloonConfiguration>,
}

#[derive(Default, Deserialize)]
struct Memory {
    size: u64,
    hotplug_size: Option<u64>,
    hotplugged_size: Option<u64>,
    hotplug_method: Option<String>,
    zones: Option<Vec<Zone>>,
}

#[derive(Deserialize)]
struct Zone {
    id: String,
    size: u64,
    hotplug_size: Option<u64>,
    hotplugged_size: Option<u64>,
}

#[derive(Deserialize)]
struct BalloonConfiguration {
    size: u64,
    #[serde(default)]
    deflate_on_oom: bool,
    #[serde(default)]
    free_page_reporting: bool,
}

impl Memory {
    fn zones(&self) -> &[Zone] {
        self.zones.as_deref().unwrap_or_default()
    }

    /// Everything that is configured; `None` if it does not fit in 64 bits.
    fn total(&self) -> Option<ByteCount> {
        let zones = self.zones().iter().flat_map(|zone| [zone.size, zone.hotplugged_size.unwrap_or(0)]);
        let mut sizes = zones.chain([self.size, self.hotplugged_size.unwrap_or(0)]);
        sizes.try_fold(0u64, u64::checked_add).map(ByteCount)
    }

    /// The pieces of hot memory, if the machine was started with `first_size`.
    fn hot(&self, first_size: u64) -> Vec<HotMemory> {
        let whole = self.hotplug_size.filter(|size| *size > 0).map(|maximum| {
            let id = HotMemoryId(WHOLE.to_owned());
            let maximum = Some(ByteCount(maximum));
            if is_acpi(self.hotplug_method.as_deref()) {
                let added = ByteCount(self.size.saturating_sub(first_size));
                let (method, block) = (HotplugMethod::Acpi, ACPI_BLOCK);
                HotMemory { id, method, block, maximum, requested: added, plugged: Some(added) }
            } else {
                let requested = ByteCount(self.hotplugged_size.unwrap_or(0));
                let (method, block) = (HotplugMethod::VirtioMem, VIRTIO_MEM_BLOCK);
                HotMemory { id, method, block, maximum, requested, plugged: None }
            }
        });
        let zones = self.zones().iter().filter_map(|zone| {
            let maximum = zone.hotplug_size.filter(|size| *size > 0)?;
            Some(HotMemory {
                id: HotMemoryId(format!("{ZONE_PREFIX}{}", zone.id)),
                method: HotplugMethod::VirtioMem,
                block: VIRTIO_MEM_BLOCK,
                maximum: Some(ByteCount(maximum)),
                requested: ByteCount(zone.hotplugged_size.unwrap_or(0)),
                plugged: None,
            })
        });
        whole.into_iter().chain(zones).collect()
    }
}

impl CloudHypervisor {
    /// The machine whose API listens at `socket`. Nothing is connected yet.
    pub fn new(socket: impl Into<PathBuf>, patience: Duration) -> Self {
        let socket = socket.into();
        let interface = format!("the Cloud Hypervisor API at {}", socket.display());
        Self { client: Client::new(socket, interface, patience), first_size: None }
    }

    /// Asks the VMM who it is.
    ///
    /// # Errors
    /// As for every request of [`Control`].
    pub fn ping(&mut self) -> Result<Ping, ControlError> {
        self.get("/api/v1/vmm.ping")
    }

    /// The counters of its devices, by device and name.
    ///
    /// # Errors
    /// As for every request of [`Control`].
    pub fn counters(&mut self) -> Result<BTreeMap<String, BTreeMap<String, u64>>, ControlError> {
        self.get("/api/v1/vm.counters")
    }

    fn get<T: serde::de::DeserializeOwned>(&mut self, path: &str) -> Result<T, ControlError> {
        rest::ask(&mut self.client, Request::get(path))
    }

    fn memory(&mut self) -> Result<(Memory, u64), ControlError> {
        let memory = self.get::<Info>(INFO)?.config.memory;
        let first_size = *self.first_size.get_or_insert(memory.size);
        Ok((memory, first_size))
    }

    fn put(&mut self, path: &str, body: Option<&Value>) -> Result<(), ControlError> {
        rest::tell(&mut self.client, Request { method: Method::Put, path, body })
    }

    fn absurd(&self, found: &str) -> ControlError {
        rest::garbage(&self.client, Request::get(INFO), "possible sizes", found.as_bytes())
    }
}

impl Control for CloudHypervisor {
    fn interface(&self) -> &str {
        self.client.interface()
    }

    fn probe(&mut self) -> Result<Capabilities, ControlError> {
        let info: Info = self.get(INFO)?;
        let mut found = Capabilities { features: [Feature::Pause].into(), ..Capabilities::default() };
        if let Some(balloon) = &info.config.balloon {
            found.balloon = Some(BalloonDevice {
                granularity: ByteCount(PAGE_SIZE as u64),
                deflate_on_oom: Some(balloon.deflate_on_oom),
            });
            found.features.extend(balloon.free_page_reporting.then_some(Feature::FreePageReporting));
        }
        let first_size = *self.first_size.get_or_insert(info.config.memory.size);
        found.hot_memory = info.config.memory.hot(first_size);
        Ok(found)
    }

    fn run_state(&mut self) -> Result<RunState, ControlError> {
        let info: Info = self.get(INFO)?;
        match &*info.state {
            "Created" => Ok(RunState::NotStarted),
            "Running" => Ok(RunState::Running),
            "Paused" | "BreakPoint" => Ok(RunState::Paused),
            "Shutdown" => Ok(RunState::Ended),
            other => Err(rest::garbage(&self.client, Request::get(INFO), "a known state", other.as_bytes())),
        }
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        self.put("/api/v1/vm.pause", None)
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        self.put("/api/v1/vm.resume", None)
    }

    fn balloon(&mut self) -> Result<Balloon, ControlError> {
        let info: Info = self.get(INFO)?;
        let balloon = info.config.balloon.ok_or_else(|| self.unsupported("balloon"))?;
        let memory = info.config.memory.total().ok_or_else(|| self.absurd("more than 64 bits of memory"))?;
        let actual = info.memory_actual_size.map(|left| {
            let held = memory.0.checked_sub(left).map(ByteCount);
            held.ok_or_else(|| self.absurd(&format!("{} left of {memory}", ByteCount(left))))
        });
        Ok(Balloon { memory, target: Some(ByteCount(balloon.size)), actual: actual.transpose()? })
    }

    fn set_balloon(&mut self, size: ByteCount) -> Result<(), ControlError> {
        let whole = size.pages_floor().bytes();
        self.put(RESIZE, Some(&json!({ "desired_balloon": whole.0 })))
    }

    fn hot_memory(&mut self) -> Result<Vec<HotMemory>, ControlError> {
        let (memory, first_size) = self.memory()?;
        Ok(memory.hot(first_size))
    }

    fn request_hot_memory(&mut self, id: &HotMemoryId, size: ByteCount) -> Result<(), ControlError> {
        let (memory, first_size) = self.memory()?;
        let hot = memory.hot(first_size);
        let wanted = checked_request(self, &hot, id, size)?;
        let zone = id.0.strip_prefix(ZONE_PREFIX);
        let zone = zone.and_then(|name| memory.zones().iter().find(|zone| zone.id == name));
        let base = match (zone, wanted.method) {
            (Some(zone), _) => zone.size,
            (None, HotplugMethod::VirtioMem) => memory.size,
            (None, HotplugMethod::Acpi) => first_size,
        };
        let desired = base.checked_add(size.0).ok_or_else(|| self.absurd("more than 64 bits of memory"))?;
        match zone {
            Some(zone) => self.put(RESIZE_ZONE, Some(&json!({ "id": zone.id, "desired_ram": desired }))),
            None => self.put(RESIZE, Some(&json!({ "desired_ram": desired }))),
        }
    }
}
