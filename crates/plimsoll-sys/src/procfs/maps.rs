//! What a process has mapped: the text of maps and smaps enters, typed mappings leave. A line that does not parse is an
//! error that shows it: skipping one could hide guest RAM.
//!
//! maps is cheap. smaps is the only place where the kernel tells a mapping's flags, and walks the page tables of the whole
//! process for it.

use super::ProcfsError;
use crate::{HvaRange, ProcessId};
use core::fmt;
use plimsoll_types::{ByteCount, Hva};

bitflags::bitflags! {
    /// What may be done with a mapping.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Access: u8 {
        /// It can be read.
        const READ = 1;
        /// It can be written.
        const WRITE = 2;
        /// It can be executed.
        const EXECUTE = 4;
        /// Writes reach the file, and everybody who maps it (`s`); without, they are private (`p`).
        const SHARED = 8;
    }

    /// The flags of a mapping that matter to whoever manages its memory. Others are ignored.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct VmFlags: u16 {
        /// Locked in memory.
        const LOCKED = 1;
        /// Huge pages of hugetlbfs.
        const HUGETLB = 1 << 1;
        /// A userfaultfd waits for missing pages.
        const UFFD_MISSING = 1 << 2;
        /// A userfaultfd waits for writes.
        const UFFD_WRITE_PROTECT = 1 << 3;
        /// A userfaultfd waits for pages that have no page-table entry.
        const UFFD_MINOR = 1 << 4;
        /// Not inherited by children.
        const DONT_FORK = 1 << 5;
        /// No swap space is reserved for it.
        const NO_RESERVE = 1 << 6;
        /// KSM may merge its pages.
        const MERGEABLE = 1 << 7;
        /// Huge pages are advised.
        const HUGE_PAGE = 1 << 8;
        /// Huge pages are advised against.
        const NO_HUGE_PAGE = 1 << 9;
        /// Device memory, or otherwise not pages that the kernel manages.
        const DEVICE = 1 << 10;
    }
}

/// The words of a VmFlags line.
const FLAG_WORDS: [(&str, VmFlags); 12] = [
    ("lo", VmFlags::LOCKED),
    ("ht", VmFlags::HUGETLB),
    ("um", VmFlags::UFFD_MISSING),
    ("uw", VmFlags::UFFD_WRITE_PROTECT),
    ("ui", VmFlags::UFFD_MINOR),
    ("dc", VmFlags::DONT_FORK),
    ("nr", VmFlags::NO_RESERVE),
    ("mg", VmFlags::MERGEABLE),
    ("hg", VmFlags::HUGE_PAGE),
    ("nh", VmFlags::NO_HUGE_PAGE),
    ("pf", VmFlags::DEVICE),
    ("io", VmFlags::DEVICE),
];

impl VmFlags {
    /// Any kind of userfaultfd.
    pub const UFFD: Self = Self::UFFD_MISSING.union(Self::UFFD_WRITE_PROTECT).union(Self::UFFD_MINOR);

    /// The flags of the words after `VmFlags:`.
    fn from_words(words: &str) -> Self {
        let known = |word| FLAG_WORDS.iter().find(|(name, _)| *name == word).map(|(_, flag)| *flag);
        words.split_ascii_whitespace().filter_map(known).collect()
    }
}

/// The device that a mapped file lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// One line of maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where it lies.
    pub range: HvaRange,
    /// What may be done with it.
    pub access: Access,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// The file's device; 0:0 for anonymous memory.
    pub device: Device,
    /// The file's inode; 0 for anonymous memory.
    pub inode: u64,
    /// The file's path as the process sees it, a name in brackets, or nothing. A removed file's ends in ` (deleted)`.
    pub path: String,
}

/// One mapping of smaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeasuredMapping {
    /// Its line of maps.
    pub mapping: Mapping,
    /// Its flags.
    pub flags: VmFlags,
    /// What of it is in memory.
    pub resident: ByteCount,
    /// What of it is in swap.
    pub swapped: ByteCount,
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path.is_empty() { "anonymous" } else { &self.path };
        write!(f, "{:#x}-{:#x} {path}", self.range.start().0, self.range.end().0)
    }
}

/// Reads /proc/PID/maps. Needs the right to ptrace the process.
pub fn maps(process: ProcessId) -> Result<Vec<Mapping>, ProcfsError> {
    parse_maps(&super::read(process, "maps")?)
}

/// Reads /proc/PID/smaps. Needs the right to ptrace the process; slow where much memory is mapped in small pages.
pub fn smaps(process: ProcessId) -> Result<Vec<MeasuredMapping>, ProcfsError> {
    parse_smaps(&super::read(process, "smaps")?)
}

/// Parses the text of a maps file.
pub fn parse_maps(text: &str) -> Result<Vec<Mapping>, ProcfsError> {
    let malformed =
        |line: &str| ProcfsError::Malformed { file: "maps", field: "a mapping", found: line.to_owned() };
    text.lines().map(|line| mapping(line).ok_or_else(|| malformed(line))).collect()
}

