//! Which frames machines have, and which of them more than one has: pages with their frames enter, frames that are shared and must not
//! be leave.
//!
//! A frame may be under several pages where KSM merged them, where private mappings of a file read the file's page, which a write would
//! copy, and where they are the page of zeros. KSM's and files' pages may be shared inside of one sharing domain only. All other frames have one page. The machines go on meanwhile: a frame that one gives up and another gets
//! between two looks seems to be shared, so what seems so is looked at again, both pages one after the other and back.
use crate::census::steps;
use plimsoll_sys::HvaRange;
use plimsoll_sys::frames::{FrameError, FrameFlags, Frames};
use plimsoll_sys::pagemap::{Pagemap, PagemapError};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE, Pfn};

const PAGE: u64 = PAGE_SIZE as u64;
/// Pages of a frame that are told of, at most: a merged page can be under a million.
const TOLD_MAX: usize = 8;

/// A machine whose frames are looked at.
#[derive(Debug)]
pub struct Owner<'a> {
    /// Its page map.
    pub pagemap: &'a Pagemap,
    /// Its RAM.
    pub ranges: &'a [HvaRange],
    /// What of it is private mappings of files.
    pub files: &'a [HvaRange],
    /// The sharing domain that it is in; machines of one may share merged pages.
    pub domain: usize,
}

impl Owner<'_> {
    /// Whether a private mapping of a file lies there.
    fn is_file(&self, hva: Hva) -> bool {
        self.files.iter().any(|file| file.start() <= hva && hva < file.end())
    }
}

/// A page of a machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// Its place in the list of machines.
    pub machine: usize,
    /// Where the page lies in its process.
    pub hva: Hva,
}

/// A frame that more than one page has, and must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// The frame.
    pub frame: Pfn,
    /// Whether KSM merged it, across domains.
    pub is_merged: bool,
    /// The pages, the first few: of different machines if there are such.
    pub pages: Vec<Held>,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Frames that machines have, the page of zeros apart.
    pub frames: u64,
    /// Pages that lie in them.
    pub pages: u64,
    /// Pages that share a frame with others as they may, by KSM.
    pub merged: u64,
    /// Pages of files, mapped private and never written, that share a frame with others as they may.
    pub files: u64,
    /// What seemed to be shared, and was not any more when it was looked at again.
    pub passing: u64,
    /// Frames that are shared and must not be.
    pub violations: Vec<Shared>,
}

/// Frames cannot be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// The kernel names no frames.
    #[error("frames of memory do not show: run as root, with CAP_SYS_ADMIN")]
    NoFrames,
    /// A page map.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The frames' flags.
    #[error(transparent)]
    Frames(#[from] FrameError),
}

