//! Guest RAM among the mappings: blocks that should be there enter, the ranges that hold them leave. Sizes have to fit
//! exactly; two places that fit are an error and not a guess: taking pages of the wrong memory would slow the VMM itself.
//!
//! madvise, mbind and mlock on a part of a block cut its mapping into neighbours, which count as one here. The other way
//! round, the kernel joins private anonymous mappings that happen to touch: Rust VMMs map the two halves of RAM around the
//! hole below 4 GiB one after the other, and often they are one mapping.

use crate::json;
use crate::rungs::Hazard;
use crate::vmm::{Backing, Block, Layout, Note};
use core::fmt;
use plimsoll_sys::HvaRange;
use plimsoll_sys::procfs::maps::{Access, Device, Mapping, MeasuredMapping, VmFlags};
use plimsoll_types::{ByteCount, Hva};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// RAM told from its looks has at least this, in whole MiB: the smallest guests have; allocators' arenas do not.
const LOOKS_MIN: ByteCount = ByteCount::mib(16);
/// The name of the block of a range that the operator gave.
pub(crate) const GIVEN: &str = "given";
/// Mappings that an error shows.
const SHOWN: usize = 6;

/// A range of guest RAM in the process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RamRange {
    /// Where it lies.
    #[serde(serialize_with = "json::range")]
    pub hva: HvaRange,
    /// The block it is of, by the VMM's name for it. A block may lie in two ranges.
    pub block: String,
    /// What is under it.
    pub backing: RamBacking,
    /// The host's NUMA node it is bound to, if the command line says so.
    pub node: Option<u32>,
    /// What of it is in memory.
    #[serde(serialize_with = "json::bytes")]
    pub resident: ByteCount,
    /// What of it is in swap.
    #[serde(serialize_with = "json::bytes")]
    pub swapped: ByteCount,
    /// What turns rungs off for this range, besides what does for the whole machine.
    pub hazards: Vec<Hazard>,
}

/// What is under a range of guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
#[non_exhaustive]
pub enum RamBacking {
    /// Private anonymous memory.
    PrivateAnonymous,
    /// Such memory, of which its pager has what is not here.
    Paged,
    /// Shared memory of the kernel's (memfd, tmpfs): it goes to swap like anonymous memory.
    SharedMemory {
        /// Its name or path.
        name: String,
    },
    /// Such memory mapped private: written pages are copies.
    PrivateMemory {
        /// Its name or path.
        name: String,
    },
    /// A file on a disk, mapped shared.
    SharedFile {
        /// Its path.
        path: String,
    },
    /// A file on a disk, mapped private: written pages are anonymous copies.
    PrivateFile {
        /// Its path.
        path: String,
    },
    /// Huge pages of hugetlbfs.
    HugeTlb {
        /// The file's path, or nothing.
        name: String,
    },
}

impl fmt::Display for RamBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PrivateAnonymous => f.write_str("private anonymous memory"),
            Self::Paged => f.write_str("memory of its pager's"),
            Self::SharedMemory { name } => write!(f, "shared memory {name}"),
            Self::PrivateMemory { name } => write!(f, "private copy of memory {name}"),
            Self::SharedFile { path } => write!(f, "file {path}"),
            Self::PrivateFile { path } => write!(f, "private copy of file {path}"),
            Self::HugeTlb { name } if name.is_empty() => f.write_str("huge pages"),
            Self::HugeTlb { name } => write!(f, "huge pages of {name}"),
        }
    }
}

/// What kind of file system a mapped file lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// In memory only, and in swap: memfd, tmpfs, shared anonymous memory.
    Memory,
    /// On a disk, or unknown.
    Disk,
}

