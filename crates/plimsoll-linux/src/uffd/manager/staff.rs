//! The threads of a manager that are of no machine: governor, housekeeper, and the disk's.
//!
//! Enters: a meter. Leaves: threads that work until they are dismissed, all of them or none.
use super::{AdmitError, Manager, Meter};
use crate::dense::Zstd;
use crate::uffd::allowance::WHOLE_PPM;
use crate::uffd::governor::govern;
use crate::uffd::{housekeeper, parking};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What a thread does, and what it is called.
type Job = (&'static str, Box<dyn FnOnce() + Send>);

impl Manager {
    /// Starts looking at what the kernel counts, every few milliseconds, has machines sampled every `sample_period`, and
    /// starts the housekeeper. Pages are stored ahead of demand within one processor from then on; see
    /// [`Host::limit_storing`](crate::uffd::host::Host::limit_storing).
    ///
    /// # Errors
    /// [`AdmitError::Thread`].
    pub fn govern(&mut self, meter: Box<dyn Meter>, sample_period: Duration) -> Result<(), AdmitError> {
        self.host.limit_storing(WHOLE_PPM);
        let stop = Arc::new(AtomicBool::new(false));
        let zstd = Zstd::new().map_err(AdmitError::Codec)?;
        let mut jobs: Vec<Job> = Vec::new();
        let (host, governed, stopped) =
            (Arc::clone(&self.host), Arc::clone(&self.governed), Arc::clone(&stop));
        jobs.push(("governor", Box::new(move || govern(&host, &governed, meter, sample_period, &stopped))));
        let (host, governed, stopped) =
            (Arc::clone(&self.host), Arc::clone(&self.governed), Arc::clone(&stop));
        let (tended, how) = (Arc::clone(&self.tended), self.housekeeping);
        let keep = move || housekeeper::keep(&host, &governed, &tended, how, zstd, &stopped);
        jobs.push(("housekeeper", Box::new(keep)));
        if let Some(tier) = self.tier().cloned() {
            let (host, governed, stopped) =
                (Arc::clone(&self.host), Arc::clone(&self.governed), Arc::clone(&stop));
            let tended = Arc::clone(&self.tended);
            let keep = move || parking::keep(&host, &governed, &tended, tier, &stopped);
            jobs.push(("disk", Box::new(keep)));
        }
        let (_, staff) = self.staff.insert((Arc::clone(&stop), Vec::new()));
        for (name, job) in jobs {
            match std::thread::Builder::new().name(name.to_owned()).spawn(job) {
                Ok(thread) => staff.push(thread),
                Err(error) => {
                    self.dismiss_staff();
                    return Err(AdmitError::Thread(error));
                }
            }
        }
        Ok(())
    }

    /// Stops them, and waits for them.
    pub(super) fn dismiss_staff(&mut self) {
        let Some((stop, threads)) = self.staff.take() else { return };
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
