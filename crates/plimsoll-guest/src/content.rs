//! What a page must contain: a pure function of the machine's seed, the page's number and its version.
//!
//! What enters are numbers, what leaves are 512 words. Nothing is stored, so nothing can be paged out,
//! dropped or mixed up together with the page it is meant to check. What must never happen: two versions of a
//! page, or two pages, with equal contents by accident, except zero and duplicate pages, whose point it is;
//! then a stale page would pass.
//!
//! The kind of a page is drawn anew from its number and version each time it is rewritten, so the shares of
//! the mix hold however long a guest runs.
use crate::machine::{PAGE_WORDS, PageWords};
use crate::random::{hash3, scale, stream};
use core::{fmt, str::FromStr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Code and text, see `build.rs`.
static CORPUS: [u64; CORPUS_BYTES.len() / 8] = words(CORPUS_BYTES);
const CORPUS_BYTES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/corpus.bin"));

/// Words of a text page that belong to it alone, one in each stretch of 64 words.
const OWN_WORDS: usize = 8;
const STRETCH: usize = PAGE_WORDS / OWN_WORDS;

const _: () = assert!(CORPUS_BYTES.len() >= 128 << 10 && CORPUS_BYTES.len().is_multiple_of(8));

/// Reads bytes as little-endian words, at compile time.
const fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    let mut rest = bytes;
    let mut index = 0;
    while let Some((word, after)) = rest.split_first_chunk()
        && index < N
    {
        words[index] = u64::from_le_bytes(*word);
        rest = after;
        index += 1;
    }
    words
}

/// The kinds of page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageKind {
    /// All zero.
    Zero,
    /// Equal to a page of the pool that all guests with the same pool seed share.
    Duplicate,
    /// Code and text, unlike every other page.
    Text,
    /// Incompressible.
    Random,
}

/// What pages contain: percent of each kind, 100 together.
///
/// ```text
///  0  zero       all zero
///  4  duplicate  from the common pool
///  8  text       compressible
/// 12  random     incompressible
/// 16  end
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Mix {
    /// All zero.
    pub zero: u32,
    /// Equal to a page of the common pool.
    pub duplicate: u32,
    /// Code and text.
    pub text: u32,
    /// Incompressible.
    pub random: u32,
}

impl Mix {
    /// The mix, if its shares are 100 percent together.
    pub fn check(self) -> Result<Self, MixError> {
        let shares = [self.zero, self.duplicate, self.text, self.random];
        let sum = shares.into_iter().fold(0u32, u32::saturating_add);
        if sum == 100 { Ok(self) } else { Err(MixError::Sum { found: sum }) }
    }
}

impl Default for Mix {
    /// 25 zero, 20 duplicate, 45 text, 10 random.
    fn default() -> Self {
        Self { zero: 25, duplicate: 20, text: 45, random: 10 }
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { zero, duplicate, text, random } = self;
        write!(f, "zero={zero},dup={duplicate},text={text},random={random}")
    }
}

impl FromStr for Mix {
    type Err = MixError;

    /// Reads `zero=25,dup=20,text=45,random=10`, in any order. A share that is not named is 0.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const NAMES: [&str; 4] = ["zero", "dup", "text", "random"];
        let mut shares = [None; 4];
        for (position, item) in (1..).zip(text.split(',')) {
            let (name, value) = item.split_once('=').ok_or(MixError::NoEqualsSign { position })?;
            let index = NAMES
                .into_iter()
                .position(|known| known == name.trim())
                .ok_or(MixError::UnknownName { position })?;
            let share: u32 = value.trim().parse().map_err(|_| MixError::NotAShare { name: NAMES[index] })?;
            if share > 100 {
                return Err(MixError::NotAShare { name: NAMES[index] });
            }
            if shares[index].replace(share).is_some() {
                return Err(MixError::Twice { name: NAMES[index] });
            }
        }
        let [zero, duplicate, text, random] = shares.map(Option::unwrap_or_default);
        Self { zero, duplicate, text, random }.check()
    }
}

