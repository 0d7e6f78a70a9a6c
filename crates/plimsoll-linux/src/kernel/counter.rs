//! Counting pages of memory that may not be managed: nothing is taken, and no right to advise is needed.
use super::KernelError;
use super::layout::Layout;
use super::machine::AHEAD;
use super::view::View;
use crate::reclaimer::Usage;
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{BlockIndex, PageCount};

/// Looks at the memory of one process. Of shared memory it sees what is in RAM only: a page map does not tell which of its
/// pages are swapped.
#[derive(Debug)]
pub struct Counter {
    process: ProcessId,
    view: View,
}

impl Counter {
    /// Of these ranges of the process.
    ///
    /// # Errors
    /// [`KernelError::Permission`], [`KernelError::ProcessGone`], or [`KernelError::BadRange`].
    pub fn open(process: &Pidfd, ranges: Vec<HvaRange>) -> Result<Self, KernelError> {
        let view = View::new(Pagemap::open(process.process())?, Layout::new(ranges)?);
        // The page map was opened by number: as long as the process of the descriptor lives, the number is its own.
        match process.is_alive().map_err(KernelError::Pidfd)? {
            true => Ok(Self { process: process.process(), view }),
            false => Err(KernelError::ProcessGone(process.process())),
        }
    }

    /// Looks at these ranges from now on.
    ///
    /// # Errors
    /// [`KernelError::BadRange`]; it then goes on with those of before.
    pub fn set_ranges(&mut self, ranges: Vec<HvaRange>) -> Result<(), KernelError> {
        self.view.set_layout(Layout::new(ranges)?);
        Ok(())
    }

    /// Where the pages are now. Reads the whole page map of the ranges: about 2 ms for a GiB.
    ///
    /// # Errors
    /// [`KernelError::ProcessGone`], or when the page map cannot be read.
    pub fn usage(&mut self) -> Result<Usage, KernelError> {
        if !self.view.is_alive()? {
            return Err(KernelError::ProcessGone(self.process));
        }
        self.view.forget();
        let mut usage = Usage::default();
        for block in (0..self.view.layout().blocks()).map(BlockIndex) {
            let presence = self.view.look(block, AHEAD)?;
            usage.resident += PageCount(u64::from(presence.present.len()));
            usage.elsewhere += PageCount(u64::from((presence.swapped - presence.present).len()));
        }
        Ok(usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uffd::estate::tests::spawn;
    use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
    use plimsoll_types::{ByteCount, PAGE_SIZE};

    #[test]
    fn what_is_written_is_counted_and_only_in_the_ranges_looked_at() {
        let memory = AnonymousMapping::new(ByteCount::mib(6), HugePages::Never).unwrap();
        for page in [0, 5, 600, 1535] {
            memory.write_u64(ByteCount(page * PAGE_SIZE as u64), 1).unwrap();
        }
        let process = Pidfd::open(ProcessId::own()).unwrap();
        let mut counter = Counter::open(&process, vec![memory.range()]).unwrap();
        assert_eq!(counter.usage().unwrap(), Usage { resident: PageCount(4), elsewhere: PageCount(0) });
        let first = HvaRange::new(memory.range().start(), ByteCount(6 * PAGE_SIZE as u64)).unwrap();
        counter.set_ranges(vec![first]).unwrap();
        assert_eq!(counter.usage().unwrap().resident, PageCount(2));
        counter.set_ranges(Vec::new()).unwrap();
        assert_eq!(counter.usage().unwrap(), Usage::default());
    }

    #[test]
    fn a_process_that_has_ended_is_gone_and_not_small() {
        let mut child = spawn(std::process::Command::new("cat").stdin(std::process::Stdio::piped()));
        let process = Pidfd::open(ProcessId::new(child.id()).unwrap()).unwrap();
        let mut counter = Counter::open(&process, Vec::new()).unwrap();
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(matches!(counter.usage(), Err(KernelError::ProcessGone(_))));
        assert!(Counter::open(&process, Vec::new()).is_err());
    }
}
