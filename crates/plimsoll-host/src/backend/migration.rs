//! Whether the machine is being migrated or saved, so that nothing is taken from it meanwhile.
//!
//! A migration reads all of guest RAM: what was taken comes back, and what is taken meanwhile has to be read again. So
//! while one runs nothing is taken. QEMU's own word comes over QMP, where the operator gave a socket; without one,
//! migration threads are looked for by their names, which QEMU gives them when started with `debug-threads=on`, as
//! libvirt does. An incoming machine has no such thread: it is told by QMP's run state only.
//!
//! Background snapshots are migrations to QEMU. Others (`savevm`, `snapshot-save`, `loadvm`) hold its main loop from
//! beginning to end, so that its monitor stays silent: a monitor that does not answer means that nothing is taken. Without a
//! socket they are known by who brings pages back: the main thread by the hundred, and no other, because vCPUs stand still. That
//! shows once something was brought back, so that a little may be taken at their beginning; it is read again, and nothing is wrong.
//! Disk and network that the main thread serves may look alike, and a guest can make them: so it is believed of QEMU only (in
//! Firecracker that thread serves every disk), and for a minute, after which it is not believed for another.
use plimsoll_attach::qmp::{Limits, Qmp, QmpError};
use plimsoll_attach::vmm::Vmm;
use plimsoll_sys::{ProcessId, procfs};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How QEMU names its threads that send a machine away, from 2.x to 10.
const THREADS: [&str; 6] =
    ["live_migration", "migration", "mig/src/main", "multifdsend", "mig/src/send", "bg_snapshot"];
/// Before a monitor that did not answer is asked again: it has one client at a time, and it may be somebody else's turn.
const RETRY: Duration = Duration::from_secs(10);
/// The same where nothing is taken until it answers.
const RETRY_SILENT: Duration = Duration::from_secs(1);

/// Major faults of the main thread in a [`WINDOW`] that a guest at work hardly causes. It touches a guest's memory for disk and
/// network: never for more than 20 pages in 200 ms, in a guest of 50 disk reads a second that was kept at 48 of 192 MiB. Saving
/// brought back up to 3917 in 200 ms, and 24 on a busy host.
const READ_OUT: u64 = 64;
/// What that was measured in. Longer ones are judged by their average, shorter ones wait until they are as long.
const WINDOW: Duration = Duration::from_millis(200);
/// A longer one says nothing: in its average a beginning does not show.
const WINDOW_MAX: Duration = Duration::from_secs(3);
/// One fault of others for so many of the main thread's: vCPUs run until the snapshot begins.
const OTHERS_SHARE: u64 = 16;
/// How long that is taken to go on after it was seen: pages that are in RAM are saved without faults.
const READ_OUT_LASTS: Duration = Duration::from_secs(2);
/// How long it is believed at most, and then not: a guest must not keep its memory by reading its disk.
const BELIEVED: Duration = Duration::from_secs(60);

/// What is known of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// None that is known of.
    None,
    /// Its monitor does not answer.
    Unknown,
    /// Nothing is known, but all of it seems to be read while it stands still.
    ReadOut,
    /// One is under way.
    Running,
    /// The machine runs elsewhere now.
    Completed,
}

/// Watches one machine.
#[derive(Debug)]
pub struct Watch {
    process: ProcessId,
    vmm: Vmm,
    socket: Option<PathBuf>,
    /// Set while the monitor is of no use.
    trouble: Option<Trouble>,
    read_out: ReadOut,
}

/// Major faults so far.
#[derive(Clone, Copy, Debug)]
struct Faults {
    main: u64,
    others: u64,
}

impl Faults {
    /// None of a process with one thread: that is its vCPU.
    fn of(process: ProcessId) -> Option<Self> {
        fs::read_dir(format!("/proc/{}/task", process.get())).ok()?.nth(1)?.ok()?;
        // Those of the main thread are in both: read first, they are not more than there are.
        let main = procfs::major_faults_of_first_thread(process).ok()?;
        let all = procfs::major_faults(process).ok()?;
        Some(Self { main, others: all.saturating_sub(main) })
    }

