//! What is done to the manager from inside and from outside: crashes and delays at its steps, readers of guest memory,
//! memory that somebody else seems to use.
//!
//! Enters: orders of the session. Leaves: pagers that stop on the spot, moves that are refused, a counter that reads
//! more than is used. What must never happen: a reader that outlives its guest, or keeps the guest's memory in use.
use crate::demo::meter::Accounting;
use parking_lot::Mutex;
use plimsoll_guest::random::{Rng, hash3, scale};
use plimsoll_linux::uffd::linux_space::Custody;
use plimsoll_linux::uffd::manager::Meter;
use plimsoll_linux::uffd::probe::{Killed, Probe, Step};
use plimsoll_sys::process_memory;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most pages read at once: all of them are pinned until the last has been read.
const READ_PAGES_MAX: usize = 64;
/// Up to here a delay is spent spinning, as an interrupt would; beyond it asleep, as when others have the CPU.
const SPIN_MAX: Duration = Duration::from_micros(50);

/// A crash that was ordered.
#[derive(Clone, Copy, Debug)]
struct Order {
    step: Step,
    left: u64,
}

/// Watches the pagers of one manager.
pub(super) struct Saboteur {
    seed: u64,
    order: Mutex<Option<Order>>,
    is_dead: AtomicBool,
    reached: AtomicU64,
    delays: Arc<Delays>,
}

/// How pagers are held up; outlives a manager.
#[derive(Debug, Default)]
pub(super) struct Delays {
    permille: AtomicU64,
    longest_us: AtomicU64,
}

impl Delays {
    pub(super) fn set(&self, permille: u64, longest_us: u64) {
        self.longest_us.store(longest_us, Ordering::Relaxed);
        self.permille.store(permille, Ordering::Relaxed);
    }
}

impl Saboteur {
    pub(super) fn new(seed: u64, delays: Arc<Delays>) -> Self {
        Self {
            seed,
            order: Mutex::new(None),
            is_dead: AtomicBool::new(false),
            reached: AtomicU64::new(0),
            delays,
        }
    }

    /// Has all pagers die once one has passed `step` `after` times more.
    pub(super) fn crash_at(&self, step: Step, after: u64) {
        *self.order.lock() = Some(Order { step, left: after });
    }

    /// Whether they did.
    pub(super) fn has_struck(&self) -> bool {
        self.is_dead.load(Ordering::Relaxed)
    }

    fn delay(&self, step: Step) {
        let permille = self.delays.permille.load(Ordering::Relaxed);
        if permille == 0 {
            return;
        }
        let word = hash3(self.seed, self.reached.fetch_add(1, Ordering::Relaxed), step as u64);
        if scale(word, 1000) >= permille {
            return;
        }
        let longest_us = self.delays.longest_us.load(Ordering::Relaxed);
        let delay = Duration::from_micros(hash3(word, 0, 0) % (longest_us + 1));
        match delay {
            delay if delay.is_zero() => std::thread::yield_now(),
            delay if delay <= SPIN_MAX => {
                let start = Instant::now();
                while start.elapsed() < delay {
                    std::hint::spin_loop();
                }
            }
            delay => std::thread::sleep(delay),
        }
    }
}

impl Probe for Saboteur {
    fn reached(&self, step: Step) -> Result<(), Killed> {
        if let Some(order) = &mut *self.order.lock()
            && order.step == step
        {
            match order.left.checked_sub(1) {
                Some(left) => order.left = left,
                None => self.is_dead.store(true, Ordering::Relaxed),
            }
        }
        if self.has_struck() {
            return Err(Killed { step });
        }
        self.delay(step);
        Ok(())
    }
}

/// A thread that reads a guest's memory again and again from outside, as a debugger or a backup would. The kernel pins
/// what it reads, so moves of those pages are refused; what is absent is brought back for it as for the guest.
pub(super) struct Reader {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Reader {
    /// Starts reading. Only numbers are taken from the custody: a reader that waits for a page of a killed guest is
    /// let go by the end of the custody, so it must not hold it.
    pub(super) fn start(custody: &Custody, seed: u64) -> Result<Self, String> {
        let process = custody.process();
        let regions = custody.hello.layout.regions().iter().zip(&custody.hello.hvas);
        let ranges: Vec<HvaRange> =
            regions.filter_map(|(region, hva)| HvaRange::new(*hva, region.bytes)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("reader".to_owned())
            .spawn(move || read(process, &ranges, Rng::new(seed), &stopped))
            .map_err(|error| format!("no thread to read with: {error}"))?;
        Ok(Self { stop, thread })
    }

    /// Has it end after the read at hand.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether waiting for its end takes no time.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for its end and returns how many pages it has read. While the guest is managed or gone for good, that
    /// is soon.
    pub(super) fn join(self) -> u64 {
        self.stop();
        self.thread.join().unwrap_or(0)
    }
}

fn read(process: ProcessId, ranges: &[HvaRange], mut rng: Rng, stop: &AtomicBool) -> u64 {
    let mut buffer = vec![0; PAGE_SIZE * READ_PAGES_MAX];
    let mut pages_read = 0;
    while !stop.load(Ordering::Relaxed) {
        let Some(range) = usize::try_from(rng.below(ranges.len() as u64)).ok().and_then(|at| ranges.get(at))
        else {
            break;
        };
        let pages = range.len().pages_floor().0;
        let want = (1 + rng.below(READ_PAGES_MAX as u64)).min(pages);
        let first = rng.below(pages - want + 1);
        let at = Hva(range.start().0 + first * PAGE_SIZE as u64);
        let Some(bytes) = usize::try_from(want).ok().and_then(|want| buffer.get_mut(..want * PAGE_SIZE))
        else {
            break;
        };
        let transfer = process_memory::read(process, at, bytes);
        pages_read += transfer.done.pages_floor().0;
        if transfer.stop.is_some() {
            // The process is gone or going.
            break;
        }
    }
    pages_read
}

/// The run's own counter, and what somebody else seems to use beside it.
pub(super) struct Pressure {
    pub(super) accounting: Accounting,
    pub(super) phantom_bytes: Arc<AtomicU64>,
}

impl Meter for Pressure {
    fn used(&mut self) -> ByteCount {
        self.accounting.used() + ByteCount(self.phantom_bytes.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_pagers_die_once_the_step_was_passed_often_enough() {
        let saboteur = Saboteur::new(1, Arc::default());
        saboteur.crash_at(Step::Moved, 2);
        for _ in 0..2 {
            saboteur.reached(Step::Moved).unwrap();
            saboteur.reached(Step::Copied).unwrap();
        }
        assert!(!saboteur.has_struck());
        assert_eq!(saboteur.reached(Step::Moved), Err(Killed { step: Step::Moved }));
        assert_eq!(saboteur.reached(Step::Copied), Err(Killed { step: Step::Copied }), "another pager");
        assert!(saboteur.has_struck());
    }
}
