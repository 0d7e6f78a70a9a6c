//! Ways to see how many pages a machine uses, behind one trait, so that they can be compared on the same machine.
//!
//! Enters: the beginning and the end of a period. Leaves: the pages used in it. What must never happen: one that waits for
//! the guest, or changes what it reads.
//!
//! | source | how | costs | needs |
//! |---|---|---|---|
//! | [`KernelMachine`] | pages taken at random, which of them came back | a fault for each sample used | swap |
//! | [`IdleBitmap`] | the kernel's idle flags, cleared by the accessed bits of page tables | two reads and a write for each 64 frames; no fault | CONFIG_IDLE_PAGE_TRACKING, CAP_SYS_ADMIN |
//! | [`Damon`] | regions of the address space, each by a page of it that is sampled again and again | a kernel thread, by regions and not by size; no fault | CONFIG_DAMON_VADDR and CONFIG_DAMON_SYSFS, nobody else who uses them |
//!
//! **What DAMON says is another thing.** It judges *regions*, each by one page sampled in it: used pages that lie scattered
//! make their whole region look used. By physical address, the only way kernels without CONFIG_DAMON_VADDR have, a guest would
//! be as many regions as its frames lie in runs: a guest of 64 MiB had some 10,000 runs of 16,384 frames after it was taken and
//! came back once (measured in `tests/kernel`), DAMON's default is at most 1,000 regions. So there is no source by physical
//! address, and nothing decides by DAMON.
//!
//! On the machine this was written on DAMON was somebody else's and without CONFIG_DAMON_VADDR, and there were no idle flags;
//! Debian's cloud kernel 6.1 has neither. Both sources are tested against what the kernel's documentation says of its files; on a
//! kernel that has them, `tests/kernel` compares them with the samples.
mod damon;

pub use damon::Damon;

use super::layout::Layout;
use super::{KernelError, KernelMachine};
use plimsoll_sys::pagemap::{Pagemap, PagemapError};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{PageCount, Pfn};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The kernel's file of idle flags: one bit a frame, in words of 64 in the machine's byte order.
pub const IDLE_BITMAP: &str = "/sys/kernel/mm/page_idle/bitmap";

/// A source cannot be used, or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The kernel does not have it.
    #[error("this kernel does not track idle pages: it needs CONFIG_IDLE_PAGE_TRACKING")]
    NotTracked,
    /// Frame numbers are hidden.
    #[error("the page map hides frame numbers: run with CAP_SYS_ADMIN")]
    FramesHidden,
    /// The kernel's file cannot be read or written.
    #[error("cannot use the kernel's idle flags")]
    Flags(#[source] io::Error),
    /// The page map cannot be read.
    #[error("cannot see in which frames the machine's pages are")]
    Frames(#[source] PagemapError),
    /// The kernel has no DAMON, or its files are not mounted.
    #[error("this kernel has no DAMON that can be set up in sysfs: it needs CONFIG_DAMON_SYSFS")]
    NoDamon,
    /// DAMON has an owner.
    #[error("DAMON is in use, nr_kdamonds is {monitors}: end what uses it")]
    DamonTaken {
        /// How many monitors there are.
        monitors: String,
    },
    /// DAMON monitors other things.
    #[error("this kernel's DAMON does not monitor address spaces of processes: it needs CONFIG_DAMON_VADDR")]
    NoVirtualAddresses,
    /// DAMON's files cannot be used.
    #[error("cannot use DAMON's file {path:?}")]
    Damon {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The machine cannot be sampled.
    #[error("cannot sample the machine")]
    Machine(#[source] KernelError),
}

/// A way to see how many pages a machine uses.
pub trait Source {
    /// What to call it in a report.
    fn name(&self) -> &'static str;

    /// Begins a period.
    ///
    /// # Errors
    /// When the machine is gone, or the kernel refuses.
    fn begin(&mut self) -> Result<(), SourceError>;

    /// Ends the period. `None` when nothing could be judged.
    ///
    /// # Errors
    /// As for [`begin`](Self::begin).
    fn end(&mut self) -> Result<Option<PageCount>, SourceError>;
}

/// What one period's samples say, without the averages of [`working_set`](crate::reclaimer::Reclaimer::working_set).
impl Source for KernelMachine {
    fn name(&self) -> &'static str {
        "samples taken"
    }

    fn begin(&mut self) -> Result<(), SourceError> {
        self.tick(Instant::now()).map(drop).map_err(SourceError::Machine)
    }

    fn end(&mut self) -> Result<Option<PageCount>, SourceError> {
        let tick = self.tick(Instant::now()).map_err(SourceError::Machine)?;
        let pages = self.view.layout().pages().0 * u64::from(tick.used);
        Ok(pages.checked_div(u64::from(tick.judged)).map(PageCount))
    }
}

/// The kernel's idle flags of the frames a machine's pages are in. A page that is elsewhere when the period ends was not
/// used at its end; one that came into RAM meanwhile was.
#[derive(Debug)]
pub struct IdleBitmap {
    flags: File,
    pagemap: Pagemap,
    ranges: Vec<HvaRange>,
    /// Which frames were marked idle, as words of the file.
    marked: BTreeMap<u64, u64>,
}

impl IdleBitmap {
    /// Of the memory of a process.
    ///
    /// # Errors
    /// [`SourceError::NotTracked`] where the kernel has none.
    pub fn open(process: ProcessId, layout: &Layout) -> Result<Self, SourceError> {
        Self::open_at(IDLE_BITMAP.as_ref(), process, layout)
    }

    fn open_at(path: &Path, process: ProcessId, layout: &Layout) -> Result<Self, SourceError> {
        let flags =
            OpenOptions::new().read(true).write(true).open(path).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => SourceError::NotTracked,
                _ => SourceError::Flags(source),
            })?;
        let pagemap = Pagemap::open(process).map_err(SourceError::Frames)?;
        Ok(Self { flags, pagemap, ranges: layout.ranges().collect(), marked: BTreeMap::new() })
    }

    /// The frames the machine is in now, as words of the file.
    fn frames(&self) -> Result<BTreeMap<u64, u64>, SourceError> {
        let mut words = BTreeMap::new();
        for range in &self.ranges {
            for Pfn(frame) in self.pagemap.frames(*range).map_err(SourceError::Frames)?.into_iter().flatten()
            {
                if frame == 0 {
                    return Err(SourceError::FramesHidden);
                }
                *words.entry(frame / 64).or_default() |= 1 << (frame % 64);
            }
        }
        Ok(words)
    }
}