    /// Whether in that time one thread, at rest else, has had page after page brought back while all others had none.
    const fn is_read_out(self, before: Self, elapsed: Duration) -> bool {
        let (main, others) =
            (self.main.saturating_sub(before.main), self.others.saturating_sub(before.others));
        main as u128 * WINDOW.as_millis() >= READ_OUT as u128 * elapsed.as_millis()
            && others <= main / OTHERS_SHARE
    }
}

/// Whether somebody seems to read all of a machine's memory.
#[derive(Debug, Default)]
struct ReadOut {
    /// Where the window began that is under way.
    before: Option<(Instant, Faults)>,
    /// When it was seen first. Forgotten once it may be believed again.
    began: Option<Instant>,
    until: Option<Instant>,
}

impl ReadOut {
    /// Takes what was counted now, and says whether it is believed.
    fn look(&mut self, now: Instant, faults: Option<Faults>) -> bool {
        let elapsed = self.before.map(|(then, _)| now.saturating_duration_since(then));
        let is_seen = faults.zip(self.before).zip(elapsed).is_some_and(|((faults, (_, before)), elapsed)| {
            (WINDOW..=WINDOW_MAX).contains(&elapsed) && faults.is_read_out(before, elapsed)
        });
        if elapsed.is_none_or(|elapsed| elapsed >= WINDOW) {
            self.before = faults.map(|faults| (now, faults));
        }
        self.began = self.began.filter(|began| now < *began + 2 * BELIEVED);
        if is_seen {
            self.began.get_or_insert(now);
            self.until = Some(now + READ_OUT_LASTS);
        }
        self.began.is_some_and(|began| now < began + BELIEVED) && self.until.is_some_and(|until| now < until)
    }
}

#[derive(Clone, Copy, Debug)]
struct Trouble {
    retry_at: Instant,
    /// What is known meanwhile.
    phase: Phase,
}

/// What a look found, and what went wrong, once.
#[derive(Debug)]
pub struct Seen {
    /// How far it is.
    pub phase: Phase,
    /// Why QMP could not be asked.
    pub trouble: Option<QmpError>,
}

impl Watch {
    /// Watches a process, through that QMP socket if there is one.
    pub fn new(process: ProcessId, vmm: Vmm, socket: Option<PathBuf>) -> Self {
        Self { process, vmm, socket, trouble: None, read_out: ReadOut::default() }
    }

    /// True when somebody has to look often: nothing wakes this program when a migration begins.
    pub const fn is_asking(&self) -> bool {
        self.socket.is_some()
    }

    /// Looks.
    pub fn look(&mut self, now: Instant) -> Seen {
        let mut trouble = None;
        match self.ask(now) {
            Ok(Some(phase)) => {
                self.trouble = None;
                // It knows better, and what was counted before it falls silent says nothing then.
                self.read_out = ReadOut::default();
                return Seen { phase, trouble };
            }
            Ok(None) => {}
            Err(error) => {
                let is_silent = matches!(error, QmpError::Stalled { .. });
                let (wait, phase) =
                    if is_silent { (RETRY_SILENT, Phase::Unknown) } else { (RETRY, Phase::None) };
                // Asking may have taken long.
                let now = Trouble { retry_at: now.max(Instant::now()) + wait, phase };
                // Said once per loss, not with every vain attempt; of a silent one its phase says enough.
                let is_new = self.trouble.replace(now).is_none_or(|before| before.phase != phase);
                trouble = (is_new && !is_silent).then_some(error);
            }
        }
        let is_read_out = self.vmm == Vmm::Qemu
            // Asking may have taken long.
            && self.read_out.look(now.max(Instant::now()), Faults::of(self.process));
        let known = self.trouble.map_or(Phase::None, |trouble| trouble.phase);
        let phase = match known {
            _ if sends(self.process) => Phase::Running,
            Phase::None if is_read_out => Phase::ReadOut,
            known => known,
        };
        Seen { phase, trouble }
    }

