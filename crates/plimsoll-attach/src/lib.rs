//! Running virtual machines, found and understood from outside: no ptrace, no stop, nothing injected.
//!
//! What enters: process ids, names, and what an operator knows about a machine. What leaves: a [`Dossier`] that says
//! where guest RAM is and what may be done with it, or a [`Refusal`] that says what was found and what to do. What must
//! never happen here: anything is changed in a machine, a number of a process is believed after the process has ended,
//! or memory is guessed to be guest RAM.
//!
//! How the parts relate:
//!
//! * [`discover()`] lists the machines of a host by program and arguments; [`find`] picks one.
//! * [`Held`] is a hold on one process; [`inspect()`] looks at it. The table of VMMs (`vmm`) reads its command line,
//!   `ram` matches what that claims against mappings, [`Rungs`] says what is allowed and why not the rest.
//! * [`Follower`] keeps up with a machine: RAM that comes and goes, exec, exit.
//! * [`AttachLock`] keeps two managers from one machine.
//! * [`control`] speaks to a machine's own management interface; [`join`](join()) finds who speaks to a given one.
//! * [`balloon`] decides what to ask of a machine's balloon.
//! * [`physical`] says where guest RAM lies in the guest.
//! * [`qmp`] is a client of QEMU's machine protocol for whoever needs one.
//!
//! A machine with a hazard (locked, huge or encrypted memory, a device with direct access, no swap) is not refused: it is
//! counted and admitted like any other, with the rungs off that would be unsafe or useless.
//!
//! Known holes:
//!
//! * The flags of mappings are known from smaps only, which walks the machine's page tables once per inspection. A
//!   [`Follower`] looks at maps, where flags do not show: memory that is locked later, or registered with a userfaultfd by
//!   a migration, is seen at the next inspection.
//! * Memory that was plugged into a QEMU is found only with its QMP socket: from outside a new mapping has no name. What
//!   was plugged into a Cloud Hypervisor or a Firecracker is found if all that looks like RAM adds up to what command line
//!   and API say the machine may have; zones of a Cloud Hypervisor's are found by their sizes only.
//! * Two blocks of the same size and kind cannot be told apart from outside; both are guest RAM, but their names, and so
//!   their nodes, are taken from the order of addresses. A [`vmm::Note`] says so.
//! * Other process-id namespaces are not looked into: processes of containers are seen under this namespace's numbers.
//! * A VMM may overwrite its command line. None of those known does.

mod argv;
pub mod balloon;
pub mod control;
mod discover;
mod dossier;
mod follow;
mod held;
mod inspect;
mod join;
mod json;
mod lock;
pub mod physical;
pub mod qmp;
mod ram;
mod refusal;
mod rungs;
mod unix;
pub mod vmm;

pub use discover::{Discovery, Sighting, discover, find};
pub use dossier::{Acceleration, Dossier, Identity};
pub use follow::{Change, Follower};
pub use held::Held;
pub use inspect::{Request, inspect};
pub use join::{NoInterface, join};
pub use lock::{AttachLock, lock_folder};
pub use ram::{ParseRangeError, RamBacking, RamError, RamRange, parse_range};
pub use refusal::Refusal;
pub use rungs::{Hazard, Rung, Rungs};
