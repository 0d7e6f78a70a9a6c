//! The keeper's own loop.
//!
//! Enters: slots, a program to start. Leaves: how it ended. Nothing here allocates after [`Keeper::new`]: not the messages,
//! which lie on the stack, nor the slots, nor the start of a child.
use super::protocol::{LISTING_MAX, LISTING_SIZE, REQUEST_SIZE, Request, Status, encode_listing};
use super::store::Store;
use crate::voice::say;
use plimsoll_sys::fdpass;
use plimsoll_sys::launch::{Ending, Program, StartError, accept_signals, hold_signals, reap};
use plimsoll_sys::pidfd::{Pidfd, Signal};
use plimsoll_sys::slots::Slots;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{getpid, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Managers that end before they serve are started again at once so often, then ever later.
const STARTS_AT_ONCE: u32 = 4;
/// The first pause, doubled each time.
const PAUSE: Duration = Duration::from_millis(20);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long a keeper that ends waits for its supervisor to listen.
const PARTING_MAX: Duration = Duration::from_secs(2);
/// How long a manager waits for it that wants something kept: far less than its silence may last.
const STORING_MAX: Duration = Duration::from_secs(5);
/// A keeper that holds nothing of any machine gives up after so many managers that ended before they served.
const STARTS_MAX: u32 = 8;
/// How long the program that is to go on may take to say whether it can: it reads its command line, and one page of memory.
const ASKING_MAX: Duration = Duration::from_secs(5);
/// The status of a manager that was asked for something that cannot be.
const UNUSABLE: i32 = 2;

/// How a keeper's work ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The manager ended because it was told to, and needs nothing any more.
    Stopped,
    /// No manager could be had, and there is no machine to need one.
    Failed(Ending),
    /// The program at the path is to go on. Everything is ready for it.
    Upgrade,
}

/// The manager that runs.
struct Manager {
    process: Pidfd,
    socket: OwnedFd,
    /// When it was started, or asked for something last.
    heard: Instant,
    /// It has been told to stop.
    is_told: bool,
    /// It closed its socket, by ending or not, and is killed: nothing of it is waited for but its end, which takes the kernel a while.
    is_parted: bool,
    /// The slot that it had filled and of which it is told when the supervisor has that, and until when at most it waits.
    keeping: Option<(u32, Instant)>,
}

/// Signals, each with what becomes readable when it comes.
struct Signals([(Signal, UnixStream); 4]);

impl Signals {
    fn new() -> io::Result<Self> {
        let watch = |number, signal| {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            write.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(number, write)?;
            io::Result::Ok((signal, read))
        };
        Ok(Self([
            watch(SIGTERM, Signal::TERM)?,
            watch(SIGINT, Signal::TERM)?,
            watch(SIGHUP, Signal::HUP)?,
            watch(SIGUSR2, Signal::USR2)?,
        ]))
    }
}

/// Holds slots and has a manager.
pub struct Keeper {
    slots: Slots,
    /// Slots below this one are the daemon's own.
    reserved: u32,
    program: Program,
    /// A manager that is silent for so long hangs.
    silence_max: Duration,
    signals: Signals,
    manager: Option<Manager>,
    /// What a supervisor keeps for the next keeper.
    store: Option<Store>,
    /// Says whether the program that is to go on can do so with what is in that slot.
    probe: Option<(Program, u32)>,
    /// Managers that have ended before they served, since one has.
    fruitless: u32,
    next_start: Instant,
    /// It is to stop, until a manager has said that it goes on: that may take minutes, and managers may crash on the way.
    is_stopping: bool,
    /// A manager has said that it goes on, and who told it to stop is a supervisor, which takes no refusal: it stops when it can.
    is_owed: bool,
}

impl Keeper {
    /// Keeps `slots`, those below `reserved` for the daemon itself, and will start `program` as manager. One that says nothing
    /// for `silence_max` is replaced.
    ///
    /// # Errors
    /// When signals cannot be caught.
    pub fn new(slots: Slots, reserved: u32, program: Program, silence_max: Duration) -> io::Result<Self> {
        let (signals, next_start) = (Signals::new()?, Instant::now());
        Ok(Self {
            slots,
            reserved,
            program,
            silence_max,
            signals,
            manager: None,
            store: None,
            probe: None,
            fruitless: 0,
            next_start,
            is_stopping: false,
            is_owed: false,
        })
    }

    /// Has a supervisor keep what is kept here.
    pub fn store_in(&mut self, store: Store) {
        self.store = Some(store);
    }

