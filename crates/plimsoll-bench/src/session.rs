//! What all benchmarks share: how one ends early, and the clocks.
//!
//! Enters: signals and work to time. Leaves: errors that say which exit status they are, and times. What must never
//! happen: a signal ending the program while something made for the benchmark is still there; so signals only set a
//! flag, and whoever sees it returns through the destructors.
use anyhow::Context;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Why a benchmark gave no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// The machine lacks something, or has something in the way.
    #[error("cannot be measured here: {0}")]
    NotHere(String),
    /// A signal came.
    #[error("interrupted; what was made for the benchmark is removed")]
    Interrupted,
    /// Something went wrong.
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// A signal that asks for the end sets it.
#[derive(Clone)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on the program ends only where it looks at this.
    pub(crate) fn install() -> anyhow::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP]
        {
            signal_hook::flag::register(signal, Arc::clone(&flag)).context("cannot catch signals")?;
        }
        Ok(Self(flag))
    }

    /// An error once a signal came.
    pub(crate) fn check(&self) -> Result<(), BenchError> {
        if self.0.load(Ordering::Relaxed) { Err(BenchError::Interrupted) } else { Ok(()) }
    }
}

/// Keeps other benchmarks from running on this host until it is dropped or the process ends: the pages of one would go to
/// the swap device of the other.
pub(crate) struct OnlyOne {
    _name: UnixListener,
}

impl OnlyOne {
    /// Takes the name that only one process of a network namespace can have.
    pub(crate) fn here() -> Result<Self, BenchError> {
        let name = SocketAddr::from_abstract_name("plimsoll-bench").context("no name for a lock")?;
        match UnixListener::bind_addr(&name) {
            Ok(name) => Ok(Self { _name: name }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(BenchError::NotHere("another benchmark is running: wait for its end".to_owned()))
            }
            Err(error) => Err(anyhow::Error::new(error).context("cannot keep other benchmarks away").into()),
        }
    }
}

/// This thread, and every thread and process that it starts meanwhile, kept on one processor until this is dropped. A page
/// that was just made waits in a list of the processor that made it, and MADV_PAGEOUT looks into the list of its own only: on
/// another one it leaves up to 31 pages behind.
pub(crate) struct OneProcessor(CpuSet);

impl OneProcessor {
    /// The processor this thread runs on.
    pub(crate) fn here() -> anyhow::Result<Self> {
        let before = sched_getaffinity(None).context("cannot see which processors there are")?;
        let mut here = CpuSet::new();
        here.set(sched_getcpu());
        sched_setaffinity(None, &here).context("cannot stay on one processor")?;
        Ok(Self(before))
    }
}

impl Drop for OneProcessor {
    fn drop(&mut self) {
        // They were allowed before.
        let _ = sched_setaffinity(None, &self.0);
    }
}

/// How long something took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Elapsed {
    /// By the wall clock.
    pub(crate) seconds: f64,
    /// User and system time of this thread.
    pub(crate) cpu_seconds: f64,
}

/// Times one piece of work on this thread.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Elapsed) {
    let (cpu, start) = (cpu_seconds(ClockId::ThreadCPUTime), Instant::now());
    let done = work();
    let seconds = start.elapsed().as_secs_f64();
    (done, Elapsed { seconds, cpu_seconds: cpu_seconds(ClockId::ThreadCPUTime) - cpu })
}

/// User and system time of this process so far.
pub(crate) fn process_cpu_seconds() -> f64 {
    cpu_seconds(ClockId::ProcessCPUTime)
}

fn cpu_seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    #[expect(clippy::cast_precision_loss, reason = "2^53 seconds of CPU time are not reached")]
    let whole = time.tv_sec as f64;
    #[expect(clippy::cast_precision_loss, reason = "below 10^9")]
    let part = time.tv_nsec as f64;
    whole + part / 1e9
}
