//! Words that lead addresses to memory, by tables that are shared as far as they are there already.
//!
//! Enters: an address, the size of the leaf that is to map it, and where it is to go. Leaves: words in [`Ram`]. All words are the
//! crate's own encoders'; damage comes later.
use crate::{Chance, Ram, Region};
use plimsoll_mmu::nested::{Purpose, SecondStage};
use plimsoll_mmu::{Access, Entry, Format, Input, Level, Output};
use std::cell::RefCell;
use std::fmt::Write;

/// Frames for tables, in no order, each taken once.
#[derive(Clone, Debug)]
pub struct Frames {
    region: Region,
    taken: RefCell<Vec<Region>>,
}

impl Frames {
    /// Frames of this region.
    pub const fn new(region: Region) -> Self {
        Self { region, taken: RefCell::new(Vec::new()) }
    }

    /// A frame of so many bytes, aligned to them.
    pub fn take(&self, chance: &mut Chance, bytes: u64) -> Output {
        let mut taken = self.taken.borrow_mut();
        loop {
            let first = self.region.first + chance.below(self.region.bytes / bytes) * bytes;
            let is_free = |other: &Region| first >= other.first + other.bytes || first + bytes <= other.first;
            if taken.iter().all(is_free) {
                taken.push(Region { first, bytes });
                return Output(first);
            }
        }
    }

    /// Where tables of a page are put.
    pub fn pages(&self) -> impl FnMut(&mut Chance) -> Output {
        |chance| self.take(chance, 4096)
    }
}

/// A guest's tables: where the guest has them, and where they are.
#[derive(Clone, Debug, Default)]
pub struct Moved {
    tables: Vec<(Output, Region, Size)>,
}

impl Moved {
    /// Adds one of so many bytes, and what size of leaf is to lead to it.
    pub fn add(&mut self, (guest, host): (Output, Output), bytes: u64, size: Size) {
        self.tables.push((guest, Region { first: host.0, bytes }, size));
    }

    /// Where the entry is that the guest has at an address, and what size of leaf leads there; `None` in none of the tables.
    pub fn find(&self, at: Output) -> Option<(Output, Size)> {
        self.tables.iter().find_map(|(guest, host, size)| {
            let offset = at.0.checked_sub(guest.0).filter(|offset| *offset < host.bytes)?;
            Some((Output(host.first + offset), *size))
        })
    }

    /// Leads `places` in the guest's tables to where they are, and the address of `last` to memory, by the second stage's `tree`;
    /// and puts the guest's words there. Says where entries are, the guest's first; `None` where two leaves are in each other's way.
    pub fn lead<S: Format>(
        &self,
        (tree, chance): (&Tree<'_, S>, &mut Chance),
        dress: &mut impl Dress<S>,
        (guest, places): (&Ram, &[Output]),
        last: (Output, Output, Size),
    ) -> Option<Vec<Output>> {
        let found = |at: &Output| self.find(*at).map(|(host, size)| (*at, host, size));
        let ways: Vec<_> = places.iter().filter_map(found).collect();
        let mut all: Vec<_> = ways.iter().map(|(_, host, _)| *host).collect();
        for (at, host, size) in ways.into_iter().chain([last]) {
            let (there, entries) = tree.lead(chance, dress, (at.as_input(), host, size))?;
            all.extend(entries);
            if there != host {
                return None;
            }
        }
        for (at, word) in guest.words() {
            tree.ram.set(self.find(Output(at))?.0, word);
        }
        Some(all)
    }
}

/// How much a leaf maps: where in the tree it is, and log2 of its bytes, which are more than its level's in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// The level.
    pub level: Level,
    /// log2 of the bytes.
    pub shift: u32,
}

impl Size {
    /// A leaf on its own.
    pub fn of<F: Format>(level: Level) -> Self {
        Self { level, shift: F::shift(level) }
    }

    /// A leaf on its own, most often a page.
    pub fn draw<F: Format>(chance: &mut Chance, caps: &F::Caps) -> Self {
        Self::of::<F>(Level(chance.of(&[1, 1, 2, F::largest_leaf(caps).0])))
    }

    /// An address whose low bits, which such a leaf leaves alone, are those of `low`.
    pub const fn join(self, high: u64, low: u64) -> u64 {
        high >> self.shift << self.shift | low & ((1 << self.shift) - 1)
    }
}

