//! Firecracker's command line and configuration. The machine's size stands in neither, but in its API
//! (`GET /machine-config`) or in the file of `--config-file`.
//!
//! Memory that can be plugged in (virtio-mem) has its place mapped from the start, of which newer versions make accessible
//! only the slots that the guest uses.

use super::{Address, Block, Claim, ControlSocket, Protocol, name_from_socket};
use crate::argv::Options;
use plimsoll_types::ByteCount;
use serde::Deserialize;
use std::path::Path;

/// Where it listens unless told otherwise.
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";
/// The name of its memory.
const RAM: &str = "dram";
/// What it calls itself unless told otherwise.
const DEFAULT_ID: &str = "anonymous-instance";

pub(super) fn claim(options: &Options<'_>) -> Claim {
    let socket = match options.has("no-api") {
        true => None,
        false => Some(options.last(&["api-sock"]).unwrap_or(DEFAULT_SOCKET)),
    };
    let id = options.last(&["id"]).filter(|id| *id != DEFAULT_ID).map(str::to_owned);
    let address =
        |path: &str| ControlSocket { protocol: Protocol::Http, address: Address::Path(path.into()) };
    Claim {
        name: id.or_else(|| socket.and_then(|socket| name_from_socket(Path::new(socket)))),
        sockets: socket.map(address).into_iter().collect(),
        blocks: vec![Block::unsaid(RAM)],
        config: options.last(&["config-file"]).map(Into::into),
        ..Claim::default()
    }
}

/// The part of the configuration that says how large the machine is: the answer to `GET /machine-config`.
#[derive(Deserialize)]
pub(crate) struct MachineConfig {
    mem_size_mib: u64,
}

impl MachineConfig {
    pub(crate) fn size(&self) -> Option<ByteCount> {
        self.mem_size_mib.checked_mul(1 << 20).map(ByteCount)
    }
}

/// Memory that can be plugged in: its configuration, and the answer to `GET /hotplug/memory`.
#[derive(Deserialize)]
pub(crate) struct HotMemory {
    total_size_mib: u64,
    #[serde(default)]
    plugged_size_mib: u64,
}

/// The configuration file.
#[derive(Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(rename = "machine-config")]
    machine: MachineConfig,
    #[serde(rename = "memory-hotplug")]
    hot: Option<HotMemory>,
}

impl ConfigFile {
    pub(crate) fn of(machine: MachineConfig, hot: Option<HotMemory>) -> Self {
        Self { machine, hot }
    }

    /// The machine's RAM. `None` for sizes that cannot be.
    pub(crate) fn block(&self) -> Option<Block> {
        let (block, size) = (Block::unsaid(RAM), self.machine.size()?);
        let Some(hot) = &self.hot else { return Some(Block { size: Some(size), ..block }) };
        let bytes = |mib: u64| mib.checked_mul(1 << 20);
        let (total, plugged) = (bytes(hot.total_size_mib)?, bytes(hot.plugged_size_mib)?);
        let unplugged = ByteCount(total.checked_sub(plugged)?);
        Some(block.growing(ByteCount(size.0.checked_add(plugged)?), unplugged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Claim {
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        claim(&Options::new(&argv))
    }

    #[test]
    fn a_jailed_machine_is_named_by_its_id() {
        let claim = of("firecracker --id=web1 --start-time-us=1 --api-sock /run/api.socket");
        assert_eq!(claim.name.as_deref(), Some("web1"));
        assert_eq!(claim.sockets[0].to_string(), "HTTP at /run/api.socket");
    }

    #[test]
    fn a_machine_without_an_api_has_its_file() {
        let claim = of("firecracker --no-api --config-file vm.json");
        assert!(claim.sockets.is_empty());
        assert_eq!(claim.config.as_deref(), Some(Path::new("vm.json")));
        assert_eq!(of("firecracker --api-sock /tmp/web2.sock").name.as_deref(), Some("web2"));
        let file: ConfigFile =
            serde_json::from_str(r#"{"drives":[],"machine-config":{"vcpu_count":2,"mem_size_mib":1024}}"#)
                .unwrap();
        let block = file.block().unwrap();
        assert_eq!((block.size, block.grows_to), (Some(ByteCount(1 << 30)), None));
    }

    #[test]
    fn memory_that_can_be_plugged_in_grows_the_machine_from_what_is_plugged() {
        let of = |hot: &str| {
            let text = format!(r#"{{"machine-config":{{"mem_size_mib":1024}},"memory-hotplug":{hot}}}"#);
            serde_json::from_str::<ConfigFile>(&text).unwrap().block()
        };
        let bounds =
            |hot| of(hot).map(|block| (block.size.unwrap().0 >> 20, block.grows_to.unwrap().0 >> 20));
        assert_eq!(bounds(r#"{"total_size_mib":2048}"#), Some((1024, 3072)));
        assert_eq!(bounds(r#"{"total_size_mib":2048,"plugged_size_mib":128}"#), Some((1152, 3072)));
        // More than there can be, in the one sense or the other.
        assert_eq!(bounds(r#"{"total_size_mib":64,"plugged_size_mib":128}"#), None);
        assert_eq!(bounds(r#"{"total_size_mib":18446744073709551615}"#), None);
    }
}
