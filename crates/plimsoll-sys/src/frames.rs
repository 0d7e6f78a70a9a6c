//! What the kernel uses a frame for: frame numbers enter, flags leave. Root only. The answer is about the frame, whoever has it by then.
//!
//! Documentation/admin-guide/mm/pagemap.rst: /proc/kpageflags has a word of 64 bits for each frame.

use plimsoll_types::Pfn;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

const PATH: &str = "/proc/kpageflags";
/// Words read per system call.
const WORDS_PER_READ: usize = 512;

bitflags::bitflags! {
    /// Flags of a frame (KPF_*). Others are ignored.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FrameFlags: u64 {
        /// Free, on the buddy allocator's lists.
        const BUDDY = 1 << 10;
        /// Anonymous memory.
        const ANONYMOUS = 1 << 12;
        /// Part of a hugetlbfs page.
        const HUGETLB = 1 << 17;
        /// There is no such frame.
        const NO_PAGE = 1 << 20;
        /// Merged by KSM.
        const KSM = 1 << 21;
        /// Part of a transparent huge page.
        const TRANSPARENT_HUGE = 1 << 22;
        /// The page of zeros, or the huge one.
        const ZERO_PAGE = 1 << 24;
    }
}

/// The flags of frames could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The file is root's.
    #[error("not permitted to read {PATH}: run as root")]
    NotPermitted,
    /// Anything else.
    #[error("reading {PATH} failed")]
    Other(#[source] io::Error),
}

/// The flags of all frames.
#[derive(Debug)]
pub struct Frames {
    file: File,
}

impl Frames {
    /// Opens them.
    pub fn open() -> Result<Self, FrameError> {
        Ok(Self { file: File::open(PATH).map_err(error)? })
    }

    /// The flags of one frame.
    pub fn flags(&self, frame: Pfn) -> Result<FrameFlags, FrameError> {
        let mut found = FrameFlags::NO_PAGE;
        self.run(frame, 1, &mut |flags| found = flags)?;
        Ok(found)
    }

    /// The flags of each of the frames, in order. Neighbours are read together.
    pub fn each(&self, frames: &[Pfn], mut report: impl FnMut(Pfn, FrameFlags)) -> Result<(), FrameError> {
        for run in frames.chunk_by(|one, next| one.0.checked_add(1) == Some(next.0)) {
            let Some(first) = run.first() else { continue };
            let mut next = run.iter();
            self.run(*first, run.len(), &mut |flags| {
                next.next().into_iter().for_each(|frame| report(*frame, flags))
            })?;
        }
        Ok(())
    }

    /// Beyond the last frame the file ends: there is no such frame.
    fn run(&self, first: Pfn, count: usize, report: &mut dyn FnMut(FrameFlags)) -> Result<(), FrameError> {
        let mut words = [0u64; WORDS_PER_READ];
        let mut done = 0;
        while done < count {
            let batch = (count - done).min(WORDS_PER_READ);
            let Some(wanted) = words.get_mut(..batch) else { break };
            let place = first.0.saturating_add(done as u64).saturating_mul(size_of::<u64>() as u64);
            let bytes = match self.file.read_at(wanted.as_mut_bytes(), place) {
                // What is asked for lies beyond the end of the file.
                Err(source) if source.kind() == io::ErrorKind::InvalidInput => 0,
                read => read.map_err(error)?,
            };
            let got = bytes / size_of::<u64>();
            wanted.iter().take(got).for_each(|bits| report(FrameFlags::from_bits_truncate(*bits)));
            if got == 0 {
                (done..count).for_each(|_| report(FrameFlags::NO_PAGE));
                break;
            }
            done += got;
        }
        Ok(())
    }
}

fn error(source: io::Error) -> FrameError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => FrameError::NotPermitted,
        _ => FrameError::Other(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ProcessId;
    use crate::mapping::{AnonymousMapping, HugePages};
    use crate::pagemap::Pagemap;
    use plimsoll_types::{ByteCount, PAGE_SIZE};

    #[test]
    fn a_written_page_is_anonymous_and_one_only_read_is_the_page_of_zeros() {
        let frames = match Frames::open() {
            Ok(frames) => frames,
            Err(error) => return println!("SKIPPED: {error}"),
        };
        let mapping = AnonymousMapping::new(ByteCount(8 * PAGE_SIZE as u64), HugePages::Never).unwrap();
        mapping.write_u64(ByteCount(0), 1).unwrap();
        mapping.read_u64(ByteCount(PAGE_SIZE as u64)).unwrap();
        let found = Pagemap::open(ProcessId::own()).unwrap().frames(mapping.range()).unwrap();
        let present: Vec<Pfn> = found.iter().copied().flatten().collect();
        if present.first() == Some(&Pfn(0)) {
            return println!("SKIPPED: no CAP_SYS_ADMIN, so frames do not show");
        }
        let mut flags = Vec::new();
        frames.each(&present, |frame, found| flags.push((frame, found))).unwrap();
        assert_eq!(flags.len(), 2);
        assert!(flags[0].1.contains(FrameFlags::ANONYMOUS), "{flags:?}");
        assert!(flags[1].1.contains(FrameFlags::ZERO_PAGE), "{flags:?}");
        assert_eq!(frames.flags(present[0]).unwrap(), flags[0].1);
        assert_eq!(frames.flags(Pfn(1 << 50)).unwrap(), FrameFlags::NO_PAGE);
        drop(mapping);
    }
}
