//! Who has a processor first while machines have no manager.
//!
//! Enters: nothing. Leaves: the niceness of this process's threads. What must never happen: a guest whose own work waits for a manager that only
//! looks for cold pages.
//!
//! Guests whose pages are absent wait for the next manager, and those that find theirs keep it from the processors: with eight of them on
//! two, each time it slept or was interrupted on its way, 3 to 8 ms went by before it went on. So the keeper, which hardly ever works, is ahead of
//! them, a manager begins so, and goes back to its place when machines are served. It is what the kernel weighs within one control group, or one
//! session (`sched_autogroup_enabled`): between units of systemd's, `CPUWeight=` does.
//!
//! Whoever gave the daemon a niceness of its own meant it: that is left as it is.
use rustix::io;
use rustix::process::{Pid, getpriority_process, setpriority_process};

/// The niceness of a keeper, and of a manager that begins. The kernel gives it nine times the share of one of [`USUAL`].
const AHEAD: i32 = -10;
/// That of a process about which nobody has said anything.
const USUAL: i32 = 0;

/// Puts this thread, and those and programs that it starts from now on, ahead of others. Without CAP_SYS_NICE everything stays as it is.
pub(super) fn take() {
    if getpriority_process(None) == Ok(USUAL) {
        let _ = setpriority_process(None, AHEAD);
    }
}

/// Puts all threads of this process that are [ahead](take) back.
///
/// # Errors
/// When it cannot be said which threads there are. They go on as they are.
pub(super) fn give_back() -> std::io::Result<()> {
    // One that is ahead may have started another meanwhile.
    while step_back()? {}
    Ok(())
}

/// False where no thread was ahead.
fn step_back() -> std::io::Result<bool> {
    let mut found = false;
    for thread in std::fs::read_dir("/proc/self/task")? {
        let number = thread?.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        // One that has ended meanwhile has no niceness.
        found |= number.is_some_and(|number| put_back(number) == Ok(true));
    }
    Ok(found)
}

fn put_back(thread: Pid) -> io::Result<bool> {
    let is_ahead = getpriority_process(Some(thread))? == AHEAD;
    if is_ahead {
        setpriority_process(Some(thread), USUAL)?;
    }
    Ok(is_ahead)
}