/// Parses the text of a smaps file: lines of maps, each followed by lines `Name: value` about it.
pub fn parse_smaps(text: &str) -> Result<Vec<MeasuredMapping>, ProcfsError> {
    let file = "smaps";
    let mut found: Vec<MeasuredMapping> = Vec::new();
    for line in text.lines() {
        // A mapping's line begins with lower-case hexadecimal digits, a field's with a capital letter.
        if !line.starts_with(|first: char| first.is_ascii_uppercase()) {
            let malformed = || ProcfsError::Malformed { file, field: "a mapping", found: line.to_owned() };
            let mapping = mapping(line).ok_or_else(malformed)?;
            let (resident, swapped) = (ByteCount(0), ByteCount(0));
            found.push(MeasuredMapping { mapping, flags: VmFlags::empty(), resident, swapped });
            continue;
        }
        let Some(last) = found.last_mut() else {
            return Err(ProcfsError::Missing { file, field: "a mapping" });
        };
        match line.split_once(':') {
            Some(("VmFlags", words)) => last.flags = VmFlags::from_words(words),
            Some(("Rss", _)) => last.resident = super::Lines { file, text: line }.kib("Rss")?,
            Some(("Swap", _)) => last.swapped = super::Lines { file, text: line }.kib("Swap")?,
            _ => {}
        }
    }
    Ok(found)
}

/// `START-END PERMS OFFSET MAJOR:MINOR INODE[ PATH]`, numbers hexadecimal but for the inode. Columns are separated by
/// one space, the path by many, and it may hold spaces itself.
fn mapping(line: &str) -> Option<Mapping> {
    let mut columns = line.splitn(6, ' ');
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let (start, end) = columns.next()?.split_once('-')?;
    let range = HvaRange::between(Hva(hex(start)?), Hva(hex(end)?))?;
    let access = access(columns.next()?)?;
    let offset = hex(columns.next()?)?;
    let (major, minor) = columns.next()?.split_once(':')?;
    let number = |digits: &str| u32::from_str_radix(digits, 16).ok();
    let device = Device { major: number(major)?, minor: number(minor)? };
    let inode = columns.next()?.parse().ok()?;
    let path = columns.next().unwrap_or("").trim_start_matches(' ').to_owned();
    Some(Mapping { range, access, offset, device, inode, path })
}

fn access(word: &str) -> Option<Access> {
    let letters: [u8; 4] = word.as_bytes().try_into().ok()?;
    let columns =
        [(b'r', Access::READ), (b'w', Access::WRITE), (b'x', Access::EXECUTE), (b's', Access::SHARED)];
    let mut access = Access::empty();
    for (letter, (meaning, flag)) in letters.into_iter().zip(columns) {
        match letter {
            letter if letter == meaning => access |= flag,
            b'-' | b'p' => {}
            _ => return None,
        }
    }
    Some(access)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QEMU: &str = "\
7f8e7fe00000-7f8e83e00000 rw-p 00000000 00:00 0 \n\
7ffa5bfff000-7ffa5ffff000 rw-s 00001000 00:01 27                         /memfd:memory-backend-memfd (deleted)\n";

    #[test]
    fn anonymous_and_shared_mappings_are_told_apart() {
        let found = parse_maps(QEMU).unwrap();
        assert_eq!(found[0].range.len(), ByteCount::mib(64));
        assert_eq!((found[0].access, found[0].inode), (Access::READ | Access::WRITE, 0));
        assert_eq!(found[1].access, Access::READ | Access::WRITE | Access::SHARED);
        assert_eq!((found[1].offset, found[1].inode), (0x1000, 27));
        assert_eq!(found[1].device, Device { major: 0, minor: 1 });
        assert_eq!(found[1].path, "/memfd:memory-backend-memfd (deleted)");
    }

    #[test]
    fn a_path_keeps_its_spaces() {
        let found = parse_maps("1000-2000 r-xp 00000000 fe:00 3  /a b  c").unwrap();
        assert_eq!(found[0].path, "/a b  c");
    }

    #[test]
    fn fields_belong_to_the_mapping_above_them() {
        let mut lines = QEMU.lines();
        let (first, second) = (lines.next().unwrap(), lines.next().unwrap());
        let text = format!(
            "{first}\nRss: 8 kB\nNew: x\nVmFlags: rd wr mr lo dc zz um \n{second}\nSwap: 4 kB\nVmFlags: sh ht \n"
        );
        let found = parse_smaps(&text).unwrap();
        assert_eq!(found[0].flags, VmFlags::LOCKED | VmFlags::DONT_FORK | VmFlags::UFFD_MISSING);
        assert_eq!((found[0].resident, found[0].swapped), (ByteCount(8 << 10), ByteCount(0)));
        assert_eq!((found[1].flags, found[1].swapped), (VmFlags::HUGETLB, ByteCount(4 << 10)));
    }

    #[test]
    fn a_line_that_is_no_mapping_is_shown() {
        for bad in [
            "",
            "x",
            "2000-1000 rw-p 0 0:0 0",
            "1000-2000 rw?p 0 0:0 0",
            "1000-2000 rw-p 0 0:0",
            "1-2 rw-p 0 00 0",
        ] {
            let error = parse_maps(&format!("{bad}\n")).unwrap_err();
            assert!(matches!(error, ProcfsError::Malformed { .. }), "{bad}: {error}");
        }
        assert!(matches!(parse_smaps("Rss: 1 kB\n"), Err(ProcfsError::Missing { .. })));
    }
}
