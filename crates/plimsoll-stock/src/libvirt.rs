//! Guests as domains of libvirt's, on hosts with and without an init system.
//!
//! Enters: options. Leaves: domains that are destroyed when they are dropped. libvirt's daemons are used where they run, and
//! started and ended here where they do not. What must never happen: a daemon ended that somebody else started, or a
//! domain touched that is not ours.
//!
//! There is one libvirt a host. Whoever holds a [`Libvirt`] holds a lock, so that nobody ends the daemons that another one has
//! just found running. Domains are named `plimsoll-PID-N`, after the process that made them: what a killed one left is
//! destroyed by the next.
use crate::files::Files;
use crate::options::{Accel, Backing, Merge, Options};
use crate::qemu::hold;
use plimsoll_sys::ProcessId;
use plimsoll_sys::pidfd::{Liveness, Pidfd, PidfdError, Signal};
use plimsoll_sys::process::end_with_parent;
use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const LOCK: &str = "/run/lock/plimsoll-libvirt";
/// Whose processes libvirt's QEMUs are (`user` in Debian's /etc/libvirt/qemu.conf).
const USER: &str = "libvirt-qemu";
const PID_FILES: &str = "/run/libvirt/qemu";
const KVM: &str = "/dev/kvm";
const PREFIX: &str = "plimsoll-";
/// In the order in which they are started: the second speaks to the first.
const DAEMONS: [(&str, &str); 2] =
    [("virtlogd", "/run/libvirt/virtlogd-sock"), ("libvirtd", "/run/libvirt/libvirt-sock")];

/// How long to wait for another user of libvirt: several tests of a loaded machine.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);
/// How long a daemon may take to listen, or to end.
const DAEMON_PATIENCE: Duration = Duration::from_secs(60);
/// How long libvirt may take over a command; it probes QEMU for some seconds before the first.
const VIRSH_SECONDS: u32 = 120;
/// What `timeout` ends with when it had to end its command.
const TIMED_OUT: i32 = 124;
const LOOK_EVERY: Duration = Duration::from_millis(20);

static NEXT_DOMAIN: AtomicU32 = AtomicU32::new(0);