    /// Has a program asked before an [upgrade](End::Upgrade) whether it can go on with what is in that slot, which it is handed: it ends with
    /// status 0 if so. Where that is empty, nothing is lost by one that cannot.
    pub fn ask_first(&mut self, probe: Program, slot: u32) {
        self.probe = Some((probe, slot));
    }

    /// Lets go of everything, and has the supervisor do the same: this daemon ends, and the next one begins anew.
    pub fn let_go_of_all(&mut self) {
        for slot in 0..self.slots.count() {
            self.let_go(slot);
        }
        let until = Instant::now() + PARTING_MAX;
        while !self.settle() && Instant::now() < until {
            std::thread::sleep(PAUSE);
        }
    }

    /// What is kept.
    pub const fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The manager's process, while there is one.
    pub fn manager(&self) -> Option<&Pidfd> {
        self.manager.as_ref().map(|manager| &manager.process)
    }

    /// Works until there is nothing to do any more.
    ///
    /// # Errors
    /// When waiting fails, which it does not.
    pub fn run(&mut self) -> io::Result<End> {
        loop {
            if let Some(end) = self.turn(PAUSE_MAX)? {
                return Ok(end);
            }
        }
    }

    /// Waits, at most so long, for something to do, and does it.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub fn turn(&mut self, limit: Duration) -> io::Result<Option<End>> {
        let wait = if self.manager.is_none() && !self.start_when_due() {
            limit.min(self.next_start.saturating_duration_since(Instant::now()))
        } else {
            limit
        };
        self.settle();
        self.answer_kept();
        let wait = self.store.as_ref().map_or(wait, |store| wait.min(store.patience()));
        let [has_ended, has_asked, signals @ ..] = self.wait(wait)?;
        for (is_set, index) in signals.into_iter().zip(0..) {
            if is_set && let Some(end) = self.obey(index) {
                return Ok(Some(end));
            }
        }
        // What it asked before it ended counts.
        let mut is_silent = !has_asked;
        if has_asked {
            is_silent = self.answer().is_err();
            if is_silent
                && !has_ended
                && let Some(manager) = &mut self.manager
            {
                // It closed its socket or does not listen, and without that it is no manager.
                let _ = manager.process.send_signal(Signal::KILL);
                manager.is_parted = true;
            }
        }
        if let Some(manager) = self.manager.as_ref().filter(|it| it.heard.elapsed() > self.silence_max) {
            // It hangs. What it had is as a crash leaves it.
            let _ = manager.process.send_signal(Signal::KILL);
        }
        Ok(if has_ended && is_silent { self.bury() } else { None })
    }

    /// Has the supervisor keep what is kept now. False where it did not listen.
    fn settle(&mut self) -> bool {
        self.store.as_mut().is_none_or(|store| store.settle(&self.slots))
    }

    /// False while it is not time yet.
    fn start_when_due(&mut self) -> bool {
        if Instant::now() < self.next_start {
            return false;
        }
        match start(&self.program) {
            Ok(manager) => self.manager = Some(manager),
            Err(error) => {
                say(format_args!("plimsoll keeper: no manager can be started: {error}"));
                self.postpone();
            }
        }
        self.manager.is_some()
    }

    /// Says when the next manager is to be started.
    fn postpone(&mut self) {
        self.fruitless = self.fruitless.saturating_add(1);
        let pauses = self.fruitless.saturating_sub(STARTS_AT_ONCE);
        let pause = if pauses == 0 { Duration::ZERO } else { PAUSE * (1 << pauses.min(10)) };
        self.next_start = Instant::now() + pause.min(PAUSE_MAX);
    }

    /// Whether the manager has ended, whether it has asked for something, and which signals came.
    fn wait(&self, limit: Duration) -> io::Result<[bool; 6]> {
        let [term, int, hup, usr2] = &self.signals.0;
        // Without a manager something stands in its place that is watched anyway.
        let stand_in = term.1.as_fd();
        let process = self.manager.as_ref().map_or(stand_in, |it| it.process.as_fd());
        let talks = self.manager.as_ref().filter(|it| !it.is_parted);
        let socket = talks.map_or(stand_in, |it| it.socket.as_fd());
        let watched = [process, socket, term.1.as_fd(), int.1.as_fd(), hup.1.as_fd(), usr2.1.as_fd()];
        let mut polled = watched.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        match poll(&mut polled, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = polled.map(|polled| polled.revents().intersects(PollFlags::IN));
        ready[0] &= self.manager.is_some();
        ready[1] &= talks.is_some();
        Ok(ready)
    }

    /// Takes one request of the manager and answers it.
    fn answer(&mut self) -> io::Result<()> {
        let Some(manager) = &mut self.manager else { return Ok(()) };
        manager.heard = Instant::now();
        let mut bytes = [0; REQUEST_SIZE + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = match recvmsg(&manager.socket, parts, &mut control, flags) {
            Ok(received) => received,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let (mut descriptor, mut descriptors): (Option<OwnedFd>, usize) = (None, 0);
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                for right in rights {
                    descriptors += 1;
                    descriptor = Some(right);
                }
            }
        }
        if received.bytes == 0 {
            return Err(Errno::PIPE.into());
        }
        let is_cut = received.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC);
        let request = bytes.get(..received.bytes).and_then(|bytes| Request::decode(bytes, descriptors));
        let is_done = match (request.filter(|_| !is_cut), descriptor) {
            (Some(Request::List), _) => return list(manager, &self.slots),
            (Some(Request::Serving), _) => {
                self.fruitless = 0;
                // The one that was told has ended without doing so, and this one listens.
                if (self.is_stopping || self.is_owed) && !manager.is_told {
                    manager.is_told = true;
                    let _ = manager.process.send_signal(Signal::TERM);
                }
                return Ok(());
            }
            (Some(Request::Staying), _) => {
                self.is_stopping = false;
                self.is_owed = self.store.is_some();
                // It knows what it owes, and the next one is told.
                manager.is_told = self.is_owed;
                return Ok(());
            }
            (Some(Request::Keep(slot)), Some(descriptor)) => {
                let is_kept = self.slots.put(slot, descriptor).is_ok();
                if let Some(store) = self.store.as_mut().filter(|_| is_kept) {
                    store.filled();
                    store.settle(&self.slots);
                    // The daemon's own are sent before any machine's, whose answer says that they were.
                    if slot >= self.reserved {
                        manager.keeping = Some((slot, Instant::now() + STORING_MAX));
                        self.answer_kept();
                        return Ok(());
                    }
                }
                is_kept
            }
            (Some(Request::LetGo(slot)), _) => self.let_go(slot),
            _ => false,
        };
        let status = if is_done { Status::Done } else { Status::Refused };
        self.tell_status(status)
    }

    /// Closes what a slot holds; the supervisor hears of it when it listens. False if it held nothing.
    fn let_go(&mut self, slot: u32) -> bool {
        let is_held = self.slots.get(slot).is_some();
        if let Some(store) = self.store.as_mut().filter(|_| is_held) {
            store.let_go(slot);
        }
        self.slots.clear(slot)
    }

    /// Tells the manager whether what it had kept is stored, once that is known.
    fn answer_kept(&mut self) {
        let (Some(store), Some(manager)) = (&mut self.store, &mut self.manager) else { return };
        let Some((slot, until)) = manager.keeping else { return };
        let status = if store.has(slot) {
            Status::Done
        } else if Instant::now() >= until {
            self.let_go(slot);
            Status::Unheard
        } else {
            return;
        };
        // One that does not listen any more is found when it asks, or when it is silent.
        let _ = self.tell_status(status);
    }

    fn tell_status(&mut self, status: Status) -> io::Result<()> {
        let Some(manager) = &mut self.manager else { return Ok(()) };
        manager.keeping = None;
        tell(manager, &status.encode(self.slots.count()), &[])
    }

    fn obey(&mut self, index: usize) -> Option<End> {
        let (signal, stream) = self.signals.0.get_mut(index)?;
        let _ = stream.read(&mut [0; 64]);
        let signal = *signal;
        if signal == Signal::USR2 {
            return self.prepare_upgrade();
        }
        self.is_stopping |= signal == Signal::TERM;
        let holds_machines = self.holds_machines();
        match &mut self.manager {
            // A manager that has ended meanwhile is buried in the next turn.
            Some(manager) => {
                manager.is_told |= signal == Signal::TERM;
                drop(manager.process.send_signal(signal));
            }
            None if signal == Signal::TERM && !holds_machines => return Some(End::Stopped),
            None => {}
        }
        None
    }

    /// Whether the program that is to go on says that it can. Meanwhile the manager works; where it has something kept, it waits.
    fn has_successor(&self) -> bool {
        let Some((probe, slot)) = &self.probe else { return true };
        let Some(kept) = self.slots.get(*slot) else { return true };
        let child = match probe.start(kept) {
            Ok(child) => child,
            Err(error) => {
                let cause = std::error::Error::source(&error);
                let cause: &dyn std::fmt::Display = cause.as_ref().map_or(&error, |cause| cause);
                say(format_args!(
                    "plimsoll keeper: no upgrade, the manager goes on: the new program cannot be started: {cause}"
                ));
                return false;
            }
        };
        if !ends_by(&child, Instant::now() + ASKING_MAX) {
            let _ = child.send_signal(Signal::KILL);
        }
        // What it said cannot be had only where it is no child of this process.
        let ending = reap(&child).unwrap_or(Ending::Status(UNUSABLE));
        if ending != Ending::Status(0) {
            say(format_args!(
                "plimsoll keeper: no upgrade, the manager goes on: the new program cannot take over, and ended with {ending}"
            ));
        }
        ending == Ending::Status(0)
    }

    /// Ends the manager as a crash would, which loses nothing, and leaves everything open. Signals are held from here on.
    fn prepare_upgrade(&mut self) -> Option<End> {
        if self.is_stopping || self.is_owed {
            say(format_args!("plimsoll keeper: no upgrade: the daemon is stopping"));
            return None;
        }
        if !self.has_successor() {
            return None;
        }
        let held = hold_signals().and_then(|()| self.wait(Duration::ZERO));
        // Being told to stop comes first: it would be forgotten.
        let Ok([_, _, false, false, is_to_reload, _]) = held else {
            let _ = accept_signals();
            return None;
        };
        if is_to_reload {
            // What was read of it is lost with this program: it waits for the next one with those that come from here on.
            let _ = kill_process(getpid(), Signal::HUP);
        }
        if let Some(manager) = self.manager.take() {
            let _ = manager.process.send_signal(Signal::KILL);
            let _ = reap(&manager.process);
        }
        // The new program does not know what was not sent.
        if !self.settle() {
            say(format_args!("plimsoll keeper: no upgrade: the supervisor does not listen"));
            self.stay();
            return None;
        }
        match self.slots.leave_open() {
            Ok(()) => Some(End::Upgrade),
            Err(error) => {
                say(format_args!("plimsoll keeper: no upgrade: {error}"));
                self.stay();
                None
            }
        }
    }

    /// Goes on after an [upgrade](End::Upgrade) that was prepared and cannot be: the next manager is of this build, and gets what
    /// is kept by asking for it, not by inheritance.
    pub fn stay(&self) {
        // Neither fails for descriptors and signals that there are.
        let _ = self.slots.close_on_exec();
        let _ = accept_signals();
    }

    fn holds_machines(&self) -> bool {
        self.slots.taken().any(|(slot, _)| slot >= self.reserved)
    }

    /// Reaps the manager and says whether there is to be another.
    fn bury(&mut self) -> Option<End> {
        let manager = self.manager.take()?;
        let process = manager.process.process();
        let ending = reap(&manager.process).unwrap_or(Ending::Status(0));
        let has_machines = self.holds_machines();
        // One that was told before it could listen has ended by the signal itself.
        if (self.is_stopping || self.is_owed) && (ending == Ending::Status(0) || !has_machines) {
            return Some(End::Stopped);
        }
        self.postpone();
        let is_hopeless = ending == Ending::Status(UNUSABLE) || self.fruitless >= STARTS_MAX;
        if !has_machines && is_hopeless && self.fruitless > 0 {
            return Some(End::Failed(ending));
        }
        say(format_args!("plimsoll keeper: the manager, {process}, ended with {ending}; starting another"));
        None
    }
}

