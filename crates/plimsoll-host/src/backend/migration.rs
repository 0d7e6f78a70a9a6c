//! Whether the machine is being migrated or saved, so that nothing is taken from it meanwhile.
//!
//! A migration reads all of guest RAM: what was taken comes back, and what is taken meanwhile has to be read again. So
//! while one runs nothing is taken. QEMU's own word comes over QMP, where the operator gave a socket; without one,
//! migration threads are looked for by their names, which QEMU gives them when started with `debug-threads=on`, as
//! libvirt does. An incoming machine has no such thread: it is told by QMP's run state only.
//!
//! Background snapshots are migrations to QEMU. Others (`savevm`, `snapshot-save`, `loadvm`) hold its main loop from
//! beginning to end, so that its monitor stays silent: a monitor that does not answer means that nothing is taken. Without a
//! socket they are not seen; what is taken meanwhile is then read again, and nothing is wrong.
use plimsoll_attach::qmp::{Limits, Qmp, QmpError};
use plimsoll_sys::ProcessId;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How QEMU names its threads that send a machine away, from 2.x to 10.
const THREADS: [&str; 6] =
    ["live_migration", "migration", "mig/src/main", "multifdsend", "mig/src/send", "bg_snapshot"];
/// Before a monitor that did not answer is asked again: it has one client at a time, and it may be somebody else's turn.
const RETRY: Duration = Duration::from_secs(10);
/// The same where nothing is taken until it answers.
const RETRY_SILENT: Duration = Duration::from_secs(1);

/// What is known of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// None that is known of.
    None,
    /// Its monitor does not answer.
    Unknown,
    /// One is under way.
    Running,
    /// The machine runs elsewhere now.
    Completed,
}

/// Watches one machine.
#[derive(Debug)]
pub struct Watch {
    process: ProcessId,
    socket: Option<PathBuf>,
    /// Set while the monitor is of no use.
    trouble: Option<Trouble>,
}

#[derive(Clone, Copy, Debug)]
struct Trouble {
    retry_at: Instant,
    /// What is known meanwhile.
    phase: Phase,
}

/// What a look found, and what went wrong, once.
#[derive(Debug)]
pub struct Seen {
    /// How far it is.
    pub phase: Phase,
    /// Why QMP could not be asked.
    pub trouble: Option<QmpError>,
}

impl Watch {
    /// Watches a process, through that QMP socket if there is one.
    pub const fn new(process: ProcessId, socket: Option<PathBuf>) -> Self {
        Self { process, socket, trouble: None }
    }

    /// True when somebody has to look often: nothing wakes this program when a migration begins.
    pub const fn is_asking(&self) -> bool {
        self.socket.is_some()
    }

    /// Looks.
    pub fn look(&mut self, now: Instant) -> Seen {
        let mut trouble = None;
        match self.ask(now) {
            Ok(Some(phase)) => {
                self.trouble = None;
                return Seen { phase, trouble };
            }
            Ok(None) => {}
            Err(error) => {
                let is_silent = matches!(error, QmpError::Stalled { .. });
                let (wait, phase) =
                    if is_silent { (RETRY_SILENT, Phase::Unknown) } else { (RETRY, Phase::None) };
                // Asking may have taken long.
                let now = Trouble { retry_at: now.max(Instant::now()) + wait, phase };
                // Said once per loss, not with every vain attempt; of a silent one its phase says enough.
                let is_new = self.trouble.replace(now).is_none_or(|before| before.phase != phase);
                trouble = (is_new && !is_silent).then_some(error);
            }
        }
        let known = self.trouble.map_or(Phase::None, |trouble| trouble.phase);
        Seen { phase: if sends(self.process) { Phase::Running } else { known }, trouble }
    }

    /// What QEMU says, if it can be asked now. The monitor is let go each time: whoever looks for plugged memory needs it,
    /// and so may others.
    fn ask(&self, now: Instant) -> Result<Option<Phase>, QmpError> {
        let Some(socket) =
            self.socket.as_ref().filter(|_| self.trouble.is_none_or(|trouble| now >= trouble.retry_at))
        else {
            return Ok(None);
        };
        let mut qmp = Qmp::connect(socket, Limits::default())?;
        let state = qmp.run_state()?;
        let migration = qmp.migration()?;
        Ok(Some(match (state.status.as_str(), migration) {
            ("postmigrate", _) => Phase::Completed,
            ("inmigrate" | "finish-migrate", _) => Phase::Running,
            (_, Some(migration)) if migration.is_running() => Phase::Running,
            _ => Phase::None,
        }))
    }
}

/// True when the process has a thread that sends a machine away.
fn sends(process: ProcessId) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{}/task", process.get())) else { return false };
    threads.flatten().any(|thread| {
        fs::read_to_string(thread.path().join("comm"))
            .is_ok_and(|name| THREADS.iter().any(|known| name.trim_end().starts_with(known)))
    })
}
