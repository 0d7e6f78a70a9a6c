//! The VMMs that are recognised: a program's path and arguments enter; what they say about the machine leaves as a
//! claim. A claim is what somebody typed, not what is: sizes are checked against mappings, acceleration against open
//! files. The name of a process (comm) is never looked at: anybody can set it.
//!
//! A VMM is one line of the table `KINDS` and one file here.

pub(crate) mod cloud_hypervisor;
mod crosvm;
pub(crate) mod firecracker;
mod plimsoll;
mod qemu;

use crate::argv::Options;
use crate::rungs::Hazard;
use core::fmt;
use plimsoll_sys::procfs::maps::VmFlags;
use plimsoll_types::{ByteCount, Hva};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A kind of VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Vmm {
    /// QEMU, also as started by libvirt or Proxmox.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker, also in its jail.
    Firecracker,
    /// crosvm's main process.
    Crosvm,
    /// A machine born under plimsoll.
    Plimsoll,
}

impl fmt::Display for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "QEMU",
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::Firecracker => "Firecracker",
            Self::Crosvm => "crosvm",
            Self::Plimsoll => "plimsoll",
        })
    }
}

/// What a control socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// QEMU's machine protocol.
    Qmp,
    /// HTTP with JSON, as Cloud Hypervisor and Firecracker do.
    Http,
    /// crosvm's own.
    Crosvm,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qmp => "QMP",
            Self::Http => "HTTP",
            Self::Crosvm => "crosvm control",
        })
    }
}

/// Where a machine listens for commands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ControlSocket {
    /// What it speaks.
    pub protocol: Protocol,
    /// How it is reached.
    pub address: Address,
}

/// How a control socket is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Address {
    /// A Unix socket, its path as the VMM sees it: below its own root and working directory.
    Path(PathBuf),
    /// A descriptor that a manager (libvirt) handed down. Only that manager can be asked.
    Inherited {
        /// Its number in the VMM.
        descriptor: u32,
    },
}

impl fmt::Display for ControlSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Path(path) => write!(f, "{} at {}", self.protocol, path.display()),
            Address::Inherited { descriptor } => {
                write!(f, "{} on descriptor {descriptor}, owned by libvirt", self.protocol)
            }
        }
    }
}

/// What backs a block of guest RAM according to the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// It does not say.
    Unsaid,
    /// Private anonymous memory.
    Anonymous,
    /// A memfd, or other shared memory without a name.
    Memfd,
    /// A file, or a file made in that directory.
    File(PathBuf),
}

/// A block of guest RAM according to the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) name: String,
    /// `None`: it has to be told from the mappings.
    pub(crate) size: Option<ByteCount>,
    /// Memory may have been plugged into it, up to this size, in mappings of their own or joined with others: all that looks
    /// like RAM is its then, if together it is of a size from the one to the other.
    pub(crate) grows_to: Option<ByteCount>,
    /// The host's NUMA node that it is bound to.
    pub(crate) node: Option<u32>,
    pub(crate) backing: Backing,
    pub(crate) origin: Origin,
    /// Where it lies, if the VMM has told.
    pub(crate) at: Option<Hva>,
}

impl Block {
    /// The same with a size, and so much that can be plugged into it.
    pub(crate) fn growing(self, size: ByteCount, pluggable: ByteCount) -> Self {
        let most = ByteCount(size.0.saturating_add(pluggable.0));
        Self { size: Some(size), grows_to: Some(most), ..self }
    }

    /// A block that is there from the start, of a size and a kind that are not said.
    pub(crate) fn unsaid(name: &str) -> Self {
        let (size, grows_to, node, at) = (None, None, None, None);
        Self {
            name: name.to_owned(),
            size,
            grows_to,
            node,
            backing: Backing::Unsaid,
            origin: Origin::Base,
            at,
        }
    }
}

/// How a block came to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It is there from the start to the end.
    Base,
    /// A device (pc-dimm, virtio-mem) brought it and may take it away.
    Device,
}

