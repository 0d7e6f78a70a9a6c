//! A processor's caches of translations, as a model that runs.
//!
//! Enters: tables, addresses, fences. Leaves: where an access goes, which is not where the tables say if something stale is
//! left. Instructions and data have a TLB each, behind both is a shared one, and entries that name tables are kept too. What is
//! found there is used without a look at the tables; a fence drops what it must and nothing else. A TLBI or SINVAL acts at
//! once here: that its moment is open is for [`super::check()`].
use super::{Cached, Fence, Kind, Stage, Tag, Through};
use crate::address::{Input, Level, Output, Span};
use crate::entry::{Permissions, Table};
use crate::format::Format;
use crate::memory::TableMemory;
use crate::walk::{Access, Begin, End, Walked, descend_from};
use core::fmt;

/// Something that is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// What it is known by.
    pub cached: Cached,
    /// Where what it translates begins, or the next table.
    pub output: Output,
    /// The level of the entry.
    pub level: Level,
    /// What all entries up to this one permit together.
    pub permissions: Permissions,
}

impl Found {
    fn span(&self) -> Option<Span> {
        self.cached.first.or(self.cached.second)
    }

    /// Whether it translates `input` for who runs now.
    fn serves(&self, tables: &Who, input: Input) -> bool {
        let Cached { tag, root, through, global, .. } = self.cached;
        let mine = match through {
            Through::Second => root.map_or(tag.owner == tables.tag.owner, |root| Some(root) == tables.root),
            _ => tag.owner == tables.tag.owner && (global || tag.space == tables.tag.space),
        };
        let there = self.span().is_some_and(|span| span.first() <= input && input <= span.last());
        mine && there && through == tables.through
    }
}

/// A bank is not a whole number of sets, or has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnevenBank {
    /// Its slots.
    pub slots: usize,
    /// Slots of a set.
    pub ways: usize,
}

impl fmt::Display for UnevenBank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} slots are no sets of {} ways; give a multiple of the ways", self.slots, self.ways)
    }
}

impl core::error::Error for UnevenBank {}

/// One cache: sets of slots, each set used in turn. Pages of all sizes share it, each indexed by its own page number.
#[derive(Debug)]
pub struct Bank<'a> {
    slots: &'a mut [Option<Found>],
    ways: usize,
    turn: usize,
}

impl<'a> Bank<'a> {
    /// A cache in these slots, `ways` to a set.
    ///
    /// # Errors
    /// The slots are not a whole number of sets, or there are none.
    pub fn new(slots: &'a mut [Option<Found>], ways: usize) -> Result<Self, UnevenBank> {
        if ways == 0 || slots.is_empty() || !slots.len().is_multiple_of(ways) {
            return Err(UnevenBank { slots: slots.len(), ways });
        }
        Ok(Self { slots, ways, turn: 0 })
    }

    /// Everything in it.
    pub fn iter(&self) -> impl Iterator<Item = &Found> {
        self.slots.iter().flatten()
    }

    /// What serves `input` and leads furthest.
    fn find(&self, tables: &Who, input: Input) -> Option<Found> {
        self.iter().filter(|found| found.serves(tables, input)).min_by_key(|found| found.level).copied()
    }

    fn keep(&mut self, found: Found) {
        let Some(span) = found.span() else { return };
        let bytes = (span.last().0 - span.first().0).saturating_add(1);
        let sets = self.slots.len() / self.ways;
        let set = usize::try_from(span.first().0 / bytes).unwrap_or(usize::MAX) % sets;
        self.turn = (self.turn + 1) % self.ways;
        let turn = self.turn;
        let Some(set) = self.slots.get_mut(set * self.ways..(set + 1) * self.ways) else { return };
        let same = set.iter().position(|slot| slot.is_some_and(|old| old.cached == found.cached));
        let free = || set.iter().position(Option::is_none);
        let way = same.or_else(free).unwrap_or(turn);
        if let Some(slot) = set.get_mut(way) {
            *slot = Some(found);
        }
    }

