//! Machines' own management interfaces behind one trait: what a guest's drivers and its VMM do when asked.
//!
//! A socket or a domain's name enters; capabilities, sizes and statistics leave as values that mean the same for
//! every VMM. What must never happen here:
//!
//! * a request without an end: each has the driver's *patience*, however the other side behaves, and afterwards the
//!   connection is gone rather than half used, so that a late answer cannot be taken for the next one;
//! * a capability that is believed in and not [probed](Control::probe);
//! * an unbounded answer, or a word of a VMM that is acted upon before it was parsed into a type.
//!
//! | driver | speaks | to |
//! |---|---|---|
//! | [`CloudHypervisor`] | REST on a Unix socket (`http`) | Cloud Hypervisor |
//! | [`Firecracker`] | REST on a Unix socket | Firecracker |
//! | [`Qemu`] | QMP, through anything that is [`Qmp`] | QEMU, by a [`QmpSocket`]; through [`Virsh`] also QEMU whose monitor libvirt owns |
//! | [`Libvirt`] | `virsh` | libvirt, where the monitor is refused: balloon, statistics, pause only |
//!
//! A machine whose interface fails is managed without cooperation; [`Cooperation`] says when that begins and ends, once.
mod cloud_hypervisor;
mod cooperation;
mod error;
pub(crate) mod firecracker;
pub(crate) mod http;
mod libvirt;
mod qemu;
mod qmp;
pub(crate) mod rest;
mod socket;
mod values;
mod virsh;

pub use cloud_hypervisor::{CloudHypervisor, Ping};
pub use cooperation::{Change, Cooperation};
pub use error::{ControlError, Fault};
pub use firecracker::Firecracker;
pub use libvirt::Libvirt;
pub use qemu::Qemu;
pub use qmp::{Qmp, QmpEvent};
pub use socket::QmpSocket;
pub use values::{
    Balloon, BalloonDevice, Capabilities, ControlEvent, Feature, GuestStatistics, Hinting, HintingCommand,
    HotMemory, HotMemoryId, HotplugMethod, Migration, RunState,
};
pub use virsh::Virsh;

use plimsoll_types::ByteCount;
use std::time::Duration;

/// One machine's management interface.
///
/// # Errors
/// Every operation fails with a [`ControlError`] within the driver's patience. [`ControlError::Unsupported`] is the answer to
/// what [`probe`](Self::probe) did not find.
pub trait Control: Send {
    /// The interface in words, for messages: `the Firecracker API at /run/fc.sock`.
    fn interface(&self) -> &str;

    /// Asks what the machine can do. Changes nothing.
    fn probe(&mut self) -> Result<Capabilities, ControlError>;

    /// Whether its vCPUs run.
    fn run_state(&mut self) -> Result<RunState, ControlError>;

    /// Stops the vCPUs.
    fn pause(&mut self) -> Result<(), ControlError>;

    /// Lets the vCPUs go on.
    fn resume(&mut self) -> Result<(), ControlError>;

    /// The balloon now.
    fn balloon(&mut self) -> Result<Balloon, ControlError>;

    /// Asks the guest to hold this much in its balloon, rounded down to the balloon's granularity. It may take its time.
    fn set_balloon(&mut self, size: ByteCount) -> Result<(), ControlError>;

    /// What the guest last said of its memory.
    fn statistics(&mut self) -> Result<GuestStatistics, ControlError> {
        Err(self.unsupported("guest statistics"))
    }

    /// How often the guest says it; zero where it does not.
    fn statistics_interval(&mut self) -> Result<Duration, ControlError> {
        Err(self.unsupported("guest statistics"))
    }

    /// Has the guest say it this often, rounded up to whole seconds; zero: no longer.
    fn poll_statistics(&mut self, _every: Duration) -> Result<(), ControlError> {
        Err(self.unsupported("guest statistics"))
    }

    /// Starts or ends a run of free page hinting.
    fn hint(&mut self, _command: HintingCommand) -> Result<(), ControlError> {
        Err(self.unsupported("free page hinting"))
    }

    /// How far the run of free page hinting is.
    fn hinting(&mut self) -> Result<Hinting, ControlError> {
        Err(self.unsupported("free page hinting"))
    }

    /// The hot memory now.
    fn hot_memory(&mut self) -> Result<Vec<HotMemory>, ControlError> {
        Err(self.unsupported("hot memory"))
    }

    /// Asks for this much of a piece of hot memory, a multiple of its block.
    fn request_hot_memory(&mut self, _id: &HotMemoryId, _size: ByteCount) -> Result<(), ControlError> {
        Err(self.unsupported("hot memory"))
    }

    /// Whether the machine is being migrated.
    fn migration(&mut self) -> Result<Migration, ControlError> {
        Err(self.unsupported("migration state"))
    }

    /// What the interface told by itself since the last call.
    fn events(&mut self) -> Result<Vec<ControlEvent>, ControlError> {
        Err(self.unsupported("events"))
    }

    /// The error for something this machine has not.
    fn unsupported(&self, what: &'static str) -> ControlError {
        ControlError::Unsupported { interface: self.interface().to_owned(), what }
    }
}

/// Whole seconds that are not less: the unit in which every interface has its interval.
fn whole_seconds(every: Duration) -> u64 {
    every.as_secs() + u64::from(every.subsec_nanos() > 0)
}

/// Finds a piece of hot memory and checks that `size` is one it can have.
fn checked_request<'a>(
    control: &dyn Control,
    all: &'a [HotMemory],
    id: &HotMemoryId,
    size: ByteCount,
) -> Result<&'a HotMemory, ControlError> {
    let found = all.iter().find(|memory| memory.id == *id);
    let memory = found.ok_or_else(|| control.unsupported("hot memory of that name"))?;
    let minimum = match memory.method {
        HotplugMethod::VirtioMem => ByteCount(0),
        HotplugMethod::Acpi => memory.requested,
    };
    if size < minimum {
        return Err(control.unsupported("way to take memory modules out of a running machine"));
    }
    let maximum = memory.maximum.unwrap_or(ByteCount(u64::MAX));
    let is_whole = memory.block.0 != 0 && size.0.is_multiple_of(memory.block.0);
    if size > maximum || !is_whole {
        return Err(ControlError::OutOfRange {
            what: "hot memory",
            asked: size,
            maximum,
            step: memory.block,
        });
    }
    Ok(memory)
}
