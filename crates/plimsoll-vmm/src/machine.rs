//! What the vCPUs of a machine share with its main thread, whatever runs them.
//!
//! Enters: port exits of vCPUs, orders of the main thread. Leaves: reports, and how each vCPU ended. What must never
//! happen: a number the guest wrote being used without a check, or a vCPU thread holding a lock while it touches or
//! discards guest memory; the balloon's gate apart, which only vCPUs and the frames' thread take.
use crate::balloon::Balloon;
use crate::control::Registers;
use crate::memory::{DiscardError, Memory, MemoryError};
use crate::report::{self, Summary, VcpuReports};
use crate::signals;
use plimsoll_guest::abi::{self, BalloonTarget, Listing};
use plimsoll_guest::frames::Plan;
use plimsoll_guest::probe::{ProbeCommand, Probed};
use plimsoll_linux::explain;
use plimsoll_sys::eventfd::EventFd;
use plimsoll_types::{ByteCount, Gpa, PAGE_SIZE};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// The longest a vCPU sleeps at once; the guest asks again.
const IDLE_MAX: Duration = Duration::from_secs(1);

/// Why a vCPU cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Death {
    /// The guest program gave up.
    #[error("the guest program stopped: {message}")]
    Panicked {
        /// Its words.
        message: String,
    },
    /// It gave back what it must not.
    #[error(transparent)]
    Discard(DiscardError),
    /// Its balloon listed nonsense.
    #[error("its balloon listed {count} pieces of kind {piece} for purpose {what}, which means nothing")]
    Listing {
        /// The purpose.
        what: u32,
        /// The kind.
        piece: u32,
        /// How many.
        count: u32,
    },
    /// It asked for a frame that it does not have.
    #[error("it asked for the frame at {gpa}, where none starts")]
    Install {
        /// The address.
        gpa: Gpa,
    },
    /// It wrote to a port that is none, or not a dword.
    #[error("it wrote {bytes} bytes to port {port:#x}, which means nothing (rip {rip:#x})")]
    Port {
        /// The port.
        port: u16,
        /// How many bytes.
        bytes: usize,
        /// Where it was.
        rip: u64,
    },
    /// A fault of the guest: with no interrupt table, every exception ends it.
    #[error("it faulted at rip {rip:#x}; the last page fault was at {fault:#x} (outside its memory?)")]
    Faulted {
        /// Where it was.
        rip: u64,
        /// The last address that was not mapped.
        fault: u64,
    },
    /// It reached memory through its page tables that the machine does not have.
    #[error("it accessed {gpa}, where the machine has no memory (rip {rip:#x})")]
    OutsideRam {
        /// The address.
        gpa: Gpa,
        /// Where it was.
        rip: u64,
    },
    /// Its bytes were lost; the manager poisoned the page.
    #[error("it touched {gpa}, whose bytes are lost: the page is poisoned")]
    Poisoned {
        /// The page.
        gpa: Gpa,
    },
    /// KVM cannot run it.
    #[error("KVM cannot go on: {exit} (rip {rip:#x})")]
    Kvm {
        /// What KVM said.
        exit: String,
        /// Where it was.
        rip: u64,
    },
    /// The VMM cannot reach the guest's memory.
    #[error("its channel page cannot be reached")]
    Memory(#[from] MemoryError),
    /// The guest program, running in this process, cannot start.
    #[error("the guest program cannot run")]
    Program(#[source] plimsoll_guest::GuestError),
}

/// How a vCPU ended.
#[derive(Debug)]
pub(crate) enum End {
    /// By itself.
    Done,
    /// It was told to leave at once.
    Left,
    /// It cannot go on.
    Died(Death),
}

/// Whether vCPU threads go on running the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Going {
    /// They do.
    On,
    /// They leave as soon as they notice.
    Leaving,
}

#[derive(Debug, Default)]
struct Vcpu {
    reports: VcpuReports,
    end: Option<End>,
}

/// What sleeping vCPUs are woken for.
#[derive(Debug, Default)]
struct Desk {
    /// The guest has been told to stop.
    is_stopping: bool,
    /// Commands that wait for their vCPUs.
    commands: VecDeque<(u32, ProbeCommand)>,
    /// How many commands there were, ever.
    numbered: u64,
    /// Answers that wait for the starter.
    answers: VecDeque<(u32, Probed)>,
    /// vCPU 0, if it waits for a command, is to look at the balloon's target.
    has_target: bool,
    /// Registers that were asked for.
    told: Option<Told>,
}

/// What a vCPU says of its registers.
#[derive(Debug)]
pub(crate) struct Told {
    /// What they are, or why that cannot be had.
    pub(crate) registers: Result<Box<Registers>, String>,
    /// How long it stood still for it.
    pub(crate) stalled: Duration,
}