/// libvirt cannot be used, or will not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LibvirtError {
    /// It is not installed.
    #[error("the user {USER} is unknown: install libvirt-daemon-system, or run `cargo xtask setup` as root")]
    NotInstalled,
    /// Somebody else uses it.
    #[error("{LOCK} is still locked: another user of libvirt on this host did not finish")]
    InUse,
    /// A daemon does not come up.
    #[error("{daemon} does not listen at {socket}; it said: {log}")]
    NotUp {
        /// Which.
        daemon: &'static str,
        /// Where it should.
        socket: &'static str,
        /// The end of its log.
        log: String,
    },
    /// libvirt refuses.
    #[error("virsh {command} failed: {why}")]
    Refused {
        /// The command.
        command: String,
        /// What it said.
        why: String,
    },
    /// The number of a domain's process is not to be found.
    #[error("{path:?} does not hold a process id")]
    NoProcessId {
        /// libvirt's file.
        path: PathBuf,
    },
    /// A domain's process cannot be opened.
    #[error("cannot open the domain's process")]
    Open(#[from] PidfdError),
    /// Something else.
    #[error("cannot {action}")]
    Other {
        /// What was tried.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> LibvirtError {
    let action = action.into();
    |source| LibvirtError::Other { action, source }
}

/// libvirt, running. Dropping it ends the daemons that were started for it; drop its guests first.
#[derive(Debug)]
pub struct Libvirt {
    user: u32,
    // Ended in reverse order, then the lock is given back.
    daemons: Vec<Daemon>,
    _kvm: Option<OpenedKvm>,
    lock: File,
}

#[derive(Debug)]
struct Daemon {
    child: Child,
    pidfd: Pidfd,
    log: TempDir,
}

impl Libvirt {
    /// Makes sure that libvirt runs. Waits for whoever else uses it through this library.
    ///
    /// Start it from a thread that lives as long as it shall: its daemons end with that thread.
    ///
    /// # Errors
    /// When it is not installed or a daemon does not start. Nothing is left running.
    pub fn start() -> Result<Self, LibvirtError> {
        let user = id("/etc/passwd", USER).ok_or(LibvirtError::NotInstalled)?;
        let lock = lock()?;
        let kvm = OpenedKvm::open().map_err(failed(format!("change who may use {KVM}")))?;
        let mut libvirt = Self { user, daemons: Vec::new(), _kvm: kvm, lock };
        for (program, socket) in DAEMONS {
            if UnixStream::connect(socket).is_err() {
                libvirt.daemons.push(Daemon::start(program, socket, &libvirt.lock)?);
            }
        }
        libvirt.sweep()?;
        Ok(libvirt)
    }

    /// The user whose processes its QEMUs are.
    pub const fn user(&self) -> u32 {
        self.user
    }

    /// Whether the daemons were started for this, rather than found running.
    pub const fn is_own(&self) -> bool {
        !self.daemons.is_empty()
    }

    /// Defines and starts a domain.
    pub(crate) fn create(
        &self,
        options: &Options,
        files: &Files,
        kernel: &Path,
    ) -> Result<Domain, LibvirtError> {
        let number = NEXT_DOMAIN.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let description = describe(&name, options, files, kernel);
        files
            .write(&files.domain(), description.as_bytes())
            .map_err(failed("write a domain's description"))?;
        virsh(&["create", &files.domain().display().to_string()])?;
        Ok(Domain { name })
    }

    /// Destroys what killed processes have left.
    fn sweep(&self) -> Result<(), LibvirtError> {
        for name in virsh(&["list", "--name"])?.lines() {
            let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-'));
            let is_stale = maker
                .is_some_and(|(pid, _)| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists());
            if is_stale {
                virsh(&["destroy", name])?;
            }
        }
        Ok(())
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        while let Some(daemon) = self.daemons.pop() {
            drop(daemon);
        }
    }
}

/// /dev/kvm as Debian's rules for devices (udev's) have it, on a host that has no such rules: open to the group kvm.
///
/// libvirt 9.0 lets QEMU try KVM with more rights than its domains have. Where only root may open the device the two disagree, and
/// libvirt takes that for news at each look: it asks QEMU anew what it can do, for 4 s, tens of times for one domain.
#[derive(Debug)]
struct OpenedKvm {
    owner: u32,
    group: u32,
    mode: u32,
}

impl OpenedKvm {
    fn open() -> io::Result<Option<Self>> {
        let Ok(found) = fs::metadata(KVM) else { return Ok(None) };
        let (Some(group), 0) = (id("/etc/group", "kvm"), found.mode() & 0o066) else { return Ok(None) };
        chown(KVM, None, Some(group))?;
        let opened = Self { owner: found.uid(), group: found.gid(), mode: found.mode() & 0o7777 };
        fs::set_permissions(KVM, Permissions::from_mode(0o660))?;
        Ok(Some(opened))
    }
}

impl Drop for OpenedKvm {
    fn drop(&mut self) {
        // The device may be gone; then there is nothing to put back.
        let _ = fs::set_permissions(KVM, Permissions::from_mode(self.mode));
        let _ = chown(KVM, Some(self.owner), Some(self.group));
    }
}

fn lock() -> Result<File, LibvirtError> {
    let file = File::create(LOCK).map_err(failed(format!("open {LOCK}")))?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => return Err(LibvirtError::InUse),
            Err(TryLockError::WouldBlock) => thread::sleep(LOOK_EVERY),
            Err(TryLockError::Error(error)) => return Err(failed(format!("lock {LOCK}"))(error)),
        }
    }
}

/// The number of a user or a group, from `name:x:number:...` lines.
fn id(file: &str, name: &str) -> Option<u32> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split(':').nth(2)?.parse().ok()
}

