//! The sandbox, in a process of its own: this file is its own test program, because a filter is for the whole process
//! and cannot be taken off again.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails the test")]

mod common;

use common::{accels, config, finite};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_vmm::config::{AccelChoice, Management, Sandbox, VmmConfig};
use plimsoll_vmm::control::{Command as Order, Event, StopMode};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

/// What the child shall do after its machine has ended.
const ENDS: &str = "ends";
const OPENS_A_FILE: &str = "opens-a-file";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, text] = &arguments[..]
        && (role == ENDS || role == OPENS_A_FILE)
    {
        child(role, text);
        return;
    }
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    // The lines of the standard harness: a test that fails panics before its line, and the process fails.
    let mut passed = 0;
    for accel in accels() {
        a_sandboxed_machine_works_as_nobody(accel, Management::Unmanaged);
        println!("test a_sandboxed_machine_works_as_nobody ({accel:?}, unmanaged) ... ok");
        a_sandboxed_machine_works_as_nobody(accel, Management::Managed);
        println!("test a_sandboxed_machine_works_as_nobody ({accel:?}, managed) ... ok");
        a_system_call_that_is_not_listed_kills_the_process(accel);
        println!("test a_system_call_that_is_not_listed_kills_the_process ({accel:?}) ... ok");
        passed += 3;
    }
    println!("test result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
}

/// Becomes the machine; its control socket is the standard input.
fn child(role: &str, text: &str) {
    let config: VmmConfig = serde_json::from_str(text).unwrap();
    let input = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned().unwrap();
    let manager = (config.management == Management::Managed)
        .then(|| OwnedFd::from(std::fs::File::from(inherited_handover())));
    let report = plimsoll_vmm::run(&config, manager.map(Into::into), input).unwrap();
    assert_eq!((report.died, report.summary.wrong_words), (None, 0));
    if role == OPENS_A_FILE {
        let _ = std::fs::read("/proc/self/status");
        println!("a file could be opened");
    }
}

/// The hand-over socket, passed as standard error so that no number has to be agreed on.
fn inherited_handover() -> OwnedFd {
    std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned().unwrap()
}

struct Machine {
    child: Child,
    socket: UnixStream,
}

impl Machine {
    fn start(role: &str, config: &VmmConfig, handover: Option<OwnedFd>) -> Self {
        let (socket, other) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(role).arg(serde_json::to_string(config).unwrap());
        command.stdin(OwnedFd::from(other)).stdout(Stdio::inherit());
        if let Some(handover) = handover {
            command.stderr(handover);
        }
        Self { child: command.spawn().unwrap(), socket }
    }

    fn events(&self) -> impl Iterator<Item = Event> {
        let lines = BufReader::new(self.socket.try_clone().unwrap()).lines();
        lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap())
    }

    fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

fn sandboxed(spec: WorkloadSpec, accel: AccelChoice) -> VmmConfig {
    VmmConfig { sandbox: Sandbox::Nobody, vcpus: 2, ..config(spec, accel) }
}

/// It runs, as nobody and under a filter, and everything that happens in a life happens: bursts and idling, discards,
/// windows, a stop by command, the end.
fn a_sandboxed_machine_works_as_nobody(accel: AccelChoice, management: Management) {
    let spec = WorkloadSpec { operations: 0, discard_every_ops: 100, ..finite(WorkloadKind::Bursts, 0) };
    let config = VmmConfig { management, ..sandboxed(spec, accel) };
    let (sender, handover) = plimsoll_sys::fdpass::seqpacket_pair().unwrap();
    let manager = (management == Management::Managed).then(|| thread::spawn(move || common::zeros(sender)));
    let machine = Machine::start(ENDS, &config, manager.is_some().then_some(handover));
    let mut stopped = false;
    for event in machine.events() {
        let order = match &event {
            Event::Started { pid, .. } => {
                // The machine waits for nothing here, so what is read is its state with the filter on.
                let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
                let field = |name: &str| {
                    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                    line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
                };
                assert_eq!((field("Seccomp:"), field("NoNewPrivs:")), (vec!["2".into()], vec!["1".into()]));
                assert!(!field("Uid:").contains(&"0".to_owned()) && !field("Gid:").contains(&"0".to_owned()));
                assert_eq!(field("CapEff:"), ["0000000000000000"]);
                Order::Window { number: 1 }
            }
            Event::Report(report) if report.discarded_pages > 100 && !stopped => {
                stopped = true;
                Order::Stop { mode: StopMode::Finish }
            }
            _ => continue,
        };
        let line = serde_json::to_string(&order).unwrap();
        (&machine.socket).write_all(format!("{line}\n").as_bytes()).unwrap();
    }
    let status = machine.wait();
    assert!(status.success() && stopped, "{accel:?} {management:?}: {status}");
    if let Some(manager) = manager {
        manager.join().unwrap();
    }
}

fn a_system_call_that_is_not_listed_kills_the_process(accel: AccelChoice) {
    let config = sandboxed(finite(WorkloadKind::Zipf, 100), accel);
    let machine = Machine::start(OPENS_A_FILE, &config, None);
    assert!(machine.events().any(|event| matches!(event, Event::Done(_))));
    // SIGSYS
    assert_eq!(machine.wait().signal(), Some(31));
}