/// Looks at all frames of all machines. Takes 24 bytes for each page in RAM.
///
/// # Errors
/// Page maps or frames cannot be read.
pub fn audit(owners: &[Owner<'_>], frames: &Frames) -> Result<Audit, AuditError> {
    let mut held: Vec<(Pfn, Held)> = Vec::new();
    for (machine, owner) in owners.iter().enumerate() {
        for range in owner.ranges {
            collect(machine, owner.pagemap, *range, &mut held)?;
        }
    }
    held.sort_unstable();
    let mut found = Audit::default();
    for group in held.chunk_by(|one, other| one.0 == other.0) {
        let Some(&(frame, _)) = group.first() else { continue };
        if let [_] = group {
            found.frames += 1;
            found.pages += 1;
            continue;
        }
        judge(owners, frames, frame, group, &mut found)?;
    }
    Ok(found)
}

/// All pages of a range that are in RAM.
fn collect(
    machine: usize,
    pagemap: &Pagemap,
    range: HvaRange,
    held: &mut Vec<(Pfn, Held)>,
) -> Result<(), AuditError> {
    for part in steps(range) {
        for (place, frame) in (0..).zip(pagemap.frames(part)?) {
            let Some(frame) = frame else { continue };
            if frame == Pfn(0) {
                return Err(AuditError::NoFrames);
            }
            held.push((frame, Held { machine, hva: Hva(part.start().0 + place * PAGE) }));
        }
    }
    Ok(())
}

/// Several pages were seen in one frame.
fn judge(
    owners: &[Owner<'_>],
    frames: &Frames,
    frame: Pfn,
    group: &[(Pfn, Held)],
    found: &mut Audit,
) -> Result<(), AuditError> {
    let flags = frames.flags(frame)?;
    if flags.contains(FrameFlags::ZERO_PAGE) {
        return Ok(());
    }
    found.frames += 1;
    found.pages += group.len() as u64;
    let is_merged = flags.contains(FrameFlags::KSM);
    // What a private mapping has of a file is the file's page until it is written, and anonymous then.
    let is_files = !flags.contains(FrameFlags::ANONYMOUS)
        && group
            .iter()
            .all(|(_, held)| owners.get(held.machine).is_some_and(|owner| owner.is_file(held.hva)));
    let domain = |held: &Held| owners.get(held.machine).map(|owner| owner.domain);
    let Some((_, first)) = group.first() else { return Ok(()) };
    let is_foreign = |(_, other): &&(Pfn, Held)| domain(other) != domain(first);
    let other = if is_merged || is_files { group.iter().find(is_foreign) } else { group.get(1) };
    let Some((_, other)) = other else {
        let shared = if is_merged { &mut found.merged } else { &mut found.files };
        *shared += group.len() as u64;
        return Ok(());
    };
    // In this order: a frame that was given from one to the other is not found with the first again.
    let is_still = |held: &Held| -> Result<bool, AuditError> {
        let Some(owner) = owners.get(held.machine) else { return Ok(false) };
        let Some(page) = HvaRange::new(held.hva, ByteCount(PAGE)) else { return Ok(false) };
        Ok(owner.pagemap.frames(page)?.first() == Some(&Some(frame)))
    };
    if !(is_still(first)? && is_still(other)? && is_still(first)?) {
        found.passing += 1;
        return Ok(());
    }
    let mut pages = vec![*first, *other];
    let rest = group.iter().map(|(_, held)| *held).filter(|held| held != first && held != other);
    pages.extend(rest.take(TOLD_MAX - 2));
    found.violations.push(Shared { frame, is_merged, pages });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_sys::ProcessId;
    use plimsoll_sys::mapping::{AnonymousMapping, HugePages, Memfd, SharedMapping};

    fn look(ranges: &[HvaRange], domains: [usize; 2]) -> Option<Audit> {
        look_at(ranges, &[], domains)
    }

    fn look_at(ranges: &[HvaRange], files: &[HvaRange], domains: [usize; 2]) -> Option<Audit> {
        let pagemap = Pagemap::open(ProcessId::own()).unwrap();
        let owners: Vec<Owner<'_>> = ranges
            .iter()
            .zip(domains)
            .map(|(range, domain)| Owner {
                pagemap: &pagemap,
                ranges: std::slice::from_ref(range),
                files,
                domain,
            })
            .collect();
        match Frames::open().map_err(AuditError::from).and_then(|frames| audit(&owners, &frames)) {
            Ok(found) => Some(found),
            Err(error) => {
                println!("SKIPPED: {error}");
                None
            }
        }
    }

    #[test]
    fn memory_of_its_own_is_disjoint_and_the_page_of_zeros_is_nobodys() {
        let [one, other] =
            [0, 1].map(|_| AnonymousMapping::new(ByteCount(16 * PAGE), HugePages::Never).unwrap());
        for place in [0, 3, 5] {
            one.write_u64(ByteCount(place * PAGE), 1).unwrap();
            other.write_u64(ByteCount(place * PAGE), 1).unwrap();
            one.read_u64(ByteCount((place + 1) * PAGE)).unwrap();
            other.read_u64(ByteCount((place + 1) * PAGE)).unwrap();
        }
        let Some(found) = look(&[one.range(), other.range()], [0, 1]) else { return };
        assert_eq!((found.frames, found.pages, found.violations), (6, 6, Vec::new()));
    }

    #[test]
    fn a_page_that_two_have_is_a_violation_with_both_named() {
        let memfd = Memfd::create("audit", ByteCount(4 * PAGE)).unwrap();
        let [one, other] = [0, 1].map(|_| SharedMapping::new(&memfd).unwrap());
        for view in [&one, &other] {
            view.as_atomic_u64s()[512].store(7, std::sync::atomic::Ordering::Relaxed);
        }
        let ranges = [&one, &other].map(|view| HvaRange::new(view.base(), ByteCount(4 * PAGE)).unwrap());
        let Some(found) = look(&ranges, [0, 0]) else { return };
        let [violation] = found.violations.as_slice() else { panic!("{found:?}") };
        let expected = [0, 1].map(|machine| Held { machine, hva: Hva(ranges[machine].start().0 + PAGE) });
        assert_eq!((violation.pages.as_slice(), violation.is_merged), (&expected[..], false));

        // Were they private mappings of a file, which they are to the frame, it would be one across domains only.
        let Some(found) = look_at(&ranges, &ranges, [0, 0]) else { return };
        assert_eq!((found.files, found.merged, found.violations), (2, 0, Vec::new()));
        let Some(found) = look_at(&ranges, &ranges, [0, 1]) else { return };
        assert_eq!((found.files, found.violations.len()), (0, 1));
        let Some(found) = look_at(&ranges, &ranges[..1], [0, 0]) else { return };
        assert_eq!((found.files, found.violations.len()), (0, 1), "one of them is mapped shared");
    }
}
