//! All hosts, on any number of threads.
//!
//! Enters: a scenario. Leaves: a report, the same whatever the number of threads: hosts share nothing once machines are
//! placed, and their records are added in the order of the hosts.
use crate::host::{Host, LONGEST};
use crate::placement::{Loaded, place};
use crate::record::HostRecord;
use crate::report::Report;
use crate::scenario::Scenario;
use crate::time::Millis;
use plimsoll_policy::settings::SettingsError;
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
            records.push(Host::new(scenario, index, tree, &placed).run(options.longest, &mut |_, _| {}));
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
