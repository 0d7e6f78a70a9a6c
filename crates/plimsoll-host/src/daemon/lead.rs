//! Who has a processor first while machines have no manager.
//!
//! Enters: nothing. Leaves: the niceness of a manager's threads. What must never happen: a guest whose own work waits for a manager that only
//! looks for cold pages.
//!
//! Guests whose pages are absent wait for the next manager, and those that find theirs keep it from the processors: with eight of them on
//! two, each time it slept or was interrupted on its way, 3 to 8 ms went by before it went on. So a manager puts itself ahead of them as the first
//! thing it does, and goes back a moment after machines are served, when its pagers have woken who waited. It is what the kernel weighs within
//! one control group, or one session (`sched_autogroup_enabled`): between units of systemd's, `CPUWeight=` does.
//!
//! It is the manager that does both, and not the keeper for it: a program of another version in its place, which knows nothing of this,
//! would be ahead for good. Whoever gave the daemon a niceness of its own meant it: that is left as it is.
use rustix::process::{Pid, getpriority_process, setpriority_process};
use std::io;
use std::time::{Duration, Instant};

/// The niceness of a manager that begins. The kernel gives it nine times the share of one of [`USUAL`].
const AHEAD: i32 = -10;
/// That of a process about which nobody has said anything.
const USUAL: i32 = 0;
/// How long pagers have for those who waited when they were started.
const MOMENT: Duration = Duration::from_millis(50);

/// What a manager has taken and is to give back.
#[derive(Debug)]
pub struct Lead {
    until: Option<Instant>,
}

impl Lead {
    /// Puts this thread, and those that it starts from now on, ahead of others. `None`: everything stays as it is, for want of CAP_SYS_NICE
    /// or because the daemon was given another niceness.
    pub fn take() -> Option<Self> {
        let is_usual = getpriority_process(None) == Ok(USUAL);
        (is_usual && setpriority_process(None, AHEAD).is_ok()).then_some(Self { until: None })
    }

    /// Machines are served from now on.
    pub(super) fn end_soon(&mut self) {
        self.until = Some(Instant::now() + MOMENT);
    }

    /// Puts all threads of this process that are ahead back when it is time. Where it cannot be said which there are, it is tried again.
    pub(super) fn end_if_over(lead: &mut Option<Self>) {
        let is_over =
            |lead: &mut Self| lead.until.is_some_and(|until| Instant::now() >= until) && give_back().is_ok();
        lead.take_if(is_over);
    }
}

fn give_back() -> io::Result<()> {
    // One that is ahead may have started another meanwhile.
    while step_back()? {}
    Ok(())
}

/// False where no thread was ahead.
fn step_back() -> io::Result<bool> {
    let mut found = false;
    for thread in std::fs::read_dir("/proc/self/task")? {
        let number = thread?.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        // One that has ended meanwhile has no niceness.
        found |= number.is_some_and(|number| put_back(number).unwrap_or(false));
    }
    Ok(found)
}

fn put_back(thread: Pid) -> rustix::io::Result<bool> {
    let is_ahead = getpriority_process(Some(thread))? == AHEAD;
    if is_ahead {
        setpriority_process(Some(thread), USUAL)?;
    }
    Ok(is_ahead)
}
