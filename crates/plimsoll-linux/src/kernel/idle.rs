//! The kernel's idle flags (`Documentation/admin-guide/mm/idle_page_tracking.rst`): pages enter and are marked, and which of
//! them nobody has used since leaves. What must never happen: a page that was used passes for idle.
//!
//! **One flag a folio.** The kernel keeps it at the folio's first frame, and the bits of the others mean nothing: a huge page
//! shows at its head alone, as a whole. `/proc/kpageflags` tells heads from tails.
//!
//! **What is seen again counts.** Marking a frame that the kernel does not have on its lists at this moment does nothing, and
//! the guest may use a page while it is marked. So flags are read once after marking; only those that stand are judged by.
//!
//! Known holes: flags are the whole kernel's. Somebody else who marks frames too makes pages look idle that were used before
//! that; a frame that changes its owner between the look at the page map and the mark is marked for its new one, to whom
//! that does nothing.
use super::source::SourceError;
use super::view::View;
use plimsoll_types::{PageIndex, Pfn};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// One bit a frame, in words of 64 in the machine's byte order.
const BITMAP: &str = "/sys/kernel/mm/page_idle/bitmap";
/// A word of flags a frame (`Documentation/admin-guide/mm/pagemap.rst`).
const KINDS: &str = "/proc/kpageflags";
const COMPOUND_HEAD: u64 = 1 << 15;
const COMPOUND_TAIL: u64 = 1 << 16;
const WORD: u64 = u64::BITS as u64;
/// Frames among which a folio's head is looked for. Folios lie at multiples of their size, and none that is on the kernel's
/// lists has more.
const GROUP: usize = 512;

/// Where a frame's flag is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Folio {
    pub(super) head: Pfn,
    /// It has more frames than one.
    pub(super) is_large: bool,
}

/// The kernel's files.
#[derive(Debug)]
pub(super) struct IdleFlags {
    flags: File,
    kinds: File,
}

impl IdleFlags {
    /// [`SourceError::NotTracked`] where the kernel has none.
    pub(super) fn open() -> Result<Self, SourceError> {
        Self::open_at(BITMAP.as_ref(), KINDS.as_ref())
    }

    pub(super) fn open_at(flags: &Path, kinds: &Path) -> Result<Self, SourceError> {
        let opened = OpenOptions::new().read(true).write(true).open(flags);
        let flags = opened.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SourceError::NotTracked,
            _ => SourceError::Flags(source),
        })?;
        Ok(Self { flags, kinds: File::open(kinds).map_err(SourceError::Flags)? })
    }

    /// The folio of each frame, in the frames' order; `None` where there is no telling.
    pub(super) fn folios(&self, frames: &[Pfn]) -> Result<Vec<Option<Folio>>, SourceError> {
        let mut group = (u64::MAX, [0_u64; GROUP]);
        let folio_of = |frame: &Pfn| {
            let number = frame.0 / GROUP as u64;
            let place = usize::try_from(frame.0 % GROUP as u64).unwrap_or(0);
            if *frame == Pfn(0) {
                return Err(SourceError::FramesHidden);
            }
            if group.0 != number {
                group = (number, self.kinds_of(number)?);
            }
            let until = group.1.get(..=place).unwrap_or_default();
            let kind = until.last().copied().unwrap_or(0);
            let is_tail = kind & COMPOUND_TAIL != 0;
            let head =
                if is_tail { until.iter().rposition(|kind| kind & COMPOUND_HEAD != 0) } else { Some(place) };
            Ok(head.map(|head| Folio {
                head: Pfn(number * GROUP as u64 + head as u64),
                is_large: is_tail || kind & COMPOUND_HEAD != 0,
            }))
        };
        frames.iter().map(folio_of).collect()
    }

    /// Frames past the machine's last have no kind.
    fn kinds_of(&self, group: u64) -> Result<[u64; GROUP], SourceError> {
        let mut bytes = [0_u8; GROUP * size_of::<u64>()];
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = group * (GROUP * size_of::<u64>()) as u64 + done as u64;
            match self.kinds.read_at(rest, at).map_err(SourceError::Flags)? {
                0 => break,
                more => done += more,
            }
        }
        let mut kinds = [0; GROUP];
        let (words, _) = bytes.as_chunks();
        kinds.iter_mut().zip(words).for_each(|(kind, word)| *kind = u64::from_ne_bytes(*word));
        Ok(kinds)
    }

    /// Marks folios idle. Bits that are 0 change nothing: those of others are left alone.
    ///
    /// Where memory ends within a word, the kernel says of it that nothing was written, and nothing is to be read: those few
    /// frames do not stand.
    pub(super) fn mark(&self, heads: &BTreeSet<Pfn>) -> Result<(), SourceError> {
        for (word, bits) in words(heads) {
            self.flags.write_at(&bits.to_ne_bytes(), word * 8).map_err(SourceError::Flags)?;
        }
        Ok(())
    }

    /// Those of the folios whose flag stands.
    pub(super) fn standing(&self, heads: &BTreeSet<Pfn>) -> Result<BTreeSet<Pfn>, SourceError> {
        let mut standing = BTreeSet::new();
        for (word, bits) in words(heads) {
            let mut flags = [0; 8];
            self.flags.read_at(&mut flags, word * 8).map_err(SourceError::Flags)?;
            let idle = u64::from_ne_bytes(flags) & bits;
            standing.extend((0..WORD).filter(|bit| idle >> bit & 1 == 1).map(|bit| Pfn(word * WORD + bit)));
        }
        Ok(standing)
    }
}

