//! VMMs that do not answer, and who waits for them.
use super::estate::{Estate, wait_until};
use parking_lot::{Condvar, Mutex};
use plimsoll_attach::control::{
    self, BalloonDevice, Capabilities, Control as Interface, ControlError, RunState,
};
use plimsoll_host::backend::balloon::{Balloon, Farewell, Lock, of_interface};
use plimsoll_host::backend::{Backend, Done, Trouble};
use plimsoll_host::control::{Control, Pool};
use plimsoll_policy::Step;
use plimsoll_policy::settings::{Face, MachineSettings, Settings, Shares};
use plimsoll_policy::view::MachineView;
use plimsoll_sys::ProcessId;
use plimsoll_types::{ByteCount, MachineId};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The lock of a machine, as it is in a file.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Option<ByteCount>>>);

impl Lock for Kept {
    fn balloon(&self) -> Option<ByteCount> {
        *self.0.lock()
    }

    fn plugged(&self) -> Option<ByteCount> {
        self.0.lock().map(|_| ByteCount(0))
    }

    fn keep(&self, balloon: ByteCount, _plugged: Option<ByteCount>) -> std::io::Result<()> {
        *self.0.lock() = Some(balloon);
        Ok(())
    }
}

/// What the VMMs behind it have been asked, and whether they answer.
#[derive(Default)]
pub(crate) struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
    /// Machines that were begun to be attached to.
    pub(crate) openings: Mutex<u32>,
    looks: Mutex<u32>,
    given_back: Mutex<u32>,
}

impl Gate {
    pub(crate) fn open(&self) {
        *self.is_open.lock() = true;
        self.opened.notify_all();
    }

    /// Attaches to a machine of a VMM behind the gate.
    pub(crate) fn attach(&self) {
        *self.openings.lock() += 1;
        self.pass();
    }

    fn pass(&self) {
        let mut is_open = self.is_open.lock();
        let due = Instant::now() + Duration::from_secs(60);
        while !*is_open && !self.opened.wait_until(&mut is_open, due).timed_out() {}
    }

    /// The balloon of a VMM behind the gate.
    pub(crate) fn balloon(self: &Arc<Self>) -> Balloon {
        let interface = of_interface(Box::new(OnlyBalloon(Arc::clone(self)))).unwrap().unwrap();
        Balloon::start(interface, ProcessId::own(), Kept::default()).unwrap()
    }
}

/// What is behind a balloon.
trait Behind: Send {
    fn holds(&self) -> ByteCount;
    fn hold(&self, size: ByteCount);
}

/// A guest that does at once what it is asked.
impl Behind for Arc<Mutex<ByteCount>> {
    fn holds(&self) -> ByteCount {
        *self.lock()
    }

    fn hold(&self, size: ByteCount) {
        *self.lock() = size;
    }
}

/// A VMM that takes its time.
impl Behind for Arc<Gate> {
    fn holds(&self) -> ByteCount {
        *self.looks.lock() += 1;
        ByteCount(0)
    }

    fn hold(&self, size: ByteCount) {
        assert_eq!(size, ByteCount(0), "what it had");
        *self.given_back.lock() += 1;
        self.pass();
    }
}

/// A VMM of which nothing is to be had but its balloon.
struct OnlyBalloon<B>(B);

impl<B: Behind> Interface for OnlyBalloon<B> {
    fn interface(&self) -> &str {
        "a VMM with a balloon"
    }

    fn probe(&mut self) -> Result<Capabilities, ControlError> {
        let device = BalloonDevice { granularity: ByteCount(4096), deflate_on_oom: None };
        Ok(Capabilities { balloon: Some(device), ..Capabilities::default() })
    }

    fn run_state(&mut self) -> Result<RunState, ControlError> {
        Err(self.unsupported("its state"))
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        Err(self.unsupported("pausing"))
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        Err(self.unsupported("resuming"))
    }

