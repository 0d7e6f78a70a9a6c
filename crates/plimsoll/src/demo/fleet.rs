//! The demo's machines: one child process each, with its two sockets.
//!
//! Enters: configurations. Leaves: running children whose events are collected on a thread each. A fleet that is
//! dropped ends its children and waits for them, so that nothing outlives the demo whatever way it ends.
use parking_lot::Mutex;
use plimsoll_linux::explain;
use plimsoll_sys::fdpass::seqpacket_pair;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process::make_inheritable;
use plimsoll_types::ByteCount;
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::config::Management;
use plimsoll_vmm::control::{Command, Event, MergeRange, Ram, StopMode};
use plimsoll_vmm::report::Summary;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// How much memory is put in place between two lines about it.
const PROGRESS_BYTES: u64 = 64 << 20;

/// What a machine has said about itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct GuestState {
    pub(crate) accel: Option<String>,
    /// Where its memory is in its process, once it runs.
    pub(crate) ram: Vec<Ram>,
    pub(crate) summary: Summary,
    /// Distinct pages touched in each complete window, oldest first.
    pub(crate) windows: Vec<u64>,
    pub(crate) died: Option<String>,
    pub(crate) done: bool,
    /// The control socket has closed: the process is ending.
    pub(crate) closed: bool,
}

/// A machine has done what it was asked about pages that may be merged, or says why not.
#[derive(Debug)]
pub(crate) struct Merging {
    pub(crate) range: MergeRange,
    pub(crate) refused: Option<String>,
}

/// Where a machine meets its manager.
enum Meeting<'a> {
    /// On a socket that it inherits.
    Inherited(OwnedFd),
    /// At a daemon's socket.
    Daemon(&'a Path),
}

pub(crate) struct Guest {
    pub(crate) name: String,
    pub(crate) size: ByteCount,
    control: UnixStream,
    state: Arc<Mutex<GuestState>>,
    merging: Option<Receiver<Merging>>,
    reader: Option<JoinHandle<()>>,
    child: Child,
}

impl Guest {
    /// Starts a machine. A managed one also gives the manager's end of its hand-over socket.
    pub(crate) fn spawn(config: &VmmConfig) -> Result<(Self, Option<OwnedFd>), String> {
        let handover =
            match config.management {
                Management::Managed => {
                    let pair = seqpacket_pair();
                    Some(pair.map_err(|error| {
                        format!("{} could not be started: {}", config.name, explain(&error))
                    })?)
                }
                Management::Unmanaged => None,
            };
        let (ours, theirs) = handover.unzip();
        Ok((Self::start(config, theirs.map(Meeting::Inherited))?, ours))
    }

    /// Starts a machine that hands itself over to the daemon listening there.
    pub(crate) fn spawn_under(config: &VmmConfig, daemon: &Path) -> Result<Self, String> {
        Self::start(config, Some(Meeting::Daemon(daemon)))
    }

