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
//! address, and no amount is decided by DAMON: its regions are hints which cold blocks to take first
//! ([`KernelMachine::heed`]), for the one machine whose manager was told to use it (`plimsoll attach --damon`), since a kernel has
//! one directory of monitors for all.
//!
//! Kernels with neither are common: Debian's cloud kernel 6.1 is one. Both sources are tested against what the kernel's documentation
//! says of its files; `cargo xtask idle` builds a kernel that has both and compares all sources on it, under emulation. With a
//! scattered hot set of 4,000 pages of 16,384 samples said 4,271, taken or watched, idle flags 4,009, DAMON 13,680 to 16,384 (its regions have used pages everywhere).
mod damon;

pub use damon::Damon;

use super::idle::IdleFlags;
use super::layout::Layout;
use super::{KernelError, KernelMachine};
use plimsoll_sys::pagemap::{Pagemap, PagemapError};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{PageCount, Pfn};
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::Instant;

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
        if self.has_idle_flags() { "samples watched" } else { "samples taken" }
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
/// used at its end; one that came into RAM meanwhile was. A huge page is used as a whole.
#[derive(Debug)]
pub struct IdleBitmap {
    flags: IdleFlags,
    pagemap: Pagemap,
    ranges: Vec<HvaRange>,
    /// The folios marked idle.
    marked: BTreeSet<Pfn>,
}

impl IdleBitmap {
    /// Of the memory of a process.
    ///
    /// # Errors
    /// [`SourceError::NotTracked`] where the kernel has none.
    pub fn open(process: ProcessId, layout: &Layout) -> Result<Self, SourceError> {
        Self::with(IdleFlags::open()?, process, layout)
    }

    fn with(flags: IdleFlags, process: ProcessId, layout: &Layout) -> Result<Self, SourceError> {
        let pagemap = Pagemap::open(process).map_err(SourceError::Frames)?;
        Ok(Self { flags, pagemap, ranges: layout.ranges().collect(), marked: BTreeSet::new() })
    }

    /// The folios of the pages that are in RAM now, one for each page. Those of which there is no telling are left out.
    fn folios(&self) -> Result<Vec<Pfn>, SourceError> {
        let mut heads = Vec::new();
        for range in &self.ranges {
            let frames = self.pagemap.frames(*range).map_err(SourceError::Frames)?;
            let frames: Vec<Pfn> = frames.into_iter().flatten().collect();
            heads.extend(self.flags.folios(&frames)?.into_iter().flatten().map(|folio| folio.head));
        }
        Ok(heads)
    }
}

impl Source for IdleBitmap {
    fn name(&self) -> &'static str {
        "idle flags"
    }

    fn begin(&mut self) -> Result<(), SourceError> {
        self.marked = self.folios()?.into_iter().collect();
        self.flags.mark(&self.marked)
    }

    fn end(&mut self) -> Result<Option<PageCount>, SourceError> {
        let standing = self.flags.standing(&self.marked)?;
        let used = self.folios()?.iter().filter(|head| !standing.contains(head)).count();
        Ok((!self.marked.is_empty()).then_some(PageCount(used as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::idle::tests::MadeUp;
    use super::*;
    use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
    use plimsoll_types::ByteCount;

    #[test]
    fn pages_whose_flag_is_gone_are_used_and_a_huge_page_as_a_whole() {
        let memory = AnonymousMapping::new(ByteCount::mib(1), HugePages::Never).unwrap();
        memory.populate_write(memory.range()).unwrap();
        let layout = Layout::new(vec![memory.range()]).unwrap();
        let files = MadeUp::new("bitmap");
        let mut source = IdleBitmap::with(files.open().unwrap(), ProcessId::own(), &layout).unwrap();
        match source.begin() {
            Err(SourceError::FramesHidden) => return println!("SKIPPED: {}", SourceError::FramesHidden),
            begun => begun.unwrap(),
        }
        let pages = memory.range().len().pages_floor().0;
        assert_eq!(source.marked.len() as u64, pages);
        assert_eq!(source.end().unwrap(), Some(PageCount(0)), "all flags still stand");
        let first = *source.marked.first().unwrap();
        files.use_frame(first);
        let used = source.marked.iter().filter(|frame| frame.0 / 64 == first.0 / 64).count() as u64;
        assert_eq!(source.end().unwrap(), Some(PageCount(used)));
        // Frames that follow one another are a huge page now, whose tails have no flag of their own.
        let run =
            source.marked.iter().zip(first.0..).take_while(|(frame, next)| frame.0 == *next).count() as u64;
        files.make_huge(first, run);
        source.begin().unwrap();
        assert_eq!(source.marked.len() as u64, pages - run + 1);
        files.use_frame(first);
        let neighbours = source.marked.iter().filter(|frame| frame.0 / 64 == first.0 / 64).count() as u64 - 1;
        assert_eq!(source.end().unwrap(), Some(PageCount(run + neighbours)));
    }
}
