//! Which blocks hold pages that have their like elsewhere, learnt by looking at few pages.
//!
//! Enters: hashes of pages that were drawn here and looked at by the host, and how many pages of a marked block did
//! merge. Leaves: pages to look at, blocks worth marking for the kernel's samepage merging with the pages that saves at
//! least, and blocks to unmark. What must never happen: a block marked on hearsay, that is on few pages that were
//! seen twice, or while its pages change.
//!
//! **Drawing.** A round looks at the same few places of every block, in an order drawn at random. Twins that lie alike in
//! their blocks (clones, images) are so met at the first look; others once enough of both blocks has been seen. A block
//! in which one twin was seen is looked at more densely, and pages of it are looked at once more, to see whether
//! they keep still. Marked blocks are not looked at: what merged there the kernel tells. When a block has been seen whole
//! the order begins anew, so that no sample grows old.
//!
//! **Judging.** What is claimed of a block is a lower bound: the share of its samples whose like has been *seen*. It grows
//! towards the truth as more is seen. Zero pages are counted apart and are nobody's twins: they are better given back.
//!
//! **Bounds.** Memory: 20 bytes a sample, at most [`Limits::samples`] of them and one round's, and 44 bytes a block.
//! Where more pages than that exist, a hash is remembered only if its lowest bits are zero; of two twins either both
//! are remembered or neither, so thinning costs accuracy and no recall. Time: [`Limits::looks`] pages a round, and one
//! sort of all samples.
use alloc::vec::Vec;
use plimsoll_types::{BLOCK_PAGES, BlockIndex, MachineId, PageCount, PageIndex};

/// Pages of an ordinary block looked at in a round.
const LOOKS: u32 = 16;
/// Pages of a block in which a twin was seen. At twins that lie anywhere in their blocks, n pages seen of either block show
/// n * n / 512 pairs: two rounds of this give 40.
const LOOKS_SUSPECT: u32 = 64;
/// Pages of such a block that are looked at once more.
const LOOKS_AGAIN: usize = 8;
/// Twins without which a block is not marked. They are exact (64 bits of hash); the number guards the share.
const TWINS_MIN: u32 = 4;
/// At least one in so many of a block's samples must be a twin. Below that the kernel spends more on pages that do not
/// merge (6 us each for two passes, FACTS) than on those that do.
const SHARE_MIN: u32 = 8;
/// Pages seen unchanged before a block counts as steady.
const STEADY_MIN: u32 = 4;
/// One page in so many of those looked at again may have changed.
const CHANGED_MAX: u32 = 4;
/// A marked block keeps its mark while one page in so many is merged.
const MERGED_MIN: u32 = 16;
/// Rounds that a block is left alone after its mark did not pay.
const REST: u32 = 64;

/// What this may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Hashes remembered from one round to the next.
    pub samples: usize,
    /// Pages looked at in a round.
    pub looks: u32,
}

impl Default for Limits {
    /// 20 MiB at most; a round of at most 65,536 pages, which takes about a tenth of a second of one processor.
    fn default() -> Self {
        Self { samples: 1 << 20, looks: 1 << 16 }
    }
}

/// A page of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Whose.
    pub machine: MachineId,
    /// Which.
    pub page: PageIndex,
}

impl Place {
    const fn key(self) -> Key {
        (self.machine, self.page.block())
    }
}

type Key = (MachineId, BlockIndex);

/// What was seen of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It is in memory and this is its hash.
    Hash(u128),
    /// It is in memory and zero.
    Zero,
    /// It is not in memory, or not to be merged.
    Away,
}

/// A block worth marking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worth {
    /// Whose.
    pub machine: MachineId,
    /// Which.
    pub block: BlockIndex,
    /// Pages that merging saves there, at least as far as was seen. A pair saves half a page at either end.
    pub saves: PageCount,
}

/// Whether a mark stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Enough merged.
    Keep,
    /// It does not pay: to be unmarked.
    Unmark,
}

/// What was seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Pages looked at that were in memory.
    pub looks: u64,
    /// Those of them that were zero.
    pub zeros: u64,
    /// Pages looked at again that had changed.
    pub changed: u64,
    /// Hashes remembered now.
    pub samples: u64,
    /// Blocks marked now.
    pub marked: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mark {
    #[default]
    No,
    Yes,
    /// It did not pay. Rounds left before the block is looked at again.
    Resting(u32),
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    mark: Mark,
    /// How many pages of the order have been drawn.
    drawn: u32,
    /// Of the pages looked at again, lately: as they were, and changed.
    steady: u32,
    changed: u32,
    /// Samples remembered, those of them that are twins, and 1/256 pages that merging these saves.
    samples: u32,
    twins: u32,
    saves: u32,
}

impl Block {
    fn is_worth_it(&self) -> bool {
        self.mark == Mark::No
            && self.twins >= TWINS_MIN
            && self.twins * SHARE_MIN >= self.samples
            && self.steady >= STEADY_MIN
            && self.changed * CHANGED_MAX <= self.steady
    }

