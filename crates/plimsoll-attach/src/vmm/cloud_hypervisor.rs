//! Cloud Hypervisor's command line. A machine that was made over its API has only `--api-socket` there; its memory is
//! told by `GET /api/v1/vm.info`, or by looks.
//!
//! What can be plugged in over virtio-mem is mapped from the start, as a piece of its own; what is plugged in as modules
//! (`hotplug_method=acpi`, the default) is mapped then. The kernel may join private pieces with their neighbours.

use super::{Address, Backing, Block, Claim, ControlSocket, Note, Origin, Protocol, name_from_socket};
use crate::argv::{Options, Properties};
use crate::rungs::Hazard;
use plimsoll_types::ByteCount;
use std::path::{Path, PathBuf};

const BYTE: ByteCount = ByteCount(1);
/// What it calls the whole when there are no zones.
pub(crate) const DEFAULT_ZONE: &str = "mem0";

pub(super) fn claim(options: &Options<'_>) -> Claim {
    let socket =
        options.properties(&["api-socket"]).find_map(|socket| socket.first_or("path").map(str::to_owned));
    let name = socket.as_deref().and_then(|socket| name_from_socket(Path::new(socket)));
    let address =
        |path: String| ControlSocket { protocol: Protocol::Http, address: Address::Path(path.into()) };
    let platform: Vec<Properties> = options.properties(&["platform"]).collect();
    let protected = ["sev_snp", "tdx"].into_iter().find(|key| platform.iter().any(|one| one.is_on(key)));
    let evidence = protected.map(|key| format!("--platform {key}=on"));
    let mut notes = Vec::new();
    if options.has("fs")
        || options.lists(&["net", "disk"]).any(|device| Properties::new(device).is_on("vhost_user"))
    {
        notes.push(Note::VhostUser);
    }
    Claim {
        name,
        uuid: platform.iter().find_map(|one| one.get("uuid").map(str::to_owned)),
        sockets: socket.map(address).into_iter().collect(),
        blocks: blocks(options),
        hazards: evidence.map(|evidence| Hazard::Confidential { evidence }).into_iter().collect(),
        notes,
        config: None,
    }
}

/// `--memory size=0` goes with `--memory-zone`, which then has all.
fn blocks(options: &Options<'_>) -> Vec<Block> {
    let memory = options.properties(&["memory"]).map(|memory| whole(&memory));
    let zones = options.lists(&["memory-zone"]).map(Properties::new);
    let zones = zones.flat_map(|zone| {
        block(&zone, zone.get("id").unwrap_or("zone")).with_hot(zone.size("hotplug_size", BYTE))
    });
    let blocks: Vec<Block> = memory.chain(zones).filter(|block| block.size != Some(ByteCount(0))).collect();
    if !blocks.is_empty() {
        return blocks;
    }
    vec![Block::unsaid(DEFAULT_ZONE)]
}

/// Memory that is not in zones.
fn whole(properties: &Properties) -> Block {
    let block = block(properties, DEFAULT_ZONE);
    match (block.size, properties.size("hotplug_size", BYTE)) {
        (Some(size), Some(hot)) => block.pluggable(size, hot, properties.get("hotplug_method")),
        _ => block,
    }
}

impl Block {
    /// The same with what can be plugged in: mapped already, or not yet.
    pub(crate) fn pluggable(self, size: ByteCount, hot: ByteCount, method: Option<&str>) -> Self {
        match is_acpi(method) {
            true => self.growing(size, hot),
            false => self.growing(ByteCount(size.0.saturating_add(hot.0)), ByteCount(0)),
        }
    }

    /// A zone, and its virtio-mem device if it has one.
    pub(crate) fn with_hot(self, size: Option<ByteCount>) -> impl Iterator<Item = Self> {
        let hot = size.map(|size| self.hot(size));
        [Some(self), hot].into_iter().flatten()
    }