/// The flags of these frames, as words of the kernel's file.
fn words(frames: &BTreeSet<Pfn>) -> BTreeMap<u64, u64> {
    let mut words = BTreeMap::new();
    for Pfn(frame) in frames {
        *words.entry(frame / WORD).or_default() |= 1 << (frame % WORD);
    }
    words
}

/// Samples of one machine that stay in RAM: marked at a period's beginning, judged at its end.
#[derive(Debug)]
pub(super) struct IdleSamples {
    flags: IdleFlags,
    marked: BTreeSet<PageIndex>,
}

impl IdleSamples {
    pub(super) const fn new(flags: IdleFlags) -> Self {
        Self { flags, marked: BTreeSet::new() }
    }

    /// Marks those of the pages that can be judged by their flag alone: of a huge page there is one flag for all, so one page
    /// in use would count as 512.
    pub(super) fn mark(
        &mut self,
        view: &View,
        pages: &[PageIndex],
    ) -> Result<&BTreeSet<PageIndex>, SourceError> {
        self.marked.clear();
        let single = self.folios(view, pages)?.filter(|(_, folio)| !folio.is_large);
        let single: Vec<(PageIndex, Pfn)> = single.map(|(page, folio)| (page, folio.head)).collect();
        let heads: BTreeSet<Pfn> = single.iter().map(|(_, head)| *head).collect();
        self.flags.mark(&heads)?;
        let standing = self.flags.standing(&heads)?;
        self.marked =
            single.iter().filter(|(_, head)| standing.contains(head)).map(|(page, _)| *page).collect();
        Ok(&self.marked)
    }

    /// Ends the period: the pages that were marked, each with whether it was used. One that has left RAM was not.
    pub(super) fn judge(&mut self, view: &View) -> Result<BTreeMap<PageIndex, bool>, SourceError> {
        let pages: Vec<PageIndex> = std::mem::take(&mut self.marked).into_iter().collect();
        let mut judged: BTreeMap<PageIndex, bool> = pages.iter().map(|page| (*page, false)).collect();
        let folios: Vec<(PageIndex, Folio)> = self.folios(view, &pages)?.collect();
        // One that has become part of a huge page meanwhile shares a flag, which is that of all.
        let heads: BTreeSet<Pfn> = folios.iter().map(|(_, folio)| folio.head).collect();
        let standing = self.flags.standing(&heads)?;
        judged.extend(folios.iter().map(|(page, folio)| (*page, !standing.contains(&folio.head))));
        Ok(judged)
    }

    pub(super) fn forget(&mut self) {
        self.marked.clear();
    }