/// What the entries of a tree look like, and where its tables are.
pub trait Dress<F: Format> {
    /// An entry of `level` that names a table.
    fn table(&mut self, chance: &mut Chance, level: Level) -> Entry;
    /// An entry that leads to `target`, which is somewhere in the memory of this size that it maps.
    fn leaf(&mut self, chance: &mut Chance, target: Output, size: Size) -> Entry;
}

/// A tree whose root is there.
#[derive(Debug)]
pub struct Tree<'a, F: Format> {
    /// Where it is.
    pub ram: &'a Ram,
    /// Its root.
    pub root: Output,
    /// The processor's.
    pub caps: F::Caps,
}

impl<F: Format> Tree<'_, F> {
    /// Leads `input` to `target` by a leaf of `size`, if what is there already leads nowhere. Both have to be equal in the
    /// bits that such a leaf leaves alone. Says where it goes, and the places of the entries, from the root on; `None` where
    /// tables are there in the leaf's place.
    ///
    /// # Panics
    /// When the format refuses an entry as dressed.
    pub fn lead(
        &self,
        chance: &mut Chance,
        dress: &mut impl Dress<F>,
        (input, target, size): (Input, Output, Size),
    ) -> Option<(Output, Vec<Output>)> {
        let (mut table, mut level) = (self.root, F::root());
        let mut places = Vec::new();
        loop {
            let at = Output(table.0 | F::index(input, level) << 3);
            places.push(at);
            if self.ram.get(at) == 0 {
                if level < size.level {
                    return None;
                }
                let entry = if level == size.level {
                    dress.leaf(chance, target, size)
                } else {
                    dress.table(chance, level)
                };
                let word = F::encode(&entry, level, &self.caps);
                self.ram.set(at, word.unwrap_or_else(|error| panic!("{entry:?} at {level}: {error}")));
            }
            match F::decode(self.ram.get(at), level, &self.caps) {
                Entry::Table(next) => table = next.at,
                Entry::Leaf(leaf) => {
                    let inside = F::offset(input) & ((1 << leaf.shift) - 1);
                    return Some((Output(leaf.base().0 | inside), places));
                }
                other => panic!("{other:?} was encoded at {level}"),
            }
            level = level.below().expect("no table is below the last level");
        }
    }
}

/// An address of the format `F`, most often an ordinary one, sometimes with the first or last index at some levels.
pub fn input<F: Format>(chance: &mut Chance) -> Input {
    let mut offset = F::offset(Input(chance.bits()));
    if chance.percent(25) {
        for level in (1..=F::LEVELS).map(Level) {
            let (shift, last) = (F::shift(level), F::entries(level) - 1);
            let any = chance.below(last + 1);
            let index = chance.of(&[0, 1, last / 2, last / 2 + 1, last, any]);
            offset = offset & !(last << shift) | index << shift;
        }
    }
    F::extend(offset)
}

/// The entries on the way of an address, decoded, a line each, and where the way ends: what the leaf says, or the last entry. Tables are
/// in memory at what `host` makes of their addresses.
pub fn path<F: Format>(
    ram: &Ram,
    (root, caps): (Output, &F::Caps),
    input: Input,
    host: impl Fn(Output) -> Option<Output>,
) -> (String, Output) {
    let mut text = format!("  {input} in {}\n", F::NAME);
    let (mut table, mut level) = (root, F::root());
    loop {
        let at = Output(table.0 | F::index(input, level) << 3);
        let Some(place) = host(at) else { return (text, at) };
        let entry = F::decode(ram.get(place), level, caps);
        let _ = writeln!(text, "    {level} at {at}: {:#018x} {entry:x?}", ram.get(place));
        match (entry, level.below()) {
            (Entry::Table(next), Some(below)) => (table, level) = (next.at, below),
            (Entry::Leaf(leaf), _) => {
                let inside = F::offset(input) & ((1 << leaf.shift) - 1);
                return (text, Output(leaf.base().0 | inside));
            }
            _ => return (text, at),
        }
    }
}

/// The same through two stages: a guest's entries, in memory at what `stage` makes of their addresses, and then those of where they lead.
pub fn nested_path<F: Format, S: Format>(
    ram: &Ram,
    stage: &impl SecondStage,
    first: (Output, &F::Caps),
    second: (Output, &S::Caps),
    input: Input,
) -> String {
    let host = |at: Output| {
        let walked = stage.translate(at.as_input(), Access::Read, Purpose::GuestTable);
        walked.ok().map(|walked| walked.output)
    };
    let (own, end) = path::<F>(ram, first, input, host);
    own + &path::<S>(ram, second, end.as_input(), Some).0
}
