//! All machines of the run under one budget, by a thread of their own.
//!
//! Enters: machines as they boot. Leaves: what each takes. The thread looks at each machine when it is due, and while
//! together they take more than the budget asks those for pages first that have most beside what they use. What must
//! never happen: a machine that fails keeping the others from being managed.
use plimsoll_attach::{AttachLock, Held};
use plimsoll_linux::explain;
use plimsoll_linux::kernel::{KernelError, KernelMachine};
use plimsoll_linux::reclaimer::Reclaimer;
use plimsoll_linux::zram::{self, SwapCost};
use plimsoll_stock::Guest;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::{ByteCount, PageCount};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks at the sum while it is above the budget.
const STEP: Duration = Duration::from_millis(200);

/// A machine for the herd.
pub(super) struct Member {
    name: String,
    machine: KernelMachine,
    /// Nobody else attaches to it meanwhile.
    _lock: AttachLock,
}

impl Member {
    pub(super) fn new(name: String, guest: &Guest) -> Result<Self, String> {
        let failed = |error: &dyn std::error::Error| format!("{name}: {}", explain(error));
        let held = Held::open(guest.process()).map_err(|error| failed(&error))?;
        let lock = AttachLock::acquire(&held).map_err(|error| failed(&error))?;
        let process = Pidfd::open(guest.process()).map_err(|error| failed(&error))?;
        let ram = guest.ram().map_err(|error| failed(&error))?;
        let seed = u64::from(guest.process().get());
        let machine =
            KernelMachine::attach(process, ram, seed, Instant::now()).map_err(|error| failed(&error))?;
        Ok(Self { name, machine, _lock: lock })
    }
}

/// What is known of one machine.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) name: String,
    pub(super) resident: ByteCount,
    pub(super) elsewhere: ByteCount,
    pub(super) working_set: Option<ByteCount>,
    pub(super) taken: PageCount,
    pub(super) refaults: PageCount,
    pub(super) trouble: Option<String>,
}

/// What is known of all.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Host {
    pub(super) resident: ByteCount,
    pub(super) elsewhere: ByteCount,
    pub(super) compressed: ByteCount,
}

impl Host {
    pub(super) fn total(self) -> ByteCount {
        self.resident + self.compressed
    }

    pub(super) fn line(self, budget: ByteCount) -> String {
        let Self { resident, elsewhere, compressed } = self;
        format!("{} of {budget}: {resident} in RAM, {elsewhere} in swap as {compressed}", self.total())
    }
}

/// The thread, and what it knows.
pub(super) struct Herd {
    arrivals: Sender<Member>,
    shared: Arc<Mutex<Vec<Known>>>,
    thread: JoinHandle<()>,
}

impl Herd {
    pub(super) fn start(budget: ByteCount) -> Result<Self, String> {
        let (arrivals, receiver) = channel();
        let shared: Arc<Mutex<Vec<Known>>> = Arc::default();
        let kept = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("herd".to_owned())
            .spawn(move || manage(budget, &receiver, &kept))
            .map_err(|error| explain(&error))?;
        Ok(Self { arrivals, shared, thread })
    }

    /// Manages one more.
    pub(super) fn admit(&self, member: Member) {
        // A thread that has ended is found out by stop.
        let _ = self.arrivals.send(member);
    }

    pub(super) fn machines(&self) -> Vec<Known> {
        locked(&self.shared).clone()
    }

    pub(super) fn host(&self) -> Host {
        sum(&locked(&self.shared), zram::swap_cost().unwrap_or_default())
    }

    /// Leaves all machines as they are.
    pub(super) fn stop(self) -> Result<(), String> {
        drop(self.arrivals);
        self.thread.join().map_err(|_| "the thread that manages the guests ended with a panic".to_owned())
    }
}

fn locked(known: &Mutex<Vec<Known>>) -> MutexGuard<'_, Vec<Known>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sum(machines: &[Known], cost: SwapCost) -> Host {
    let resident = machines.iter().map(|machine| machine.resident).sum();
    let elsewhere: ByteCount = machines.iter().map(|machine| machine.elsewhere).sum();
    Host { resident, elsewhere, compressed: cost.of(elsewhere) }
}

fn manage(budget: ByteCount, arrivals: &Receiver<Member>, shared: &Mutex<Vec<Known>>) {
    let mut members: Vec<Member> = Vec::new();
    loop {
        match arrivals.recv_timeout(STEP) {
            Ok(member) => {
                locked(shared).push(Known { name: member.name.clone(), ..Known::default() });
                members.push(member);
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        for (place, member) in members.iter_mut().enumerate() {
            let seen = look(&mut member.machine);
            note(shared, place, &member.machine, seen);
        }
        squeeze(budget, &mut members, shared);
    }
}

fn look(machine: &mut KernelMachine) -> Result<(ByteCount, ByteCount), KernelError> {
    let now = Instant::now();
    if now >= machine.due() {
        machine.tick(now)?;
    }
    let usage = machine.usage()?;
    Ok((usage.resident.bytes(), usage.elsewhere.bytes()))
}

fn note(
    shared: &Mutex<Vec<Known>>,
    place: usize,
    machine: &KernelMachine,
    seen: Result<(ByteCount, ByteCount), KernelError>,
) {
    let mut all = locked(shared);
    let Some(known) = all.get_mut(place) else { return };
    match seen {
        Ok((resident, elsewhere)) => (known.resident, known.elsewhere) = (resident, elsewhere),
        Err(error) => {
            (known.resident, known.elsewhere) = Default::default();
            known.trouble.get_or_insert_with(|| explain(&error));
        }
    }
    known.working_set = machine.working_set().map(PageCount::bytes);
    (known.taken, known.refaults) = (machine.totals().taken, machine.totals().refaults);
}

/// Asks the machines for pages until what all take is within the budget: first for what they have beside what they use,
/// whoever has most of it first; then, if that is not enough, for more, whoever has most in RAM first.
fn squeeze(budget: ByteCount, members: &mut [Member], shared: &Mutex<Vec<Known>>) {
    let beside_use = |known: &Known| known.resident.saturating_sub(known.working_set.unwrap_or_default());
    let all = |known: &Known| known.resident;
    let cost = zram::swap_cost().unwrap_or_default();
    for spare in [beside_use as fn(&Known) -> ByteCount, all] {
        let mut order: Vec<(ByteCount, usize)> =
            locked(shared).iter().enumerate().map(|(place, known)| (spare(known), place)).collect();
        order.sort_unstable_by(|one, other| other.cmp(one));
        for (spare, place) in order {
            let over = sum(&locked(shared), cost).total().saturating_sub(budget);
            let Some(member) = members.get_mut(place).filter(|_| over.0 > 0) else { return };
            let want = cost.to_free(over).min(spare.pages_ceil());
            let got = member.machine.reclaim(want, Instant::now()).map(drop);
            let seen = got.and_then(|()| look(&mut member.machine));
            note(shared, place, &member.machine, seen);
        }
    }
}