/// Guest RAM could not be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// No mapping fits.
    #[error(
        "guest RAM was not found: looked for {wanted}, and the largest mappings that can be written are {largest}: \
         if one of them is it, name it with --range"
    )]
    NotFound {
        /// The blocks and their sizes.
        wanted: String,
        /// The largest mappings there are.
        largest: String,
    },
    /// More mappings fit than there are blocks.
    #[error("guest RAM is ambiguous: {wanted} could be any of {candidates}: name the right one with --range")]
    Ambiguous {
        /// The blocks and their sizes.
        wanted: String,
        /// The ranges that fit.
        candidates: String,
    },
    /// A range that was named cannot be guest RAM.
    #[error("{range} cannot be guest RAM: {why}; see /proc/PID/maps")]
    BadRange {
        /// The range.
        range: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Two ranges that were named share addresses.
    #[error("the ranges {first} and {second} overlap: name each address once")]
    Overlap {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
}

/// A text that is not a range of addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a range of addresses: write it as in /proc/PID/maps, 0x7f1200000000-0x7f1240000000")]
pub struct ParseRangeError(pub String);

/// Reads `0x7f12…-0x7f13…`, with `..` for `-` and with or without `0x`.
pub fn parse_range(text: &str) -> Result<HvaRange, ParseRangeError> {
    let error = || ParseRangeError(text.to_owned());
    let hex = |digits: &str| u64::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16).ok();
    let (start, end) = text.split_once("..").or_else(|| text.split_once('-')).ok_or_else(error)?;
    let (start, end) = hex(start).zip(hex(end)).ok_or_else(error)?;
    HvaRange::between(Hva(start), Hva(end)).filter(|range| !range.is_empty()).ok_or_else(error)
}

/// As [`parse_range`] reads it, and as maps writes it.
pub(crate) fn show(range: HvaRange) -> String {
    format!("{:#x}-{:#x}", range.start().0, range.end().0)
}

/// A stretch of neighbouring mappings that could be one block.
#[derive(Clone, Copy, Debug)]
struct Run<'a> {
    mappings: &'a [MeasuredMapping],
}

impl<'a> Run<'a> {
    /// The run's first mapping; a run is never empty.
    fn first(&self) -> Option<&'a MeasuredMapping> {
        self.mappings.first()
    }

    fn range(&self) -> Option<HvaRange> {
        let (first, last) = (self.mappings.first()?, self.mappings.last()?);
        HvaRange::between(first.mapping.range.start(), last.mapping.range.end())
    }

    fn len(&self) -> ByteCount {
        self.range().map(HvaRange::len).unwrap_or_default()
    }

    fn flags(&self) -> VmFlags {
        self.mappings.iter().fold(VmFlags::empty(), |all, one| all | one.flags)
    }

    fn overlaps(&self, other: HvaRange) -> bool {
        self.range().is_some_and(|own| own.overlaps(other))
    }
}

/// Where guest RAM is.
pub(crate) struct Located {
    pub(crate) ranges: Vec<RamRange>,
    pub(crate) notes: Vec<Note>,
}

/// Finds blocks among mappings.
pub(crate) struct Finder<'a> {
    mappings: &'a [MeasuredMapping],
    layout: Layout,
    kind_of: &'a dyn Fn(&Mapping) -> FileKind,
}

impl<'a> Finder<'a> {
    /// `kind_of` is asked about mappings that have a file.
    pub(crate) fn new(
        mappings: &'a [MeasuredMapping],
        layout: Layout,
        kind_of: &'a dyn Fn(&Mapping) -> FileKind,
    ) -> Self {
        Self { mappings, layout, kind_of }
    }

    /// Finds each block. Blocks that differ in nothing but their names are found together.
    pub(crate) fn locate(&self, blocks: &[Block]) -> Result<Located, RamError> {
        let mut found = Located { ranges: Vec::new(), notes: Vec::new() };
        let mut done = vec![false; blocks.len()];
        // One that grows gets all that is left.
        let growing = |place: &usize| blocks[*place].grows_to.is_some();
        let (last, first): (Vec<usize>, Vec<usize>) = (0..blocks.len()).partition(growing);
        for place in first.into_iter().chain(last) {
            if done[place] {
                continue;
            }
            let key = |block: &Block| (block.size, block.grows_to, block.at, block.backing.clone());
            let alike = |other: &Block| key(other) == key(&blocks[place]);
            let places: Vec<usize> = (place..blocks.len()).filter(|&other| alike(&blocks[other])).collect();
            places.iter().for_each(|&other| done[other] = true);
            let group: Vec<&Block> = places.iter().map(|&other| &blocks[other]).collect();
            let runs = self.runs_of(&group, &found.ranges)?;
            if group.len() > 1 && runs.len() == group.len() {
                let names: Vec<&str> = group.iter().map(|block| block.name.as_str()).collect();
                found.notes.push(Note::Interchangeable { names: names.join(", ") });
            }
            if blocks[place].size.is_none() {
                found.notes.push(Note::ByLooks);
            }
            for (place, run) in runs.into_iter().enumerate() {
                // One block for each run, or one block in several runs.
                let block = group.get(place).or(group.last()).copied();
                found.ranges.extend(block.and_then(|block| self.range(block, run)));
            }
        }
        Ok(found)
    }

