//! Pages of the guest's memory, each of which must contain what its number and version say.
//!
//! Enters: page numbers. Leaves: words that are not what they should be. Contents are generated anew for each comparison
//! and never kept; versions lie in guest memory like the pages themselves, with proof that they are right
//! (`plimsoll_guest::versions`).
use plimsoll_guest::PageWords;
use plimsoll_guest::content::Content;
use plimsoll_guest::random::Permutation;
use plimsoll_guest::versions::PageState;
use std::hint::black_box;

/// Neighbours that are hot together.
const GROUP: u64 = 16;
/// Wrong words that are described one by one; the rest is only counted.
const DESCRIBED: u64 = 16;

/// A page at a page's address, as direct disk reads need it.
#[repr(C, align(4096))]
#[derive(Debug)]
pub(crate) struct Page(pub(crate) PageWords);

impl Page {
    /// A page of zeros.
    pub(crate) const ZERO: Self = Self([0; 512]);
}

/// Wrong words, counted, and the first of them described.
#[derive(Debug, Default)]
pub(crate) struct Wrongs {
    /// All there were.
    pub(crate) count: u64,
    /// Descriptions not told yet.
    pub(crate) untold: Vec<String>,
}

impl Wrongs {
    /// Counts one, and describes it if it is among the first.
    pub(crate) fn note(&mut self, describe: impl FnOnce() -> String) {
        if self.count < DESCRIBED {
            self.untold.push(describe());
        }
        self.count += 1;
    }

    /// Compares what was read with what it must be.
    pub(crate) fn compare(&mut self, what: &str, number: u64, found: &PageWords, expected: &PageWords) {
        // What is read is read here, not remembered from when it was written.
        let found = black_box(found);
        if found == expected {
            return;
        }
        let address = std::ptr::from_ref(found).addr();
        for (word, (found, expected)) in found.iter().zip(expected).enumerate() {
            if found != expected {
                self.note(|| {
                    let address = address + 8 * word;
                    format!("{what} number={number} address={address} word={word} found={found} expected={expected}")
                });
            }
        }
    }

    /// The state a version word stands for. A wrong one is noted, and what it alleges taken for the truth.
    pub(crate) fn decode(&mut self, what: &str, word: u64, seed: u64, number: u64) -> PageState {
        PageState::decode(word, seed, number).unwrap_or_else(|wrong| {
            let expected = wrong.expected;
            self.note(|| format!("{what}-version number={number} found={word} expected={expected}"));
            wrong.alleged
        })
    }
}

/// The pages and what is known about them.
#[derive(Debug)]
pub(crate) struct Memory {
    content: Content,
    seed: u64,
    pages: Vec<Page>,
    versions: Vec<u64>,
    /// A bit for each page touched in this window.
    touched: Vec<u64>,
    distinct: u64,
    scratch: Box<PageWords>,
}

impl Memory {
    pub(crate) fn new(content: Content, seed: u64) -> Self {
        let scratch = Box::new([0; 512]);
        Self {
            content,
            seed,
            pages: Vec::new(),
            versions: Vec::new(),
            touched: Vec::new(),
            distinct: 0,
            scratch,
        }
    }

    /// How many pages there are.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Makes room for so many pages more, which [`push`](Self::push) then writes.
    ///
    /// Versions get their memory at once. Grown together with the pages, every 2 MiB of these would have a page of versions among
    /// them; as long as that is in use, or rests in a processor's list after it was freed, there is no free block of
    /// 2 MiB, and a guest reports none smaller.
    pub(crate) fn reserve(&mut self, pages: usize) -> Result<(), String> {
        let room = self.pages.try_reserve_exact(pages).and_then(|()| self.versions.try_reserve_exact(pages));
        room.map_err(|error| format!("no room for {pages} pages: {error}"))?;
        let written = self.versions.len();
        self.versions.resize(written + pages, 0);
        black_box(&mut self.versions).truncate(written);
        Ok(())
    }

    /// Writes one page more.
    pub(crate) fn push(&mut self) {
        let index = self.pages.len();
        self.pages.push(Page::ZERO);
        self.versions.push(PageState::FIRST.encode(self.seed, index as u64));
        self.touched.resize(self.pages.len().div_ceil(64), 0);
        if let Some(page) = self.pages.get_mut(index) {
            self.content.fill(index as u64, PageState::FIRST.version(), &mut page.0);
        }
        self.touch(index);
    }

    /// Gives everything back.
    pub(crate) fn free(&mut self) {
        let (content, seed) = (self.content.clone(), self.seed);
        *self = Self::new(content, seed);
    }

    /// Reads a page and compares all of it.
    pub(crate) fn verify(&mut self, index: usize, wrongs: &mut Wrongs) {
        let (Some(page), Some(&word)) = (self.pages.get(index), self.versions.get(index)) else { return };
        let state = wrongs.decode("memory", black_box(word), self.seed, index as u64);
        self.content.fill(index as u64, state.version(), &mut self.scratch);
        wrongs.compare("memory", index as u64, &page.0, &self.scratch);
        self.touch(index);
    }

    /// Writes a page anew, in its next version.
    pub(crate) fn rewrite(&mut self, index: usize, wrongs: &mut Wrongs) {
        let (Some(page), Some(word)) = (self.pages.get_mut(index), self.versions.get_mut(index)) else {
            return;
        };
        let state = wrongs.decode("memory", black_box(*word), self.seed, index as u64).written();
        *word = state.encode(self.seed, index as u64);
        self.content.fill(index as u64, state.version(), black_box(&mut page.0));
        self.touch(index);
    }

    fn touch(&mut self, index: usize) {
        let bit = 1 << (index % 64);
        if let Some(word) = self.touched.get_mut(index / 64).filter(|word| **word & bit == 0) {
            *word |= bit;
            self.distinct += 1;
        }
    }

    /// Pages touched since this was last asked.
    pub(crate) fn close_window(&mut self) -> u64 {
        self.touched.fill(0);
        std::mem::take(&mut self.distinct)
    }

    /// Where the hot page of a rank lies: groups of neighbours, strewn over all of memory.
    pub(crate) fn hot_page(&self, rank: u64) -> usize {
        let pages = self.pages.len() as u64;
        let groups = Permutation::new(pages.div_ceil(GROUP), self.seed);
        let page = groups.apply(rank / GROUP % pages.div_ceil(GROUP).max(1)) * GROUP + rank % GROUP;
        usize::try_from(page).unwrap_or(0).min(self.pages.len().saturating_sub(1))
    }
}
