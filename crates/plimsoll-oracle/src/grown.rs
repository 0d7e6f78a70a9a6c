//! Trees that the mapper made, by changes at random.
//!
//! Enters: a root, and a way that an address could go. Leaves: the words of a history of maps, splits, protections, unmappings and merges
//! around that address, and the addresses where one of them began or ended. What must never happen: a frame that is given back with a
//! word in it, a refusal that nobody asked for, or a tree that leads elsewhere than was asked: each address is looked up in what was asked
//! of the mapper, one request after the other, before a processor walks it.
use crate::Chance;
use crate::tree::{Dress, Frames, Size, Tree};
use plimsoll_mmu::mapper::Mapper;
use plimsoll_mmu::{
    Entry, Format, Input, Invalidate, Leaf, Level, MapError, NothingCached, Output, Permissions, Span,
    TableFrames, TableMemory,
};
use std::fmt;

/// How many blocks are mapped beside that of the address, at most: entries of more than one table, where those have 512.
const BLOCKS: u64 = 300;
/// How many pages what is mapped goes on beyond the last whole block.
const PAGES: u64 = 100;
/// Changes after the first.
const CHANGES: u64 = 7;
/// Words of a tree. A 64 KiB table of Arm's has 8192; trees with several of them would leave room for no others in a batch.
const WORDS_MAX: usize = 20_000;
/// Cases of one tree.
const LOOKS: usize = 6;

/// Frames at random, as many as are asked for.
struct Supply<'a, F: Format> {
    tree: &'a Tree<'a, F>,
    frames: &'a Frames,
    chance: Chance,
}

impl<F: Format> TableFrames for Supply<'_, F> {
    fn left(&self, _: Level) -> usize {
        usize::MAX
    }

    fn take(&mut self, level: Level) -> Option<Output> {
        Some(self.frames.take(&mut self.chance, (F::entries(level) * 8).max(4096)))
    }

    fn give(&mut self, level: Level, frame: Output) {
        for at in (0..F::entries(level)).map(|index| Output(frame.0 + index * 8)) {
            assert_eq!(self.tree.ram.get(at), 0, "the table at {frame} was given back with a word at {at}");
        }
    }
}

/// Translated bits: from the first to the last.
#[derive(Clone, Copy)]
struct Range {
    first: u64,
    last: u64,
}

impl Range {
    const fn has(self, offset: u64) -> bool {
        self.first <= offset && offset <= self.last
    }

    fn span<F: Format>(self) -> Span {
        Span::new(F::extend(self.first), self.last - self.first + 1).expect("a range is not empty")
    }
}

/// A place for changes: what is mapped at first, and where.
struct Place {
    page: u64,
    /// Where the address's page begins.
    here: u64,
    mapped: Range,
    /// Where the first mapped byte goes.
    output: u64,
}

impl Place {
    /// Blocks around that of the address, with some pages more or fewer at the ends, all below one entry of the root.
    fn draw<F: Format>(chance: &mut Chance, (input, target, size): (Input, Output, Size)) -> Self {
        let (page, block) = (1 << F::PAGE_SHIFT, 1 << F::shift(size.level));
        let root = (1 << F::shift(F::root())) - 1;
        let offset = F::offset(input);
        let (here, begin, there) = (offset & !(page - 1), offset & !(block - 1), target.0 & !(block - 1));
        let most = chance.of(&[0, 1, 3, BLOCKS]) + 1;
        let before = (chance.below(most) * block).min(begin & root).min(there);
        let after = ((chance.below(most) + 1) * block).min((begin | root) - begin + 1);
        let (mut first, mut last) = (begin - before, begin + after - 1);
        if chance.percent(40) {
            let inside = if before > 0 { first + block } else { here };
            first = first.max(inside.saturating_sub(chance.below(PAGES) * page));
        }
        if chance.percent(40) {
            let inside = if after > block { last - block } else { here + page - 1 };
            last = last.min(inside + chance.below(PAGES) * page);
        }
        Self { page, here, mapped: Range { first, last }, output: there + first - begin }
    }

    /// A part of what is mapped, at the address half the time, of at most `most` bytes.
    fn part(&self, chance: &mut Chance, most: u64) -> Range {
        let Range { first, last } = self.mapped;
        let pages = (last - first + 1) / self.page;
        let any = chance.below(pages) + 1;
        let length = chance.of(&[1, 2, any, any, pages]).min(most / self.page).min(pages).max(1);
        let near = ((self.here - first) / self.page).saturating_sub(chance.below(length + 1));
        let any = chance.below(pages);
        let begin = if chance.percent(60) { near } else { any };
        let begin = begin.min(pages - length);
        Range { first: first + begin * self.page, last: first + (begin + length) * self.page - 1 }
    }
}

/// What was asked of the mapper, and done.
#[derive(Clone, Copy)]
enum Asked {
    /// To map a range, from this memory on, with these rights.
    Map(Range, u64, Permissions),
    Unmap(Range),
    Protect(Range, Permissions),
    /// What changes sizes and nothing else.
    Resize(Range),
}

impl Asked {
    const fn range(&self) -> Range {
        match self {
            Self::Map(range, ..) | Self::Unmap(range) | Self::Protect(range, _) | Self::Resize(range) => {
                *range
            }
        }
    }
}

/// Where translated bits go, and with which rights, after all that was asked.
fn meant(asked: &[Asked], offset: u64) -> Option<(u64, Permissions)> {
    asked.iter().filter(|one| one.range().has(offset)).fold(None, |found, one| match (*one, found) {
        (Asked::Map(range, output, permissions), _) => Some((output + (offset - range.first), permissions)),
        (Asked::Unmap(_), _) => None,
        (Asked::Protect(_, permissions), Some((output, _))) => Some((output, permissions)),
        (Asked::Protect(..) | Asked::Resize(_), found) => found,
    })
}

