//! A machine with a balloon, whose VMM's interface fails and works again.
use super::fake::{Fake, MIB, body, settings};
use plimsoll_attach::control::{
    Balloon as Sizes, BalloonDevice, Capabilities, Control as Vmm, ControlError, RunState,
};
use plimsoll_host::backend::balloon::{Balloon, Lock, of_interface};
use plimsoll_host::backend::{Backend, Cooperation, Done, Trouble};
use plimsoll_host::control::{Control, Event, Pool};
use plimsoll_policy::Step;
use plimsoll_policy::settings::Settings;
use plimsoll_policy::view::MachineView;
use plimsoll_sys::ProcessId;
use plimsoll_types::{ByteCount, MachineId};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A VMM that answers, or hangs up whatever it is asked.
#[derive(Clone, Default)]
struct Moody {
    hangs_up: Arc<AtomicBool>,
    asked: Arc<AtomicU32>,
}

impl Vmm for Moody {
    fn interface(&self) -> &str {
        "the moody VMM"
    }

    fn probe(&mut self) -> Result<Capabilities, ControlError> {
        let balloon = Some(BalloonDevice { granularity: ByteCount(4096), deflate_on_oom: None });
        Ok(Capabilities { balloon, ..Capabilities::default() })
    }

    fn run_state(&mut self) -> Result<RunState, ControlError> {
        Ok(RunState::Running)
    }

    fn pause(&mut self) -> Result<(), ControlError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ControlError> {
        Ok(())
    }

    fn balloon(&mut self) -> Result<Sizes, ControlError> {
        self.asked.fetch_add(1, Ordering::AcqRel);
        if self.hangs_up.load(Ordering::Acquire) {
            let (interface, request) = (self.interface().to_owned(), "for its balloon".to_owned());
            return Err(ControlError::Lost { interface, request, source: None });
        }
        Ok(Sizes { memory: MIB(1024), target: Some(ByteCount(0)), actual: Some(ByteCount(0)) })
    }

    fn set_balloon(&mut self, _size: ByteCount) -> Result<(), ControlError> {
        Ok(())
    }
}

/// A machine of numbers with a balloon that is driven as any other.
struct Ballooned(Fake, Balloon);

impl Backend for Ballooned {
    fn observe(&mut self, id: MachineId, now: Instant) -> Result<MachineView, Trouble> {
        self.0.observe(id, now)
    }

    fn apply(&mut self, steps: &[Step], now: Instant) -> Vec<Done> {
        self.0.apply(steps, now)
    }

    fn news(&mut self) -> Option<Cooperation> {
        self.1.news()
    }
}

/// Nothing outlives this test.
struct Unkept;

impl Lock for Unkept {
    fn balloon(&self) -> Option<ByteCount> {
        None
    }

    fn plugged(&self) -> Option<ByteCount> {
        None
    }

    fn keep(&self, _balloon: ByteCount, _plugged: Option<ByteCount>) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_interface_that_fails_and_works_again_is_told_of_once_each() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let vmm = Moody::default();
    let interface = of_interface(Box::new(vmm.clone())).unwrap().unwrap();
    let balloon = Balloon::start(interface, ProcessId::own(), Unkept).unwrap();
    let backend = Box::new(Ballooned(Fake(body(500, 100)), balloon));
    let mut control =
        Control::new(Settings::new(MIB(4096)), Pool::of(MIB(4096)), MIB(0), Instant::now()).unwrap();
    control.admit("web", settings(1024, 0), backend).unwrap();
    let mut told = Vec::new();
    // Turns until that many requests more were made: each is a chance to say something.
    let mut turns = |more: u32, until: &dyn Fn(&[String]) -> bool| {
        let (began, goal) = (Instant::now(), vmm.asked.load(Ordering::Acquire) + more);
        while !until(&told) || vmm.asked.load(Ordering::Acquire) < goal {
            assert!(began.elapsed() < PATIENCE, "{told:?}");
            let events = control.turn(Instant::now()).events;
            told.extend(events.iter().map(Event::to_string));
            std::thread::sleep(Duration::from_millis(10));
        }
        told.clone()
    };
    assert_eq!(turns(1, &|_| true), [""; 0]);
    vmm.hangs_up.store(true, Ordering::Release);
    let lost = turns(3, &|told| !told.is_empty());
    let [sentence] = &lost[..] else { panic!("{lost:?}") };
    assert!(
        sentence.starts_with(
            "web is managed without its balloon from now on: the moody VMM closed the connection"
        ),
        "{sentence}"
    );
    vmm.hangs_up.store(false, Ordering::Release);
    let restored = turns(1, &|told| told.len() > 1);
    assert_eq!(restored[1..], ["the balloon of web can be asked again"]);
}
