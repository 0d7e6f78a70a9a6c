//! Probes that hold a pager at a step, or end all pagers as a crash of their manager would.
use crate::fleet::PATIENCE;
use plimsoll_linux::uffd::probe::{Killed, Probe, Step};
use plimsoll_types::MachineId;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

/// The machine whose pager runs on this thread. A probe is not told; threads are named.
fn machine_here() -> Option<MachineId> {
    let thread = std::thread::current();
    thread.name()?.strip_prefix("pager-")?.parse().ok().map(MachineId)
}

/// Holds one pager at one step until it is let go.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum GateState {
    #[default]
    Open,
    /// So many of the steps were passed.
    Armed {
        machine: MachineId,
        passed: usize,
        path: Vec<Step>,
    },
    Held,
}

impl Gate {
    /// Has the machine's pager held at the last of these steps, when it comes there by the others without any between.
    pub(crate) fn arm(&self, machine: MachineId, path: &[Step]) {
        *self.state.lock().unwrap() = GateState::Armed { machine, passed: 0, path: path.to_vec() };
    }

    pub(crate) fn is_holding(&self) -> bool {
        *self.state.lock().unwrap() == GateState::Held
    }

    pub(crate) fn open(&self) {
        *self.state.lock().unwrap() = GateState::Open;
        self.changed.notify_all();
    }
}

impl Probe for Gate {
    fn reached(&self, step: Step) -> Result<(), Killed> {
        let mut state = self.state.lock().unwrap();
        let GateState::Armed { machine, passed, path } = &mut *state else { return Ok(()) };
        if machine_here() != Some(*machine) {
            return Ok(());
        }
        *passed = if path[*passed] == step { *passed + 1 } else { usize::from(path[0] == step) };
        if *passed == path.len() {
            *state = GateState::Held;
            // Not for ever: a test that failed meanwhile has to end, too.
            let held = |state: &mut GateState| *state == GateState::Held;
            drop(self.changed.wait_timeout_while(state, PATIENCE, held).unwrap());
        }
        Ok(())
    }
}

/// Ends the first pager that passes a step for the n-th time, and then every other pager where it is.
pub(crate) struct Crash {
    step: Step,
    left: AtomicU64,
    happened: AtomicBool,
    /// The machine, or its shards, that gives pages back. A discard whose event was read and not applied is lost with the manager by
    /// design (see `plimsoll_linux::uffd::recovery`), so its pager does not die between the two.
    discards: Vec<MachineId>,
}

impl Crash {
    pub(crate) fn new(step: Step, nth: u64, discards: Vec<MachineId>) -> Self {
        Self { step, left: AtomicU64::new(nth), happened: AtomicBool::new(false), discards }
    }

    pub(crate) fn happened(&self) -> bool {
        self.happened.load(Ordering::SeqCst)
    }
}

impl Probe for Crash {
    fn reached(&self, step: Step) -> Result<(), Killed> {
        let spared = matches!(step, Step::EventsRead | Step::DiscardApplied);
        if spared && machine_here().is_some_and(|here| self.discards.contains(&here)) {
            return Ok(());
        }
        let due = || step == self.step && self.left.fetch_sub(1, Ordering::SeqCst) == 1;
        if self.happened() || due() {
            self.happened.store(true, Ordering::SeqCst);
            return Err(Killed { step });
        }
        Ok(())
    }
}