/// Whether it was done. A refusal by which nothing was changed is one of the ends that a request has; others are mistakes.
fn done<T, E: fmt::Debug>(result: Result<T, MapError<E>>) -> bool {
    match result {
        Ok(_) => true,
        Err(MapError::Mapped { .. } | MapError::Unencodable { .. }) => false,
        Err(error) => panic!("the mapper failed: {error}"),
    }
}

/// What `dress` makes of a leaf.
fn leaf<F: Format>(chance: &mut Chance, dress: &mut impl Dress<F>, target: Output, size: Size) -> Leaf {
    match dress.leaf(chance, target, size) {
        Entry::Leaf(leaf) => leaf,
        other => panic!("{other:?} is no leaf"),
    }
}

/// Maps memory around `input`, which is to go to `target` by a leaf of `size`, and changes what is mapped; sometimes there is something
/// already, by entries as others have them. Says at which addresses below the same entry of the root it is worth to look; `None` where
/// the tree became too large.
///
/// # Panics
/// The mapper fails, does something else than it was asked, or gives a frame back with a word in it.
pub fn grow<F: Format>(
    chance: &mut Chance,
    (tree, frames): (&Tree<'_, F>, &Frames),
    dress: &mut impl Dress<F>,
    (input, target, size): (Input, Output, Size),
) -> Option<Vec<Input>> {
    let place = Place::draw::<F>(chance, (input, target, size));
    let over_others = chance.percent(30);
    if over_others {
        tree.lead(chance, dress, (input, target, size));
    }
    let mut supply = Supply { tree, frames, chance: Chance::new(chance.bits()) };
    let mut caches = NothingCached;
    let mut mapper = Mapper::<F, _, _, _>::new(tree.root, tree.caps, tree.ram, &mut supply, &mut caches)
        .unwrap_or_else(|error| panic!("{error}"));
    let alone = Size::of::<F>(size.level);
    let first = leaf(chance, dress, target, alone);
    let mut asked = Vec::new();
    map(&mut mapper, &mut asked, place.mapped, Leaf { output: Output(place.output), ..first });
    for _ in 0..chance.below(CHANGES) {
        change(chance, &mut mapper, &mut asked, dress, (&place, target, alone));
        if tree.ram.len() > WORDS_MAX {
            return None;
        }
    }
    let ends = |range: Range| {
        [range.first.saturating_sub(8), range.first, range.last - 7, range.last.saturating_add(1)]
    };
    let mut edges: Vec<_> = asked.iter().flat_map(|one| ends(one.range())).map(F::extend).collect();
    edges.push(input);
    let page = F::extend(place.here | target.0 & (place.page - 1) & !7);
    let root = |input| F::index(input, F::root());
    let looks = (0..LOOKS).map(|_| if chance.percent(30) { page } else { chance.of(&edges) });
    let looks: Vec<_> = looks.filter(|look| F::accepts(*look) && root(*look) == root(input)).collect();
    for look in looks.iter().filter(|_| !over_others) {
        let found = mapper.translate(*look).unwrap_or_else(|error| panic!("{error}"));
        let found = found.map(|found| (found.output.0, found.permissions));
        assert_eq!(found, meant(&asked, F::offset(*look)), "what {look} leads to, and what was asked for");
    }
    Some(looks)
}

/// Maps a range, and takes note of it.
fn map<F: Format, M: TableMemory, P: TableFrames, I: Invalidate>(
    mapper: &mut Mapper<'_, F, M, P, I>,
    asked: &mut Vec<Asked>,
    range: Range,
    leaf: Leaf,
) {
    if done(mapper.map(range.span::<F>(), leaf)) {
        asked.push(Asked::Map(range, leaf.output.0, leaf.permissions));
    }
}

/// One change at random.
fn change<F: Format, M: TableMemory, P: TableFrames, I: Invalidate>(
    chance: &mut Chance,
    mapper: &mut Mapper<'_, F, M, P, I>,
    asked: &mut Vec<Asked>,
    dress: &mut impl Dress<F>,
    (place, target, size): (&Place, Output, Size),
) {
    let part = place.part(chance, u64::MAX);
    let new = leaf(chance, dress, target, size);
    match chance.below(6) {
        0 | 1 => {
            let to = Level(u8::try_from(chance.below(u64::from(size.level.0))).unwrap_or(0) + 1);
            // No more than makes two tables of the level.
            let part = place.part(chance, 1 << F::shift(Level(to.0 + 1)));
            done(mapper.split(part.span::<F>(), to));
            asked.push(Asked::Resize(part));
        }
        2 => {
            if done(mapper.protect(part.span::<F>(), new.permissions)) {
                asked.push(Asked::Protect(part, new.permissions));
            }
        }
        3 => {
            if done(mapper.unmap(part.span::<F>())) {
                asked.push(Asked::Unmap(part));
            }
        }
        4 => {
            // To other memory, in line or not: then all of it is pages.
            let part = place.part(chance, PAGES * place.page);
            let output = target.0 >> size.shift << size.shift;
            let output = output ^ chance.of(&[0, place.page, 1 << size.shift]);
            let offset = part.first & ((1 << size.shift) - 1);
            if done(mapper.unmap(part.span::<F>())) {
                asked.push(Asked::Unmap(part));
            }
            map(mapper, asked, part, Leaf { output: Output(output + offset), ..new });
        }
        _ => {
            done(mapper.merge(place.mapped.span::<F>()));
            asked.push(Asked::Resize(place.mapped));
        }
    }
}
