//! A machine that is stopped through its monitor. It enters running, and leaves running whatever becomes of the command.
//!
//! QEMU answers `stop` when its block devices have come to rest, which may take minutes, and forgets commands that wait when their client
//! hangs up. So whoever sent `stop` stays connected until the machine runs again, or its process has ended. What must never happen: a
//! machine let go on that somebody else stopped, or one left standing still because an answer was late.
use super::super::said;
use plimsoll_attach::qmp::{Limits, Qmp, QmpError};
use plimsoll_linux::explain;
use plimsoll_sys::pidfd::Pidfd;
use std::time::{Duration, Instant};

/// The longest wait for one answer of a machine that is being stopped, or is: its disks may be behind a network that is away.
const PATIENCE: Duration = Duration::from_secs(600);
/// Between two attempts to let it go on.
const BETWEEN: Duration = Duration::from_secs(1);

/// QEMU's word for a machine that `stop` stopped, and that `cont` lets go on.
const PAUSED: &str = "paused";

/// A monitor, and whether the machine is to go on when it is let go.
pub(super) struct Monitor<'a> {
    pub(super) qmp: Qmp,
    vmm: &'a Pidfd,
    patience: Duration,
    stopped: Option<Instant>,
}

impl<'a> Monitor<'a> {
    /// The monitor of the machine that runs in that process.
    pub(super) fn new(qmp: Qmp, vmm: &'a Pidfd) -> Self {
        Self { qmp, vmm, patience: PATIENCE, stopped: None }
    }

    /// Stops a machine that runs. One that is paused is left so.
    pub(super) fn stop(&mut self) -> Result<(), String> {
        let state = self.qmp.run_state().map_err(said)?;
        match state.status.as_str() {
            "running" => {}
            PAUSED => return Ok(()),
            other => {
                return Err(format!(
                    "the machine is neither running nor paused but {other}: it is not stopped; dump it without --paused"
                ));
            }
        }
        self.qmp.wait_for_replies(self.patience);
        // From here on it is let go on, whatever becomes of the command.
        self.stopped = Some(Instant::now());
        self.qmp.stop().map_err(said)
    }

    /// Lets the machine go on and says how long it stood still.
    pub(super) fn resume(&mut self) -> Result<Option<Duration>, String> {
        self.go_on().map_err(said)
    }

    fn go_on(&mut self) -> Result<Option<Duration>, QmpError> {
        let Some(since) = self.stopped else { return Ok(None) };
        if self.qmp.run_state()?.status == PAUSED {
            self.qmp.resume()?;
        }
        let state = self.qmp.run_state()?;
        if state.status == PAUSED {
            return Err(QmpError::Unexpected {
                command: "cont",
                expected: "a machine that runs",
                found: state.status,
            });
        }
        self.stopped = None;
        if !state.running {
            eprintln!(
                "plimsoll dump: the machine is {}, which `cont` is not for: it is left so",
                state.status
            );
        }
        Ok(Some(since.elapsed()))
    }
}

