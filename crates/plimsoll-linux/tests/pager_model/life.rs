//! The life of one manager: when it is killed, and where it is held up. Also the flaws that the tests of the test add.
use super::kernel::{Kernel, point};
use plimsoll_linux::uffd::probe::{Killed, Probe, Step};
use shuttle::rand::{Rng, thread_rng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Kills so far in this process, by step: the runs must have killed at every one.
pub(crate) static KILLS: [AtomicU64; Step::ALL.len()] = [const { AtomicU64::new(0) }; Step::ALL.len()];
/// Kills in the middle of a call.
pub(crate) static KILLS_IN_CALLS: AtomicU64 = AtomicU64::new(0);

/// A deliberate mistake that the checks must notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// None: what ships.
    None,
    /// The agent reports pages as moved although the move was refused.
    RefusalsHidden,
    /// Discards reach the pager a read later than the faults that came with them; whoever discards goes on.
    DiscardsLate,
    /// The new manager does not wait for the agent's answers, and so not for what the old one queued.
    NoBarrier,
    /// The new manager drops discards that were waiting to be read.
    DrainedDiscardsDropped,
    /// An install that found a discard under way reports that it was done.
    AgainHidden,
    /// The new manager takes nobody's word: it starts with fresh ones.
    WordsForgotten,
    /// Slot pages are reported empty when the new manager looks.
    AirlockOverlooked,
    /// The agent reports memory as registered that is not.
    WatchUndone,
    /// Registering does not wait for discards nobody hears of.
    WatchHasty,
    /// The new manager does not register what was left to the kernel.
    TakeOverUnwatched,
    /// The agent reports pages as moved back although the move was refused.
    ReturnsHidden,
}

/// When a manager is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Not at all.
    Lives,
    /// When it has been at the step that often.
    DiesAt(Step, u32),
    /// In its so-many-th call to the kernel.
    DiesIn(u32),
}

/// One manager, that is: one process with a pager thread for each machine.
pub(crate) struct Life {
    is_alive: AtomicBool,
    fate: Fate,
    /// Steps or calls until it dies.
    left: AtomicU32,
    /// Where everybody else may run for long.
    held_up: Option<Step>,
    machines: Vec<Arc<Kernel>>,
}

impl Life {
    /// A manager that has just started.
    pub(crate) fn new(fate: Fate, held_up: Option<Step>, machines: Vec<Arc<Kernel>>) -> Self {
        let left = match fate {
            Fate::Lives => u32::MAX,
            Fate::DiesAt(_, count) | Fate::DiesIn(count) => count,
        };
        Self { is_alive: AtomicBool::new(true), fate, left: AtomicU32::new(left), held_up, machines }
    }

    /// False once it was killed.
    pub(crate) fn is_alive(&self) -> bool {
        self.is_alive.load(Ordering::Relaxed)
    }

    /// Nothing kills it any more.
    pub(crate) fn spare(&self) {
        self.left.store(u32::MAX, Ordering::Relaxed);
    }

    fn die(&self) {
        self.is_alive.store(false, Ordering::Relaxed);
        self.machines.iter().for_each(|kernel| kernel.ring());
    }

    /// Counts a call to the kernel. True if the manager is to die in it.
    pub(crate) fn dies_in_call(&self) -> bool {
        matches!(self.fate, Fate::DiesIn(_)) && self.left.fetch_sub(1, Ordering::Relaxed) == 1
    }

    /// Dies in a call.
    pub(crate) fn die_in_call(&self) {
        KILLS_IN_CALLS.fetch_add(1, Ordering::Relaxed);
        self.die();
    }
}

/// Lets a host's probe outlive and watch one [`Life`].
pub(crate) struct Watch(pub(crate) Arc<Life>);

impl Probe for Watch {
    fn reached(&self, step: Step) -> Result<(), Killed> {
        let life = &self.0;
        let turns = if life.held_up == Some(step) { thread_rng().gen_range(5..40) } else { 1 };
        (0..turns).for_each(|_| if turns == 1 { point() } else { shuttle::thread::yield_now() });
        if !life.is_alive() {
            return Err(Killed { step });
        }
        if matches!(life.fate, Fate::DiesAt(at, _) if at == step)
            && life.left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            KILLS[step as usize].fetch_add(1, Ordering::Relaxed);
            life.die();
            return Err(Killed { step });
        }
        Ok(())
    }
}