    /// Those of the pages that are in RAM, each with its folio.
    fn folios(
        &self,
        view: &View,
        pages: &[PageIndex],
    ) -> Result<impl Iterator<Item = (PageIndex, Folio)> + use<>, SourceError> {
        let (mut present, mut frames) = (Vec::new(), Vec::new());
        for page in pages {
            if let Some(frame) = view.frame(*page)? {
                present.push(*page);
                frames.push(frame);
            }
        }
        let folios = self.flags.folios(&frames)?;
        Ok(present.into_iter().zip(folios).filter_map(|(page, folio)| Some((page, folio?))))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::path::PathBuf;

    /// Files of holes as large as the kernel's would be, in which a test plays the kernel's part.
    pub(in crate::kernel) struct MadeUp {
        folder: PathBuf,
    }

    impl MadeUp {
        pub(in crate::kernel) fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("plimsoll-idle-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            for (file, len) in [("bitmap", 1 << 34), ("kinds", 1 << 40)] {
                File::create(folder.join(file)).unwrap().set_len(len).unwrap();
            }
            Self { folder }
        }

        pub(in crate::kernel) fn open(&self) -> Result<IdleFlags, SourceError> {
            IdleFlags::open_at(&self.folder.join("bitmap"), &self.folder.join("kinds"))
        }

        fn write(&self, file: &str, at: u64, word: u64) {
            let file = OpenOptions::new().write(true).open(self.folder.join(file)).unwrap();
            file.write_all_at(&word.to_ne_bytes(), at * 8).unwrap();
        }

        /// As the kernel does when somebody uses the frame, and 63 others.
        pub(in crate::kernel) fn use_frame(&self, frame: Pfn) {
            self.write("bitmap", frame.0 / WORD, 0);
        }

        fn end_flags_at(&self, frame: Pfn) {
            let flags = OpenOptions::new().write(true).open(self.folder.join("bitmap")).unwrap();
            flags.set_len(frame.0 / 8).unwrap();
        }

        pub(in crate::kernel) fn set_kind(&self, frame: Pfn, kind: u64) {
            self.write("kinds", frame.0, kind);
        }

        pub(in crate::kernel) fn make_huge(&self, head: Pfn, frames: u64) {
            self.set_kind(head, COMPOUND_HEAD);
            (1..frames).for_each(|tail| self.set_kind(Pfn(head.0 + tail), COMPOUND_TAIL));
        }
    }

    impl Drop for MadeUp {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    #[test]
    fn the_flag_of_a_huge_page_is_that_of_its_head_and_a_tail_without_head_has_none() {
        let files = MadeUp::new("heads");
        files.make_huge(Pfn(1024), 512);
        files.make_huge(Pfn(2048 + 64), 16);
        files.set_kind(Pfn(4096), COMPOUND_TAIL);
        let flags = files.open().unwrap();
        let frames = [1023, 1024, 1535, 1536, 2048 + 64 + 15, 2048 + 64 + 16, 4096].map(Pfn);
        let large = |head| Some(Folio { head: Pfn(head), is_large: true });
        let single = |head| Some(Folio { head: Pfn(head), is_large: false });
        assert_eq!(
            flags.folios(&frames).unwrap(),
            [single(1023), large(1024), large(1024), single(1536), large(2112), single(2128), None]
        );
        assert!(matches!(flags.folios(&[Pfn(0)]), Err(SourceError::FramesHidden)));
    }

    #[test]
    fn flags_stand_until_their_frame_is_used_and_those_of_others_are_not_touched() {
        let files = MadeUp::new("flags");
        let flags = files.open().unwrap();
        let heads: BTreeSet<Pfn> = [3, 64, 65, 1000].map(Pfn).into();
        flags.mark(&heads).unwrap();
        assert_eq!(flags.standing(&heads).unwrap(), heads);
        assert_eq!(flags.standing(&[4, 66].map(Pfn).into()).unwrap(), BTreeSet::new());
        files.use_frame(Pfn(70));
        assert_eq!(flags.standing(&heads).unwrap(), [3, 1000].map(Pfn).into());
        // As at the end of memory that ends within a word.
        files.end_flags_at(Pfn(960));
        assert_eq!(flags.standing(&heads).unwrap(), [Pfn(3)].into());
    }

    #[test]
    fn a_kernel_without_flags_is_told_from_one_that_refuses() {
        let missing = IdleFlags::open_at("/nowhere/bitmap".as_ref(), "/dev/null".as_ref());
        assert!(matches!(missing, Err(SourceError::NotTracked)));
        let refused = IdleFlags::open_at("/".as_ref(), "/dev/null".as_ref());
        assert!(matches!(refused, Err(SourceError::Flags(_))));
    }
}
