//! An allocator of guest memory whose free state the host can read, and from which the host can take.
//!
//! Enters: words shared by the guest's vCPUs and the host ([`Words`]), and which of them lie where ([`Plan`]). Leaves: pages and
//! frames of 2 MiB for the guest; frames that nobody uses, for the host. What must never happen: a page given to two owners, or
//! the host dropping memory that a guest which keeps to the protocol has in use. The idea is that of LLFree and HyperAlloc: free
//! memory is found and taken without asking the guest, so taking it costs the host one compare-and-swap and the guest nothing.
//!
//! # The words
//!
//! ```text
//! word f, of frame f                          words frames + 8 f .. frames + 8 f + 8
//!   0..16  used        pages in use, 0 to 512     bit p % 64 of word p / 64: page p of the frame is in use
//!      16  installed   it may be touched; clear: the host has its memory
//!      17  whole       in use as one piece, used is 0
//!      18  held        out of circulation: the host's for good
//! ```
//!
//! All zero is the state at the start: everything free, nothing installed. So nobody has to write the words before they are used,
//! and a machine that just started has given all its memory to the host already.
//!
//! # Protocol
//!
//! Every change of a frame's word is one compare-and-swap of all of it. Pages are counted before their bit is set and uncounted
//! after it is cleared, so a frame whose `used` is below 512 has a clear bit for everybody who was counted.
//!
//! ```text
//! allocate page   1 used + 1, unless held, whole or 512     2 if not installed: ask the host to install   3 set a clear bit
//! free page       1 clear its bit                           2 used - 1
//! allocate frame  1 whole, if used is 0, not whole or held  2 as above
//! free frame      1 clear whole
//! take (host)     1 if used is 0, not whole, not held: clear installed (softly), and set held (for good)   2 drop its memory
//! give back (host) 1 clear held
//! install (host)  1 set installed
//! ```
//!
//! The host does *take* from 1 to 2 and *install* under one lock of its own. The interleavings that matter:
//!
//! * *The guest allocates while the host takes.* Both swap the same word, so one of them fails and looks again. If the guest was
//!   first, the host sees `used` or `whole` and leaves the frame. If the host was first, the guest sees that the frame is not
//!   installed (or held, and passes on).
//! * *The guest allocates between the host's 1 and 2.* It finds the frame not installed and asks; the answer waits for the
//!   lock, so it comes after the memory was dropped. Nothing that the guest writes after it is dropped.
//! * *The host takes while the guest frees the last page.* The bit is clear before `used` becomes 0, so a frame that can be taken
//!   has no bit set, and nobody else has a page of it.
//! * *Two vCPUs allocate pages of a frame that is not installed.* Both ask; the second answer changes nothing. A vCPU that sees
//!   `installed` may be sure that the memory was dropped before.
//! * *The guest frees between its question and the answer.* An empty frame becomes installed that nobody asked for any more. It can
//!   be taken again.
//!
//! # What the host believes
//!
//! Nothing but that the frame's memory may be dropped, to this guest's own harm: the words are the guest's to write. Where frames
//! lie follows from the parameter page, which the host wrote and of which it keeps its own copy; how much memory the host won is
//! for its page map to say.
use crate::abi::{MAX_REGIONS, PAGE_SIZE, Params, WORKLOAD_GPA};

/// Pages of a frame.
pub const FRAME_PAGES: u64 = 512;
/// Bytes of a frame.
pub const FRAME_SIZE: u64 = FRAME_PAGES * PAGE_SIZE;
/// Words of a frame's bitmap.
const BITMAP_WORDS: u64 = FRAME_PAGES / 64;

const USED: u64 = 0xffff;
const INSTALLED: u64 = 1 << 16;
const WHOLE: u64 = 1 << 17;
const HELD: u64 = 1 << 18;

/// The words that guest and host share, by number. Each access is one atomic operation. Exchanges are in one order that everybody
/// agrees on; a load is only a first guess, which an exchange confirms or corrects.
pub trait Words {
    /// What a word holds.
    fn load(&mut self, word: u64) -> u64;
    /// Puts `new` in the place of `old`, if that is what the word holds; else it fails with what it holds.
    ///
    /// # Errors
    /// What the word holds instead of `old`.
    fn exchange(&mut self, word: u64, old: u64, new: u64) -> Result<(), u64>;
}