    /// Checks ranges that somebody named.
    pub(crate) fn verify(&self, ranges: &[HvaRange]) -> Result<Vec<RamRange>, RamError> {
        for (place, range) in ranges.iter().enumerate() {
            if let Some(other) = ranges[place + 1..].iter().find(|other| other.overlaps(*range)) {
                return Err(RamError::Overlap { first: show(*range), second: show(*other) });
            }
        }
        ranges.iter().map(|range| self.verify_one(*range)).collect()
    }

    fn verify_one(&self, range: HvaRange) -> Result<RamRange, RamError> {
        let bad = |why| RamError::BadRange { range: show(range), why };
        if !range.start().is_page_aligned() || !range.end().is_page_aligned() {
            return Err(bad("it does not begin and end at pages of 4 KiB"));
        }
        let inside = |one: &MeasuredMapping| one.mapping.range.overlaps(range);
        let first = self.mappings.iter().position(inside).ok_or_else(|| bad("nothing is mapped there"))?;
        let count = self.mappings[first..].iter().take_while(|one| inside(one)).count();
        let run = Run { mappings: &self.mappings[first..first + count] };
        if !run.mappings.windows(2).all(|pair| are_kin(&pair[0], &pair[1])) {
            return Err(bad("it covers different kinds of mappings, or a hole"));
        }
        if !run.range().is_some_and(|mapped| mapped.contains(range)) {
            return Err(bad("only a part of it is mapped"));
        }
        if !run.first().is_some_and(is_eligible) {
            return Err(bad("it is a program, a stack or a heap, or cannot be written"));
        }
        let block = Block::unsaid(GIVEN);
        let found = self.range(&block, run).ok_or_else(|| bad("nothing is mapped there"))?;
        Ok(RamRange { hva: range, ..found })
    }

