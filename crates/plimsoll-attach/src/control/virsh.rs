//! `virsh`, run with a deadline: libvirt owns its machines' monitors, and this is the way in that needs no library of its.
//!
//! Enters: a domain and a command. Leaves: what the program printed, or an error in libvirt's words. What must never happen: a
//! `virsh` that outlives its deadline, or output without a bound. A program that takes too long is killed through a
//! descriptor of exactly that process. It prints into files in memory, not pipes: then there is one thing to wait for, its
//! end, and neither a full pipe nor a child of its own that keeps one open can hold us up.
use super::error::{ControlError, quote};
use super::qmp::{Qmp, QmpEvent};
use plimsoll_sys::pidfd::{Liveness, Pidfd, PidfdError, Signal};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Deserialize;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// The most that is read of an answer; the longest we ask for (a device's properties) takes some KiB.
const OUTPUT_MAX: u64 = 1 << 20;

/// One domain of libvirt's, spoken to through its program.
#[derive(Clone, Debug)]
pub struct Virsh {
    program: OsString,
    connection: Option<String>,
    domain: String,
    interface: String,
    patience: Duration,
}

/// What libvirt's program is called.
const PROGRAM: &str = "virsh";

impl Virsh {
    /// Whether there is a `virsh` in `PATH`.
    pub fn is_installed() -> bool {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(PROGRAM).exists())
    }

    /// The domain of that name, id or UUID, by the `virsh` in `PATH` and its default connection.
    pub fn new(domain: impl Into<String>, patience: Duration) -> Self {
        let domain = domain.into();
        let interface = format!("libvirt's domain {}", quote(&domain));
        Self { program: PROGRAM.into(), connection: None, domain, interface, patience }
    }

    /// Uses another program in place of `virsh`.
    #[must_use]
    pub fn with_program(mut self, program: impl Into<OsString>) -> Self {
        self.program = program.into();
        self
    }

    /// Uses another connection, such as `qemu:///session`.
    #[must_use]
    pub fn with_connection(mut self, connection: impl Into<String>) -> Self {
        self.connection = Some(connection.into());
        self
    }

    pub(crate) fn interface(&self) -> &str {
        &self.interface
    }

    /// Runs one of virsh's commands on the domain and returns what it printed.
    pub(crate) fn run(&self, command: &str, arguments: &[&str]) -> Result<String, ControlError> {
        let unreachable =
            |source: io::Error| ControlError::Unreachable { interface: self.interface.clone(), source };
        let (output, errors) = (memory_file().map_err(unreachable)?, memory_file().map_err(unreachable)?);
        let mut virsh = Command::new(&self.program);
        // Its messages are matched, so they must not be translated.
        virsh.env("LC_ALL", "C").stdin(Stdio::null());
        virsh
            .stdout(output.try_clone().map_err(unreachable)?)
            .stderr(errors.try_clone().map_err(unreachable)?);
        if let Some(connection) = &self.connection {
            virsh.args(["--connect", connection]);
        }
        virsh.args([command, "--domain", &self.domain]).args(arguments);
        let mut child = virsh.spawn().map_err(unreachable)?;
        let Some(status) = end_within(&mut child, self.patience).map_err(unreachable)? else {
            let (interface, patience) = (self.interface.clone(), self.patience);
            return Err(ControlError::Stalled { interface, request: format!("virsh {command}"), patience });
        };
        if status.success() {
            return Ok(printed(output).map_err(unreachable)?.trim().to_owned());
        }
        let text = quote(&printed(errors).map_err(unreachable)?);
        if text.contains("failed to connect to the hypervisor") {
            return Err(unreachable(io::Error::other(text)));
        }
        let request = format!("virsh {command}");
        Err(ControlError::Refused { interface: self.interface.clone(), request, text })
    }

    pub(crate) fn garbage(&self, command: &str, expected: &'static str, found: &str) -> ControlError {
        ControlError::Garbage {
            interface: self.interface.clone(),
            request: format!("virsh {command}"),
            expected,
            found: quote(found),
        }
    }
}

fn memory_file() -> io::Result<File> {
    Ok(memfd_create("virsh", MemfdFlags::CLOEXEC)?.into())
}

/// What a program that has ended wrote there.
fn printed(mut file: File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(OUTPUT_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Reaps a child once it has ended; `None` if it had to be killed for that.
fn end_within(child: &mut Child, patience: Duration) -> io::Result<Option<ExitStatus>> {
    let liveness = match Pidfd::from_child(child) {
        Ok(process) => match process.wait_exit(patience) {
            Ok(Liveness::Alive) => process.send_signal(Signal::KILL).map(|()| Liveness::Alive),
            outcome => outcome,
        },
        Err(PidfdError::NoProcess(_)) => Ok(Liveness::Exited),
        Err(error) => Err(error),
    };
    let ended = match liveness {
        Ok(liveness) => liveness == Liveness::Exited,
        Err(error) => {
            // No descriptor, no waiting with a limit. An unreaped child's number is its own, so this hits no other.
            child.kill()?;
            child.wait()?;
            return Err(io::Error::other(error));
        }
    };
    let status = child.wait()?;
    Ok(ended.then_some(status))
}

impl Qmp for Virsh {
    fn interface(&self) -> &str {
        &self.interface
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Answer {
            Return(Value),
            Error { desc: String },
        }
        const COMMAND: &str = "qemu-monitor-command";
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let printed = self.run(COMMAND, &["--cmd", &request.to_string()])?;
        let not_qmp = || self.garbage(COMMAND, "a QMP answer", &printed);
        let mut answer: serde_json::Map<String, Value> =
            serde_json::from_str(&printed).map_err(|_| not_qmp())?;
        // libvirt leaves its own `id` in.
        answer.remove("id");
        match serde_json::from_value(Value::Object(answer)).map_err(|_| not_qmp())? {
            Answer::Return(value) => Ok(value),
            Answer::Error { desc } => {
                let interface = self.interface.clone();
                Err(ControlError::Refused { interface, request: command.to_owned(), text: quote(&desc) })
            }
        }
    }

    fn events(&mut self) -> Result<Vec<QmpEvent>, ControlError> {
        Err(ControlError::Unsupported { interface: self.interface.clone(), what: "events" })
    }
}