/// What a frame's word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    const fn used(self) -> u64 {
        self.0 & USED
    }

    const fn is(self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    /// Nobody uses any of it, and it is in circulation.
    pub const fn is_free(self) -> bool {
        self.used() == 0 && !self.is(WHOLE | HELD)
    }

    /// It may be touched.
    pub const fn is_installed(self) -> bool {
        self.is(INSTALLED)
    }

    const fn has_a_page(self) -> bool {
        self.used() < FRAME_PAGES && !self.is(WHOLE | HELD)
    }
}

/// Something allocated, and whether the host has to be asked before it is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// A page, counted over all frames, or a frame.
    pub number: u64,
    /// Its frame may be touched.
    pub is_installed: bool,
}

/// How the host takes a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// The guest can have it back by asking.
    Softly,
    /// Until it is given back.
    ForGood,
}

/// A frame that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Taken {
    /// It may have memory, which is to be dropped.
    Installed,
    /// The host had its memory already.
    Empty,
}

/// What was to be freed was not in use: the words have been damaged, or the caller has lost count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotInUse;

/// Where a vCPU looked last. Each vCPU has its own, so that they fill different frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor {
    frame: u64,
}

impl Cursor {
    /// A cursor that begins with this frame.
    pub const fn at(frame: u64) -> Self {
        Self { frame }
    }

    /// A cursor that begins with the frame after this one's, around, of `count`.
    #[must_use]
    pub const fn next(self, count: u64) -> Self {
        Self { frame: if self.frame + 1 < count { self.frame + 1 } else { 0 } }
    }
}

/// The allocator, as one vCPU or the host sees it.
#[derive(Debug)]
pub struct Frames<W> {
    words: W,
    count: u64,
}

impl<W: Words> Frames<W> {
    /// The allocator of `count` frames in these words.
    pub const fn new(words: W, count: u64) -> Self {
        Self { words, count }
    }

    /// What is said of a frame.
    pub fn entry(&mut self, frame: u64) -> Entry {
        Entry(self.words.load(frame))
    }

    /// Changes a frame's word as `change` says, or not at all if it gives nothing. Returns the word from before.
    fn update(&mut self, frame: u64, change: impl Fn(Entry) -> Option<u64>) -> Option<Entry> {
        if frame >= self.count {
            return None;
        }
        let mut found = self.words.load(frame);
        loop {
            let new = change(Entry(found))?;
            match self.words.exchange(frame, found, new) {
                Ok(()) => return Some(Entry(found)),
                Err(other) => found = other,
            }
        }
    }

    /// Allocates a page: in the frame of the cursor, else in one that is in use already, else in a free one.
    pub fn allocate_page(&mut self, cursor: &mut Cursor) -> Option<Claim> {
        let counted = |entry: Entry| entry.has_a_page().then_some(entry.0 + 1);
        let (frame, entry) = self
            .update(cursor.frame, counted)
            .map(|entry| (cursor.frame, entry))
            .or_else(|| self.find(cursor, |entry| if entry.is_free() { None } else { counted(entry) }))
            .or_else(|| self.find(cursor, counted))?;
        let page = self.set_a_bit(frame, entry.used());
        Some(Claim { number: frame * FRAME_PAGES + page, is_installed: entry.is_installed() })
    }

    /// Frees a page.
    ///
    /// # Errors
    /// [`NotInUse`]; nothing was changed, or the bit alone where the frame counts no page.
    pub fn free_page(&mut self, page: u64) -> Result<(), NotInUse> {
        let (frame, place) = (page / FRAME_PAGES, page % FRAME_PAGES);
        if frame >= self.count {
            return Err(NotInUse);
        }
        let (word, bit) = (self.bitmap(frame) + place / 64, 1 << (place % 64));
        let mut found = self.words.load(word);
        loop {
            if found & bit == 0 {
                return Err(NotInUse);
            }
            match self.words.exchange(word, found, found & !bit) {
                Ok(()) => break,
                Err(other) => found = other,
            }
        }
        let uncounted = |entry: Entry| (entry.used() > 0).then(|| entry.0 - 1);
        self.update(frame, uncounted).map(|_| ()).ok_or(NotInUse)
    }

