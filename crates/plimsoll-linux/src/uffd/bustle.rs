//! What the pagers of a host do, counted, so that whoever looks after machines may leave a thousand idle ones alone.
//!
//! Enters: a word of each pager that did something. Leaves: counts that two looks compare, and a call for whoever sleeps longer because
//! nothing happens. What must never happen: somebody who sleeps on although something has.
//!
//! ```text
//!   who sleeps:  awaited = true,  then looks at the counts,  sleeps if they are what they were
//!   a pager:     counts,          then looks at `awaited`,   calls everybody if it was true
//! ```
//! In the one order of all these accesses either the sleeper sees the count or the pager sees that it is awaited. A pager that is not
//! awaited counts, once a turn that did something, and reads a flag beside it.
use parking_lot::Mutex;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// See the file's head.
#[derive(Default)]
pub struct Bustle {
    /// Faults served, and pages taken for good, of all machines, by turns of pagers.
    served: AtomicU64,
    /// Pagers that have nothing left to do, ever.
    endings: AtomicU64,
    is_awaited: AtomicBool,
    sleepers: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
}

impl Bustle {
    /// `wake` is called by whatever happens first after somebody has begun to [expect](Self::expect) it. It must not wait.
    pub fn on_begin(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.sleepers.lock().push(Box::new(wake));
    }

    /// From here on, until something happens: the first thing that does calls everybody.
    pub fn expect(&self) {
        self.is_awaited.store(true, Ordering::SeqCst);
    }

    /// A pager has done something for its guest, or to it; or somebody has changed what holds for all.
    pub(super) fn count_served(&self) {
        self.served.fetch_add(1, Ordering::SeqCst);
        self.call();
    }

    /// A pager has nothing left to do: its VMM has ended, or is alone with its memory. What it has said of that before is seen by
    /// whoever sees the number change.
    pub(super) fn count_ending(&self) {
        self.endings.fetch_add(1, Ordering::SeqCst);
        self.call();
    }

    /// Something has changed that those who sleep should know.
    pub fn stir(&self) {
        self.count_served();
    }

    /// As long as this is the same, no guest has taken memory or lost any. What is stored may be packed, moved and sampled meanwhile.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::SeqCst)
    }

    /// How many pagers have had nothing left to do. As long as this is the same, no machine has gone.
    pub fn endings(&self) -> u64 {
        self.endings.load(Ordering::SeqCst)
    }

    /// Both together: as long as this is the same, nothing has happened at all.
    pub(super) fn count(&self) -> u64 {
        self.served().wrapping_add(self.endings())
    }

    fn call(&self) {
        if self.is_awaited.load(Ordering::SeqCst) && self.is_awaited.swap(false, Ordering::SeqCst) {
            self.sleepers.lock().iter().for_each(|wake| wake());
        }
    }
}

impl fmt::Debug for Bustle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (served, endings) = (self.served(), self.endings());
        f.debug_struct("Bustle").field("served", &served).field("endings", &endings).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn whoever_waits_for_something_to_happen_is_called_once_by_the_first_thing_that_does() {
        let (bustle, calls) = (Bustle::default(), Arc::new(AtomicU64::new(0)));
        for _ in 0..2 {
            let calls = Arc::clone(&calls);
            bustle.on_begin(move || _ = calls.fetch_add(1, Ordering::Relaxed));
        }
        bustle.count_served();
        assert_eq!(calls.load(Ordering::Relaxed), 0, "nobody waits");
        bustle.expect();
        bustle.count_ending();
        bustle.count_served();
        assert_eq!(calls.load(Ordering::Relaxed), 2, "both, once");
        bustle.expect();
        bustle.stir();
        assert_eq!(calls.load(Ordering::Relaxed), 4);
        assert_eq!((bustle.served(), bustle.endings(), bustle.count()), (3, 1, 4));
    }

    #[test]
    fn nothing_happens_between_a_look_and_a_sleep_without_a_call() {
        const ROUNDS: u64 = 20_000;
        const PATIENCE: Duration = Duration::from_secs(120);
        let bustle = Bustle::default();
        let ((say, called), (go, gone), (end, ended)) = (channel(), channel(), channel());
        bustle.on_begin(move || say.send(()).unwrap());
        let bustle = &bustle;
        std::thread::scope(|threads| {
            threads.spawn(move || {
                for () in gone {
                    bustle.count_served();
                    end.send(()).unwrap();
                }
            });
            for seen in 0..ROUNDS {
                // Once, so that no later count makes up for one that nobody saw.
                go.send(()).unwrap();
                bustle.expect();
                if bustle.served() == seen {
                    called.recv_timeout(PATIENCE).unwrap();
                }
                ended.recv_timeout(PATIENCE).unwrap();
                called.try_iter().for_each(drop);
            }
            drop(go);
        });
    }
}