    fn looked_again(&mut self, is_same: bool) {
        *(if is_same { &mut self.steady } else { &mut self.changed }) += 1;
        // What counts is how it behaves now.
        if self.steady + self.changed > 64 {
            self.steady /= 2;
            self.changed /= 2;
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    place: Place,
    tag: u64,
}

const _: () = assert!(size_of::<Sample>() == 16);

/// The search for twins on one host.
#[derive(Clone, Debug)]
pub struct Twins {
    limits: Limits,
    /// The order in which pages of a block are drawn: `start + n * step` modulo the block, `step` odd.
    start: u32,
    step: u32,
    /// A hash is remembered if this many of its lowest bits are zero.
    thinning: u32,
    /// Ascending by key.
    blocks: Vec<(Key, Block)>,
    /// Ascending by place, each place once.
    samples: Vec<Sample>,
    /// What was seen in this round: a hash to remember, or none.
    fresh: Vec<(Place, Option<u64>)>,
    /// Where among the blocks the next round begins.
    hand: usize,
    seen: Seen,
}

impl Twins {
    /// Nothing is known yet. The seed makes the order of looking repeatable.
    pub fn new(limits: Limits, seed: u64) -> Self {
        let bits = |shift: u32| u32::try_from(seed >> shift & 0xffff).unwrap_or(0) % BLOCK_PAGES;
        Self {
            limits,
            start: bits(0),
            step: bits(16) | 1,
            thinning: 0,
            blocks: Vec::new(),
            samples: Vec::new(),
            fresh: Vec::new(),
            hand: 0,
            seen: Seen::default(),
        }
    }

    /// Begins to look at a machine of that many blocks, which is not there yet.
    pub fn add(&mut self, machine: MachineId, blocks: u32) {
        self.blocks.extend((0..blocks).map(|block| ((machine, BlockIndex(block)), Block::default())));
        self.blocks.sort_unstable_by_key(|(key, _)| *key);
        self.thin();
    }

    /// Forgets a machine. Blocks of others that were marked because of it keep their marks until they are judged.
    pub fn remove(&mut self, machine: MachineId) {
        self.blocks.retain(|((owner, _), _)| *owner != machine);
        self.samples.retain(|sample| sample.place.machine != machine);
        self.fresh.retain(|(place, _)| place.machine != machine);
        self.thin();
    }

    fn thin(&mut self) {
        let pages = self.blocks.len().saturating_mul(BLOCK_PAGES as usize);
        let needed = pages.div_ceil(self.limits.samples.max(1)).max(1);
        self.thinning = needed.next_power_of_two().trailing_zeros();
        self.samples.retain(|sample| is_kept(sample.tag, self.thinning));
    }

    fn block(&mut self, key: Key) -> Option<&mut Block> {
        let at = self.blocks.binary_search_by_key(&key, |(key, _)| *key).ok()?;
        self.blocks.get_mut(at).map(|(_, block)| block)
    }

    /// Draws the pages to look at in this round, ascending, replacing what was in `places`. What was seen of each is told
    /// by [`saw`](Self::saw) before [`turn`](Self::turn); of one that was not looked at nothing is.
    pub fn draw(&mut self, places: &mut Vec<Place>) {
        places.clear();
        let count = self.blocks.len();
        self.hand = if self.hand < count { self.hand } else { 0 };
        for _ in 0..count {
            let Some((key, block)) = self.blocks.get_mut(self.hand) else { break };
            let looks = match &mut block.mark {
                Mark::No if block.twins > 0 => LOOKS_SUSPECT,
                Mark::No => LOOKS,
                Mark::Resting(rounds) if *rounds > 0 => {
                    *rounds -= 1;
                    0
                }
                Mark::Resting(_) => {
                    block.mark = Mark::No;
                    LOOKS
                }
                Mark::Yes => 0,
            };
            if places.len() + looks as usize + LOOKS_AGAIN > self.limits.looks as usize {
                break;
            }
            let (machine, first) = (key.0, key.1.0 * BLOCK_PAGES);
            for _ in 0..looks {
                let page = first + (self.start + block.drawn * self.step) % BLOCK_PAGES;
                block.drawn = (block.drawn + 1) % BLOCK_PAGES;
                places.push(Place { machine, page: PageIndex(page) });
            }
            if looks == LOOKS_SUSPECT {
                let skip = block.drawn as usize;
                let known = samples_of(&self.samples, *key);
                places.extend(
                    known.iter().cycle().skip(skip).take(LOOKS_AGAIN.min(known.len())).map(|s| s.place),
                );
            }
            self.hand = (self.hand + 1) % count;
        }
        places.sort_unstable();
        places.dedup();
    }

    /// Tells what a page was when it was looked at.
    pub fn saw(&mut self, place: Place, look: Look) {
        let tag = match look {
            Look::Hash(hash) => Some(tag_of(hash)).filter(|tag| is_kept(*tag, self.thinning)),
            Look::Zero | Look::Away => None,
        };
        self.seen.looks += u64::from(look != Look::Away);
        self.seen.zeros += u64::from(look == Look::Zero);
        self.fresh.push((place, tag));
    }

    /// Ends the round: compares what was seen with all that is remembered, and returns the blocks to mark from now on,
    /// ascending. They count as marked until they are judged or [`unmark`](Self::unmark)ed.
    pub fn turn(&mut self) -> Vec<Worth> {
        self.merge();
        self.count();
        let mut worth = Vec::new();
        for ((machine, block), state) in self.blocks.iter_mut().filter(|(_, block)| block.is_worth_it()) {
            state.mark = Mark::Yes;
            let saves =
                u64::from(state.saves) * u64::from(BLOCK_PAGES) / u64::from(state.samples.max(1)) / 256;
            worth.push(Worth { machine: *machine, block: *block, saves: PageCount(saves) });
        }
        worth
    }

    /// Puts what was seen in the place of what was remembered of the same pages.
    fn merge(&mut self) {
        let mut fresh = core::mem::take(&mut self.fresh);
        // Of a page that was looked at twice the last look counts, so the sort is a stable one.
        fresh.sort_by_key(|(place, _)| *place);
        let old = core::mem::take(&mut self.samples);
        let mut merged = Vec::with_capacity(old.len() + fresh.len());
        let mut old = old.into_iter().peekable();
        let mut fresh = fresh.drain(..).peekable();
        while let Some((place, tag)) = fresh.next() {
            if fresh.peek().is_some_and(|(next, _)| *next == place) {
                continue;
            }
            while let Some(sample) = old.next_if(|sample| sample.place < place) {
                merged.push(sample);
            }
            if let Some(before) = old.next_if(|sample| sample.place == place) {
                let is_same = tag == Some(before.tag);
                self.seen.changed += u64::from(!is_same);
                if let Some(block) = self.block(place.key()) {
                    block.looked_again(is_same);
                }
            }
            merged.extend(tag.map(|tag| Sample { place, tag }));
        }
        merged.extend(old);
        self.samples = merged;
    }

    /// Counts each block's samples and twins anew.
    fn count(&mut self) {
        for (_, block) in &mut self.blocks {
            (block.samples, block.twins, block.saves) = (0, 0, 0);
        }
        let mut by_tag: Vec<u32> = (0..u32::try_from(self.samples.len()).unwrap_or(u32::MAX)).collect();
        let samples = core::mem::take(&mut self.samples);
        let tag = |index: &u32| samples.get(*index as usize).map(|sample| sample.tag);
        for of_block in samples.chunk_by(|one, next| one.place.key() == next.place.key()) {
            if let Some(block) = of_block.first().and_then(|sample| self.block(sample.place.key())) {
                block.samples = u32::try_from(of_block.len()).unwrap_or(u32::MAX);
            }
        }
        by_tag.sort_unstable_by_key(tag);
        for alike in by_tag.chunk_by(|one, next| tag(one) == tag(next)).filter(|alike| alike.len() > 1) {
            let saves = u32::try_from(256 * (alike.len() - 1) / alike.len()).unwrap_or(256);
            for sample in alike.iter().filter_map(|index| samples.get(*index as usize)) {
                if let Some(block) = self.block(sample.place.key()) {
                    block.twins += 1;
                    block.saves += saves;
                }
            }
        }
        self.samples = samples;
    }

    /// Tells how many pages of a marked block are merged, after the kernel had the time to. A block that is unmarked rests.
    pub fn judge(&mut self, machine: MachineId, block: BlockIndex, merged: PageCount) -> Verdict {
        if merged.0 * u64::from(MERGED_MIN) >= u64::from(BLOCK_PAGES) {
            return Verdict::Keep;
        }
        self.unmark(machine, block);
        Verdict::Unmark
    }

    /// The block is not marked, or not any more: its machine refused, or it did not pay.
    pub fn unmark(&mut self, machine: MachineId, block: BlockIndex) {
        let key = (machine, block);
        self.samples.retain(|sample| sample.place.key() != key);
        if let Some(block) = self.block(key) {
            *block = Block { mark: Mark::Resting(REST), drawn: block.drawn, ..Block::default() };
        }
    }

    /// The blocks that are marked, ascending.
    pub fn marked(&self) -> impl Iterator<Item = (MachineId, BlockIndex)> {
        self.blocks.iter().filter(|(_, block)| block.mark == Mark::Yes).map(|(key, _)| *key)
    }

    /// What was seen so far.
    pub fn seen(&self) -> Seen {
        Seen { samples: self.samples.len() as u64, marked: self.marked().count() as u64, ..self.seen }
    }
}

/// The half of a hash that is remembered.
fn tag_of(hash: u128) -> u64 {
    u64::try_from(hash >> 64).unwrap_or(0)
}

const fn is_kept(tag: u64, thinning: u32) -> bool {
    tag.trailing_zeros() >= thinning
}

/// What is remembered of a block.
fn samples_of(samples: &[Sample], key: Key) -> &[Sample] {
    let from = samples.partition_point(|sample| sample.place.key() < key);
    let to = samples.partition_point(|sample| sample.place.key() <= key);
    samples.get(from..to).unwrap_or_default()
}