    /// Allocates a frame, one that is installed if there is one near.
    pub fn allocate_frame(&mut self, cursor: &mut Cursor) -> Option<Claim> {
        let whole = |entry: Entry| entry.is_free().then_some(entry.0 | WHOLE);
        let (frame, entry) = self.find(cursor, whole)?;
        Some(Claim { number: frame, is_installed: entry.is_installed() })
    }

    /// Frees a frame.
    ///
    /// # Errors
    /// [`NotInUse`]; nothing was changed.
    pub fn free_frame(&mut self, frame: u64) -> Result<(), NotInUse> {
        let freed = |entry: Entry| entry.is(WHOLE).then_some(entry.0 & !WHOLE);
        self.update(frame, freed).map(|_| ()).ok_or(NotInUse)
    }

    /// The host takes a frame that nobody uses. `None` where there is nothing to take: it is in use or held, or, softly, the host
    /// has its memory already.
    pub fn take(&mut self, frame: u64, take: Take) -> Option<Taken> {
        let taken = |entry: Entry| match take {
            Take::Softly => (entry.is_free() && entry.is_installed()).then_some(entry.0 & !INSTALLED),
            Take::ForGood => entry.is_free().then_some(entry.0 & !INSTALLED | HELD),
        };
        let before = self.update(frame, taken)?;
        Some(if before.is_installed() { Taken::Installed } else { Taken::Empty })
    }

    /// The host gives back a frame it held.
    ///
    /// # Errors
    /// [`NotInUse`] where it is not held any more, which is the guest's doing.
    pub fn give_back(&mut self, frame: u64) -> Result<(), NotInUse> {
        let given = |entry: Entry| entry.is(HELD).then_some(entry.0 & !HELD);
        self.update(frame, given).map(|_| ()).ok_or(NotInUse)
    }

    /// The host says that a frame may be touched.
    pub fn install(&mut self, frame: u64) {
        self.update(frame, |entry| Some(entry.0 | INSTALLED));
    }

    /// The first frame from the cursor on, around, that `change` changes. The cursor stays there.
    fn find(&mut self, cursor: &mut Cursor, change: impl Fn(Entry) -> Option<u64>) -> Option<(u64, Entry)> {
        let start = cursor.frame;
        let (frame, entry) = (start..self.count)
            .chain(0..start.min(self.count))
            .find_map(|frame| Some((frame, self.update(frame, &change)?)))?;
        cursor.frame = frame;
        Some((frame, entry))
    }

    /// Sets a bit for a page that was counted, looking first where pages were set one after the other. There is one: others
    /// that were counted may take it, but each of them leaves another.
    fn set_a_bit(&mut self, frame: u64, hint: u64) -> u64 {
        let mut turn = hint / 64;
        loop {
            let word = turn % BITMAP_WORDS;
            turn += 1;
            let mut found = self.words.load(self.bitmap(frame) + word);
            while found != u64::MAX {
                let bit = u64::from(found.trailing_ones());
                match self.words.exchange(self.bitmap(frame) + word, found, found | 1 << bit) {
                    Ok(()) => return word * 64 + bit,
                    Err(other) => found = other,
                }
            }
        }
    }

    const fn bitmap(&self, frame: u64) -> u64 {
        self.count + frame * BITMAP_WORDS
    }
}

/// Where frames lie, and the tables in front of them.
///
/// The workload memory that is made of whole, aligned frames, region after region:
///
/// ```text
/// | words of the allocator | given: a word for each page | kept: a word for each page |  up to a frame's end | frame 0, 1, ..
/// ```
///
/// *given* is a stack of what the balloon has, *kept* lists what the vCPUs keep, each in its equal part. All of the tables lie in
/// the first region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Where each region's frames start, and the number of the first.
    extents: [(u64, u64); MAX_REGIONS],
    extent_count: usize,
    tables_gpa: u64,
    frames: u64,
    vcpus: u64,
}