fn start(program: &Program) -> Result<Manager, StartError> {
    let (socket, theirs) = fdpass::seqpacket_pair().map_err(StartError::Spawn)?;
    let process = program.start(theirs.as_fd())?;
    Ok(Manager { process, socket, heard: Instant::now(), is_told: false, is_parted: false, keeping: None })
}

/// Waits for a process's end, however many signals come meanwhile. False where it has not ended by then.
fn ends_by(child: &Pidfd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(limit) = Timespec::try_from(left) else { return false };
        match poll(&mut [PollFd::new(child, PollFlags::IN)], Some(&limit)) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn list(manager: &Manager, slots: &Slots) -> io::Result<()> {
    let mut taken = slots.taken();
    loop {
        let (mut numbers, mut count) = ([0; LISTING_MAX], 0);
        let mut descriptors = [manager.socket.as_fd(); LISTING_MAX];
        for (slot, descriptor) in taken.by_ref().take(LISTING_MAX) {
            (numbers[count], descriptors[count]) = (slot, descriptor);
            count += 1;
        }
        let mut bytes = [0; LISTING_SIZE];
        let length = encode_listing(&mut bytes, slots.count(), &numbers[..count]);
        tell(manager, &bytes[..length], &descriptors[..count])?;
        if count < LISTING_MAX {
            return Ok(());
        }
    }
}

fn tell(manager: &Manager, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LISTING_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::INVAL.into());
    }
    // A manager that does not read what it asked for is no manager: the keeper does not wait.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(&manager.socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    Ok(())
}
