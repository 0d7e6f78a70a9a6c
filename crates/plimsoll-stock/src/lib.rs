//! Stock Linux guests under QEMU and libvirt, which verify every page and every disk block they read.
//!
//! Enters: options. Leaves: an unmodified Debian kernel with unmodified virtio drivers in an unmodified QEMU, in which one
//! program fills memory, touches it and reads a disk, and knows of each word what it must be. What must never happen: a read in the
//! guest that is not verified, a wait without a deadline, or anything left behind by a guest that is dropped.
//!
//! * [`Guest`] is a machine, started from [`Options`]; [`Console`] is the line to its program, [`Monitor`] to its QEMU.
//! * [`Libvirt`] starts guests as domains instead. [`Disk`] is what both may be given.
//! * [`Kernel`] and [`Initramfs`] are what guests boot. The program in them is `init/`, a workspace of its own.
//!
//! ```no_run
//! use plimsoll_stock::{Command, Disk, Guest, Options};
//! use plimsoll_types::ByteCount;
//! use std::{sync::Arc, time::Duration};
//!
//! let mut options = Options::new(ByteCount::mib(512));
//! options.work = vec![Command::Alloc { pages: 80_000 }, Command::Hot { pages: 2000, per_second: 500 }];
//! options.disk = Some(Arc::new(Disk::create(ByteCount::mib(64), 7)?));
//! let mut guest = Guest::start(options)?;
//!
//! // Take from the outside what the guest has: its process is `guest.pidfd()`, its RAM there is `guest.ram()?`.
//! let minute = Duration::from_secs(60);
//! guest.console().ask(Command::Disk { per_second: 100 }, minute)?;
//! let swept = guest.console().ask(Command::Sweep, minute)?;
//! assert_eq!(swept.get("wrong"), Some(0));
//! let report = guest.console().report(minute)?;
//! println!("{} operations, {} wrong words", report.operations, report.wrong);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Known holes
//!
//! * A guest is one thread over one program. What the kernel keeps for itself is verified only as far as the guest goes on.
//! * A page and its version that turn back in step pass as right; see `plimsoll_guest`.
//! * With a lost connection to libvirt the domain stays until the next [`Libvirt::start`].
mod console;
mod disk;
mod files;
mod guest;
mod initramfs;
mod kernel;
mod libvirt;
mod monitor;
mod options;
mod protocol;
mod qemu;
mod ram;
mod wire;

pub use console::{Console, ConsoleError, Question, Report};
pub use disk::{Disk, DiskError};
pub use guest::{Guest, GuestError};
pub use initramfs::Initramfs;
pub use kernel::{Kernel, KernelError};
pub use libvirt::{Libvirt, LibvirtError};
pub use monitor::{Event, Monitor, MonitorError};
pub use options::{Accel, Backing, Merge, Node, Options};
pub use protocol::{Command, Counts, UnknownCommand, content};
pub use ram::RamError;
pub use wire::WireError;
