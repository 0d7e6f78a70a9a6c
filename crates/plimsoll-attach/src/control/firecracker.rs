//! Firecracker's REST interface. Requests and answers are those of its published description (`tests/api/firecracker.yaml`).
//!
//! Most of what a machine can do is fixed before it starts: what was not configured is answered with status 400, which
//! probing takes as "has it not". The size of a balloon is known only while statistics are on.
use super::error::ControlError;
use super::http::{Client, Method};
use super::rest::{self, Request};
use super::{
    Balloon, BalloonDevice, Capabilities, Control, Feature, GuestStatistics, Hinting, HintingCommand,
    HotMemory, HotMemoryId, HotplugMethod, RunState, checked_request, whole_seconds,
};
use plimsoll_types::ByteCount;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

const BALLOON: &str = "/balloon";
const STATISTICS: &str = "/balloon/statistics";
/// Where it tells of memory that can be plugged in.
pub(crate) const HOTPLUG: &str = "/hotplug/memory";
/// The name of its only piece of hot memory.
const HOT_MEMORY: &str = "virtio-mem";
/// Hinting's commands (virtio: `VIRTIO_BALLOON_CMD_ID_STOP` and `_DONE`); larger numbers name runs.
const HINT_STOP: u64 = 0;
const HINT_DONE: u64 = 1;

/// One Firecracker machine.
#[derive(Debug)]
pub struct Firecracker {
    client: Client,
}

#[derive(Deserialize)]
struct InstanceInfo {
    state: String,
}

#[derive(Deserialize)]
struct MachineConfiguration {
    mem_size_mib: u64,
}

#[derive(Deserialize)]
struct BalloonConfiguration {
    amount_mib: u64,
    deflate_on_oom: bool,
    #[serde(default)]
    stats_polling_interval_s: u64,
    #[serde(default)]
    free_page_hinting: bool,
    #[serde(default)]
    free_page_reporting: bool,
}

/// Each of the guest's numbers is read for itself: one that makes no sense is missing, and spoils no other.
#[derive(Deserialize)]
struct BalloonStatistics {
    actual_mib: u64,
    #[serde(default)]
    swap_in: Value,
    #[serde(default)]
    swap_out: Value,
    #[serde(default)]
    major_faults: Value,
    #[serde(default)]
    minor_faults: Value,
    #[serde(default)]
    free_memory: Value,
    #[serde(default)]
    total_memory: Value,
    #[serde(default)]
    available_memory: Value,
    #[serde(default)]
    disk_caches: Value,
    #[serde(default)]
    oom_kill: Value,
}

#[derive(Deserialize)]
struct HintingStatus {
    host_cmd: u64,
    guest_cmd: Option<u64>,
}

/// All fields are optional in the description; a device without a size is no device.
#[derive(Deserialize)]
struct HotplugStatus {
    total_size_mib: Option<u64>,
    block_size_mib: Option<u64>,
    plugged_size_mib: Option<u64>,
    requested_size_mib: Option<u64>,
}

impl Firecracker {
    /// The machine whose API listens at `socket`. Nothing is connected yet.
    pub fn new(socket: impl Into<PathBuf>, patience: Duration) -> Self {
        let socket = socket.into();
        let interface = format!("the Firecracker API at {}", socket.display());
        Self { client: Client::new(socket, interface, patience) }
    }

    /// The VMM's version.
    ///
    /// # Errors
    /// As for every request of [`Control`].
    pub fn version(&mut self) -> Result<String, ControlError> {
        #[derive(Deserialize)]
        struct Version {
            firecracker_version: String,
        }
        Ok(self.get::<Version>("/version")?.firecracker_version)
    }

    fn get<T: serde::de::DeserializeOwned>(&mut self, path: &str) -> Result<T, ControlError> {
        rest::ask(&mut self.client, Request::get(path))
    }

    fn patch(&mut self, path: &str, body: Option<&Value>) -> Result<(), ControlError> {
        rest::tell(&mut self.client, Request { method: Method::Patch, path, body })
    }

    /// `None` for what the machine was not configured with.
    fn get_if_there<T: serde::de::DeserializeOwned>(
        &mut self,
        path: &str,
    ) -> Result<Option<T>, ControlError> {
        rest::ask_if_there(&mut self.client, path)
    }

    fn mib(&self, path: &str, count: u64) -> Result<ByteCount, ControlError> {
        rest::mib(&self.client, path, count)
    }
}

impl Control for Firecracker {
    fn interface(&self) -> &str {
        self.client.interface()
    }

