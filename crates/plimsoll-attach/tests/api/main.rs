//! The REST drivers against the VMMs' published descriptions, and against servers that do not keep to them.
mod conformance;
mod description;
mod misbehaviour;
mod server;
mod values;

use plimsoll_attach::control::{CloudHypervisor, Control, Firecracker};
use std::path::PathBuf;
use std::time::Duration;

/// Far more than a local answer takes, for tests in which one comes.
const PATIENCE: Duration = Duration::from_secs(180);

/// Makes a driver for a socket.
type Driver = fn(PathBuf, Duration) -> Box<dyn Control>;
/// The drivers under test.
const DRIVERS: [(&str, Driver); 2] = [
    ("Cloud Hypervisor", |socket, patience| Box::new(CloudHypervisor::new(socket, patience))),
    ("Firecracker", |socket, patience| Box::new(Firecracker::new(socket, patience))),
];