    /// The virtio-mem device of a zone. It is not in the zone's file.
    fn hot(&self, size: ByteCount) -> Self {
        let backing = match &self.backing {
            Backing::File(_) => Backing::Unsaid,
            backing => backing.clone(),
        };
        let name = format!("{}, virtio-mem", self.name);
        Self { name, size: Some(size), backing, origin: Origin::Device, ..self.clone() }
    }
}

/// Whether memory is plugged in as modules, which is the default.
pub(crate) fn is_acpi(method: Option<&str>) -> bool {
    method.is_none_or(|method| method.eq_ignore_ascii_case("acpi"))
}

/// Private memory is anonymous in newer versions and a private memfd in older ones: unsaid.
pub(crate) fn backing(file: Option<PathBuf>, is_shared: bool) -> Backing {
    match file {
        Some(path) => Backing::File(path),
        None if is_shared => Backing::Memfd,
        None => Backing::Unsaid,
    }
}

fn block(properties: &Properties, name: &str) -> Block {
    let backing = backing(properties.get("file").map(PathBuf::from), properties.is_on("shared"));
    let node = properties.get("host_numa_node").and_then(|node| node.parse().ok());
    Block { size: properties.size("size", BYTE), node, backing, ..Block::unsaid(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Claim {
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        claim(&Options::new(&argv))
    }

    #[test]
    fn memory_and_zones_are_blocks() {
        let claim =
            of("cloud-hypervisor --api-socket path=/run/web1.sock --memory size=512M,shared=on,hugepages=on");
        assert_eq!((claim.name.as_deref(), claim.blocks.len()), (Some("web1"), 1));
        assert_eq!(claim.blocks[0].size, Some(ByteCount::mib(512)));
        assert_eq!(claim.blocks[0].backing, Backing::Memfd);
        let zoned =
            of("ch --memory size=0 --memory-zone id=a,size=1G,host_numa_node=1 id=b,size=64M,file=/dev/shm");
        let names: Vec<&str> = zoned.blocks.iter().map(|block| block.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(zoned.blocks[0].node, Some(1));
        assert_eq!(zoned.blocks[1].backing, Backing::File("/dev/shm".into()));
    }

    #[test]
    fn what_can_be_plugged_in_is_mapped_at_once_or_later() {
        let bounds = |line: &str| {
            let blocks = of(line).blocks;
            let mib = |size: Option<ByteCount>| size.map(|size| size.0 >> 20);
            blocks
                .iter()
                .map(|block| (block.name.clone(), mib(block.size), mib(block.grows_to)))
                .collect::<Vec<_>>()
        };
        let mem0 = |least, most| [("mem0".to_owned(), Some(least), Some(most))];
        assert_eq!(bounds("ch --memory size=512M,hotplug_size=1G"), mem0(512, 1536));
        assert_eq!(
            bounds("ch --memory size=512M,hotplug_size=1G,hotplug_method=virtio-mem"),
            mem0(1536, 1536)
        );
        assert_eq!(
            bounds(
                "ch --memory size=0,hotplug_method=virtio-mem --memory-zone id=a,size=64M,hotplug_size=1G"
            ),
            [("a".to_owned(), Some(64), None), ("a, virtio-mem".to_owned(), Some(1024), None)]
        );
    }

    #[test]
    fn a_machine_made_over_the_api_says_no_size() {
        let claim = of("cloud-hypervisor --api-socket /run/vc/vm/5ab/clh-api.sock");
        assert_eq!((claim.name.as_deref(), claim.blocks[0].size), (Some("5ab"), None));
    }

    #[test]
    fn protection_and_shared_devices_are_noticed() {
        let claim = of(
            "ch --platform sev_snp=on,uuid=1-2 --memory size=1G,hotplug_size=1G --disk path=/x vhost_user=true,socket=/y",
        );
        assert_eq!(claim.hazards, [Hazard::Confidential { evidence: "--platform sev_snp=on".to_owned() }]);
        assert_eq!(claim.notes, [Note::VhostUser]);
        assert_eq!(claim.uuid.as_deref(), Some("1-2"));
    }
}