    fn probe(&mut self) -> Result<Capabilities, ControlError> {
        let mut found = Capabilities { features: [Feature::Pause].into(), ..Capabilities::default() };
        if let Some(balloon) = self.get_if_there::<BalloonConfiguration>(BALLOON)? {
            found.balloon = Some(BalloonDevice {
                granularity: ByteCount::mib(1),
                deflate_on_oom: Some(balloon.deflate_on_oom),
            });
            let switches = [
                (balloon.stats_polling_interval_s > 0, Feature::Statistics),
                (balloon.free_page_hinting, Feature::FreePageHinting),
                (balloon.free_page_reporting, Feature::FreePageReporting),
            ];
            found
                .features
                .extend(switches.into_iter().filter(|(is_on, _)| *is_on).map(|(_, feature)| feature));
        }
        found.hot_memory = self.hot_memory()?;
        Ok(found)
    }

    fn run_state(&mut self) -> Result<RunState, ControlError> {
        let info: InstanceInfo = self.get("/")?;
        match &*info.state {
            "Not started" => Ok(RunState::NotStarted),
            "Running" => Ok(RunState::Running),
            "Paused" => Ok(RunState::Paused),
            other => Err(rest::garbage(&self.client, Request::get("/"), "a known state", other.as_bytes())),
        }
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        self.patch("/vm", Some(&json!({ "state": "Paused" })))
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        self.patch("/vm", Some(&json!({ "state": "Resumed" })))
    }

    fn balloon(&mut self) -> Result<Balloon, ControlError> {
        let machine: MachineConfiguration = self.get("/machine-config")?;
        let balloon: BalloonConfiguration = self.get(BALLOON)?;
        let actual = if balloon.stats_polling_interval_s > 0 {
            Some(self.get::<BalloonStatistics>(STATISTICS)?.actual_mib)
        } else {
            None
        };
        Ok(Balloon {
            memory: self.mib("/machine-config", machine.mem_size_mib)?,
            target: Some(self.mib(BALLOON, balloon.amount_mib)?),
            actual: actual.map(|actual| self.mib(STATISTICS, actual)).transpose()?,
        })
    }

    fn set_balloon(&mut self, size: ByteCount) -> Result<(), ControlError> {
        self.patch(BALLOON, Some(&json!({ "amount_mib": size.0 >> 20 })))
    }

    fn statistics(&mut self) -> Result<GuestStatistics, ControlError> {
        let said: BalloonStatistics = self.get(STATISTICS)?;
        let bytes = |value: &Value| value.as_u64().map(ByteCount);
        Ok(GuestStatistics {
            age: None,
            available: bytes(&said.available_memory),
            free: bytes(&said.free_memory),
            total: bytes(&said.total_memory),
            caches: bytes(&said.disk_caches),
            swapped_in: bytes(&said.swap_in),
            swapped_out: bytes(&said.swap_out),
            major_faults: said.major_faults.as_u64(),
            minor_faults: said.minor_faults.as_u64(),
            oom_kills: said.oom_kill.as_u64(),
        })
    }

    fn statistics_interval(&mut self) -> Result<Duration, ControlError> {
        let balloon: BalloonConfiguration = self.get(BALLOON)?;
        Ok(Duration::from_secs(balloon.stats_polling_interval_s))
    }

    fn poll_statistics(&mut self, every: Duration) -> Result<(), ControlError> {
        self.patch(STATISTICS, Some(&json!({ "stats_polling_interval_s": whole_seconds(every) })))
    }

    fn hint(&mut self, command: HintingCommand) -> Result<(), ControlError> {
        match command {
            HintingCommand::Start => {
                self.patch("/balloon/hinting/start", Some(&json!({ "acknowledge_on_stop": true })))
            }
            HintingCommand::Stop => self.patch("/balloon/hinting/stop", None),
        }
    }

    fn hinting(&mut self) -> Result<Hinting, ControlError> {
        let status: HintingStatus = self.get("/balloon/hinting/status")?;
        Ok(match (status.host_cmd, status.guest_cmd) {
            (HINT_STOP, _) => Hinting::Stopped,
            (HINT_DONE, _) | (_, Some(HINT_STOP)) => Hinting::Done,
            _ => Hinting::Running,
        })
    }

    fn hot_memory(&mut self) -> Result<Vec<HotMemory>, ControlError> {
        let Some(status) = self.get_if_there::<HotplugStatus>(HOTPLUG)? else { return Ok(Vec::new()) };
        let size = |count: Option<u64>| count.map(|count| self.mib(HOTPLUG, count)).transpose();
        let (Some(maximum), Some(block)) = (size(status.total_size_mib)?, size(status.block_size_mib)?)
        else {
            return Ok(Vec::new());
        };
        Ok(vec![HotMemory {
            id: HotMemoryId(HOT_MEMORY.to_owned()),
            method: HotplugMethod::VirtioMem,
            block,
            maximum: Some(maximum),
            requested: size(status.requested_size_mib)?.unwrap_or_default(),
            plugged: size(status.plugged_size_mib)?,
        }])
    }

    fn request_hot_memory(&mut self, id: &HotMemoryId, size: ByteCount) -> Result<(), ControlError> {
        let all = self.hot_memory()?;
        checked_request(self, &all, id, size)?;
        self.patch(HOTPLUG, Some(&json!({ "requested_size_mib": size.0 >> 20 })))
    }
}
