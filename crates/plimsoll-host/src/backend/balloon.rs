//! A machine's balloon, and its virtio-mem devices where it has some, asked by a thread of its own.
//!
//! Enters: what the guest is to lack of all it could have. Leaves: what was last seen of it and of the guest's own word. The loop reads and
//! writes numbers only; whoever answers slowly, or never, keeps this thread waiting and nobody else. The
//! [controller](plimsoll_attach::balloon) decides how fast the balloon goes there, and when it rests;
//! [another](Plugging) which part of it is to be unplugged instead. What must never
//! happen: an ask that stays behind when the machine is let go in good order, or somebody who lets it go waiting for its VMM. So
//! the thread outlives the balloon until it has given back what was asked for, keeps the machine's lock as long, and whoever must
//! know has its [`Farewell`]. What it gives back is written into the lock before anything is asked for: a manager that is killed leaves
//! the balloon as it is, and the next one must not take that for what was there before.
use super::{Done, OtherWay};
use parking_lot::{Condvar, Mutex};
use plimsoll_attach::AttachLock;
use plimsoll_attach::balloon::{Controller, Observation, Plugged, Plugging, requests};
use plimsoll_attach::control::{
    self, Change, Control, ControlError, Cooperation, Feature, HotMemory, Migration,
};
use plimsoll_policy::view;
use plimsoll_sys::{ProcessId, procfs};
use plimsoll_types::{ByteCount, PageCount};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a balloon is looked at, and its guest asked for statistics: as often as the policy decides.
const PERIOD: Duration = Duration::from_secs(1);

/// A machine's lock: nobody else may have it as long as somebody speaks to the balloon. What is kept in it outlives a holder that is
/// killed.
pub trait Lock: Send {
    /// What the balloon was asked to hold before the first of those holders came, where that is kept.
    fn balloon(&self) -> Option<ByteCount>;

    /// What its virtio-mem devices were asked to bring before, where that is kept.
    fn plugged(&self) -> Option<ByteCount>;

    /// Keeps what the balloon was asked to hold and the devices to bring.
    ///
    /// # Errors
    /// When it cannot be written.
    fn keep(&self, balloon: ByteCount, plugged: Option<ByteCount>) -> std::io::Result<()>;
}

impl Lock for Arc<AttachLock> {
    fn balloon(&self) -> Option<ByteCount> {
        (**self).balloon()
    }

    fn plugged(&self) -> Option<ByteCount> {
        (**self).plugged()
    }

    fn keep(&self, balloon: ByteCount, plugged: Option<ByteCount>) -> std::io::Result<()> {
        (**self).keep(balloon, plugged)
    }
}

/// Speaks to a balloon through its VMM's own interface. Its calls may wait.
pub struct Interface {
    control: Box<dyn Control>,
    /// The balloon's size can be asked for in multiples of this.
    granularity: ByteCount,
    else_by: OtherWay,
    /// It has virtio-mem devices. Nobody is asked each second for what was not there.
    is_pluggable: bool,
}