/// How long a vCPU stands before it looks again whether the machine has to go.
const STAND: Duration = Duration::from_millis(20);

/// No vCPU is asked for its registers.
const NOBODY: u32 = u32::MAX;

/// One machine, as its threads see it.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) memory: Memory,
    pub(crate) balloon: Balloon,
    pub(crate) tsc_hz: u64,
    vcpus: Vec<Mutex<Vcpu>>,
    leaving: AtomicBool,
    /// Whose registers are asked for, or [`NOBODY`]'s. Changed with the desk locked, so that nobody falls asleep over it.
    asked: AtomicU32,
    /// Whether vCPUs are to stand still. Set with the desk locked, as `asked` is.
    held: AtomicBool,
    /// vCPUs that run the guest, are about to, or do what it asked for. Whoever holds the machine waits until there is none.
    inside: AtomicU32,
    /// Touches of poisoned pages before the machine was.
    touches_before: u64,
    /// What sleeping vCPUs wait for, and `wake` wakes them.
    desk: Mutex<Desk>,
    wake: Condvar,
    /// Signalled when a vCPU has ended or answered, or the manager is lost.
    pub(crate) attention: EventFd,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values that no panic can leave half written.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    /// `plan` is where a guest that keeps frames has them.
    pub(crate) fn new(
        memory: Memory,
        plan: Option<Plan>,
        vcpus: u32,
        tsc_hz: u64,
        attention: EventFd,
    ) -> Self {
        Self {
            balloon: Balloon::new(plan, memory.layout().pages()),
            memory,
            tsc_hz,
            vcpus: (0..vcpus).map(|_| Mutex::default()).collect(),
            touches_before: signals::touches(),
            leaving: AtomicBool::new(false),
            asked: AtomicU32::new(NOBODY),
            held: AtomicBool::new(false),
            inside: AtomicU32::new(0),
            desk: Mutex::default(),
            wake: Condvar::new(),
            attention,
        }
    }

    fn vcpu(&self, index: u32) -> Option<MutexGuard<'_, Vcpu>> {
        self.vcpus.get(usize::try_from(index).ok()?).map(locked)
    }

    /// The channel page of a vCPU that waits in a port exit.
    fn channel(&self, vcpu: u32) -> Result<abi::Channel, Death> {
        let mut bytes = [0; size_of::<abi::Channel>()];
        self.memory.read(Gpa(abi::channel_gpa(vcpu)), &mut bytes)?;
        // Every array of that length is a `Channel`: its fields are integers.
        abi::Channel::read_from_bytes(&bytes).map_err(|_| {
            MemoryError::OutsideRam { gpa: Gpa(abi::channel_gpa(vcpu)), len: ByteCount(0) }.into()
        })
    }

    /// Does what a vCPU asked for by writing to a port. `Some` when it shall not be resumed.
    pub(crate) fn port(&self, vcpu: u32, port: u16, bytes: usize, rip: impl Fn() -> u64) -> Option<End> {
        if bytes != 4 {
            return Some(End::Died(Death::Port { port, bytes, rip: rip() }));
        }
        let channel = match self.channel(vcpu) {
            Ok(channel) => channel,
            Err(death) => return Some(End::Died(death)),
        };
        match port {
            abi::PORT_REPORT => self.report(vcpu, &channel.report),
            abi::PORT_IDLE => self.idle(vcpu, channel.request_ns),
            abi::PORT_DISCARD => {
                let discarded = self.memory.discard(Gpa(channel.request_gpa), channel.request_len);
                return discarded.err().map(|error| End::Died(Death::Discard(error)));
            }
            abi::PORT_BALLOON => {
                let listed = self.listing().and_then(|listing| self.listed(&listing));
                return listed.err().map(End::Died);
            }
            abi::PORT_INSTALL => {
                let installed = self.balloon.install(&self.memory, channel.request_gpa);
                return installed.err().map(End::Died);
            }
            abi::PORT_COMMAND => {
                let command = self.next_command(vcpu, &channel.probed);
                let place = Gpa(abi::channel_gpa(vcpu) + abi::COMMAND_OFFSET);
                let written = self.memory.write(place, command.as_bytes());
                return written.err().map(|error| End::Died(Death::Memory(error)));
            }
            abi::PORT_DONE => {
                self.report(vcpu, &channel.report);
                return Some(End::Done);
            }
            abi::PORT_PANIC => {
                let len = usize::try_from(channel.message_len).unwrap_or(usize::MAX).min(abi::MESSAGE_SIZE);
                let message = String::from_utf8_lossy(&channel.message[..len]);
                let message = message.chars().filter(|letter| !letter.is_control()).collect();
                return Some(End::Died(Death::Panicked { message }));
            }
            _ => return Some(End::Died(Death::Port { port, bytes, rip: rip() })),
        }
        None
    }

    /// The balloon's listing.
    fn listing(&self) -> Result<Listing, Death> {
        let mut bytes = [0; size_of::<Listing>()];
        self.memory.read(Gpa(abi::LISTING_GPA), &mut bytes)?;
        // As in `channel`.
        Listing::read_from_bytes(&bytes)
            .map_err(|_| MemoryError::OutsideRam { gpa: Gpa(abi::LISTING_GPA), len: ByteCount(0) }.into())
    }

    /// Does what a listing says.
    pub(crate) fn listed(&self, listing: &Listing) -> Result<(), Death> {
        self.balloon.listed(&self.memory, listing)?;
        if listing.what == abi::Listed::Settled as u32 {
            // As in `ended`.
            let _ = self.attention.signal();
        }
        Ok(())
    }

    /// Tells the guest how much its balloon shall have. False if it has none.
    pub(crate) fn aim(
        &self,
        bytes: ByteCount,
        piece: abi::Piece,
        finds: abi::Finds,
    ) -> Result<bool, MemoryError> {
        let Some(BalloonTarget(word)) = self.balloon.aim(bytes, piece, finds) else { return Ok(false) };
        self.channel_word(0, abi::BALLOON_OFFSET, word)?;
        locked(&self.desk).has_target = true;
        self.wake.notify_all();
        Ok(true)
    }

    /// Takes a report over.
    pub(crate) fn report(&self, vcpu: u32, report: &abi::Report) {
        if let Some(mut vcpu) = self.vcpu(vcpu) {
            vcpu.reports.take(*report);
        }
    }

    /// Sleeps at most that long, less when the machine is told to stop or the vCPU is asked for something.
    pub(crate) fn idle(&self, vcpu: u32, ns: u64) {
        let until = Instant::now() + Duration::from_nanos(ns).min(IDLE_MAX);
        let mut desk = locked(&self.desk);
        while !desk.is_stopping && !self.is_held() && !self.is_asked(vcpu) {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return };
            let woken = self.wake.wait_timeout(desk, left);
            desk = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes the answer of a probing guest over and waits until there is another command for it. None, with number 0,
    /// when the machine is told to stop or held, the balloon has a new target, or the vCPU is asked for its registers.
    pub(crate) fn next_command(&self, vcpu: u32, answer: &Probed) -> ProbeCommand {
        let mut desk = locked(&self.desk);
        if answer.number != 0 {
            desk.answers.push_back((vcpu, *answer));
            // As in `ended`.
            let _ = self.attention.signal();
        }
        loop {
            let is_out = self.is_held() || self.is_asked(vcpu);
            let is_wanted = is_out || (vcpu == 0 && std::mem::take(&mut desk.has_target));
            if desk.is_stopping || is_wanted {
                return ProbeCommand::default();
            }
            let place = desk.commands.iter().position(|(whose, _)| *whose == vcpu);
            if let Some((_, command)) = place.and_then(|place| desk.commands.remove(place)) {
                return command;
            }
            desk = self.wake.wait(desk).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has a probing guest do something once it has done what it was asked before.
    pub(crate) fn command(&self, vcpu: u32, command: ProbeCommand) {
        let mut desk = locked(&self.desk);
        desk.numbered += 1;
        let number = desk.numbered;
        desk.commands.push_back((vcpu, ProbeCommand { number, ..command }));
        self.wake.notify_all();
    }

    /// What vCPUs have answered since this was asked last.
    pub(crate) fn answers(&self) -> Vec<(u32, Probed)> {
        locked(&self.desk).answers.drain(..).collect()
    }

    /// Asks a vCPU for its registers. It answers before it enters KVM again; whoever asks gets it out.
    pub(crate) fn ask(&self, vcpu: u32) {
        let mut desk = locked(&self.desk);
        desk.told = None;
        self.asked.store(vcpu, Ordering::SeqCst);
        self.wake.notify_all();
    }

    /// Has vCPUs stand still before they enter the guest again; whoever holds gets them out.
    pub(crate) fn hold(&self) {
        let _desk = locked(&self.desk);
        self.held.store(true, Ordering::SeqCst);
        self.wake.notify_all();
    }

    fn is_held(&self) -> bool {
        self.held.load(Ordering::SeqCst)
    }

    /// Lets them go on.
    pub(crate) fn release(&self) {
        let _desk = locked(&self.desk);
        self.held.store(false, Ordering::SeqCst);
        self.wake.notify_all();
    }

    /// Whether no vCPU runs the guest or changes its memory. It stays so while the machine is held.
    pub(crate) fn stands_still(&self) -> bool {
        self.inside.load(Ordering::SeqCst) == 0
    }

    /// A vCPU is about to run the guest; `false` if the machine is held. Counted before it looks, so that whoever holds the machine and then
    /// counts sees it, or is seen.
    pub(crate) fn enter(&self) -> bool {
        self.inside.fetch_add(1, Ordering::SeqCst);
        let may = !self.is_held();
        if !may {
            self.exit();
        }
        may
    }

    /// It is out again.
    pub(crate) fn exit(&self) {
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    /// Waits where the machine is held, until it no longer is, has to go, or the vCPU is asked for its registers.
    pub(crate) fn stand(&self, vcpu: u32) {
        let mut desk = locked(&self.desk);
        while self.is_held() && !self.is_asked(vcpu) && self.going() == Going::On {
            desk = self.wake.wait_timeout(desk, STAND).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether a vCPU is asked for its registers.
    pub(crate) fn is_asked(&self, vcpu: u32) -> bool {
        self.asked.load(Ordering::SeqCst) == vcpu
    }

    /// Takes over what a vCPU that was asked says, unless nobody waits for it any more.
    pub(crate) fn tell(&self, vcpu: u32, registers: Result<Registers, String>, since: Instant) {
        let mut desk = locked(&self.desk);
        if self.asked.compare_exchange(vcpu, NOBODY, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            let stalled = since.elapsed();
            desk.told = Some(Told { registers: registers.map(Box::new), stalled });
            // As in `ended`.
            let _ = self.attention.signal();
        }
    }

    /// What the vCPU said that was asked.
    pub(crate) fn told(&self) -> Option<Told> {
        locked(&self.desk).told.take()
    }

    /// Takes the question back.
    pub(crate) fn no_longer_ask(&self) {
        let mut desk = locked(&self.desk);
        desk.told = None;
        self.asked.store(NOBODY, Ordering::SeqCst);
    }

    /// Whether a vCPU has ended, or was never there.
    pub(crate) fn has_ended(&self, vcpu: u32) -> bool {
        self.vcpu(vcpu).is_none_or(|vcpu| vcpu.end.is_some())
    }

    /// A vCPU has ended.
    pub(crate) fn ended(&self, vcpu: u32, end: End) {
        if let Some(mut vcpu) = self.vcpu(vcpu) {
            vcpu.end.get_or_insert(end);
        }
        // The main thread also looks at every report interval, so a signal that fails only delays it.
        let _ = self.attention.signal();
    }

    /// Tells the guest to stop.
    pub(crate) fn stop(&self, word: u64) -> Result<(), MemoryError> {
        for vcpu in 0..self.vcpus.len() {
            self.channel_word(vcpu, 0, word)?;
        }
        locked(&self.desk).is_stopping = true;
        self.wake.notify_all();
        Ok(())
    }

    /// Tells the guest that another window runs.
    pub(crate) fn window(&self, number: u64) -> Result<(), MemoryError> {
        (0..self.vcpus.len()).try_for_each(|vcpu| self.channel_word(vcpu, 8, number))
    }

    /// Writes one of the VMM's words of a channel page, which is pinned for life.
    fn channel_word(&self, vcpu: usize, offset: u64, value: u64) -> Result<(), MemoryError> {
        let base = abi::channel_gpa(u32::try_from(vcpu).unwrap_or(u32::MAX));
        self.memory.write_u64(Gpa(base.saturating_add(offset)), value)
    }

    /// Tells the vCPU threads to leave without the guest's consent.
    pub(crate) fn leave(&self) {
        self.leaving.store(true, Ordering::SeqCst);
    }

    /// Whether a vCPU thread may run the guest.
    pub(crate) fn going(&self) -> Going {
        if self.leaving.load(Ordering::SeqCst) { Going::Leaving } else { Going::On }
    }

    /// The poisoned page some thread stumbled over, if it is one of this machine's.
    pub(crate) fn poisoned(&self) -> Option<Death> {
        let gpa = self.memory.gpa_of(signals::poisoned_after(self.touches_before)?)?;
        Some(Death::Poisoned { gpa: Gpa(gpa.0 - gpa.0 % PAGE_SIZE as u64) })
    }

    /// How many vCPUs it has.
    pub(crate) fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// vCPUs that have not ended.
    pub(crate) fn running(&self) -> usize {
        self.vcpus.iter().filter(|vcpu| locked(vcpu).end.is_none()).count()
    }

    /// The first vCPU that died, and why.
    pub(crate) fn death(&self) -> Option<(u32, String)> {
        self.vcpus.iter().zip(0..).find_map(|(vcpu, index)| match &locked(vcpu).end {
            Some(End::Died(death)) => Some((index, explain(death))),
            _ => None,
        })
    }

    /// What all vCPUs say.
    pub(crate) fn summary(&self) -> Summary {
        let reports: Vec<_> = self.vcpus.iter().map(|vcpu| locked(vcpu).reports.clone()).collect();
        let ballooned_bytes = self.balloon.ballooned().0;
        Summary { ballooned_bytes, ..report::summarise(&reports, self.tsc_hz) }
    }
}