impl Daemon {
    /// Starts a daemon in the foreground, as a child, and waits until it listens.
    ///
    /// The lock is its standard input, an empty file. So a daemon that outlives us for a moment, because we were killed, keeps
    /// the lock for that moment, and nobody takes it for one that will go on running.
    fn start(program: &'static str, socket: &'static str, lock: &File) -> Result<Self, LibvirtError> {
        let lock = lock.try_clone().map_err(failed("share the lock"))?;
        let log = tempfile::Builder::new().prefix("plimsoll-libvirt-").tempdir();
        let log = log.map_err(failed("make a folder for logs"))?;
        let file = File::create(log.path().join("log")).map_err(failed("make a log"))?;
        let mut command = Command::new(program);
        command.stdin(lock).stdout(file.try_clone().map_err(failed("share a log"))?).stderr(file);
        end_with_parent(&mut command, Signal::TERM);
        let mut child = command.spawn().map_err(failed(format!("start {program}")))?;
        let pidfd = hold(&child).inspect_err(|_| drop(child.kill().and_then(|()| child.wait())));
        let pidfd = pidfd.map_err(failed(format!("hold {program}")))?;
        let daemon = Self { child, pidfd, log };
        let deadline = Instant::now() + DAEMON_PATIENCE;
        while UnixStream::connect(socket).is_err() {
            let has_ended = daemon.pidfd.wait_exit(LOOK_EVERY)? == Liveness::Exited;
            if has_ended || Instant::now() > deadline {
                let log = fs::read(daemon.log.path().join("log")).unwrap_or_default();
                let log = String::from_utf8_lossy(&log).trim().to_owned();
                return Err(LibvirtError::NotUp { daemon: program, socket, log });
            }
        }
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Gently, so that it takes its sockets and pid files along.
        let _ = self.pidfd.send_signal(Signal::TERM);
        if !matches!(self.pidfd.wait_exit(DAEMON_PATIENCE), Ok(Liveness::Exited)) {
            let _ = self.pidfd.send_signal(Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Runs a command of libvirt's and returns what it prints.
fn virsh(arguments: &[&str]) -> Result<String, LibvirtError> {
    // A daemon that hangs must not hang us: coreutils' timeout ends the wait, and says so by its status.
    let mut command = Command::new("timeout");
    command.arg(VIRSH_SECONDS.to_string()).args(["virsh", "--quiet", "--connect", "qemu:///system"]);
    let output = command.args(arguments).stdin(Stdio::null()).output().map_err(failed("start virsh"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let why = match output.status.code() {
        Some(TIMED_OUT) => format!("no answer within {VIRSH_SECONDS} s"),
        _ => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    };
    Err(LibvirtError::Refused { command: arguments.join(" "), why })
}

/// A domain that runs. Dropping it destroys it.
#[derive(Debug)]
pub(crate) struct Domain {
    name: String,
}

impl Domain {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A hold on the process that runs it.
    pub(crate) fn open(&self) -> Result<Pidfd, LibvirtError> {
        let path = Path::new(PID_FILES).join(format!("{}.pid", self.name));
        let text = fs::read_to_string(&path).map_err(failed(format!("read {}", path.display())))?;
        let process = text.trim().parse().ok().and_then(ProcessId::new);
        Ok(Pidfd::open(process.ok_or(LibvirtError::NoProcessId { path })?)?)
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // It may have ended by itself. What stays is swept by the next start.
        let _ = virsh(&["destroy", &self.name]);
    }
}

/// libvirt's description of a guest.
fn describe(name: &str, options: &Options, files: &Files, kernel: &Path) -> String {
    let path = |path: &Path| text(&path.display().to_string());
    let is_memfd = options.nodes.iter().any(|node| node.backing == Backing::Memfd);
    let memfd = if is_memfd { "<source type='memfd'/><access mode='shared'/>" } else { "" };
    let merge = if options.merge == Merge::Off { "<nosharepages/>" } else { "" };
    let disk = options.disk.as_ref().map_or_else(String::new, |disk| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none' io='native'/>\
             <source file='{}'/><target dev='vda' bus='virtio'/></disk>",
            path(disk.path())
        )
    });
    let kind = match options.accel {
        Accel::Tcg => "qemu",
        Accel::Kvm => "kvm",
    };
    format!(
        "<domain type='{kind}'>\n\
         <name>{name}</name><memory unit='b'>{memory}</memory><vcpu>{cpus}</vcpu>\n\
         <memoryBacking>{memfd}{merge}</memoryBacking>\n\
         <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel>\
         <initrd>{initramfs}</initrd><cmdline>{command_line}</cmdline></os>\n\
         <features><acpi/></features><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>\n\
         <devices>{disk}\n\
         <serial type='file'><source path='{log}'/><target port='0'/></serial>\n\
         <serial type='unix'><source mode='connect' path='{console}'/><target port='1'/></serial>\n\
         <controller type='usb' model='none'/><memballoon model='virtio'/></devices>\n\
         <seclabel type='none'/>\n\
         </domain>\n",
        memory = options.memory().0,
        cpus = options.cpus,
        kernel = path(kernel),
        initramfs = path(&files.initramfs()),
        command_line = text(&options.command_line()),
        log = path(&files.kernel_log()),
        console = path(&files.console()),
    )
}

/// Text inside XML.
fn text(raw: &str) -> String {
    raw.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}
