//! Process ids: foreign numbers enter, and what leaves can be given to the kernel without meaning something else
//! (0 is "myself" or "my group" to many calls, a negative number a whole group). No process is touched here.

use core::{fmt, num::NonZeroI32};
use rustix::process::Pid;

/// The id of one process, positive. It is a name, not a hold: the process may be gone and the number reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(NonZeroI32);

impl ProcessId {
    /// The process of that number, or `None` where no process can have it.
    pub const fn new(number: u32) -> Option<Self> {
        if number > i32::MAX.cast_unsigned() {
            return None;
        }
        match NonZeroI32::new(number.cast_signed()) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// This process.
    pub fn own() -> Self {
        Self::from(rustix::process::getpid())
    }

    /// This process's parent at the moment, or `None` if it lives outside this process-id namespace.
    pub fn parent() -> Option<Self> {
        rustix::process::getppid().map(Self::from)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get().cast_unsigned()
    }

    /// The number as the C interfaces take it.
    pub(crate) const fn as_raw(self) -> i32 {
        self.0.get()
    }

    pub(crate) fn to_rustix(self) -> Option<Pid> {
        Pid::from_raw(self.0.get())
    }
}

impl From<Pid> for ProcessId {
    fn from(pid: Pid) -> Self {
        Self(pid.as_raw_nonzero())
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_with_a_special_meaning_are_not_processes() {
        assert_eq!(ProcessId::new(0), None);
        assert_eq!(ProcessId::new(u32::MAX), None);
        assert_eq!(ProcessId::new(42).map(ProcessId::get), Some(42));
        assert_eq!(ProcessId::own().get(), std::process::id());
    }
}
