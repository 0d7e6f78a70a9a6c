//! Whether the machine is being migrated or saved, so that nothing is taken from it meanwhile.
//!
//! A migration reads all of guest RAM: what was taken comes back, and what is taken meanwhile has to be read again. So
//! while one runs nothing is taken. QEMU's own word comes over QMP, where the operator gave a socket; without one,
//! migration threads are looked for by their names, which QEMU gives them when started with `debug-threads=on`, as
//! libvirt does. An incoming machine has no such thread: it is told by QMP's run state only.
//!
//! Background snapshots are migrations to QEMU. Others (`savevm`, `snapshot-save`, `loadvm`) hold its main loop from
//! beginning to end, so that its monitor stays silent: a monitor that does not answer means that nothing is taken. Without a
//! socket they are known by who brings pages back: the main thread by the hundred, and no other, because vCPUs stand still. That
//! shows once something was brought back, so that a little may be taken at their beginning; it is read again, and nothing is wrong.
use plimsoll_attach::qmp::{Limits, Qmp, QmpError};
use plimsoll_sys::{ProcessId, procfs};
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

/// Major faults of the main thread between two looks that no guest at work causes. It touches a guest's memory for disk and
/// network: never for more than 20 pages in 200 ms, in a guest of 50 disk reads a second that was kept at 48 of 192 MiB. Saving
/// brought back up to 3917 in 200 ms, and 24 on a busy host.
const READ_OUT: u64 = 64;
/// One fault of others for so many of the main thread's: vCPUs run until the snapshot begins.
const OTHERS_SHARE: u64 = 16;
/// How long that is taken to go on after it was seen: pages that are in RAM are saved without faults.
const READ_OUT_LASTS: Duration = Duration::from_secs(2);

/// What is known of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// None that is known of.
    None,
    /// Its monitor does not answer.
    Unknown,
    /// Nothing is known, but all of it seems to be read while it stands still.
    ReadOut,
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
    /// At the last look.
    faults: Option<Faults>,
    read_out_until: Option<Instant>,
}

/// Major faults so far.
#[derive(Clone, Copy, Debug)]
struct Faults {
    main: u64,
    others: u64,
}

impl Faults {
    /// None of a process with one thread: that is its vCPU.
    fn of(process: ProcessId) -> Option<Self> {
        fs::read_dir(format!("/proc/{}/task", process.get())).ok()?.nth(1)?.ok()?;
        // Those of the main thread are in both: read first, they are not more than there are.
        let main = procfs::major_faults_of_first_thread(process).ok()?;
        let all = procfs::major_faults(process).ok()?;
        Some(Self { main, others: all.saturating_sub(main) })
    }

    /// Whether since then one thread, at rest else, has had page after page brought back while all others had none.
    const fn is_read_out(self, before: Self) -> bool {
        let (main, others) =
            (self.main.saturating_sub(before.main), self.others.saturating_sub(before.others));
        main >= READ_OUT && others <= main / OTHERS_SHARE
    }
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
        Self { process, socket, trouble: None, faults: None, read_out_until: None }
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
        let is_read_out = self.is_read_out(now);
        let known = self.trouble.map_or(Phase::None, |trouble| trouble.phase);
        let phase = match known {
            _ if sends(self.process) => Phase::Running,
            Phase::None if is_read_out => Phase::ReadOut,
            known => known,
        };
        Seen { phase, trouble }
    }

    /// Whether somebody seems to read all of the machine's memory now.
    fn is_read_out(&mut self, now: Instant) -> bool {
        let seen = Faults::of(self.process);
        let before = std::mem::replace(&mut self.faults, seen);
        if seen.zip(before).is_some_and(|(seen, before)| seen.is_read_out(before)) {
            self.read_out_until = Some(now + READ_OUT_LASTS);
        }
        self.read_out_until.is_some_and(|until| now < until)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_out_where_the_main_thread_alone_brings_it_back() {
        let before = Faults { main: 1000, others: 5000 };
        // Windows of 200 ms as they were seen: a snapshot's first, in which vCPUs ran at first, one amidst it, and a guest at work.
        for (main, others, is_read_out) in
            [(3314, 143, true), (733, 0, true), (286, 232, false), (20, 0, false), (0, 900, false)]
        {
            let now = Faults { main: before.main + main, others: before.others + others };
            assert_eq!(now.is_read_out(before), is_read_out, "{main} {others}");
        }
    }
}