/// Something worth knowing that turns nothing off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Note {
    /// Other processes map guest RAM.
    #[error(
        "vhost-user back ends share guest RAM: pages leave when the kernel has unmapped them everywhere, which is safe"
    )]
    VhostUser,
    /// Memory may come and go.
    #[error("memory can be plugged in later: only its control socket (--qmp) tells the size of what was")]
    HotPlug,
    /// Blocks of equal size cannot be told apart from outside.
    #[error("blocks {names} have the same size: which is which was taken from the order of their addresses")]
    Interchangeable {
        /// Their names.
        names: String,
    },
    /// Locked memory outside of guest RAM.
    #[error("{locked} of the process are locked in memory, none of it guest RAM")]
    LockedElsewhere {
        /// VmLck.
        locked: ByteCount,
    },
    /// The kernel holds pages for devices.
    #[error("{pinned} are pinned by the kernel (VmPin) and stay")]
    Pinned {
        /// VmPin.
        pinned: ByteCount,
    },
    /// RAM was told from its looks.
    #[error("neither command line nor API gives the size: the mappings that look like guest RAM were taken")]
    ByLooks,
    /// The control socket did not answer; what it would have told is missing.
    #[error("the control socket was not used: {why}")]
    NoAnswer {
        /// Why.
        why: String,
    },
    /// A private mapping of a file on a disk.
    #[error("{path} is mapped private: pages never written are read from it again, written ones go to swap")]
    PrivateFile {
        /// The file.
        path: String,
    },
}

impl Serialize for Note {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What a command line says about a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) name: Option<String>,
    pub(crate) uuid: Option<String>,
    pub(crate) sockets: Vec<ControlSocket>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) hazards: Vec<Hazard>,
    pub(crate) notes: Vec<Note>,
    /// A file with the rest of the configuration, its path as the VMM sees it.
    pub(crate) config: Option<PathBuf>,
}

/// How a VMM lays out guest RAM in its address space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Flags that its private anonymous RAM has and most of its other memory has not.
    pub(crate) mark: VmFlags,
    /// Where it cuts RAM in two when it is larger: the guest physical addresses at which the hole below 4 GiB has begun
    /// in one version or another.
    pub(crate) cuts: &'static [ByteCount],
}

/// A line of the table.
pub(crate) struct Kind {
    pub(crate) vmm: Vmm,
    names: &'static [Name],
    pub(crate) layout: Layout,
    pub(crate) claim: fn(&Options<'_>) -> Claim,
}

enum Name {
    /// This file name.
    Is(&'static str),
    /// This file name, or one that goes on after it like this: `firecracker-v1.9`, not `firecracker-containerd`.
    Versioned(&'static str),
    /// A file name that begins so.
    Begins(&'static str),
}

impl Name {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Is(whole) => name == *whole,
            Self::Begins(start) => name.starts_with(start),
            Self::Versioned(start) => name.strip_prefix(start).is_some_and(|rest| {
                let version = rest
                    .strip_prefix("-v")
                    .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
                rest.is_empty() || rest == "-static" || version
            }),
        }
    }
}

const fn gib(count: u64) -> ByteCount {
    ByteCount(count << 30)
}

const KINDS: [Kind; 5] = [
    Kind {
        vmm: Vmm::Qemu,
        names: &[Name::Begins("qemu-system-"), Name::Is("qemu-kvm"), Name::Is("kvm")],
        // QEMU maps each block once, whatever the size, and marks it MADV_DONTFORK.
        layout: Layout { mark: VmFlags::DONT_FORK, cuts: &[] },
        claim: qemu::claim,
    },
    Kind {
        vmm: Vmm::CloudHypervisor,
        names: &[Name::Versioned("cloud-hypervisor")],
        layout: Layout { mark: VmFlags::NO_RESERVE, cuts: &[gib(3)] },
        claim: cloud_hypervisor::claim,
    },
    Kind {
        vmm: Vmm::Firecracker,
        names: &[Name::Versioned("firecracker")],
        layout: Layout { mark: VmFlags::NO_RESERVE, cuts: &[gib(3), ByteCount::mib(3328)] },
        claim: firecracker::claim,
    },
    Kind {
        vmm: Vmm::Crosvm,
        names: &[Name::Versioned("crosvm")],
        layout: Layout { mark: VmFlags::empty(), cuts: &[ByteCount::mib(3328), gib(3)] },
        claim: crosvm::claim,
    },
    Kind {
        vmm: Vmm::Plimsoll,
        names: &[Name::Is("plimsoll")],
        layout: Layout { mark: VmFlags::UFFD_MISSING, cuts: &[] },
        claim: plimsoll::claim,
    },
];

/// Whether the program may be a VMM, by its file alone: what it was told is dearer to find out.
pub(crate) fn is_named_like_one(program: &Path) -> bool {
    named(program).is_some()
}

fn named(program: &Path) -> Option<&'static Kind> {
    let name = program.file_name()?.to_str()?;
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    KINDS.iter().find(|kind| kind.names.iter().any(|candidate| candidate.matches(name)))
}

/// The kind of VMM that the program is, if it is one. Its path may end in ` (deleted)`: an upgrade replaced the file
/// under the running machine.
pub(crate) fn recognise(program: &Path, argv: &[String]) -> Option<&'static Kind> {
    let kind = named(program)?;
    let runs_a_machine = match kind.vmm {
        // The same programs have other verbs.
        Vmm::Plimsoll => argv.get(1).is_some_and(|verb| verb == "vmm"),
        Vmm::Crosvm => argv.iter().any(|verb| verb == "run"),
        Vmm::Qemu | Vmm::CloudHypervisor | Vmm::Firecracker => true,
    };
    runs_a_machine.then_some(kind)
}