impl Source for IdleBitmap {
    fn name(&self) -> &'static str {
        "idle flags"
    }

    fn begin(&mut self) -> Result<(), SourceError> {
        self.marked = self.frames()?;
        for (word, frames) in &self.marked {
            // Bits that are 0 change nothing: frames of others are left alone.
            self.flags.write_all_at(&frames.to_ne_bytes(), word * 8).map_err(SourceError::Flags)?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<Option<PageCount>, SourceError> {
        let mut used = 0;
        for (word, frames) in self.frames()? {
            let mut flags = [0; 8];
            self.flags.read_exact_at(&mut flags, word * 8).map_err(SourceError::Flags)?;
            let idle = u64::from_ne_bytes(flags) & self.marked.get(&word).copied().unwrap_or(0);
            used += u64::from((frames & !idle).count_ones());
        }
        Ok((!self.marked.is_empty()).then_some(PageCount(used)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
    use plimsoll_types::ByteCount;

    #[test]
    fn frames_whose_idle_flag_is_gone_are_used_and_those_of_others_are_not_touched() {
        let memory = AnonymousMapping::new(ByteCount::mib(1), HugePages::Never).unwrap();
        memory.populate_write(memory.range()).unwrap();
        let layout = Layout::new(vec![memory.range()]).unwrap();
        let path = std::env::temp_dir().join(format!("plimsoll-idle-{}", std::process::id()));
        // A file of holes as large as the kernel's would be, in which a kernel's part is played below.
        File::create(&path).unwrap().set_len(1 << 30).unwrap();
        let mut source = IdleBitmap::open_at(&path, ProcessId::own(), &layout).unwrap();
        match source.begin() {
            Err(SourceError::FramesHidden) => return println!("SKIPPED: {}", SourceError::FramesHidden),
            begun => begun.unwrap(),
        }
        let pages = memory.range().len().pages_floor().0;
        assert_eq!(source.marked.values().map(|frames| u64::from(frames.count_ones())).sum::<u64>(), pages);
        assert_eq!(source.end().unwrap(), Some(PageCount(0)), "all flags are still set");
        let (word, frames) = source.marked.iter().next().map(|(word, frames)| (*word, *frames)).unwrap();
        source.flags.write_all_at(&0_u64.to_ne_bytes(), word * 8).unwrap();
        assert_eq!(source.end().unwrap(), Some(PageCount(u64::from(frames.count_ones()))));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(
            IdleBitmap::open_at(&path, ProcessId::own(), &layout),
            Err(SourceError::NotTracked)
        ));
    }
}
