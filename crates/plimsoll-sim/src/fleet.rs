//! All hosts, on any number of threads.
//!
//! Enters: a scenario. Leaves: a report, the same whatever the number of threads: hosts share nothing once machines are
//! placed, and their records are added in the order of the hosts. Or one host of it, whose every decision is shown.
use crate::host::{Host, LONGEST, Witness};
use crate::machine::Class;
use crate::placement::{Loaded, place};
use crate::record::HostRecord;
use crate::report::Report;
use crate::scenario::Scenario;
use crate::time::Millis;
use plimsoll_policy::settings::SettingsError;
use plimsoll_policy::tree::Tree;
use plimsoll_types::MachineId;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::thread;

/// How it is simulated, which changes nothing about what comes of it but how exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads.
    pub threads: NonZeroUsize,
    /// The longest step; [`crate::host::SECOND`] decides each second, as the daemon does.
    pub longest: Millis,
}

impl Default for Options {
    /// As many threads as there are processors, and steps of up to [`LONGEST`].
    fn default() -> Self {
        let threads = thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Self { threads, longest: LONGEST }
    }
}

/// Simulates a scenario; `on_host` is called whenever a host is done, from any thread.
///
/// # Errors
/// Settings that contradict each other, which a scenario that was read from a file has none of.
pub fn run(
    scenario: &Scenario,
    options: Options,
    on_host: &(dyn Fn() + Sync),
) -> Result<Report, SettingsError> {
    let placements = place(scenario)?;
    let todo = Mutex::new(placements.hosts.into_iter().enumerate());
    let next = || todo.lock().ok()?.next();
    let work = || {
        let mut records = Vec::new();
        while let Some((index, Loaded { tree, placed, .. })) = next() {
            records.push(Host::new(scenario, index, tree, &placed).run(options.longest, &mut |_, _, _| {}));
            on_host();
        }
        records
    };
    let mut records: Vec<HostRecord> = thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads.get()).map(|_| scope.spawn(work)).collect();
        // A thread that panicked has said why: the panic goes on here.
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    records.sort_unstable_by_key(|record| record.host);
    Ok(Report::of(scenario, &records, &placements.unplaced))
}

/// One host with its machines on it, before anything happens.
pub struct Stage<'a> {
    scenario: &'a Scenario,
    index: usize,
    loaded: Loaded,
}

impl<'a> Stage<'a> {
    /// The host of that number, from 0; `None` if the scenario has no such host.
    ///
    /// # Errors
    /// As [`run`].
    pub fn of(scenario: &'a Scenario, index: usize) -> Result<Option<Self>, SettingsError> {
        let loaded = place(scenario)?.hosts.into_iter().nth(index);
        Ok(loaded.map(|loaded| Self { scenario, index, loaded }))
    }

    /// Its settings.
    pub const fn tree(&self) -> &Tree {
        &self.loaded.tree
    }

    /// Its machines, in the order of their numbers, which begin at 1 on a scenario's first host.
    pub fn machines(&self) -> impl Iterator<Item = (MachineId, &'a Class)> {
        self.loaded.placed.iter().map(|placed| (placed.id, &self.scenario.classes[placed.class]))
    }

    /// Simulates it to the end of the scenario, in steps of at most `longest`, and shows each decision.
    pub fn run(self, longest: Millis, witness: Witness<'_>) {
        let Self { scenario, index, loaded } = self;
        Host::new(scenario, index, loaded.tree, &loaded.placed).run(longest, witness);
    }
}

impl std::fmt::Debug for Stage<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let machines = self.loaded.placed.len();
        f.debug_struct("Stage")
            .field("index", &self.index)
            .field("machines", &machines)
            .finish_non_exhaustive()
    }
}
