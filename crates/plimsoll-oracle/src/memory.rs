//! The memory of a case: the few words in it that matter, and zeros elsewhere, as far as there is RAM.
use crate::Chance;
use plimsoll_mmu::{Output, TableMemory};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Some of a machine's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The first.
    pub first: u64,
    /// How many bytes.
    pub bytes: u64,
}

impl Region {
    /// Eight bytes of it, aligned.
    pub fn word(self, chance: &mut Chance) -> Output {
        Output(self.first + chance.below(self.bytes / 8) * 8)
    }

    /// Whether it has the eight bytes at an address.
    pub const fn has(self, at: u64) -> bool {
        at >= self.first && at - self.first <= self.bytes - 8
    }
}

/// An address without RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside(pub Output);

/// RAM as a case sees it.
#[derive(Clone, Debug)]
pub struct Ram {
    region: Region,
    words: RefCell<BTreeMap<u64, u64>>,
}

impl Ram {
    /// RAM at these addresses, all zero.
    pub const fn new(region: Region) -> Self {
        Self { region, words: RefCell::new(BTreeMap::new()) }
    }

    /// The word at an address; zero where none was set.
    pub fn get(&self, at: Output) -> u64 {
        self.words.borrow().get(&at.0).copied().unwrap_or(0)
    }

    /// Sets a word.
    pub fn set(&self, at: Output, word: u64) {
        self.words.borrow_mut().insert(at.0, word);
    }

    /// How many words were set.
    pub(crate) fn len(&self) -> usize {
        self.words.borrow().len()
    }

    /// All words that were set, by address.
    pub fn words(&self) -> BTreeMap<u64, u64> {
        self.words.borrow().clone()
    }
}

impl TableMemory for Ram {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        if self.region.has(at.0) { Ok(self.get(at)) } else { Err(Outside(at)) }
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let found = self.read(at)?;
        if found == current {
            self.set(at, new);
        }
        Ok(found)
    }
}
