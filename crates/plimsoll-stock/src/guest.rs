//! A running guest.
//!
//! Enters: options. Leaves: a machine that has booted and answers, the process that runs it, and where its RAM lies there. What
//! must never happen: a process, a domain or a folder that outlives it.
use crate::console::{Console, ConsoleError};
use crate::files::Files;
use crate::initramfs::Initramfs;
use crate::kernel::{Kernel, KernelError};
use crate::libvirt::{Domain, Libvirt, LibvirtError};
use crate::monitor::{Monitor, MonitorError};
use crate::options::Options;
use crate::protocol::Command;
use crate::qemu::{Birth, PROGRAM, Qemu};
use crate::ram::{self, RamError};
use crate::wire::{Wire, WireError};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A guest could not be started, or moved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// It would have no memory.
    #[error("a guest needs RAM in whole MiB: give each node at least 1M")]
    NoMemory,
    /// No kernel to boot.
    #[error("no kernel to boot")]
    Kernel(#[from] KernelError),
    /// Its files cannot be written.
    #[error("cannot write the guest's files")]
    Files(#[source] io::Error),
    /// QEMU does not start.
    #[error("cannot start {PROGRAM}: run `cargo xtask setup`, or look into what it says")]
    Start(#[source] io::Error),
    /// Only a QEMU of our own has several nodes.
    #[error("{0} nodes of RAM were asked for: a guest of libvirt's has one here")]
    ManyNodes(usize),
    /// libvirt does not start it.
    #[error("libvirt does not start the guest")]
    Libvirt(#[from] LibvirtError),
    /// QEMU started and did not connect.
    #[error("QEMU did not come up; it and the guest's kernel said: {logs}")]
    NotUp {
        /// The ends of their logs.
        logs: String,
        /// Why.
        #[source]
        source: WireError,
    },
    /// The guest started and did not become ready.
    #[error("the guest did not boot; QEMU and its kernel said: {logs}")]
    NotReady {
        /// The ends of their logs.
        logs: String,
        /// Why.
        #[source]
        source: ConsoleError,
    },
    /// QEMU's monitor.
    #[error("QEMU's monitor failed")]
    Monitor(#[from] MonitorError),
    /// A guest of libvirt's has no monitor of ours.
    #[error("this guest is libvirt's, who owns its monitor: use virsh")]
    NoMonitor,
    /// Moving came to an end that was not planned.
    #[error("the migration ended as {0}")]
    NotMigrated(String),
}

/// What runs a guest; dropping it ends the guest.
#[derive(Debug)]
enum Runner {
    Process { monitor: Box<Monitor>, qemu: Qemu },
    Domain { domain: Domain, pidfd: Pidfd },
}

/// A guest that runs. Dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    console: Console,
    // Ends before its files go.
    runner: Runner,
    options: Options,
    files: Files,
}

impl Guest {
    /// Starts a guest under QEMU and waits until it answers.
    ///
    /// Start it from a thread that lives as long as the guest shall: QEMU is killed when that thread ends.
    ///
    /// # Errors
    /// Nothing is left behind. What QEMU and the guest's kernel said is in the error.
    pub fn start(options: Options) -> Result<Self, GuestError> {
        let patience = options.patience;
        let mut guest = Self::start_qemu(options, Birth::Boot)?;
        guest.wait_ready(patience)?;
        Ok(guest)
    }

    /// Starts a QEMU into which a guest with the same options will [move](Self::migrate_to).
    ///
    /// # Errors
    /// Nothing is left behind. What QEMU said is in the error.
    pub fn await_migration(options: Options) -> Result<Self, GuestError> {
        let mut guest = Self::start_qemu(options, Birth::Migration)?;
        let uri = format!("unix:{}", guest.files.incoming().display());
        guest.monitor()?.call("migrate-incoming", &json!({ "uri": uri }))?;
        Ok(guest)
    }

    /// Starts a QEMU that goes on with the guest that was [saved](Self::save_to), and is in a file now, and waits until it has it.
    ///
    /// # Errors
    /// Nothing is left behind. What QEMU said is in the error.
    pub fn restore(options: Options, file: &Path) -> Result<Self, GuestError> {
        let deadline = Instant::now() + options.patience;
        let mut guest = Self::start_qemu(options, Birth::Migration)?;
        let uri = format!("exec:cat {}", file.display());
        guest.monitor()?.call("migrate-incoming", &json!({ "uri": uri }))?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match guest.monitor()?.event(left)? {
                Some(event) if event.name == "RESUME" => return Ok(guest),
                Some(_) => {}
                None => return Err(GuestError::NotMigrated("unfinished in time".to_owned())),
            }
        }
    }

    /// Starts a guest as a domain of libvirt's and waits until it answers.
    ///
    /// # Errors
    /// Nothing is left behind. What libvirt and the guest's kernel said is in the error.
    pub fn start_domain(libvirt: &Libvirt, options: Options) -> Result<Self, GuestError> {
        if options.nodes.len() > 1 {
            return Err(GuestError::ManyNodes(options.nodes.len()));
        }
        let (kernel, files) = prepare(&options, Some(libvirt.user()))?;
        let listener = files.listen(&files.console()).map_err(GuestError::Files)?;
        let deadline = Instant::now() + options.patience;
        let domain = libvirt.create(&options, &files, &kernel.image())?;
        let pidfd = domain.open()?;
        let wire = Wire::accept(&listener, &pidfd, deadline).map_err(|source| not_up(&files, source))?;
        let patience = options.patience;
        let mut guest =
            Self { console: Console::new(wire), runner: Runner::Domain { domain, pidfd }, options, files };
        guest.wait_ready(patience)?;
        Ok(guest)
    }

    fn start_qemu(options: Options, birth: Birth) -> Result<Self, GuestError> {
        let (kernel, files) = prepare(&options, options.user.map(|(user, _)| user.get()))?;
        let listen = |path: &Path| files.listen(path).map_err(GuestError::Files);
        let (console, monitor) = (listen(&files.console())?, listen(&files.monitor())?);
        let deadline = Instant::now() + options.patience;
        let qemu = Qemu::start(&options, birth, &files, &kernel.image()).map_err(GuestError::Start)?;
        let accept = |listener| {
            Wire::accept(listener, qemu.pidfd(), deadline).map_err(|source| not_up(&files, source))
        };
        let console = Console::new(accept(&console)?);
        let monitor = Monitor::new(accept(&monitor)?).map_err(|error| match error {
            MonitorError::Wire { source, .. } => not_up(&files, source),
            error => GuestError::Monitor(error),
        });
        let monitor = Box::new(monitor?);
        Ok(Self { console, runner: Runner::Process { monitor, qemu }, options, files })
    }

    /// Waits until it has booted, and has done what it does from the start: memory is worked on in the order in which that was asked for.
    fn wait_ready(&mut self, patience: Duration) -> Result<(), GuestError> {
        let (files, console) = (&self.files, &mut self.console);
        console
            .wait_ready(patience)
            .and_then(|()| console.ask(Command::Alloc { pages: 0 }, patience))
            .map(|_| ())
            .map_err(|source| GuestError::NotReady { logs: files.logs(), source })
    }

    /// The line to the guest program.
    pub const fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    /// When the guest is libvirt's.
    pub fn monitor(&mut self) -> Result<&mut Monitor, GuestError> {
        match &mut self.runner {
            Runner::Process { monitor, .. } => Ok(monitor),
            Runner::Domain { .. } => Err(GuestError::NoMonitor),
        }
    }

    /// The name libvirt knows it by, if it does.
    pub fn domain(&self) -> Option<&str> {
        match &self.runner {
            Runner::Process { .. } => None,
            Runner::Domain { domain, .. } => Some(domain.name()),
        }
    }

    /// A QMP socket on which QEMU waits for a manager. A guest of libvirt's has none.
    pub fn qmp(&self) -> PathBuf {
        self.files.qmp()
    }

    /// The process whose memory the guest's is.
    pub const fn pidfd(&self) -> &Pidfd {
        match &self.runner {
            Runner::Process { qemu, .. } => qemu.pidfd(),
            Runner::Domain { pidfd, .. } => pidfd,
        }
    }

    /// Its number.
    pub const fn process(&self) -> ProcessId {
        self.pidfd().process()
    }

    /// Where the guest's RAM lies in that process, a range for each node.
    ///
    /// # Errors
    /// When the process is gone or maps something else than was asked for.
    pub fn ram(&self) -> Result<Vec<HvaRange>, RamError> {
        ram::find(self.process(), &self.options.nodes)
    }

    /// What it was made from; another guest like it can be.
    pub const fn options(&self) -> &Options {
        &self.options
    }

    /// The ends of what QEMU and the guest's kernel said.
    pub fn logs(&self) -> String {
        self.files.logs()
    }

    /// Begins to move into the QEMU of `target`, which [awaits](Self::await_migration) it. The guest goes on here until
    /// [`has_migrated`](Self::has_migrated).
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn migrate_to(&mut self, target: &Self) -> Result<(), GuestError> {
        let uri = format!("unix:{}", target.files.incoming().display());
        let monitor = self.monitor()?;
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        monitor.call("migrate-set-capabilities", &events)?;
        // At once and in few passes. QEMU 7.2's translator loses writes of a guest that is migrated for long: at 8 MiB a
        // second the guest's kernel crashed at the target in 3 of 3 runs with nobody else on the host, at this speed in
        // none of 8.
        let fast = json!({ "max-bandwidth": 1_u64 << 30, "downtime-limit": 5000 });
        monitor.call("migrate-set-parameters", &fast)?;
        monitor.call("migrate", &json!({ "uri": uri }))?;
        Ok(())
    }

    /// Begins to save the guest, as it is now, while it goes on: QEMU's background snapshot, which ends as a
    /// [migration](Self::has_migrated) does. What is saved goes to whoever listens at `socket`.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub fn save_to(&mut self, socket: &Path) -> Result<(), GuestError> {
        let monitor = self.monitor()?;
        let on = |capability| json!({ "capability": capability, "state": true });
        let capabilities = json!({ "capabilities": [on("events"), on("background-snapshot")] });
        monitor.call("migrate-set-capabilities", &capabilities)?;
        monitor.call("migrate", &json!({ "uri": format!("unix:{}", socket.display()) }))?;
        Ok(())
    }

    /// Waits at most so long for the migration's end. True: the guest is there and no longer here.
    ///
    /// # Errors
    /// When it failed, or QEMU has ended.
    pub fn has_migrated(&mut self, within: Duration) -> Result<bool, GuestError> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(event) = self.monitor()?.event(left)? else { return Ok(false) };
            if event.name != "MIGRATION" {
                continue;
            }
            match event.data.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(true),
                Some(status @ ("failed" | "cancelled")) => {
                    return Err(GuestError::NotMigrated(status.to_owned()));
                }
                _ => {}
            }
        }
    }
}

/// What every guest needs before its QEMU starts.
fn prepare(options: &Options, user: Option<u32>) -> Result<(Kernel, Files), GuestError> {
    let is_memory = |size: ByteCount| size.0 > 0 && size.is_multiple_of(1 << 20);
    if options.nodes.is_empty() || !options.nodes.iter().all(|node| is_memory(node.size)) {
        return Err(GuestError::NoMemory);
    }
    let kernel = Kernel::find()?;
    let files = Files::create(user).map_err(GuestError::Files)?;
    let initramfs = Initramfs::build(&kernel)?;
    files.write(&files.initramfs(), initramfs.bytes()).map_err(GuestError::Files)?;
    if let Some(disk) = &options.disk {
        files.give(disk.path()).map_err(GuestError::Files)?;
    }
    Ok((kernel, files))
}

fn not_up(files: &Files, source: WireError) -> GuestError {
    GuestError::NotUp { logs: files.logs(), source }
}