    /// The runs that hold the blocks of a group: one each, highest address first, as mmap hands them out; or, for a
    /// block that lies in pieces, all of them.
    fn runs_of(&self, group: &[&Block], taken: &[RamRange]) -> Result<Vec<Run<'a>>, RamError> {
        let Some(block) = group.first() else { return Ok(Vec::new()) };
        let is_free = |run: &Run<'_>| !taken.iter().any(|range| run.overlaps(range.hva));
        let looks = || self.by_looks().into_iter().filter(is_free).collect::<Vec<_>>();
        let Some(size) = block.size else {
            let runs = looks();
            return if runs.is_empty() { Err(self.not_found(group)) } else { Ok(runs) };
        };
        if let Some(grown) = block.grows_to.and_then(|most| adding_up(looks(), size, most)) {
            return Ok(grown);
        }
        let fits = |size| {
            let runs = self.exact(size).into_iter().filter(|run| is_free(run) && self.matches(block, run));
            self.prefer_marked(runs.collect())
        };
        let mut runs = fits(size);
        if runs.is_empty() && group.len() == 1 {
            runs = self.in_one_file(block, size).or_else(|| self.cut(size, &fits)).unwrap_or_default();
            return if runs.is_empty() { Err(self.not_found(group)) } else { Ok(runs) };
        }
        runs.reverse();
        let overlap = |pair: &[Run<'_>]| pair[1].range().is_some_and(|range| pair[0].overlaps(range));
        match runs.len() {
            count if count < group.len() => Err(self.not_found(group)),
            count if count > group.len() || runs.windows(2).any(overlap) => Err(RamError::Ambiguous {
                wanted: wanted(group),
                candidates: runs
                    .iter()
                    .filter_map(|run| run.range().map(show))
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
            _ => Ok(runs),
        }
    }

    /// All runs of exactly that size that begin and end where mappings do.
    fn exact(&self, size: ByteCount) -> Vec<Run<'a>> {
        let starting_at = |first: usize| {
            let mut len = ByteCount(0);
            for last in first..self.mappings.len() {
                let one = &self.mappings[last];
                let goes_on = last == first || are_kin(&self.mappings[last - 1], one);
                if !is_eligible(one) || !goes_on {
                    return None;
                }
                len = ByteCount(len.0.saturating_add(one.mapping.range.len().0));
                if len >= size {
                    return (len == size).then_some(Run { mappings: &self.mappings[first..=last] });
                }
            }
            None
        };
        (0..self.mappings.len()).filter_map(starting_at).collect()
    }

    /// Whether the run is what the block says to be made of.
    fn matches(&self, block: &Block, run: &Run<'_>) -> bool {
        let Some(first) = run.first() else { return false };
        if block.at.is_some_and(|at| at != first.mapping.range.start()) {
            return false;
        }
        let is_memory = || first.mapping.inode != 0 && (self.kind_of)(&first.mapping) == FileKind::Memory;
        match &block.backing {
            Backing::Unsaid => true,
            Backing::Anonymous => first.mapping.inode == 0,
            Backing::Memfd => is_memory() || first.flags.contains(VmFlags::HUGETLB),
            // QEMU makes its own file below a directory, and removes it at once.
            Backing::File(path) => Path::new(&first.mapping.path).starts_with(path),
        }
    }

    /// Those with the layout's mark, if any has it.
    fn prefer_marked(&self, runs: Vec<Run<'a>>) -> Vec<Run<'a>> {
        let is_marked = |run: &Run<'_>| run.flags().contains(self.layout.mark);
        if runs.iter().any(is_marked) { runs.into_iter().filter(is_marked).collect() } else { runs }
    }

    /// The pieces of a file in memory, if together they are the block from its beginning to its end.
    fn in_one_file(&self, block: &Block, size: ByteCount) -> Option<Vec<Run<'a>>> {
        let mut files: BTreeMap<(u32, u32, u64), Vec<Run<'a>>> = BTreeMap::new();
        for run in self.maximal().into_iter().filter(|run| self.matches(block, run)) {
            let mapping = &run.first()?.mapping;
            let Device { major, minor } = mapping.device;
            if mapping.inode != 0 {
                files.entry((major, minor, mapping.inode)).or_default().push(run);
            }
        }
        let mut whole = files.into_values().filter_map(|mut runs| {
            let offset = |run: &Run<'_>| run.first().map_or(0, |first| first.mapping.offset);
            runs.sort_by_key(offset);
            let covered = runs.iter().try_fold(0, |end, run| (offset(run) == end).then(|| end + run.len().0));
            (covered == Some(size.0)).then_some(runs)
        });
        let only = whole.next()?;
        whole.next().is_none().then_some(only)
    }

    /// The two pieces of a block that is cut at the hole below 4 GiB.
    fn cut(&self, size: ByteCount, fits: &dyn Fn(ByteCount) -> Vec<Run<'a>>) -> Option<Vec<Run<'a>>> {
        self.layout.cuts.iter().filter(|&&low| low < size).find_map(|&low| {
            let (below, above) = (fits(low), fits(size - low));
            let (&[below], &[above]) = (below.as_slice(), above.as_slice()) else { return None };
            let distinct = above.range().is_some_and(|range| !below.overlaps(range));
            distinct.then(|| vec![below, above])
        })
    }

    /// What looks like RAM: shared memory, or private memory with the layout's mark, in whole MiB.
    fn by_looks(&self) -> Vec<Run<'a>> {
        let large = |run: &Run<'_>| run.len() >= LOOKS_MIN && run.len().is_multiple_of(1 << 20);
        let runs: Vec<Run<'a>> = self.maximal().into_iter().filter(large).collect();
        let has_file = |run: &Run<'_>| run.first().is_some_and(|first| first.mapping.inode != 0);
        if runs.iter().any(has_file) {
            return runs.into_iter().filter(has_file).collect();
        }
        runs.into_iter().filter(|run| run.flags().contains(self.layout.mark)).collect()
    }

    /// The longest runs.
    fn maximal(&self) -> Vec<Run<'a>> {
        let runs = self.mappings.chunk_by(are_kin).map(|mappings| Run { mappings });
        runs.filter(|run| run.mappings.iter().all(is_eligible)).collect()
    }

    fn range(&self, block: &Block, run: Run<'_>) -> Option<RamRange> {
        let first = run.first()?;
        let backing = self.backing(&first.mapping, run.flags());
        let hazards = hazards(&backing, &run);
        let sum = |of: fn(&MeasuredMapping) -> ByteCount| run.mappings.iter().map(of).sum();
        Some(RamRange {
            hva: run.range()?,
            block: block.name.clone(),
            backing,
            node: block.node,
            resident: sum(|one| one.resident),
            swapped: sum(|one| one.swapped),
            hazards,
        })
    }