impl Plan {
    /// The plan for these parameters, of which [`Layout::new`](crate::layout::Layout::new) has accepted the regions. `None` where
    /// there is no frame left behind the tables of the first region.
    pub fn new(params: &Params) -> Option<Self> {
        let count = usize::try_from(params.region_count).ok()?;
        let (mut extents, mut extent_count, mut blocks) = ([(0, 0); MAX_REGIONS], 0, 0);
        for region in params.regions.get(..count)? {
            let start = region.gpa.max(WORKLOAD_GPA).checked_next_multiple_of(FRAME_SIZE)?;
            let whole = region.gpa.checked_add(region.len)?.saturating_sub(start) / FRAME_SIZE;
            if whole > 0 {
                *extents.get_mut(extent_count)? = (start, blocks);
                extent_count += 1;
                blocks += whole;
            }
        }
        let tables = (1..blocks).find(|tables| table_bytes(blocks - tables) <= tables * FRAME_SIZE)?;
        let (first_gpa, _) = extents[0];
        let in_first = if extent_count > 1 { extents[1].1 } else { blocks };
        if tables > in_first {
            return None;
        }
        // Numbers count from behind the tables.
        extents[0].0 += tables * FRAME_SIZE;
        for extent in extents.iter_mut().take(extent_count).skip(1) {
            extent.1 -= tables;
        }
        let vcpus = u64::from(params.vcpus.max(1));
        Some(Self { extents, extent_count, tables_gpa: first_gpa, frames: blocks - tables, vcpus })
    }

    /// How many frames there are, at least one.
    pub const fn frames(&self) -> u64 {
        self.frames
    }

    /// How many pages they have together.
    pub const fn pages(&self) -> u64 {
        self.frames * FRAME_PAGES
    }

    /// Where a word of the allocator lies.
    pub const fn word_gpa(&self, word: u64) -> u64 {
        self.tables_gpa + word * 8
    }

    /// How many words the allocator has.
    pub const fn words(&self) -> u64 {
        self.frames * (1 + BITMAP_WORDS)
    }

    /// Where an entry of the balloon's stack lies.
    pub const fn given_gpa(&self, entry: u64) -> u64 {
        self.word_gpa(self.words() + entry)
    }

    /// Where an entry of what a vCPU keeps lies.
    pub const fn kept_gpa(&self, vcpu: u32, entry: u64) -> u64 {
        self.given_gpa(self.pages() + vcpu as u64 * self.kept_most() + entry)
    }

    /// The most entries a vCPU can keep.
    pub const fn kept_most(&self) -> u64 {
        self.pages() / self.vcpus
    }

    /// Where a frame lies, which must be below [`frames`](Self::frames).
    pub fn frame_gpa(&self, frame: u64) -> u64 {
        let mut extent = self.extents[0];
        for next in self.extents.iter().take(self.extent_count) {
            if next.1 <= frame {
                extent = *next;
            }
        }
        extent.0 + (frame - extent.1) * FRAME_SIZE
    }

    /// Where a page lies, counted over all frames.
    pub fn page_gpa(&self, page: u64) -> u64 {
        self.frame_gpa(page / FRAME_PAGES) + page % FRAME_PAGES * PAGE_SIZE
    }

    /// The frame that starts at an address, if one does.
    pub fn frame_at(&self, gpa: u64) -> Option<u64> {
        let extents = self.extents.iter().take(self.extent_count);
        let ends = extents.clone().skip(1).map(|(_, first)| *first).chain([self.frames]);
        extents.zip(ends).find_map(|((start, first), end)| {
            let offset = gpa.checked_sub(*start)?;
            let frame = first + offset / FRAME_SIZE;
            (offset.is_multiple_of(FRAME_SIZE) && frame < end).then_some(frame)
        })
    }
}

/// Bytes of the tables for so many frames.
const fn table_bytes(frames: u64) -> u64 {
    frames * (1 + BITMAP_WORDS + 2 * FRAME_PAGES) * 8
}