    /// What QEMU says, if it can be asked now. The monitor is let go each time: whoever looks for plugged memory needs it,
    /// and so may others.
    fn ask(&self, now: Instant) -> Result<Option<Phase>, QmpError> {
        let Some(socket) =
            self.socket.as_ref().filter(|_| self.trouble.is_none_or(|trouble| now >= trouble.retry_at))
        else {
            return Ok(None);
        };
        let mut qmp = Qmp::connect(socket, Limits::default())?;
        let state = qmp.run_state()?;
        let migration = qmp.migration()?;
        Ok(Some(match (state.status.as_str(), migration) {
            ("postmigrate", _) => Phase::Completed,
            ("inmigrate" | "finish-migrate", _) => Phase::Running,
            (_, Some(migration)) if migration.is_running() => Phase::Running,
            _ => Phase::None,
        }))
    }
}

/// True when the process has a thread that sends a machine away.
fn sends(process: ProcessId) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{}/task", process.get())) else { return false };
    threads.flatten().any(|thread| {
        fs::read_to_string(thread.path().join("comm"))
            .is_ok_and(|name| THREADS.iter().any(|known| name.trim_end().starts_with(known)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Faults = Faults { main: 1000, others: 5000 };

    fn after(main: u64, others: u64) -> Faults {
        Faults { main: BEFORE.main + main, others: BEFORE.others + others }
    }

    #[test]
    fn memory_is_read_out_where_the_main_thread_alone_brings_it_back() {
        // Windows of 200 ms as they were seen: a snapshot's first, in which vCPUs ran at first, one amidst it, and a guest at work.
        // Then that guest for a second, and the least rate in windows as long as they may be.
        for (ms, main, others, is_read_out) in [
            (200, 3314, 143, true),
            (200, 733, 0, true),
            (200, 286, 232, false),
            (200, 20, 0, false),
            (200, 0, 900, false),
            (1000, 100, 3, false),
            (3000, 959, 0, false),
            (3000, 960, 0, true),
        ] {
            let is_seen = after(main, others).is_read_out(BEFORE, Duration::from_millis(ms));
            assert_eq!(is_seen, is_read_out, "{main} {others} in {ms} ms");
        }
    }

    #[test]
    fn only_windows_as_long_as_were_measured_or_a_little_longer_are_judged() {
        let start = Instant::now();
        // What a look finds, so long after the last.
        for (looks, is_seen) in [
            (&[(200, 64)][..], true),
            (&[(3000, 5000)], true),
            (&[(3001, 5000)], false),
            (&[(32_000, 100_000)], false),
            // Not before both are long enough together.
            (&[(100, 64)], false),
            (&[(100, 64), (100, 0)], true),
            (&[(100, 40), (100, 0)], false),
            // What is not judged begins the next.
            (&[(3001, 5000), (200, 64)], true),
        ] {
            let (mut read_out, mut now, mut main) = (ReadOut::default(), start, 0);
            assert!(!read_out.look(now, Some(BEFORE)));
            let mut last = false;
            for (ms, faults) in looks {
                (now, main) = (now + Duration::from_millis(*ms), main + faults);
                last = read_out.look(now, Some(after(main, 0)));
            }
            assert_eq!(last, is_seen, "{looks:?}");
        }
    }

    #[test]
    fn a_guest_that_looks_read_out_for_ever_is_spared_every_other_minute() {
        let (start, mut read_out) = (Instant::now(), ReadOut::default());
        let mut spared = [0; 4];
        for second in 0..240 {
            let faults = after(second * 1000, 0);
            let is_spared = read_out.look(start + Duration::from_secs(second), Some(faults));
            spared[usize::try_from(second / 60).unwrap()] += u32::from(is_spared);
        }
        // The first look has nothing before it.
        assert_eq!(spared, [59, 1, 59, 1]);
    }
}