    fn backing(&self, mapping: &Mapping, flags: VmFlags) -> RamBacking {
        let name = mapping.path.clone();
        let is_shared = mapping.access.contains(Access::SHARED);
        match (mapping.inode, is_shared) {
            _ if flags.contains(VmFlags::HUGETLB) => RamBacking::HugeTlb { name },
            (0, false) => RamBacking::PrivateAnonymous,
            _ => match ((self.kind_of)(mapping), is_shared) {
                (FileKind::Memory, true) => RamBacking::SharedMemory { name },
                (FileKind::Memory, false) => RamBacking::PrivateMemory { name },
                (FileKind::Disk, true) => RamBacking::SharedFile { path: name },
                (FileKind::Disk, false) => RamBacking::PrivateFile { path: name },
            },
        }
    }

    fn not_found(&self, group: &[&Block]) -> RamError {
        let mut runs = self.maximal();
        runs.sort_by_key(|run| std::cmp::Reverse(run.len()));
        let shown = runs.iter().take(SHOWN).filter_map(|run| {
            let path = run.first().map_or("", |first| first.mapping.path.as_str());
            let text = format!(
                "{} of {}{}{path}",
                show(run.range()?),
                run.len(),
                if path.is_empty() { "" } else { " " }
            );
            Some(text)
        });
        RamError::NotFound { wanted: wanted(group), largest: shown.collect::<Vec<_>>().join(", ") }
    }
}

/// These, if together they have a size from the one to the other.
fn adding_up(runs: Vec<Run<'_>>, least: ByteCount, most: ByteCount) -> Option<Vec<Run<'_>>> {
    let size: ByteCount = runs.iter().map(Run::len).sum();
    (least <= size && size <= most && !runs.is_empty()).then_some(runs)
}

fn wanted(group: &[&Block]) -> String {
    let one = |block: &&Block| match block.size {
        Some(size) => format!("{} of {size}", block.name),
        None => format!("{} of unknown size", block.name),
    };
    group.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Memory that can be written, is not a program's, and is not one of the kernel's bracketed special places; `[anon:…]`
/// is anonymous memory with a name.
fn is_eligible(one: &MeasuredMapping) -> bool {
    let Mapping { access, path, .. } = &one.mapping;
    let is_special = path.starts_with('[') && !path.starts_with("[anon");
    access.contains(Access::READ | Access::WRITE)
        && !access.contains(Access::EXECUTE)
        && !is_special
        && !one.flags.contains(VmFlags::DEVICE)
}

/// True when the second mapping goes on where the first ends, in the same file or in anonymous memory.
fn are_kin(first: &MeasuredMapping, second: &MeasuredMapping) -> bool {
    let (a, b) = (&first.mapping, &second.mapping);
    let goes_on = a.inode == 0 || a.offset.checked_add(a.range.len().0) == Some(b.offset);
    a.range.end() == b.range.start()
        && a.access == b.access
        && (a.device, a.inode) == (b.device, b.inode)
        && a.path == b.path
        && goes_on
}

/// What a range's own nature turns off. Memory that is kept out of core dumps is like any other: libvirt asks for that
/// with every machine.
fn hazards(backing: &RamBacking, run: &Run<'_>) -> Vec<Hazard> {
    let mut hazards = Vec::new();
    if run.flags().intersects(VmFlags::UFFD) {
        hazards.push(Hazard::Userfaultfd);
    }
    let is_locked = |one: &&MeasuredMapping| one.flags.contains(VmFlags::LOCKED);
    let locked: ByteCount = run.mappings.iter().filter(is_locked).map(|one| one.mapping.range.len()).sum();
    if locked > ByteCount(0) {
        hazards.push(Hazard::Locked { locked });
    }
    match backing {
        RamBacking::HugeTlb { .. } => hazards.push(Hazard::HugeTlb),
        RamBacking::SharedFile { path } => hazards.push(Hazard::DiskFile { path: path.clone() }),
        RamBacking::SharedMemory { .. } => hazards.push(Hazard::SharedPages),
        RamBacking::PrivateAnonymous
        | RamBacking::Paged
        | RamBacking::PrivateMemory { .. }
        | RamBacking::PrivateFile { .. } => {}
    }
    hazards
}

#[cfg(test)]
mod tests;
