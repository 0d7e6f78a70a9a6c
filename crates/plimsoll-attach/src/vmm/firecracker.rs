//! Firecracker's command line and configuration. The machine's size stands in neither, but in its API
//! (`GET /machine-config`) or in the file of `--config-file`.

use super::{Address, Block, Claim, ControlSocket, Protocol, name_from_socket};
use crate::argv::Options;
use plimsoll_types::ByteCount;
use serde::Deserialize;
use std::path::Path;

/// Where it listens unless told otherwise.
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";
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
        blocks: vec![Block::unsaid("dram")],
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

/// The configuration file.
#[derive(Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(rename = "machine-config")]
    pub(crate) machine: MachineConfig,
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
        assert_eq!(file.machine.size(), Some(ByteCount(1 << 30)));
    }
}
