//! Pressure stall information: text enters, shares of time leave. A kernel that does not measure it (`psi=0`, or built
//! without) is told apart from one that measured none.
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The whole host's file.
pub const HOST_MEMORY: &str = "/proc/pressure/memory";

/// Longer than two lines of four numbers.
const TEXT_MAX: usize = 512;

/// A pressure file could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PsiError {
    /// The kernel does not measure pressure.
    #[error("{0:?} tells nothing: boot with psi=1 to have memory pressure measured")]
    Off(PathBuf),
    /// The text is not that of a pressure file.
    #[error("{path:?} holds {found:?}, which is not a line of a pressure file")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is in it.
        found: String,
    },
    /// Something else failed.
    #[error("cannot read {path:?}")]
    Other {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A share of time, in 1/10,000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeShare(pub u32);

/// Time lost for want of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pressure {
    /// Some task waited, of the last 10 seconds.
    pub some: TimeShare,
    /// All tasks that could have run waited, of the last 10 seconds.
    pub full: TimeShare,
}

/// An open pressure file.
#[derive(Debug)]
pub struct PressureFile {
    file: File,
    path: PathBuf,
}

impl PressureFile {
    /// Opens one: [`HOST_MEMORY`], or `memory.pressure` of a cgroup of version 2.
    pub fn open(path: &Path) -> Result<Self, PsiError> {
        let file = File::open(path).map_err(|source| PsiError::new(path, source))?;
        let opened = Self { file, path: path.to_owned() };
        // Where it is switched off, opening succeeds and reading does not.
        opened.read().map(|_| opened)
    }

    /// The pressure now. One system call.
    pub fn read(&self) -> Result<Pressure, PsiError> {
        let mut text = [0; TEXT_MAX];
        let length = self.file.read_at(&mut text, 0).map_err(|source| PsiError::new(&self.path, source))?;
        let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
        parse(&text).ok_or_else(|| PsiError::Malformed { path: self.path.clone(), found: text.into_owned() })
    }
}

/// A descriptor that poll(2) finds ready (`PRI`) when tasks have waited for memory so long within a window.
#[derive(Debug)]
pub struct PressureTrigger(File);

impl PressureTrigger {
    /// Sets a trigger on a pressure file: some task has waited for `stall` within `window`, which is 500 ms to 10 s; without
    /// CAP_SYS_RESOURCE, a multiple of 2 s. It fires once a window at most.
    ///
    /// # Errors
    /// [`PsiError::Off`], or what the kernel says to the window.
    pub fn open(path: &Path, stall: Duration, window: Duration) -> Result<Self, PsiError> {
        let opened = File::options().read(true).write(true).open(path);
        let mut file = opened.map_err(|source| PsiError::new(path, source))?;
        // The kernel wants the terminating zero in the same write.
        let text = format!("some {} {}\0", stall.as_micros(), window.as_micros());
        file.write_all(text.as_bytes()).map_err(|source| PsiError::new(path, source))?;
        Ok(Self(file))
    }

    /// One that another process has set. `None` where the kernel says that it tells nothing: it is a pressure file without a trigger, or none
    /// at all whose other end is gone. What tells of something else cannot be told from one.
    pub fn adopt(descriptor: OwnedFd) -> Option<Self> {
        let mut polled = [PollFd::new(&descriptor, PollFlags::PRI)];
        // An event that waits is taken by this: whoever adopts it looks anyway.
        poll(&mut polled, Some(&Timespec::default())).ok()?;
        let [polled] = polled.map(|polled| polled.revents());
        let is_void = polled.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
        (!is_void).then(|| Self(descriptor.into()))
    }
}

impl From<PressureTrigger> for OwnedFd {
    fn from(trigger: PressureTrigger) -> Self {
        trigger.0.into()
    }
}

impl AsFd for PressureTrigger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl PsiError {
    fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match (source.kind(), source.raw_os_error()) {
            (io::ErrorKind::NotFound, _) | (_, Some(libc::EOPNOTSUPP)) => Self::Off(path),
            _ => Self::Other { path, source },
        }
    }
}

/// Parses `some avg10=0.12 avg60=0.00 avg300=0.00 total=34` and the same for `full`; `None` where a line is missing or
/// is none.
pub fn parse(text: &str) -> Option<Pressure> {
    let line = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" avg10="))?;
        let (whole, hundredths) = rest.split_ascii_whitespace().next()?.split_once('.')?;
        let hundredths: u32 = if hundredths.len() == 2 { hundredths.parse().ok()? } else { return None };
        whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(hundredths).map(TimeShare)
    };
    Some(Pressure { some: line("some")?, full: line("full")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_time_are_read_to_the_hundredth_of_a_percent() {
        let text = "some avg10=12.34 avg60=0.00 avg300=0.00 total=17\nfull avg10=0.07 avg60=1.00 avg300=0.00 total=5\n";
        assert_eq!(parse(text), Some(Pressure { some: TimeShare(1234), full: TimeShare(7) }));
        for bad in
            ["", "some avg10=1.00", "some avg10=x.00 \nfull avg10=0.00", "some avg10=1.0\nfull avg10=0.00"]
        {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_tells_of_no_pressure_is_not_adopted() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        drop(write);
        assert!(PressureTrigger::adopt(read).is_none(), "its other end is gone");
        let Ok(file) = File::open(HOST_MEMORY) else { return };
        assert!(PressureTrigger::adopt(file.into()).is_none(), "nobody has said what is to be told of");
        let set =
            PressureTrigger::open(HOST_MEMORY.as_ref(), Duration::from_millis(100), Duration::from_secs(2));
        if let Ok(set) = set {
            assert!(PressureTrigger::adopt(set.into()).is_some());
        }
    }

    #[test]
    fn a_file_that_is_not_there_means_that_nothing_is_measured() {
        assert!(matches!(PressureFile::open("/no/such/file".as_ref()), Err(PsiError::Off(_))));
        let other = PressureFile::open("/proc/self/statm".as_ref());
        assert!(matches!(other, Err(PsiError::Malformed { .. })), "{other:?}");
        // This machine's own, whichever way it is set.
        assert!(matches!(PressureFile::open(HOST_MEMORY.as_ref()), Ok(_) | Err(PsiError::Off(_))));
    }
}