/// A name for a machine that has none but a control socket: the socket's, or its directory's where the socket is named
/// after what it is and not after whose it is.
fn name_from_socket(path: &Path) -> Option<String> {
    const GENERIC: [&str; 7] =
        ["api", "clh-api", "ch", "cloud-hypervisor", "firecracker", "crosvm", "control"];
    let stem = path.file_stem()?.to_str()?;
    if !GENERIC.contains(&stem) {
        return Some(stem.to_owned());
    }
    let directory = path.parent()?.file_name()?.to_str()?;
    (!["run", "tmp", "root"].contains(&directory)).then(|| directory.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(path: &str, argv: &[&str]) -> Option<Vmm> {
        let argv: Vec<String> = argv.iter().map(|&word| word.to_owned()).collect();
        recognise(Path::new(path), &argv).map(|kind| kind.vmm)
    }

    #[test]
    fn programs_are_recognised_by_their_file() {
        for (path, vmm) in [
            ("/usr/bin/qemu-system-x86_64", Vmm::Qemu),
            ("/usr/bin/qemu-system-aarch64 (deleted)", Vmm::Qemu),
            ("/usr/libexec/qemu-kvm", Vmm::Qemu),
            ("/usr/bin/kvm", Vmm::Qemu),
            ("/usr/bin/cloud-hypervisor", Vmm::CloudHypervisor),
            ("/opt/cloud-hypervisor-static", Vmm::CloudHypervisor),
            ("/srv/jailer/firecracker/web1/root/firecracker", Vmm::Firecracker),
            ("/opt/firecracker-v1.9.1-x86_64", Vmm::Firecracker),
        ] {
            assert_eq!(kind(path, &["renamed"]), Some(vmm), "{path}");
        }
    }

    #[test]
    fn programs_with_similar_names_and_other_verbs_are_not() {
        for path in [
            "/usr/bin/qemu-img",
            "/usr/bin/firecracker-containerd",
            "/usr/bin/qemu-kvm-wrapper",
            "/usr/bin/bash",
            "/",
        ] {
            assert_eq!(kind(path, &["qemu-system-x86_64"]), None, "{path}");
        }
        assert_eq!(kind("/bin/plimsoll", &["plimsoll", "vmm"]), Some(Vmm::Plimsoll));
        assert_eq!(kind("/bin/plimsoll", &["plimsoll", "demo"]), None);
        assert_eq!(kind("/bin/crosvm", &["crosvm", "--log-level=info", "run"]), Some(Vmm::Crosvm));
        assert_eq!(kind("/bin/crosvm", &["crosvm", "stop"]), None);
    }

    #[test]
    fn a_socket_named_after_its_kind_lends_its_directorys_name() {
        let name = |path| name_from_socket(Path::new(path));
        assert_eq!(name("/run/web1.sock").as_deref(), Some("web1"));
        assert_eq!(name("/run/vc/vm/5ab/clh-api.sock").as_deref(), Some("5ab"));
        assert_eq!(name("/run/firecracker.socket"), None);
    }
}
