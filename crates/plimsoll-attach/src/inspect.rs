//! Looking at one process: a hold on it and what the operator knows enter, a [`Dossier`] or the reason why there is none
//! leaves. The process is neither stopped nor entered, and nothing is sent to it but questions, to sockets it listens on.

use crate::Refusal;
use crate::argv::Options;
use crate::control::firecracker::HOTPLUG;
use crate::control::http::Client;
use crate::control::rest;
use crate::dossier::{Acceleration, Dossier, Identity};
use crate::held::{Held, Program, Snapshot};
use crate::qmp::{Limits, MemoryBackend, Qmp};
use crate::ram::{FileKind, Finder, Located};
use crate::rungs::Hazard;
use crate::vmm::cloud_hypervisor::{DEFAULT_ZONE, backing, is_acpi};
use crate::vmm::firecracker::{ConfigFile, HotMemory, MachineConfig};
use crate::vmm::{self, Address, Backing, Block, Claim, Kind, Note, Origin, Protocol, Vmm};
use plimsoll_linux::cgroup::foreign::{ProcessCgroup, SwapRight};
use plimsoll_sys::process::{CapabilitySet, effective_capabilities};
use plimsoll_sys::procfs::maps::Mapping;
use plimsoll_sys::procfs::program;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::ByteCount;
use rustix::fs::{major, minor, stat, statfs};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `f_type` of tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// How long an API may take to tell a machine's memory.
const API_PATIENCE: Duration = Duration::from_secs(3);
/// How open files look that give a device access to guest RAM by physical address.
const DIRECT_DEVICES: [&str; 6] = [
    "/dev/vfio/",
    "/dev/iommu",
    "/dev/vhost-vdpa",
    "anon_inode:[vfio",
    "anon_inode:vfio",
    "anon_inode:kvm-vfio",
];

/// What the operator knows about a machine, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Where guest RAM is, instead of looking for it.
    pub ranges: Vec<HvaRange>,
    /// A QMP socket of QEMU's. Without it QMP is not used: a monitor has one client at a time, and it may be taken.
    pub qmp: Option<PathBuf>,
    /// The API socket of Firecracker or Cloud Hypervisor, instead of the one that its command line names.
    pub api: Option<PathBuf>,
}

/// Looks at a process.
pub fn inspect(held: &Held, request: &Request) -> Result<Dossier, Refusal> {
    let process = held.process();
    if process == ProcessId::own() {
        return Err(Refusal::Ourselves(process));
    }
    // Before the page tables of something else are walked; and again, since the program may have changed meanwhile.
    recognise(held, &held.program()?)?;
    let snapshot = held.snapshot()?;
    let kind = recognise(held, &snapshot.program)?;
    let mut claim = (kind.claim)(&Options::new(&snapshot.program.argv));
    let run_state = complete(&mut claim, kind, held, request)?;
    if claim.blocks.is_empty() && kind.vmm != Vmm::Plimsoll && request.ranges.is_empty() {
        return Err(Refusal::NoMachine(process));
    }
    let found = locate(&claim, kind, held, &snapshot, request)?;
    let mut dossier = Dossier {
        identity: Identity { process, start: held.start() },
        vmm: kind.vmm,
        name: claim.name.unwrap_or_else(|| fallback_name(kind.vmm, process)),
        uuid: claim.uuid,
        program: snapshot.program.path,
        acceleration: acceleration(&snapshot.files),
        run_state,
        sockets: claim.sockets,
        ram: found.ranges,
        hazards: claim.hazards,
        notes: claim.notes.into_iter().chain(found.notes).collect(),
    };
    dossier.hazards.extend(of_files(&snapshot.files));
    dossier.hazards.extend(of_surroundings(process));
    dossier.notes.extend(of_counters(&dossier, snapshot.locked, snapshot.pinned));
    held.confirm()?;
    Ok(dossier)
}

/// A name for a machine without one.
pub(crate) fn fallback_name(vmm: Vmm, process: ProcessId) -> String {
    format!("{}-{}", vmm.to_string().to_lowercase().replace(' ', "-"), process.get())
}

