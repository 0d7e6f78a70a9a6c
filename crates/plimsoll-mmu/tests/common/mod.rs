//! Memory for tables: words by address, up to a limit, all of which can be compared; frames for tables; numbers at random.
use plimsoll_mmu::{Level, Output, Pools, TableMemory};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// An address beyond the memory's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outside(pub(crate) Output);

/// `limit` bytes of memory, zero at first.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) words: RefCell<BTreeMap<u64, u64>>,
    limit: u64,
}

impl Ram {
    pub(crate) fn new(limit: u64) -> Self {
        Self { words: RefCell::default(), limit }
    }

    pub(crate) fn set(&self, at: u64, word: u64) {
        self.words.borrow_mut().insert(at, word);
    }

    pub(crate) fn get(&self, at: u64) -> u64 {
        self.words.borrow().get(&at).copied().unwrap_or(0)
    }

    /// All words that are not zero.
    pub(crate) fn image(&self) -> BTreeMap<u64, u64> {
        self.words.borrow().iter().filter(|(_, word)| **word != 0).map(|(at, word)| (*at, *word)).collect()
    }
}

/// `N` frames for tables of each of four levels, `step` bytes apart from `first` on.
pub(crate) fn pools<const N: usize>(first: u64, step: u64) -> Pools<N> {
    let mut pools = Pools::default();
    let mut next = first;
    for level in (1..=4).map(Level) {
        while pools.add(level, Output(next)) {
            next += step;
        }
    }
    pools
}

/// Numbers that are the same each time (xorshift64).
pub(crate) fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

impl TableMemory for Ram {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        assert_eq!(at.0 % 8, 0, "entries are aligned");
        if at.0 < self.limit { Ok(self.get(at.0)) } else { Err(Outside(at)) }
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let found = self.read(at)?;
        if found == current {
            self.set(at.0, new);
        }
        Ok(found)
    }
}