/// Whoever speaks to the balloon of a running VMM, if it has one.
///
/// # Errors
/// When its interface cannot be asked.
pub fn of_interface(mut control: Box<dyn Control>) -> Result<Option<Interface>, ControlError> {
    let capabilities = control.probe()?;
    let Some(device) = &capabilities.balloon else { return Ok(None) };
    let granularity = device.granularity;
    let is_pluggable = Plugged::of(&capabilities.hot_memory).is_some();
    let is_only_way = !capabilities.has(Feature::FreePageHinting) && !is_pluggable;
    let reports = capabilities.has(Feature::FreePageReporting) && is_only_way;
    let else_by = if reports { OtherWay::Reports } else { OtherWay::Unknown };
    match control.poll_statistics(PERIOD) {
        // Then it is driven without.
        Ok(()) | Err(ControlError::Unsupported { .. } | ControlError::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(Some(Interface { control, granularity, else_by, is_pluggable }))
}

impl Interface {
    /// Its virtio-mem devices, as far as their interface tells all about them. That it does not tell just now is not that there are
    /// none.
    fn hot_memory(&mut self) -> Result<Vec<HotMemory>, ControlError> {
        if !self.is_pluggable {
            return Ok(Vec::new());
        }
        match self.control.hot_memory() {
            Err(ControlError::Unsupported { .. }) => Ok(Vec::new()),
            other => other,
        }
    }

    /// Asks the devices to bring so much. A block that is refused now may be had at the next look.
    fn request(&mut self, all: &[HotMemory], total: ByteCount) -> Result<(), ControlError> {
        for (id, size) in requests(all, total) {
            match self.control.request_hot_memory(&id, size) {
                Ok(()) | Err(ControlError::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// True while the machine is on its way to another host.
    fn is_migrating(&mut self) -> bool {
        matches!(self.control.migration(), Ok(Migration::Active | Migration::Completed))
    }
}

/// What was last seen of a balloon.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// What its guest lacks of what it could have: what the balloon holds, and what is not plugged of its devices.
    pub lacks: ByteCount,
    /// What the balloon holds of that.
    pub held: ByteCount,
    /// Its virtio-mem devices, if it has any.
    pub plugged: Option<Plugged>,
    /// Whether whoever speaks to it can be spoken to.
    pub is_cooperating: bool,
    /// Whether the machine is on its way to another host.
    pub is_migrating: bool,
    /// How else its guest gives memory back.
    pub else_by: OtherWay,
    said: Option<(control::GuestStatistics, Instant)>,
}

impl Seen {
    /// What the guest said, as the policy takes it.
    pub fn statistics(&self, now: Instant) -> Option<view::GuestStatistics> {
        let (said, heard) = self.said?;
        let age = said.age.unwrap_or_default() + now.saturating_duration_since(heard);
        let signed = |bytes: ByteCount| i64::try_from(bytes.0).unwrap_or(i64::MAX);
        Some(view::GuestStatistics {
            total: signed(said.total?),
            free: signed(said.free?),
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        })
    }
}

#[derive(Default)]
struct Board {
    wanted: Option<ByteCount>,
    seen: Option<Seen>,
    /// What nobody was told yet.
    news: Option<Change>,
    is_over: bool,
    has_ended: bool,
    /// To be done when it has.
    after: Vec<Box<dyn FnOnce() + Send>>,
}

#[derive(Default)]
struct Shared {
    board: Mutex<Board>,
    changed: Condvar,
}

/// A balloon, to which a thread speaks.
pub struct Balloon {
    shared: Arc<Shared>,
}

/// The end of a balloon's thread: what was asked for has been given back, as far as its VMM listens.
#[derive(Clone)]
pub struct Farewell(Arc<Shared>);

impl Farewell {
    /// True once it has come.
    pub fn has_come(&self) -> bool {
        self.0.board.lock().has_ended
    }

    /// Waits for it, until `due` at most.
    pub fn wait(&self, due: Instant) {
        let mut board = self.0.board.lock();
        while !board.has_ended && !self.0.changed.wait_until(&mut board, due).timed_out() {}
    }

    /// Does something when it has come, on that thread; at once if it has.
    pub fn then(&self, act: impl FnOnce() + Send + 'static) {
        let mut board = self.0.board.lock();
        if board.has_ended {
            drop(board);
            act();
        } else {
            board.after.push(Box::new(act));
        }
    }
}

impl std::fmt::Debug for Farewell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Farewell").field("has_come", &self.has_come()).finish()
    }
}

impl Balloon {
    /// Starts the thread. `process` is the machine's, for what the host had to bring back of it.
    ///
    /// # Errors
    /// When no thread is to be had.
    pub fn start(
        interface: Interface,
        process: ProcessId,
        lock: impl Lock + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let drive = move || {
            // Last of all, also when the thread fails: whoever waits is told when the lock is free.
            let _end = End(&theirs);
            let lock = lock;
            Worker { interface, process, lock: &lock, shared: &theirs, started: Instant::now() }.run();
        };
        std::thread::Builder::new().name(format!("balloon-{process}")).spawn(drive)?;
        Ok(Self { shared })
    }

    /// When the thread has ended, after this is dropped.
    pub fn farewell(&self) -> Farewell {
        Farewell(Arc::clone(&self.shared))
    }

    /// What was last seen, if anything was.
    pub fn seen(&self) -> Option<Seen> {
        self.shared.board.lock().seen
    }

    /// That its interface failed for good or works again, told once.
    pub fn news(&self) -> Option<Change> {
        self.shared.board.lock().news.take()
    }

    /// What the guest is to lack from now on.
    pub fn ask(&self, lacks: ByteCount) -> Done {
        self.shared.board.lock().wanted = Some(lacks);
        self.shared.changed.notify_all();
        Done::Begun
    }
}

impl Drop for Balloon {
    /// Has the thread give back what was asked for, and end.
    fn drop(&mut self) {
        self.shared.board.lock().is_over = true;
        self.shared.changed.notify_all();
    }
}

/// Tells that a thread has ended.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let after = {
            let mut board = self.0.board.lock();
            board.has_ended = true;
            std::mem::take(&mut board.after)
        };
        self.0.changed.notify_all();
        after.into_iter().for_each(|act| act());
    }
}

/// What the thread works with.
struct Worker<'a> {
    interface: Interface,
    process: ProcessId,
    lock: &'a dyn Lock,
    shared: &'a Shared,
    started: Instant,
}

