//! What a daemon's processes say to whoever listens.
//!
//! Enters: a line. Leaves: the same on standard error, or nothing. What must never happen: a process that holds guests' memory
//! ending, or waiting, because nobody reads what it says. The standard macros end a process whose pipe is broken, and a terminal that
//! is stopped keeps it for as long.
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fmt::Arguments;
use std::io::{Write, stderr};

/// Says a line, if that can be said at once.
pub(crate) fn say(line: Arguments<'_>) {
    let stderr = stderr();
    let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut ready, Some(&now)).is_ok() && ready[0].revents().contains(PollFlags::OUT) {
        let _ = writeln!(stderr.lock(), "{line}");
    }
}