/// What kind of VMM runs there.
pub(crate) fn recognise(held: &Held, program: &Program) -> Result<&'static Kind, Refusal> {
    let process = held.process();
    let Some(kind) = vmm::recognise(&program.path, &program.argv) else {
        return Err(Refusal::NotVmm { process, program: program.path.clone() });
    };
    held.check_class(program)?;
    match main_of(kind, program, process) {
        Some(main) => Err(Refusal::DeviceProcess { process, main }),
        None => Ok(kind),
    }
}

/// The main process of a crosvm of which this is a device's: the highest ancestor that runs the same.
fn main_of(kind: &Kind, program: &Program, process: ProcessId) -> Option<ProcessId> {
    if kind.vmm != Vmm::Crosvm {
        return None;
    }
    let parent = |process| program::stat(process).ok()?.parent;
    let same = |process: &ProcessId| {
        program::executable(*process).is_ok_and(|path| path == program.path)
            && program::arguments(*process).is_ok_and(|argv| argv.iter().any(|verb| verb == "run"))
    };
    std::iter::successors(parent(process).filter(same), |&process| parent(process).filter(same)).last()
}

/// Completes a claim with what configuration files and control sockets say. Gives the machine's state if it was told.
fn complete(
    claim: &mut Claim,
    kind: &Kind,
    held: &Held,
    request: &Request,
) -> Result<Option<String>, Refusal> {
    match (kind.vmm, &request.qmp) {
        (Vmm::Qemu, Some(path)) => return ask_qemu(claim, held, path).map(Some),
        (Vmm::Firecracker | Vmm::CloudHypervisor, _) => {}
        _ => return Ok(None),
    }
    let is_told = |block: &Block| block.size.is_some() && block.grows_to.is_none();
    if request.api.is_none() && claim.blocks.iter().all(is_told) {
        return Ok(None);
    }
    if let Some(block) = claim.config.as_ref().and_then(|path| configured(&held.reach(path))) {
        claim.blocks = vec![block];
        return Ok(None);
    }
    let own = claim.sockets.iter().find_map(|socket| match (socket.protocol, &socket.address) {
        (Protocol::Http, Address::Path(path)) => Some(held.reach(path)),
        _ => None,
    });
    let Some(socket) = request.api.clone().or(own) else { return Ok(None) };
    match ask_api(claim, kind.vmm, &socket) {
        Ok(state) => Ok(state),
        // Nobody asked for it, and there are other ways.
        Err(error) if request.api.is_none() => {
            claim.notes.push(Note::NoAnswer { why: plimsoll_linux::explain(&error) });
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn configured(path: &Path) -> Option<Block> {
    let text = std::fs::read(path).ok()?;
    serde_json::from_slice::<ConfigFile>(&text).ok()?.block()
}

/// The parts of Cloud Hypervisor's vm.info that matter here.
#[derive(Deserialize)]
struct VmInfo {
    config: VmConfig,
    state: String,
}

#[derive(Deserialize)]
struct VmConfig {
    memory: VmMemory,
}

#[derive(Deserialize)]
struct VmMemory {
    size: u64,
    hotplug_size: Option<u64>,
    hotplug_method: Option<String>,
    #[serde(default)]
    shared: bool,
    zones: Option<Vec<VmZone>>,
}

#[derive(Deserialize)]
struct VmZone {
    id: String,
    size: u64,
    hotplug_size: Option<u64>,
    #[serde(default)]
    shared: bool,
    file: Option<PathBuf>,
    host_numa_node: Option<u32>,
}

/// Asks for the machine's memory over HTTP.
fn ask_api(claim: &mut Claim, vmm: Vmm, socket: &Path) -> Result<Option<String>, Refusal> {
    let interface = format!("the {vmm} API at {}", socket.display());
    let mut client = Client::new(socket.to_owned(), interface, API_PATIENCE);
    if vmm == Vmm::Firecracker {
        let machine: MachineConfig = rest::ask(&mut client, rest::Request::get("/machine-config"))?;
        let hot: Option<HotMemory> = rest::ask_if_there(&mut client, HOTPLUG)?;
        let block = ConfigFile::of(machine, hot).block();
        let absurd = || rest::garbage(&client, rest::Request::get(HOTPLUG), "possible sizes", b"other sizes");
        claim.blocks = vec![block.ok_or_else(absurd)?];
        return Ok(None);
    }
    let info: VmInfo = rest::ask(&mut client, rest::Request::get("/api/v1/vm.info"))?;
    claim.blocks = info.config.memory.blocks();
    Ok(Some(info.state))
}

impl VmMemory {
    /// What was plugged in as modules is in the size; what virtio-mem devices may have is mapped from the start.
    fn blocks(self) -> Vec<Block> {
        let zones = self.zones.into_iter().flatten().flat_map(|zone| {
            let block = Block {
                size: Some(ByteCount(zone.size)),
                node: zone.host_numa_node,
                backing: backing(zone.file, zone.shared),
                ..Block::unsaid(&zone.id)
            };
            block.with_hot(zone.hotplug_size.map(ByteCount))
        });
        let size = ByteCount(self.size);
        let whole = Block { backing: backing(None, self.shared), ..Block::unsaid(DEFAULT_ZONE) };
        let method = self.hotplug_method.as_deref();
        let whole = match self.hotplug_size {
            None => Block { size: Some(size), ..whole },
            Some(_) if is_acpi(method) => whole.growing(size, ByteCount(0)),
            Some(hot) => whole.pluggable(size, ByteCount(hot), method),
        };
        zones.chain([whole]).filter(|block| block.size != Some(ByteCount(0))).collect()
    }
}

/// Asks QEMU: first whether it is the right one, then for what was plugged in, then whether it migrates.
fn ask_qemu(claim: &mut Claim, held: &Held, socket: &Path) -> Result<String, Refusal> {
    let mut qmp = Qmp::connect(socket, Limits::default())?;
    let wrong = |what, expected: String, found: String| Refusal::WrongSocket {
        socket: socket.to_owned(),
        process: held.process(),
        what,
        expected,
        found,
    };
    let shown = |name: &Option<String>| name.as_ref().map_or("none".to_owned(), |name| format!("{name:?}"));
    let name = qmp.name()?;
    if name != claim.name {
        return Err(wrong("name", shown(&claim.name), shown(&name)));
    }
    let base = claim.blocks.iter().filter(|block| block.origin == Origin::Base);
    let expected: ByteCount = base.filter_map(|block| block.size).sum();
    let size = qmp.memory_size()?;
    if size.base != expected {
        return Err(wrong("RAM without memory devices", expected.to_string(), size.base.to_string()));
    }
    claim.blocks.retain(|block| block.origin == Origin::Base);
    let backends = qmp.memory_backends()?;
    for device in qmp.memory_devices()? {
        let named = |backend: &&MemoryBackend| backend.id.as_ref() == Some(&device.backend);
        let backend = backends.iter().find(named);
        claim.blocks.push(Block {
            size: Some(backend.map_or(device.size, |backend| backend.size)),
            node: backend.and_then(|backend| backend.node),
            backing: match backend.and_then(|backend| backend.share) {
                Some(true) => Backing::Memfd,
                _ => Backing::Unsaid,
            },
            origin: Origin::Device,
            ..Block::unsaid(&device.backend)
        });
    }
    // Newer versions tell addresses; a build without HMP tells nothing, and is no worse off than an older one.
    for told in qmp.ram_blocks().unwrap_or_default() {
        let block = claim.blocks.iter_mut().find(|block| block.name == told.name);
        block.into_iter().for_each(|block| block.at = told.hva);
    }
    claim.notes.retain(|note| *note != Note::HotPlug);
    if let Some(migration) = qmp.migration()?.filter(|migration| migration.is_running()) {
        claim.hazards.push(Hazard::Migrating { status: migration.status });
    }
    Ok(qmp.run_state()?.status)
}

fn locate(
    claim: &Claim,
    kind: &Kind,
    held: &Held,
    snapshot: &Snapshot,
    request: &Request,
) -> Result<Located, Refusal> {
    let kind_of = |mapping: &Mapping| file_kind(held, mapping);
    let finder = Finder::new(&snapshot.mappings, kind.layout, &kind_of);
    if request.ranges.is_empty() {
        return Ok(finder.locate(&claim.blocks)?);
    }
    Ok(Located { ranges: finder.verify(&request.ranges)?, notes: Vec::new() })
}

/// Whether a mapped file lies in memory. QEMU removes the files it makes below `mem-path`, so the file's directory
/// stands for it when it is gone; a file that cannot be found at all is taken to lie on a disk.
fn file_kind(held: &Held, mapping: &Mapping) -> FileKind {
    const OF_THE_KERNEL: [&str; 3] = ["/memfd:", "/dev/zero", "/SYSV"];
    if OF_THE_KERNEL.iter().any(|start| mapping.path.starts_with(start)) {
        return FileKind::Memory;
    }
    let path = held.reach(Path::new(mapping.path.trim_end_matches(" (deleted)")));
    let is_there = |path: &Path| {
        let device = stat(path).ok().map(|found| found.st_dev);
        device.is_some_and(|device| {
            (major(device), minor(device)) == (mapping.device.major, mapping.device.minor)
        })
    };
    let place = [Some(path.as_path()), path.parent()].into_iter().flatten().find(|place| is_there(place));
    match place.and_then(|place| statfs(place).ok()) {
        Some(system) if system.f_type == TMPFS_MAGIC => FileKind::Memory,
        _ => FileKind::Disk,
    }
}

fn acceleration(files: &[String]) -> Acceleration {
    match files.iter().any(|file| file.contains("kvm-vm")) {
        true => Acceleration::Kvm,
        false => Acceleration::Emulated,
    }
}

/// What open files turn off.
fn of_files(files: &[String]) -> Vec<Hazard> {
    let is_direct = |file: &&String| DIRECT_DEVICES.iter().any(|start| file.starts_with(start));
    let device = files.iter().find(is_direct).map(|file| Hazard::DirectDevice { file: file.clone() });
    let private = files.iter().find(|file| file.contains("[kvm-gmem]"));
    let private = private.map(|file| Hazard::Confidential { evidence: format!("{file} is open") });
    device.into_iter().chain(private).collect()
}

/// What its cgroup and this process's rights turn off.
fn of_surroundings(process: ProcessId) -> Vec<Hazard> {
    // What cannot be found out forbids nothing: paging then fails harmlessly and is seen to.
    let forbids = |cgroup: &ProcessCgroup| matches!(cgroup.swap_right(), Ok(SwapRight::Forbidden));
    let cgroup = ProcessCgroup::of(process).ok().filter(forbids);
    let cgroup = cgroup.map(|cgroup| Hazard::SwapForbidden { cgroup: cgroup.path().display().to_string() });
    let may_advise = effective_capabilities().is_ok_and(|held| held.contains(CapabilitySet::SYS_NICE));
    let right = (!may_advise).then_some(Hazard::MissingCapability { capability: "CAP_SYS_NICE" });
    cgroup.into_iter().chain(right).collect()
}

fn of_counters(dossier: &Dossier, locked: ByteCount, pinned: ByteCount) -> Vec<Note> {
    let own = dossier.ram.iter().flat_map(|range| &range.hazards);
    // What VFIO pins is counted as locked, too.
    let explains = |hazard: &Hazard| matches!(hazard, Hazard::Locked { .. } | Hazard::DirectDevice { .. });
    let is_explained = own.chain(&dossier.hazards).any(explains);
    let elsewhere = (locked > ByteCount(0) && !is_explained).then_some(Note::LockedElsewhere { locked });
    let pinned = (pinned > ByteCount(0)).then_some(Note::Pinned { pinned });
    let private = dossier.ram.iter().filter_map(|range| match &range.backing {
        crate::ram::RamBacking::PrivateFile { path } => Some(Note::PrivateFile { path: path.clone() }),
        _ => None,
    });
    elsewhere.into_iter().chain(pinned).chain(private).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_without_a_path_are_told_by_their_kind_of_file() {
        for file in ["anon_inode:[vfio-device]", "anon_inode:vfio-device", "anon_inode:kvm-vfio"] {
            let files = ["/dev/kvm", "anon_inode:kvm-vm", file].map(str::to_owned);
            assert_eq!(of_files(&files), [Hazard::DirectDevice { file: file.to_owned() }]);
        }
    }
}