    fn fence(&mut self, fence: &Fence) {
        for slot in self.slots.iter_mut() {
            *slot = slot.filter(|found| !fence.drops(&found.cached));
        }
    }
}

/// Who runs, and through what.
struct Who {
    tag: Tag,
    root: Option<Output>,
    through: Through,
}

/// The tables that a processor has in its registers.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a, F: Format, M> {
    /// Where they are.
    pub memory: &'a M,
    /// The root.
    pub root: Output,
    /// The processor's capabilities.
    pub caps: F::Caps,
    /// Which stage they are.
    pub stage: Stage,
    /// Who runs.
    pub tag: Tag,
}

/// A processor's caches.
#[derive(Debug)]
pub struct Tlb<'a> {
    /// For fetches.
    pub instruction: Bank<'a>,
    /// For reads and writes.
    pub data: Bank<'a>,
    /// Behind both.
    pub shared: Bank<'a>,
    /// Entries that name tables.
    pub structures: Bank<'a>,
}

impl Tlb<'_> {
    /// Drops what the fence must drop.
    pub fn fence(&mut self, fence: &Fence) {
        for bank in [&mut self.instruction, &mut self.data, &mut self.shared, &mut self.structures] {
            bank.fence(fence);
        }
    }

    /// Where `input` goes: by what is cached, else by the tables from the deepest entry on that is cached. What is read is
    /// kept. Rights are shown, not judged, and no marks are set.
    ///
    /// # Errors
    /// The walk ends at an absent or malformed entry, or the memory fails.
    pub fn translate<F: Format, M: TableMemory>(
        &mut self,
        tables: &Tables<'_, F, M>,
        input: Input,
        access: Access,
    ) -> Result<(Output, Permissions), End<M::Error>> {
        let (through, root) = match tables.stage {
            Stage::First => (Through::First, None),
            Stage::Second => (Through::Second, Some(tables.root)),
        };
        let who = Who { tag: tables.tag, root, through };
        let own = if access == Access::Fetch { &mut self.instruction } else { &mut self.data };
        let leaf = match own.find(&who, input).or_else(|| self.shared.find(&who, input)) {
            Some(leaf) => leaf,
            None => walk(&mut self.structures, tables, &who, input)?,
        };
        own.keep(leaf);
        self.shared.keep(leaf);
        let begin = leaf.span().map_or(input, Span::first);
        Ok((Output(leaf.output.0 + (input.0 - begin.0)), leaf.permissions))
    }
}

fn walk<F: Format, M: TableMemory>(
    structures: &mut Bank<'_>,
    tables: &Tables<'_, F, M>,
    who: &Who,
    input: Input,
) -> Result<Found, End<M::Error>> {
    let mut begin = Begin::at(tables.root, F::root(), Permissions::all());
    let mut global = false;
    if let Some(found) = structures.find(who, input) {
        let level = found.level.below().unwrap_or(Level::PAGES);
        begin = Begin::at(found.output, level, found.permissions);
        global = found.cached.global;
    }
    let known_by = |kind, shift: u32, global| {
        let span = Span::new(F::extend(F::offset(input) >> shift << shift), 1 << shift);
        let (first, second) = match who.through {
            Through::Second => (None, span),
            Through::First | Through::Both => (span, None),
        };
        let Who { tag, root, through } = *who;
        Cached { through, kind, tag, root, global, first, second }
    };
    let walked = descend_from::<F, M>(
        tables.memory,
        begin,
        &tables.caps,
        input,
        |level, table: &Table, permissions| {
            global |= table.global;
            if table.skips > 0 {
                return; // what it leads to is less than what it translates
            }
            let cached = known_by(Kind::Structure, F::shift(level), global);
            structures.keep(Found { cached, output: table.at, level, permissions });
        },
    )?;
    let Walked { leaf, level, permissions, .. } = walked;
    let cached = known_by(Kind::Leaf, leaf.shift, global || leaf.global);
    Ok(Found { cached, output: leaf.base(), level, permissions })
}