impl Drop for Monitor<'_> {
    fn drop(&mut self) {
        let mut is_told = false;
        while let Err(error) = self.go_on() {
            if !self.vmm.is_alive().unwrap_or(true) {
                return;
            }
            if !is_told {
                is_told = true;
                let text = format!("{}; trying until it goes on", explain(&error));
                // Elsewhere, as a terminal may hold up whoever writes.
                std::thread::spawn(move || eprintln!("plimsoll dump: the machine may stand still: {text}"));
            }
            std::thread::sleep(BETWEEN.min(self.patience));
            let is_lost = !matches!(
                error,
                QmpError::Stalled { .. } | QmpError::Command { .. } | QmpError::Unexpected { .. }
            );
            if let Some(qmp) =
                is_lost.then(|| Qmp::connect(self.qmp.path(), Limits::default()).ok()).flatten()
            {
                self.qmp = qmp;
                self.qmp.wait_for_replies(self.patience);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::ProcessId;
    use serde_json::{Value, json};
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::{Arc, Mutex};
    use tempfile::TempDir;

    /// A machine that is only a monitor.
    struct Fake {
        folder: TempDir,
        /// Its process: the test's own where no other is put here.
        vmm: Pidfd,
        status: Arc<Mutex<&'static str>>,
        log: Arc<Mutex<Vec<String>>>,
    }

    /// What is out of order.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Trouble {
        None,
        /// `stop` is answered after that time.
        Late(Duration),
        /// It hangs up instead of answering the first `cont`.
        HangsUp,
    }

    impl Fake {
        fn start(status: &'static str, trouble: Trouble) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
            let vmm = Pidfd::open(ProcessId::own()).unwrap();
            let fake = Self { folder, vmm, status: Arc::new(Mutex::new(status)), log: Arc::default() };
            let (status, log) = (Arc::clone(&fake.status), Arc::clone(&fake.log));
            // It ends with the test's process.
            std::thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    // As QEMU does, it forgets commands of a client that has hung up.
                    let _ = serve(&stream, trouble, &status, &log);
                }
            });
            fake
        }

        fn monitor(&self, patience: Duration) -> Monitor<'_> {
            let qmp = Qmp::connect(&self.folder.path().join("qmp"), Limits::default()).unwrap();
            let mut monitor = Monitor::new(qmp, &self.vmm);
            monitor.patience = patience;
            monitor
        }

        fn status(&self) -> &'static str {
            *self.status.lock().unwrap()
        }

        fn count(&self, command: &str) -> usize {
            self.log.lock().unwrap().iter().filter(|other| *other == command).count()
        }
    }

    fn serve(
        mut stream: &UnixStream,
        trouble: Trouble,
        status: &Mutex<&'static str>,
        log: &Mutex<Vec<String>>,
    ) -> std::io::Result<()> {
        writeln!(stream, "{}", json!({ "QMP": {} }))?;
        for line in BufReader::new(stream.try_clone()?).lines() {
            let command: Value = serde_json::from_str(&line?)?;
            let name = command["execute"].as_str().unwrap();
            log.lock().unwrap().push(name.to_owned());
            match (name, trouble) {
                ("stop", Trouble::Late(time)) => {
                    std::thread::sleep(time);
                    *status.lock().unwrap() = "paused";
                }
                ("stop", _) => *status.lock().unwrap() = "paused",
                ("cont", Trouble::HangsUp)
                    if log.lock().unwrap().iter().filter(|name| *name == "cont").count() == 1 =>
                {
                    return Ok(());
                }
                ("cont", _) => *status.lock().unwrap() = "running",
                _ => {}
            }
            let answer = match name {
                "query-status" => {
                    let status = *status.lock().unwrap();
                    json!({ "status": status, "running": status == "running" })
                }
                _ => json!({}),
            };
            writeln!(stream, "{}", json!({ "return": answer, "id": command["id"] }))?;
        }
        Ok(())
    }

    const SHORT: Duration = Duration::from_millis(200);

    #[test]
    fn a_machine_goes_on_although_it_was_stopped_after_the_patience_had_ended() {
        let fake = Fake::start("running", Trouble::Late(6 * SHORT));
        let mut monitor = fake.monitor(SHORT);
        assert!(monitor.stop().is_err_and(|error| error.contains("has not sent the answer to stop")));
        drop(monitor);
        assert_eq!((fake.status(), fake.count("cont")), ("running", 1));
    }

    #[test]
    fn a_machine_goes_on_although_its_monitor_hung_up() {
        let fake = Fake::start("running", Trouble::HangsUp);
        let mut monitor = fake.monitor(PATIENCE);
        monitor.stop().unwrap();
        assert_eq!(fake.status(), "paused");
        drop(monitor);
        assert_eq!((fake.status(), fake.count("cont")), ("running", 2));
    }

    #[test]
    fn the_wait_for_a_machine_ends_with_its_process() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let mut fake = Fake::start("running", Trouble::Late(60 * SHORT));
        fake.vmm = Pidfd::open(ProcessId::new(child.id()).unwrap()).unwrap();
        let mut monitor = fake.monitor(SHORT);
        assert!(monitor.stop().is_err());
        child.kill().unwrap();
        child.wait().unwrap();
        drop(monitor);
        assert_eq!(fake.count("cont"), 0);
    }

    #[test]
    fn only_what_runs_is_stopped_and_only_what_is_paused_goes_on() {
        for status in
            ["inmigrate", "postmigrate", "finish-migrate", "prelaunch", "guest-panicked", "shutdown"]
        {
            let fake = Fake::start(status, Trouble::None);
            let mut monitor = fake.monitor(PATIENCE);
            assert!(monitor.stop().is_err_and(|error| error.contains(status)));
            drop(monitor);
            assert_eq!((fake.count("stop"), fake.count("cont")), (0, 0));
        }
        let paused = Fake::start("paused", Trouble::None);
        let mut monitor = paused.monitor(PATIENCE);
        monitor.stop().unwrap();
        assert_eq!(monitor.resume(), Ok(None));
        drop(monitor);
        assert_eq!((paused.count("stop"), paused.count("cont")), (0, 0));
        // Meanwhile somebody else migrated it away.
        let other = Fake::start("running", Trouble::None);
        let mut monitor = other.monitor(PATIENCE);
        monitor.stop().unwrap();
        *other.status.lock().unwrap() = "postmigrate";
        assert!(monitor.resume().unwrap().is_some());
        drop(monitor);
        assert_eq!((other.count("stop"), other.count("cont")), (1, 0));
    }
}
