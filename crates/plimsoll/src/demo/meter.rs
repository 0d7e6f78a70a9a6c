//! What the run uses, by the kernel's own counters.
//!
//! A memory cgroup over the VMMs and this process where one can be made; else a sum over /proc, which misses page
//! tables and other memory the kernel keeps for us, and says so.
use parking_lot::Mutex;
use plimsoll_linux::cgroup::{MemoryCgroup, sweep_stale};
use plimsoll_linux::explain;
use plimsoll_linux::procsum::ProcessSum;
use plimsoll_linux::uffd::manager::Meter;
use plimsoll_sys::ProcessId;
use plimsoll_types::ByteCount;
use std::sync::Arc;

/// What our control groups are called, so that a later run knows one that a killed run left behind.
pub(crate) const PREFIX: &str = "plimsoll-demo";

/// One run's accounting.
#[derive(Clone)]
pub(crate) struct Accounting {
    counter: Arc<Mutex<Counter>>,
    source: String,
}

enum Counter {
    Cgroup(MemoryCgroup),
    Processes(ProcessSum),
}

impl Accounting {
    /// Puts this process into a new control group; processes it starts from now on are in it, too.
    pub(crate) fn start() -> Result<Self, String> {
        let own = ProcessId::own();
        // Only what a killed run left is swept; that it cannot be is that run's matter, not ours.
        let _ = sweep_stale(PREFIX);
        let (counter, source) = match MemoryCgroup::create(PREFIX, own) {
            Ok(cgroup) => {
                cgroup.join_self().map_err(|error| explain(&error))?;
                (
                    Counter::Cgroup(cgroup),
                    "memory cgroup's high-water mark, VMMs and manager together".to_owned(),
                )
            }
            Err(error) => {
                let why = explain(&error);
                println!("no memory cgroup ({why}): memory is summed over /proc");
                let sum = ProcessSum::new([own]).map_err(|error| explain(&error))?;
                (Counter::Processes(sum), "sum over /proc, page tables not included".to_owned())
            }
        };
        Ok(Self { counter: Arc::new(Mutex::new(counter)), source })
    }

    /// A process started by the run.
    pub(crate) fn add(&self, pid: u32) {
        if let (Counter::Processes(sum), Some(process)) = (&mut *self.counter.lock(), ProcessId::new(pid)) {
            // One that has ended already uses nothing.
            let _ = sum.add(process);
        }
    }

    pub(crate) fn used(&self) -> ByteCount {
        match &mut *self.counter.lock() {
            Counter::Cgroup(cgroup) => cgroup.used().unwrap_or_default(),
            Counter::Processes(sum) => sum.sample().unwrap_or_default(),
        }
    }

    pub(crate) fn peak(&self) -> ByteCount {
        match &mut *self.counter.lock() {
            Counter::Cgroup(cgroup) => cgroup.peak().unwrap_or_default(),
            Counter::Processes(sum) => sum.peak(),
        }
    }

    pub(crate) fn source(&self) -> String {
        self.source.clone()
    }

    pub(crate) fn meter(&self) -> Box<dyn Meter> {
        Box::new(self.clone())
    }

    /// Leaves the control group and removes it, with what a killed run has left and was still ending when this one began.
    pub(crate) fn finish(self) -> Result<(), String> {
        // The governor that had the other reference has ended.
        let removed = match Arc::into_inner(self.counter).map(Mutex::into_inner) {
            Some(Counter::Cgroup(cgroup)) => cgroup.remove().map_err(|error| explain(&error)),
            Some(Counter::Processes(_)) | None => Ok(()),
        };
        // Afterwards: groups are looked for where this process would create one, which is not inside its own.
        let _ = sweep_stale(PREFIX);
        removed
    }
}

impl Meter for Accounting {
    fn used(&mut self) -> ByteCount {
        Accounting::used(self)
    }
}
