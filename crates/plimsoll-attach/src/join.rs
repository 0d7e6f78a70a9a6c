//! From a machine that was found to whoever speaks to it: a dossier and what the operator knows enter, a driver leaves, or the
//! reason why there is none. What must never happen: a monitor taken that nobody offered, since it serves one client at a time.
use crate::control::{CloudHypervisor, Control, ControlError, Firecracker, Libvirt, Qemu, QmpSocket, Virsh};
use crate::qmp::Limits;
use crate::vmm::{Address, Protocol, Vmm};
use crate::{Dossier, Held, Request};
use std::path::PathBuf;
use std::time::Duration;

/// How long one request may take: a busy host's libvirt takes some seconds for its first.
const PATIENCE: Duration = Duration::from_secs(10);

/// There is nobody to ask.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoInterface {
    /// Its monitor may be somebody else's.
    #[error(
        "its QMP monitor at {0:?} serves one client at a time: if nobody else uses it, give it with --qmp"
    )]
    MonitorNotOffered(PathBuf),
    /// It was started without a monitor.
    #[error("its QEMU has no QMP socket: start it with -qmp unix:PATH,server=on,wait=off")]
    NoMonitor,
    /// It was started without an API socket.
    #[error("its {0} names no API socket on its command line: give it with --api, or start it with one")]
    NoApi(Vmm),
    /// The operator named a socket that such a machine does not have.
    #[error("{vmm} does not speak {protocol}: leave {option} out")]
    Misplaced {
        /// What the machine is.
        vmm: Vmm,
        /// What was to be spoken.
        protocol: Protocol,
        /// Where that was said.
        option: &'static str,
    },
    /// Nobody here speaks to such a machine.
    #[error("{0} has no interface here that could be asked about the guest's memory")]
    NotSpoken(Vmm),
    /// There is one, and it does not answer.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// The driver of a machine's management interface.
///
/// A QEMU whose monitor libvirt holds is spoken to as libvirt's supported commands do, which leaves its domain untainted; so
/// memory cannot be plugged there.
///
/// # Errors
/// Nothing is connected to unless the operator named it, libvirt owns it, or it serves many clients.
pub fn join(held: &Held, dossier: &Dossier, request: &Request) -> Result<Box<dyn Control>, NoInterface> {
    let vmm = dossier.vmm;
    let misplaced = |protocol, option| NoInterface::Misplaced { vmm, protocol, option };
    match vmm {
        Vmm::Qemu if request.api.is_some() => Err(misplaced(Protocol::Http, "--api")),
        Vmm::Qemu => join_qemu(dossier, request),
        _ if request.qmp.is_some() => Err(misplaced(Protocol::Qmp, "--qmp")),
        Vmm::CloudHypervisor => Ok(Box::new(CloudHypervisor::new(api(held, dossier, request)?, PATIENCE))),
        Vmm::Firecracker => Ok(Box::new(Firecracker::new(api(held, dossier, request)?, PATIENCE))),
        Vmm::Crosvm | Vmm::Plimsoll => Err(NoInterface::NotSpoken(vmm)),
    }
}

fn join_qemu(dossier: &Dossier, request: &Request) -> Result<Box<dyn Control>, NoInterface> {
    if let Some(path) = &request.qmp {
        let limits = Limits { reply: PATIENCE, ..Limits::default() };
        return Ok(Box::new(Qemu::new(QmpSocket::connect(path, limits)?)));
    }
    let is_libvirts =
        dossier.sockets.iter().any(|socket| matches!(socket.address, Address::Inherited { .. }));
    if is_libvirts {
        return Ok(Box::new(Libvirt::new(Virsh::new(&dossier.name, PATIENCE))));
    }
    let monitor = dossier.sockets.iter().find_map(|socket| path(&socket.address));
    Err(monitor.map_or(NoInterface::NoMonitor, NoInterface::MonitorNotOffered))
}

/// The API socket the operator names, or else the machine's own.
fn api(held: &Held, dossier: &Dossier, request: &Request) -> Result<PathBuf, NoInterface> {
    let own = || dossier.sockets.iter().find_map(|socket| path(&socket.address));
    let found = request.api.clone().or_else(|| own().map(|path| held.reach(&path)));
    found.ok_or(NoInterface::NoApi(dossier.vmm))
}

fn path(address: &Address) -> Option<PathBuf> {
    match address {
        Address::Path(path) => Some(path.clone()),
        Address::Inherited { .. } => None,
    }
}