    fn start(config: &VmmConfig, meeting: Option<Meeting<'_>>) -> Result<Self, String> {
        let failed = |error: &dyn std::error::Error| {
            format!("{} could not be started: {}", config.name, explain(error))
        };
        let executable = std::env::current_exe().map_err(|error| failed(&error))?;
        let (control, child_control) = UnixStream::pair().map_err(|error| failed(&error))?;
        let mut command = std::process::Command::new(executable);
        make_inheritable(&child_control).map_err(|error| failed(&error))?;
        command.arg("vmm").arg("--control-fd").arg(child_control.as_raw_fd().to_string());
        match &meeting {
            Some(Meeting::Inherited(socket)) => {
                make_inheritable(socket).map_err(|error| failed(&error))?;
                command.arg("--handover-fd").arg(socket.as_raw_fd().to_string());
            }
            Some(Meeting::Daemon(path)) => drop(command.arg("--daemon").arg(path)),
            None => {}
        }
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| failed(&error))?;
        let text = serde_json::to_vec(config).map_err(|error| failed(&error))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A child that ended already shows as a hand-over that never comes, with its own words on stderr.
            let _ = stdin.write_all(&text);
        }
        let state = Arc::new(Mutex::new(GuestState::default()));
        let name = config.name.clone();
        let (events, kept) = (control.try_clone().map_err(|error| failed(&error))?, Arc::clone(&state));
        let (answers, merging) = channel();
        let reader = std::thread::Builder::new()
            .name(format!("events-{}", config.name))
            .spawn(move || collect(&name, events, &kept, &answers))
            .map_err(|error| failed(&error))?;
        Ok(Self {
            name: config.name.clone(),
            size: ByteCount(config.ram_bytes),
            control,
            state,
            merging: Some(merging),
            reader: Some(reader),
            child,
        })
    }

    pub(crate) fn state(&self) -> GuestState {
        self.state.lock().clone()
    }

    pub(crate) fn pidfd(&mut self) -> Result<Pidfd, String> {
        Pidfd::from_child(&mut self.child).map_err(|error| explain(&error))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells the machine something. One that is gone shows in its state.
    pub(crate) fn tell(&self, command: &Command) {
        let _ = send(&self.control, command);
    }

    /// A second hold on the line to the machine, and what it answers about merging; once.
    pub(crate) fn merging(&mut self) -> Result<(UnixStream, Receiver<Merging>), String> {
        let failed = |error: std::io::Error| format!("{}: {}", self.name, explain(&error));
        let control = self.control.try_clone().map_err(failed)?;
        self.merging
            .take()
            .map(|answers| (control, answers))
            .ok_or_else(|| format!("{} is asked by another", self.name))
    }

    /// How the process ended, if it ended without having been told to.
    pub(crate) fn untimely_end(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        Some(format!("its process ended with {status}"))
    }

    /// What the process has left to say, once it has ended.
    pub(crate) fn last_words(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut text = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            let _ = stderr.read_to_string(&mut text);
        }
        text.trim().to_owned()
    }

    /// Waits for the process after it was told to stop; ends it when it does not.
    pub(crate) fn reap(&mut self, patience: std::time::Duration) -> Result<(), String> {
        if let Ok(pidfd) = self.pidfd() {
            let _ = pidfd.wait_exit(patience);
        }
        match self.child.try_wait() {
            Ok(Some(status)) if status.success() => Ok(()),
            Ok(Some(status)) => {
                let words = self.last_words();
                Err(format!("{} ended with {status}: {words}", self.name))
            }
            _ => {
                let words = self.last_words();
                Err(format!("{} did not end when told to and was killed. {words}", self.name))
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Sends a machine a command.
pub(crate) fn send(mut control: &UnixStream, command: &Command) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(command)?;
    line.push(b'\n');
    control.write_all(&line)
}

fn collect(name: &str, events: UnixStream, state: &Mutex<GuestState>, merging: &Sender<Merging>) {
    for line in BufReader::new(events).lines() {
        let Ok(line) = line else { break };
        let Ok(event) = serde_json::from_str::<Event>(&line) else { continue };
        let mut state = state.lock();
        match event {
            Event::Prefault { done_bytes, total_bytes } => {
                // A machine whose memory is being put in place has not been handed over: there is no view of it yet.
                let (done, total) = (ByteCount(done_bytes), ByteCount(total_bytes));
                if done_bytes.is_multiple_of(PROGRESS_BYTES) || done == total {
                    eprintln!("{name}: {done} of {total} in place");
                }
            }
            Event::Started { accel, ram, .. } => {
                state.accel = Some(accel.to_string());
                state.ram = ram;
            }
            Event::Report(summary) => state.take(summary),
            Event::Done(summary) => {
                state.take(summary);
                state.done = true;
            }
            Event::Died { vcpu, reason } => state.died = Some(format!("vCPU {vcpu}: {reason}")),
            Event::ManagerLost => state.died = Some("its manager is gone".to_owned()),
            // Only a manager that ends gives machines back, and a run's is there to its end.
            Event::GivenBack => state.died = Some("its manager has given it back".to_owned()),
            Event::Error { message } => state.died = Some(message),
            // Nobody waits for it where nothing is shared.
            Event::Merging { range, refused } => drop(merging.send(Merging { range, refused })),
            // Nobody here asks a guest to probe.
            Event::Probed(_)
            | Event::Ballooned { .. }
            | Event::Frames { .. }
            | Event::Registers { .. }
            | Event::Held
            | Event::Released => {}
        }
    }
    state.lock().closed = true;
}

impl GuestState {
    fn take(&mut self, summary: Summary) {
        let newest = summary.window.map(|window| window.number);
        let known = self.summary.window.map(|window| window.number);
        if let (Some(window), true) = (summary.window, newest != known) {
            self.windows.push(window.pages);
        }
        self.summary = summary;
    }
}

/// Asks all machines to end; with `finish` they check every page once more before they do.
pub(crate) fn stop<'a>(guests: impl IntoIterator<Item = &'a Guest>, mode: StopMode) {
    guests.into_iter().for_each(|guest| guest.tell(&Command::Stop { mode }));
}