    fn balloon(&mut self) -> Result<control::Balloon, ControlError> {
        let held = Some(self.0.holds());
        Ok(control::Balloon { memory: ByteCount::mib(64), target: held, actual: held })
    }

    fn set_balloon(&mut self, size: ByteCount) -> Result<(), ControlError> {
        self.0.hold(size);
        Ok(())
    }
}

/// A machine that is a balloon.
struct Inflated(Balloon);

impl Backend for Inflated {
    fn observe(&mut self, id: MachineId, _now: Instant) -> Result<MachineView, Trouble> {
        Ok(MachineView::new(id, ByteCount(0)))
    }

    fn apply(&mut self, steps: &[Step], _now: Instant) -> Vec<Done> {
        steps.iter().map(|_| Done::Begun).collect()
    }

    fn farewell(&self) -> Option<Farewell> {
        Some(self.0.farewell())
    }
}

#[test]
fn a_release_is_answered_when_its_vmm_has_answered_and_nobody_else_waits_for_that() {
    let folder = tempfile::tempdir().unwrap();
    let estate = Estate::start(folder.path(), 1, 1024);
    assert_eq!(estate.send("POST", "/v1/machines", r#"{"machine": "slow"}"#).status, 201);
    wait_until("its balloon was looked at", || *estate.gate.looks.lock() > 0);
    let client = estate.client();
    let release =
        std::thread::spawn(move || client.exchange("DELETE", "/v1/machines/slow", &[], Vec::new()).unwrap());
    wait_until("its balloon is to be given back", || *estate.gate.given_back.lock() > 0);
    for shares in [500, 2000] {
        let text = format!(r#"{{"shares": {shares}}}"#);
        assert_eq!(estate.send("PATCH", "/v1/machines/m1", &text).status, 200);
    }
    assert!(!release.is_finished(), "its VMM has not answered");
    estate.gate.open();
    assert_eq!(release.join().unwrap().status, 204);
}

#[test]
fn a_loop_that_ends_waits_for_all_its_vmms_together() {
    const MACHINES: u32 = 5;
    let gate = Arc::<Gate>::default();
    let budget = ByteCount::mib(1024);
    let now = Instant::now();
    let mut control = Control::new(Settings::new(budget), Pool::of(budget), ByteCount(0), now).unwrap();
    for number in 0..MACHINES {
        let (size, reservation) = (ByteCount::mib(64), ByteCount(0));
        let face = Face::Guarantee { size, reservation, limit: size, shares: Shares::NORMAL };
        let machine = Box::new(Inflated(gate.balloon()));
        control.admit(&number.to_string(), MachineSettings::new(MachineId(0), face), machine).unwrap();
    }
    wait_until("all balloons were looked at", || *gate.looks.lock() >= MACHINES);
    let end = std::thread::spawn(move || drop(control));
    // None has answered, and all have been asked.
    wait_until("all are to give theirs back", || *gate.given_back.lock() == MACHINES);
    assert!(!end.is_finished());
    gate.open();
    end.join().unwrap();
}

#[test]
fn a_balloon_goes_back_to_what_it_held_before_the_first_of_managers_that_were_killed() {
    let (holds, lock) = (Arc::new(Mutex::new(ByteCount::mib(8))), Kept::default());
    let begin = || {
        let interface = of_interface(Box::new(OnlyBalloon(Arc::clone(&holds)))).unwrap().unwrap();
        let balloon = Balloon::start(interface, ProcessId::own(), lock.clone()).unwrap();
        wait_until("it was looked at", || balloon.seen().is_some());
        balloon
    };
    let end = |balloon: Balloon| {
        let farewell = balloon.farewell();
        drop(balloon);
        wait_until("it has ended", || farewell.has_come());
    };
    end(begin());
    assert_eq!(lock.balloon(), Some(ByteCount::mib(8)));
    // As one leaves it that is killed: it does not give up the lock.
    *holds.lock() = ByteCount::mib(40);
    end(begin());
    assert_eq!(*holds.lock(), ByteCount::mib(8));
}