/// The balloon as this thread found it.
struct Found {
    /// What it was asked to hold then, perhaps by a manager that was killed.
    target: ByteCount,
    /// What its guest was to lack then.
    lacked: ByteCount,
    /// What it was asked to hold before any manager came, which is what it is to hold when the last has gone.
    inherited: ByteCount,
    /// The same of what its devices were asked to bring, if it had some.
    brought: Option<ByteCount>,
    plugging: Plugging,
    /// What the guest was to keep plugged at most, and did not come to.
    in_vain: Option<ByteCount>,
}

impl Worker<'_> {
    fn run(mut self) {
        let mut cooperation = Cooperation::default();
        let mut controller: Option<(Controller, Found)> = None;
        while !self.shared.board.lock().is_over {
            let now = self.started.elapsed();
            if cooperation.may_try(now) {
                let outcome = self.turn(&mut controller, now);
                let change = cooperation.note(&outcome, now);
                let mut board = self.shared.board.lock();
                board.news = change.or_else(|| board.news.take());
                if let (Err(_), Some(seen)) = (outcome, &mut board.seen) {
                    seen.is_cooperating = cooperation.is_there();
                }
            }
            let mut board = self.shared.board.lock();
            if !board.is_over {
                let _ = self.shared.changed.wait_for(&mut board, PERIOD);
            }
        }
        if let Some((_, found)) = controller {
            // A guest that does not listen keeps what it has.
            let _ = self.interface.control.set_balloon(found.inherited);
            let hot = self.interface.hot_memory().unwrap_or_default();
            if let (Some(plugged), Some(brought)) = (Plugged::of(&hot), found.brought)
                && plugged.requested != brought
            {
                let _ = self.interface.request(&hot, brought);
            }
        }
    }

    /// The balloon as it is, of which what was there before the first manager is kept.
    fn found(&self, target: ByteCount, requested: Option<ByteCount>, lacked: ByteCount) -> Found {
        let (kept, kept_plugged) = (self.lock.balloon(), self.lock.plugged());
        let (inherited, brought) = (kept.unwrap_or(target), kept_plugged.or(requested));
        if kept.is_none() || kept_plugged != brought {
            // Where that cannot be written, a manager that follows a killed one finds what that one asked for.
            let _ = self.lock.keep(inherited, brought);
        }
        Found { target, lacked, inherited, brought, plugging: Plugging::default(), in_vain: None }
    }

    /// Looks, and asks for what the controller says.
    fn turn(
        &mut self,
        controller: &mut Option<(Controller, Found)>,
        now: Duration,
    ) -> Result<(), ControlError> {
        let control::Balloon { memory, actual, target } = self.interface.control.balloon()?;
        let is_migrating = self.interface.is_migrating();
        let hot = self.interface.hot_memory()?;
        let plugged = Plugged::of(&hot);
        let unplugged = plugged.map_or(ByteCount(0), |plugged| plugged.unplugged());
        let (controller, found) = controller.get_or_insert_with(|| {
            let target = target.or(actual).unwrap_or_default();
            let found = self.found(target, plugged.map(|plugged| plugged.requested), target + unplugged);
            (Controller::new(self.interface.granularity, target), found)
        });
        let held = actual.unwrap_or(found.target);
        let statistics = self.interface.control.statistics().ok();
        let said = statistics.map(|said| (said, Instant::now()));
        let refaulted = PageCount(procfs::major_faults(self.process).unwrap_or_default()).bytes();
        let lacks = self.shared.board.lock().wanted.unwrap_or(found.lacked);
        let course = plugged.map(|plugged| found.plugging.step(now, lacks, held, memory, &plugged));
        let wanted = course.map_or(lacks, |course| course.balloon);
        let kept = course.and_then(|course| course.kept).or(found.in_vain);
        found.in_vain = kept.filter(|most| plugged.is_some_and(|plugged| plugged.plugged > *most));
        let plugged = plugged.map(|plugged| Plugged { in_vain: found.in_vain, ..plugged });
        let seen = Observation { now, memory, actual: held, statistics, refaulted };
        let step = controller.step(&seen, wanted);
        if let Some(ask) = step.ask.filter(|_| !is_migrating) {
            self.interface.control.set_balloon(ask)?;
        }
        if let Some(request) = course.and_then(|course| course.request).filter(|_| !is_migrating) {
            self.interface.request(&hot, request)?;
        }
        let seen = Seen {
            lacks: held + unplugged,
            plugged,
            held,
            is_cooperating: true,
            is_migrating,
            else_by: self.interface.else_by,
            said,
        };
        self.shared.board.lock().seen = Some(seen);
        Ok(())
    }
}