/// Why a mix is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MixError {
    /// An item is not of the form `name=share`.
    NoEqualsSign {
        /// Which item, from 1.
        position: usize,
    },
    /// No kind of page has this name.
    UnknownName {
        /// Which item, from 1.
        position: usize,
    },
    /// A share is not a whole number of percent.
    NotAShare {
        /// The kind of page.
        name: &'static str,
    },
    /// A kind of page is named twice.
    Twice {
        /// The kind of page.
        name: &'static str,
    },
    /// The shares are not 100 percent together.
    Sum {
        /// What they are together.
        found: u32,
    },
}

impl fmt::Display for MixError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoEqualsSign { position } => write!(
                f,
                "item {position} of the mix has no `=`: write it like zero=25,dup=20,text=45,random=10"
            ),
            Self::UnknownName { position } => {
                write!(f, "item {position} of the mix is of no known kind: use zero, dup, text and random")
            }
            Self::NotAShare { name } => {
                write!(f, "the share of {name} pages is not a number from 0 to 100: give whole percent")
            }
            Self::Twice { name } => write!(f, "the mix names {name} pages twice: name each kind once"),
            Self::Sum { found } => {
                write!(f, "the shares of the mix are {found} percent together: make them 100")
            }
        }
    }
}

impl core::error::Error for MixError {}

/// What the pages of one machine must contain.
#[derive(Clone, Debug)]
pub struct Content {
    seed: u64,
    pool_seed: u64,
    pool_pages: u64,
    mix: Mix,
}

impl Content {
    /// Contents by these seeds and this mix. The pool has at least one page.
    pub fn new(seed: u64, pool_seed: u64, pool_pages: u64, mix: Mix) -> Result<Self, MixError> {
        Ok(Self { seed, pool_seed, pool_pages: pool_pages.max(1), mix: mix.check()? })
    }

    /// The kind of a page in this version.
    pub fn kind(&self, page: u64, version: u32) -> PageKind {
        self.kind_of_hash(self.hash(page, version))
    }

    /// Writes what a page must contain in this version. Version 0 is a page never written: zero.
    #[inline]
    pub fn fill(&self, page: u64, version: u32, words: &mut PageWords) {
        if version == 0 {
            words.fill(0);
            return;
        }
        let hash = self.hash(page, version);
        match self.kind_of_hash(hash) {
            PageKind::Zero => words.fill(0),
            PageKind::Duplicate => {
                let member = scale(stream(hash, 0), self.pool_pages);
                fill_text(hash3(self.pool_seed, member, 0), words);
            }
            PageKind::Text => fill_text(hash, words),
            PageKind::Random => {
                for (index, word) in (0..).zip(words.iter_mut()) {
                    *word = stream(hash, index);
                }
            }
        }
    }

    fn hash(&self, page: u64, version: u32) -> u64 {
        hash3(self.seed, page, u64::from(version))
    }

    fn kind_of_hash(&self, hash: u64) -> PageKind {
        let Mix { zero, duplicate, text, .. } = self.mix;
        let roll = scale(hash, 100);
        if roll < u64::from(zero) {
            PageKind::Zero
        } else if roll < u64::from(zero) + u64::from(duplicate) {
            PageKind::Duplicate
        } else if roll < u64::from(zero) + u64::from(duplicate) + u64::from(text) {
            PageKind::Text
        } else {
            PageKind::Random
        }
    }
}

/// A page cut from the corpus somewhere, with words spliced in that only this hash has.
#[inline]
fn fill_text(hash: u64, words: &mut PageWords) {
    let places = (CORPUS.len() - PAGE_WORDS + 1) as u64;
    let start = index(scale(stream(hash, 1), places));
    if let Some(cut) = CORPUS.get(start..start + PAGE_WORDS) {
        words.copy_from_slice(cut);
    }
    for (number, stretch) in (2..).zip(words.as_chunks_mut::<STRETCH>().0) {
        let own = stream(hash, number);
        stretch[index(own % STRETCH as u64)] = own;
    }
}

/// A place in an array, from a word known to be small.
#[expect(clippy::cast_possible_truncation, reason = "callers pass indices into arrays")]
const fn index(word: u64) -> usize {
    word as usize
}
