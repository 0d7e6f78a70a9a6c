//! A machine with a balloon and a virtio-mem device, whose guest does what it is asked, or a part of it.
use super::fake::MIB;
use plimsoll_attach::control::{
    Balloon as Sizes, BalloonDevice, Capabilities, Control, ControlError, Feature, HotMemory, HotMemoryId,
    HotplugMethod, RunState,
};
use plimsoll_host::backend::OtherWay;
use plimsoll_host::backend::balloon::{Balloon, Lock, Seen, of_interface};
use plimsoll_sys::ProcessId;
use plimsoll_types::ByteCount;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const MEMORY: ByteCount = ByteCount::mib(256);
const MOST: ByteCount = ByteCount::mib(512);
const BLOCK: ByteCount = ByteCount::mib(4);

/// What the guest holds and has, and what it was asked.
#[derive(Debug, Default)]
struct Guest {
    balloon: ByteCount,
    requested: ByteCount,
    /// What it never unplugs.
    keeps: ByteCount,
    asked: Vec<ByteCount>,
}

#[derive(Clone)]
struct Vmm(Arc<Mutex<Guest>>);

impl Control for Vmm {
    fn interface(&self) -> &str {
        "the growing VMM"
    }

    fn probe(&mut self) -> Result<Capabilities, ControlError> {
        let balloon = Some(BalloonDevice { granularity: ByteCount(4096), deflate_on_oom: None });
        let features = [Feature::FreePageReporting].into();
        Ok(Capabilities { balloon, features, hot_memory: self.hot_memory()? })
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
        let held = self.0.lock().unwrap().balloon;
        Ok(Sizes { memory: MEMORY, target: Some(held), actual: Some(held) })
    }

    fn set_balloon(&mut self, size: ByteCount) -> Result<(), ControlError> {
        self.0.lock().unwrap().balloon = size;
        Ok(())
    }

    fn hot_memory(&mut self) -> Result<Vec<HotMemory>, ControlError> {
        let guest = self.0.lock().unwrap();
        Ok(vec![HotMemory {
            id: HotMemoryId("vm0".to_owned()),
            method: HotplugMethod::VirtioMem,
            block: BLOCK,
            maximum: Some(MOST),
            requested: guest.requested,
            plugged: Some(guest.requested.max(guest.keeps)),
        }])
    }

    fn request_hot_memory(&mut self, _id: &HotMemoryId, size: ByteCount) -> Result<(), ControlError> {
        let mut guest = self.0.lock().unwrap();
        guest.requested = size;
        guest.asked.push(size);
        Ok(())
    }
}

/// What balloon and devices were asked for.
type Both = (ByteCount, Option<ByteCount>);

/// What outlives a manager that is killed.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Option<Both>>>);

impl Lock for Kept {
    fn balloon(&self) -> Option<ByteCount> {
        self.0.lock().unwrap().map(|(balloon, _)| balloon)
    }

    fn plugged(&self) -> Option<ByteCount> {
        self.0.lock().unwrap().and_then(|(_, plugged)| plugged)
    }

    fn keep(&self, balloon: ByteCount, plugged: Option<ByteCount>) -> std::io::Result<()> {
        *self.0.lock().unwrap() = Some((balloon, plugged));
        Ok(())
    }
}

fn wait_until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn drive(guest: &Arc<Mutex<Guest>>, lock: &Kept) -> Balloon {
    let interface = of_interface(Box::new(Vmm(Arc::clone(guest)))).unwrap().unwrap();
    let balloon = Balloon::start(interface, ProcessId::own(), lock.clone()).unwrap();
    wait_until("it to be looked at", || balloon.seen());
    balloon
}

fn end(balloon: Balloon) {
    let farewell = balloon.farewell();
    drop(balloon);
    farewell.wait(Instant::now() + Duration::from_secs(120));
    assert!(farewell.has_come());
}

#[test]
fn a_machine_that_is_to_have_more_gets_it_from_its_balloon_and_then_by_virtio_mem_and_gives_it_back() {
    let guest = Arc::new(Mutex::new(Guest { balloon: MIB(64), ..Guest::default() }));
    let lock = Kept::default();
    let balloon = drive(&guest, &lock);
    let is = |what: &str, is_so: &dyn Fn(&Seen) -> bool| wait_until(what, || balloon.seen().filter(is_so));
    let seen = is("its whole lack to be seen", &|seen| seen.lacks == MIB(512 + 64));
    assert_eq!((seen.held, seen.else_by), (MIB(64), OtherWay::Unknown), "unplugging is another way to give");
    balloon.ask(MIB(512 + 16));
    is("the balloon to give", &|seen| seen.lacks == MIB(512 + 16) && seen.held == MIB(16));
    assert_eq!(guest.lock().unwrap().asked, [], "that was the balloon's to give");
    balloon.ask(MIB(512 - 201));
    is("more to be plugged", &|seen| seen.lacks == MIB(512 - 200) && seen.held == MIB(0));
    assert_eq!(guest.lock().unwrap().asked, [MIB(200)], "in whole blocks, and asked for once");
    end(balloon);
    let found = guest.lock().unwrap();
    assert_eq!((found.balloon, found.requested), (MIB(64), MIB(0)), "as it was before");
}

#[test]
fn what_was_plugged_before_managers_that_were_killed_is_what_is_asked_for_in_the_end() {
    let guest = Arc::new(Mutex::new(Guest { requested: MIB(300), keeps: MIB(120), ..Guest::default() }));
    let lock = Kept(Arc::new(Mutex::new(Some((MIB(8), Some(MIB(100)))))));
    let balloon = drive(&guest, &lock);
    // It unplugs a part: what it has is what is seen.
    balloon.ask(MIB(512 - 300));
    end(balloon);
    let asked = |guest: &Guest| (guest.balloon, guest.requested);
    assert_eq!(asked(&guest.lock().unwrap()), (MIB(8), MIB(100)));
    let balloon = drive(&guest, &lock);
    let seen = wait_until("it to be seen", || balloon.seen());
    let plugged = seen.plugged.unwrap();
    assert_eq!((plugged.requested, plugged.plugged, seen.lacks), (MIB(100), MIB(120), MIB(8 + 512 - 120)));
    end(balloon);

    // A manager that knew of no devices has kept nothing of them: they are as the next one finds them.
    let lock = Kept(Arc::new(Mutex::new(Some((MIB(8), None)))));
    let balloon = drive(&guest, &lock);
    assert_eq!((lock.balloon(), lock.plugged()), (Some(MIB(8)), Some(MIB(100))));
    end(balloon);
    assert_eq!(asked(&guest.lock().unwrap()), (MIB(8), MIB(100)));
}
